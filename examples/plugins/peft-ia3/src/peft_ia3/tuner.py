"""What (IA)³ does to a model."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Collection

from peft_core import BaseView, ConfigError, LayerTuner, ModuleValues, Plan, ops_for
from peft_core.config import LayerConfig

from .config import IA3Config
from .defaults import DEFAULTS
from .layer import IA3Layer, IA3Settings


class IA3Tuner(LayerTuner):
    """Wraps the targets; a layer scales its input where it is one of `feedforward_modules`, otherwise its output."""

    layers = (IA3Layer,)

    def plan(self, base: BaseView, adapter: str, config: LayerConfig) -> Plan:
        """Plan as every layer tuner, with the feed-forward modules that are usual on the architecture where the config names none.

        Raises:
            ConfigError: a malformed expression.
        """
        assert isinstance(config, IA3Config)
        wanted = config.feedforward_modules
        chosen = copy.copy(config)
        chosen.feedforward_modules = set(DEFAULTS[base.model_type][1]) if wanted is None and base.model_type in DEFAULTS else wanted or set()
        plan = super().plan(base, adapter, chosen)
        resolved = {**plan.resolved, "feedforward_modules": chosen.feedforward_modules}
        if wanted is None:  # only those that are adapted: the file must be a config that can be read again
            paths = [wrap.path for wrap in plan.wraps]
            resolved["feedforward_modules"] = {name for name in chosen.feedforward_modules if any(matches(path, {name}) for path in paths)}
        kinds = {ops.kind for wrap in plan.wraps if (ops := ops_for(base.modules[wrap.path])) is not None}
        resolved["fan_in_fan_out"] = kinds == {"conv1d"}  # for other readers of the file
        return dataclasses.replace(plan, resolved=resolved)

    def settings(self, config: IA3Config, module: ModuleValues) -> IA3Settings:
        """Return what one layer is told."""
        return IA3Settings(feedforward=matches(module.path, config.feedforward_modules or ()), ones=config.init_ia3_weights)


def matches(path: str, wanted: Collection[str] | str) -> bool:
    """Return whether names (whole, or an end after a dot) or one regular expression (for all of it) match a module's path.

    Raises:
        ConfigError: the expression is malformed.
    """
    if isinstance(wanted, str):
        try:
            return re.fullmatch(wanted, path) is not None
        except re.error as error:
            raise ConfigError(f"feedforward_modules={wanted!r} is no regular expression: {error}", hint="give a list to match names") from error
    return any(path == name or path.endswith(f".{name}") for name in wanted)
