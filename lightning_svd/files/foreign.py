"""Weights in files that anybody wrote: read without running code, and found wherever in a file they are."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_svd.arguments import needs
from lightning_svd.wording import few

_ZIP = b"PK\x03\x04"  # how files of `torch.save` begin
_READABLE = (".ckpt", ".pt", ".pth", ".bin", ".tar")
_IN_FOLDERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_INDEX = ".index.json"
_FEW = 3  # names in a message
_DEEPEST = 8  # dicts in dicts; a pickle may hold itself
_WRITE_WEIGHTS = "write its weights where its code is, `torch.save(model.state_dict(), FILE)`, and give that file"


class StateDict(NamedTuple):
    """A state dict somewhere in a file.

    Attributes:
        key: Where: keys of nested dicts with dots between; "" for the file itself.
        state: Names -> tensors, and what else there is.
    """

    key: str
    state: Mapping[str, Any]

    def __str__(self) -> str:
        count = sum(isinstance(value, Tensor) for value in self.state.values())
        return f"`{self.key or '(top)'}` ({count} tensors)"


# -------------------------------------------------------------------------------------------------------------- reading


def weights_file(path: str | Path) -> Path:
    """The file with the weights: of a folder the one in it that models are saved as, or the index of several.

    Raises:
        FileNotFoundError: If a folder has none.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for name in _IN_FOLDERS:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"the folder {path} must hold one of {', '.join(_IN_FOLDERS)}")


def is_checkpoint(path: str | Path) -> bool:
    """Whether a file is in the format of ``torch.save``, or was meant to be, rather than safetensors."""
    path = Path(path)
    if not path.is_file():
        return path.suffix in _READABLE
    with path.open("rb") as file:
        head = file.read(9)
    # Safetensors begin with the length of a JSON object, by whatever name the file goes.
    is_safetensors = head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size
    return head.startswith(_ZIP) or (path.suffix in _READABLE and not is_safetensors)


def read_contents(path: str | Path) -> Mapping[str, Any]:
    """What a file of weights holds, on the CPU: tensors by name, perhaps in dicts in dicts.

    Args:
        path: Of safetensors, of ``torch.save``, or the index of several such files.

    Raises:
        ValueError: If it is none of these, or cannot be read without running code.
        FileNotFoundError: If it, or one of several, is not there.
    """
    path = Path(path)
    if is_index(path):
        parts = [path.parent / name for name in sorted({*read_index(path).values()})]
        return {name: value for part in parts for name, value in read_contents(part).items()}
    if not is_checkpoint(path):
        return read_safetensors(path)
    contents = read_pickled(path)
    if not isinstance(contents, Mapping):
        raise ValueError(f"{path} must hold weights by name, got a {type(contents).__name__}")
    return contents


def is_index(path: Path) -> bool:
    """Whether a file is named as the index of several files of weights."""
    return path.name.endswith(_INDEX)


def read_index(index: Path) -> dict[str, str]:
    """In which file each tensor is; all are there, beside the index.

    Raises:
        ValueError: If it is no index, or names files elsewhere.
        FileNotFoundError: If one of the files is not there.
    """
    try:
        files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        parts = {name: index.parent / name for name in sorted({*files.values()})}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is no index of weights: it must map their names to files") from None
    for name, part in parts.items():
        if Path(name).name != name or name.endswith(_INDEX):
            raise ValueError(f"{index} must name files beside it, got {name!r}")
        if not part.is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not there")
    return files


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: If it is none.
        FileNotFoundError: If it is not there.
    """
    with needs("files"):
        from safetensors.torch import load_file

    try:
        return dict(load_file(str(path)))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except Exception as error:  # whatever the reader raises for a file that is none of its own
        raise ValueError(f"{path} is neither a checkpoint nor safetensors: {first_line(error)}") from None


def read_pickled(path: str | Path) -> Any:
    """What ``torch.save`` wrote, on the CPU, read without running any code that it may hold.

    Raises:
        ValueError: If it cannot be read in that way; the message says why, and what to do.
        FileNotFoundError: If it is not there.
    """
    if _is_torchscript(path):
        raise ValueError(
            f"{path} is a TorchScript archive, which holds code: write its weights, "
            "`torch.save(torch.jit.load(FILE).state_dict(), OTHER)`, and give that file"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a reader raises on bytes that are none of its own
        raise ValueError(_why_unreadable(path, error)) from None


def _is_torchscript(path: str | Path) -> bool:
    return any(name.rpartition("/")[2] == "constants.pkl" for name in _names_in_zip(path))


def _names_in_zip(path: str | Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return []


def _why_unreadable(path: str | Path, error: Exception) -> str:
    refused = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
    if not refused:
        inner = re.search(r"WeightsUnpickler error: (.+)", str(error))
        why = inner.group(1).strip() if inner else first_line(error)
        if isinstance(error, KeyError):  # torch's reader, of a byte that begins nothing
            why = "it is nothing that `torch.save` writes"
        return f"{path} cannot be read as a checkpoint: {why}"
    if _holds_modules(path):
        return f"{path} holds a whole pickled module (`{refused.group(1)}`), which is not unpickled: {_WRITE_WEIGHTS}"
    return f"{path} holds more than data (`{refused.group(1)}`), which is not unpickled: {_WRITE_WEIGHTS}"


def _holds_modules(path: str | Path) -> bool:
    """Whether attributes that only modules have are in the pickle."""
    names = [name for name in _names_in_zip(path) if name.rpartition("/")[2] == "data.pkl"]
    try:
        if names:
            with zipfile.ZipFile(path) as archive:
                pickled = archive.read(names[0])
        else:
            pickled = Path(path).read_bytes()
    except (OSError, zipfile.BadZipFile):
        return False
    return all(name in pickled for name in (b"_modules", b"_parameters", b"_buffers"))


# -------------------------------------------------------------------------------------------------------------- finding


def state_dicts(contents: Mapping[Any, Any]) -> list[StateDict]:
    """Every dict in a file that holds tensors by name, outermost first."""
    return list(_walk(contents, "", _DEEPEST))


def _walk(node: Mapping[Any, Any], key: str, depth: int) -> Iterator[StateDict]:
    if not all(isinstance(name, str) for name in node):
        return  # such as the state of an optimizer
    if any(isinstance(value, Tensor) for value in node.values()):
        yield StateDict(key, node)
    for name, value in node.items():
        if isinstance(value, Mapping) and depth:
            yield from _walk(value, f"{key}.{name}" if key else name, depth - 1)


def state_dict_at(contents: Mapping[str, Any], key: str, path: str | Path) -> StateDict:
    """The state dict that ``--key`` names: keys of nested dicts, and then how names in it begin.

    Raises:
        ValueError: If there is none; the message lists what there is.
    """
    found = _at(contents, key)
    if not found or not any(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"`--key`: {path} has no weights at {key!r}, {_listed(state_dicts(contents))}")
    return StateDict(key, found)


def _at(node: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    if isinstance(node.get(key), Mapping):
        return dict(node[key])
    dots = [index for index, letter in enumerate(key) if letter == "."]
    for dot in dots:  # a key may hold a dot itself
        inner = node.get(key[:dot])
        if isinstance(inner, Mapping) and (found := _at(inner, key[dot + 1 :])):
            return found
    prefix = f"{key}."
    return {
        name.removeprefix(prefix): value
        for name, value in node.items()
        if isinstance(name, str) and name.startswith(prefix)
    } or None


def only_state_dict(contents: Mapping[str, Any], path: str | Path) -> StateDict:
    """The one state dict of a file that has a weight matrix, without a model to ask.

    Raises:
        ValueError: If there is none, or several.
    """
    found = [each for each in state_dicts(contents) if any(map(_is_matrix, each.state.values()))]
    if len(found) != 1:
        raise ValueError(f"{path} must hold one state dict, or `--key` say which, {_listed(found)}")
    return found[0]


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2


def _listed(found: Sequence[StateDict]) -> str:
    return f"got {few(found, 2 * _FEW)}" if found else "got no tensors by name"


# -------------------------------------------------------------------------------------------------------------- fitting


def load_weights(model: nn.Module, contents: Mapping[str, Any], path: str | Path, key: str | None = None) -> None:
    """Load the one state dict of a file that fits a model, in the model's dtypes.

    Names may all begin alike, as wrappers make them (``module.``, ``model.``, ``_orig_mod.``); of tied tensors one name
    is enough.

    Args:
        model: Freshly built; on an error its weights are of no use.
        contents: Of the file.
        path: Its path, for messages.
        key: Where in the file, if there is a choice.

    Raises:
        ValueError: If none fits, or several do and no key says which.
    """
    found = [state_dict_at(contents, key, path)] if key else state_dicts(contents)
    if not found:
        raise ValueError(f"{path} must hold weights by name, got no tensors")
    expected = model.state_dict(keep_vars=True)
    states = {each.key: _named_as(expected, each.state) for each in found}
    problems = {where: _load(model, expected, state) for where, state in states.items()}
    fitting = [each for each in found if problems[each.key] is None]
    name = type(model).__name__
    if len(fitting) > 1:
        there = _listed(fitting)
        raise ValueError(f"{path} holds several state dicts that fit {name}: `--key` must say which, {there}")
    if not fitting:
        nearest = max(found, key=lambda each: len(states[each.key].keys() & expected.keys()))
        place = f" at `{nearest.key}`" if nearest.key else ""
        others = f"; `--key` takes another, {_listed(found)}" if len(found) > 1 else ""
        raise ValueError(f"{path} does not fit {name}{place}: {problems[nearest.key]}{others}")
    if fitting[0] is not found[-1]:
        _load(model, expected, states[fitting[0].key])


def _named_as(expected: Mapping[str, Any], state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict without what wrappers put before names, as far as more of the model's names are then there."""
    kept = {name: value for name, value in state.items() if isinstance(value, Tensor) or name in expected}
    variants = [state if len(kept) == len(state) else kept]  # the mapping itself, which holds versions of modules
    names = {name.replace("_orig_mod.", ""): value for name, value in kept.items() if name != "n_averaged"}
    while names:
        variants.append(names)
        if any("." not in name for name in names) or len({name.partition(".")[0] for name in names}) != 1:
            break
        names = {name.partition(".")[2]: value for name, value in names.items()}
    return max(variants, key=lambda variant: len(variant.keys() & expected.keys()))


def _load(model: nn.Module, expected: Mapping[str, Any], state: Mapping[str, Any]) -> str | None:
    """Load a state dict as far as it goes; returns what is wrong with it, None for nothing."""
    both = [name for name in state if isinstance(state[name], Tensor) and isinstance(expected.get(name), Tensor)]
    for name in both:
        there, here = _kind(state[name]), _kind(expected[name])
        if there != here:
            return f"`{name}` holds {there} there, {here} here"
        if isinstance(expected[name], nn.Parameter) and bool(torch.isnan(state[name]).any()):
            return f"`{name}` holds NaN"
    try:
        # A model may know other names for what it is given, and what it can do without: it is asked, not its names.
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        shapes = [
            f"`{name}` is {tuple(state[name].shape)} there, {tuple(expected[name].shape)} here"
            for name in both
            if not nn.parameter.is_lazy(expected[name]) and state[name].shape != expected[name].shape
        ]
        missing, unexpected = [name for name in expected if name not in state], [*state.keys() - expected.keys()]
        wrong = shapes[:_FEW] or [" ".join(str(error).split())[:200]]
        wrong += [f"{len(shapes) - _FEW} more differ in shape"] if len(shapes) > _FEW else []
    else:
        wrong = []
    there_too = {_storage(expected[name]) for name in both}
    missing = [name for name in missing if isinstance(expected.get(name), Tensor)]
    missing = [name for name in missing if _storage(expected[name]) not in there_too]
    for what, names in (("missing", missing), ("unexpected", sorted(unexpected))):
        if names:
            wrong.append(f"{what} {few((f'`{name}`' for name in names), _FEW)}")
    return "; ".join(wrong) or None


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex numbers"
    return "floating-point numbers" if tensor.is_floating_point() else "whole numbers"


def _storage(tensor: Tensor) -> int:
    """The same for tied tensors."""
    if nn.parameter.is_lazy(tensor):
        return id(tensor)
    return tensor.untyped_storage().data_ptr() or id(tensor)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    text = str(error).strip()
    return text.splitlines()[0].strip() if text else type(error).__name__
