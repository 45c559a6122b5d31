"""The index of a model: which adapter has weights in which module. Data and queries; `operations/` has what is done with it."""

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
    """The adapters of one base model, of whatever methods. `PeftModel` and the plain functions are views of it.

    Attributes:
        base: the base model, adapted in place; the one inside, where others have put wrappers around it.
        view: the base under its original names.
        selection: which adapters act.
        configs: adapter → config, in load order.
        modules: (method, path) → the module there that holds weights; mounts have the path of the mount and no method.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base = unwrapped(base)
        self.view = BaseView(base)
        self.selection = AdapterSelection()
        self.configs: dict[str, PeftConfig] = {}
        self.tuners: dict[str, TunerBase] = {}
        self.modules: dict[Key, AdapterModule] = {}
        self.keys_by_adapter: dict[str, list[Key]] = {}
        #: tuners whose prepare or finish is called; recomputed when adapters come and go, not per call
        self.call_tuners: tuple[TunerBase, ...] = ()
        self.call_arguments: frozenset[str] = frozenset()
        self.frozen_base = False
        #: path → batches that a normalisation of the base had seen when the first adapter came
        self.batches_seen: dict[str, int] = {}
        self.forward = BaseForward(self.view)
        #: the change that was made to the base's structure, and the method that asked for it
        self.reshaped: Reshape | None = None
        self.reshaped_by = ""
        #: is asked before an adapter is added
        self.review: InjectionReview = PASSES
        self._adding: TunerBase | None = None

    def require(self, *adapters: str) -> None:
        """Check that the model has these adapters.

        Raises:
            AdapterNotFoundError: it lacks one; the message names the nearest.
        """
        for adapter in adapters:
            if adapter not in self.configs:
                raise AdapterNotFoundError(
                    f"Adapter {adapter!r} not found. The model has {listed(self.configs) or 'no adapter'}",
                    hint=did_you_mean(str(adapter), self.configs) or None,
                )

    def modules_of(self, adapter: str) -> list[tuple[Key, AdapterModule]]:
        """Return the modules in which an adapter has weights, by (method, path)."""
        return [(key, self.modules[key]) for key in self.keys_by_adapter.get(adapter, ())]

    def parameters_of(self, adapter: str) -> Iterator[nn.Parameter]:
        """Yield the parameters of an adapter."""
        for _, module in self.modules_of(adapter):
            yield from module.parameters_of(adapter).values()

    def slots(self, adapter: str) -> Iterator[tuple[str | None, str, Slot]]:
        """Yield (path in the base or None for what is mounted beside it, end of the key, slot) for all that a file holds of an adapter."""
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
        """Return this model's tuner of the method `spec`; a new one, not stored yet, if it has none."""
        return self.tuners.get(spec.peft_type) or registry.tuner_class(spec.peft_type)(spec, self.selection)

    def prefix(self, adapter: str) -> str:
        """Return what stands before a base module's path in the adapter's file, also while the adapter is being added."""
        return self.tuner(adapter).spec.base_prefix

    def operation(self, name: str) -> Callable[..., Any] | None:
        """Return the function that the tuner of an adapter offers as `name`: of the first in load order that does; None if none does."""
        for config in self.configs.values():
            found = self.tuners[str(config.peft_type)].operations.get(name)
            if found is not None:
                return found
        return None

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters chosen for the whole model, in the order given."""
        return self.selection.names

    def refresh(self) -> None:
        """Recompute what depends on which adapters there are."""
        self.selection.drop_cached()
        used = {str(config.peft_type) for config in self.configs.values()}
        present = [tuner for kind, tuner in self.tuners.items() if kind in used or kind in (SAVED, BIAS)]
        for kind, tuner in self.tuners.items():
            tuner.configs = {name: config for name, config in self.configs.items() if str(config.peft_type) == kind}
        self.call_tuners = tuple(tuner for tuner in present if tuner.takes_part_in_calls)
        self.call_arguments = frozenset(name for tuner in present for name in tuner.spec.call_arguments)

    def require_capability(self, adapter: str, capability: Capability, what: str) -> None:
        """Raise `CapabilityError` unless the adapter's tuner declares `capability`; `what` it is for, for the message."""
        spec = self.spec(adapter)
        if not spec.can(capability):
            raise CapabilityError(f"the adapter {adapter!r} ({spec.peft_type}) can't be {what}", hint=f"its tuner does not declare {capability.name}")

    def attach(self, *, with_configs: bool = True) -> None:
        """Let the base know its adapters.

        Args:
            with_configs: give it `peft_config`, too, by which other libraries recognise a model whose layers are adapted.
        """
        self.base.__dict__[ATTRIBUTE] = self
        if with_configs:
            self.base.__dict__["peft_config"] = self.configs

    def is_in_place(self) -> bool:
        """Return whether the layers of adapters stand in the base: False where somebody else took all of them off."""
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
        """Return the merged adapters, each once, in load order."""
        merged = {name for module in self.modules.values() if isinstance(module, AdapterLayer) and module.merged for name in module.merged_adapters}
        return [name for name in self.configs if name in merged]


def adapted_model(model: nn.Module) -> nn.Module:
    """Return the model that has adapters inside what others put around it (compiled, parallel, sharded, nested in any order); `model` if none has."""
    found: nn.Module | None = model
    while found is not None:
        if isinstance(getattr(found, "__dict__", {}).get(ATTRIBUTE), AdapterIndex):
            return found
        found = inside(found, any_holder=True)
    return model


def index_of(model: nn.Module) -> AdapterIndex | None:
    """Return the index of a `PeftModel`, or of a model with injected adapters; None if it has none. Wrappers around it are looked through.

    An index whose layers others have taken off, as libraries that know layers do, is none.
    """
    found = getattr(adapted_model(model), "__dict__", {}).get(ATTRIBUTE)
    return found if isinstance(found, AdapterIndex) and found.is_in_place() else None


def require_index(model: nn.Module) -> AdapterIndex:
    """Return the index of a `PeftModel`, or of a model with injected adapters. Wrappers around it are looked through.

    Raises:
        AdapterNotFoundError: the model has no adapters.
    """
    found = index_of(model)
    if found is None:
        raise AdapterNotFoundError(f"No adapter layers found in the model {type(model).__name__}", hint="wrap it with get_peft_model first")
    return found
