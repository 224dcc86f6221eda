"""`pl-attnedit eval`: teacher and student answer the same lm-eval tasks."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pl_attnedit.cli.devices import device_option, torch_device
from pl_attnedit.cli.options import OptionParser, json_option, known_teacher, out_option, show, teacher_option
from pl_attnedit.errors import invalid

if TYPE_CHECKING:  # it imports lm-eval, which takes seconds
    from pl_attnedit.eval.harness.differences import EvaluationResult


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(list(arguments))
    options.out = Path(options.out or Path(options.student).parent / "eval" / Path(options.suite or "").stem)
    _check(options)
    options.teacher = known_teacher(options.teacher, options.student)
    options.device = str(torch_device(options.device))
    if options.log_to is not None:
        _check_run(options.log_to, options.teacher, options.tracking_uri)
    result = _by_suite(options) if options.suite else _by_tasks(options)
    if options.log_to:
        _log(result, options)
    show(result.content(), _table(result), f"{options.out}/results.json", as_json=options.json)
    return 0


def _parser() -> OptionParser:
    parser = OptionParser(prog="pl-attnedit eval", description="Evaluate a converted model against its teacher.")
    parser.add_argument(
        "student",
        type=expanduser,
        help="folder of a converted model, e.g. runs/quickstart/student, or one that export wrote in the format deepseek_v3 "
        "(not step3p7); or a .ckpt of fit",
    )
    teacher_option(parser, "the student's own")
    parser.add_argument(
        "--suite",
        type=expanduser,
        help="quick, fidelity, offline, paper, or a YAML file; default: perplexity and cloze of --text",
    )
    parser.add_argument(
        "--text",
        type=expanduser,
        default="builtin:",
        help="text to make tasks of: all of it that the student was not trained on, of builtin: what conversions hold out "
        "(default builtin:)",
    )
    parser.add_argument(
        "--bigbench",
        nargs="+",
        type=expanduser,
        help="folder or .jsonl files with BIG-bench's questions (suite offline)",
    )
    parser.add_argument("--tasks", nargs="+", help="instead of a suite: tasks in --task-folder or of lm-eval's library")
    parser.add_argument("--task-folder", type=expanduser, help="folder with lm-eval task YAMLs")
    parser.add_argument("--documents", type=int, help="held-out passages for perplexity (default 8)")
    parser.add_argument("--cloze", type=int, help="cloze questions (default 48)")
    parser.add_argument("--seq-len", type=int, help="longest window in tokens (default 512)")
    parser.add_argument("--batch-size", default="auto", help="a number, or auto (default): as large as memory allows")
    parser.add_argument("--limit", type=int, help="only the first samples of each task")
    device_option(parser)
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of both models (default: the one in which the student is saved)",
    )
    out_option(
        parser, None, "folder for results.json and the samples (default: eval, or eval/SUITE, beside the student)"
    )
    json_option(parser)
    parser.add_argument("--log-to", help="MLflow run id of the conversion, or of an evaluation that has begun")
    parser.add_argument("--tracking-uri", help="MLflow (default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db)")
    return parser


def _check(options: Namespace) -> None:
    """Options that exclude each other or are out of range; `batch_size` becomes a number."""
    if options.batch_size != "auto":
        if not options.batch_size.isdigit():
            raise invalid("--batch-size", options.batch_size, "must be a number or auto")
        options.batch_size = int(options.batch_size)
    for name in ("tasks", "task_folder", "documents", "cloze", "seq_len", "limit"):
        if options.suite and getattr(options, name) is not None:
            raise invalid("--" + name.replace("_", "-"), getattr(options, name), "is the suite's; leave it out")
    for name in ("documents", "cloze"):
        if getattr(options, name) is not None and getattr(options, name) < 2:
            raise invalid(f"--{name}", getattr(options, name), "must be at least 2: one sample has no interval")
    if options.task_folder and not options.tasks:
        raise invalid("--task-folder", options.task_folder, "needs --tasks")


def _by_suite(options: Namespace) -> EvaluationResult:
    from pl_attnedit.eval.harness.suites import load_suite

    suite = load_suite(options.suite)
    from pl_attnedit.eval.evaluate import evaluate_suite

    return evaluate_suite(
        suite,
        options.student,
        options.teacher,
        out_dir=options.out,
        text=options.text,
        bigbench=options.bigbench,
        device=options.device,
        dtype=options.dtype,
        batch_size=options.batch_size,
    )


def _by_tasks(options: Namespace) -> EvaluationResult:
    from pl_attnedit.eval.harness.paired import evaluate_pair
    from pl_attnedit.eval.harness.tasks import OFFLINE_TASKS, build_offline_tasks
    from pl_attnedit.eval.held_out import held_out_texts, trained_on
    from pl_attnedit.eval.students import load_pair
    from pl_attnedit.teachers.sources.fingerprint import model_fingerprint
    from pl_attnedit.teachers.sources.resolve import teacher_fingerprint

    teacher, student, tokenizer = load_pair(options.student, options.teacher, options.dtype, options.device)
    folder: str | Path | None = options.task_folder
    seq_len = 512 if options.seq_len is None else options.seq_len
    settings: dict[str, Any] = {}
    if options.tasks is None:
        held_out = held_out_texts(options.teacher, options.text, trained_on(options.student), seq_len, whole=False)
        settings = {"text": options.text, **held_out.settings}
        sizes = {"n_documents": options.documents, "n_cloze": options.cloze}
        given = {name: size for name, size in sizes.items() if size is not None}
        given |= {"tokenizer": tokenizer, "max_length": seq_len}
        folder = build_offline_tasks(held_out.texts, options.out / "tasks", **given)
    return evaluate_pair(
        teacher,
        student,
        tokenizer,
        options.tasks or OFFLINE_TASKS,
        task_folder=folder,
        max_length=seq_len,
        batch_size=options.batch_size,
        limit=options.limit,
        out_dir=options.out,
        settings=settings,
        teacher_fingerprint=teacher_fingerprint(options.teacher),
        student_fingerprint=model_fingerprint(options.student),
    )


def _check_run(run_id: str, teacher: str, tracking_uri: str | None) -> None:
    """An unknown run, or one of another teacher, is an error before the work."""
    from mlflow.exceptions import MlflowException

    from pl_attnedit.teachers.sources.resolve import teacher_fingerprint
    from pl_attnedit.tracking import connect

    client = connect(tracking_uri, create=False)
    try:
        tags = client.get_run(run_id).data.tags
    except MlflowException as error:
        raise invalid("--log-to", run_id, f"must be a run in this MLflow store ({error})") from error
    known = tags.get("teacher_fingerprint")
    if known is not None and known != teacher_fingerprint(teacher):
        raise invalid(
            "--teacher", teacher, f"is not the one of run {run_id}, {tags.get('teacher', 'which is another')}"
        )


def _log(result: EvaluationResult, options: Namespace) -> None:
    """To a child of the conversion; if this is the student that it has saved, what is compared also to its own run."""
    from pl_attnedit.eval.evaluation_log import compared_metrics, log_evaluation
    from pl_attnedit.teachers.sources.fingerprint import model_fingerprint
    from pl_attnedit.tracking import TrackedRun, connect
    from pl_attnedit.tracking.client import KIND_TAG, PARENT_TAG, STUDENT_FINGERPRINT_TAG
    from pl_attnedit.tracking.conversion import start_child

    client, child = connect(options.tracking_uri), options.log_to
    tags = client.get_run(child).data.tags
    parent = tags.get(PARENT_TAG) if tags.get(KIND_TAG) == "evaluation" else child
    if parent == child:
        child = start_child(child, "evaluation", client=client, status="RUNNING")
    elif parent is not None:
        tags = client.get_run(parent).data.tags
    spool, uri = options.out / ".mlflow", options.tracking_uri
    with TrackedRun(child, spool, tracking_uri=uri) as run:
        log_evaluation(result, run)
    if parent is not None and tags.get(STUDENT_FINGERPRINT_TAG) == model_fingerprint(options.student):
        whole = TrackedRun(parent, spool, tracking_uri=uri)
        whole.log_metrics(compared_metrics(result.content()), of_model=True)
        whole.flush()


def _table(result: EvaluationResult) -> str:
    from pl_attnedit.eval.report.formatting import NONE, aligned, points_or_value, significant, value_of
    from pl_attnedit.eval.report.tables import fidelity_cells

    head = ("task", "metric", "n", "teacher", "student", "student - teacher [95% interval]", "detectable", "p (Holm)")
    rows: list[tuple[str, ...]] = [(*head, "verdict")]
    for row in result.tasks:
        low, high = points_or_value(row.metric, row.ci_low), points_or_value(row.metric, row.ci_high)
        difference = f"{points_or_value(row.metric, row.difference)} [{low}, {high}]"
        values = (value_of(row.metric, row.teacher), value_of(row.metric, row.student))
        mde = NONE if row.mde is None else points_or_value(row.metric, row.mde).removeprefix("+")
        rows.append(
            (row.task, row.metric, str(row.n), *values, difference, mde, f"{row.p_holm:.3g}", row.verdict or NONE)
        )
    for span in result.further.get("by_position", []):
        where = f"tokens {span['start']}-{span['end'] - 1}"
        rows.append(("KL to the teacher", where, str(span["n"]), NONE, significant(span["kl"]), *[NONE] * 4))
    if whole := result.further.get("fidelity"):
        tokens = str(whole["tokens"])
        rows += [(name, "all tokens", tokens, *cells, *[NONE] * 4) for name, *cells in fidelity_cells(whole)]
    return "\n".join(aligned(rows))
