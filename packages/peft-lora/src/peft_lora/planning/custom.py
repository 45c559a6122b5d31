"""Layers of one's own that a config was told of: made by their own constructor, not by ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from peft_core import AdapterModule, AdapterSelection, ConfigError, InitOptions, Wrap

from ..contracts import LoraSettings


@dataclass(frozen=True)
class CustomBuilder:
    """Makes a layer of a class that a config names, with the first adapter in it."""

    kind: type[Any]
    selection: AdapterSelection
    adapter: str = ""
    settings: LoraSettings | None = None

    def __call__(self, module: nn.Module) -> AdapterModule:
        settings = self.settings
        assert settings is not None
        made = self.kind(module, self.adapter, config=settings.config, r=settings.r, lora_alpha=settings.alpha)
        if not isinstance(made, nn.Module) or not isinstance(made, AdapterModule):
            raise ConfigError(
                f"{self.kind.__name__} is no layer of adapters", hint="derive it from nn.Module and peft.tuners.lora.layer.LoraLayer, in this order"
            )
        made.__dict__["selection"] = self.selection
        return made


@dataclass(frozen=True)
class CustomFiller:
    """Adds another adapter to such a layer."""

    adapter: str
    settings: LoraSettings

    def __call__(self, layer: Any, init_options: InitOptions) -> None:
        if self.adapter not in layer.adapters():
            layer.update_layer(self.adapter, self.settings.r, lora_alpha=self.settings.alpha, config=self.settings.config)
        for parameter in layer.parameters_of(self.adapter).values():
            parameter.requires_grad_(False)


def custom_wraps(adapter: str, wraps: Iterable[Wrap]) -> Iterator[Wrap]:
    """Yield those of `wraps` that make layers of one's own, told what they are to make for `adapter`."""
    for wrap in wraps:
        if isinstance(wrap.build, CustomBuilder):
            settings: LoraSettings = wrap.fill.settings  # type: ignore[attr-defined]
            yield Wrap(wrap.path, replace(wrap.build, adapter=adapter, settings=settings), CustomFiller(adapter, settings))
