"""Files that open anywhere, with the exact factors beside them.

A checkpoint that is written during a fit holds dense weights under the user's own names in its ``state_dict``, so that
whoever has the LightningModule's class can load it, and the factors under a key of its own, so that a fit with the
callback resumes exactly. A low-rank file holds a compact model's plain weights as safetensors, the ranks in its header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from lightning_svd.costs import svd_layers
from lightning_svd.factorization import Factors, truncate
from lightning_svd.layers import SVDConv2d, SVDLayer, SVDLinear
from lightning_svd.pairs import MARK, factored_pair, is_pair, merged, merged_weight
from lightning_svd.surgery import become, to_factored

KEY = "lightning_svd"
VERSION = 1

State = dict[str, Any]


@torch.no_grad()
def to_dense_state(module: nn.Module, state: Mapping[str, Any]) -> tuple[State, State]:
    """A state dict with dense weights under the original names, and what it takes to restore the factors.

    Args:
        module: The model whose state it is, or has the layout of: an average of it, say.
        state: Of ``module``, factorised layers and pairs of low-rank layers as they are.

    Returns:
        The dense state dict, and layer name -> its exact tensors and how they were one layer.
    """
    dense, exact = dict(state), {}
    for name, layer in svd_layers(module).items():
        prefix = f"{name}." if name else ""
        if f"{prefix}U" in dense:
            factors = Factors(*(dense.pop(f"{prefix}{factor}") for factor in "UsV"))
            mask = layer.kept_mask()  # not the state's, which averaging may have blurred
            dense.pop(f"{prefix}mask")
            dense[f"{prefix}weight"] = layer.fold(truncate(factors, mask.nonzero().squeeze(1).to(factors.s.device)))
            mode = getattr(layer, "conv_mode", None)
            exact[name] = {**factors._asdict(), "mask": mask, "conv_mode": mode}
    for name, pair in low_rank_pairs(module).items():
        prefix = f"{name}." if name else ""
        if f"{prefix}0.weight" in dense:
            first, second = dense.pop(f"{prefix}0.weight"), dense.pop(f"{prefix}1.weight")
            dense[f"{prefix}weight"] = merged_weight(pair, first, second)
            if f"{prefix}1.bias" in dense:
                dense[f"{prefix}bias"] = dense.pop(f"{prefix}1.bias")
            exact[name] = {"first": first, "second": second, "conv_mode": _mode(pair)}
    return dense, exact


def to_factored_state(module: nn.Module, state: Mapping[str, Any], exact: Mapping[str, Any]) -> State:
    """The inverse of :func:`to_dense_state` for a model that is factorised as it was then.

    Args:
        module: The model that is going to load the state.
        state: A dense state dict.
        exact: The factors beside it.

    Raises:
        ValueError: If other layers, or the same in another mode, are factorised in ``module``.
    """
    layers = {name: getattr(layer, "conv_mode", None) for name, layer in svd_layers(module).items()}
    saved = {name: entry["conv_mode"] for name, entry in exact.items()}
    if layers != saved:
        differ = sorted(name for name in layers.keys() | saved.keys() if layers.get(name, 0) != saved.get(name, 0))
        raise ValueError(
            f"the checkpoint was written with other factorised layers, see {', '.join(map(repr, differ[:5]))}: resume "
            "with the `target_modules`, `exclude_modules` and `conv_mode` that it was written with"
        )
    factored = dict(state)
    for name, entry in exact.items():
        prefix = f"{name}." if name else ""
        del factored[f"{prefix}weight"]
        factored |= {f"{prefix}{part}": entry[part] for part in ("U", "s", "V", "mask")}
    return factored


def take_form(module: nn.Module, state: Mapping[str, Any], exact: Mapping[str, Any]) -> State:
    """Give a low-rank model the ranks of a checkpoint, in place, and the state to load into it.

    Layers that are plain and whole stay so, and load the dense weight.

    Args:
        module: A model after its fit, each low-rank layer a pair, a factorised layer, or plain.
        state: A dense state dict.
        exact: The factors beside it.
    """
    state = dict(state)
    for name, entry in exact.items():
        layer = module.get_submodule(name)
        if not (is_pair(layer) or isinstance(layer, SVDLayer)):
            continue
        prefix = f"{name}." if name else ""
        plain = merged(layer) if is_pair(layer) else layer.dense()  # type: ignore[operator]
        plain.weight.data = state.pop(f"{prefix}weight")
        if plain.bias is not None:
            plain.bias.data = state.pop(f"{prefix}bias")
        twin = _low_rank_twin(plain, entry)
        become(layer, twin)
        state |= {f"{prefix}{key}": value for key, value in twin.state_dict().items()}
    return state


def _low_rank_twin(plain: nn.Linear | nn.Conv2d, entry: Mapping[str, Any]) -> nn.Module:
    """What stands for ``plain`` at the rank of a checkpoint's entry; itself where factors do not pay."""
    if "first" in entry:
        pair = factored_pair(plain, entry["first"].shape[0], entry["conv_mode"])
        for part, weight in zip(pair, (entry["first"], entry["second"]), strict=True):
            part.weight = nn.Parameter(weight)
        pair[1].register_parameter("bias", cast("nn.Parameter | None", plain.bias))
        return pair
    factors = Factors(entry["U"], entry["s"], entry["V"])
    if isinstance(plain, nn.Linear):
        layer: SVDLayer = SVDLinear(plain, factors=factors)
    else:
        layer = SVDConv2d(plain, entry["conv_mode"], factors=factors)
    layer.keep(entry["mask"].to(factors.s.device))
    return layer.factored() if layer.rank * layer.params_per_rank < layer.dense_params else plain


def low_rank_pairs(module: nn.Module) -> dict[str, nn.Sequential]:
    """The pairs of plain layers that stand for one each, by name."""
    sequences = {name: child for name, child in module.named_modules() if isinstance(child, nn.Sequential)}
    return {name: sequence for name, sequence in sequences.items() if is_pair(sequence)}


def check_version(found: Any, what: str) -> None:
    """Refuse a file of a version that this package does not know."""
    if found != VERSION:
        raise ValueError(f"{what} has format version {found}, this lightning-svd reads version {VERSION}: update it")


def save_low_rank(module: nn.Module, path: str | Path) -> Path:
    """Write a low-rank model's weights as safetensors, with the ranks in the header.

    Args:
        module: After a fit with ``final="factored"``, or with factorised layers, which are compacted in a copy.
        path: File to write.

    Returns:
        The path.
    """
    compacted = to_factored(module) if svd_layers(module) else module
    ranks = {name: {"rank": _rank(pair), "conv_mode": _mode(pair)} for name, pair in low_rank_pairs(compacted).items()}
    save_model(compacted, str(path), {KEY: json.dumps({"version": VERSION, "layers": ranks})})
    return Path(path)


def load_low_rank(module: nn.Module, path: str | Path) -> nn.Module:
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
    if header is None:
        raise ValueError(f"{path} has no ranks in its header: it was not written by `save_low_rank`")
    check_version(header["version"], str(path))
    pairs = {name: _pair_for(module, name, entry, path) for name, entry in header["layers"].items()}
    _check_shapes(module, pairs, shapes, path)
    for name, pair in pairs.items():
        become(module.get_submodule(name), pair.to_empty(device=_device(module)))
    load_model(module, str(path))
    return module


def _pair_for(module: nn.Module, name: str, entry: Mapping[str, Any], path: str | Path) -> nn.Sequential:
    try:
        layer = module.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{path} has a low-rank layer `{name}`, which {type(module).__name__} does not have") from None
    if type(layer) not in (nn.Linear, nn.Conv2d):
        raise ValueError(f"`{name}` must be a plain Linear or Conv2d to load {path}, got {type(layer).__name__}")
    return factored_pair(layer, entry["rank"], entry["conv_mode"])


def _check_shapes(
    module: nn.Module, pairs: Mapping[str, nn.Sequential], shapes: Mapping[str, tuple[int, ...]], path: str | Path
) -> None:
    """Refuse a file whose tensors are not those of the model once ``pairs`` are in it."""
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    for name, pair in pairs.items():
        prefix = f"{name}." if name else ""
        expected = {key: shape for key, shape in expected.items() if key not in (f"{prefix}weight", f"{prefix}bias")}
        expected |= {f"{prefix}{key}": tuple(value.shape) for key, value in pair.state_dict().items()}
    for key, shape in shapes.items():
        if expected.get(key) != shape:
            raise ValueError(f"{path} does not fit the model: `{key}` is {shape} there, {expected.get(key)} here")


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _rank(pair: nn.Sequential) -> int:
    weight = pair[0].weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def _mode(pair: nn.Sequential) -> str | None:
    mode: str = vars(pair)[MARK]
    return None if mode == "linear" else mode
