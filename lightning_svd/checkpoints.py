"""Checkpoints that open anywhere, with the exact factors beside them.

A checkpoint that is written during a fit holds dense weights under the user's own names in its ``state_dict``, so that
whoever has the LightningModule's class can load it, and the factors under a key of its own, so that a fit with the
callback resumes exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_svd.compounds import join_states, split_prefixes, split_states
from lightning_svd.costs import svd_layers
from lightning_svd.factorization import Factors, truncate
from lightning_svd.layers import svd_layer
from lightning_svd.pairs import bias_of, factored_pair, is_pair, low_rank_pairs, merged, merged_weight, rank_of, view_of
from lightning_svd.parts import prefix_of
from lightning_svd.surgery import become, settle
from lightning_svd.views import View

KEY = "lightning_svd"
VERSION = 1

State = dict[str, Any]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@torch.no_grad()
def to_dense_state(module: nn.Module, state: Mapping[str, Any]) -> tuple[State, State]:
    """A state dict with dense weights under the original names, and what it takes to restore the factors.

    Args:
        module: The model whose state it is, or has the layout of: an average of it, say.
        state: Of ``module``, factorised layers and pairs of low-rank layers as they are.

    Returns:
        The dense state dict, and layer name -> its exact tensors and how they were one layer.
    """
    dense, exact = dict(state), {}
    for name, layer in under_every_name(module, svd_layers(module)):
        prefix = prefix_of(name)
        if f"{prefix}U" in dense:
            factors = Factors(*(dense.pop(f"{prefix}{factor}") for factor in "UsV"))
            mask = layer.kept_mask()  # not the state's, which averaging may have blurred
            dense.pop(f"{prefix}mask")
            dense[f"{prefix}weight"] = layer.fold(truncate(factors, mask.nonzero().squeeze(1).to(factors.s.device)))
            exact[name] = {**factors._asdict(), "mask": mask, "conv_mode": layer.conv_mode}
    for name, pair in under_every_name(module, low_rank_pairs(module)):
        prefix = prefix_of(name)
        if f"{prefix}0.weight" in dense:
            first, second = dense.pop(f"{prefix}0.weight"), dense.pop(f"{prefix}1.weight")
            dense[f"{prefix}weight"] = merged_weight(pair, first, second)
            if f"{prefix}1.bias" in dense:
                dense[f"{prefix}bias"] = dense.pop(f"{prefix}1.bias")
            mode = view_of(pair).conv_mode
            exact[name] = {"first": first, "second": second, "rank": rank_of(pair), "conv_mode": mode}
    return join_states(module, dense), exact


def to_factored_state(module: nn.Module, state: Mapping[str, Any], exact: Mapping[str, Any]) -> State:
    """The inverse of :func:`to_dense_state` for a model whose layers have the form they had then.

    Args:
        module: The model that is going to load the state.
        state: A dense state dict.
        exact: The factors beside it.

    Raises:
        ValueError: If other layers, or the same in another mode or at another stage, are low-rank in ``module``.
    """
    pairs = dict(under_every_name(module, low_rank_pairs(module)))
    layers = dict(under_every_name(module, svd_layers(module)))
    here = {name: ("pair", view_of(pair).conv_mode, rank_of(pair)) for name, pair in pairs.items()}
    here |= {name: ("factors", layer.conv_mode, layer.full_rank) for name, layer in layers.items()}
    saved = {name: _form(entry) for name, entry in exact.items()}
    if here != saved:
        raise ValueError(_why_not_resumed(here, saved))
    factored = split_states(module, state)
    # Pairs first: their two layers may be factorised in turn.
    for name, entry in sorted(exact.items(), key=lambda item: "first" not in item[1]):
        prefix = prefix_of(name)
        del factored[f"{prefix}weight"]
        if "first" not in entry:
            factored |= {f"{prefix}{part}": entry[part] for part in ("U", "s", "V", "mask")}
            continue
        factored |= {f"{prefix}0.weight": entry["first"], f"{prefix}1.weight": entry["second"]}
        if f"{prefix}bias" in factored:
            factored[f"{prefix}1.bias"] = factored.pop(f"{prefix}bias")
    return factored


_FormOf = tuple[str, str | None, int]  # "pair" or "factors", the convolution's mode, the rank there is room for


def _form(entry: Mapping[str, Any]) -> _FormOf:
    if "first" in entry:
        return "pair", entry["conv_mode"], entry["rank"]
    return "factors", entry["conv_mode"], entry["s"].shape[-1]


def _why_not_resumed(here: Mapping[str, _FormOf], saved: Mapping[str, _FormOf]) -> str:
    """What to do where the low-rank layers of a model are not those of a checkpoint."""
    both = here.keys() & saved.keys()
    rooms = [(here[name][2], saved[name][2]) for name in both if here[name][1] == saved[name][1]]
    pairs_here, pairs_saved = ({name for name, form in forms.items() if form[0] == "pair"} for forms in (here, saved))
    if not here or pairs_here - pairs_saved or any(room < was for room, was in rooms):
        return (
            "the checkpoint resumes SVD training, but the model is low-rank already, since an earlier fit has finished "
            "it: build the model anew and pass it to `fit` with this checkpoint"
        )
    if pairs_saved - pairs_here or any(room > was for room, was in rooms):
        return (
            "the checkpoint was written when its SVD training had finished: load its weights into the model with "
            "`load_from_checkpoint`, and call `fit` without `ckpt_path`"
        )
    differ = sorted(name for name in here.keys() | saved.keys() if here.get(name) != saved.get(name))
    return (
        f"the checkpoint was written with other factorised layers, see {', '.join(map(repr, differ[:5]))}: resume "
        "with the `target_modules`, `exclude_modules` and `conv_mode` that it was written with"
    )


def take_form(module: nn.Module, state: Mapping[str, Any], exact: Mapping[str, Any]) -> State:
    """Give a low-rank model the ranks of a checkpoint, in place, and the state to load into it.

    A layer that is plain, or of which the checkpoint holds only the dense weight, loads that.

    Args:
        module: A model after its fit, each low-rank layer a pair, a factorised layer, or plain.
        state: A dense state dict.
        exact: The factors beside it; empty for a weights-only file.
    """
    split = {(prefix, kind) for prefix, kind in split_prefixes(module) if kind.is_whole_in(state, prefix)}
    state = split_states(module, state)
    layers: dict[str, nn.Module] = {**svd_layers(module), **low_rank_pairs(module)}
    for name, layer in [*under_every_name(module, layers)]:
        prefix = prefix_of(name)
        if f"{prefix}weight" not in state:
            continue
        plain = merged(layer) if is_pair(layer) else layer.dense()  # type: ignore[operator]
        plain.weight.data = state.pop(f"{prefix}weight")
        if bias_of(plain) is not None:
            plain.bias.data = state.pop(f"{prefix}bias")
        twin = low_rank_twin(plain, exact[name]) if name in exact else plain
        become(layer, twin)
        state |= {f"{prefix}{key}": value for key, value in twin.state_dict().items()}
    settle(module)
    for prefix, kind in split - {*split_prefixes(module)}:
        state = kind.join_state(state, prefix)
    return state


def low_rank_twin(plain: Any, entry: Mapping[str, Any]) -> nn.Module:
    """What stands for ``plain`` at the rank of a checkpoint's entry; itself where factors do not pay."""
    mode = entry["conv_mode"]
    if "first" in entry:
        pair = factored_pair(View.of(plain, mode or "channel"), entry["rank"], bias_of(plain) is not None)
        for part, weight in zip(pair, (entry["first"], entry["second"]), strict=True):
            part.weight = nn.Parameter(weight)
        pair[1].register_parameter("bias", bias_of(plain))
        return pair
    factors = Factors(entry["U"], entry["s"], entry["V"])
    layer = svd_layer(plain, mode, factors=factors)
    layer.keep(entry["mask"].to(factors.s.device))
    return layer.factored() if layer.rank * layer.params_per_rank < layer.dense_params else plain


def under_every_name(module: nn.Module, found: Mapping[str, ModuleT]) -> Iterator[tuple[str, ModuleT]]:
    """As ``found``, a shared layer under each of the names that it has in a state dict."""
    by_id = {id(layer): layer for layer in found.values()}
    names = module.named_modules(remove_duplicate=False)
    return ((name, by_id[id(child)]) for name, child in names if id(child) in by_id)


def check_version(found: Any, what: str) -> None:
    """Refuse a file of a version that this package does not know."""
    if found != VERSION:
        raise ValueError(f"{what} has format version {found}, this lightning-svd reads version {VERSION}: update it")


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a plain layer."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight
