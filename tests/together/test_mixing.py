"""The proof that the doors are right: methods of every kind on one model at once, and nothing in core knows which they are."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_core import (
    MergeError,
    PeftModel,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft_core.testing import tiny
from peft_core.testing.helpers import randomise

CONFIGS: dict[str, dict[str, Any]] = {
    "lo": {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
    "ha": {"peft_type": "LOHA", "r": 2, "target_modules": ["q_proj", "down_proj"]},
    "pre": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4},
    "pro": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3},
}
TEXT = 7
ROWS: list[Any] = [["lo", "ha", "pre"], "__base__", "pro", ["ha", "lo", "pre", "pro"]]


def config(name: str) -> Any:
    return get_peft_config({"task_type": "CAUSAL_LM", **copy.deepcopy(CONFIGS[name])})


@pytest.fixture
def model() -> PeftModel:
    """LoRA, LoHa, prefix and prompt tuning and a saved head on one Llama, all in use."""
    first, *others = CONFIGS
    wrapped = get_peft_model(tiny(), config(first), first)
    for other in others:
        wrapped.add_adapter(other, config(other))
    for seed, name in enumerate(CONFIGS):
        randomise(wrapped, name, seed)
    wrapped.set_adapter(list(CONFIGS))
    return wrapped.eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 64, (4, TEXT), generator=torch.Generator().manual_seed(0))


def logits(model: Any, ids: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **kwargs).logits[:, -ids.shape[1] :]


def members(row: Any) -> list[str]:
    return [] if row == "__base__" else [row] if isinstance(row, str) else row


def step_by_step(model: Any, ids: Tensor, mask: Tensor, steps: int, **kwargs: Any) -> Tensor:
    for _ in range(steps):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        following = logits(model, ids, mask, position_ids=positions, **kwargs)[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, following], 1), torch.cat([mask, torch.ones_like(following)], 1)
    return ids


def left_padded(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[2, :1] = 0
    return mask


def test_each_row_computes_what_it_would_alone(model: PeftModel, ids: Tensor) -> None:
    together = logits(model, ids, adapter_names=ROWS)
    for row, names in enumerate(ROWS):
        with model.use_adapters(*members(names)):
            alone = logits(model, ids[row : row + 1])[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)


def test_a_base_row_is_the_base(model: PeftModel, ids: Tensor) -> None:
    found = logits(model, ids, adapter_names=ROWS)[1]
    torch.testing.assert_close(found, logits(tiny(), ids)[1], atol=1e-5, rtol=1e-5)


def test_each_adapter_has_its_effect_in_the_mix(model: PeftModel, ids: Tensor) -> None:
    everything = logits(model, ids)
    for name in CONFIGS:
        with model.use_adapters(*(other for other in CONFIGS if other != name)):
            assert not torch.allclose(logits(model, ids), everything, atol=1e-4), f"without {name} nothing changes"


def test_disabled_it_is_the_base_bit_for_bit(model: PeftModel, ids: Tensor) -> None:
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(tiny(), ids))


@pytest.mark.parametrize("rows", [None, ROWS], ids=["all", "by-row"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "left-padded"])
def test_generate_equals_an_argmax_loop(model: PeftModel, ids: Tensor, rows: Any, padded: bool) -> None:
    mask = left_padded(ids) if padded else torch.ones_like(ids)
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, adapter_names=rows)
    assert torch.equal(found, step_by_step(model, ids, mask, 6, adapter_names=rows))


@pytest.mark.parametrize("rows", [None, ROWS], ids=["all", "by-row"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_without_a_cache_is_the_same(model: PeftModel, ids: Tensor, rows: Any, beams: int) -> None:
    options = {"attention_mask": left_padded(ids), "max_new_tokens": 6, "do_sample": False, "num_beams": beams, "adapter_names": rows}
    assert torch.equal(model.generate(input_ids=ids, **options), model.generate(input_ids=ids, use_cache=False, **options))


def test_left_padding_changes_nothing(model: PeftModel, ids: Tensor) -> None:
    short = ids[:1, 3:]
    padded, mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1), torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    torch.testing.assert_close(logits(model, padded, mask)[:, -4:], logits(model, short), atol=1e-5, rtol=1e-5)


def test_saved_and_loaded_piece_by_piece(model: PeftModel, ids: Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    first, *others = CONFIGS
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / first, first)
    for other in others:
        assert loaded.load_adapter(tmp_path / other, other) == ([], [])
    loaded.set_adapter(list(CONFIGS))
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert torch.equal(logits(loaded, ids, adapter_names=ROWS), logits(model, ids, adapter_names=ROWS))


@pytest.mark.parametrize("rows", [None, ROWS], ids=["all", "by-row"])
def test_one_graph(model: PeftModel, ids: Tensor, rows: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, ids, adapter_names=rows), logits(model, ids, adapter_names=rows), atol=1e-5, rtol=1e-5)


def test_all_of_them_train(model: PeftModel, ids: Tensor) -> None:
    model.train()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    without = [name for name in trained if model.get_parameter(name).grad is None]
    assert not without
    for name in CONFIGS:
        assert any(f".{name}" in parameter for parameter in trained), f"{name} does not train"


def test_what_can_merge_merges_and_the_rest_stays(model: PeftModel, ids: Tensor) -> None:
    expected = logits(model, ids)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters() if "base_layer" in name}
    model.merge_adapter(["lo", "ha"])
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in weights.items())


def test_a_merge_that_one_of_them_can_not_do_changes_nothing(model: PeftModel, ids: Tensor) -> None:
    expected = logits(model, ids)
    with pytest.raises(ValueError, match=r"'pre' \(PREFIX_TUNING\) can't be merged"):
        model.merge_adapter()
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("order", [("lo", "ha"), ("ha", "lo")])
def test_two_methods_on_one_module_nest_in_any_order(ids: Tensor, order: tuple[str, str]) -> None:
    wrapped = get_peft_model(tiny(), config(order[0]), order[0])
    wrapped.add_adapter(order[1], config(order[1]))
    randomise(wrapped, "lo", 0)
    randomise(wrapped, "ha", 1)
    wrapped.set_adapter(["lo", "ha"])
    single = [get_peft_model(tiny(), config(name), name) for name in ("lo", "ha")]
    for seed, alone in enumerate(single):
        randomise(alone, ("lo", "ha")[seed], seed)
    path = "model.layers.0.self_attn.q_proj"
    deltas = sum(alone.get_base_model().get_submodule(path).get_delta_weight(name) for alone, name in zip(single, ("lo", "ha"), strict=True))
    merged = wrapped.merge_and_unload()
    expected = tiny().get_submodule(path).weight + deltas
    torch.testing.assert_close(merged.get_submodule(path).weight, expected)


def test_threads_with_different_mixes_do_not_meet(model: PeftModel, ids: Tensor) -> None:
    mixes = [("lo",), ("pre", "ha"), ("pro",), ()]
    expected = []
    for mix in mixes:
        with model.use_adapters(*mix):
            expected.append(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False))
    wrong: list[Any] = []

    def work(number: int) -> None:
        with model.use_adapters(*mixes[number]):
            for _ in range(3):
                found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
                if not torch.equal(found, expected[number]):
                    wrong.append(mixes[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(mixes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_prefix_prompt_and_lora_by_row_on_an_encoder_with_a_head() -> None:
    """Rows with and without virtual embeddings in one batch of BERT, whose pooler reads the first token."""
    ids = torch.randint(1, 64, (4, 6), generator=torch.Generator().manual_seed(0))
    kinds = {
        "lo": {"peft_type": "LORA", "target_modules": ["query"]},
        "pro": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3},
        "pre": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2},
    }
    wrapped = None
    for seed, (name, fields) in enumerate(kinds.items()):
        made = get_peft_config({"task_type": "SEQ_CLS", **fields})
        if wrapped is None:
            wrapped = get_peft_model(tiny("bert-seq-cls"), made, name).eval()
        else:
            wrapped.add_adapter(name, made)
        randomise(wrapped, name, seed)
    assert wrapped is not None
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    rows = ["pro", ["lo", "pre"], "__base__", ["lo", "pro"]]
    with torch.no_grad():
        together = wrapped(input_ids=ids, attention_mask=mask, adapter_names=rows).logits
        for row, names in enumerate(rows):
            with wrapped.use_adapters(*members(names)):
                alone = wrapped(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1]).logits
            torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [("lo", "ha"), ("ha", "lo")])
def test_two_methods_merged_one_after_the_other_come_out_exactly(order: tuple[str, str], dtype: torch.dtype) -> None:
    """Taken out in any order: the whole model at once, or one layer while the other stays merged."""
    wrapped = get_peft_model(tiny().to(dtype), config("lo"), "lo")
    wrapped.add_adapter("ha", config("ha"))
    randomise(wrapped, "lo", 0)
    randomise(wrapped, "ha", 1)
    path = "model.layers.0.self_attn.q_proj"
    outer = wrapped.get_base_model().get_submodule(path)
    inner = outer.base_layer
    before = outer.weight.detach().clone()
    for _ in range(3):
        for name in order:
            wrapped.merge_adapter(name)
        wrapped.unmerge_adapter()
        assert torch.equal(outer.weight, before)
    wrapped.merge_adapter(order[0])
    alone = outer.weight.detach().clone()
    first, second = (inner, outer) if order[0] == "lo" else (outer, inner)
    second.merge(adapter_names=[order[1]])
    second.unmerge()
    assert torch.equal(outer.weight, alone)
    second.merge(adapter_names=[order[1]])
    first.unmerge()
    second.unmerge()
    assert torch.equal(outer.weight, before)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("choice", ["rows", "block"])
def test_layers_that_run_again_meet_the_adapters_of_the_call(model: PeftModel, ids: Tensor, choice: str, reentrant: bool) -> None:
    """Under checkpointing layers run again in the backward pass, when the choice for one call or block is gone."""
    model.set_adapter(["lo", "ha"])
    model.train()
    base = model.get_base_model()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        if choice == "rows":
            loss = model(input_ids=ids, labels=ids, adapter_names=["lo", "ha", "lo", "__base__"]).loss
        else:
            with model.use_adapters("lo"):
                loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    expected = gradients()
    assert expected
    base.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.prepare_model_for_gradient_checkpointing(base)
    found = gradients()
    base.activation_checkpointing_disable()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_a_merge_that_is_done_again_keeps_nothing_of_the_first_time() -> None:
    """What is kept is a few small integers or a whole copy, depending on sizes; here the kind changes when the merge below is taken out."""
    wrapped = get_peft_model(tiny(), config("lo"), "lo")
    wrapped.add_adapter("ha", config("ha"))
    randomise(wrapped, "lo", 0)
    randomise(wrapped, "ha", 1)
    outer = wrapped.get_base_model().get_submodule("model.layers.0.self_attn.q_proj")
    with torch.no_grad():  # with LoRA merged almost nothing is left of the weight, beside which LoHa is large; without, they are alike
        outer.weight.copy_(-0.99999 * outer.base_layer.get_delta_weight("lo"))
        outer.hada_w1_a["ha"].mul_(30)
    before = outer.weight.detach().clone()
    outer.base_layer.merge(adapter_names=["lo"])
    outer.merge(adapter_names=["ha"])
    outer.base_layer.unmerge()
    outer.unmerge()
    assert torch.equal(outer.weight, before)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_shared_weight_comes_back_when_merges_are_done_again() -> None:
    """A tied embedding: the layer gets a weight of its own while merged, and the shared one afterwards, in whatever order merges come out."""
    base = tiny()
    base.config.tie_word_embeddings = True
    base.lm_head.weight = base.model.embed_tokens.weight
    fields = {"peft_type": "LORA", "r": 2, "target_modules": ["lm_head"], "init_lora_weights": False}
    wrapped = get_peft_model(base, get_peft_config(fields), "a")
    wrapped.add_adapter("ha", get_peft_config({"peft_type": "LOHA", "r": 2, "target_modules": ["lm_head"], "init_weights": False}))
    layer = base.lm_head
    shared, values = base.model.embed_tokens.weight, base.model.embed_tokens.weight.detach().clone()
    layer.base_layer.merge(adapter_names=["a"])
    layer.merge(adapter_names=["ha"])
    assert torch.equal(shared, values), "merging changed the embedding that shares the weight"
    layer.base_layer.unmerge()
    layer.unmerge()
    assert layer.weight is shared
    assert torch.equal(shared, values)


def test_loading_into_a_merged_adapter_is_refused(model: PeftModel) -> None:
    model.merge_adapter(["lo"])
    state = get_peft_model_state_dict(model, adapter_name="lo")
    with pytest.raises(MergeError, match="unmerge_adapter"):
        set_peft_model_state_dict(model, state, "lo")
