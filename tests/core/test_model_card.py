"""The README.md beside saved adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import support
from peft_core import PeftModel, get_peft_model
from support import DenseConfig


@pytest.fixture
def model() -> PeftModel:
    base = support.llama()
    base.config._name_or_path = "acme/tiny"
    return get_peft_model(base, DenseConfig(task_type="CAUSAL_LM"))


def header(folder: Path) -> dict:
    from huggingface_hub import ModelCard

    return ModelCard.load(folder / "README.md").data.to_dict()


def test_the_header_is_for_the_hub(model: PeftModel, tmp_path: Path) -> None:
    model.create_or_update_model_card(tmp_path)
    found = header(tmp_path)
    assert (found["library_name"], found["base_model"], found["pipeline_tag"]) == ("peft", "acme/tiny", "text-generation")
    assert found["tags"] == sorted(found["tags"])
    assert {"base_model:adapter:acme/tiny", "transformers"} <= set(found["tags"])


def test_writing_twice_changes_nothing(model: PeftModel, tmp_path: Path) -> None:
    model.create_or_update_model_card(tmp_path)
    once = (tmp_path / "README.md").read_bytes()
    model.create_or_update_model_card(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == once


def test_the_version_is_there_once(model: PeftModel, tmp_path: Path) -> None:
    for _ in range(3):
        model.create_or_update_model_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("### Framework versions") == 1
    assert text.count("- PEFT ") == 1


def test_what_the_user_wrote_stays(model: PeftModel, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n\n# My adapter\n\nHow it was made.\n")
    model.create_or_update_model_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "# My adapter\n\nHow it was made." in text
    assert header(tmp_path)["license"] == "mit"
    assert "mine" in header(tmp_path)["tags"]


def test_a_card_without_header_gets_one(model: PeftModel, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My adapter\n")
    model.create_or_update_model_card(tmp_path)
    assert header(tmp_path)["library_name"] == "peft"
    assert "# My adapter" in (tmp_path / "README.md").read_text()


def test_a_base_without_name_leaves_the_name_out(tmp_path: Path) -> None:
    get_peft_model(support.llama(), DenseConfig()).create_or_update_model_card(tmp_path)
    assert "base_model" not in header(tmp_path)
    assert not any(tag.startswith("base_model:adapter") for tag in header(tmp_path)["tags"])


def test_quantisation_is_described_once(model: Any, tmp_path: Path) -> None:
    model.get_base_model().config.quantization_config = {"load_in_4bit": True}
    for _ in range(2):
        model.create_or_update_model_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("quantization config was used during training") == 1
    assert text.count("- load_in_4bit: True") == 1


def test_saving_writes_it(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert header(tmp_path)["library_name"] == "peft"
