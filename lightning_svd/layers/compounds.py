"""Which torch modules hold several weight matrices in one piece, and what splits and rejoins them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_svd.arguments import check_module
from lightning_svd.layers.attention import SplitAttention
from lightning_svd.layers.layer import Replaced, SVDLayer
from lightning_svd.layers.pairs import is_pair
from lightning_svd.layers.parts import InParts, State, TakenApart, prefix_of, take_apart
from lightning_svd.layers.recurrent import SplitCell, SplitRecurrent
from lightning_svd.wording import few

KINDS: dict[type[nn.Module], type[InParts]] = {
    nn.MultiheadAttention: SplitAttention,
    nn.LSTM: SplitRecurrent,
    nn.GRU: SplitRecurrent,
    nn.RNN: SplitRecurrent,
    nn.LSTMCell: SplitCell,
    nn.GRUCell: SplitCell,
    nn.RNNCell: SplitCell,
}


_COMPUTED = "in an attention or recurrent module ({}) with a weight that is computed from other parameters"


def _base_of(module: nn.Module) -> type[nn.Module] | None:
    """Which of the kinds a module in one piece is or is derived from; None for any other."""
    if isinstance(module, InParts):
        return None
    return next((base for base in KINDS if isinstance(module, base)), None)


def linears_of(module: nn.Module) -> dict[str, nn.Module]:
    """The weight matrices inside an attention or recurrent module as linear layers; {} for any other module.

    Of a module in one piece its weight matrices as linear layers, which share its parameters; of one that was taken
    apart the parts that train.
    """
    if isinstance(module, TakenApart):
        return module.parts()
    base = _base_of(module)
    if base is None:
        return {}
    # Spectral norm iterates whenever its weight is read in training.
    with evaluating(module) if is_parametrized(module) else nullcontext():
        return {**KINDS[base].linears(module)}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """``module`` in evaluation inside, each of its modules in the mode it was in afterwards."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode


def why_not_split(module: nn.Module) -> str | None:
    """Why a module in one piece cannot be taken apart; None if it can."""
    base = _base_of(module)
    if base is None:
        return None
    if is_parametrized(module) or any(map(is_parametrized, module.children())):
        return _COMPUTED.format(base.__name__)
    if type(module) is not base:
        return f"in a subclass of {base.__name__}, which may have a forward of its own"
    if any(map(_is_written_to, (module, *module.children()))):
        return _COMPUTED.format(base.__name__)
    return KINDS[base].why_not(module)


def _is_written_to(module: nn.Module) -> bool:
    """Whether a weight of it is no parameter: torch's older hooks write one there in each call, and so do people."""
    own = {**vars(module), **module._parameters}
    return any(
        "weight" in name and isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
        for name, value in own.items()
    )


def owner_of(module: nn.Module, name: str) -> nn.Module | None:
    """The attention or recurrent module that has the part of this name; None if the name is an ordinary layer's."""
    owner, _, part = name.rpartition(".")
    try:
        found = module.get_submodule(owner)
    except AttributeError:
        return None
    return found if part in linears_of(found) else None


def named_layers(module: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """As ``named_modules()``, and the hidden parts of attention and recurrent modules in training."""
    for name, child in module.named_modules(remove_duplicate=remove_duplicate):
        yield name, child
        if isinstance(child, TakenApart):
            children = dict(child.named_children())
            for part, layer in child.parts().items():
                if part not in children:
                    yield prefix_of(name) + part, layer


def svd_layers(module: nn.Module) -> dict[str, SVDLayer]:
    """The factorized layers in ``module`` by name, parts of attention and recurrent modules among them."""
    check_module("module", module)
    return {name: layer for name, layer in named_layers(module) if isinstance(layer, SVDLayer)}


def owners_of(module: nn.Module) -> list[TakenApart]:
    """The modules in ``module`` that are taken apart and train in parts."""
    return [child for child in module.modules() if isinstance(child, TakenApart)]


def split(module: nn.Module, names: Iterable[str]) -> None:
    """Take the modules in one piece apart, in place, that have parts of these names.

    Args:
        module: The model.
        names: Of layers; those that are no parts of such a module, or of one that is taken apart, ask for nothing.
    """
    for name in names:
        owner = owner_of(module, name)
        base = None if owner is None else _base_of(owner)
        if owner is not None and base is not None:
            take_apart(owner, KINDS[base], name.rpartition(".")[0])


def join(module: nn.Module) -> list[Replaced]:
    """Put the modules in ``module`` together again, in place, that are in parts and whose parts are plain layers.

    Returns:
        Which parameters took the place of which.
    """
    joinable = [child for child in module.modules() if isinstance(child, InParts) and child.can_join()]
    return [replaced for child in joinable for replaced in child.join()]


def open_up(module: nn.Module) -> list[Replaced]:
    """Register the parts as children wherever one of them became two layers.

    Returns:
        Which parameters took the place of which, where parts shared one.
    """
    owners = [owner for owner in owners_of(module) if any(map(is_pair, owner.parts().values()))]
    return [replaced for owner in owners for replaced in owner.open_up()]


# State dicts, in which a module has torch's own names or those of its layers


def no_faster(module: nn.Module) -> str | None:
    """A warning of the modules that compute with dense weights, to which low-rank parts are multiplied out."""
    names = [
        name or "the model" for name, child in module.named_modules() if isinstance(child, InParts) and child.rebuilds
    ]
    if not names:
        return None
    return (
        f"{few(names)}: recurrent layers so small take no less time with low rank, and somewhat more for a "
        "single input: their factors are multiplied out for torch's kernel in each call"
    )


def split_prefixes(module: nn.Module) -> Iterator[tuple[str, type[InParts]]]:
    """Where in a state dict the modules stand whose parts are children, under every name they have, and their kind."""
    for name, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, InParts) and not isinstance(child, TakenApart):
            yield prefix_of(name), type(child)


def join_states(module: nn.Module, state: Mapping[str, Tensor]) -> State:
    """A state dict of ``module`` with torch's own names."""
    joined = dict(state)
    for prefix, kind in split_prefixes(module):
        if kind.is_split_in(joined, prefix):
            joined = kind.join_state(joined, prefix)
    return joined


def split_states(module: nn.Module, state: Mapping[str, Tensor]) -> State:
    """A state dict with torch's own names in those that ``module`` has."""
    names = dict(state)
    for prefix, kind in split_prefixes(module):
        if kind.is_whole_in(names, prefix):
            names = kind.split_state(names, prefix)
    return names


def split_everywhere(state: Mapping[str, Tensor]) -> State:
    """A state dict of an unknown model with each weight matrix for itself."""
    names = dict(state)
    for prefix in {name[: name.rfind(".") + 1] for name in state}:
        for kind in dict.fromkeys(KINDS.values()):
            if kind.is_whole_in(names, prefix):
                names = kind.split_state(names, prefix)
    return names
