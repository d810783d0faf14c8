"""A Llama of transformers trained to half of its parameters on the text of any files, one device, DDP or sharded.

    python examples/language_model.py README.md docs/*.md --steps 600
    python examples/language_model.py README.md docs/*.md --strategy sharded --devices 2

Tokens are bytes, so that nothing is downloaded. Prints the perplexity on text held out of the dense model, of the dense
one truncated to the same size, and of the low-rank one; writes the latter as dense weights for
``AutoModelForCausalLM``, and as factors for ``load_low_rank``.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_svd import SVDTrainingCallback, decompose, gather_factored, save_low_rank, to_dense, to_factored

LEFT_ALONE = ["lm_head"]  # and the embeddings, which are not factorized unless they are named
LENGTH = 64


def llama(width: int, depth: int) -> LlamaForCausalLM:
    """A small one for bytes."""
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": depth}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=4 * LENGTH, **shape, **heads))


class LanguageModel(LightningModule):
    """Predicts the next byte."""

    def __init__(self, options: argparse.Namespace, svd: bool) -> None:
        super().__init__()
        self.options, self.svd = options, svd
        self.net: nn.Module | None = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        torch.manual_seed(0)  # the same weights in each process
        self.net = llama(self.options.width, self.options.depth)
        if self.options.strategy == "sharded":
            from torch.distributed.fsdp import fully_shard

            if self.svd:
                decompose(self.net, exclude_modules=LEFT_ALONE)
            mesh = self.device_mesh["data_parallel"]
            for block in self.net.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert self.net is not None
        loss: Tensor = self.net(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.options.rate, weight_decay=0.01)


def texts(files: list[Path]) -> tuple[Tensor, Tensor]:
    """Rows of bytes to train on, and a tenth that is held out."""
    joined = bytearray().join(path.read_bytes() for path in files)
    count = len(joined) // LENGTH
    if count < 20:
        raise SystemExit(f"expected at least {20 * LENGTH} bytes of text, got {len(joined)}")
    rows = torch.frombuffer(joined, dtype=torch.uint8)[: count * LENGTH].view(count, LENGTH).long()
    held_out = torch.arange(count) % 10 == 9
    return rows[~held_out], rows[held_out]


def train(options: argparse.Namespace, rows: Tensor, svd: bool) -> LlamaForCausalLM | None:
    """The model that comes out, in process 0; None in others."""
    sharded = options.strategy == "sharded"
    strategy = options.strategy
    if sharded:
        strategy = ModelParallelStrategy(options.devices, 1, save_distributed_checkpoint=False)
    asked = {"final": "decomposed"} if sharded else {"exclude_modules": LEFT_ALONE}
    callbacks = [SVDTrainingCallback(target_params=options.target_params, **asked)] if svd else []
    seed_everything(0, verbose=False)
    model = LanguageModel(options, svd)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        strategy=strategy,
        max_steps=options.steps,
        max_epochs=-1,
        callbacks=callbacks,
        enable_progress_bar=False,
        **quiet,
    )
    trainer.fit(model, DataLoader(rows, options.batch, shuffle=True, drop_last=True))
    if sharded:
        return gather_factored(model.net, llama(options.width, options.depth))
    return model.net.cpu() if trainer.is_global_zero else None


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, rows: Tensor) -> float:
    """Of bytes."""
    losses = [model.eval()(input_ids=part, labels=part).loss * len(part) for part in rows.split(32)]
    return math.exp(float(sum(losses)) / len(rows))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, compare, write and print; returns the perplexities, in process 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--strategy", choices=("auto", "ddp", "sharded"), default="auto")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--target-params", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("language_model"))
    options = parser.parse_args(arguments)
    rows, held_out = texts(options.files)
    dense, small = train(options, rows, svd=False), train(options, rows, svd=True)
    if dense is None or small is None:
        return {}
    truncated = to_factored(dense, target_params=options.target_params, exclude_modules=LEFT_ALONE)
    found = {}
    for name, model in (("dense", dense), ("truncated", truncated), ("low-rank", small)):
        found[name] = perplexity(model, held_out)
        print(f"{name:>9}: {sum(p.numel() for p in model.parameters()):9,} parameters, perplexity {found[name]:.2f}")
    prompt = held_out[:1, :16]
    written = small.generate(prompt, max_new_tokens=48, do_sample=False, pad_token_id=0)[0]
    print(bytes(written.tolist()).decode("utf-8", "replace"))
    options.folder.mkdir(parents=True, exist_ok=True)
    save_low_rank(small, options.folder / "low_rank.safetensors")
    to_dense(small).save_pretrained(options.folder / "dense")
    return found


if __name__ == "__main__":
    main()
