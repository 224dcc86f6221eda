"""Text that `lookups:` takes pieces of is trained on, and nobody is judged on it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pl_attnedit.data.lookups import LOOKUPS, check_judged
from pl_attnedit.data.packing import Corpus
from pl_attnedit.data.sources import Source, Sources, listed
from pl_attnedit.errors import invalid


def check_sources(source: Sources, val_source: Sources | None) -> None:
    """`UserError` unless the text that `lookups:` takes pieces of counts as trained on, and is not held out."""
    for one, base in _lookups(source):
        if base not in _unweighted(source):
            allowed = f"is for training, beside the source that it has pieces of: name {base.name} beside it"
            same = " with the same config, split and column" if base != Source(base.name) else ""
            raise invalid("source", one.name, allowed + same)
        if val_source is None:
            raise invalid(
                "val_source", None, f"must be given: {one.name} has pieces of whatever is held out of {base.name}"
            )
    for one in () if val_source is None else listed(val_source):
        check_judged("val_source", one.name)


def check_pieces(source: Sources, train: Corpus, held_out: Corpus, val_source: str) -> None:
    """`UserError` if documents that `lookups:` takes pieces of are held out."""
    for one, base in _lookups(source):
        store = train.stores[_unweighted(source).index(base)]
        if shared := int(np.isin(store.wordings, held_out.wordings).sum()):
            allowed = f"holds {shared} documents of {base.name}, and {one.name} has pieces of it"
            raise invalid("val_source", val_source, allowed)


def _lookups(sources: Sources) -> list[tuple[Source, Source]]:
    """Each source that is `lookups:`, with what it has pieces of; without their weights."""
    return [
        (one, replace(one, name=one.name.removeprefix(LOOKUPS)))
        for one in _unweighted(sources)
        if one.name.startswith(LOOKUPS)
    ]


def _unweighted(sources: Sources) -> list[Source]:
    return [replace(one, weight=None) for one in listed(sources)]
