"""Adds an adapter: all parts are planned first, then the model is changed; every step can be undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..base.statistics import batches_seen
from ..base.undo import Undo, collector_paused
from ..base.view import BaseView
from ..base.wrappers import unwrapped
from ..calls import backbone, generation
from ..config import PeftConfig
from ..errors import CapabilityError, UnsupportedModuleError, listed
from ..layers.adapter_layer import AdapterLayer
from ..layers.init_options import INITIAL, InitOptions
from ..layers.mounted import MountedModules
from ..layers.slots import LeavesBehind
from ..layers.token_rows import TrainableRowsLayer
from ..plugins import hooks, registry
from ..tuners import adapter_names, builtin
from ..tuners.index import ATTRIBUTE, AdapterIndex, Key, index_of
from ..tuners.review import InjectionReview
from ..tuners.tuner import Plan, TunerBase, Wrap
from . import reshape
from .delete import remove_index


def add_adapter(
    index: AdapterIndex,
    adapter: str,
    config: PeftConfig,
    *,
    init_options: InitOptions = INITIAL,
    heads: Sequence[str] = (),
    mount_on: nn.Module | None = None,
    view: BaseView | None = None,
    before_commit: Callable[[], None] | None = None,
    adapt_config: bool = False,
    review: InjectionReview | None = None,
) -> None:
    """Add an adapter: plan all parts, then change the model. The adapter is neither active nor trainable. If a step fails, all are undone.

    Args:
        index: the adapters of a model.
        adapter: the name of the new adapter.
        config: the config of the new adapter; this object is stored, not a copy.
        init_options: how the adapter's weights are initialised.
        heads: names of modules that the task saves whole, if the base has them.
        mount_on: the module to which modules that do not wrap a module of the base are added; None: a plan with such modules raises
            `CapabilityError`.
        view: the view of the base with which the adapter is planned; None: the view of the index.
        adapt_config: rewrite a config that was made for another module layout of the base. False if loading a file has done this already.
        review: checks the adapter before and after it is added; None: the review of the index.
        before_commit: called after the adapter's modules are created (to write a file's tensors); if it raises, all steps are undone.

    Raises:
        AdapterNameError, ConfigError, NoMatchingPeftModuleError, UnsupportedModuleError, CapabilityError: the adapter can't be planned.
    """
    spec = registry.resolve(str(config.peft_type))
    adapter_names.check_name(adapter, index.configs)
    config.check()
    tuner = index.tuner_for(spec)
    review = index.review if review is None else review
    asked, init_options = init_options, review.options(init_options)
    with collector_paused(), Undo() as undo:
        reshape.reshape(index, tuner, adapter, config, undo)
        for name, value in (tuner.adapted_config(index.view, config) if adapt_config else {}).items():
            undo.call(setattr, config, name, getattr(config, name))
            setattr(config, name, value)
        plans = _plans(index, tuner, adapter, config, (view or index.view).with_heads(heads), review)
        if mount_on is None and any(plan.mounts for _, _, plan in plans):
            raise CapabilityError(f"{spec.peft_type} puts modules beside the base and can't be injected into a bare model", hint="use get_peft_model")
        keys: list[Key] = []
        for kind, part, plan in plans:
            keys += _wrap_modules(index, kind, plan, adapter, init_options, undo)
            if mount_on is not None:
                keys += _mount_modules(index, part, plan, adapter, init_options, mount_on, undo)
            keys += _adopt_parameters(index, kind, plan, adapter, undo)
        index.keys_by_adapter[adapter] = list(dict.fromkeys(keys))
        undo.call(index.keys_by_adapter.pop, adapter, None)
        review.filled(adapter, config, asked)
        if before_commit is not None:
            undo.call(setattr, index, "_adding", None)
            index._adding = tuner
            before_commit()
            index._adding = None
        _commit(index, adapter, config, plans, heads, undo)
    hooks.adapter_added(index.base, adapter, config)


def _plans(
    index: AdapterIndex, tuner: TunerBase, adapter: str, config: PeftConfig, view: BaseView, review: InjectionReview
) -> list[tuple[str, TunerBase, Plan]]:
    main = tuner.plan(review.view(adapter, config, tuner, view), adapter, config)
    plans: list[tuple[str, TunerBase, Plan]] = [(tuner.spec.peft_type, tuner, main)]
    for kind, part, request in builtin.requests(index.tuners, index.selection, config.shared_options(), view, main):
        plans.append((kind, part, part.plan(view, adapter, request)))
    return plans


def _commit(
    index: AdapterIndex, adapter: str, config: PeftConfig, plans: Sequence[tuple[str, TunerBase, Plan]], heads: Sequence[str], undo: Undo
) -> None:
    _freeze_base(index, undo)
    index.configs[adapter] = config
    undo.call(index.configs.pop, adapter, None)
    for kind, part, plan in plans:
        if kind not in index.tuners:
            index.tuners[kind] = part
            undo.call(index.tuners.pop, kind, None)
        for name, value in plan.resolved.items():
            undo.call(setattr, config, name, getattr(config, name))
            setattr(config, name, value)
    if heads and hasattr(config, "modules_to_save"):
        # assign a new list: the caller's list must not change
        undo.call(setattr, config, "modules_to_save", config.modules_to_save)
        config.modules_to_save = list(dict.fromkeys((*(config.modules_to_save or ()), *heads)))
    undo.call(index.refresh)
    index.refresh()
    generation.install(index, undo)
    backbone.install(index, undo)


def _freeze_base(index: AdapterIndex, undo: Undo) -> None:
    if index.frozen_base:
        return
    for parameter in index.base.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            undo.call(parameter.requires_grad_, True)
    index.frozen_base = True
    undo.call(setattr, index, "frozen_base", False)
    index.batches_seen = batches_seen(index.view)


def _wrap_modules(index: AdapterIndex, kind: str, plan: Plan, adapter: str, init_options: InitOptions, undo: Undo) -> list[Key]:
    """Wrap the modules that `plan` names, unless they are wrapped already, and add the adapter's weights. Return their keys in `index.modules`."""
    keys = []
    for wrap in plan.wraps:
        key = (kind, wrap.path)
        module: Any = index.modules.get(key)
        if module is None:
            occupant = index.view.occupant(wrap.path)
            if occupant is not index.view.modules[wrap.path] and isinstance(occupant, LeavesBehind):
                raise UnsupportedModuleError(
                    f"{wrap.path!r} is saved whole by {listed(occupant.adapters())}, so that {adapter!r} can't wrap it",
                    hint="leave it out of the targets with exclude_modules, or add the adapters in the other order",
                )
            _insert_wrapper(index, key, occupant, wrap, undo)
            module = index.modules[key]
        undo.call(module.drop, adapter)
        wrap.fill(module, init_options)
        keys.append(key)
    return keys


def _mount_modules(
    index: AdapterIndex, tuner: TunerBase, plan: Plan, adapter: str, init_options: InitOptions, mount_on: nn.Module, undo: Undo
) -> list[Key]:
    """Add to `mount_on` the adapter's modules that do not wrap a module of the base. Return their keys in `index.modules`."""
    keys: list[Key] = []
    for path, mount in plan.mounts.items():
        key = ("", path)
        holder = index.modules.get(key)
        if holder is None:
            holder = MountedModules()
            mount_on.add_module(path, holder)
            undo.call(mount_on._modules.pop, path, None)
            index.modules[key] = holder
            undo.call(index.modules.pop, key, None)
        assert isinstance(holder, MountedModules)
        module = mount(init_options).requires_grad_(False)
        module.train(mount_on.training)
        holder.add(adapter, module, tuner.mounted.setdefault(path, {}))
        undo.call(holder.drop, adapter)
        keys.append(key)
    return keys


def _adopt_parameters(index: AdapterIndex, kind: str, plan: Plan, adapter: str, undo: Undo) -> list[Key]:
    """Record parameters of the base as parameters of the adapter. Return their keys in `index.modules`."""
    keys = []
    for path, adopt in plan.adopts.items():
        key = (kind, path)
        module = adopt()
        for parameter in module.parameters_of(adapter).values():
            undo.call(parameter.requires_grad_, parameter.requires_grad)
        undo.call(module.drop, adapter)
        index.modules[key] = module
        keys.append(key)
    return keys


def _insert_wrapper(index: AdapterIndex, key: Key, occupant: nn.Module, wrap: Wrap, undo: Undo) -> None:
    """Put a new wrapper around `occupant`, the module (perhaps already wrapped) at the wrap's path.

    A `TrainableRowsLayer` must stay outermost and is merged last: the new wrapper is put inside it.

    Raises:
        UnsupportedModuleError: rows of the module are trained, and the new wrapper would save the module whole.
    """
    if not isinstance(occupant, TrainableRowsLayer):
        module: Any = wrap.build(occupant)
        _replace_module(index, wrap.path, module, undo)
    else:
        inside = occupant.wrapped
        module = wrap.build(inside)
        if isinstance(module, LeavesBehind):
            raise UnsupportedModuleError(
                f"rows of {wrap.path!r} train in {listed(occupant.adapters())}, so that it can't be saved whole",
                hint="leave it out of modules_to_save, or delete_adapter the other one",
            )
        occupant.put_inside(module)
        undo.call(occupant.put_inside, inside)
        _configure(index, wrap.path, module)
    index.modules[key] = module
    undo.call(index.modules.pop, key, None)
    if isinstance(occupant, TrainableRowsLayer):
        for other in [other for other, entry in index.modules.items() if entry is occupant]:
            index.modules[other] = index.modules.pop(other)


def _replace_module(index: AdapterIndex, path: str, module: Any, undo: Undo) -> None:
    for parent, leaf in index.view.sites[path]:
        before = parent._modules[leaf]
        parent._modules[leaf] = module
        undo.call(parent._modules.__setitem__, leaf, before)
    _configure(index, path, module)


def _configure(index: AdapterIndex, path: str, module: Any) -> None:
    occupied = index.view.modules[path]
    module.train(occupied.training)
    if isinstance(module, AdapterLayer):
        weight = occupied._parameters.get(module.weight_name)
        module.merging.shared_weight = weight is not None and id(weight) in index.view.shared_weights


def get_or_create_index(model: nn.Module) -> tuple[AdapterIndex, bool]:
    """Return the adapter index of a base model, and whether it was newly created. If the model already has an index, that is returned.

    If another library has removed the adapter layers without `unload`, the outdated index is deleted first.
    """
    found = index_of(model)
    if found is not None:
        return found, False
    stale = unwrapped(model).__dict__.get(ATTRIBUTE)
    if isinstance(stale, AdapterIndex):
        remove_index(stale)
    return AdapterIndex(model), True
