"""Tables of what conversions lose: whole ones, and single choices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pl_attnedit.conversion.study_results import ratio_text
from results.figures.data import CONVERSIONS, PHASES, bold_least, data, digits, kl, table


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


def recipes(*names: str) -> str:
    """The shipped recipes beside other conversions, given as NAME=text."""
    rows = []
    for name, _, text in (each.partition("=") for each in names):
        if name in PHASES:
            found = PHASES[name]
            budget, tokens = found["kv_budget"]["8192"], found["tokens_stage1"] + found["tokens_stage2"]
            short, long, far = found["fidelity"]["512"], found["fidelity"]["2048"], kl(found["tokens_4k_8k"])
        else:
            found = CONVERSIONS[name]
            budget, tokens, far = found["kv_budget"], found["tokens"], "-"
            short, long = found["fidelity"]["fidelity"], found["fidelity"].get("fidelity_2k")
        values = [kl(short), f"{short['top1']:.1%}", kl(long), far]
        rows.append([text or name, f"{budget:.0%}", f"{tokens / 1e6:.0f}M", *values])
    for column in (3, 5, 6):
        bold_least(rows, column)
    head = ["", "KV budget at 8k", "tokens", "KL at 512", "top-1 at 512", "KL at 2,048", "KL at 4k to 8k"]
    return table(head, rows)


def phases() -> str:
    """The conversions that went through lengths, by context."""
    rows = []
    for name, found in PHASES.items():
        far = found["tokens_4k_8k"]
        values = [kl(found["fidelity"]["512"]), kl(found["fidelity"]["2048"]), kl(far), f"{far['top1']:.1%}"]
        late = f"{far['ppl_teacher']:.2f} / {far['ppl_student']:.2f}"
        alone = f"{found['wall_seconds'] / 60:.1f} min" if found["alone_on_its_gpu"] else "-"
        rows.append([name, f"{found['kv_budget']['8192']:.1%}", *values, late, alone])
    head = ["", "KV budget at 8k", "KL at 512", "KL at 2,048", "KL at 4k to 8k", "top-1 there"]
    return table([*head, "perplexity there, teacher / student", "time, alone on the GPU"], rows)


def times() -> str:
    """How long the conversions took that had a GPU to themselves."""
    rows = []
    for name, found in data("smollm2_alone")["rows"].items():
        name = name.rsplit("-", 1)[0].replace("_", " ")
        if name in CONVERSIONS and "wall_seconds" in found:  # others were replaced
            seconds = [f"{found[key]:.0f} s" for key in ("seconds_to_the_end_of_stage2", "wall_seconds")]
            rows.append([name, f"{CONVERSIONS[name]['tokens'] / 1e6:.0f}M", *seconds])
    return table(["", "tokens", "init and both stages", "with the evaluation"], sorted(rows))


QUICKSTARTS = {
    "quickstart": "`quickstart.yaml`: GateSWA",
    "quickstart_mla": "`quickstart_mla.yaml`: MLA",
    "quickstart_gemma": "`quickstart_gemma.yaml`: MLA in the full layers",
}


def quickstart(*names: str) -> str:
    runs = [data(name) for name in names]
    [context] = {run["kv_context"] for run in runs}

    def cached(run: dict[str, Any]) -> str:
        student, teacher = run["kv_bytes_per_token_student"], run["kv_bytes_per_token_teacher"]
        return f"{student:,.0f} / {teacher:,.0f} (**{student / teacher:.0%}**)"

    cells: dict[str, Callable[[dict[str, Any]], str]] = {
        f"cached bytes per token at {context // 1024}k, student / teacher": cached,
        "training tokens, stage 1 + stage 2": lambda r: f"{r['tokens_stage1']:,} + {r['tokens_stage2']:,}",
        "KL before training": lambda r: digits(r["kl_before"]),
        "KL after stage 1": lambda r: digits(r["kl_after_stage1"]),
        "KL after stage 2": lambda r: f"**{digits(r['kl_after_stage2'])}**",
        "top-1 agreement": lambda r: f"{r['top1_after']:.1%}",
        "perplexity, teacher / student": lambda r: f"{r['ppl_teacher']:.1f} / {r['ppl_student']:.1f}",
        "wall time": lambda r: f"{r['wall_seconds'] / 60:.1f} min",
        "peak memory": lambda r: f"{r['peak_rss_bytes'] / 1e9:.1f} GB",
    }
    return table(["", *map(QUICKSTARTS.get, names)], ([name, *map(cell, runs)] for name, cell in cells.items()))


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


def bench_init_gemma() -> str:
    rows = [
        [row["name"], f"{row['kv_budget']:.0%}", digits(row["kl"]), f"{row['top1']:.1%}", digits(row["ppl_student"])]
        for row in data("bench_init_gemma")["rows"]
    ]
    return table(["three full layers", "KV budget", "KL", "top-1", "perplexity"], rows)


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


def precision() -> str:
    kinds = ("q_proj", "o_proj", "kv_b_proj", "kv_a_layernorm")
    rows = []
    for found in data("precision")["rows"]:
        moved = [f"{found['moved'][kind]:.0%}" for kind in kinds]
        rows.append([f"`{found['precision']}`", found["dtype"], *moved, digits(found["kl"])])
    return table(["precision", "frozen weights", *(f"`{kind}`" for kind in kinds), "KL"], rows)
