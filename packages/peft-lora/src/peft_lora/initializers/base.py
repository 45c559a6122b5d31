"""What an initialiser is: it says which values A and B of a new adapter start with, and what is taken out of the base in return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from peft_core import ConfigError

if TYPE_CHECKING:
    from ..config import LoraConfig
    from ..layers.common import LoraLayer, LoraSettings


@dataclass(frozen=True)
class Start:
    """What A and B start with, as matrices: A (r, in), B (out, r); for convolutions `in` is in/groups · ∏ kernel.

    Args:
        a, b: values, or functions that fill a float32 tensor in place. Values decide the rank that is stored.
        shift: what is subtracted from the base weight for as long as the adapter exists: True for s·B·A of these values as they are stored,
            a tensor (out, in), or False.
        frozen: which of ``"A"`` and ``"B"`` never train.
    """

    a: Tensor | Callable[[Tensor], Any]
    b: Tensor | Callable[[Tensor], Any]
    shift: bool | Tensor = False
    frozen: frozenset[str] = frozenset()


class Initializer:
    """Base class of initialisers. One object for each adapter; asked once for each layer.

    Args:
        config: the adapter's config.

    Attributes:
        kinds: the base layers that it can start: ``"linear"``, ``"conv1d"``, ``"embedding"``, ``"convolution"``, ``"attention"``, ``"parameter"``.
        needs_base: it looks at the base weight also when a file will overwrite A and B, because it shifts the base.

    Raises:
        ConfigError: the config does not suit it.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    needs_base: ClassVar[bool] = False

    def __init__(self, config: LoraConfig) -> None:
        self.config = config

    def start(self, layer: LoraLayer, settings: LoraSettings) -> Start:
        """Return what the adapter of one layer starts with. Changes nothing.

        Args:
            layer: `layer.base_weight()` is W in its own layout, ``layer.ops.matrix(…)`` makes it (out, in).
            settings: rank, alpha, the module's path and the rest.

        Raises:
            ConfigError: it can't be done for this layer.
        """
        raise NotImplementedError(f"{type(self).__name__} must define start(layer, settings)")

    def require_kind(self, kind: str, path: str) -> None:
        """Check that a base layer is of a kind that this initialiser knows.

        Raises:
            ConfigError: it is not.
        """
        if kind not in self.kinds:
            raise ConfigError(
                f"init_lora_weights={self.config.init_lora_weights!r} can't start {path!r}, which is of the kind {kind!r}",
                hint=f"it knows {', '.join(sorted(self.kinds))}; target other modules, or use init_lora_weights=True",
            )
