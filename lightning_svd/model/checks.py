"""Whether a changed model still computes what it did: replays before and after, and which layers are to blame.

A model may read what only the dense layer has, or ask what class a layer is of. Such a layer cannot become two.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_svd.layers.compounds import owners_of
from lightning_svd.layers.layer import PART_OF, SVDLayer, own_class, plain_dense, plain_pair, set_class
from lightning_svd.layers.matrices import wide
from lightning_svd.layers.parts import TakenApart
from lightning_svd.model.calls import Call
from lightning_svd.model.replay import cut, replay
from lightning_svd.model.surgery import become
from lightning_svd.model.values import leaves

# Inputs that are enough to see a difference, and entries of pairs that are held at a time (256 MB in float32).
FEW, ENTRIES = 8, 1 << 26
# Rounding grows on its way through a network: by the length of sums, by depth, where a normalization scales up small
# activations, by derivatives. In float32 ten thousand times the dtype's eps is 1e-3, more than is seen and far less
# than what a layer does that is used in another way; where a dtype is so coarse that this would hide that, a tenth.
AMPLIFIED, MOST = 1e4, 0.1


class NotTheSameError(ValueError):
    """A model computes something else with plain layers than with factorized ones."""


def whole_layers(
    module: nn.Module,
    calls: Sequence[Call],
    layers: Mapping[str, SVDLayer],
    limit_s: float = 120.0,
    entries: int = ENTRIES,
) -> dict[str, str]:
    """The layers that cannot become two plain ones, and why, found by replaying calls with pairs in their place.

    Args:
        module: The whole tree; it is changed only meanwhile.
        calls: Of one batch; a few inputs are used where that is safe.
        layers: By name, parts of attention and recurrent modules among them.
        limit_s: When to give up; what is not cleared by then is blamed.
        entries: Of the pairs that are held at a time.

    Raises:
        NotTheSameError: If the model asks for a layer's exact class; the message names the layers.
    """
    if not layers or not calls:
        return {}
    until = time.monotonic() + limit_s
    calls, _ = cut(module, calls, FEW)
    expected, blamed = replay(module, calls), dict[str, str]()
    allowed = _allowed(module, calls, expected)
    plain, pairs = (functools.partial(change, module, layers) for change in (plain_in_place, pairs_in_place))
    search = _Search(module, calls, plain, expected, allowed, until, limit_s)
    asked = search.among([*layers])
    if asked:
        first = next(iter(asked))
        owner = next((each for each in owners_of(module) if layers[first] in each.parts().values()), None)
        kind = own_class(layers[first] if owner is None else owner)
        raise NotTheSameError(
            f"`{first}`: {asked[first]}, where the plain layer itself is in its place. A model that asks for the exact "
            f"class, `type(layer) is {kind.__name__}`, sees another while layers train as factors: "
            f"ask by `isinstance`, or leave the layers out, `exclude_modules={[*asked]}`"
        )
    for chunk in chunks(layers, entries):
        blamed |= _Search(module, calls, pairs, expected, allowed, until, limit_s).among(chunk)
    return blamed


def chunks(layers: Mapping[str, SVDLayer], entries: int) -> Iterator[list[str]]:
    """Names of layers in groups whose pairs have about so many entries together, and at least one layer each."""
    chunk: list[str] = []
    held = 0
    for name, layer in layers.items():
        size = max(1, layer.rank) * layer.params_per_rank
        if chunk and held + size > entries:
            yield chunk
            chunk, held = [], 0
        chunk.append(name)
        held += size
    if chunk:
        yield chunk


@contextmanager
def pairs_in_place(module: nn.Module, layers: Mapping[str, SVDLayer], names: Sequence[str]) -> Iterator[None]:
    """Have layers be the pairs of plain ones that they become at the end of a fit; afterwards, exactly what they were.

    Of a layer that trains its dense weight one of the two is the identity: it computes the same, and costs no SVD. An
    attention or recurrent module that one of them is in shows its parts, as it does at the end.
    """
    chosen = [layers[name] for name in names]
    ids, make = {*map(id, chosen)}, functools.partial(plain_pair, exact=False)

    def opened(owner: TakenApart) -> nn.Module:
        hidden = owner.hidden_parts().items()
        return owner.opened_twin({name: make(layer) for name, layer in hidden if id(layer) in ids})

    with _in_place(module, chosen, make, opened):
        yield


@contextmanager
def plain_in_place(module: nn.Module, layers: Mapping[str, SVDLayer], names: Sequence[str]) -> Iterator[None]:
    """Have layers be plain ones of their own class inside, with the weights that they stand for; as before afterwards.

    An attention or recurrent module that one of them is in is torch's own.
    """
    with _in_place(module, [layers[name] for name in names], plain_dense, TakenApart.whole_twin):
        yield


@contextmanager
def _in_place(
    module: nn.Module,
    layers: Sequence[SVDLayer],
    of_layer: Callable[[SVDLayer], nn.Module],
    of_owner: Callable[[TakenApart], nn.Module],
) -> Iterator[None]:
    saved: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
    chosen = {id(layer) for layer in layers}
    try:
        for layer in layers:
            if PART_OF in vars(layer):
                continue
            twin, own = of_layer(layer), vars(layer)
            saved.append((layer, type(layer), dict(own)))
            # New containers, so that those that it has are there afterwards, in their order.
            of_form = set(layer.form.columns)
            parameters = {key: value for key, value in own["_parameters"].items() if key not in of_form}
            own.update(_parameters=parameters, _buffers=dict(own["_buffers"]), _modules=dict(own["_modules"]))
            for attribute in ("view", "form", "svd_name", "shows_factors", "weight", "_face", "_remembered"):
                own.pop(attribute, None)
            become(layer, twin)
        for owner in owners_of(module):
            if any(id(part) in chosen for part in owner.parts().values()):
                twin = of_owner(owner)
                saved.append((owner, type(owner), dict(vars(owner))))
                _be(owner, type(twin), vars(twin))
        yield
    finally:
        for changed, kind, before in reversed(saved):
            _be(changed, kind, before)


def _be(module: nn.Module, kind: type[nn.Module], attributes: dict[str, Any]) -> None:
    """Have a module be of this class, and have these attributes and no others."""
    vars(module).clear()
    vars(module).update(attributes)
    set_class(module, kind)


def differing(
    module: nn.Module,
    calls: Sequence[Call],
    candidates: Sequence[str],
    changed: Callable[[Sequence[str]], AbstractContextManager[None]],
    expected: Sequence[Any] | None = None,
    limit_s: float = 60.0,
) -> dict[str, str]:
    """Which changes make a model fail or compute something else, found by halving.

    Args:
        module: The whole tree.
        calls: Of modules in it. An error of the unchanged model's is raised.
        candidates: What may be changed, by name.
        changed: Has some of them changed inside.
        expected: What :func:`~lightning_svd.model.replay.replay` returns for the model as it should be; None for what
            it returns now.
        limit_s: When to stop halving; what is left then is blamed as a group.

    Returns:
        Name -> why, of those to blame. With all others changed together the model computes what it did.
    """
    until = time.monotonic() + limit_s
    if not candidates:
        return {}
    now = replay(module, calls)
    allowed, expected = _allowed(module, calls, now), now if expected is None else expected
    return _Search(module, calls, changed, expected, allowed, until, limit_s).among(candidates)


class _Search:
    """Looks by halving for what is to blame; what was cleared stays changed, so that changes are seen together."""

    def __init__(
        self,
        module: nn.Module,
        calls: Sequence[Call],
        changed: Callable[[Sequence[str]], AbstractContextManager[None]],
        expected: Sequence[Any],
        allowed: float,
        until: float,
        limit_s: float,
    ) -> None:
        self.module, self.calls, self.changed, self.expected = module, calls, changed, expected
        self.allowed, self.until, self.limit_s = allowed, until, limit_s
        self.cleared: list[str] = []

    def among(self, names: Sequence[str]) -> dict[str, str]:
        """Name -> why, of those to blame."""
        if time.monotonic() > self.until:
            return dict.fromkeys(names, f"not cleared within {self.limit_s:g} s")
        reason = self._reason([*self.cleared, *names])
        if reason is None:
            self.cleared += names
            return {}
        if len(names) == 1:
            return {names[0]: reason}
        half = len(names) // 2
        return self.among(names[:half]) | self.among(names[half:])

    def _reason(self, names: Sequence[str]) -> str | None:
        """What goes wrong with these changed; None for nothing."""
        try:
            with self.changed(names):
                outputs = replay(self.module, self.calls)
        except (AttributeError, TypeError, KeyError) as error:
            return f"the model needs what only the dense layer has: {_said(error)}"
        except Exception as error:
            return f"the model fails with it: {_said(error)}"
        apart = difference(self.expected, outputs)
        if apart <= self.allowed:
            return None
        return f"the model computes something else with it (outputs differ by {apart:.2g})"


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _allowed(module: nn.Module, calls: Sequence[Call], outputs: Sequence[Any]) -> float:
    """The difference that is allowed: what rounding explains, or several times what two unchanged replays show."""
    noise = difference(outputs, replay(module, calls))
    dtypes = {dtype for call in calls for dtype in call.autocast.values() if dtype is not None}
    return max(tolerance(module, outputs, dtypes), 4 * noise)


def tolerance(module: nn.Module, outputs: Any, computed_in: Iterable[torch.dtype] = ()) -> float:
    """The relative difference of outputs that rounding explains, in the coarsest dtype that computes them."""
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    floating = [leaf for leaf in leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    dtypes = {*computed_in, *(tensor.dtype for tensor in (*parameters, *floating))}
    devices = {tensor.device.type for tensor in (*parameters, *floating)}
    dtypes |= {torch.get_autocast_dtype(device) for device in devices if torch.is_autocast_enabled(device)}
    if "cuda" in devices and torch.get_float32_matmul_precision() != "highest":
        dtypes.add(torch.float16)  # TF32 has as many bits
    return min(MOST, max((AMPLIFIED * torch.finfo(dtype).eps for dtype in dtypes), default=MOST))


def difference(expected: Any, actual: Any) -> float:
    """How far outputs are apart, relative to the largest entry of each tensor; infinite where they are of other kinds.

    NaN is equal to NaN. Where numbers with fractions agree, whole ones (the largest logit's index) may flip by rounding
    and are not compared; where there are none, whole numbers must be equal.
    """
    pairs = [*map(_as_tensor, leaves(expected))], [*map(_as_tensor, leaves(actual))]
    if len(pairs[0]) != len(pairs[1]):
        return torch.inf
    largest, whole = 0.0, 0.0
    scale = max((_largest(leaf) for leaf in pairs[0] if _has_fractions(leaf)), default=0.0)
    for one, other in zip(*pairs, strict=True):
        if isinstance(one, Tensor) != isinstance(other, Tensor):
            return torch.inf
        if not isinstance(one, Tensor):
            if isinstance(one, str) and one != other:  # marks of nested values among them
                return torch.inf
            continue
        if one.shape != other.shape or one.dtype != other.dtype:
            return torch.inf
        if _has_fractions(one):
            largest = max(largest, _apart(one, other, scale))
        elif not torch.equal(one, other):
            whole = torch.inf
    return largest if any(map(_has_fractions, pairs[0])) else whole


def has_finite(outputs: Any) -> bool:
    """Whether there is a finite number in outputs; True where there are no numbers with fractions at all."""
    tensors = [leaf for leaf in map(_as_tensor, leaves(outputs)) if _has_fractions(leaf) and leaf.numel()]
    return not tensors or any(
        bool(torch.isfinite(leaf.to_dense() if leaf.is_sparse else leaf).any()) for leaf in tensors
    )


def _as_tensor(leaf: Any) -> Any:
    return torch.tensor(leaf, dtype=torch.float64) if isinstance(leaf, float) else leaf


def _has_fractions(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _largest(tensor: Tensor) -> float:
    finite = wide(tensor.detach().to_dense() if tensor.is_sparse else tensor.detach())
    finite = finite[torch.isfinite(finite)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _apart(one: Tensor, other: Tensor, scale: float) -> float:
    one, other = (wide(each.detach().to_dense() if each.is_sparse else each.detach()) for each in (one, other))
    same = (one == other) | (torch.isnan(one) & torch.isnan(other))
    if same.all():
        return 0.0
    distance = (one - other).abs()[~same]
    if not torch.isfinite(distance).all():
        return torch.inf
    # A tensor that is zero but for rounding, beside others that are not, is compared with those.
    size = max(_largest(one), 1e-3 * scale)
    return float(distance.max()) / size if size else torch.inf
