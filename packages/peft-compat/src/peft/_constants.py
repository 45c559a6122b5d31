"""Names of files and modules that code written for upstream imports; ours has each where it is used."""

from __future__ import annotations

import torch

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

#: dtypes of 8 bits whose adapter weights are kept in float32, by name: a torch may lack some
UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")

#: dtypes in which layers of LoRA compute
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: keywords of a call that belong to variants of LoRA
VARIANT_KWARG_KEYS = ["alora_offsets"]

__all__ = [
    "ALLOWED_COMPUTE_DTYPES",
    "UPCAST_DTYPES",
    "VARIANT_KWARG_KEYS",
    "DEFAULT_TARGETS",
    "CONFIG_NAME",
    "DUMMY_TARGET_MODULES",
    "EMBEDDING_LAYER_NAMES",
    "SAFETENSORS_WEIGHTS_NAME",
    "SEQ_CLS_HEAD_NAMES",
    "WEIGHTS_NAME",
]
