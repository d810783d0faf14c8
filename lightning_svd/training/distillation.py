"""Distillation: the dense net that a run began with teaches the one that it trains, whatever the loss is.

Neither labels nor loss are needed: the teacher is called with what the student is called with, and the gradient of
their distance, which has a closed form, is added at the student's output in the backward pass of the user's own loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_svd.arguments import check_choice, check_positive, check_weight, shown
from lightning_svd.layers.layer import SVDLayer
from lightning_svd.layers.matrices import wide
from lightning_svd.model.calls import Call, CallWatcher, holders
from lightning_svd.model.replay import run_again, without_fast_path
from lightning_svd.model.surgery import frozen_copy
from lightning_svd.model.values import logits_of, tensors_of
from lightning_svd.training import processes

KINDS = ("auto", "logits", "features")
_DIMENSIONS = 64  # at most, of a tensor


@dataclass
class Distillation:
    """How the dense net teaches the low-rank one: which outputs are compared, and by which distance.

    Two distances of an output y to the teacher's t, each times ``weight``, as if they were added to your loss:

    - "logits": T^2 KL(softmax(t / T) || softmax(y / T)), the mean over all rows, a row being one vector of classes
      (Hinton et al. 2015, arXiv 1503.02531). Its gradient is T (softmax(y / T) - softmax(t / T)) / rows.
    - "features": the mean of (y - t)^2 over all entries. Its gradient is 2 (y - t) / entries.

    Of an output with an attribute ``logits`` only those are compared; of a tuple, a list, a dict or a dataclass every
    floating tensor, each by itself; never a single number, which may be a loss.

    Args:
        where: Name of the submodule whose output is compared, "backbone" say; "" for what the training step calls from
            outside: the module itself, a network in it, or several, each call by itself.
        temperature: T of the logits.
        weight: Of the distance beside a loss of weight 1.
        kind: "logits", "features", or "auto": logits where the output has an attribute ``logits``, features elsewhere.
        class_dim: Dimension of the classes in logits: the last, or 1 for maps of shape (N, classes, H, W).

    Raises:
        ValueError: If one is out of range; the message names it.
    """

    where: str = ""
    temperature: float = 1.0
    weight: float = 1.0
    kind: str = "auto"
    class_dim: int = -1

    def __post_init__(self) -> None:
        if not isinstance(self.where, str):
            raise ValueError(f"`where` must be the name of a module, or '', got {shown(self.where)}")
        check_positive("temperature", self.temperature)
        check_weight("weight", self.weight)
        check_choice("kind", self.kind, KINDS)
        is_dim = isinstance(self.class_dim, int) and not isinstance(self.class_dim, bool)
        if not is_dim or abs(self.class_dim) > _DIMENSIONS:
            bounds = f" from {-_DIMENSIONS} to {_DIMENSIONS}" if is_dim else ""
            raise ValueError(f"`class_dim` must be an integer{bounds}, got {shown(self.class_dim)}")

    def of_logits(self, output: Any) -> bool:
        """Whether this output of a student is compared as logits."""
        return self.kind == "logits" or (self.kind == "auto" and logits_of(output) is not None)

    def gradient(self, y: Tensor, t: Tensor, of_logits: bool) -> Tensor:
        """The gradient of the weighted distance with respect to ``y``, in float32 or wider; the shape of ``y``."""
        y, t = wide(y), wide(t)
        if not of_logits:
            return (y - t).mul_(2 * self.weight / y.numel())
        T, dim = self.temperature, self.class_dim
        rows = y.numel() // y.shape[dim]
        return torch.softmax(y / T, dim).sub_(torch.softmax(t / T, dim)).mul_(T * self.weight / rows)


class Distiller(CallWatcher):
    """Teaches a model that is being trained: keeps the teacher, and adds its gradients at the model's outputs.

    Build it while the model is as it is to teach; :meth:`start` it when its layers are factorized. Calls count while
    the model is in training mode and gradients are enabled.

    Args:
        asked: What is asked for.
        model: The student.
        teacher: If it is there already; otherwise a copy of the student.

    Attributes:
        teacher: The frozen copy, in evaluation mode.
        loss_scale: What the loss is multiplied by before its backward pass: the scale of a loss scaler, the share of a
            batch in an accumulation.

    Raises:
        ValueError: If there is no such module, or it cannot be copied.
    """

    def __init__(self, asked: Distillation, model: nn.Module, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.asked, self.model = asked, model
        self.loss_scale: Callable[[], float] = lambda: 1.0
        self.teacher = teacher or frozen_copy(
            self._student(),
            "`distill` keeps",
            "name the network in it that is to be compared, `distill=Distillation(where=...)`",
        )
        self._calls: dict[nn.Module, Call] = {}  # of the teacher's modules, without arguments, by the student's
        self._names: dict[nn.Module, str] = {}
        self._teaching = False
        self._expected: list[Any] = []
        self._reached: dict[str, bool] = {}
        self._checked: set[str] = set()
        self._is_first_check = True

    def _student(self) -> nn.Module:
        try:
            return self.model.get_submodule(self.asked.where)
        except AttributeError:
            known = ", ".join(repr(name) for name, _ in self.model.named_children())
            raise ValueError(
                f"`where` must be the name of a module in {type(self.model).__name__}, got {self.asked.where!r}; "
                f"it holds: {known or 'none'}"
            ) from None

    def start(self, layers: Mapping[str, SVDLayer]) -> None:
        """Teach from now on.

        Args:
            layers: The factorized layers of the student.
        """
        names = {module: name for name, module in self._student().named_modules()}
        self._calls = self._chosen(layers)
        self._names = {module: self.asked.where or names[module] or type(module).__name__ for module in self._calls}
        self.watch(self._calls)

    def _students(self, layers: Mapping[str, SVDLayer]) -> list[nn.Module]:
        """The modules whose outputs may be compared."""
        student = self._student()
        return [student] if self.asked.where else holders(student, layers.values())

    def _chosen(self, layers: Mapping[str, SVDLayer]) -> dict[nn.Module, Call]:
        """For each of them the call by which the teacher is asked, without arguments."""
        twins, student = dict(self.teacher.named_modules()), self._student()
        names = {module: name for name, module in student.named_modules()}
        return {module: Call(twins[names[module]]) for module in self._students(layers)}

    def entered(self, module: nn.Module) -> None:
        """Refuse a teacher that calls its student."""
        if self._teaching:
            raise ValueError(
                f"`distill` keeps a copy of the model as it was, and that copy calls `{self._names[module]}` of the "
                "model itself, by a function that was set on it: name a module that does not, "
                "`distill=Distillation(where=...)`"
            )

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Ask the teacher, before the student holds memory for its backward pass, and may write into its input."""
        self._expected = []
        if self._teaches():
            self._teaching = True
            try:
                call = replace(self._calls[module], args=args, kwargs=kwargs)
                self._expected = [self._ask(call)]
                self._calls[module].differentiates = call.differentiates
            finally:
                self._teaching = False

    def _teaches(self) -> bool:
        """Whether a call that begins now counts."""
        return self.model.training and torch.is_grad_enabled()

    def _ask(self, call: Call) -> Any:
        """What the teacher puts out."""
        with without_fast_path():
            return run_again(call)

    def returned(self, module: nn.Module, output: Any) -> None:
        """Have the backward pass that comes add the gradients of the distances."""
        for expected in self._expected:
            name, of_logits = self._names[module], self.asked.of_logits(output)
            ours, theirs = _compared(output), _compared(expected)
            if [y.shape for y in ours] != [t.shape for t in theirs]:
                raise ValueError(
                    f"`distill`: `{name}` returns tensors of shapes {_shapes(ours)} in training and {_shapes(theirs)} "
                    "in evaluation: name a module that returns the same in both, `distill=Distillation(where=...)`"
                )
            pairs = {id(y): (y, t) for y, t in zip(ours, theirs, strict=True)}  # one that is there twice counts once
            for y, t in pairs.values():
                if y.requires_grad:
                    self._reached.setdefault(name, False)
                    with torch.no_grad():
                        self._add_in_backward(name, y, self.asked.gradient(y.detach(), t, of_logits))
        self._expected = []

    def _add_in_backward(self, name: str, y: Tensor, gradient: Tensor) -> None:
        # Half precision without the range for it holds what is scaled only.
        gradient = gradient if y.dtype == torch.float16 else gradient.to(y.dtype)
        leaf, is_added = _leaf(y), False

        def add(above: Tensor) -> Tensor | None:
            nonlocal is_added
            if is_added or not _accumulates(leaf):
                return None
            is_added = self._reached[name] = True
            return above + (gradient * self.loss_scale()).to(above.dtype)

        y.register_hook(add)  # type: ignore[no-untyped-call]

    def check(self) -> list[str]:
        """After a batch: warn of outputs that no gradient reached in the first one in which they came.

        Returns:
            The warnings, each one once.
        """
        found = []
        if self._is_first_check and not self._reached:
            what = f"`{self.asked.where}`" if self.asked.where else "a network"
            found.append(
                f"`distill` does nothing: in the first batch no call of {what} returned a tensor with gradients; calls "
                "in compiled code and in reentrant checkpoints are not seen"
            )
        for name, reached in self._reached.items():
            if not reached and name not in self._checked:
                found.append(
                    f"`distill` does nothing for `{name}`: in the first batch in which it was called no gradient "
                    "reached its output"
                )
        self._checked.update(self._reached)
        self._is_first_check = False
        if processes.rank() == 0:
            for warning in found:
                warnings.warn(f"SVD training: {warning}", stacklevel=2)
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """The teacher's parameters and buffers by name."""
        return {name: tensor.detach() for name, tensor in _tensors_of(self.teacher).items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor] | None) -> None:
        """Become the teacher of the run that is resumed.

        Raises:
            ValueError: If that had none, or one of another shape.
        """
        if state is None:
            raise ValueError(
                "the checkpoint was written without `distill`, so that the dense net which is to teach is not known: "
                "resume without it"
            )
        own = _tensors_of(self.teacher)
        if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in state.items()}:
            raise ValueError(
                "the checkpoint was written with another teacher: resume with the `where` of `distill` that it was "
                "written with"
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])


def distiller_of(asked: bool | Distillation, model: nn.Module) -> Distiller | None:
    """What teaches a model, if that is asked for; True stands for ``Distillation()``."""
    if asked is False:
        return None
    return Distiller(Distillation() if asked is True else asked, model)


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    # Not its state dict, from which a class may leave out what it likes.
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _compared(output: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_of(output) if tensor.is_floating_point() and tensor.ndim]


def _shapes(tensors: list[Tensor]) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors) or "none"


def _leaf(y: Tensor) -> Any:
    """The node of the graph that accumulates the gradient of some tensor from which ``y`` was computed."""
    waiting, seen = [y.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::AccumulateGrad":
            return node
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return None


def _accumulates(leaf: Any) -> bool:
    """Whether the backward pass that runs is of a loss, and not of a derivative that ``torch.autograd.grad`` returns.

    For torch's own hooks on several tensors this question has a private answer, and no public one.
    """
    if leaf is None:
        return True
    try:
        return bool(torch._C._will_engine_execute_node(leaf))
    except RuntimeError:  # the derivative is one with respect to this very leaf
        return False
