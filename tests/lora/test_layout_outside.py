"""Adapters for a base in another layout, read as a plugin says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_core import BaseView, CheckpointTranslation, PeftModel, get_peft_model, hookimpl
from peft_core.plugins import registry
from peft_lora import CheckpointLayout, LayoutSpec, LoraConfig, LoraTuner

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def base(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Module()
    inner.add_module(name, nn.Linear(4, 4))
    inner.forward = lambda x: inner.get_submodule(name)(x)
    return nn.Sequential(inner)


class Projection(CheckpointLayout):
    """What is `up` now was `projection`."""

    @classmethod
    def adapted_config(cls, base: BaseView, config: LoraConfig, *, shared: bool) -> Mapping[str, Any]:
        return {"target_modules": {"up"}} if "projection" in (config.target_modules or ()) and "up" in base.leaf_names else {}

    @classmethod
    def translate(cls, base: BaseView, config: LoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> CheckpointTranslation | None:
        if not any(".projection." in key for key in shapes) or "up" not in base.leaf_names:
            return None

        def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {key.replace(".projection.", ".up."): tensor for key, tensor in tensors.items()}

        return CheckpointTranslation(cls.adapted_config(base, config, shared=True), convert)

    @classmethod
    def loading_conversions(cls, conversions: Sequence[Any], adapter: str, config: LoraConfig) -> list[Any]:
        return [*conversions, SimpleNamespace(source_patterns=["projection"], target_patterns=[f"up.{adapter}"])]


class Plugin:
    @hookimpl
    def peft_lora_layouts(self) -> list[LayoutSpec]:
        return [LayoutSpec("projection", Projection)]


@pytest.fixture
def plugin() -> Iterator[None]:
    offered = Plugin()
    registry.register_plugin(offered)
    yield
    registry.unregister_plugin(offered)


def test_a_file_of_another_layout_computes_what_it_computed(plugin: None, tmp_path: Path) -> None:
    old = get_peft_model(base("projection"), LoraConfig(r=2, target_modules=["projection"], init_lora_weights=False))
    old.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base("up"), tmp_path)
    torch.testing.assert_close(model(X), old(X))
    assert model.targeted_module_names == ["0.up"]


def test_a_new_adapter_may_use_the_old_names(plugin: None) -> None:
    model = get_peft_model(base("up"), LoraConfig(r=2, target_modules=["projection"]))
    assert model.targeted_module_names == ["0.up"]


def test_other_loaders_are_told(plugin: None) -> None:
    one = SimpleNamespace(source_patterns=["a"], target_patterns=["b"])
    first, second = LoraTuner.loading_conversions([one], "french", LoraConfig())
    assert first is one
    assert second.target_patterns == ["up.french"]


def test_a_layout_by_itself_changes_nothing() -> None:
    view, config = BaseView(base("up")), LoraConfig()
    assert CheckpointLayout.adapted_config(view, config, shared=True) == {}
    assert CheckpointLayout.translate(view, config, {}) is None
    assert CheckpointLayout.loading_conversions(["one"], "default", config) == ["one"]
