"""Options for creating the weights of a new adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class InitOptions:
    """Options for creating the weights of a new adapter.

    Args:
        meta: create the weights on the meta device, without storage, because their values will be loaded from a file.
        autocast: store the adapter's weights in float32 where the base has half precision.
        initialise: draw initial values; False when a file will overwrite all weights.
        from_file: the weights will be loaded from a file in which some may be missing, so that initial values are still drawn.
        base_dtype, device: dtype and device of the base layer; set by the layer when an adapter is attached to it.
    """

    meta: bool = False
    autocast: bool = True
    initialise: bool = True
    from_file: bool = False
    base_dtype: torch.dtype = torch.float32
    device: torch.device = _CPU

    @property
    def continues(self) -> bool:
        """Whether the adapter already exists and is being loaded: changes that its creation made to the base must then be repeated."""
        return self.from_file or self.meta or not self.initialise

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the adapter's parameters: float32; the base's dtype if that is float64, or if it is half precision and `autocast` is off."""
        return self.base_dtype if self.base_dtype == torch.float64 or (self.base_dtype in _HALF and not self.autocast) else torch.float32

    def new_parameter(self, shape: Sequence[int], fill: Callable[[Tensor], Any]) -> nn.Parameter:
        """Return a frozen parameter: initialised in float32 (or float64), rounded to a half-precision base's dtype, then cast to `dtype`.

        Args:
            shape: shape of the parameter.
            fill: function that initialises a tensor in place.
        """
        if self.meta:
            return nn.Parameter(torch.empty(tuple(shape), dtype=self.dtype, device="meta"), requires_grad=False)
        wide = torch.float64 if self.base_dtype == torch.float64 else torch.float32
        tensor = torch.empty(tuple(shape), dtype=wide, device=self.device)
        if self.initialise:
            with torch.no_grad():
                fill(tensor)
        return nn.Parameter(tensor.to(self.base_dtype).to(self.dtype) if self.base_dtype in _HALF else tensor, requires_grad=False)

    def parameter_of(self, value: Tensor) -> nn.Parameter:
        """Return a frozen parameter with the given `value`, cast directly to `dtype`, without rounding to the base's dtype first."""
        # with fresh strides: a column sliced from a matrix counts as contiguous, but is multiplied by another kernel, which rounds differently
        tensor = torch.empty(value.shape, dtype=self.dtype, device="meta" if self.meta else self.device)
        return nn.Parameter(tensor if self.meta else tensor.copy_(value.detach()), requires_grad=False)


#: the options for a new adapter that is not loaded from a file
INITIAL = InitOptions()


def filler(std: float | None, bound: float | None, init: Callable[[Tensor], Any] | None) -> Callable[[Tensor], Any]:
    """Return the function that initialises a tensor in place: `init` itself, uniform on ±bound, normal with a standard deviation, or zeros."""
    if init is not None:
        return init
    if bound is not None:
        return lambda tensor: tensor.uniform_(-bound, bound)
    return lambda tensor: tensor.normal_(std=std) if std else tensor.zero_()
