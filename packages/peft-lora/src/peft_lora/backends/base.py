"""LoRA around a Linear with a quantised weight: the code that is the same for all quantisation libraries."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_core import MERGES, Fold, PeftWarning
from peft_core.merging.exact import Change

from ..layers.common import LoraMerging
from ..layers.linear import Linear


@dataclass(frozen=True)
class Packed:
    """A quantised weight as a library stores it; the tensors are references, not copies.

    Args:
        tensor: the base's parameter or buffer with the name of the weight.
        rest: name → other data of this weight that the library stores in other places (scales, for example).
    """

    tensor: Tensor
    rest: dict[str, Any]


@dataclass(frozen=True)
class RoundingError:
    """The error that quantising again causes in a merged weight W'; Q(W') is the quantised W'.

    Args:
        of_weight: ‖Q(W') − W'‖ / ‖W'‖.
        of_change: ‖Q(W') − W'‖ / ‖W' − W‖; 1 means that the error is as large as the change that the adapters made.
    """

    of_weight: float
    of_change: float


class RequantisingMerging(LoraMerging):
    """Merges into a quantised weight: quantises the changed weight again, and stores the original quantised weight for unmerging."""

    def weight_fold(self, change: Change, instead: str = "") -> Requantised:
        """Return the object that will apply `change` to the quantised weight; nothing is changed yet."""
        return Requantised(self.layer, change)


class QuantisedLinear(Linear):
    """LoRA around a quantised Linear: y = base(x) + s·B(A·drop(x)). The adapter is in floating point; the base is not changed.

    Merging dequantises W, changes it and quantises it again with the same settings. This is not exact; `rounding_error` is the error. The original
    quantised weight is stored as long as the merge lasts, so unmerging is exact. With several merges, the sum of all changes is rounded once.

    A subclass for a library (backend) overrides `packed`, `put`, `unpack` and `pack` where needed.
    """

    library: ClassVar[str] = ""
    merging_type = RequantisingMerging

    # ---- what a backend overrides ---------------------------------------------------------------------------------
    def packed(self) -> Packed:
        """Return the base's present weight, without copying it."""
        stored: Tensor = getattr(self.get_base_layer(), self.weight_name)
        return Packed(stored, {})

    def put(self, packed: Packed) -> None:
        """Set the base's weight to a quantised weight."""
        base = self.get_base_layer()
        if self.weight_name in base._buffers:
            base._buffers[self.weight_name] = packed.tensor.detach()
        else:
            base._parameters[self.weight_name] = packed.tensor if isinstance(packed.tensor, nn.Parameter) else nn.Parameter(packed.tensor, False)

    def unpack(self, packed: Packed) -> Tensor:
        """Return a quantised weight, dequantised to a float32 matrix (out, in)."""
        raise NotImplementedError(f"{type(self).__name__} must define unpack(packed)")

    def pack(self, matrix: Tensor) -> Packed:
        """Return a matrix (out, in), quantised with the settings of the base's weight. Changes nothing.

        Raises:
            MergeError: the matrix can't be quantised.
        """
        raise NotImplementedError(f"{type(self).__name__} must define pack(matrix)")

    # ---- the weight -------------------------------------------------------------------------------------------------
    def base_weight(self) -> Tensor:
        """Return the base weight without merged adapters, dequantised to a float32 matrix (out, in)."""
        for merge in self.get_base_layer().__dict__.get(MERGES, ()):
            fold = merge.folds[0]
            if not merge.permanent and isinstance(fold, Requantised) and fold.kept is not None:
                return self.unpack(fold.kept)
        return self.unpack(self.packed())

    # ---- merging ----------------------------------------------------------------------------------------------------
    @property
    def rounding_error(self) -> RoundingError | None:
        """The error of the merged weight, caused by quantising it again; None if nothing is merged."""
        fold = self.merging.merges[-1].folds[0] if self.merged else None
        return fold.error if isinstance(fold, Requantised) else None


class Requantised(Fold):
    """One change of a quantised weight. It stores the original quantised weight, so that the change can be undone.

    Attributes:
        kept: the quantised weight before the change; None if the change is not applied.
        error: the error from quantising the changed weight; None if the change is not applied.
    """

    def __init__(self, layer: QuantisedLinear, change: Any) -> None:
        super().__init__(layer.get_base_layer(), layer.weight_name, change)
        self.layer = layer
        self.kept: Packed | None = None
        self.error: RoundingError | None = None

    def prepare(self) -> Tensor:
        """Return the changed matrix (out, in) in float32, not quantised yet. Changes nothing."""
        with torch.no_grad():
            return self.change.apply(self._exact()).float()

    def put(self, merged: Tensor) -> None:
        """Quantise the changed matrix `merged` (out, in), and set it as the base's weight."""
        layer = self.layer
        with torch.no_grad():
            before = self._exact()
            packed = layer.pack(merged)
            lost = torch.linalg.vector_norm(layer.unpack(packed) - merged)
            of = (torch.linalg.vector_norm(merged), torch.linalg.vector_norm(merged - before))
            self.error = RoundingError(*(float(lost / total) if total else 0.0 for total in of))
            self.kept = layer.packed()
            layer.put(packed)

    def undo(self) -> None:
        """Set the base's weight to the original quantised weight."""
        assert self.kept is not None
        self.layer.put(self.kept)
        self.kept = self.error = None

    def before(self, merged: Tensor) -> Tensor:
        """Return the quantised weight from before the change; `merged` if the change is not applied."""
        return merged if self.kept is None else self.kept.tensor.detach()

    @property
    def nbytes(self) -> int:
        """Size in bytes of the original quantised weight that is stored for unmerging."""
        return 0 if self.kept is None else self.kept.tensor.nbytes

    def _exact(self) -> Tensor:
        """Return the float32 matrix (out, in) with all changes that are merged already, computed without rounding between the changes."""
        matrix = self.layer.base_weight()
        for merge in self.owner.__dict__.get(MERGES, ()):
            fold = merge.folds[0]
            if not merge.permanent and isinstance(fold, Requantised):
                matrix = fold.change.apply(matrix)
        return matrix


def tell_errors(model: nn.Module) -> None:
    """Warn about the quantisation errors in a model into which adapters were just merged; no warning if no merged weight is quantised."""
    errors = {
        name: error for name, module in model.named_modules() if isinstance(module, QuantisedLinear) and (error := module.rounding_error) is not None
    }
    if not errors:
        return
    worst = max(errors, key=lambda name: errors[name].of_change)
    mean = sum(error.of_weight for error in errors.values()) / len(errors)
    warnings.warn(
        f"merged into {len(errors)} quantised weights, which had to be rounded again: they are {mean:.2%} off on average; in the worst case, "
        f"{worst!r}, what is lost is {errors[worst].of_change:.2f} times what the adapters change. unmerge_adapter() gives the base back exactly; "
        "unmerged adapters are exact, too",
        PeftWarning,
        stacklevel=2,
    )
