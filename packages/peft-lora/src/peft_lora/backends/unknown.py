"""LoRA around Linears of quantisation libraries without a backend in this package: adapters can be used and trained, but not merged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_core import MergeError

from .base import Packed, QuantisedLinear


def make(base: nn.Module, selection: Any) -> QuantisedLinear | None:
    """Return the adapter layer for a Linear whose weight is quantised: integers in a subclass of `nn.Linear`, or a tensor subclass; else None."""
    if not isinstance(base, nn.Linear):
        return None
    weight: Any = getattr(base, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    foreign = type(weight).__module__.partition(".")[0] != "torch" and hasattr(type(weight), "__tensor_flatten__")
    integers = type(base) is not nn.Linear and not weight.is_floating_point()
    return UnknownLinear(base, selection) if foreign or integers else None


class UnknownLinear(QuantisedLinear):
    """LoRA around a Linear with a quantised weight of a library that has no backend in this package."""

    def unpack(self, packed: Packed) -> Tensor:
        """Return the dequantised weight (out, in) in float32: the layer's output for the identity matrix, which needs no function of the library."""
        base: Any = self.get_base_layer()
        bias = base._parameters.get(self.bias_name)
        dtype = torch.float32 if bias is None else bias.dtype
        with torch.no_grad():
            answer: Tensor = base(torch.eye(self.matrix_shape[1], device=packed.tensor.device, dtype=dtype)).float()
            return (answer if bias is None else answer - bias.float()).T

    def pack(self, matrix: Tensor) -> Packed:
        """Raise an error, since the storage format of the weight is not known.

        Raises:
            MergeError: always.
        """
        base = self.get_base_layer()
        raise MergeError(
            f"a {type(base).__module__}.{type(base).__name__} can't be merged into: how it keeps its weight is not known here",
            hint="use the adapter unmerged, or merge it into the unquantised base and quantise that; a plugin's peft_make_layer can know it",
        )
