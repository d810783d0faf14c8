"""Hypothesis strategies for networks: small ones of any make, as descriptions that are built anew at will.

A description is plain data whose ``repr`` is Python, so that what hypothesis prints can be pasted into a test.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

ROWS, POSITIONS, SIDE, TOKENS = 3, 3, 5, 9
# Children may be called what a factorized layer calls its own parts, what torch has names for, or what no attribute is.
NAMES = (
    *("fc", "weight", "s", "U", "V", "A", "B", "bias", "form", "view", "rank", "forward_", "0", "1", "layer", "_face"),
    *("état", "权重", "__x__", "a-b", "with space", "shows_factors", "in_proj_weight", "weight_ih_l0", "out_proj"),
)
ACTIVATIONS: dict[str, Any] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}


@dataclass(frozen=True)
class Node:
    """A module of a network.

    Attributes:
        kind: A layer, or a container.
        options: What it is made with.
        key: Its number among the layers, by which another place can have it again; -1 for a container.
        frozen: Whether it does not train.
        hooks: Which are hung on it.
        children: Of a container.
        names: Of the children.
    """

    kind: str
    options: tuple[Any, ...] = ()
    key: int = -1
    frozen: bool = False
    hooks: tuple[str, ...] = ()
    children: tuple[Node, ...] = ()
    names: tuple[str, ...] = ()

    def __repr__(self) -> str:
        given = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return f"Node({', '.join([repr(self.kind), *given])})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # as hypothesis prints it


@dataclass(frozen=True)
class Description:
    """A network, and what it is fed.

    Attributes:
        track: What its inputs are: "vector", "sequence", "tokens", "signal" or "image".
        width: Features or channels of the input.
        root: The network.
        double: Whether it computes in float64.
        seed: Of weights and data.
        simple: Whether it has linear layers and plain convolutions only.
    """

    track: str
    width: int
    root: Node
    double: bool = False
    seed: int = 0
    simple: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.double else torch.float32

    def build(self) -> nn.Module:
        """The network, the same each time."""
        torch.manual_seed(self.seed)
        return _build(self.root, {}).to(self.dtype)

    def inputs(self, number: int) -> Tensor:
        """The inputs of a batch, the same each time."""
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        if self.track == "tokens":
            return torch.randint(TOKENS, (ROWS, POSITIONS), generator=generator)
        sizes = {"vector": (), "sequence": (POSITIONS,), "signal": (SIDE,), "image": (SIDE, SIDE)}[self.track]
        shape = (ROWS, *sizes, self.width) if self.track == "sequence" else (ROWS, self.width, *sizes)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)


# ----------------------------------------------------------------------------------------------------------- modules


class Chain(nn.Module):
    """Calls its children one after the other, under whatever names they have."""

    def __init__(self, children: dict[str, nn.Module]) -> None:
        super().__init__()
        self.order = []
        for name, child in children.items():
            while name in self._modules or hasattr(self, name):
                name += "_"
            self.add_module(name, child)
            self.order.append(name)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = self._modules[name](x)
        return x


class Listed(nn.Module):
    """Calls the modules of a list."""

    def __init__(self, children: dict[str, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(children.values())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Keyed(nn.Module):
    """Calls the modules of a dictionary, and has a second name for the last."""

    def __init__(self, children: dict[str, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for name, layer in children.items():
            while name in self.layers or hasattr(self.layers, name):
                name += "_"
            self.layers[name] = layer
        self.alias = layer

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


class Residual(Chain):
    """Adds what its children compute to its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class WithUnused(Chain):
    """Has a layer that is never called, and one that only a Python list knows of."""

    def __init__(self, children: dict[str, nn.Module]) -> None:
        super().__init__(children)
        self.unused = nn.Linear(5, 4)
        self.listed = [*self._modules.values()][:1]


class ByType(Chain):
    """Asks of what class its children are, and what their weights are, as torch's own modules do."""

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            layer = self._modules[name]
            x = layer(x)
            if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
                x = torch.tanh(x.to(layer.weight.dtype)) if layer.weight.ndim else x
        return x


class OwnLinear(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, bias=bias, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self, kind: str, inputs: int, hidden: int, layers: int, both: bool, bias: bool) -> None:
        super().__init__()
        make = getattr(nn, kind)
        self.rnn = make(inputs, hidden, layers, bias=bias, batch_first=True, bidirectional=both)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class Tied(nn.Module):
    """A layer that computes with the very weight of another."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        outputs, inputs = first.weight.shape
        self.twin = nn.Linear(inputs, outputs, bias=False)
        self.twin.weight = first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.twin(x)


CONTAINERS: dict[str, Any] = {
    "sequential": lambda children: nn.Sequential(*children.values()),
    "chain": Chain,
    "listed": Listed,
    "keyed": Keyed,
    "residual": Residual,
    "unused": WithUnused,
    "by_type": ByType,
}
LAYERS: dict[str, Any] = {
    "linear": lambda i, o, bias: nn.Linear(i, o, bias=bias),
    "own_linear": lambda i, o, bias: OwnLinear(i, o, bias=bias),
    "embedding": lambda i, o, padding: nn.Embedding(i, o, padding_idx=padding),
    "layer_norm": nn.LayerNorm,
    "batch_norm1d": nn.BatchNorm1d,
    "batch_norm2d": nn.BatchNorm2d,
    "attention": Attention,
    "recurrent": Recurrent,
    "encoder": lambda width, heads, first: nn.TransformerEncoderLayer(
        width, heads, 2 * width, 0.0, batch_first=True, norm_first=first
    ),
    "conv1d": lambda i, o, k, options: nn.Conv1d(i, o, k, **dict(options)),
    "conv2d": lambda i, o, k, options: nn.Conv2d(i, o, k, **dict(options)),
    "conv_transpose1d": lambda i, o, k, options: nn.ConvTranspose1d(i, o, k, **dict(options)),
    "conv_transpose2d": lambda i, o, k, options: nn.ConvTranspose2d(i, o, k, **dict(options)),
    "activation": lambda name: ACTIVATIONS[name](),
    "dropout": lambda: nn.Dropout(0.0),
    "identity": nn.Identity,
    "flat": Flat,
}


def _build(node: Node, built: dict[int, nn.Module]) -> nn.Module:
    if node.kind == "again":
        return built[node.key]
    if node.kind == "tied":
        return Tied(built[node.key])
    if node.kind in CONTAINERS:
        children = [_build(child, built) for child in node.children]
        names: dict[str, nn.Module] = {}
        for name, child in zip(node.names, children, strict=True):
            while name in names:
                name += "_"
            names[name] = child
        return CONTAINERS[node.kind](names)
    layer: nn.Module = LAYERS[node.kind](*node.options)
    built[node.key] = layer
    if node.frozen:
        layer.requires_grad_(False)
    for hook in node.hooks:
        HOOKS[hook](layer)
    return layer


def _forward_hook(layer: nn.Module) -> None:
    layer.calls = 0

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        module.calls += 1
        return 0.5 * output if isinstance(output, Tensor) else output

    layer.register_forward_hook(hook)


def _pre_hook(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(lambda module, args: (1.5 * args[0],) if args[0].is_floating_point() else None)


def _own_parameter(layer: nn.Module) -> None:
    layer.gain = nn.Parameter(torch.tensor(1.25))
    layer.register_buffer("shift", torch.tensor(0.125))
    layer.register_forward_hook(lambda module, args, output: module.gain * output + module.shift)


def _backward_hook(layer: nn.Module) -> None:
    layer.register_full_backward_hook(lambda module, given, got: tuple(g if g is None else 0.5 * g for g in given))


def _weight_hook(layer: nn.Module) -> None:
    if layer.weight.requires_grad:
        layer.weight.register_hook(lambda grad: 0.5 * grad)


def _zero(layer: nn.Module) -> None:
    nn.init.zeros_(layer.weight)


HOOKS = {
    "forward": _forward_hook,
    "pre": _pre_hook,
    "own": _own_parameter,
    "backward": _backward_hook,
    "weight": _weight_hook,
    "zero": _zero,
}


# -------------------------------------------------------------------------------------------------------- strategies


class _Drawer:
    """What is drawn so far: the layers that another place may have again, by the shapes between which they map."""

    def __init__(self, draw: Any, simple: bool) -> None:
        self.draw, self.simple = draw, simple
        self.made: list[tuple[Node, Any, Any]] = []

    def one_of(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def size(self) -> int:
        return self.draw(st.integers(1, 12))

    def rarely(self) -> bool:
        return self.draw(st.integers(0, 9)) == 9

    def layer(self, kind: str, options: tuple[Any, ...], before: Any, after: Any, hooks: bool = True) -> Node:
        node = Node(kind, options, len(self.made))
        if kind not in ("activation", "dropout", "identity", "flat"):
            node = replace(node, frozen=self.rarely())
        if hooks and self.rarely():
            node = replace(node, hooks=(self.one_of(*([*HOOKS] if not self.simple else ["forward", "pre", "own"])),))
        self.made.append((node, before, after))
        return node

    def stage(self, shape: tuple[str, int, tuple[int, ...]], depth: int) -> tuple[Node, Any]:
        """A module for inputs of this shape: track, width, sizes; and the shape of its output."""
        track, width, _ = shape
        if depth and self.draw(st.integers(0, 3)) == 0:
            return self.container(shape, depth - 1)
        again = [(node, after) for node, before, after in self.made if before == shape and node.kind != "flat"]
        if again and self.draw(st.integers(0, 5)) == 5:
            node, after = self.one_of(*again)
            if node.kind == "linear" and not node.hooks and self.draw(st.booleans()):
                return Node("tied", (), node.key), after
            return Node("again", (), node.key), after
        kinds = ["weight", "weight", "weight", "norm", "activation", "other"]
        kind = self.one_of(*kinds)
        if kind == "activation":
            return self.layer("activation", (self.one_of(*ACTIVATIONS),), shape, shape, hooks=False), shape
        if kind == "other":
            return self.layer(self.one_of("dropout", "identity"), (), shape, shape, hooks=False), shape
        if kind == "norm":
            name = {"vector": "batch_norm1d", "signal": "batch_norm1d", "image": "batch_norm2d"}.get(track)
            return self.layer(name or "layer_norm", (width,), shape, shape, hooks=False), shape
        return getattr(self, f"_{track}")(shape)

    def linear(self, shape: Any) -> tuple[Node, Any]:
        track, width, sizes = shape
        after = (track, self.size(), sizes)
        kind = "own_linear" if not self.simple and self.rarely() else "linear"
        return self.layer(kind, (width, after[1], self.draw(st.booleans())), shape, after), after

    _vector = linear

    def _sequence(self, shape: Any) -> tuple[Node, Any]:
        track, width, sizes = shape
        kind = "linear" if self.simple else self.one_of("linear", "linear", "attention", "recurrent", "encoder")
        if kind == "linear":
            return self.linear(shape)
        if kind == "recurrent":
            name, hidden, both = (
                self.one_of("LSTM", "GRU", "RNN"),
                self.draw(st.integers(1, 6)),
                self.draw(st.booleans()),
            )
            options = (name, width, hidden, self.one_of(1, 1, 2), both, self.draw(st.booleans()))
            after = (track, hidden * (1 + both), sizes)
            return self.layer(kind, options, shape, after, hooks=False), after
        heads = self.one_of(*(n for n in (1, 2, 3) if width % n == 0))
        options = (width, heads, self.draw(st.booleans()))
        return self.layer(kind, options, shape, shape, hooks=False), shape

    def _convolution(self, shape: Any, axes: int) -> tuple[Node, Any]:
        track, width, sizes = shape
        transposed = not self.simple and self.one_of(False, False, True)
        groups = self.one_of(*(n for n in (1, 1, 2, 3, width) if width % n == 0))
        outputs = groups * self.draw(st.integers(1, 8))
        kernel = tuple(self.one_of(1, 2, 3) for _ in range(axes))
        options: dict[str, Any] = {"groups": groups, "bias": self.draw(st.booleans())}
        if transposed:
            options |= {"stride": self.one_of(1, 2)}
            if options["stride"] == 2:
                options |= {"output_padding": self.one_of(0, 1)}
            sizes_after = tuple(
                (n - 1) * options["stride"] + k + options.get("output_padding", 0)
                for n, k in zip(sizes, kernel, strict=True)
            )
            if max(sizes_after) > 12:
                return self.layer("identity", (), shape, shape, hooks=False), shape
        else:
            padding = self.one_of(1, 1, "same" if all(k % 2 for k in kernel) else 0, 0)  # of even ones torch warns
            mode = "zeros" if self.simple or padding == 0 else self.one_of("zeros", "zeros", "circular", "reflect")
            stride, dilation = (1, self.one_of(1, 2)) if padding == "same" else (self.one_of(1, 2), 1)
            if padding == "same" and max(dilation * (k - 1) for k in kernel) > min(sizes):
                dilation = 1
            if min(sizes) < 3:
                kernel, padding, mode, dilation = (1,) * axes, 0, "zeros", 1
            options |= {"padding": padding, "stride": stride, "dilation": dilation, "padding_mode": mode}
            sizes_after = tuple(
                n if padding == "same" else (n + 2 * padding - k) // stride + 1
                for n, k in zip(sizes, kernel, strict=True)
            )
        after = (track, outputs, sizes_after)
        name = f"conv{'_transpose' if transposed else ''}{axes}d"
        return self.layer(name, (width, outputs, kernel, tuple(options.items())), shape, after), after

    def _signal(self, shape: Any) -> tuple[Node, Any]:
        return self._convolution(shape, 1)

    def _image(self, shape: Any) -> tuple[Node, Any]:
        return self._convolution(shape, 2)

    def container(self, shape: Any, depth: int) -> tuple[Node, Any]:
        kind = self.one_of(*CONTAINERS)
        children, now = [], shape
        for _ in range(self.draw(st.integers(1, 3))):
            node, now = self.stage(now, depth)
            children.append(node)
        if kind == "residual" and now != shape:
            kind = "chain"
        names = tuple(self.one_of(*NAMES) for _ in children)
        return Node(kind, children=tuple(children), names=names), now


@st.composite
def descriptions(draw: Any, simple: bool = False) -> Description:
    """Networks with at least one layer that has a weight.

    Args:
        draw: Of hypothesis.
        simple: Only what a straightforward reference knows: linear layers and convolutions in double precision.
    """
    drawer = _Drawer(draw, simple)
    tracks = (
        ("vector", "image", "signal", "sequence") if simple else ("vector", "image", "signal", "sequence", "tokens")
    )
    track, width = drawer.one_of(*tracks), draw(st.integers(1, 6))
    children: list[Node] = []
    sizes = {"signal": (SIDE,), "image": (SIDE, SIDE)}.get(track, ())
    shape: Any = ("sequence" if track == "tokens" else track, width, sizes)
    if track == "tokens":
        padding = drawer.one_of(None, 0)
        children.append(drawer.layer("embedding", (TOKENS, width, padding), "tokens", shape, hooks=False))
    for _ in range(draw(st.integers(1, 4))):
        node, shape = drawer.stage(shape, 2)
        children.append(node)
    children.append(Node("flat"))
    size = shape[1]
    for n in (POSITIONS,) if shape[0] == "sequence" else shape[2]:
        size *= n
    flat = ("vector", size, ())
    outputs = drawer.size()
    children.append(drawer.layer("linear", (size, outputs, draw(st.booleans())), flat, ("vector", outputs, ())))
    kind = drawer.one_of("sequential", "chain", "keyed", "listed")
    names = tuple(drawer.one_of(*NAMES) for _ in children)
    double = simple or draw(st.booleans())
    return Description(
        track, width, Node(kind, children=tuple(children), names=names), double, draw(st.integers(0, 99)), simple
    )
