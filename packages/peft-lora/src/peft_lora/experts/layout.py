"""The checkpoint layout of mixture-of-experts adapters with one module for each expert; peft-lora provides it through `peft_lora_layouts`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_core import BaseView, CheckpointTranslation

from ..contracts import CheckpointLayout
from . import fused, loading

if TYPE_CHECKING:
    from ..config import LoraConfig


class ExpertsAsModules(CheckpointLayout):
    """Reads adapters with one module for each expert, for a base that fuses all experts into one parameter."""

    @classmethod
    def adapted_config(cls, base: BaseView, config: LoraConfig, *, shared: bool) -> Mapping[str, Any]:
        """Return the changed fields of a config that targets projections of single experts; see `loading.adapted_config`."""
        return loading.adapted_config(base, config, shared=shared)

    @classmethod
    def translate(cls, base: BaseView, config: LoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> CheckpointTranslation | None:
        """Return how to convert a file with one module for each expert; see `fused.translation`."""
        return fused.translation(base, config, shapes)

    @classmethod
    def loading_conversions(cls, conversions: Sequence[Any], adapter: str, config: LoraConfig) -> list[Any]:
        """Return transformers' conversions, with those for experts replaced; see `loading.conversions`."""
        return loading.conversions(conversions, adapter, config)
