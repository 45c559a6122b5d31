"""§2: the constructor of `PeftModel` and its attributes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from page.making import (
    EMBEDDINGS,
    IDS,
    LAYERS,
    PROMPTS,
    SORTS,
    N,
    PeftModel,
    config,
    fresh,
    get_peft_model,
    made,
    pair,
    refused,
    run,
    same,
    tiny,
    trains,
)
from peft_core import PeftModelForCausalLM
from peft_core.testing.helpers import method_parameters


# ---- the constructor -------------------------------------------------------------------------------------------------
def base_is_modified_in_place() -> None:
    base = tiny()
    model = PeftModel(base, config("lora"))
    assert model.get_base_model() is base
    assert hasattr(base.model.layers[0].self_attn.q_proj, "base_layer")


def any_module_can_be_a_base() -> None:
    base = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.randn(2, 3)
    expected = base(x)
    for kind in LAYERS:
        model = PeftModel(base, config(kind, task_type=None, target_modules=["0"]))
        assert same(model(x), expected)
        base = model.unload()


def prompts_leave_the_base_as_it_is() -> None:
    base = tiny()
    before = [(name, id(module)) for name, module in base.named_modules()]
    PeftModelForCausalLM(base, config("prompt"))
    assert before == [(name, id(module)) for name, module in base.named_modules()]


def config_is_kept_by_reference() -> None:
    for kind in SORTS:
        own = config(kind)
        assert PeftModelForCausalLM(tiny(), own).peft_config["default"] is own


def name_is_part_of_every_parameter_name() -> None:
    for kind in SORTS:
        model = fresh(kind, name="mine")
        added = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert added
        assert all("mine" in name.split(".") for name in added)


def illegal_names_are_refused() -> None:
    for name in ("a.b", "keys", ""):
        with refused(ValueError):
            fresh("lora", name=name)


def half_precision_weights_are_cast_to_float32() -> None:
    for kind in LAYERS:
        for autocast, expected in ((True, torch.float32), (False, torch.bfloat16)):
            model = PeftModel(tiny().bfloat16(), config(kind), autocast_adapter_dtype=autocast)
            assert {parameter.dtype for parameter in method_parameters(model, "default")} == {expected}


def prompts_are_float32_anyway() -> None:
    for autocast in (True, False):
        model = PeftModelForCausalLM(tiny().bfloat16(), config("prompt"), autocast_adapter_dtype=autocast)
        assert {parameter.dtype for parameter in model.prompt_encoder.parameters()} == {torch.float32}


def saved_modules_keep_the_dtype_of_the_original() -> None:
    model = PeftModel(tiny().bfloat16(), config("lora", modules_to_save=["lm_head"]))
    assert model.get_base_model().lm_head.modules_to_save["default"].weight.dtype == torch.bfloat16


def weights_are_made_on_the_meta_device() -> None:
    for kind in SORTS:
        model = get_peft_model(tiny(), config(kind), low_cpu_mem_usage=True)
        assert {parameter.device.type for parameter in method_parameters(model, "default")} == {"meta"}


# ---- attributes ------------------------------------------------------------------------------------------------------
def base_model_of_layers_is_the_tuner_object() -> None:
    base = tiny()
    model = get_peft_model(base, config("lora"))
    assert model.base_model is not base
    assert model.base_model.model is base


def base_model_of_prompts_is_the_base() -> None:
    for kind in PROMPTS:
        base = tiny()
        assert get_peft_model(base, config(kind)).base_model is base


def configs_are_a_dict_by_adapter() -> None:
    model = pair("lora")
    assert list(model.peft_config) == ["a", "b"]
    assert model.base_model.peft_config is model.peft_config


def configs_can_be_set() -> None:
    """The page: a property with a setter."""
    model = fresh("lora")
    other = config("lora", lora_alpha=8)
    model.peft_config = {"default": other}
    assert model.peft_config["default"] is other
    assert model.base_model.peft_config["default"] is other


def saved_names_are_the_union_over_adapters() -> None:
    model = fresh("lora", name="a", modules_to_save=["lm_head"])
    model.add_adapter("b", config("lora", modules_to_save=["norm"]))
    assert model.modules_to_save == {"lm_head", "norm"}
    assert fresh("lora").modules_to_save is None


def encoders_by_adapter() -> None:
    for kind in PROMPTS:
        model = pair(kind)
        assert isinstance(model.prompt_encoder, nn.ModuleDict)
        assert set(model.prompt_encoder) == {"a", "b"}


def tokens_are_counted_over_the_submodules() -> None:
    assert torch.equal(fresh("prompt").prompt_tokens["default"], torch.arange(N))
    tokens = fresh("prompt", "t5").prompt_tokens["default"]
    assert torch.equal(tokens, torch.arange(2 * N))
    assert (tokens.dtype, tokens.device.type) == (torch.int64, "cpu")


def backbone_is_the_first_child_that_is_a_transformers_model() -> None:
    expected = {"t5": "encoder", "bert-seq-cls": "bert", "llama": "model", "gpt2": "transformer", "bert": "base_model"}
    for base, name in expected.items():
        assert fresh("lora", base).transformer_backbone_name == name
        assert fresh("prompt", base).transformer_backbone_name == name


def embeddings_are_the_backbones() -> None:
    for base in ("llama", "gpt2", "bert-seq-cls", "t5"):
        model = fresh("prompt", base)
        assert model.word_embeddings is model.get_base_model().get_input_embeddings()


def active_adapter_is_one_name() -> None:
    for kind in SORTS:
        model = pair(kind)
        assert model.active_adapter == "a"
        assert model.active_adapters == ["a"]


def active_adapters_follow_the_tuner() -> None:
    model = pair("lora")
    model.base_model.set_adapter(["a", "b"])
    assert model.active_adapters == model.base_model.active_adapters == ["a", "b"]


def active_config_is_that_of_the_active_adapter() -> None:
    for kind in SORTS:
        model = pair(kind)
        model.set_adapter("b")
        assert model.active_peft_config is model.peft_config["b"]


def type_is_that_of_the_first_config() -> None:
    assert pair("loha").peft_type == "LOHA"
    assert pair("lora", "prefix").peft_type == "LORA"


def special_arguments_are_named() -> None:
    for kind in SORTS:
        assert fresh(kind).special_peft_forward_args >= {"adapter_names", "alora_offsets"}


def special_arguments_do_not_reach_the_base() -> None:
    seen: dict[str, object] = {}
    model = made("lora")
    model.get_base_model().register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    run(model, adapter_names=["default", "__base__"])
    run(model, alora_offsets=[1, 1])
    assert set(seen) == {"input_ids", "attention_mask"}


def dtype_is_the_bases() -> None:
    assert PeftModel(tiny().bfloat16(), config("lora")).base_model_torch_dtype == torch.bfloat16
    assert PeftModel(nn.Sequential(nn.Linear(2, 2)), config("lora", target_modules=["0"])).base_model_torch_dtype is None


def says_whether_an_enabled_adapter_is_active() -> None:
    for kind in SORTS:
        model = fresh(kind)
        assert model.has_active_enabled_adapter
        with model.disable_adapter():
            assert not model.has_active_enabled_adapter
        model.delete_adapter("default")
        assert not model.has_active_enabled_adapter


def unknown_attributes_are_the_bases() -> None:
    for kind in ("lora", "prompt"):
        model = fresh(kind)
        base = model.get_base_model()
        assert model.config is base.config
        assert model.device == base.device
        assert model.lm_head is base.lm_head
        with pytest.raises(AttributeError, match="nothing_of_this_name"):
            _ = model.nothing_of_this_name


# ---- side effects ----------------------------------------------------------------------------------------------------
def pretraining_tp_becomes_one() -> None:
    base = tiny()
    base.config.pretraining_tp = 2
    PeftModel(base, config("lora"))
    assert base.config.pretraining_tp == 1


def checkpointed_bases_get_inputs_that_require_gradients() -> None:
    base = tiny()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.disable_input_require_grads()  # new versions of transformers do it themselves
    PeftModelForCausalLM(base, config("lora"))
    assert base.get_input_embeddings()(IDS).requires_grad
    plain = tiny()
    PeftModelForCausalLM(plain, config("lora"))
    assert not plain.get_input_embeddings()(IDS).requires_grad


def the_base_is_frozen_and_the_adapter_trains() -> None:
    for kind in (*LAYERS, *PROMPTS):
        model = fresh(kind)
        assert trains(model, "default")
        base = [parameter for name, parameter in model.named_parameters() if "default" not in name.split(".")]
        assert base
        assert not any(parameter.requires_grad for parameter in base)


def for_inference_nothing_trains() -> None:
    for kind in SORTS:
        assert not any(parameter.requires_grad for parameter in fresh(kind, inference_mode=True).parameters())


# ---- 2.5 forward -----------------------------------------------------------------------------------------------------
def output_of_the_base_is_returned_as_it_is() -> None:
    model = made("lora")
    base = model.get_base_model()
    found = model(IDS, output_hidden_states=True)
    assert type(found) is type(base(IDS))
    assert torch.equal(found.logits, base(IDS).logits)
    assert len(found.hidden_states) == 3
    assert isinstance(model(IDS, return_dict=False), tuple)


def rows_can_have_adapters_of_their_own() -> None:
    for kind in ("lora", "prefix"):
        model = pair(kind)
        found = run(model, adapter_names=["a", "b"])
        model.set_adapter("b")
        assert same(found[1], run(model)[1])


def without_a_task_prompts_work() -> None:
    """Differs: docs/prompts.md; the peer raises `KeyError: None`."""
    for kind in (*EMBEDDINGS[:3], "prefix"):
        model = PeftModel(tiny(), config(kind, task_type=None)).eval()
        logits = run(model, kind=kind)
        assert logits.shape[1] == IDS.shape[1] + (0 if kind == "prefix" else N)
