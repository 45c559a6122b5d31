"""The tuner of LoRA and its hooks know contracts, not methods. (Circles: tests/architecture/test_circles.py.)"""

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


@pytest.mark.parametrize("name", ["tuner", "contracts", "extensions", "offers", "hookspecs"])
def test_what_is_for_all_methods_imports_none(name: str) -> None:
    known = modules(SOURCE)
    assert [each for each in imported(f"peft_lora.{name}", known) if each.startswith(("peft_lora.variants", "peft_lora.initializers"))] == []
