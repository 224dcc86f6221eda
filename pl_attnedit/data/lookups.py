"""`lookups:SOURCE`: text in which facts are said again far from where they stood first, among others like them.

Running text seldom asks for one of several alike facts far back, so a student that learns from it alone loses that first.
The facts stand between the sentences of every tenth stretch of another source. Their forms and words are not those of the
retrieval tasks that judge (`pl_attnedit.eval.harness.retrieval`). The same source always gives the same documents.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Iterable, Iterator

from pl_attnedit.errors import invalid

LOOKUPS = "lookups:"
VERSION = 2  # part of the cache key: raise it when the documents change
SEED = 1
# Behind no other white space: else each of a long run would be looked at from every one before it.
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<!\s)\s*\n\s*")
# What has no such ends, as lists and Chinese have none, is cut where a sentence or at least a word ends, if there is one.
PIECE = re.compile(r".{1,1000}(?:\Z|\s|(?<=[。！？]))|.{1000}", re.DOTALL)

SHORT, LONG = (1_500, 7_000), (14_000, 27_000)  # characters of a document; the long ones fill a context of 8,192 tokens
SHARE_SHORT = 0.3
TAKEN = 10  # one stretch of so many
CHARACTERS_PER_GROUP = 3_500  # facts come in groups of one form, told apart by their keys alone
SHARE_LISTS = 0.25  # of the groups: a list of words instead
ASKED_AT_END = 4

# The first field is the key, the second its value.
FORMS = (
    "{person} lives in {city}.",
    "{person} was born in {year}.",
    "{person} scored {number} points.",
    "The telephone extension of {person} is {number}.",
    "The favourite colour of {person} is {colour}.",
    "Parcel {code} weighs {number} grams.",
    "Invoice {code}: {number} euros.",
    "Room {number} is booked for {person}.",
    "The train to {city} leaves at {time}.",
    "The office in {city} is led by {person}.",
    "The serial code of the {thing} is {code}.",
    "{variable} = {number}",
    '"{thing}": "{code}",',
    "| {person} | {number} |",
)
LIST_BEGINNINGS = ("Stops: ", "In this order: ", "Items - ")
SAID_AGAIN = ("", "", "As said: ", "Again, ")
WORDS = [
    words.split()
    for words in (
        "Ada Amir Bianca Bruno Clara Cyril David Dora Elena Emil Fatima Felix Grace Gustav Hanna Hugo Irene Ivan Jonas "
        "Julia Karla Kofi Lena Leon Maria Milan Nils Nora Olga Oscar Paul Petra Ruth Simon Tanja Ulrich Vera Walter "
        "Yara Zoe",
        "Adler Banerjee Becker Cohen Costa Duarte Dubois Eriksen Evans Fischer Fontaine Garcia Hansen Ito Jensen Keller "
        "Lopez Meyer Novak Olsen Petrov Quinn Rossi Schmidt Tanaka Urban Vogel Weber Young Zhang",
        "Athens Bath Bergen Bremen Cardiff Derby Dublin Geneva Ghent Krakow Leeds Leipzig Lille Lisbon Lyon Madrid Malaga "
        "Nantes Oslo Porto Prague Riga Sofia Split Tallinn Turin Vienna Warsaw York Zagreb",
        "beige black blue brown crimson green grey pink purple red turquoise violet white",
        "archive bicycle drawer invoice ledger locker parcel permit printer report router sample sensor server turbine "
        "valve",
    )
]
FIRST_NAMES, LAST_NAMES, CITIES, COLOURS, THINGS = WORDS
LETTERS = "ABCDEFGHKLMNPRSTUVWXYZ"

DRAWN: dict[str, Callable[[random.Random], str]] = {
    "person": lambda rng: f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}",
    "city": lambda rng: rng.choice(CITIES),
    "colour": lambda rng: rng.choice(COLOURS),
    "thing": lambda rng: rng.choice(THINGS),
    "variable": lambda rng: f"{rng.choice(THINGS)}_{rng.randrange(100)}",
    "number": lambda rng: str(rng.randrange(10 ** rng.randrange(2, 7))),
    "code": lambda rng: f"{rng.choice(LETTERS)}{rng.choice(LETTERS)}-{rng.randrange(100, 10_000)}",
    "time": lambda rng: f"{rng.randrange(24):02}:{rng.randrange(60):02}",
    "year": lambda rng: str(rng.randrange(1900, 2010)),
}


def check_judged(field: str, name: str) -> None:
    """`UserError` where `lookups:` is to be text that a student is judged on."""
    if name.startswith(LOOKUPS):
        raise invalid(field, name, "must be text as it is, lookups: is for training")


def lookup_documents(name: str, documents: Iterable[object]) -> Iterator[str]:
    """The documents; streamed, about a tenth as much text as `documents` have. Conversations among these are left out.

    Raises:
        UserError: `documents`, of the source `name`, have no plain text.
    """
    rng, sentences, found, skipped, made = random.Random(SEED), list[str](), 0, 0, 0
    wanted = _length(rng)
    for sentence in _sentences(documents):
        if skipped > 0:
            skipped -= len(sentence)
            continue
        sentences.append(sentence)
        found += len(sentence)
        if found >= wanted:
            yield _with_facts(sentences, rng)
            skipped, made, wanted = found * (TAKEN - 1), made + 1, _length(rng)
            sentences, found = [], 0
    if sentences and not made:
        yield _with_facts(sentences, rng)
    elif not made:
        raise invalid("source", f"{LOOKUPS}{name}", "must be of a source with plain text")


def _sentences(documents: Iterable[object]) -> Iterator[str]:
    for document in documents:
        if isinstance(document, str):
            for sentence in SENTENCE_END.split(document):
                yield from filter(None, map(str.rstrip, PIECE.findall(sentence)))


def _length(rng: random.Random) -> int:
    return rng.randrange(*(SHORT if rng.random() < SHARE_SHORT else LONG))


def _with_facts(sentences: list[str], rng: random.Random) -> str:
    """The sentences in their order, and between them facts, each said again once to three times, some at the end."""
    placed: list[tuple[float, str]] = []
    for _ in range(max(1, sum(map(len, sentences)) // CHARACTERS_PER_GROUP)):
        start, spread = 0.8 * rng.random(), rng.choice([0.02, 0.3])  # close together, or scattered
        for fact in _list(rng) if rng.random() < SHARE_LISTS else _alike_facts(rng):
            first = min(0.97, start + spread * rng.random())
            placed.append((first, fact))
            for _ in range(rng.choice([1, 1, 2, 3])):
                placed.append((first + (1 - first) * rng.random(), rng.choice(SAID_AGAIN) + fact))
    if rng.random() < 0.6:
        placed += [(1.0, fact) for _, fact in rng.sample(placed, min(ASKED_AT_END, len(placed)))]
    placed += [(place / len(sentences), sentence) for place, sentence in enumerate(sentences)]
    return "".join(text + rng.choice([" ", " ", "\n"]) for _, text in sorted(placed, key=lambda part: part[0]))


def _alike_facts(rng: random.Random) -> list[str]:
    form = rng.choice(FORMS)
    key, value = (field for _, field, _, _ in string.Formatter().parse(form) if field)
    keys = {DRAWN[key](rng): None for _ in range(rng.choice([2, 4, 4, 6, 8, 12]))}  # in this order, none twice
    return [form.format(**{key: one, value: DRAWN[value](rng)}) for one in keys]


def _list(rng: random.Random) -> list[str]:
    words = {rng.choice(rng.choice(WORDS)): None for _ in range(rng.randrange(8, 30))}
    return [f"{rng.choice(LIST_BEGINNINGS)}{', '.join(words)}."]
