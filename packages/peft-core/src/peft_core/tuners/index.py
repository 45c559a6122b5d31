"""The index of a model: which adapter has weights in which module. It holds data and answers queries; the operations are in `operations/`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..base.forward import BaseForward
from ..base.view import BaseView
from ..base.wrappers import inside, unwrapped
from ..config import PeftConfig
from ..errors import AdapterNotFoundError, CapabilityError, did_you_mean, listed
from ..layers.adapter_layer import AdapterLayer
from ..layers.slots import AdapterModule, Slot
from ..plugins import Capability, TunerSpec, registry
from ..selection.selection import AdapterSelection
from .biases import BIAS
from .reshape import Reshape
from .review import PASSES, InjectionReview
from .saved_modules import SAVED
from .tuner import TunerBase

#: attribute of an adapted base model under which its index is found
ATTRIBUTE = "_peft_index"
Key = tuple[str, str]


class AdapterIndex:
    """All adapters of one base model, whatever their methods. `PeftModel` and the plain functions both work on this index.

    Attributes:
        base: the base model, adapted in place, without the wrappers that other libraries may have put around it.
        view: the base model under its original module names.
        selection: which adapters are active.
        configs: adapter name → config, in load order.
        modules: (method, path) → the module that holds adapter weights at this path; a module mounted beside the base model has the path of
            its mount and an empty method.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base = unwrapped(base)
        self.view = BaseView(base)
        self.selection = AdapterSelection()
        self.configs: dict[str, PeftConfig] = {}
        self.tuners: dict[str, TunerBase] = {}
        self.modules: dict[Key, AdapterModule] = {}
        self.keys_by_adapter: dict[str, list[Key]] = {}
        #: tuners whose `prepare` or `finish` is called in each model call; recomputed when adapters are added or deleted, not in each call
        self.call_tuners: tuple[TunerBase, ...] = ()
        self.call_arguments: frozenset[str] = frozenset()
        self.frozen_base = False
        #: path → number of batches that a normalisation layer of the base model had processed when the first adapter was added
        self.batches_seen: dict[str, int] = {}
        self.forward = BaseForward(self.view)
        #: the change that was made to the base's structure, and the method that required it
        self.reshaped: Reshape | None = None
        self.reshaped_by = ""
        #: review that is called before an adapter is added
        self.review: InjectionReview = PASSES
        self._adding: TunerBase | None = None

    def require(self, *adapters: str) -> None:
        """Check that the model has all of these adapters.

        Raises:
            AdapterNotFoundError: the model lacks one of them; the hint suggests the most similar existing name.
        """
        for adapter in adapters:
            if adapter not in self.configs:
                raise AdapterNotFoundError(
                    f"Adapter {adapter!r} not found. The model has {listed(self.configs) or 'no adapter'}",
                    hint=did_you_mean(str(adapter), self.configs) or None,
                )

    def modules_of(self, adapter: str) -> list[tuple[Key, AdapterModule]]:
        """Return ((method, path), module) for each module in which the adapter has weights."""
        return [(key, self.modules[key]) for key in self.keys_by_adapter.get(adapter, ())]

    def parameters_of(self, adapter: str) -> Iterator[nn.Parameter]:
        """Yield the parameters of an adapter."""
        for _, module in self.modules_of(adapter):
            yield from module.parameters_of(adapter).values()

    def mounts(self) -> dict[str, nn.Module]:
        """Return the modules mounted beside the base model, by the path of their mount; each holds the modules of all adapters."""
        return {path: module for (kind, path), module in self.modules.items() if not kind and isinstance(module, nn.Module)}

    def slots(self, adapter: str) -> Iterator[tuple[str | None, str, Slot]]:
        """Yield (path, end of the file key, slot) for each tensor of the adapter that is saved in its file.

        The path is the module's path in the base model; it is None for modules mounted beside the base model.
        """
        for (kind, path), module in self.modules_of(adapter):
            where = path if kind else None
            for key, slot in module.slots(adapter).items():
                yield where, key, slot

    def spec(self, adapter: str) -> TunerSpec:
        """Return the spec of an adapter's tuner."""
        return self.tuners[str(self.configs[adapter].peft_type)].spec

    def tuner(self, adapter: str) -> TunerBase:
        """Return an adapter's tuner, also while the adapter is being added."""
        return self._adding if self._adding is not None else self.tuners[str(self.configs[adapter].peft_type)]

    def tuner_for(self, spec: TunerSpec) -> TunerBase:
        """Return the model's tuner for the method `spec`; if the model has none, return a new tuner, which is not stored yet."""
        return self.tuners.get(spec.peft_type) or registry.tuner_class(spec.peft_type)(spec, self.selection)

    def prefix(self, adapter: str) -> str:
        """Return the prefix of base module paths in the keys of the adapter's file, also while the adapter is being added."""
        return self.tuner(adapter).spec.base_prefix

    def operation(self, name: str) -> Callable[..., Any] | None:
        """Return the operation called `name` of the first adapter (in load order) whose tuner offers it; None if no tuner does."""
        for config in self.configs.values():
            found = self.tuners[str(config.peft_type)].operations.get(name)
            if found is not None:
                return found
        return None

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the adapters selected for the whole model, in the order in which they were given."""
        return self.selection.names

    def refresh(self) -> None:
        """Recompute the attributes that depend on which adapters the model has, and empty the cache scopes."""
        self.selection.drop_cached()
        used = {str(config.peft_type) for config in self.configs.values()}
        present = [tuner for kind, tuner in self.tuners.items() if kind in used or kind in (SAVED, BIAS)]
        for kind, tuner in self.tuners.items():
            tuner.configs = {name: config for name, config in self.configs.items() if str(config.peft_type) == kind}
        self.call_tuners = tuple(tuner for tuner in present if tuner.takes_part_in_calls)
        self.call_arguments = frozenset(name for tuner in present for name in tuner.spec.call_arguments)

    def require_capability(self, adapter: str, capability: Capability, what: str) -> None:
        """Raise `CapabilityError` unless the adapter's tuner declares `capability`; `what` completes the message "the adapter can't be …"."""
        spec = self.spec(adapter)
        if not spec.can(capability):
            raise CapabilityError(f"the adapter {adapter!r} ({spec.peft_type}) can't be {what}", hint=f"its tuner does not declare {capability.name}")

    def attach(self, *, with_configs: bool = True) -> None:
        """Set this index as an attribute of the base model.

        Args:
            with_configs: also set the attribute `peft_config`, by which other libraries recognise a model with adapted layers.
        """
        self.base.__dict__[ATTRIBUTE] = self
        if with_configs:
            self.base.__dict__["peft_config"] = self.configs

    def is_in_place(self) -> bool:
        """Return whether the adapter layers are still installed in the base model; False if other code has removed all of them."""
        wrapped = [key for key, module in self.modules.items() if key[0] and isinstance(module, nn.Module) and key[1] in self.view.sites]
        return not wrapped or any(self._is_installed(key) for key in wrapped)

    def _is_installed(self, key: Key) -> bool:
        module = self.modules[key]
        for parent, leaf in self.view.sites[key[1]]:
            found: Any = getattr(parent, leaf, None)
            while found is not None and found is not module:
                children = found._modules
                held = [children[name] for name in ("base_layer", "original_module") if children.get(name) is not None]
                found = held[0] if held else inside(found)
            if found is module:
                return True
        return False

    def merged_adapters(self) -> list[str]:
        """Return the names of the adapters that are merged in any layer, in load order, without duplicates."""
        merged = {name for module in self.modules.values() if isinstance(module, AdapterLayer) and module.merged for name in module.merged_adapters}
        return [name for name in self.configs if name in merged]


def adapted_model(model: nn.Module) -> nn.Module:
    """Return the model with adapters inside the wrappers that other libraries put around it; `model` itself if there is no such model.

    The wrappers (compiled, parallel, sharded) may be nested in any order.
    """
    found: nn.Module | None = model
    while found is not None:
        if isinstance(getattr(found, "__dict__", {}).get(ATTRIBUTE), AdapterIndex):
            return found
        found = inside(found, any_holder=True)
    return model


def index_of(model: nn.Module) -> AdapterIndex | None:
    """Return the index of a `PeftModel` or of a model with injected adapters, looking through wrappers around it; None if there is no index.

    Also returns None if other code, such as a library that works on single layers, has removed all adapter layers from the model.
    """
    found = getattr(adapted_model(model), "__dict__", {}).get(ATTRIBUTE)
    return found if isinstance(found, AdapterIndex) and found.is_in_place() else None


def require_index(model: nn.Module) -> AdapterIndex:
    """Return the index of a `PeftModel` or of a model with injected adapters, looking through wrappers around it.

    Raises:
        AdapterNotFoundError: the model has no adapters.
    """
    found = index_of(model)
    if found is None:
        raise AdapterNotFoundError(f"No adapter layers found in the model {type(model).__name__}", hint="wrap it with get_peft_model first")
    return found
