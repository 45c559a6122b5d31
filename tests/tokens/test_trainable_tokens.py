"""TRAINABLE_TOKENS: rows of an embedding train, and nothing else."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import support
from peft_core import (
    BaseTunerLayer,
    ConfigError,
    MergeError,
    NoMatchingPeftModuleError,
    PeftModel,
    RoutingError,
    UnsupportedModuleError,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft_tokens import TrainableTokensConfig, TrainableTokensLayer, TrainableTokensModel

T = [5, 2, 9]
IDS = torch.tensor([[1, 5, 9, 3], [2, 2, 7, 5]])


def llama(tie: bool = True) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=tie, initializer_range=0.2)).eval()


def config(**fields: Any) -> TrainableTokensConfig:
    return TrainableTokensConfig(**{"token_indices": T, "task_type": "CAUSAL_LM", **fields})


logits = partial(support.logits, input_ids=IDS)


def trained(model: Any, value: float = 0.5) -> Any:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.manual_seed(len(name))
            parameter.data.normal_(value, 0.1)
    return model


def rows_of(model: Any) -> Tensor:
    return model.get_base_model().get_input_embeddings().trainable_tokens_delta["default"].detach()


def by_hand(rows: Tensor, tie: bool = True) -> Any:
    model = llama(tie)
    with torch.no_grad():
        model.get_input_embeddings().weight[T] = rows
    return model


@pytest.mark.parametrize("tie", [True, False])
def test_rows_take_the_place_of_those_of_the_table(tie: bool) -> None:
    model = get_peft_model(llama(tie), config())
    assert torch.equal(logits(model), logits(llama(tie))), "they start as the base's"
    assert model.get_nb_trainable_parameters()[0] == len(T) * 16
    trained(model)
    torch.testing.assert_close(logits(model), logits(by_hand(rows_of(model), tie)))


@pytest.mark.parametrize("tie", [True, False])
def test_gradients_are_those_of_the_rows(tie: bool) -> None:
    model = trained(get_peft_model(llama(tie).double(), config()))
    plain = by_hand(rows_of(model).float(), tie).double()
    with torch.no_grad():
        plain.get_input_embeddings().weight[T] = rows_of(model).double()
    for each in (model, plain):
        each(input_ids=IDS, labels=IDS).loss.backward()
    got = model.get_base_model().get_input_embeddings().trainable_tokens_delta["default"].grad
    torch.testing.assert_close(got, plain.get_input_embeddings().weight.grad[T].to(got.dtype), atol=1e-7, rtol=1e-5)


def test_the_layer_is_one_of_a_tuner_and_the_names_are_those_of_the_format() -> None:
    model = get_peft_model(llama(), config())
    base: Any = model.get_base_model()
    layer = base.get_input_embeddings()
    assert type(layer) is TrainableTokensLayer
    assert isinstance(layer, BaseTunerLayer)
    assert isinstance(base.lm_head, TrainableTokensLayer)
    names = [name for name, _ in model.named_parameters() if "embed_tokens" in name or "lm_head" in name]
    assert names == [f"base_model.model.model.embed_tokens.{end}" for end in ("base_layer.weight", "trainable_tokens_delta.default")]
    assert set(get_peft_model_state_dict(model)) == {
        "base_model.model.lm_head.trainable_tokens_delta",
        "base_model.model.model.embed_tokens.trainable_tokens_delta",
    }
    noted: Any = model.peft_config["default"]
    assert noted.target_modules == "model.embed_tokens", "what the model decided is noted"


@pytest.mark.parametrize("tie", [True, False])
def test_saved_and_loaded(tie: bool, tmp_path: Path) -> None:
    model = trained(get_peft_model(llama(tie), config()))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(tie), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not any(p.requires_grad for p in again.parameters())


def test_a_file_that_names_rows_of_a_tied_pair_once_is_enough(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = trained(get_peft_model(llama(), config()))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "lm_head" not in key}, file)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


@pytest.mark.parametrize("tie", [True, False])
def test_merging_writes_the_rows_and_unmerging_gives_every_bit_back(tie: bool) -> None:
    base = llama(tie)
    before = base.get_input_embeddings().weight.clone()
    model = trained(get_peft_model(base, config()))
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(base.get_input_embeddings().get_base_weight(), before)
    merged = model.merge_and_unload()
    assert merged is base
    torch.testing.assert_close(logits(merged), expected)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["model.embed_tokens"], r".*embed_tokens"])
def test_named_embeddings(targets: Any) -> None:
    model: Any = get_peft_model(llama(), config(target_modules=targets))
    assert isinstance(model.get_base_model().get_input_embeddings(), TrainableTokensLayer)
    assert model.peft_config["default"].target_modules == targets


def test_random_rows() -> None:
    torch.manual_seed(0)
    rows = rows_of(get_peft_model(llama(), config(token_indices=list(range(30)), init_weights=False)))
    assert abs(rows.mean()) < 0.2
    assert 0.8 < rows.std() < 1.2
    assert not torch.equal(rows, llama().get_input_embeddings().weight[:30])


def test_two_adapters_with_rows_of_their_own() -> None:
    model = trained(get_peft_model(llama(), config(), "a"))
    model.add_adapter("b", config(token_indices=[3]))
    model.set_adapter("b")
    trained(model, -0.5)
    model.set_adapter(["a", "b"])
    both = logits(model)
    table = llama()
    layer = model.get_base_model().get_input_embeddings()
    with torch.no_grad():
        table.get_input_embeddings().weight[T] = layer.trainable_tokens_delta["a"]
        table.get_input_embeddings().weight[3] = layer.trainable_tokens_delta["b"][0]
    torch.testing.assert_close(both, logits(table))
    mixed = model(input_ids=IDS, adapter_names=["a", "__base__"]).logits
    assert torch.equal(mixed[1], logits(llama())[1])


def test_two_adapters_of_the_same_rows_are_used_one_at_a_time() -> None:
    model = trained(get_peft_model(llama(), config(), "a"))
    first = logits(model)
    model.add_adapter("b", config(token_indices=[2, 8]))
    model.set_adapter("b")
    trained(model, -0.5)
    second = logits(model)
    model.set_adapter("a")
    assert torch.equal(logits(model), first)
    with pytest.raises(RoutingError, match="have rows of the same tokens"):
        model.set_adapter(["a", "b"])
    with pytest.raises(MergeError, match="have rows of the same tokens"):
        model.merge_adapter(["a", "b"])
    assert torch.equal(logits(model), first)
    mixed = model(input_ids=IDS, adapter_names=["a", "b"]).logits
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]))


def test_generation() -> None:
    model = trained(get_peft_model(llama(), config()))
    plain = by_hand(rows_of(model))
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(input_ids=IDS, **options), plain.generate(input_ids=IDS, **options))


def test_without_a_wrapper() -> None:
    tuner: Any = TrainableTokensModel(llama(), config(), "default")
    assert isinstance(tuner.model.get_input_embeddings(), TrainableTokensLayer)
    assert isinstance(tuner, TrainableTokensModel)
    base: Any = inject_adapter_in_model(config(), llama())
    assert isinstance(base.get_input_embeddings(), TrainableTokensLayer)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"token_indices": []}, ConfigError, "token_indices is empty"),
        ({"token_indices": [99]}, ConfigError, r"\[99\] out of range"),
        ({"token_indices": [1, -31]}, ConfigError, "given more than once"),
        ({"token_indices": "12"}, ConfigError, "no list of integers"),
        ({"token_indices": [1.0]}, ConfigError, "no list of integers"),
        ({"target_modules": 3}, ConfigError, "target_modules=3 is a int"),
        ({"init_weights": "yes"}, ConfigError, "neither True nor False"),
        ({"target_modules": "embed_tokens"}, NoMatchingPeftModuleError, "a list matches names, one string is a regular expression"),
        ({"target_modules": ["nope"]}, NoMatchingPeftModuleError, "not found in the base model"),
        ({"target_modules": ["norm"]}, UnsupportedModuleError, "'model.norm' is a LlamaRMSNorm"),
    ],
)
def test_bad_input(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    base = llama()
    names = [name for name, _ in base.named_parameters()]
    with pytest.raises(error, match=message):
        get_peft_model(base, config(**fields))
    assert [name for name, _ in base.named_parameters()] == names
    assert all(p.requires_grad for p in base.parameters())


def test_a_config_from_a_dictionary() -> None:
    found = get_peft_config({"peft_type": "TRAINABLE_TOKENS", "token_indices": [1]})
    assert type(found) is TrainableTokensConfig
