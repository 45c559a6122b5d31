"""Find child layers whose weight the parent module reads directly (for a fused kernel): an adapter layer around such a child is bypassed."""

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

#: attributes and methods of a weight that code may read without computing with the weight
_PROPERTIES = frozenset({"dtype", "device", "shape", "size", "ndim", "dim", "numel", "is_meta", "requires_grad", "grad", "data_ptr", "element_size"})
#: functions that only inspect a weight and do not compute with it
_QUESTIONS = frozenset({"isinstance", "hasattr", "getattr", "setattr", "super", "type", "id", "len", "print"})
#: name prefixes of methods that do not run as a part of the module's forward pass
_NOT_CALLED = (
    *("__init__", "__repr__", "extra_repr", "init_", "_init", "reset_", "_reset", "tie_", "_tie", "load_", "_load", "set_", "get_"),
    *("fuse_", "unfuse_"),  # they make one layer of several, when somebody calls them
)
#: the child layers of a state-space mixer (Mamba); its fused kernels take the weights of `conv1d` and `out_proj`
_MIXER = frozenset({"in_proj", "conv1d", "out_proj"})


@dataclass(frozen=True)
class WeightUse:
    """How a module's code uses the weight of one of its child layers.

    Args:
        by_kernel: whether the weight is passed to a function outside torch (a fused kernel).
        in_training: whether the weight is read in training mode only.
        called: whether the code also calls the layer somewhere, or hands the module over to other code, which may do so.
    """

    by_kernel: bool
    in_training: bool
    called: bool


def weight_uses(parent: nn.Module) -> dict[str, WeightUse]:
    """Return a dict: child name → how the code of `parent` computes with that child's weight. Children that are only called are not in it.

    The answer is read from the source code of the class. If the class defines no `forward`, or its source is not available, the answer depends on the
    names of its children only.
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
    elsewhere = False
    for kind in cls.__mro__:
        if kind.__module__.partition(".")[0] == "torch":
            break
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
        except (OSError, TypeError, SyntaxError):
            return None
        reads.extend(_reads(tree))
        calls = [node for method in _methods(tree) for node in ast.walk(method) if isinstance(node, ast.Call)]
        called.update(name for call in calls if (name := _attribute_of_self(call.func)))
        elsewhere = elsewhere or any(_hands_over_self(call) for call in calls)
    names = {name for name, _, _ in reads}
    return {
        name: WeightUse(
            by_kernel=any(kernel for other, kernel, _ in reads if other == name),
            in_training=all(training for other, _, training in reads if other == name),
            called=elsewhere or name in called,
        )
        for name in names
    }


def _methods(tree: ast.AST) -> list[ast.FunctionDef]:
    """Return the methods of classes in `tree` that may run as a part of the forward pass."""
    kinds = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return [node for kind in kinds for node in kind.body if isinstance(node, ast.FunctionDef) and not node.name.startswith(_NOT_CALLED)]


def _hands_over_self(call: ast.Call) -> bool:
    """Return whether `self` is an argument of a call, which may then call the children itself (attention processors of diffusers do)."""
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    return ast.unparse(call.func) not in _QUESTIONS and any(isinstance(one, ast.Name) and one.id == "self" for one in given)


def _reads(tree: ast.AST) -> Iterator[tuple[str, bool, bool]]:
    """Yield (child name, whether a kernel takes the weight, whether this is under ``if self.training``) for each use of a weight in a method."""
    for method in _methods(tree):
        parents = {id(child): node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(method):
            child = _attribute_of_self(node.value) if isinstance(node, ast.Attribute) and node.attr == "weight" else None
            if child is None:
                continue
            above: list[ast.AST] = [node]
            while id(above[-1]) in parents:
                above.append(parents[id(above[-1])])
            kernel = _by_kernel(above)
            if kernel is not None:
                yield child, kernel, _in_training(above)


def _attribute_of_self(node: ast.AST) -> str | None:
    """Return the name in ``self.<name>``; None for other expressions."""
    return node.attr if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self" else None


def _by_kernel(above: list[ast.AST]) -> bool | None:
    """Return whether a function outside torch takes a weight; None if nothing computes with it.

    `above` lists the syntax-tree nodes from the weight up to the root.
    """
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
