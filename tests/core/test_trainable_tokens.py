"""Rows of embeddings that train by themselves, in models whose output layer shares the weight and in others."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import support
from peft_core import (
    AdapterWeightsError,
    Capability,
    ConfigError,
    Extras,
    MergeError,
    PeftModel,
    TunerSpec,
    UnsupportedModuleError,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft_core.layers import token_rows
from support import DenseConfig

T = [5, 30, 2]
IDS = torch.tensor([[3, 1, 5, 30, 2, 0], [2, 2, 9, 5, 31, 4]])


@dataclass
class RowsConfig(DenseConfig):
    """DENSE with rows that train."""

    tokens: Any = None

    default_peft_type: ClassVar[str | None] = "ROWS"

    def extras(self) -> Extras:
        return Extras(modules_to_save=tuple(self.modules_to_save or ()), bias=self.bias, token_indices=self.tokens)


CAN = Capability.MERGE | Capability.PER_SAMPLE | Capability.EMBEDDING
ROWS = TunerSpec("ROWS", RowsConfig, support.DenseTuner, "dense_", capabilities=CAN)


@pytest.fixture(autouse=True)
def rows_tuner() -> Iterator[None]:
    with support.registered(ROWS):
        yield


def rows(tokens: Any = T, **fields: Any) -> RowsConfig:
    return RowsConfig(**{"target_modules": ["q_proj"], "tokens": tokens, **fields})


def llama(**kwargs: Any) -> Any:
    return support.llama(**{"tie_word_embeddings": True, **kwargs})


def bert(**kwargs: Any) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertForMaskedLM(BertConfig(**{**sizes, **kwargs})).eval()
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    return model


def gemma() -> Any:
    """A model that multiplies what it looks up by √dim."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, num_key_value_heads=1)).eval()


#: model, what its adapter targets
MODELS = {
    "tied": (llama, "q_proj"),
    "untied": (lambda: llama(tie_word_embeddings=False), "q_proj"),
    "bias": (bert, "query"),
    "scaled": (gemma, "q_proj"),
}


def new_rows(model: Any, adapter: str = "default", seed: int = 3) -> Tensor:
    """Give the rows of an adapter random values; returns them."""
    delta = table_of(model).token_adapter.trainable_tokens_delta[adapter]
    with torch.no_grad():
        delta.copy_(torch.randn(delta.shape, generator=torch.Generator().manual_seed(seed)))
    return delta.detach()


def base_weight(module: Any) -> torch.Tensor:
    return module.get_base_weight() if hasattr(module, "get_base_weight") else module.weight


def table_of(model: Any) -> Any:
    return (model.get_base_model() if isinstance(model, PeftModel) else model).get_input_embeddings()


def logits(model: Any, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **kwargs).logits
    return found


def overwritten(model: Any, values: Tensor, tokens: Sequence[int] = T) -> Any:
    """Return the plain model with rows written by hand."""
    with torch.no_grad():
        model.get_input_embeddings().weight[list(tokens)] = values.to(model.get_input_embeddings().weight.dtype)
    return model


@pytest.fixture
def model() -> PeftModel:
    """A tied llama whose rows T have other values than in the base."""
    found = get_peft_model(llama(), rows()).eval()
    new_rows(found)
    return found


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
    base = nn.Module()
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
    model = get_peft_model(llama(tie_word_embeddings=False), rows({"embed_tokens": T, "lm_head": [7]})).eval()
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
        merged = model.merge_and_unload()
        assert torch.equal(merged(**ids).logits, plain(**ids).logits)
    assert merged.lm_head.weight is merged.shared.weight is merged.decoder.embed_tokens.weight


# ---- conflicts ----------------------------------------------------------------------------------------------------------


def test_no_token_trains_in_two_adapters(model: PeftModel) -> None:
    before = support.picture(model)
    with pytest.raises(ConfigError, match=r"the tokens \[2, 5\] of 'model.embed_tokens' train in 'default' already"):
        model.add_adapter("b", rows([2, 7, 5]))
    assert support.picture(model) == before
    model.add_adapter("c", rows([7]))
    model.set_adapter("c")
    model.delete_adapter("default")
    model.add_adapter("b", rows([2, 6, 5]))


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


def test_two_adapters_at_once(two: PeftModel) -> None:
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
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), expected)
    assert {name: type(module) for name, module in merged.named_modules()} == names
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) is (kind != "untied")


def test_unload_leaves_the_base(model: PeftModel) -> None:
    assert torch.equal(logits(model.unload()), logits(llama()))


def test_merging_two_and_taking_them_out(two: PeftModel) -> None:
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
        assert torch.equal(layer.ops.stored(layer.delta_weight("default")).detach(), expected)


# ---- beside an adapter of the whole table ---------------------------------------------------------------------------------

ORDERS = ["same", "rows-first", "rows-last"]


def beside(order: str) -> PeftModel:
    """Return a model with rows (a) and a wrapper of the whole table (in the same adapter, or w)."""
    whole = {"target_modules": ["embed_tokens"], "start": "random", "alpha": 1}
    if order == "same":
        model = get_peft_model(llama(), rows(**whole), "a")
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


def test_names_in_files_and_in_memory(model: PeftModel) -> None:
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
