"""The public names, for type checkers, editors, and `lazy_loader`, which reads where each one is."""

from .config import LoHaConfig as LoHaConfig
from .layers.common import LoHaLayer as LoHaLayer
from .layers.convolution import Convolution as Convolution
from .layers.embedding import Embedding as Embedding
from .layers.linear import Linear as Linear
from .model import LoHaModel as LoHaModel
from .tuner import LoHaTuner as LoHaTuner

__version__: str
__all__ = [
    "Convolution",
    "Embedding",
    "Linear",
    "LoHaConfig",
    "LoHaLayer",
    "LoHaModel",
    "LoHaTuner",
]
