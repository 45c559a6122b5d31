"""LoRA around the 8-bit and 4-bit Linears of bitsandbytes."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import MergeError

from .base import Packed, QuantisedLinear

#: the library; imported by name, because it may be missing where the type checker runs
bnb: Any = importlib.import_module("bitsandbytes")


def make(base: nn.Module, selection: Any) -> QuantisedLinear | None:
    """Return the adapter layer for a quantised layer of bitsandbytes; None for all other modules, also for 8-bit layers with `has_fp16_weights`."""
    if isinstance(base, bnb.nn.Linear8bitLt):
        return None if base.state.has_fp16_weights else Linear8bitLt(base, selection)
    return Linear4bit(base, selection) if isinstance(base, bnb.nn.Linear4bit) else None


def _require_quantised(ready: bool, layer: QuantisedLinear) -> None:
    if not ready:
        raise MergeError(
            f"the {type(layer.get_base_layer()).__name__} is not quantised yet: bitsandbytes does that when it is moved to a device",
            hint="call model.to('cpu'), or another device, first",
        )


class Linear8bitLt(QuantisedLinear):
    """LoRA around `bitsandbytes.nn.Linear8bitLt`: an int8 weight with one scale per output row, W = codes · scale / 127."""

    library = "bitsandbytes"

    def packed(self) -> Packed:
        """Return the codes and their scales, which are attributes of the parameter at first, and of `state` after the layer's first forward."""
        base: Any = self.get_base_layer()
        weight, state = base.weight, base.state
        return Packed(weight, {"CB": weight.CB, "SCB": weight.SCB, "state.CB": state.CB, "state.SCB": state.SCB})

    def put(self, packed: Packed) -> None:
        """Set the base's weight to a quantised weight, together with the scales."""
        super().put(packed)
        base: Any = self.get_base_layer()
        base.weight.CB, base.weight.SCB = packed.rest["CB"], packed.rest["SCB"]
        base.state.CB, base.state.SCB = packed.rest["state.CB"], packed.rest["state.SCB"]

    def unpack(self, packed: Packed) -> Tensor:
        """Return the dequantised weight codes · scale / 127, (out, in).

        Raises:
            MergeError: the weight is not quantised yet.
        """
        scales = packed.rest["SCB"] if packed.rest["SCB"] is not None else packed.rest["state.SCB"]
        _require_quantised(scales is not None and packed.tensor.dtype == torch.int8, self)
        codes = packed.tensor.detach().as_subclass(Tensor)
        found: Tensor = codes.float() * (scales.float() / 127).to(codes.device)[:, None]
        return found

    def pack(self, matrix: Tensor) -> Packed:
        """Return a matrix (out, in), quantised to int8 with one scale per row.

        Raises:
            MergeError: a value is too large for float16, to which bitsandbytes converts before it quantises.
        """
        if matrix.abs().amax() > torch.finfo(torch.float16).max:
            raise MergeError("the merged weight has numbers that float16 does not hold, through which bitsandbytes quantises to 8 bits")
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(matrix.to(torch.float16).contiguous())
        parameter = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False)
        return Packed(parameter, {"CB": codes, "SCB": scales, "state.CB": None, "state.SCB": None})


class Linear4bit(QuantisedLinear):
    """LoRA around `bitsandbytes.nn.Linear4bit` (NF4, FP4): 4-bit codes in blocks, two codes in one byte, one scale per block."""

    library = "bitsandbytes"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output with the adapters in use applied to each row of the batch."""
        base: Any = self.get_base_layer()
        if base.training or (x.requires_grad and torch.is_grad_enabled()):
            weight = base.weight
            if _is_reordered(weight.quant_state):  # by an earlier call in evaluation mode; bitsandbytes has no backward for this order
                weight.data, weight.quant_state = _in_usual_order(weight.data, weight.quant_state)
                base.quant_state = weight.quant_state
        return super().forward(x, *args, **kwargs)

    def put(self, packed: Packed) -> None:
        """Set the base's weight to a quantised weight; the base's `quant_state`, which holds the scales, is set as well."""
        super().put(packed)
        base: Any = self.get_base_layer()
        base.quant_state = packed.tensor.quant_state  # type: ignore[attr-defined]

    def unpack(self, packed: Packed) -> Tensor:
        """Return the dequantised weight (out, in) in float32.

        Raises:
            MergeError: the weight is not quantised yet.
        """
        weight: Any = packed.tensor
        codes, state = weight.detach().as_subclass(Tensor), weight.quant_state
        _require_quantised(state is not None, self)
        if _is_reordered(state):
            codes, state = _in_usual_order(codes, copy.deepcopy(state))
        found: Tensor = bnb.functional.dequantize_4bit(codes, state)
        return found.float()

    def pack(self, matrix: Tensor) -> Packed:
        """Return a matrix (out, in), quantised with the quantisation type, block size and storage dtype of the base's weight."""
        weight: Any = self.packed().tensor
        state = weight.quant_state
        codes, fresh = bnb.functional.quantize_4bit(
            matrix.to(getattr(state, "original_dtype", state.dtype)).contiguous(),
            blocksize=weight.blocksize,
            compress_statistics=weight.compress_statistics,
            quant_type=weight.quant_type,
            quant_storage=weight.quant_storage,
        )
        parameter = bnb.nn.Params4bit(
            codes,
            requires_grad=False,
            quant_state=fresh,
            blocksize=weight.blocksize,
            compress_statistics=weight.compress_statistics,
            quant_type=weight.quant_type,
            quant_storage=weight.quant_storage,
            module=self.get_base_layer(),
            bnb_quantized=True,
        )
        return Packed(parameter, {})


def _is_reordered(state: Any) -> bool:
    """Return whether bitsandbytes has reordered the codes for AVX-512 BF16, which it does in a layer's first forward in evaluation mode."""
    return getattr(state, "packing_format_for_cpu", False)


def _in_usual_order(codes: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Return codes and scales in the order in which bitsandbytes quantises; `state` is changed in place."""
    scales = state.absmax
    codes, state = bnb.functional._convert_weight_packed_for_cpu_inverse(codes, state)
    if not state.nested:  # bitsandbytes 0.50 does not convert these scales back
        state.absmax = scales.T.reshape(-1).float()
    return codes, state
