"""Slots: each describes one tensor that a file stores for an adapter, with its shape and functions to read and write its value."""

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
    """One tensor of an adapter file.

    Args:
        shape: shape of the tensor.
        read: returns the current value, detached.
        write: sets a new value of the same shape; the value is cast to the parameter's dtype and copied in place, so that optimisers still
            refer to the same parameter.
        owner: (module, attribute) where the tensor is stored, if it is a tensor of the model; None if it is computed.
        optional: the tensor may be missing in a file, because other readers and writers of the format do not know it.
        stands_for: ends of the keys of the optional tensors from which this tensor is computed. When a file with all of them is loaded, they are
            used, and this tensor is ignored. When a file with none of them is loaded, this tensor is used, and `write` replaces them by it.
        unread: a file may contain this tensor, in any shape, but this module neither reads nor writes it.
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
        """Return the slot for the parameter or buffer `name` of `module`."""

        def read() -> Tensor:
            tensor: Tensor = getattr(module, name)
            return tensor.detach()

        def write(value: Tensor) -> None:
            write_tensor(module, name, value)

        return cls(tuple(getattr(module, name).shape), read, write, (module, name))

    @classmethod
    def ignored(cls) -> Slot:
        """Return the slot for a tensor that files may contain and that the module ignores."""

        def read() -> Tensor:
            raise LookupError("this tensor is not stored")

        return cls((), read, lambda value: None, optional=True, unread=True)


def write_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Set the parameter or buffer `name` of `module` to `value` (same shape): copies in place, or replaces a tensor on the meta device."""
    current = getattr(module, name)
    if not current.is_meta:
        with torch.no_grad():
            current.copy_(value)
        return
    value = value.to(current.dtype)
    if value.data_ptr() % 64:  # memory of a file may be unaligned, and matrix products would then round differently
        value = value.clone()
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value, requires_grad=current.requires_grad)
    else:
        module._buffers[name] = value


@runtime_checkable
class AdapterModule(Protocol):
    """A module with weights of named adapters: a wrapped Linear, a prompt embedding, a saved head.

    In all methods, `adapter` is the name of an adapter.
    """

    def adapters(self) -> tuple[str, ...]:
        """Return the names of the adapters that have weights in this module."""
        ...

    def parameters_of(self, adapter: str) -> Mapping[str, nn.Parameter]:
        """Return the trainable parameters of the adapter."""
        ...

    def slots(self, adapter: str) -> Mapping[str, Slot]:
        """Return {end of the file key: slot} for the tensors that a file stores."""
        ...

    def drop(self, adapter: str) -> None:
        """Remove the adapter's weights, and undo changes that its creation made to the base."""
        ...


@runtime_checkable
class LeavesBehind(Protocol):
    """An `AdapterModule` that is replaced by the result of `remains` when adapters are unloaded; other wrappers are replaced by what they wrap."""

    def adapters(self) -> tuple[str, ...]:
        """Return the adapters that have weights in this module."""
        ...

    def remains(self, adapters: tuple[str, ...]) -> nn.Module:
        """Return the module that replaces this one when it is unloaded; it must have the effect of `adapters`."""
        ...


def module_slots(module: nn.Module) -> dict[str, Slot]:
    """Return {name in the state dict: slot} for every parameter and persistent buffer of `module` and its submodules."""
    found = {}
    for path, part in module.named_modules():
        if is_hidden(part):
            continue
        names = parameter_names(part)
        names += [name for name, b in part._buffers.items() if b is not None and name not in part._non_persistent_buffers_set]
        for name in names:
            found[join(visible(path), name)] = Slot.of(part, name)
    return found
