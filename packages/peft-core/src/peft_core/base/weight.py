"""Read and write the weight of a module of the base, also if the module computes it (`weight_norm`, pruning) or accelerate offloads it."""

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

#: attribute of a module of the base that records which adapters are merged into its weight
MERGES = "_peft_merges"
#: attribute of a module in which accelerate stores its hook
HOOK = "_hf_hook"
#: attributes that accelerate sets on a module together with its hook
_HOOK_ATTRIBUTES = (HOOK, "_old_forward", "forward")


def has_accelerate_hook(module: nn.Module) -> bool:
    """Return whether a module has a hook of accelerate; then its parameters may be on the meta device except during `forward`."""
    return HOOK in module.__dict__


@contextlib.contextmanager
def in_memory(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Load the offloaded parameters of `modules` into memory for the duration of the block, as accelerate does for a forward pass."""
    with contextlib.ExitStack() as cleanup:
        for module in modules:
            if has_accelerate_hook(module):
                hook = module.__dict__[HOOK]
                hook.pre_forward(module)
                cleanup.callback(hook.post_forward, module, None)
        yield


@contextlib.contextmanager
def without_offloading(module: nn.Module) -> Iterator[None]:
    """For the duration of the block, load all parameters of `module` into memory and remove accelerate's hooks, so that a copy is a plain module."""
    hooked = [part for part in module.modules() if has_accelerate_hook(part)]
    with in_memory(hooked), contextlib.ExitStack() as cleanup:
        for part in hooked:
            cleanup.callback(part.__dict__.update, {name: part.__dict__.pop(name) for name in _HOOK_ATTRIBUTES if name in part.__dict__})
        yield


def read_weight(module: nn.Module, name: str) -> Tensor:
    """Return the weight `name` that the `forward` of `module` would use now, in the layout of the module. Do not write to the returned tensor.

    Weights that forward pre-hooks compute (`weight_norm`, `spectral_norm`, pruning) are recomputed, and offloaded weights are loaded into memory.
    """
    for hook in module._forward_pre_hooks.values():
        untyped: Any = hook
        if isinstance(hook, SpectralNorm) and hook.name == name:
            with torch.no_grad():  # no power iteration, which `forward` does in training: it would change the module's buffers
                computed: Tensor = untyped.compute_weight(module, do_power_iteration=False)
            return computed
        if (isinstance(hook, WeightNorm) and hook.name == name) or (isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name):
            untyped(module, None)
    weight: Tensor = getattr(module, name)
    if weight.is_meta and has_accelerate_hook(module):
        with in_memory((module,)):
            weight = getattr(module, name)
    return weight


def execution_device(module: nn.Module, name: str) -> torch.device:
    """Return the device on which `module` computes with its weight `name`: the weight's device, or the device of accelerate's hook if offloaded."""
    weight: Tensor = getattr(module, name)
    hook: Any = module.__dict__.get(HOOK) if weight.is_meta else None
    device = getattr(hook, "execution_device", None)
    return weight.device if device is None else torch.device(device)


def require_writable(module: nn.Module, name: str, instead: str = "use the adapter unmerged") -> nn.Parameter:
    """Return the parameter `name` of a module after checking that it can be written to.

    Args:
        module: a module of the base.
        name: the parameter's name.
        instead: text for the error's hint: what the user can do instead of writing to the weight.

    Raises:
        MergeError: the weight is computed by the module, sharded or offloaded.
    """
    weight = module._parameters.get(name)
    if weight is None:
        raise MergeError(
            f"{name!r} of this {type(module).__name__} is computed (weight_norm, a parametrisation, pruning) or sharded: there is no "
            "weight to write to",
            hint=f"make it a parameter first (remove_parametrizations, remove_weight_norm, prune.remove), or {instead}",
            code="weight-is-computed",
        )
    if weight.is_meta and has_accelerate_hook(module):
        raise MergeError(
            f"{name!r} of this {type(module).__name__} is offloaded by accelerate and is not in memory",
            hint=f"load the base without offloading, or {instead}",
            code="weight-is-offloaded",
        )
    return weight


def write_weight(module: nn.Module, name: str, value: Tensor) -> None:
    """Write `value` into the weight `name` of a module of the base, in place.

    Raises:
        MergeError: the weight is computed, sharded or offloaded.
        ModelError: the shape of `value` differs from the shape of the weight.
    """
    weight = require_writable(module, name)
    if value.shape != weight.shape:
        raise ModelError(f"the base weight has the shape {tuple(weight.shape)}, and the given one {tuple(value.shape)}")
    with torch.no_grad():
        weight.copy_(value)
