"""Names of files and modules that code written for upstream imports; ours has each where it is used."""

from __future__ import annotations

from peft_core.checkpoint.embeddings import EMBEDDING_LAYER_NAMES as EMBEDDING_LAYER_NAMES
from peft_core.checkpoint.files import SAFETENSORS_WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from peft_core.checkpoint.files import WEIGHTS_NAME as WEIGHTS_NAME
from peft_core.config.reading import CONFIG_NAME as CONFIG_NAME
from peft_core.tuners.targeting import DUMMY as DUMMY_TARGET_MODULES
from peft_core.tuners.targeting import default_targets_by_model_type

#: what heads of classifiers are usually called
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]

#: model type → the modules that are adapted where a config says nothing: names, or one regular expression
DEFAULT_TARGETS = default_targets_by_model_type()

__all__ = [
    "DEFAULT_TARGETS",
    "CONFIG_NAME",
    "DUMMY_TARGET_MODULES",
    "EMBEDDING_LAYER_NAMES",
    "SAFETENSORS_WEIGHTS_NAME",
    "SEQ_CLS_HEAD_NAMES",
    "WEIGHTS_NAME",
]
