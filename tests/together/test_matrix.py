"""Every ordered pair of tuners on one model, ours and outside ones, and all six at once. Layer methods share their modules, so that they nest."""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_core import (
    AdapterLayer,
    Capability,
    CapabilityError,
    MergeError,
    PeftModel,
    get_model_status,
    get_peft_config,
    get_peft_model,
    get_tuner_spec,
    register_tuner,
    unregister_tuner,
)
from peft_core.testing import tiny
from peft_core.testing.helpers import changed_tensors, parameters_of, randomise, tensors_of
from support import Unchanged

PLUGINS = Path(__file__).parents[2] / "examples" / "plugins"
MODULES = ["q_proj", "down_proj"]
TUNERS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4, "target_modules": MODULES},
    "LOHA": {"r": 2, "target_modules": MODULES},
    "IA3": {"target_modules": MODULES, "feedforward_modules": ["down_proj"]},
    "VERA": {"r": 5, "target_modules": MODULES},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "PREFIX_TUNING": {"num_virtual_tokens": 2},
    "TRAINABLE_TOKENS": {"token_indices": [54, 46, 57, 52, 44, 35, 11]},
}
OUTSIDE = ("IA3", "VERA")
LAYERS = ("LORA", "LOHA", "IA3", "VERA")
#: two adapters that train the same rows of a table can't be used at once: tests/tokens
PAIRS = [pair for pair in itertools.product(TUNERS, repeat=2) if pair != ("TRAINABLE_TOKENS",) * 2]
NESTED = list(itertools.permutations(LAYERS, 2))
#: three adapters on a batch of five: alone, together in both orders of naming, none
ROWS: list[Any] = ["one", ["one", "two"], "__base__", "two", ["two", "one"]]


def label(types: tuple[str, ...]) -> str:
    return "+".join(types)


@pytest.fixture(autouse=True, scope="module")
def outside() -> Iterator[None]:
    """The outside tuners, registered as in a notebook; `test_outside_plugins.py` has them installed."""
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
    return get_peft_config({"peft_type": peft_type, "task_type": "CAUSAL_LM", **copy.deepcopy(TUNERS[peft_type])})


def model_of(**types: str) -> PeftModel:
    """Return a model with adapters, name → type, in this order and all in use; an adapter has the same weights wherever it is."""
    model: PeftModel | None = None
    for name, peft_type in types.items():
        if model is None:
            model = get_peft_model(tiny(), config(peft_type), name)
        else:
            model.add_adapter(name, config(peft_type))
        randomise(model, name, sum(map(ord, name)))
    assert model is not None
    model.set_adapter(list(types))
    return model.eval()


@pytest.fixture(params=PAIRS, ids=label)
def pair(request: pytest.FixtureRequest) -> tuple[PeftModel, tuple[str, str]]:
    """Two adapters, also of one method, both in use."""
    return model_of(one=request.param[0], two=request.param[1]), request.param


def some_ids(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 64, (rows, 5), generator=torch.Generator().manual_seed(seed))


def output(model: Any, rows: int = len(ROWS), **kwargs: Any) -> Tensor:
    """Return the logits of the text, without those of a prompt."""
    ids = some_ids(rows)
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs).logits[:, -5:]
    return found.clone()


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


def differs(found: Tensor, other: Tensor) -> bool:
    return float((found - other).abs().max()) > 1e-3 * float(other.abs().max())


# ---- forward, rows, training, generation --------------------------------------------------------------------------------


def test_both_act_and_each_alone_is_as_if_alone(pair: Any) -> None:
    model, types = pair
    both = output(model)
    for name, peft_type in zip(("one", "two"), types, strict=True):
        with model.use_adapters(name):
            alone = output(model)
        close(alone, output(model_of(**{name: peft_type})))
        assert differs(alone, both), f"beside {name} the other does nothing"


def test_each_row_for_itself(pair: Any) -> None:
    model, _ = pair
    together = output(model, adapter_names=ROWS)
    for number, names in enumerate(ROWS):
        with model.use_adapters(*([] if names == "__base__" else [names] if isinstance(names, str) else names)):
            close(together[number], output(model)[number])
    close(together[2], output(tiny())[2])


def test_training_reaches_both_and_nothing_else(pair: Any) -> None:
    model, _ = pair
    ids = some_ids(2)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    mine = {id(parameter) for name in ("one", "two") for parameter in parameters_of(model, name).values()}
    for name in ("one", "two"):
        gradients = [parameter.grad for parameter in parameters_of(model, name).values()]
        assert all(gradient is not None and bool(gradient.any()) for gradient in gradients), f"{name} does not learn beside the other"
    assert [key for key, parameter in model.named_parameters() if parameter.grad is not None and id(parameter) not in mine] == []


def test_generation_follows_both(pair: Any) -> None:
    """With a cache, without, and for rows of different adapters: what a loop over forward chooses, token by token."""
    model, _ = pair
    names: list[Any] = [["one", "two"], "one", "__base__"]
    ids = some_ids(len(names), 1)
    options = {"max_new_tokens": 3, "do_sample": False}

    def by_hand(ids: Tensor, **kwargs: Any) -> Tensor:
        for _ in range(3):
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        return ids

    expected = by_hand(ids)
    for cached in (True, False):
        assert torch.equal(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=cached, **options), expected)
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **options)
    assert torch.equal(found, by_hand(ids, adapter_names=names))


# ---- merging ------------------------------------------------------------------------------------------------------------


def merges(peft_type: str) -> bool:
    return get_tuner_spec(peft_type).can(Capability.MERGE)


def test_merging_both_where_both_declare_it(pair: Any) -> None:
    """Folded in the order of nesting: what multiplies, multiplies what was added inside it. Otherwise nothing changes."""
    model, types = pair
    expected = output(model)
    if not all(map(merges, types)):
        for refused in (model.merge_adapter, model.merge_and_unload):
            with Unchanged(model), pytest.raises(CapabilityError, match="can't be merged"):
                refused()
        assert torch.equal(output(model), expected)
        return
    before = tensors_of(model)
    model.merge_adapter()
    assert changed_tensors(before), "nothing was merged"
    close(output(model), expected)
    with pytest.raises(MergeError, match="while it is merged"):
        model.delete_adapter("one")
    model.unmerge_adapter()
    assert changed_tensors(before) == []
    assert torch.equal(output(model), expected)
    close(output(model.merge_and_unload()), expected)


@pytest.mark.parametrize("which", ["one", "two"])
def test_merging_one_of_them(pair: Any, which: str) -> None:
    """Right, or refused before anything changes: never a weight that is something else than the two adapters make of it."""
    model, types = pair
    other = "two" if which == "one" else "one"
    kind = dict(zip(("one", "two"), types, strict=True))
    expected, before = output(model), tensors_of(model)
    if not merges(kind[which]):
        reason: tuple[Any, str] | None = (CapabilityError, "can't be merged")
    elif which == "two" and kind["two"] == "IA3" and kind["one"] in LAYERS:
        reason = (MergeError, "would stay unmerged")  # it would multiply a weight in which what it multiplies is not yet
    elif which == "two" and kind["one"] == "IA3" and kind["two"] in LAYERS:
        reason = (MergeError, "would be multiplied")  # what is added outside a factor would come inside it
    else:
        reason = None
    if reason is not None:
        with Unchanged(model), pytest.raises(reason[0], match=reason[1]):
            model.merge_adapter([which])
        assert torch.equal(output(model), expected)
        return
    if kind[which] == kind[other]:
        # one layer holds both, and a layer with something merged is its weight: the other has a rest until it is merged, too
        with model.use_adapters(which):
            expected = output(model)
    model.merge_adapter([which])
    assert get_model_status(model).merged_adapters == [which]
    close(output(model), expected)
    model.unmerge_adapter()
    assert changed_tensors(before) == []


# ---- files and copies ---------------------------------------------------------------------------------------------------


def test_the_stack_is_one_manifest_and_comes_back(pair: Any, tmp_path: Path) -> None:
    model, types = pair
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["one", "two"]
    (manifest,) = [path for path in tmp_path.glob("*.json") if "adapters" in json.loads(path.read_text())]
    members = json.loads(manifest.read_text())["adapters"]
    assert [(member["name"], member["peft_type"]) for member in members] == list(zip(("one", "two"), types, strict=True))
    again = PeftModel.from_stack(tiny(), tmp_path)
    assert list(again.active_adapters) == ["one", "two"]
    assert torch.equal(output(again), output(model))
    # and each by itself, in the same order
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "one", "one")
    loaded.load_adapter(tmp_path / "two", "two")
    loaded.set_adapter(["one", "two"])
    assert torch.equal(output(loaded), output(model))


def test_copies(pair: Any) -> None:
    model, _ = pair
    expected = output(model)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for name in ("one", "two"):
        for parameter in parameters_of(model, name).values():
            parameter.data.zero_()
    for twin in twins:
        assert torch.equal(output(twin), expected)


# ---- taking out ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["one", "two"])
def test_deleting_either_leaves_the_other(pair: Any, which: str) -> None:
    model, _ = pair
    other = "two" if which == "one" else "one"
    with model.use_adapters(other):
        expected = output(model)
    model.delete_adapter(which)
    assert list(model.peft_config) == list(model.active_adapters) == [other]
    close(output(model), expected)
    assert not [key for key in model.state_dict() if which in key.split(".")]
    model.delete_adapter(other)
    assert torch.equal(output(model), output(tiny()))


def test_disabled_it_is_the_base_and_unloaded_it_is_again(pair: Any) -> None:
    model, _ = pair
    both, bare = output(model), output(tiny())
    with model.disable_adapter():
        assert torch.equal(output(model), bare)
        assert torch.equal(output(model, adapter_names=ROWS), bare)
    assert torch.equal(output(model), both)
    base = model.unload(restore_base=True)
    assert torch.equal(output(base), bare)
    assert not [module for module in base.modules() if isinstance(module, AdapterLayer)]


# ---- two types on one and the same module ---------------------------------------------------------------------------------


@pytest.mark.parametrize("types", NESTED, ids=label)
@pytest.mark.parametrize("module", MODULES)
def test_nested_in_load_order_as_the_formulas_say(types: tuple[str, str], module: str) -> None:
    """The later adapter's layer is outside. Effects in float64: W + ΔW for sums, rows or (feed-forward) columns times l for IA3."""
    model = model_of(one=types[0], two=types[1]).double()
    outer: Any = next(layer for key, layer in model.named_modules() if isinstance(layer, AdapterLayer) and key.endswith(f".{module}"))
    inner: Any = outer.base_layer
    assert [layer.adapters() for layer in (outer, inner)] == [("two",), ("one",)]
    base: Any = inner.base_layer
    assert type(base) is nn.Linear
    expected = base.weight.clone()
    for layer, name, peft_type in ((inner, "one", types[0]), (outer, "two", types[1])):
        if peft_type == "IA3":
            factor = layer.ia3_l[name]
            assert factor.shape == ((1, base.in_features) if module == "down_proj" else (base.out_features, 1))
            expected = expected * factor
        else:
            expected = expected + layer.delta_weight(name)
    x = torch.randn(3, base.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(outer(x), x @ expected.T, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("order", ["inner-first", "outer-first"])
def test_unmerging_in_every_order(order: str) -> None:
    """With effects of many sizes: what a merge keeps is a few small integers, or a whole copy, and may change when it is done again."""
    for size in torch.logspace(-2, 0.5, 24).tolist():
        model = model_of(lora="LORA", ia3="IA3")
        with torch.no_grad():
            for parameter in parameters_of(model, "lora").values():
                parameter.mul_(size)
        before = tensors_of(model)
        if order == "inner-first":
            model.merge_adapter(["lora"])
            model.merge_adapter(["ia3"])
        else:
            model.set_adapter("ia3")  # alone, it may be merged; then nothing may be folded in under it
            model.merge_adapter(["ia3"])
            with pytest.raises(MergeError, match="would not be multiplied"):
                model.merge_adapter(["lora"])
        model.unmerge_adapter()
        assert changed_tensors(before) == []


# ---- all at once ----------------------------------------------------------------------------------------------------------

#: load orders in which each tuner is first, last and in the middle, and each of a triple is outside each other
TRIPLES = [*itertools.combinations(TUNERS, 3), *(tuple(reversed(three)) for three in itertools.combinations(TUNERS, 3))]
ALL_SIX = [tuple(list(TUNERS)[turn:] + list(TUNERS)[:turn]) for turn in range(6)]


@pytest.mark.parametrize("types", [*TRIPLES, *ALL_SIX], ids=label)
def test_three_and_six(types: tuple[str, ...], tmp_path: Path) -> None:
    """Each one counts, rows take any of them, and the stack comes back as it was."""
    names = [name.lower() for name in types]
    model = model_of(**dict(zip(names, types, strict=True)))
    everything = output(model)
    for left_out in names:
        with model.use_adapters(*(name for name in names if name != left_out)):
            assert differs(output(model), everything), f"{left_out} does nothing among the others"
    rows: list[Any] = [names, names[:1], "__base__", names[1:], names[-1]]
    together = output(model, adapter_names=rows)
    for number, chosen in enumerate(rows):
        with model.use_adapters(*([] if chosen == "__base__" else [chosen] if isinstance(chosen, str) else chosen)):
            close(together[number], output(model)[number])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_stack(tiny(), tmp_path)
    assert list(again.peft_config) == names
    assert torch.equal(output(again), everything)
    for name in names[:-1]:
        again.delete_adapter(name)
    with model.use_adapters(names[-1]):
        close(output(again), output(model))
