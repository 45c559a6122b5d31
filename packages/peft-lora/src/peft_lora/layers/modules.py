"""Helper functions to create and inspect the modules that hold A and B."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import ModelError


def dtype_of(module: nn.Module, x: Tensor) -> torch.dtype:
    """Return the dtype of a module's first parameter; the dtype of `x` if the module has no parameter."""
    return next((parameter.dtype for parameter in module.parameters()), x.dtype)


def bare(kind: type[nn.Module], **attributes: Any) -> Any:
    """Create a module with these attributes without calling its constructor, whose random initialisation would be discarded."""
    module: Any = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, value in attributes.items():
        (module._parameters if isinstance(value, nn.Parameter) else module.__dict__)[name] = value
    return module


def plain_linear(weight: nn.Parameter) -> nn.Linear:
    """Return a bias-free Linear with this weight."""
    out, inp = weight.shape
    layer: nn.Linear = bare(nn.Linear, out_features=out, in_features=inp, weight=weight)
    layer._parameters["bias"] = None
    return layer


def require_unhooked(modules: Iterable[nn.Module], owner: str) -> None:
    """Check that the weights of A and B may be read without calling the modules. `owner`: the weight to which ΔW is added, for the error message.

    Raises:
        ModelError: one of the modules has hooks, which would not be called.
    """
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise ModelError(
                f"A or B of an adapter on {owner} has hooks, but they are read and not called: their product is added to the weight",
                hint="remove the hooks, or register them on the adapted module itself",
                code="factors-are-read",
            )
