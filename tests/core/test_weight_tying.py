"""Modules saved whole whose weight another module shares: with `ensure_weight_tying` the copies share theirs, without it a warning says so."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import support
from peft_core import Capability, ConfigError, PeftModel, PeftWarning, SharedOptions, TunerSpec, get_peft_model, get_peft_model_state_dict
from support import IDS, DenseConfig

NAMES = [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]]


@dataclass
class TiedConfig(DenseConfig):
    """DENSE with the choice of keeping tied what is."""

    tie: bool = True
    tokens: Any = None

    default_peft_type: ClassVar[str | None] = "TIED"

    def shared_options(self) -> SharedOptions:
        return SharedOptions(modules_to_save=tuple(self.modules_to_save or ()), token_indices=self.tokens, ensure_weight_tying=self.tie)


TIED = TunerSpec("TIED", TiedConfig, support.DenseTuner, "dense_", capabilities=Capability.MERGE | Capability.PER_SAMPLE | Capability.EMBEDDING)


@pytest.fixture(autouse=True)
def tied_tuner() -> Iterator[None]:
    with support.registered(TIED):
        yield


def config(names: list[str] | None = None, **fields: Any) -> TiedConfig:
    return TiedConfig(**{"target_modules": ["q_proj"], "modules_to_save": names or ["embed_tokens"], **fields})


def llama(**kwargs: Any) -> Any:
    return support.llama(**{"tie_word_embeddings": True, **kwargs})


logits = partial(support.logits, input_ids=IDS)


def ends(model: PeftModel, adapter: str = "default") -> tuple[Any, Any]:
    """The copies of the embedding and of the output layer."""
    base: Any = model.get_base_model()
    return base.model.embed_tokens.modules_to_save[adapter], base.lm_head.modules_to_save[adapter]


def moved(model: PeftModel, adapter: str = "default", seed: int = 3) -> Any:
    """Give the copy other values; returns a plain model with them."""
    weight = ends(model, adapter)[0].weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
        plain = llama()
        plain.model.embed_tokens.weight.copy_(weight)
    return plain


@pytest.mark.parametrize("names", NAMES)
def test_both_ends_train_one_parameter(names: list[str]) -> None:
    model: Any = get_peft_model(llama(), config(names)).eval()
    first, last = ends(model)
    assert first.weight is last.weight
    assert first.weight is not model.get_base_model().model.embed_tokens.original_module.weight
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "dense" not in name}
    assert trainable == {"base_model.model.model.embed_tokens.modules_to_save.default.weight"}
    dense = sum(parameter.numel() for name, parameter in model.named_parameters() if "dense" in name)
    assert model.get_nb_trainable_parameters()[0] == dense + 32 * 16
    assert torch.equal(logits(model), logits(llama()))
    plain = moved(model)
    assert torch.equal(logits(model), logits(plain))


def test_its_gradient_is_that_of_both_uses() -> None:
    model = get_peft_model(llama().double(), config())
    plain = moved(model).double()
    plain.load_state_dict(
        {**llama().double().state_dict(), **{name: ends(model)[0].weight for name in ("model.embed_tokens.weight", "lm_head.weight")}}
    )
    for each in (model, plain):
        each(input_ids=IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(ends(model)[0].weight.grad, plain.model.embed_tokens.weight.grad, atol=1e-14, rtol=1e-12)


def test_both_names_are_in_the_file() -> None:
    model = get_peft_model(llama(), config())
    tensors = get_peft_model_state_dict(model)
    names = [key for key in tensors if "layers" not in key]
    assert names == ["base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"]
    assert torch.equal(*(tensors[name] for name in names))


@pytest.mark.parametrize("low_memory", [False, True])
def test_what_is_loaded_is_tied(low_memory: bool, tmp_path: Path) -> None:
    model = get_peft_model(llama(), config()).eval()
    plain = moved(model)
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_memory, is_trainable=True).eval()
    first, last = ends(other)
    assert first.weight is last.weight
    assert first.weight.requires_grad
    assert torch.equal(logits(other), logits(plain))


def test_merge_unload_and_copies_keep_the_tie() -> None:
    model = get_peft_model(llama(), config()).eval()
    plain = moved(model)
    twin = copy.deepcopy(model)
    assert ends(twin)[0].weight is ends(twin)[1].weight is not ends(model)[0].weight
    merged: Any = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert torch.equal(logits(merged), logits(plain))


def test_two_adapters_and_rows() -> None:
    model = get_peft_model(llama(), config(), "a").eval()
    model.add_adapter("b", config(["lm_head"]))
    plain = {name: moved(model, name, seed) for seed, name in enumerate("ab")}
    mixed = logits(model, adapter_names=["b", "a"])
    for row, name in ((0, "b"), (1, "a")):
        torch.testing.assert_close(mixed[row], logits(plain[name])[row], atol=1e-6, rtol=1e-5)
    model.set_adapter("b")
    model.delete_adapter("a")
    assert torch.equal(logits(model), logits(plain["b"]))


def test_all_modules_with_the_weight_are_tied() -> None:
    from peft_core.testing import tiny

    base: Any = tiny("t5")
    get_peft_model(base, config(["shared"], target_modules=["q"]))
    copies = [module.modules_to_save["default"] for module in (base.shared, base.encoder.embed_tokens, base.decoder.embed_tokens, base.lm_head)]
    assert len({id(module.weight) for module in copies}) == 1


# ---- what is said -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}])
def test_without_it_a_warning_says_that_the_tie_is_lost(fields: dict[str, Any]) -> None:
    with pytest.warns(PeftWarning, match=r"`tie_word_embeddings=True` and a tied layer is part of the adapter, but `ensure_weight_tying` is not set"):
        get_peft_model(llama(), TiedConfig(**{"target_modules": ["q_proj"], "tie": False, **fields}))


@pytest.mark.parametrize(
    ("base", "tie", "tokens"), [({}, False, None), ({"tie_word_embeddings": False}, False, None), ({}, False, [1, 2])], ids=["far", "untied", "rows"]
)
def test_nothing_is_said_where_nothing_is_parted(base: dict[str, Any], tie: bool, tokens: Any) -> None:
    saved = ["lm_head"] if base else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(llama(**base), TiedConfig(target_modules=["q_proj"], modules_to_save=saved, tie=tie, tokens=tokens))


def test_without_anything_to_tie_a_warning_says_so() -> None:
    with pytest.warns(PeftWarning, match="no tied modules were found in the model"):
        get_peft_model(llama(tie_word_embeddings=False), config())
    with pytest.warns(PeftWarning, match="no tied modules are added in either `modules_to_save` or `target_modules`"):
        get_peft_model(llama(), TiedConfig(target_modules=["q_proj"]))


def test_one_weight_is_not_adapted_and_saved() -> None:
    base = llama()
    before = support.picture(base)
    with pytest.raises(ConfigError, match=r"'model.embed_tokens' is adapted, and its weight, which is also that of 'lm_head', is saved whole"):
        get_peft_model(base, config(["lm_head"], target_modules=["embed_tokens"]))
    assert support.picture(base) == before


def test_a_saved_weight_has_no_rows_of_its_own() -> None:
    with pytest.raises(ConfigError, match=r"trainable_token_indices and modules_to_save both have 'model.embed_tokens'"):
        get_peft_model(llama(), config(["lm_head"], tokens=[1]))
