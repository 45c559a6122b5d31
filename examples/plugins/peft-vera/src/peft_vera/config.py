"""`VeraConfig`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from peft_core import ConfigError, SharedOptions
from peft_core.config import LayerConfig, require_number, require_positive_integer, require_probability

#: ours → core's
_BIAS = {"none": "none", "all": "all", "vera_only": "targets"}


@dataclass
class VeraConfig(LayerConfig):
    """VeRA: ΔW = diag(b) B diag(d) A with frozen random A (r, max in) and B (max out, r), the same in all layers.

    Besides the fields of `LayerConfig`:

    Args:
        r: rows of A and columns of B. Large ranks are usual: a layer learns r + out numbers.
        projection_prng_key: seed of A and B.
        save_projection: write A and B into files; False: they are drawn again from the seed when the file is read.
        vera_dropout: in training inputs of the adapter are dropped with this probability, in [0, 1).
        d_initial: initial value of d.
        fan_in_fan_out: read and written for other readers of the file; the layers themselves know how their weight lies.
        bias: which biases of the base train: ``"none"``, ``"all"``, ``"vera_only"`` (those of adapted modules).
        init_weights: b starts at 0, so that a new adapter changes nothing; False: b at 1 and d normally distributed.

    Raises:
        ConfigError: a bad value.

    Source: arXiv 2310.11454.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    default_peft_type: ClassVar[str | None] = "VERA"
    transient: ClassVar[frozenset[str]] = frozenset({"rank_pattern", "alpha_pattern"})  # all layers share one A and B

    def check(self) -> None:
        """Check every value by itself."""
        super().check()
        require_positive_integer("r", self.r)
        require_number("d_initial", self.d_initial)
        require_probability("vera_dropout", self.vera_dropout)
        if isinstance(self.projection_prng_key, bool) or not isinstance(self.projection_prng_key, int):
            raise ConfigError(f"projection_prng_key={self.projection_prng_key!r} is no integer", hint="0 is as good a seed as any")
        if self.bias not in _BIAS:
            raise ConfigError(f"bias={self.bias!r}", hint=f"write one of {', '.join(_BIAS)}")
        if self.rank_pattern or self.alpha_pattern:
            raise ConfigError("the layers of VERA share one rank", hint="leave rank_pattern and alpha_pattern out")

    def shared_options(self) -> SharedOptions:
        """Return the saved modules and the biases."""
        return SharedOptions(modules_to_save=tuple(self.modules_to_save or ()), bias=_BIAS.get(self.bias, self.bias))

    def to_dict(self) -> dict[str, Any]:
        """Return every field that belongs in a file; other readers do not know `exclude_modules`: it is written where it is used."""
        return {name: value for name, value in super().to_dict().items() if value is not None or name != "exclude_modules"}
