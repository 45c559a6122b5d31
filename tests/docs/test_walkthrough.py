"""`walkthrough.py` does what a reader does, in the page's order, and says on which line it fails. The real page: `nox -s walkthrough`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import walkthrough

Follow = Callable[[str], int]


@pytest.fixture
def follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Follow:
    """Follows a page with this text in an empty folder, with this interpreter as the fresh one."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    page = tmp_path / "page.md"

    def run(text: str) -> int:
        page.write_text(text)
        return walkthrough.main(str(page), sys.executable)

    return run


def test_in_the_order_of_the_page(follow: Follow) -> None:
    file = "```python src/a/one.py\nX = 1\n```\n"
    commands = "```bash\ncp src/a/one.py seen.py\n```\n"
    later = file.replace("X = 1", "X = 2")
    code = "```python\nimport seen\nassert seen.X == 1\nassert open('src/a/one.py').read() == 'X = 2\\n'\n```\n"
    assert follow(file + commands + later + code) == 0


def test_a_command_that_fails_is_named_by_its_line(follow: Follow) -> None:
    with pytest.raises(SystemExit, match=r"page\.md:2: exit status 3"):
        follow("```bash\n(exit 3)\necho not reached > out\n```\n")
    assert os.listdir() == []


def test_python_that_fails_is_a_failure(follow: Follow) -> None:
    assert follow("```python\nassert False\n```\n") != 0


def test_what_is_in_src_must_come_from_where_it_is_installed(follow: Follow) -> None:
    assert follow("```python src/one.py\nX = 1\n```\n```python\nimport sys; sys.path.append('src'); import one\n```\n") != 0


def test_refused_where_the_folder_is_not_empty_or_the_order_would_be_another(follow: Follow) -> None:
    with pytest.raises(SystemExit, match="below the first Python block"):
        follow("```python\nX = 1\n```\n```bash\ntrue\n```\n")
    Path("left").touch()
    with pytest.raises(SystemExit, match="is not empty"):
        follow("")
