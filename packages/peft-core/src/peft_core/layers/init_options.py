"""How the weights of a new adapter are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class InitOptions:
    """How the weights of a new adapter are made.

    Args:
        meta: on the meta device, without storage, because a file will supply them.
        autocast: keep half-precision weights in float32.
        initialise: draw initial values; False when a file will overwrite them.
    """

    meta: bool = False
    autocast: bool = True
    initialise: bool = True

    def parameter_dtype(self, base: torch.dtype) -> torch.dtype:
        """Return the dtype of a new adapter's parameters around a base of dtype `base`: float32, or the base's where autocasting is off."""
        return base if base == torch.float64 or (base in _HALF and not self.autocast) else torch.float32

    def make(self, shape: Sequence[int], fill: Callable[[Tensor], Any], base: torch.dtype, device: torch.device) -> nn.Parameter:
        """Return a frozen parameter: filled in float32, rounded to the base's dtype, then in that of the adapter.

        Args:
            shape: its shape.
            fill: fills a tensor in place.
            base: dtype of the base.
            device: device of the base.
        """
        dtype = self.parameter_dtype(base)
        if self.meta:
            return nn.Parameter(torch.empty(tuple(shape), dtype=dtype, device="meta"), requires_grad=False)
        tensor = torch.empty(tuple(shape), dtype=torch.float64 if base == torch.float64 else torch.float32, device=device)
        if self.initialise:
            with torch.no_grad():
                fill(tensor)
        return nn.Parameter(tensor.to(base).to(dtype) if base in _HALF else tensor, requires_grad=False)

    def hold(self, value: Tensor, base: torch.dtype, device: torch.device) -> nn.Parameter:
        """Return a frozen parameter with a computed `value`, in the adapter's dtype. `base` and `device` as in `make`."""
        # strides of its own: a column cut out of a matrix counts as contiguous, but is multiplied, and rounded, in another way
        tensor = torch.empty(value.shape, dtype=self.parameter_dtype(base), device="meta" if self.meta else device)
        return nn.Parameter(tensor if self.meta else tensor.copy_(value.detach()), requires_grad=False)


#: a new adapter with initial values
INITIAL = InitOptions()


def filler(std: float | None, bound: float | None, init: Callable[[Tensor], Any] | None) -> Callable[[Tensor], Any]:
    """Return the function that initialises a tensor in place: `init` itself, uniform on ±bound, normal with a standard deviation, or zeros."""
    if init is not None:
        return init
    if bound is not None:
        return lambda tensor: tensor.uniform_(-bound, bound)
    return lambda tensor: tensor.normal_(std=std) if std else tensor.zero_()
