"""Merges changes into weights so that unmerging is exact, bit for bit.

W' = round(W + Δ) loses bits of W. The loss is small: read as integers, the bit patterns of W and of round(W' − Δ) are close. Their differences are
stored as int8 (one byte per weight, instead of a full copy), the few that overflow as a sparse list; where too many overflow, a full copy is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..base.weight import MERGES
from ..errors import MergeError

_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float64: torch.int64}
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


class Change(Protocol):
    """A change of a weight: what goes in, and, where it can be said, the way back."""

    @property
    def additive(self) -> bool:
        """Whether it is a sum: then the order of merges does not matter."""
        ...

    @property
    def invertible(self) -> bool:
        """Whether `invert` leads back up to rounding; if not, a copy of the weight is kept."""
        ...

    def apply(self, weight: Tensor) -> Tensor:
        """Return the changed weight in the promoted dtype."""
        ...

    def invert(self, weight: Tensor) -> Tensor:
        """Return the weight without the change, up to rounding. Must give the same bits when called again."""
        ...


class Fold:
    """One change of one parameter that can be undone.

    Args:
        owner: the module that has the parameter.
        name: name of the parameter in it, of any shape.
        change: what is done to it.
        shared: it also belongs to another module (tied embeddings): while merged, `owner` holds a parameter of its own.
    """

    def __init__(self, owner: nn.Module, name: str, change: Change, *, shared: bool = False) -> None:
        self.owner, self.name, self.change = owner, name, change
        self._shared = shared
        self._original: nn.Parameter | None = None
        self._residual: Residual | None = None
        self._copy: Tensor | None = None
        self._threads = torch.get_num_threads()

    def prepare(self) -> Tensor:
        """Return the changed parameter's value, of its shape, without touching anything."""
        # after an undo, the next merge may start from another weight: all saved state is reset
        parameter = self.owner.get_parameter(self.name)
        self._original = parameter if self._shared else None
        self._residual = self._copy = None
        self._threads = torch.get_num_threads()
        with torch.no_grad():
            weight = parameter.detach()
            merged = self.change.apply(weight).to(weight.dtype)
            if self._original is None:
                self._keep(weight, merged)
            return merged

    def put(self, merged: Tensor) -> None:
        """Put `merged`, of the parameter's shape, in place: into the same parameter, or into one of its own where the parameter is shared."""
        parameter = self.owner.get_parameter(self.name)
        if self._original is not None:
            self.owner.register_parameter(self.name, nn.Parameter(merged, requires_grad=parameter.requires_grad))
            return
        with torch.no_grad():
            parameter.copy_(merged)

    def undo(self) -> None:
        """Restore the parameter as it was before."""
        if self._original is not None:
            self.owner.register_parameter(self.name, self._original)
            return
        parameter = self.owner.get_parameter(self.name)
        with torch.no_grad():
            parameter.copy_(self.before(parameter.detach()))

    def before(self, merged: Tensor) -> Tensor:
        """Return the value that was there before, given `merged`, the one that is there now, of the same shape. Changes nothing."""
        if self._original is not None:
            return self._original.detach()
        if self._copy is not None:
            return self._copy.to(merged.device)
        threads = torch.get_num_threads()
        torch.set_num_threads(self._threads)  # with another number of threads the product could be split, and Δ rounded, differently
        try:
            plain = self.change.invert(merged).to(merged.dtype)
        finally:
            torch.set_num_threads(threads)
        if self._residual is not None and merged.dtype in _BITS:
            plain = _corrected(plain, self._residual)
        return plain

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for the way back, besides the adapter's own parameters."""
        copied = 0 if self._copy is None else self._copy.numel() * self._copy.element_size()
        return copied + (self._residual.nbytes if self._residual is not None else 0)

    def _keep(self, weight: Tensor, merged: Tensor) -> None:
        if not self.change.invertible or weight.dtype not in _BITS:
            self._copy = weight.clone()
            return
        plain = self.change.invert(merged).to(weight.dtype)
        self._residual = _difference(weight, plain)
        if self._residual is None:
            self._copy = weight.clone()


class Merge:
    """Adapters of one layer folded into its base: one fold for each parameter of the base that they change.

    Args:
        owner: the base module.
        adapters: what is merged.
        folds: the changes.
        permanent: undone when the adapter is deleted, not by unmerging: PiSSA and its relatives subtract the initial s·B·A from the base
            weight.
    """

    def __init__(self, owner: nn.Module, adapters: tuple[str, ...], folds: Sequence[Fold], *, permanent: bool = False) -> None:
        self.owner, self.adapters, self.folds, self.permanent = owner, adapters, tuple(folds), permanent

    @property
    def additive(self) -> bool:
        """Whether all changes are sums."""
        return all(fold.change.additive for fold in self.folds)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for the way back."""
        return sum(fold.nbytes for fold in self.folds)

    def prepare(self, *, check_finite: bool) -> list[Tensor]:
        """Return the merged values, in the shapes of the parameters, without touching anything.

        Raises:
            MergeError: `check_finite`, and one contains NaN or infinity.
        """
        values = []
        for fold in self.folds:
            merged = fold.prepare()
            if check_finite and not torch.isfinite(merged).all():
                what = "NaNs" if torch.isnan(merged).any() else "infinite values"
                raise MergeError(
                    f"{what} detected in the merged weights. The adapter {', '.join(self.adapters)} seems to be broken",
                    hint="look at its tensors; the base weights are unchanged",
                    code="merge-not-finite",
                )
            values.append(merged)
        return values

    def apply(self, values: Sequence[Tensor]) -> None:
        """Put `values`, what `prepare` returned, in the shapes of the parameters, in place."""
        for fold, merged in zip(self.folds, values, strict=True):
            fold.put(merged)

    def undo(self) -> None:
        """Restore the base as it was before the merge."""
        for fold in reversed(self.folds):
            fold.undo()


def pristine(owner: nn.Module, name: str = "weight") -> Tensor:
    """Return a parameter as it was before all that is merged into it now; detached, not to be written to."""
    value: Tensor = getattr(owner, name).detach()
    for merge in reversed(owner.__dict__.get(MERGES, ())):
        if merge.permanent:
            break
        for fold in reversed(merge.folds):
            if fold.name == name:
                value = fold.before(value)
    return value


def merges_of(owner: nn.Module) -> list[Merge]:
    """Return the merges into the weight of `owner`, a module of the base, in the order in which they were done, whatever layers did them."""
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
