"""Files of low-rank models: plain weights as safetensors, the ranks in the header; and checkpoints, to load.

What a file holds is checked as a whole, names, shapes, dtypes and values, before the model is changed. Nothing that it
may hold is run.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lightning_svd.arguments import check_module, needs
from lightning_svd.files.checkpoints import (
    KEY,
    State,
    check_fits,
    check_layers,
    check_state,
    check_version,
    is_low_rank,
    is_of,
    saved_state,
)
from lightning_svd.files.foreign import first_line, is_checkpoint, read_pickled
from lightning_svd.layers.compounds import KINDS, owner_of, split_everywhere, svd_layers
from lightning_svd.layers.forms import DenseForm
from lightning_svd.layers.identity import IdentityLinear
from lightning_svd.layers.layer import SVDLayer
from lightning_svd.layers.pairs import factored_pair, low_rank_pairs, rank_of, view_of
from lightning_svd.layers.parts import prefix_of
from lightning_svd.layers.views import CONV_MODES, View
from lightning_svd.model.counting import count_params
from lightning_svd.model.plan import LayerPlan
from lightning_svd.model.surgery import begin, finish, make_factored, to_factored, undo
from lightning_svd.writing import whole_file

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# Of the header of safetensors files: the first has pairs only, so that an older version of this package reads it.
VERSION, WITH_IDENTITIES = 1, 2


# -------------------------------------------------------------------------------------------------------------- writing


def save_low_rank(module: nn.Module, path: str | Path) -> Path:
    """Write a low-rank model's weights as safetensors, with the ranks in the header.

    The file is written beside its place and moved there when it is whole.

    Args:
        module: After a fit with ``final="factored"``, or with factorized layers, which are made plain in a copy.
        path: File to write.

    Returns:
        The path.

    Raises:
        ValueError: If a parameter holds NaN or infinity, which no reader would take, or the model has what safetensors
            cannot hold: sparse tensors, extra state that is no tensor.
        OSError: If it cannot be written; a file that was there is as it was.
    """
    check_module("module", module)
    plain = to_factored(module, count_params(module)) if svd_layers(module) else module
    pairs = low_rank_pairs(plain)
    _check_finite(dict(plain.named_parameters()), dict(plain.named_parameters()), "the model cannot be saved")
    ranks = {name: {"rank": rank_of(pair), "conv_mode": view_of(pair).conv_mode} for name, pair in pairs.items()}
    identities = {name: child.rank for name, child in plain.named_modules() if isinstance(child, IdentityLinear)}
    ranks |= {name: {"rank": rank, "conv_mode": None, "form": "identity"} for name, rank in identities.items()}
    version = WITH_IDENTITIES if identities else VERSION
    return write_weights(plain, path, {KEY: json.dumps({"version": version, "layers": ranks})})


def write_weights(module: nn.Module, path: str | Path, header: dict[str, str] | None = None) -> Path:
    """Write the weights of a module as safetensors, whole or not at all; arguments as for :func:`save_low_rank`."""
    with needs("files"):
        from safetensors import SafetensorError
        from safetensors.torch import save_model

    _check_storable(module.state_dict())
    with whole_file(path, SafetensorError) as beside:
        save_model(module, beside, header)
    return Path(path)


def _check_storable(state: Mapping[str, Any]) -> None:
    """Refuse what safetensors cannot hold, of which it would speak in words of its own making.

    Raises:
        ValueError: Naming the first of it.
    """
    for key, value in state.items():
        if not isinstance(value, Tensor):
            what = f"{type(value).__name__}, from `get_extra_state`,"
        elif value.layout is not torch.strided or value.is_quantized:
            what = f"{str(value.dtype if value.is_quantized else value.layout).removeprefix('torch.')} tensor"
        elif not _is_storable(value.dtype):
            what = f"{str(value.dtype).removeprefix('torch.')} tensor"
        else:
            continue
        raise ValueError(
            f"the model cannot be saved as safetensors: `{key}` is a {what} which they cannot hold: make it no part of "
            "the state dict, or write the model by `torch.save`"
        )


@functools.cache
def _is_storable(dtype: torch.dtype) -> bool:
    """Whether safetensors hold it, which is asked by writing some, once: their table of dtypes is not public."""
    from safetensors.torch import save

    try:
        save({"": torch.empty(0, dtype=dtype)})
    except KeyError:
        return False
    return True


# -------------------------------------------------------------------------------------------------------------- reading


def load_low_rank(module: ModuleT, path: str | Path) -> ModuleT:
    """Load a low-rank model into a freshly built dense one, in place, on its device and in its dtype.

    Args:
        module: As it was before it was factorized; its own weights do not matter.
        path: Of a file that :func:`save_low_rank` wrote, or of a checkpoint of SVD training: one from during the fit
            gives the model of the ranks that it had then. Where a checkpoint holds averaged weights, layers get those
            of that rank that are nearest to them.

    Returns:
        ``module``.

    Raises:
        ValueError: If the file is neither, is damaged, is of another version, or does not fit the model, or if the
            model is on the meta device. The model is then as it was.
    """
    check_module("module", module)
    for name, tensor in module.named_parameters():
        if tensor.is_meta:
            raise ValueError(
                f"`{name}` is on the meta device, where nothing can be loaded into it: build the model on the device "
                "where it is to be"
            )
    if is_checkpoint(path):
        return load_low_rank_checkpoint(module, read_checkpoint(path), path)
    return _load_safetensors(module, str(path))


def read_checkpoint(path: str | Path) -> State:
    """A Lightning checkpoint, on the CPU, read without running any code that it may hold.

    Raises:
        ValueError: If it is none, or cannot be read in that way.
        FileNotFoundError: If it is not there.
    """
    checkpoint = read_pickled(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"{path} is no Lightning checkpoint: it has no `state_dict`")
    return checkpoint


def low_rank_layers(checkpoint: Mapping[str, Any], path: str | Path) -> State | None:
    """The entry of each layer that is low-rank in a checkpoint; None if it is no checkpoint of SVD training.

    Raises:
        ValueError: If they are damaged, or of another version.
    """
    if KEY in checkpoint:  # where the first version had it
        check_version(1, str(path))
    state = saved_state(checkpoint)
    if state is None:
        return None
    check_state(state, str(path))
    return {name: entry for name, entry in state.get("layers", {}).items() if is_low_rank(entry)}


class _Tensor(NamedTuple):
    """What a file says of a tensor before it is read."""

    shape: tuple[int, ...]
    is_float: bool


def load_low_rank_checkpoint(module: ModuleT, checkpoint: Mapping[str, Any], path: str | Path) -> ModuleT:
    """:func:`load_low_rank` of a checkpoint that was read from ``path``."""
    where, state = str(path), checkpoint["state_dict"]
    layers = low_rank_layers(checkpoint, path)
    if layers is None:
        raise ValueError(f"{path} has no ranks beside its weights: it is no checkpoint of SVD training to resume from")
    tensors = _tensors(state)
    found = {key: _Tensor(tuple(value.shape), value.is_floating_point()) for key, value in tensors.items()}
    expected = _tensors(module.state_dict(keep_vars=True))
    _check_tensors(expected, found, where)
    views = check_fits(module, layers, where)
    _check_finite(tensors, _parameters(expected), where)
    unknown = [" ".join(str(key).split())[:80] for key in state.keys() - module.state_dict().keys()]
    if unknown:
        raise ValueError(f"{where} does not fit the model: it has, beside the model's, `{min(unknown)}`")
    module.load_state_dict(state)
    weights = split_everywhere(tensors)
    exact, ranks = {}, {}
    for name, entry in layers.items():
        if is_of(entry, views[name], weights[f"{prefix_of(name)}weight"]):
            exact[name] = entry
        else:
            ranks[name] = entry["rank"]
    return _become_low_rank(module, views, exact, ranks)


def _load_safetensors(module: ModuleT, path: str) -> ModuleT:
    header, found = _read_header(path)
    entries = _entries(header, path)
    expected = _tensors(module.state_dict(keep_vars=True))
    views = check_layers(module, entries, path)
    identities = {name for name, entry in entries.items() if entry.get("form") == "identity"}
    for name in identities:
        if views[name].layer_type is not nn.Linear or entries[name]["rank"] >= min(views[name].matrix_shape):
            raise ValueError(f"{path} does not fit the model: `{name}` cannot have an identity inside here")
    expected = _with_pairs(
        module, expected, {name: (view, entries[name]["rank"]) for name, view in views.items()}, identities
    )
    _check_tensors(expected, found, path)
    tensors = _read_tensors(path)
    _check_finite(tensors, _parameters(expected), path)
    exact = {}
    for name, view in views.items():
        if name in identities:
            order = _weight_in(tensors, module, name, "order")
            if not torch.equal(order.sort().values, torch.arange(view.inputs)):
                raise ValueError(f"{path} is damaged: `{name}.order` is no order of {view.inputs} inputs")
            columns, mixing = (_weight_in(tensors, module, name, key) for key in ("columns", "mixing"))
            right = torch.cat([torch.eye(len(mixing), dtype=mixing.dtype), mixing], 1).mT[order.argsort()]
            exact[name] = {"form": "pair", "rank": len(mixing), "conv_mode": None, "A": columns, "B": right}
            continue
        first, second = (_weight_in(tensors, module, name, f"{half}.weight") for half in (0, 1))
        factors = {"A": view.left_factor(second), "B": view.right_factor(first)}
        exact[name] = {"form": "pair", **entries[name], **factors}
    _become_low_rank(module, views, exact, {})
    make_factored(module, forms=dict.fromkeys(identities, "identity"))
    module.load_state_dict(tensors, strict=False)  # of tied tensors a file holds one name only
    return module


def _become_low_rank(
    module: ModuleT, views: Mapping[str, View], exact: Mapping[str, State], ranks: Mapping[str, int]
) -> ModuleT:
    """Have layers of a dense model low-rank, by these exact factors, or at these ranks of the weights they have."""
    modes = {name: view.conv_mode for name, view in views.items()}
    if not modes:
        return module
    layers = begin(module, [LayerPlan(name, "", (), conv_mode=mode) for name, mode in modes.items()])
    before = {name: _dense_weight(layer) for name, layer in layers.items()}
    forms = {}
    try:
        for name, layer in layers.items():
            if name in exact:
                layer.load_exact_state(dict(exact[name]))
            else:
                layer.to_svd()
                layer.keep(ranks[name])
            pays = layer.rank * layer.params_per_rank < layer.dense_params
            forms[name] = "pair" if pays or layer.form.name == "pair" else "dense"
    except BaseException:
        undo(module, before)
        raise
    finish(module, forms)
    return module


# ------------------------------------------------------------------------------------------------- what is in a file


def _read_header(path: str) -> tuple[Any, dict[str, _Tensor]]:
    """What a safetensors file says of itself: our part of the header, and its tensors."""
    with needs("files"):
        from safetensors import safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(KEY, "null"))
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            tensors = {
                key: _Tensor(tuple(each.get_shape()), "F" in str(each.get_dtype())) for key, each in slices.items()
            }
    except Exception as error:  # whatever a reader raises on bytes that are none of its own
        raise ValueError(f"{path} is not a readable safetensors file: {first_line(error)}") from None
    return header, tensors


def _read_tensors(path: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except Exception as error:
        raise ValueError(f"{path} is not a readable safetensors file: {first_line(error)}") from None


def _entries(header: Any, path: str) -> State:
    """Layer name -> its rank and mode, as the header of a low-rank file tells them."""
    if header is None:
        raise ValueError(f"{path} has no ranks in its header: it was not written by `save_low_rank`")
    if isinstance(header, dict):
        if header.get("version") not in (VERSION, WITH_IDENTITIES):
            version = str(header.get("version"))[:40]
            raise ValueError(
                f"{path} has format version {version}, this lightning-svd reads versions {VERSION} and "
                f"{WITH_IDENTITIES}: update it"
            )
        entries = header.get("layers")
        if isinstance(entries, dict) and all(map(_is_entry, entries.values())):
            return entries
    raise ValueError(f"{path}: its header is damaged, got {str(header)[:80]}")


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() - {"form"} != {"rank", "conv_mode"}:
        return False
    if entry.get("form", "identity") != "identity":
        return False
    return type(entry["rank"]) is int and entry["rank"] > 0 and entry["conv_mode"] in (None, *CONV_MODES)


# ------------------------------------------------------------------------------------------------------------- checks


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _parameters(expected: Mapping[str, Tensor]) -> set[str]:
    return {key for key, value in expected.items() if isinstance(value, nn.Parameter)}


def _with_pairs(
    module: nn.Module,
    state: Mapping[str, Tensor],
    pairs: Mapping[str, tuple[View, int]],
    identities: Collection[str] = (),
) -> dict[str, Tensor]:
    """The state dict of a dense model as it would be with pairs of these ranks in it; new tensors are on meta.

    Layers whose names are in ``identities`` have an identity inside in the place of a pair.
    The same tensor stands under each name of what is shared.
    """
    names: dict[str, Tensor] = dict(state)
    owners = {id(owner): owner for name in pairs if (owner := owner_of(module, name)) is not None}
    for owner in owners.values():
        kind = next(kind for base, kind in KINDS.items() if isinstance(owner, base))
        parts: dict[str, Tensor] = {}
        for prefix in _prefixes(module, owner):
            if kind.is_whole_in(names, prefix):
                split = kind.split_state(names, prefix)
                for key in split.keys() - names.keys():
                    part = key.removeprefix(prefix)
                    split[key] = parts.setdefault(part, _empty_like(split[key]))
                names = split
    for name, (view, rank) in pairs.items():
        bias_key = "bias" if name in identities else "1.bias"
        with torch.device("meta"):
            inside = name in identities
            made = (
                IdentityLinear(view.inputs, view.outputs, rank, False) if inside else factored_pair(view, rank, False)
            )
        pair: dict[str, Any] = made.state_dict(keep_vars=True)
        for prefix in _names_of(module, name):
            del names[f"{prefix}weight"]
            names |= {f"{prefix}{key}": weight for key, weight in pair.items()}
            if f"{prefix}bias" in names:
                names[f"{prefix}{bias_key}"] = names.pop(f"{prefix}bias")
    return names


def _empty_like(tensor: Tensor) -> Tensor:
    return nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)


def _prefixes(module: nn.Module, child: nn.Module) -> list[str]:
    """How names in a state dict begin of what is in ``child``, which may be shared."""
    return [prefix_of(name) for name, other in module.named_modules(remove_duplicate=False) if other is child]


def _names_of(module: nn.Module, name: str) -> list[str]:
    """:func:`_prefixes` of a layer, that of a part of a module in one piece too."""
    owner, _, part = name.rpartition(".")
    if owner_of(module, name) is None:
        return _prefixes(module, module.get_submodule(name))
    return [f"{prefix}{part}." for prefix in _prefixes(module, module.get_submodule(owner))]


def _weight_in(tensors: Mapping[str, Tensor], module: nn.Module, name: str, own: str) -> Tensor:
    """A tensor of a low-rank layer in a file, which holds it under one of its names."""
    return next(tensors[key] for prefix in _names_of(module, name) if (key := f"{prefix}{own}") in tensors)


def _dense_weight(layer: SVDLayer) -> Tensor:
    assert isinstance(layer.form, DenseForm)
    return layer.form.weight().detach()


def _check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, _Tensor], path: str) -> None:
    """Refuse a file whose tensors are not those of ``expected``, each at least under one of its names."""
    there = {_storage(expected[key]) for key in found if key in expected}
    for key in [*found, *expected]:
        shape = found[key].shape if key in found else None
        here = tuple(expected[key].shape) if key in expected else None
        if shape != here and (shape is not None or _storage(expected[key]) not in there):
            raise ValueError(f"{path} does not fit the model: `{key}` is {shape} there, {here} here")
        if key in found and found[key].is_float != expected[key].is_floating_point():
            kinds = ["whole numbers", "floating-point numbers"]
            one, other = kinds[found[key].is_float], kinds[expected[key].is_floating_point()]
            raise ValueError(f"{path} does not fit the model: `{key}` holds {one} there, {other} here")


def _storage(tensor: Tensor) -> int:
    """The same for tensors that a file holds only once."""
    return tensor.untyped_storage().data_ptr() or id(tensor)


def _check_finite(tensors: Mapping[str, Tensor], names: Iterable[str], path: str) -> None:
    for key in sorted(names):
        if key in tensors and tensors[key].is_floating_point() and not bool(torch.isfinite(tensors[key]).all()):
            raise ValueError(f"{path}: `{key}` holds NaN or infinity")
