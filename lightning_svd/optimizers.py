"""What factorised layers ask of the user's optimizers.

Weight decay must act on s and never on U and V, which it would pull off orthonormality; on s it is exactly decay of
the layer's Frobenius norm. And the momentum of a pruned rank must go with it, or the optimizer moves the rank on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_svd.layers import SVDLayer, TrainedAs


class OptimizerOfFactors:
    """A user's optimizer that trains factors: keeps its weight decay on s and off U and V.

    Schedulers, checkpoints and the user's own code rely on the parameter groups as they were made, so a group is only
    split for the duration of a step: :meth:`split` just before it, :meth:`merge`, which the optimizer's own post-step
    hook calls, right after. s takes the decay of the group that holds its U, which a user who exempts vectors from
    decay means for weights.

    Attributes:
        must_split: Whether a step without :meth:`split` before it is an error; off at first, since a learning rate
            finder steps the optimizer for its trials.
        gradients_added: Whether the regularisers' gradient is in ``.grad`` already, ahead of the step.
    """

    def __init__(self, optimizer: Optimizer, layers: Iterable[SVDLayer]) -> None:
        self.must_split = False
        self.gradients_added = False
        self._optimizer = optimizer
        self._layers = list(layers)
        self._whole: list[dict[str, Any]] | None = None
        self._parts: list[list[dict[str, Any]]] = []
        self._known: _Holdings | None = None
        self._hook = optimizer.register_step_post_hook(lambda *_: self._stepped())

    def held(self) -> frozenset[nn.Parameter]:
        """The parameters that the optimizer trains at present: a finetuning schedule may add some."""
        return self._holdings().parameters

    @property
    def layers(self) -> list[SVDLayer]:
        """The factorised layers of which the optimizer trains a factor."""
        return self._holdings().layers

    @property
    def regularised(self) -> list[SVDLayer]:
        """Those of them that are trained as an SVD, for which alone the regularisers are meant."""
        return self._holdings().regularised

    def hold_constants(self) -> None:
        """Have the next step pass over factors that are not trained at present: no gradient, decay or momentum."""
        for constant in self._holdings().constants:
            constant.grad = None

    def split(self) -> None:
        """Give U, V and s groups of their own with the decay they should have."""
        self.merge()
        by_decay = self._holdings().by_decay
        groups = self._whole = self._optimizer.param_groups
        self._parts = [_parts(group, decays) for group, decays in zip(groups, by_decay, strict=True)]
        self._optimizer.param_groups = [part for parts in self._parts for part in parts]

    def _stepped(self) -> None:
        if self.must_split and self._whole is None and self.layers:
            raise RuntimeError(
                f"{type(self._optimizer).__name__}.step() was called on the optimizer itself, so the factors "
                "missed their regularisers: in `training_step` call it on what `self.optimizers()` "
                "returns, not on what it returns with `use_pl_optimizer=False`"
            )
        self.merge()

    def merge(self) -> None:
        """Restore the user's groups; harmless when they are whole."""
        if self._whole is None:
            return
        for group, parts in zip(self._whole, self._parts, strict=True):
            # What the optimizer noted in its group during the step stays.
            group.update({key: value for key, value in parts[0].items() if key not in ("params", "weight_decay")})
        self._optimizer.param_groups, self._whole = self._whole, None

    def remove(self) -> None:
        """Let go of the optimizer."""
        self.merge()
        self._hook.remove()

    def _holdings(self) -> _Holdings:
        groups = self._optimizer.param_groups if self._whole is None else self._whole
        # Comparing identities costs a hundredth of sorting the parameters anew. The old key's are kept alive by what
        # it stands for, so none of them can be another parameter's by now.
        parameters = [(group.get("weight_decay", 0.0), list(map(id, group["params"]))) for group in groups]
        key = (parameters, [layer.trained_as for layer in self._layers])
        if self._known is None or self._known.key != key:
            self._known = _holdings(key, groups, self._layers)
        return self._known


_Key = tuple[list[tuple[float, list[int]]], list[TrainedAs]]


@dataclass(frozen=True)
class _Holdings:
    """What an optimizer's groups are to the factors, worked out once for each way they are.

    Attributes:
        key: Decay and identities of the parameters of each group, and as what the layers are trained.
        parameters: All of them.
        layers: Those of which a factor is among them.
        regularised: Those of these that are trained as an SVD.
        constants: The factors of these that are not trained at present.
        by_decay: For each group its parameters by the weight decay that they should have; a single entry for a group
            that can stay whole.
    """

    key: _Key
    parameters: frozenset[nn.Parameter]
    layers: list[SVDLayer]
    regularised: list[SVDLayer]
    constants: list[nn.Parameter]
    by_decay: list[dict[float, list[nn.Parameter]]]


def _holdings(key: _Key, groups: Sequence[dict[str, Any]], layers: Iterable[SVDLayer]) -> _Holdings:
    decays = {p: group.get("weight_decay", 0.0) for group in groups for p in group["params"]}
    held = [layer for layer in layers if not decays.keys().isdisjoint((layer.U, layer.s, layer.V))]
    regularised = [layer for layer in held if layer.trained_as == "svd"]
    constants = [constant for layer in held for constant in layer.untrained]
    for layer in regularised:  # the others decay as the plain layers that they are trained as
        decays[layer.s] = decays.get(layer.U, decays.get(layer.s, 0.0))
        decays[layer.U] = decays[layer.V] = 0.0
    by_decay: list[dict[float, list[nn.Parameter]]] = []
    for group in groups:
        by_decay.append({})
        for p in group["params"]:
            by_decay[-1].setdefault(decays[p], []).append(p)
    parameters = frozenset(p for group in groups for p in group["params"])
    return _Holdings(key, parameters, held, regularised, constants, by_decay)


def _parts(group: dict[str, Any], by_decay: dict[float, list[nn.Parameter]]) -> list[dict[str, Any]]:
    """The group itself, or it split by the decay its parameters should have."""
    if list(by_decay) in ([], [group.get("weight_decay", 0.0)]):
        return [group]
    return [{**group, "params": params, "weight_decay": decay} for decay, params in by_decay.items()]


def check_holds_factors(optimizers: Sequence[Optimizer], module: nn.Module, layers: dict[str, SVDLayer]) -> None:
    """Refuse optimizers that would leave factors untrained.

    Args:
        optimizers: All that train ``module``.
        module: The model.
        layers: Its factorised layers by name.

    Raises:
        ValueError: If an optimizer holds parameters that the model no longer has, or a trainable factor is not in
            exactly one optimizer.
    """
    held = Counter(p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    stale = len(held.keys() - set(module.parameters()))
    if stale:
        raise ValueError(
            f"an optimizer holds {stale} parameters that the model does not have: was it built before the layers were "
            "factorised? Build it in `configure_optimizers` from `self.parameters()`"
        )
    for name, layer in layers.items():
        for factor in ("U", "s", "V"):
            parameter = getattr(layer, factor)
            if parameter.requires_grad and held[parameter] != 1:
                raise ValueError(
                    f"`{name}.{factor}` must be in exactly one optimizer, found it in {held[parameter]}: does "
                    "`configure_optimizers` choose parameters by name? A factorised layer has U, s, V instead of weight"
                )


@torch.no_grad()
def forget_pruned(optimizers: Sequence[Optimizer], layers: Iterable[SVDLayer]) -> None:
    """Clear the optimizers' memory (momentum, second moments) of the ranks that are not kept."""
    masks: dict[Tensor, Tensor] = {p: layer.kept_mask() for layer in layers for p in (layer.U, layer.s, layer.V)}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            if p in masks:
                for value in state.values():
                    if isinstance(value, Tensor) and value.shape == p.shape:
                        value.mul_(masks[p])


def merge_factors(optimizers: Sequence[Optimizer], layers: Iterable[SVDLayer]) -> None:
    """Merge every layer's s into its U and V, for which the optimizers begin anew: their memory is of another scale."""
    for layer in layers:
        layer.merge()
        forget(optimizers, layer)


def forget(optimizers: Sequence[Optimizer], layer: SVDLayer) -> None:
    """Have the optimizers begin anew with the factors of a layer."""
    for optimizer in optimizers:
        for p in (layer.U, layer.s, layer.V):
            optimizer.state.pop(p, None)
