"""An initialiser and a variant of somebody else: registered in the process, and as an installed distribution."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_core import ConfigError, NoMatchingPeftModuleError, PeftConfig, PeftModel, PeftWarning, PluginError, get_peft_model, hookimpl
from peft_core.plugins import registry
from peft_lora import InitialFactors, Initializer, InitializerSpec, LoraConfig, LoraLayer, LoraSettings, Variant, VariantSpec
from peft_lora.offers import variant_specs
from support import distribution, features, net, run_python


class Corner(Initializer):
    """A and B start as the first rows and columns of a unit matrix; what they add leaves the base."""

    needs_base = True

    def subtracts_start(self) -> bool:
        return True

    def start(self, layer: LoraLayer, settings: LoraSettings) -> InitialFactors:
        out, inp = layer.matrix_shape
        return InitialFactors(torch.eye(settings.r, inp), torch.eye(out, settings.r), base_offset=True)


@dataclass
class Diagonal:
    """Settings of `Diagonally`: what stands on the diagonals."""

    value: float
    note: str = ""


class Diagonally(Corner):
    """As `Corner`, with another number, and with marks on the base that go when the adapter is there."""

    @classmethod
    def adapter_added(cls, base: nn.Module, config: LoraConfig) -> None:
        for module in base.modules():
            module.__dict__.pop("mark", None)

    def start(self, layer: LoraLayer, settings: LoraSettings) -> InitialFactors:
        found = super().start(layer, settings)
        assert layer.get_base_layer().__dict__["mark"]
        return InitialFactors(found.a * settings.config.plugin_settings["diagonal_9"].value, found.b, base_offset=True)


class Gated(Variant):
    """y = base(x) + g·s·B·A·x with a number g that trains."""

    name = "gated"
    containers = ("lora_gate",)

    @classmethod
    def check(cls, config: LoraConfig) -> None:
        if config.use_rslora:
            raise ConfigError("gated LoRA has no rslora")

    def add(self) -> None:
        self.layer.new("lora_gate", self.adapter, (1,), init=torch.Tensor.zero_)

    def contribute(self, x: Tensor, y: Tensor) -> Tensor:
        return y + nn.functional.linear(x, self.delta().to(x.dtype))

    def delta(self) -> Tensor:
        return super().delta() * self.layer.lora_gate[self.adapter]


DIAGONAL = InitializerSpec("diagonal_[0-9]", Diagonally, shown="diagonal_9", settings=Diagonal)


class Plugin:
    @hookimpl
    def peft_lora_initializers(self) -> list[InitializerSpec]:
        return [InitializerSpec("corner", f"{__name__}:Corner"), InitializerSpec("missing", "nobody.knows:It"), DIAGONAL]

    @hookimpl
    def peft_lora_variants(self) -> list[VariantSpec]:
        return [VariantSpec("gated", f"{__name__}:Gated")]


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    # pytest does not put test modules where an import by name finds them
    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(Corner=Corner, Gated=Gated))
    offered = Plugin()
    registry.register_plugin(offered)
    yield
    registry.unregister_plugin(offered)


def test_an_initialiser_from_outside(plugin: None, tmp_path: Path) -> None:
    x = features()
    expected = net()(x)
    model = get_peft_model(net(), LoraConfig(r=2, lora_alpha=3, target_modules=["up"], init_lora_weights="corner"))
    layer = model.base_model.model.layers[0].up
    assert torch.equal(layer.lora_A["default"].weight, torch.eye(2, 4))
    torch.testing.assert_close(layer.get_base_layer().weight, net().layers[0].up.weight - 1.5 * torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])))
    torch.testing.assert_close(model(x), expected)
    model.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(0.3)
    model.save_pretrained(tmp_path / "trained")
    torch.testing.assert_close(PeftModel.from_pretrained(net(), tmp_path / "trained")(x), model(x))
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    torch.testing.assert_close(PeftModel.from_pretrained(net(), tmp_path / "plain")(x), model(x))
    torch.testing.assert_close(model.unload(restore_base=True)(x), expected)


def test_plugins_are_asked_once_and_anew_after_one_came_or_went() -> None:
    class Counting:
        asked = 0

        @hookimpl
        def peft_lora_variants(self) -> list[VariantSpec]:
            self.asked += 1
            return [VariantSpec("counted", f"{__name__}:Gated")]

    counting, another = Counting(), Plugin()
    registry.register_plugin(counting)
    try:
        for _ in range(3):
            assert "counted" in {spec.name for spec in variant_specs()}
        assert counting.asked == 1
        registry.register_plugin(another)
        assert {"counted", "gated"} <= {spec.name for spec in variant_specs()}
        registry.unregister_plugin(another)
        assert "gated" not in {spec.name for spec in variant_specs()}
        assert counting.asked == 3
    finally:
        registry.unregister_plugin(counting)
    assert "counted" not in {spec.name for spec in variant_specs()}


def marked() -> nn.Module:
    base = net()
    for module in base.modules():
        module.__dict__["mark"] = True
    return base


def test_an_initialiser_with_settings_cleans_up(plugin: None, tmp_path: Path) -> None:
    given = {"diagonal_9": {"value": 3.0}}
    config = LoraConfig(r=2, target_modules=["up"], init_lora_weights="diagonal_4", plugin_settings=given)
    assert config.plugin_settings == {"diagonal_9": Diagonal(3.0)}
    base = marked()
    with pytest.raises(NoMatchingPeftModuleError):
        get_peft_model(base, LoraConfig(target_modules=["nowhere"], init_lora_weights="diagonal_4", plugin_settings=given))
    assert base.layers[0].mark, "adding failed"
    model = get_peft_model(base, config)
    assert not any(hasattr(module, "mark") for module in base.modules())
    assert torch.equal(model.base_model.model.layers[0].up.lora_A["default"].weight, 3 * torch.eye(2, 4))
    model.save_pretrained(tmp_path / "initial")
    assert PeftConfig.from_pretrained(tmp_path / "initial").plugin_settings == {"diagonal_9": Diagonal(3.0)}
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    assert PeftConfig.from_pretrained(tmp_path / "plain").plugin_settings is None
    torch.testing.assert_close(PeftModel.from_pretrained(net(), tmp_path / "plain")(features()), model(features()))


def test_settings_that_do_not_fit_are_refused(plugin: None) -> None:
    with pytest.raises(ConfigError, match=r"plugin_settings\['diagonal_9'\] lacks 'value'"):
        LoraConfig(init_lora_weights="diagonal_4")
    with pytest.raises(ConfigError, match="gated has no settings"):
        LoraConfig(variant="gated", plugin_settings={"gated": {}})
    with pytest.raises(ConfigError, match="give a dict"):
        LoraConfig(variant="gated", plugin_settings=["gated"])
    with pytest.warns(PeftWarning, match=r"plugin_settings\['diagonal_9'\] is ignored: the config asks for no variant or initialiser of this name"):
        assert LoraConfig(plugin_settings={"diagonal_9": {"value": 1.0}}).plugin_settings is None


def test_a_variant_from_outside(plugin: None, tmp_path: Path) -> None:
    x = features()
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["up"], variant="gated", init_lora_weights=False))
    torch.testing.assert_close(model(x), net()(x))
    layer = model.base_model.model.layers[0].up
    model(x).sum().backward()
    assert layer.lora_gate["default"].grad.abs().max() > 0
    with torch.no_grad():
        layer.lora_gate["default"].fill_(2.0)
        expected = model(x)
        assert (expected - net()(x)).abs().max() > 1e-3
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(PeftModel.from_pretrained(net(), tmp_path)(x), expected)
        torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_both_together(plugin: None) -> None:
    model = get_peft_model(net(), LoraConfig(r=2, lora_alpha=2, target_modules=["up"], variant="gated", init_lora_weights="corner"))
    with torch.no_grad():
        for block in model.base_model.model.layers:
            block.up.lora_gate["default"].fill_(1.0)
        torch.testing.assert_close(model(features()), net()(features()))


def test_what_plugins_say_is_listened_to(plugin: None) -> None:
    with pytest.raises(ConfigError, match="gated LoRA has no rslora"):
        get_peft_model(net(), LoraConfig(target_modules=["up"], variant="gated", use_rslora=True))
    with pytest.raises(ConfigError, match="several variants of LoRA"):
        get_peft_model(net(), LoraConfig(target_modules=["up"], variant="gated", use_dora=True))
    with pytest.raises(ConfigError, match="init_lora_weights='cornr' is unknown; did you mean 'corner'"):
        LoraConfig(init_lora_weights="cornr")
    with pytest.raises(PluginError, match=r"'nobody.knows:It' can't be imported"):
        get_peft_model(net(), LoraConfig(target_modules=["up"], init_lora_weights="missing"))


def test_without_the_plugin_its_names_are_unknown() -> None:
    with pytest.raises(ConfigError, match="init_lora_weights='corner' is unknown"):
        LoraConfig(init_lora_weights="corner")
    with pytest.raises(ConfigError, match="variant='gated' is unknown"):
        get_peft_model(net(), LoraConfig(target_modules=["up"], variant="gated"))


SOURCES = {
    "outer_plugin": """
        from peft_core import hookimpl
        from peft_lora import InitializerSpec, VariantSpec

        @hookimpl
        def peft_lora_initializers():
            yield InitializerSpec("ones", "outer_classes:Ones")
            yield InitializerSpec("gaussian", "outer_classes:Ones")  # ours is replaced

        @hookimpl
        def peft_lora_variants():
            yield VariantSpec("doubled", "outer_classes:Doubled")
    """,
    "outer_classes": """
        import torch
        from peft_lora import Initializer, InitialFactors, Variant

        class Ones(Initializer):
            def start(self, layer, settings):
                return InitialFactors(torch.Tensor.zero_, lambda b: b.fill_(1.0))

        class Doubled(Variant):
            name = "doubled"

            def contribute(self, x, y):
                return y + x @ self.delta().T

            def delta(self):
                return 2 * super().delta()
    """,
}


def test_an_installed_distribution(tmp_path: Path) -> None:
    distribution(tmp_path, "peft-outer", plugins={"outer": "outer_plugin"}, requires=("peft-core>=0.1",), modules=SOURCES)
    printed = run_python(
        """
        import sys
        import peft_core, peft_lora
        config = peft_lora.LoraConfig(r=2, lora_alpha=2, target_modules=["0"], init_lora_weights="ones", variant="doubled")
        print("torch" in sys.modules, "outer_classes" in sys.modules)
        import torch
        model = peft_core.get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 4)), config)
        layer = model.base_model.model[0]
        with torch.no_grad():
            layer.lora_A["default"].weight.fill_(1.0)
        print(layer.get_delta_weight("default").unique().tolist())
        other = peft_lora.LoraConfig(r=2, target_modules=["0"], init_lora_weights="gaussian")
        model = peft_core.get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 4)), other)
        print(model.base_model.model[0].lora_B["default"].weight.unique().tolist())
        """,
        path=tmp_path,
    )
    assert printed.splitlines() == ["False False", "[4.0]", "[1.0]"]


class OtherRank(Initializer):
    """Gives factors of a rank of its own."""

    def start(self, layer: LoraLayer, settings: LoraSettings) -> InitialFactors:
        out, inp = layer.matrix_shape
        return InitialFactors(torch.ones(settings.r + 1, inp), torch.zeros(out, settings.r + 1))


def test_factors_of_another_rank_are_refused_where_their_file_could_not_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Offer:
        @hookimpl
        def peft_lora_initializers(self) -> list[InitializerSpec]:
            return [InitializerSpec("other_rank", OtherRank)]

    offered = Offer()
    registry.register_plugin(offered)
    try:
        config = LoraConfig(r=2, target_modules=["up"], init_lora_weights="other_rank")
        with pytest.raises(ConfigError, match="needs_base"):
            get_peft_model(net(), config)
        monkeypatch.setattr(OtherRank, "needs_base", True)
        model = get_peft_model(net(), config)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(net(), tmp_path)
        torch.testing.assert_close(again(features()), model(features()))
    finally:
        registry.unregister_plugin(offered)
