"""Helper functions for the initialisers that decompose a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_core import ConfigError

if TYPE_CHECKING:
    from ..contracts import FactorLayer, LoraSettings

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
#: number of columns that a randomised SVD computes in addition to the requested rank
OVERSAMPLING = 10


def float_matrix(layer: FactorLayer, settings: LoraSettings) -> Tensor:
    """Return the base weight as a matrix (out, in) in float32, or in float64 if the weight is in float64; detached.

    Raises:
        ConfigError: the weight has no floating-point dtype (a quantised base), or has entries that are not finite.
    """
    weight = layer.base_weight()
    if weight.dtype not in _FLOATS:
        raise ConfigError(
            f"init_lora_weights={settings.config.init_lora_weights!r} needs the numbers of {settings.path!r}, whose dtype is {weight.dtype}",
            hint="load the base in float32, float16 or bfloat16",
        )
    return finite(wide(layer.ops.matrix(weight).detach()), settings.path)


def finite(matrix: Tensor, path: str) -> Tensor:
    """Check that all entries of a matrix are finite, and return the matrix unchanged; a matrix on the meta device is not checked.

    Args:
        matrix: (out, in).
        path: name of the layer, for the error message.

    Raises:
        ConfigError: the matrix has entries that are infinite or NaN.
    """
    if matrix.is_meta or bool(matrix.isfinite().all()):
        return matrix
    raise ConfigError(f"the weight of {path!r} has entries that are infinite or no numbers, so that it can't be decomposed", hint="check the base")


def wide(matrix: Tensor) -> Tensor:
    """Return a matrix converted to float32; a float64 matrix is returned unchanged."""
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def svd(matrix: Tensor, rank: int, iterations: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading part of a singular value decomposition: U (out, rank), S (rank,), Vᵀ (rank, in).

    Args:
        matrix: (out, in).
        rank: number of singular values; limited to min(out, in).
        iterations: None: exact SVD; otherwise, if this is much cheaper, a randomised SVD with this number of subspace iterations, with
            `OVERSAMPLING` and a fixed seed. The random numbers are drawn on the CPU with a separate generator, so that the result is the same on
            each device and in each run, and the global generator is unchanged.
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
    """Return A (r, in) and B (out, r) with scaling · B·A = U·diag(S)·Vᵀ, where A and B each get the square roots of the singular values.

    Raises:
        ConfigError: the scaling is not positive.
    """
    if scaling <= 0:
        raise ConfigError(f"the scaling of {path!r} is {scaling}, and this initialisation divides by it", hint="choose a positive lora_alpha")
    root = (s / scaling).sqrt()
    return root[:, None] * vt, u * root
