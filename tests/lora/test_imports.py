"""How the modules of peft_lora know each other: in no circle, annotations included; the tuner and the hooks know contracts, not methods."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "packages" / "peft-lora" / "src"


def modules(source: Path) -> dict[str, Path]:
    """Return dotted name → file of all modules below a folder."""
    return {".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__"): path for path in source.rglob("*.py")}


def imported(name: str, known: dict[str, Path]) -> Iterator[str]:
    """Yield the modules of `known` that a module imports, wherever in it: at the top, in functions, for type checkers."""
    package = name.split(".") if known[name].name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(known[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*start, *filter(None, [node.module])])
            for alias in node.names:
                yield from [each for each in (f"{origin}.{alias.name}", origin) if each in known][:1]


def circular(source: Path) -> list[str]:
    """Return the modules that are left when those are taken away, again and again, that import none of the rest or that none of the rest imports."""
    known = modules(source)
    edges = {name: set(imported(name, known)) - {name} for name in known}
    while True:
        used = set().union(*edges.values())
        ends = {name for name, found in edges.items() if not found or name not in used}
        if not ends:
            return sorted(edges)
        edges = {name: found - ends for name, found in edges.items() if name not in ends}
        if not edges:
            return []


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circular(SOURCE) == []


def test_a_circle_is_seen(tmp_path: Path) -> None:
    files = {
        "__init__": "",
        "a": "from .b import x",
        "b": "def f():\n    from . import c",
        "c": "if TYPE_CHECKING:\n    import p.a",
        "d": "from .a import y",
    }
    (tmp_path / "p").mkdir()
    for name, text in files.items():
        (tmp_path / "p" / f"{name}.py").write_text(text)
    assert circular(tmp_path) == ["p.a", "p.b", "p.c"]


@pytest.mark.parametrize("name", ["tuner", "contracts", "extensions", "offers", "hookspecs"])
def test_what_is_for_all_methods_imports_none(name: str) -> None:
    known = modules(SOURCE)
    assert [each for each in imported(f"peft_lora.{name}", known) if each.startswith(("peft_lora.variants", "peft_lora.initializers"))] == []
