"""Run the Python blocks of one page in this process, from top to bottom, in one namespace: `python run_page.py PAGE`.

A block that is a file (`Block.file`) is written to the working directory instead. A `pyproject.toml` is also "installed": its metadata is
written into `src`, as `pip install -e .` would do. Tests among the files are run with pytest at the end. With `--installed` nothing is written or
tested: the files are there, and the package that they make is installed (`walkthrough.py`).
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

#: where what a page writes is imported from
PLACES = [os.getcwd(), os.path.join(os.getcwd(), "src")]
_LENIENT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def main(name: str, *, installed: bool = False) -> int:
    """Run a page; the exit status.

    Args:
        name: the page, from the root of the repository.
        installed: the page's files are there, and what is in `src` is imported from where it is installed.
    """
    page = Page(ROOT / name)
    sys.path[:0] = PLACES[:1] if installed else PLACES
    space: dict[str, Any] = {"__name__": "__main__"}
    tests: list[str] = []
    for block in page.blocks:
        if block.file:
            if not installed:
                write(block)
                tests += [block.file] if Path(block.file).name.startswith("test_") else []
        elif block.language == "python":
            run(page, block, space)
    if installed:
        strays = [key for key, module in sys.modules.items() if (getattr(module, "__file__", None) or "").startswith(PLACES[1] + os.sep)]
        if strays:
            raise SystemExit(f"{name}: imported from {PLACES[1]} and not from where they are installed: {strays}")
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
    info = Path("src", f"{project['name'].replace('-', '_')}-{project['version']}.dist-info")
    info.mkdir(parents=True)
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

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(PLACES)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", *files]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], installed="--installed" in sys.argv[2:]))
