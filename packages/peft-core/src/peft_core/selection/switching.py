"""Selecting adapters layer by layer, for libraries that work with the adapter layers of a model instead of the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from .selection import AdapterSelection


class SelectionMixin(nn.Module):
    """A module that uses its model's selection of adapters until a selection is set for this module alone.

    `PeftModel.set_adapter`, `enable_adapter_layers` and `disable_adapter_layers` make it use the model's selection again.
    """

    #: names of the attributes that hold weights by adapter, and of those that hold other values by adapter
    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: ClassVar[tuple[str, ...]] = ()

    selection: AdapterSelection

    if TYPE_CHECKING:

        def adapters(self) -> tuple[str, ...]: ...
        def parameters_of(self, adapter: str) -> Mapping[str, nn.Parameter]: ...
        def drop(self, adapter: str) -> None: ...

    @property
    def active_adapters(self) -> list[str]:
        """The adapters selected for this module, in the order in which they are applied, including those without weights in this module."""
        return list(self.selection.names)

    @property
    def active_adapter(self) -> str | list[str]:
        """The same list as `active_adapters`, under the name that libraries read from layers; for a model or a saved module it may be a string."""
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether adapters are switched off in this module."""
        return not self.selection.enabled

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate these adapters in this module and make their parameters trainable; the parameters of all other adapters are frozen.

        Args:
            adapter_names: one name or several names; an adapter without weights in this module has no effect in it.
            inference_mode: also freeze the parameters of the activated adapters.
        """
        given = (adapter_names,) if isinstance(adapter_names, str) else tuple(dict.fromkeys(adapter_names))
        self.selection = self.selection.variant(given, self.selection.enabled)
        for name in self.adapters():
            let_train(self.parameters_of(name).values(), name in given and not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on in this module if `enabled` is True, else off; `requires_grad` of their parameters is not changed."""
        if enabled is not self.selection.enabled:
            self.selection = self.selection.variant(self.selection.names, enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's weights from this module; the name of an adapter without weights in this module is ignored.

        If no active adapter remains, the first adapter that has weights in this module becomes active.
        """
        if adapter_name not in self.adapters():
            return
        self.drop(adapter_name)
        self.stop_using(adapter_name)

    def stop_using(self, adapter_name: str) -> None:
        """Deactivate an adapter in this module; if no active adapter remains, the first adapter that has weights in this module becomes active."""
        active = self.selection
        if adapter_name in active.names:
            rest = tuple(name for name in active.names if name != adapter_name) or self.adapters()[:1]
            self.selection = active.variant(rest, active.enabled)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Set `requires_grad` of the parameters of these adapters in this module, whether the adapters are active or not."""
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            if name in self.adapters():
                let_train(self.parameters_of(name).values(), requires_grad)


def let_train(parameters: Iterable[nn.Parameter], trains: bool) -> None:
    """Set `requires_grad` of each parameter to `trains`; parameters that are not floating-point can't require gradients and are never set to True."""
    for parameter in parameters:
        if parameter.requires_grad is not trains and (parameter.is_floating_point() or not trains):
            parameter.requires_grad_(trains)


class AuxiliaryTrainingWrapper(SelectionMixin):
    """Base class of the wrappers for the adapter parts that are available with every method: saved modules and trained token rows.

    In all methods, `adapter_name` is the name of an adapter.
    """

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the adapter selected for this module; a list of names if several are selected, or none."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return a dict: key in the adapter's file → name in memory, both relative to the path of this module."""
        raise NotImplementedError(f"{type(self).__name__} must define adapter_state_dict_load_map(adapter_name)")

    def adapter_state_dict(self, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of this module that are saved in the adapter's file, by their key relative to the path of this module.

        Args:
            adapter_name: the name of the adapter.
            state_dict: the module's state dict.

        Raises:
            KeyError: the state dict lacks one of the adapter's tensors.
        """
        return {key: state_dict[name] for key, name in self.adapter_state_dict_load_map(adapter_name).items()}

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on if `enabled` is True, else off, in this module.

        A module that was switched off is switched on again as soon as an adapter layer of the model is.
        """
        super().enable_adapters(enabled)
        root = self.selection.root
        if not enabled and not any(module is self for module in root.switched_off):
            root.switched_off.append(self)
