"""Models and files as a command line names them, and from one form into another."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_svd.arguments import needs
from lightning_svd.files.checkpoints import KEY, saved_state
from lightning_svd.files.foreign import (
    first_line,
    is_checkpoint,
    load_weights,
    only_state_dict,
    read_contents,
    state_dict_at,
    weights_file,
)
from lightning_svd.files.low_rank import (
    load_low_rank,
    load_low_rank_checkpoint,
    low_rank_layers,
    save_low_rank,
    write_weights,
)
from lightning_svd.layers.pairs import low_rank_pairs
from lightning_svd.model.counting import as_arguments
from lightning_svd.model.export import largest_difference, onnx_seconds, to_onnx
from lightning_svd.model.surgery import to_dense

Maker = Callable[..., nn.Module]


def model_maker(spec: str) -> Maker:
    """The class, or the function that returns a model, that ``package.module:name`` or ``path/to/file.py:name`` names.

    Raises:
        ValueError: If there is none; the message says what is missing.
    """
    found, source, name = _named("model", spec, "Class")
    if isinstance(found, nn.Module):
        raise ValueError(f"`--model`: {spec} is a model already: name its class, or a function that returns it")
    if not callable(found) or (isinstance(found, type) and not issubclass(found, nn.Module)):
        raise ValueError(f"`--model`: {source} has no class of modules, and no function that returns one, {name!r}")
    return cast("Maker", found)


def calibration_batches(spec: str, model: nn.Module) -> Iterator[Any]:
    """What the function that ``package.module:function`` or ``path/to/file.py:function`` names gives.

    Args:
        spec: Of a function that needs no argument, or one, the model.
        model: For it.

    Raises:
        ValueError: If there is none, it fails, or what it returns cannot be batches of inputs.
    """
    function, source, name = _named("data", spec, "function")
    if not callable(function):
        raise ValueError(f"`--data`: {source} has no function {name!r}")
    parameters = inspect.signature(function).parameters.values()
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    needed = [each for each in parameters if each.default is Parameter.empty and each.kind in positional]
    with _blaming("data", spec):
        batches = function(model) if needed else function()
    if not isinstance(batches, Iterable) or isinstance(batches, (Tensor, Mapping, str)):
        kind = type(batches).__name__
        raise ValueError(f"`--data`: {spec} must return an iterable of inputs, such as a list of batches, got a {kind}")
    return _each(batches, spec)


def _each(batches: Iterable[Any], spec: str) -> Iterator[Any]:
    with _blaming("data", spec):
        iterator = iter(batches)
    while True:
        with _blaming("data", spec):
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch


@contextmanager
def _blaming(option: str, what: str) -> Iterator[None]:
    """Whatever the user's code raises inside as one line, with the option that named it."""
    try:
        yield
    except (Exception, SystemExit) as error:  # a script may parse arguments of its own, and ends where it has none
        raise ValueError(f"`--{option}`: {what} fails: {type(error).__name__}: {first_line(error)}") from error


def _named(option: str, spec: str, what: str) -> tuple[Any, str, str]:
    """What ``package.module:name`` or ``path/to/file.py:name`` names, and both parts of that."""
    source, _, name = spec.rpartition(":")
    if not source:
        raise ValueError(f"`--{option}` must be `package.module:{what}` or `path/to/file.py:{what}`, got {spec!r}")
    try:
        module = _module_at(Path(source)) if source.endswith(".py") else _module_named(source)
    except (ImportError, FileNotFoundError) as error:
        raise ValueError(f"`--{option}`: cannot import {source}: {error}") from None
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"`--{option}`: cannot import {source}: {why}") from error
    return getattr(module, name, None), source, name


def _module_named(name: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: the user's own package lies in the current folder
    return importlib.import_module(name)


def _module_at(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path.resolve()):
        return known  # the class and the function of one file know each other
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def build(kind: Maker, arguments: Mapping[str, Any]) -> nn.Module:
    """A new model in evaluation.

    Args:
        kind: Its class, or a function that returns it. Where it says the class of its configuration, as those of
            transformers do, ``config`` may be a dict.
        arguments: By keyword.

    Raises:
        ValueError: If it does not take these arguments, fails with them, or returns no module.
    """
    name = getattr(kind, "__name__", type(kind).__name__)
    shown = {name: "{...}" if isinstance(value, Mapping) else value for name, value in arguments.items()}
    given = dict(arguments)
    config_class = getattr(kind, "config_class", None)
    if isinstance(config_class, type) and isinstance(given.get("config"), Mapping):
        make: Any = getattr(config_class, "from_dict", lambda entries: config_class(**entries))
        try:
            given["config"] = make(dict(given["config"]))
        except Exception as error:  # each library checks in its own way
            why = " ".join(str(error).split())[:200]
            raise ValueError(f"`--arguments`: `config` is no {config_class.__name__}: {why}") from None
    try:
        model = kind(**given)
    except TypeError as error:
        raise ValueError(f"`--arguments`: {name} cannot be built with {shown}: {error}") from None
    except (Exception, SystemExit) as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"`--model`: building {name} with {shown} fails: {why}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"`--model`: {name} must return a module, got a {type(model).__name__}")
    return model.eval()


def load(kind: Maker, path: str | Path, arguments: Mapping[str, Any], key: str | None = None) -> nn.Module:
    """The model of a file or folder, on the CPU: dense or low-rank, written by this package, Lightning or others.

    Args:
        kind: Its class, or a function that returns it; hyperparameters that a Lightning checkpoint holds are its
            arguments, and so is the ``config.json`` in a folder, for a class that says what its configuration is.
        path: A file of ``torch.save`` or safetensors, the index of several, or the folder where they are.
        arguments: Of that, in addition to those in the file.
        key: Where in the file the weights are, dots between keys; found without it if one place fits.

    Raises:
        ValueError: If the file cannot be read without running code, or does not fit.
    """
    path = weights_file(path)
    is_low_rank = not is_checkpoint(path) and path.suffix != ".json" and KEY in _header(path)
    contents = {} if is_low_rank else read_contents(path)
    model = build(kind, {**_hyperparameters(kind, contents), **_config_beside(kind, path), **arguments})
    if is_low_rank:
        return load_low_rank(model, path)
    if key is None and _is_lightning(contents):
        if low_rank_layers(contents, path):
            return load_low_rank_checkpoint(model, contents, path)
        key = "state_dict"
    load_weights(model, contents, path, key)
    return model


def _is_lightning(contents: Mapping[str, Any]) -> bool:
    """Whether a file is a checkpoint of Lightning, whose weights have their place."""
    known = "pytorch-lightning_version" in contents or KEY in contents or saved_state(contents) is not None
    return known and isinstance(contents.get("state_dict"), Mapping)


def _config_beside(kind: Maker, path: Path) -> dict[str, Any]:
    """The configuration that a folder of transformers holds beside the weights."""
    beside = path.with_name("config.json")
    if not isinstance(getattr(kind, "config_class", None), type) or not beside.is_file():
        return {}
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{beside} is no JSON: {error}") from None
    return {"config": config}


def _hyperparameters(kind: Maker, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a checkpoint holds and a class or function takes; what Lightning adds for itself is left out."""
    saved = checkpoint.get("hyper_parameters")
    if not isinstance(saved, Mapping):
        return {}
    parameters = inspect.signature(kind).parameters.values()
    # What a function passes on by ``**kwargs`` goes to another class than the checkpoint's as likely as to its own.
    if isinstance(kind, type) and any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
        return {str(name): value for name, value in saved.items() if not str(name).startswith("_")}
    return {parameter.name: saved[parameter.name] for parameter in parameters if parameter.name in saved}


def dense_weights(path: str | Path, key: str | None = None) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors of a file that holds a dense model, and the rank that each low-rank layer of it keeps.

    Args:
        path: As for :func:`load`.
        key: As for :func:`load`.

    Raises:
        ValueError: If it cannot be read, or holds a low-rank model, of which only its class knows the dense form.
    """
    path = weights_file(path)
    if not is_checkpoint(path) and path.suffix != ".json" and KEY in _header(path):
        raise ValueError(f"{path} holds a low-rank model: give its class, `--model package.module:Class`")
    contents = read_contents(path)
    ranks: dict[str, int] = {}
    if key is None and _is_lightning(contents):
        ranks = {name: entry["rank"] for name, entry in (low_rank_layers(contents, path) or {}).items()}
        key = "state_dict"
    found = state_dict_at(contents, key, path) if key else only_state_dict(contents, path)
    return {name: value for name, value in found.state.items() if isinstance(value, Tensor)}, ranks


def _header(path: str | Path) -> Mapping[str, str]:
    with needs("files"):
        from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except Exception as error:  # whatever the reader raises for a file that is none of its own
        raise ValueError(f"{path} is neither a checkpoint nor safetensors: {first_line(error)}") from None


def example_input(shape: Sequence[int] | None, model: nn.Module) -> Any:
    """Random numbers of this shape, else the model's own ``example_input_array``, else None.

    Raises:
        ValueError: If the model fails for an input of this shape.
    """
    if not shape:
        return getattr(model, "example_input_array", None)
    example = torch.randn(*shape)
    with _blaming("example-input", f"calling the model with {','.join(map(str, shape))}"), torch.no_grad():
        model(example)
    return example


def convert(
    model: nn.Module, form: str, path: Path, example: Any = None, batch_size: int = 64, fold: bool = False
) -> dict[str, Any]:
    """Write a model in another form, and compare.

    Args:
        model: Dense or low-rank.
        form: "dense" or "factored", as safetensors, or "onnx".
        path: File to write.
        example: What ``model`` is called with; only "onnx" cannot do without it.
        batch_size: For the timing of "onnx".
        fold: Whether batch normalizations are merged into the layers before them in "onnx".

    Returns:
        What was written and how it compares.

    Raises:
        ValueError: If "onnx" has no example, "factored" no low-rank layer, or another form than "onnx" is to be folded.
    """
    _check_fold(form, fold)
    result: dict[str, Any] = {"file": str(path)}
    if form == "onnx":
        return result | _convert_to_onnx(model, path, example, batch_size, fold)
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


def _check_fold(form: str, fold: bool) -> None:
    if fold and form != "onnx":
        raise ValueError(
            f"`--fold` is for `--to onnx`, got `--to {form}`: files of weights keep the names of the model's class"
        )


def _convert_to_onnx(model: nn.Module, path: Path, example: Any, batch_size: int, fold: bool) -> dict[str, Any]:
    if example is None:
        raise ValueError("onnx needs an input to follow the model with: `--example-input`, its shape")
    difference = to_onnx(model, path, example, fold)
    result = {"largest difference": difference, "bytes": path.stat().st_size}
    if not low_rank_pairs(model):
        return result
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.onnx"
        to_onnx(to_dense(model), dense, example, fold)
        mine, theirs = onnx_seconds([path, dense], example, batch_size)
    return result | {f"time / dense, batch {batch_size}": round(mine / theirs, 3)}


def check_file(option: str, path: Path) -> None:
    """Refuse a place where no file could be written, before the work and not after it.

    Raises:
        ValueError: If its folder is not there or closed, or a folder stands in its place; the message names the option.
    """
    if not path.parent.is_dir():
        raise ValueError(f"`--{option}`: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"`--{option}`: {path} is a folder")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"`--{option}`: the folder {path.parent} cannot be written to")


def check_output(form: str, path: Path, fold: bool = False) -> None:
    """Refuse what could not be written, before the work and not after it.

    Raises:
        ValueError: If the folder is not there, or another form than "onnx" is to be folded.
        ModuleNotFoundError: If what writes such a file is not installed.
    """
    _check_fold(form, fold)
    check_file("out", path)
    if form == "onnx":
        with needs("export"):
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
    else:
        with needs("files"):
            import safetensors  # noqa: F401


def write_compressed(model: nn.Module, form: str, path: Path, batch: Any, fold: bool = False) -> dict[str, Any]:
    """Write a compressed model: "factored" as :func:`~lightning_svd.save_low_rank` does, or as "onnx".

    Args:
        model: Of plain layers.
        form: "factored" or "onnx".
        path: File to write.
        batch: What ``model`` is called with, a tuple of arguments or a dict of arguments by keyword; only "onnx" needs
            it.
        fold: Whether batch normalizations are merged into the layers before them in "onnx".

    Returns:
        What was written, for "onnx" compared with eager PyTorch and timed against the dense model.

    Raises:
        ValueError: If "onnx" cannot have such inputs.
    """
    if form == "onnx":
        example = _by_position(model, batch)
        inputs = len(as_arguments(example)[0])
        return {"file": str(path)} | _convert_to_onnx(model, path, example, inputs, fold)
    return {"file": str(save_low_rank(model, path)), "bytes": path.stat().st_size}


def _by_position(model: nn.Module, batch: Any) -> Any:
    """A batch as ``to_onnx`` has it: one tensor, or a tuple."""
    if isinstance(batch, Mapping):
        names = list(inspect.signature(model.forward).parameters)[: len(batch)]
        if set(names) != set(batch):
            raise ValueError(
                f"onnx needs inputs by position: a batch of `--data` has {', '.join(map(repr, batch))}, the first "
                f"arguments of {type(model).__name__} are {', '.join(map(repr, names))}"
            )
        batch = tuple(batch[name] for name in names)
    batch = tuple(batch) if isinstance(batch, list) else batch
    if not all(isinstance(each, Tensor) for each in as_arguments(batch)):
        raise ValueError("onnx needs inputs that are tensors, or tuples of tensors: `--data` gives others")
    return batch
