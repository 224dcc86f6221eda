"""Running English that is already on the machine: what Python and its scientific packages say about themselves.

`builtin:` needs no download. It is made of the language reference in `pydoc_data`, the docstrings of the standard
library and of a few well-documented packages that this project requires. Only paragraphs of prose are kept; code, tables
and parameter lists are left out. The result is a function of the interpreter and of these packages' versions: whatever
else is installed, the documents and their order are the same.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from pl_attnedit.errors import invalid

# Part of the cache key: raise it when the extraction below changes.
VERSION = 2

# Packages with long, well-edited docstrings, and their distributions. All are dependencies of this project.
PACKAGES = {
    "numpy": "numpy",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "networkx": "networkx",
    "pandas": "pandas",
    "matplotlib": "matplotlib",
    "sqlalchemy": "SQLAlchemy",
    "nltk": "nltk",
}
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "_vendor", "externals"}

MIN_DOCUMENT_WORDS = 60
MIN_PARAGRAPH_WORDS = 12
MIN_PLAIN_SHARE = 0.85  # least share of a paragraph's words that consist of letters only
MIN_COMMON_SHARE = 0.2  # least share of common English words: prose has 0.3 to 0.5, lists of names have none

_PLAIN = re.compile(r"[\"'(]*[A-Za-z]+(?:['’-][A-Za-z]+)*[.,;:!?)\"']*")
_COMMON = frozenset(
    "the of a an and or to in is are be that this it for with as by on from not which can if at when will was has have"  # noqa: SIM905
    " its their you may than then these such been into only all other used use using but".split()
)
_BLANK_LINE = re.compile(r"\n\s*\n")
_SECTION_TITLE = re.compile(r"[^\n]+\n\s*[-=~^*]{3,}\s*(?:\n|$)")
_MARKUP = (
    (re.compile(r":[\w:+-]+:`[~!.]*([^`<]+?)(?:\s*<[^`>]*>)?`"), r"\1"),  # :class:`~a.b.C` -> a.b.C
    (re.compile(r"!?\[([^\]]*)\]\([^)]*\)"), r"\1"),  # [text](link) -> text
    (re.compile(r"`{1,2}([^`]+?)(?:\s*<[^`>]*>)?`{1,2}_{0,2}"), r"\1"),  # ``code``, `link <url>`_
    (re.compile(r"\s?\[\w+\]_"), ""),  # references to a bibliography
    (re.compile(r"\*{1,2}(\w[^*]*\w|\w)\*{1,2}"), r"\1"),  # emphasis
)


def builtin_identity() -> str:
    """What the text depends on: the interpreter and the packages with their versions. Cheap to compute.

    Raises:
        UserError: a package is not installed.
    """
    try:
        versions = [f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES.values()]
    except importlib.metadata.PackageNotFoundError as error:
        raise invalid("source", "builtin:", f"is made of what {error.name} says of itself: install it") from error
    return "\n".join([f"builtin {VERSION}", sys.version, *versions])


def builtin_documents() -> Iterator[str]:
    """The documents: paragraphs of prose separated by blank lines, one document per topic or module.

    Raises:
        UserError: a package is not installed.
    """
    builtin_identity()
    seen: set[str] = set()
    for raw in _raw_documents():
        paragraphs = []
        for block in _BLANK_LINE.split(raw):
            paragraph = _prose(block)
            if paragraph and paragraph not in seen:
                seen.add(paragraph)
                paragraphs.append(paragraph)
        text = "\n\n".join(paragraphs)
        if len(text.split()) >= MIN_DOCUMENT_WORDS:
            yield text


def _raw_documents() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]
    yield from _docstrings(Path(sysconfig.get_paths()["stdlib"]))
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        for folder in spec.submodule_search_locations or []:
            yield from _docstrings(Path(folder))


def _docstrings(root: Path) -> Iterator[str]:
    """One text per module: its docstring and those of its classes and functions, in the order of the source."""
    for file in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(file.relative_to(root).parts):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # invalid escapes, about which newer Pythons warn
                    tree = ast.parse(file.read_text("utf-8"))
            except (SyntaxError, ValueError):  # not a module: a template, or a test of the parser
                continue
            yield "\n\n".join(_docstrings_of(tree))


def _docstrings_of(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    if docstring := ast.get_docstring(node, clean=False):
        yield inspect.cleandoc(docstring)
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings_of(child)


def _prose(block: str) -> str | None:
    """The block as one line of text without markup, or None where it is no running English."""
    if len(block.split()) < MIN_PARAGRAPH_WORDS:
        return None
    block = _SECTION_TITLE.sub("", block.strip("\n"), count=1)
    lines = block.splitlines()
    if len({len(line) - len(line.lstrip()) for line in lines}) != 1:  # definition lists are indented below their term
        return None
    text = " ".join(block.split())
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    if not text or not (text[0].isalpha() or text[0] in "\"'(") or text[-1] not in ".:!?)":
        return None
    words = text.split()
    plain = sum(_PLAIN.fullmatch(word) is not None for word in words)
    common = sum(word.lower().strip(".,;:()") in _COMMON for word in words)
    if len(words) < MIN_PARAGRAPH_WORDS or plain < MIN_PLAIN_SHARE * len(words):
        return None
    return text if common >= MIN_COMMON_SHARE * len(words) else None
