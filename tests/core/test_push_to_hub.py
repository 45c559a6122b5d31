"""Uploading takes the adapter's folder, never the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

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
