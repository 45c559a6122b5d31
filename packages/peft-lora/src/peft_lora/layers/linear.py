"""LoRA around `nn.Linear` and transformers' transposed Linear, `Conv1D`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_core import is_conv1d

from .common import LoraLayer, plain_linear


class Linear(LoraLayer):
    """LoRA around `nn.Linear` or transformers' `Conv1D`.

    Shapes, with the base weight seen as (out, in): `lora_A.<adapter>.weight` (r, in), `lora_B.<adapter>.weight` (out, r).
    """

    containers = ("lora_A", "lora_B")

    def __init__(self, base_layer: nn.Module, activation: Any) -> None:
        super().__init__(base_layer, activation)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Return whether `module` is a Linear or a Conv1D."""
        return isinstance(module, nn.Linear) or is_conv1d(module)

    def place(self, adapter: str, a: nn.Parameter, b: nn.Parameter) -> None:
        """Put A and B into plain Linears, so that they are called as in the reference implementation."""
        self.lora_A[adapter] = plain_linear(a)
        self.lora_B[adapter] = plain_linear(b)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r)."""
        # straight to the dicts: nn.Module's attribute look-up would cost as much as one of the two products
        modules = self._modules
        a = modules["lora_A"]._modules[adapter]._parameters["weight"]  # type: ignore[union-attr]
        b = modules["lora_B"]._modules[adapter]._parameters["weight"]  # type: ignore[union-attr]
        return a, b  # type: ignore[return-value]

    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·B(A·drop(x)): two small products and one addition into `y`, rounded once to its dtype."""
        if adapter in self.unusual:
            variant = self.variants.get(adapter)
            if variant is not None:
                return variant.contribute(x, y)
            return self.with_beta(adapter, self.low_rank(adapter, x, y))
        return self.low_rank(adapter, x, y)

    def low_rank(self, adapter: str, x: Tensor, y: Tensor, *, drop: bool = True) -> Tensor:
        """Return y + s·B(A·drop(x)); without `drop`, `x` is dropped already."""
        a, b = self.factors(adapter)
        dtype = x.dtype
        p = drop and self.training and self.lora_dropout[adapter]
        if not p and x.numel() == self.matrix_shape[1] and dtype is y.dtype and dtype is a.dtype and y.is_contiguous():
            # one token, as in decoding: products with a vector are cheaper than products with a matrix of one row
            y.view(-1).addmv_(b, torch.mv(a, x.view(-1)), alpha=self.scaling[adapter])
            return y
        if dtype is not a.dtype:
            x = self.cast_input(x, a.dtype)
        if p:
            x = F.dropout(x, p)
        return y.add_(F.linear(F.linear(x, a), b), alpha=self.scaling[adapter])

    def with_beta(self, adapter: str, y: Tensor) -> Tensor:
        """Return y + s·β, where `lora_bias` gave B a bias β."""
        beta = self.beta(adapter)
        return y if beta is None else y.add_(beta, alpha=self.scaling[adapter])
