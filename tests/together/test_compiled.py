"""Compiled models: one graph, no breaks, and no further graph when adapters are switched, routed by row or disabled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.utils import counters

from peft_core import PeftModel, get_peft_config, get_peft_model
from peft_core.testing import tiny
from peft_core.testing.helpers import randomise

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "down_proj"]},
    "dora": {"peft_type": "LORA", "r": 3, "use_dora": True, "target_modules": ["q_proj", "v_proj"]},
    "loha": {"peft_type": "LOHA", "r": 2, "target_modules": ["down_proj", "up_proj"]},
}
ROWS: list[list[Any]] = [["lora", "dora", "loha", "__base__"], ["dora", "dora", "lora", "__base__"], ["loha", ["lora", "dora"], "__base__", "lora"]]


@pytest.fixture
def model() -> Iterator[PeftModel]:
    """Three adapters of three kinds, all frozen."""
    names = iter(ADAPTERS.items())
    name, fields = next(names)
    adapted = get_peft_model(tiny(), get_peft_config({"task_type": "CAUSAL_LM", **fields}), name)
    for other, fields in names:
        adapted.add_adapter(other, get_peft_config({"task_type": "CAUSAL_LM", **fields}))
    for seed, name in enumerate(ADAPTERS):
        randomise(adapted, name, seed)
    adapted.set_adapter("lora", inference_mode=True)
    torch._dynamo.reset()
    yield adapted.eval()
    torch._dynamo.reset()


def output(model: Any, **kwargs: Any) -> Tensor:
    ids = torch.randint(1, 60, (4, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits.clone()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def expected(model: PeftModel) -> dict[str, Tensor]:
    """What the model computes without being compiled, in each state that the tests visit."""
    found = {}
    for name in ADAPTERS:
        model.set_adapter(name, inference_mode=True)
        found[name] = output(model)
    model.set_adapter(["lora", "loha"], inference_mode=True)
    found["both"] = output(model)
    with model.disable_adapter():
        found["off"] = output(model)
    for number, rows in enumerate(ROWS):
        found[f"rows{number}"] = output(model, adapter_names=rows)
    model.set_adapter("lora", inference_mode=True)
    return found


@pytest.mark.parametrize("whole", [False, True], ids=["model.compile", "torch.compile"])
def test_switching_and_disabling_compile_nothing_again(model: PeftModel, whole: bool) -> None:
    wanted = expected(model)
    compiled: Any = model
    if whole:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:
        model.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(output(compiled), wanted["lora"], atol=1e-5, rtol=1e-4)
    before = graphs()
    for name in ("dora", "loha", "lora"):
        model.set_adapter(name, inference_mode=True)
        torch.testing.assert_close(output(compiled), wanted[name], atol=1e-5, rtol=1e-4)
    model.set_adapter(["lora", "loha"], inference_mode=True)
    torch.testing.assert_close(output(compiled), wanted["both"], atol=1e-5, rtol=1e-4)
    with model.disable_adapter():
        assert torch.equal(output(compiled), wanted["off"])
    model.disable_adapter_layers()
    assert torch.equal(output(compiled), wanted["off"])
    model.enable_adapter_layers()
    torch.testing.assert_close(output(compiled), wanted["both"], atol=1e-5, rtol=1e-4)
    assert graphs() == before
    assert not counters["graph_break"]


def test_other_rows_compile_nothing_again(model: PeftModel) -> None:
    wanted = expected(model)
    model.compile(fullgraph=True, backend="aot_eager")
    output(model)
    output(model, adapter_names=ROWS[0])  # the graph for batches whose rows differ
    before = graphs()
    for number, rows in enumerate(ROWS):
        torch.testing.assert_close(output(model, adapter_names=rows), wanted[f"rows{number}"], atol=1e-5, rtol=1e-4)
    assert graphs() == before
    assert not counters["graph_break"]


def test_a_choice_for_this_thread_compiles_nothing_again(model: PeftModel) -> None:
    wanted = expected(model)
    model.compile(fullgraph=True, backend="aot_eager")
    output(model)
    with model.use_adapters("dora"):
        output(model)  # the graph for threads that choose for themselves
    before = graphs()
    for name in ADAPTERS:
        with model.use_adapters(name):
            torch.testing.assert_close(output(model), wanted[name], atol=1e-5, rtol=1e-4)
    with model.use_adapters():
        assert torch.equal(output(model), wanted["off"])
    assert graphs() == before


def test_a_compiled_training_step_has_the_same_gradients(model: PeftModel) -> None:
    model.set_adapter("dora")
    ids = torch.randint(1, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=ids, labels=ids).loss.backward()
    assert wanted
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-5, rtol=1e-4)
