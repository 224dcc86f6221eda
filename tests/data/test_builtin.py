"""The English that Python carries: prose, no duplicates, the same every time."""

from __future__ import annotations

import json
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pl_attnedit.data import builtin
from pl_attnedit.data.builtin import _docstrings, _prose, builtin_documents, builtin_identity
from pl_attnedit.errors import UserError

SENTENCE = "This is a sentence of English that is as long as a paragraph has to be in order to be kept."


def test_prose_is_kept_without_its_markup() -> None:
    wrapped = (
        "This is :class:`~a.b.C` and ``code`` of\nwhich the `text <https://x.y>`_ is **all**\nthat we see here [1]_."
    )
    assert _prose(wrapped) == "This is a.b.C and code of which the text is all that we see here."
    assert _prose("Notes\n-----\n" + SENTENCE) == SENTENCE


@pytest.mark.parametrize(
    "block",
    [
        ">>> for x in the_list_of_all_that_is_there: print(x) and that is it for now.",
        "x : int\n    The number of the things that are to be counted before this function can return.",
        "| a | table | of | the | things | that | are | in | it | and | more | and | more |",
        "Too short to be kept.",
        "numpy scipy pandas matplotlib sklearn networkx sympy torch lightning mlflow datasets tokenizers safetensors.",
        SENTENCE.removesuffix("."),
    ],
)
def test_what_is_no_prose(block: str) -> None:
    assert _prose(block) is None


def test_docstrings_in_the_order_of_the_source() -> None:
    texts = list(_docstrings(Path(json.__file__).parent))
    module = next(text for text in texts if text.startswith("JSON (JavaScript Object Notation)"))
    assert module.index("JSON (JavaScript") < module.index("Serialize ``obj`` as a JSON formatted stream")


def test_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "_docstrings", lambda root: iter(()))  # topics alone, for speed
    documents = list(builtin_documents())
    paragraphs = [paragraph for document in documents for paragraph in document.split("\n\n")]
    assert len(documents) > 50
    assert len(set(paragraphs)) == len(paragraphs)
    assert min(len(document.split()) for document in documents) >= builtin.MIN_DOCUMENT_WORDS
    assert documents == list(builtin_documents())


def test_what_else_is_installed_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    identity = builtin_identity()
    assert identity == builtin_identity()
    assert f"numpy=={metadata.version('numpy')}" in identity
    assert "torch==" not in identity

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(UserError, match="what numpy says of itself"):
        list(builtin_documents())


def test_all_packages_are_required() -> None:
    """By what this project requires, without extras."""
    found: set[str] = set()
    wanted = [Requirement(each) for each in metadata.requires("pl_attnedit") or []]
    for each in wanted:  # grows
        name = canonicalize_name(each.name)
        if name in found or (each.marker and not any(each.marker.evaluate({"extra": e}) for e in ("", *each.extras))):
            continue
        found.add(name)
        with suppress(metadata.PackageNotFoundError):
            wanted += [Requirement(further) for further in metadata.requires(name) or []]
    assert {canonicalize_name(name) for name in builtin.PACKAGES.values()} <= found


@pytest.mark.slow
def test_there_is_enough_of_it() -> None:
    assert sum(len(document.split()) for document in builtin_documents()) > 500_000
