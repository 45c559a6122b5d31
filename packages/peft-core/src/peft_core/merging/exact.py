"""Merges changes into weights so that unmerging is exact, bit for bit.

The merged weight W' = round(W + Δ) loses bits of W. The loss is small: if the bit patterns of W and of round(W' − Δ) are read as integers, they are
close to each other. Their differences are stored as int8 (one byte per weight, instead of a full copy). The few differences that overflow int8 are
stored as a sparse list. If too many overflow, a full copy of W is stored instead.
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
#: if more than this fraction of the differences does not fit in int8, a full copy of the weight takes less memory
_SPARSE_SHARE = 0.15


@dataclass(frozen=True)
class Residual:
    """The integer differences between the bit patterns of W and of round(W' − Δ): added to the latter, they give W again.

    Attributes:
        small: the differences that fit in int8, in the shape of the weight; 0 where a difference does not fit.
        large_at: the flat positions of the differences that do not fit in int8.
        large: the values of those differences.
    """

    small: Tensor
    large_at: Tensor
    large: Tensor

    @property
    def nbytes(self) -> int:
        """The number of bytes that these tensors take while the change is merged."""
        return sum(t.numel() * t.element_size() for t in (self.small, self.large_at, self.large))


class Change(Protocol):
    """A change of a weight: how to apply it, and, if it is invertible, how to remove it again."""

    @property
    def additive(self) -> bool:
        """Whether the change only adds to the weight (W + Δ): then the order of merges does not matter."""
        ...

    @property
    def invertible(self) -> bool:
        """Whether `invert` returns the original weight up to rounding; if False, merging stores a copy of the weight."""
        ...

    def apply(self, weight: Tensor) -> Tensor:
        """Return the changed weight in the promoted dtype."""
        ...

    def invert(self, weight: Tensor) -> Tensor:
        """Return the weight without the change, up to rounding. Two calls with the same weight must return the same bits."""
        ...


class Fold:
    """One change of one parameter, which can be applied and undone.

    Args:
        owner: the module that has the parameter.
        name: the name of the parameter in `owner`; the parameter can have any shape.
        change: the change of the parameter.
        shared: whether the parameter also belongs to another module (tied embeddings). If so, `owner` has a separate parameter while merged.
    """

    def __init__(self, owner: nn.Module, name: str, change: Change, *, shared: bool = False) -> None:
        self.owner, self.name, self.change = owner, name, change
        self._shared = shared
        self._original: nn.Parameter | None = None
        self._residual: Residual | None = None
        self._copy: Tensor | None = None
        self._threads = torch.get_num_threads()

    def prepare(self) -> Tensor:
        """Return the merged value, in the shape of the parameter, and store what `undo` needs. Does not modify the parameter."""
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
        """Write `merged` (in the shape of the parameter) into the parameter, or, if that is shared, into a new parameter of `owner`."""
        parameter = self.owner.get_parameter(self.name)
        if self._original is not None:
            self.owner.register_parameter(self.name, nn.Parameter(merged, requires_grad=parameter.requires_grad))
            return
        with torch.no_grad():
            parameter.copy_(merged)

    def undo(self) -> None:
        """Restore the value that the parameter had before the merge."""
        if self._original is not None:
            self.owner.register_parameter(self.name, self._original)
            return
        parameter = self.owner.get_parameter(self.name)
        with torch.no_grad():
            parameter.copy_(self.before(parameter.detach()))

    def before(self, merged: Tensor) -> Tensor:
        """Return the value from before the merge, given the current value `merged`, in the same shape. Changes nothing."""
        if self._original is not None:
            return self._original.detach()
        if self._copy is not None:
            return self._copy.to(merged.device)
        threads = torch.get_num_threads()
        torch.set_num_threads(self._threads)  # another number of threads could split the matrix product, and so round Δ, differently
        try:
            plain = self.change.invert(merged).to(merged.dtype)
        finally:
            torch.set_num_threads(threads)
        if self._residual is not None and merged.dtype in _BITS:
            plain = _corrected(plain, self._residual)
        return plain

    @property
    def nbytes(self) -> int:
        """The number of bytes stored for `undo`, not counting the adapter's parameters."""
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
    """The merge of one or more adapters of one layer into its base module: one `Fold` for each parameter of the base that they change.

    Args:
        owner: the base module.
        adapters: the names of the adapters to merge.
        folds: the changes, one for each changed parameter.
        permanent: the merge is undone when the adapter is deleted, not by unmerging. For initialisations such as PiSSA, which subtract the
            initial s·B·A from the base weight.
    """

    def __init__(self, owner: nn.Module, adapters: tuple[str, ...], folds: Sequence[Fold], *, permanent: bool = False) -> None:
        self.owner, self.adapters, self.folds, self.permanent = owner, adapters, tuple(folds), permanent

    @property
    def additive(self) -> bool:
        """Whether all changes only add to their parameter (W + Δ)."""
        return all(fold.change.additive for fold in self.folds)

    @property
    def nbytes(self) -> int:
        """The number of bytes stored for `undo`."""
        return sum(fold.nbytes for fold in self.folds)

    def prepare(self, *, check_finite: bool) -> list[Tensor]:
        """Return the merged values, in the shapes of the parameters. Does not modify the parameters.

        Raises:
            MergeError: `check_finite` is True, and a merged value contains NaN or infinity.
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
        """Write `values`, which `prepare` returned, into the parameters; each has the shape of its parameter."""
        for fold, merged in zip(self.folds, values, strict=True):
            fold.put(merged)

    def undo(self) -> None:
        """Restore the parameters of the base to their values before the merge."""
        for fold in reversed(self.folds):
            fold.undo()


def pristine(owner: nn.Module, name: str = "weight") -> Tensor:
    """Return a parameter's value without the adapters that are merged now; permanent merges stay in. Detached; do not write to it."""
    value: Tensor = getattr(owner, name).detach()
    for merge in reversed(owner.__dict__.get(MERGES, ())):
        if merge.permanent:
            break
        for fold in reversed(merge.folds):
            if fold.name == name:
                value = fold.before(value)
    return value


def merges_of(owner: nn.Module) -> list[Merge]:
    """Return the merges into the base module `owner`, in the order in which they were done, whichever adapter layers did them."""
    stack: list[Merge] = owner.__dict__.setdefault(MERGES, [])
    return stack


def _difference(weight: Tensor, plain: Tensor) -> Residual | None:
    bits = _BITS[weight.dtype]
    # the difference of two int32 patterns can overflow int32 (opposite signs): subtraction and addition wrap around and still cancel exactly
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
