"""LoRA around `nn.Linear` and transformers' transposed Linear, `Conv1D`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_core import is_conv1d

from .. import kernels
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

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output with the effect of the adapters in use on each row."""
        if torch.is_grad_enabled():
            y = self._with_base(x)
            if y is not None:
                return y
        return super().forward(x, *args, **kwargs)

    def _with_base(self, x: Tensor) -> Tensor | None:
        """Return the output where one plain adapter acts on a plain frozen Linear: one step in the graph for both. None elsewhere."""
        route = self.activation.current()
        if self.merges or route.per_row is not None or not kernels.can_record() or torch.is_autocast_enabled(x.device.type):
            return None
        here = [name for name in route.names if name in self.scaling]
        base = self.plain_base() if len(here) == 1 else None
        if base is None or base.weight.dtype is not x.dtype:
            return None
        if here[0] in self.unusual:
            variant = self.variants.get(here[0])
            return None if variant is None else variant.with_base(x, base)
        a, b = self.factors(here[0])
        if not (a.requires_grad or b.requires_grad or x.requires_grad):
            return None
        p = self.lora_dropout[here[0]] if self.training else 0.0
        return kernels.low_rank_linear(x, base.weight, base.bias, a, b, self.scaling[here[0]], p)

    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·B(A·drop(x)) and what the adapter does besides, rounded once to the dtype of `y`."""
        if adapter in self.unusual:
            variant = self.variants.get(adapter)
            if variant is not None:
                return variant.contribute(x, y)
            return self.with_beta(adapter, self.low_rank(adapter, x, y))
        return self.low_rank(adapter, x, y)

    def low_rank(self, adapter: str, x: Tensor, y: Tensor, *, drop: bool = True) -> Tensor:
        """Return y + s·B(A·drop(x)); without `drop`, `x` is dropped already. `y` may be overwritten."""
        # straight to the dicts: nn.Module's attribute look-up would cost as much as one of the two products
        modules = self._modules
        a: Any = modules["lora_A"]._modules[adapter]._parameters["weight"]  # type: ignore[union-attr]
        b: Any = modules["lora_B"]._modules[adapter]._parameters["weight"]  # type: ignore[union-attr]
        dtype = x.dtype
        s = self.scaling[adapter]
        p = drop and self.training and self.lora_dropout[adapter]
        if not p and x.numel() == self.matrix_shape[1] and dtype is y.dtype and dtype is a.dtype and y.is_contiguous():
            # one token, as in decoding: products with a vector are cheaper than products with a matrix of one row
            y.view(-1).addmv_(b, torch.mv(a, x.view(-1)), alpha=s)
            return y
        if torch.is_grad_enabled() and kernels.can_record() and not torch.is_autocast_enabled(x.device.type):
            return kernels.record_low_rank(y, x, a, b, s, float(p))
        return kernels.add_low_rank(y, F.dropout(x, p) if p else x, a, b, s)

    def with_beta(self, adapter: str, y: Tensor) -> Tensor:
        """Return y + s·β, where `lora_bias` gave B a bias β."""
        beta = self.beta(adapter)
        return y if beta is None else y.add_(beta, alpha=self.scaling[adapter])
