"""`ensure_weight_tying`: where modules of the base share a weight (an embedding and its output layer), their LoRA layers share A and B.

The layer around the embedding has the parameters and is called the owner. With ΔE = s·(BA)ᵀ (vocabulary, dim), the ΔW of an output layer is the same
matrix, so the output layer uses Bᵀ as its A and Aᵀ as its B. A further embedding uses A and B without transposition.
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
    """Yield `wraps`, but replace the wrap of a tied module by wraps of all modules with the same weight; they share one embedding's A and B.

    Raises:
        ConfigError: tied modules are targets, and the config has a variant or `lora_bias`, neither of which has a transposed form.
        UnsupportedModuleError: a tied module is neither an Embedding nor a Linear.
    """
    planned = {wrap.path: wrap for wrap in wraps}
    done: set[str] = set()
    for wrap in wraps:
        group = base.sharing(wrap.path)
        if not group:
            yield wrap
            continue
        if wrap.path in done:
            continue
        done.update(group)
        owner = next(path for path in group if isinstance(base.modules[path], nn.Embedding))
        settings: LoraSettings = cast(Any, planned.get(owner, wrap).fill).settings  # the owner may be no target
        _check_tieable(base, config, settings, group)
        owner_filler = _OwnerFiller(adapter, dataclasses.replace(settings, path=owner))
        settings.initializer.require_kind("embedding", owner)
        yield Wrap(owner, tuner.builder_for(base.modules[owner], owner), owner_filler)
        for path in group:
            if path != owner:
                filler = _TiedFiller(adapter, dataclasses.replace(settings, path=path), owner_filler)
                yield Wrap(path, tuner.builder_for(base.modules[path], path), filler)


def _check_tieable(base: BaseView, config: LoraConfig, settings: LoraSettings, group: Sequence[str]) -> None:
    if settings.variant is not None or config.lora_bias:
        what = settings.variant.name if settings.variant is not None else "lora_bias"
        raise ConfigError(f"ensure_weight_tying does not work with {what}", hint=f"use plain LoRA, or leave {list(group)} out")
    for path in group:
        if not isinstance(base.modules[path], (nn.Embedding, nn.Linear)):
            raise UnsupportedModuleError(
                f"ensure_weight_tying: {path!r}, which shares its weight with {group[0]!r}, is a {type(base.modules[path]).__name__}",
                hint="leave ensure_weight_tying out",
            )


@dataclass(frozen=True)
class _OwnerFiller:
    """Creates the parameters in the owner's layer, and then appends this layer to `layers`, where the tied modules find it."""

    adapter: str
    settings: LoraSettings
    layers: list[Embedding] = field(default_factory=list)

    def __call__(self, layer: Any, init_options: InitOptions) -> None:
        layer.attach(self.adapter, self.settings, init_options)
        if self.adapter in layer.merging.shifts:
            raise ConfigError(
                f"ensure_weight_tying does not work with init_lora_weights={self.settings.config.init_lora_weights!r}, which gives "
                f"{self.settings.path!r} a weight of its own",
                hint="start with True, or leave ensure_weight_tying out",
            )
        self.layers.append(layer)


@dataclass(frozen=True)
class _TiedFiller:
    """Makes a tied module's layer use the parameters of the owner's layer."""

    adapter: str
    settings: LoraSettings
    owner: _OwnerFiller

    def __call__(self, layer: AdapterModule, init_options: InitOptions) -> None:
        assert isinstance(layer, LoraLayer)
        source = self.owner.layers[0]
        tie = Tie(source, self.adapter, transposed=not isinstance(layer, Embedding))
        layer.selection.register_adapter(self.adapter, layer.weight.device)
        layer.record_settings(self.adapter, self.settings)
        layer.tied[self.adapter] = tie
        tie.show_in(layer)
        frozen = source.frozen.get(self.adapter, frozenset())
        layer.frozen[self.adapter] = frozenset({"A": "B", "B": "A"}[factor] for factor in frozen) if tie.transposed else frozen
