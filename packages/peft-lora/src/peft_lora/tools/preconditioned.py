"""Optimisers that change the gradients of A and B before each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..layers.common import LoraLayer

#: function that returns pairs of a parameter and the gradient that the next step uses for it
Changes = Callable[[], list[tuple[nn.Parameter, Tensor]]]


def pairs_of(model: nn.Module) -> Iterator[tuple[LoraLayer, str, nn.Parameter, nn.Parameter]]:
    """Yield (layer, adapter, A (r, in), B (out, r)) for each adapter in use around a layer whose weight is a matrix."""
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or layer.ops.kind not in ("linear", "conv1d"):
            continue
        for adapter in layer.selection.current().used:
            held = layer.parameters_of(adapter) if adapter in layer.scaling else {}
            # from `holders`, since `parameters_of` leaves out frozen factors
            factors = {key: getattr(module, name) for key, module, name in layer.holders(adapter)} if held else {}
            if "lora_A.weight" in factors and "lora_B.weight" in factors:
                yield layer, adapter, factors["lora_A.weight"], factors["lora_B.weight"]


def preconditioned(optimizer_cls: type[Optimizer], changes: Changes) -> Any:
    """Return a subclass of `optimizer_cls` whose `step` uses the gradients that `changes` returns; each parameter's `grad` is restored afterwards.

    Args:
        optimizer_cls: class of the optimiser.
        changes: function that is called before each step and returns (parameter, gradient) pairs.
    """

    class Preconditioned(optimizer_cls):  # type: ignore[valid-type, misc]
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            with torch.no_grad():
                changed = changes()
            before = [(parameter, parameter.grad) for parameter, _ in changed]
            try:
                for parameter, gradient in changed:
                    parameter.grad = gradient
                super().step()
            finally:
                for parameter, kept in before:
                    parameter.grad = kept
            return loss

    Preconditioned.__name__ = Preconditioned.__qualname__ = f"Preconditioned{optimizer_cls.__name__}"
    return Preconditioned


def inverse_gram(factor: Tensor, damping: float) -> Tensor:
    """Return (F·Fᵀ + damping·I)⁻¹ (r, r) of a factor F (r, n), in float32 or a wider dtype."""
    wide = factor.detach().to(torch.promote_types(factor.dtype, torch.float32))
    gram = wide @ wide.T
    gram.diagonal().add_(damping)
    found: Tensor = torch.linalg.inv(gram)
    return found
