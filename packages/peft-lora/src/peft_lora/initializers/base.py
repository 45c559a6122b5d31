"""What an initialiser is: it says which values A and B of a new adapter start with, and what is taken out of the base in return."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from peft_core import ConfigError, PeftWarning
from peft_core.errors import listed

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
        needs_base: it is asked also when a file will supply A and B, because it shifts the base.
        frozen: which of ``"A"`` and ``"B"`` never train, also when they come from a file; for what depends on the layer there is `Start.frozen`.

    Raises:
        ConfigError: the config does not suit it.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    needs_base: ClassVar[bool] = False
    frozen: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        self._told = False

    def start(self, layer: LoraLayer, settings: LoraSettings) -> Start:
        """Return what the adapter of one layer starts with. Changes nothing.

        Args:
            layer: `layer.base_weight()` is W in its own layout, ``layer.ops.matrix(…)`` makes it (out, in).
            settings: rank, alpha, the module's path and the rest.

        Raises:
            ConfigError: it can't be done for this layer.
        """
        raise NotImplementedError(f"{type(self).__name__} must define start(layer, settings)")

    def subtracts_start(self) -> bool:
        """Return whether what it takes out of the base is s·B·A of the values that A and B start with (`Start.shift` is True).

        Then an adapter can be saved relative to the original base, given what it started with.

        Raises:
            ConfigError: it takes out something else, so that it can't.
        """
        return False

    def tell_others(self, adapters: Sequence[str], path: str) -> None:
        """Warn, once, that `adapters`, others of the layer at `path`, see another base from now on."""
        if adapters and not self._told:
            self._told = True
            warnings.warn(
                f"init_lora_weights={self.config.init_lora_weights!r} changes the base weight of {path!r}, and perhaps of others, which "
                f"{listed(adapters)} adapt, too: they compute otherwise until the new adapter is deleted",
                PeftWarning,
                stacklevel=2,
            )

    def require_kind(self, kind: str, path: str) -> None:
        """Check that the `kind` of the base layer at `path` is one that this initialiser knows.

        Raises:
            ConfigError: it is not.
        """
        if kind not in self.kinds:
            raise ConfigError(
                f"init_lora_weights={self.config.init_lora_weights!r} can't start {path!r}, which is of the kind {kind!r}",
                hint=f"it knows {', '.join(sorted(self.kinds))}; target other modules, or use init_lora_weights=True",
            )
