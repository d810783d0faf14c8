"""What a model costs, counted: its parameters, and the multiply-accumulates of calls that are replayed for it.

MACs are what :class:`torch.utils.flop_counter.FlopCounterMode` counts, halved, and what it has no formula for:
everything that multiplies matrices or convolves, the products in the kernels of attention, recurrent nets and experts
included. They are those of the dense model and of each rank, whatever ranks the layers keep meanwhile and in whichever
way they compute. An operator of the user's own (``torch.library.custom_op``) counts by the formula that is registered
for it (``torch.utils.flop_counter.register_flop_formula``).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_svd.arguments import check_module
from lightning_svd.layers.compounds import svd_layers
from lightning_svd.layers.dense_weight import DenseWeight
from lightning_svd.layers.forms import DenseForm
from lightning_svd.layers.layer import FactorizedModule, SVDLayer
from lightning_svd.layers.matrices import exact_products
from lightning_svd.layers.parts import InParts, TakenApart
from lightning_svd.layers.recurrent import SplitRecurrent
from lightning_svd.model.calls import Call, UncopiedHook, inputs_of
from lightning_svd.model.replay import replay
from lightning_svd.model.values import mapped
from lightning_svd.ranks.costs import LayerCost, ModelCost


def as_arguments(example_input: Any) -> tuple[Any, ...]:
    """What a module is called with: a tuple holds several arguments, anything else is one."""
    return example_input if isinstance(example_input, tuple) else (example_input,)


def example_call(module: nn.Module, example_input: Any) -> Call:
    """The call of a module with an example: a tuple holds several arguments, a dict arguments by keyword if it can."""
    if isinstance(example_input, dict) and _takes(module, example_input):
        return Call(module, (), example_input)
    return Call(module, as_arguments(example_input), {})


def count_params(module: nn.Module) -> ModelCost:
    """The cost of ``module`` in parameters only."""
    return _params(module, svd_layers(module))


def _params(module: nn.Module, layers: Mapping[str, SVDLayer]) -> ModelCost:
    left = {id(p): p.numel() for p in module.parameters()}
    other = 0
    for layer in layers.values():
        trained = [] if isinstance(layer.form, DenseForm) else [id(p) for p in layer.trained_parameters()]
        if trained and all(each in left for each in trained):  # it shows its factors
            for each in trained:
                del left[each]
        else:  # the dense weight, or a part of a larger one
            other -= layer.dense_params
    costs = {name: LayerCost(layer.dense_params, layer.params_per_rank) for name, layer in layers.items()}
    return ModelCost(costs, other + sum(left.values()))


def count_costs(module: nn.Module, example_input: Any) -> ModelCost:
    """The cost of ``module`` in MACs and parameters.

    Args:
        module: With factorized layers or without; called once, as in evaluation and without gradients.
        example_input: What it is called with: a tuple for several arguments, a dict for arguments by keyword. The
            first tensor's first dimension is the batch.

    Raises:
        ValueError: If the module cannot be called with it.
    """
    check_module("module", module)
    with running_example("example_input"):
        return count_calls(module, svd_layers(module), [example_call(module, example_input)])


@contextmanager
def running_example(argument: str) -> Iterator[None]:
    """Whatever fails inside is a matter of the example that a model is called with.

    Args:
        argument: Its name.

    Raises:
        ValueError: Naming it.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"`{argument}`: the model fails on it: {type(error).__name__}: {error}") from error


def _takes(module: nn.Module, keywords: dict[Any, Any]) -> bool:
    """Whether these are the module's arguments by keyword, and not one argument that is a dict."""
    try:
        inspect.signature(module.forward).bind(**keywords)
    except TypeError:
        return False
    return True


def count_calls(
    module: nn.Module, layers: Mapping[str, SVDLayer], calls: Sequence[Call], inputs: int | None = None
) -> ModelCost:
    """The cost of calls that a :class:`~lightning_svd.model.calls.CallRecorder` noted, found by replaying them.

    While they run, the layers have their dense weights, which takes as much memory as those do.

    Args:
        module: The whole tree.
        layers: Its factorized layers by name.
        calls: Of modules in it.
        inputs: How many inputs the calls hold; None for the first dimension of the first call's first tensor.
    """
    notes = _Notes(module, layers)
    with _whole_weights(module), notes:
        replay(module, calls, notes.during)
    params = _params(module, layers)
    costs = {}
    for name, layer in layers.items():
        shapes = notes.shapes[name]
        dense = sum(layer.view.dense_macs(shape) for shape in shapes)
        per_rank = sum(layer.view.macs_per_rank(shape) for shape in shapes)
        known = params.layers[name]
        repeats = min(notes.repeats[name], default=1)
        costs[name] = LayerCost(
            known.dense_params, known.params_per_rank, dense, per_rank, tuple(shapes), repeats=repeats
        )
    other = notes.macs - sum(cost.dense_macs for cost in costs.values())
    return ModelCost(costs, params.other_params, max(0, other), inputs_of(calls) if inputs is None else inputs)


class _Notes:
    """What is noted in a replay: all MACs, and the shapes of what the layers get.

    Attributes:
        macs: Of everything.
        shapes: Of each layer's inputs, by its name.
        repeats: How often each layer ran in each of the calls that it ran in.
    """

    def __init__(self, module: nn.Module, layers: Mapping[str, SVDLayer]) -> None:
        self.module = module
        self.macs = 0
        self.shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in layers}
        self.repeats: dict[str, list[int]] = {name: [] for name in layers}
        self._names = {id(layer): name for name, layer in layers.items()}
        self._now: list[tuple[str, list[tuple[int, ...]]]] = []
        self._meter = _Meter()
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        owners = [child for child in self.module.modules() if isinstance(child, InParts)]
        for owner in owners:
            self._handles.append(owner.register_forward_pre_hook(UncopiedHook(self._enter_owner), with_kwargs=True))
            if _computes_merged(owner):
                self._handles.append(owner.register_forward_hook(UncopiedHook(self._leave_merged), always_call=True))
        of_owners = {id(part) for owner in owners for part in owner.parts().values()}
        for child in self.module.modules():
            if id(child) in self._names and id(child) not in of_owners:
                self._handles.append(child.register_forward_pre_hook(UncopiedHook(self._enter_layer), with_kwargs=True))

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def during(self, call: Call) -> Iterator[None]:
        """What is noted inside counts, if it goes well."""
        self._now, self._meter.macs, self._meter.paused = [], 0, 0
        with self._meter:
            yield
        self.macs += call.times * self._meter.macs
        for name, shapes in self._now:
            self.shapes[name] += shapes * call.times
        for name, repeats in Counter(name for name, _ in self._now).items():
            self.repeats[name].append(repeats)

    def _enter_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = (*args, *kwargs.values())[0]
        self._now.append((self._names[id(layer)], [tuple(first.shape)]))

    def _enter_owner(self, owner: InParts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parts = owner.parts()
        for name, shapes in owner.input_shapes(*args, **kwargs).items():
            if id(parts[name]) in self._names:
                self._now.append((self._names[id(parts[name])], shapes))
            elif _computes_merged(owner):
                positions = sum(shape[0] for shape in shapes)
                self._meter.macs += positions * sum(p.numel() for p in parts[name].parameters() if p.ndim == 2)
        self._meter.paused += _computes_merged(owner)

    def _leave_merged(self, *_: Any) -> None:
        self._meter.paused -= 1


def _computes_merged(owner: nn.Module) -> bool:
    # A recurrent net of pairs may merge them, once for all steps, and hand them to torch's kernel. It costs what the
    # pairs do wherever it runs otherwise.
    return isinstance(owner, SplitRecurrent) and not isinstance(owner, TakenApart)


@contextmanager
def _whole_weights(module: nn.Module) -> Iterator[None]:
    """Have plain dense weights where factors stand for them, so that nothing but the model's own products are made.

    Here nn.Module's private containers are touched, as by ``torch.func.functional_call``, which cannot take a whole
    tree of networks, and knows nothing of factors that are shown.
    """
    changed: list[tuple[FactorizedModule, dict[str, Any], dict[str, Any]]] = []
    try:
        for child in module.modules():
            if isinstance(child, FactorizedModule):
                own = vars(child)
                hung = {name: face for name, face in own.items() if type(face) is DenseWeight and name != "_face"}
                held = own["_parameters"]
                faces = {name: face for name, face in (held | hung).items() if type(face) is DenseWeight}
                if faces:
                    values = {name: _computed(face) for name, face in faces.items()}
                    changed.append((child, held, hung))
                    own["_parameters"] = held | values
                    for name in hung:
                        del own[name]
                    _relink(child)
        yield
    finally:
        for child, held, hung in changed:
            vars(child)["_parameters"] = held
            vars(child).update(hung)
            _relink(child)


def _computed(face: DenseWeight) -> nn.Parameter:
    with torch.no_grad(), exact_products(face.device):
        trained = any(p.requires_grad for p in face.source.trained_parameters())
        return nn.Parameter(face.source.rebuilt().detach(), trained)


def _relink(module: nn.Module) -> None:
    if isinstance(module, InParts):
        module._relink()


# ---------------------------------------------------------------------------------------------------- operators


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the products that run inside it.

    Not FlopCounterMode, which also follows modules by hooks in the backward pass, and fails where a model
    differentiates in its forward pass.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = self.paused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)
        if getattr(func, "_opname", "") in _ABOUT:
            return NotImplemented
        formula = flop_registry.get(packet) or _MORE_FORMULAS.get(str(packet))
        if formula is None and isinstance(func, torch._ops.OpOverload) and func is not torch.ops.prim.device.default:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula is not None and not self.paused:
            self.macs += int(formula(*args, **kwargs, out_val=result)) // 2
        return result


# What tensors of several parts answer themselves.
_ABOUT = {
    *("is_contiguous", "sym_is_contiguous", "is_strides_like_format", "is_non_overlapping_and_dense", "dim", "layout"),
    *("size", "sym_size", "stride", "sym_stride", "storage_offset", "sym_storage_offset", "numel", "sym_numel"),
}


def _of_shapes(formula: Callable[..., int]) -> Callable[..., int]:
    """A formula of shapes as one of tensors, as torch keeps them."""

    def of_tensors(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula(*mapped(args, _shape))

    return of_tensors


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any) -> int:
    """Both products of scaled dot-product attention, shapes (batch, heads, positions, width)."""
    batch, heads, queries, width = query
    return int(2 * batch * heads * queries * key[-2] * (width + value[-1]))


def _recurrent_flops(data: Any, *weights: Any) -> int:
    """Products of an LSTM's kernel on the CPU: one layer in one direction, data (steps, rows, width)."""
    return int(2 * prod(data[:-1]) * sum(prod(weight) for weight in weights[:2]))


def _cudnn_recurrent_flops(data: Any, weights: Any, *_: Any) -> int:
    """Products of a recurrent net's kernel on CUDA, all layers: data (..., width)."""
    return int(2 * prod(data[:-1]) * sum(prod(weight) for weight in weights if len(weight) == 2))


def _vector_flops(*tensors: Any) -> int:
    """A matrix, or a vector, times a vector; what the product is added to has another place."""
    return int(2 * prod(tensors[0]))


def _grouped_flops(left: Any, right: Any, *_: Any) -> int:
    """Products of groups of rows, or of columns, with a matrix each: experts in one piece."""
    groups = left[0] if len(left) == len(right) == 3 else 1
    return int(2 * groups * left[-2] * left[-1] * right[-1])


def _summed_flops(_: Any, left: Any, right: Any, *__: Any) -> int:
    """Products of matrices in batches, (batch, m, k) and (batch, k, n), that are summed."""
    return int(2 * prod(left) * right[-1])


def _bilinear_flops(left: Any, weight: Any, right: Any, *expanded: Any) -> int:
    """A weight (k, m, n) between rows of m and of n, each given one dimension more where it has none."""
    shapes = []
    for shape, dims in zip((left, weight, right), expanded, strict=False):
        full = list(shape)
        for dim in sorted(dims):
            full.insert(dim, 1)
        shapes.append(full)
    return int(2 * prod(map(max, zip(*shapes, strict=True))))


def _distance_flops(left: Any, right: Any, *_: Any) -> int:
    """Distances by products of all rows of one matrix with all of another."""
    return int(2 * prod(left) * right[-2])


def _time_first_flops(data: Any, weight: Any, _: Any, pad: int = 0) -> int:
    """A convolution of data (steps, rows, inputs) with a weight (width, inputs, outputs)."""
    return int(2 * (data[0] + 2 * pad - weight[0] + 1) * data[1] * prod(weight))


# What torch's own counter leaves out, by the operators' names: not every version has each. It knows attention's kernels
# on CUDA and plain products of matrices.
_MORE_FORMULAS: dict[str, Callable[..., int]] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _of_shapes(_attention_flops),
    "aten.mkldnn_rnn_layer": _of_shapes(_recurrent_flops),
    "aten._cudnn_rnn": _of_shapes(_cudnn_recurrent_flops),
    "aten._grouped_mm": _of_shapes(_grouped_flops),
    "aten._scaled_grouped_mm": _of_shapes(_grouped_flops),
    "transformers.grouped_mm_fallback": _of_shapes(_grouped_flops),  # what it computes by where torch cannot
    "aten.mv": _of_shapes(_vector_flops),
    "aten.dot": _of_shapes(_vector_flops),
    "aten.vdot": _of_shapes(_vector_flops),
    "aten.addmv": _of_shapes(lambda _, *factors: _vector_flops(*factors)),
    "aten.addbmm": _of_shapes(_summed_flops),
    "aten._addmm_activation": _of_shapes(_summed_flops),
    "aten._int_mm": _of_shapes(_grouped_flops),
    "aten._trilinear": _of_shapes(_bilinear_flops),
    "aten._euclidean_dist": _of_shapes(_distance_flops),
    "aten.conv_tbc": _of_shapes(_time_first_flops),
}
