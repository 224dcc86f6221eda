"""The README's tables and plots, made from the data in this folder: `make figures`.

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`, a plot is `results/NAME.svg`.
tests/test_readme.py makes all of them again and compares.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pl_attnedit.conversion.study import ratio_text
from pl_attnedit.eval.report.charts import Chart, Mark, Series, line_chart, scatter_chart
from pl_attnedit.eval.report.compare import fidelity_cell
from pl_attnedit.eval.report.figures import TARGET_CSS
from pl_attnedit.eval.report.formatting import markdown_table
from pl_attnedit.eval.report.tables import task_row
from pl_attnedit.files import write_atomically

FOLDER = Path(__file__).parent
README = FOLDER.parent / "README.md"
SVG_HEAD = '<svg xmlns="http://www.w3.org/2000/svg" width="660" '
# what the report's page says of colours, for a picture alone
STYLE = """
svg { --card: #fff; --ink: #1d2025; --soft: #59616c; --grid: #eceef0; --blue: #2466c9; --orange: #b4500a; --gray: #69727d;
  background: var(--card); font: 11px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) {
  svg { --card: #1c2025; --ink: #e6e8ea; --soft: #a0a8b2; --grid: #2a3037; --gray: #98a1ac;
    --blue: #74a9f7; --orange: #f0a050; }
}
text { fill: var(--soft); } .name { fill: var(--ink); } path { fill: none; }
.grid { stroke: var(--grid); } .axis { stroke: var(--gray); }
.front { stroke: var(--ink); stroke-opacity: .5; stroke-width: 1.4; stroke-dasharray: 5 3; }
.mark.gate circle { fill: var(--blue); } .mark.mla path { fill: var(--orange); } .mark.other path { fill: var(--gray); }
.line { stroke-width: 1.6; stroke-linejoin: round; } .line.train { stroke: var(--gray); } .line.held { stroke: var(--blue); }
.dot.train { fill: var(--gray); } .dot.held { fill: var(--blue); } .dot.before { fill: var(--orange); }
.mark.teacher circle { fill: none; stroke: var(--ink); stroke-width: 1.6; }
"""


def data(name: str) -> Any:
    """The content of NAME.json."""
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def rounded(value: float, to: int) -> str:
    return f"{round(value / to) * to:,.0f}"


def quickstart() -> str:
    runs = [data("quickstart"), data("quickstart_mla")]

    def row(name: str, cell: Callable[[dict[str, Any]], str]) -> list[str]:
        return [name, *map(cell, runs)]

    def cached(run: dict[str, Any]) -> str:
        student, teacher = run["kv_bytes_per_token_student"], run["kv_bytes_per_token_teacher"]
        return f"{student:,.0f} / {teacher:,.0f} ({student / teacher:.0%})"

    rows = [
        row("cached bytes per token at 8k context, student / teacher", cached),
        row("training tokens, stage 1 + stage 2", lambda r: f"{r['tokens_stage1']:,} + {r['tokens_stage2']:,}"),
        row(
            "KL before, after stage 1, after stage 2",
            lambda r: f"{r['kl_before']:.3f}, {r['kl_after_stage1']:.3f}, **{r['kl_after_stage2']:.3f}**",
        ),
        row("top-1 agreement", lambda r: f"{r['top1_after']:.1%}"),
        row("perplexity, teacher and student", lambda r: f"{r['ppl_teacher']:.1f}, {r['ppl_student']:.1f}"),
        row(
            "wall time, peak memory", lambda r: f"{r['wall_seconds'] / 60:.1f} min, {r['peak_rss_bytes'] / 1e9:.1f} GB"
        ),
    ]
    return markdown_table(["", "GateSWA, window 64, 4 sinks, SSSF", "MLA, 160+32 of 384 values"], rows)


def bench_init() -> str:
    found = {row["name"]: row["kl"] for row in data("bench_init")["rows"]}
    rows = []
    for split in ("92+36", "96+32", "144+48", "160+32"):
        inits = ("calibrated", "latent norm, calibrated", "plain svd", "random")
        values = [found.get(f"mla {split}, {init}") for init in inits]
        digits = (3, 3, 2, 2)
        cells = ["" if v is None else f"{v:.{d}f}" for v, d in zip(values, digits)]
        rows.append([f"MLA {split} = {sum(map(int, split.split('+')))}", *cells])
    windows = [found[f"gate_swa 64{sinks}, SSSF"] for sinks in (", 4 sinks", "")]
    rows.append(["GateSWA 64, SSSF: 4 sinks / none", f"{windows[0]:.3f} / {windows[1]:.3f}", "", "", ""])
    head = "cached values per token and layer (teacher 384)"
    return markdown_table([head, "calibrated", "with latent norm", "plain SVD", "random"], rows)


MODELS = {"smollm2-135m": "SmolLM2-135M", "qwen3-8b": "Qwen3-8B"}


def bench_one_gpu() -> str:
    rows = []
    for found in data("bench_one_gpu"):
        what = found["what"]
        trained = {"attention": ", attention trained", "all": ", all trained"}.get(what.get("train"), "")
        name = f"{MODELS[what['model']]}, stage {what['stage'][-1]}{trained}"
        naive = f"{found['naive_over_step']:.1f}" if found.get("naive_over_step") else ""
        speed = rounded(found["tokens_per_s"], 1000 if found["tokens_per_s"] > 1e5 else 100)
        over = f"{found['step_over_bound']:.2f}"
        use = f"{found['flop_utilisation']:.0%}"
        rows.append([name, what["precision"], what["batch"].replace("x", " x "), speed, over, use, naive])
    head = ["", "precision", "batch", "tokens/s", "step / bound", "FLOP utilisation", "naive / step"]
    return markdown_table(head, rows)


def precision() -> str:
    rows = []
    for found in data("precision")["rows"]:
        moved = [f"{found['moved'][kind]:.0%}" for kind in ("q_proj", "o_proj", "kv_b_proj", "kv_a_layernorm")]
        rows.append([found["precision"], found["dtype"], *moved, f"{found['kl']:.3f}"])
    head = ["precision", "what does not train", "q_proj", "o_proj", "kv_b_proj", "kv_a_layernorm", "KL"]
    return markdown_table(head, rows)


def bench_two_gpus() -> str:
    strategies = {"fsdp2": "FSDP2", "ddp": "DDP", "layers": "layers"}
    rows = []
    for found in data("bench_two_gpus"):
        what = found["what"]
        parts = [f"{MODELS[what['model']]}", f"stage {what['stage'][-1]}"]
        parts += [f"{what['train']} trained"] if "train" in what else []
        parts += ["activation checkpointing"] if what.get("activation_checkpointing") else []
        parts += [f"{what['layers']} layers"] if "layers" in what else []
        parts += ["16 batches of 1 x 4096 a step"] if what["strategy"] == "layers" else []
        held, alone = (each["weights_gradients_optimizer_bytes"] / 1e9 for each in (found, found["alone"]))
        held_text = "" if what["strategy"] == "ddp" else f"{held:.1f} GB (one GPU: {alone:.1f})"
        share = f"{found['communication_share']:.0%}"
        rows.append(
            [", ".join(parts), strategies[what["strategy"]], f"{found['scaling_efficiency']:.2f}", held_text, share]
        )
    head = ["", "strategy", "efficiency", "weights, gradients, optimizer per GPU", "NCCL kernels run in"]
    return markdown_table(head, rows)


def bench_trl() -> str:
    rows = []
    for trained in ("attention", "all"):
        found = data("bench_trl")[trained]
        ours, theirs = (next(row for row in found["rows"] if row["name"] == name) for name in ("ours", "distillation"))
        speeds = [a / b for a, b in zip(ours["of_rounds"], theirs["of_rounds"])]
        ratio = f"{ours['tokens_per_s'] / theirs['tokens_per_s']:.1f} times ({min(speeds):.1f} to {max(speeds):.1f})"
        cells = [f"{row['tokens_per_s']:.0f} tokens/s" for row in (ours, theirs)]
        rows.append([trained, *cells, ratio, f"{ours['peak_bytes'] / theirs['peak_bytes']:.2f}"])
    return markdown_table(["trained", "ours", "TRL", "speed", "peak memory of the process"], rows)


def smollm2() -> str:
    """The conversions of configs/studies/smollm2.yaml; MLA's also as they are exported, judged in stock transformers."""
    exports = {found["conversion"]: fidelity_cell(found["fidelity"]["fidelity"]) for found in data("smollm2_exported")}
    rows = []
    for found in sorted(data("smollm2"), key=lambda row: (row["target"], -row["kv_budget"], row["kl_after_stage2"])):
        name = conversion_name(found["name"])
        curve = ", ".join(f"{found[key]:.3f}" for key in ("kl_before", "kl_after_stage1", "kl_after_stage2"))
        tokens = f"{found['tokens'] / 1e6:.0f}M" if found["tokens"] else "none"
        short, *others = judged(found["fidelity"])
        export = exports.get(found["name"], "")
        rows.append([name, f"{found['kv_budget']:.0%}", tokens, curve, short, export, *others])
    head = ["", "KV budget at 8k", "tokens", "KL before, after stage 1, after stage 2", "KL, top-1 at 512"]
    return markdown_table([*head, "exported", "KL, top-1 at 2,048", "perplexity at 512: teacher, student"], rows)


def alone() -> str:
    """How long the conversions of `smollm2` took that had a GPU to themselves."""
    tokens, rows = {row["name"]: row["tokens"] for row in data("smollm2")}, []
    for name, found in data("smollm2_alone")["rows"].items():
        if name in tokens:  # the others were replaced
            times = [f"{found[key]:.0f} s" for key in ("seconds_to_the_end_of_stage2", "wall_seconds")]
            rows.append([conversion_name(name), f"{tokens[name] / 1e6:.0f}M", *times])
    return markdown_table(["", "tokens", "init and both stages", "with the evaluation"], sorted(rows))


def judged(suites: dict[str, dict[str, float]]) -> list[str]:
    """What the fidelity suites found, at 512 and 2,048 tokens, and the perplexities at 512."""
    short, long = suites["fidelity"], suites.get("fidelity_2k")
    return [fidelity_cell(short), fidelity_cell(long), f"{short['ppl_teacher']:.1f}, {short['ppl_student']:.1f}"]


def conversion_name(run: str) -> str:
    """What a variant of a study is called: the run's name less the seed."""
    return run.rsplit("-", 1)[0].replace("_", " ")


def pilots() -> str:
    rows = []
    for row in data("pilots_mla"):
        kls = [f"{row[key]:.3f}" for key in ("kl_before", "kl_after_stage1", "kl_after_stage2")]
        rows.append([row["variant"], *kls, f"{row['top1_after']:.1%}"])
    return markdown_table(["2.1M + 6.6M tokens", "KL before", "after stage 1", "after stage 2", "top-1"], rows)


def study(name: str) -> str:
    """The variants of a study that were run; the first is what the others are compared with."""
    rows = []
    for row in data(f"study_{name}")["rows"]:
        tokens = f"{row['tokens_stage1'] / 1e6:.1f}M + {row['tokens_stage2'] / 1e6:.1f}M"
        kls = [f"{row[key]:.3f}" for key in ("kl_before", "kl_after_stage1", "kl_after_stage2")]
        rows.append([row["variant"], str(len(row["seeds"])), tokens, *kls, f"{row['top1_after']:.1%}", ratio_text(row)])
    head = ["", "seeds", "tokens", "KL before", "after stage 1", "after stage 2", "top-1", "KL / first [95%]"]
    return markdown_table(head, rows)


def sequences() -> str:
    """How long the sequences of the training were, a conversion called TARGET_LENGTH; judged alike, by both suites."""
    found = {tuple(conversion_name(row["name"]).split()): judged(row["fidelity"]) for row in data("smollm2_sequences")}
    rows = []
    for length in sorted({int(length) for _, length in found}):
        cells = [found.get((target, str(length)), ["", ""])[:2] for target in ("MLA", "SSSF")]
        rows.append([f"{length:,}", *cells[0], *cells[1]])
    head = ["sequences of", "MLA 128: KL, top-1 at 512", "at 2,048", "SSSF, 4 sinks: KL, top-1 at 512", "at 2,048"]
    return markdown_table(head, rows)


def windows() -> str:
    """Two groups: those judged on 64, 64 and 48 sequences of 512, 2,048 and 8,192 tokens, and on 64, 32 and 16."""
    rows = []
    for found in data("smollm2_windows"):
        latent = found["targets"].get("M")
        letters = {letter: found["pattern"].count(letter) for letter in "MF"}
        name = f"windows of {found['targets']['S']['window']}"
        name += f", {letters['M']} x MLA {latent['kv_lora_rank']}+{latent['qk_rope_head_dim']}" if letters["M"] else ""
        name += f", {letters['F']} full layers" if letters["F"] else ""
        name += ", stage 2 at 8e-4" if found["learning_rate_stage2"] > 4e-4 else ""
        kl = [found["fidelity"][context]["kl"] for context in ("512", "2048")]
        late = found["tokens_4k_8k"]
        row = [name, f"{found['kv_budget_8k']:.1%}", f"{found['seq_len']:,}", *(f"{each:.4f}" for each in kl)]
        nll = [math.exp(late[f"nll_{model}"]) for model in ("teacher", "student")]
        rows.append([*row, f"{late['kl']:.3f}", "{:.2f}, {:.2f}".format(*nll)])
    head = [
        "",
        "KV budget at 8k",
        "trained at",
        "KL at 512",
        "at 2,048",
        "tokens 4k-8k",
        "perplexity there: teacher, student",
    ]
    return markdown_table(head, rows)


def sensitivity() -> str:
    found = data("sensitivity_gate_swa")
    rows = []
    for name, text in (("plan", "by sensitivity"), ("evenly_spread", "evenly spread")):
        row = found[name]
        full = ", ".join(str(i) for i, letter in enumerate(row["pattern"]) if letter == "F")
        rows.append([text, full, f"{row['kl']:.3f} ± {row['kl_error']:.3f}", f"{row['top1']:.1%}"])
    return markdown_table(["full layers, chosen", "which", "KL, untrained", "top-1"], rows)


def bench_decode() -> str:
    found = data("bench_decode")
    models = [row["model"] for row in found["largest_batch"]]

    def cells(values: dict[str, float]) -> list[str]:
        teacher = values[models[0]]
        return [f"{teacher:,.0f}", *(f"{values[name]:,.0f} ({values[name] / teacher:.2f})" for name in models[1:])]

    speeds: dict[str, dict[str, float]] = {}
    for row in found["efficiency"]:
        place = f"{row['batch']:,} x {row['context']:,}"
        speeds.setdefault(place, {})[row["model"]] = row["decode_tokens_per_s"]["median"]
    rows = [[place, *cells(values)] for place, values in speeds.items()]
    budget = found["largest_batch"][0]["budget_bytes"] / 1e9
    rows.append(
        [
            f"largest batch in {budget:g} GB, sequences",
            *cells({row["model"]: row["batch"] for row in found["largest_batch"]}),
        ]
    )
    return markdown_table(["tokens/s, batch x context", *models], rows)


def bench_cuda_graph() -> str:
    rows = []
    found = data("bench_cuda_graph")
    for plain, graph in zip(found[::2], found[1::2]):
        what = plain["what"]
        name = f"{MODELS[what['model']]}, stage {what['stage'][-1]}" + (", all trained" if "train" in what else "")
        speeds = [row["tokens_per_s"] for row in (plain, graph)]
        rows.append([name, what["batch"].replace("x", " x "), *(rounded(each, 1000) for each in speeds)])
        rows[-1].append(f"{speeds[1] / speeds[0]:.2f}")
    return markdown_table(["", "batch", "tokens/s", "with `cuda_graph`", "ratio"], rows)


ASKED = {
    "heldout_perplexity": "bits_per_byte",
    "heldout_cloze": "acc_norm",
    "bigbench": "acc_norm",
    "needle_1": "acc",
    "needle_4": "acc",
    "variables": "acc",
    "copy": "exact_match",
}


def offline() -> str:
    """What the suite asked each student, beside the teacher."""
    students = data("smollm2_offline")
    rows = []
    for task, metric in ASKED.items():
        asked = [
            task_row(next(row for row in found["tasks"] if (row["task"], row["metric"]) == (task, metric)))
            for found in students
        ]
        rows.append([task, metric, str(asked[0].n), asked[0].teacher])
        rows[-1] += [f"{row.student}, {row.difference} [{row.low}, {row.high}], {row.verdict}" for row in asked]
    head = ["task", "metric", "n", "teacher"]
    return markdown_table([*head, *(conversion_name(found["conversion"]) for found in students)], rows)


def offline_by_context(long: bool) -> str:
    """The same by context, the teacher and each student: the perplexity of the tokens in its second half, and whether
    something far back is found. long: of the students trained at 2,048 tokens, not of those at 512."""
    students = [found for found in data("smollm2_offline") if ("sequences_of_2048" in found["conversion"]) == long]
    rows = []
    for context in sorted({row["context"] for row in students[0]["retrieval"]}):
        spans = [next(span for span in found["by_position"] if span["end"] == context) for found in students]
        likelihoods = [spans[0]["nll_teacher"], *(span["nll_student"] for span in spans)]
        cells = [", ".join(f"{span['kl']:.3f}" for span in spans)]
        cells.append(", ".join(f"{math.exp(each):.1f}" for each in likelihoods))
        for task in ("needle_1", "needle_4", "variables", "copy"):
            shares = [found_share(students[0], task, context, "teacher")]
            shares += [found_share(found, task, context, "student") for found in students]
            cells.append(", ".join(f"{share:.0%}" for share in shares))
        rows.append([f"{context:,}", *cells])
    head = ["context", "KL", "perplexity", "one needle", "one of four", "variables", "copy"]
    return markdown_table(head, rows)


def found_share(found: dict[str, Any], task: str, context: int, model: str) -> float:
    """How much of what lies far back in a context was found, over all depths."""
    shares = [row[model] for row in found["retrieval"] if (row["task"], row["context"]) == (task, context)]
    return float(sum(shares) / len(shares))


def pareto() -> Chart:
    """KL against KV budget of the conversions."""
    marks = [Mark("teacher", 100.0, 0.0, "teacher")]
    for found in data("smollm2"):
        kl, css = found["fidelity"]["fidelity"]["kl"], TARGET_CSS.get(found["target"], "other")
        marks.append(Mark(conversion_name(found["name"]), 100 * found["kv_budget"], kl, css))
    return scatter_chart(marks, "KV budget at 8k context", "KL(teacher||student), nats per token")


def random_init() -> Chart:
    """KL over training tokens: calibrated and random init, and a calibrated one with a small budget."""
    runs = {row["name"]: row for row in data("smollm2")}

    def line(name: str, row: dict[str, Any], css: str) -> Series:
        a_step = row["tokens"] / sum(steps[-1] for steps, _ in stages(row))  # tokens
        points, before = [], 0
        for steps, values in stages(row):
            points += [((before + step) * a_step / 1e6, value) for step, value in zip(steps, values)]
            before += steps[-1]
        return Series(name, points, css, dots=True)

    low = next(row for row in data("study_mla")["rows"] if row["variant"] == "stage 2 rate 2e-4")
    small = ((low["tokens_stage1"] + low["tokens_stage2"]) / 1e6, low["kl_after_stage2"])
    series = [line("random", runs["MLA_128_random_init-0"], "train"), line("calibrated", runs["MLA_128-0"], "held")]
    series.append(Series("calibrated, small budget", [small], "before", dots=True))
    return line_chart(series, "million training tokens, both stages", "KL(teacher||student), held out")


def stages(row: dict[str, Any]) -> list[tuple[list[int], list[float]]]:
    """Steps and held-out KL of a conversion's stages."""
    return [(curve["steps"], curve["values"]) for curve in row["curves"] if curve["metric"] == "val/kl"]


TABLES: dict[str, Callable[[], str]] = {
    "quickstart": quickstart,
    "bench_init": bench_init,
    "bench_one_gpu": bench_one_gpu,
    "precision": precision,
    "bench_two_gpus": bench_two_gpus,
    "bench_trl": bench_trl,
    "bench_decode": bench_decode,
    "bench_cuda_graph": bench_cuda_graph,
    "offline": offline,
    "offline_by_context": partial(offline_by_context, False),
    "offline_by_context_2048": partial(offline_by_context, True),
    "smollm2": smollm2,
    "alone": alone,
    "sensitivity": sensitivity,
    "pilots": pilots,
    "study_mla": partial(study, "mla"),
    "study_gate_swa": partial(study, "gate_swa"),
    "sequences": sequences,
    "windows": windows,
}
PLOTS: dict[str, Callable[[], Chart]] = {"smollm2_kv_budget": pareto, "smollm2_random_init": random_init}


def with_tables(text: str) -> str:
    """The README's text with its tables made again."""
    for name, made in TABLES.items():
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text, found = re.subn(pattern, lambda match: f"{match[1]}{made()}\n{match[2]}", text, flags=re.DOTALL)  # noqa: B023
        if found != 1:
            raise ValueError(f"{README.name} must have one table {name}, has {found}")
    return text


def plots() -> dict[Path, str]:
    """The plots' files and their content."""
    found = {}
    for name, made in PLOTS.items():
        svg = str(made().svg).replace("<svg ", SVG_HEAD, 1)
        end = svg.index(">") + 1
        found[FOLDER / f"{name}.svg"] = f"{svg[:end]}<style>{STYLE}</style>{svg[end:]}\n"
    return found


def main() -> None:
    for path, text in {README: with_tables(README.read_text("utf-8")), **plots()}.items():
        write_atomically(path, text)


if __name__ == "__main__":
    main()
