"""No module of a package knows itself through others, imports in functions and for annotations included."""

from __future__ import annotations

import graphlib

import grimp
import pytest

PACKAGES = ("peft_core", "peft_lora", "peft_loha", "peft_prompt", "peft_tokens")


def import_graph(package: str) -> dict[str, set[str]]:
    """Return module → the modules of the same package that it imports, anywhere in its text."""
    graph = grimp.build_graph(package, include_external_packages=False, exclude_type_checking_imports=False, cache_dir=None)
    return {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_through_others(package: str) -> None:
    try:
        graphlib.TopologicalSorter(import_graph(package)).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


def test_a_circle_is_found() -> None:
    graph = import_graph("peft_core")
    graph["peft_core.errors"].add("peft_core.models.factory")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()
