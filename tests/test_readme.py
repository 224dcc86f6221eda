"""The README's tables and the plots beside the data are what the data gives; `make figures` makes them again. What its
text says of the conversions is compared figure by figure."""

from __future__ import annotations

import importlib.util
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def readme() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "results" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_the_datas(readme: ModuleType) -> None:
    text = readme.README.read_text("utf-8")
    assert readme.with_tables(text) == text
    changed = text.replace("| MLA 92+36 = 128 | 0.8", "| MLA 92+36 = 128 | 0.7")
    assert changed != text == readme.with_tables(changed)


def test_a_table_without_its_place_is_an_error(readme: ModuleType) -> None:
    text = readme.README.read_text("utf-8")
    with pytest.raises(ValueError, match="one table bench_trl, has 0"):
        readme.with_tables(text.replace("<!-- begin bench_trl -->", ""))


def test_plots_are_the_datas(readme: ModuleType) -> None:
    made = readme.plots()
    text = readme.README.read_text("utf-8")
    for path, svg in made.items():
        assert path.read_text("utf-8") == svg
        assert ET.fromstring(svg).tag.endswith("svg")
        assert f"results/{path.name}" in text
    assert set(ROOT.glob("results/*.svg")) == set(made)


def data(name: str) -> Any:
    return json.loads((ROOT / "results" / f"{name}.json").read_text("utf-8"))


CONVERSIONS = {row["name"].rsplit("-", 1)[0]: row for row in data("smollm2")}
ALONE = {name.removesuffix("-0"): row for name, row in data("smollm2_alone")["rows"].items()}
REPLACED = {row["name"].rsplit("-", 1)[0]: row for row in data("smollm2_replaced")["rows"]}


def judged(name: str, key: str = "kl", suite: str = "fidelity", rows: dict[str, Any] = CONVERSIONS) -> float:
    return rows[name]["fidelity"][suite][key]


def budget(name: str) -> float:
    return CONVERSIONS[name]["kv_budget"]


def tokens(name: str) -> float:
    return CONVERSIONS[name]["tokens"] / 1e6


def further(name: str) -> float:
    """How many times as far off at 2,048 tokens as at 512."""
    return judged(name, suite="fidelity_2k") / judged(name)


def varied(study: str, variant: str) -> dict[str, Any]:
    return next(row for row in data(f"study_{study}")["rows"] if row["variant"] == variant)


def behind(study: str, variant: str) -> float:
    """How much more KL than the study's first variant."""
    return varied(study, variant)["ratio"] - 1


def spent(variant: str) -> float:
    """Millions of tokens of a variant of MLA 128."""
    row = varied("mla", variant)
    return (row["tokens_stage1"] + row["tokens_stage2"]) / 1e6


def by_length(target: str, length: int, suite: str) -> float:
    [row] = [row for row in data("smollm2_sequences") if row["name"].startswith(f"{target}_{length}-")]
    return row["fidelity"][suite]["kl"]


def at_end(name: str, context: int) -> float:
    """KL of the second half of a context."""
    [found] = [row for row in data("smollm2_offline") if row["conversion"] == f"{name}-0"]
    return next(span["kl"] for span in found["by_position"] if span["end"] == context)


def faster(name: str, other: str) -> float:
    """How many more tokens per second."""
    return seconds(other) / tokens(other) / (seconds(name) / tokens(name)) - 1


def seconds(name: str, key: str = "seconds_to_the_end_of_stage2") -> float:
    return ALONE[name][key]


# What the text says, with # for each figure, and what the data has for them. Percentages are shares.
CLAIMS = [
    (
        "At 512 tokens, where that is 19%, it comes to #; trained at 2,048, to # at 8k",
        [judged("mix"), at_end("mix_sequences_of_2048", 8192)],
    ),
    ("the same seven stay full: # at 512.", [judged("chosen_layers_longer")]),
    ("(# beside # at 8,192)", [at_end(name, 8192) for name in ("mix_sequences_of_2048", "chosen_layers_4_sinks")]),
    (
        "reaches # at a half, # at a third (`configs/recipes/smollm2_mla.yaml`, in batches of 64) and # at a quarter",
        [judged("MLA_192"), judged("MLA_128_batch_of_64"), judged("MLA_96")],
    ),
    (
        "as good at 2,048 tokens as at 512 (# beside #)",
        [judged("MLA_192", suite="fidelity_2k"), judged("MLA_192")],
    ),
    (
        "beyond the 512 that it was trained at: #.",
        [judged("MLA_128_fastest_frequencies", suite="fidelity_2k")],
    ),
    (
        "at 2,048 tokens MLA 128 is # times as far off as at 512, MLA 96, with 16 values, # times",
        [further("MLA_128"), further("MLA_96")],
    ),
    (
        "in batches of 64, MLA 128 is # nearer at 512, #, and # further off at 2,048",
        [
            1 - judged("MLA_128_as_112_16") / judged("MLA_128_batch_of_64"),
            judged("MLA_128_as_112_16"),
            judged("MLA_128_as_112_16", suite="fidelity_2k") / judged("MLA_128_batch_of_64", suite="fidelity_2k") - 1,
        ],
    ),
    (
        "leave MLA 128 at # there instead of #, and at 512 at # instead of #",
        [
            judged(name, suite=suite)
            for suite in ("fidelity_2k", "fidelity")
            for name in ("MLA_128_sequences_of_2048", "MLA_128")
        ],
    ),
    (
        "the mix, after # tokens, at # instead of #, and at 512 at # instead of #",
        [tokens("mix_sequences_of_2048")]
        + [
            judged("mix" + more, suite=suite, rows=rows)
            for suite in ("fidelity_2k", "fidelity")
            for more, rows in (("_sequences_of_2048", CONVERSIONS), ("", REPLACED))
        ],
    ),
    (
        "not far behind SSSF after # tokens, # beside #, and twice as close to the teacher once trained, "
        "with half as many: #; after #, #. Without sinks, after #: #, where SSSF, with more tokens, reaches #.",
        [
            tokens("SSSF_4_sinks"),
            judged("chosen_layers_4_sinks_untrained"),
            judged("SSSF_4_sinks"),
            judged("chosen_layers_4_sinks"),
            tokens("chosen_layers_longer"),
            judged("chosen_layers_longer"),
            tokens("chosen_layers_no_sinks"),
            judged("chosen_layers_no_sinks"),
            judged("SSSF_no_sinks"),
        ],
    ),
    (
        "(SSSF: seven with one), has # and #, after # tokens # and #",
        [
            judged("FSSS_4_sinks"),
            judged("FSSS_4_sinks", "top1"),
            tokens("FSSS_longer"),
            judged("FSSS_longer"),
            judged("FSSS_longer", "top1"),
        ],
    ),
    ('"Mix second run" repeats the #-token mix', [REPLACED["mix"]["tokens"] / 1e6]),
    (
        "ends at # after # tokens",
        [CONVERSIONS["MLA_128_random_init"]["kl_after_stage2"], tokens("MLA_128_random_init")],
    ),
    (
        "is there after #, stage 2 at 2e-4: # of them",
        [spent("stage 2 rate 2e-4"), spent("stage 2 rate 2e-4") / tokens("MLA_128_random_init")],
    ),
    ("trains better at these rates: without it # more", [behind("mla", "no latent norm")]),
    ("the same time in stage 2 alone comes out # behind", [behind("mla", "no stage 1, its time in stage 2")]),
    (
        "8e-4 is # behind 4e-4), and all of the layers have to train: attention alone is # behind",
        [behind("mla", "stage 2 rate 8e-4"), behind("mla", "attention alone trained in stage 2")],
    ),
    (
        "costs # from the bottom and # from the top in stage 1, in stage 2 by parts #",
        [behind("mla", "stage 1 bottom up"), behind("mla", "stage 1 top down"), behind("mla", "stage 2 by parts")],
    ),
    (
        "MLA 96 came to # with it (# tokens, # s) and without (#, # s)",
        [
            judged("MLA_96_batch_of_64"),
            tokens("MLA_96_batch_of_64"),
            seconds("MLA_96_batch_of_64"),
            tokens("MLA_96_batch_of_64_no_features"),
            seconds("MLA_96_batch_of_64_no_features"),
        ],
    ),
    (
        "are # to # faster with them: MLA 96 with features ends # behind",
        [
            faster("MLA_96_batch_of_64", "MLA_96"),
            faster("MLA_96_batch_of_64_no_features", "MLA_96_no_features"),
            judged("MLA_96_batch_of_64") / judged("MLA_96") - 1,
        ],
    ),
    (
        "ends at # in batches of 32 (#, # s), too, and MLA 128 in batches of 64 at # (#, # s), in those of 32 at # (#, # s)",
        [
            figure(name)
            for name in ("MLA_96_no_features", "MLA_128_batch_of_64", "MLA_128")
            for figure in (judged, tokens, seconds)
        ],
    ),
    (
        "gone through two and a half times, cost #. As many written by the teacher without prompts, as chats, cost #",
        [behind("mla", "2.2M tokens of the corpus"), behind("mla", "2.2M tokens of the teacher")],
    ),
    (
        "Nor does it with # tokens at 512: SSSF without sinks is at # where SSSF with them, after #, is at #; "
        "at 2,048 it all but does, # beside #",
        [tokens("SSSF_no_sinks"), judged("SSSF_no_sinks"), tokens("SSSF_4_sinks"), judged("SSSF_4_sinks")]
        + [judged(name, suite="fidelity_2k") for name in ("SSSF_no_sinks", "SSSF_4_sinks")],
    ),
    ("sixteen gain #", [-behind("gate_swa", "16 sinks")]),
    ("Training attention alone costs #, more", [behind("gate_swa", "attention alone trained in stage 2")]),
    (
        "those of 2,048 are # nearer to the teacher than those of 512, at 512 they are # further off",
        [
            1 - by_length("MLA", 2048, "fidelity_2k") / by_length("MLA", 512, "fidelity_2k"),
            by_length("MLA", 2048, "fidelity") / by_length("MLA", 512, "fidelity") - 1,
        ],
    ),
    (
        "Windows lose # at 512 by it and gain # at 2,048",
        [
            by_length("SSSF", 2048, "fidelity") / by_length("SSSF", 512, "fidelity") - 1,
            1 - by_length("SSSF", 2048, "fidelity_2k") / by_length("SSSF", 512, "fidelity_2k"),
        ],
    ),
    (
        "SSSF with sinks: KL # instead of 0.05, top-1 agreement # instead of 90% (after # tokens # and #",
        [
            judged("SSSF_4_sinks"),
            judged("SSSF_4_sinks", "top1"),
            REPLACED["SSSF_4_sinks"]["tokens"] / 1e6,
            judged("SSSF_4_sinks", rows=REPLACED),
            judged("SSSF_4_sinks", "top1", rows=REPLACED),
        ],
    ),
    (
        "FSSS has # and # with # of the cache, the chosen layers, at SSSF's budget, # and #",
        [
            judged("FSSS_longer"),
            judged("FSSS_longer", "top1"),
            budget("FSSS_longer"),
            judged("chosen_layers_longer"),
            judged("chosen_layers_longer", "top1"),
        ],
    ),
    ("Top-1 agreement of 89% at MLA 128: it has #", [judged("MLA_128_batch_of_64", "top1")]),
    ("the split of the cache: 112+16 has #", [judged("MLA_128_as_112_16", "top1")]),
    (
        "(# after # tokens, # after #). At 4e-4 and 512 tokens it is # after 5.4M",
        [
            judged("MLA_128"),
            tokens("MLA_128"),
            judged("MLA_128", rows=REPLACED),
            REPLACED["MLA_128"]["tokens"] / 1e6,
            by_length("MLA", 512, "fidelity"),
        ],
    ),
    (
        "within seven minutes: # after # to #, in batches of 32 or 64, with feature matching or without, "
        "where 0.10 was asked; # takes #.",
        [
            judged("MLA_96_no_features"),
            seconds("MLA_96_batch_of_64_no_features") / 60,
            seconds("MLA_96_batch_of_64") / 60,
            judged("MLA_96"),
            seconds("MLA_96") / 60,
        ],
    ),
]


FIGURE = r"(\d+(?:\.\d+)?[%M]?)"


@pytest.mark.parametrize(("claim", "values"), CLAIMS, ids=[claim[:40] for claim, _ in CLAIMS])
def test_the_text_says_what_the_data_does(claim: str, values: list[float]) -> None:
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    [found] = re.finditer(re.escape(claim).replace(r"\#", FIGURE), text)
    assert len(found.groups()) == len(values)
    for figure, value in zip(found.groups(), values):
        digits = len(figure.rstrip("%M").partition(".")[2])
        assert figure.rstrip("%M") == f"{value * (100 if figure.endswith('%') else 1):.{digits}f}"
