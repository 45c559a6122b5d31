"""`ensure_weight_tying` on targets: an embedding and its output layer use one A and one B."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import support
from peft_core import (
    CapabilityError,
    ConfigError,
    PeftModel,
    PeftWarning,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter_from_state_dict,
)
from peft_core.testing import tiny
from peft_lora import LoraConfig
from support import IDS

TARGETS = [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]]


def config(targets: list[str] | None = None, **fields: Any) -> LoraConfig:
    settings = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, "ensure_weight_tying": True, "target_modules": targets or ["embed_tokens"]}
    return LoraConfig(**{**settings, **fields})


def llama(**kwargs: Any) -> Any:
    return support.llama(**{"tie_word_embeddings": True, **kwargs})


logits = partial(support.logits, input_ids=IDS)


def factors(model: Any, adapter: str = "default") -> tuple[nn.Parameter, nn.Parameter]:
    embedding = model.get_base_model().model.embed_tokens
    return embedding.lora_embedding_A[adapter], embedding.lora_embedding_B[adapter]


def by_hand(model: Any, adapter: str = "default", base: Any = None) -> Any:
    """Return the plain model with (BA)ᵀ added to its one table, in float64."""
    plain = (llama() if base is None else base).double()
    a, b = factors(model, adapter)
    with torch.no_grad():
        plain.model.embed_tokens.weight.add_((b.double() @ a.double()).T, alpha=5 / 3)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    return plain


@pytest.mark.parametrize("targets", TARGETS)
def test_both_ends_use_one_a_and_one_b(targets: list[str]) -> None:
    model = get_peft_model(llama().double(), config(targets)).eval()
    torch.testing.assert_close(logits(model), logits(by_hand(model)), atol=1e-10, rtol=1e-10)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "base_model.model.model.embed_tokens.lora_embedding_A.default",
        "base_model.model.model.embed_tokens.lora_embedding_B.default",
    ]
    assert model.get_nb_trainable_parameters()[0] == 3 * (32 + 16)
    layer: Any = model.get_base_model().lm_head
    a, b = factors(model)
    assert torch.equal(layer.factors("default")[0], b.T)
    assert torch.equal(layer.factors("default")[1], a.T)
    assert (layer.r["default"], layer.scaling["default"]) == (3, 5 / 3)


def test_the_gradient_is_that_of_both_uses() -> None:
    model = get_peft_model(llama().double(), config())
    plain = llama().double()
    a, b = (factor.detach().clone().requires_grad_() for factor in factors(model))
    table = plain.model.embed_tokens.weight.detach() + 5 / 3 * (b @ a).T
    names = ("model.embed_tokens.weight", "lm_head.weight")
    expected = torch.func.functional_call(plain, dict.fromkeys(names, table), (IDS,), {"labels": IDS}, tie_weights=False)
    expected.loss.backward()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for found, wanted in zip(factors(model), (a, b), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, atol=1e-12, rtol=1e-10)


def test_one_step_of_an_optimiser_is_one_step() -> None:
    model = get_peft_model(llama(), config())
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = [factor.detach().clone() for factor in factors(model)]
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimiser.step()
    for factor, old in zip(factors(model), before, strict=True):
        assert factor.grad is not None
        torch.testing.assert_close(factor.detach(), old - 0.1 * factor.grad)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_with_dropout_runs(dropout: float) -> None:
    model = get_peft_model(llama(), config(lora_dropout=dropout)).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(bool(factor.grad.abs().sum() > 0) for factor in factors(model))


def test_what_the_initialisation_freezes_is_frozen_at_both_ends() -> None:
    model = get_peft_model(llama(), config(init_lora_weights="mica", r=1))
    frozen = model.get_base_model().model.embed_tokens.frozen["default"]
    assert {"A": factors(model)[0].requires_grad, "B": factors(model)[1].requires_grad} == {end: end not in frozen for end in "AB"}
    assert len(frozen) == 1
    model.set_adapter("default")
    assert [factor.requires_grad for factor in factors(model)] == [end not in frozen for end in "AB"]


def test_the_embedding_has_the_rank_of_the_end_that_is_named() -> None:
    model = get_peft_model(llama(), config(["lm_head"], rank_pattern={"lm_head": 2}))
    assert factors(model)[0].shape == (2, 32)


def test_merging_keeps_the_tie_and_unmerging_gives_every_bit_back() -> None:
    model = get_peft_model(llama(), config()).eval()
    base: Any = model.get_base_model()
    weight, expected = base.lm_head.weight, logits(by_hand(model)).float()
    before = weight.detach().clone()
    model.merge_adapter()
    assert base.lm_head.weight is base.model.embed_tokens.weight is not weight
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():  # what is trained while merged does not leak into the base
        factors(model)[0].mul_(3)
    model.unmerge_adapter()
    assert base.lm_head.weight is base.model.embed_tokens.weight is weight
    assert torch.equal(support.bits(weight), support.bits(before))
    merged: Any = get_peft_model(llama(), config()).merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_merging_when_the_ends_came_in_another_order() -> None:
    """The output layer was wrapped first, by another adapter: it is merged by itself then."""
    with pytest.warns(PeftWarning, match="ensure_weight_tying"):
        model = get_peft_model(llama(), config(["lm_head"], ensure_weight_tying=False), "a").eval()
    model.add_adapter("b", config())
    model.set_adapter("b")
    base: Any = model.get_base_model()
    weight, expected = base.lm_head.weight, logits(model)
    before = weight.detach().clone()
    torch.testing.assert_close(expected, logits(by_hand(model, "b")).float(), atol=1e-4, rtol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        factors(model, "b")[0].mul_(3)
    model.unmerge_adapter()
    assert base.lm_head.weight is base.model.embed_tokens.weight is weight
    assert torch.equal(weight, before)


def test_merging_beside_an_adapter_of_one_end() -> None:
    """Both are merged into the embedding, one of them into the output layer."""
    model = get_peft_model(llama(), config(), "a").eval()
    with pytest.warns(PeftWarning, match="ensure_weight_tying"):
        model.add_adapter("c", config(ensure_weight_tying=False))
    model.base_model.set_adapter(["a", "c"])
    base: Any = model.get_base_model()
    weight, expected = base.lm_head.weight, logits(model)
    before = weight.detach().clone()
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert base.lm_head.weight is base.model.embed_tokens.weight is weight
    assert torch.equal(weight, before)


def test_a_safe_merge_refuses_nan() -> None:
    from peft_core import MergeError

    model = get_peft_model(llama(), config())
    base: Any = model.get_base_model()
    weight = base.lm_head.weight
    with torch.no_grad():
        factors(model)[0][0, 0] = float("nan")
    with pytest.raises(MergeError, match="NaNs"):
        model.merge_adapter(safe_merge=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight is weight


def test_rows_of_a_batch_and_a_disabled_adapter() -> None:
    model = get_peft_model(llama(), config(), "a").eval()
    model.add_adapter("b", config(["lm_head"], r=2))
    mixed = logits(model, adapter_names=["b", "a"])
    for row, name in ((0, "b"), (1, "a")):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], logits(model)[row], atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))


def test_names_in_a_file() -> None:
    tensors = get_peft_model_state_dict(get_peft_model(llama(), config()), save_embedding_layers=False)
    assert {key.removeprefix("base_model.model."): tuple(value.shape) for key, value in tensors.items()} == {
        "model.embed_tokens.lora_embedding_A": (3, 32),
        "model.embed_tokens.lora_embedding_B": (16, 3),
        "lm_head.lora_A.weight": (3, 16),
        "lm_head.lora_B.weight": (32, 3),
    }
    plain = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    assert torch.equal(plain["lm_head.lora_A.weight"], plain["model.embed_tokens.lora_embedding_B"].T)
    assert torch.equal(plain["lm_head.lora_B.weight"], plain["model.embed_tokens.lora_embedding_A"].T)


@pytest.mark.parametrize("low_memory", [False, True])
def test_save_and_load(low_memory: bool, tmp_path: Path) -> None:
    model = get_peft_model(llama(), config()).eval()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    other = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_memory).eval()
    assert torch.equal(logits(other), logits(model))
    with torch.no_grad():
        factors(other)[0].zero_()
    assert torch.equal(logits(other), logits(llama()))


@pytest.mark.parametrize("merged", [False, True])
def test_copies_and_pickles_are_tied_among_themselves(merged: bool) -> None:
    model = get_peft_model(llama(), config()).eval()
    expected = logits(model)
    if merged:
        model.merge_adapter()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        if merged:
            twin.unmerge_adapter()
        torch.testing.assert_close(logits(twin), expected, atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            factors(twin)[0].zero_()
        assert torch.equal(logits(twin), logits(llama()))


def test_deleted_adapters_are_gone() -> None:
    model = get_peft_model(llama(), config(), "a").eval()
    model.add_adapter("b", config())
    model.set_adapter("b")
    expected = logits(model)
    model.delete_adapter("a")
    assert torch.equal(logits(model), expected)
    head: Any = model.get_base_model().lm_head
    assert (list(head.tied), list(head.scaling)) == (["b"], ["b"])


def test_embeddings_with_the_weight_are_tied_too() -> None:
    ids = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}
    model = get_peft_model(tiny("t5").double(), config(["shared"])).eval()
    plain: Any = tiny("t5").double()
    source: Any = model.get_base_model().shared
    with torch.no_grad():
        plain.shared.weight.add_((source.lora_embedding_B["default"] @ source.lora_embedding_A["default"]).T, alpha=5 / 3)
        torch.testing.assert_close(model(**ids).logits, plain(**ids).logits, atol=1e-10, rtol=1e-10)
        merged: Any = model.merge_and_unload()
        torch.testing.assert_close(merged(**ids).logits, plain(**ids).logits, atol=1e-10, rtol=1e-10)
    assert merged.lm_head.weight is merged.shared.weight is merged.encoder.embed_tokens.weight


def test_beside_trained_rows() -> None:
    model = get_peft_model(llama(), config(trainable_token_indices=[5, 2])).eval()
    rows = model.get_base_model().model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    with torch.no_grad():
        rows.normal_()
    plain = by_hand_under_rows(model, rows)
    expected = logits(plain).float()
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model.get_base_model().lm_head.get_base_weight(), llama().lm_head.weight)


def test_rows_start_as_they_were_before_an_initialisation_changed_the_base() -> None:
    """PiSSA takes its largest components out of the weight; what the rows replace is the weight with them."""
    base = llama(tie_word_embeddings=False)
    settings = config(["lm_head"], init_lora_weights="pissa", ensure_weight_tying=False, trainable_token_indices={"lm_head": [7, 3]})
    model = get_peft_model(base, settings).eval()
    rows = base.lm_head.token_adapter.trainable_tokens_delta["default"]
    plain = llama(tie_word_embeddings=False)
    torch.testing.assert_close(rows.detach(), plain.lm_head.weight.detach()[[7, 3]], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=1e-4)


def test_the_table_is_not_written_where_rows_of_it_train(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config(trainable_token_indices=[5, 2])).eval()
    model.save_pretrained(tmp_path)  # a warning would say that the embeddings are saved
    other = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(logits(other), logits(model))
    assert not [key for key in get_peft_model_state_dict(model) if key.endswith("base_layer.weight")]


def by_hand_under_rows(model: Any, rows: Tensor) -> Any:
    layer = model.get_base_model().model.embed_tokens.wrapped
    plain = llama().double()
    with torch.no_grad():
        change = layer.lora_embedding_B["default"].double() @ layer.lora_embedding_A["default"].double()
        plain.model.embed_tokens.weight.add_(change.T, alpha=5 / 3)
        plain.model.embed_tokens.weight[[5, 2]] = rows.double()
    return plain


# ---- refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "ensure_weight_tying does not work with"),
        ({"target_modules": ["lm_head"], "lora_bias": True}, "ensure_weight_tying does not work with lora_bias"),
        ({"target_modules": ["lm_head"], "init_lora_weights": "pissa"}, "'pissa' can't start 'model.embed_tokens'"),
    ],
)
def test_what_has_no_transposed_form_is_refused(fields: dict[str, Any], message: str) -> None:
    base = llama()
    before = support.picture(base)
    with pytest.raises(ConfigError, match=message):
        get_peft_model(base, config(**fields))
    assert support.picture(base) == before


def test_tied_factors_are_not_swapped() -> None:
    model = get_peft_model(llama(), config())
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    with pytest.raises(CapabilityError, match=r"'lm_head' uses the A and B of another module \(ensure_weight_tying\)"):
        hotswap_adapter_from_state_dict(model, state, "default", config())
