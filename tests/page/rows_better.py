"""§12, points 1 to 14: what is to be better than upstream."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import support
from page import by_hand
from page.making import (
    IDS,
    LAYERS,
    PROMPTS,
    SORTS,
    PeftModel,
    config,
    fresh,
    get_peft_config,
    get_peft_model,
    inputs,
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
from peft_core import PeftConfig

WEIGHTS = "adapter_model.safetensors"


# ---- 1 ---------------------------------------------------------------------------------------------------------------
def unknown_keys_are_warned_of(tmp_path: Path) -> None:
    values = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "never_heard_of": 3}
    with warned("never_heard_of"):
        assert get_peft_config(values).r == 2
    import json

    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with warned("never_heard_of"):
        assert PeftConfig.from_pretrained(tmp_path).to_dict()["r"] == 2


def legacy_keys_are_warned_of_once() -> None:
    prefix = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2, "postprocess_past_key_value_function": None}
    for values in (prefix, {"peft_type": "LORA", "enable_lora": None}):
        with warned():
            get_peft_config(values)


def unknown_types_are_named() -> None:
    with refused(ValueError, "LOHA.*LORA|LORA.*LOHA"):
        get_peft_config({"peft_type": "LORAA"})
    with refused(ValueError, "peft_type"):
        get_peft_config({"r": 2})
    with refused(ValueError, "install"):
        get_peft_config({"peft_type": "FOO"})


# ---- 2 ---------------------------------------------------------------------------------------------------------------
@over(*SORTS)
def names_are_compared_by_segments(kind: str, tmp_path: Path) -> None:
    made(kind).save_pretrained(tmp_path)
    model = fresh(kind, name="a")
    assert tuple(model.load_adapter(tmp_path, "b")) == ([], [])
    assert tuple(model.load_adapter(tmp_path, "e")) == ([], [])


# ---- 3 ---------------------------------------------------------------------------------------------------------------
def other_configs_are_refused(tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("lora", {"lora_alpha": 9}),
        ("lora", {"r": 3}),
        ("loha", {"alpha": 9}),
        ("prompt", {"num_virtual_tokens": 6}),
    ]
    for kind, more in cases:
        made(kind, **more).save_pretrained(tmp_path / kind)
        model = pair(kind)
        before = run(model)
        with refused(ValueError, next(iter(more))):
            model.load_adapter(tmp_path / kind, "a")
        assert torch.equal(run(model), before)


# ---- 4 ---------------------------------------------------------------------------------------------------------------
def saved_modules_that_lack_are_missing_keys(tmp_path: Path) -> None:
    made("lora", modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({key: value for key, value in tensors.items() if "lm_head" not in key}, tmp_path / WEIGHTS)
    model = fresh("lora", name="a")
    with refused(RuntimeError, "missing.*lm_head"):
        model.load_adapter(tmp_path, "b")
    assert [key for key in model.load_adapter(tmp_path, "b", strict=False).missing_keys if "lm_head" in key]


# ---- 5 ---------------------------------------------------------------------------------------------------------------
@over(*SORTS)
def flags_survive_disabling_and_looking(kind: str) -> None:
    model = pair(kind)
    next(iter(parameters_of(model, "a").values())).requires_grad = False
    before = trainability(model)
    with model.disable_adapter():
        model.get_model_status()
    model.get_layer_status()
    assert trainability(model) == before


# ---- 6 ---------------------------------------------------------------------------------------------------------------
@over(*LAYERS, *PROMPTS)
def without_adapters_nothing_fails(kind: str) -> None:
    model = made(kind)
    model.delete_adapter("default")
    assert model.active_adapter in (None, [])
    assert torch.equal(run(model), run(tiny()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if kind in LAYERS:
            assert model.get_model_status().available_adapters == []
    model.add_adapter("new", config(kind))
    model.set_adapter("new")
    assert model.active_adapters == ["new"]


# ---- 7 ---------------------------------------------------------------------------------------------------------------
@over(*SORTS)
def lists_can_be_set(kind: str) -> None:
    model = pair(kind, "lora")
    model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a", "b"]


def names_of_merges_are_checked() -> None:
    for kind in LAYERS:
        model = made(kind)
        before = run(model)
        with refused(ValueError, "defalt.*default"):
            model.merge_adapter(["defalt"])
        model.merge_adapter("default")
        assert model.get_model_status().merged_adapters == ["default"]
        assert same(run(model), before, atol=1e-4)


# ---- 8 ---------------------------------------------------------------------------------------------------------------
def one_warning_each() -> None:
    model = pair("lora")
    with warned("deleted"):
        model.delete_adapter("a")
    with warned("(?i)already unmerged"):
        model.unmerge_adapter()
    model.merge_adapter()
    with warned("merged"):
        model.merge_adapter()


# ---- 9 ---------------------------------------------------------------------------------------------------------------
@over(*PROMPTS)
def loaded_prompts_are_frozen(kind: str, tmp_path: Path) -> None:
    made(kind).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny(), tmp_path, "a")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.add_adapter("b", config(kind))
    model.set_adapter("b")
    assert trains(model, "b")
    model.set_adapter("a", inference_mode=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())


# ---- 10 --------------------------------------------------------------------------------------------------------------
@over("prompt", "p-tuning", "multitask", "prefix")
def prompts_need_no_task(kind: str) -> None:
    for base in ("llama", "bert"):
        model = made(kind, base, task_type=None)
        with torch.no_grad():
            found, whole = model(**inputs(base, kind)), by_hand.whole(model, base, kind)
        assert same(found[0], whole[0])


# ---- 11 --------------------------------------------------------------------------------------------------------------
@over("prompt", "p-tuning", "multitask")
def labels_of_tokens_and_answers_fit(kind: str) -> None:
    for base in ("bert-token-cls", "bert-qa"):
        model = made(kind, base)
        output = model(**inputs(base, kind), **by_hand.labels_of(base))
        with torch.no_grad():
            torch.testing.assert_close(output.loss, by_hand.loss(by_hand.whole(model, base, kind), base, kind))
        assert (output.start_logits if base == "bert-qa" else output.logits).shape[1] == IDS.shape[1]


# ---- 12 --------------------------------------------------------------------------------------------------------------
def answers_see_types_and_positions() -> None:
    types, positions = torch.tensor([[0, 0, 1, 1, 1, 0]] * 2), torch.arange(6).flip(0).expand(2, 6)
    for kind in SORTS:
        model = made(kind, "bert-qa")
        plain = run(model, "bert-qa")
        seen: list[dict[str, Any]] = [{"token_type_ids": types}, {"position_ids": positions}]
        for more in seen:
            found = run(model, "bert-qa", **more)
            assert not same(found, plain)
            if kind in LAYERS:
                assert same(found, run(model.get_base_model(), "bert-qa", **more))


# ---- 13 --------------------------------------------------------------------------------------------------------------
def all_linear_works_with_heads() -> None:
    for base in ("bert-token-cls", "bert-qa"):
        for kind in LAYERS:
            model = fresh(kind, base, target_modules="all-linear")
            targets = model.base_model.targeted_module_names
            plain = tiny(base)
            assert set(targets) == {name for name, module in plain.named_modules() if type(module) is nn.Linear and "." in name}


# ---- 14 --------------------------------------------------------------------------------------------------------------
@over(*SORTS)
def lists_of_the_user_stay(kind: str, tmp_path: Path) -> None:
    own = ["classifier"]
    given = config(kind, "bert-seq-cls", modules_to_save=own)
    model = get_peft_model(tiny("bert-seq-cls"), given)
    assert own == ["classifier"]
    for number in range(3):
        model.save_pretrained(tmp_path / str(number))
        model = PeftModel.from_pretrained(tiny("bert-seq-cls"), tmp_path / str(number))
        assert sorted(model.peft_config["default"].modules_to_save) == ["classifier", "score"]


def names_match_at_segments() -> None:
    with support.registered(support.DENSE):
        base = nn.ModuleDict({"head": nn.Linear(2, 2), "lm_head": nn.Linear(2, 2), "overhead": nn.Linear(2, 2), "x": nn.Linear(2, 2)})
        own = get_peft_config({"peft_type": "DENSE", "target_modules": ["x"], "modules_to_save": ["head"]})
        model = get_peft_model(base, own)
    assert [name for name, module in model.get_base_model().items() if hasattr(module, "modules_to_save")] == ["head"]
