"""§2.7 to §2.11, §2.14, §2.18: looking at a model, its prompts, checkpointing, and what the tuner offers."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from page.making import (
    EMBEDDINGS,
    IDS,
    LAYERS,
    PROMPTS,
    SORTS,
    TASK_IDS,
    N,
    PeftModel,
    config,
    fresh,
    get_peft_model,
    made,
    over,
    pair,
    refused,
    run,
    same,
    tiny,
    trains,
)
from peft_core import get_layer_status, get_model_status


# ---- 2.7 to 2.10 -----------------------------------------------------------------------------------------------------
@over(*SORTS)
def it_is_the_object_that_was_passed(kind: str) -> None:
    base = tiny()
    model = get_peft_model(base, config(kind)).eval()
    assert model.get_base_model() is base


def it_keeps_acting_as_the_adapted_model() -> None:
    for kind in LAYERS:
        model = made(kind)
        assert torch.equal(run(model.get_base_model()), run(model))


@over(*SORTS)
def status_is_that_of_the_function(kind: str) -> None:
    model = pair(kind)
    assert model.get_layer_status() == get_layer_status(model)
    assert model.get_model_status() == get_model_status(model)


@over(*SORTS)
def numbers_are_counted(kind: str) -> None:
    model = fresh(kind)
    parameters = list(model.parameters())
    expected = sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
    assert model.get_nb_trainable_parameters() == expected
    assert 0 < expected[0] < expected[1]


def tied_numbers_count_once() -> None:
    model = fresh("lora", "gpt2")
    assert model.get_base_model().lm_head.weight is model.get_base_model().transformer.wte.weight
    assert model.get_nb_trainable_parameters()[1] == sum(p.numel() for p in tiny("gpt2").parameters()) + model.get_nb_trainable_parameters()[0]


def numbers_of_deepspeed_are_asked_for() -> None:
    model = fresh("lora")
    before = model.get_nb_trainable_parameters()
    assert before[1] > 32
    norm = model.get_base_model().model.norm
    norm.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    norm.weight.ds_numel = 32
    assert model.get_nb_trainable_parameters() == before


def four_bit_numbers_are_unpacked() -> None:
    class Params4bit(nn.Parameter):
        """What bitsandbytes calls its packed weights."""

        quant_storage: torch.dtype

    model = fresh("lora")
    before = model.get_nb_trainable_parameters()[1]
    norm = model.get_base_model().model.norm
    for storage, bytes_each in ((torch.uint8, 1), (torch.float32, 4)):
        packed = Params4bit(torch.zeros(32 // 2 // bytes_each, dtype=storage), requires_grad=False)
        packed.quant_storage = storage
        norm.weight = packed
        assert model.get_nb_trainable_parameters()[1] == before


def text_is_that_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    model = fresh("lora", r=8)
    model.print_trainable_parameters()
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable > 999
    expected = f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}\n"
    assert capsys.readouterr().out == expected


# ---- 2.11 get_prompt -------------------------------------------------------------------------------------------------
@over(*EMBEDDINGS)
def embeddings_for_each_sample(kind: str) -> None:
    model = pair(kind)
    tasks = {"task_ids": TASK_IDS} if kind == "multitask" else {}
    found = model.get_prompt(2, **tasks)
    assert found.shape == (2, N, 32)
    assert torch.equal(found[0], found[1]) is (kind != "multitask")
    model.set_adapter("b")
    assert not torch.equal(model.get_prompt(2, **tasks), found)


def embeddings_of_both_submodules() -> None:
    assert fresh("prompt", "t5").get_prompt(3).shape == (3, 2 * N, 32)


def prefixes_are_a_cache() -> None:
    from transformers import Cache

    found: Any = made("prefix").get_prompt(3)
    assert issubclass(type(found), Cache)
    assert found.get_seq_length() == N
    assert found.layers[0].keys.shape == (3, 2, N, 8)


@over("p-tuning", "prefix-projection")
def in_inference_the_table_is_used(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert loaded.peft_config["default"].inference_mode
    if kind == "p-tuning":
        assert same(loaded.get_prompt(2), model.get_prompt(2))
    else:
        assert same(loaded.get_prompt(2).layers[1].values, model.get_prompt(2).layers[1].values)
    weights = sum(parameter.numel() for parameter in loaded.prompt_encoder.parameters())
    assert weights == N * (32 if kind == "p-tuning" else 2 * 2 * 16)


def caches_can_have_a_fixed_size() -> None:
    found: Any = made("prefix").get_prompt(2, max_cache_len=20)
    assert found.layers[0].max_cache_len == 20
    assert found.get_seq_length() == N
    assert torch.equal(found.layers[0].keys[:, :, :N], made("prefix").get_prompt(2).layers[0].keys)


def without_virtual_tokens_there_is_none() -> None:
    with refused(TypeError, "virtual tokens"):
        fresh("lora").get_prompt(2)


# ---- 2.14 gradient checkpointing -------------------------------------------------------------------------------------
class _Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, 4)
        self.layer = nn.Linear(4, 4)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(self.words(ids))
        return found


def inputs_require_gradients() -> None:
    model = fresh("lora")
    base = model.get_base_model()
    assert model.prepare_model_for_gradient_checkpointing(base) is base
    assert base.get_input_embeddings()(IDS).requires_grad


def models_without_the_method_get_a_hook() -> None:
    base = _Bare()
    model = PeftModel(base, config("lora", task_type=None, target_modules=["layer"]))
    model.prepare_model_for_gradient_checkpointing(base)
    assert base.words(torch.tensor([1])).requires_grad


def models_that_do_not_say_count_as_checkpointed() -> None:
    base = _Bare()
    PeftModel(base, config("lora", task_type=None, target_modules=["layer"]))
    assert base.words(torch.tensor([1])).requires_grad


def quantised_models_are_left_alone() -> None:
    model = fresh("lora")
    for name in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized"):
        calls: list[int] = []
        fake: Any = SimpleNamespace(**{name: True}, enable_input_require_grads=lambda calls=calls: calls.append(1))
        assert model.prepare_model_for_gradient_checkpointing(fake) is fake
        assert calls == []


# ---- 2.18 other members ----------------------------------------------------------------------------------------------
@over(*LAYERS, *PROMPTS[:3], "prefix")
def generate_is_an_argmax_loop(kind: str) -> None:
    model = made(kind)
    tasks: dict[str, Any] = {"task_ids": TASK_IDS} if kind == "multitask" else {}
    expected = IDS
    with torch.no_grad():
        for _ in range(4):
            expected = torch.cat([expected, model(input_ids=expected, **tasks).logits[:, -1:].argmax(-1)], dim=1)
    found = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False, **tasks)
    assert torch.equal(found, expected)


@over(*SORTS)
def flags_are_set_whatever_is_active(kind: str) -> None:
    """Differs: prompts, too; the peer raises `TypeError` for them."""
    model = pair(kind)
    model.set_requires_grad(["a", "b"])
    assert trains(model, "a")
    assert trains(model, "b")
    model.set_requires_grad("b", requires_grad=False)
    assert not trains(model, "b")
    with refused(ValueError, "not found"):
        model.set_requires_grad("c")


def layers_say_whether_they_can_become_lora() -> None:
    assert fresh("loha").supports_lora_conversion()
    assert fresh("lora", name="a").supports_lora_conversion("a")
    assert not made("lora", init_lora_weights="gaussian", use_dora=True).supports_lora_conversion()


@over("lora", "loha")
def operations_of_the_tuner_are_reachable(kind: str) -> None:
    model = pair(kind)
    before = run(model)
    model.merge_adapter()
    assert same(run(model), before, atol=1e-4)
    model.unmerge_adapter()
    model.disable_adapter_layers()
    assert torch.equal(run(model), run(tiny()))
    model.enable_adapter_layers()
    assert torch.equal(run(model), before)
    merged = copy.deepcopy(model).merge_and_unload()
    assert same(run(merged), before, atol=1e-4)
    assert torch.equal(run(model.unload()), run(tiny()))


def weighted_adapters_are_reachable() -> None:
    model = pair("lora")
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "c", combination_type="cat")
    assert model.peft_config["c"].r == 4


def uploading_saves_first(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    seen: list[set[str]] = []

    class Api:
        def __init__(self, **options: Any) -> None: ...
        def create_repo(self, *args: Any, **options: Any) -> None: ...

        def upload_folder(self, *, folder_path: str, **options: Any) -> None:
            seen.append({path.name for path in Path(folder_path).iterdir()})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    fresh("lora").push_to_hub("somebody/something")
    assert seen == [{"README.md", "adapter_config.json", "adapter_model.safetensors"}]
