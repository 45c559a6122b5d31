"""Switching off the cast of inputs to the dtype of adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from .adapter_layer import AdapterLayer


@contextlib.contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Inside the block, layers hand inputs to their adapters in the dtype in which they come.

    For hooks that cast weights when a layer is called. LoRA's layers never cast inputs: they cast A and B.

    Args:
        model: a model with adapters, or a part of one.
        active: False: do nothing.
    """
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer) and module.casts_input] if active else []
    for layer in layers:
        layer.casts_input = False
    try:
        yield
    finally:
        for layer in layers:
            del layer.casts_input  # the class says True
