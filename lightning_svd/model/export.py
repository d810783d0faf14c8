"""A low-rank model as ONNX, checked against eager PyTorch."""

from __future__ import annotations

import inspect
import io
import logging
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from inspect import Parameter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from lightning_svd.arguments import check_module, needs, shown
from lightning_svd.layers.compounds import evaluating, svd_layers
from lightning_svd.model.counting import as_arguments, count_params
from lightning_svd.model.folding import fold_norms
from lightning_svd.model.surgery import to_factored
from lightning_svd.model.values import leaves
from lightning_svd.writing import whole_file

TOLERANCE = 1e-4  # of the largest output: kernels of another library sum in another order
_LARGEST = 1 << 30  # bytes of weights that are surely in the one file
ROUNDS, SECONDS = 5, 0.2  # of a timing, in turns


def to_onnx(module: nn.Module, path: str | Path, example_input: Any, fold: bool = False) -> float:
    """Write a model as ONNX, with any batch size, and check it in onnxruntime against eager PyTorch.

    Whether it is right for a batch of twice the size is checked too, and warned of if not. Needs ``pip install
    'lightning-svd[export]'``.

    Args:
        module: With factorized layers, which are written as pairs of plain ones, or without.
        path: File to write; the weights are in it.
        example_input: What ``module`` is called with, a tuple for several tensors, their first dimension the batch.
        fold: Whether batch normalizations are merged into the layers before them first, as by
            :func:`~lightning_svd.fold_norms`. ONNX Runtime does so by itself; other runtimes and quantizers may not.

    Returns:
        The largest difference to eager, relative to the largest output.

    Raises:
        ValueError: If a parameter holds NaN, or the input is anything else.
        RuntimeError: If it is more than 1e-4, in half precision more than 4 eps, or onnxruntime cannot run the file,
            which is left for inspection.
        ModuleNotFoundError: If onnx, onnxscript or onnxruntime is missing.
    """
    check_module("module", module)
    with needs("export"):
        import onnxruntime  # noqa: F401 - before the work, not after it

    plain = to_factored(module, count_params(module)) if svd_layers(module) else module
    for name, parameter in plain.named_parameters():
        if parameter.is_floating_point() and bool(torch.isnan(parameter).any()):
            raise ValueError(f"`{name}` holds NaN: what it puts out cannot be checked")
    inputs = as_arguments(example_input)
    for each in inputs:
        if not isinstance(each, Tensor):
            raise ValueError(f"`example_input` must be a tensor, or a tuple of tensors by position, got {shown(each)}")
    if fold:
        with evaluating(plain):
            plain, _ = fold_norms(plain, inputs)
    dynamic: tuple[Any, ...] = tuple({0: torch.export.Dim.AUTO} for _ in inputs)
    kinds = [parameter.kind for parameter in inspect.signature(plain.forward).parameters.values()]
    if Parameter.VAR_POSITIONAL in kinds:  # the exporter wants what `*args` takes as one
        named = kinds.index(Parameter.VAR_POSITIONAL)
        dynamic = (*dynamic[:named], dynamic[named:])
    with evaluating(plain), torch.no_grad(), _quiet():
        expected = plain(*inputs)  # first, so that a wrong input is the model's to refuse and not the exporter's
        program = torch.onnx.export(plain, inputs, dynamo=True, dynamic_shapes=dynamic, verbose=False)
        assert program is not None
        _save(program, plain, path)
    try:
        session = onnx_session(path)
        actual = [torch.from_numpy(output) for output in session(inputs)]
    except Exception as error:  # of its own kinds, as for a number format that an operator does not have
        raise RuntimeError(f"{path} does not run in onnxruntime: {' '.join(str(error).split())}") from error
    difference = largest_difference(actual, expected)
    if not difference <= _tolerance(plain):
        raise RuntimeError(f"{path} differs from the model by {difference:.1e} of its largest output in onnxruntime")
    if not _takes_more(session, plain, inputs):
        warnings.warn(
            f"{path} is right for batches of {len(inputs[0])} only: {type(module).__name__} takes the size of a batch "
            "as a number, as by `len(x)`, which the exporter takes for a constant; `x.shape[0]` goes with the batch",
            stacklevel=2,
        )
    return difference


def _tolerance(module: nn.Module) -> float:
    """How far outputs may differ, relative to the largest: numbers of half precision are rounded in between."""
    dtypes = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    return max([TOLERANCE, *(4 * torch.finfo(dtype).eps for dtype in dtypes)])


def _takes_more(session: Callable[[Sequence[Tensor]], Any], module: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether a file computes a batch of twice the size as the model does, if that can."""
    size = len(inputs[0]) if inputs[0].ndim else 0
    twice = [torch.cat([x, x]) if x.ndim and len(x) == size else x for x in inputs]
    with evaluating(module), torch.no_grad():
        try:
            expected = module(*twice)
        except Exception:
            return True  # the model's own limit
    try:
        actual = [torch.from_numpy(output) for output in session(twice)]
        return [one.shape for one in actual] == [one.shape for one in _outputs(expected)] and (
            largest_difference(actual, expected) <= _tolerance(module)
        )
    except Exception:
        return False


def _save(program: torch.onnx.ONNXProgram, module: nn.Module, path: str | Path) -> None:
    import onnx

    if sum(weight.nbytes for weight in [*module.parameters(), *module.buffers()]) > _LARGEST:
        program.save(str(path))  # the weights go into a second file, which this one names
        return
    # A weight says its shape itself. The exporter says it once more, which quantizers of older versions, that
    # transpose the weight, then find in contradiction.
    proto = program.model_proto
    weights = {weight.name for weight in proto.graph.initializer}
    values = [value for value in proto.graph.value_info if value.name not in weights]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(values)
    with whole_file(path) as beside:
        onnx.save(proto, beside)


def largest_difference(actual: Any, expected: Any) -> float:
    """Of two outputs of a model, each relative to its largest entry: tensors, or what holds several of them.

    What is infinite in both, as masked logits are, does not differ, and is not the largest.
    """
    apart = []
    for one, other in zip(_outputs(actual), _outputs(expected), strict=True):
        if not other.numel():
            continue
        if other.dtype is torch.bool:
            one, other = one.long(), other.long()
        size = other.abs()[torch.isfinite(other)].max() if torch.isfinite(other).any() else other.new_zeros(())
        difference = (one - other).abs().masked_fill(one == other, 0).max()
        apart.append(float(difference / size.clamp_min(torch.finfo(torch.float32).tiny)))
    return max(apart, default=0.0)


def onnx_session(path: str | Path) -> Callable[[Sequence[Tensor]], Any]:
    """A function that runs a file in onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what it says of an error, the exception says too
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda inputs: session.run(None, dict(zip(names, (each.numpy() for each in inputs), strict=True)))


def onnx_seconds(paths: Sequence[str | Path], example_input: Any, batch_size: int) -> list[float]:
    """Median seconds that each file takes for a batch in onnxruntime, the files taking turns."""
    inputs = [each[:1].expand(batch_size, *each.shape[1:]).contiguous() for each in as_arguments(example_input)]
    sessions = [onnx_session(path) for path in paths]
    timers = [Timer("run(inputs)", globals={"run": session, "inputs": inputs}) for session in sessions]
    rounds = ([timer.blocked_autorange(min_run_time=SECONDS).median for timer in timers] for _ in range(ROUNDS))
    return [statistics.median(seconds) for seconds in zip(*rounds, strict=True)]


def _outputs(output: Any) -> list[Tensor]:
    """The tensors of a model's output: one, or those in tuples, lists, mappings and dataclasses, in order."""
    return [leaf for leaf in leaves(output) if isinstance(leaf, Tensor)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on itself, some of which onnxscript prints where others want only JSON."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
