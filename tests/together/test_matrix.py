"""Every pair of tuners on one model: forward, rows, training, merging where declared and refusal where not, the stack on disk."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_core import Capability, CapabilityError, PeftModel, get_peft_config, get_peft_model, get_tuner_spec
from peft_core.testing import tiny
from peft_core.testing.helpers import parameters_of, randomise

TUNERS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "LOHA": {"r": 2, "target_modules": ["q_proj", "up_proj"]},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "PREFIX_TUNING": {"num_virtual_tokens": 2},
}
PAIRS = list(itertools.product(TUNERS, repeat=2))


def config(peft_type: str) -> Any:
    return get_peft_config({"peft_type": peft_type, "task_type": "CAUSAL_LM", **TUNERS[peft_type]})


@pytest.fixture(params=PAIRS, ids=["+".join(pair) for pair in PAIRS])
def pair(request: pytest.FixtureRequest) -> tuple[PeftModel, tuple[str, str]]:
    """Two adapters, also of one method, both in use."""
    model = get_peft_model(tiny(), config(request.param[0]), "one")
    model.add_adapter("two", config(request.param[1]))
    randomise(model, "one", 1)
    randomise(model, "two", 2)
    model.set_adapter(["one", "two"])
    return model.eval(), request.param


def output(model: PeftModel, rows: int = 4, **kwargs: Any) -> Tensor:
    ids = torch.randint(1, 64, (rows, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs).logits[:, -5:]


def test_both_act(pair: Any) -> None:
    model, _ = pair
    both = output(model)
    for name in ("one", "two"):
        with model.use_adapters(name):
            assert not torch.allclose(output(model), both, atol=1e-4)


def test_each_row_for_itself(pair: Any) -> None:
    model, _ = pair
    rows: list[Any] = ["one", ["one", "two"], "__base__", "two"]
    together = output(model, adapter_names=rows)
    for number, names in enumerate(rows):
        with model.use_adapters(*([] if names == "__base__" else [names] if isinstance(names, str) else names)):
            torch.testing.assert_close(together[number], output(model)[number], atol=1e-5, rtol=1e-4)


def test_both_train(pair: Any) -> None:
    model, _ = pair
    ids = torch.randint(1, 64, (2, 5))
    model(input_ids=ids, labels=ids).loss.backward()
    for name in ("one", "two"):
        assert all(parameter.grad is not None for parameter in parameters_of(model, name).values())


def test_merging_where_both_declare_it(pair: Any) -> None:
    model, types = pair
    expected = output(model)
    if not all(get_tuner_spec(peft_type).can(Capability.MERGE) for peft_type in types):
        with pytest.raises(CapabilityError, match="can't be merged"):
            model.merge_adapter()
        assert torch.equal(output(model), expected)
        return
    model.merge_adapter()
    torch.testing.assert_close(output(model), expected, atol=1e-4, rtol=1e-3)
    model.unmerge_adapter()
    assert torch.equal(output(model), expected)


def test_the_stack_comes_back(pair: Any, tmp_path: Path) -> None:
    model, _ = pair
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_stack(tiny(), tmp_path)), output(model))


def test_generation_follows_both(pair: Any) -> None:
    model, _ = pair
    ids = torch.randint(1, 64, (2, 5), generator=torch.Generator().manual_seed(1))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    found = model.generate(input_ids=ids, **options)
    assert torch.equal(found, model.generate(input_ids=ids, use_cache=False, **options))
