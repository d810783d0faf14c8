"""A tree of modules: factorize its layers in place, and turn them into plain ones again.

Layers are changed in place, class and parameters, as ``torch.nn.utils.parametrize`` does: every other reference to a
layer (a Python list of layers, a second name, a bound method, a hook) stays valid.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset

from lightning_svd.arguments import check_choice, check_count, check_module, check_share
from lightning_svd.layers.compounds import join, named_layers, open_up, owners_of, split, svd_layers
from lightning_svd.layers.forms import DenseForm, SVDForm
from lightning_svd.layers.identity import IdentityLinear, merged_linear
from lightning_svd.layers.layer import (
    FactorizedModule,
    Replaced,
    SVDLayer,
    factorize,
    plain_pair,
    release,
    set_class,
)
from lightning_svd.layers.matrices import Factors, check_finite
from lightning_svd.layers.pairs import is_pair, low_rank_pairs, merged, rank_of, view_of
from lightning_svd.layers.parts import InParts, attributes_of
from lightning_svd.layers.views import View
from lightning_svd.model.counting import count_costs, count_params
from lightning_svd.model.plan import LayerPlan, Targets, names_by_reason, plan
from lightning_svd.ranks.allocation import keep_by_budget
from lightning_svd.ranks.costs import ModelCost
from lightning_svd.wording import few

ModuleT = TypeVar("ModuleT", bound=nn.Module)

COUNTED = "lightning_svd_counted"  # the attribute of a module that has its cost as an example showed it


def decompose(
    module: nn.Module,
    target_modules: Targets = None,
    exclude_modules: Targets = (),
    conv_mode: str = "channel",
    *,
    layer_plans: Sequence[LayerPlan] | None = None,
    example_input: Any = None,
) -> list[LayerPlan]:
    """Factorize the layers of ``module`` in place: ``parameters()`` gives U, s and V in the place of each ``weight``.

    Either every layer of the plan is factorized or, if anything is refused, none is. Build the optimizer afterwards:
    one that was built before holds the old weights. State dicts have the dense weights, under their own names.

    Args:
        module: Any module; a layer itself too. On the meta device the factors have their shapes and no values, which
            come with :func:`~lightning_svd.load_sharded`.
        target_modules: Layers to factorize, each item a layer's name, the end of one after a dot, a type of layer
            ("Conv2d"), "all-linear", or a regular expression for whole names; None for every supported layer.
        exclude_modules: Layers to leave alone, in the same form.
        conv_mode: "channel", "spatial", or "auto", for each layer the one that has less to remove before it pays.
        layer_plans: A plan to follow instead, from :func:`~lightning_svd.plan` or :func:`~lightning_svd.read_plan`.
        example_input: What the module is called with, a tuple for several arguments, a dict for arguments by keyword;
            on its device. Its MACs are counted and kept, for a budget of MACs where parameters are sharded later.

    Returns:
        The plan in effect, skipped layers with their reason.

    Raises:
        ValueError: If nothing can be factorized, a pattern matches no layer, or a weight holds NaN or infinity.
    """
    check_module("module", module)
    if layer_plans is None:
        layer_plans = plan(module, target_modules, exclude_modules, conv_mode, include_meta=True)
    layers = begin(module, layer_plans)
    weights = {name: layer.rebuilt().detach() for name, layer in layers.items()}  # the very values, not copies of them
    try:
        counted = None if example_input is None else count_costs(module, example_input)
        for name, layer in layers.items():
            layer.to_svd(_without_values(layer) if weights[name].is_meta else None)
    except BaseException:
        undo(module, weights)
        raise
    show_factors(module)
    if counted is not None:
        vars(module)[COUNTED] = counted
    return list(layer_plans)


def _without_values(layer: SVDLayer) -> Factors:
    """Factors of full rank on the meta device."""
    shapes = SVDForm.shapes(layer.view, layer.full_rank)
    return Factors(*(layer.form.trained[0].new_empty(shapes[key]) for key in SVDForm.columns))


def counted_before(module: nn.Module, layers: Mapping[str, SVDLayer]) -> ModelCost:
    """The cost of a module in parameters, and in the MACs that :func:`decompose` counted of it or of modules in it.

    Args:
        module: The whole tree.
        layers: Its factorized layers, by name.

    Returns:
        Without MACs where those of a layer were not counted.
    """
    cost = count_params(module)
    of_layers, others, batch_size = dict(cost.layers), 0, 0
    for prefix, child in module.named_modules():
        counted: ModelCost | None = vars(child).get(COUNTED)
        if counted is not None:
            others, batch_size = others + counted.other_macs, counted.batch_size
            for name, one in counted.layers.items():
                whole = f"{prefix}.{name}".strip(".")
                if whole in layers:
                    of_layers[whole] = one
    if any(not one.input_shapes for one in of_layers.values()):
        return cost
    return replace(cost, layers=of_layers, other_macs=others, batch_size=batch_size)


def show_factors(module: nn.Module) -> None:
    """Have ``parameters()`` give what is trained in all factorized layers, from now on and in whichever form."""
    for layer in svd_layers(module).values():
        layer.show_factors()
    for owner in owners_of(module):
        owner.show_factors()


def begin(module: nn.Module, layer_plans: Iterable[LayerPlan]) -> dict[str, SVDLayer]:
    """Make the chosen layers factorized ones that train their dense weight still; nothing is computed yet.

    Raises:
        ValueError: If no layer is chosen.
    """
    chosen = {layer.name: layer for layer in layer_plans if not layer.skipped}
    if not chosen:
        raise ValueError(_nothing_to_do(module, layer_plans))
    split(module, chosen)
    found = dict(named_layers(module))
    return {
        name: factorize(found[name], View.of(found[name], of.conv_mode or "channel"), name, form="dense")
        for name, of in chosen.items()
    }


def trained_weights(layers: Mapping[str, SVDLayer]) -> dict[str, Tensor]:
    """The weights of layers that train them still, by name: what :func:`undo` gives back, values and not copies."""
    return {name: layer.form.weight().detach() for name, layer in layers.items() if isinstance(layer.form, DenseForm)}


def check_dense(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that no decomposition has.

    Args:
        module: Whose layers they are.
        weights: By the layers' names.

    Raises:
        ValueError: If one holds NaN or infinity; the message names its layer.
    """
    for name, weight in weights.items():
        check_finite(weight, name or type(module).__name__)


def check_in_place(module: nn.Module, layers: Mapping[str, SVDLayer]) -> None:
    """Refuse that a layer which is trained was taken out of the module, where another may stand in its place.

    Args:
        module: The whole tree.
        layers: That were factorized in it, by name.

    Raises:
        RuntimeError: If one of them is not there; the message names it.
    """
    for name in out_of_place(module, layers):
        raise RuntimeError(
            f"`{name}` is another module than the one whose U, s and V are trained, or is gone: build the model "
            f"before the fit starts, or leave the layer out, `exclude_modules=['{name}']`"
        )


def out_of_place(module: nn.Module, layers: Mapping[str, SVDLayer]) -> list[str]:
    """The names of factorized layers that are in the module no more."""
    there = {id(layer) for _, layer in named_layers(module)}
    return [name for name, layer in layers.items() if id(layer) not in there]


@contextmanager
def showing_factors(module: nn.Module) -> Iterator[None]:
    """Have ``parameters()`` of the whole module give what is trained inside."""
    with ExitStack() as stack:
        for child in [*module.modules()]:
            if isinstance(child, FactorizedModule):
                stack.enter_context(child.showing_factors())
        yield


def undo(module: nn.Module, weights: Mapping[str, Any] | None = None) -> list[Replaced]:
    """Make every factorized layer a plain one of its own class again.

    Args:
        module: Changed in place.
        weights: By name what layers' weights are to be; otherwise what their parameters multiply to.
    """
    replaced = [release(layer, (weights or {}).get(name)) for name, layer in svd_layers(module).items()]
    return replaced + join(module)


def finish(module: nn.Module, forms: Mapping[str, str], layers: Mapping[str, SVDLayer] | None = None) -> list[Replaced]:
    """Give factorized layers the form in which they stay, in place.

    Args:
        module: With factorized layers; those that are not named stay as they are.
        forms: Name -> "pair" (two plain torch layers in sequence), "dense" (a plain layer of its own class), or
            "decomposed" (U, s and V at the rank in use, shown as its parameters).
        layers: The layers by these names, which they may have had before the tree was changed; None for the names of
            today.

    Returns:
        Which parameters took the place of which.
    """
    layers = svd_layers(module) if layers is None else layers
    replaced: list[Replaced] = []
    for name, form in forms.items():
        layer = layers[name]
        if form == "pair":
            old, pair = layer.form.trained, plain_pair(layer)
            new = [p for name, p in pair.named_parameters() if name.endswith("weight")]
            become_pair(layer, pair)
            replaced.append((old, new))
        elif form == "decomposed":
            replaced += [layer.shrink() if isinstance(layer.form, SVDForm) else layer.to_svd()]
            layer.show_factors()
        else:
            replaced.append(release(layer))
    for owner in owners_of(module):
        if any(isinstance(part, SVDLayer) and part.shows_factors for _, part in named_layers(owner)):
            owner.show_factors()
    replaced += join(module) + open_up(module)
    settle(module)
    return replaced


def compact(module: ModuleT, cost: ModelCost | None = None) -> ModuleT:
    """Drop what is pruned, in place: storage shrinks, and layers that factors do not help become plain again.

    Args:
        module: With factorized layers; not while an optimizer holds them.
        cost: Of the module with MACs, from :func:`~lightning_svd.count_costs`; without it a layer is
            dense again when its factors have no fewer parameters.

    Returns:
        ``module``.
    """
    check_module("module", module)
    finish(module, _by_what_pays(module, cost, "decomposed"))
    return module


def make_factored(module: ModuleT, cost: ModelCost | None = None, forms: str | Mapping[str, str] = "pair") -> ModuleT:
    """:func:`to_factored` in place."""
    layers = {name: layer.view.layer_type for name, layer in called_layers(module).items()}
    layers |= {name: view_of(pair).layer_type for name, pair in plain_pairs(module).items()}
    if isinstance(forms, str):
        check_choice("forms", forms, ("pair", "identity"))
        every = {name for name, kind in layers.items() if kind is nn.Linear} if forms == "identity" else ()
        forms = dict.fromkeys(every, forms)
    for name, form in forms.items():
        check_choice(f"forms[{name!r}]", form, ("dense", "pair", "identity"))
        if name not in layers:
            raise ValueError(f"`forms`: there is no low-rank layer `{name}`; there are {', '.join(layers) or 'none'}")
        if form == "identity" and layers[name] is not nn.Linear:
            raise ValueError(f'`forms`: `{name}` is {layers[name].__name__}, "identity" is for Linear')
    factorized = svd_layers(module)
    asked = {name: "pair" if form == "identity" else form for name, form in forms.items() if name in factorized}
    finish(module, _by_what_pays(module, cost, "pair") | asked)
    for name, pair in plain_pairs(module).items():
        if forms.get(name) == "identity" and rank_of(pair) < min(view_of(pair).matrix_shape):
            become(pair, IdentityLinear.of(pair))
        elif forms.get(name) in ("identity", "dense"):  # of full rank an identity saves nothing
            become(pair, merged(pair))
    return settle(module)


def plain_pairs(module: nn.Module) -> dict[str, nn.Sequential]:
    """Pairs of plain layers by name, but for those that an attention or a recurrent module calls itself."""
    owned = _owned(module)
    return {name: pair for name, pair in low_rank_pairs(module).items() if id(pair) not in owned}


def called_layers(module: nn.Module) -> dict[str, SVDLayer]:
    """Factorized layers by name, but for those that an attention or a recurrent module calls itself."""
    owned = _owned(module)
    return {name: layer for name, layer in svd_layers(module).items() if id(layer) not in owned}


def _owned(module: nn.Module) -> set[int]:
    owners = (child for child in module.modules() if isinstance(child, InParts))
    return {id(part) for owner in owners for part in owner.parts().values()}


def _by_what_pays(module: nn.Module, cost: ModelCost | None, form: str) -> dict[str, str]:
    def pays(name: str, layer: SVDLayer) -> bool:
        by_params = layer.rank * layer.params_per_rank < layer.dense_params
        return cost.layers[name].pays(layer.rank) if cost else by_params

    return {name: form if pays(name, layer) else "dense" for name, layer in svd_layers(module).items()}


def make_dense(module: ModuleT) -> ModuleT:
    """Each factorized layer becomes a plain layer with the weight its ranks stand for, in place."""
    undo(module)
    return settle(module)


def to_factored(
    module: ModuleT,
    cost: ModelCost | None = None,
    forms: str | Mapping[str, str] = "pair",
    *,
    target_macs: float | None = None,
    target_params: float | None = None,
    example_input: Any = None,
    min_rank: int = 1,
    round_to: int = 1,
    **layers: Any,
) -> ModuleT:
    """A copy of ``module`` in plain torch layers, two in sequence for each factorized one that is worth it.

    With a budget the strongest ranks are kept that fit it, in exact factors and shared out over the layers as a cut of
    the training does; without one each layer keeps the rank that it has. No data is looked at: see
    :func:`~lightning_svd.compress` for that.

    Args:
        module: With factorized layers, or with the pairs of plain ones that a fit leaves; with a budget, any module.
        cost: Of the module with its layers factorized, from :func:`~lightning_svd.count_costs`. Without it and without
            ``example_input`` a layer is dense again when its factors have no fewer parameters, and no budget of MACs
            can be met.
        forms: "pair" for plain torch layers only; "identity" for an
            :class:`~lightning_svd.layers.identity.IdentityLinear` in the place of each pair of linear layers, which
            computes the same from fewer numbers; or the form of each layer by its name, "pair", "identity" or "dense",
            as :func:`~lightning_svd.fastest_forms` finds it by measuring.
        target_macs: Share of the dense model's multiply-accumulates to keep, in (0, 1].
        target_params: Share of its parameters to keep instead.
        example_input: What the module is called with, to count its cost here: a tuple for several arguments, a dict
            for arguments by keyword; on its device.
        min_rank: The fewest ranks that a layer keeps under a budget.
        round_to: Ranks under a budget are multiples of this.
        layers: Which layers of a module without factorized ones are meant, as for :func:`decompose`:
            ``target_modules``, ``exclude_modules``, ``conv_mode``, ``layer_plans``.

    Returns:
        The copy; ``module`` is as it was.

    Raises:
        ValueError: If an argument is out of range, the budget is below what can be met, or ``cost`` is of other layers;
            if a form is unknown, is of a layer that is not there, or "identity" of one that is no linear layer.
    """
    check_module("module", module)
    given = {"target_macs": target_macs, "target_params": target_params}
    asked = {name: share for name, share in given.items() if share is not None}
    if cost is not None and example_input is not None:
        raise ValueError("give one of `cost`, `example_input`, got both")
    if not asked:
        if layers:
            raise ValueError(f"`{next(iter(layers))}` is for a budget: give `target_macs` or `target_params` too")
        twin = factorized_copy(module)
        return make_factored(twin, cost if example_input is None else count_costs(twin, example_input), forms)
    if len(asked) > 1:
        raise ValueError("give one of `target_macs`, `target_params`, got both")
    ((name, share),) = asked.items()
    check_share(name, share)
    check_count("min_rank", min_rank)
    check_count("round_to", round_to)
    if target_macs is not None and example_input is None and (cost is None or not cost.counted):
        raise ValueError("`target_macs` needs `example_input`, or `cost` from `count_costs`, to count MACs by")
    twin = factorized_copy(module)
    if not svd_layers(twin):
        decompose(twin, **layers)
    elif layers:
        raise ValueError(f"`{next(iter(layers))}` is for a module without factorized layers, and this one has some")
    found = svd_layers(twin)
    if example_input is not None:
        cost = count_costs(twin, example_input)
    if cost is not None and cost.layers.keys() != found.keys():
        differ = sorted(cost.layers.keys() ^ found.keys())
        raise ValueError(f"`cost` is of other layers than those that are factorized, see {few(differ)}")
    price = cost or count_params(twin)
    for one in found.values():
        one.to_svd()  # exact, the strongest first
    priced = price.by("macs" if target_macs is not None else "params")
    energies = {of: one.energies().cpu() for of, one in found.items()}
    ranks = keep_by_budget(energies, priced, priced.budget(share), min_rank, round_to)
    for of, one in found.items():
        one.keep(ranks[of])
    return make_factored(twin, cost, forms)


def to_dense(module: ModuleT) -> ModuleT:
    """A copy of ``module`` in plain torch layers of the original shapes, with the original parameter names.

    Factorized layers, pairs of low-rank layers and linear layers with an identity inside become what they stand for.
    """
    check_module("module", module)
    dense = make_dense(copied(module, "`to_dense` makes"))
    for pair in low_rank_pairs(dense).values():
        become(pair, merged(pair))
    for child in [*dense.modules()]:
        if isinstance(child, IdentityLinear):
            become(child, merged_linear(child))
    join(dense)
    return settle(dense)


def factorized_copy(module: ModuleT) -> ModuleT:
    """A copy whose layers are factorized as those of ``module`` are, where ``copy.deepcopy`` gives dense ones."""
    twin, layers = copied(module, "`to_factored` changes"), svd_layers(module)
    missing = {name: layer for name, layer in layers.items() if name not in svd_layers(twin)}
    split(twin, missing)
    found = dict(named_layers(twin))
    for name, layer in missing.items():
        form = "dense" if layer.form.name == "dense" else "svd"
        factors = None if form == "dense" else Factors(*(f.detach() for f in layer.factors()))
        factorize(found[name], layer.view, name, form, factors)
    return twin


def frozen_copy(module: nn.Module, who: str, instead: str) -> nn.Module:
    """A copy in evaluation mode whose parameters get no gradients; data sets that the module keeps are shared.

    Args:
        module: With factorized layers or without; those of the copy are dense.
        who: Needs the copy, as an error says it.
        instead: What to do where there can be none.

    Raises:
        ValueError: If it cannot be copied.
    """
    kept = [value for child in module.modules() for value in vars(child).values()]
    shared = {id(value): value for value in kept if isinstance(value, (Dataset, DataLoader))}
    what = type(module).__name__
    if any(is_lazy(parameter) for parameter in module.parameters()):
        raise ValueError(f"{who} a copy of {what}, which has lazy layers: call it once before the fit")
    return copied(module, who, instead, shared).eval().requires_grad_(False)


def copied(module: ModuleT, who: str, instead: str = "", memo: dict[int, Any] | None = None) -> ModuleT:
    """A copy, whose factorized layers are dense.

    Args:
        module: Any module.
        who: Needs the copy, as an error says it.
        instead: What to do where there can be none.
        memo: As of ``copy.deepcopy``.

    Raises:
        ValueError: If it cannot be copied, as where it holds a lock, or a tensor that is computed.
    """
    try:
        return copy.deepcopy(module, memo)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        what, why = type(module).__name__, f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{who} a copy of {what}, which cannot be copied ({why}){instead and f': {instead}'}"
        ) from error


def _nothing_to_do(module: nn.Module, layer_plans: Iterable[LayerPlan]) -> str:
    reasons = "; ".join(f"{names}: {reason}" for reason, names in names_by_reason(layer_plans).items())
    return f"{type(module).__name__} has no layer to factorize ({reasons or 'no linear layer or convolution in it'})"


# What turns off the ways in which torch's encoders compute in evaluation without calling their layers.
_FAST_PATHS: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
_USERS = "lightning_svd_fast_path"  # where the attribute's own value waits meanwhile


def settle(module: ModuleT) -> ModuleT:
    """Have torch's transformer encoders fit the layers that are now in them.

    Their fast paths, which read the weights of linear layers and compute what the layers would, are off where one is
    low-rank, and as they were where none is.

    Args:
        module: Changed in place, after its layers were.

    Returns:
        ``module``.
    """
    for parent in module.modules():
        for kind, (attribute, off) in _FAST_PATHS.items():
            if isinstance(parent, kind):
                low_rank = any(
                    isinstance(child, (FactorizedModule, IdentityLinear)) or is_pair(child)
                    for child in parent.modules()
                )
                if low_rank and _USERS not in vars(parent):
                    vars(parent)[_USERS] = getattr(parent, attribute)
                    setattr(parent, attribute, off)
                elif not low_rank and _USERS in vars(parent):
                    setattr(parent, attribute, vars(parent).pop(_USERS))
    return module


def become_pair(layer: SVDLayer, pair: nn.Sequential) -> nn.Sequential:
    """Make a factorized layer itself this pair; its hooks, and what the user hung on it, stay."""
    release(layer)
    become(layer, pair)
    return layer  # type: ignore[return-value]


def become(module: nn.Module, twin: nn.Module) -> None:
    """Change ``module`` into ``twin`` in place; what the twin's class does not know stays as it was.

    Here nn.Module's private containers are touched: torch has no public way to change a module's class.
    """
    theirs = {"weight", "bias"} | ({"columns", "mixing", "order"} if isinstance(module, IdentityLinear) else set())
    for container in ("_parameters", "_buffers", "_modules"):
        own = {key: value for key, value in vars(module)[container].items() if key not in theirs}
        own = {} if is_pair(module) and container == "_modules" else own
        vars(module)[container].clear()
        vars(module)[container].update(vars(twin)[container] | own)
    for attribute in ("low_rank_view",):
        vars(module).pop(attribute, None)
    vars(module).update(attributes_of(twin))
    set_class(module, type(twin))
