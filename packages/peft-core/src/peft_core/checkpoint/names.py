"""Names of files and modules that writers and readers of the format agree on, in one place for who asks for them."""

from __future__ import annotations

from ..config.reading import CONFIG_NAME as CONFIG_NAME
from ..tuners.targeting import DUMMY as DUMMY_TARGET_MODULES
from ..tuners.targeting import defaults
from .embeddings import EMBEDDING_LAYER_NAMES as EMBEDDING_LAYER_NAMES
from .files import SAFETENSORS_WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from .files import WEIGHTS_NAME as WEIGHTS_NAME

#: what heads of classifiers are usually called
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]

#: model type → the modules that are adapted where a config says nothing: names, or one regular expression
DEFAULT_TARGETS = defaults()

__all__ = [
    "DEFAULT_TARGETS",
    "CONFIG_NAME",
    "DUMMY_TARGET_MODULES",
    "EMBEDDING_LAYER_NAMES",
    "SAFETENSORS_WEIGHTS_NAME",
    "SEQ_CLS_HEAD_NAMES",
    "WEIGHTS_NAME",
]
