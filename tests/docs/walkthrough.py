"""Follow a page to the letter in an empty working directory: `python walkthrough.py PAGE` (`nox -s walkthrough`).

From top to bottom: blocks that name a file are written, bash blocks are run. Then the Python blocks run in one process, with the interpreter of
the environment that the page has made: what they import is what the page has installed there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from pages import ROOT, Block, Page

#: the interpreter of the page's second environment
FRESH = "fresh/bin/python"


def main(name: str, fresh: str = FRESH) -> int:
    """Follow a page; the exit status.

    Args:
        name: the page, from the root of the repository.
        fresh: the interpreter that runs the Python blocks, from the working directory.
    """
    if os.listdir():
        raise SystemExit(f"{os.getcwd()} is not empty: {sorted(os.listdir())[:5]}")
    page = Page(ROOT / name)
    commands = [number for number, block in enumerate(page.blocks) if block.language == "bash"]
    code = [number for number, block in enumerate(page.blocks) if block.language == "python" and not block.file]
    if commands and code and commands[-1] > code[0]:
        raise SystemExit(f"{name}:{page.blocks[commands[-1]].line}: a command below the first Python block would be run before it")
    for block in page.blocks:
        if block.file:
            path = Path(block.file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.code, encoding="utf-8")
        elif block.language == "bash":
            run(page, block)
    # a path and not the link's target: an interpreter knows its environment by where it was called
    return subprocess.run([os.path.abspath(fresh), str(Path(__file__).with_name("run_page.py")), name, "--installed"], check=False).returncode


def run(page: Page, block: Block) -> None:
    """Run the commands of a block as one script, which ends at the first that fails."""
    print(f"{page.name}:{block.line}\n{block.code}", flush=True)
    status = subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=False).returncode
    if status:
        raise SystemExit(f"{page.name}:{block.line}: exit status {status}\n{block.code}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
