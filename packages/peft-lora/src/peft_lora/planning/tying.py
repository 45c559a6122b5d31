"""`ensure_weight_tying`: layers whose weight is one and the same in the base, an embedding and its output layer, have one A and one B.

The embedding has the parameters. The others use them transposed: with ΔE = s·(BA)ᵀ (vocabulary, dim), the output layer's ΔW is the same
matrix, so that its A is Bᵀ and its B is Aᵀ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from peft_core import AdapterModule, BaseView, ConfigError, InitOptions, LayerTuner, UnsupportedModuleError, Wrap

from ..contracts import LoraSettings
from ..layers.common import LoraLayer
from ..layers.embedding import Embedding
from ..layers.tied import Tie

if TYPE_CHECKING:
    from ..config import LoraConfig


def with_ties(tuner: LayerTuner, base: BaseView, adapter: str, config: LoraConfig, wraps: Sequence[Wrap]) -> Iterator[Wrap]:
    """Yield the wraps of modules; of those whose weight belongs to others too, all get a layer, and one of them the parameters.

    Raises:
        ConfigError: a variant, or `lora_bias`, which has no transposed form.
        UnsupportedModuleError: a module with the weight is neither an embedding nor a Linear.
    """
    planned = {wrap.path: wrap for wrap in wraps}
    done: set[str] = set()
    for wrap in wraps:
        group = base.sharing(wrap.path)
        if not group:
            yield wrap
        if not group or wrap.path in done:
            continue
        done.update(group)
        owner = next(path for path in group if isinstance(base.modules[path], nn.Embedding))
        own: LoraSettings = cast(Any, planned.get(owner, wrap).fill).settings
        _check(base, config, own, group)
        fill = _OwnerFiller(adapter, dataclasses.replace(own, path=owner))
        own.initializer.require_kind("embedding", owner)
        yield Wrap(owner, tuner.builder_for(base.modules[owner], owner), fill)
        for path in group:
            if path != owner:
                yield Wrap(path, tuner.builder_for(base.modules[path], path), _TiedFiller(adapter, dataclasses.replace(own, path=path), fill))


def _check(base: BaseView, config: LoraConfig, settings: LoraSettings, group: Sequence[str]) -> None:
    if settings.variant is not None or config.lora_bias:
        what = settings.variant.name if settings.variant is not None else "lora_bias"
        raise ConfigError(f"ensure_weight_tying does not work with {what}", hint=f"use plain LoRA, or leave {list(group)} out")
    for path in group:
        if not isinstance(base.modules[path], (nn.Embedding, nn.Linear)):
            raise UnsupportedModuleError(
                f"ensure_weight_tying: {path!r}, which has the weight of {group[0]!r}, is a {type(base.modules[path]).__name__}",
                hint="leave ensure_weight_tying out",
            )


@dataclass(frozen=True)
class _OwnerFiller:
    """Adds the parameters."""

    adapter: str
    settings: LoraSettings
    filled: list[Embedding] = field(default_factory=list)

    def __call__(self, layer: Any, init_options: InitOptions) -> None:
        layer.attach(self.adapter, self.settings, init_options)
        if self.adapter in layer.merging.shifts:
            raise ConfigError(
                f"ensure_weight_tying does not work with init_lora_weights={self.settings.config.init_lora_weights!r}, which gives "
                f"{self.settings.path!r} a weight of its own",
                hint="start with True, or leave ensure_weight_tying out",
            )
        self.filled.append(layer)


@dataclass(frozen=True)
class _TiedFiller:
    """Makes a layer use the parameters of another."""

    adapter: str
    settings: LoraSettings
    owner: _OwnerFiller

    def __call__(self, layer: AdapterModule, init_options: InitOptions) -> None:
        assert isinstance(layer, LoraLayer)
        source = self.owner.filled[0]
        tie = Tie(source, self.adapter, transposed=not isinstance(layer, Embedding))
        layer.selection.register_adapter(self.adapter, layer.weight.device)
        layer.record_settings(self.adapter, self.settings)
        layer.tied[self.adapter] = tie
        tie.show_in(layer)
        frozen = source.frozen.get(self.adapter, frozenset())
        layer.frozen[self.adapter] = frozenset({"A": "B", "B": "A"}[end] for end in frozen) if tie.transposed else frozen
