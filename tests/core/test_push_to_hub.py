"""Uploading takes the adapter's folder, never the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

import support
from peft_core import get_peft_model


def test_the_adapter_is_uploaded_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Hub:
        def __init__(self, token: Any = None) -> None:
            seen["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> None:
            seen["created"] = (repo_id, options)

        def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> str:
            seen["files"] = sorted(path.name for path in Path(folder_path).iterdir())
            return repo_id

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    model = get_peft_model(support.net(), support.DenseConfig(target_modules=["last"]))
    assert model.push_to_hub("me/adapter", token="secret", private=True) == "me/adapter"
    assert seen["token"] == "secret"
    assert seen["created"] == ("me/adapter", {"private": True, "exist_ok": True})
    assert seen["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(("options", "repository"), [({}, "my-adapter"), ({"repo_id": "me/other", "private": True}, "me/other")])
def test_saving_can_upload(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: dict[str, Any], repository: str) -> None:
    seen: list[Any] = []

    class Hub:
        def __init__(self, token: Any = None) -> None: ...

        def create_repo(self, repo_id: str, **options: Any) -> None:
            seen.append((repo_id, options["private"]))

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> None:
            seen.append((repo_id, folder_path))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    model = get_peft_model(support.net(), support.DenseConfig(target_modules=["last"]))
    folder = tmp_path / "my-adapter"
    model.save_pretrained(folder, is_main_process=False, push_to_hub=True, **options)
    assert seen == []
    model.save_pretrained(folder, push_to_hub=True, **options)
    assert seen == [(repository, options.get("private")), (repository, folder)]


def test_saving_takes_the_keywords_of_scripts_that_save_whole_models(tmp_path: Path) -> None:
    """accelerate's examples pass `save_function`, the CLI of others `max_shard_size`: adapters have no use for them."""
    model = get_peft_model(support.net(), support.DenseConfig(target_modules=["last"]))
    model.save_pretrained(tmp_path, save_function=torch.save, max_shard_size="1GB", push_to_hub=False)
    assert (tmp_path / "adapter_config.json").is_file()
    with pytest.raises(TypeError, match=r"unexpected keyword argument\(s\) 'save_functoin'; did you mean 'save_function'"):
        model.save_pretrained(tmp_path / "other", save_functoin=torch.save)
    assert not (tmp_path / "other").exists()
