"""LoHa around `nn.Linear` and transformers' transposed Linear, `Conv1D`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_core import can_fuse, is_conv1d

from .. import formulas, kernels
from .common import LoHaLayer


class Linear(LoHaLayer):
    """LoHa around `nn.Linear` or transformers' `Conv1D`. ΔW is only computed if no other method is cheaper (`formulas.Costs`)."""

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Return whether `module` is a Linear or a Conv1D."""
        return isinstance(module, nn.Linear) or is_conv1d(module)

    def fused_forward(self, x: Tensor) -> Tensor | None:
        """Return the output of base and adapter in one fused computation, if exactly one adapter is applied to a plain Linear; otherwise None."""
        adapter = self.only_adapter()
        base: Any = self._modules["base_layer"]
        if adapter is None or not can_fuse(x, base):
            return None
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        factors: Any = self.factors(adapter)
        if weight.dtype is not x.dtype or any(type(factor) is not nn.Parameter for factor in factors):
            return None
        grad = torch.is_grad_enabled()
        if grad and (weight.requires_grad or (bias is not None and bias.requires_grad)):
            return None
        record = grad and (x.requires_grad or any(factor.requires_grad for factor in factors))
        if not (record or self.training):
            found = self.cached_merged_linear(adapter, x)
            if found is not None:
                return found
            if x.numel() == self.matrix_shape[1]:
                return self._add_to_one(adapter, nn.functional.linear(x, weight, bias), x, factors)
        if self.training:
            dropped = self.dropped(adapter, x.device)
            if dropped is None:
                return nn.functional.linear(x, weight, bias)
            factors = dropped[0]
        return kernels.linear(x, weight, bias, factors, self.scaling[adapter], record=record)

    def _add_to_one(self, adapter: str, y: Tensor, x: Tensor, factors: formulas.Factors) -> Tensor:
        """Return y + s·xΔWᵀ for a single token, without gradients, rounded once to the dtype of `y`. It may change `y` in place."""
        b1, a1, b2, a2 = factors
        s, wide = self.scaling[adapter], torch.promote_types(y.dtype, b1.dtype)
        total, x = y.to(wide), x.to(wide)
        return formulas.add_applied_to_one(total, s, x, b1, a1, b2, a2).to(y.dtype)

    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·xΔWᵀ, rounded once to the dtype of `y`; in training with module and rank dropout."""
        factors, stays = self.factors(adapter), None
        if self.training:
            dropped = self.dropped(adapter, x.device)
            if dropped is None:
                return y
            factors, stays = dropped
        if stays is not None:
            factors = (factors[0] * stays, *factors[1:])
        return formulas.add_applied(y, self.scaling[adapter], self.cast_input(x, factors[0].dtype), factors, fixed=torch.compiler.is_compiling())
