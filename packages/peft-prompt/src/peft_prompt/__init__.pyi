"""The public names, for type checkers, editors, and `lazy_loader`, which reads where each one is."""

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

__version__: str
__all__ = [
    "CPTConfig",
    "CPTEmbedding",
    "CPTTuner",
    "MultitaskPromptEmbedding",
    "MultitaskPromptTuner",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "PrefixEncoder",
    "PrefixTuner",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptEncoderTuner",
    "PromptTuner",
    "PromptTuningConfig",
    "PromptTuningInit",
]
