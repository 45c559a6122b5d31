"""README and docs say what is so: their code runs, their commands and links exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import urldefrag

import pages
import pytest
import reference
from pages import ROOT, Page

try:
    import tomllib
except ImportError:  # Python 3.10: pytest brings its twin along
    import tomli as tomllib

PAGES = {page.name: page for page in pages.pages()}
RUNNABLE = [name for name, page in PAGES.items() if any(block.language == "python" for block in page.blocks)]
#: what a reader can be told to type, as the first word of a command
PROGRAMS = {"python", "pip", "nox", "pytest", "cd", "git"}
#: what `python -m` can start
MODULES = {"build", "pip", "nox", "pytest", "venv"}


@pytest.mark.parametrize("name", RUNNABLE)
def test_its_code_runs(name: str, tmp_path: Path) -> None:
    """All Python blocks, in order, in a fresh process without network; warnings are errors."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-W", "error", str(Path(__file__).with_name("run_page.py")), name]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("name", PAGES)
def test_every_block_says_what_it_is(name: str) -> None:
    """A block without a known language would be checked by nobody."""
    strange = [
        f"line {b.line}: {b.language!r}" for b in PAGES[name].blocks if b.language not in ("python", "bash", "toml", "text", "json", "mermaid")
    ]
    assert not strange


@pytest.mark.parametrize("name", PAGES)
def test_its_toml_parses(name: str) -> None:
    for block in PAGES[name].blocks:
        if block.language == "toml":
            tomllib.loads(block.code)


@pytest.mark.parametrize("name", PAGES)
def test_its_commands_exist(name: str) -> None:
    """Programs, nox sessions, and files of the checkout in bash blocks; none of them is run."""
    for block in PAGES[name].blocks:
        if block.language == "bash":
            for offset, line in enumerate(block.code.splitlines()):
                for command in re.split(r"&&|\|\||;", line.split("  #")[0]):
                    fault = fault_of(shlex.split(command, comments=True))
                    assert fault is None, f"{name}:{block.line + offset}: {fault}"


def fault_of(words: list[str]) -> str | None:
    """Return what is wrong with a command, or None."""
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    if not words:
        return None
    program, *rest = words
    program = re.sub(r"^(?:\.\./)?[\w.-]+/bin/", "", program)  # of a virtual environment that the page has made
    if program == "python" and rest[:1] == ["-m"]:
        program, rest = rest[1], rest[2:]
        if program not in MODULES:
            return f"python -m {program} is not known here"
    if program not in PROGRAMS | MODULES:
        return f"{program} is not known here"
    if program == "nox":
        rest = rest[: rest.index("--")] if "--" in rest else rest
        named = [word for word in rest[rest.index("-s") + 1 :] if not word.startswith("-")] if "-s" in rest else []
        unknown = set(named) - pages.sessions()
        return f"no nox session is called {sorted(unknown)}" if unknown else None
    missing = [word for word in rest if word.startswith(("./", "examples/", "scripts/", "bench/", "tests/")) and not (ROOT / word).exists()]
    return f"{missing} does not exist" if missing else None


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("python -m nox -s tests lint -- -k x", None),
        ("PEFT_CORE_PLUGINS=none python -c pass", None),
        ("nox -s no-such-session", "no nox session"),
        ("python -m peft_core_cli", "not known"),
        ("../fresh/bin/python -m pytest", None),
        ("../fresh/bin/peft-core plugins", "not known"),
        ("peft-core plugins", "not known"),
        ("pip install ./packages/peft-nothing", "does not exist"),
    ],
)
def test_a_wrong_command_is_seen(command: str, fault: str | None) -> None:
    found = fault_of(shlex.split(command))
    assert found is None if fault is None else fault in (found or "")


@pytest.mark.parametrize("name", PAGES)
def test_sessions_named_in_its_text_exist(name: str) -> None:
    named = {word for words in re.findall(r"nox -s ((?:[a-z][a-z-]*[ `]?)+)", PAGES[name].prose) for word in words.strip("` ").split()[:1]}
    assert named <= pages.sessions()


@pytest.mark.parametrize("name", PAGES)
def test_its_links_lead_somewhere(name: str) -> None:
    """Relative ones, and the headings that they name."""
    page = PAGES[name]
    for link in page.links:
        if re.match(r"[a-z]+:", link):
            continue
        target, anchor = urldefrag(link)
        path = (page.path.parent / target).resolve() if target else page.path
        assert path.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in Page(path).anchors | reference.anchors(path), f"{link}: no such heading"


def test_every_page_can_be_reached_from_the_readme() -> None:
    """Those of the API reference from its entry page; `index.md` is the site's own README (see test_site.py)."""
    linked = {(ROOT / urldefrag(link)[0]).resolve() for link in PAGES["README.md"].links}
    apart = {ROOT / "docs" / "index.md"}
    assert [page.name for page in PAGES.values() if page.path.parent.name == "docs" and page.path not in linked | apart] == []
