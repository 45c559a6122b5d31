"""LoRA around `nn.Linear` and transformers' transposed Linear, `Conv1D`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_core import Route, is_conv1d

from .. import kernels
from . import rows
from .common import LoraLayer, add_scaled, plain_linear

#: where a layer keeps what it stacked for the last route; no adapter can be called so
ROWS = "rows."


class Factors(nn.ModuleDict):
    """A or B of each adapter. The layer looks past this dictionary on its way to them, and is told when somebody puts another module in."""

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a part of this one, but the other way round

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Put a module in."""
        super().add_module(name, module)
        self.__dict__["layer"].look_again(name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__dict__.get("_modules", ()):
            self.__dict__["layer"].look_again(name)

    def _get_name(self) -> str:
        return "ModuleDict"


class Linear(LoraLayer):
    """LoRA around `nn.Linear` or transformers' `Conv1D`.

    Shapes, with the base weight seen as (out, in): `lora_A.<adapter>.weight` (r, in), `lora_B.<adapter>.weight` (out, r).
    """

    containers = ("lora_A", "lora_B")
    keep_up_to: ClassVar[int] = 1 << 18  # 1 MiB
    per_adapter: ClassVar[tuple[str, ...]] = (*LoraLayer.per_adapter, "ends")

    def __init__(self, base_layer: nn.Module, activation: Any) -> None:
        super().__init__(base_layer, activation)
        self._modules["lora_A"] = Factors(self)
        self._modules["lora_B"] = Factors(self)

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    #: by adapter the dicts in which A and B are: a decode step visits each layer with cold caches, and every object on the way costs
    ends: dict[str, tuple[dict[str, Any], dict[str, Any]]]

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Return whether `module` is a Linear or a Conv1D."""
        return isinstance(module, nn.Linear) or is_conv1d(module)

    def place(self, adapter: str, a: nn.Parameter, b: nn.Parameter) -> None:
        """Put A and B into plain Linears, so that they are called as in the reference implementation."""
        down, up = plain_linear(a), plain_linear(b)
        self.lora_A._modules[adapter] = down
        self.lora_B._modules[adapter] = up
        self.look_again(adapter)

    def look_again(self, adapter: str) -> None:
        """Find the modules of A and B again, of which one is new."""
        down, up = self.lora_A._modules.get(adapter), self.lora_B._modules.get(adapter)
        if down is not None and up is not None:
            self.ends[adapter] = (down._parameters, up._parameters)
        self.forget()

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r)."""
        down, up = self.ends[adapter]
        return down["weight"], up["weight"]

    def parameters_of(self, adapter: str) -> Mapping[str, nn.Parameter]:
        """Return what trains, by the end of its file key."""
        if adapter in self.unusual or self.frozen.get(adapter) or adapter in self.tied:
            return super().parameters_of(adapter)
        down, up = self.ends[adapter]  # switching asks every layer
        return {"lora_A.weight": down["weight"], "lora_B.weight": up["weight"]}

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
        p = self.drop_rate(here[0]) if self.training else 0.0
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
        down, up = self.ends[adapter]
        a, b = down.get("weight"), up.get("weight")
        if a is None or b is None or a.dim() != 2:
            return self._by_calling(adapter, x, y, drop)
        dtype = x.dtype
        s = self.scaling[adapter]
        if isinstance(s, Tensor):  # of a compiled model whose adapters are swapped: the graph reads it anew each time
            s, b = 1.0, b * s
        p = drop and self.training and self.drop_rate(adapter)
        if not p and x.numel() == self.matrix_shape[1] and dtype is y.dtype and dtype is a.dtype and y.is_contiguous():
            # one token, as in decoding: products with a vector are cheaper than products with a matrix of one row
            y.view(-1).addmv_(b, torch.mv(a, x.view(-1)), alpha=s)
            return y
        if torch.is_grad_enabled() and kernels.can_record() and not torch.is_autocast_enabled(x.device.type):
            return kernels.record_low_rank(y, x, a, b, s, float(p))
        return kernels.add_low_rank(y, F.dropout(x, p) if p else x, a, b, s)

    def _by_calling(self, adapter: str, x: Tensor, y: Tensor, drop: bool) -> Tensor:
        """As `low_rank`, where FSDP1 has made units of A and B, whose weights are whole while their modules are called, and not otherwise."""
        down, up = self.lora_A[adapter], self.lora_B[adapter]
        p = self.drop_rate(adapter) if drop and self.training else 0.0
        x = self.cast_input(x, next(down.parameters()).dtype)
        return add_scaled(y, up(down(F.dropout(x, p) if p else x)).to(y.dtype), self.scaling[adapter])

    def contribute_by_row(self, route: Route, x: Tensor, y: Tensor) -> Tensor:
        """Return `y` with each row under the adapters that the route gives it; plain ones in two batched products."""
        kept: Any = self.kept.get(ROWS)
        if kept is not None and kept[0] is route and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            stack: rows.Stack = kept[1]
            if stack.holds(x.dtype):
                return stack.add(x, y)
        if torch.is_autocast_enabled(x.device.type) or not rows.worth_stacking(self, route):
            return super().contribute_by_row(route, x, y)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            assert route.per_row is not None
            here = [tuple(name for name in row if name in self.scaling) for row in route.per_row]
            return rows.add_by_row(x, y, *rows.stacked(self, here, x.dtype))
        stack = rows.Stack(self, route, x.dtype)
        self.kept[ROWS] = (route, stack)
        return stack.add(x, y)

    def with_beta(self, adapter: str, y: Tensor) -> Tensor:
        """Return y + s·β, where `lora_bias` gave B a bias β."""
        beta = self.beta(adapter)
        return y if beta is None else add_scaled(y, beta, self.scaling[adapter])
