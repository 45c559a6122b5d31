"""§2.1, §2.3, §2.4, §2.17: adding, deleting, disabling and choosing adapters."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from page.making import (
    IDS,
    LAYERS,
    PROMPTS,
    SORTS,
    PeftModel,
    config,
    fresh,
    get_peft_model,
    made,
    over,
    pair,
    parameters_of,
    refused,
    run,
    same,
    tiny,
    trainability,
    trains,
    warned,
)

SAVED: dict[str, Any] = {"modules_to_save": ["lm_head"]}
CLASSIFIERS = ("bert-seq-cls", "bert-token-cls")


# ---- 2.1 add_adapter -------------------------------------------------------------------------------------------------
@over(*LAYERS, *PROMPTS)
def new_one_is_neither_active_nor_trainable(kind: str) -> None:
    model = fresh(kind, name="a")
    before = trainability(model)
    assert model.add_adapter("b", config(kind)) is None
    assert model.active_adapters == ["a"]
    assert not trains(model, "b")
    assert {name: flag for name, flag in trainability(model).items() if name in before} == before
    model.set_adapter("b")
    assert trains(model, "b")


@over(*SORTS)
def taken_name_is_refused(kind: str) -> None:
    model = fresh(kind)
    with refused(ValueError, "already exists"):
        model.add_adapter("default", config(kind))


def other_methods_are_welcome() -> None:
    model = fresh("lora", name="a")
    for kind in ("loha", *PROMPTS[:2], "prefix"):
        model.add_adapter(kind, config(kind))
    assert list(model.peft_config) == ["a", "loha", "prompt", "p-tuning", "prefix"]


def names_that_begin_as_parameters_do_are_no_collision(tmp_path: Path) -> None:
    """The page has it that they are refused; the reference implementation takes them, and no file holds an adapter's name."""
    for name in ("lora_", "lora_A"):
        model = made("lora", name=name)
        model.save_pretrained(tmp_path)
        assert same(run(PeftModel.from_pretrained(tiny(), tmp_path / name, name)), run(model))


def the_name_of_a_method_is_no_collision(tmp_path: Path) -> None:
    for name in ("lora", "ora"):
        model = made("lora", name=name)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny(), tmp_path / name, name)
        assert torch.equal(run(loaded), run(model))


def second_bias_is_refused() -> None:
    model = fresh("lora", name="a", bias="lora_only")
    with refused(ValueError, "bias"):
        model.add_adapter("b", config("lora", bias="lora_only"))
    model.add_adapter("c", config("lora"))
    assert list(model.peft_config) == ["a", "c"]


def failure_takes_the_config_back() -> None:
    for kind in LAYERS:
        model = fresh(kind, name="a")
        before = [name for name, _ in model.named_parameters()]
        with refused(ValueError, "nowhere"):
            model.add_adapter("b", config(kind, target_modules=["nowhere"]))
        assert list(model.peft_config) == ["a"]
        assert [name for name, _ in model.named_parameters()] == before


@over(*PROMPTS)
def prompts_get_an_encoder(kind: str) -> None:
    model = fresh(kind, name="a")
    model.add_adapter("b", config(kind))
    assert model.prompt_encoder["b"] is not model.prompt_encoder["a"]
    assert set(model.prompt_tokens) == {"a", "b"}


def prompts_get_their_saved_modules() -> None:
    model = fresh("prompt", name="a")
    model.add_adapter("b", config("prompt", **SAVED))
    assert set(model.get_base_model().lm_head.modules_to_save) == {"b"}


@over("lora", "loha", "prompt", "prefix")
def heads_of_the_task_are_saved(kind: str) -> None:
    for base, heads in (("bert-seq-cls", {"classifier", "score"}), ("bert-token-cls", {"classifier", "score"}), ("bert-qa", {"qa_outputs"})):
        model = fresh(kind, base, name="a")
        own = config(kind, base)
        model.add_adapter("b", own)
        assert set(own.modules_to_save) == heads
        head = model.get_base_model().qa_outputs if base == "bert-qa" else model.get_base_model().classifier
        assert set(head.modules_to_save) == {"a", "b"}


def low_memory_adapters_have_no_weights_yet() -> None:
    model = fresh("lora", name="a")
    model.add_adapter("b", config("lora"), low_cpu_mem_usage=True)
    assert {parameter.device.type for parameter in parameters_of(model, "b").values()} == {"meta"}


def weights_are_cast_unless_told_otherwise() -> None:
    model = PeftModel(tiny().bfloat16(), config("lora"))
    model.add_adapter("b", config("lora"))
    model.add_adapter("c", config("lora"), autocast_adapter_dtype=False)
    assert {name: {p.dtype for p in parameters_of(model, name).values()} for name in "bc"} == {"b": {torch.float32}, "c": {torch.bfloat16}}


# ---- 2.3 delete_adapter ----------------------------------------------------------------------------------------------
@over(*SORTS)
def unknown_one_can_not_be_deleted(kind: str) -> None:
    model = pair(kind)
    with refused(ValueError, "c.*not found"):
        model.delete_adapter("c")
    assert list(model.peft_config) == ["a", "b"]


def merged_one_can_not_be_deleted() -> None:
    for kind in LAYERS:
        model = pair(kind)
        model.merge_adapter()
        with refused(ValueError, "cannot delete.*merged"):
            model.delete_adapter("a")
        model.unmerge_adapter()
        model.delete_adapter("b")
        assert list(model.peft_config) == ["a"]


@over(*LAYERS, *PROMPTS)
def inactive_one_disappears_and_nothing_else_changes(kind: str) -> None:
    model = pair(kind)
    before, flags = run(model, kind=kind), trainability(model)
    model.delete_adapter("b")
    after = trainability(model)
    assert "b" not in model.peft_config
    assert not any("b" in name.split(".") for name, _ in model.named_parameters())
    assert after == {name: flag for name, flag in flags.items() if name in after}
    assert torch.equal(before, run(model, kind=kind))


@over(*SORTS)
def other_active_ones_stay(kind: str) -> None:
    model = pair(kind, "loha" if kind == "lora" else "lora")
    model.set_adapter(["a", "b"])
    with warned(times=0):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    assert trains(model, "b")


@over(*SORTS)
def first_remaining_one_takes_over(kind: str) -> None:
    model = pair(kind)
    model.add_adapter("c", config(kind))
    with warned("a.*deleted"):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    assert trains(model, "b")
    assert not trains(model, "c")


@over(*LAYERS, *PROMPTS)
def without_the_last_one_the_model_is_the_base(kind: str) -> None:
    model = made(kind)
    model.delete_adapter("default")
    assert model.active_adapters == []
    assert torch.equal(run(model), run(tiny()))
    if kind in LAYERS:
        assert hasattr(model.get_base_model().model.layers[0].self_attn.q_proj, "base_layer")


# ---- 2.4 disable_adapter ---------------------------------------------------------------------------------------------
@over(*LAYERS, *PROMPTS)
def inside_the_model_is_the_base(kind: str) -> None:
    model = made(kind)
    before = run(model, kind=kind)
    with model.disable_adapter():
        assert torch.equal(run(model), run(tiny()))
    assert torch.equal(run(model, kind=kind), before)
    assert not same(before[:, -6:], run(tiny()))


@over(*SORTS)
def original_heads_are_used(kind: str) -> None:
    for base in CLASSIFIERS:
        model = made(kind, base)
        with model.disable_adapter():
            assert torch.equal(run(model, base), run(tiny(base), base))


def original_token_rows_are_used() -> None:
    model = made("lora", trainable_token_indices=[1, 2])
    with model.disable_adapter():
        assert torch.equal(run(model), run(tiny()))


@over(*SORTS)
def exceptions_restore_it(kind: str) -> None:
    model = made(kind)
    before = run(model)
    with pytest.raises(KeyError, match="mine"), model.disable_adapter():
        raise KeyError("mine")
    assert torch.equal(run(model), before)


@over(*SORTS)
def nested_blocks_end_with_the_outermost(kind: str) -> None:
    model = made(kind)
    before = run(model)
    with model.disable_adapter():
        with model.disable_adapter():
            pass
        assert torch.equal(run(model), run(tiny()))
    assert torch.equal(run(model), before)


@over(*SORTS)
def generate_is_the_bases(kind: str) -> None:
    model = made(kind)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    expected = tiny().generate(IDS, **options)
    with model.disable_adapter():
        assert torch.equal(model.generate(input_ids=IDS, **options), expected)
        steps = model.prepare_inputs_for_generation(IDS, attention_mask=torch.ones_like(IDS), next_sequence_length=None)
    assert steps["attention_mask"].shape == IDS.shape
    assert not torch.equal(model.generate(input_ids=IDS, **options), expected)


def trained_biases_are_warned_of() -> None:
    model = fresh("lora", "bert-seq-cls", bias="all")
    with warned("bias"), model.disable_adapter():
        pass
    with warned(times=0), fresh("lora").disable_adapter():
        pass


def irregular_layers_are_restored_as_they_were() -> None:
    """The page warns that all layers will be enabled on exit; ours must either warn or bring each back as it was."""
    model = made("lora")
    layers = model.get_base_model().model.layers
    layers[0].self_attn.q_proj.enable_adapters(False)
    before = run(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with model.disable_adapter():
            assert torch.equal(run(model), run(tiny()))
    assert torch.equal(run(model), before) or any("enabled" in str(entry.message) for entry in caught)


def merged_ones_are_taken_out_and_stay_out() -> None:
    for kind in LAYERS:
        model = made(kind)
        before = run(model)
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(run(model), run(tiny()))
        assert model.get_model_status().merged_adapters == []
        assert torch.equal(run(model), before)


# ---- 2.17 set_adapter ------------------------------------------------------------------------------------------------
@over(*LAYERS, *PROMPTS)
def exactly_this_one_is_active_and_trains(kind: str) -> None:
    model = pair(kind)
    alone = run(model, kind=kind)
    assert model.set_adapter("b") is None
    assert model.active_adapters == ["b"]
    assert (trains(model, "a"), trains(model, "b")) == (False, True)
    assert not same(run(model, kind=kind), alone)
    model.set_adapter("a")
    assert torch.equal(run(model, kind=kind), alone)


@over(*SORTS)
def for_inference_it_does_not_train(kind: str) -> None:
    model = pair(kind)
    model.set_adapter("b", inference_mode=True)
    assert model.active_adapters == ["b"]
    assert not any(parameter.requires_grad for parameter in model.parameters())


@over("lora", "prompt")
def saved_modules_and_token_rows_follow(kind: str) -> None:
    more: dict[str, Any] = {"trainable_token_indices": [1, 2]} if kind == "lora" else {}
    other_rows: dict[str, Any] = {"trainable_token_indices": [3]} if kind == "lora" else {}
    model = fresh(kind, name="a", **SAVED, **more)
    model.add_adapter("b", config(kind, **SAVED, **other_rows))
    head = model.get_base_model().lm_head.modules_to_save
    for name, other in (("b", "a"), ("a", "b")):
        model.set_adapter(name)
        assert (trains(model, name), trains(model, other)) == (True, False)
        assert (head[name].weight.requires_grad, head[other].weight.requires_grad) == (True, False)
    assert not model.get_base_model().lm_head.original_module.weight.requires_grad


def the_pages_recipe_undoes_it() -> None:
    model = pair("lora")
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad = False
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_B"}


@over(*SORTS)
def unknown_one_can_not_be_set(kind: str) -> None:
    model = pair(kind)
    with refused(ValueError, "Adapter 'c' not found"):
        model.set_adapter("c")
    assert model.active_adapters == ["a"]


def merged_ones_are_taken_out_first() -> None:
    for kind in LAYERS:
        model = pair(kind)
        model.set_adapter("b")
        expected = run(model)
        model.set_adapter("a")
        model.merge_adapter()
        with warned("[Uu]nmerging"):
            model.set_adapter("b")
        assert model.get_model_status().merged_adapters == []
        assert torch.equal(run(model), expected)


@over(*SORTS)
def several_are_set_through_the_tuner(kind: str) -> None:
    model = pair(kind, "lora")
    tuner = model.base_model if kind in LAYERS else model
    tuner.set_adapter(["a", "b"])
    assert model.active_adapters == ["a", "b"]
    assert trains(model, "a")
    assert trains(model, "b")


def a_wrapped_model_is_one_with_adapters() -> None:
    with warned("already has adapters"):
        get_peft_model(fresh("lora", name="a").get_base_model(), config("lora"), "b")
