"""Modules beside the base, one per adapter."""

from __future__ import annotations

from typing import Any

from torch import nn

from .slots import Slot


class MountedModules(nn.ModuleDict):
    """Modules beside the base, one per adapter: `<mount>.<adapter>`, whatever tuner made them. Each has `slots()`.

    If one of them is replaced, as FullyShardedDataParallel does, `TunerBase.mounted` follows.
    """

    def __init__(self) -> None:
        super().__init__()
        #: adapter → the mapping in which its tuner looks its module up
        self._known: dict[str, dict[str, nn.Module]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module) and name in self._known:
            self._known[name][name] = value

    def add(self, adapter: str, module: nn.Module, known: dict[str, nn.Module]) -> None:
        """Put the module of an adapter here, and into `known`, the mapping in which its tuner looks it up."""
        self._known[adapter] = known
        self[adapter] = known[adapter] = module

    def adapters(self) -> tuple[str, ...]:
        """Return the adapters that have a module here."""
        return tuple(self)

    def parameters_of(self, adapter: str) -> dict[str, nn.Parameter]:
        """Return all parameters of the adapter's module."""
        return dict(self[adapter].named_parameters())

    def slots(self, adapter: str) -> dict[str, Slot]:
        """Return what the adapter's module says that a file holds."""
        found: dict[str, Slot] = self[adapter].slots()  # type: ignore[operator]
        return found

    def drop(self, adapter: str) -> None:
        """Remove the adapter's module."""
        if adapter in self:
            del self[adapter]
            self._known.pop(adapter, {}).pop(adapter, None)
