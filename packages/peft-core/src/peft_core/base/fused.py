"""Layers whose weights a module's code computes with itself: what is wrapped around them is passed by."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

#: what is asked of a weight without computing with it
_PROPERTIES = frozenset({"dtype", "device", "shape", "size", "ndim", "dim", "numel", "is_meta", "requires_grad", "grad", "data_ptr", "element_size"})
#: functions that look at a weight and do not compute with it
_QUESTIONS = frozenset({"isinstance", "hasattr", "getattr", "type", "id", "len", "print"})
#: beginnings of the names of methods that are no part of a call of the module
_NOT_CALLED = ("__init__", "__repr__", "extra_repr", "init_", "_init", "reset_", "_reset", "tie_", "_tie", "load_", "_load", "set_", "get_")
#: the layers of a state-space mixer; its kernels take the weights of the last two
_MIXER = frozenset({"in_proj", "conv1d", "out_proj"})


@dataclass(frozen=True)
class WeightUse:
    """How a module's code uses the weight of one of its layers.

    Args:
        by_kernel: it is handed to a function that is none of torch's, a fused kernel.
        in_training: so it is in training only.
        called: elsewhere in the code the layer is called.
    """

    by_kernel: bool
    in_training: bool
    called: bool


def weight_uses(parent: nn.Module) -> dict[str, WeightUse]:
    """Return child → how the code of a module computes with its weight; children that are only called are not among them.

    Read from the source of its class. A class without a forward of its own, or without source, is judged by what it consists of.
    """
    cls: Any = type(parent)
    found = _of_class(cls)
    if found is None:
        return dict.fromkeys(("conv1d", "out_proj"), WeightUse(True, False, True)) if parent._modules.keys() >= _MIXER else {}
    return found


@functools.lru_cache(maxsize=512)
def _of_class(cls: type) -> dict[str, WeightUse] | None:
    if getattr(cls, "forward", None) is nn.Module.forward:
        return None
    reads: list[tuple[str, bool, bool]] = []
    called: set[str] = set()
    for kind in cls.__mro__:
        if kind.__module__.partition(".")[0] == "torch":
            break
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
        except (OSError, TypeError, SyntaxError):
            return None
        reads.extend(_reads(tree))
        called.update(name for node in ast.walk(tree) if isinstance(node, ast.Call) and (name := _attribute_of_self(node.func)))
    names = {name for name, _, _ in reads}
    return {
        name: WeightUse(
            any(kernel for other, kernel, _ in reads if other == name), all(training for other, _, training in reads if other == name), name in called
        )
        for name in names
    }


def _reads(tree: ast.AST) -> Iterator[tuple[str, bool, bool]]:
    """Yield (child, whether a kernel takes it, whether under ``if self.training``) for each weight that methods of a class compute with."""
    parents = {id(child): node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        child = _attribute_of_self(node.value) if isinstance(node, ast.Attribute) and node.attr == "weight" else None
        if child is None:
            continue
        above: list[ast.AST] = [node]
        while id(above[-1]) in parents:
            above.append(parents[id(above[-1])])
        methods = [one.name for one in above if isinstance(one, ast.FunctionDef)]
        kernel = _by_kernel(above)
        if methods and not methods[-1].startswith(_NOT_CALLED) and kernel is not None:
            yield child, kernel, _in_training(above)


def _attribute_of_self(node: ast.AST) -> str | None:
    """Return the name in ``self.<name>``; None for other expressions."""
    return node.attr if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self" else None


def _by_kernel(above: list[ast.AST]) -> bool | None:
    """Return whether a function that is not torch's takes a weight, the first of the nodes up to the root; None: nothing computes with it."""
    for inner, outer in itertools.pairwise(above):
        if isinstance(outer, ast.Attribute) and outer.attr in _PROPERTIES:
            return None
        if isinstance(outer, ast.Call) and inner is not outer.func:
            called = ast.unparse(outer.func)
            return None if called in _QUESTIONS else not called.startswith(("torch.", "F.", "nn."))
        if isinstance(outer, ast.BinOp) or (isinstance(outer, ast.Assign) and inner is outer.value):
            return False
        if isinstance(outer, (ast.Compare, ast.stmt)):
            return None
    return None


def _in_training(above: list[ast.AST]) -> bool:
    for inner, outer in itertools.pairwise(above):
        if isinstance(outer, ast.If) and inner in outer.body:
            parts = outer.test.values if isinstance(outer.test, ast.BoolOp) and isinstance(outer.test.op, ast.And) else [outer.test]
            if any(_attribute_of_self(part) == "training" for part in parts):
                return True
    return False
