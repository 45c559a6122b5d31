"""Every class with every adapter: trained by one library, saved, and the same in the other, with the same file when it is saved again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from interop.cases import Case, assert_close, base, difference, ours, outputs, peer, save, shake, using
from interop.class_cases import (
    BASES,
    CELLS,
    CLASS_OF,
    LAYERS,
    REFUSED,
    REFUSED_CALLS,
    TUNERS,
    N,
    cell,
    has_labels,
    inputs_of,
    is_bare,
    task_of,
    train,
    views,
)
from interop.test_files import comparable, settings
from interop.test_generate import assert_same

every_cell = pytest.mark.parametrize("case", CELLS, ids=lambda case: case.id)
both_ways = pytest.mark.parametrize(("writer", "reader"), [(ours, peer), (peer, ours)], ids=["ours-to-peer", "peer-to-ours"])
both_formats = pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])


def tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's folder, without those that only ours reads (docs/files.md)."""
    path = folder / "adapter_model.safetensors"
    found = load_file(path) if path.exists() else torch.load(folder / "adapter_model.bin", weights_only=True)
    return {key: value for key, value in found.items() if not key.startswith("prompt_encoder.")}


@every_cell
@both_ways
@both_formats
def test_a_trained_adapter_goes_over_and_back(case: Case, writer: Any, reader: Any, safe: bool, tmp_path: Path) -> None:
    goes_over_and_back(case, writer, reader, safe, tmp_path)


def goes_over_and_back(case: Case, writer: Any, reader: Any, safe: bool, tmp_path: Path) -> None:
    """Trained, saved, loaded by the other: its class, outputs, loss; saved again by the other: the same keys, numbers, config."""
    model = case.make(writer)
    before = views(writer, model, case)
    train(writer, model, case)
    expected = views(writer, model, case)
    assert difference(before, expected) > 1e-3, "nothing was learnt: the comparison says nothing"
    first = save(writer, model, tmp_path / "first", safe_serialization=safe)
    loaded = case.load(reader, first)
    assert type(loaded).__name__ == type(model).__name__ == CLASS_OF[task_of(case)]
    assert_close(views(reader, loaded, case), expected, 2e-6)
    again = save(reader, loaded, tmp_path / "again", safe_serialization=safe)
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors" if safe else "adapter_model.bin"}
    assert {path.name for path in first.iterdir()} == {path.name for path in again.iterdir()} == files
    written, rewritten = tensors(first), tensors(again)
    assert written.keys() == rewritten.keys()
    for key, value in written.items():
        torch.testing.assert_close(rewritten[key], value, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    assert comparable(settings(again)) == comparable(settings(first))


@every_cell
def test_both_learn_alike(case: Case) -> None:
    losses = [train(library, case.make(library), case, steps=3) for library in (ours, peer)]
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-5)
    assert losses[0][0] != losses[0][2]


@pytest.mark.parametrize("case", [case for case in CELLS if case.config in {config for config, _ in LAYERS.values()}], ids=lambda case: case.id)
@both_ways
def test_training_goes_on_in_the_other(case: Case, writer: Any, reader: Any, tmp_path: Path) -> None:
    model = case.make(writer)
    train(writer, model, case)
    folder = save(writer, model, tmp_path)
    losses = [train(library, case.load(library, folder, is_trainable=True), case, steps=3) for library in (writer, reader)]
    assert losses[1] == pytest.approx(losses[0], rel=0, abs=1e-5)


@every_cell
def test_the_same_names_and_numbers_from_a_seed(case: Case) -> None:
    """Optimisers and trainers go by these names (formats.md §5); both draw alike. The context of CPT, which never trains, is a buffer in ours."""
    found, expected = (dict(case.make(library).named_parameters()) for library in (ours, peer))
    if case.config == "CPTConfig":
        expected.pop("prompt_encoder.default.embedding.weight")
    assert {name: value.requires_grad for name, value in found.items()} == {name: value.requires_grad for name, value in expected.items()}
    for name, value in expected.items():
        rounding = 1e-6 if "lora_magnitude_vector" in name else 0.0  # norms, which each adds up in its own order
        torch.testing.assert_close(found[name], value, rtol=0, atol=rounding, msg=lambda text, name=name: f"{name}: {text}")


@every_cell
def test_files_of_the_peer_are_read_without_memory_for_them(case: Case, tmp_path: Path) -> None:
    model = case.make(peer)
    shake(model)
    expected = views(peer, model, case)  # the peer saves what CPT learnt as it is after a call
    folder = save(peer, model, tmp_path)
    loaded = case.load(ours, folder, low_cpu_mem_usage=True)
    assert not [name for name, value in loaded.state_dict(keep_vars=True).items() if value.is_meta]
    assert_close(views(ours, loaded, case), expected, 2e-6)


GENERATE = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
_GENERATING = [case for case in CELLS if task_of(case) in ("CAUSAL_LM", "SEQ_2_SEQ_LM")]
_TWO_PROMPTS = [case for case in _GENERATING if task_of(case) == "SEQ_2_SEQ_LM" and case.config == "MultitaskPromptTuningConfig"]


@pytest.mark.parametrize("case", [case for case in _GENERATING if case not in _TWO_PROMPTS], ids=lambda case: case.id)
@both_ways
def test_the_same_words_are_generated(case: Case, writer: Any, reader: Any, tmp_path: Path) -> None:
    model = case.make(writer)
    shake(model, size=0.3)
    views(writer, model, case)
    loaded = case.load(reader, save(writer, model, tmp_path))
    inputs = {name: value for name, value in inputs_of(case).items() if name != "decoder_input_ids"}
    found = []
    for library, one in ((writer, model), (reader, loaded), (ours, base(case.base))):
        given = inputs if one is model or one is loaded else {name: value for name, value in inputs.items() if name != "task_ids"}
        with using(library):
            found.append(one.generate(**given, **GENERATE))
    assert_same(found[0], found[1])
    assert float((found[0].scores[0] - found[2].scores[0]).nan_to_num(neginf=0).abs().max()) > 1e-2, "the adapter has no effect"


@pytest.mark.parametrize("case", _TWO_PROMPTS, ids=lambda case: case.id)
def test_the_peer_forgets_the_decoders_prompt_when_it_generates(case: Case, tmp_path: Path) -> None:
    """Tasks of encoder-decoders have a prompt for each part. Ours says what a call of the peer finds best; `generate` of the peer does not."""
    model = case.make(ours)
    shake(model, size=0.3)
    other = case.load(peer, save(ours, model, tmp_path))
    inputs = {name: value for name, value in inputs_of(case).items() if name != "decoder_input_ids"}
    found = model.generate(**inputs, **GENERATE)
    for library, wanted, agrees in ((ours, found, True), (peer, other.generate(**inputs, **GENERATE), False)):
        logits = outputs(peer, other, {**inputs, "labels": wanted.sequences[:, 1:]})["logits"][:, N:]
        logits[..., 2] = -torch.inf  # the text must not end
        close = [torch.allclose(logits[:, step], score, atol=1e-5) for step, score in enumerate(wanted.scores)]
        assert all(close) is agrees, library


@pytest.mark.parametrize("case", [case for case in CELLS if case.config in {config for config, _ in LAYERS.values()}], ids=lambda case: case.id)
def test_merged_they_are_the_same_model(case: Case, tmp_path: Path) -> None:
    model = case.make(peer)
    shake(model)
    loaded = case.load(ours, save(peer, model, tmp_path))
    with using(peer):
        expected = model.merge_and_unload().state_dict()
    found = loaded.merge_and_unload().state_dict()
    assert found.keys() == expected.keys() == base(case.base).state_dict().keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    assert [key for key, value in base(case.base).state_dict().items() if not torch.equal(value, found[key])]


# ---- cells that the peer does not have -----------------------------------------------------------------------------------
def goes_round(case: Case, folder: Path, *, labels: bool = True) -> None:
    """Ours has the cell: its loss learns, and its file gives the same outputs."""
    model = case.make(ours)
    shake(model)
    inputs = inputs_of(case, labels=labels and not is_bare(case))
    expected = outputs(ours, model, inputs)
    save(ours, model, folder)
    assert_close(outputs(ours, case.load(ours, folder), inputs), expected, 1e-6)
    model.train()
    found = model(**inputs)
    (found["loss"] if labels and "labels" in inputs else found[0].sum()).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert any(float(parameter.grad.abs().max()) > 0 for parameter in trained if parameter.grad is not None)


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_peer_refuses(name: str, tmp_path: Path) -> None:
    case, (error, words) = REFUSED[name]
    with pytest.raises(error, match=words):
        case.make(peer)
    if case.config == "CPTConfig":  # methods.md: it is for causal language models; ours says what to do
        with pytest.raises(ours.ConfigError, match="set task_type='CAUSAL_LM'"):
            case.make(ours)
        return
    goes_round(case, tmp_path)
    if task_of(case) is None:  # without a task it does what the class of the base's task does, which the peer has
        task = "CAUSAL_LM" if case.base == "llama" else "FEATURE_EXTRACTION"
        like = cell(task, case.base, cell_tuner(name))
        if like.id in REFUSED_CALLS:
            return
        inputs = inputs_of(like, labels=True, padded=True)
        named = getattr(peer, CLASS_OF[task])
        with using(peer):
            other = named.from_pretrained(base(case.base), tmp_path)
        assert type(other) is named  # a file without a task says nothing: the class that is called decides
        assert_close(outputs(ours, case.load(ours, tmp_path), inputs), outputs(peer, other, inputs), 1e-6)


@pytest.mark.parametrize("name", REFUSED_CALLS)
def test_what_the_peer_builds_and_cannot_call(name: str, tmp_path: Path) -> None:
    """Its files are good all the same: the tensors of ours and of the peer go over."""
    case, (error, words) = REFUSED_CALLS[name]
    other = case.make(peer)
    shake(other)
    with using(peer), pytest.raises(error, match=words):
        other(**inputs_of(case))
    goes_round(case, tmp_path / "ours")
    save(peer, other, tmp_path / "peer")
    read = case.load(ours, tmp_path / "peer")
    model = case.make(ours)
    shake(model)
    assert_close(outputs(ours, read, inputs_of(case)), outputs(ours, model, inputs_of(case)), 1e-6)
    with using(peer):
        back = peer.get_peft_model_state_dict(case.load(peer, tmp_path / "ours"))
    written = tensors(tmp_path / "ours")
    assert back.keys() == written.keys()
    assert all(torch.equal(back[key], value) for key, value in written.items())


@pytest.mark.parametrize("base_name", ["t5", "bart"])
def test_the_peer_needs_labels_where_tasks_are_for_encoder_decoders(base_name: str) -> None:
    case = cell("SEQ_2_SEQ_LM", base_name, "multitask")
    models = {}
    for library in (ours, peer):
        models[library is ours] = case.make(library)
        shake(models[library is ours])
    inputs = inputs_of(case)
    with using(peer), pytest.raises(TypeError, match="expected Tensor"):
        models[False](**inputs)
    with torch.no_grad():
        assert torch.isfinite(models[True](**inputs).logits).all()


# ---- where the peer is wrong (api.md §12.11; docs/prompts.md) ------------------------------------------------------------
_BEHIND = [case for case in CELLS if task_of(case) in ("TOKEN_CLS", "QUESTION_ANS") and not has_labels(case)]


@pytest.mark.parametrize("case", _BEHIND, ids=lambda case: case.id)
def test_labels_behind_embeddings(case: Case) -> None:
    """Tokens: the peer does not pad the labels, and fails. Answers: it does not move the positions, and learns to find the prompt."""
    model, other = (case.make(library) for library in (ours, peer))
    shake(model)
    shake(other)
    labelled, bare = inputs_of(case, labels=True), inputs_of(case)
    theirs = outputs(peer, other, bare)
    found = outputs(ours, model, labelled)["loss"]
    if task_of(case) == "TOKEN_CLS":
        with pytest.raises(ValueError, match="batch_size"):
            outputs(peer, other, labelled)
        right = cross_entropy(theirs["logits"][:, N:].flatten(0, 1), labelled["labels"].flatten())
    else:

        def loss(lead: int) -> Tensor:
            parts = (cross_entropy(theirs[f"{end}_logits"], labelled[f"{end}_positions"] + lead) for end in ("start", "end"))
            return torch.stack(list(parts)).mean()

        right = loss(N)
        torch.testing.assert_close(outputs(peer, other, labelled)["loss"], loss(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tuner", ["prompt", "p-tuning", "multitask"])
def test_a_decoder_classifies_by_its_last_token(tuner: str) -> None:
    """Behind a prompt the peer reads a pad where a text is padded on the right: only without the pad is it the text's class."""
    case = cell("SEQ_CLS", "llama-cls", tuner)
    model, other = (case.make(library) for library in (ours, peer))
    shake(model)
    shake(other)
    inputs = inputs_of(case, padded=True)
    row = {name: value[1:2, :5] if value.dim() > 1 else value[1:2] for name, value in inputs.items()}
    found = outputs(ours, model, inputs)["logits"][1]
    right = outputs(peer, other, row)["logits"][0]
    torch.testing.assert_close(found, right, rtol=0, atol=1e-6)
    assert float((outputs(peer, other, inputs)["logits"][1] - right).abs().max()) > 1e-2


@pytest.mark.parametrize("name", [*BASES["SEQ_CLS"], "gpt2-cls"])
def test_rows_alone_in_a_class_with_a_head(name: str, tmp_path: Path) -> None:
    """Beside trained rows the peer neither trains nor saves the head, ours does. The peer's file is read all the same, with the base's head."""
    case = cell("SEQ_CLS", name, "tokens")
    other = case.make(peer)
    train(peer, other, case)
    assert len(tensors(save(peer, other, tmp_path / "peer"))) == 1
    assert_close(views(ours, case.load(ours, tmp_path / "peer"), case), views(peer, other, case), 2e-6)
    goes_round(case, tmp_path / "ours")
    written = tensors(tmp_path / "ours")
    assert len(written) > 1
    [key] = tensors(tmp_path / "peer")
    assert torch.equal(peer.get_peft_model_state_dict(case.load(peer, tmp_path / "ours"))[key], written[key])


def test_the_table_is_whole() -> None:
    """Each class of the peer, each adapter: compared, or listed with the peer's words."""
    assert set(CLASS_OF.values()) == {"PeftModel", *(cls.__name__ for cls in peer.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values())}
    ids = [case.id for case in CELLS] + list(REFUSED) + list(REFUSED_CALLS) + [cell("SEQ_CLS", name, "tokens").id for name in BASES["SEQ_CLS"]]
    assert sorted(ids) == sorted(cell(task, name, tuner).id for task, bases in BASES.items() for name in bases for tuner in TUNERS)
    assert len(ids) == len(set(ids))
    layers = [name for name in (*REFUSED, *REFUSED_CALLS) if cell_tuner(name) in LAYERS and cell_tuner(name) != "tokens"]
    assert layers == ["PeftModelForCausalLM-gpt2-loha", "PeftModelForCausalLM-gpt2-loha-saved"]
    assert {cell_tuner(name) for name in REFUSED if not name.startswith("PeftModel-")} == {"loha", "loha-saved", "cpt", "tokens"}


def cell_tuner(name: str) -> str:
    """Return the adapter's part of a cell's id."""
    return max((tuner for tuner in TUNERS if name.endswith(f"-{tuner}")), key=len)
