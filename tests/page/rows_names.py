"""§1: names that are importable from the top of our packages."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import peft_core
from peft_core import PeftConfig, TaskType
from peft_core.plugins.registry import registry

TYPES = ("LORA", "LOHA", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")
HOMES = ("peft_core", "peft_lora", "peft_loha", "peft_prompt", "peft_tokens")


def importable(*names: str) -> Callable[[], None]:
    """Return a check that each name comes from the top of one of our packages, and is in its `__all__`."""

    def are_importable() -> None:
        for name in names:
            homes = [home for home in HOMES if name in importlib.import_module(home).__all__]
            assert homes, f"no package of ours has {name}"
            assert getattr(importlib.import_module(homes[0]), name) is not None

    return are_importable


def mapping_leads_from_tasks_to_classes() -> None:
    assert peft_core.MODEL_TYPE_TO_PEFT_MODEL_MAPPING["SEQ_CLS"] is peft_core.PeftModelForSequenceClassification
    assert set(peft_core.MODEL_TYPE_TO_PEFT_MODEL_MAPPING) == {task.value for task in TaskType}


def mapping_is_a_dict() -> None:
    assert isinstance(peft_core.MODEL_TYPE_TO_PEFT_MODEL_MAPPING, dict)


def version_is_text() -> None:
    assert isinstance(peft_core.__version__, str)


def every_config_derives_from_it() -> None:
    assert set(TYPES) <= set(registry.names())
    assert all(issubclass(registry.config_class(name), PeftConfig) for name in registry.names())
