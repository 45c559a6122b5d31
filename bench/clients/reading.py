"""What Python source text asks of the module `peft`: imports, attributes of what it imported, and names in strings."""

from __future__ import annotations

import ast
import contextlib
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_PATH = re.compile(r"peft(\.[A-Za-z_]\w*)+")
_NOT_NAMES = (".py", ".json", ".log", ".safetensors", ".bin", ".md", ".yaml")
_CATCHING = ("ImportError", "ModuleNotFoundError", "AttributeError", "Exception", "BaseException")
_BY_NAME = {"getattr": "getattr", "hasattr": "hasattr", "setattr": "assigned", "delattr": "assigned", "object": "patched"}
_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@dataclass(frozen=True, order=True)
class Use:
    """One place where a file names something of `peft`."""

    file: str
    line: int
    #: what `import` has to find: ``peft``, ``peft.utils``
    module: str
    #: what this has to have: ``LoraConfig``, ``LoraModel.merge``; empty: nothing
    attributes: str
    #: import, attribute, assigned (the file sets it), patched, hasattr, getattr, super (a subclass calls it), string, or one of them "in text"
    how: str
    #: the function it stands in; empty: it is needed when the file is imported
    function: str = ""
    #: what keeps it from failing, or makes it depend on a version; empty: nothing
    guard: str = ""

    @property
    def name(self) -> str:
        """The dotted name."""
        return f"{self.module}.{self.attributes}" if self.attributes else self.module


def uses(folder: Path) -> list[Use]:
    """Return what all Python files under a folder ask of `peft`; files that this Python can't parse are left out."""
    found: set[Use] = set()
    for path in sorted(folder.rglob("*.py")):
        with contextlib.suppress(SyntaxError, ValueError, RecursionError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in strings that are not ours
            found.update(read(path.read_text(encoding="utf-8", errors="replace"), path.relative_to(folder).as_posix()))
    return sorted(found)


def read(text: str, file: str) -> list[Use]:
    """Return what one file asks of `peft`."""
    reader = _Reader(file)
    reader.module(ast.parse(text))
    return reader.found


class _Reader(ast.NodeVisitor):
    def __init__(self, file: str) -> None:
        self.file = file
        self.found: list[Use] = []
        self._scopes: list[dict[str, tuple[str, str] | None]] = []
        self._functions: list[str] = []
        self._guards: list[str] = []
        self._bases: list[tuple[str, str] | None] = []
        self._docstrings: set[ast.Constant] = set()

    def module(self, tree: ast.Module) -> None:
        with self._scope(tree.body):
            self.generic_visit(tree)

    # what the file names ---------------------------------------------------------------------------------------------------------------

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if _of_peft(alias.name):
                self._note(node, (alias.name, ""), "import")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level == 0 and node.module and _of_peft(node.module):
            for alias in node.names:
                self._note(node, (node.module, "" if alias.name == "*" else alias.name), "import")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        named = self._named(node)
        if named is not None:
            self._note(node, named, "attribute" if isinstance(node.ctx, ast.Load) else "assigned")
        elif _calls_super(node.value) and self._bases and (base := self._bases[-1]):
            self._note(node, (base[0], f"{base[1]}.{node.attr}".lstrip(".")), "super")
        else:
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
        if function in _BY_NAME and len(node.args) > 1 and (named := self._named(node.args[0])) and (name := _literal(node.args[1])):
            guards = ["default"] if function == "getattr" and len(node.args) > 2 else []
            with self._guard(*guards):
                self._note(node, (named[0], f"{named[1]}.{name}".lstrip(".")), _BY_NAME[function])
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if not isinstance(node.value, str) or "peft" not in node.value or node in self._docstrings:
            return
        if _PATH.fullmatch(node.value) and not node.value.endswith(_NOT_NAMES):
            self._note(node, ("peft", node.value.removeprefix("peft.")), "string")
        elif "import" in node.value:
            with contextlib.suppress(SyntaxError, ValueError):
                for use in read(textwrap.dedent(node.value).strip(), self.file):
                    self._note(node, (use.module, use.attributes), f"{use.how} in text")

    # where it stands -------------------------------------------------------------------------------------------------------------------

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._function(node, node.name)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._function(node, node.name)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._function(node, "lambda")

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._visit([*node.decorator_list, *node.bases, *node.keywords])
        self._ignore_docstring(node.body)
        self._bases.append(self._named(node.bases[0]) if len(node.bases) == 1 else None)  # of several, super() may mean another one
        with self._scope(node.body):
            self._visit(node.body)
        self._bases.pop()

    def visit_Try(self, node: ast.Try) -> None:
        caught = " ".join("BaseException" if handler.type is None else ast.unparse(handler.type) for handler in node.handlers)
        with self._guard(*[f"except {caught}"] * any(name in caught for name in _CATCHING)):
            self._visit(node.body)
        self._visit([*node.handlers, *node.orelse, *node.finalbody])

    def visit_With(self, node: ast.With) -> None:
        self._visit(node.items)
        what = " ".join(ast.unparse(item.context_expr) for item in node.items)
        with self._guard(*[what] * ("suppress(" in what)):
            self._visit(node.body)

    def visit_If(self, node: ast.If) -> None:
        self._branch(node.test, node.body, node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._branch(node.test, [node.body], [node.orelse])

    def _branch(self, test: ast.expr, then: Sequence[ast.AST], otherwise: Sequence[ast.AST]) -> None:
        text = ast.unparse(test)
        telling = any(word in text.lower() for word in ("version", "hasattr", "type_checking"))
        self._visit([test])
        with self._guard(*[f"if {text}"] * telling):
            self._visit(then)
        with self._guard(*[f"if not ({text})"] * telling):
            self._visit(otherwise)

    def _function(self, node: _Function, name: str) -> None:
        arguments = [argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)]
        body = node.body if isinstance(node.body, list) else [node.body]
        self._ignore_docstring(body)
        self._visit([node.args, *getattr(node, "decorator_list", [])])
        self._functions.append(name)
        with self._scope(body, arguments):
            self._visit(body)
        self._functions.pop()

    def _visit(self, nodes: Sequence[ast.AST]) -> None:
        for node in nodes:
            self.visit(node)

    def _ignore_docstring(self, body: Sequence[ast.AST]) -> None:
        first = body[0] if body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            self._docstrings.add(first.value)

    @contextlib.contextmanager
    def _scope(self, body: Sequence[ast.AST], arguments: Sequence[str] = ()) -> Iterator[None]:
        self._scopes.append({**dict.fromkeys(arguments), **_bound(body)})
        yield
        self._scopes.pop()

    @contextlib.contextmanager
    def _guard(self, *texts: str) -> Iterator[None]:
        self._guards.extend(texts)
        yield
        del self._guards[len(self._guards) - len(texts) :]

    def _named(self, node: ast.AST) -> tuple[str, str] | None:
        """Return (module, attributes) that an expression stands for, where it is a name that was imported from `peft`, or attributes of it."""
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self._scopes) if node.id in scope), None)
        if isinstance(node, ast.Attribute) and (of := self._named(node.value)):
            return of[0], f"{of[1]}.{node.attr}".lstrip(".")
        return None

    def _note(self, node: ast.stmt | ast.expr, named: tuple[str, str], how: str) -> None:
        guard = "; ".join(" ".join(text.split()) for text in self._guards)
        self.found.append(Use(self.file, node.lineno, *named, how, ".".join(self._functions), guard))


def _bound(body: Sequence[ast.AST]) -> dict[str, tuple[str, str] | None]:
    """Return what names of a scope stand for; None for those that are something else. An import counts more than an assignment."""
    names: dict[str, tuple[str, str] | None] = {}
    imported: dict[str, tuple[str, str] | None] = {}
    left = list(body)
    while left:
        node = left.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names[node.id] = None
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = None
            continue
        elif isinstance(node, ast.Lambda):
            continue
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _of_peft(alias.name):
                    imported[alias.asname or "peft"] = (alias.name if alias.asname else "peft", "")
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if node.level == 0 and node.module and _of_peft(node.module):
                    imported[alias.asname or alias.name] = (node.module, alias.name)
                else:
                    names[alias.asname or alias.name] = None
        left.extend(ast.iter_child_nodes(node))
    return {**names, **imported}


def _of_peft(module: str) -> bool:
    return module == "peft" or module.startswith("peft.")


def _calls_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _literal(node: ast.AST) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
