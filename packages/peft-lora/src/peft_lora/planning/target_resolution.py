"""A dry run: which modules a config adapts, and with which rank, without wrapping anything."""

from __future__ import annotations

import copy
import warnings

from torch import Tensor, nn

from peft_core import AdapterLayer, AdapterSelection, BaseView, ConfigError, ModuleValues, get_tuner_spec, ops_for

from ..config import LoraConfig
from ..contracts import LoraSettings
from ..tuner import LoraTuner


class DryRunTuner(LoraTuner):
    """Plans as `LoraTuner` does, and records the settings of each layer."""

    def settings(self, config: LoraConfig, module: ModuleValues) -> LoraSettings:
        """Return rank, alpha and the other settings of one module, and record them under its path."""
        found = super().settings(config, module)
        self.__dict__.setdefault("found", {})[module.path] = found
        return found


def planned(model: nn.Module, config: LoraConfig) -> dict[str, tuple[nn.Module, LoraSettings]]:
    """Return path → (module, its settings) for each module that an adapter with this config would wrap.

    Args:
        model: a model without adapters.
        config: the adapter's config; it is not changed.

    Raises:
        ConfigError: the model has adapters.
        NoMatchingPeftModuleError, UnsupportedModuleError, ConfigError: the errors that adding the adapter would raise.
    """
    if any(isinstance(module, AdapterLayer) for module in model.modules()):
        raise ConfigError(f"this {type(model).__name__} has adapters already", hint="pass the base as it is before get_peft_model")
    view = BaseView(model)
    tuner = DryRunTuner(get_tuner_spec("LORA"), AdapterSelection())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same warnings are shown when the adapter is added
        tuner.plan(view, "dry-run", copy.copy(config))
    found: dict[str, LoraSettings] = tuner.__dict__.get("found", {})
    return {path: (view.modules[path], settings) for path, settings in found.items()}


def matrix_of(module: nn.Module) -> Tensor:
    """Return the weight of a base layer as a matrix (out, in)."""
    ops = ops_for(module)
    assert ops is not None  # planned() has raised an error for modules without ops
    return ops.matrix(module.get_parameter("weight"))
