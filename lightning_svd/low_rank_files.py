"""Files of low-rank models: plain weights as safetensors, the ranks in the header; and checkpoints, to load."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from lightning_svd.checkpoints import (
    KEY,
    VERSION,
    check_version,
    low_rank_twin,
    under_every_name,
    weight_of,
)
from lightning_svd.compounds import split_states
from lightning_svd.costs import svd_layers
from lightning_svd.pairs import bias_of, factored_pair, low_rank_pairs, rank_of, view_of
from lightning_svd.parts import prefix_of
from lightning_svd.surgery import become, compounds_split, settle, to_factored
from lightning_svd.views import CONV_MODES, CONVOLUTIONS, View, supported_type

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
    """Load a low-rank model into a freshly built dense one, in place.

    Args:
        module: As it was before it was factorised; its own weights do not matter.
        path: Of a file that :func:`save_low_rank` wrote, or of a checkpoint of SVD training: one from during the fit
            gives the model of the ranks that it had then.

    Returns:
        ``module``.

    Raises:
        ValueError: If the file is neither, is damaged, is of another version, or does not fit the model, which is then
            as it was.
    """
    if is_checkpoint(path):
        return load_low_rank_checkpoint(module, read_checkpoint(path), path)
    return _load_safetensors(module, path)


def is_checkpoint(path: str | Path) -> bool:
    """Whether a file is in the format of ``torch.save``, rather than safetensors."""
    return zipfile.is_zipfile(path)


def load_low_rank_checkpoint(module: ModuleT, checkpoint: dict[str, Any], path: str | Path) -> ModuleT:
    """:func:`load_low_rank` of a checkpoint that was read from ``path``."""
    state, beside = checkpoint["state_dict"], checkpoint.get(KEY)
    if beside is None:
        raise ValueError(f"{path} has no ranks beside its weights: it is no checkpoint of SVD training to resume from")
    check_version(beside["version"], str(path))
    _check_shapes(_tensors(module.state_dict(keep_vars=True)), {key: tuple(v.shape) for key, v in state.items()}, path)
    modes = {name: entry["conv_mode"] for name, entry in beside["layers"].items()}
    with compounds_split(module, modes):
        layers = {name: _plain_layer(module, name, mode, path) for name, mode in modes.items()}
        module.load_state_dict(split_states(module, state))
        for name, layer in layers.items():
            become(layer, low_rank_twin(layer, beside["layers"][name]))
    return settle(module)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Lightning checkpoint, on the CPU, read without running any code that it may hold.

    Raises:
        ValueError: If it is none, or cannot be read in that way.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"{path} is no Lightning checkpoint: it has no `state_dict`")
    return checkpoint


def _load_safetensors(module: ModuleT, path: str | Path) -> ModuleT:
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(KEY, "null"))
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    entries = _entries(header, path)
    with compounds_split(module, entries):
        pairs = {name: _pair_for(module, name, entry, path) for name, entry in entries.items()}
        _check_shapes(_state_with(module, pairs), shapes, path)
        for name, pair in pairs.items():
            layer = module.get_submodule(name)
            for part in pair:
                empty = torch.empty_like(weight_of(part), device=weight_of(layer).device)
                part.weight = nn.Parameter(empty, weight_of(layer).requires_grad)
            become(layer, pair)
        load_model(module, str(path))
    return settle(module)


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
    layer = _plain_layer(module, name, entry["conv_mode"], path)
    view = View.of(layer, entry["conv_mode"] or "channel")
    pair = factored_pair(view, entry["rank"], bias_of(layer) is not None).to(weight_of(layer).dtype)
    pair[1].register_parameter("bias", bias_of(layer))
    return pair


def _plain_layer(module: nn.Module, name: str, conv_mode: str | None, path: str | Path) -> nn.Module:
    """The layer of this name, if it is a plain one that can be low-rank in this mode."""
    try:
        layer = module.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{path} has a low-rank layer `{name}`, which {type(module).__name__} does not have") from None
    kind = supported_type(layer)
    if type(layer) is not kind or (kind in CONVOLUTIONS) != (conv_mode is not None):
        expected = "convolution" if conv_mode else "linear layer"
        raise ValueError(f"`{name}` must be a plain {expected} to load {path}, got {type(layer).__name__}")
    return layer


def _state_with(module: nn.Module, pairs: Mapping[str, nn.Sequential]) -> dict[str, Tensor]:
    """The tensors of the model's state dict as it would be with ``pairs`` in it."""
    state: dict[str, Any] = module.state_dict(keep_vars=True)
    layers = {name: module.get_submodule(name) for name in pairs}
    pair_of = {id(layer): pairs[name] for name, layer in layers.items()}
    for name, layer in under_every_name(module, layers):
        prefix = prefix_of(name)
        for key in ("weight", "bias"):
            state.pop(f"{prefix}{key}", None)
        state |= {f"{prefix}{key}": value for key, value in pair_of[id(layer)].state_dict(keep_vars=True).items()}
    return _tensors(state)


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
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
