"""How the weights of a new adapter are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


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


#: a new adapter with initial values
INITIAL = InitOptions()


def filler(std: float | None, bound: float | None, init: Callable[[Tensor], Any] | None) -> Callable[[Tensor], Any]:
    """Return the function that initialises a tensor in place: `init` itself, uniform on ±bound, normal with a standard deviation, or zeros."""
    if init is not None:
        return init
    if bound is not None:
        return lambda tensor: tensor.uniform_(-bound, bound)
    return lambda tensor: tensor.normal_(std=std) if std else tensor.zero_()
