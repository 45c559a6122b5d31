"""Multitask prompt tuning: worked numbers, tasks of rows, starts from a source, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from peft_core import AdapterFileError, AdapterWeightsError, ConfigError, PeftModel, RoutingError, get_peft_config, get_peft_model
from peft_core.testing import tiny

N, D, TASKS, RANKS = 3, 32, 3, 2
PLAIN = {"peft_type": "MULTITASK_PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": N, "num_tasks": TASKS, "num_ranks": RANKS}


def made(base: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(tiny(base), get_peft_config({**PLAIN, **changes})).eval()


def shaken(model: Any) -> Any:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.prompt_encoder["default"].parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def prompt(model: Any, task: int) -> Tensor:
    """P ⊙ (C_t R_t), number by number."""
    encoder = model.prompt_encoder["default"]
    p, c, r = (value.detach().double() for value in (encoder.embedding.weight, encoder.prefix_task_cols, encoder.prefix_task_rows))
    found = torch.zeros_like(p)
    for i in range(p.shape[0]):
        for j in range(p.shape[1]):
            found[i, j] = p[i, j] * sum(c[task, i, k] * r[task, k, j] for k in range(c.shape[2]))
    return found


def ids(rows: int = 3) -> Tensor:
    return torch.randint(2, 64, (rows, 5), generator=torch.Generator().manual_seed(1))


def expected_logits(model: Any, tasks: list[int]) -> Tensor:
    bare: Any = tiny("llama")
    prompts = torch.stack([prompt(model, task) for task in tasks]).float()
    with torch.no_grad():
        return bare(inputs_embeds=torch.cat([prompts, bare.get_input_embeddings()(ids(len(tasks)))], dim=1)).logits


@pytest.mark.parametrize("tasks", [[2, 0, 1], [1, 1, 1]], ids=["mixed", "the same"])
@pytest.mark.parametrize("grad", [False, True])
def test_each_row_gets_the_prompt_of_its_task(tasks: list[int], grad: bool) -> None:
    model = shaken(made())
    for _ in range(2):  # the second time in evaluation it is kept
        with torch.set_grad_enabled(grad):
            found = model(input_ids=ids(), task_ids=torch.tensor(tasks)).logits.detach()
        torch.testing.assert_close(found, expected_logits(model, tasks), rtol=0, atol=1e-5)
    with torch.no_grad():  # nothing is stale
        model.prompt_encoder["default"].prefix_task_rows.mul_(2)
        found = model(input_ids=ids(), task_ids=tasks).logits
    torch.testing.assert_close(found, expected_logits(model, tasks), rtol=0, atol=1e-5)


def test_only_the_tasks_of_a_batch_get_gradients() -> None:
    model = shaken(made())
    model.train()
    model(input_ids=ids(), labels=ids(), task_ids=torch.tensor([0, 2, 0])).loss.backward()
    for factor in (model.prompt_encoder["default"].prefix_task_cols, model.prompt_encoder["default"].prefix_task_rows):
        assert [bool(part.abs().sum()) for part in factor.grad] == [True, False, True]


def test_rows_of_other_adapters_need_no_task() -> None:
    model = shaken(made())
    model.add_adapter("other", get_peft_config({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2}))
    with torch.no_grad():
        found = model(input_ids=ids(), task_ids=torch.tensor([99, 1, -5]), adapter_names=["__base__", "default", "other"]).logits
        alone = model(input_ids=ids()[1:2], task_ids=torch.tensor([1])).logits
    torch.testing.assert_close(found[1:2, -5:], alone[:, -5:], rtol=0, atol=1e-5)
    with torch.no_grad():
        bare = tiny("llama")(input_ids=ids()[:1]).logits
    torch.testing.assert_close(found[:1, -5:], bare, rtol=0, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 2])
def test_generate(beams: int) -> None:
    model = shaken(made())
    tasks = torch.tensor([2, 0, 1])
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "attention_mask": torch.ones_like(ids())}
    found = model.generate(input_ids=ids(), task_ids=tasks, **options)
    for row, task in enumerate(tasks):
        alone = model.generate(input_ids=ids()[row : row + 1], task_ids=task[None], **{**options, "attention_mask": torch.ones(1, 5)})
        assert torch.equal(found[row : row + 1], alone)


def test_wrong_task_ids() -> None:
    model = made()
    wrong: list[tuple[Any, str]] = [
        (None, "task_ids cannot be None"),
        (torch.tensor([0, 1]), "2 entries, but the batch has 3 rows"),
        (torch.tensor([0] * 6), "6 entries, but the batch has 3 rows"),
        (torch.tensor([], dtype=torch.long), "0 entries"),
        (torch.tensor([0, 1, TASKS]), f"names the task {TASKS}, but the adapter 'default' has {TASKS}; give numbers from 0 to {TASKS - 1}"),
        (torch.tensor([0, -1, 1]), "names the task -1"),
        (torch.tensor([[0], [1], [1]]), r"\(batch,\) of integers"),
        (torch.tensor([0.0, 1.0, 1.0]), r"\(batch,\) of integers"),
    ]
    for given, message in wrong:
        with pytest.raises(RoutingError, match=message) as caught:
            model(input_ids=ids(), **({} if given is None else {"task_ids": given}))
        assert isinstance(caught.value, ValueError)


def test_two_submodules_have_a_half_each() -> None:
    model = shaken(made("t5", task_type="SEQ_2_SEQ_LM"))
    bare: Any = tiny("t5")
    assert model.prompt_encoder["default"].embedding.weight.shape == (2 * N, D)
    text, target, tasks = ids(), ids()[:, :4], [2, 0, 1]
    prompts = torch.stack([prompt(model, task) for task in tasks]).float()
    words = bare.get_input_embeddings()
    with torch.no_grad():
        found = model(input_ids=text, decoder_input_ids=target, task_ids=torch.tensor(tasks)).logits
        expected = bare(
            inputs_embeds=torch.cat([prompts[:, :N], words(text)], dim=1), decoder_inputs_embeds=torch.cat([prompts[:, N:], words(target)], dim=1)
        ).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    one = made("t5", task_type="SEQ_2_SEQ_LM", num_transformer_submodules=1)
    assert one.prompt_encoder["default"].embedding.weight.shape == (N, D)
    with torch.no_grad():
        assert one(input_ids=text, decoder_input_ids=target, task_ids=torch.tensor(tasks)).logits.shape[1] == 4


# ---- starts ------------------------------------------------------------------------------------------------------------
def test_the_usual_start_is_near_zero() -> None:
    """std(P)·√q·4e-4, as the paper's code has it: for q = 20 about 1.8e-3."""
    model = made(num_ranks=20, num_virtual_tokens=50)
    assert abs(float(prompt(model, 0).std()) - 1.8e-3) < 3e-4


@pytest.mark.parametrize("ranks", [1, 4])
def test_preserved_scale(ranks: int) -> None:
    model = made(num_ranks=ranks, num_virtual_tokens=20, preserve_scale=True)
    shared = model.prompt_encoder["default"].embedding.weight.detach().double()
    for task in range(TASKS):
        ratio = prompt(model, task) / shared
        assert float((ratio - 1).abs().max()) < 0.2
        assert float((ratio - 1).std()) > 0.01


def test_preserve_scale_is_written_only_where_it_is_chosen(tmp_path: Path) -> None:
    for chosen in (False, True):
        made(preserve_scale=chosen).save_pretrained(tmp_path)
        assert ("preserve_scale" in json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))) is chosen
        loaded: Any = PeftModel.from_pretrained(tiny("llama"), tmp_path).peft_config["default"]
        assert loaded.preserve_scale is chosen


@pytest.fixture(params=["safetensors", "pickle"])
def source(request: Any, tmp_path: Path) -> tuple[dict[str, Tensor], str]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"prompt_embeddings": (N, D), "prefix_task_cols": (4, N, RANKS), "prefix_task_rows": (4, RANKS, D)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    path = tmp_path / f"source.{'safetensors' if request.param == 'safetensors' else 'bin'}"
    if request.param == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return tensors, str(path)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("start", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_starts_from_a_source(source: tuple[dict[str, Tensor], str], start: str, tasks: int) -> None:
    tensors, path = source
    model = made(prompt_tuning_init=start, prompt_tuning_init_state_dict_path=path, prompt_tuning_init_task=2, num_tasks=tasks)
    encoder = model.prompt_encoder["default"]
    assert torch.equal(encoder.embedding.weight, tensors["prompt_embeddings"])
    for name in ("prefix_task_cols", "prefix_task_rows"):
        found = getattr(encoder, name)
        assert found.shape[0] == tasks
        if start == "ONLY_SOURCE_SHARED":
            assert 0.01 < float(found.detach().std()) < 0.03
            continue
        expected = tensors[name][2] if start == "EXACT_SOURCE_TASK" else sum(tensors[name][task] for task in range(4)) / 4
        for task in range(tasks):
            torch.testing.assert_close(found[task], expected, rtol=0, atol=1e-6)


def test_a_loaded_adapter_needs_no_source(source: tuple[dict[str, Tensor], str], tmp_path: Path) -> None:
    model = made(prompt_tuning_init="EXACT_SOURCE_TASK", prompt_tuning_init_state_dict_path=source[1])
    model.save_pretrained(tmp_path / "saved")
    Path(source[1]).unlink()
    for trains in (False, True):
        loaded: Any = PeftModel.from_pretrained(tiny("llama"), tmp_path / "saved", is_trainable=trains).eval()
        tasks = torch.tensor([2, 0, 1])
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids(), task_ids=tasks).logits, model(input_ids=ids(), task_ids=tasks).logits)


def test_sources_that_do_not_fit(source: tuple[dict[str, Tensor], str], tmp_path: Path) -> None:
    tensors, path = source
    usual = {"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_state_dict_path": path}
    shared = tmp_path / "shared.safetensors"
    save_file({"prompt_embeddings": tensors["prompt_embeddings"]}, shared)
    made(**{**usual, "prompt_tuning_init": "ONLY_SOURCE_SHARED", "prompt_tuning_init_state_dict_path": str(shared)})  # that is enough
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"prompt_tuning_init_state_dict_path": None}, ConfigError, "'EXACT_SOURCE_TASK' needs prompt_tuning_init_state_dict_path"),
        ({"prompt_tuning_init_state_dict_path": str(tmp_path / "nowhere.bin")}, AdapterFileError, "nowhere.bin' is no file"),
        ({"prompt_tuning_init_state_dict_path": str(broken)}, AdapterFileError, "can't be read as tensors"),
        ({"prompt_tuning_init_state_dict_path": str(shared)}, AdapterWeightsError, "has no 'prefix_task_cols' and no 'prefix_task_rows'"),
        ({"prompt_tuning_init_task": 4}, AdapterWeightsError, "prompt_tuning_init_task=4, but .* has 4 tasks; give one of 0 to 3"),
        ({"prompt_tuning_init_task": -1}, ConfigError, "is not the index of a task"),
        ({"num_ranks": 5}, AdapterWeightsError, r"'prefix_task_cols' .* is \(4, 3, 2\), but the new prompt needs \(4, 3, 5\)"),
        ({"num_virtual_tokens": 4}, AdapterWeightsError, r"'prompt_embeddings' .* is \(3, 32\), but the new prompt needs \(4, 32\)"),
        ({"prompt_tuning_init": "EXACT_SOURCE_TASKS"}, ConfigError, "did you mean 'EXACT_SOURCE_TASK'"),
        ({"num_tasks": 0}, ConfigError, "num_tasks"),
        ({"num_ranks": 0}, ConfigError, "num_ranks"),
    ]
    for changes, error, message in wrong:
        base = tiny("llama")
        before = dict(base.named_modules()).keys()
        with pytest.raises(error, match=message):
            get_peft_model(base, get_peft_config({**PLAIN, **usual, **changes}))
        assert dict(base.named_modules()).keys() == before


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "source.bin"
    torch.save({"prompt_embeddings": Path("/")}, path)  # a class that is no tensor
    with pytest.raises(AdapterFileError, match="can't be read as tensors"):
        made(prompt_tuning_init="ONLY_SOURCE_SHARED", prompt_tuning_init_state_dict_path=str(path))
