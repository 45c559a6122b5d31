"""The public names, for type checkers, editors, and `lazy_loader`, which reads where each one is."""

from .config import TrainableTokensConfig as TrainableTokensConfig
from .layer import TrainableTokensLayer as TrainableTokensLayer
from .model import TrainableTokensModel as TrainableTokensModel
from .tuner import TrainableTokensTuner as TrainableTokensTuner

__version__: str
__all__ = [
    "TrainableTokensConfig",
    "TrainableTokensLayer",
    "TrainableTokensModel",
    "TrainableTokensTuner",
]
