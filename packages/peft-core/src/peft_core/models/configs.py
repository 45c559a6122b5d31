"""Configs when an adapter is loaded: reading, comparing, and the options of a download."""

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
    """Read an adapter's config; if its tuner is not installed, say which distribution wrote the weights.

    Raises:
        UnknownTunerError, ConfigFileError: as `PeftConfig.from_pretrained`.
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


def note_offload(config: PeftConfig, ephemeral: bool) -> None:
    """Set `runtime_config.ephemeral_gpu_offload` of a config if `ephemeral`; warn where the config has no such field."""
    if not ephemeral:
        return
    runtime = getattr(config, "runtime_config", None)
    if runtime is None:
        warnings.warn(f"ephemeral_gpu_offload has no effect on adapters of {config.peft_type!s}", PeftWarning, stacklevel=5)
    else:
        runtime.ephemeral_gpu_offload = True


def take_hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the download options among keywords.

    Raises:
        TypeError: there are others.
    """
    known = (*HUB_KEYS, "subfolder")
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        near = did_you_mean(unknown[0], known)
        raise TypeError(f"unexpected keyword argument(s) {', '.join(map(repr, unknown))}{f'; {near}' if near else ''}")
    return dict(kwargs)


def default_key_mapping(base: nn.Module, config: PeftConfig) -> Mapping[str, str] | None:
    """Return the base's own renaming of old checkpoints, if it has one."""
    if config.is_prompt_learning:
        return None
    mapping = getattr(base, "_checkpoint_conversion_mapping", None)
    return mapping if isinstance(mapping, Mapping) and mapping else None


#: what two configs may differ in without computing differently
_IRRELEVANT = frozenset({"inference_mode", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "task_type", "target_modules"})


def check_same_effect(present: PeftConfig, loaded: PeftConfig, adapter: str, allowed: frozenset[str] = frozenset()) -> None:
    """Check that weights saved with one config can be used under another.

    Args:
        present, loaded: the two configs.
        adapter: for messages.
        allowed: further fields in which they may differ.

    Raises:
        ConfigError: they compute differently; the message names the fields.
    """
    ours, theirs = present.to_dict(), loaded.to_dict()
    if ours.get("peft_type") != theirs.get("peft_type"):
        raise ConfigError(
            f"the adapter {adapter!r} is {ours.get('peft_type')}, the file's is {theirs.get('peft_type')}", hint="load it under another name"
        )
    differing = [
        f"{name}={theirs.get(name)!r} instead of {ours.get(name)!r}"
        for name in sorted({*ours, *theirs} - _IRRELEVANT - allowed)
        if (ours.get(name) or None) != (theirs.get(name) or None)
    ]
    if differing:
        raise ConfigError(
            f"the adapter {adapter!r} exists with another config than the file's: {', '.join(differing)}",
            hint="load it under another name, or delete_adapter the existing one first",
            code="other-config",
        )
