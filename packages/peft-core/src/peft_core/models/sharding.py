"""FSDP's auto-wrap policy for adapted models."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import ModelError, did_you_mean
from ..tuners.index import index_of


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """Return the policy that tells `torch.distributed.fsdp.FullyShardedDataParallel` which modules to wrap as FSDP units.

    Units are the base's transformer blocks, the prompt modules, and each module without children whose weight is trainable. So in each unit either
    all parameters are trainable or none, which ``use_orig_params=False`` requires. The classes of the blocks are named in the environment variable
    `FSDP_TRANSFORMER_CLS_TO_WRAP` (separated by commas), or, if it is not set, in the base's `_no_split_modules`.

    Args:
        model: any model, with or without adapters.

    Returns:
        A function (module, recurse, nonwrapped_numel) → bool, to be passed as `auto_wrap_policy`.

    Raises:
        ModelError: the model has no module of a named class.
    """
    blocks, prompts = _block_classes(model), _prompts(model)
    inside = {part for prompt in prompts for part in prompt.modules()} - prompts

    def policy(module: nn.Module, recurse: bool, nonwrapped_numel: int, **kwargs: Any) -> bool:
        if recurse:
            return True
        if type(module) in blocks or module in prompts:
            return True
        weight: Any = getattr(module, "weight", None)
        alone = weight is not None and next(module.children(), None) is None
        return alone and bool(weight.requires_grad) and module not in inside

    return policy


def _block_classes(model: nn.Module) -> set[type]:
    default: Any = getattr(model, "_no_split_modules", None) or ()
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    names = [name.strip() for name in named.split(",") if name.strip()] if named is not None else sorted(default)
    found = {type(module).__name__: type(module) for module in model.modules()}
    for name in names:
        if name not in found:
            raise ModelError(
                f"Could not find the transformer layer class {name!r} in {type(model).__name__}",
                hint=did_you_mean(name, found) or "set the environment variable FSDP_TRANSFORMER_CLS_TO_WRAP to the classes of its blocks",
            )
    return {found[name] for name in names}


def _prompts(model: nn.Module) -> set[nn.Module]:
    """Return the prompt modules. Each must be a single FSDP unit, because it reads the weights of its submodules without calling them."""
    index = index_of(model)
    mounts = {} if index is None else index.mounts()
    return {prompt for mount in mounts.values() for prompt in mount.children()}
