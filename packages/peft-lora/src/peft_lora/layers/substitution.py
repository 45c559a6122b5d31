"""Calling a module with other tensors instead of its parameters, without modifying the module: safe while other threads use the same module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

#: attributes that call the original module; accelerate and `Module.compile` set them on a module
_LEADING_BACK = ("forward", "_old_forward", "_hf_hook", "_compiled_call_impl")


def shell(module: nn.Module, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module] | None = None) -> Any:
    """Return a module that computes as `module` does, but with other tensors and children. `module` is not modified; its hooks are called.

    The returned object has the same class and the same state, and is created without calling the constructor: this works for any subclass.

    Args:
        module: the module to imitate.
        tensors: name of a parameter → the tensor that replaces it.
        modules: name of a child → the module that replaces it.
    """
    kind: type[nn.Module] = type(module)
    parameters: dict[str, Any] = {**module._parameters, **tensors}
    if parametrize.is_parametrized(module):
        # a parametrised module has its own class, whose properties take precedence over `_parameters`: use the class before parametrisation
        kind = parametrize.type_before_parametrizations(module)
        parametrised: Any = module.parametrizations
        parameters |= {name: getattr(module, name) for name in parametrised if name not in tensors}
    twin = kind.__new__(kind)
    state = {name: value for name, value in module.__dict__.items() if name not in _LEADING_BACK}
    twin.__dict__ = {**state, "_parameters": parameters, "_modules": {**module._modules, **(modules or {})}}
    return twin


def call_with(module: nn.Module, tensors: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call `module` with `tensors` instead of its parameters, and return its output.

    Args:
        module: the module to call.
        tensors: name of a direct parameter of the module → the tensor that replaces it.
        args, kwargs: arguments of the call.
    """
    if torch.compiler.is_compiling() and not parametrize.is_parametrized(module):
        return torch.func.functional_call(module, dict(tensors), tuple(args), dict(kwargs))
    twin = shell(module, tensors)
    output = twin(*args, **kwargs)
    for name, value in twin.__dict__.items():  # attributes that the forward has set are copied to the module
        if name not in ("_parameters", "_modules") and module.__dict__.get(name, twin) is not value:
            module.__dict__[name] = value
    return output
