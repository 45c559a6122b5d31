"""LoRA around a Linear whose weight is not kept as floating-point numbers: what does not depend on the library."""

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
    """A weight as a library keeps it, by reference.

    Args:
        tensor: what the base has under the name of its weight: a parameter or a buffer.
        rest: what belongs to it elsewhere (scales that the library moves about), by name.
    """

    tensor: Tensor
    rest: dict[str, Any]


@dataclass(frozen=True)
class RoundingError:
    """How far quantising anew has moved a merged weight W'.

    Args:
        of_weight: ‖Q(W') − W'‖ / ‖W'‖.
        of_change: ‖Q(W') − W'‖ / ‖W' − W‖: at 1 as much was lost as the adapters had changed.
    """

    of_weight: float
    of_change: float


class RequantisingMerging(LoraMerging):
    """Merging into a packed weight: the changed weight is packed anew, and the packed original is the way back."""

    def weight_fold(self, change: Change, instead: str = "") -> Requantised:
        """Return what makes `change` in the packed weight, nothing done yet."""
        return Requantised(self.layer, change)


class QuantisedLinear(Linear):
    """LoRA around a quantised Linear: y = base(x) + s·B(A·drop(x)). The adapter is in floating point, the base stays as it is.

    Merging unpacks W, changes it and packs it anew with the settings that it had: not exact, `rounding_error` says how far off. The packed
    original is kept meanwhile, so that unmerging is exact. Several merges are one rounding of the sum and not one each.

    A backend says `packed`, `put`, `unpack` and `pack`.
    """

    library: ClassVar[str] = ""
    merging_type = RequantisingMerging

    # ---- what a backend says --------------------------------------------------------------------------------------
    def packed(self) -> Packed:
        """Return the weight as the base has it now, nothing copied."""
        stored: Tensor = getattr(self.get_base_layer(), self.weight_name)
        return Packed(stored, {})

    def put(self, packed: Packed) -> None:
        """Give the base a packed weight."""
        base = self.get_base_layer()
        if self.weight_name in base._buffers:
            base._buffers[self.weight_name] = packed.tensor.detach()
        else:
            base._parameters[self.weight_name] = packed.tensor if isinstance(packed.tensor, nn.Parameter) else nn.Parameter(packed.tensor, False)

    def unpack(self, packed: Packed) -> Tensor:
        """Return the matrix (out, in) that a packed weight stands for, in float32."""
        raise NotImplementedError(f"{type(self).__name__} must define unpack(packed)")

    def pack(self, matrix: Tensor) -> Packed:
        """Return a matrix (out, in) packed with the settings that the base's weight has. Changes nothing.

        Raises:
            MergeError: it can't be packed.
        """
        raise NotImplementedError(f"{type(self).__name__} must define pack(matrix)")

    # ---- the weight -------------------------------------------------------------------------------------------------
    def base_weight(self) -> Tensor:
        """Return the base weight as it is when nothing is merged: unpacked, (out, in), float32."""
        for merge in self.get_base_layer().__dict__.get(MERGES, ()):
            fold = merge.folds[0]
            if not merge.permanent and isinstance(fold, Requantised) and fold.kept is not None:
                return self.unpack(fold.kept)
        return self.unpack(self.packed())

    # ---- merging ----------------------------------------------------------------------------------------------------
    @property
    def rounding_error(self) -> RoundingError | None:
        """How far the merged weight is from what it should be; None if nothing is merged."""
        fold = self.merging.merges[-1].folds[0] if self.merged else None
        return fold.error if isinstance(fold, Requantised) else None


class Requantised(Fold):
    """One change of a packed weight, and the way back: the packed original, kept aside.

    Attributes:
        kept: the weight before the change; None before it is made.
        error: what packing cost.
    """

    def __init__(self, layer: QuantisedLinear, change: Any) -> None:
        super().__init__(layer.get_base_layer(), layer.weight_name, change)
        self.layer = layer
        self.kept: Packed | None = None
        self.error: RoundingError | None = None

    def prepare(self) -> Tensor:
        """Return the changed matrix (out, in) in float32, not rounded yet, without touching anything."""
        with torch.no_grad():
            return self.change.apply(self._exact()).float()

    def put(self, merged: Tensor) -> None:
        """Pack the changed matrix, and put it in place."""
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
        """Give the base what it had."""
        assert self.kept is not None
        self.layer.put(self.kept)
        self.kept = self.error = None

    def before(self, merged: Tensor) -> Tensor:
        """Return the packed weight that was there before."""
        return merged if self.kept is None else self.kept.tensor.detach()

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for the way back."""
        return 0 if self.kept is None else self.kept.tensor.nbytes

    def _exact(self) -> Tensor:
        """Return the matrix with all that is merged already, each change made on unrounded numbers."""
        matrix = self.layer.base_weight()
        for merge in self.owner.__dict__.get(MERGES, ()):
            fold = merge.folds[0]
            if not merge.permanent and isinstance(fold, Requantised):
                matrix = fold.change.apply(matrix)
        return matrix


def tell_errors(model: nn.Module) -> None:
    """Warn how far quantising anew has moved the weights of a model into which adapters were just merged; nothing if none is quantised."""
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
