"""The small model of one that is sharded over processes, put together layer by layer."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_svd.layers.compounds import svd_layers
from lightning_svd.layers.forms import PairForm, balanced
from lightning_svd.layers.layer import SVDLayer
from lightning_svd.layers.matrices import Factors, exact_products, wide
from lightning_svd.layers.pairs import empty_dense, factored_pair, fill
from lightning_svd.layers.shards import reshard, whole
from lightning_svd.model.surgery import become, settle
from lightning_svd.training import processes

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@torch.no_grad()
def gather_factored(sharded: nn.Module, plain: ModuleT) -> ModuleT | None:
    """The small model of one whose layers are factorized and sharded, in plain torch layers on the CPU of process 0.

    All processes call it together. One layer at a time is put together, and only process 0 keeps it. Where two
    parameters were one, they are two with the same values.

    Args:
        sharded: As SVD training with Lightning's ``ModelParallelStrategy`` leaves it.
        plain: A model of the same class, none of whose layers is factorized. It is changed in place, and its values do
            not matter: on the meta device it takes no memory.

    Returns:
        ``plain``, two layers in the place of each that is smaller as two, in process 0; None in the others.

    Raises:
        ValueError: If ``plain`` is not of the same layers and parameters; in process 0.
    """
    reshard(sharded)
    keeps, layers = processes.rank() == 0, svd_layers(sharded)
    small: dict[str, nn.Module] = {}
    gathered: dict[str, Tensor] = {}
    of_layers = {id(parameter) for layer in layers.values() for parameter in layer.form.trained}
    for name, tensor in _tensors_of(sharded).items():
        if id(tensor) not in of_layers:
            value = whole(tensor.detach())
            if keeps:
                value = value.cpu().clone()
                gathered[name] = (
                    nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
                )
    for name, layer in layers.items():
        U, s, V = (whole(parameter.detach()) for parameter in layer.form.trained)
        if keeps:
            factors = Factors(*(factor[..., : layer.rank].cpu() for factor in (U, s, V)))
            small[name] = _plain(layer, factors, gathered.pop(_inside(name, "bias"), None))
    if not keeps:
        return None
    expected = {name: tuple(tensor.shape) for name, tensor in gathered.items()} | {
        _inside(name, "weight"): layer.view.weight_shape for name, layer in layers.items()
    }
    found = {name: tuple(tensor.shape) for name, tensor in _tensors_of(plain).items()}
    found = {name: shape for name, shape in found.items() if name in expected or name.rpartition(".")[0] not in layers}
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise ValueError(f"`plain.{name}` must be of shape {expected.get(name)}, got {found.get(name)}")
    for name, tensor in gathered.items():
        owner, _, key = name.rpartition(".")
        setattr(plain.get_submodule(owner), key, tensor)
    for name, module in small.items():
        become(plain.get_submodule(name), module)
    return settle(plain)


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that are another's too."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def _inside(layer: str, name: str) -> str:
    return f"{layer}.{name}".lstrip(".")


def _plain(layer: SVDLayer, factors: Factors, bias: Tensor | None) -> nn.Module:
    """The two plain layers in sequence for these factors, or the dense one where they are not smaller."""
    view, rank = layer.view, layer.rank
    with exact_products(factors.s.device):
        if isinstance(layer.form, PairForm):
            left, right = factors.U, factors.V
        else:
            left, right = balanced(Factors(*map(wide, factors)))
        like = factors.s.requires_grad_(layer.form.requires_grad)
        if rank * view.params_per_rank >= view.dense_params:
            dense = empty_dense(view, bias is not None)
            return fill(dense, view.fold(left @ right.mT).to(like), bias, like).train(layer.training)  # type: ignore[arg-type]
    pair = factored_pair(view, rank, bias is not None)
    fill(pair[0], view.first_weight(right).to(like), None, like)
    fill(pair[1], view.second_weight(left).to(like), bias, like)  # type: ignore[arg-type]
    return pair.train(layer.training)
