"""LoftQ (arXiv 2310.08659): quantisation to 4 or 8 bits in plain torch, and A and B that approximate the quantisation error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..matrices import split, svd

#: block size of NF4: how many consecutive numbers share one scale
BLOCK = 64
#: the 16 numbers of NF4: quantiles of a normal distribution, 0 and ±1 among them (QLoRA, arXiv 2305.14314, appendix E)
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def rounded_to_nf4(weight: Tensor, block: int = BLOCK) -> Tensor:
    """Quantise a weight to NF4 and dequantise it: each number, divided by the largest magnitude in its block, becomes the nearest of 16 values.

    Args:
        weight: (out, in); blocks are taken from the flattened weight, so that a block may continue in the next row.
        block: block size; the last block may be shorter.

    Returns:
        The dequantised weight, with the same shape and dtype.

    Source: arXiv 2305.14314, equation 2 and appendix E.
    """
    flat = weight.flatten()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    largest = padded.abs().amax(1, keepdim=True)
    codes = torch.tensor(NF4, dtype=weight.dtype, device=weight.device)
    halfway = (codes[1:] + codes[:-1]) / 2
    nearest = codes[torch.bucketize(padded / largest.clamp_min(torch.finfo(weight.dtype).tiny), halfway)]
    return (nearest * largest).view(-1)[: flat.numel()].view(weight.shape)


def rounded_to_int8(weight: Tensor) -> Tensor:
    """Quantise a weight (out, in) to int8 and dequantise it, with one scale per row: its largest magnitude / 127, which gives 255 even steps.

    Source: LLM.int8(), arXiv 2208.07339, section 2.1 (vector-wise).
    """
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / step.clamp_min(torch.finfo(weight.dtype).tiny)).round() * step


ROUNDING: dict[int, Callable[[Tensor], Tensor]] = {4: rounded_to_nf4, 8: rounded_to_int8}


def loftq_decomposition(
    weight: Tensor, rank: int, scaling: float, *, bits: int = 4, iterations: int = 1, dtype: torch.dtype | None = None, name: str = "the weight"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q (out, in), A (r, in) and B (out, r) with Q + scaling·B·A ≈ W.

    Each iteration quantises W − scaling·B·A to Q, and then computes A and B from the SVD of W − Q.

    Args:
        weight: W (out, in), float32 or float64.
        rank: rank r of A and B.
        scaling: s; B·A is divided by it, so that s·B·A equals the rank-r correction for any alpha.
        bits: 4 (NF4) or 8 (int8 with one scale per row).
        iterations: number of iterations.
        dtype: Q is rounded to this dtype (and returned in the dtype of W); default: the dtype of W.
        name: the weight's name, for error messages.

    Raises:
        ConfigError: the scaling is not positive.
    """
    rest = weight
    for _ in range(iterations):
        q = ROUNDING[bits](rest).to(dtype or weight.dtype).to(weight.dtype)
        a, b = split(*svd(weight - q, rank), scaling, name)
        rest = weight - scaling * b @ a
    return q, a, b
