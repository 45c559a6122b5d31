"""Calling a module with other tensors in the place of its parameters, without touching it: safe while other threads use the same module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

#: attributes that lead back to the original: what accelerate and `Module.compile` put on a module
_LEADING_BACK = ("forward", "_old_forward", "_hf_hook", "_compiled_call_impl")


def shell(module: nn.Module, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module] | None = None) -> Any:
    """Return a module that computes as `module` does, but with other tensors and children. `module` is not touched, hooks on it are called.

    It is a bare object of the same class with the same state, so that subclasses with a constructor and a forward of their own keep theirs.

    Args:
        module: what to imitate.
        tensors: name of a parameter → what takes its place.
        modules: name of a child → what takes its place.
    """
    kind: type[nn.Module] = type(module)
    parameters: dict[str, Any] = {**module._parameters, **tensors}
    if parametrize.is_parametrized(module):
        # the properties that compute parametrised tensors are in a class of the module's own, before which nothing in `_parameters` counts
        kind = parametrize.type_before_parametrizations(module)
        parametrised: Any = module.parametrizations
        parameters |= {name: getattr(module, name) for name in parametrised if name not in tensors}
    twin = kind.__new__(kind)
    state = {name: value for name, value in module.__dict__.items() if name not in _LEADING_BACK}
    twin.__dict__ = {**state, "_parameters": parameters, "_modules": {**module._modules, **(modules or {})}}
    return twin


def call_with(module: nn.Module, tensors: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what `module` makes of the arguments when its parameters are `tensors`.

    Args:
        module: what to call.
        tensors: name of a parameter of the module itself → what takes its place.
        args, kwargs: of the call.
    """
    if torch.compiler.is_compiling() and not parametrize.is_parametrized(module):
        return torch.func.functional_call(module, dict(tensors), tuple(args), dict(kwargs))
    twin = shell(module, tensors)
    output = twin(*args, **kwargs)
    for name, value in twin.__dict__.items():  # what the forward sets on the module stays
        if name not in ("_parameters", "_modules") and module.__dict__.get(name, twin) is not value:
            module.__dict__[name] = value
    return output
