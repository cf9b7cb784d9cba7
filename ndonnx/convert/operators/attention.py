"""Converters of attention, rotary positions and the normalisations that came with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ndonnx.convert.registry import OnnxNode, converts, opset_of
from ndonnx.convert.tables import converts_table, integers, refuse_further_outputs


@converts("GroupNormalization")
class GroupNormalization(nn.Module):
    """`GroupNormalization`: scale and bias for each group (opset 18) or each channel (opset 21)."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.groups = int(node.attributes["num_groups"])
        self.epsilon = float(node.attributes.get("epsilon", 1e-5))
        self.by_group = opset_of(node) < 21

    def forward(self, data: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if self.by_group:
            scale, bias = (part.repeat_interleave(data.shape[1] // self.groups) for part in (scale, bias))
        return F.group_norm(data, self.groups, scale, bias, self.epsilon)


@converts("RMSNormalization", "SimplifiedLayerNormalization")
class RMSNormalization(nn.Module):
    """`RMSNormalization` over the axes from `axis` on; onnxruntime's older name means the same."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.axis = int(node.attributes.get("axis", -1))
        self.epsilon = float(node.attributes.get("epsilon", 1e-5))
        refuse_further_outputs(node)

    def forward(self, data: Tensor, scale: Tensor) -> Tensor:
        return F.rms_norm(data, data.shape[self.axis :], None, self.epsilon) * scale


@converts("MeanVarianceNormalization")
class MeanVarianceNormalization(nn.Module):
    """`MeanVarianceNormalization`, over the batch too unless told otherwise."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.axes = integers(node, "axes") or [0, 2, 3]

    def forward(self, data: Tensor) -> Tensor:
        variance, mean = torch.var_mean(data, self.axes, correction=0, keepdim=True)
        return (data - mean) / torch.sqrt(variance + 1e-18)


def _lp_normalization(data: Tensor, *, axis: int, p: int) -> Tensor:
    return F.normalize(data, p, axis)


converts_table({"LpNormalization": (_lp_normalization, {"axis": -1, "p": 2})})


@converts("RotaryEmbedding")
class RotaryEmbedding(nn.Module):
    """`RotaryEmbedding`: data (N, heads, T, size) or (N, T, heads * size).

    The tables are (N, T, pairs), or (positions, pairs) with the position ids (N, T).
    """

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.interleaved = bool(node.attributes.get("interleaved", 0))
        self.heads = int(node.attributes.get("num_heads", 0))
        self.rotated = int(node.attributes.get("rotary_embedding_dim", 0))

    def forward(self, data: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None) -> Tensor:
        heads = _split_heads(data, self.heads) if data.ndim == 3 else data
        if position_ids is not None:
            cos, sin = cos[position_ids], sin[position_ids]
        cos, sin = cos[:, None], sin[:, None]
        size = self.rotated or heads.shape[-1]
        turning, rest = heads[..., :size], heads[..., size:]
        if self.interleaved:
            first, second = turning[..., ::2], turning[..., 1::2]
        else:
            first, second = turning.chunk(2, -1)
        pair = (cos * first - sin * second, sin * first + cos * second)
        turned = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        out = torch.cat([turned, rest], -1)
        return _join_heads(out) if data.ndim == 3 else out


@converts("Attention")
class Attention(nn.Module):
    """`Attention` without a cache: query, key, value (N, heads, T, size) or (N, T, heads * size), and a mask.

    The mask is boolean (True: attend) or added to the scores. Fewer key heads than query heads
    are shared by groups of neighbours.
    """

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        attributes = node.attributes
        self.causal = bool(attributes.get("is_causal", 0))
        self.scale: float | None = attributes.get("scale")
        self.softcap = float(attributes.get("softcap", 0.0))
        self.heads = int(attributes.get("q_num_heads", 0)), int(attributes.get("kv_num_heads", 0))
        refuse_further_outputs(node)
        if any(node.input_values[4:]):
            raise NotImplementedError(f"Attention with a cache or lengths: {list(node.input_values[4:])}")
        if self.softcap:
            raise NotImplementedError("Attention with softcap")

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        flat = query.ndim == 3
        if flat:
            query = _split_heads(query, self.heads[0])
            key, value = _split_heads(key, self.heads[1]), _split_heads(value, self.heads[1])
        share = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
        if self.causal and mask is not None:
            future = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).triu(1)
            mask = mask & ~future if mask.dtype == torch.bool else mask.masked_fill(future, -torch.inf)
        out = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=self.causal and mask is None, scale=self.scale
        )
        return _join_heads(out) if flat else out


def _split_heads(data: Tensor, heads: int) -> Tensor:
    """(N, T, heads * size) as (N, heads, T, size)."""
    return data.reshape(*data.shape[:-1], heads, -1).transpose(1, 2)


def _join_heads(data: Tensor) -> Tensor:
    """(N, heads, T, size) as (N, T, heads * size)."""
    return data.transpose(1, 2).flatten(2)
