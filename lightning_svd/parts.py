"""A module of torch that holds several weight matrices in one piece, with each as a layer of its own.

Such a module hands its raw weights to a function, so no layer in it could be replaced. It is taken apart in place, and
put together again: a state dict has the dense names only in the latter form.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

State = dict[str, Tensor]


class InParts(nn.Module):
    """What a module of torch computes, by layers of its own; which they are, and under which names they are saved."""

    @staticmethod
    def linears(whole: nn.Module) -> dict[str, nn.Linear]:
        """The weight matrices of a module in one piece as linear layers, which share its parameters."""
        raise NotImplementedError

    @staticmethod
    def why_not(whole: nn.Module) -> str | None:
        """Why a module of a supported type cannot be taken apart; None if it can."""
        return None

    def joined(self) -> nn.Module:
        """The module of torch again, from plain linear layers."""
        raise NotImplementedError

    def can_join(self) -> bool:
        """Whether its layers are plain."""
        return all(type(part) is nn.Linear for part in self.children())

    # A state dict in torch's own names and in those of the layers, for the module whose names begin with `prefix`

    @staticmethod
    def is_whole_in(state: Mapping[str, Tensor], prefix: str) -> bool:
        """Whether the state dict holds the module in one piece: it may hold a part of a model only."""
        raise NotImplementedError

    @staticmethod
    def is_split_in(state: Mapping[str, Tensor], prefix: str) -> bool:
        """Whether the state dict holds the module as plain layers."""
        raise NotImplementedError

    @staticmethod
    def join_state(state: Mapping[str, Tensor], prefix: str = "") -> State:
        """The state dict with torch's own names in the place of the layers'."""
        raise NotImplementedError

    @staticmethod
    def split_state(state: Mapping[str, Tensor], prefix: str = "") -> State:
        """The inverse of :meth:`join_state`."""
        raise NotImplementedError


def prefix_of(name: str) -> str:
    """How the names begin of what is in the module of this name; "" for the model itself."""
    return f"{name}." if name else ""


def attributes_of(module: nn.Module) -> dict[str, object]:
    """What a module's own class keeps beside parameters, buffers, children, hooks and the training flag."""
    of_every_module = vars(nn.Module())
    return {key: value for key, value in vars(module).items() if key not in of_every_module}


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of these very parameters, or of views of a parameter."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            setattr(layer, name, as_parameter(value))
    return layer


def as_parameter(value: Tensor) -> nn.Parameter:
    """``value`` itself if it is a parameter, else a new one that shares its memory."""
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach(), value.requires_grad)
