"""The transformer block with an adaptive norm that DiT and PixArt share, written over the backbone's own weights."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def adaptive_block(
    block: Any,
    norms: tuple[nn.LayerNorm, nn.LayerNorm],
    tokens: Tensor,
    row: Tensor,
    text: tuple[Tensor, Tensor] | None = None,
    text_bias: Tensor | None = None,
) -> Tensor:
    """tokens (R, N, D), row (R, 6, D), text's key and value each (R, L, D), text_bias (R, 1, 1, L) -> (R, N, D).

    Norms, modulation and gates run in float32, matrix products and attention in the weights' dtype.
    Source: the block of DiT (arXiv 2212.09748, figure 3) and of PixArt-alpha (arXiv 2310.00426, figure 4).
    """
    shift, scale, gate, shift_ff, scale_ff, gate_ff = row.unsqueeze(2).unbind(1)  # each (R, 1, D)
    dtype = block.attn1.to_q.weight.dtype
    normed = modulate(norms[0], tokens, shift, scale).to(dtype)
    attended = attention(block.attn1, normed, block.attn1.to_k(normed), block.attn1.to_v(normed))
    tokens = tokens + (gate * attended).to(tokens.dtype)
    if text is not None:
        tokens = tokens + attention(block.attn2, tokens.to(dtype), *text, text_bias).to(tokens.dtype)
    forwarded = block.ff(modulate(norms[1], tokens, shift_ff, scale_ff).to(dtype))
    return tokens + (gate_ff * forwarded).to(tokens.dtype)


def modulate(norm: nn.LayerNorm, tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm, then scale and shift, in float32: tokens (R, N, D), shift and scale (R, 1, D) -> (R, N, D)."""
    weight, bias = (None if p is None else p.float() for p in (norm.weight, norm.bias))
    return F.layer_norm(tokens.float(), norm.normalized_shape, weight, bias, norm.eps) * (1 + scale) + shift


def attention(attn: Any, tokens: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of tokens (R, N, D) to key and value (R, L, D) under bias (R, 1, 1, L) -> (R, N, D)."""
    query, key, value = (
        x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # each (R, heads, N or L, d)
        for x in (attn.to_q(tokens), key, value)
    )
    mask = None if bias is None else bias.to(query.dtype)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    projected: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2))
    return projected


def unpatchify(patches: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """patches (R, N, patch * patch * C) in row-major order of the grid -> (R, C, H, W)."""
    height, width = grid
    cells = patches.unflatten(1, (height, width)).unflatten(-1, (patch, patch, -1))  # (R, h, w, p, p, C)
    return torch.einsum("nhwpqc->nchpwq", cells).flatten(4, 5).flatten(2, 3)
