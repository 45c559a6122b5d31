"""Choosing adapters layer by layer, for libraries that know the layers of a model and not the model as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from .selection import AdapterSelection


class SelectionMixin(nn.Module):
    """A module that follows its model's choice of adapters until it is given one of its own.

    `PeftModel.set_adapter`, `enable_adapter_layers` and `disable_adapter_layers` bring it back to the model's.
    """

    #: attributes that hold weights by adapter, and those that hold other things by adapter
    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: ClassVar[tuple[str, ...]] = ()

    selection: AdapterSelection

    if TYPE_CHECKING:

        def adapters(self) -> tuple[str, ...]: ...
        def parameters_of(self, adapter: str) -> Mapping[str, nn.Parameter]: ...
        def drop(self, adapter: str) -> None: ...

    @property
    def active_adapters(self) -> list[str]:
        """The adapters chosen here, in the order in which they act, also those that have no weights here."""
        return list(self.selection.names)

    @property
    def active_adapter(self) -> str | list[str]:
        """The same, under the name by which libraries that know layers ask for it: always a list, unlike that of a model or a saved module."""
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether adapters are switched off here."""
        return not self.selection.enabled

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use these adapters in this module; they train, all others are frozen.

        Args:
            adapter_names: a name or names; those without weights here have no effect here.
            inference_mode: they do not train either.
        """
        given = (adapter_names,) if isinstance(adapter_names, str) else tuple(dict.fromkeys(adapter_names))
        self.selection = self.selection.variant(given, self.selection.enabled)
        for name in self.adapters():
            let_train(self.parameters_of(name).values(), name in given and not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off in this module, as `enabled` says; which of them train does not change."""
        if enabled is not self.selection.enabled:
            self.selection = self.selection.variant(self.selection.names, enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter's weights out of this module; a name without weights here is ignored.

        If no adapter in use remains, the first that has weights here takes over.
        """
        if adapter_name not in self.adapters():
            return
        self.drop(adapter_name)
        self.stop_using(adapter_name)

    def stop_using(self, adapter_name: str) -> None:
        """Take a name out of those in use here; if none remains, the first adapter that has weights here takes over."""
        active = self.selection
        if adapter_name in active.names:
            rest = tuple(name for name in active.names if name != adapter_name) or self.adapters()[:1]
            self.selection = active.variant(rest, active.enabled)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train in this module or not, whether they are in use or not."""
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            if name in self.adapters():
                let_train(self.parameters_of(name).values(), requires_grad)


def let_train(parameters: Iterable[nn.Parameter], trains: bool) -> None:
    """Set `requires_grad`; what holds no floating-point numbers can't train and is left out."""
    for parameter in parameters:
        if parameter.requires_grad is not trains and (parameter.is_floating_point() or not trains):
            parameter.requires_grad_(trains)


class AuxiliaryTrainingWrapper(SelectionMixin):
    """What stands around a module of the base for a part of an adapter that every method may have: saved modules, rows of tokens.

    Methods take an adapter's name as `adapter_name`.
    """

    @property
    def active_adapter(self) -> str | list[str]:
        """The adapter chosen here; a list if there are several, or none."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return key in an adapter's file → key in memory, both behind the path of this module."""
        raise NotImplementedError(f"{type(self).__name__} must define adapter_state_dict_load_map(adapter_name)")

    def adapter_state_dict(self, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what an adapter's file holds of this module.

        Args:
            adapter_name: which adapter.
            state_dict: the module's state dict.

        Raises:
            KeyError: the state dict lacks one of the adapter's tensors.
        """
        return {key: state_dict[name] for key, name in self.adapter_state_dict_load_map(adapter_name).items()}

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off in this module. It comes on again with the first adapter layer of the model that does."""
        super().enable_adapters(enabled)
        root = self.selection.root
        if not enabled and not any(module is self for module in root.switched_off):
            root.switched_off.append(self)
