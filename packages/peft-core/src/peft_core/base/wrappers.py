"""Wrappers of other libraries around a model: compiled, data-parallel, sharded.

The names that they add are never written to files, and functions that take a model also accept the wrapped model.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..tensor_names import HIDDEN_PARTS

#: the attribute in which data-parallel wrappers and engines store the model
_PARALLEL = "module"
#: the name of FSDP1's flat parameter
_FLAT = "_flat_param"
#: class names of engines; names are compared because importing their libraries is slow
_ENGINES = frozenset({"DeepSpeedEngine"})


def inside(model: nn.Module, *, any_holder: bool = False) -> nn.Module | None:
    """Return the model inside a wrapper (`torch.compile`, FSDP1, checkpoint wrappers, DDP, `DataParallel`, DeepSpeed); None for other models.

    Args:
        model: a wrapper or a model.
        any_holder: also treat every module with a child called ``module`` as a wrapper (`AveragedModel`, engines of other libraries).
    """
    children: dict[str, nn.Module | None] = getattr(model, "__dict__", {}).get("_modules") or {}
    for name in HIDDEN_PARTS:
        if children.get(name) is not None:
            return children[name]
    held = children.get(_PARALLEL)
    return held if held is not None and (any_holder or _is_parallel(model)) else None


def _is_parallel(model: nn.Module) -> bool:
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return True
    return any(cls.__name__ in _ENGINES for cls in type(model).__mro__)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside all wrappers, which may be nested in any order; a model without wrappers is returned unchanged."""
    while (held := inside(model)) is not None:
        model = held
    return model


def is_hidden(module: nn.Module) -> bool:
    """Return whether `module` is a wrapper whose part of the module name is left out; such a wrapper may be anywhere in a model."""
    return any(module._modules.get(name) is not None for name in HIDDEN_PARTS)


def parameter_names(module: nn.Module) -> list[str]:
    """Return the names of the attributes that hold a module's direct parameters, not those of its submodules.

    FSDP1 without ``use_orig_params`` replaces the parameters by plain tensors: views of one flat parameter that is stored in another module.
    """
    names = [name for name, parameter in module._parameters.items() if parameter is not None and name != _FLAT]
    return names or [name for name, value in module.__dict__.items() if isinstance(value, Tensor)]


def _sharded_roots(model: nn.Module) -> list[Any]:
    """Return the outermost FSDP1 modules in `model`."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # if the model is sharded, this module has been imported already
    if fsdp is None:
        return []
    found: list[Any] = []
    pending = [model]
    while pending:
        module = pending.pop()
        if isinstance(module, fsdp.FullyShardedDataParallel):
            found.append(module)
        else:
            pending.extend(child for child in module._modules.values() if child is not None and child._modules)  # FSDP has a child: skip leaves
    return found


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP1 shards parameters of the model. If so, a module may hold only a part of a tensor, or an empty part."""
    return bool(_sharded_roots(model))


@contextlib.contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """For the duration of the block, gather the full (unsharded) parameters of an FSDP1 model; changes are written back to all shards.

    Every process has to enter the block. Without FSDP1, the context manager does nothing.
    """
    with contextlib.ExitStack() as stack:
        for root in _sharded_roots(model):
            stack.enter_context(type(root).summon_full_params(root, writeback=True))
        yield
