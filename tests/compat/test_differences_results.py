"""Lines of docs/compat.md: what code for the peer has to do otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import peft
from compat.tiny import llama, net, outputs, randomise, rows, worst

pytestmark = pytest.mark.filterwarnings("ignore")


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **fields})


def test_a_layer_that_is_off_is_not_merged() -> None:
    model = randomise(peft.get_peft_model(net(), peft.LoraConfig(r=4, target_modules=["0", "2"])))
    model.get_base_model()[2].enable_adapters(False)
    expected = model(rows())
    assert worst(model.merge_and_unload()(rows()), expected) < 1e-4


def test_an_adapter_that_started_with_nothing_is_saved_as_it_is(tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(), lora())
    model.save_pretrained(tmp_path / "initial")
    randomise(model)
    expected = outputs(model)
    with pytest.warns(UserWarning, match="saved unconverted"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert peft.PeftConfig.from_pretrained(tmp_path / "out").r == 4
    assert worst(outputs(peft.PeftModel.from_pretrained(llama(), tmp_path / "out")), expected) < 1e-6


def test_loading_over_a_start_that_changed_the_base_in_another_way(tmp_path: Path) -> None:
    peft.get_peft_model(llama(), lora(init_lora_weights="olora")).save_pretrained(tmp_path)
    model = peft.get_peft_model(llama(), lora(init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="in another way"):
        model.load_adapter(str(tmp_path), "default")


@pytest.mark.parametrize("how", ["wrapper", "base_model"])
def test_what_the_base_has_is_set_on_the_base(how: str) -> None:
    model = peft.get_peft_model(llama(), lora())
    (model if how == "wrapper" else model.base_model).main_input_name = "text"
    assert model.get_base_model().main_input_name == "text"


@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
def test_adapters_with_different_invocations_are_not_combined(how: str) -> None:
    model = peft.get_peft_model(llama(), lora(alora_invocation_tokens=[4]), "a")
    model.add_adapter("b", lora(alora_invocation_tokens=[5]))
    with pytest.raises(ValueError, match="different tokens"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "both", combination_type=how)


@pytest.mark.parametrize("restore", [None, False, True])
@pytest.mark.parametrize("through", ["wrapper", "base_model"])
def test_unloading_leaves_the_residual_unless_it_is_asked_for(through: str, restore: bool | None) -> None:
    model = peft.get_peft_model(llama(), lora(init_lora_weights="pissa"))
    how = {} if restore is None else {"restore_base": restore}
    base = (model if through == "wrapper" else model.base_model).unload(**how)
    same = torch.equal(base.model.layers[0].self_attn.q_proj.weight, llama().model.layers[0].self_attn.q_proj.weight)
    assert same is bool(restore)
