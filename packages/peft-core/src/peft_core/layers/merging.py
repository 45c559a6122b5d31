"""Folding a change into a weight such that it can be taken out again bit for bit.

W' = round(W + Δ) loses bits of W. What is lost is small when W' − Δ is rounded the same way again: the integers of the bit patterns
of W and of round(W' − Δ) differ by little. Those differences are kept in int8 (one byte a weight, against a second copy), with the few
larger ones listed apart, or a full copy where they are many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import MergeError

_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float64: torch.int64}
#: attribute of a module whose weight is merged
MERGES = "_peft_merges"
#: when more than this share of the differences do not fit in int8, a full copy is smaller
_SPARSE_SHARE = 0.15


@dataclass(frozen=True)
class Residual:
    """Integers that turn round(W' − Δ) back into W."""

    small: Tensor
    large_at: Tensor
    large: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes kept while merged."""
        return sum(t.numel() * t.element_size() for t in (self.small, self.large_at, self.large))


class Merge:
    """One merge into one weight, and the way back.

    Args:
        owner: the module that has the weight.
        name: name of the weight in it.
        adapters: what is merged, for messages.
        delta: returns ΔW (stored layout) as it is now; must give the same bits when called again.
        shared: the weight also belongs to another module (tied embeddings): then `owner` gets a weight of its own meanwhile.
        keep_copy: keep W itself (for effects that are no sum and can't be inverted exactly).
    """

    def __init__(self, owner: nn.Module, name: str, adapters: tuple[str, ...], delta: Callable[[], Tensor], *, shared: bool, keep_copy: bool) -> None:
        self.owner, self.name, self.adapters = owner, name, adapters
        self._delta = delta
        self._shared = shared
        self._original: nn.Parameter | None = None
        self._keep_copy = keep_copy
        self.additive = not keep_copy
        self._residual: Residual | None = None
        self._copy: Tensor | None = None
        self._threads = torch.get_num_threads()

    def prepare(self, *, check_finite: bool) -> Tensor:
        """Return the merged weight without touching anything.

        Raises:
            MergeError: `check_finite`, and it contains NaN or infinity.
        """
        # a merge that is taken out and done again starts from another weight: nothing of the first time may stay
        parameter = self.owner.get_parameter(self.name)
        self._original = parameter if self._shared else None
        self._residual = self._copy = None
        self._threads = torch.get_num_threads()
        with torch.no_grad():
            weight = parameter.detach()
            delta = self._delta()
            merged = _sum(weight, delta)
            if check_finite and not torch.isfinite(merged).all():
                what = "NaNs" if torch.isnan(merged).any() else "infinite values"
                raise MergeError(
                    f"{what} detected in the merged weights. The adapter {', '.join(self.adapters)} seems to be broken",
                    hint="look at its tensors; the base weights are unchanged",
                    code="merge-not-finite",
                )
            if self._original is None:
                self._keep(weight, merged, delta)
            return merged

    def apply(self, merged: Tensor) -> None:
        """Put the merged weight in place: into the same parameter, or into one of its own where the weight is shared."""
        parameter = self.owner.get_parameter(self.name)
        if self._original is not None:
            self.owner.register_parameter(self.name, nn.Parameter(merged, requires_grad=parameter.requires_grad))
            return
        with torch.no_grad():
            parameter.copy_(merged)

    def undo(self) -> None:
        """Restore the weight as it was before the merge."""
        if self._original is not None:
            self.owner.register_parameter(self.name, self._original)
            return
        parameter = self.owner.get_parameter(self.name)
        with torch.no_grad():
            if self._copy is not None:
                parameter.copy_(self._copy.to(parameter.device))
                return
            threads = torch.get_num_threads()
            torch.set_num_threads(self._threads)  # another split of the product could round Δ otherwise
            try:
                delta = self._delta()
            finally:
                torch.set_num_threads(threads)
            weight = parameter.detach()
            plain = _sum(weight, -delta)
            if self._residual is not None and weight.dtype in _BITS:
                plain = _corrected(plain, self._residual)
            parameter.copy_(plain)

    def _keep(self, weight: Tensor, merged: Tensor, delta: Tensor) -> None:
        if self._keep_copy or weight.dtype not in _BITS:
            self._copy = weight.clone()
            return
        plain = _sum(merged, -delta)
        self._residual = _difference(weight, plain)
        if self._residual is None:
            self._copy = weight.clone()


def _sum(weight: Tensor, delta: Tensor) -> Tensor:
    """Return weight + delta, rounded once to the weight's dtype."""
    wide = torch.promote_types(weight.dtype, delta.dtype)
    return (weight.to(wide) + delta.to(wide)).to(weight.dtype)


def merges_of(owner: nn.Module) -> list[Merge]:
    """Return the merges into a module's weight in the order in which they were done, whatever layers did them."""
    stack: list[Merge] = owner.__dict__.setdefault(MERGES, [])
    return stack


def _difference(weight: Tensor, plain: Tensor) -> Residual | None:
    bits = _BITS[weight.dtype]
    # int32 patterns can differ by more than int32 holds (opposite signs): wrapping subtraction and addition still cancel exactly
    difference = weight.contiguous().view(bits) - plain.contiguous().view(bits)
    flat = difference.flatten()
    at = ((flat > 127) | (flat < -128)).nonzero().flatten()
    if at.numel() > _SPARSE_SHARE * flat.numel():
        return None
    large = flat[at].clone()
    small = flat.clone()
    small[at] = 0
    index = at.to(torch.int32) if flat.numel() < 2**31 else at
    return Residual(small.to(torch.int8).view(weight.shape), index, large)


def _corrected(plain: Tensor, residual: Residual) -> Tensor:
    bits = _BITS[plain.dtype]
    integers = plain.contiguous().view(bits)
    integers = integers + residual.small.to(device=plain.device, dtype=bits)
    flat = integers.flatten()
    flat[residual.large_at.to(device=plain.device, dtype=torch.long)] += residual.large.to(device=plain.device, dtype=bits)
    return flat.view(plain.shape).view(plain.dtype)
