"""Constants (file names, module names, dtypes) that code written for upstream imports. In our packages, each constant is in the file that uses it."""

from __future__ import annotations

import torch

from peft_core.checkpoint.embeddings import EMBEDDING_LAYER_NAMES as EMBEDDING_LAYER_NAMES
from peft_core.checkpoint.files import SAFETENSORS_WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from peft_core.checkpoint.files import WEIGHTS_NAME as WEIGHTS_NAME
from peft_core.config.reading import CONFIG_NAME as CONFIG_NAME
from peft_core.tuners.targeting import DUMMY as DUMMY_TARGET_MODULES
from peft_core.tuners.targeting import default_targets_by_model_type

#: usual module names of classification heads
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]

#: model type → the default target modules if a config sets none: module names, or one regular expression
DEFAULT_TARGETS = default_targets_by_model_type()

#: names of 8-bit dtypes whose adapter weights are cast to float32; names, because older versions of torch lack some of the dtypes
UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")

#: dtypes in which LoRA layers compute
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: keyword arguments of a model call that are meant for variants of LoRA
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
