"""Training of the base model's own bias parameters (the config field `bias`)."""

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
    """Which biases are trained: those of `targets` (paths of adapted modules), or with `every` all biases of the base model.

    Biases inside the modules at the paths `saved`, which the adapter saves in full, are left out.
    """

    targets: tuple[str, ...]
    every: bool
    saved: tuple[str, ...] = ()


class BiasHolder:
    """Holds the biases of the base model that an adapter trains in place.

    They are parameters of the base model: disabling or deleting the adapter does not restore their original values.
    """

    def __init__(self) -> None:
        self.biases: dict[str, dict[str, tuple[nn.Module, str]]] = {}

    def adapters(self) -> tuple[str, ...]:
        """Return a tuple with the name of the adapter that trains biases; it is empty if there is no such adapter."""
        return tuple(self.biases)

    def parameters_of(self, adapter: str) -> Mapping[str, nn.Parameter]:
        """Return the bias parameters that the adapter trains, by their key in the adapter's file."""
        return {key: module.get_parameter(name) for key, (module, name) in self.biases[adapter].items()}

    def slots(self, adapter: str) -> Mapping[str, Slot]:
        """Return one slot for each bias that the adapter trains, by its key in the adapter's file."""
        return {key: Slot.of(module, name) for key, (module, name) in self.biases[adapter].items()}

    def drop(self, adapter: str) -> None:
        """Freeze the biases that the adapter trained and forget them; their trained values remain in the base model."""
        for module, name in self.biases.pop(adapter, {}).values():
            module.get_parameter(name).requires_grad_(False)


class Biases(TunerBase):
    """Plans which biases of the base model are trained."""

    def __init__(self, selection: AdapterSelection) -> None:
        super().__init__(TunerSpec("BIAS", "peft_core.config:PeftConfig", Biases, "bias@", capabilities=Capability.MERGE), selection)
        self.holder = BiasHolder()

    def plan(self, base: BaseView, adapter: str, config: BiasRequest) -> Plan:
        """Find the biases to train and return the plan that registers them for `adapter`.

        Raises:
            AdapterNameError: another adapter already trains biases of this model.
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
