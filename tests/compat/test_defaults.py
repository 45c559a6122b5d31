"""What this module adapts: loading warns about missing tensors; whichever of the two modules made a model does not matter."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import peft
import peft_core

IDS = torch.tensor([[1, 2, 3]])


def base() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).eval()


def config(**fields: Any) -> Any:
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM", **fields})


def cut(folder: Path) -> list[str]:
    """Take the tensors of v_proj out of a file."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if "v_proj" not in key}, file)
    return [key for key in tensors if "v_proj" in key]


@pytest.fixture
def incomplete(tmp_path: Path) -> Path:
    peft.get_peft_model(base(), config()).save_pretrained(tmp_path)
    assert len(cut(tmp_path)) == 2
    return tmp_path


@pytest.mark.parametrize("make", ["PeftModel", "PeftModelForCausalLM", "PeftMixedModel"])
def test_from_pretrained_warns_about_missing_tensors(incomplete: Path, make: str) -> None:
    with pytest.warns(UserWarning, match=r"Found missing adapter keys while loading the checkpoint: \['base_model.*v_proj.*'\]"):
        model = getattr(peft, make).from_pretrained(base(), incomplete)
    assert type(model).__name__ == ("PeftMixedModel" if make == "PeftMixedModel" else "PeftModelForCausalLM")
    with pytest.raises(peft_core.AdapterWeightsError, match="missing keys:"):
        getattr(peft, make).from_pretrained(base(), incomplete, strict=True)


@pytest.mark.parametrize("mixed", [False, True])
def test_load_adapter_warns_about_missing_tensors(incomplete: Path, mixed: bool) -> None:
    model = peft.get_peft_model(base(), config(), mixed=mixed)
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        found = model.load_adapter(incomplete, "other")
    assert len(found.missing_keys) == 2
    assert all("v_proj" in key for key in found.missing_keys)
    assert found.unexpected_keys == []


def test_the_module_of_our_own_stays_strict(incomplete: Path) -> None:
    with pytest.raises(peft_core.AdapterWeightsError, match="missing keys:"):
        peft_core.PeftModel.from_pretrained(base(), incomplete)
    model = peft_core.get_peft_model(base(), config())
    with pytest.raises(peft_core.AdapterWeightsError, match="missing keys:"):
        model.load_adapter(incomplete, "other")


def test_models_of_either_module_are_models_of_both() -> None:
    for make in (peft.get_peft_model, peft_core.get_peft_model):
        model = make(base(), config())
        for module in (peft, peft_core):
            assert isinstance(model, module.PeftModel)
            assert isinstance(model, module.PeftModelForCausalLM)
            assert not isinstance(model, module.PeftModelForSeq2SeqLM)
            assert not isinstance(model, module.PeftMixedModel)
        assert type(model).__name__ == "PeftModelForCausalLM"
        assert isinstance(model.base_model, peft.LoraModel)
        assert not isinstance(model.base_model, peft.LoHaModel)
    mixed = peft.get_peft_model(base(), config(), mixed=True)
    assert isinstance(mixed, peft_core.PeftMixedModel)
    assert not isinstance(mixed, peft.PeftModel)
    assert not isinstance(base(), peft.PeftModel)


def test_classes_that_users_derive() -> None:
    class Mine(peft.PeftModel):  # type: ignore[misc]
        pass

    assert not isinstance(peft.get_peft_model(base(), config()), Mine)
    model = Mine(base(), config())
    assert isinstance(model, Mine)
    assert isinstance(model, peft.PeftModel)
    assert issubclass(Mine, peft.PeftModel)
    assert not issubclass(peft.PeftModelForCausalLM, Mine)


def test_each_task_has_its_class() -> None:
    for task, kind in peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items():
        assert issubclass(kind, peft_core.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task])
        assert kind.__module__ == "peft.peft_model"
    assert type(peft.get_peft_model(base(), config(task_type=None))) is peft.PeftModel


def test_the_class_is_called_as_upstream() -> None:
    model = peft.PeftModelForCausalLM(base(), config(), "mine")
    assert type(model) is peft.PeftModelForCausalLM
    assert model.active_adapter == "mine"


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(how: Any) -> None:
    model = peft.get_peft_model(base(), config()).eval()
    twin = how(model)
    assert type(twin) is type(model)
    assert torch.equal(twin(IDS).logits, model(IDS).logits)


def test_auto_classes_make_models_of_this_module(tmp_path: Path) -> None:
    plain = base()
    plain.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), config())
    model.save_pretrained(tmp_path / "adapter")
    for kind in (peft.AutoPeftModel, peft.AutoPeftModelForCausalLM):
        found = kind.from_pretrained(tmp_path / "adapter")
        assert type(found) is peft.PeftModelForCausalLM
        assert torch.equal(found(IDS).logits, model.eval()(IDS).logits)
    with pytest.raises(ValueError, match="Expected target PEFT class: PeftModelForCausalLM, but you have asked for: PeftModelForSeq2SeqLM"):
        peft.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")


def test_an_adapter_without_a_task_is_loaded_by_a_class_that_knows_it(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(config(task_type=None))
    model.save_pretrained(tmp_path / "adapter")
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(found) is peft.PeftModelForCausalLM
    assert torch.equal(found(IDS).logits, model.eval()(IDS).logits)


# ---- what model cards and notebooks do ---------------------------------------------------------------------------------

BESIDE = "ignore:the model already has adapters; the new one is added beside them"


def test_keywords_of_whole_models_are_ignored_with_a_warning(tmp_path: Path) -> None:
    model = peft.get_peft_model(base(), config())
    with pytest.warns(UserWarning, match="save_pretrained ignores 'convert_pissa_to_lora'"):
        model.save_pretrained(tmp_path, convert_pissa_to_lora=None)
    with pytest.warns(UserWarning, match="from_pretrained ignores 'torch_dtype', 'device_map'"):
        found = peft.PeftModel.from_pretrained(base(), tmp_path, torch_dtype=torch.float16, device_map="auto")
    assert torch.equal(found(IDS).logits, model.eval()(IDS).logits)
    with pytest.warns(UserWarning, match="load_adapter ignores 'offload_folder'"):
        found.load_adapter(tmp_path, "other", offload_folder="x")
    with pytest.raises(TypeError, match="unexpected keyword"):
        peft_core.PeftModel.from_pretrained(base(), tmp_path, torch_dtype=torch.float16)


@pytest.mark.filterwarnings(BESIDE)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_cell_that_runs_twice_makes_the_adapter_anew(mixed: bool) -> None:
    plain = base()
    expected = plain(IDS).logits
    model = peft.get_peft_model(plain, config(), mixed=mixed)
    names = [name for name, _ in model.named_parameters()]
    with pytest.warns(UserWarning, match="has an adapter 'default' already, which is replaced"):
        again = peft.get_peft_model(model, config(init_lora_weights=True), mixed=mixed).eval()
    assert [name for name, _ in again.named_parameters()] == names
    assert torch.equal(again(IDS).logits, expected)
    with pytest.warns(UserWarning, match="which is replaced"):
        third = peft.get_peft_model(plain, config(r=4))
    assert third.peft_config["default"].r == 4


@pytest.mark.filterwarnings(BESIDE)
def test_a_second_loading_replaces_the_first(tmp_path: Path) -> None:
    plain = base()
    first = peft.get_peft_model(plain, config()).eval()
    expected = first(IDS).logits
    first.save_pretrained(tmp_path)
    with torch.no_grad():
        next(p for p in first.parameters() if p.requires_grad).zero_()
    with pytest.warns(UserWarning, match="which is replaced"):
        again = peft.PeftModel.from_pretrained(plain, tmp_path)
    assert torch.equal(again(IDS).logits, expected)


@pytest.mark.filterwarnings(BESIDE)
def test_what_fails_the_second_time_leaves_the_first() -> None:
    model = peft.get_peft_model(base(), config()).eval()
    expected = model(IDS).logits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="which is replaced"), pytest.raises(ValueError, match="nothing_like_this"):
        peft.get_peft_model(model, config(target_modules=["nothing_like_this"]))
    assert torch.equal(model(IDS).logits, expected)
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {name: value.tolist() for name, value in before.items()}
    assert model.active_adapter == "default"
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"default"}


@pytest.mark.filterwarnings(BESIDE)
def test_our_own_module_says_what_to_do_when_a_cell_runs_twice() -> None:
    model = peft_core.get_peft_model(base(), config())
    with pytest.raises(peft_core.AdapterNameError, match=r"already exists; .* begin with the base: model.unload\(\)"):
        peft_core.get_peft_model(model, config())


@pytest.mark.filterwarnings(BESIDE)
def test_what_runs_twice_leaves_other_adapters_out_of_use() -> None:
    model = peft.get_peft_model(base(), config(), "a")
    model.add_adapter("b", config())
    with pytest.warns(UserWarning, match="has an adapter 'a' already"):
        again = peft.get_peft_model(model, config(), "a")
    assert again.active_adapters == ["a"]
    assert {name.split(".")[-2] for name, p in again.named_parameters() if p.requires_grad} == {"a"}


@pytest.mark.filterwarnings(BESIDE)
def test_a_prompt_is_put_back_where_it_was() -> None:
    prompt = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(base(), peft.PromptTuningConfig(**prompt)).eval()
    expected, names = model(IDS).logits, list(model.state_dict())
    with pytest.warns(UserWarning, match="which is replaced"), pytest.raises(ValueError, match="num_virtual_tokens"):
        peft.get_peft_model(model.get_base_model(), peft.PromptTuningConfig(num_virtual_tokens=None, task_type="CAUSAL_LM"))
    assert torch.equal(model(IDS).logits, expected)
    assert list(model.state_dict()) == names


def test_keywords_of_saving_are_none_of_loading(tmp_path: Path) -> None:
    peft.get_peft_model(base(), config()).save_pretrained(tmp_path, variant="fp16")
    with pytest.warns(UserWarning, match="from_pretrained ignores 'variant'"):
        peft.PeftModel.from_pretrained(base(), tmp_path, variant="fp16")
