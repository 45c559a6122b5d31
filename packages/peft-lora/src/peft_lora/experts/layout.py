"""Adapters for mixture-of-experts models in which each expert is a module, as peft-lora offers to read them (`peft_lora_layouts`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_core import BaseView, CheckpointTranslation

from ..contracts import CheckpointLayout
from . import fused, loading

if TYPE_CHECKING:
    from ..config import LoraConfig


class ExpertsAsModules(CheckpointLayout):
    """Adapters with one module for each expert, for a base that has all experts in one parameter."""

    @classmethod
    def adapted_config(cls, base: BaseView, config: LoraConfig, *, shared: bool) -> Mapping[str, Any]:
        """Return the fields of a config that names projections of single experts."""
        return loading.adapted_config(base, config, shared=shared)

    @classmethod
    def translate(cls, base: BaseView, config: LoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> CheckpointTranslation | None:
        """Return how a file with one module for each expert is read."""
        return fused.translation(base, config, shapes)

    @classmethod
    def loading_conversions(cls, conversions: Sequence[Any], adapter: str, config: LoraConfig) -> list[Any]:
        """Return transformers' conversions with those of experts replaced by what joins factors."""
        return loading.conversions(conversions, adapter, config)
