"""``nn.MultiheadAttention`` with its projections as layers of their own, so that each can be low-rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_svd.layers.parts import InParts, Slot, Slots, State, linear_of

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_PACKED = ("in_proj_weight", "in_proj_bias")
_SEPARATE = tuple(f"{part}_weight" for part in PROJECTIONS)


class SplitAttention(InParts):
    """Multi-head attention computed by four separate linear layers: q_proj, k_proj, v_proj, out_proj.

    It takes the same arguments and returns the same.
    """

    embed_dim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    out_proj: nn.Module

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
        if self.is_dense:
            of_torch: Any = super().forward
            result: tuple[Tensor, Tensor | None] = of_torch(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
            return result
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")  # torch's own words
        batched = query.ndim == 3
        inputs = [x if batched else x.unsqueeze(0) for x in (query, key, value)]
        if batched and not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        q, k, v = (self._heads(self.function_of(name)(x)) for name, x in zip(PROJECTIONS, inputs, strict=True))
        # As in torch's own: the hint takes the place of the mask, so that kernels need none, where nothing else does.
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _added(attn_mask, key_padding_mask, self.num_heads, q)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.mT * self.head_dim**-0.5
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = weights @ v
        else:
            weights, heads = None, F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        # Past its hooks, which torch's own function never calls.
        out = self.out_proj.forward(heads.transpose(1, 2).flatten(2))
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def input_shapes(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> dict[str, list[tuple[int, ...]]]:
        shapes = [tuple(x.shape) for x in (query, key, value)] + [(*query.shape[:-1], self.embed_dim)]
        return {name: [shape] for name, shape in zip((*PROJECTIONS, "out_proj"), shapes, strict=True)}

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
        weight = whole.out_proj._parameters.get("weight")
        # One that is computed from other parameters is not even read: spectral norm iterates whenever it is.
        return layers if weight is None else layers | {"out_proj": linear_of(weight, whole.out_proj.bias)}

    @staticmethod
    def why_not(whole: Any) -> str | None:
        if whole.bias_k is not None or whole.add_zero_attn:
            return "in an attention with `add_bias_kv` or `add_zero_attn`"
        return None

    @staticmethod
    def slots_of(whole: Any) -> Slots:
        size = whole.embed_dim
        rows = [slice(start * size, (start + 1) * size) for start in range(3)]
        biases = [Slot("in_proj_bias", part) if whole.in_proj_bias is not None else None for part in rows]
        if whole.in_proj_weight is not None:
            weights = [Slot("in_proj_weight", part) for part in rows]
        else:  # keys or values of another width
            weights = [Slot(name) for name in _SEPARATE]
        return dict(zip(PROJECTIONS, zip(weights, biases, strict=True), strict=True))

    def _relink(self) -> None:
        if type(self.out_proj) is nn.Linear:  # after a pair of layers was merged
            self.out_proj.__class__ = NonDynamicallyQuantizableLinear

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
    """The attention mask and the padding mask as one that is added to the scores; None if there is neither."""
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
