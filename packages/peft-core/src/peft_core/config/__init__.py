"""Configurations: dataclasses that are `adapter_config.json` in another form. Imports no torch."""

from __future__ import annotations

from .base import LayerConfig, PeftConfig, PromptLearningConfig, SharedOptions, get_peft_config
from .names import PeftType, TaskType
from .reading import CONFIG_NAME, FORMAT_VERSION, HUB_KEYS, config_from_dict, find_config
from .values import require_number, require_positive_integer, require_probability

__all__ = [
    "CONFIG_NAME",
    "FORMAT_VERSION",
    "HUB_KEYS",
    "SharedOptions",
    "LayerConfig",
    "PeftConfig",
    "PeftType",
    "PromptLearningConfig",
    "TaskType",
    "config_from_dict",
    "find_config",
    "get_peft_config",
    "require_number",
    "require_positive_integer",
    "require_probability",
]
