"""LoRA around `nn.Linear` and transformers' transposed Linear, `Conv1D`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_core import Route, can_fuse, is_conv1d

from .. import kernels
from . import rows
from .common import LoraLayer
from .modules import dtype_of, plain_linear


class Linear(LoraLayer):
    """LoRA around `nn.Linear` or transformers' `Conv1D`.

    Shapes, with the base weight viewed as (out, in): `lora_A.<adapter>.weight` (r, in), `lora_B.<adapter>.weight` (out, r).
    """

    containers = ("lora_A", "lora_B")
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, selection: Any) -> None:
        super().__init__(base_layer, selection)
        self._modules["lora_A"] = nn.ModuleDict()
        self._modules["lora_B"] = nn.ModuleDict()

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Return whether `module` is a Linear or a Conv1D."""
        return isinstance(module, nn.Linear) or is_conv1d(module)

    def store_factors(self, adapter: str, a: nn.Parameter, b: nn.Parameter) -> None:
        """Put A and B into plain Linears, so that they are called as in the reference implementation."""
        held = self._modules
        held["lora_A"]._modules[adapter] = plain_linear(a)  # type: ignore[union-attr]
        held["lora_B"]._modules[adapter] = plain_linear(b)  # type: ignore[union-attr]

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r)."""
        if adapter in self.tied:
            return self.tied[adapter].factors()
        down, up = self.factor_modules(adapter)
        return down.weight, up.weight  # type: ignore[return-value]

    def factor_modules(self, adapter: str) -> tuple[nn.Module, nn.Module]:
        """Return the modules of A and B."""
        held = self._modules
        return held["lora_A"]._modules[adapter], held["lora_B"]._modules[adapter]  # type: ignore[union-attr, return-value]

    def parameters_of(self, adapter: str) -> Mapping[str, nn.Parameter]:
        """Return the adapter's trainable parameters: end of the file key → parameter."""
        if adapter in self.has_variant_or_bias or self.frozen.get(adapter) or adapter in self.tied:
            return super().parameters_of(adapter)
        down, up = self.factor_modules(adapter)  # a fast path, since switching adapters calls this for every layer
        a, b = down._parameters.get("weight"), up._parameters.get("weight")
        return super().parameters_of(adapter) if a is None or b is None else {"lora_A.weight": a, "lora_B.weight": b}

    # ---- forward ----------------------------------------------------------------------------------------------------
    def fused_forward(self, x: Tensor) -> Tensor | None:
        """Return the output of base and adapter as one autograd node, if exactly one adapter acts and all modules are plain; otherwise None."""
        adapter = self.only_adapter()
        if adapter is None or adapter in self.tied:
            return None
        base: Any = self._modules["base_layer"]
        if adapter in self.has_variant_or_bias:
            variant = self.variants.get(adapter)
            return None if variant is None else variant.fused_forward(x, base)
        return self._fused_plain(adapter, x, base)

    def _fused_plain(self, adapter: str, x: Tensor, base: Any) -> Tensor | None:
        """Return base(x) + s·B(A·drop(x)) (…, out) for `x` (…, in), if all modules are plain and W and its bias are frozen; otherwise None."""
        down, up = self.factor_modules(adapter)
        dropout = self.dropout_of(adapter)
        if not (can_fuse(x, base, down, up) if dropout is None else can_fuse(x, base, down, up, dropout)):
            return None
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        a: Any = down._parameters["weight"]
        b: Any = up._parameters["weight"]
        s = self.scaling[adapter]
        if weight.dtype is not x.dtype or up._parameters["bias"] is not None:
            return None
        s = s.item() if isinstance(s, Tensor) else s  # a tensor if the model is prepared for hot-swapping; here it is not compiled
        p = dropout.p if dropout is not None and dropout.training and type(dropout) is nn.Dropout else 0.0
        if torch.is_grad_enabled():
            if weight.requires_grad or (bias is not None and bias.requires_grad):
                return None
            if a.requires_grad or b.requires_grad or x.requires_grad:
                return kernels.low_rank_linear(x, weight, bias, a, b, s, float(p))
        if not p:
            found = self.cached_merged_linear(adapter, x)
            if found is not None:
                return found
        return kernels.add_low_rank(F.linear(x, weight, bias), F.dropout(x, p) if p else x, a, b, s)

    def merged_linear(self, adapter: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight (out, in) and bias (out,) of base and adapter merged into one Linear; `weight` and `bias` are not modified."""
        variant = self.variants.get(adapter)
        if variant is None:  # one `addmm`, since this runs in each call of `generate`
            a, b = self.factors(adapter)
            merged: Tensor | None = torch.addmm(weight, b.to(weight.dtype), a.to(weight.dtype), alpha=self.scaling[adapter])
        else:
            merged = variant.merged_rows(weight)
        return super().merged_linear(adapter, weight, bias) if merged is None else (merged, self.merged_bias(adapter, bias))

    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·B(A·drop(x)), with the effect of the adapter's variant or bias if it has one, rounded once to the dtype of `y`."""
        variant = self.variants.get(adapter)
        return self.low_rank(adapter, x, y) if variant is None else variant.contribute(x, y)

    def low_rank(self, adapter: str, x: Tensor, y: Tensor, *, drop: bool = True) -> Tensor:
        """Return y + s·B(A·drop(x)), with the bias of B if it has one. ``drop=False``: no dropout is applied to `x`. `y` may be overwritten."""
        s = self.scaling[adapter]
        dropout = self.dropout_of(adapter) if drop else None
        if adapter in self.tied:
            a, b = self.factors(adapter)
            return kernels.add_product(y, x if dropout is None else dropout(x), a, b, s)
        down, up = self.factor_modules(adapter)
        plain = can_fuse(x, down, up) if dropout is None else can_fuse(x, down, up, dropout)
        if plain and up._parameters["bias"] is None:
            return kernels.add_product(y, x, down._parameters["weight"], up._parameters["weight"], s, self.drop_rate(adapter) if drop else 0.0)  # type: ignore[arg-type]
        x = self.cast_input(x, dtype_of(down, x))
        return kernels.add_scaled(y, up(down(x if dropout is None else dropout(x))), s)

    def contribute_by_row(self, route: Route, x: Tensor, y: Tensor) -> Tensor:
        """Return `y` plus, for each row, the output of the adapters that the route gives to it; plain adapters need only two batched products."""
        scope = self.selection.cache()
        if scope is not None and not self.training:
            # for 64 adapters, can_stack costs as much as the matrix products; modules do not change in a cache scope, so it is called once per scope
            stack = scope.get(
                ("stack", self, route, x.dtype, x.device),
                lambda: rows.StackedFactors(self, route, x.dtype) if rows.can_stack(self, route, x) else None,
            )
            if stack is not None and can_fuse(x):
                return stack.add(x, y)
        if not rows.can_stack(self, route, x):
            return super().contribute_by_row(route, x, y)
        assert route.per_row is not None
        adapters_by_row = [tuple(name for name in row if name in self.scaling) for row in route.per_row]
        return rows.add_by_row(x, y, *rows.stack_factors(self, adapters_by_row, x.dtype))

    def with_beta(self, adapter: str, y: Tensor) -> Tensor:
        """Return y + s·β if B has a bias β (`lora_bias`); otherwise `y`."""
        beta = self.beta(adapter)
        return y if beta is None else kernels.add_scaled(y, beta, self.scaling[adapter])
