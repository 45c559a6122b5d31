"""LoHa around `nn.Linear` and transformers' transposed Linear, `Conv1D`."""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_core import Watch, is_conv1d

from .. import formulas, kernels
from .common import LoHaLayer

#: from so many outputs on, transposed copies of B₁ and B₂ pay in decoding
TURN_FROM = 512


class Turned:
    """B₁ᵀ and B₂ᵀ (r, out) of one adapter, whether they still are what they were made of, and room for two intermediate results.

    The room is kept on the CPU, for the thread that came first: whoever frees 64 KiB there may have to return to the system what others freed
    before, which took longer than a layer. All layers of a thread share it.
    """

    __slots__ = ("b1t", "b2t", "room", "thread", "watch")

    def __init__(self, b1: Tensor, b2: Tensor, inputs: int) -> None:
        self.watch = Watch(b1, b2)
        with torch.inference_mode(False), torch.no_grad():
            self.b1t, self.b2t = b1.t().contiguous(), b2.t().contiguous()
            self.room = _room(self.b1t, inputs) if b1.device.type == "cpu" else None
        self.thread = threading.get_ident()

    def __reduce__(self) -> Any:
        return type(None), ()  # copies of a layer form their own


_local = threading.local()


def _room(like: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
    """Return memory of this thread for (r, in) and (r, out) numbers."""
    r, outputs = like.shape
    found: list[Tensor] = []
    for name, count in (("first", r * inputs), ("second", r * outputs)):
        memory: Tensor | None = getattr(_local, name, None)
        if memory is None or memory.numel() < count or memory.dtype is not like.dtype:
            memory = like.new_empty(count)
            setattr(_local, name, memory)
        found.append(memory[:count])
    return found[0].view(r, inputs), found[1].view(r, outputs)


class Linear(LoHaLayer):
    """LoHa around `nn.Linear` or transformers' `Conv1D`. No ΔW is formed where something else is cheaper (`formulas.Costs`)."""

    per_adapter: ClassVar[tuple[str, ...]] = (*LoHaLayer.per_adapter, "_ones", "_turned")
    keep_up_to: ClassVar[int] = 1 << 18  # 1 MiB

    def __init__(self, base_layer: nn.Module, activation: Any) -> None:
        super().__init__(base_layer, activation)
        self._ones: dict[str, Tensor] = {}
        self._turned: dict[str, Turned] = {}

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Return whether `module` is a Linear or a Conv1D."""
        return isinstance(module, nn.Linear) or is_conv1d(module)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output with the effect of the adapters in use on each row."""
        if not kernels.can_record():  # a compiled graph must not depend on the route, or it is compiled again for each
            return super().forward(x, *args, **kwargs)
        if torch.is_grad_enabled() or (not self._small and x.numel() != self.matrix_shape[1]):
            y = self._with_base(x)
            if y is not None:
                return y
        return super().forward(x, *args, **kwargs)

    def _with_base(self, x: Tensor) -> Tensor | None:
        """Return the output where one adapter acts on a plain frozen Linear: base and adapter in one. None elsewhere."""
        route = self.activation.current()
        if self.merges or route.per_row is not None or torch.is_autocast_enabled(x.device.type):
            return None
        here = [name for name in route.names if name in self.scaling]
        base = self.plain_base() if len(here) == 1 else None
        if base is None or base.weight.dtype is not x.dtype:
            return None
        adapter = here[0]
        factors = self.factors(adapter)
        record = torch.is_grad_enabled() and (x.requires_grad or any(factor.requires_grad for factor in factors))
        if not record and not self.training and x.numel() == self.matrix_shape[1]:
            return None
        if self.training:
            kept = self.dropped(adapter, x.device)
            if kept is None:
                return nn.functional.linear(x, base.weight, base.bias)
            factors = kept[0]
        return kernels.linear(x, base.weight, base.bias, factors, self.scaling[adapter], record=record)

    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·xΔWᵀ; in training with module and rank dropout."""
        if not self.training and x.numel() == self.matrix_shape[1]:
            b1, a1, b2, a2 = self.factors(adapter)
            dtype = x.dtype
            if dtype is y.dtype and dtype is b1.dtype and y.is_contiguous():
                ones, s = self._ones_for(adapter, y), self.scaling[adapter]
                if self.matrix_shape[0] < TURN_FROM or not kernels.can_record() or torch.is_grad_enabled():
                    return formulas.add_applied_to_one(y, s, x, b1, a1, b2, a2, ones)
                turned = self._turned.get(adapter)
                if turned is None or not turned.watch.holds((b1, b2)):
                    turned = self._turned[adapter] = Turned(b1, b2, a1.shape[1])
                room = turned.room if turned.thread == threading.get_ident() else None
                return formulas.add_applied_to_one_across(y, s, x, turned.b1t, a1, turned.b2t, a2, ones, room)
        compiling = torch.compiler.is_compiling()
        factors, stays = self.factors(adapter), None
        if self.training:
            kept = self.dropped(adapter, x.device)
            if kept is None:
                return y
            factors, stays = kept
        if stays is not None:
            factors = (factors[0] * stays, *factors[1:])
        return formulas.add_applied(y, self.scaling[adapter], x, factors, fixed=compiling)

    def forget(self) -> None:
        """Drop everything that was computed once from weights."""
        super().forget()
        self._turned = {}

    def _ones_for(self, adapter: str, y: Tensor) -> Tensor:
        ones = self._ones.get(adapter)
        if ones is None or ones.dtype is not y.dtype or ones.device != y.device:
            with torch.inference_mode(False):
                ones = self._ones[adapter] = y.new_ones(self.r[adapter])
        return ones
