"""Decide whether a layer may compute directly with the parameters of modules instead of calling them. Only this file decides that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from .ops import LAYER_TYPES

#: class → its original `forward`, for the classes that may be fused; a subclass, or a class with a replaced `forward`, has to be called
_FORWARDS: dict[type[nn.Module], Any] = {kind: kind.forward for kind in (nn.Linear, nn.Dropout, nn.Identity)}
_TENSORS = (Tensor, nn.Parameter)


def can_fuse(x: Tensor, *modules: nn.Module) -> bool:
    """Return whether a layer may compute with the parameters of `modules` for the input `x` instead of calling them.

    Each module has to be exactly an `nn.Linear`, `nn.Dropout` or `nn.Identity` (no subclass), with dense parameters that are not a tensor subclass,
    without hooks, and without a `forward` set on the instance. Nothing may intercept the operations: no autocast, compiler, tracer, functorch,
    forward-mode AD or dispatch mode. The answer is valid for this call only.

    Args:
        x: input of the modules, of any shape.
        modules: the modules that would be called otherwise.
    """
    if type(x) not in _TENSORS or torch._C._is_any_autocast_enabled() or is_transformed():
        return False
    return are_plain(*modules)


def are_plain(*modules: nn.Module) -> bool:
    """Return whether calling `modules` does nothing except compute with their parameters: `can_fuse` without the checks of the input and the call.

    It is meant for formulas that combine several modules in operations which autocast, compilers and transforms are allowed to intercept.
    """
    if _hooked_globally():
        return False
    for module in modules:
        state, kind = module.__dict__, type(module)
        if (
            _FORWARDS.get(kind) is not kind.forward
            or state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
        ):
            return False
        if kind is nn.Linear:
            parameters = state["_parameters"]
            weight, bias = parameters.get("weight"), parameters.get("bias")  # FSDP1 takes the weight out between calls of its module
            if type(weight) is not nn.Parameter or weight.layout is not torch.strided or weight.is_meta:
                return False
            if bias is not None and type(bias) is not nn.Parameter:
                return False
    return True


def is_observed(module: nn.Module) -> bool:
    """Return whether a module has hooks (global hooks count), or a `forward` set on the instance."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or _hooked_globally()
    )


def returns_new_tensor(module: nn.Module) -> bool:
    """Return whether a base layer returns a new tensor that no other code holds: a torch layer without hooks and without a replaced `forward`.

    The caller may then change the output in place.
    """
    return type(module) in LAYER_TYPES and not is_observed(module)


def _hooked_globally() -> bool:
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def is_transformed() -> bool:
    """Return whether something intercepts the operations of this call: a compiler, a tracer, functorch, forward-mode AD or a dispatch mode."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
    )
