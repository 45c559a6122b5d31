"""`adapter_names`: another adapter for each row of a batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import support
from peft_core import AdapterNotFoundError, Capability, CapabilityError, PeftModel, RoutingError, get_peft_model, register_tuner
from support import DENSE, CueConfig, DenseConfig

X = support.features()


@pytest.fixture
def model() -> PeftModel:
    model = get_peft_model(support.net(), DenseConfig(target_modules=["up", "last"], start="random"), "a")
    model.add_adapter("b", DenseConfig(target_modules=["last"], start="random"))
    return model.eval()


def row_by_row(model: PeftModel, names: list[Any]) -> torch.Tensor:
    rows = []
    for i, name in enumerate(names):
        used = [] if name == "__base__" else [name] if isinstance(name, str) else name
        with model.use_adapters(*used):
            rows.append(model(X[i : i + 1]))
    return torch.cat(rows)


@pytest.mark.parametrize("names", [["a", "b", "__base__"], ["a", "a", "a"], ["__base__"] * 3, [["a", "b"], "b", []], [["b", "a"], ["a", "b"], "a"]])
def test_each_row_comes_out_as_if_alone(model: PeftModel, names: list[Any]) -> None:
    torch.testing.assert_close(model(X, adapter_names=names), row_by_row(model, names))


def test_rows_with_and_without_virtual_tokens() -> None:
    model = get_peft_model(support.llama(), CueConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "a")
    model.add_adapter("b", DenseConfig(start="random"))
    mixed = model(input_ids=support.IDS, attention_mask=torch.ones_like(support.IDS), adapter_names=["a", "b"]).logits[:, -5:]
    for row, name in enumerate("ab"):
        with model.use_adapters(name):
            torch.testing.assert_close(mixed[row], model(input_ids=support.IDS[row : row + 1]).logits[0, -5:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["a", "b"], RoutingError, "Length of `adapter_names` should be the same as the number of inputs, but got 2 and 3"),
        (["a", "bb", "a"], AdapterNotFoundError, r"non-existing adapter\(s\): bb"),
        ("a", RoutingError, "must be a list, and is the string 'a'"),
        (["a", 3, "b"], RoutingError, r"adapter_names\[1\]=3 is not an adapter name"),
    ],
)
def test_names_that_can_not_be_followed(model: PeftModel, names: Any, error: type[Exception], message: str) -> None:
    with support.Unchanged(model), pytest.raises(error, match=message):
        model(X, adapter_names=names)


def test_merged_adapters_are_in_all_rows(model: PeftModel) -> None:
    model.merge_adapter()
    with pytest.raises(RoutingError, match="'a' are merged, and act on all rows; unmerge_adapter"):
        model(X, adapter_names=["a", "b", "a"])


def test_a_tuner_that_does_not_declare_it_is_refused() -> None:
    register_tuner(dataclasses.replace(DENSE, capabilities=Capability.MERGE), replace=True)
    model = get_peft_model(support.net(), DenseConfig(target_modules=["last"]), "a")
    with pytest.raises(CapabilityError, match=r"'a' .DENSE. can't be used for some rows of a batch only.*PER_SAMPLE"):
        model(X, adapter_names=["a", "__base__", "a"])


def test_a_tuner_that_does_not_declare_merging_is_refused() -> None:
    register_tuner(dataclasses.replace(DENSE, capabilities=Capability.PER_SAMPLE), replace=True)
    model = get_peft_model(support.net(), DenseConfig(target_modules=["last"]), "a")
    with support.Unchanged(model), pytest.raises(CapabilityError, match=r"can't be merged.*MERGE"):
        model.merge_adapter()
