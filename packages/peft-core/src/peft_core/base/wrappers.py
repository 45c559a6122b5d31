"""What others put around a model: compiled, data-parallel, sharded. Its names never reach files; functions that take a model look through it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..tensor_names import HIDDEN_PARTS

#: the attribute under which parallel wrappers and engines hold the model
_PARALLEL = "module"
#: what FSDP1 calls its flat parameter
_FLAT = "_flat_param"
#: engines that are known by name: importing their libraries is slow
_ENGINES = frozenset({"DeepSpeedEngine"})


def inside(model: nn.Module, *, any_holder: bool = False) -> nn.Module | None:
    """Return the model that a wrapper (`torch.compile`, FSDP1, checkpoint wrappers, DDP, `DataParallel`, DeepSpeed) holds; None if it is none.

    Args:
        model: a wrapper or a model.
        any_holder: whatever has a child called ``module`` counts as a wrapper, too (`AveragedModel`, engines of other libraries).
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
    """Return the model inside all wrappers, nested in any order; any other as it is."""
    while (held := inside(model)) is not None:
        model = held
    return model


def is_hidden(module: nn.Module) -> bool:
    """Return whether `module` is a wrapper whose part of a name is left out, wherever in a model it stands."""
    return any(module._modules.get(name) is not None for name in HIDDEN_PARTS)


def parameter_names(module: nn.Module) -> list[str]:
    """Return the attributes that hold a module's own parameters.

    FSDP1 without ``use_orig_params`` replaces them by plain tensors, views of one flat parameter that it keeps elsewhere.
    """
    names = [name for name, parameter in module._parameters.items() if parameter is not None and name != _FLAT]
    return names or [name for name, value in module.__dict__.items() if isinstance(value, Tensor)]


def _sharded_roots(model: nn.Module) -> list[Any]:
    """Return the outermost modules of FSDP1 in `model`."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # who shards has imported it
    if fsdp is None:
        return []
    found: list[Any] = []
    pending = [model]
    while pending:
        module = pending.pop()
        if isinstance(module, fsdp.FullyShardedDataParallel):
            found.append(module)
        else:
            pending.extend(module.children())
    return found


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP1 has parameters of the model, so that what its modules hold may be a part of a tensor, or none of it."""
    return bool(_sharded_roots(model))


@contextlib.contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Inside the block the parameters of a model in FSDP1 are whole tensors; what is written to them is written to all shards.

    Every process has to enter it. Without FSDP1 it does nothing.
    """
    with contextlib.ExitStack() as stack:
        for root in _sharded_roots(model):
            stack.enter_context(type(root).summon_full_params(root, writeback=True))
        yield
