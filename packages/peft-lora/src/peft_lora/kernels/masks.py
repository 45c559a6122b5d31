"""Dropout masks that store one bit per element."""

from __future__ import annotations

import torch
from torch import Tensor


def scale_of(p: float) -> float:
    """Return the factor by which dropout with probability p multiplies the elements that it does not set to zero: 1 / (1 − p), or 0 if p is 1."""
    return 1 / (1 - p) if p < 1 else 0.0


def masked(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return x · scale where the mask, which may be packed, is true, and 0 elsewhere."""
    return torch.ops.aten.native_dropout_backward(x, unpacked(mask, x), scale)  # type: ignore[no-any-return]


#: multiplying an int64 whose eight bytes are 0 or 1 by this constant collects these as the bits of the highest byte
_GATHER = 0x0102040810204080
#: multiplying a byte by `_SPREAD` copies it to all eight bytes of an int64; `_DIAGONAL` then selects a different bit in each byte
_SPREAD = 0x0101010101010101
_DIAGONAL = 0x8040201008040201 - (1 << 64)


def packed(mask: Tensor) -> Tensor:
    """Return a boolean mask packed to uint8, eight elements per byte; unchanged if its size is no multiple of eight or it is not contiguous."""
    if mask.numel() % 8 or not mask.is_contiguous():
        return mask
    return ((mask.view(-1).view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


def unpacked(mask: Tensor, like: Tensor) -> Tensor:
    """Return the boolean mask from which `packed` computed `mask`, in the shape of `like`."""
    if mask.dtype is torch.bool:
        return mask
    return ((mask.to(torch.int64) * _SPREAD) & _DIAGONAL).view(torch.uint8).view(like.shape) != 0
