"""A tree of modules: plan which layers to factorise, factorise them in place, and turn them back.

Layers are changed in place, class and parameters, as ``torch.nn.utils.parametrize`` does: every other reference to a
layer (a Python list of layers, a second name, a bound method, a hook) stays valid.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_svd.costs import ModelCost, count_costs, count_params, svd_layers
from lightning_svd.latency import time_layers
from lightning_svd.layers import SVDConv, SVDLayer, SVDLinear
from lightning_svd.pairs import MARK
from lightning_svd.views import CONV_MODES, View, supported_type

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Targets = str | Sequence[str] | None

# nn.TransformerEncoderLayer reads these children's `weight` in its eval fast path, past their forward.
_READ_PAST_FORWARD: dict[type[nn.Module], tuple[str, ...]] = {nn.TransformerEncoderLayer: ("linear1", "linear2")}


@dataclass(frozen=True)
class LayerPlan:
    """What is to become of one layer.

    Attributes:
        name: As in ``named_modules``.
        kind: Class of the dense layer.
        weight_shape: Of the dense weight.
        matrix_shape: (m, n) of the weight seen as a matrix; None if the layer is skipped.
        conv_mode: "channel" or "spatial" for a convolution that is factorised, else None.
        skipped: Why the layer is left alone; None if it is factorised.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    matrix_shape: tuple[int, int] | None = None
    conv_mode: str | None = None
    skipped: str | None = None

    @property
    def full_rank(self) -> int:
        """min(m, n); 0 if the layer is skipped."""
        return min(self.matrix_shape) if self.matrix_shape else 0

    @property
    def break_even(self) -> int:
        """The largest rank whose factors have fewer parameters than the dense weight; 0 if the layer is skipped."""
        if not self.matrix_shape:
            return 0
        return _break_even(*self.matrix_shape)


def plan(
    module: nn.Module,
    target_modules: Targets = None,
    exclude_modules: Targets = (),
    conv_mode: str = "channel",
) -> list[LayerPlan]:
    """What :func:`decompose` would do, with the reason for every layer that it would skip; changes nothing.

    Raises:
        ValueError: As :func:`decompose`, but for weights that are not finite.
    """
    if conv_mode not in (*CONV_MODES, "auto"):
        raise ValueError(f"`conv_mode` must be one of {', '.join(CONV_MODES)}, auto, got {conv_mode!r}")
    layers = {
        name: child for name, child in module.named_modules() if _holds_matrix(child) or isinstance(child, SVDLayer)
    }
    targeted = matching(layers, target_modules, "target_modules") if target_modules is not None else set(layers)
    excluded = matching(layers, exclude_modules, "exclude_modules")
    reasons = _Reasons(module, targeted, excluded, conv_mode)
    return [_plan_layer(name, layer, conv_mode, reasons.why_not(name, layer)) for name, layer in layers.items()]


def decompose(
    module: nn.Module,
    target_modules: Targets = None,
    exclude_modules: Targets = (),
    conv_mode: str = "channel",
) -> list[LayerPlan]:
    """Factorise the layers of ``module`` in place: ``weight`` becomes parameters U, s, V of full rank.

    Either every layer of the plan is factorised or, if anything is refused, none is. Build the optimizer afterwards:
    one that was built before holds the old weights.

    Args:
        module: Any module; a layer itself too.
        target_modules: Names of layers (whole names, or their ends after a dot), or one regular expression that must
            match a whole name; None for every supported layer.
        exclude_modules: Layers to leave alone, in the same form.
        conv_mode: "channel", "spatial", or "auto", for each layer the one that has less to remove before it pays.

    Returns:
        The plan in effect, skipped layers with their reason.

    Raises:
        ValueError: If nothing can be factorised, a pattern matches no layer, or a weight holds NaN or infinity.
    """
    layer_plans = plan(module, target_modules, exclude_modules, conv_mode)
    if all(layer.skipped for layer in layer_plans):
        raise ValueError(_nothing_to_do(module, layer_plans))
    modules = dict(module.named_modules())
    # All SVDs before the first change, so that a weight that is refused leaves the module as it was.
    factorised = [(modules[p.name], _factorise(modules[p.name], p)) for p in layer_plans if not p.skipped]
    for layer, twin in factorised:
        become(layer, twin)
    return layer_plans


def compact(module: ModuleT, cost: ModelCost | None = None, example_input: Any = None) -> ModuleT:
    """Drop what is pruned, in place: storage shrinks, and layers that factors do not help become plain again.

    Args:
        module: With factorised layers; not while an optimizer holds them.
        cost: Of the module with MACs, from :func:`~lightning_svd.costs.count_costs`; without it a layer is dense
            again when its factors have no fewer parameters.
        example_input: What ``module`` is called with, a tuple for several arguments. Given, both forms of each layer
            are timed on this machine for such an input, and a layer that is no faster as factors is dense again too.

    Returns:
        ``module``.
    """
    layers = svd_layers(module)
    if example_input is not None:
        cost = time_layers(count_costs(module, example_input), layers)
    costs = (cost or count_params(module)).layers
    for name, layer in layers.items():
        if costs[name].pays(layer.rank):
            layer.compact()
        else:
            become(layer, layer.dense())
    return module


def make_factored(module: ModuleT, cost: ModelCost | None = None, example_input: Any = None) -> ModuleT:
    """As :func:`compact`, then each factorised layer becomes two plain torch layers in sequence, in place."""
    for layer in svd_layers(compact(module, cost, example_input)).values():
        become(layer, layer.factored())
    return module


def make_dense(module: ModuleT) -> ModuleT:
    """Each factorised layer becomes a plain layer with the weight its kept ranks stand for, in place."""
    for layer in svd_layers(module).values():
        become(layer, layer.dense())
    return module


def restore(module: ModuleT, weights: Mapping[str, nn.Parameter]) -> ModuleT:
    """Undo :func:`decompose` exactly: the layers get the very parameters they had before.

    Args:
        module: As it was given to :func:`decompose`.
        weights: Name of each factorised layer -> the ``weight`` it had.
    """
    names = list(svd_layers(module))
    make_dense(module)
    for name in names:
        module.get_submodule(name).weight = weights[name]
    return module


def to_factored(module: ModuleT, cost: ModelCost | None = None, example_input: Any = None) -> ModuleT:
    """A copy of ``module`` in plain torch layers, two in sequence for each factorised one that is worth it.

    Arguments as for :func:`compact`.
    """
    return make_factored(copy.deepcopy(module), cost, example_input)


def to_dense(module: ModuleT) -> ModuleT:
    """A copy of ``module`` in plain torch layers of the original shapes, with the original parameter names."""
    return make_dense(copy.deepcopy(module))


def _holds_matrix(module: nn.Module) -> bool:
    """Whether the module itself owns a weight of two or more dimensions, lazy ones included."""
    weight = module._parameters.get("weight")
    return weight is not None and (is_lazy(weight) or weight.ndim >= 2)


class _Reasons:
    """Why layers are skipped."""

    def __init__(self, module: nn.Module, targeted: set[str], excluded: set[str], conv_mode: str) -> None:
        self.targeted, self.excluded, self.conv_mode = targeted, excluded, conv_mode
        self.owners = Counter(
            id(parameter) for child in module.modules() for _, parameter in child.named_parameters(recurse=False)
        )
        self.read_past_forward = {
            id(getattr(parent, child)): type(parent).__name__
            for parent in module.modules()
            for kind, children in _READ_PAST_FORWARD.items()
            if isinstance(parent, kind)
            for child in children
        }

    def why_not(self, name: str, layer: nn.Module) -> str | None:
        return next(self._reasons(name, layer), None)

    def _reasons(self, name: str, layer: nn.Module) -> Iterator[str]:
        if isinstance(layer, SVDLayer):
            yield "already factorised"
        if name in self.excluded:
            yield "excluded by `exclude_modules`"
        if name not in self.targeted:
            yield "not in `target_modules`"
        weight = _weight(layer)
        if is_lazy(weight):
            yield "not initialised yet"
        if weight.is_meta:
            yield "on the meta device, without values"
        kind = supported_type(layer)
        if kind is None:
            yield "unsupported type"
        elif type(layer) is not kind:
            yield f"subclass of {kind.__name__}, which may have a forward of its own"
        if self.owners[id(weight)] > 1:
            yield "weight tied to another module's"
        if id(layer) in self.read_past_forward:
            yield f"{self.read_past_forward[id(layer)]} reads its weight directly"
        if _break_even(*view_in(layer, self.conv_mode).matrix_shape) == 0:
            yield "too thin: even rank 1 costs as much as the dense layer"


def _weight(layer: nn.Module) -> Tensor:
    """The weight that the layer holds or stands for."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _break_even(m: int, n: int) -> int:
    return (m * n - 1) // (m + n)


def view_in(layer: nn.Module, conv_mode: str) -> View:
    """The view of a plain layer in a mode, "auto" among them."""
    views = [View.of(layer, mode) for mode in (CONV_MODES if conv_mode == "auto" else (conv_mode,))]
    # "auto": where the break-even rank is the larger share of the full rank, less must be removed before it pays.
    return max(views, key=lambda view: _break_even(*view.matrix_shape) / min(view.matrix_shape))


def _plan_layer(name: str, layer: nn.Module, conv_mode: str, skipped: str | None) -> LayerPlan:
    weight, kind = _weight(layer), type(layer).__name__
    shape = () if is_lazy(weight) else tuple(weight.shape)
    if skipped:
        return LayerPlan(name, kind, shape, skipped=skipped)
    view = view_in(layer, conv_mode)
    return LayerPlan(name, kind, shape, view.matrix_shape, view.conv_mode)


def matching(layers: dict[str, nn.Module], targets: Targets, argument: str) -> set[str]:
    """Names of the layers that ``targets`` name."""
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(f"`{argument}` is not a regular expression: {targets!r} ({error})") from None
        matched = {name for name in layers if pattern.fullmatch(name)}
        if not matched:
            raise ValueError(_no_match(argument, targets, layers))
        return matched
    matched = set()
    for target in targets or ():
        hits = {name for name in layers if name == target or name.endswith(f".{target}")}
        if not hits:
            raise ValueError(_no_match(argument, target, layers))
        matched |= hits
    return matched


def _no_match(argument: str, target: str, layers: dict[str, nn.Module]) -> str:
    known = ", ".join(list(layers)[:8]) + (", ..." if len(layers) > 8 else "")
    return f"`{argument}`: {target!r} matches no layer with a weight matrix; there are: {known or 'none'}"


def _nothing_to_do(module: nn.Module, layer_plans: list[LayerPlan]) -> str:
    reasons = "; ".join(f"{layer.name or 'the module itself'}: {layer.skipped}" for layer in layer_plans[:8])
    return f"{type(module).__name__} has no layer to factorise ({reasons or 'no linear layer or convolution in it'})"


def _factorise(layer: nn.Module, layer_plan: LayerPlan) -> SVDLayer:
    name = layer_plan.name or type(layer).__name__
    return SVDConv(layer, layer_plan.conv_mode, name) if layer_plan.conv_mode else SVDLinear(layer, name)


_CONTAINERS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # hooks and the training flag among them
_OF_SVD_LAYERS = ("kept", "view", MARK)


def become(module: nn.Module, twin: nn.Module) -> None:
    """Change ``module`` into ``twin`` in place; hooks, references and the user's own attributes stay.

    The only place that touches nn.Module's private containers: torch has no public way to change a module's class.
    """
    for attribute in _OF_SVD_LAYERS:
        vars(module).pop(attribute, None)
    for key, value in vars(twin).items():
        if key in _CONTAINERS or key not in _OF_EVERY_MODULE:
            vars(module)[key] = value
    module.__class__ = type(twin)
