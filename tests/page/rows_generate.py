"""§4.5 to §4.7: keys and values in their cache, generation of decoders, CPT."""

from __future__ import annotations

from typing import Any

import torch

from page import by_hand
from page.making import IDS, PROMPTS, TASK_IDS, N, config, get_peft_model, inputs, made, over, randomise, refused, run, same, tiny, warned

OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def _generated(model: Any, kind: str = "prompt", ids: torch.Tensor = IDS, **more: Any) -> torch.Tensor:
    tasks = {"task_ids": TASK_IDS} if kind == "multitask" else {}
    found: torch.Tensor = model.generate(**{"input_ids": ids, "attention_mask": torch.ones_like(ids), **tasks, **OPTIONS, **more})
    return found


# ---- 4.5 layout ------------------------------------------------------------------------------------------------------
def rows_of_the_table_are_keys_and_values() -> None:
    """Index 2i of a row is the key of layer i, 2i + 1 its value."""
    for base, heads, width in (("llama", 2, 8), ("gpt2", 4, 8)):
        model = made("prefix", base)
        table = model.get_prompt_embedding_to_save("default").view(N, 4, heads, width)
        cache: Any = model.get_prompt(3)
        for i, layer in enumerate(cache.layers):
            for tensor, j in ((layer.keys, 2 * i), (layer.values, 2 * i + 1)):
                assert tensor.shape == (3, heads, N, width)
                assert torch.equal(tensor, table[:, j].permute(1, 0, 2).expand(3, heads, N, width))


def cache_is_dynamic() -> None:
    from transformers import DynamicCache

    assert type(made("prefix").get_prompt(1)) is DynamicCache


def nothing_is_dropped() -> None:
    model = made("prefix").train()
    first, second = (model.get_prompt(1).layers[0].keys for _ in range(2))
    assert torch.equal(first, second)


def cache_has_the_dtype_of_the_base() -> None:
    model = get_peft_model(tiny().bfloat16(), config("prefix"))
    assert model.get_prompt(1).layers[0].keys.dtype == torch.bfloat16


def each_layer_of_both_submodules_reads_its_part() -> None:
    """Layer i reads part 2i mod L, as files of the peer mean it (docs/prompts.md)."""
    model = made("prefix", "t5")
    own = model.peft_config["default"]
    assert (own.num_layers, own.num_transformer_submodules) == (2, 2)
    cache: Any = model.get_prompt(1)
    assert len(cache.self_attention_cache.layers) == 2
    assert cache.self_attention_cache.layers[0].keys.shape == (1, 4, N, 8)
    assert torch.equal(cache.self_attention_cache.layers[0].keys, cache.self_attention_cache.layers[1].keys)


def windows_and_shapes_by_layer_work() -> None:
    from peft_core.testing import tiny as model_of

    model = get_peft_model(model_of("gemma3"), config("prefix")).eval()
    randomise(model, "default", 5)
    expected = IDS
    with torch.no_grad():
        for _ in range(4):
            expected = torch.cat([expected, model(input_ids=expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(_generated(model), expected)


# ---- 4.6 generation of decoders --------------------------------------------------------------------------------------
@over(*PROMPTS)
@torch.no_grad()
def greedy_is_an_argmax_loop(kind: str) -> None:
    for base in ("llama", "gpt2"):
        model = made(kind, base)
        tasks = {"task_ids": TASK_IDS} if kind == "multitask" else {}
        expected = IDS
        for _ in range(4):
            expected = torch.cat([expected, model(input_ids=expected, **tasks).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(_generated(model, kind), expected)


@over("prompt", "prefix", "multitask")
def beams_are_those_of_each_row_alone(kind: str) -> None:
    model = made(kind)
    found = _generated(model, kind, num_beams=3)
    for row in range(2):
        tasks = {"task_ids": TASK_IDS[row : row + 1]} if kind == "multitask" else {}
        alone = model.generate(input_ids=IDS[row : row + 1], attention_mask=torch.ones(1, 6, dtype=torch.long), num_beams=3, **OPTIONS, **tasks)
        assert torch.equal(found[row], alone[0])
    assert found.shape == (2, 10)


@over(*PROMPTS)
def without_a_cache_it_is_the_same(kind: str) -> None:
    model = made(kind)
    assert torch.equal(_generated(model, kind, use_cache=False), _generated(model, kind))


@over(*PROMPTS)
def padding_on_the_left_changes_nothing(kind: str) -> None:
    model = made(kind)
    ids = torch.cat([torch.zeros(2, 2, dtype=torch.long), IDS], dim=1)
    mask = torch.cat([torch.zeros(2, 2, dtype=torch.long), torch.ones_like(IDS)], dim=1)
    assert torch.equal(_generated(model, kind, ids, attention_mask=mask)[:, 2:], _generated(model, kind))


@over("prompt", "prefix")
def masks_grow_in_every_step(kind: str) -> None:
    model = made(kind)
    seen: list[tuple[int, ...]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        text = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        seen.append((text.shape[1], kwargs["attention_mask"].shape[1]))

    model.get_base_model().register_forward_pre_hook(note, with_kwargs=True)
    model.train()  # what the prompt computes by itself is kept in evaluation
    mask = torch.ones_like(IDS)
    mask[1, 0] = 0
    with warned(times=0):
        _generated(model, kind, attention_mask=mask)
    first = 6 + (N if kind == "prompt" else 0)
    assert seen == [(first, N + 6), (1, N + 7), (1, N + 8), (1, N + 9)]


@over("prompt", "prefix")
def static_caches_give_the_same(kind: str) -> None:
    model = made(kind)
    assert torch.equal(_generated(model, kind, cache_implementation="static", disable_compile=True), _generated(model, kind))


@over("prompt", "p-tuning", "prefix")
def virtual_tokens_never_appear(kind: str) -> None:
    found = _generated(made(kind), kind)
    assert found.shape == (2, 10)
    assert torch.equal(found[:, :6], IDS)


# ---- 4.7 CPT ---------------------------------------------------------------------------------------------------------
def types_are_labels_unless_told_otherwise() -> None:
    model, labels = made("cpt"), by_hand.labels_of("llama")["labels"]
    plain = model(**inputs(), labels=labels).loss
    assert same(model(**inputs(), labels=labels, input_type_mask=torch.full_like(IDS, 4)).loss, plain)
    some = torch.full_like(IDS, 4)
    some[:, :3] = 2
    found = model(**inputs(), labels=labels, input_type_mask=some)
    assert not same(found.loss, plain)
    assert same(found.loss, by_hand.loss_of(found.logits, labels.masked_fill(some != 4, by_hand.IGNORED)))


def types_have_the_shape_of_the_ids() -> None:
    with refused(ValueError, "input_type_mask"):
        made("cpt")(**inputs(), labels=IDS, input_type_mask=torch.ones(2, 3, dtype=torch.long))


def types_are_needed_for_labels_alone() -> None:
    model = made("cpt")
    assert same(run(model, input_type_mask=torch.full_like(IDS, 4)), run(model))
