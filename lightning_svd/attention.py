"""``nn.MultiheadAttention`` with its projections as layers of their own, so that each can be low-rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_svd.parts import InParts, State, as_parameter, attributes_of, linear_of

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_PACKED = ("in_proj_weight", "in_proj_bias")
_SEPARATE = tuple(f"{part}_weight" for part in PROJECTIONS)


class SplitAttention(InParts, nn.MultiheadAttention):
    """What an ``nn.MultiheadAttention`` computes, by four linear layers: q_proj, k_proj, v_proj, out_proj.

    It takes the same arguments and returns the same.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        """Take ``attention`` apart; it is left unchanged, and its output's bias is shared."""
        nn.Module.__init__(self)
        vars(self).update(attributes_of(attention))
        # torch's encoder layers look for these before they compute without calling their layers.
        for name in (*_PACKED, *_SEPARATE):
            self.register_parameter(name, None)
        for name, part in self.linears(attention).items():
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

    @staticmethod
    def linears(whole: Any) -> dict[str, nn.Linear]:
        packed, bias = whole.in_proj_weight, whole.in_proj_bias
        weights = packed.chunk(3) if packed is not None else [getattr(whole, name) for name in _SEPARATE]
        biases = bias.chunk(3) if bias is not None else (None,) * 3
        of_inputs = zip(weights, biases, strict=True)
        layers = {name: linear_of(*pair) for name, pair in zip(PROJECTIONS, of_inputs, strict=True)}
        return layers | {"out_proj": linear_of(whole.out_proj.weight, whole.out_proj.bias)}

    @staticmethod
    def why_not(whole: Any) -> str | None:
        if whole.bias_k is not None or whole.add_zero_attn:
            return "in an attention with `add_bias_kv` or `add_zero_attn`"
        return None

    def joined(self) -> nn.MultiheadAttention:
        whole = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            self.q_proj.bias is not None,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            device="meta",
        )
        with torch.enable_grad():  # so that the packed tensor is trainable where a part of it is
            state = self.join_state(dict(self.named_parameters()))
        for name, value in state.items():
            owner, _, leaf = name.rpartition(".")
            setattr(whole.get_submodule(owner), leaf, as_parameter(value))
        return whole.train(self.training)

    @staticmethod
    def is_whole_in(state: Mapping[str, Tensor], prefix: str) -> bool:
        return f"{prefix}in_proj_weight" in state or f"{prefix}q_proj_weight" in state

    @staticmethod
    def is_split_in(state: Mapping[str, Tensor], prefix: str) -> bool:
        return f"{prefix}q_proj.weight" in state

    @staticmethod
    def join_state(state: Mapping[str, Tensor], prefix: str = "") -> State:
        joined = dict(state)
        weights = [joined.pop(f"{prefix}{part}.weight") for part in PROJECTIONS]
        if len({weight.shape for weight in weights}) == 1 and weights[0].shape[0] == weights[0].shape[1]:
            joined[f"{prefix}in_proj_weight"] = torch.cat(weights)
        else:  # keys or values of another width
            joined |= {f"{prefix}{name}": weight for name, weight in zip(_SEPARATE, weights, strict=True)}
        if f"{prefix}q_proj.bias" in joined:
            joined[f"{prefix}in_proj_bias"] = torch.cat([joined.pop(f"{prefix}{part}.bias") for part in PROJECTIONS])
        return joined

    @staticmethod
    def split_state(state: Mapping[str, Tensor], prefix: str = "") -> State:
        split = dict(state)
        packed, bias = (split.pop(f"{prefix}{name}", None) for name in _PACKED)
        weights = [split.pop(f"{prefix}{name}") for name in _SEPARATE] if packed is None else packed.chunk(3)
        split |= {f"{prefix}{part}.weight": weight for part, weight in zip(PROJECTIONS, weights, strict=True)}
        if bias is not None:
            split |= {f"{prefix}{part}.bias": value for part, value in zip(PROJECTIONS, bias.chunk(3), strict=True)}
        return split


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


def _owning(layer: nn.Linear) -> nn.Linear:
    """``layer`` with storage of its own where a parameter is a view of another's."""
    for name, value in list(layer.named_parameters()):
        if value._base is not None or value.untyped_storage().nbytes() > value.nbytes:
            setattr(layer, name, nn.Parameter(value.detach().clone(), value.requires_grad))
    return layer
