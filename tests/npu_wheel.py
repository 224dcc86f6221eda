"""Which names of torch_npu a source uses, and whether a torch_npu wheel has them. Nothing is imported: both are read."""

from __future__ import annotations

import ast
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

LOADER = "load_torch_npu"  # our function that gives the module


@dataclass
class Use:
    """One place of a source. `arguments` and `keywords` are those of a call, None where the name is not called."""

    name: str  # with its module: torch_npu.npu.device_count
    where: str
    arguments: int | None = None
    keywords: list[str] = field(default_factory=list)


def uses_in(files: Iterable[Path]) -> list[Use]:
    """What the files use of torch_npu, of its `torch.npu` and of its environment variables' readers."""
    found: list[Use] = []
    for path in files:
        visitor = _Uses(path)
        visitor.visit(ast.parse(path.read_text("utf-8")))
        found += visitor.found
    return found


class _Uses(ast.NodeVisitor):
    def __init__(self, path: Path) -> None:
        self.path, self.found = path, list[Use]()
        self.local: dict[str, str] = {
            "torch": "torch"
        }  # names of the file that stand for a module, or something in one

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == "torch_npu":
                self.local[alias.asname or "torch_npu"] = alias.name if alias.asname else "torch_npu"
                self._record(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and node.module.split(".")[0] == "torch_npu":
            for alias in node.names:
                self.local[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                self._record(f"{node.module}.{alias.name}", node)

    def visit_Assign(self, node: ast.Assign) -> None:
        name = self._name(node.value)
        if name is not None and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            self.local[node.targets[0].id] = name
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = self._name(node.func)
        if name is None:
            if (name := self._name(node)) is not None:
                self._record(name, node)
            self.generic_visit(node)
            return
        keywords = [keyword.arg for keyword in node.keywords if keyword.arg is not None]
        self._record(name, node, len(node.args), keywords)
        for child in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.visit(child)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = self._name(node)
        if name is None:
            self.generic_visit(node)
        else:
            self._record(name, node)

    def _name(self, node: ast.expr) -> str | None:
        """The dotted name that an expression stands for, if it belongs to torch_npu."""
        name = self._dotted(node)
        return name if name is not None and name.split(".")[0] == "torch_npu" else None

    def _dotted(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return self.local.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._dotted(node.value)
            return None if owner is None else _in_torch_npu(f"{owner}.{node.attr}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if called == LOADER:
                return "torch_npu"
            texts = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            if called == "import_module" and texts and str(texts[0]).split(".")[0] == "torch_npu":
                return str(texts[0])
            if called == "getattr" and texts and (owner := self._dotted(node.args[0])) is not None:
                return _in_torch_npu(f"{owner}.{texts[0]}")
        return None

    def _record(
        self, name: str, node: ast.AST, arguments: int | None = None, keywords: list[str] | None = None
    ) -> None:
        where = f"{self.path.name}:{getattr(node, 'lineno', '?')}"
        self.found.append(Use(name, where, arguments, keywords or []))


def _in_torch_npu(name: str) -> str:
    """`torch.npu` is `torch_npu.npu`, and torch_npu puts one function of its own into `torch.distributed`."""
    if name == "torch.npu" or name.startswith("torch.npu."):
        return "torch_npu" + name.removeprefix("torch")
    return "torch_npu.distributed.is_hccl_available" if name == "torch.distributed.is_hccl_available" else name


class Wheel:
    """The files of a torch_npu wheel."""

    def __init__(self, path: Path) -> None:
        self.zip = zipfile.ZipFile(path)
        self.files = set(self.zip.namelist())

    def has(self, name: str) -> bool:
        """Whether a dotted name is a module, is defined or imported in one, or is an operator."""
        parts = name.split(".")
        return self._in_module("torch_npu", parts[1:]) or (len(parts) == 2 and self.is_operator(parts[1]))

    def is_operator(self, name: str) -> bool:
        """An operator that `torch_npu.NAME` exposes, has a schema and is registered by the library."""
        return name in self._exposed and self.schema(name) is not None and f"npu::{name}\0".encode() in self._library

    def schema(self, operator: str) -> list[tuple[str, str | None]] | None:
        """An operator's parameters in order, (name, default as written or None)."""
        match = re.search(rf"func: {operator}\((.*?)\) ->", self._functions)
        if match is None:
            return None
        parameters = [text.split("=") for text in match[1].split(", ") if text != "*"]
        return [(head.split()[-1], rest[0] if rest else None) for head, *rest in parameters]

    def parameters(self, name: str) -> list[str] | None:
        """Names of a function's parameters, "*" and "**" for those that take any; None for what has no `def` to read."""
        parts = name.split(".")
        if len(parts) == 2 and self.is_operator(parts[1]):
            return [parameter for parameter, _ in self.schema(parts[1]) or []]
        node = self._definition("torch_npu", parts[1:])
        if isinstance(node, ast.ClassDef):
            node = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if not isinstance(node, ast.FunctionDef):
            return None
        given = node.args
        names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg != "self"]
        return names + ["*"] * (given.vararg is not None) + ["**"] * (given.kwarg is not None)

    def mentions(self, text: str) -> bool:
        """Whether the library or a module of Python has these letters."""
        found = text.encode() in self._library
        return found or any(text.encode() in self.zip.read(name) for name in self.files if name.endswith(".py"))

    @cached_property
    def _library(self) -> bytes:
        return self.zip.read("torch_npu/lib/libtorch_npu.so")

    @cached_property
    def _functions(self) -> str:
        files = [name for name in self.files if re.fullmatch(r"torch_npu/csrc/aten/.*\.yaml", name)]
        return "\n".join(self.zip.read(name).decode() for name in files)

    @cached_property
    def _exposed(self) -> set[str]:
        tree = ast.parse(self.zip.read("torch_npu/utils/exposed_api.py"))
        return set(ast.literal_eval(next(node.value for node in tree.body if isinstance(node, ast.Assign))))

    def _in_module(self, module: str, rest: list[str]) -> bool:
        return self._file(module) is not None if not rest else self._definition(module, rest) is not None

    def _file(self, module: str) -> str | None:
        path = module.replace(".", "/")
        return next((name for name in (f"{path}/__init__.py", f"{path}.py") if name in self.files), None)

    @cache  # noqa: B019  # one wheel lives as long as the test
    def _tree(self, file: str) -> ast.Module:
        return ast.parse(self.zip.read(file))

    def _definition(self, module: str, rest: list[str]) -> ast.AST | None:
        """The statement that defines `rest` in a module, or a class's method; a whole module stands for itself."""
        file = self._file(module)
        if file is None:
            return None
        if not rest:
            return self._tree(file)
        for node in _statements(self._tree(file)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == rest[0]:
                members = [node] if len(rest) == 1 else [n for n in node.body if getattr(n, "name", None) == rest[1]]
                if members and len(rest) <= 2:
                    return members[0]
            elif isinstance(node, ast.Assign | ast.AnnAssign) and len(rest) == 1:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(target, ast.Name) and target.id == rest[0] for target in targets):
                    return node
            elif isinstance(node, ast.ImportFrom):
                source = _absolute(node, module, is_package=file.endswith("/__init__.py"))
                for alias in node.names:
                    if alias.name == "*" or (alias.asname or alias.name) == rest[0]:
                        wanted = rest if alias.name == "*" else [alias.name, *rest[1:]]
                        if source.startswith("torch_npu") and (found := self._definition(source, wanted)) is not None:
                            return found
        return self._definition(f"{module}.{rest[0]}", rest[1:])


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Those of the module itself, also under `if` and `try`."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        yield node
        if isinstance(node, ast.If | ast.Try):
            waiting += node.body + node.orelse


def _absolute(node: ast.ImportFrom, module: str, *, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    base = module.split(".")[: len(module.split(".")) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])])
