"""Run the Python blocks of one page in this process, from top to bottom, in one namespace: `python run_page.py PAGE`.

A block whose first line is a file name (``# peft_diag/layer.py``) is written to the working directory instead. A `pyproject.toml` is also
"installed": its metadata is written beside it, as `pip install -e .` would do. Tests among the files are run with pytest at the end.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from pages import ROOT, Block, Page

try:
    import tomllib
except ImportError:  # Python 3.10: pytest brings its twin along
    import tomli as tomllib

_LENIENT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def main(name: str) -> int:
    """Run a page; the exit status."""
    page = Page(ROOT / name)
    sys.path.insert(0, os.getcwd())
    space: dict[str, Any] = {"__name__": "__main__"}
    tests: list[str] = []
    for block in page.blocks:
        if block.file:
            write(block)
            tests += [block.file] if Path(block.file).name.startswith("test_") else []
        elif block.language == "python":
            run(page, block, space)
    return run_tests(tests) if tests else 0


def write(block: Block) -> None:
    """Put a block where its first line says."""
    assert block.file
    target = Path(block.file)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(block.code, encoding="utf-8")
    if target.name == "pyproject.toml":
        install(tomllib.loads(block.code)["project"])


def install(project: dict[str, Any]) -> None:
    """Write the metadata that an editable install of the working directory would have."""
    info = Path(f"{project['name'].replace('-', '_')}-{project['version']}.dist-info")
    info.mkdir()
    requires = [f"Requires-Dist: {text}" for text in project.get("dependencies", ())]
    (info / "METADATA").write_text(
        "\n".join(["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}", *requires]) + "\n"
    )
    groups = project.get("entry-points", {})
    (info / "entry_points.txt").write_text("".join(f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for g, points in groups.items()))


def run(page: Page, block: Block, space: dict[str, Any]) -> None:
    """Execute a block; its traceback shows the page's own lines. Compare what it prints with the text block that follows."""
    code = compile("\n" * (block.line - 1) + block.code, str(page.path), "exec", dont_inherit=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, space)
    if block.output is not None and not doctest.OutputChecker().check_output(block.output, printed.getvalue(), _LENIENT):
        raise SystemExit(f"{page.name}:{block.line}: expected\n{block.output}\nbut it prints\n{printed.getvalue()}")


def run_tests(files: list[str]) -> int:
    """Run the test files that the page wrote, as a reader would."""
    import subprocess

    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", *files]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
