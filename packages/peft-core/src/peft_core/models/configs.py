"""Reads the config of an adapter that is loaded, compares it with the config of an existing adapter, and checks download options."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..checkpoint.files import find_weights
from ..config import HUB_KEYS, PeftConfig
from ..errors import AdapterFileError, ConfigError, PeftWarning, UnknownTunerError, did_you_mean


def read_config(model_id: str | os.PathLike[str], hub: Mapping[str, Any]) -> PeftConfig:
    """Read an adapter's config. If its tuner is not installed, the error names the distribution that wrote the weights.

    Args:
        model_id: a folder, or a repository of the Hub.
        hub: options of the download.

    Raises:
        UnknownTunerError, ConfigFileError: as in `PeftConfig.from_pretrained`.
    """
    try:
        return PeftConfig.from_pretrained(model_id, **hub)
    except UnknownTunerError as error:
        try:
            writer = find_weights(model_id, **hub).metadata.get("peft_tuner")
        except AdapterFileError:
            writer = None
        if writer is None:
            raise
        distribution, _, version = writer.partition(" ")
        raise UnknownTunerError(
            f"{error.message}; the adapter in {str(model_id)!r} was written by {writer}", hint=f"pip install {distribution}=={version}"
        ) from error


def set_ephemeral_offload(config: PeftConfig, ephemeral: bool) -> None:
    """If `ephemeral`, set `config.runtime_config.ephemeral_gpu_offload`; warn if the config has no `runtime_config`."""
    if not ephemeral:
        return
    runtime = getattr(config, "runtime_config", None)
    if runtime is None:
        warnings.warn(f"ephemeral_gpu_offload has no effect on adapters of {config.peft_type!s}", PeftWarning, stacklevel=5)
    else:
        runtime.ephemeral_gpu_offload = True


def checked_hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `kwargs` after checking that all keywords are options of a download from the Hub.

    Raises:
        TypeError: a keyword is not such an option.
    """
    known = (*HUB_KEYS, "subfolder")
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        near = did_you_mean(unknown[0], known)
        raise TypeError(f"unexpected keyword argument(s) {', '.join(map(repr, unknown))}{f'; {near}' if near else ''}")
    return dict(kwargs)


def default_key_mapping(base: nn.Module, config: PeftConfig) -> Mapping[str, str] | None:
    """Return the base's own `key_mapping` (regular expression → replacement) for keys of old checkpoints; None if it has none."""
    if config.is_prompt_learning:
        return None
    mapping = getattr(base, "_checkpoint_conversion_mapping", None)
    return mapping if isinstance(mapping, Mapping) and mapping else None


#: config fields that do not change what an adapter computes; differing `target_modules` are found by comparing the keys of the file
_FIELDS_WITHOUT_EFFECT = frozenset(
    {"inference_mode", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "task_type", "target_modules"}
)


def check_same_effect(present: PeftConfig, loaded: PeftConfig, adapter: str, allowed: frozenset[str] = frozenset()) -> None:
    """Check that weights saved with the config `loaded` compute the same in an adapter with the config `present`.

    Args:
        present, loaded: the config of the existing adapter, and the one that comes with the weights.
        adapter: the adapter's name, for messages.
        allowed: names of additional fields in which the configs may differ.

    Raises:
        ConfigError: the configs differ in other fields; the message names them.
    """
    present_fields, loaded_fields = present.to_dict(), loaded.to_dict()
    if present_fields.get("peft_type") != loaded_fields.get("peft_type"):
        raise ConfigError(
            f"the adapter {adapter!r} is {present_fields.get('peft_type')}, the file's is {loaded_fields.get('peft_type')}",
            hint="load it under another name",
        )
    differing = [
        f"{name}={loaded_fields.get(name)!r} instead of {present_fields.get(name)!r}"
        for name in sorted({*present_fields, *loaded_fields} - _FIELDS_WITHOUT_EFFECT - allowed)
        if (present_fields.get(name) or None) != (loaded_fields.get(name) or None)  # missing, None, False, 0 and empty mean the same
    ]
    if differing:
        raise ConfigError(
            f"the adapter {adapter!r} exists with another config than the file's: {', '.join(differing)}",
            hint="load it under another name, or delete_adapter the existing one first",
            code="other-config",
        )
