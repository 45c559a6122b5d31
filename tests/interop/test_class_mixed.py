"""`PeftMixedModel`: files of single adapters are read into a mix, and those of a saved mix by anybody, with equal outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from interop.cases import Case, assert_close, base, difference, ours, outputs, peer, save, shake, using
from interop.class_cases import cell, inputs_of, train
from interop.test_files import comparable, settings

#: task -> base on which two adapters are mixed
PLACES: dict[str | None, str] = {
    None: "bert",
    "SEQ_CLS": "bert-cls",
    "TOKEN_CLS": "llama-token",
    "QUESTION_ANS": "bert-qa",
    "CAUSAL_LM": "llama",
    "SEQ_2_SEQ_LM": "t5",
    "FEATURE_EXTRACTION": "llama-features",
}
HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
PAIRS = [
    ("lora", "loha"),
    ("loha", "lora"),
    ("dora", "loha"),
    ("loha", "dora"),
    ("lora", "lora"),
    ("loha", "loha"),
    ("lora-saved", "loha"),
    ("lora", "loha-saved"),
    ("loha", "lora-tokens"),
]
mixes = pytest.mark.parametrize(("one", "two"), PAIRS, ids=["+".join(pair) for pair in PAIRS])
every_task = pytest.mark.parametrize("task", PLACES)


def cases_of(task: str | None, one: str, two: str) -> dict[str, Case]:
    return {"one": cell(task, PLACES[task], one), "two": cell(task, PLACES[task], two)}


def uses(task: str | None) -> list[str | list[str]]:
    """Which adapters to use together. The peer has one module at a time where two adapters saved it: with heads, one adapter."""
    return ["one", "two"] if task in HEADS else ["one", "two", ["one", "two"], ["two", "one"]]


def seen(library: Any, model: Any, cases: dict[str, Case], names: str | list[str]) -> dict[str, Any]:
    with using(library):
        model.set_adapter(names)
    return outputs(library, model, inputs_of(cases["one"], padded=True))


def read(library: Any, cases: dict[str, Case], folders: dict[str, Path]) -> Any:
    with using(library):
        model = library.PeftMixedModel.from_pretrained(base(cases["one"].base), str(folders["one"]), "one")
        model.load_adapter(str(folders["two"]), "two")
    assert type(model).__name__ == "PeftMixedModel"
    return model


def mixed(library: Any, cases: dict[str, Case]) -> Any:
    model = base(cases["one"].base)
    with using(library):
        torch.manual_seed(3)
        model = library.get_peft_model(model, cases["one"].make_config(library), "one", mixed=True)
        model.add_adapter("two", cases["two"].make_config(library))
    return model


@every_task
@mixes
@pytest.mark.parametrize("writer", [ours, peer], ids=["ours", "peer"])
def test_files_of_single_adapters_are_mixed_alike(task: str | None, one: str, two: str, writer: Any, tmp_path: Path) -> None:
    cases, folders = cases_of(task, one, two), {}
    for seed, (name, case) in enumerate(cases.items()):
        model = case.make(writer, seed=seed)
        train(writer, model, case)
        folders[name] = save(writer, model, tmp_path / name)
    found, expected = read(ours, cases, folders), read(peer, cases, folders)
    plain = outputs(ours, base(cases["one"].base), inputs_of(cases["one"], padded=True))
    effects = []
    for names in uses(task):
        effects.append(seen(peer, expected, cases, names))
        assert_close(seen(ours, found, cases, names), effects[-1], 2e-6)
        assert difference(effects[-1], plain) > 1e-3
    assert all(difference(effect, effects[0]) > 1e-3 for effect in effects[1:])


@every_task
@mixes
def test_a_mix_that_ours_trained_and_saved(task: str | None, one: str, two: str, tmp_path: Path) -> None:
    """Each folder of the stack is a file that the peer reads, alone and into a mix; and ours reads the whole back."""
    cases = cases_of(task, one, two)
    model = mixed(ours, cases)
    for name in ["one", "two"]:
        model.set_adapter(name)
        train(ours, model, cases[name])
    folders = {name: save(ours, model, tmp_path) / name for name in cases}
    other, again = read(peer, cases, folders), ours.PeftMixedModel.from_stack(base(cases["one"].base), tmp_path)
    for names in uses(task):
        expected = seen(ours, model, cases, names)
        assert_close(seen(ours, again, cases, names), expected, 0)
        assert_close(seen(peer, other, cases, names), expected, 2e-6)
    for name, case in cases.items():
        alone = case.load(peer, folders[name])
        assert_close(outputs(peer, alone, inputs_of(case, padded=True)), seen(ours, model, cases, name), 2e-6)
        save(peer, alone, tmp_path / f"{name}-again")
        assert comparable(settings(tmp_path / f"{name}-again")) == comparable(settings(folders[name]))


@pytest.mark.parametrize("task", [task for task in PLACES if task not in HEADS])
@pytest.mark.parametrize(("one", "two"), PAIRS[:3], ids=["+".join(pair) for pair in PAIRS[:3]])
def test_both_train_a_mix_alike(task: str | None, one: str, two: str) -> None:
    cases = cases_of(task, one, two)
    losses = []
    for library in (ours, peer):
        model = mixed(library, cases)
        shake(model)
        with using(library):
            model.set_adapter(["one", "two"])
        losses.append(train(library, model, cases["one"], steps=3))
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-5)
    assert losses[0][0] != losses[0][2]


@every_task
def test_merging_a_mix_gives_the_same_weights(task: str | None, tmp_path: Path) -> None:
    cases, folders = cases_of(task, "lora", "loha"), {}
    for name, case in cases.items():
        model = case.make(peer)
        shake(model)
        folders[name] = save(peer, model, tmp_path / name)
    merged = []
    for library in (ours, peer):
        model = read(library, cases, folders)
        with using(library):
            model.set_adapter("two" if task in HEADS else ["one", "two"])
            merged.append(model.merge_and_unload().state_dict())
    assert merged[0].keys() == merged[1].keys() == base(cases["one"].base).state_dict().keys()
    for key, value in merged[1].items():
        torch.testing.assert_close(merged[0][key], value, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


# ---- what the peer refuses -----------------------------------------------------------------------------------------------
def test_the_peer_does_not_save_or_show_a_mix(tmp_path: Path) -> None:
    cases = cases_of("CAUSAL_LM", "lora", "loha")
    model, other = mixed(ours, cases), mixed(peer, cases)
    for name, error in (("save_pretrained", NotImplementedError), ("create_or_update_model_card", NotImplementedError)):
        with using(peer), pytest.raises(error):
            getattr(other, name)(str(tmp_path / "peer"))
        getattr(model, name)(str(tmp_path / name))
        assert (tmp_path / name / "README.md").exists()
    for name in ("get_layer_status", "get_model_status"):
        with using(peer), pytest.raises(TypeError, match="not supported for PeftMixedModel"):
            getattr(other, name)()
    assert model.get_model_status().available_adapters == ["one", "two"]
    assert {tuple(layer.available_adapters) for layer in model.get_layer_status()} == {("one",), ("two",)}


def test_the_peer_can_not_add_a_file_to_trained_tokens(tmp_path: Path) -> None:
    """It asks every file for the rows of the first adapter, and finds a key missing."""
    cases = cases_of("CAUSAL_LM", "lora-tokens", "loha")
    folders = {name: save(peer, case.make(peer), tmp_path / name) for name, case in cases.items()}
    with pytest.raises(KeyError, match="trainable_tokens_delta"):
        read(peer, cases, folders)
    model = read(ours, cases, folders)
    for name, case in cases.items():
        alone = case.load(peer, folders[name])
        assert_close(seen(ours, model, cases, name), outputs(peer, alone, inputs_of(cases["one"], padded=True)), 1e-6)


@pytest.mark.parametrize("task", HEADS)
def test_the_peer_uses_no_two_heads(task: str, tmp_path: Path) -> None:
    """Where both adapters saved a head, the peer refuses to use both. In ours the layers of both act, and the head of the last."""
    cases, folders = cases_of(task, "lora", "loha"), {}
    for seed, (name, case) in enumerate(cases.items()):
        alone = case.make(peer)
        shake(alone, seed)
        folders[name] = save(peer, alone, tmp_path / name)
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        seen(peer, read(peer, cases, folders), cases, ["one", "two"])
    together = seen(ours, read(ours, cases, folders), cases, ["one", "two"])

    # the same in the peer: the second adapter without a head, and its head in the file of the first
    files = {name: load_file(folder / "adapter_model.safetensors") for name, folder in folders.items()}
    head = {key: value for key, value in files["two"].items() if "hada_" not in key}
    assert head
    save_file({**files["one"], **head}, folders["one"] / "adapter_model.safetensors", metadata={"format": "pt"})
    with using(peer):
        other = peer.PeftMixedModel.from_pretrained(base(cases["one"].base), str(folders["one"]), "one")
        config = cases["two"].make_config(peer)
        config.task_type = None
        other.add_adapter("two", config)
        peer.set_peft_model_state_dict(other, {key: value for key, value in files["two"].items() if key not in head}, adapter_name="two")
    assert_close(together, seen(peer, other, cases, ["one", "two"]), 2e-6)
    assert all(difference(together, seen(ours, read(ours, cases, folders), cases, name)) > 1e-3 for name in cases)


@pytest.mark.parametrize("tuner", ["prompt", "prefix", "prefix-projection", "p-tuning", "multitask", "cpt", "tokens"])
def test_the_peer_mixes_no_tokens(tuner: str, tmp_path: Path) -> None:
    """Ours does; and each file of the mix is one that the peer reads."""
    cases = cases_of("CAUSAL_LM", "lora", tuner)
    with using(peer), pytest.raises(ValueError, match="is not compatible with the `PeftMixedModel`"):
        peer.get_peft_model(base("llama"), cases["two"].make_config(peer), mixed=True)
    model = mixed(ours, cases)
    for name, case in cases.items():
        model.set_adapter(name)
        train(ours, model, case)
    model.set_adapter(["one", "two"])
    inputs = inputs_of(cases["two"])
    together = outputs(ours, model, inputs)
    save(ours, model, tmp_path)
    again = ours.PeftMixedModel.from_stack(base("llama"), tmp_path)
    assert_close(outputs(ours, again, inputs), together, 1e-6)
    for name, case in cases.items():
        model.set_adapter(name)
        alone = outputs(ours, model, inputs_of(case))
        assert difference(alone, together) > 1e-3
        assert_close(outputs(peer, case.load(peer, tmp_path / name), inputs_of(case)), alone, 2e-6)
