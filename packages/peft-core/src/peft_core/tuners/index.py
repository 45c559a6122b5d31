"""The index of a model: which adapter has weights in which module, and every operation that is a loop over that."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from ..config import PeftConfig
from ..errors import AdapterNotFoundError, CapabilityError, MergeError, PeftWarning, RoutingError, did_you_mean, listed
from ..layers.activation import BASE, Activation, Route
from ..layers.creation import INITIAL, Creation
from ..layers.slots import AdapterModule, Slot
from ..layers.switching import Switches, let_train
from ..plugins import Capability, TunerSpec, hooks, registry
from . import backbone, builtin, checkpointing, folding, generation, naming, reshaping
from .assemble import BaseForward
from .base_view import BaseView
from .perform import Undo, collector_paused, perform
from .reshaping import Reshape
from .tuner import Plan, TunerBase

#: attribute of an adapted base model under which its index is found
ATTRIBUTE = "_peft_index"
Key = tuple[str, str]


class AdapterIndex:
    """The adapters of one base model, of whatever methods. `PeftModel` and the plain functions are views of it.

    Attributes:
        base: the base model, wrapped in place.
        view: the base under its original names.
        activation: which adapters act.
        configs: adapter → config, in load order.
        entries: (method, path) → the module there that holds weights; mounts have the path of the mount and no method.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.view = BaseView(base)
        self.activation = Activation()
        self.configs: dict[str, PeftConfig] = {}
        self.tuners: dict[str, TunerBase] = {}
        self.entries: dict[Key, AdapterModule] = {}
        self.own: dict[str, list[Key]] = {}
        #: tuners whose prepare or finish is called; recomputed when adapters come and go, not per call
        self.speakers: tuple[TunerBase, ...] = ()
        self.call_arguments: frozenset[str] = frozenset()
        self.frozen_base = False
        self.forward = BaseForward(self.view)
        #: the change that was made to the base's structure, and the method that asked for it
        self.reshaped: Reshape | None = None
        self.reshaped_by = ""
        self._adding: TunerBase | None = None

    # ---- asking ---------------------------------------------------------------------------------------------------
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
        """Return the entries in which an adapter has weights."""
        return [(key, self.entries[key]) for key in self.own.get(adapter, ())]

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
        """Return this model's tuner of the method `spec`; a new one, not kept yet, if it has none."""
        return self.tuners.get(spec.peft_type) or registry.tuner_class(spec.peft_type)(spec, self.activation)

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
        """The adapters chosen for the whole model, in load order."""
        return self.activation.names

    # ---- adding ---------------------------------------------------------------------------------------------------
    def check_name(self, adapter: str, spec: TunerSpec) -> None:
        """Check that a new adapter of the method `spec` may be called `adapter`.

        Raises:
            AdapterNameError: taken, not a legal key, or colliding with a parameter prefix.
        """
        prefixes = {spec.parameter_prefix, *(tuner.spec.parameter_prefix for tuner in self.tuners.values())}
        naming.check_name(adapter, self.configs, prefixes)

    def add(
        self,
        adapter: str,
        config: PeftConfig,
        *,
        creation: Creation = INITIAL,
        heads: Sequence[str] = (),
        mount_on: nn.Module | None = None,
        view: BaseView | None = None,
        before_commit: Callable[[], None] | None = None,
        fit: bool = False,
    ) -> None:
        """Add an adapter: plan all parts, then perform; it is neither active nor trainable afterwards. A failure leaves no trace.

        Args:
            adapter: its name.
            config: its config; kept, not copied.
            creation: how its weights are made.
            heads: modules that the task wants saved whole where they exist.
            mount_on: where modules beside the base go; None refuses plans that mount something.
            view: the view to plan with; default the model's own.
            fit: rewrite a config that was made for another layout of the base; who reads a file knows more and has done it.
            before_commit: called when everything is built (to fill in a file's tensors); if it raises, all is undone.

        Raises:
            AdapterNameError, ConfigError, NoMatchingPeftModuleError, UnsupportedModuleError, CapabilityError: from the plans.
        """
        spec = registry.resolve(str(config.peft_type))
        self.check_name(adapter, spec)
        config.check()
        tuner = self.tuner_for(spec)
        with collector_paused(), Undo() as undo:
            reshaping.reshape(self, tuner, adapter, config, undo)
            for name, value in (tuner.fitted(self.view, config) if fit else {}).items():
                undo.call(setattr, config, name, getattr(config, name))
                setattr(config, name, value)
            plans = self._plans(tuner, adapter, config, (view or self.view).with_heads(heads))
            if mount_on is None and any(plan.mounts for _, _, plan in plans):
                raise CapabilityError(
                    f"{spec.peft_type} puts modules beside the base and can't be injected into a bare model", hint="use get_peft_model"
                )
            keys: list[Key] = []
            for kind, part, plan in plans:
                perform(self, kind, part, plan, adapter, creation, mount_on, keys, undo)
            self.own[adapter] = list(dict.fromkeys(keys))
            undo.call(self.own.pop, adapter, None)
            if before_commit is not None:
                undo.call(setattr, self, "_adding", None)
                self._adding = tuner
                before_commit()
                self._adding = None
            self._commit(adapter, config, plans, heads, undo)
        hooks.adapter_added(self.base, adapter, config)

    def _plans(self, tuner: TunerBase, adapter: str, config: PeftConfig, view: BaseView) -> list[tuple[str, TunerBase, Plan]]:
        main = tuner.plan(view, adapter, config)
        plans: list[tuple[str, TunerBase, Plan]] = [(tuner.spec.peft_type, tuner, main)]
        for kind, part, request in builtin.requests(self.tuners, self.activation, config.extras(), view, main):
            plans.append((kind, part, part.plan(view, adapter, request)))
        return plans

    def _commit(self, adapter: str, config: PeftConfig, plans: Sequence[tuple[str, TunerBase, Plan]], heads: Sequence[str], undo: Undo) -> None:
        self._freeze_base(undo)
        self.configs[adapter] = config
        undo.call(self.configs.pop, adapter, None)
        for kind, part, plan in plans:
            if kind not in self.tuners:
                self.tuners[kind] = part
                undo.call(self.tuners.pop, kind, None)
            for name, value in plan.resolved.items():
                undo.call(setattr, config, name, getattr(config, name))
                setattr(config, name, value)
        if heads and hasattr(config, "modules_to_save"):
            # a list of our own: the caller's stays as it was
            undo.call(setattr, config, "modules_to_save", config.modules_to_save)
            config.modules_to_save = list(dict.fromkeys((*(config.modules_to_save or ()), *heads)))
        undo.call(self.refresh)
        self.refresh()
        generation.install(self, undo)
        backbone.install(self, undo)

    def _freeze_base(self, undo: Undo) -> None:
        if self.frozen_base:
            return
        for parameter in self.base.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                undo.call(parameter.requires_grad_, True)
        self.frozen_base = True
        undo.call(setattr, self, "frozen_base", False)

    def refresh(self) -> None:
        """Recompute what depends on which adapters there are."""
        self.activation.drop_cached()
        used = {str(config.peft_type) for config in self.configs.values()}
        present = [tuner for kind, tuner in self.tuners.items() if kind in used or kind in (builtin.SAVED, builtin.BIAS)]
        for kind, tuner in self.tuners.items():
            tuner.configs = {name: config for name, config in self.configs.items() if str(config.peft_type) == kind}
        self.speakers = tuple(tuner for tuner in present if tuner.takes_part_in_calls)
        self.call_arguments = frozenset(name for tuner in present for name in tuner.spec.call_arguments)

    # ---- choosing -------------------------------------------------------------------------------------------------
    def activate(self, adapters: Sequence[str], *, trainable: bool = True) -> None:
        """Use these adapters from now on; they train if `trainable`, all others are frozen. Order is load order.

        Raises:
            AdapterNotFoundError: the model lacks one.
        """
        self.require(*adapters)
        if self.merged_adapters():
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", PeftWarning, stacklevel=4)
            folding.unmerge(self)
        chosen = tuple(name for name in self.configs if name in adapters)
        self.follow_model()
        self.activation.select(chosen)
        for adapter in self.configs:
            self.set_trainable(adapter, trainable and adapter in chosen)
        hooks.adapter_activated(self.base, chosen)

    def follow_model(self) -> None:
        """Let every layer that was switched by itself follow the model's activation again."""
        self.activation.switched_off.clear()
        for module in self.entries.values():
            if isinstance(module, Switches) and module.activation is not self.activation:
                module.activation = self.activation

    def set_trainable(self, adapter: str, trainable: bool) -> None:
        """Set `requires_grad` of an adapter's parameters to `trainable`."""
        let_train(self.parameters_of(adapter), trainable)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The plain base inside: merged adapters are taken out first; which parameters train does not change."""
        if self.merged_adapters():
            folding.unmerge(self)
        checkpointing.prepare(self)
        overridden = getattr(self.activation.local, "route", None) is not None
        with self.activation.disabled(), self.activation.use(Route()) if overridden else contextlib.nullcontext():
            yield

    def check_route(self, route: Route) -> None:
        """Check that a route can be followed.

        Raises:
            AdapterNotFoundError: it names an adapter that the model lacks.
            CapabilityError: it treats rows differently, and a tuner in it does not declare PER_SAMPLE.
            RoutingError: adapters are merged.
        """
        self.check_moment()
        unknown = [name for name in route.used if name not in self.configs]
        if unknown:
            raise AdapterNotFoundError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}",
                hint=did_you_mean(unknown[0], [*self.configs, BASE]) or f"the model has {listed(self.configs) or 'none'}",
            )
        if route.per_row is not None and len(set(route.per_row)) > 1:
            for name in route.used:
                self.require_capability(name, Capability.PER_SAMPLE, "used for some rows of a batch only")

    def check_moment(self) -> None:
        """Check that adapters may be chosen for one call or block now; layers that run again in the backward pass will meet them then.

        Raises:
            RoutingError: adapters are merged.
        """
        checkpointing.prepare(self)
        if self.merged_adapters():
            raise RoutingError(f"{listed(self.merged_adapters())} are merged into the base weights of all rows", hint="unmerge_adapter() first")

    def require_capability(self, adapter: str, capability: Capability, what: str) -> None:
        """Raise `CapabilityError` unless the adapter's tuner declares `capability`; `what` it is for, for the message."""
        spec = self.spec(adapter)
        if not spec.can(capability):
            raise CapabilityError(f"the adapter {adapter!r} ({spec.peft_type}) can't be {what}", hint=f"its tuner does not declare {capability.name}")

    def merged_adapters(self) -> list[str]:
        """Return the merged adapters, each once, in load order."""
        return folding.merged_adapters(self)

    # ---- taking out -----------------------------------------------------------------------------------------------
    def delete(self, adapter: str) -> None:
        """Remove an adapter's weights and config. If it was the only one in use, the first that remains takes over.

        Raises:
            AdapterNotFoundError: the model has no such adapter.
            MergeError: it is merged.
        """
        self.require(adapter)
        if adapter in self.merged_adapters():
            raise MergeError(f"cannot delete the adapter {adapter!r} while it is merged", hint="unmerge_adapter() first")
        for (kind, path), module in self.modules_of(adapter):
            module.drop(adapter)
            if not kind:
                for tuner in self.tuners.values():
                    tuner.mounted.get(path, {}).pop(adapter, None)
            if isinstance(module, Switches) and module.activation is not self.activation:  # switched by itself
                module.stop_using(adapter)
        del self.own[adapter], self.configs[adapter]
        active = before = self.activation.names
        if adapter in active:
            rest = tuple(name for name in active if name != adapter)
            if rest or not self.configs:
                self.activation.select(rest)
            else:
                first = next(iter(self.configs))
                warnings.warn(f"the active adapter {adapter!r} was deleted; {first!r} is active now", PeftWarning, stacklevel=4)
                self.activation.select((first,))
                self.set_trainable(first, not self.configs[first].inference_mode)
        reshaping.restore_when_unused(self)
        self.refresh()
        if self.activation.names and self.activation.names != before:
            hooks.adapter_activated(self.base, self.activation.names)
        hooks.adapter_deleted(self.base, adapter)

    def retire(self) -> None:
        """Forget all adapters; the base is no adapted model any more."""
        generation.uninstall(self.base)
        backbone.uninstall(self)
        checkpointing.uninstall(self.base)
        for name in (ATTRIBUTE, "peft_config"):
            self.base.__dict__.pop(name, None)
        for (kind, path), module in self.entries.items():
            mounted: Any = self.base._modules.get(path)
            if not kind and mounted is module:  # mounted on the base itself, as injecting does
                del self.base._modules[path]
        self.entries.clear()
        self.own.clear()
        self.configs.clear()
        self.activation.select(())
        self.refresh()


def index_of(model: nn.Module) -> AdapterIndex | None:
    """Return the index of a `PeftModel` (compiled or not), or of a model with injected adapters; None if it has none."""
    found = getattr(uncompiled(model), "__dict__", {}).get(ATTRIBUTE)
    return found if isinstance(found, AdapterIndex) else None


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model inside what `torch.compile` returned; any other as it is."""
    inside: nn.Module | None = getattr(model, "__dict__", {}).get("_modules", {}).get("_orig_mod")
    return model if inside is None else inside


def require_index(model: nn.Module) -> AdapterIndex:
    """Return the index of a `PeftModel` (compiled or not), or of a model with injected adapters.

    Raises:
        AdapterNotFoundError: the model has no adapters.
    """
    found = index_of(model)
    if found is None:
        raise AdapterNotFoundError(f"No adapter layers found in the model {type(model).__name__}", hint="wrap it with get_peft_model first")
    return found
