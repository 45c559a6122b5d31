"""LoRA around Linears whose weight is a tensor of torchao."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import MergeError, PeftWarning

from ..contracts import LoraSettings
from .base import Packed, QuantisedLinear

#: the library; imported by name, because it may be missing where the type checker runs
ao: Any = importlib.import_module("torchao.quantization")
#: classes of quantised weights that can be created from a float matrix; other versions of torchao may lack these classes
_INT8: Any = getattr(ao, "Int8Tensor", ())
_INTX: Any = getattr(ao, "IntxUnpackedToInt8Tensor", ())


def make(base: nn.Module, selection: Any) -> QuantisedLinear | None:
    """Return the adapter layer for a Linear whose weight is a tensor of torchao; None for everything else."""
    if not isinstance(base, nn.Linear) or type(base.weight).__module__.partition(".")[0] != "torchao":
        return None
    return TorchaoLinear(base, selection)


class TorchaoLinear(QuantisedLinear):
    """LoRA around `nn.Linear` with a weight of torchao.

    Unmerged adapters work with all weight classes of torchao. Merging works for int8 (`Int8WeightOnlyConfig`) and for 1 to 8 bits stored in bytes
    (`IntxWeightOnlyConfig`, int4 on CPU), even if `quantize_` created the weight and its config is not known: the tensor holds the settings.
    """

    library = "torchao"

    def add(self, adapter: str, config: LoraSettings) -> None:
        """Create A and B, and warn if the base layer passes no gradient back to the layers before it."""
        super().add(adapter, config)
        if getattr(self.packed().tensor, "act_quant_kwargs", None) is not None:
            warnings.warn(
                f"{config.path!r} quantises its inputs, too, and torchao has no gradient for that: adapters in the layers before it learn through "
                "other ways only. For training, use a config that quantises weights only",
                PeftWarning,
                stacklevel=2,
            )

    def unpack(self, packed: Packed) -> Tensor:
        """Return the dequantised weight (out, in) in float32."""
        return packed.tensor.detach().dequantize().float()

    def pack(self, matrix: Tensor) -> Packed:
        """Return a matrix (out, in), quantised with the number of bits and the groups of the base's weight.

        Raises:
            MergeError: the base's weight has a class that this backend can't create.
        """
        weight: Any = self.packed().tensor.detach()
        numbers = matrix.to(weight.dtype)
        if isinstance(weight, _INT8):
            made = _INT8.from_hp(
                numbers,
                _granularity(weight),
                mapping_type=_mapping(weight),
                act_quant_kwargs=weight.act_quant_kwargs,
                act_quant_scale=weight.act_quant_scale,
                act_quant_zero_point=weight.act_quant_zero_point,
                act_pre_scale=weight.act_pre_scale,
                reduce_range=weight.reduce_range,
            )
        elif isinstance(weight, _INTX):
            made = _INTX.from_hp(
                numbers,
                tuple(weight.block_size),
                weight.target_dtype,
                mapping_type=_mapping(weight),
                activation_quantization=weight.activation_quantization,
            )
        else:
            raise MergeError(
                f"a {type(weight).__name__} of torchao can't be merged into: how to make one from numbers is not known here",
                hint="use the adapter unmerged, or merge it into the unquantised base and quantise that",
            )
        return Packed(nn.Parameter(made, requires_grad=False), {})


def _granularity(weight: Any) -> Any:
    out, inp = weight.shape
    block = tuple(weight.block_size)
    if block == (out, inp) and out > 1:
        return ao.PerTensor()
    return ao.PerRow() if block == (1, inp) else ao.PerGroup(block[1])


def _mapping(weight: Any) -> Any:
    zero = weight.zero_point
    return ao.MappingType.ASYMMETRIC if zero is not None and bool(torch.any(zero != 0)) else ao.MappingType.SYMMETRIC
