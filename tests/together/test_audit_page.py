"""The section of docs/plugins.md on the audit log, played as a reader would: install, run the script, read the log."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import support

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "examples" / "plugins" / "peft-audit-log"


def blocks() -> dict[str, list[str]]:
    """Return the blocks of the section by their language."""
    section = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8").partition("\n## An audit log\n")[2].partition("\n## ")[0]
    found: dict[str, list[str]] = {}
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL):
        found.setdefault(language, []).append(code)
    return found


def test_the_log_is_what_the_page_shows(tmp_path: Path) -> None:
    (commands,), (script,), (lines,) = (blocks()[language] for language in ("bash", "python", "text"))
    install, start = commands.splitlines()
    assert install.split() == ["pip", "install", f"./{PACKAGE.relative_to(ROOT).as_posix()}"]
    support.distribution(
        tmp_path / "site", "peft-audit-log", plugins={"audit-log": "peft_audit_log.plugin"}, requires=("peft-core>=0.1,<0.2",), version="0.1.0"
    )
    name = script.partition("\n")[0].removeprefix("# ")
    (tmp_path / name).write_text(script)
    setting, program, file = start.split()
    variable, _, log = setting.partition("=")
    assert (program, file) == ("python", name)
    path = os.pathsep.join([str(tmp_path / "site"), str(PACKAGE / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", variable: log}
    for command in ([sys.executable, "-W", "error", file], [sys.executable, "-m", "peft_audit_log", log]):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    written = (tmp_path / log).read_text(encoding="utf-8")
    assert doctest.OutputChecker().check_output(lines, written, doctest.ELLIPSIS), written
    assert len(written.splitlines()) == len(lines.splitlines()), "`...` must not stand for whole lines"
