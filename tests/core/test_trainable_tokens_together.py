"""Rows of embeddings that train, beside other adapters and in the life of a model: conflicts, routes, merging, files and copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import support
from core.token_models import IDS, MODELS, ROWS, T, base_weight, llama, logits, new_rows, overwritten, rows, table_of, with_rows
from peft_core import (
    AdapterWeightsError,
    ConfigError,
    MergeError,
    PeftModel,
    PeftWarning,
    RoutingError,
    UnsupportedModuleError,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft_core.layers import token_rows
from support import DenseConfig


@pytest.fixture(autouse=True)
def rows_tuner() -> Iterator[None]:
    with support.registered(ROWS):
        yield


@pytest.fixture
def model() -> PeftModel:
    """A tied llama whose rows T have other values than in the base."""
    return with_rows()


# ---- conflicts ----------------------------------------------------------------------------------------------------------


COMMON = r"in 'model.embed_tokens' '(default|b)' and '(default|b)' have rows of the same tokens \[2, 5\]"


def test_adapters_with_rows_of_the_same_tokens_are_not_used_at_once(model: PeftModel) -> None:
    model.add_adapter("b", rows([2, 7, 5]))
    model.add_adapter("c", rows([9]))
    before = support.picture(model)
    layer: Any = model.get_base_model().get_input_embeddings()
    for use in (
        lambda: model.set_adapter(["default", "b"]),
        lambda: model.use_adapters("default", "b").__enter__(),
        lambda: model(input_ids=IDS, adapter_names=[["default", "b"], "c"]),
        lambda: model.get_base_model().get_input_embeddings().set_adapter(["b", "default"]),
        lambda: layer.token_adapter.set_adapter(["b", "default"]),
    ):
        with pytest.raises(RoutingError, match=r"have rows of the same tokens \[2, 5\]"):
            use()
    for names in (["default", "b"], ["b", "default"]):
        with pytest.raises(MergeError, match=COMMON):
            model.merge_adapter(names)
    assert support.picture(model) == before
    assert model.active_adapters == ["default"]
    model.set_adapter(["default", "c"])
    model.merge_adapter()
    with pytest.raises(MergeError, match=COMMON):
        model.merge_adapter(["b"])
    assert layer.merged_adapters == ["default", "c"]


def test_each_of_two_adapters_has_its_own_rows_of_the_same_tokens(model: PeftModel) -> None:
    plain, first = llama(), model(input_ids=IDS).logits
    model.add_adapter("b", rows([2, 7, 5]))
    model.set_adapter("b")
    torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)  # begins as the base, not as the other adapter
    layer: Any = model.get_base_model().get_input_embeddings()
    with torch.no_grad():
        layer.token_adapter.trainable_tokens_delta["b"].fill_(0.25)
        plain.get_input_embeddings().weight[[2, 7, 5]] = 0.25
    second = model(input_ids=IDS).logits
    torch.testing.assert_close(second, plain(input_ids=IDS).logits)
    rowwise = model(input_ids=IDS, adapter_names=["default", "b"]).logits
    torch.testing.assert_close(rowwise, torch.stack([first[0], second[1]]))
    for name, expected in (("default", first), ("b", second)):
        model.set_adapter(name)
        model.merge_adapter([name])
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)
        model.unmerge_adapter()
    model.delete_adapter("default")
    torch.testing.assert_close(model(input_ids=IDS).logits, second)
    torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS).logits, second)


def test_one_is_merged_into_the_base_and_the_other_dropped(model: PeftModel) -> None:
    first = model(input_ids=IDS).logits
    model.add_adapter("b", rows([2, 7, 5]))
    torch.testing.assert_close(model.merge_and_unload(adapter_names=["default"])(input_ids=IDS).logits, first)


def test_wrapping_a_model_again_is_refused_where_both_would_be_in_use(model: PeftModel) -> None:
    before = support.picture(model)
    with pytest.warns(PeftWarning, match="already has adapters"), pytest.raises(RoutingError, match=COMMON):
        get_peft_model(model.get_base_model(), rows([2, 7, 5]), "b")
    assert support.picture(model) == before
    assert list(model.peft_config) == ["default"]


def test_a_module_is_saved_whole_or_has_rows() -> None:
    with pytest.raises(ConfigError, match=r"trainable_token_indices and modules_to_save both have 'model.embed_tokens'"):
        get_peft_model(llama(), rows(modules_to_save=["embed_tokens"]))


def test_of_two_adapters_too(model: PeftModel) -> None:
    whole = DenseConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    before = support.picture(model)
    with pytest.raises(UnsupportedModuleError, match=r"rows of 'model.embed_tokens' train in 'default', so that it can't be saved whole"):
        model.add_adapter("b", whole)
    assert support.picture(model) == before
    other = get_peft_model(llama(), whole)
    with pytest.raises(UnsupportedModuleError, match=r"'model.embed_tokens' is saved whole by 'default'"):
        other.add_adapter("b", rows())


@pytest.mark.filterwarnings("ignore:input and output embeddings are not tied any more")
def test_an_output_layer_that_is_saved_whole_has_no_rows() -> None:
    """What trl asks for when it adds tokens to a chat template, whether the pair is tied or not."""
    model = get_peft_model(llama(), rows(modules_to_save=["lm_head"])).eval()
    base: Any = model.get_base_model()
    assert torch.equal(logits(model), logits(llama()))
    plain = llama()
    plain.lm_head.weight = nn.Parameter(plain.lm_head.weight.detach().clone())
    overwritten(plain, new_rows(model))
    with torch.no_grad():
        base.lm_head.modules_to_save["default"].weight.mul_(2)
        plain.lm_head.weight.mul_(2)
    assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model.merge_and_unload()), logits(plain))


# ---- several adapters, routes ---------------------------------------------------------------------------------------------


@pytest.fixture
def two() -> PeftModel:
    model = get_peft_model(llama(), rows(), "a").eval()
    model.add_adapter("b", rows([9, 0], start="random"))
    new_rows(model, "a", 1), new_rows(model, "b", 2)
    return model


def test_two_adapters_at_once(two: Any) -> None:
    two.base_model.set_adapter(["a", "b"])
    table = table_of(two).token_adapter.trainable_tokens_delta
    found = table_of(two)(torch.arange(32))
    expected = table_of(two).original_module.weight.detach().clone()
    expected[T], expected[[9, 0]] = table["a"].detach(), table["b"].detach()
    assert torch.equal(found, expected)


def test_each_row_of_a_batch_sees_its_own(two: PeftModel) -> None:
    ids = IDS[[1, 0, 1, 0]]
    mixed = logits(two, ids, adapter_names=["b", "__base__", "a", "b"])
    for row, name in ((0, "b"), (2, "a"), (3, "b")):
        two.set_adapter(name)
        torch.testing.assert_close(mixed[row], logits(two, ids)[row], atol=1e-6, rtol=1e-5)
    with two.disable_adapter():
        torch.testing.assert_close(mixed[1], logits(two, ids)[1], atol=1e-6, rtol=1e-5)


def test_disabled_rows_do_nothing(model: PeftModel) -> None:
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))


def test_deleted_rows_are_gone(two: PeftModel) -> None:
    two.delete_adapter("b")
    assert not [name for name in two.state_dict() if "token_adapter" in name and name.endswith(".b")]
    two.set_adapter("a")
    assert torch.equal(logits(two), logits(overwritten(llama(), table_of(two).token_adapter.trainable_tokens_delta["a"].detach())))


# ---- merging ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
def test_merging_writes_the_rows_and_unmerging_what_was_there(tie: bool) -> None:
    model = get_peft_model(llama(tie_word_embeddings=tie), rows()).eval()
    base: Any = model.get_base_model()
    values, weight = new_rows(model), base_weight(table_of(model))
    before, expected = weight.detach().clone(), logits(model)
    model.merge_adapter()
    assert torch.equal(base_weight(table_of(model))[T], values)
    assert torch.equal(logits(model), expected)
    assert model.get_model_status().merged_adapters == ["default"]
    with torch.no_grad():  # what is trained meanwhile does not leak
        table_of(model).token_adapter.trainable_tokens_delta["default"].add_(1)
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert base_weight(table_of(model)) is weight
    assert torch.equal(support.bits(weight), support.bits(before))
    assert (base_weight(base.lm_head) is weight) is tie


@pytest.mark.parametrize("kind", MODELS)
def test_merge_and_unload(kind: str) -> None:
    make, target = MODELS[kind]
    base = make()
    names = {name: type(module) for name, module in base.named_modules()}
    model = get_peft_model(base, rows(target_modules=[target])).eval()
    expected = logits(overwritten(make(), new_rows(model)))
    merged: Any = model.merge_and_unload()
    assert torch.equal(logits(merged), expected)
    assert {name: type(module) for name, module in merged.named_modules()} == names
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) is (kind != "untied")


def test_unload_leaves_the_base(model: PeftModel) -> None:
    assert torch.equal(logits(model.unload()), logits(llama()))


def test_merging_two_and_taking_them_out(two: Any) -> None:
    two.base_model.set_adapter(["a", "b"])
    before, expected = base_weight(table_of(two)).detach().clone(), logits(two)
    two.merge_adapter(["a"])
    two.merge_adapter(["b"])
    torch.testing.assert_close(logits(two), expected, atol=1e-6, rtol=1e-5)
    two.unmerge_adapter()
    assert torch.equal(base_weight(table_of(two)), before)


def test_a_safe_merge_refuses_nan(model: PeftModel) -> None:
    before = base_weight(table_of(model)).detach().clone()
    with torch.no_grad():
        table_of(model).token_adapter.trainable_tokens_delta["default"][0, 0] = float("nan")
    with pytest.raises(MergeError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(base_weight(table_of(model)), before)


@pytest.mark.parametrize("merged", [False, True])
def test_the_delta_of_the_weight(model: PeftModel, merged: bool) -> None:
    base: Any = model.get_base_model()
    weight = base_weight(table_of(model)).detach()
    expected = torch.zeros_like(weight)
    expected[T] = table_of(model).token_adapter.trainable_tokens_delta["default"].detach() - weight[T]
    if merged:
        model.merge_adapter()
    for layer in (base.model.embed_tokens, base.lm_head):
        assert torch.equal(layer.get_delta_weight("default"), expected)
        assert torch.equal(layer.ops.to_weight_layout(layer.delta_weight("default")).detach(), expected)


# ---- beside an adapter of the whole table ---------------------------------------------------------------------------------

ORDERS = ["same", "rows-first", "rows-last"]


def beside(order: str) -> PeftModel:
    """Return a model with rows (a) and a wrapper of the whole table (in the same adapter, or w)."""
    whole: dict[str, Any] = {"target_modules": ["embed_tokens"], "start": "random", "alpha": 1}
    if order == "same":
        model: Any = get_peft_model(llama(), rows(**whole), "a")
    elif order == "rows-first":
        model = get_peft_model(llama(), rows(), "a")
        model.add_adapter("w", DenseConfig(**whole))
    else:
        model = get_peft_model(llama(), DenseConfig(**whole), "w")
        model.add_adapter("a", rows())
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".w", ".a")) and "embed_tokens" in name and "tokens_delta" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    new_rows(model, "a")
    model.base_model.set_adapter(list(model.peft_config))
    return model.eval()


@pytest.mark.filterwarnings("ignore:input and output embeddings are not tied any more")
@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_what_they_say_beside_an_adapter_of_the_table(order: str) -> None:
    """In whatever order they came: the rows replace what the other adapter makes of them, too."""
    model = beside(order)
    base: Any = model.get_base_model()
    layer = table_of(model)
    assert isinstance(layer, token_rows.TokenRows)
    (delta,) = [p for name, p in layer.named_parameters() if "dense_delta" in name]
    table = llama().model.embed_tokens.weight.detach() + delta.detach().T
    table[T] = layer.token_adapter.trainable_tokens_delta["a"].detach()
    assert torch.allclose(layer(torch.arange(32)), table, atol=1e-6)
    assert torch.equal(layer(torch.tensor(T)), table[T])
    expected = logits(model)
    shared = base_weight(base.lm_head)
    values = shared.detach().clone()
    model.merge_adapter()
    assert torch.allclose(layer.get_base_weight(), table, atol=1e-6)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert layer.get_base_weight() is base_weight(base.lm_head) is shared
    assert torch.equal(support.bits(shared), support.bits(values))
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-5, rtol=1e-4)


def test_rows_alone_are_not_merged_over_an_adapter_that_is_not() -> None:
    model = beside("rows-first")
    before = base_weight(table_of(model)).detach().clone()
    with pytest.raises(MergeError, match="'w' would stay unmerged"):
        model.merge_adapter(["a"])
    assert torch.equal(base_weight(table_of(model)), before)


def test_a_wrapper_that_could_not_be_added_leaves_no_trace(model: PeftModel) -> None:
    before = support.picture(model)
    with pytest.raises(RuntimeError, match="refuses"):
        model.add_adapter("w", DenseConfig(target_modules=["embed_tokens", "lm_head"], start="fail"))
    assert support.picture(model) == before


# ---- files, names, copies -------------------------------------------------------------------------------------------------


def test_names_in_files_and_in_memory(model: Any) -> None:
    assert {key: tuple(value.shape) for key, value in get_peft_model_state_dict(model).items() if "layers" not in key} == {
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (3, 16)
    }
    names = [name.removeprefix("base_model.model.") for name in model.state_dict() if ".layers." not in name]
    assert names == [
        "model.embed_tokens.token_adapter.base_layer.weight",
        "model.embed_tokens.token_adapter.trainable_tokens_delta.default",
        "model.norm.weight",
        "lm_head.token_adapter.base_layer.weight",
        "lm_head.token_adapter.trainable_tokens_delta.default",
    ]
    embed: Any = model.get_base_model().model.embed_tokens
    assert embed.original_module is embed.token_adapter.base_layer


def test_a_state_dict_is_loaded_again(model: PeftModel) -> None:
    other = get_peft_model(llama(), rows()).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("embeddings", [False, True])
def test_save_and_load(model: PeftModel, tmp_path: Path, low_memory: bool, embeddings: bool) -> None:
    model.save_pretrained(tmp_path, save_embedding_layers=embeddings)
    other = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_memory).eval()
    assert torch.equal(logits(other), logits(model))
    assert not any(parameter.is_meta for parameter in other.parameters())
    head: Any = other.get_base_model().lm_head
    assert head.token_adapter.trainable_tokens_delta["default"] is table_of(other).token_adapter.trainable_tokens_delta["default"]


def test_other_numbers_of_rows_do_not_fit(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"tokens": [\n    5,\n', '"tokens": [\n'))
    with pytest.raises(AdapterWeightsError, match=r"size mismatch: '.*trainable_tokens_delta' is \(3, 16\), expected \(2, 16\)"):
        PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("merged", [False, True])
def test_copies_and_pickles_are_independent(model: PeftModel, merged: bool) -> None:
    expected = logits(model)
    if merged:
        model.merge_adapter()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
        if merged:
            twin.unmerge_adapter()
        plain = overwritten(llama(), new_rows(twin, seed=8))
        assert torch.equal(logits(twin), logits(plain))
        assert torch.equal(logits(twin.merge_and_unload()), logits(plain))
    assert torch.equal(logits(model), expected)


def test_new_embeddings_of_a_resized_vocabulary_go_along(tmp_path: Path) -> None:
    base = llama()
    base.resize_token_embeddings(40, mean_resizing=False)
    model = get_peft_model(base, rows([36, 39])).eval()
    new_rows(model)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    bigger = llama()
    bigger.resize_token_embeddings(40, mean_resizing=False)
    other = PeftModel.from_pretrained(bigger, tmp_path).eval()
    ids = torch.tensor([[36, 38, 39, 1]])
    assert torch.equal(logits(other, ids), logits(model, ids))
