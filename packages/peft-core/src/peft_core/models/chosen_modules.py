"""Chooses the modules to adapt from the keys of a state dict, instead of from the targets of a config."""

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


def view_for_state_dict(index: AdapterIndex, config: PeftConfig, adapter: str, state_dict: Mapping[str, Any]) -> BaseView:
    """Return a view of the base in which exactly the modules that have tensors in `state_dict` are targets.

    Warns if the targets in `config` would have selected other modules.

    Raises:
        ConfigError: `target_parameters` is set in `config`; or no key contains the tuner's parameter prefix; or no key names a module of the base.
    """
    spec = registry.resolve(str(config.peft_type))
    if getattr(config, "target_parameters", None):
        raise ConfigError("the keys of state_dict can't say which parameters are adapted", hint="leave state_dict or target_parameters out")
    view = index.view.choosing(_adapted_paths(state_dict, adapter, spec.parameter_prefix, index))
    _warn_if_config_differs(index, config, adapter, view.chosen or frozenset())
    return view


def _adapted_paths(state_dict: Mapping[str, Any], adapter: str, prefix: str, index: AdapterIndex) -> frozenset[str]:
    """Return the paths of the base's modules that have tensors in `state_dict`.

    Warns about modules in `state_dict` that the base does not have, if it has at least one of the others.

    Raises:
        ConfigError: no key contains `prefix`, or the base has none of the modules.
    """
    paths = {path for key in state_dict if (path := adapted_module(without_adapter(key, adapter, prefix), prefix)) is not None}
    if not paths:
        raise ConfigError(f"no key of state_dict contains {prefix!r}, so it chooses no module")
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
            # planning may change the config, so it gets a copy
            by_config = {wrap.path for wrap in tuner.plan(index.view, adapter, copy.copy(config)).wraps}
    except ValueError:  # for example a config without targets, which is allowed here
        by_config = set()
    if by_config != chosen:
        warnings.warn(
            f"While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the provided state_dict: "
            f"the config alone would have chosen other modules ({len(by_config)} instead of {len(chosen)}); the modules of the state_dict are used",
            RuntimeWarning,
            stacklevel=3,
        )
