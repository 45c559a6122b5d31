"""§12, points 15 to 28: what is to be better than upstream."""

from __future__ import annotations

import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import support
from page.making import (
    ALL,
    IDS,
    LAYERS,
    PROMPTS,
    SORTS,
    TASK_IDS,
    config,
    fresh,
    get_peft_config,
    get_peft_model,
    inject_adapter_in_model,
    made,
    mixed,
    over,
    pair,
    refused,
    run,
    same,
    tiny,
    warned,
)
from peft_core import AutoPeftModel, AutoPeftModelForCausalLM, PeftMixedModel

OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
MASK = torch.ones_like(IDS)


# ---- 15 --------------------------------------------------------------------------------------------------------------
@over(*SORTS)
def head_is_named_for_every_kind(kind: str) -> None:
    for base, name in {"bert-seq-cls": "classifier", "llama-seq-cls": "score", "bert-token-cls": "classifier", "bert-qa": "qa_outputs"}.items():
        assert fresh(kind, base).cls_layer_name == name


# ---- 16 --------------------------------------------------------------------------------------------------------------
@over("prefix", "prefix-projection")
def prefixes_generate_without_a_cache(kind: str) -> None:
    for base in ("llama", "gpt2"):
        model = made(kind, base)
        cached, plain = (model.generate(input_ids=IDS, attention_mask=MASK, use_cache=flag, **OPTIONS) for flag in (True, False))
        assert torch.equal(plain, cached)


# ---- 17 --------------------------------------------------------------------------------------------------------------
@over(*PROMPTS)
def positions_are_not_warned_of(kind: str) -> None:
    tasks = {"task_ids": TASK_IDS} if kind == "multitask" else {}
    with warned(times=0):
        made(kind).generate(input_ids=IDS, attention_mask=MASK, position_ids=torch.arange(6).expand(2, 6), **OPTIONS, **tasks)


# ---- 18 --------------------------------------------------------------------------------------------------------------
@over("lora", "loha", "prompt", "multitask", "prefix")
def ids_can_stand_first_in_generate(kind: str) -> None:
    tasks = {"task_ids": TASK_IDS} if kind == "multitask" else {}
    for base in ("llama", "t5", "bart"):
        model = made(kind, base)
        named = model.generate(input_ids=IDS, attention_mask=MASK, **OPTIONS, **tasks)
        assert torch.equal(model.generate(IDS, attention_mask=MASK, **OPTIONS, **tasks), named)
        assert torch.equal(model.generate(inputs=IDS, attention_mask=MASK, **OPTIONS, **tasks), named)


# ---- 19 --------------------------------------------------------------------------------------------------------------
def failures_leave_the_base_as_it_was() -> None:
    with support.registered(support.DENSE):
        base = support.net()
        for start in ("fail", "fail-late"):
            own = get_peft_config({"peft_type": "DENSE", "target_modules": ["up", "down", "last"], "start": start})
            with support.Unchanged(base), pytest.raises(RuntimeError, match="refuses"):
                get_peft_model(base, own)
    for kind in LAYERS:
        base = tiny()
        with support.Unchanged(base), refused(ValueError):
            get_peft_model(base, config(kind, target_modules=["q_proj", "input_layernorm"]))


# ---- 20 --------------------------------------------------------------------------------------------------------------
@over(*LAYERS)
def unmatched_targets_are_warned_of(kind: str) -> None:
    with warned("q_prjo"):
        fresh(kind, target_modules=["q_proj", "q_prjo"])


# ---- 21 --------------------------------------------------------------------------------------------------------------
def loha_has_rows() -> None:
    model = pair("loha")
    found = run(model, adapter_names=["a", "b"])
    assert same(found[0], run(model)[0])
    model.set_adapter("b")
    assert same(found[1], run(model)[1])


# ---- 22 --------------------------------------------------------------------------------------------------------------
def weighted_adapters_are_checked_first() -> None:
    model = pair("lora")
    faults: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((["a", "b"], [1.0, 1.0], "a"), {}, "already exists"),
        ((["a", "b"], [1.0], "c"), {}, "weights"),
        (([], [], "c"), {}, "adapters"),
        ((["a", "b"], [1.0, 1.0], "c"), {"combination_type": "ties"}, "density"),
        ((["a", "b"], [1.0, 1.0], "c"), {"combination_type": "dare_linear"}, "density"),
        ((["a", "nobody"], [1.0, 1.0], "c"), {}, "nobody"),
        ((["a", "b"], [1.0, 1.0], "c"), {"combination_type": "sum"}, "sum"),
    ]
    for args, more, match in faults:
        with support.Unchanged(model), refused(ValueError, match):
            model.add_weighted_adapter(*args, **more)


# ---- 23 --------------------------------------------------------------------------------------------------------------
def saving_never_asks_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for kind in ALL:
        model = fresh(kind)
        model.peft_config["default"].base_model_name_or_path = "somebody/base"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.save_pretrained(tmp_path / kind, save_embedding_layers="auto")
        assert (tmp_path / kind / "adapter_model.safetensors").exists()


# ---- 24 --------------------------------------------------------------------------------------------------------------
def replicated_layers_are_not_merged() -> None:
    model = made("lora", layer_replication=[(0, 2), (1, 2)])
    assert len(model.get_base_model().model.layers) == 3
    for operation in (model.merge_adapter, model.merge_and_unload):
        with refused(ValueError, "replica|layer_replication"):
            operation()


# ---- 25 --------------------------------------------------------------------------------------------------------------
def mixed_models_are_for_inference_when_loaded_so(tmp_path: Path) -> None:
    for kind in LAYERS:
        made(kind).save_pretrained(tmp_path / kind)
    model = PeftMixedModel.from_pretrained(tiny(), tmp_path / "lora", "one")
    model.load_adapter(tmp_path / "loha", "two")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.set_adapter(["one", "two"], inference_mode=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "stack")
    assert {path.name for path in (tmp_path / "stack").iterdir() if path.is_dir()} == {"one", "two"}
    stack = PeftMixedModel.from_stack(tiny(), tmp_path / "stack")
    assert same(run(stack), run(model))
    assert not any(parameter.requires_grad for parameter in stack.parameters())


def compatible_types_are_one_list() -> None:
    assert set(mixed(*SORTS).peft_config) == set(SORTS)


# ---- 26 --------------------------------------------------------------------------------------------------------------
def bad_names_are_refused() -> None:
    for name in ("a.b", "keys", "items", "training", "__base__", "../b", "/b", "a\\b"):
        for base, make in ((tiny(), get_peft_model), (tiny(), None)):
            with support.Unchanged(base), refused(ValueError, "name"):
                get_peft_model(base, config("lora"), name) if make else inject_adapter_in_model(config("lora"), base, name)
        model = fresh("lora", name="a")
        with support.Unchanged(model), refused(ValueError, "name"):
            model.add_adapter(name, config("lora"))


# ---- 27 --------------------------------------------------------------------------------------------------------------
def bases_without_a_name_are_told(tmp_path: Path) -> None:
    fresh("lora").save_pretrained(tmp_path)
    for cls in (AutoPeftModel, AutoPeftModelForCausalLM):
        with refused(ValueError, "base_model_name_or_path"):
            cls.from_pretrained(tmp_path)


# ---- 28 --------------------------------------------------------------------------------------------------------------
def print_format_is_the_real_one(capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(support.llama(vocab_size=32), config("lora", r=64))
    model.print_trainable_parameters()
    trainable, total = model.get_nb_trainable_parameters()
    assert capsys.readouterr().out == f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}\n"
    assert "," in f"{trainable:,}"
