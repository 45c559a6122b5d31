"""Rotary embeddings as Llama computes them; other libraries import them from here."""

from __future__ import annotations

import torch
from torch import Tensor


def llama_rotate_half(x: Tensor) -> Tensor:
    """Return (-b, a) for x = (a, b), halves along the last dimension of (..., width)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def llama_apply_rotary_pos_emb(q: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    """Return queries turned by their positions.

    Args:
        q: (batch, heads, tokens, width).
        cos, sin: (positions, width), (1, 1, positions, width), or (batch, tokens, width) of the very tokens.
        position_ids: (batch, tokens).
    """
    if cos.dim() == 4:
        cos, sin = cos[0, 0], sin[0, 0]
    if cos.dim() == 2:
        cos, sin = cos[position_ids], sin[position_ids]
    return q * cos.unsqueeze(1) + llama_rotate_half(q) * sin.unsqueeze(1)
