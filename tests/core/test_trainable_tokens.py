"""Rows of embeddings that train by themselves, in models whose output layer shares the weight and in others: numbers, and which rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import support
from core.token_models import IDS, MODELS, ROWS, T, base_weight, llama, logits, new_rows, overwritten, rows, table_of, with_rows
from peft_core import ConfigError, PeftModel, UnsupportedModuleError, get_peft_model, get_peft_model_state_dict
from peft_core.layers import token_rows


@pytest.fixture(autouse=True)
def rows_tuner() -> Iterator[None]:
    with support.registered(ROWS):
        yield


@pytest.fixture
def model() -> PeftModel:
    """A tied llama whose rows T have other values than in the base."""
    return with_rows()


# ---- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_new_rows_change_nothing(kind: str) -> None:
    make, target = MODELS[kind]
    assert torch.equal(logits(get_peft_model(make(), rows(target_modules=[target])).eval()), logits(make()))


@pytest.mark.parametrize("kind", MODELS)
def test_rows_act_as_if_written_into_the_table(kind: str) -> None:
    make, target = MODELS[kind]
    model = get_peft_model(make(), rows(target_modules=[target])).eval()
    plain = overwritten(make(), new_rows(model))
    assert torch.equal(logits(model), logits(plain))
    assert not torch.equal(logits(plain), logits(make()))


@pytest.mark.parametrize("kind", MODELS)
def test_large_output_layers_are_not_multiplied_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_rows, "SMALL", 0)
    make, target = MODELS[kind]
    model = get_peft_model(make().double(), rows(target_modules=[target])).eval()
    plain = overwritten(make().double(), new_rows(model))
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-11, rtol=1e-12)


class Sizes(TorchDispatchMode):
    """Notes the sizes of what operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.untyped_storage().data_ptr() not in self.known:
            self.seen.add(tuple(found.shape))
        return found

    known: frozenset[int] = frozenset()


@pytest.mark.parametrize("grad", [False, True])
def test_no_forward_copies_the_table(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_rows, "SMALL", 0)
    model = get_peft_model(llama(), rows())
    with torch.set_grad_enabled(grad), Sizes() as sizes:
        sizes.known = frozenset(parameter.untyped_storage().data_ptr() for parameter in model.parameters())
        found = model(input_ids=IDS).logits
        if grad:
            found.sum().backward()
    assert not {(32, 16), (16, 32)} & sizes.seen


def reference(base: Any, delta: Tensor, ids: Tensor, **look_up: Any) -> Tensor:
    return F.embedding(ids, base.weight.detach().index_copy(0, torch.tensor(T), delta), **look_up)


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": 2}, {"padding_idx": 9}, {"scale_grad_by_freq": True}, {"max_norm": 0.7, "norm_type": 1.5}, {"sparse": True}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_look_ups_and_gradients_are_those_of_a_changed_table(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    base: Any = nn.Module()
    base.tokens, base.q_proj = nn.Embedding(32, 4, dtype=torch.float64, **options), nn.Linear(4, 4)
    plain = copy.deepcopy(base.tokens)
    get_peft_model(base, rows({"tokens": T}))
    delta = base.tokens.token_adapter.trainable_tokens_delta["default"]
    with torch.no_grad():
        delta.normal_()
    twin = delta.detach().clone().requires_grad_()
    weights = torch.randn(*IDS.shape, 4, dtype=torch.float64)
    found = base.tokens(IDS)
    options = {key: value for key, value in options.items() if key != "sparse"}
    expected = reference(plain, twin, IDS, **options)
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-14)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(delta.grad, twin.grad, atol=1e-15, rtol=1e-13)


@pytest.mark.parametrize("small", [0, 2**16])
def test_rows_of_a_tied_pair_get_one_gradient_from_both_ends(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_rows, "SMALL", small)
    model = get_peft_model(llama().double(), rows())
    delta = table_of(model).token_adapter.trainable_tokens_delta["default"]
    plain = overwritten(llama().double(), new_rows(model))
    weights = torch.randn(*IDS.shape, 32, dtype=torch.float64)
    (model(input_ids=IDS).logits * weights).sum().backward()
    (plain(input_ids=IDS).logits * weights).sum().backward()
    torch.testing.assert_close(delta.grad, plain.model.embed_tokens.weight.grad[T], atol=1e-12, rtol=1e-12)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad and "tokens" in name] == [
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"
    ]


def test_only_the_rows_learn(model: PeftModel) -> None:
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimiser.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("trainable_tokens_delta" in name for name in changed)
    assert all(name.endswith("default") for name in changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = get_peft_model(llama().to(dtype), rows()).eval()
    assert table_of(model).token_adapter.trainable_tokens_delta["default"].dtype == torch.float32
    plain = overwritten(llama().to(dtype), new_rows(model))
    found = logits(model)
    assert found.dtype == dtype
    assert torch.equal(found, logits(plain))
    before = base_weight(table_of(model)).clone()
    model.merge_adapter()
    assert torch.equal(base_weight(table_of(model)), plain.model.embed_tokens.weight)
    model.unmerge_adapter()
    assert torch.equal(support.bits(base_weight(table_of(model))), support.bits(before))


@pytest.mark.parametrize("kind", ["tied", "bias"])
def test_rows_that_change_between_calls_are_seen(kind: str) -> None:
    """At both ends, in evaluation, where layers may keep what they computed once."""
    make, target = MODELS[kind]
    model = get_peft_model(make(), rows(target_modules=[target])).eval()
    for seed in (1, 2):
        plain = overwritten(make(), new_rows(model, seed=seed))
        assert torch.equal(logits(model), logits(plain))
        assert torch.equal(logits(model), logits(plain))


def test_under_autocast(model: PeftModel) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model)
        expected = logits(overwritten(llama(), new_rows(model)))
    assert torch.equal(found, expected)


def test_one_graph(model: PeftModel) -> None:
    expected = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(logits(compiled), expected)


# ---- which rows of which modules ----------------------------------------------------------------------------------------


def test_negative_indices_count_from_the_end() -> None:
    model = get_peft_model(llama(), rows([-1, 4])).eval()
    values = new_rows(model)
    assert torch.equal(logits(model), logits(overwritten(llama(), values, [31, 4])))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 32], r"\[32\] out of range for 'model.embed_tokens', which has 32 rows; resize_token_embeddings"),
        ([-33], r"\[-33\] out of range"),
        ([3, 5, 3], r"\[3\] given more than once for 'model.embed_tokens'"),
        ([31, -1], r"\[31\] given more than once"),
        ([1.0], r"\[1.0\] is no list of integers; write the ids of tokens"),
        ([True], r"no list of integers"),
        ("12", r"'12' is no list of integers"),
        ({"embed_token": [1]}, r"'embed_token' not found in the base model LlamaForCausalLM; did you mean 'embed_tokens'"),
        ({"embed_tokens": [1], "model.embed_tokens": [2]}, r"'model.embed_tokens' is named twice"),
    ],
)
def test_bad_indices_are_refused_and_leave_no_trace(tokens: Any, message: str) -> None:
    base = llama()
    before = support.picture(base)
    with pytest.raises(ConfigError, match=message):
        get_peft_model(base, rows(tokens))
    assert support.picture(base) == before


def test_a_module_that_is_no_table_is_refused() -> None:
    with pytest.raises(UnsupportedModuleError, match=r"'model.norm' is a LlamaRMSNorm; name an nn.Embedding"):
        get_peft_model(llama(), rows({"model.norm": [1]}))


def test_a_model_that_does_not_name_its_embedding() -> None:
    base = nn.Module()
    base.embed_tokens, base.q_proj = nn.Embedding(8, 4), nn.Linear(4, 4)
    get_peft_model(base, rows([1]))
    assert isinstance(base.embed_tokens, token_rows.TokenRows)
    base = nn.Module()
    base.words, base.q_proj = nn.Embedding(8, 4), nn.Linear(4, 4)
    with pytest.raises(ConfigError, match=r"does not say which module embeds its tokens; name it"):
        get_peft_model(base, rows([1]))


def test_no_rows_at_all() -> None:
    model = get_peft_model(llama(), rows([])).eval()
    assert torch.equal(logits(model), logits(llama()))
    assert table_of(model).token_adapter.trainable_tokens_delta["default"].shape == (0, 16)


def test_named_modules_have_rows_of_their_own() -> None:
    model: Any = get_peft_model(llama(tie_word_embeddings=False), rows({"embed_tokens": T, "lm_head": [7]})).eval()
    values = new_rows(model)
    head = model.get_base_model().lm_head.token_adapter.trainable_tokens_delta["default"]
    plain = overwritten(llama(tie_word_embeddings=False), values)
    with torch.no_grad():
        head.fill_(0.5)
        plain.lm_head.weight[7] = 0.5
    assert torch.equal(logits(model), logits(plain))


def test_a_tied_pair_named_with_the_same_rows_has_them_once() -> None:
    model = get_peft_model(llama(), rows({"embed_tokens": T, "lm_head": T})).eval()
    assert [key for key in get_peft_model_state_dict(model) if "token_adapter" in key] == [
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    plain = overwritten(llama(), new_rows(model))
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.filterwarnings("ignore:input and output embeddings are not tied any more")
@pytest.mark.parametrize("tokens", [{"lm_head": [7]}, {"embed_tokens": T, "lm_head": [7]}])
def test_rows_of_one_end_of_a_tied_pair_stay_there(tokens: dict[str, list[int]]) -> None:
    model = get_peft_model(llama(), rows(tokens)).eval()
    base: Any = model.get_base_model()
    plain = llama()
    plain.lm_head.weight = nn.Parameter(plain.lm_head.weight.detach().clone())
    with torch.no_grad():
        base.lm_head.token_adapter.trainable_tokens_delta["default"].fill_(0.5)
        plain.lm_head.weight[7] = 0.5
    if "embed_tokens" in tokens:
        overwritten(plain, new_rows(model))
    expected, shared = logits(plain), base_weight(table_of(model))
    assert torch.equal(logits(model), expected)
    model.merge_adapter()
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert base_weight(base.lm_head) is base_weight(table_of(model)) is shared
    assert torch.equal(logits(model.merge_and_unload()), expected)


def test_all_modules_with_the_weight_get_the_rows() -> None:
    from peft_core.testing import tiny

    ids = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}
    model = get_peft_model(tiny("t5"), rows(target_modules=["q"])).eval()
    plain = overwritten(tiny("t5"), new_rows(model))
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, plain(**ids).logits)
        merged: Any = model.merge_and_unload()
        assert torch.equal(merged(**ids).logits, plain(**ids).logits)
    assert merged.lm_head.weight is merged.shared.weight is merged.decoder.embed_tokens.weight
