"""Models and files as a command line names them, and from one form into another."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import tempfile
from collections.abc import Mapping, Sequence
from inspect import Parameter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_svd.files.checkpoints import KEY
from lightning_svd.files.export import largest_difference, onnx_seconds, to_onnx
from lightning_svd.files.low_rank import (
    is_checkpoint,
    load_low_rank,
    load_low_rank_checkpoint,
    low_rank_layers,
    read_checkpoint,
    save_low_rank,
    write_weights,
)
from lightning_svd.layers.pairs import low_rank_pairs
from lightning_svd.model.counting import as_arguments
from lightning_svd.model.surgery import to_dense


def model_class(spec: str) -> type[nn.Module]:
    """The class that ``package.module:Class`` or ``path/to/file.py:Class`` names.

    Raises:
        ValueError: If there is none; the message says what is missing.
    """
    source, _, name = spec.rpartition(":")
    if not source:
        raise ValueError(f"`--model` must be `package.module:Class` or `path/to/file.py:Class`, got {spec!r}")
    try:
        module = _module_at(Path(source)) if source.endswith(".py") else _module_named(source)
    except (ImportError, FileNotFoundError) as error:
        raise ValueError(f"`--model`: cannot import {source}: {error}") from None
    found = getattr(module, name, None)
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise ValueError(f"`--model`: {source} has no class of modules {name!r}")
    return found


def _module_named(name: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: the user's own package lies in the current folder
    return importlib.import_module(name)


def _module_at(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def build(kind: type[nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    """A new model in evaluation.

    Raises:
        ValueError: If the class does not take these arguments.
    """
    try:
        return kind(**arguments).eval()
    except TypeError as error:
        raise ValueError(f"`--arguments`: {kind.__name__} cannot be built with {dict(arguments)}: {error}") from None


def load(kind: type[nn.Module], path: str | Path, arguments: Mapping[str, Any]) -> nn.Module:
    """The model of a file: a Lightning checkpoint or safetensors, dense or low-rank.

    Args:
        kind: Its class; hyperparameters that a checkpoint holds are its arguments.
        path: The file.
        arguments: Of the class, in addition to those in the file.

    Raises:
        ValueError: If the file cannot be read or does not fit.
    """
    checkpoint = read_checkpoint(path) if is_checkpoint(path) else None
    model = build(kind, {**_hyperparameters(kind, checkpoint or {}), **arguments})
    if checkpoint and low_rank_layers(checkpoint, path):
        return load_low_rank_checkpoint(model, checkpoint, path)
    if not checkpoint and KEY in _header(path):
        return load_low_rank(model, path)
    try:
        if checkpoint:
            model.load_state_dict(checkpoint["state_dict"])
        else:
            from safetensors.torch import load_model

            load_model(model, str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {kind.__name__}: {' '.join(str(error).split())[:400]}") from None
    return model


def _hyperparameters(kind: type[nn.Module], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a checkpoint holds and the class takes; what Lightning adds for itself is left out."""
    saved = checkpoint.get("hyper_parameters")
    if not isinstance(saved, Mapping):
        return {}
    parameters = inspect.signature(kind).parameters.values()
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
        return {str(name): value for name, value in saved.items() if not str(name).startswith("_")}
    return {parameter.name: saved[parameter.name] for parameter in parameters if parameter.name in saved}


def dense_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors of a file that holds a dense model, and the rank that each low-rank layer of it keeps.

    Raises:
        ValueError: If it cannot be read, or holds a low-rank model, of which only its class knows the dense form.
    """
    if is_checkpoint(path):
        checkpoint = read_checkpoint(path)
        weights = {key: value for key, value in checkpoint["state_dict"].items() if isinstance(value, Tensor)}
        return weights, {name: entry["rank"] for name, entry in (low_rank_layers(checkpoint, path) or {}).items()}
    if KEY in _header(path):
        raise ValueError(f"{path} holds a low-rank model: give its class, `--model package.module:Class`")
    from safetensors.torch import load_file

    return dict(load_file(str(path))), {}


def _header(path: str | Path) -> Mapping[str, str]:
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever the reader raises for a file that is none of its own
        raise ValueError(f"{path} is neither a checkpoint nor safetensors: {error}") from None


def example_input(shape: Sequence[int] | None, model: nn.Module) -> Any:
    """Random numbers of this shape, else the model's own ``example_input_array``, else None."""
    return torch.randn(*shape) if shape else getattr(model, "example_input_array", None)


def convert(model: nn.Module, form: str, path: Path, example: Any = None, batch_size: int = 64) -> dict[str, Any]:
    """Write a model in another form, and compare.

    Args:
        model: Dense or low-rank.
        form: "dense" or "factored", as safetensors, or "onnx".
        path: File to write.
        example: What ``model`` is called with; only "onnx" cannot do without it.
        batch_size: For the timing of "onnx".

    Returns:
        What was written and how it compares.

    Raises:
        ValueError: If "onnx" has no example, or "factored" no low-rank layer.
    """
    result: dict[str, Any] = {"file": str(path)}
    if form == "onnx":
        return result | _convert_to_onnx(model, path, example, batch_size)
    if form == "factored" and not low_rank_pairs(model):
        raise ValueError("the model has no low-rank layer: there is nothing to keep factored")
    converted = to_dense(model) if form == "dense" else model
    if form == "dense":
        write_weights(converted, path)
    else:
        save_low_rank(converted, path)
    result["parameters"] = sum(p.numel() for p in converted.parameters())
    if example is not None:
        with torch.no_grad():
            expected, actual = model(*as_arguments(example)), converted(*as_arguments(example))
        result["largest difference"] = largest_difference(actual, expected)
    return result | {"bytes": path.stat().st_size}


def _convert_to_onnx(model: nn.Module, path: Path, example: Any, batch_size: int) -> dict[str, Any]:
    if example is None:
        raise ValueError("onnx needs an input to follow the model with: `--example-input`, its shape")
    difference = to_onnx(model, path, example)
    result = {"largest difference": difference, "bytes": path.stat().st_size}
    if not low_rank_pairs(model):
        return result
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.onnx"
        to_onnx(to_dense(model), dense, example)
        mine, theirs = onnx_seconds([path, dense], example, batch_size)
    return result | {f"time / dense, batch {batch_size}": round(mine / theirs, 3)}
