"""Slots: the tensors that a file holds for one adapter, each with its shape and the way to read and write it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..base.wrappers import is_hidden, parameter_names
from ..tensor_names import join, visible


@dataclass(frozen=True)
class Slot:
    """One tensor of a file.

    Args:
        shape: its shape.
        read: returns its present value, detached.
        write: takes a new value of that shape; copied into the parameter's dtype, in place, so that optimisers keep their parameter.
        owner: the module and attribute that hold it, where it is a tensor of the model and not computed.
        optional: a file may lack it: other readers and writers of the format do not know it.
        stands_for: ends of the keys of optional tensors from which this one is computed. A file that has them all is read without this one;
            one that has none of them gives this one alone, which then replaces them.
        unread: a file may hold it, of whatever shape, but this module has no use for it and does not write it.
    """

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    write: Callable[[Tensor], None]
    owner: tuple[nn.Module, str] | None = None
    optional: bool = False
    stands_for: tuple[str, ...] = ()
    unread: bool = False

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Slot:
        """Return the slot of the parameter or buffer `name` of `module`."""

        def read() -> Tensor:
            tensor: Tensor = getattr(module, name)
            return tensor.detach()

        def write(value: Tensor) -> None:
            write_tensor(module, name, value)

        return cls(tuple(getattr(module, name).shape), read, write, (module, name))

    @classmethod
    def of_no_use(cls) -> Slot:
        """Return the slot of a tensor that files may hold and that the module ignores."""

        def read() -> Tensor:
            raise LookupError("this tensor is not stored")

        return cls((), read, lambda value: None, optional=True, unread=True)


def write_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Set the parameter or buffer `name` of `module` to `value`, of its shape: copied in place, or put there where it is still on the meta device."""
    current = getattr(module, name)
    if not current.is_meta:
        with torch.no_grad():
            current.copy_(value)
        return
    value = value.to(current.dtype)
    if value.data_ptr() % 64:  # a tensor of a file may lie anywhere; products with it would be rounded otherwise than with a trained one
        value = value.clone()
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value, requires_grad=current.requires_grad)
    else:
        module._buffers[name] = value


@runtime_checkable
class AdapterModule(Protocol):
    """A module with weights of named adapters: a wrapped Linear, a prompt table, a saved head.

    Methods take an adapter's name as `adapter`.
    """

    def adapters(self) -> tuple[str, ...]:
        """Return the names of the adapters that have weights here."""
        ...

    def parameters_of(self, adapter: str) -> Mapping[str, nn.Parameter]:
        """Return what trains."""
        ...

    def slots(self, adapter: str) -> Mapping[str, Slot]:
        """Return what a file holds, by the end of its key."""
        ...

    def drop(self, adapter: str) -> None:
        """Take the adapter's weights out, and undo what its creation did to the base."""
        ...


@runtime_checkable
class LeavesBehind(Protocol):
    """An `AdapterModule` that is replaced by something other than the original when adapters are unloaded."""

    def adapters(self) -> tuple[str, ...]:
        """Return the adapters that have weights here."""
        ...

    def remains(self, adapters: tuple[str, ...]) -> nn.Module:
        """Return that module, when `adapters` are to stay in effect."""
        ...


def module_slots(module: nn.Module) -> dict[str, Slot]:
    """Return a slot for every parameter and persistent buffer of a whole module, by its name in the state dict."""
    found = {}
    for path, part in module.named_modules():
        if is_hidden(part):
            continue
        names = parameter_names(part)
        names += [name for name, b in part._buffers.items() if b is not None and name not in part._non_persistent_buffers_set]
        for name in names:
            found[join(visible(path), name)] = Slot.of(part, name)
    return found
