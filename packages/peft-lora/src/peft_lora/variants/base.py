"""What a variant is: another formula around the same A and B, in one layer for one adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from peft_core import BaseView, ConfigError

if TYPE_CHECKING:
    from ..config import LoraConfig
    from ..initializers.base import Start
    from ..layers.common import LoraLayer, LoraSettings


class Variant:
    """Base class of variants. One object for each layer and adapter.

    Methods take the input of the base as `x` (rows, …, in) and its output as `y` (rows, …, out).

    Args:
        layer: where the adapter is.
        adapter: its name.
        settings: rank, alpha, the module's path and the whole config.

    Attributes:
        name: for messages.
        kinds: the base layers around which it works (`Initializer.kinds` lists the names).
        containers: attributes of the layer in which it keeps parameters, besides those of plain LoRA; they begin with ``"lora_"``.
        additive: its effect is a sum W + ΔW.
    """

    name: ClassVar[str] = ""
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    containers: ClassVar[tuple[str, ...]] = ()
    additive: ClassVar[bool] = True

    @classmethod
    def check(cls, config: LoraConfig) -> None:
        """Check that a config suits the variant.

        Raises:
            ConfigError: it does not.
        """

    @classmethod
    def require_kind(cls, kind: str, path: str) -> None:
        """Check that the variant works around the `kind` of base layer at `path`.

        Raises:
            ConfigError: it does not.
        """
        if kind not in cls.kinds:
            raise ConfigError(
                f"{cls.name} does not work on {path!r}, which is of the kind {kind!r}",
                hint=f"it knows {', '.join(sorted(cls.kinds))}; leave the module out with exclude_modules",
            )

    @classmethod
    def require_base(cls, base: BaseView) -> None:
        """Check that the variant works on a model, seen as `base`.

        Raises:
            ConfigError: it does not.
        """

    def __init__(self, layer: LoraLayer, adapter: str, settings: LoraSettings) -> None:
        self.layer, self.adapter, self.settings = layer, adapter, settings

    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B as they are stored; by default those of plain LoRA."""
        return self.layer.factor_shapes(self.settings.r)

    def start(self, start: Start) -> Start:
        """Return what A and B start with, given what the initialiser says."""
        return start

    def add(self) -> None:
        """Create the variant's own parameters with `layer.new`; A and B are there already."""

    def contribute(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the base's output `y` for `x` with the adapter's effect. `y` may be overwritten, `x` may not."""
        raise NotImplementedError(f"{type(self).__name__} must define contribute(x, y)")

    def fused_forward(self, x: Tensor, base: nn.Module) -> Tensor | None:
        """Return the whole output of `base` for `x` with the adapter's effect, computed at once, where `can_fuse` allows it; None elsewhere."""
        return None

    def merged_rows(self, weight: Tensor) -> Tensor | None:
        """Return the weight (out, in) of a Linear that does what one with `weight` and the adapter do; None: as `delta` and `factor` say."""
        return None

    def delta(self) -> Tensor:
        """Return s·ΔW (out, in); by default s·B·A.

        Raises:
            MergeError: there is none.
        """
        return self.layer.plain_delta(self.adapter)

    def low_rank_factors(self) -> tuple[Tensor, Tensor] | None:
        """Return s·B (out, r) and A (r, in) of which ΔW is the product; None where there are none."""
        return None

    def buffers(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Yield (end of the file key, module, attribute) for each tensor that files hold and that does not train."""
        return iter(())

    def factor(self) -> Tensor | None:
        """Return what W + ΔW is multiplied by, as a matrix that broadcasts against (out, in); None for a sum."""
        return None

    def drop(self) -> None:
        """Undo what `add` did besides creating parameters."""
