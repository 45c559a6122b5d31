"""LoftQ (arXiv 2310.08659): rounding to 4 or 8 bits in plain torch, and what rounding loses as A and B."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..matrices import split, svd

#: numbers that share one scale in NF4
BLOCK = 64
#: the 16 numbers of NF4: quantiles of a normal distribution, 0 and ±1 among them (QLoRA, arXiv 2305.14314, appendix E)
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def rounded_to_nf4(weight: Tensor, block: int = BLOCK) -> Tensor:
    """Return what a weight becomes in NF4: each block of neighbours, over its largest magnitude, takes the nearest of 16 numbers.

    Args:
        weight: (out, in); blocks run along its rows and into the next one.
        block: numbers in a block; the last one may be shorter.

    Returns:
        The same shape and dtype.

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
    """Return what a weight (out, in) becomes in int8 by rows: each row, over its largest magnitude, is one of 255 even steps.

    Source: LLM.int8(), arXiv 2208.07339, section 2.1 (vector-wise).
    """
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / step.clamp_min(torch.finfo(weight.dtype).tiny)).round() * step


ROUNDING: dict[int, Callable[[Tensor], Tensor]] = {4: rounded_to_nf4, 8: rounded_to_int8}


def loftq_decomposition(
    weight: Tensor, rank: int, scaling: float, *, bits: int = 4, iterations: int = 1, dtype: torch.dtype | None = None, name: str = "the weight"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q (out, in), A (r, in) and B (out, r) with Q + scaling·B·A ≈ W, by rounding and decomposing in turn.

    Args:
        weight: W (out, in), float32 or float64.
        rank: of the correction.
        scaling: s; the correction is divided by it, so that it is whole whatever alpha is.
        bits: 4 (NF4) or 8 (int8 by rows).
        iterations: how often both are done.
        dtype: Q consists of numbers of this dtype.
        name: for messages.

    Raises:
        ConfigError: the scaling is not positive.
    """
    rest = weight
    for _ in range(iterations):
        q = ROUNDING[bits](rest).to(dtype or weight.dtype).to(weight.dtype)
        a, b = split(*svd(weight - q, rank), scaling, name)
        rest = weight - scaling * b @ a
    return q, a, b
