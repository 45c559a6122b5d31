"""Custom layer classes that the user has registered in a config: their constructor is called, instead of those of our layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from peft_core import AdapterModule, AdapterSelection, ConfigError, InitOptions, Wrap

from ..contracts import LoraSettings


@dataclass(frozen=True)
class CustomBuilder:
    """Creates a layer of a custom class from a config; its constructor also adds the first adapter."""

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
                f"{self.kind.__name__} is not an adapter layer", hint="derive it from nn.Module and peft.tuners.lora.layer.LoraLayer, in this order"
            )
        made.__dict__["selection"] = self.selection
        return made


@dataclass(frozen=True)
class CustomFiller:
    """Adds an adapter to a layer of a custom class, if the constructor has not added it, and freezes its parameters."""

    adapter: str
    settings: LoraSettings

    def __call__(self, layer: Any, init_options: InitOptions) -> None:
        if self.adapter not in layer.adapters():
            layer.update_layer(self.adapter, self.settings.r, lora_alpha=self.settings.alpha, config=self.settings.config)
        for parameter in layer.parameters_of(self.adapter).values():
            parameter.requires_grad_(False)


def custom_wraps(adapter: str, wraps: Iterable[Wrap]) -> Iterator[Wrap]:
    """Yield those of `wraps` that create custom layers, completed with the name and the settings of `adapter`."""
    for wrap in wraps:
        if isinstance(wrap.build, CustomBuilder):
            settings: LoraSettings = wrap.fill.settings  # type: ignore[attr-defined]
            yield Wrap(wrap.path, replace(wrap.build, adapter=adapter, settings=settings), CustomFiller(adapter, settings))
