"""What a Lightning checkpoint holds of SVD training, and the model that it stands for.

The weights in a checkpoint are dense, under the user's own names, so that whoever has the LightningModule's class can
load them. The exact factors ride in the callback's own state: for each layer its form, its rank and the very tensors
that are trained. Everything that is read is checked before anything is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_svd.layers.compounds import join, join_states, split_everywhere, split_prefixes, split_states, svd_layers
from lightning_svd.layers.forms import FORMS, DenseForm, balanced
from lightning_svd.layers.layer import FactorizedModule, release
from lightning_svd.layers.matrices import Factors, exact_products, roundoff, truncate, wide
from lightning_svd.layers.pairs import (
    bias_of,
    factored_pair,
    fill,
    low_rank_pairs,
    merged,
    merged_weight,
    rank_of,
    view_of,
)
from lightning_svd.layers.parts import prefix_of
from lightning_svd.layers.shards import IN_SHARDS
from lightning_svd.layers.views import CONV_MODES, CONVOLUTIONS, View, supported_type
from lightning_svd.model.plan import LayerPlan, layers_of
from lightning_svd.model.surgery import become, settle
from lightning_svd.plain_data import (
    Fits,
    by_name,
    each,
    having,
    is_count,
    is_finite,
    is_flag,
    is_mapping,
    is_number,
    is_tensor,
    is_text,
    optional,
    row,
)
from lightning_svd.wording import few

KEY = "lightning_svd"
VERSION = 2

State = dict[str, Any]
ModuleT = TypeVar("ModuleT", bound=nn.Module)

_LAYER_COST = having(
    repeats=is_count,
    dense_params=is_count,
    params_per_rank=is_count,
    dense_macs=is_count,
    macs_per_rank=is_count,
    input_shapes=each(each(is_count)),
    latency=optional(having(dense=is_finite, factored=each(row(is_count, is_finite)))),
)


def _is_cost_of_layer(value: Any) -> bool:
    """What a layer costs; how often it runs is not in files that were written when nobody asked."""
    return isinstance(value, dict) and _LAYER_COST({"repeats": 1} | value)


_LATENCY = having(
    dense=is_finite,
    samples=each(row(is_finite, is_finite)),
    others=is_finite,
    conditions=by_name(lambda value: is_text(value) or is_count(value)),
)
_IS_COST = optional(
    having(
        layers=by_name(_is_cost_of_layer),
        other_params=is_count,
        other_macs=is_count,
        batch_size=is_count,
        latency=optional(_LATENCY),
    )
)
_IS_CHANGE = having(
    step=is_count, epoch=is_count, ranks=by_name(is_count), macs_ratio=is_number, params_ratio=is_number
)
_IS_PAUSE = having(start=is_count, end=optional(is_count), value=is_number, best=is_number)
# Statistics of a batch that was not finite are thrown away when ranks are due, and in a file until then.
_IS_SEEN = having(lambda value: isinstance(value, Tensor), inputs=is_count, positions=is_count)

# What a run that is to go on needs beside its layers: its kind, and of what kind entries are in it.
_OF_A_RUN: dict[str, tuple[tuple[type, ...], Fits]] = {
    "refused": ((dict,), by_name(is_text)),
    "steps": ((int,), is_count),
    "last_cut": ((int,), is_count),
    "is_final": ((bool,), is_flag),
    "target": ((list,), row(is_text, is_number)),
    "timeline": ((list,), each(_IS_CHANGE)),
    "strengths": ((list,), each(row(is_count, is_number))),
    "warnings": ((list,), each(is_text)),
    "spectra_before": ((dict,), by_name(each(lambda value: is_finite(value) and value >= 0))),
    "cost": ((dict, type(None)), _IS_COST),
    "guard": (
        (dict, type(None)),
        optional(having(values=each(row(is_count, is_number)), pauses=each(_IS_PAUSE))),
    ),
    "observed": (
        (dict, type(None)),
        optional(having(waits=is_flag, observes=is_flag, listens=is_flag, batches=is_count, seen=by_name(_IS_SEEN))),
    ),
}


# ----------------------------------------------------------------------------------------------- the callback's state


def saved_state(checkpoint: Mapping[str, Any]) -> State | None:
    """The state of SVD training in a checkpoint, whatever its callback is called there; None if there is none."""
    key = saved_key(checkpoint)
    return None if key is None else checkpoint["callbacks"][key]


def saved_key(checkpoint: Mapping[str, Any]) -> str | None:
    """Under which of its callbacks' names a checkpoint has the state of SVD training; None if it has none."""
    states = checkpoint.get("callbacks")
    if not isinstance(states, Mapping):
        return None
    return next((key for key, state in states.items() if isinstance(state, dict) and KEY in state), None)


def check_version(found: Any, what: str) -> None:
    """Refuse a file of a version that this package does not read.

    Raises:
        ValueError: Naming both versions.
    """
    if found != VERSION:
        newer = not isinstance(found, int) or found > VERSION
        advice = "update it" if newer else f"use one that reads version {found}"
        raise ValueError(f"{what} has format version {found!r}, this lightning-svd reads version {VERSION}: {advice}")


def check_state(state: Any, who: str, may_be_in_shards: bool = False) -> None:
    """Refuse a state of SVD training that is of another version, or damaged.

    Args:
        state: What :func:`saved_state` found.
        who: Whose it is, to begin the message with.
        may_be_in_shards: Whether its factors may be in a folder of shards, and not in it.

    Raises:
        ValueError: In one line, naming the layer.
    """
    if not isinstance(state, Mapping) or KEY not in state:
        raise ValueError(f"{who} has no state of SVD training, got {_short(state)}")
    check_version(state[KEY], who)
    damaged = f"{who}: the state of SVD training in it is damaged"
    if type(state.get("is_finished")) is not bool:
        raise ValueError(f"{damaged}: `is_finished` is {_short(state.get('is_finished'))}")
    for key in ("layers", "current_layers"):
        if key in state:
            _check_layers(state[key], damaged)
            if not may_be_in_shards and any(entry.get(IN_SHARDS) for entry in state[key].values()):
                raise ValueError(
                    f"{who} has the ranks of SVD training, whose factors are in shards: resume from the folder itself, "
                    "with ModelParallelStrategy, or save with `save_distributed_checkpoint=False`"
                )
    if "layers" not in state and _OF_A_RUN.keys() & state.keys():
        raise ValueError(f"{damaged}: `layers` is missing")
    if "layers" in state and not state["is_finished"]:
        for key, (kinds, fits) in _OF_A_RUN.items():
            if (
                key not in state
                or not isinstance(state[key], kinds)
                or (is_number(state[key]) and not fits(state[key]))
            ):
                raise ValueError(f"{damaged}: `{key}` is {_short(state.get(key))}")
            if not fits(state[key]):
                what = "other fields" if key == "cost" else "an entry of another kind"
                raise ValueError(f"{damaged}: `{key}` has {what}")
        if not optional(by_name(is_tensor))(state.get("teacher")):
            raise ValueError(f"{damaged}: `teacher` has an entry of another kind")
        if not each(by_name(is_count))(state.get("ladder", [])):
            raise ValueError(f"{damaged}: `ladder` has an entry of another kind")
        if state["layers"].keys() - state["spectra_before"].keys():
            raise ValueError(f"{damaged}: `spectra_before` lacks layers")
        if state["spectra_before"].keys() - state["layers"].keys() - state["refused"].keys():
            raise ValueError(f"{damaged}: `layers` lacks some that were factorized")
        if state["cost"] and state["layers"].keys() - state["cost"]["layers"].keys():
            raise ValueError(f"{damaged}: `cost` lacks layers")


def _check_layers(layers: Any, damaged: str) -> None:
    if not isinstance(layers, dict):
        raise ValueError(f"{damaged}: `layers` is {_short(layers)}")
    for name, entry in layers.items():
        what = _wrong_with(entry)
        if what:
            raise ValueError(f"{damaged}: `{_in_a_line(name)}`: {what}")


def _wrong_with(entry: Any) -> str | None:
    """Why this is not what :meth:`~lightning_svd.layers.layer.SVDLayer.exact_state` gives; None if it may be."""
    if not isinstance(entry, dict):
        return f"it is {_short(entry)}"
    form, rank = entry.get("form"), entry.get("rank")
    if not isinstance(form, str) or form not in FORMS:
        return f"its form is {_short(form)}"
    if type(rank) is not int or rank < 0:
        return f"its rank is {_short(rank)}"
    mode = entry.get("conv_mode", "missing")
    if not (mode is None or (isinstance(mode, str) and mode in CONV_MODES)):
        return f"its `conv_mode` is {_short(entry.get('conv_mode'))}"
    if entry.get(IN_SHARDS) is True and form != DenseForm.name:
        return None
    for key in FORMS[form].columns:
        tensor = entry.get(key)
        if not isinstance(tensor, Tensor) or not tensor.ndim:
            return f"it has no {key}"
        if not tensor.is_floating_point():
            return f"its {key} is of {tensor.dtype}"
        if tensor.shape[-1] < rank:
            return f"its {key} has {tensor.shape[-1]} columns for a rank of {rank}"
        if not bool(torch.isfinite(tensor).all()):
            return f"its {key} holds NaN or infinity"
    if len({entry[key].shape[-1] for key in FORMS[form].columns}) > 1:
        return f"its {', '.join(FORMS[form].columns)} have different numbers of columns"
    return None


def _short(value: Any) -> str:
    """A value in a message, in one line."""
    if isinstance(value, (str, int, float, bool)) or value is None:
        text = repr(value)
        return text if len(text) <= 40 else f"{text[:37]}..."
    return f"a {type(value).__name__}"


def check_of_lightning(checkpoint: Any, path: str) -> None:
    """Refuse a file from which Lightning cannot resume, or of which an optimizer could not take up its state.

    Raises:
        ValueError: In one line, naming what is missing.
    """
    for key, fits in _OF_LIGHTNING.items():
        if key not in checkpoint:
            raise ValueError(f"{path} is no Lightning checkpoint of a fit: it has no `{key}`")
        if not fits(checkpoint[key]):
            raise ValueError(f"{path} is damaged: `{key}` is {_short(checkpoint[key])}")
    for number, state in enumerate(checkpoint.get("optimizer_states") or ()):
        if not _is_optimizer(state):
            raise ValueError(f"{path} is damaged: the state of optimizer {number} is none, or holds NaN")


_OF_LIGHTNING: dict[str, Fits] = {
    "pytorch-lightning_version": lambda value: is_text(value) and value[:1].isdigit(),
    "epoch": is_count,
    "global_step": is_count,
    "state_dict": is_mapping,
    "loops": having(is_mapping, fit_loop=is_mapping),
    "optimizer_states": lambda value: isinstance(value, list),
    "lr_schedulers": lambda value: isinstance(value, list) and all(isinstance(each, dict) for each in value),
}
# What optimizers remember of a parameter as tensors.
_MOMENTS = {"momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "sum"}


def _is_optimizer(state: Any) -> bool:
    """Whether this is what an optimizer's `state_dict` returns."""
    if not (isinstance(state, dict) and isinstance(state.get("state"), dict) and state.get("param_groups")):
        return False
    groups = state["param_groups"]
    if not (isinstance(groups, list) and all(isinstance(group, dict) for group in groups)):
        return False
    if not all(isinstance(group.get("params"), list) and all(map(is_count, group["params"])) for group in groups):
        return False
    numbers = [number for group in groups for number in group["params"]]
    if len({*numbers}) < len(numbers):
        return False
    for remembered in state["state"].values():
        if not isinstance(remembered, dict):
            return False
        for key, value in remembered.items():
            if isinstance(value, Tensor) and not is_tensor(value):
                return False
            if key in _MOMENTS and not (value is None or (isinstance(value, Tensor) and value.is_floating_point())):
                return False
    return True


def check_weights(module: nn.Module, state: Mapping[str, Any], path: str) -> None:
    """Refuse a state dict that a model could not load, before it loads a part of it.

    A model that changes what it loads, or loads a part, is asked only for what is in both: the values of parameters.

    Raises:
        ValueError: Naming the entry.
    """
    expected = module.state_dict(keep_vars=True)
    if _loads_as_torch_does(module):
        missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
        missing = {key for key in missing if not key.endswith("num_batches_tracked")}  # of old files
        for name, what in ((missing, "lacks"), (unexpected, "has, beside the model's,")):
            if name:
                raise ValueError(f"{path} does not fit the model: it {what} `{_in_a_line(min(name))}`")
        for key, here in expected.items():
            there = state.get(key, here)
            if not isinstance(here, Tensor) or is_lazy(here):
                continue
            if not isinstance(there, Tensor):
                raise ValueError(f"{path} does not fit the model: `{key}` is {_short(there)} there")
            if there.shape != here.shape:
                shapes = f"`{key}` is {tuple(there.shape)} there, {tuple(here.shape)} here"
                raise ValueError(f"{path} does not fit the model: {shapes}")
            if there.is_floating_point() != here.is_floating_point():
                raise ValueError(f"{path} does not fit the model: `{key}` is of {there.dtype} there, {here.dtype} here")
    for key, here in expected.items():
        if isinstance(here, nn.Parameter) and isinstance(state.get(key), Tensor) and not is_tensor(state[key]):
            raise ValueError(f"{path}: `{key}` holds NaN")


def _in_a_line(name: Any) -> str:
    return " ".join(str(name).split())[:80]


_PLAIN_LOADERS = {nn.Module._load_from_state_dict, nn.BatchNorm1d._load_from_state_dict}


def _loads_as_torch_does(module: nn.Module) -> bool:
    """Whether nobody, as far as can be seen, changes what is in a file before it is loaded, or loads a part of it."""
    if type(module).load_state_dict is not nn.Module.load_state_dict or not getattr(module, "strict_loading", True):
        return False
    own = getattr(type(module), "on_load_checkpoint", None)
    if own is not None and own.__module__.split(".")[0] not in ("lightning", "pytorch_lightning"):
        return False
    return all(
        type(child)._load_from_state_dict in _PLAIN_LOADERS and not child._load_state_dict_pre_hooks
        for child in module.modules()
    )


def check_same_layers(state: Mapping[str, Any], plan: Sequence[LayerPlan], where: str) -> None:
    """Refuse to resume a run whose layers are not those that this one would factorize.

    Args:
        state: That :func:`check_state` let pass, of a run that goes on.
        plan: Of the run that is going to take it up.
        where: The file.

    Raises:
        ValueError: Naming the layers that differ.
    """
    saved = {name: entry["conv_mode"] for name, entry in state["layers"].items()}
    here = {of.name: of.conv_mode for of in plan if not of.skipped and of.name not in state["refused"]}
    differ = sorted(name for name in here.keys() | saved.keys() if here.get(name, "") != saved.get(name, ""))
    if differ:
        raise ValueError(
            f"{where}: the checkpoint was written with other factorized layers, see "
            f"{few(map(repr, differ))}: resume with the `target_modules`, `exclude_modules` and `conv_mode` "
            "that it was written with"
        )


def check_fits(module: nn.Module, layers: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, View]:
    """Refuse low-rank layers of a file that are not those of a dense model.

    Args:
        module: Not factorized.
        layers: Entries that :func:`check_state` let pass.
        where: The file.

    Returns:
        How each layer's weight is seen as a matrix.

    Raises:
        ValueError: Naming the layer.
    """
    views = check_layers(module, layers, where)
    for name, entry in layers.items():
        for key in FORMS[entry["form"]].columns:
            stored = tuple(entry[key].shape)
            expected = FORMS[entry["form"]].shapes(views[name], stored[-1])[key]
            if stored != expected:
                shapes = f"{key} of `{name}` is {stored} there, {expected} here"
                raise ValueError(f"{where} does not fit the model: {shapes}")
    return views


def check_layers(module: nn.Module, layers: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, View]:
    """As :func:`check_fits`, of entries of which only ``rank`` and ``conv_mode`` are looked at."""
    found, views = layers_of(module), {}
    for name, entry in layers.items():
        layer = found[name] if name in found else _child(module, name, where)
        views[name] = view = plain_view(layer, name, entry["conv_mode"], where)
        if entry["rank"] > min(view.matrix_shape):
            rank, full = _short(entry["rank"]), min(view.matrix_shape)
            raise ValueError(f"{where} does not fit the model: `{name}` has rank {rank} there, at most {full} here")
    return views


def _child(module: nn.Module, name: str, where: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{where} has a low-rank layer `{name}`, which {type(module).__name__} does not have"
        ) from None


def plain_view(layer: nn.Module, name: str, conv_mode: str | None, where: str) -> View:
    """How the weight of a plain layer is seen as a matrix.

    Raises:
        ValueError: If the layer is low-rank already, or none that can be seen so.
    """
    kind = supported_type(layer)
    if kind is None or isinstance(layer, FactorizedModule) or (kind in CONVOLUTIONS) != (conv_mode is not None):
        expected = "convolution" if conv_mode else "linear layer"
        raise ValueError(f"`{name}` must be a plain {expected} to load {where}, got {type(layer).__name__}")
    return View.of(layer, conv_mode or "channel")


# --------------------------------------------------------------------------------------- what an entry says of a weight


def is_low_rank(entry: Mapping[str, Any] | None) -> TypeGuard[Mapping[str, Any]]:
    """Whether an entry holds factors, and not only says that the layer is dense."""
    return entry is not None and entry["form"] != DenseForm.name


def is_of(entry: Mapping[str, Any], view: View, weight: Tensor) -> bool:
    """Whether the factors of an entry multiply to this weight.

    They do not where the weights of a checkpoint are averages, or were changed by whoever wrote it.
    """
    with torch.no_grad(), exact_products(weight.device):
        left, right = _left_right(entry, weight.device)
        product, target = left @ right.mT, view.unfold(wide(weight))
        off, scale = (torch.linalg.vector_norm(value) for value in (product - target, target))
    # Rounding of the factors, of their product and of the weight, in the dtype that they are stored in.
    stored = weight.dtype
    rounding = 4 * torch.finfo(stored).eps + roundoff(view.matrix_shape, torch.float32)
    return bool(off <= min(rounding, roundoff(view.matrix_shape, stored)) * scale)


def _left_right(entry: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """The two factors of an entry, of equal scale, in float32 or wider."""
    columns = FORMS[entry["form"]].columns
    tensors = [wide(entry[key].to(device)) for key in columns]
    if len(tensors) == 2:
        return tensors[0][..., : entry["rank"]], tensors[1][..., : entry["rank"]]
    return balanced(truncate(Factors(*tensors), entry["rank"]))


# ----------------------------------------------------------------------------------------------- a model after its fit


def exact_layers(module: nn.Module, state: Mapping[str, Any]) -> State:
    """The exact weights of the layers that stay low-rank in a model after its fit, as entries of a state.

    Args:
        module: With pairs of plain layers, or with factorized layers.
        state: Its state dict, or one with its names, whose pairs these are.
    """
    exact = {name: layer.exact_state() for name, layer in svd_layers(module).items()}
    for name, pair in low_rank_pairs(module).items():
        first, second = (state.get(f"{prefix_of(name)}{half}.weight") for half in (0, 1))
        if first is not None and second is not None:
            view = view_of(pair)
            factors = {"A": view.left_factor(second), "B": view.right_factor(first)}
            exact[name] = {"form": "pair", "rank": rank_of(pair), "conv_mode": view.conv_mode, **factors}
    return exact


@torch.no_grad()
def to_dense_state(module: nn.Module, state: Mapping[str, Any]) -> State:
    """A state dict of a model after its fit with dense weights under the original names.

    Args:
        module: Whose pairs of low-rank layers are looked for.
        state: Of ``module``, or with its names; what is dense in it stays as it is.
    """
    dense = dict(state)
    for name, pair in under_every_name(module, low_rank_pairs(module)):
        prefix = prefix_of(name)
        if f"{prefix}0.weight" in dense:
            first, second = dense.pop(f"{prefix}0.weight"), dense.pop(f"{prefix}1.weight")
            with exact_products(first.device):
                dense[f"{prefix}weight"] = merged_weight(pair, first, second).contiguous()
            if f"{prefix}1.bias" in dense:
                dense[f"{prefix}bias"] = dense.pop(f"{prefix}1.bias")
    return join_states(module, dense)


def from_dense_state(module: nn.Module, state: Mapping[str, Any], exact: Mapping[str, Any]) -> State:
    """The inverse of :func:`to_dense_state`, for a model whose pairs are those of ``exact``."""
    names = split_states(module, state)
    for name, pair in under_every_name(module, low_rank_pairs(module)):
        prefix, view = prefix_of(name), view_of(pair)
        entry = exact.get(name) or exact[_first_name(module, pair)]
        if f"{prefix}weight" in names:
            weight = names.pop(f"{prefix}weight")
            left, right = (entry[key].to(weight) for key in ("A", "B"))
            names |= {f"{prefix}0.weight": view.first_weight(right), f"{prefix}1.weight": view.second_weight(left)}
            if f"{prefix}bias" in names:
                names[f"{prefix}1.bias"] = names.pop(f"{prefix}bias")
    return names


def _first_name(module: nn.Module, child: nn.Module) -> str:
    names: Iterator[str] = (name for name, other in module.named_modules() if other is child)
    return next(names)


def take_form(module: nn.Module, state: Mapping[str, Any], layers: Mapping[str, Any]) -> State:
    """Give a model after its fit the ranks of a checkpoint, in place, and the state to load into it.

    A layer that is plain in the model, or of which the checkpoint has no factors that are those of its weight, gets
    the dense weight.

    Args:
        module: Each low-rank layer a pair, or factorized.
        state: A dense state dict.
        layers: The entries of the checkpoint; {} for one without.
    """
    whole = {(prefix, kind) for prefix, kind in split_prefixes(module) if kind.is_whole_in(state, prefix)}
    weights = split_everywhere({key: value for key, value in state.items() if isinstance(value, Tensor)})
    exact: dict[str, Mapping[str, Any]] = {}

    def entry_of(name: str, view: View) -> Mapping[str, Any] | None:
        entry, weight = layers.get(name), weights.get(f"{prefix_of(name)}weight")
        fits = is_low_rank(entry) and weight is not None and weight.shape == view.weight_shape
        return entry if fits and is_of(entry, view, weight) else None  # type: ignore[arg-type]

    for name, layer in svd_layers(module).items():
        entry = entry_of(name, layer.view)
        if entry is None:
            release(layer)
        else:
            layer.load_exact_state(dict(entry))
            layer.shrink()
    for name, pair in low_rank_pairs(module).items():
        entry, plain = entry_of(name, view_of(pair)), merged(pair)
        if entry is None:
            become(pair, plain)
            continue
        twin = exact_pair(view_of(pair), entry, pair)
        exact[name] = _entry_of_pair(twin)
        become(pair, twin)
    join(module)
    settle(module)
    names = from_dense_state(module, state, exact)
    for prefix, kind in whole - {*split_prefixes(module)}:
        if kind.is_split_in(names, prefix):
            names = kind.join_state(names, prefix)
    return names


def _entry_of_pair(pair: Any) -> State:
    # clone: what is loaded must not share the memory of where it goes.
    first, second = (half.weight.detach().clone() for half in pair)
    return {"A": view_of(pair).left_factor(second), "B": view_of(pair).right_factor(first)}


@torch.no_grad()
def exact_pair(view: View, entry: Mapping[str, Any], like: Any) -> nn.Sequential:
    """Two new plain layers of the rank and the factors of an entry, with the bias of ``like``, a pair."""
    model = like[0].weight
    left, right = _left_right(entry, model.device)
    pair = factored_pair(view, left.shape[-1], bias_of(like) is not None)
    for half, weight in zip(pair, (view.first_weight(right), view.second_weight(left)), strict=True):
        fill(half, weight.to(model), bias_of(like), model)
    return pair.train(like.training)


def under_every_name(module: nn.Module, found: Mapping[str, ModuleT]) -> Iterator[tuple[str, ModuleT]]:
    """As ``found``, a shared layer under each of the names that it has in a state dict."""
    by_id = {id(layer): layer for layer in found.values()}
    names = module.named_modules(remove_duplicate=False)
    return ((name, by_id[id(child)]) for name, child in names if id(child) in by_id)
