"""A tree of modules: plan which layers to factorise, factorise them in place, and turn them back.

Layers are changed in place, class and parameters, as ``torch.nn.utils.parametrize`` does: every other reference to a
layer (a Python list of layers, a second name, a bound method, a hook) stays valid.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from lightning_svd.compounds import owner_of, split, why_not_split
from lightning_svd.costs import ModelCost, count_costs, count_params, svd_layers
from lightning_svd.latency import time_layers
from lightning_svd.layers import SVDLayer, svd_layer
from lightning_svd.pairs import MARK, is_pair, low_rank_pairs, merged
from lightning_svd.parts import InParts, attributes_of
from lightning_svd.plans import LayerPlan, Targets, plan
from lightning_svd.recurrent import OWN_ATTRIBUTES

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def decompose(
    module: nn.Module,
    target_modules: Targets = None,
    exclude_modules: Targets = (),
    conv_mode: str = "channel",
    *,
    layer_plans: Sequence[LayerPlan] | None = None,
) -> list[LayerPlan]:
    """Factorise the layers of ``module`` in place: ``weight`` becomes parameters U, s, V of full rank.

    Either every layer of the plan is factorised or, if anything is refused, none is. Build the optimizer afterwards:
    one that was built before holds the old weights.

    Args:
        module: Any module; a layer itself too.
        target_modules: Layers to factorise, each item a layer's name, the end of one after a dot, a type of layer
            ("Conv2d"), "all-linear", or a regular expression for whole names; None for every supported layer.
        exclude_modules: Layers to leave alone, in the same form.
        conv_mode: "channel", "spatial", or "auto", for each layer the one that has less to remove before it pays.
        layer_plans: A plan to follow instead, from :func:`~lightning_svd.plan` or :func:`~lightning_svd.read_plan`.

    Returns:
        The plan in effect, skipped layers with their reason.

    Raises:
        ValueError: If nothing can be factorised, a pattern matches no layer, or a weight holds NaN or infinity.
    """
    if layer_plans is None:
        layer_plans = plan(module, target_modules, exclude_modules, conv_mode)
    if all(layer.skipped for layer in layer_plans):
        raise ValueError(_nothing_to_do(module, layer_plans))
    chosen = [layer for layer in layer_plans if not layer.skipped]
    with compounds_split(module, [layer.name for layer in chosen]):
        layers = [module.get_submodule(layer.name) for layer in chosen]
        # All SVDs before the first change, so that a weight that is refused leaves the module as it was.
        twins = [
            svd_layer(layer, of.conv_mode, of.name or type(layer).__name__)
            for layer, of in zip(layers, chosen, strict=True)
        ]
        for layer, twin in zip(layers, twins, strict=True):
            become(layer, twin)
    settle(module)
    return list(layer_plans)


@contextmanager
def compounds_split(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """The modules of which these layers are parts are taken apart from now on, unless an error follows."""
    found = {id(owner): owner for name in names if (owner := owner_of(module, name)) is not None}
    owners = [owner for owner in found.values() if why_not_split(owner) is None]
    before = [(owner, copy.copy(owner)) for owner in owners]
    for owner in owners:
        become(owner, split(owner))
    try:
        yield
    except BaseException:
        for owner, whole in before:
            become(owner, whole)
        raise


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
    return settle(module)


def make_factored(module: ModuleT, cost: ModelCost | None = None, example_input: Any = None) -> ModuleT:
    """As :func:`compact`, then each factorised layer becomes two plain torch layers in sequence, in place."""
    for layer in svd_layers(compact(module, cost, example_input)).values():
        become(layer, layer.factored())
    return module


def make_dense(module: ModuleT) -> ModuleT:
    """Each factorised layer becomes a plain layer with the weight its kept ranks stand for, in place."""
    for layer in svd_layers(module).values():
        become(layer, layer.dense())
    return settle(module)


def restore(module: ModuleT, weights: Mapping[str, nn.Parameter]) -> ModuleT:
    """Undo :func:`decompose` exactly: the layers get the very parameters they had before.

    Args:
        module: As it was given to :func:`decompose`.
        weights: By name, the parameters that it had and has no longer.
    """
    make_dense(module)
    for name, parameter in weights.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, parameter)
    return module


def to_factored(module: ModuleT, cost: ModelCost | None = None, example_input: Any = None) -> ModuleT:
    """A copy of ``module`` in plain torch layers, two in sequence for each factorised one that is worth it.

    Arguments as for :func:`compact`.
    """
    return make_factored(copy.deepcopy(module), cost, example_input)


def to_dense(module: ModuleT) -> ModuleT:
    """A copy of ``module`` in plain torch layers of the original shapes, with the original parameter names.

    Factorised layers and pairs of low-rank layers become what they stand for.
    """
    dense = make_dense(copy.deepcopy(module))
    for pair in low_rank_pairs(dense).values():
        become(pair, merged(pair))
    return settle(dense)


def _nothing_to_do(module: nn.Module, layer_plans: Sequence[LayerPlan]) -> str:
    reasons = "; ".join(f"{layer.name or 'the module itself'}: {layer.skipped}" for layer in layer_plans[:8])
    return f"{type(module).__name__} has no layer to factorise ({reasons or 'no linear layer or convolution in it'})"


# What turns off the ways in which torch's encoders compute in evaluation without calling their layers.
_FAST_PATHS: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
_USERS = "lightning_svd_fast_path"  # where the attribute's own value waits meanwhile


def settle(module: ModuleT) -> ModuleT:
    """Have torch's modules fit the layers that are now in them.

    An attention or recurrent module of plain layers is put together again. A transformer encoder's fast paths, which
    read the weights of linear layers and compute what the layers would, are off where one is low-rank, and as they were
    where none is.

    Args:
        module: Changed in place, after its layers were.

    Returns:
        ``module``.
    """
    for child in [*module.modules()]:
        if isinstance(child, InParts) and child.can_join():
            become(child, child.joined())
    for parent in module.modules():
        for kind, (attribute, off) in _FAST_PATHS.items():
            if isinstance(parent, kind):
                low_rank = any(isinstance(child, SVDLayer) or is_pair(child) for child in parent.modules())
                if low_rank and _USERS not in vars(parent):
                    vars(parent)[_USERS] = getattr(parent, attribute)
                    setattr(parent, attribute, off)
                elif not low_rank and _USERS in vars(parent):
                    setattr(parent, attribute, vars(parent).pop(_USERS))
    return module


_CONTAINERS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_OF_ONE_FORM = ("kept", "view", "weight_reads", "trained_as", "stays_whole", MARK, *OWN_ATTRIBUTES)


def become(module: nn.Module, twin: nn.Module) -> None:
    """Change ``module`` into ``twin`` in place; hooks, references and the user's own attributes stay.

    The only place that touches nn.Module's private containers: torch has no public way to change a module's class.
    """
    for attribute in _OF_ONE_FORM:
        vars(module).pop(attribute, None)
    vars(module).update({key: vars(twin)[key] for key in _CONTAINERS} | attributes_of(twin))
    module.__class__ = type(twin)
