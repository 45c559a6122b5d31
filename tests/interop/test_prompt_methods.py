"""P-tuning, multitask prompt tuning, CPT, and encoder-decoder models: one file, equal outputs; one seed, equal starts; the same losses."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from interop.cases import Case, assert_close, base, batch, difference, ours, outputs, peer, shake, using

N = 4
#: keys that only ours reads: the network behind the table
OWN = "prompt_encoder."
_CONTEXT: dict[str, Any] = {"cpt_token_ids": [5, 6, 7, 8], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4], "opt_projection_epsilon": 0.5}
_TWO_PAIRS: dict[str, Any] = {
    "cpt_token_ids": [5, 6, 7, 8, 9, 10, 11, 12],
    "cpt_mask": [1] * 8,
    "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 7, 8],
    "opt_projection_epsilon": 0.5,
}
_DECAY: dict[str, Any] = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5}


def case(id: str, base: str, config: str, task: str = "CAUSAL_LM", **options: Any) -> Case:
    length = {} if config == "CPTConfig" else {"num_virtual_tokens": N}
    return Case(id=id, base=base, config=config, options={"task_type": task, **length, **options})


CASES = [
    case("mlp", "llama", "PromptEncoderConfig", encoder_hidden_size=6),
    case("mlp-default", "gpt2", "PromptEncoderConfig"),
    case("mlp-bert", "bert-cls", "PromptEncoderConfig", "SEQ_CLS"),
    case("mlp-t5", "t5", "PromptEncoderConfig", "SEQ_2_SEQ_LM"),
    case("lstm", "llama", "PromptEncoderConfig", encoder_reparameterization_type="LSTM", encoder_hidden_size=6),
    case("lstm-one-layer", "llama", "PromptEncoderConfig", encoder_reparameterization_type="LSTM", encoder_num_layers=1),
    case("lstm-bart", "bart", "PromptEncoderConfig", "SEQ_2_SEQ_LM", encoder_reparameterization_type="LSTM"),
    case("multitask", "llama", "MultitaskPromptTuningConfig", num_tasks=3, num_ranks=2),
    case("multitask-vocabulary", "llama", "MultitaskPromptTuningConfig", num_tasks=3, prompt_tuning_init="SAMPLE_VOCAB"),
    case("multitask-bert", "bert-cls", "MultitaskPromptTuningConfig", "SEQ_CLS", num_tasks=3, num_ranks=2),
    case("cpt", "llama", "CPTConfig", **_CONTEXT),
    case("cpt-decay", "gpt2", "CPTConfig", opt_weighted_loss_type="decay", opt_loss_decay_factor=0.5, **_CONTEXT),
    case("prompt-t5", "t5", "PromptTuningConfig", "SEQ_2_SEQ_LM"),
    case("prompt-bart", "bart", "PromptTuningConfig", "SEQ_2_SEQ_LM", prompt_tuning_init="SAMPLE_VOCAB"),
    case("prefix-t5", "t5", "PrefixTuningConfig", "SEQ_2_SEQ_LM"),
    case("prefix-bart", "bart", "PrefixTuningConfig", "SEQ_2_SEQ_LM"),
    case("prefix-bart-projection", "bart", "PrefixTuningConfig", "SEQ_2_SEQ_LM", prefix_projection=True, encoder_hidden_size=6),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
both_ways = pytest.mark.parametrize(("writer", "reader"), [(ours, peer), (peer, ours)], ids=["ours-to-peer", "peer-to-ours"])


def inputs_of(case: Case, **how: Any) -> dict[str, Tensor]:
    extra = {"task_ids": torch.tensor([2, 0, 1])} if case.id.startswith("multitask") else {}
    return {**batch(case.base, **how), **extra}


def saved(case: Case, library: Any, folder: Path) -> Any:
    model = case.make(library)
    shake(model)
    with using(library):
        outputs(library, model, inputs_of(case))  # the peer saves the δ of CPT as it is projected in a call
        model.save_pretrained(folder)
    return model


def public(tensors: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {key: (tuple(value.shape), value.dtype) for key, value in tensors.items() if not key.startswith(OWN)}


def parameters(model: Any) -> dict[str, Tensor]:
    """By name; the table of CPT, which does not train, is a buffer in ours."""
    buffers = {name: value for name, value in model.named_buffers() if name.startswith(OWN) and name.endswith(".embedding.weight")}
    return {**dict(model.named_parameters()), **buffers}


@every_case
def test_same_seed_same_start(case: Case) -> None:
    models = [case.make(library) for library in (ours, peer)]
    found, expected = (parameters(model) for model in models)
    assert found.keys() == expected.keys()
    assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]
    results = [outputs(library, model, inputs_of(case)) for library, model in zip((ours, peer), models, strict=True)]
    assert_close(results[0], results[1], 1e-6)


@every_case
def test_as_many_numbers_are_drawn(case: Case) -> None:
    after = []
    for library in (ours, peer):
        case.make(library)
        after.append(torch.rand(4))
    assert torch.equal(after[0], after[1])


@every_case
@both_ways
def test_outputs_survive_the_way(case: Case, writer: Any, reader: Any, tmp_path: Path) -> None:
    model = saved(case, writer, tmp_path)
    expected = outputs(writer, model, inputs_of(case))
    loaded = case.load(reader, tmp_path)
    assert_close(outputs(reader, loaded, inputs_of(case)), expected, 1e-6)
    bare = {name: value for name, value in inputs_of(case).items() if name != "task_ids"}
    assert difference(expected, outputs(reader, base(case.base), bare)) > 1e-2, "the adapter has no effect: the comparison says nothing"


@every_case
def test_same_files(case: Case, tmp_path: Path) -> None:
    for library, name in ((ours, "ours"), (peer, "peer")):
        saved(case, library, tmp_path / name)
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peer"))
    assert public(found) == public(expected)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text("utf-8")) for name in ("ours", "peer")]
    for config in configs:
        config["base_model_name_or_path"] = config["base_model_name_or_path"] or None
        config["modules_to_save"] = list(dict.fromkeys(config["modules_to_save"] or ())) or None  # api.md §12.14
    assert configs[0] == configs[1]


@pytest.mark.parametrize("case", [case for case in CASES if case.id in ("mlp", "lstm", "prefix-bart-projection", "cpt")], ids=lambda case: case.id)
def test_the_peer_ignores_what_only_we_read(case: Case, tmp_path: Path) -> None:
    saved(case, ours, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    assert any(key.startswith(OWN) for key in tensors)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = peer.PeftModel.from_pretrained(base(case.base), tmp_path)
    assert not [str(warning.message) for warning in said if "prompt_encoder" in str(warning.message) or "keys" in str(warning.message)]
    expected = outputs(peer, loaded, inputs_of(case))
    save_file({key: value for key, value in tensors.items() if not key.startswith(OWN)}, path, metadata={"format": "pt"})
    assert_close(outputs(peer, case.load(peer, tmp_path), inputs_of(case)), expected, 0)


@pytest.mark.parametrize("case", [case for case in CASES if not case.id.startswith("cpt")], ids=lambda case: case.id)
def test_the_peers_files_train_on(case: Case, tmp_path: Path) -> None:
    model = saved(case, peer, tmp_path)
    loaded = case.load(ours, tmp_path, is_trainable=True)
    assert any(parameter.requires_grad for parameter in loaded.parameters())
    assert_close(outputs(ours, loaded, inputs_of(case)), outputs(peer, model, inputs_of(case)), 1e-6)


@pytest.mark.parametrize("tasks", [[2, 0, 1], [1, 1, 1]])
def test_tasks(tasks: list[int], tmp_path: Path) -> None:
    multitask = next(case for case in CASES if case.id == "multitask")
    model = saved(multitask, ours, tmp_path)
    loaded = multitask.load(peer, tmp_path)
    inputs = {**batch("llama"), "task_ids": torch.tensor(tasks)}
    assert_close(outputs(ours, model, inputs), outputs(peer, loaded, inputs), 1e-6)


@pytest.mark.parametrize("start", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_starts_from_a_source(start: str, tmp_path: Path) -> None:
    source = next(case for case in CASES if case.id == "multitask")
    saved(source, peer, tmp_path)
    options = {
        "prompt_tuning_init": start,
        "prompt_tuning_init_state_dict_path": str(tmp_path / "adapter_model.safetensors"),
        "prompt_tuning_init_task": 1,
        "num_ranks": 2,
    }
    new = case("start", "llama", "MultitaskPromptTuningConfig", num_tasks=1, **options)
    found, expected = (parameters(new.make(library)) for library in (ours, peer))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{}, _DECAY, {**_DECAY, "cpt_tokens_type_mask": [8, 2, 3, 4, 1, 2, 3, 4]}], ids=["plain", "decay", "begins with a label"]
)
@pytest.mark.parametrize("types", [None, [[1, 2, 3, 4]] * 2, [[1, 4, 8, 8], [0, 2, 4, 4]]], ids=["labels", "pairs", "several"])
def test_losses_of_cpt(options: dict[str, Any], types: Any) -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 6]])
    labels = torch.tensor([[5, 6, 7, 8], [-100, 4, -100, 6]])
    given = {} if types is None else {"input_type_mask": torch.tensor(types)}
    found = []
    for library in (ours, peer):
        model = case("cpt", "llama", "CPTConfig", **{**_TWO_PAIRS, **options}).make(library)
        shake(model)
        model.train(False)
        with using(library):
            # the peer changes what it is given
            arguments = {name: value.clone() for name, value in given.items()}
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels.clone(), **arguments).loss
            loss.backward()
        gradient = model.prompt_encoder["default"].delta_embedding.weight.grad
        found.append((loss.detach(), gradient))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
