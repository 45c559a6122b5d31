"""Biases of the base that train in place (`bias`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..base.view import BaseView, is_inside
from ..errors import AdapterNameError
from ..layers.slots import AdapterModule, Slot
from ..plugins import Capability, TunerSpec
from ..selection.selection import AdapterSelection
from ..tensor_names import join, wrapped_path
from .tuner import Plan, TunerBase


@dataclass(frozen=True)
class BiasRequest:
    """Which biases train: those of `targets` (paths of adapted modules), or every one of the base; none inside modules saved whole."""

    targets: tuple[str, ...]
    every: bool
    saved: tuple[str, ...] = ()


class BiasHolder:
    """Biases of the base that train in place. They belong to the base: disabling or deleting an adapter does not take them back."""

    def __init__(self) -> None:
        self.biases: dict[str, dict[str, tuple[nn.Module, str]]] = {}

    def adapters(self) -> tuple[str, ...]:
        """Return the adapter that trains biases, if there is one."""
        return tuple(self.biases)

    def parameters_of(self, adapter: str) -> Mapping[str, nn.Parameter]:
        """Return the biases by the path that they have in a file."""
        return {key: module.get_parameter(name) for key, (module, name) in self.biases[adapter].items()}

    def slots(self, adapter: str) -> Mapping[str, Slot]:
        """Return one slot for each bias."""
        return {key: Slot.of(module, name) for key, (module, name) in self.biases[adapter].items()}

    def drop(self, adapter: str) -> None:
        """Freeze the biases; their values stay."""
        for module, name in self.biases.pop(adapter, {}).values():
            module.get_parameter(name).requires_grad_(False)


class Biases(TunerBase):
    """Plans which biases of the base train."""

    def __init__(self, selection: AdapterSelection) -> None:
        super().__init__(TunerSpec("BIAS", "peft_core.config:PeftConfig", Biases, "bias@", capabilities=Capability.MERGE), selection)
        self.holder = BiasHolder()

    def plan(self, base: BaseView, adapter: str, config: BiasRequest) -> Plan:
        """Find the biases.

        Raises:
            AdapterNameError: another adapter trains biases of this model already.
        """
        if self.holder.biases:
            other = next(iter(self.holder.biases))
            raise AdapterNameError(
                f"the adapter {other!r} trains biases of the base in place; there can't be a second one that does ({adapter!r})",
                hint="set bias='none' for one of them",
                code="two-biases",
            )
        targets = frozenset(config.targets)
        found: dict[str, tuple[nn.Module, str]] = {}
        for path, module in base.modules.items():
            if (not config.every and path not in targets) or is_inside(path, config.saved):
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None and "bias" in name:
                    found[join(wrapped_path(path, targets), name)] = (module, name)
        return Plan(adopts={"": _BiasAdoption(self.holder, adapter, found)})


@dataclass(frozen=True)
class _BiasAdoption:
    holder: BiasHolder
    adapter: str
    found: Mapping[str, tuple[nn.Module, str]]

    def __call__(self) -> AdapterModule:
        self.holder.biases[self.adapter] = dict(self.found)
        return self.holder


BIAS = "@bias"
