"""`pl-attnedit eval`: teacher and student answer the same lm-eval tasks."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from pl_attnedit.data import TextDataModule
from pl_attnedit.errors import invalid
from pl_attnedit.eval.formatting import points_or_value, value_of
from pl_attnedit.eval.harness import EvaluationResult, evaluate_pair
from pl_attnedit.eval.records import log_evaluation
from pl_attnedit.eval.tasks import OFFLINE_TASKS, build_offline_tasks
from pl_attnedit.teachers.source import load_teacher


def main(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(prog="pl-attnedit eval", description="Evaluate a converted model against its teacher.")
    parser.add_argument("student", help="folder of a converted model, e.g. runs/quickstart/student")
    parser.add_argument("--teacher", required=True, help="hub name, folder, GGUF file or package:NAME")
    parser.add_argument("--text", default="builtin:", help="text whose held-out documents make the tasks")
    parser.add_argument("--tasks", nargs="+", help="tasks in --task-folder instead of those made from --text")
    parser.add_argument("--task-folder", help="folder with lm-eval task YAMLs")
    parser.add_argument("--documents", type=int, default=8, help="held-out passages for perplexity (default 8)")
    parser.add_argument("--cloze", type=int, default=48, help="cloze questions (default 48)")
    parser.add_argument("--seq-len", type=int, default=512, help="longest window in tokens (default 512)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--limit", type=int, help="only the first samples of each task")
    parser.add_argument("--out", help="folder for results.json and the samples (default: eval beside the student)")
    parser.add_argument("--log-to", help="MLflow run id of the conversion that the result belongs to")
    parser.add_argument("--tracking-uri", help="MLflow (default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db)")
    options = parser.parse_args(list(arguments))

    from pl_attnedit import load

    student = load(options.student)
    teacher, tokenizer = load_teacher(options.teacher, dtype=student.dtype)
    out = Path(options.out or Path(options.student).parent / "eval")
    if (options.tasks is None) != (options.task_folder is None):
        raise invalid("--tasks", options.tasks, "needs --task-folder, and the reverse")
    if options.tasks is None:
        data = TextDataModule(options.teacher, options.text, seq_len=options.seq_len)
        data.setup("validate")
        folder: str | Path = build_offline_tasks(
            data.held_out_texts(), out / "tasks", n_documents=options.documents, n_cloze=options.cloze
        )
        tasks: Sequence[str] = OFFLINE_TASKS
    else:
        folder, tasks = options.task_folder, options.tasks
    result = evaluate_pair(
        teacher,
        student,
        tokenizer,
        tasks,
        task_folder=folder,
        max_length=options.seq_len,
        batch_size=options.batch_size,
        limit=options.limit,
        out_dir=out,
    )
    if options.log_to:
        _log(result, options.log_to, options.tracking_uri, out)
    print(_table(result))
    print(f"{out}/results.json")
    return 0


def _log(result: EvaluationResult, parent: str, tracking_uri: str | None, out: Path) -> None:
    from pl_attnedit.tracking import TrackedRun, connect
    from pl_attnedit.tracking.conversion import start_child

    child = start_child(parent, "evaluation", client=connect(tracking_uri), status="RUNNING")
    with TrackedRun(child, out / ".mlflow", tracking_uri=tracking_uri) as run:
        log_evaluation(result, run)


def _table(result: EvaluationResult) -> str:
    rows = [("task", "metric", "n", "teacher", "student", "student - teacher [95% interval]", "p (Holm)")]
    for row in result.tasks:
        low, high = points_or_value(row.metric, row.ci_low), points_or_value(row.metric, row.ci_high)
        difference = f"{points_or_value(row.metric, row.difference)} [{low}, {high}]"
        values = (value_of(row.metric, row.teacher), value_of(row.metric, row.student))
        rows.append((row.task, row.metric, str(row.n), *values, difference, f"{row.p_holm:.3g}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
