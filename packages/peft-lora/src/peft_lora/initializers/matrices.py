"""What the initialisers that decompose a matrix share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_core import ConfigError

if TYPE_CHECKING:
    from ..contracts import FactorLayer, LoraSettings

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
#: columns that a randomised decomposition has besides those that are wanted
OVERSAMPLING = 10


def float_matrix(layer: FactorLayer, settings: LoraSettings) -> Tensor:
    """Return the base weight as a matrix (out, in) in float32, or in float64 if that is its dtype; detached.

    Raises:
        ConfigError: it is not of a floating-point dtype (a quantised base), or has entries that are not finite.
    """
    weight = layer.base_weight()
    if weight.dtype not in _FLOATS:
        raise ConfigError(
            f"init_lora_weights={settings.config.init_lora_weights!r} needs the numbers of {settings.path!r}, whose dtype is {weight.dtype}",
            hint="load the base in float32, float16 or bfloat16",
        )
    return finite(wide(layer.ops.matrix(weight).detach()), settings.path)


def finite(matrix: Tensor, path: str) -> Tensor:
    """Return a matrix that is to be decomposed, on a device with numbers.

    Args:
        matrix: (out, in).
        path: the layer it belongs to.

    Raises:
        ConfigError: it has entries that are infinite or no numbers.
    """
    if matrix.is_meta or bool(matrix.isfinite().all()):
        return matrix
    raise ConfigError(f"the weight of {path!r} has entries that are infinite or no numbers, so that it can't be decomposed", hint="check the base")


def wide(matrix: Tensor) -> Tensor:
    """Return a matrix in float32, or as it is if it is in float64."""
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def svd(matrix: Tensor, rank: int, iterations: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading part of a singular value decomposition: U (out, rank), S (rank,), Vᵀ (rank, in).

    Args:
        matrix: (out, in).
        rank: how much of it; no more than there is.
        iterations: None: exactly; otherwise, where that is much cheaper, by so many steps of a randomised subspace iteration with
            `OVERSAMPLING` and a fixed seed. The numbers are drawn on the CPU and no global generator moves, so that each device and each run
            finds the same.
    """
    rank = min(rank, *matrix.shape)
    width = rank + OVERSAMPLING
    if iterations is None or 2 * width >= min(matrix.shape):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    start = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype).to(matrix.device)
    q = torch.linalg.qr(matrix @ start).Q
    for _ in range(iterations):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ q).Q).Q
    u, s, vt = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], vt[:rank]


def split(u: Tensor, s: Tensor, vt: Tensor, scaling: float, path: str) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) with scaling · B·A = U·diag(S)·Vᵀ, the singular values shared out evenly.

    Raises:
        ConfigError: the scaling is not positive.
    """
    if scaling <= 0:
        raise ConfigError(f"the scaling of {path!r} is {scaling}, and this initialisation divides by it", hint="choose a positive lora_alpha")
    root = (s / scaling).sqrt()
    return root[:, None] * vt, u * root
