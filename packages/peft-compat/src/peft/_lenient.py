"""The model classes with the defaults that users of this module expect: loading warns about missing tensors instead of raising."""

from __future__ import annotations

from typing import Any

from torch import nn

import peft_core
from peft_core.models import factory


class _Lenient(type(nn.Module)):  # type: ignore[misc]
    """A class that takes instances of the class of core that it derives from for its own: which of the two made a model does not matter.

    Classes that users derive from it are ordinary ones.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        found: bool = isinstance(instance, cls.__mro__[1]) if cls.__module__ == MODULE else super().__instancecheck__(instance)
        return found

    def __subclasscheck__(cls, subclass: type) -> bool:
        found: bool = issubclass(subclass, cls.__mro__[1]) if cls.__module__ == MODULE else super().__subclasscheck__(subclass)
        return found


MODULE = "peft.peft_model"


def _lenient(core: type) -> Any:
    members = {"__module__": MODULE, "__doc__": core.__doc__, "strict_loading": "warn", "class_for": classmethod(_class_for)}
    return _Lenient(core.__name__, (core,), members)


def _class_for(cls: Any, task: str) -> Any:
    """Return the class of models for a task, as in `TaskType`; this one for others."""
    return cls if issubclass(cls, PeftMixedModel) else MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task, cls)


PeftModel = _lenient(peft_core.PeftModel)
PeftModelForSequenceClassification = _lenient(peft_core.PeftModelForSequenceClassification)
PeftModelForTokenClassification = _lenient(peft_core.PeftModelForTokenClassification)
PeftModelForQuestionAnswering = _lenient(peft_core.PeftModelForQuestionAnswering)
PeftModelForFeatureExtraction = _lenient(peft_core.PeftModelForFeatureExtraction)
PeftModelForCausalLM = _lenient(peft_core.PeftModelForCausalLM)
PeftModelForSeq2SeqLM = _lenient(peft_core.PeftModelForSeq2SeqLM)
PeftMixedModel = _lenient(peft_core.PeftMixedModel)
MODEL_TYPE_TO_PEFT_MODEL_MAPPING = {task: globals()[kind.__name__] for task, kind in peft_core.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items()}


def get_peft_model(
    model: nn.Module,
    peft_config: peft_core.PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """As `peft_core.get_peft_model`, with the classes of this module."""
    kind = PeftMixedModel if mixed else PeftModel
    return factory.wrap(kind, model, peft_config, adapter_name, autocast_adapter_dtype, revision, low_cpu_mem_usage)


def _auto(core: Any) -> Any:
    members = {"__module__": "peft.auto", "__doc__": core.__doc__, "class_for": classmethod(lambda cls, task: PeftModel.class_for(task or ""))}
    return type(core.__name__, (core,), members)


AutoPeftModel = _auto(peft_core.AutoPeftModel)
AutoPeftModelForCausalLM = _auto(peft_core.AutoPeftModelForCausalLM)
AutoPeftModelForSeq2SeqLM = _auto(peft_core.AutoPeftModelForSeq2SeqLM)
AutoPeftModelForSequenceClassification = _auto(peft_core.AutoPeftModelForSequenceClassification)
AutoPeftModelForTokenClassification = _auto(peft_core.AutoPeftModelForTokenClassification)
AutoPeftModelForQuestionAnswering = _auto(peft_core.AutoPeftModelForQuestionAnswering)
AutoPeftModelForFeatureExtraction = _auto(peft_core.AutoPeftModelForFeatureExtraction)
