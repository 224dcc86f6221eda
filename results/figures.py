"""The tables and plots of README.md and docs/, made from the data in this folder: `make figures`.

A table stands between `<!-- table FUNCTION ARGUMENT; ... -->` and `<!-- end -->`: the page says which rows it shows.
tests/test_figures.py makes all of them again and compares.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pl_attnedit.conversion.study import ratio_text
from pl_attnedit.eval.report.formatting import markdown_table
from pl_attnedit.eval.report.tables import task_row
from pl_attnedit.files import write_atomically

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
Rows = Iterable[Sequence[str]]


def data(name: str) -> Any:
    """The content of NAME.json."""
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def table(head: Sequence[str], rows: Rows) -> str:
    """A table whose columns but the first are aligned to the right."""
    return markdown_table(head, list(rows), right=range(1, len(head)))


def digits(value: float, number: int = 3) -> str:
    """A number with so many significant digits, no exponent; thousands are set apart."""
    if value == 0:
        return "0"
    places = number - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(places, 0)}f}"


def kl(found: dict[str, float] | None) -> str:
    """KL with its standard error, as many places of it as of the KL."""
    if not found or "kl" not in found:
        return "-"
    text = digits(found["kl"])
    return f"{text} ± {found['kl_stderr']:.{len(text.partition('.')[2])}f}"


def bold_least(rows: list[list[str]], column: int) -> None:
    """Sets the least number of a column, the first in each cell, in bold."""
    least = min((row for row in rows if row[column] not in ("", "-")), key=lambda row: float(row[column].split()[0]))
    least[column] = f"**{least[column]}**"


# Conversions of configs/studies/smollm2.yaml ------------------------------------------------------------------------

CONVERSIONS = {row["name"].rsplit("-", 1)[0].replace("_", " "): row for row in data("smollm2")}


def conversions(*names: str) -> str:
    """What conversions cache, took and reach, each given as NAME or NAME=what the page calls it; KL and top-1 by the
    suites fidelity and fidelity_2k."""
    rows = []
    for name, _, text in (each.partition("=") for each in names):
        found = CONVERSIONS[name]
        short, long = found["fidelity"]["fidelity"], found["fidelity"].get("fidelity_2k")
        tokens = f"{found['tokens'] / 1e6:.0f}M" if found["tokens"] else "none"
        row = [text or name, f"{found['kv_budget']:.0%}", tokens, kl(short), f"{short['top1']:.1%}", kl(long)]
        rows.append(row)
    bold_least(rows, 3)
    bold_least(rows, 5)
    return table(["", "KV budget at 8k", "tokens", "KL at 512", "top-1 at 512", "KL at 2,048"], rows)


def times() -> str:
    """How long the conversions took that had a GPU to themselves."""
    rows = []
    for name, found in data("smollm2_alone")["rows"].items():
        name = name.rsplit("-", 1)[0].replace("_", " ")
        if name in CONVERSIONS and "wall_seconds" in found:  # others were replaced
            seconds = [f"{found[key]:.0f} s" for key in ("seconds_to_the_end_of_stage2", "wall_seconds")]
            rows.append([name, f"{CONVERSIONS[name]['tokens'] / 1e6:.0f}M", *seconds])
    return table(["", "tokens", "init and both stages", "with the evaluation"], sorted(rows))


def quickstart() -> str:
    runs = [data("quickstart"), data("quickstart_mla")]

    def cached(run: dict[str, Any]) -> str:
        student, teacher = run["kv_bytes_per_token_student"], run["kv_bytes_per_token_teacher"]
        return f"{student:,.0f} / {teacher:,.0f} (**{student / teacher:.0%}**)"

    cells: dict[str, Callable[[dict[str, Any]], str]] = {
        "cached bytes per token at 8k, student / teacher": cached,
        "training tokens, stage 1 + stage 2": lambda r: f"{r['tokens_stage1']:,} + {r['tokens_stage2']:,}",
        "KL before training": lambda r: digits(r["kl_before"]),
        "KL after stage 1": lambda r: digits(r["kl_after_stage1"]),
        "KL after stage 2": lambda r: f"**{digits(r['kl_after_stage2'])}**",
        "top-1 agreement": lambda r: f"{r['top1_after']:.1%}",
        "perplexity, teacher / student": lambda r: f"{r['ppl_teacher']:.1f} / {r['ppl_student']:.1f}",
        "wall time": lambda r: f"{r['wall_seconds'] / 60:.1f} min",
        "peak memory": lambda r: f"{r['peak_rss_bytes'] / 1e9:.1f} GB",
    }
    head = ["", "`quickstart.yaml`: GateSWA", "`quickstart_mla.yaml`: MLA"]
    return table(head, ([name, *map(cell, runs)] for name, cell in cells.items()))


# Single choices -----------------------------------------------------------------------------------------------------


def study(name: str, *variants: str) -> str:
    """Variants of a study; all are compared with its first one."""
    found = {row["variant"]: row for row in data(f"study_{name}")["rows"]}
    rows = []
    for variant in variants:
        row = found[variant]
        values = [digits(row[key]) for key in ("kl_before", "kl_after_stage1", "kl_after_stage2")]
        rows.append([variant, str(len(row["seeds"])), *values, ratio_text(row)])
    bold_least(rows, 4)
    return table(["", "seeds", "KL before", "after stage 1", "after stage 2", "KL / first row [95%]"], rows)


def pilots() -> str:
    keys = ("kl_after_stage1", "kl_after_stage2")
    rows = [
        [row["variant"], *(digits(row[key]) for key in keys), f"{row['top1_after']:.1%}"] for row in data("pilots_mla")
    ]
    bold_least(rows, 2)
    return table(["rates", "KL after stage 1", "after stage 2", "top-1"], rows)


def bench_init() -> str:
    found = {row["name"]: row["kl"] for row in data("bench_init")["rows"]}
    inits = ("calibrated", "latent norm, calibrated", "plain svd", "random")
    rows = []
    for split in ("96+32", "160+32"):
        values = [found[f"mla {split}, {init}"] for init in inits]
        rows.append([f"MLA {split} = {sum(map(int, split.split('+')))} values", *map(digits, values)])
    return table(["teacher: 384 values", "calibrated", "calibrated, latent norm", "plain SVD", "random"], rows)


def sensitivity() -> str:
    found = data("sensitivity_gate_swa")
    rows = []
    for name, text in (("plan", "by `pl-attnedit sensitivity`"), ("evenly_spread", "evenly spread")):
        row = found[name]
        full = ", ".join(str(i) for i, letter in enumerate(row["pattern"]) if letter == "F")
        rows.append([text, full, f"{row['kl']:.3f} ± {row['kl_error']:.3f}", f"{row['top1']:.1%}"])
    bold_least(rows, 2)
    return table(["seven full layers, chosen", "which", "KL, not trained", "top-1"], rows)


def sequences() -> str:
    """How long the sequences of the training were, a conversion called TARGET_LENGTH; judged alike, by both suites."""
    found = {tuple(row["name"].rsplit("-", 1)[0].split("_")): row["fidelity"] for row in data("smollm2_sequences")}
    rows = []
    for length in sorted({int(length) for _, length in found}):
        judged = [found.get((target, str(length)), {}).get(suite) for target in ("MLA", "SSSF") for suite in SUITES]
        rows.append([f"{length:,}", *(kl(each) if each else "" for each in judged)])
    for column in range(1, 5):
        bold_least(rows, column)
    return table(["sequences of", "MLA 128: KL at 512", "at 2,048", "SSSF: KL at 512", "at 2,048"], rows)


SUITES = ("fidelity", "fidelity_2k")


def windows(*places: str) -> str:
    """Conversions at about a tenth of the cache, those that were judged on the same text."""
    rows = []
    for found in (data("smollm2_windows")[int(place)] for place in places):
        latent = found["targets"].get("M")
        letters = {letter: found["pattern"].count(letter) for letter in "MF"}
        rest = f"{letters['M']} x MLA {latent['kv_lora_rank']}+{latent['qk_rope_head_dim']}" if letters["M"] else ""
        rest = rest or f"{letters['F']} full layers"
        rest += ", stage 2 at 8e-4" if found["learning_rate_stage2"] > 4e-4 else ""
        cells = [str(found["targets"]["S"]["window"]), rest, f"{found['kv_budget_8k']:.1%}", f"{found['seq_len']:,}"]
        values = [found["fidelity"]["512"]["kl"], found["fidelity"]["2048"]["kl"], found["tokens_4k_8k"]["kl"]]
        late = [math.exp(found["tokens_4k_8k"][f"nll_{model}"]) for model in ("teacher", "student")]
        rows.append([*cells, *map(digits, values), "{:.1f} / {:.1f}".format(*late)])
    for column in (4, 5, 6):
        bold_least(rows, column)
    head = ["window", "other layers", "KV budget at 8k", "trained at", "KL at 512", "KL at 2,048", "KL at 4k to 8k"]
    return table([*head, "perplexity at 4k to 8k, teacher / student"], rows)


# The suite `offline` ------------------------------------------------------------------------------------------------

ASKED = {
    "heldout_perplexity": "bits_per_byte",
    "heldout_cloze": "acc_norm",
    "bigbench": "acc_norm",
    "needle_1": "acc",
    "needle_4": "acc",
    "variables": "acc",
    "copy": "exact_match",
}
STUDENTS = ["chosen layers, 512", "mix, 512", "MLA 128, 512", "mix, 2,048", "MLA 128, 2,048"]


def offline() -> str:
    """Differences to the teacher with their intervals; bold = inferior, a tick = non-inferior."""
    marks = {"inferior": "**{}**", "non-inferior": "{} ✓", "inconclusive": "{}"}
    rows = []
    for task, metric in ASKED.items():
        found = [row for each in data("smollm2_offline") for row in each["tasks"]]
        asked = [row for row in found if (row["task"], row["metric"]) == (task, metric)]
        rows.append([f"{task}, {asked[0]['n']:,}", task_row(asked[0]).teacher])
        rows[-1] += [marks[row["verdict"]].format(difference(row)) for row in asked]
    return table(["task, questions", "teacher", *STUDENTS], rows)


def difference(row: dict[str, Any]) -> str:
    """Student less teacher with its interval: bits per byte, or points."""
    keys = ("difference", "ci_low", "ci_high")
    scale, places = (1, 3) if row["metric"] == "bits_per_byte" else (100, 1)
    return "{} [{}, {}]".format(*(f"{scale * row[key]:+.{places}f}".replace("-", "−") for key in keys))


def by_context(measure: str) -> str:
    """By context: KL or perplexity of the tokens in its second half, or the share found of what lies far back."""
    students = data("smollm2_offline")
    rows = []
    for context in sorted({row["context"] for row in students[0]["retrieval"]}):
        if measure in ASKED:
            teacher = f"{found_share(students[0], measure, context, 'teacher'):.0%}"
            cells = [f"{found_share(found, measure, context, 'student'):.0%}" for found in students]
        else:
            spans = [next(span for span in found["by_position"] if span["end"] == context) for found in students]
            teacher = digits(math.exp(spans[0]["nll_teacher"])) if measure == "perplexity" else "0"
            key, shown = ("nll_student", math.exp) if measure == "perplexity" else ("kl", float)
            cells = [digits(shown(span[key])) for span in spans]
        rows.append([f"{context:,}", teacher, *cells])
    return table(["context", "teacher", *STUDENTS], rows)


def found_share(found: dict[str, Any], task: str, context: int, model: str) -> float:
    """How much of what lies far back in a context was found, over all depths."""
    shares = [row[model] for row in found["retrieval"] if (row["task"], row["context"]) == (task, context)]
    return float(sum(shares) / len(shares))


# Speed --------------------------------------------------------------------------------------------------------------

MODELS = {"smollm2-135m": "SmolLM2-135M", "qwen3-8b": "Qwen3-8B"}


def what_is_timed(what: dict[str, Any]) -> str:
    trained = {"attention": ", attention trained", "all": ", all trained"}.get(what.get("train"), "")
    checkpointing = ", activation checkpointing" if what.get("activation_checkpointing") else ""
    return f"{MODELS[what['model']]}, stage {what['stage'][-1]}{trained}{checkpointing}"


def bench_one_gpu() -> str:
    rows = []
    for found in data("bench_one_gpu"):
        what = found["what"]
        naive = f"{found['naive_over_step']:.1f}" if found.get("naive_over_step") else ""
        over, use = f"{found['step_over_bound']:.2f}", f"{found['flop_utilisation']:.0%}"
        batch = what["batch"].replace("x", " x ")
        rows.append([what_is_timed(what), what["precision"], batch, digits(found["tokens_per_s"]), over, use, naive])
    head = ["", "precision", "batch", "tokens/s", "step / bound", "FLOP utilisation", "naive / step"]
    return table(head, rows)


def bench_two_gpus() -> str:
    rows = []
    for found in data("bench_two_gpus"):
        what = found["what"]
        if what["strategy"] == "layers":  # is no longer there
            continue
        held, alone = (each["weights_gradients_optimizer_bytes"] / 1e9 for each in (found, found["alone"]))
        text = "whole" if what["strategy"] == "ddp" else f"{held:.1f} GB of {alone:.1f}"
        share = f"{found['communication_share']:.0%}"
        rows.append([what_is_timed(what), what["strategy"], f"**{found['scaling_efficiency']:.2f}**", text, share])
    head = ["", "strategy", "efficiency", "weights, gradients, optimizer on each GPU", "share of time in NCCL kernels"]
    return table(head, rows)


def bench_trl() -> str:
    rows = []
    for trained in ("attention", "all"):
        found = data("bench_trl")[trained]
        ours, theirs = (next(row for row in found["rows"] if row["name"] == name) for name in ("ours", "distillation"))
        speeds = [a / b for a, b in zip(ours["of_rounds"], theirs["of_rounds"])]
        ratio = f"**{ours['tokens_per_s'] / theirs['tokens_per_s']:.1f}** ({min(speeds):.1f} to {max(speeds):.1f})"
        cells = [f"{row['tokens_per_s']:.0f}" for row in (ours, theirs)]
        rows.append([trained, *cells, ratio, f"{ours['peak_bytes'] / theirs['peak_bytes']:.2f}"])
    head = ["trained", "ours, tokens/s", "TRL, tokens/s", "ours / TRL (by round)", "peak memory, ours / TRL"]
    return table(head, rows)


def bench_decode() -> str:
    found = data("bench_decode")
    models = [row["model"] for row in found["largest_batch"]]

    def cells(values: dict[str, float]) -> list[str]:
        teacher = values[models[0]]
        return [digits(teacher), *(f"{digits(values[name])} (**{values[name] / teacher:.2f}**)" for name in models[1:])]

    speeds: dict[str, dict[str, float]] = {}
    for row in found["efficiency"]:
        place = f"{row['batch']:,} x {row['context']:,}"
        speeds.setdefault(place, {})[row["model"]] = row["decode_tokens_per_s"]["median"]
    rows = [[place, *cells(values)] for place, values in speeds.items()]
    budget = found["largest_batch"][0]["budget_bytes"] / 1e9
    largest = {row["model"]: row["batch"] for row in found["largest_batch"]}
    rows.append([f"largest batch in {budget:g} GB", *cells(largest)])
    return table(["tokens/s, batch x context", *models], rows)


def bench_cuda_graph() -> str:
    rows, found = [], data("bench_cuda_graph")
    for plain, graph in zip(found[::2], found[1::2]):
        speeds = [row["tokens_per_s"] for row in (plain, graph)]
        batch = plain["what"]["batch"].replace("x", " x ")
        rows.append([what_is_timed(plain["what"]), batch, *map(digits, speeds), f"**{speeds[1] / speeds[0]:.2f}**"])
    return table(["", "batch", "tokens/s", "with `cuda_graph`", "ratio"], rows)


def precision() -> str:
    kinds = ("q_proj", "o_proj", "kv_b_proj", "kv_a_layernorm")
    rows = []
    for found in data("precision")["rows"]:
        moved = [f"{found['moved'][kind]:.0%}" for kind in kinds]
        rows.append([f"`{found['precision']}`", found["dtype"], *moved, digits(found["kl"])])
    return table(["precision", "frozen weights", *(f"`{kind}`" for kind in kinds), "KL"], rows)


TABLES: dict[str, Callable[..., str]] = {
    made.__name__: made
    for made in (
        *(
            conversions,
            times,
            quickstart,
            study,
            pilots,
            bench_init,
            sensitivity,
            sequences,
            windows,
            offline,
            by_context,
        ),
        *(bench_one_gpu, bench_two_gpus, bench_trl, bench_decode, bench_cuda_graph, precision),
    )
}
MARKED = re.compile(r"(<!-- table (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def remade(page: str) -> str:
    """A page with its tables made again."""

    def one(match: re.Match[str]) -> str:
        name, _, arguments = match[2].partition(" ")
        return f"{match[1]}{TABLES[name](*filter(None, arguments.split('; ')))}\n{match[3]}"

    return MARKED.sub(one, page)


def pages() -> list[Path]:
    """README and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    for path in pages():
        write_atomically(path, remade(path.read_text("utf-8")))


if __name__ == "__main__":
    main()
