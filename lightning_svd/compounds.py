"""The modules of torch that hold several weight matrices in one piece, and how each kind is taken apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from lightning_svd.attention import SplitAttention
from lightning_svd.parts import InParts, State, prefix_of
from lightning_svd.recurrent import SplitCell, SplitRecurrent

KINDS: dict[type[nn.Module], type[InParts]] = {
    nn.MultiheadAttention: SplitAttention,
    nn.LSTM: SplitRecurrent,
    nn.GRU: SplitRecurrent,
    nn.RNN: SplitRecurrent,
    nn.LSTMCell: SplitCell,
    nn.GRUCell: SplitCell,
    nn.RNNCell: SplitCell,
}


def _base_of(module: nn.Module) -> type[nn.Module] | None:
    """Which of the kinds a module in one piece is or is derived from; None for any other."""
    if isinstance(module, InParts):
        return None
    return next((base for base in KINDS if isinstance(module, base)), None)


def linears_of(module: nn.Module) -> dict[str, nn.Linear]:
    """The weight matrices of a module in one piece, as layers that share its parameters; {} for any other."""
    base = _base_of(module)
    return KINDS[base].linears(module) if base else {}


def why_not_split(module: nn.Module) -> str | None:
    """Why a module in one piece cannot be taken apart; None if it can."""
    base = _base_of(module)
    if base is None:
        return None
    if type(module) is not base:
        return f"in a subclass of {base.__name__}, which may have a forward of its own"
    return KINDS[base].why_not(module)


def owner_of(module: nn.Module, name: str) -> nn.Module | None:
    """The module in ``module``, still in one piece, that has or would have a part of this name; None if none has."""
    owner, _, part = name.rpartition(".")
    try:
        found = module.get_submodule(owner)
    except AttributeError:
        return None
    return found if part in linears_of(found) else None


def split(module: nn.Module) -> InParts:
    """What a module becomes that nothing speaks against taking apart."""
    return KINDS[type(module)](module)


# State dicts, in which a module has torch's own names or those of its layers


def split_prefixes(module: nn.Module) -> Iterator[tuple[str, type[InParts]]]:
    """Where in a state dict the modules stand that are taken apart, under every name they have, and their kind."""
    for name, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, InParts):
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
