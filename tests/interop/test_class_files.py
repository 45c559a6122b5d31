"""Folders of every class with two adapters of every kind, and files of one class read through another: what decides in both libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interop.cases import Case, assert_close, base, difference, ours, peer, save, shake, using
from interop.class_cases import BASES, CELLS, CLASS_OF, EMBEDDINGS, PREFIXES, cell, second, shown, task_of, train, views
from interop.class_cases import inputs_of as inputs_for
from interop.test_classes import tensors
from interop.test_files import comparable, settings, tree

PROMPTS = {**EMBEDDINGS, **PREFIXES}
both_ways = pytest.mark.parametrize(("writer", "reader"), [(ours, peer), (peer, ours)], ids=["ours-to-peer", "peer-to-ours"])
ENCODER_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


# ---- two adapters --------------------------------------------------------------------------------------------------------
def two(library: Any, case: Case, other: Case) -> Any:
    """Return a model with two trained adapters, "default" and "other"."""
    model = case.make(library)
    train(library, model, case)
    with using(library):
        torch.manual_seed(5)
        model.add_adapter("other", other.make_config(library))
        model.set_adapter("other")
        for name, parameter in model.named_parameters():  # the peer leaves virtual tokens of adapters that are not in use trainable
            parameter.requires_grad_("other" in name.split("."))
    train(library, model, other)
    return model


def by_name(library: Any, model: Any, cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    """Return the views of each adapter."""
    found = {}
    for name, case in cases.items():
        with using(library):
            model.set_adapter(name)
        found[name] = views(library, model, case)
    return found


#: bases whose output layer is the embedding: the peer takes no second adapter of rows there
_ONE_ONLY = [case for case in CELLS if case.config == "TrainableTokensConfig" and case.base in ("gpt2", "t5", "bart")]


@pytest.mark.parametrize("case", [case for case in CELLS if case not in _ONE_ONLY], ids=lambda case: case.id)
@both_ways
def test_two_adapters_in_one_folder(case: Case, writer: Any, reader: Any, tmp_path: Path) -> None:
    other = second(case)
    model = two(writer, case, other)
    expected = by_name(writer, model, {"default": case, "other": other})
    assert difference(expected["default"], expected["other"]) > 1e-3
    save(writer, model, tmp_path / "both")
    loaded = case.load(reader, tmp_path / "both")
    with using(reader):
        loaded.load_adapter(str(tmp_path / "both" / "other"), "other")
    found = by_name(reader, loaded, {"default": case, "other": other})
    for name, value in expected.items():
        assert_close(found[name], value, 2e-6)
    save(reader, loaded, tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "both")
    for part in (".", "other"):
        assert comparable(settings(tmp_path / "again" / part)) == comparable(settings(tmp_path / "both" / part))
    name = "default" if reader is peer and case.config == "CPTConfig" else "renamed"  # the test below
    alone = case.load(reader, tmp_path / "both", subfolder="other", adapter_name=name)
    assert list(alone.peft_config) == [name]
    assert_close(views(reader, alone, other), expected["other"], 2e-6)


@pytest.mark.parametrize("base_name", BASES["CAUSAL_LM"])
def test_the_peer_knows_contexts_by_one_name_only(base_name: str) -> None:
    """The loss of CPT reads the config of "default", whatever the adapter is called; ours reads the adapter's own."""
    case = cell("CAUSAL_LM", base_name, "cpt")
    inputs = inputs_for(case, labels=True)
    with pytest.raises(KeyError, match="default"):
        shown(peer, case.make(peer, adapter="renamed"), case, inputs)
    expected = shown(ours, case.make(ours), case, inputs)
    assert_close(shown(ours, case.make(ours, adapter="renamed"), case, inputs), expected, 0)


@pytest.mark.parametrize("case", _ONE_ONLY, ids=lambda case: case.id)
def test_the_peer_takes_one_adapter_of_rows_where_weights_are_tied(case: Case, tmp_path: Path) -> None:
    """Its second one breaks the output layer. Ours takes both, and each folder is a file that the peer reads alone."""
    other = second(case)
    with using(peer):
        broken = case.make(peer)
        broken.add_adapter("other", other.make_config(peer))
        broken.set_adapter("other")
        with pytest.raises(ValueError, match="wraps an unknown layer type"):
            broken(**inputs_for(case))
    model = two(ours, case, other)
    expected = by_name(ours, model, {"default": case, "other": other})
    assert difference(expected["default"], expected["other"]) > 1e-3
    save(ours, model, tmp_path)
    for name, folder in (("default", tmp_path), ("other", tmp_path / "other")):
        assert_close(views(peer, case.load(peer, folder), case), expected[name], 2e-6)
    again = ours.PeftModel.from_stack(base(case.base), tmp_path)
    for name, value in by_name(ours, again, {"default": case, "other": other}).items():
        assert_close(value, expected[name], 1e-6)


# ---- which class ---------------------------------------------------------------------------------------------------------
NAMES = [*CLASS_OF.values(), "PeftMixedModel"]


def written(library: Any, case: Case, folder: Path, **changes: Any) -> Path:
    """Save the moved adapter of a cell; change its config in the file."""
    model = case.make(library)
    shake(model)
    save(library, model, folder)
    if changes:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**settings(folder), **changes}), "utf-8")
    return folder


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", BASES)
@both_ways
def test_the_task_in_the_file_decides(task: str | None, name: str, writer: Any, reader: Any, tmp_path: Path) -> None:
    """Whichever class is asked; without a task the one that was asked. A mixed model stays one."""
    case = cell(task, BASES[task][0], "lora")
    folder = written(writer, case, tmp_path)
    with using(reader):
        loaded = getattr(reader, name).from_pretrained(base(case.base), str(folder))
    kept = name == "PeftMixedModel" or task is None
    assert type(loaded).__name__ == (name if kept else CLASS_OF[task])
    model = case.load(writer, folder)
    inputs = inputs_for(case, padded=True)
    assert_close(shown(reader, loaded, case, inputs), shown(writer, model, case, inputs), 1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", [task for task in BASES if task])
def test_without_a_task_the_class_that_was_asked(task: str, name: str, tmp_path: Path) -> None:
    case = cell(task, BASES[task][0], "lora")
    folder = written(peer, case, tmp_path, task_type=None)
    generates = name in ("PeftModelForCausalLM", "PeftModelForSeq2SeqLM") and task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
    for library in (ours, peer):
        with using(library):
            if generates:  # the base has no language model's head
                with pytest.raises(AttributeError, match="prepare_inputs_for_generation") as caught:
                    getattr(library, name).from_pretrained(base(case.base), str(folder))
                assert isinstance(caught.value, ours.PeftError) == (library is ours)
            else:
                assert type(getattr(library, name).from_pretrained(base(case.base), str(folder))).__name__ == name


@pytest.mark.parametrize("name", ["PeftModel", "PeftModelForTokenClassification"])
def test_a_config_that_is_given_decides_before_the_file(name: str, tmp_path: Path) -> None:
    case = cell("CAUSAL_LM", "llama", "lora")
    folder = written(peer, case, tmp_path)
    other = cell("FEATURE_EXTRACTION", "llama", "lora")
    found = []
    for library in (ours, peer):
        with using(library):
            loaded = getattr(library, name).from_pretrained(base("llama"), str(folder), config=other.make_config(library))
        found.append(type(loaded).__name__)
        assert_close(shown(library, loaded, case, inputs_for(case)), shown(peer, case.load(peer, folder), case, inputs_for(case)), 1e-6)
    assert found == ["PeftModelForFeatureExtraction"] * 2


@pytest.mark.parametrize(("task", "name"), [(task, name) for task in ENCODER_HEADS for name in BASES[task]])
def test_a_file_without_the_head(task: str, name: str, tmp_path: Path) -> None:
    """Trained without a task, read through a class with a head: the peer dies with a bare key; ours says what is missing, or keeps the base's."""
    case = cell(None, name, "lora")
    folder = written(peer, case, tmp_path)
    with using(peer), pytest.raises(KeyError, match=r"base_model\.model\..*weight"):
        getattr(peer, CLASS_OF[task]).from_pretrained(base(name), str(folder))
    with pytest.raises(ours.AdapterWeightsError, match=r"missing keys: 'base_model\.model"):
        getattr(ours, CLASS_OF[task]).from_pretrained(base(name), str(folder))
    loaded = getattr(ours, CLASS_OF[task]).from_pretrained(base(name), str(folder), strict=False)
    plain = case.load(peer, folder)
    assert_close(shown(ours, loaded, case, inputs_for(case)), shown(peer, plain, case, inputs_for(case)), 1e-6)


@pytest.mark.parametrize("tuner", ["lora", "prompt", "prefix", "p-tuning"])
def test_a_task_beside_the_base(tuner: str, tmp_path: Path) -> None:
    """The page's example puts a sequence classifier into the class for tokens: both build it, with equal files."""
    case = cell("TOKEN_CLS", "bert-cls", tuner)
    for writer, reader, folder in ((ours, peer, tmp_path / "ours"), (peer, ours, tmp_path / "peer")):
        written(writer, case, folder)
        loaded = case.load(reader, folder)
        assert type(loaded).__name__ == CLASS_OF[task_of(case)]
    assert comparable(settings(tmp_path / "ours")) == comparable(settings(tmp_path / "peer"))


# ---- the base from the adapter's config ----------------------------------------------------------------------------------
@pytest.mark.parametrize("task", BASES)
@pytest.mark.parametrize("tuner", ["lora", "loha", "prefix"])
@both_ways
def test_auto_classes_find_base_and_adapter(task: str | None, tuner: str, writer: Any, reader: Any, tmp_path: Path) -> None:
    case = cell(task, BASES[task][0], tuner)
    if task is None and tuner == "prefix":
        case = cell("CAUSAL_LM", "gpt2", tuner)
    base(case.base).save_pretrained(tmp_path / "base")
    loaded_base = type(base(case.base)).from_pretrained(tmp_path / "base").eval()
    with using(writer):
        model = writer.get_peft_model(loaded_base, case.make_config(writer))
        shake(model)
        model.save_pretrained(str(tmp_path / "adapter"))
    assert settings(tmp_path / "adapter")["base_model_name_or_path"] == str(tmp_path / "base")
    expected = shown(writer, model, case, inputs_for(case))
    names = ["AutoPeftModel"] if task_of(case) is None else ["AutoPeftModel", CLASS_OF[task_of(case)].replace("PeftModel", "AutoPeftModel")]
    for name in names:
        if reader is peer and name == "AutoPeftModel" and task_of(case) is not None:
            with using(peer), pytest.raises(ValueError, match="please use a specific class for your task type"):
                peer.AutoPeftModel.from_pretrained(str(tmp_path / "adapter"))
            continue  # ours takes the class of the task
        with using(reader):
            loaded = getattr(reader, name).from_pretrained(str(tmp_path / "adapter"))
        assert type(loaded).__name__ == CLASS_OF[task_of(case)]
        assert_close(shown(reader, loaded, case, inputs_for(case)), expected, 1e-6)
    if task in ("CAUSAL_LM", "SEQ_CLS"):
        with using(reader), pytest.raises(ValueError, match="Expected target PEFT class"):
            reader.AutoPeftModelForTokenClassification.from_pretrained(str(tmp_path / "adapter"))


# ---- bases of one's own --------------------------------------------------------------------------------------------------
class Own(nn.Module):
    """A model that is none of transformers: what `PeftModel` without a task is for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(32, 6)
        self.picture = nn.Conv1d(6, 8, 3, padding=1)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.middle(self.picture(self.words(ids).transpose(1, 2)).transpose(1, 2)).tanh())
        return found


_OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"target_modules": ["words", "picture", "middle"]}),
    "dora": ("LoraConfig", {"target_modules": ["words", "picture", "middle"], "use_dora": True}),
    "lora-saved": ("LoraConfig", {"target_modules": ["middle"], "modules_to_save": ["head"], "bias": "lora_only"}),
    "lora-tokens": ("LoraConfig", {"target_modules": ["middle"], "trainable_token_indices": {"words": [5, 30]}}),
    "loha": ("LoHaConfig", {"target_modules": ["picture", "middle"]}),
    "loha-saved": ("LoHaConfig", {"target_modules": ["middle"], "modules_to_save": ["head"]}),
}


@pytest.mark.parametrize("kind", _OWN)
@both_ways
def test_a_base_of_ones_own(kind: str, writer: Any, reader: Any, tmp_path: Path) -> None:
    name, options = _OWN[kind]
    ids = torch.tensor([[5, 3, 30, 7], [9, 5, 5, 2]])
    with using(writer):
        model = writer.get_peft_model(Own(), getattr(writer, name)(r=2, **options))
    optimiser = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    for _ in range(2):
        model(ids).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    first = save(writer, model.eval(), tmp_path / "first")
    written = settings(first)
    assert written["task_type"] is None
    assert written["auto_mapping"] == {"base_model_class": "Own", "parent_library": Own.__module__}
    with using(reader):
        loaded = reader.PeftModel.from_pretrained(Own(), str(first))
    assert type(loaded).__name__ == "PeftModel"
    with torch.no_grad():
        expected = model(ids)
        torch.testing.assert_close(loaded(ids), expected, rtol=0, atol=1e-6 * float(expected.abs().max().clamp(min=1)))
        assert float((expected - Own()(ids)).abs().max()) > 1e-2
    again = save(reader, loaded, tmp_path / "again")
    assert comparable(settings(again)) == comparable(written)
    assert tensors(again).keys() == tensors(first).keys()
    assert all(torch.equal(value, tensors(first)[key]) for key, value in tensors(again).items())


@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning"])
def test_virtual_tokens_need_a_model_of_transformers(kind: str) -> None:
    name, options = PROMPTS[kind]
    for library in (ours, peer):
        config = getattr(library, name)(num_virtual_tokens=3, **options)
        with using(library), pytest.raises((ValueError, AttributeError, KeyError)) as caught:
            library.get_peft_model(Own(), config)
        assert isinstance(caught.value, ours.PeftError) == (library is ours)
