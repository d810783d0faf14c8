"""Models that people use, built narrow and with random weights: those of transformers as a table, others as classes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import nets
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

BATCH, WORDS, WIDTH = 4, 200, 96

# ------------------------------------------------------------------------------------------------------------- inputs


def words(length: int = 16) -> Tensor:
    return torch.randint(3, WORDS, (BATCH, length))


def images(size: int = 32) -> Tensor:
    return torch.randn(BATCH, 3, size, size)


def numbers(*shape: int) -> Tensor:
    return torch.randn(BATCH, *shape)


def ones(*shape: int) -> Tensor:
    return torch.ones(BATCH, *shape)


@dataclass(frozen=True)
class Architecture:
    """How a model is built, and what it is called with.

    Attributes:
        build: Makes it; the same weights for the same seed.
        inputs: Make the tensors that it is called with, by position.
        arguments: Of the callback, besides the budget.
        needs: A package besides torch and transformers that it comes from.
        refused: A part of what the callback says where it refuses the model before the first step; None where it
            trains it.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[Callable[[], Tensor], ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: str | None = None
    refused: str | None = None


# ------------------------------------------------------------------------------------------------------- transformers


class Named(nn.Module):
    """A model of transformers called by position, giving one of its outputs.

    Args:
        model: The model.
        names: Of its arguments, in the order of the inputs.
        output: The name of its output; None for the first.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...], output: str | None = None) -> None:
        super().__init__()
        self.model, self.names, self.output = model, names, output

    def forward(self, *inputs: Tensor) -> Tensor:
        outputs = self.model(**dict(zip(self.names, inputs, strict=True)))[self.output or 0]
        return outputs if isinstance(outputs, Tensor) else outputs[0]


def from_transformers(config: str, head: str, sizes: Mapping[str, Any], *names: str, output: str | None) -> nn.Module:
    import transformers

    model = getattr(transformers, head)(getattr(transformers, config)(**sizes))
    return Named(model, names, output)


@dataclass(frozen=True)
class Family:
    """A row of the table: the common part of two names in transformers, and what its configuration needs.

    Attributes:
        name: Of the configuration, without "Config".
        head: What follows it in the model's name.
        sizes: Arguments of the configuration.
        inputs: The model's arguments by name, in order.
        output: Name of the output that is looked at; None for the first.
        arguments: Of the callback, besides the budget.
    """

    name: str
    head: str
    sizes: Mapping[str, Any]
    inputs: Mapping[str, Callable[[], Tensor]] = field(default_factory=lambda: {"input_ids": words})
    output: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def architecture(self) -> Architecture:
        config, model = f"{self.name}Config", f"{self.name}{self.head}"
        build = partial(from_transformers, config, model, self.sizes, *self.inputs, output=self.output)
        return Architecture(build, tuple(self.inputs.values()), self.arguments)


ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {"vocab_size": WORDS, **ENDS}
BLOCKS = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 2 * WIDTH}
CAUSAL = {**TEXT, **BLOCKS, "use_cache": False}
KV = {"num_key_value_heads": 2}
D_MODEL = {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
D_MODEL |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 2 * WIDTH, "decoder_ffn_dim": 2 * WIDTH}
SEQ2SEQ = {**TEXT, **D_MODEL, "decoder_start_token_id": 1, "use_cache": False}
PATCHES = {"image_size": 32, "patch_size": 8, "num_labels": 10}
PIXELS = {"pixel_values": images}
LARGE = {"pixel_values": partial(images, 64)}
BOTH = {"input_ids": words, "decoder_input_ids": partial(words, 12)}
# Two strided convolutions in front of the encoder, in the place of seven that ask for a second of sound.
SOUND = {"conv_dim": (64, 64), "conv_kernel": (10, 4), "conv_stride": (5, 4), "num_feat_extract_layers": 2}
SOUND |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0, "vocab_size": 32}
WAVES = {"input_values": partial(numbers, 400)}
BACKBONE = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1]}

TABLE: dict[str, Family] = {
    # Texts, in both directions
    "BERT": Family("Bert", "ForSequenceClassification", {**TEXT, **BLOCKS}),
    "RoBERTa": Family("Roberta", "ForMaskedLM", {**TEXT, **BLOCKS}),
    "ALBERT": Family("Albert", "ForMaskedLM", {**TEXT, **BLOCKS, "embedding_size": 48}),
    "DistilBERT": Family(
        "DistilBert", "ForMaskedLM", {**TEXT, "dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 2 * WIDTH}
    ),
    "ELECTRA": Family("Electra", "ForPreTraining", {**TEXT, **BLOCKS, "embedding_size": 48}),
    "DeBERTa": Family(
        "DebertaV2",
        "ForSequenceClassification",
        {**TEXT, **BLOCKS, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "num_labels": 4},
    ),
    "ModernBERT": Family(
        "ModernBert", "ForMaskedLM", {**TEXT, **BLOCKS, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}
    ),
    "Funnel": Family(
        "Funnel",
        "ForMaskedLM",
        {**TEXT, "d_model": WIDTH, "n_head": 4, "d_head": 24, "d_inner": 2 * WIDTH}
        | {"block_sizes": [1, 1], "num_decoder_layers": 1},
    ),
    "Longformer": Family("Longformer", "ForMaskedLM", {**TEXT, **BLOCKS, "attention_window": 8}),
    "FNet": Family(
        "FNet",
        "ForMaskedLM",
        {**TEXT, "hidden_size": WIDTH, "num_hidden_layers": 2, "intermediate_size": 2 * WIDTH},
    ),
    # Texts, from left to right
    "GPT-2": Family(
        "GPT2",
        "LMHeadModel",
        {**TEXT, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 32, "use_cache": False},
    ),
    "GPT-NeoX": Family("GPTNeoX", "ForCausalLM", CAUSAL),
    "OPT": Family(
        "OPT",
        "ForCausalLM",
        {**TEXT, "hidden_size": WIDTH, "ffn_dim": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"word_embed_proj_dim": 48, "max_position_embeddings": 32, "use_cache": False},
    ),
    "BLOOM": Family(
        "Bloom", "ForCausalLM", {**TEXT, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4, "use_cache": False}
    ),
    "Falcon": Family("Falcon", "ForCausalLM", CAUSAL),
    "MPT": Family(
        "Mpt",
        "ForCausalLM",
        {**TEXT, "d_model": WIDTH, "n_heads": 4, "n_layers": 2, "max_seq_len": 32} | {"use_cache": False},
    ),
    "Llama": Family("Llama", "ForCausalLM", {**CAUSAL, **KV}),
    "Qwen3": Family("Qwen3", "ForCausalLM", {**CAUSAL, **KV, "head_dim": 24}),
    "Gemma 2": Family("Gemma2", "ForCausalLM", {**CAUSAL, **KV, "head_dim": 24}),
    "Phi-3": Family("Phi3", "ForCausalLM", {**CAUSAL, **KV}),
    "Mixtral, experts in one piece": Family("Mixtral", "ForCausalLM", {**CAUSAL, **KV, "num_local_experts": 4}),
    "Mamba": Family("Mamba", "ForCausalLM", {**TEXT, "hidden_size": WIDTH, "num_hidden_layers": 2, "use_cache": False}),
    "RWKV": Family(
        "Rwkv",
        "ForCausalLM",
        {**TEXT, "hidden_size": WIDTH, "num_hidden_layers": 2, "context_length": 32, "rescale_every": 1}
        | {"use_cache": False},
        # Whose weights it halves where it evaluates.
        arguments={"exclude_modules": ["attention.output", "feed_forward.value"]},
    ),
    "xLSTM": Family(
        "xLSTM",
        "ForCausalLM",
        {**TEXT, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_heads": 4}
        | {
            "use_cache": False,
            "chunkwise_kernel": "chunkwise--native_autograd",
            "sequence_kernel": "native_sequence__native",
            "step_kernel": "native",
            "mode": "train",
            "chunk_size": 16,
        },
    ),
    # Texts to texts
    "T5": Family(
        "T5",
        "ForConditionalGeneration",
        {**TEXT, "d_model": WIDTH, "d_kv": 24, "d_ff": 2 * WIDTH, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0, "use_cache": False},
        BOTH,
    ),
    "BART": Family("Bart", "ForConditionalGeneration", SEQ2SEQ, BOTH),
    # Images
    "ViT": Family("ViT", "ForImageClassification", {**BLOCKS, **PATCHES}, PIXELS),
    "DeiT": Family("DeiT", "ForImageClassification", {**BLOCKS, **PATCHES}, PIXELS),
    "BEiT": Family("Beit", "ForImageClassification", {**BLOCKS, **PATCHES, "use_relative_position_bias": True}, PIXELS),
    "DINOv2": Family(
        "Dinov2",
        "ForImageClassification",
        {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4} | {"mlp_ratio": 2, **PATCHES},
        PIXELS,
    ),
    "ViTMAE": Family(
        "ViTMAE",
        "ForPreTraining",
        {**BLOCKS, "image_size": 32, "patch_size": 8, "decoder_hidden_size": 64}
        | {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4, "decoder_intermediate_size": 128},
        {"pixel_values": images, "noise": partial(numbers, 16)},
        "logits",
    ),
    "Swin": Family(
        "Swin",
        "ForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 48, "depths": [2, 1]}
        | {"num_heads": [2, 4], "window_size": 4, "num_labels": 10},
        PIXELS,
    ),
    "SegFormer": Family(
        "Segformer",
        "ForSemanticSegmentation",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [4, 2], "hidden_sizes": [32, 64]}
        | {"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
        | {"decoder_hidden_size": 64, "num_labels": 5},
        LARGE,
    ),
    "ConvNeXt": Family(
        "ConvNext",
        "ForImageClassification",
        {"hidden_sizes": [24, 48, 96, 96], "depths": [1, 1, 2, 1]} | {"num_labels": 10},
        LARGE,
    ),
    "ResNet": Family(
        "ResNet",
        "ForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [64, 128], "depths": [2, 2]} | {"num_labels": 10},
        LARGE,
    ),
    "RegNet": Family(
        "RegNet",
        "ForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2]} | {"groups_width": 16, "num_labels": 10},
        LARGE,
    ),
    "MobileNetV2": Family(
        "MobileNetV2", "ForImageClassification", {"depth_multiplier": 0.35, "image_size": 64, "num_labels": 10}, LARGE
    ),
    "MobileViT": Family(
        "MobileViT",
        "ForImageClassification",
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_labels": 10}
        | {"neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96]},
        LARGE,
    ),
    "SAM": Family(
        "Sam",
        "Model",
        {
            "vision_config": {
                "hidden_size": 64,
                "output_channels": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
            }
            | {"image_size": 64, "patch_size": 8, "mlp_dim": 128, "window_size": 4, "global_attn_indexes": [1]}
            | {"num_pos_feats": 16},
            "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 8},
            "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
            | {"iou_head_hidden_dim": 32},
        },
        {**LARGE, "input_points": partial(numbers, 1, 2, 2)},
        "pred_masks",
    ),
    "Perceiver": Family(
        "Perceiver",
        "ForImageClassificationLearned",
        {"num_latents": 16, "d_latents": 64, "d_model": 64, "num_blocks": 1, "num_self_attends_per_block": 2}
        | {"num_self_attention_heads": 4, "num_cross_attention_heads": 4, "image_size": 16, "num_labels": 10},
        {"inputs": partial(images, 16)},
    ),
    # Sound
    "Wav2Vec2": Family("Wav2Vec2", "ForCTC", {**BLOCKS, **ENDS, **SOUND}, WAVES),
    "HuBERT": Family("Hubert", "ForCTC", {**BLOCKS, **ENDS, **SOUND}, WAVES),
    "Whisper": Family(
        "Whisper",
        "ForConditionalGeneration",
        {**SEQ2SEQ, "max_source_positions": 30, "max_target_positions": 32},
        {"input_features": partial(numbers, 80, 60), "decoder_input_ids": words},
    ),
    # Series
    "PatchTST": Family(
        "PatchTST",
        "ForPrediction",
        {"num_input_channels": 3, "context_length": 32, "patch_length": 4, "patch_stride": 4, "prediction_length": 8}
        | {"d_model": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
        {"past_values": partial(numbers, 32, 3)},
    ),
    "TimeSeriesTransformer": Family(
        "TimeSeriesTransformer",
        "ForPrediction",
        {**D_MODEL, "d_model": 64, "prediction_length": 8, "context_length": 24, "lags_sequence": [1, 2, 3]}
        | {"num_time_features": 2, "use_cache": False},
        {"past_values": partial(numbers, 27), "past_time_features": partial(numbers, 27, 2)}
        | {"past_observed_mask": partial(ones, 27), "future_values": partial(numbers, 8)}
        | {"future_time_features": partial(numbers, 8, 2)},
        "params",
    ),
    # Several kinds of inputs
    "CLIP": Family(
        "CLIP",
        "Model",
        {"text_config": {**TEXT, **BLOCKS, "max_position_embeddings": 32}, "projection_dim": 64}
        | {"vision_config": {**BLOCKS, "image_size": 32, "patch_size": 8}},
        {"input_ids": words, **PIXELS},
        "text_embeds",
    ),
    "DETR": Family(
        "Detr",
        "ForObjectDetection",
        {**D_MODEL, "d_model": 64, "num_queries": 8, "num_labels": 10, "use_timm_backbone": False}
        | {"use_pretrained_backbone": False, "backbone": None, "backbone_config": BACKBONE},
        LARGE,
    ),
}

# ------------------------------------------------------------------------------------------------------- torch's own


class Translator(nn.Module):
    """``nn.Transformer`` between an embedding and a head (Vaswani et al. 2017)."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.transformer = nn.Transformer(width, 4, 2, 2, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.transformer(self.embed(source), self.embed(target)))


class LanguageModel(nn.Module):
    """Embedding, two recurrent layers, head (Zaremba et al. 2014): what the paper's authors trained too."""

    def __init__(self, kind: type[nn.RNNBase], width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.recurrent = kind(width, width, 2, batch_first=True)
        self.head = nn.Linear(width, WORDS)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embed(text))[0])


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


def convolutions(
    norm: Callable[[nn.Module], nn.Module] = lambda layer: layer, between: Callable[[], nn.Module] = nn.Identity
) -> nn.Sequential:
    """Three convolutions, of which the second goes through ``norm``, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.ReLU(),
        between(),
        norm(nn.Conv2d(16, 32, 3, 2, 1)),
        nn.ReLU(),
        between(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        between(),
        nn.Flatten(),
        nn.Linear(64 * 64, 10),
    )


# ------------------------------------------------------------------------------- what other code makes of a network


def spiking() -> nn.Module:
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

    return Spiking()


def with_lora() -> nn.Module:
    """BERT with low-rank adapters beside its queries and values, which train, and its head."""
    import peft

    model = TABLE["BERT"].architecture().build()
    config = peft.LoraConfig(target_modules=["query", "value"], modules_to_save=["classifier"], r=4)
    model.model = peft.get_peft_model(model.model, config)
    return model


def fake_quantize() -> nn.Module:
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

    return FakeQuantize(MovingAverageMinMaxObserver)


def prepared_for_quantization() -> nn.Module:
    """As ``prepare_qat`` makes it: every layer rounds its weight and its output to eight bits."""
    from torch.ao import quantization

    model = convolutions().train()
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    return quantization.prepare_qat(model)


class OwnMatrix(nn.Module):
    """A layer written by hand, ``x @ w``, between two of torch's."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(48, width), nn.Linear(width, 10)
        self.w = nn.Parameter(torch.randn(width, width) / math.sqrt(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.relu(self.first(x)) @ self.w))


# --------------------------------------------------------------------------------------------------- all of them

ARCHITECTURES: dict[str, Architecture] = {
    **{name: family.architecture() for name, family in TABLE.items()},
    "Transformer (torch)": Architecture(Translator, (words, partial(words, 12))),
    "LSTM language model": Architecture(partial(LanguageModel, nn.LSTM), (words,)),
    "GRU language model": Architecture(partial(LanguageModel, nn.GRU), (words,)),
    "U-Net": Architecture(UNet, (images,)),
    "ResNet-18, a quarter as wide": Architecture(lambda: nets.resnet(3, 10, 16, (2, 2, 2, 2)), (images,)),
    "ResNet with bottlenecks": Architecture(lambda: bottlenecks(lambda w: w, lambda w: 4 * w, False), (images,)),
    "MobileNet-style": Architecture(lambda: bottlenecks(lambda w: 6 * w, lambda w: w, True), (images,)),
    "spiking net (snntorch)": Architecture(spiking, (images,), needs="snntorch"),
    "BERT with LoRA (PEFT)": Architecture(with_lora, (words,), needs="peft"),
    "BERT with LoRA, its base factorized": Architecture(
        with_lora, (words,), {"target_modules": ["base_layer", "key", "dense"]}, needs="peft"
    ),
    "prepared for quantization": Architecture(prepared_for_quantization, (images,)),
    "activations as of eight bits": Architecture(partial(convolutions, between=fake_quantize), (images,)),
    "weight norm": Architecture(partial(convolutions, parametrizations.weight_norm), (images,)),
    "spectral norm": Architecture(partial(convolutions, parametrizations.spectral_norm), (images,)),
    "a matrix of the user's own": Architecture(OwnMatrix, (partial(numbers, 48),)),
}
