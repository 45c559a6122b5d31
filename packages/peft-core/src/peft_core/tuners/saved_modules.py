"""Modules that an adapter copies, trains and saves in full: `modules_to_save`, and the heads of a task."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from torch import nn

from ..base.view import BaseView, is_inside
from ..errors import ConfigError, PeftWarning, UnsupportedModuleError, did_you_mean, listed
from ..layers.adapter_layer import AdapterLayer
from ..layers.init_options import InitOptions
from ..layers.saved_modules import ModulesToSaveWrapper
from ..layers.slots import AdapterModule
from ..plugins import Capability, TunerSpec
from ..selection.selection import AdapterSelection
from .targeting import target_matcher
from .tasks import HEADS
from .tuner import Plan, TunerBase, Wrap


@dataclass(frozen=True)
class SavedRequest:
    """Modules to copy, train and save in full: `required` ones should exist, `optional` ones (task heads) are used if present.

    With `tied`, requesting a module also requests the modules that share its weight, and their copies stay tied.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    tied: bool = False


class SavedModules(TunerBase):
    """Plans a `ModulesToSaveWrapper` around each module that an adapter saves in full."""

    def __init__(self, selection: AdapterSelection) -> None:
        spec = TunerSpec(
            "SAVED_MODULES", "peft_core.config:PeftConfig", SavedModules, "modules_to_save", capabilities=Capability.MERGE | Capability.PER_SAMPLE
        )
        super().__init__(spec, selection)

    def plan(self, base: BaseView, adapter: str, config: SavedRequest) -> Plan:
        """Wrap every module whose path equals a given name or ends in ``.name``.

        Warns about required names without a match if other names do match.

        Raises:
            ConfigError: a required name has no match, and there is nothing else to save.
            UnsupportedModuleError: a matched module is a container without a forward, or is already wrapped by an adapter.
        """
        paths = self.paths(base, config)
        unknown = [name for name in config.required if name not in HEADS and not any(map(target_matcher((name,), "modules_to_save"), base.modules))]
        if unknown:
            message = f"modules_to_save: {listed(unknown)} match no module of {base.name}"
            hint = did_you_mean(unknown[0].rpartition(".")[2], base.leaf_names)
            if not paths:
                raise ConfigError(message, hint=hint or None)
            warnings.warn(f"{message}{'; ' + hint if hint else ''}", PeftWarning, stacklevel=6)
        for path in paths:
            module = base.modules[path]
            if isinstance(module, (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList, AdapterLayer)):
                raise UnsupportedModuleError(
                    f"modules_to_save: {path!r} is a {type(module).__name__}, which can't be replaced by a copy", hint="name the modules inside it"
                )
        fillers: dict[str, _SavedFiller] = {}
        for path in paths:
            owner = next((fillers[other] for other in base.sharing(path) if other in fillers), None) if config.tied else None
            fillers[path] = _SavedFiller(adapter, owner)
        return Plan(wraps=tuple(Wrap(path, _SavedBuilder(self.selection), filler) for path, filler in fillers.items()))

    @staticmethod
    def paths(base: BaseView, request: SavedRequest) -> list[str]:
        """Return the paths of the modules to save in full; a module nested inside another saved module is left out."""
        named = target_matcher((*request.required, *request.optional), "modules_to_save")
        brought = {other for path in base.tied if named(path) for other in base.sharing(path)} if request.tied else frozenset()
        found: list[str] = []
        for path in base.modules:
            if path and (path in brought or named(path)) and not is_inside(path, found):
                found.append(path)
        return found


@dataclass(frozen=True)
class _SavedBuilder:
    selection: AdapterSelection

    def __call__(self, module: nn.Module) -> AdapterModule:
        return ModulesToSaveWrapper(module, self.selection)


@dataclass(frozen=True)
class _SavedFiller:
    adapter: str
    owner: _SavedFiller | None = None
    wrappers: list[ModulesToSaveWrapper] = field(default_factory=list)

    def __call__(self, module: ModulesToSaveWrapper, init_options: InitOptions) -> None:
        module.attach(self.adapter, init_options, None if self.owner is None else self.owner.wrappers[0])
        self.wrappers.append(module)


SAVED = "@saved"
