"""Reading and writing the weight of a base, which may be computed by its module or offloaded by accelerate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..errors import MergeError, ModelError

#: attribute of a module whose weight is merged
MERGES = "_peft_merges"
#: attribute of a module under which accelerate keeps its hook
HOOK = "_hf_hook"
#: attributes of a module that belong to accelerate's hook
_HOOKED = (HOOK, "_old_forward", "forward")


def is_offloaded(module: nn.Module) -> bool:
    """Return whether accelerate has a hook on a module: its parameters may be on meta outside of its forward."""
    return HOOK in module.__dict__


@contextlib.contextmanager
def in_memory(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block, the parameters of those `modules` that accelerate offloads are in memory, as in their own forward."""
    with contextlib.ExitStack() as after:
        for module in modules:
            if is_offloaded(module):
                hook = module.__dict__[HOOK]
                hook.pre_forward(module)
                after.callback(hook.post_forward, module, None)
        yield


@contextlib.contextmanager
def without_offloading(module: nn.Module) -> Iterator[None]:
    """Inside the block, all parameters of `module` are in memory, and accelerate's hooks are off: what is copied then is a module like any other."""
    hooked = [part for part in module.modules() if is_offloaded(part)]
    with in_memory(hooked), contextlib.ExitStack() as after:
        for part in hooked:
            after.callback(part.__dict__.update, {name: part.__dict__.pop(name) for name in _HOOKED if name in part.__dict__})
        yield


def read_weight(base: nn.Module, name: str) -> Tensor:
    """Return the weight `name` as a call of `base` would use it now, in its own layout; not to be written to.

    Weights that forward pre-hooks compute (`weight_norm`, `spectral_norm`, pruning) are computed anew, and offloaded ones are brought into memory.
    """
    for hook in base._forward_pre_hooks.values():
        computed: Any = hook
        if isinstance(hook, SpectralNorm) and hook.name == name:
            with torch.no_grad():  # without the power iteration of a call in training, which would change the module
                found: Tensor = computed.compute_weight(base, do_power_iteration=False)
            return found
        if (isinstance(hook, WeightNorm) and hook.name == name) or (isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name):
            computed(base, None)
    weight: Tensor = getattr(base, name)
    if weight.is_meta and is_offloaded(base):
        with in_memory((base,)):
            weight = getattr(base, name)
    return weight


def execution_device(base: nn.Module, name: str) -> torch.device:
    """Return the device on which `base` computes with its weight `name`: that of the weight, unless accelerate offloads it."""
    weight: Tensor = getattr(base, name)
    hook: Any = base.__dict__.get(HOOK) if weight.is_meta else None
    device = getattr(hook, "execution_device", None)
    return weight.device if device is None else torch.device(device)


def require_writable(base: nn.Module, name: str, instead: str = "use the adapter unmerged") -> nn.Parameter:
    """Return the parameter `name` of a base, which may be written to. `instead`: what somebody can do otherwise, for the message.

    Raises:
        MergeError: its module computes it, or it is sharded or offloaded.
    """
    weight = base._parameters.get(name)
    if weight is None:
        raise MergeError(
            f"{name!r} of this {type(base).__name__} is computed (weight_norm, a parametrisation, pruning) or sharded: there is no "
            "weight to write to",
            hint=f"make it a parameter first (remove_parametrizations, remove_weight_norm, prune.remove), or {instead}",
            code="weight-is-computed",
        )
    if weight.is_meta and is_offloaded(base):
        raise MergeError(
            f"{name!r} of this {type(base).__name__} is offloaded by accelerate and is not in memory",
            hint=f"load the base without offloading, or {instead}",
            code="weight-is-offloaded",
        )
    return weight


def write_weight(base: nn.Module, name: str, value: Tensor) -> None:
    """Write `value` into the weight `name` of a base, in place.

    Raises:
        MergeError: the weight is computed, sharded or offloaded.
        ModelError: the shape is another.
    """
    weight = require_writable(base, name)
    if value.shape != weight.shape:
        raise ModelError(f"the base weight has the shape {tuple(weight.shape)}, and the given one {tuple(value.shape)}")
    with torch.no_grad():
        weight.copy_(value)
