"""Recurrent modules of torch with their weight matrices as layers of their own, so that each can be low-rank.

The matrices of the gates stay stacked, as torch keeps them: a rank of the stack costs (gates * hidden + inputs), one in
every gate's own matrix gates * (hidden + inputs), and a step of a sequence takes one product instead of one a gate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_svd.layers.layer import SVDLayer
from lightning_svd.layers.pairs import is_pair, view_of
from lightning_svd.layers.parts import InParts, Slot, Slots, State, linear_of

# What torch's own modules hand their weights to.
_KERNELS: dict[str, Any] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}
# Entries of a recurrent matrix that torch's kernel makes up for by taking all steps at once, measured on a CPU: at a
# third of the products steps of our own are slower for 256 hidden units of an LSTM, and faster for 512.
SAVED_BY_KERNEL = 1 << 18
_OF_TORCH = re.compile(r"(weight|bias)_((?:ih|hh|hr)(?:_l\d+(?:_reverse)?)?)")
_OF_LAYERS = re.compile(r"((?:ih|hh|hr)(?:_l\d+(?:_reverse)?)?)\.(weight|bias)")

States = list[Tensor]  # hidden states (rows, width), and for an LSTM cell states


def step(mode: str, inputs: Tensor, recurrent: Tensor, states: States) -> States:
    """One step of a recurrent net.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        inputs: What the input's matrix and bias make of the input, (rows, gates * hidden).
        recurrent: What the recurrent matrix and bias make of the hidden states, (rows, gates * hidden).
        states: Before the step.
    """
    if mode == "LSTM":
        enter, forget, cell, leave = (inputs + recurrent).chunk(4, -1)
        memory = forget.sigmoid() * states[1] + enter.sigmoid() * cell.tanh()
        return [leave.sigmoid() * memory.tanh(), memory]
    if mode == "GRU":
        (reset, update, new), (reset_r, update_r, new_r) = inputs.chunk(3, -1), recurrent.chunk(3, -1)
        candidate = (new + (reset + reset_r).sigmoid() * new_r).tanh()
        return [candidate + (update + update_r).sigmoid() * (states[0] - candidate)]
    total = inputs + recurrent
    return [total.tanh() if mode == "RNN_TANH" else total.relu()]


class _Split(InParts):
    """What recurrent modules and their cells share: names in files, and how they are taken apart."""

    @staticmethod
    def why_not(whole: nn.Module) -> str | None:
        own = _parameters_of(whole)
        of_inputs, of_states = ({name[9:] for name in own if name.startswith(f"weight_{of}")} for of in ("ih", "hh"))
        if of_inputs != of_states:
            return "in a recurrent module, a weight of which is computed and no parameter of it"
        return None

    @staticmethod
    def linears(whole: nn.Module) -> dict[str, nn.Linear]:
        own = _parameters_of(whole)
        matches = {name: match for name in own if (match := _OF_TORCH.fullmatch(name))}
        return {
            match[2]: linear_of(own[name], own.get(f"bias_{match[2]}"))
            for name, match in matches.items()
            if match[1] == "weight"
        }

    @staticmethod
    def slots_of(whole: nn.Module) -> Slots:
        own = dict(whole.named_parameters(recurse=False))
        parts = [match[2] for name in own if (match := _OF_TORCH.fullmatch(name)) and match[1] == "weight"]
        return {
            part: (Slot(f"weight_{part}"), Slot(f"bias_{part}") if f"bias_{part}" in own else None) for part in parts
        }

    @staticmethod
    def is_whole_in(state: Mapping[str, Tensor], prefix: str) -> bool:
        return any(f"{prefix}weight_ih{of}" in state for of in ("", "_l0"))

    @staticmethod
    def is_split_in(state: Mapping[str, Tensor], prefix: str) -> bool:
        return any(f"{prefix}ih{of}.weight" in state for of in ("", "_l0"))

    @staticmethod
    def join_state(state: Mapping[str, Tensor], prefix: str = "") -> State:
        return _renamed(state, prefix, _OF_LAYERS, r"\2_\1")

    @staticmethod
    def split_state(state: Mapping[str, Tensor], prefix: str = "") -> State:
        return _renamed(state, prefix, _OF_TORCH, r"\2.\1")


def _parameters_of(whole: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own; AWD-LSTM and others put tensors among them, which are computed for each call."""
    return {name: p for name, p in whole.named_parameters(recurse=False) if isinstance(p, nn.Parameter)}


def _renamed(state: Mapping[str, Tensor], prefix: str, old: re.Pattern[str], new: str) -> State:
    """``state`` with every name of ``old`` form behind ``prefix`` in the ``new`` form."""

    def rename(name: str) -> str:
        match = old.fullmatch(name, len(prefix)) if name.startswith(prefix) else None
        return prefix + match.expand(new) if match else name

    return {rename(name): value for name, value in state.items()}


class SplitRecurrent(_Split):
    """An ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` computed by separate linear layers: ih_l0, hh_l0, ih_l0_reverse, ...

    It takes the same arguments and returns the same. At high ranks, and for small matrices, the dense weights are
    rebuilt, once for all steps of a sequence, and handed to torch's own kernel. Where two factors save more than the
    kernel does, steps are taken one by one, at the cost of the low-rank products; but not on CUDA, where the kernel of
    cuDNN is faster than steps of whatever rank.
    """

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int

    def flatten_parameters(self) -> None:
        """Pack the weights for cuDNN as torch does, if they are all dense."""
        if self.is_dense:
            super().flatten_parameters()  # type: ignore[misc]

    def _relink(self) -> None:
        self._init_flat_weights()  # type: ignore[operator]  # of nn.RNNBase

    @property
    def fused(self) -> bool:
        """Whether torch's kernel computes, with dense weights.

        It does not depend on the input, whose sizes an exported model is to leave open.
        """
        if self.watched:
            return False
        recurrent = (part for name, part in self.parts().items() if name.startswith("hh"))
        return next(self.parameters()).is_cuda or all(_saved(part) <= SAVED_BY_KERNEL for part in recurrent)

    @property
    def rebuilds(self) -> bool:
        """Whether torch's kernel computes with weights that low-rank parts are multiplied out to."""
        return self.fused and not self.is_dense

    def factored_up_to(self, part: SVDLayer) -> int:
        """As in :class:`InParts`: where no recurrent part can save enough, or on CUDA, none at all."""
        recurrent = [each for name, each in self.parts().items() if name.startswith("hh")]
        most = {id(each): _by_steps_up_to(each) for each in recurrent if isinstance(each, SVDLayer)}
        if next(self.parameters()).is_cuda or not any(most.values()):
            return 0
        return most.get(id(part), part.full_rank)

    def input_shapes(self, input: Tensor | PackedSequence, *_: Any, **__: Any) -> dict[str, list[tuple[int, ...]]]:
        """As in :class:`InParts`: all steps of a sequence at once, and what takes the hidden states step by step."""
        if isinstance(input, PackedSequence):
            rows = input.batch_sizes.tolist()
        elif input.ndim == 2:
            rows = [1] * len(input)
        else:
            rows = [input.shape[0 if self.batch_first else 1]] * input.shape[1 if self.batch_first else 0]
        hidden = self.proj_size or self.hidden_size
        widths = {"ih_l0": self.input_size, "ih": hidden * len(self._directions), "hh": hidden, "hr": self.hidden_size}
        shapes: dict[str, list[tuple[int, ...]]] = {}
        for name in self.parts():
            width = widths.get(name.removesuffix("_reverse"), widths[name[:2]])
            shapes[name] = [(count, width) for count in ([sum(rows)] if name.startswith("ih") else rows)]
        return shapes

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor | tuple[Tensor, ...]]:
        """As in torch's own module."""
        if self.is_dense:
            of_torch: Any = super().forward
            result: tuple[Tensor | PackedSequence, Tensor | tuple[Tensor, ...]] = of_torch(input, hx)
            return result
        order = back = sizes = None
        batched, axis = True, 0 if self.batch_first else 1
        if isinstance(input, PackedSequence):
            data, sizes, order, back = input
            rows = int(sizes[0])
        else:
            if input.ndim not in (2, 3):
                raise ValueError(f"{self.mode}: expected an input of 2 or 3 dimensions, got {input.ndim}")
            batched = input.ndim == 3
            data = input if batched else input.unsqueeze(axis)
            rows = data.shape[axis]
        if data.shape[-1] != self.input_size:
            raise RuntimeError(f"{self.mode}: expected {self.input_size} features, got {data.shape[-1]}")
        states = self._states(hx, data, rows, batched, order)
        output, states = self._by_kernel(data, sizes, states) if self.fused else self._by_steps(data, sizes, states)
        if back is not None:
            states = [state.index_select(1, back) for state in states]
        if not batched:
            output, states = output.squeeze(axis), [state.squeeze(1) for state in states]
        hidden = tuple(states) if self.mode == "LSTM" else states[0]
        return (output if sizes is None else PackedSequence(output, sizes, order, back)), hidden

    def _states(
        self, hx: Tensor | tuple[Tensor, Tensor] | None, data: Tensor, rows: int, batched: bool, order: Tensor | None
    ) -> States:
        """Where sequences begin: of each layer and direction, (layers * directions, rows, width)."""
        widths = [self.proj_size or self.hidden_size, self.hidden_size][: 2 if self.mode == "LSTM" else 1]
        shapes = [(self.num_layers * len(self._directions), rows, width) for width in widths]
        if hx is None:
            return [data.new_zeros(shape) for shape in shapes]
        states = [hx] if isinstance(hx, Tensor) else [*hx]
        if not batched:
            states = [state.unsqueeze(1) for state in states]
        for state, shape in zip(states, shapes, strict=True):
            if state.shape != shape:
                raise RuntimeError(f"{self.mode}: expected a hidden state of {shape}, got {tuple(state.shape)}")
        return states if order is None else [state.index_select(1, order) for state in states]

    @property
    def _directions(self) -> tuple[str, ...]:
        return ("", "_reverse") if self.bidirectional else ("",)

    def _suffixes(self) -> Iterator[tuple[int, str, str]]:
        """Layer, direction, and how the names of the layers for them end."""
        for layer in range(self.num_layers):
            for direction in self._directions:
                yield layer, direction, f"_l{layer}{direction}"

    def _by_kernel(self, data: Tensor, sizes: Tensor | None, states: States) -> tuple[Tensor, States]:
        weights: list[Tensor] = []
        # Rebuilt in the dtype that torch's module would hand over, whatever autocast makes of it there.
        with torch.autocast(data.device.type, enabled=False):
            for _, _, suffix in self._suffixes():
                parts = [f"{name}{suffix}" for name in ("ih", "hh")]
                weights += [self.weight_of(part) for part in parts]
                weights += [bias for part in parts if (bias := self.bias_of(part)) is not None]
                if self.proj_size:
                    weights.append(self.weight_of(f"hr{suffix}"))
        kernel, start = _KERNELS[self.mode], states if self.mode == "LSTM" else states[0]
        options = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        if sizes is None:
            output, *states = kernel(data, start, weights, *options, self.batch_first)
        else:
            output, *states = kernel(data, sizes, start, weights, *options)
        return output, states

    def _by_steps(self, data: Tensor, sizes: Tensor | None, states: States) -> tuple[Tensor, States]:
        """Steps one by one; all sequences of a batch together, those that are as long as that."""
        shape: tuple[int, ...] = ()
        if sizes is None:
            data = data.transpose(0, 1) if self.batch_first else data
            shape = tuple(data.shape[:2])
            data, rows = data.flatten(0, 1), [shape[1]] * shape[0]
        else:
            rows = sizes.tolist()
        ends: list[States] = []
        outputs: list[Tensor] = []
        for layer, direction, suffix in self._suffixes():
            if layer and not direction:  # a layer begins: what the one before it puts out
                data, outputs = F.dropout(torch.cat(outputs, -1), self.dropout, self.training), []
            start = [state[len(ends)] for state in states]
            output, end = self._along(suffix, data, rows, start, bool(direction))
            outputs.append(output)
            ends.append(end)
        data = torch.cat(outputs, -1)
        if sizes is None:
            data = data.view(*shape, -1)
            data = data.transpose(0, 1) if self.batch_first else data
        return data, [torch.stack(state) for state in zip(*ends, strict=True)]

    def _along(
        self, suffix: str, data: Tensor, rows: Sequence[int], start: States, reverse: bool
    ) -> tuple[Tensor, States]:
        """One layer in one direction.

        Args:
            suffix: Of its names.
            data: Inputs of all steps, those of one step together, the longest sequence's first.
            rows: How many sequences there are in each step.
            start: Their first states.
            reverse: Whether from the last step to the first.
        """
        of_inputs, of_states = (self.function_of(f"{name}{suffix}") for name in ("ih", "hh"))
        project = self.function_of(f"hr{suffix}") if self.proj_size else nn.Identity()
        if self.watched and rows[0] == rows[-1]:  # so that inputs can be told apart from steps
            by_input = data.view(len(rows), rows[0], -1).transpose(0, 1)
            inputs = of_inputs(by_input).transpose(0, 1).unbind()
        else:
            inputs = torch.split(of_inputs(data), list(rows))
        if reverse:
            inputs = inputs[::-1]
        states = [state[: len(inputs[0])] for state in start]
        outputs, ended = [], []
        for of_step in inputs:
            now, before = len(of_step), len(states[0])
            if now < before:  # sequences that are over
                ended.append([state[now:] for state in states])
                states = [state[:now] for state in states]
            elif now > before:  # sequences that begin here, seen from their end
                begun = [state[before:now] for state in start]
                states = [torch.cat(both) for both in zip(states, begun, strict=True)]
            states = step(self.mode, of_step, of_states(states[0]), states)
            states[0] = project(states[0])
            outputs.append(states[0])
        ends = [torch.cat(parts) for parts in zip(states, *reversed(ended), strict=True)]
        return torch.cat(outputs[::-1] if reverse else outputs), ends


def _saved(part: Any) -> int:
    """How many entries two factors save compared with the dense weight."""
    if isinstance(part, SVDLayer):
        return part.dense_params - part.rank * part.params_per_rank
    if is_pair(part):
        return view_of(part).dense_params - sum(int(layer.weight.numel()) for layer in part)
    return 0


def _by_steps_up_to(part: SVDLayer) -> int:
    """The highest rank at which two factors save enough for steps of our own; 0 if there is none."""
    return max(0, part.dense_params - SAVED_BY_KERNEL - 1) // part.params_per_rank


class SplitCell(_Split):
    """What an ``nn.LSTMCell``, ``nn.GRUCell`` or ``nn.RNNCell`` computes, by two linear layers: ih and hh.

    It takes the same arguments and returns the same.
    """

    hidden_size: int
    nonlinearity: str

    @property
    def mode(self) -> str:
        """As of :func:`step`."""
        kind: Any = type(self)
        if issubclass(kind, nn.LSTMCell):
            return "LSTM"
        return "GRU" if issubclass(kind, nn.GRUCell) else f"RNN_{self.nonlinearity.upper()}"

    def input_shapes(self, input: Tensor, *_: Any, **__: Any) -> dict[str, list[tuple[int, ...]]]:
        return {"ih": [tuple(input.shape)], "hh": [(*input.shape[:-1], self.hidden_size)]}

    def forward(
        self, input: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As in torch's own module."""
        if self.is_dense:
            of_torch: Any = super().forward
            result: Tensor | tuple[Tensor, Tensor] = of_torch(input, hx)
            return result
        lstm = self.mode == "LSTM"
        if hx is None:
            nothing = input.new_zeros(*input.shape[:-1], self.hidden_size)
            hx = (nothing, nothing) if lstm else nothing
        states = [hx] if isinstance(hx, Tensor) else [*hx]
        states = step(self.mode, self.function_of("ih")(input), self.function_of("hh")(states[0]), states)
        return (states[0], states[1]) if lstm else states[0]
