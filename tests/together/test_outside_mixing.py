"""Outside tuners on one model with ours: a multiplicative one, and one whose layers share weights. Nested in any order."""

from __future__ import annotations

import copy
import importlib
import itertools
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_core import MergeError, PeftModel, get_peft_config, get_peft_model, register_tuner, unregister_tuner
from support import IDS, llama, randomise

PLUGINS = Path(__file__).parents[2] / "examples" / "plugins"
MODULES = ["q_proj", "down_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "IA3": {"target_modules": MODULES, "feedforward_modules": ["down_proj"]},
    "VERA": {"target_modules": MODULES, "r": 5},
    "LORA": {"target_modules": MODULES, "r": 2},
    "LOHA": {"target_modules": MODULES, "r": 2},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
}
OUTSIDE = ("IA3", "VERA")
LAYERS = ("IA3", "VERA", "LORA", "LOHA")
PAIRS = [pair for pair in itertools.permutations(OPTIONS, 2) if set(pair) & set(OUTSIDE)]
LAYER_PAIRS = [pair for pair in PAIRS if set(pair) <= set(LAYERS)]


def ids(pair: tuple[str, ...]) -> str:
    return "-".join(pair).lower()


@pytest.fixture(autouse=True, scope="module")
def outside() -> Iterator[None]:
    """The two tuners, registered as in a notebook; `test_outside_plugins.py` has them installed."""
    with pytest.MonkeyPatch.context() as patch:
        specs = []
        for name in OUTSIDE:
            patch.syspath_prepend(PLUGINS / f"peft-{name.lower()}" / "src")
            specs += list(importlib.import_module(f"peft_{name.lower()}.plugin").peft_tuners())
        for spec in specs:
            register_tuner(spec, replace=True)
        yield
        for spec in specs:
            unregister_tuner(spec.peft_type)
        for module in [module for module in sys.modules if module.partition(".")[0] in ("peft_ia3", "peft_vera")]:
            del sys.modules[module]


def config(peft_type: str) -> Any:
    return get_peft_config({"peft_type": peft_type, "task_type": "CAUSAL_LM", **copy.deepcopy(OPTIONS[peft_type])})


def model_of(*types: str) -> PeftModel:
    model = get_peft_model(llama(), config(types[0]), types[0].lower())
    for other in types[1:]:
        model.add_adapter(other.lower(), config(other))
    for seed, name in enumerate(types):
        randomise(model, name.lower(), seed + 1)
    model.set_adapter([name.lower() for name in types])
    return model.eval()


@torch.no_grad()
def logits(model: Any, **kwargs: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS, **kwargs).logits
    return found.clone()


def close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


@pytest.mark.parametrize("pair", PAIRS, ids=ids)
def test_each_alone_together_and_in_rows(pair: tuple[str, str]) -> None:
    model = model_of(*pair)
    first, second = (name.lower() for name in pair)
    text = IDS.shape[1]
    for name, kind in ((first, pair[0]), (second, pair[1])):
        model.set_adapter(name)
        lonely = get_peft_model(llama(), config(kind), name)
        randomise(lonely, name, pair.index(kind) + 1)
        close(logits(model), logits(lonely.eval()))
    rows = logits(model, adapter_names=[[first, second], second])
    for row, names in enumerate(([first, second], [second])):
        with model.use_adapters(*names):
            close(rows[row][-text:], logits(model)[row][-text:])
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize("pair", PAIRS, ids=ids)
def test_training_reaches_both(pair: tuple[str, str]) -> None:
    model = model_of(*pair).train()
    torch.autograd.backward(model(input_ids=IDS).logits.square().mean())
    for name in pair:
        gradients = [p.grad for key, p in model.named_parameters() if name.lower() in key.split(".")]
        assert gradients
        assert all(gradient is not None and bool(gradient.any()) for gradient in gradients), f"{name} does not learn beside the other"


@pytest.mark.parametrize("pair", PAIRS, ids=ids)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies(pair: tuple[str, str], duplicate: Any) -> None:
    model = model_of(*pair)
    assert torch.equal(logits(duplicate(model)), logits(model))


@pytest.mark.parametrize("pair", PAIRS, ids=ids)
def test_files(pair: tuple[str, str], tmp_path: Path) -> None:
    model = model_of(*pair)
    model.save_pretrained(tmp_path)
    first, second = (name.lower() for name in pair)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / first, first)
    loaded.load_adapter(tmp_path / second, second)
    loaded.set_adapter([first, second])
    assert torch.equal(logits(loaded.eval()), logits(model))


@pytest.mark.parametrize("pair", LAYER_PAIRS, ids=ids)
def test_merging_both(pair: tuple[str, str]) -> None:
    """Folded in the order of nesting: what multiplies, multiplies what was added inside it."""
    model = model_of(*pair)
    expected, before = logits(model), weights(model)
    model.merge_adapter()
    close(logits(model), expected)
    model.unmerge_adapter()
    assert_equal(weights(model), before)
    close(logits(model.merge_and_unload()), expected)


@pytest.mark.parametrize("order", ["inner-first", "outer-first"])
def test_unmerging_in_every_order(order: str) -> None:
    """With effects of many sizes: what a merge keeps is a few small integers, or a whole copy, and may change when it is done again."""
    for size in torch.logspace(-2, 0.5, 24).tolist():
        model = model_of("LORA", "IA3")
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.mul_(size if "lora_" in key else 1.0)
        before = weights(model)
        if order == "inner-first":
            model.merge_adapter(["lora"])
            model.merge_adapter(["ia3"])
        else:
            model.set_adapter("ia3")  # alone, it may be merged; then nothing may be folded in under it
            model.merge_adapter(["ia3"])
            with pytest.raises(MergeError, match="would not be multiplied"):
                model.merge_adapter(["lora"])
        model.unmerge_adapter()
        assert_equal(weights(model), before)


def test_a_partial_merge_is_refused_or_right() -> None:
    model = model_of("LORA", "IA3")
    expected = logits(model)
    try:
        model.merge_adapter(["ia3"])
    except MergeError:
        return
    close(logits(model), expected)


def weights(model: PeftModel) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if "base_layer.weight" in key or "base_layer.bias" in key}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
