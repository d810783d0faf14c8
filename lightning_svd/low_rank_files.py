"""Files of low-rank models: plain weights as safetensors, the ranks in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from lightning_svd.checkpoints import (
    KEY,
    VERSION,
    check_version,
    low_rank_pairs,
    under_every_name,
    weight_of,
)
from lightning_svd.costs import svd_layers
from lightning_svd.pairs import factored_pair, rank_of, view_of
from lightning_svd.surgery import become, to_factored
from lightning_svd.views import CONV_MODES, View, supported_type

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def save_low_rank(module: nn.Module, path: str | Path) -> Path:
    """Write a low-rank model's weights as safetensors, with the ranks in the header.

    Args:
        module: After a fit with ``final="factored"``, or with factorised layers, which are compacted in a copy.
        path: File to write.

    Returns:
        The path.
    """
    compacted = to_factored(module) if svd_layers(module) else module
    pairs = low_rank_pairs(compacted)
    ranks = {name: {"rank": rank_of(pair), "conv_mode": view_of(pair).conv_mode} for name, pair in pairs.items()}
    save_model(compacted, str(path), {KEY: json.dumps({"version": VERSION, "layers": ranks})})
    return Path(path)


def load_low_rank(module: ModuleT, path: str | Path) -> ModuleT:
    """Load a low-rank file into a freshly built dense model, in place.

    Args:
        module: As it was before it was factorised; its own weights do not matter.
        path: Of a file that :func:`save_low_rank` wrote.

    Returns:
        ``module``.

    Raises:
        ValueError: If the file is not such a file, is damaged, is of another version, or does not fit the model, which
            is then as it was.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(KEY, "null"))
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    pairs = {name: _pair_for(module, name, entry, path) for name, entry in _entries(header, path).items()}
    _check_shapes(_state_with(module, pairs), shapes, path)
    for name, pair in pairs.items():
        layer = module.get_submodule(name)
        for part in pair:
            empty = torch.empty_like(weight_of(part), device=weight_of(layer).device)
            part.weight = nn.Parameter(empty, weight_of(layer).requires_grad)
        become(layer, pair)
    load_model(module, str(path))
    return module


def _entries(header: Any, path: str | Path) -> dict[str, Any]:
    """Layer name -> its rank and mode, as the header of a low-rank file tells them."""
    if header is None:
        raise ValueError(f"{path} has no ranks in its header: it was not written by `save_low_rank`")
    if isinstance(header, dict):
        check_version(header.get("version"), str(path))
        entries = header.get("layers")
        if isinstance(entries, dict) and all(map(_is_entry, entries.values())):
            return entries
    raise ValueError(f"{path}: its header is damaged, got {str(header)[:80]}")


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"rank", "conv_mode"}:
        return False
    return type(entry["rank"]) is int and entry["rank"] > 0 and entry["conv_mode"] in (None, *CONV_MODES)


def _pair_for(module: nn.Module, name: str, entry: Mapping[str, Any], path: str | Path) -> nn.Sequential:
    """What the layer is to become: weights on the meta device, its own bias."""
    try:
        layer = module.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{path} has a low-rank layer `{name}`, which {type(module).__name__} does not have") from None
    view = View.of(layer, entry["conv_mode"] or "channel") if type(layer) is supported_type(layer) else None
    if view is None or view.conv_mode != entry["conv_mode"]:
        expected = "convolution" if entry["conv_mode"] else "linear layer"
        raise ValueError(f"`{name}` must be a plain {expected} to load {path}, got {type(layer).__name__}")
    pair = factored_pair(view, entry["rank"], layer.bias is not None).to(weight_of(layer).dtype)
    pair[1].register_parameter("bias", cast("nn.Parameter | None", layer.bias))
    return pair


def _state_with(module: nn.Module, pairs: Mapping[str, nn.Sequential]) -> dict[str, Tensor]:
    """The tensors of the model's state dict as it would be with ``pairs`` in it."""
    state: dict[str, Any] = module.state_dict(keep_vars=True)
    layers = {name: module.get_submodule(name) for name in pairs}
    pair_of = {id(layer): pairs[name] for name, layer in layers.items()}
    for name, layer in under_every_name(module, layers):
        prefix = f"{name}." if name else ""
        for key in ("weight", "bias"):
            state.pop(f"{prefix}{key}", None)
        state |= {f"{prefix}{key}": value for key, value in pair_of[id(layer)].state_dict(keep_vars=True).items()}
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _check_shapes(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: str | Path) -> None:
    """Refuse a file whose tensors are not those of ``state``, each at least under one of its names."""
    there = {_storage(state[key]) for key in shapes if key in state}
    for key in [*shapes, *state]:
        found, expected = shapes.get(key), tuple(state[key].shape) if key in state else None
        if found != expected and (found or _storage(state[key]) not in there):
            raise ValueError(f"{path} does not fit the model: `{key}` is {found} there, {expected} here")


def _storage(tensor: Tensor) -> int:
    """The same for tensors that a file holds only once."""
    return tensor.untyped_storage().data_ptr() or id(tensor)
