"""Models that people use, built narrow and with random weights: what is found in them, and whether all of it works.

    python benchmarks/real_models.py --json out.json
    python benchmarks/real_models.py --quick

Each model is trained for a few steps under the callback down to half of its multiply-accumulates, saved as a low-rank
file and loaded again, followed by ``torch.export`` and, without ``--quick``, written as ONNX and run in onnxruntime.
What does not work is printed and kept in the table.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nets
import torch
import torch.nn.functional as F
from harness import Row, Table, arguments, progress, save
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_svd import FallToBudget, SVDTrainingCallback, load_low_rank, save_low_rank
from lightning_svd.model.export import largest_difference, to_onnx

TARGET, STEPS, BATCH = 0.5, 8, 4
WORDS = 200


class Named(nn.Module):
    """A model of transformers called by position, giving its first output."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=False)[0]


def words(length: int = 16) -> Tensor:
    return torch.randint(3, WORDS, (BATCH, length))


def images(size: int = 32) -> Tensor:
    return torch.randn(BATCH, 3, size, size)


Built = tuple[nn.Module, tuple[Tensor, ...]]
BLOCKS: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192}


def bert() -> Built:
    from transformers import BertConfig, BertForSequenceClassification

    return Named(BertForSequenceClassification(BertConfig(vocab_size=WORDS, **BLOCKS)), "input_ids"), (words(),)


def gpt2() -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=WORDS,
        n_embd=96,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return Named(GPT2LMHeadModel(config), "input_ids"), (words(),)


def llama() -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=WORDS, num_key_value_heads=2, use_cache=False, **BLOCKS)
    return Named(LlamaForCausalLM(config), "input_ids"), (words(),)


def whisper() -> Built:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(
        vocab_size=WORDS,
        d_model=96,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=192,
        decoder_ffn_dim=192,
        max_source_positions=30,
        max_target_positions=32,
        use_cache=False,
        **heads,
        **ends,
    )
    inputs = (torch.randn(BATCH, config.num_mel_bins, 60), words())
    return Named(WhisperForConditionalGeneration(config), "input_features", "decoder_input_ids"), inputs


def vit() -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(image_size=32, patch_size=8, num_labels=10, **BLOCKS)
    return Named(ViTForImageClassification(config), "pixel_values"), (images(),)


def convnext() -> Built:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[24, 48, 96, 96], depths=[1, 1, 2, 1], num_labels=10)
    return Named(ConvNextForImageClassification(config), "pixel_values"), (images(64),)


def spiking() -> Built:
    import snntorch

    class Spiking(nn.Module):
        """Two convolutions and a linear layer between leaky neurons, four time steps."""

        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 48, 3, stride=2, padding=1)
            self.head = nn.Linear(48 * 64, 10)
            self.neurons = nn.ModuleList(snntorch.Leaky(beta=0.9) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            states = [neuron.reset_mem() for neuron in self.neurons]
            total = torch.zeros(())
            for _ in range(4):
                spikes = F.max_pool2d(x, 2)
                for index, layer in enumerate((self.conv1, self.conv2, self.head)):
                    current = layer(spikes.flatten(1) if index == 2 else spikes)
                    spikes, states[index] = self.neurons[index](current, states[index])
                total = total + states[2]
            return total

    return Spiking(), (images(),)


class Translator(nn.Module):
    """``nn.Transformer`` between an embedding and a head (Vaswani et al. 2017)."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.transformer = nn.Transformer(width, 4, 2, 2, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.transformer(self.embed(source), self.embed(target)))


class LanguageModel(nn.Module):
    """Embedding, two layers of LSTM, head (Zaremba et al. 2014): what the paper's authors trained too."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.lstm = nn.LSTM(width, width, 2, batch_first=True)
        self.head = nn.Linear(width, WORDS)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(text))[0])


class UNet(nn.Module):
    """Down and up again with shortcuts and transposed convolutions (Ronneberger et al. 2015)."""

    def __init__(self, width: int = 16, depth: int = 3, classes: int = 5) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth)]
        self.down = nn.ModuleList(self.block(i, o) for i, o in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(o, i, 2, stride=2) for i, o in itertools.pairwise(widths))
        self.merge = nn.ModuleList(self.block(2 * i, i) for i in widths[:-1])
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.max_pool2d(x, 2))
            levels.append(x)
        for level in reversed(range(len(self.up))):
            x = self.merge[level](torch.cat([levels[level], self.up[level](x)], dim=1))
        return self.head(x).movedim(1, -1)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 (He et al. 2016); with groups as many as channels that of a MobileNet (Sandler et al. 2018)."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, depthwise: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner if depthwise else 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def bottlenecks(inner: Callable[[int], int], outer: Callable[[int], int], depthwise: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inputs = 16
    for width, stride in ((16, 1), (32, 2), (32, 1), (64, 2)):
        layers.append(Bottleneck(inputs, inner(width), outer(width), stride, depthwise))
        inputs = outer(width)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


MODELS: dict[str, Callable[[], Built]] = {
    "BERT": bert,
    "GPT-2": gpt2,
    "Llama": llama,
    "Whisper": whisper,
    "ViT": vit,
    "ConvNeXt": convnext,
    "Transformer (torch)": lambda: (Translator(), (words(), words(12))),
    "LSTM language model": lambda: (LanguageModel(), (words(),)),
    "spiking net (snntorch)": spiking,
    "U-Net": lambda: (UNet(), (images(),)),
    "ResNet-18, a quarter as wide": lambda: (nets.resnet(3, 10, 16, (2, 2, 2, 2)), (images(),)),
    "ResNet with bottlenecks": lambda: (bottlenecks(lambda w: w, lambda w: 4 * w, False), (images(),)),
    "MobileNet-style": lambda: (bottlenecks(lambda w: 6 * w, lambda w: w, True), (images(),)),
}


class Task(LightningModule):
    """Random labels for the last dimension of whatever the model gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(*inputs)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        scores = self.model(*batch).flatten(0, -2)
        return F.cross_entropy(scores, torch.arange(len(scores)) % scores.shape[-1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def measure(name: str, quick: bool) -> Row:
    """Take one model the whole way."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    task, callback = Task(model), SVDTrainingCallback(target_macs=TARGET, schedule=FallToBudget(cuts=3))
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader([inputs] * STEPS, batch_size=None))
    report, factorized = callback.report, [layer for layer in callback.plan if not layer.skipped]
    assert report is not None
    row: Row = {
        "model": name,
        "layers": len(callback.plan),
        "factorized": len(factorized),
        "skipped": Counter(f"{layer.kind}: {layer.skipped}" for layer in callback.plan if layer.skipped),
        "share": sum(layer.dense_macs for layer in report.layers) / report.dense_macs,
        "macs": report.macs_ratio,
    }
    low_rank = task.model.eval()
    with torch.no_grad():
        expected = low_rank(*inputs)
        row["low-rank file"] = attempt(lambda: largest_difference(reloaded(name, low_rank)(*inputs), expected))
        row["torch.export"] = attempt(
            lambda: largest_difference(torch.export.export(low_rank, inputs).module()(*inputs), expected)
        )
    if not quick:
        with tempfile.TemporaryDirectory() as folder:
            row["ONNX"] = attempt(lambda: to_onnx(low_rank, Path(folder) / "model.onnx", inputs))
    return row


def reloaded(name: str, low_rank: nn.Module) -> nn.Module:
    """The model from its low-rank file."""
    with tempfile.TemporaryDirectory() as folder:
        path = save_low_rank(low_rank, Path(folder) / "model.safetensors")
        return load_low_rank(MODELS[name]()[0], path).eval()


def attempt(work: Callable[[], float]) -> float | str:
    """The difference that ``work`` gives, or why it failed."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"


def tables(rows: list[Row]) -> list[Table]:
    """What was found, and how far the exported forms are from the model."""
    exports = [key for key in ("low-rank file", "torch.export", "ONNX") if key in rows[0]]
    headings = ["model", "layers", "factorized", "their MACs", "left", *exports, "skipped, because"]
    lines = [
        [
            row["model"],
            str(row["layers"]),
            str(row["factorized"]),
            f"{row['share']:.0%}",
            f"{row['macs']:.1%}",
            *(f"{row[key]:.1g}" if isinstance(row[key], float) else row[key] for key in exports),
            "; ".join(f"{count} {reason}" for reason, count in row["skipped"].items()),
        ]
        for row in rows
    ]
    return [Table("What is found, and how far each form is from the model", headings, lines)]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = []
    for name in options.models:
        progress(name)
        rows.append(measure(name, options.quick))
    for table in tables(rows):
        table.print()
    save("real_models", argv, options, rows)


if __name__ == "__main__":
    main()
