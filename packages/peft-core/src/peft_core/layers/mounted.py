"""Modules outside the base model, one per adapter, such as prompt embeddings."""

from __future__ import annotations

from typing import Any

from torch import nn

from .slots import Slot


class MountedModules(nn.ModuleDict):
    """Modules outside the base model, one per adapter: `<mount>.<adapter>`, for all tuners. Each module has a method `slots()`.

    If one of them is replaced, as FullyShardedDataParallel does, `TunerBase.mounted` is updated, too.
    """

    def __init__(self) -> None:
        super().__init__()
        #: adapter → the dict in which its tuner looks up the module of the adapter
        self._known: dict[str, dict[str, nn.Module]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module) and name in self._known:
            self._known[name][name] = value

    def add(self, adapter: str, module: nn.Module, known: dict[str, nn.Module]) -> None:
        """Register the module of an adapter here and in `known`, the dict in which the tuner looks it up."""
        self._known[adapter] = known
        self[adapter] = known[adapter] = module

    def adapters(self) -> tuple[str, ...]:
        """Return the adapters that have a module in this container."""
        return tuple(self)

    def parameters_of(self, adapter: str) -> dict[str, nn.Parameter]:
        """Return all parameters of the adapter's module."""
        return dict(self[adapter].named_parameters())

    def slots(self, adapter: str) -> dict[str, Slot]:
        """Return {end of the file key: slot} of the tensors that a file stores, as the adapter's module returns them."""
        found: dict[str, Slot] = self[adapter].slots()  # type: ignore[operator]
        return found

    def drop(self, adapter: str) -> None:
        """Remove the adapter's module."""
        if adapter in self:
            del self[adapter]
            self._known.pop(adapter, {}).pop(adapter, None)
