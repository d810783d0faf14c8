"""``nn.MultiheadAttention`` with its projections as layers of their own, so that each can be low-rank.

torch's module keeps the projections of queries, keys and values in one tensor and hands the raw weights to a function,
so no layer in it can be replaced. Here it is taken apart in place, and put together again: a state dict has the dense
names only in the latter form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
PARTS = (*PROJECTIONS, "out_proj")
_PACKED = ("in_proj_weight", "in_proj_bias")
_SEPARATE = tuple(f"{part}_weight" for part in PROJECTIONS)


class SplitAttention(nn.MultiheadAttention):
    """What an ``nn.MultiheadAttention`` computes, by four linear layers: q_proj, k_proj, v_proj, out_proj.

    It takes the same arguments and returns the same.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        """Take ``attention`` apart; it is left unchanged, and its output's bias is shared."""
        nn.Module.__init__(self)
        own = vars(nn.Module())
        vars(self).update({key: value for key, value in vars(attention).items() if key not in own})
        # torch's encoder layers look for these before they compute without calling their layers.
        for name in (*_PACKED, *_SEPARATE):
            self.register_parameter(name, None)
        for name, part in projections(attention).items():
            self.add_module(name, _owning(part))
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`torch.nn.MultiheadAttention.forward`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")  # torch's own words
        batched = query.ndim == 3
        inputs = [x if batched else x.unsqueeze(0) for x in (query, key, value)]
        if batched and not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        q, k, v = (
            self._heads(layer(x)) for layer, x in zip((self.q_proj, self.k_proj, self.v_proj), inputs, strict=True)
        )
        mask = _added(attn_mask, key_padding_mask, self.num_heads, q)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.mT * self.head_dim**-0.5
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = weights @ v
        else:
            weights, heads = None, F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(heads.transpose(1, 2).flatten(2))
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, positions, width) -> (batch, heads, positions, width of a head)."""
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)


def _added(attn_mask: Tensor | None, padding: Tensor | None, heads: int, like: Tensor) -> Tensor | None:
    """Both masks as what is added to the scores (batch or 1, heads or 1, queries, keys); None for none."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask if attn_mask.ndim == 2 else attn_mask.view(-1, heads, *attn_mask.shape[1:]))
    if padding is not None:
        masks.append(padding[:, None, None, :])
    total: Tensor | None = None
    for mask in masks:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(mask, -torch.inf)
        total = mask if total is None else total + mask
    return None if total is None else total.to(like.dtype)


def is_whole(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Whether ``module`` is an attention module in one piece."""
    return isinstance(module, nn.MultiheadAttention) and not isinstance(module, SplitAttention)


def below(name: str, part: str) -> str:
    """Name of a part of the module of this name."""
    return f"{name}.{part}" if name else part


def why_not_split(attention: nn.MultiheadAttention) -> str | None:
    """Why an attention module cannot be taken apart; None if it can."""
    if type(attention) is not nn.MultiheadAttention:
        return "in a subclass of MultiheadAttention, which may have a forward of its own"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "in an attention with `add_bias_kv` or `add_zero_attn`"
    return None


def projections(attention: nn.MultiheadAttention) -> dict[str, nn.Linear]:
    """The projections as linear layers whose weights are views of the module's own."""
    packed, bias = attention.in_proj_weight, attention.in_proj_bias
    weights = packed.chunk(3) if packed is not None else [getattr(attention, name) for name in _SEPARATE]
    biases = bias.chunk(3) if bias is not None else (None,) * 3
    of_inputs = zip(weights, biases, strict=True)
    layers = {name: _linear(*pair) for name, pair in zip(PROJECTIONS, of_inputs, strict=True)}
    return layers | {"out_proj": _linear(attention.out_proj.weight, attention.out_proj.bias)}


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            own = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach(), value.requires_grad)
            setattr(layer, name, own)
    return layer


def _owning(layer: nn.Linear) -> nn.Linear:
    """``layer`` with storage of its own where a parameter is a view of another's."""
    for name, value in list(layer.named_parameters()):
        if value._base is not None or value.untyped_storage().nbytes() > value.nbytes:
            setattr(layer, name, nn.Parameter(value.detach().clone(), value.requires_grad))
    return layer


def joined(attention: SplitAttention) -> nn.MultiheadAttention:
    """The module of torch again, from four plain linear layers."""
    whole = nn.MultiheadAttention(
        attention.embed_dim,
        attention.num_heads,
        attention.dropout,
        attention.q_proj.bias is not None,
        kdim=attention.kdim,
        vdim=attention.vdim,
        batch_first=attention.batch_first,
        device="meta",
    )
    with torch.enable_grad():  # so that the packed tensor is trainable where a part of it is
        state = join_state(dict(attention.named_parameters()))
    for name, value in state.items():
        owner, _, leaf = name.rpartition(".")
        parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach(), value.requires_grad)
        setattr(whole.get_submodule(owner), leaf, parameter)
    return whole.train(attention.training)


def can_join(attention: SplitAttention) -> bool:
    """Whether its four layers are plain."""
    return all(type(getattr(attention, part)) is nn.Linear for part in PARTS)


def join_state(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """A state dict in which torch's own names stand for the four layers of the attention at ``prefix``."""
    joined = dict(state)
    weights = [joined.pop(f"{prefix}{part}.weight") for part in PROJECTIONS]
    if len({weight.shape for weight in weights}) == 1 and weights[0].shape[0] == weights[0].shape[1]:
        joined[f"{prefix}in_proj_weight"] = torch.cat(weights)
    else:  # keys or values of another width
        joined |= {f"{prefix}{name}": weight for name, weight in zip(_SEPARATE, weights, strict=True)}
    if f"{prefix}q_proj.bias" in joined:
        joined[f"{prefix}in_proj_bias"] = torch.cat([joined.pop(f"{prefix}{part}.bias") for part in PROJECTIONS])
    return joined


def split_state(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The inverse of :func:`join_state`."""
    split = dict(state)
    packed, bias = (split.pop(f"{prefix}{name}", None) for name in _PACKED)
    weights = [split.pop(f"{prefix}{name}") for name in _SEPARATE] if packed is None else packed.chunk(3)
    split |= {f"{prefix}{part}.weight": weight for part, weight in zip(PROJECTIONS, weights, strict=True)}
    if bias is not None:
        split |= {f"{prefix}{part}.bias": value for part, value in zip(PROJECTIONS, bias.chunk(3), strict=True)}
    return split


def has_attention(state: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether a state dict holds torch's own attention module at ``prefix``: it may hold a part of a model only."""
    return f"{prefix}in_proj_weight" in state or f"{prefix}q_proj_weight" in state


def split_prefixes(module: nn.Module) -> Iterator[str]:
    """Where in a state dict the attentions in ``module`` that are taken apart stand, under every name they have."""
    for name, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, SplitAttention):
            yield f"{name}." if name else ""
