"""Methods that are not installed: importable, refused when used, replaced by a plugin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from torch import Tensor, nn

import peft
import peft_core
from peft import _absent
from peft.tuners.lokr.layer import LoKrLayer, factorization
from peft.tuners.tuners_utils import BaseTunerLayer


@pytest.mark.parametrize("name", sorted(_absent.METHOD_OF))
def test_a_stand_in_says_what_to_install(name: str) -> None:
    kind = _absent.stand_in(name)
    assert isinstance(kind, type)
    assert kind.__name__ == name
    with pytest.raises(peft_core.PeftError, match=f"the method {_absent.METHOD_OF[name]} is not installed; install a package that provides"):
        kind()


@pytest.mark.parametrize("name", ["LoKrConfig", "OFTConfig", "IA3Config"])
def test_a_config_takes_arguments_before_it_refuses(name: str) -> None:
    kind = getattr(peft, name)
    assert issubclass(kind, peft.PeftConfig)
    with pytest.raises(ValueError, match="is not installed"):
        kind(r=8, alpha=4, target_modules=["q_proj"])


def test_the_layer_that_diffusers_asks_for() -> None:
    kind: Any = LoKrLayer
    assert issubclass(kind, BaseTunerLayer)
    assert kind.adapter_layer_names == ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    assert not isinstance(nn.Linear(1, 1), kind)


@pytest.mark.parametrize(
    ("dimension", "factor", "pair"), [(24, 8, (8, 3)), (24, -1, (4, 6)), (100, 3, (2, 50)), (7, -1, (1, 7)), (36, -1, (6, 6)), (12, 12, (12, 1))]
)
def test_factorization(dimension: int, factor: int, pair: tuple[int, int]) -> None:
    assert factorization(dimension, factor) == pair


@dataclass
class PluginConfig(peft_core.LayerConfig):
    r: int = 8
    default_peft_type: ClassVar[str | None] = "LOKR"


class PluginLayer(peft_core.AdapterLayer):
    containers = ("lokr_w1",)

    def add(self, adapter: str, config: Any) -> None:
        self.new("lokr_w1", adapter, self.matrix_shape, std=1.0)

    def delta_weight(self, adapter: str) -> Tensor:
        return self.lokr_w1[adapter]


class PluginTuner(peft_core.LayerTuner):
    layers = (PluginLayer,)

    def settings(self, config: Any, module: Any) -> Any:
        return config


def test_a_plugin_takes_the_place() -> None:
    assert peft.LoKrConfig is not PluginConfig
    peft_core.register_tuner(peft_core.TunerSpec("LOKR", PluginConfig, PluginTuner, "lokr_"))
    try:
        assert peft.LoKrConfig is PluginConfig
        from peft.tuners.lokr.layer import LoKrLayer as found

        assert found is PluginLayer
        model = peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoKrConfig(target_modules=["0"]))
        assert isinstance(model.base_model, peft.LoKrModel)
        assert not isinstance(model.base_model, peft.LoraModel)
    finally:
        peft_core.unregister_tuner("LOKR")
    assert peft.LoKrConfig is not PluginConfig
