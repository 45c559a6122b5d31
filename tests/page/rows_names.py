"""§1: names that are importable from the top of our packages."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

import peft_core
from peft_core import PeftConfig, TaskType

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


def mappings_lead_from_types_to_classes() -> None:
    assert peft_core.MODEL_TYPE_TO_PEFT_MODEL_MAPPING["SEQ_CLS"] is peft_core.PeftModelForSequenceClassification
    assert set(peft_core.MODEL_TYPE_TO_PEFT_MODEL_MAPPING) == {task.value for task in TaskType}
    for kind in TYPES:
        config = peft_core.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
        assert issubclass(config, PeftConfig)
        assert issubclass(peft_core.PEFT_TYPE_TO_TUNER_MAPPING[peft_core.PeftType(kind)], peft_core.TunerBase)
        assert kind in peft_core.PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    assert peft_core.TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING == {}


def mappings_are_dicts() -> None:
    for name in ("MODEL_TYPE_TO_PEFT_MODEL", "PEFT_TYPE_TO_CONFIG", "PEFT_TYPE_TO_TUNER", "PEFT_TYPE_TO_MIXED_MODEL"):
        assert isinstance(getattr(peft_core, f"{name}_MAPPING"), dict)


def version_is_text() -> None:
    assert isinstance(peft_core.__version__, str)


def every_config_derives_from_it() -> None:
    assert all(issubclass(config, PeftConfig) for config in peft_core.PEFT_TYPE_TO_CONFIG_MAPPING.values())


def device_is_the_best_there_is() -> None:
    assert peft_core.infer_device() == ("cuda" if torch.cuda.is_available() else "cpu")


def transposes_if_stored_so() -> None:
    weight = torch.arange(6.0).view(2, 3)
    assert torch.equal(peft_core.transpose(weight, True), weight.T)
    assert peft_core.transpose(weight, False) is weight
