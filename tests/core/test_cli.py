"""The command line where typer is missing, and what of it needs no torch; the commands themselves: `tests/together/test_cli.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

import support

BLOCKED = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_extra_it_says_what_to_install(missing: str) -> None:
    code = f"""
        import contextlib, io, sys
        sys.modules["typer"] = sys.modules["rich"] = None
        if {missing!r} == "rich":
            import types
            sys.modules["typer"] = types.ModuleType("typer")
        from peft_core.cli import main
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            status = main()
        print(status, said.getvalue())
    """
    said = support.run_python(code)
    assert said == f'2 the command peft-core needs {missing}: pip install "peft-core[cli]"'


def test_the_overview_needs_no_torch_and_imports_no_plugin(tmp_path: Path) -> None:
    support.distribution(tmp_path, "peft-zip", tuners={"zip": "zip_plugin"}, plugins={"ear": "zip_ear"}, modules={"zip_ear": "raise RuntimeError"})
    code = (
        "from peft_core.cli.overview import overview\nfound = overview()\n"
        "rows = [r for r in (*found['tuners'], *found['plugins']) if r['distribution'] == 'peft-zip']\n"
        "print(found['ok'], [(r['name'], r['state']) for r in rows], 'zip_plugin' in sys.modules)"
    )
    assert support.run_python(BLOCKED + code, path=tmp_path) == "True [('zip', 'available'), ('ear', 'available')] False"


@pytest.mark.parametrize(
    ("switch", "requires", "state", "ok"),
    [("", (), "available", True), ("-peft-zip", (), "off", True), ("", ("peft-core>=9",), "incompatible", False)],
)
def test_the_overview_knows_states_without_importing(tmp_path: Path, switch: str, requires: tuple[str, ...], state: str, ok: bool) -> None:
    support.distribution(tmp_path, "peft-zip", tuners={"zip": "zip_plugin"}, requires=requires)
    code = "from peft_core.cli.overview import overview\nf = overview()\nprint([r['state'] for r in f['tuners'] if r['name'] == 'zip'], f['ok'])"
    assert support.run_python(code, path=tmp_path, PEFT_CORE_PLUGINS=switch) == f"['{state}'] {ok}"


def test_the_overview_shows_both_owners_of_a_type(tmp_path: Path) -> None:
    for name in ("peft-zip", "other-zip"):
        support.distribution(tmp_path, name, tuners={"zip": "zip_plugin"})
    code = """
        from peft_core.cli.overview import overview
        print([(row["distribution"], row["state"], row["detail"]) for row in overview()["tuners"] if row["name"] == "zip"])
    """
    assert support.run_python(code, path=tmp_path) == (
        "[('other-zip', 'conflict', 'also offered by peft-zip 1.0'), ('peft-zip', 'conflict', 'also offered by other-zip 1.0')]"
    )
