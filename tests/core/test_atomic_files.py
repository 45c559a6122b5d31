"""A reader of a folder sees the files of the last save that succeeded, all of them or none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import support
from peft_core import PeftModel, get_peft_model
from support import DenseConfig


@pytest.fixture
def model() -> PeftModel:
    model = get_peft_model(support.net(), DenseConfig(target_modules=["last"]))
    model.add_adapter("other", DenseConfig(target_modules=["up"]))
    return model


def failing_at(call: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `original`, except that its `call`-th call raises."""
    calls = 0

    def function(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError("the disk is full")
        return original(*args, **kwargs)

    return function


@pytest.mark.parametrize("call", range(1, 11))
def test_a_rename_that_fails_leaves_the_old_files(model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    model.save_pretrained(tmp_path)
    before = support.files_in(tmp_path)
    support.randomise(model, "default")
    support.randomise(model, "other")
    monkeypatch.setattr(os, "replace", failing_at(call, os.replace))
    try:
        model.save_pretrained(tmp_path)
    except OSError:
        assert support.files_in(tmp_path) == before
    else:
        assert call > 5  # fewer renames than that: nothing failed, and nothing of the old is left
        assert support.files_in(tmp_path).keys() == before.keys()
        assert support.files_in(tmp_path) != before


@pytest.mark.parametrize("call", [1, 2])
def test_a_weight_file_that_can_not_be_written_leaves_the_old_files(
    model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    import safetensors.torch

    model.save_pretrained(tmp_path)
    before = support.files_in(tmp_path)
    support.randomise(model, "default")
    monkeypatch.setattr(safetensors.torch, "save_file", failing_at(call, safetensors.torch.save_file))
    with pytest.raises(OSError, match="disk is full"):
        model.save_pretrained(tmp_path)
    assert support.files_in(tmp_path) == before


def test_a_text_file_that_can_not_be_written_leaves_the_old_files(model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.save_pretrained(tmp_path)
    before = support.files_in(tmp_path)
    support.randomise(model, "default")
    monkeypatch.setattr(Path, "write_text", failing_at(2, Path.write_text))
    with pytest.raises(OSError, match="disk is full"):
        model.save_pretrained(tmp_path)
    assert support.files_in(tmp_path) == before


def test_a_first_save_that_fails_leaves_no_file(model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", failing_at(2, os.replace))
    with pytest.raises(OSError, match="disk is full"):
        model.save_pretrained(tmp_path)
    assert support.files_in(tmp_path) == {}


def test_saving_leaves_no_temporary_files(model: PeftModel, tmp_path: Path) -> None:
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert not [name for name in support.files_in(tmp_path) if Path(name).name.startswith(".")]


def test_other_files_in_the_folder_stay(model: PeftModel, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_interrupt_leaves_the_old_files(model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.save_pretrained(tmp_path)
    before = support.files_in(tmp_path)
    support.randomise(model, "default")

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    import safetensors.torch

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    assert support.files_in(tmp_path) == before


@pytest.mark.parametrize("name", ["a/../b", "/tmp/outside", "..", "a\\b"])
def test_no_adapter_name_leads_out_of_the_folder(model: PeftModel, name: str) -> None:
    with support.Unchanged(model), pytest.raises(ValueError, match="can't be the name of an adapter"):
        model.add_adapter(name, DenseConfig(target_modules=["last"]))
