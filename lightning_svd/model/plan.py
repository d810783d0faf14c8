"""Which layers are factorized and how, or why not: decided here, done by :mod:`lightning_svd.model.surgery`.

A plan can be written to a YAML file, edited, and read back.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import FunctionType, MethodType, NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_svd.arguments import check_count, check_module, check_rank_pattern, needs, shown
from lightning_svd.layers.compounds import linears_of, named_layers, owner_of, why_not_split
from lightning_svd.layers.layer import FactorizedModule, SVDLayer, name_taken, own_class
from lightning_svd.layers.pairs import low_rank_pairs
from lightning_svd.layers.parts import prefix_of
from lightning_svd.layers.views import CONV_MODES, CONVOLUTIONS, View, supported_type
from lightning_svd.model.replay import untouched
from lightning_svd.wording import few
from lightning_svd.writing import write_whole

Targets = str | Sequence[str] | None
ALL_LINEAR = "all-linear"
_DEEPEST = 8  # lists in lists in a plan


@dataclass(frozen=True)
class LayerPlan:
    """What is to become of one layer.

    Attributes:
        name: As in ``named_modules``.
        kind: Class of the dense layer.
        weight_shape: Of the dense weight.
        matrix_shape: (m, n) of the weight seen as a matrix, of each group; None if the layer is skipped.
        conv_mode: "channel" or "spatial" for a convolution that is factorized, else None.
        skipped: Why the layer is left alone; None if it is factorized.
        max_rank: The most ranks that it is to keep; None for no bound.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    matrix_shape: tuple[int, int] | None = None
    conv_mode: str | None = None
    skipped: str | None = None
    max_rank: int | None = None

    @property
    def full_rank(self) -> int:
        """min(m, n); 0 if the layer is skipped."""
        return min(self.matrix_shape) if self.matrix_shape else 0

    @property
    def break_even(self) -> int:
        """The largest rank whose factors have fewer parameters than the dense weight; 0 if the layer is skipped."""
        return _break_even(*self.matrix_shape) if self.matrix_shape else 0


def plan(
    module: nn.Module,
    target_modules: Targets = None,
    exclude_modules: Targets = (),
    conv_mode: str = "channel",
    rank_pattern: Mapping[str, int] | None = None,
    include_frozen: bool = False,
    include_meta: bool = False,
) -> list[LayerPlan]:
    """What :func:`~lightning_svd.decompose` would do, with the reason for every layer skipped; changes nothing.

    Args:
        module: Any module.
        target_modules: Layers to factorize, each item a layer's name, the end of one after a dot, a type of layer
            ("Conv2d"), "all-linear", or a regular expression for whole names; None for every supported layer.
        exclude_modules: Layers to leave alone, in the same form.
        conv_mode: "channel", "spatial", or "auto", for each layer the one that has less to remove before it pays.
        rank_pattern: The most ranks that layers are to keep, by names in the same form; of several that match a layer
            the last counts.
        include_frozen: Whether frozen layers are meant too, which are left alone unless ``target_modules`` names them.
        include_meta: Whether layers on the meta device are meant too, whose weights have no values yet.

    Raises:
        ValueError: If the mode is unknown, an item matches no layer, or a rank is not a positive integer.
    """
    check_module("module", module)
    if conv_mode not in (*CONV_MODES, "auto"):
        raise ValueError(f"`conv_mode` must be one of {', '.join(CONV_MODES)}, auto, got {conv_mode!r}")
    layers = layers_of(module)
    targeted = default_targets(layers) if target_modules is None else matching(layers, target_modules, "target_modules")
    excluded = matching(layers, exclude_modules, "exclude_modules")
    most: dict[str, int] = {}
    check_rank_pattern(rank_pattern)
    for pattern, rank in (rank_pattern or {}).items():
        most |= dict.fromkeys(matching(layers, pattern, "rank_pattern"), rank)
    named = {name for name in layers for item in _listed(target_modules) if _is_called(name, item)}
    reasons = _Reasons(module, targeted, excluded, conv_mode, layers if include_frozen else named, include_meta)
    plans = [
        _plan_layer(name, layer, conv_mode, reasons.why_not(name, layer), most.get(name))
        for name, layer in layers.items()
    ]
    return plans + [
        LayerPlan(name, "Parameter", tuple(parameter.shape), skipped=_of_no_layer(parameter))
        for name, parameter in _own_matrices(module, layers)
    ]


def with_reasons(plans: Iterable[LayerPlan], reasons: Mapping[str, str]) -> list[LayerPlan]:
    """Plans with further layers left alone.

    Args:
        plans: Of all layers.
        reasons: Why, by the names of layers.
    """
    return [replace(of, skipped=reasons.get(of.name, of.skipped)) for of in plans]


# How many names a message gives, and from which share of the parameters on it tells of what is left alone.
_NAMES, LARGE = 4, 0.01


def names_by_reason(plans: Iterable[LayerPlan]) -> dict[str, str]:
    """Why layers are skipped, and which they are, as text: the first few names and how many more there are."""
    names: dict[str, list[str]] = {}
    for of in plans:
        if of.skipped:
            names.setdefault(of.skipped, []).append(of.name or "the module itself")
    return {reason: few(some, _NAMES) for reason, some in names.items()}


def large_left_alone(plans: Iterable[LayerPlan], params: int) -> str | None:
    """What is left alone of a model and how large it is, by the reason; None where no reason is worth a mention.

    Args:
        plans: Of all layers.
        params: How many parameters the dense model has.
    """
    plans = [*plans]
    params = max(params, sum(prod(of.weight_shape) for of in plans))  # those of low rank have fewer
    sizes: Counter[str] = Counter()
    for of in plans:
        sizes[of.skipped or ""] += prod(of.weight_shape) if of.skipped else 0
    names = names_by_reason(plans)
    large = [(reason, size / max(1, params)) for reason, size in sizes.most_common() if size > LARGE * params]
    if not large:
        return None
    return "; ".join(f"{share:.1%} of the parameters, {names[reason]}: {reason}" for reason, share in large)


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """Whatever has a weight matrix, by name; of attention and recurrent modules the parts, as if taken apart."""
    layers: dict[str, nn.Module] = {}
    for name, child in named_layers(module):
        parts = linears_of(child)
        if parts:
            layers |= {prefix_of(name) + part: layer for part, layer in parts.items()}
        elif name not in layers and (_holds_matrix(child) or _computes_weight(child) or isinstance(child, SVDLayer)):
            layers[name] = child
    return layers


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameter that each layer's weight is, or is a part of, by the layer's name."""
    return {name: _parameter_of(module, name, layer) for name, layer in layers_of(module).items()}


def _parameter_of(module: nn.Module, name: str, layer: nn.Module) -> Tensor:
    owner = owner_of(module, name)
    packed = getattr(owner, "in_proj_weight", None)
    return _weight(layer) if packed is None or name.endswith(".out_proj") or name == "out_proj" else packed


def default_targets(layers: Mapping[str, nn.Module]) -> set[str]:
    """Names of the layers that are meant where none are named: all but embeddings, whose lookups cost no MACs."""
    return {name for name, layer in layers.items() if supported_type(layer) is not nn.Embedding}


def matching(layers: Mapping[str, nn.Module], targets: Targets, argument: str) -> set[str]:
    """Names of the layers that ``targets`` name; see :func:`plan`.

    Raises:
        ValueError: If one of them names none.
    """
    matched = set()
    for target in _listed(targets):
        hits = _named(layers, target)
        if not hits:
            raise ValueError(_no_match(argument, target, layers))
        matched |= hits
    return matched


def _listed(targets: Targets) -> Sequence[str]:
    return [targets] if isinstance(targets, str) else targets or ()


def _is_called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _named(layers: Mapping[str, nn.Module], target: str) -> set[str]:
    if target == ALL_LINEAR:
        return {name for name, layer in layers.items() if _is_linear(layer)}
    hits = {name for name, layer in layers.items() if _is_called(name, target) or own_class(layer).__name__ == target}
    if hits:
        return hits
    try:
        pattern = re.compile(target)
    except re.error:
        return set()
    return {name for name in layers if pattern.fullmatch(name)}


def _is_linear(layer: nn.Module) -> bool:
    kind = supported_type(layer)
    return kind is not None and kind is not nn.Embedding and kind not in CONVOLUTIONS


def _no_match(argument: str, target: str, layers: Mapping[str, nn.Module]) -> str:
    return f"`{argument}`: {target!r} matches no layer with a weight matrix; there are: {few(layers) or 'none'}"


# Why layers are skipped


def _holds_matrix(module: nn.Module) -> bool:
    """Whether the module itself owns a weight of two or more dimensions, lazy ones included."""
    weight = None if isinstance(module, torch.jit.ScriptModule) else module._parameters.get("weight")
    return weight is not None and (is_lazy(weight) or weight.ndim >= 2)


def _computes_weight(module: nn.Module) -> bool:
    """Whether a supported layer computes its weight from other parameters, or hides it in a script."""
    if isinstance(module, torch.jit.ScriptModule):
        return isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim >= 2
    if supported_type(module) is None:
        return False
    weight = module._parameters.get("weight")
    return "weight" not in module._parameters or not isinstance(weight, (nn.Parameter, NoneType))


def _of_no_layer(parameter: nn.Parameter) -> str:
    many = parameter.shape[0] if parameter.ndim == 3 else 1
    if many > 1:
        return f"{many} matrices in one parameter, not the weight of a layer"
    return "a matrix of its own, not the weight of a layer"


def _computed_by(layer: nn.Module) -> str:
    """What computes a layer's weight, parametrizations or torch's older hooks, as text; "" if that is not known."""
    own = getattr(layer, "parametrizations", {})
    makers = [*own["weight"]] if "weight" in own else [*layer._forward_pre_hooks.values()]
    names = [type(maker).__name__.strip("_") for maker in makers if not isinstance(maker, (FunctionType, MethodType))]
    return f" ({', '.join(names)})" if names else ""


def _own_matrices(module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of two or more dimensions that are no layer's weight: of experts in one piece, or written by hand."""
    known = {id(p) for layer in layers.values() for p in layer.parameters()}
    for name, child in module.named_modules():
        if isinstance(child, torch.jit.ScriptModule) or linears_of(child) or isinstance(child, FactorizedModule):
            continue
        for key, parameter in child.named_parameters(recurse=False):
            if not is_lazy(parameter) and id(parameter) not in known and sum(n > 1 for n in parameter.shape) > 1:
                yield prefix_of(name) + key, parameter


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Reasons:
    """Why layers are skipped."""

    def __init__(
        self,
        module: nn.Module,
        targeted: set[str],
        excluded: set[str],
        conv_mode: str,
        thawed: Container[str],
        with_meta: bool = False,
    ) -> None:
        self.module, self.targeted, self.excluded, self.conv_mode = module, targeted, excluded, conv_mode
        self.thawed, self.with_meta = thawed, with_meta
        own = [
            parameter
            for child in module.modules()
            if not isinstance(child, torch.jit.ScriptModule)
            for parameter in child._parameters.values()
            if parameter is not None and not is_lazy(parameter)
        ]
        self.halves = {half for pair in low_rank_pairs(module).values() for half in pair}
        self.owners = Counter(map(id, own))
        self.places = Counter(place for parameter in {id(p): p for p in own}.values() if (place := _place(parameter)))

    def why_not(self, name: str, layer: nn.Module) -> str | None:
        return next(self._reasons(name, layer), None)

    def _reasons(self, name: str, layer: nn.Module) -> Iterator[str]:
        if isinstance(layer, SVDLayer):
            yield "already factorized; `to_dense(model)` makes it a dense layer again"
        if layer in self.halves:
            yield "one of the two layers of a low-rank one; `to_dense(model)` makes them one again"
        if name in self.excluded:
            yield "excluded by `exclude_modules`"
        kind = supported_type(layer)
        if name not in self.targeted:
            lookup = "lookups cost no MACs; name it to save parameters"
            yield lookup if kind is nn.Embedding else "not in `target_modules`"
        if isinstance(layer, torch.jit.ScriptModule):
            yield "scripted"
        if _computes_weight(layer):
            yield f"its weight is computed from other parameters{_computed_by(layer)}"
        weight = _weight(layer)
        if is_lazy(weight):
            yield "not initialized yet"
        if weight.is_meta and not self.with_meta:
            yield "on the meta device, without values"
        if kind is None:
            yield "unsupported type"
        elif type(layer) not in (kind, NonDynamicallyQuantizableLinear):
            yield f"subclass of {kind.__name__}, which may have a forward of its own"
        yield from self._of_weight(name, layer, weight)
        if isinstance(layer, nn.Embedding) and (layer.sparse or layer.max_norm is not None or layer.scale_grad_by_freq):
            yield "an Embedding with `sparse`, `max_norm` or `scale_grad_by_freq`"
        if isinstance(layer, nn.Embedding) and _is_padding_seen(layer):
            yield "its padding row, which never trains, is not zero: factors would move it"
        if [*layer.children()]:
            yield "has modules of its own in it"
        if taken := name_taken(layer):
            yield f"its attribute `{taken}` has the name of one of a factorized layer"
        if _break_even(*_view_in(layer, self.conv_mode).matrix_shape) == 0:
            yield "too thin: even rank 1 costs as much as the dense layer"

    def _of_weight(self, name: str, layer: nn.Module, weight: Tensor) -> Iterator[str]:
        owner = owner_of(self.module, name)
        reason = why_not_split(owner) if owner is not None else None
        if reason:
            yield reason
        parameter = _parameter_of(self.module, name, layer)
        if type(parameter) is not nn.Parameter:
            yield f"its weight is a {type(parameter).__name__}, not a plain parameter"
        if parameter.dtype not in _DTYPES:
            yield f"its weight is of {parameter.dtype}"
        if not parameter.numel():
            yield "its weight is empty"
        # A module that holds another's weight may be given other tensors in its place in every call.
        with_it = [] if owner is None else [p for p in owner._parameters.values() if p is not None]
        if any(self.owners[id(p)] > 1 for p in (parameter, *with_it)):
            yield "weight tied to another module's"
        place = _place(parameter)
        if place and self.places[place] > 1:
            yield "weight shares its memory with another parameter"
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            yield "its weight has a hook, which factors would not call"
        if not parameter.requires_grad and name not in self.thawed:
            yield "frozen; name it in `target_modules` to factorize it all the same"


def _place(parameter: Tensor) -> tuple[Any, int] | None:
    """Where its values lie; None where it has none."""
    if parameter.is_meta or type(parameter) is not nn.Parameter or not parameter.numel():
        return None
    return parameter.device, parameter.data_ptr()


def _is_padding_seen(layer: nn.Embedding) -> bool:
    """Whether the row of what stands for nothing is not zero."""
    if layer.padding_idx is None or layer.weight.is_meta:
        return False
    return bool(layer.weight[layer.padding_idx].detach().any())


def _weight_shape(layer: nn.Module) -> tuple[int, ...]:
    weight = _weight(layer)
    return () if is_lazy(weight) else tuple(weight.shape)


def _weight(layer: nn.Module) -> Tensor:
    weight: Any
    if is_parametrized(layer, "weight"):
        with untouched(layer), torch.no_grad():  # spectral norm iterates whenever it is read in training
            weight = layer.weight
    else:
        weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, Tensor) else torch.empty(())  # a hook makes it in each call


def _break_even(m: int, n: int) -> int:
    return (m * n - 1) // (m + n) if m * n else 0


def _view_in(layer: nn.Module, conv_mode: str) -> View:
    """The view of a plain layer in a mode, "auto" among them."""
    views = [View.of(layer, mode) for mode in (CONV_MODES if conv_mode == "auto" else (conv_mode,))]
    # "auto": where the break-even rank is the larger share of the full rank, less must be removed before it pays.
    return max(views, key=lambda view: _break_even(*view.matrix_shape) / min(view.matrix_shape))


def _plan_layer(
    name: str, layer: nn.Module, conv_mode: str, skipped: str | None, max_rank: int | None = None
) -> LayerPlan:
    kind, shape = own_class(layer).__name__, _weight_shape(layer)
    if skipped:
        return LayerPlan(name, kind, shape, skipped=skipped)
    view = _view_in(layer, conv_mode)
    return LayerPlan(name, kind, shape, view.matrix_shape, view.conv_mode, max_rank=max_rank)


# Plans in files

_HOW_TO_USE = """\
# What becomes of each layer. Edit it and pass it back, as SVDTrainingCallback(plan_file=...): change `conv_mode`, set
# `max_rank`, or write a reason to `skip` a layer. A layer that is not listed is skipped.
"""


def write_plan(layer_plans: Sequence[LayerPlan], path: str | Path) -> Path:
    """Write a plan as YAML, for reading, editing and :func:`read_plan`; returns the path."""
    with needs("files"):
        import yaml

    entries = {layer.name: _entry(layer) for layer in layer_plans}
    text = yaml.safe_dump({"layers": entries}, sort_keys=False, width=120, default_flow_style=None)
    write_whole(path, _HOW_TO_USE + text)
    return Path(path)


def _entry(layer: LayerPlan) -> dict[str, Any]:
    about = {"kind": layer.kind, "weight": list(layer.weight_shape)}
    if layer.skipped:
        return about | {"skip": layer.skipped}
    mode = {"conv_mode": layer.conv_mode} if layer.conv_mode else {}
    assert layer.matrix_shape
    matrix = {"matrix": list(layer.matrix_shape), "break_even": layer.break_even}
    return about | mode | matrix | {"max_rank": layer.max_rank}


def read_plan(path: str | Path, module: nn.Module) -> list[LayerPlan]:
    """The plan of a file that :func:`write_plan` wrote, edited or not, for ``module``.

    What `kind`, `matrix` and `break_even` say there is for the reader's information; a `weight` must be the model's.

    Raises:
        ValueError: If the file is no such plan, or does not fit ``module``; the message names the layer.
    """
    entries = _entries(path)
    layers = {layer.name: layer for layer in plan(module)}
    unknown = sorted(entries.keys() - layers.keys())
    if unknown:
        raise ValueError(f"{path}: {type(module).__name__} has no layer {shown(unknown[0])} with a weight matrix")
    children = layers_of(module)
    return [
        _as_edited(layer, entries.get(name), children[name], module, path) if name in children else layer
        for name, layer in layers.items()
    ]


def _entries(path: str | Path) -> dict[str, dict[str, Any]]:
    with needs("files"):
        import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        _check_plain(yaml, text)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"`plan_file`: cannot read a plan from {path}: {why}") from None
    entries = content.get("layers") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"{path}: expected `layers:` with an entry for each layer")
    for name in entries:
        if not isinstance(name, str):
            raise ValueError(f"{path}: the name of a layer must be in quotes, '{name}', got {shown(name)}")
    return entries


def _check_plain(yaml: Any, text: str) -> None:
    """Refuse YAML that a plan has no use for, before it is built: it may be endless, and the last of two entries wins.

    Raises:
        ValueError: Saying in which line.
    """
    names: list[set[str] | None] = []  # those so far, of each mapping that is open; None for a list
    is_name: list[bool] = []
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"{where} refers to another place, `*{event.anchor}`")
        if isinstance(event, yaml.CollectionEndEvent):
            names.pop()
            is_name.pop()
            continue
        if isinstance(event, yaml.NodeEvent):
            if names and names[-1] is not None:
                if is_name[-1]:
                    name = event.value if isinstance(event, yaml.ScalarEvent) else ""
                    if name in names[-1]:
                        raise ValueError(f"{where} has a second entry for {shown(name)}")
                    names[-1].add(name)
                is_name[-1] = not is_name[-1]
            if isinstance(event, yaml.CollectionStartEvent):
                names.append(set() if isinstance(event, yaml.MappingStartEvent) else None)
                is_name.append(True)
                if len(names) > _DEEPEST:
                    raise ValueError(f"{where} is nested too deeply")


def _as_edited(
    layer: LayerPlan, entry: dict[str, Any] | None, child: nn.Module, module: nn.Module, path: str | Path
) -> LayerPlan:
    where = f"{path}: `{layer.name}`"
    if entry is None:
        return LayerPlan(layer.name, layer.kind, layer.weight_shape, skipped=f"not in {Path(path).name}")
    known = {"kind", "weight", "skip", "conv_mode", "matrix", "break_even", "max_rank"}
    unknown = [key for key in entry if key not in known]
    if unknown:
        raise ValueError(f"{where}: expected {', '.join(sorted(known))}, got {shown(unknown[0])}")
    shape = entry.get("weight", list(layer.weight_shape))
    if shape != list(layer.weight_shape):
        raise ValueError(f"{where}: the plan is for a weight {shown(shape)}, the model's is {list(layer.weight_shape)}")
    skip = entry.get("skip")
    if not (skip is None or isinstance(skip, (str, bool))):
        raise ValueError(f"{where}: `skip` must be a reason, got {shown(skip)}")
    if skip:
        return LayerPlan(layer.name, layer.kind, layer.weight_shape, skipped=" ".join(str(skip).split()))
    mode = entry.get("conv_mode")
    mode = "channel" if mode is None else mode
    if not isinstance(mode, str) or mode not in (*CONV_MODES, "auto"):
        raise ValueError(f"{where}: `conv_mode` must be one of {', '.join(CONV_MODES)}, auto, got {shown(mode)}")
    if entry.get("max_rank") is not None:
        try:
            check_count("max_rank", entry["max_rank"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    reason = _Reasons(module, {layer.name}, set(), mode, {layer.name}).why_not(layer.name, child)
    if reason:
        raise ValueError(f"{where} cannot be factorized ({reason}): give it a `skip`")
    return replace(_plan_layer(layer.name, child, mode, None), max_rank=entry.get("max_rank"))
