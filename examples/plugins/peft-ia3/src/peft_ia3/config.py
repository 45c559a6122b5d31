"""`IA3Config`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from peft_core import ConfigError
from peft_core.config import LayerConfig

#: fields of `LayerConfig` that files of the peer do not have: written only when used
_OPTIONAL = ("layers_to_transform", "layers_pattern")


@dataclass
class IA3Config(LayerConfig):
    """(IA)³: y ⊙ l for keys and values, W(x ⊙ l) for feed-forward layers; l is all that is learned.

    Besides the fields of `LayerConfig`:

    Args:
        feedforward_modules: those of the targets whose *input* is scaled: names or one regular expression, matched as `target_modules` are.
            None: what is usual on the architecture; of the others the output is scaled.
        fan_in_fan_out: read and written for other readers of the file; the layers themselves know how their weight lies.
        init_ia3_weights: start at 1, so that a new adapter changes nothing; False: normally distributed.

    Raises:
        ConfigError: a bad value, or feed-forward modules that are no targets.

    Source: arXiv 2205.05638.
    """

    feedforward_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    default_peft_type: ClassVar[str | None] = "IA3"
    transient: ClassVar[frozenset[str]] = frozenset({"rank_pattern", "alpha_pattern"})  # there is no rank

    def check(self) -> None:
        """Check every value by itself; turns a list of names into a set."""
        super().check()
        if self.rank_pattern or self.alpha_pattern:
            raise ConfigError("IA3 has neither rank nor alpha", hint="leave rank_pattern and alpha_pattern out")
        given = self.feedforward_modules
        if isinstance(given, (list, tuple)):
            self.feedforward_modules = given = set(given)
        elif given is not None and not isinstance(given, (str, set, frozenset)):
            raise ConfigError(f"feedforward_modules={given!r} is a {type(given).__name__}", hint="give a list of names or one regular expression")
        if isinstance(given, (set, frozenset)) and isinstance(self.target_modules, (set, frozenset)):
            others = sorted(name for name in given if not _names(name, self.target_modules))
            if others:
                raise ConfigError(
                    f"`feedforward_modules` should be a subset of `target_modules`: {others} are no targets",
                    hint="add them to target_modules",
                )

    def to_dict(self) -> dict[str, Any]:
        """Return every field that belongs in a file."""
        return {name: value for name, value in super().to_dict().items() if value is not None or name not in _OPTIONAL}


def _names(name: str, targets: set[str] | frozenset[str]) -> bool:
    """Return whether what `name` matches is matched by the targets, or the other way round ("down_proj", "mlp.down_proj")."""
    return any(name == target or name.endswith(f".{target}") or target.endswith(f".{name}") for target in targets)
