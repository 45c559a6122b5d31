"""How the weights of a new adapter are made."""

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
    """How the weights of a new adapter are made.

    Args:
        meta: on the meta device, without storage, because a file will supply them.
        autocast: keep half-precision weights in float32.
        initialise: draw initial values; False when a file will overwrite all of them.
        from_file: tensors come from a file, which may lack some, so that initial values are drawn all the same.
        base_dtype, device: of the base layer; a layer that an adapter is attached to fills them in.
    """

    meta: bool = False
    autocast: bool = True
    initialise: bool = True
    from_file: bool = False
    base_dtype: torch.dtype = torch.float32
    device: torch.device = _CPU

    @property
    def continues(self) -> bool:
        """Whether the adapter is one that was created before, and its tensors are on their way: what changed its base then has to be repeated."""
        return self.from_file or self.meta or not self.initialise

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the adapter's parameters: float32, or the base's where autocasting is off or the base has float64."""
        return self.base_dtype if self.base_dtype == torch.float64 or (self.base_dtype in _HALF and not self.autocast) else torch.float32

    def new_parameter(self, shape: Sequence[int], fill: Callable[[Tensor], Any]) -> nn.Parameter:
        """Return a frozen parameter: filled in float32 (or float64), rounded to the base's dtype, then cast to `dtype`.

        Args:
            shape: its shape.
            fill: fills a tensor in place.
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
        """Return a frozen parameter with a computed `value`, rounded to `dtype` alone."""
        # strides of its own: a column cut out of a matrix counts as contiguous, but is multiplied, and rounded, in another way
        tensor = torch.empty(value.shape, dtype=self.dtype, device="meta" if self.meta else self.device)
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
