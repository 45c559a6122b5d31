"""Files: what one library writes, the other reads, with equal outputs; and both write the same."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from huggingface_hub import ModelCard

from interop.cases import (
    BY_ID,
    CASES,
    PREFIX,
    PROMPT,
    Case,
    assert_close,
    base,
    batch,
    difference,
    ours,
    outputs,
    peer,
    saved,
    saving,
    shake,
    tolerance,
    using,
)

PAIRS = {"ours-to-peer": (ours, peer), "peer-to-ours": (peer, ours)}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
both_ways = pytest.mark.parametrize(("writer", "reader"), PAIRS.values(), ids=PAIRS.keys())


def tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    with safetensors.safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {key: (tuple(file.get_tensor(key).shape), file.get_tensor(key).dtype) for key in file.keys()}  # noqa: SIM118


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text("utf-8"))


@every_case
@both_ways
def test_outputs_survive_the_way(case: Case, writer: Any, reader: Any, tmp_path: Path) -> None:
    model = saved(case, writer, tmp_path)
    expected = outputs(writer, model, batch(case.base))
    loaded = case.load(reader, tmp_path)
    assert type(loaded).__name__ == type(model).__name__
    assert_close(outputs(reader, loaded, batch(case.base)), expected, tolerance(case))
    plain = outputs(reader, base(case.base), batch(case.base))
    assert difference(expected, plain) > 1e-2, "the adapter has no effect: the comparison says nothing"


@every_case
@both_ways
def test_loaded_for_training(case: Case, writer: Any, reader: Any, tmp_path: Path) -> None:
    model = saved(case, writer, tmp_path)
    if reader is peer and case in (*PROMPT, *PREFIX):
        with pytest.raises(ValueError, match="prompt learning"):
            case.load(reader, tmp_path, is_trainable=True)
        return  # ours can (formats.md §8)
    loaded = case.load(reader, tmp_path, is_trainable=True)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad and ".transform." not in name}
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == names
    assert_close(outputs(reader, loaded, batch(case.base)), outputs(writer, model, batch(case.base)), tolerance(case))


#: bias="all" and a head saved whole: the peer writes the head's bias three times. formats.md §4.1 has `head.bias` only; the others are
#: ignored when read, which `test_outputs_survive_the_way` shows.
PEERS_SURPLUS = re.compile(r".*\.(original_module|modules_to_save)\.bias")


def wanted(keys: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if not PEERS_SURPLUS.fullmatch(key)}


def public(keys: dict[str, Any]) -> dict[str, Any]:
    """Take out what only ours reads: the network behind a projected prefix, from which training goes on."""
    return {key: value for key, value in keys.items() if not key.startswith("prompt_encoder.")}


@every_case
def test_same_tensors_in_the_file(case: Case, tmp_path: Path) -> None:
    for library, name in ((ours, "ours"), (peer, "peer")):
        saved(case, library, tmp_path / name)
    assert public(tensors(tmp_path / "ours")) == wanted(tensors(tmp_path / "peer"))
    for name in ("ours", "peer"):
        with safetensors.safe_open(tmp_path / name / "adapter_model.safetensors", "pt") as file:
            metadata = file.metadata()
        assert metadata.get("format") == "pt"


#: formats.md §2 "set: list (upstream: arbitrary order; ours: sorted)"
UNORDERED = ("target_modules", "exclude_modules")


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """Take out the differences that the spec wants, and no other."""
    config = dict(config)
    for name in UNORDERED:
        if isinstance(config.get(name), list):
            config[name] = Counter(config[name])
    # api.md §12.14: head names are neither written twice nor added to the user's list
    if config.get("modules_to_save"):
        config["modules_to_save"] = list(dict.fromkeys(config["modules_to_save"]))
    config["base_model_name_or_path"] = config["base_model_name_or_path"] or None  # has a test of its own
    return config


@every_case
def test_same_config_in_the_file(case: Case, tmp_path: Path) -> None:
    for library, name in ((ours, "ours"), (peer, "peer")):
        saved(case, library, tmp_path / name)
    assert comparable(settings(tmp_path / "ours")) == comparable(settings(tmp_path / "peer"))
    text = (tmp_path / "ours" / "adapter_config.json").read_text("utf-8")
    assert list(settings(tmp_path / "ours")) == sorted(settings(tmp_path / "ours"))
    assert text.startswith('{\n  "')
    for name in UNORDERED:
        value = settings(tmp_path / "ours").get(name)
        assert not isinstance(value, list) or value == sorted(value)


@pytest.mark.parametrize("name", ["lora-linear", "prompt-random"])
def test_base_without_a_name(name: str, tmp_path: Path) -> None:
    for library, folder in ((ours, "ours"), (peer, "peer")):
        saved(BY_ID[name], library, tmp_path / folder)
        assert settings(tmp_path / folder)["base_model_name_or_path"] is None


@every_case
def test_same_config_by_itself(case: Case, tmp_path: Path) -> None:
    for library, name in ((ours, "ours"), (peer, "peer")):
        with using(library):
            case.make_config(library).save_pretrained(tmp_path / name)
    assert comparable(settings(tmp_path / "ours")) == comparable(settings(tmp_path / "peer"))


@every_case
@both_ways
def test_configs_are_read_alike(case: Case, writer: Any, reader: Any, tmp_path: Path) -> None:
    with using(writer):
        written = case.make_config(writer)
        written.save_pretrained(tmp_path)
    with using(reader):
        read = reader.PeftConfig.from_pretrained(tmp_path)
    assert type(read).__name__ == case.config
    assert read.to_dict() == written.to_dict()


@every_case
def test_same_names_in_memory(case: Case) -> None:
    """formats.md §5: optimisers, trainers and state dicts go by these names."""
    found = {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in case.make(ours).named_parameters()}
    expected = {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in case.make(peer).named_parameters()}
    assert found == expected


@every_case
def test_same_state_dict_function(case: Case) -> None:
    model, other = case.make(ours), case.make(peer)
    with using(peer):
        expected = peer.get_peft_model_state_dict(other)
    with saving(ours, case):
        found = ours.get_peft_model_state_dict(model)
    assert {k: (v.shape, v.dtype) for k, v in public(found).items()} == {k: (v.shape, v.dtype) for k, v in wanted(expected).items()}


@both_ways
@pytest.mark.parametrize("name", ["lora-linear", "loha-linear", "prompt-random", "prefix-gqa-projection", "lora-bert-bias-all"])
def test_pickled_weights(name: str, writer: Any, reader: Any, tmp_path: Path) -> None:
    case = BY_ID[name]
    model = saved(case, writer, tmp_path, safe_serialization=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.bin"]
    assert_close(outputs(reader, case.load(reader, tmp_path), batch(case.base)), outputs(writer, model, batch(case.base)))


@both_ways
@pytest.mark.parametrize("name", ["lora-linear", "lora-embedding", "lora-saved", "loha-linear", "prompt-random", "prefix-gqa"])
def test_low_cpu_mem_usage(name: str, writer: Any, reader: Any, tmp_path: Path) -> None:
    case = BY_ID[name]
    model = saved(case, writer, tmp_path)
    loaded = case.load(reader, tmp_path, low_cpu_mem_usage=True)
    assert_close(outputs(reader, loaded, batch(case.base)), outputs(writer, model, batch(case.base)))


# ---- several adapters ------------------------------------------------------------------------------------------------
OTHERS = {
    "lora-linear": {"r": 2, "lora_alpha": 10, "target_modules": ["k_proj", "v_proj"]},
    "lora-embedding": {"r": 2, "target_modules": ["embed_tokens"]},
    "lora-saved": {"target_modules": ["o_proj"]},
    "lora-gpt2": {"r": 2, "target_modules": ["c_fc"]},
    "lora-bert-cls": {"r": 2, "target_modules": ["key"]},
    "loha-linear": {"r": 2, "target_modules": ["k_proj", "v_proj"]},
    "prompt-random": {"num_virtual_tokens": 3},
    "prefix-gqa": {"num_virtual_tokens": 3},
}


def two_adapters(library: Any, case: Case, first: str = "default") -> Any:
    """Return a model with two moved adapters, `first` and "other"."""
    model = case.make(library, adapter=first)
    shake(model)
    with using(library):
        second = getattr(library, case.config)(**{**case.options, **OTHERS[case.id]})
        model.add_adapter("other", second)
        model.set_adapter("other")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("other" in name.split("."))
    shake(model, seed=8)
    return model


def by_adapter(library: Any, model: Any, case: Case, *names: str) -> dict[str, Any]:
    found = {}
    for name in names:
        with using(library):
            model.set_adapter(name)
        found[name] = outputs(library, model, batch(case.base))
    return found


def tree(folder: Path) -> list[str]:
    """The files of a folder, without the manifest of several adapters, which is ours alone and which the peer does not read."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != "peft_stack.json")


@both_ways
@pytest.mark.parametrize("name", OTHERS)
def test_two_adapters_in_one_folder(name: str, writer: Any, reader: Any, tmp_path: Path) -> None:
    case = BY_ID[name]
    model = two_adapters(writer, case)
    with saving(writer, case):
        model.save_pretrained(tmp_path)
    assert tree(tmp_path) == [
        "README.md",
        *("adapter_config.json", "adapter_model.safetensors"),
        *("other/adapter_config.json", "other/adapter_model.safetensors"),
    ]
    expected = by_adapter(writer, model, case, "default", "other")
    assert difference(expected["default"], expected["other"]) > 1e-3
    loaded = case.load(reader, tmp_path)
    with using(reader):
        loaded.load_adapter(tmp_path / "other", "other")
    found = by_adapter(reader, loaded, case, "default", "other")
    for adapter in expected:
        assert_close(found[adapter], expected[adapter])


@both_ways
@pytest.mark.parametrize("name", OTHERS)
def test_subfolder(name: str, writer: Any, reader: Any, tmp_path: Path) -> None:
    """The adapter's name is not in its files: any will do on the other side."""
    case = BY_ID[name]
    model = two_adapters(writer, case)
    with saving(writer, case):
        model.save_pretrained(tmp_path)
    expected = by_adapter(writer, model, case, "other")["other"]
    loaded = case.load(reader, tmp_path, subfolder="other", adapter_name="renamed")
    assert list(loaded.peft_config) == ["renamed"]
    assert_close(outputs(reader, loaded, batch(case.base)), expected)
    again = case.load(reader, tmp_path)
    with using(reader):
        again.load_adapter(tmp_path, "third", subfolder="other")
    assert_close(by_adapter(reader, again, case, "third")["third"], expected)


@both_ways
@pytest.mark.parametrize("name", ["lora-linear", "loha-linear", "prompt-random"])
def test_no_default_adapter(name: str, writer: Any, reader: Any, tmp_path: Path) -> None:
    case = BY_ID[name]
    model = two_adapters(writer, case, first="one")
    with using(writer):
        model.save_pretrained(tmp_path / "all")
        model.save_pretrained(tmp_path / "some", selected_adapters=["one"])
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert tree(tmp_path / "all") == ["README.md", *(f"one/{file}" for file in files), *(f"other/{file}" for file in files)]
    assert tree(tmp_path / "some") == ["README.md", *(f"one/{file}" for file in files)]
    expected = by_adapter(writer, model, case, "one")["one"]
    assert_close(outputs(reader, case.load(reader, tmp_path / "all" / "one"), batch(case.base)), expected)


@pytest.mark.parametrize("name", ["lora-linear", "lora-bert-cls", "lora-bert-features", "loha-linear", "prompt-random", "prefix-bert-cls"])
def test_same_model_card(name: str, tmp_path: Path) -> None:
    case = BY_ID[name]
    for library, folder in ((ours, "ours"), (peer, "peer")):
        model = base(case.base)
        model.name_or_path = model.config._name_or_path = "some/base"
        with using(library):
            model = library.get_peft_model(model, case.make_config(library))
            model.save_pretrained(tmp_path / folder)
        assert settings(tmp_path / folder)["base_model_name_or_path"] == "some/base"
    found, expected = (ModelCard.load(tmp_path / folder / "README.md") for folder in ("ours", "peer"))
    data, wanted_data = found.data.to_dict(), expected.data.to_dict()
    if name == "prefix-bert-cls":  # formats.md §6 has this tag for every base from transformers; the peer forgets it here
        wanted_data["tags"] = sorted({*wanted_data["tags"], "transformers"})
    assert data == wanted_data
    assert found.text.strip() == expected.text.strip()


@pytest.mark.parametrize("name", ["lora-linear", "lora-embedding", "lora-gpt2", "lora-patterns", "loha-linear", "lora-bert-cls", "lora-saved"])
def test_merged_weights_are_the_same(name: str, tmp_path: Path) -> None:
    case = BY_ID[name]
    model = saved(case, ours, tmp_path)
    other = case.load(peer, tmp_path)
    with using(peer):
        merged_there = other.merge_and_unload().state_dict()
    merged_here = model.merge_and_unload().state_dict()
    assert merged_here.keys() == merged_there.keys() == base(case.base).state_dict().keys()
    for key, value in merged_there.items():
        torch.testing.assert_close(merged_here[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["lora-linear", "lora-gpt2", "lora-embedding", "loha-linear"])
def test_injected_models_have_the_same_keys(name: str) -> None:
    case = BY_ID[name]
    model = ours.inject_adapter_in_model(case.make_config(ours), base(case.base))
    with using(peer):
        other = peer.inject_adapter_in_model(case.make_config(peer), base(case.base))
        shake(other)
        expected = peer.get_peft_model_state_dict(other)
    with saving(ours, case):
        found = ours.get_peft_model_state_dict(model)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    ours.set_peft_model_state_dict(model, expected)
    assert_close(outputs(ours, model, batch(case.base)), outputs(peer, other, batch(case.base)))


@pytest.mark.parametrize("save_embedding_layers", [True, False, "auto"])
@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], r".*embed_tokens", r".*q_proj"], ids=str)
def test_same_embeddings_are_saved(targets: Any, save_embedding_layers: Any) -> None:
    found = []
    for library in (ours, peer):
        with using(peer):  # both warn
            model = library.get_peft_model(base("llama"), library.LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
            found.append({k: v.shape for k, v in library.get_peft_model_state_dict(model, save_embedding_layers=save_embedding_layers).items()})
    assert found[0] == found[1]


@both_ways
def test_resized_vocabulary(writer: Any, reader: Any, tmp_path: Path) -> None:
    """New tokens: the file brings the embeddings along, onto a base that was resized too."""
    case = BY_ID["lora-linear"]
    model = base("llama")
    with using(peer):
        model.resize_token_embeddings(36, mean_resizing=False)
        model = writer.get_peft_model(model, case.make_config(writer))
        shake(model)
        model.save_pretrained(tmp_path, save_embedding_layers=True)
        fresh = base("llama")
        fresh.resize_token_embeddings(36, mean_resizing=False)
        loaded = reader.PeftModel.from_pretrained(fresh, tmp_path)
        with pytest.raises((RuntimeError, ValueError)):  # formats.md §7.7
            reader.PeftModel.from_pretrained(base("llama"), tmp_path)
    assert_close(outputs(reader, loaded, batch("llama")), outputs(writer, model, batch("llama")))
