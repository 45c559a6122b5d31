"""The commands that write adapters and models: `merge` and `convert`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

pytest.importorskip("typer", reason="the command line is an extra of peft-core")

from peft_core import get_peft_config, get_peft_model
from peft_core.testing import tiny
from peft_core.testing.helpers import randomise
from support import files_in
from together.commands import IDS, LORA, checks, report, rewrite, run, saved

# ---- merge ------------------------------------------------------------------------------------------------------------


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def loaded(folder: Path, task: str = "AutoModelForCausalLM") -> nn.Module:
    import transformers

    model: nn.Module = getattr(transformers, task).from_pretrained(folder)
    return model


@pytest.mark.parametrize("fields", [{}, {"peft_type": "LOHA"}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_a_merged_model_computes_the_same(here: Path, fields: dict[str, Any]) -> None:
    model = saved(here / "a", **fields)
    found = report("merge", "a", "--base", "base", "--out", "merged", "--safe")
    assert "tokenizer_config.json" in found["files"]
    torch.testing.assert_close(logits(loaded(here / "merged")), logits(model), rtol=0, atol=1e-5)
    assert logits(tiny()).sub(logits(model)).abs().max() > 1e-3
    assert sorted(path.name for path in here.iterdir()) == ["a", "base", "merged", "my-adapter"]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_tied_embeddings_that_an_adapter_parted_stay_apart(here: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    base.save_pretrained(here / "tied")
    model = get_peft_model(base, get_peft_config({**LORA, "target_modules": ["lm_head"]}))
    randomise(model, "default", 3)
    model.save_pretrained(here / "a", save_embedding_layers=False)
    assert run("merge", "a", "--base", "tied", "--out", "merged").exit_code == 0
    torch.testing.assert_close(logits(loaded(here / "merged")), logits(model), rtol=0, atol=1e-5)


def test_a_classifier_is_merged_into_a_base_without_a_head(here: Path) -> None:
    tiny("bert").save_pretrained(here / "bert")
    model = saved(here / "a", "bert-seq-cls", task_type="SEQ_CLS", target_modules=["query"])
    assert run("merge", "a", "--base", "bert", "--out", "merged").exit_code == 0
    torch.testing.assert_close(logits(loaded(here / "merged", "AutoModelForSequenceClassification")), logits(model), rtol=0, atol=1e-5)


def test_nothing_random_is_written(here: Path) -> None:
    tiny("bert").save_pretrained(here / "bert")
    saved(here / "a", "bert-seq-cls", task_type="SEQ_CLS", target_modules=["query"])
    rewrite(here / "a", lambda tensors: tensors.pop("base_model.model.classifier.bias"))
    done = run("merge", "a", "--base", "bert", "--out", "merged")
    assert done.exit_code == 2
    assert "classifier.bias" in done.stderr
    assert not (here / "merged").exists()


def test_the_adapters_in_use_of_a_stack_are_merged(here: Path) -> None:
    model = saved(here / "stack")
    model.add_adapter("ha", get_peft_config({**LORA, "peft_type": "LOHA"}))
    randomise(model, "ha", 2)
    model.set_adapter(["default", "ha"])
    model.save_pretrained(here / "stack")
    assert report("merge", "stack", "--base", "base", "--out", "merged")["merged"] == ["default", "ha"]
    torch.testing.assert_close(logits(loaded(here / "merged")), logits(model), rtol=0, atol=1e-5)


def test_a_prompt_can_not_be_merged(here: Path) -> None:
    get_peft_model(tiny(), get_peft_config({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3})).save_pretrained("a")
    done = run("merge", "a", "--base", "base", "--out", "merged")
    assert done.exit_code == 2
    assert "can't be merged" in done.stderr


# ---- convert ----------------------------------------------------------------------------------------------------------


def test_there_and_back_gives_the_same_bytes(here: Path) -> None:
    assert run("convert", "my-adapter", "old", "--format", "bin").exit_code == 0
    assert run("convert", "old", "new").exit_code == 0
    before, after = (load_file(here / name / "adapter_model.safetensors") for name in ("my-adapter", "new"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_folder_is_converted_in_place(here: Path) -> None:
    shutil.copy(here / "my-adapter" / "README.md", here / "my-adapter" / "notes.txt")
    assert run("convert", "my-adapter", "my-adapter", "--format", "bin", "--dtype", "float16").exit_code == 0
    assert sorted(files_in(here / "my-adapter")) == ["README.md", "adapter_config.json", "adapter_model.bin", "notes.txt"]
    assert checks("my-adapter", "--base", "base")["base"][0] == "ok"


def test_renaming_and_back(here: Path) -> None:
    assert report("convert", "my-adapter", "a", "--rename", r"^model\.layers\.(\d+)=transformer.h.\1")["adapters"][0]["renamed"] == 4
    assert "base_model.model.transformer.h.0.self_attn.q_proj.lora_A.weight" in load_file(here / "a" / "adapter_model.safetensors")
    assert checks("a", "--base", "base", code=1)["base"][0] == "fault"
    assert run("convert", "a", "a", "--rename", r"^transformer\.h=model.layers").exit_code == 0
    assert checks("a", "--base", "base")["base"][0] == "ok"


def test_the_passport_is_kept(here: Path) -> None:
    assert run("convert", "my-adapter", "a", "--dtype", "bfloat16").exit_code == 0
    (before,), (after,) = report("inspect", "my-adapter")["adapters"], report("inspect", "a")["adapters"]
    assert (before["writer"], before["base"]) == (after["writer"], after["base"])
    assert {tensor["dtype"] for tensor in after["tensors"]} == {"bfloat16"}


def test_values_that_do_not_fit_a_dtype_are_refused(here: Path) -> None:
    rewrite(here / "my-adapter", lambda tensors: tensors[next(iter(tensors))].fill_(1e6))
    done = run("convert", "my-adapter", "a", "--dtype", "float16")
    assert done.exit_code == 2
    assert "too large for float16" in done.stderr
    assert not (here / "a").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no permissions to take away")
def test_a_failure_while_writing_leaves_the_old_files(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_in(here)

    def fails(*words: Any, **named: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    for target in ("my-adapter", "new"):
        done = run("convert", "my-adapter", target, "--dtype", "float16")
        assert done.exit_code == 2
        assert "the disk is full" in done.stderr
    assert files_in(here) == before
    assert not (here / "new").exists()
