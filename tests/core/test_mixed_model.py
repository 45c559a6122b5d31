"""`PeftMixedModel`: any methods on one base, in load order; it saves, loads, trains and has a status."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import support
from peft_core import AdapterNotFoundError, PeftMixedModel, PeftModel, get_peft_model
from peft_core.testing import tiny
from peft_core.testing.helpers import randomise
from peft_core.testing.models import inputs_of
from support import CueConfig, DenseConfig

INPUTS = inputs_of("llama", 2)


logits = partial(support.logits, **INPUTS)


@pytest.fixture
def mixed() -> PeftMixedModel:
    model: Any = get_peft_model(tiny(), DenseConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), "one", mixed=True)
    model.add_adapter("two", DenseConfig(target_modules=["q_proj", "up_proj"], alpha=2, task_type="CAUSAL_LM"))
    model.add_adapter("words", CueConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    for number, name in enumerate(("one", "two", "words")):
        randomise(model, name, number)
    return model.eval()


def test_it_is_no_peft_model(mixed: PeftMixedModel) -> None:
    assert type(mixed) is PeftMixedModel
    assert not isinstance(mixed, PeftModel)
    assert mixed.active_adapter == "one"


def test_several_methods_act_in_load_order_and_are_shown_in_the_order_given(mixed: PeftMixedModel) -> None:
    mixed.set_adapter(["two", "one", "words"])
    assert mixed.active_adapters == ["two", "one", "words"]
    together = logits(mixed)
    assert together.shape[1] == 3 + INPUTS["input_ids"].shape[1]
    mixed.set_adapter(["words", "one", "two"])
    torch.testing.assert_close(logits(mixed), together)
    with mixed.disable_adapter():
        assert torch.equal(logits(mixed), logits(tiny()))


def test_save_and_load_keep_order_and_use(mixed: PeftMixedModel, tmp_path: Path) -> None:
    mixed.set_adapter(["words", "one"])
    expected = logits(mixed)
    mixed.save_pretrained(tmp_path)
    again = PeftMixedModel.from_stack(tiny(), tmp_path)
    assert type(again) is PeftMixedModel
    assert list(again.peft_config) == ["one", "two", "words"]
    assert again.active_adapters == ["words", "one"]
    assert torch.equal(logits(again), expected)
    alone = PeftMixedModel.from_pretrained(tiny(), tmp_path / "two", "two")
    assert type(alone) is PeftMixedModel
    assert not any(parameter.requires_grad for parameter in alone.parameters())
    alone.set_adapter(["two"], inference_mode=True)
    assert not any(parameter.requires_grad for parameter in alone.parameters())


def test_it_trains(mixed: PeftMixedModel) -> None:
    mixed.set_adapter(["one", "two"])
    mixed.train()
    mixed(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    trained = {name.split(".")[-1] for name, parameter in mixed.named_parameters() if parameter.grad is not None}
    assert trained == {"one", "two"}


def test_status_and_parameters(mixed: PeftMixedModel) -> None:
    mixed.set_adapter(["one", "two"])
    status = mixed.get_model_status()
    assert status.active_adapters == ["one", "two"]
    assert status.peft_types == {"one": "DENSE", "two": "DENSE", "words": "CUE"}
    assert mixed.get_layer_status()
    trained, everything = mixed.get_nb_trainable_parameters()
    assert 0 < trained < everything


def test_deleting_several_is_all_or_nothing(mixed: PeftMixedModel) -> None:
    with pytest.raises(AdapterNotFoundError, match="tow"):
        mixed.delete_adapter(["one", "tow"])
    assert list(mixed.peft_config) == ["one", "two", "words"]
    mixed.delete_adapter(["words", "two"])
    assert list(mixed.peft_config) == ["one"]


def test_merging_and_unloading(mixed: PeftMixedModel) -> None:
    mixed.set_adapter(["one", "two"])
    expected = logits(mixed)
    base = mixed.merge_and_unload(adapter_names=["one", "two"])
    torch.testing.assert_close(logits(base), expected, atol=1e-5, rtol=1e-4)


def test_an_unknown_name_names_the_nearest(mixed: PeftMixedModel) -> None:
    with pytest.raises(AdapterNotFoundError, match="one"):
        mixed.set_adapter(["oen"])
    assert mixed.active_adapters == ["one"]
