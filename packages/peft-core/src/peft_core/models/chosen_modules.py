"""Which modules of a base the tensors of a state dict belong to."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

from ..base.view import BaseView
from ..config import PeftConfig
from ..errors import ConfigError, PeftWarning, did_you_mean, listed
from ..plugins.registry import registry
from ..tensor_names import adapted_module, without_adapter
from ..tuners.index import AdapterIndex


def chosen_by(index: AdapterIndex, config: PeftConfig, adapter: str, state_dict: Mapping[str, Any]) -> BaseView:
    """Return a view of the base in which the names of a state dict say what is adapted; a warning where the config would say otherwise.

    Raises:
        ConfigError: a name belongs to no module, or none is an adapter's.
    """
    spec = registry.resolve(str(config.peft_type))
    if getattr(config, "target_parameters", None):
        raise ConfigError("the names in state_dict can't say which parameters are adapted", hint="leave state_dict or target_parameters out")
    view = index.view.choosing(_paths_in(state_dict, adapter, spec.parameter_prefix, index))
    _warn_if_config_differs(index, config, adapter, view.chosen or frozenset())
    return view


def _paths_in(state_dict: Mapping[str, Any], adapter: str, prefix: str, index: AdapterIndex) -> frozenset[str]:
    paths = {path for key in state_dict if (path := adapted_module(without_adapter(key, adapter, prefix), prefix)) is not None}
    if not paths:
        raise ConfigError(f"no name in state_dict contains {prefix!r}, so that no module can be chosen by it")
    unknown = sorted(paths - index.view.modules.keys())
    if unknown:
        message = f"state_dict names modules that {index.view.name} does not have: {listed(unknown)}"
        hint = did_you_mean(unknown[0], index.view.modules)
        if len(unknown) == len(paths):
            raise ConfigError(message, hint=hint or None)
        warnings.warn(f"{message}{f'; {hint}' if hint else ''}", PeftWarning, stacklevel=4)
    return frozenset(paths - set(unknown))


def _warn_if_config_differs(index: AdapterIndex, config: PeftConfig, adapter: str, chosen: frozenset[str]) -> None:
    spec = registry.resolve(str(config.peft_type))
    tuner = registry.tuner_class(spec.peft_type)(spec, index.selection)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alone = {wrap.path for wrap in tuner.plan(index.view, adapter, copy.copy(config)).wraps}
    except ValueError:
        alone = set()
    if alone != chosen:
        warnings.warn(
            f"While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the provided state_dict: "
            f"the config alone would have chosen other modules ({len(alone)} instead of {len(chosen)}); the state_dict decides",
            RuntimeWarning,
            stacklevel=3,
        )
