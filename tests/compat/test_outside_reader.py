"""What code written for `peft` found to be missing or wrong here, and that now works: these tests run on the peer as well."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch

import peft
from compat import tiny


def prompt(**fields: Any) -> Any:
    return peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", **fields)


def trainable(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["default", "second"])
def test_a_second_model_of_one_base_trains_its_prompt(name: str) -> None:
    base = tiny.llama()
    peft.get_peft_model(base, prompt())
    model = peft.get_peft_model(base, prompt(), name)
    weight = dict(model.named_parameters())[f"prompt_encoder.{name}.embedding.weight"]
    assert weight.requires_grad
    assert f"prompt_encoder.{name}.embedding.weight" in model.state_dict()
    tiny.step(model)
    assert any(parameter is weight for parameter in trainable(model))


@pytest.mark.filterwarnings("ignore")
def test_a_prompt_beside_an_adapter_of_another_wrapper_is_a_parameter_of_the_model() -> None:
    base = tiny.llama()
    first = peft.get_peft_model(base, prompt())
    before = first.prompt_encoder["default"].embedding.weight
    second = peft.get_peft_model(base, peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "second")
    assert "prompt_encoder.second.embedding.weight" in dict(second.named_parameters())
    assert first.prompt_encoder["default"].embedding.weight is before


@pytest.mark.parametrize("name", ["PeftError", "PeftWarning", "NoMatchingPeftModuleError", "get_base_model_state_dict", "set_base_model_state_dict"])
def test_names_of_utils(name: str) -> None:
    utils: Any = importlib.import_module("peft.utils")
    assert getattr(utils, name) is getattr(peft, name)
    assert name in utils.__all__


SUB_MODULES = """tuners.trainable_tokens tuners.prompt_tuning.config tuners.p_tuning.model tuners.cpt.model tuners.mixed tuners.loha.config
tuners.lora.eva tuners.lora.conversion utils.loftq_utils utils.peft_types"""


def test_sub_modules_need_no_import_of_their_own() -> None:
    """In a process of its own: in this one other tests may have imported them."""
    lines = "; ".join(["import peft", *(f"peft.{path}" for path in SUB_MODULES.split())])
    subprocess.run([sys.executable, "-c", lines], check=True)


OF_CARTRIDGES = """compose_cartridge_adapters initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text
prompt_embeddings_from_past_key_values"""


@pytest.mark.parametrize("name", OF_CARTRIDGES.split())
def test_functions_of_a_method_that_is_not_installed_can_be_imported(name: str) -> None:
    assert callable(getattr(peft, name))
    assert name in peft.__all__


def test_weights_may_be_a_tensor() -> None:
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    for name, weights in (("tensor", torch.tensor([0.5, 1.0])), ("floats", [0.5, 1.0])):
        model.add_weighted_adapter(["default", "b"], weights, name, "linear")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert torch.equal(layer.get_delta_weight("tensor"), layer.get_delta_weight("floats"))


def test_the_encoder_of_several_tasks_is_called_with_indices_and_tasks() -> None:
    config = peft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2, task_type="CAUSAL_LM")
    model = tiny.randomise(peft.get_peft_model(tiny.llama(), config))
    indices, tasks = model.prompt_tokens["default"].expand(2, -1), torch.tensor([1, 0])
    assert torch.allclose(model.prompt_encoder["default"](indices, tasks), model.get_prompt(2, tasks))
    with pytest.raises(ValueError, match="task_ids cannot be None"):
        model.prompt_encoder["default"](indices, None)
