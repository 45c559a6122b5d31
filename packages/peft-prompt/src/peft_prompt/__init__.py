"""Methods that learn virtual tokens, for peft-core. Names are loaded when they are first used: configs need no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
_MODULE_OF = {
    "PromptTuningConfig": "config",
    "PromptTuningInit": "config",
    "PrefixTuningConfig": "config",
    "PromptEncoderConfig": "config",
    "PromptEncoderReparameterizationType": "config",
    "MultitaskPromptTuningConfig": "config",
    "MultitaskPromptTuningInit": "config",
    "CPTConfig": "config",
    "PromptEmbedding": "prompt_tuning",
    "PromptTuner": "prompt_tuning",
    "PrefixEncoder": "prefix_tuning",
    "PrefixTuner": "prefix_tuning",
    "PromptEncoder": "p_tuning",
    "PromptEncoderTuner": "p_tuning",
    "MultitaskPromptEmbedding": "multitask",
    "MultitaskPromptTuner": "multitask",
    "CPTEmbedding": "cpt",
    "CPTTuner": "cpt",
}
__all__ = ["__version__", *sorted(_MODULE_OF)]

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .config import CPTConfig as CPTConfig
    from .config import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
    from .config import MultitaskPromptTuningInit as MultitaskPromptTuningInit
    from .config import PrefixTuningConfig as PrefixTuningConfig
    from .config import PromptEncoderConfig as PromptEncoderConfig
    from .config import PromptEncoderReparameterizationType as PromptEncoderReparameterizationType
    from .config import PromptTuningConfig as PromptTuningConfig
    from .config import PromptTuningInit as PromptTuningInit
    from .cpt import CPTEmbedding as CPTEmbedding
    from .cpt import CPTTuner as CPTTuner
    from .multitask import MultitaskPromptEmbedding as MultitaskPromptEmbedding
    from .multitask import MultitaskPromptTuner as MultitaskPromptTuner
    from .p_tuning import PromptEncoder as PromptEncoder
    from .p_tuning import PromptEncoderTuner as PromptEncoderTuner
    from .prefix_tuning import PrefixEncoder as PrefixEncoder
    from .prefix_tuning import PrefixTuner as PrefixTuner
    from .prompt_tuning import PromptEmbedding as PromptEmbedding
    from .prompt_tuning import PromptTuner as PromptTuner


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
