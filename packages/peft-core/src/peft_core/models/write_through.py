"""Lets a wrapper write attributes to its base, as it reads them from its base."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ..calls.generation import GenerationHook
from ..tuners.index import ATTRIBUTE, AdapterIndex

_MISSING = object()


class WriteThrough(nn.Module):
    """A wrapper through which the attributes of its base can be read and written.

    An attribute that is read from the base (`generation_config`, `config`, ...) is also written to the base, because the base uses the value there.
    Set on the wrapper are: attributes that the wrapper already has, names that begin with an underscore, modules, names of parameters, buffers and
    submodules of the base, and names of properties of the base without a setter.
    """

    def _written_through(self) -> nn.Module | None:
        """Return the base; None while the wrapper is being constructed."""
        index: AdapterIndex | None = self.__dict__.get(ATTRIBUTE)
        return None if index is None else index.base

    def __setattr__(self, name: str, value: Any) -> None:
        base = None if name.startswith("_") or isinstance(value, nn.Module) or self._is_own(name) else self._written_through()
        if base is None or not _is_settable(base, name):
            super().__setattr__(name, value)
        else:
            setattr(base, name, value)

    def __delattr__(self, name: str) -> None:
        base = None if name.startswith("_") or self._is_own(name) else self._written_through()
        if base is None or name not in base.__dict__:
            super().__delattr__(name)
        else:
            delattr(base, name)

    def _is_own(self, name: str) -> bool:
        held = self.__dict__
        return name in held or hasattr(type(self), name) or any(name in held.get(part, ()) for part in ("_parameters", "_buffers", "_modules"))


def _is_settable(base: nn.Module, name: str) -> bool:
    """Return whether the base has a plain attribute of this name, or a property that can be set."""
    if any(name in base.__dict__[part] for part in ("_parameters", "_buffers", "_modules")):
        return False
    found = inspect.getattr_static(base, name, _MISSING)
    if isinstance(found, property):
        return found.fset is not None
    return found is not _MISSING and not isinstance(found, GenerationHook)  # the hook replaces a method of the base, which it calls
