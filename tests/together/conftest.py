"""A working directory for the tests of the commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_core.testing import tiny
from together.commands import saved


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `base/` and `my-adapter/`."""
    tiny().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    saved(tmp_path / "my-adapter")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    return tmp_path
