"""Dropout masks with one bit an element."""

from __future__ import annotations

import torch
from torch import Tensor


def scale_of(p: float) -> float:
    """Return what dropout with probability p multiplies the elements by that stay."""
    return 1 / (1 - p) if p < 1 else 0.0


def masked(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return x, scaled where the (packed) mask says that an element stays, and 0 elsewhere."""
    return torch.ops.aten.native_dropout_backward(x, unpacked(mask, x), scale)  # type: ignore[no-any-return]


#: multiplied with eight bytes that are 0 or 1, gathers them as the bits of the highest byte
_GATHER = 0x0102040810204080
#: a byte in every one of eight, and one bit of each
_SPREAD = 0x0101010101010101
_DIAGONAL = 0x8040201008040201 - (1 << 64)


def packed(mask: Tensor) -> Tensor:
    """Return a boolean mask with eight elements in a byte; as it is where its size is no multiple of eight."""
    if mask.numel() % 8 or not mask.is_contiguous():
        return mask
    return ((mask.view(-1).view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


def unpacked(mask: Tensor, like: Tensor) -> Tensor:
    """Return what `packed` was given, in the shape of `like`."""
    if mask.dtype is torch.bool:
        return mask
    return ((mask.to(torch.int64) * _SPREAD) & _DIAGONAL).view(torch.uint8).view(like.shape) != 0
