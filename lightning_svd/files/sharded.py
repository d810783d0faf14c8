"""The weights of a dense model loaded into one that is factorized and sharded, of which no process has the whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lightning_svd.arguments import check_module, needs
from lightning_svd.files.foreign import first_line, is_index, read_index, weights_file
from lightning_svd.layers.compounds import svd_layers
from lightning_svd.layers.forms import SVDForm
from lightning_svd.layers.layer import SVDLayer
from lightning_svd.layers.matrices import svd
from lightning_svd.layers.parts import prefix_of
from lightning_svd.layers.shards import is_by_rows, is_sharded, range_of, reshard, rows_of
from lightning_svd.training import processes
from lightning_svd.wording import few

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_FEW = 3  # names in a message


class _Entry(NamedTuple):
    """What the header of a file says of a tensor.

    Attributes:
        path: Of the file.
        shape: Of the tensor.
        is_float: Whether it holds floating-point numbers.
    """

    path: Path
    shape: tuple[int, ...]
    is_float: bool


@torch.no_grad()
def load_sharded(module: ModuleT, folder: str | Path, device: torch.device | str | None = None) -> ModuleT:
    """Load the safetensors of a dense model into one whose layers are factorized and whose parameters are sharded.

    All processes call it together, after :func:`~lightning_svd.decompose` and ``fully_shard``, of a model on the meta
    device say. Each reads its own rows of what is dense; the weight of a factorized layer is read and decomposed by one
    process, a layer in each at a time, and the rows of its exact U, s and V go to the others. So no process ever has
    more than its share and a layer. Parameters on the meta device get memory, and those that were one stay one.

    Args:
        module: With factorized layers, at their full ranks; it may be whole in each process too.
        folder: With ``model.safetensors``, or ``model.safetensors.index.json`` and the files that it names; or the path
            of either.
        device: For parameters on the meta device; None for that of the mesh over which they are sharded, or the CPU.

    Returns:
        ``module``.

    Raises:
        ValueError: If the files are damaged, or their names, shapes or dtypes are not those of the model, which is then
            as it was; if a weight holds NaN or infinity, when a part is loaded.
        FileNotFoundError: If one of them is not there.
    """
    check_module("module", module)
    reshard(module)
    layers = svd_layers(module)
    found: dict[str, _Entry] = {}
    processes.agree(lambda: found.update(_headers(Path(folder))))
    processes.agree(lambda: _check_layers(layers))
    saved = module.state_dict(keep_vars=True).keys()
    processes.agree(lambda: _check_tensors(module, saved))
    names = {name: _as_in(found, name, same) for name, same in _names_of(module, layers).items()}
    expected = _expected(module, layers, saved)
    processes.agree(lambda: _check(expected, found, names, str(folder)))
    _give_memory(module, device)
    with ExitStack() as stack:
        files: dict[Path, Any] = {}

        def part(name: str, rows: slice | None = None) -> Tensor:
            path = found[names[name]].path
            if path not in files:
                files[path] = stack.enter_context(_open(path))
            if rows is None:
                return files[path].get_tensor(names[name])  # type: ignore[no-any-return]
            return files[path].get_slice(names[name])[rows]  # type: ignore[no-any-return]

        for name, tensor in _tensors_of(module).items():
            if name in expected and name in names:
                rows = slice(*range_of(tensor)) if is_sharded(tensor) else None
                _here(tensor).copy_(part(name, rows))
        _decompose(layers, part)
    return module


def _decompose(layers: Mapping[str, SVDLayer], part: Any) -> None:
    """Give layers the exact factors of the weights in files, the work shared out over processes."""

    def compute(name: str) -> list[Tensor]:
        layer = layers[name]
        weight = part(_weight_of(name)).to(_here(layer.form.trained[0]))
        return [*svd(layer.view.unfold(weight), name)]

    def empty(name: str) -> list[Tensor]:
        layer = layers[name]
        like = _here(layer.form.trained[0])
        dtype = torch.promote_types(like.dtype, torch.float32)
        shapes = SVDForm.shapes(layer.view, layer.full_rank)
        return [like.new_empty(shapes[key], dtype=dtype) for key in SVDForm.columns]

    for name, factors in processes.shared_out([*layers], compute, empty):
        for parameter, factor in zip(layers[name].form.trained, factors, strict=True):
            start, stop = range_of(parameter) if is_sharded(parameter) else (0, len(factor))
            _here(parameter).copy_(factor[start:stop])


def _here(tensor: Tensor) -> Tensor:
    return rows_of(tensor.detach()) if is_sharded(tensor) else tensor.detach()


def _weight_of(layer: str) -> str:
    return f"{prefix_of(layer)}weight"


# ----------------------------------------------------------------------------------------------- what is in the files


def _headers(folder: Path) -> dict[str, _Entry]:
    """Of all tensors in a folder, by name.

    Raises:
        ValueError: If a file is none, or not what the index says.
        FileNotFoundError: If one is not there.
    """
    path = weights_file(folder)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    index = read_index(path) if is_index(path) else {}
    found: dict[str, _Entry] = {}
    for name in sorted({*index.values()} or {path.name}):
        found |= _header(path.parent / name)
    differ = sorted(name for name, file in index.items() if name not in found or found[name].path.name != file)
    if differ:
        raise ValueError(f"{path} says that `{differ[0]}` is in {index[differ[0]]}, and it is not")
    return found


def _header(path: Path) -> dict[str, _Entry]:
    try:
        with _open(path) as file:
            about = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            return {
                name: _Entry(path, tuple(of.get_shape()), of.get_dtype().startswith(("F", "BF")))
                for name, of in about.items()
            }
    except Exception as error:  # whatever the reader raises for a file that is none of its own
        raise ValueError(f"{path} is no safetensors file: {first_line(error)}") from None


def _open(path: Path) -> Any:
    with needs("files"):
        from safetensors import safe_open
    return safe_open(path, framework="pt")


# ------------------------------------------------------------------------------------------------ what the model needs


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that are another's too."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def _expected(
    module: nn.Module, layers: Mapping[str, SVDLayer], saved: Collection[str]
) -> dict[str, tuple[tuple[int, ...], bool]]:
    """The shape of each tensor of the dense model's state dict, and whether it is of floating-point numbers."""
    factors = {id(parameter) for layer in layers.values() for parameter in layer.form.trained}
    others = {
        name: (tuple(tensor.shape), tensor.is_floating_point())
        for name, tensor in _tensors_of(module).items()
        if name in saved and id(tensor) not in factors
    }
    return others | {_weight_of(name): (layer.view.weight_shape, True) for name, layer in layers.items()}


def _names_of(module: nn.Module, layers: Mapping[str, SVDLayer]) -> dict[str, list[str]]:
    """For each tensor all names of it."""
    names: dict[int, list[str]] = {}
    for name, tensor in _tensors_of(module).items():
        names.setdefault(id(tensor), []).append(name)
    known = {name: same for same in names.values() for name in same}
    return known | {_weight_of(name): [_weight_of(name)] for name in layers}


def _as_in(found: Mapping[str, _Entry], name: str, same: list[str]) -> str:
    """The name under which a file has a tensor: tied ones are written under one of theirs."""
    return next((each for each in (name, *same) if each in found), name)


def _check_layers(layers: Mapping[str, SVDLayer]) -> None:
    """Refuse layers that cannot take exact factors of their weight by rows.

    Raises:
        ValueError: Naming the layer.
    """
    for name, layer in layers.items():
        if not isinstance(layer.form, SVDForm) or layer.form.room < layer.full_rank or layer.rank < layer.full_rank:
            raise ValueError(f"`{name}` must have all of its {layer.full_rank} ranks, found {layer.rank}")
        if layer._part_of is not None:
            raise ValueError(f"`{name}` is a part of another module, which is not loaded by shards: leave it dense")
        if layer.view.groups > 1 and any(map(is_sharded, layer.form.trained)):
            raise ValueError(f"`{name}` is in groups, which is not loaded by shards: leave it dense")


def _check_tensors(module: nn.Module, saved: Collection[str]) -> None:
    """Refuse what is sharded in another way, and what no file has.

    Raises:
        ValueError: Naming the parameter or the buffer.
    """
    for name, tensor in module.named_buffers(remove_duplicate=False):
        if tensor.is_meta and name not in saved:
            raise ValueError(
                f"`{name}` is a buffer without values that no file has: build the module that has it outside of "
                '`torch.device("meta")`'
            )
    for name, tensor in module.named_parameters(remove_duplicate=False):
        if is_sharded(tensor) and not is_by_rows(tensor):
            raise ValueError(f"`{name}` must be cut by rows over all processes, it is {tensor.placements}")  # type: ignore[attr-defined]


def _check(
    expected: Mapping[str, tuple[tuple[int, ...], bool]],
    found: Mapping[str, _Entry],
    names: Mapping[str, str],
    where: str,
) -> None:
    """Refuse files that are not those of the model.

    Raises:
        ValueError: Naming what differs.
    """
    used = {names[name] for name in expected}
    for what, differ in (
        ("lacks", sorted(name for name in expected if names[name] not in found)),
        ("has, beside the model's,", sorted(found.keys() - used)),
    ):
        if differ:
            listed = few((f"`{name}`" for name in differ), _FEW)
            raise ValueError(f"{where} does not fit the model: it {what} {listed}")
    for name, (shape, is_float) in expected.items():
        there = found[names[name]]
        if there.shape != shape:
            raise ValueError(f"{where} does not fit the model: `{name}` is {there.shape} there, {shape} here")
        if there.is_float != is_float:
            kinds = "floating-point numbers" if there.is_float else "whole numbers"
            raise ValueError(f"{where} does not fit the model: `{name}` holds {kinds} there")


def _give_memory(module: nn.Module, device: torch.device | str | None) -> None:
    """Have what is on the meta device on another one, without values; other tensors keep theirs."""
    before = _tensors_of(module)
    if not any(tensor.is_meta for tensor in before.values()):
        return
    if device is None:
        meshes = (tensor.device_mesh.device_type for tensor in before.values() if is_sharded(tensor))  # type: ignore[attr-defined]
        device = next(meshes, "cpu")
    kept = {name: tensor.detach().clone() for name, tensor in before.items() if not tensor.is_meta}
    module.to_empty(device=device)
    after, first = _tensors_of(module), dict[int, str]()
    for name, tensor in before.items():
        origin = first.setdefault(id(tensor), name)
        if origin != name:  # each of several names of one got memory of its own
            owner, _, key = name.rpartition(".")
            setattr(module.get_submodule(owner), key, after[origin])
        elif name in kept:
            _here(after[name]).copy_(_here(kept[name]))
