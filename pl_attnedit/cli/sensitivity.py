"""`pl-attnedit sensitivity`: what editing each layer costs, and an edit plan for a KV budget."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import expanduser
from typing import Any

from pl_attnedit.cli.devices import device_option, torch_device
from pl_attnedit.cli.options import (
    TEACHER_HELP,
    OptionParser,
    at_least,
    earlier_spelling,
    json_option,
    out_option,
    show,
    yaml_value,
)
from pl_attnedit.errors import invalid
from pl_attnedit.files import check_output, json_text, write_atomically


def main(arguments: Sequence[str]) -> int:
    parser = OptionParser(
        prog="pl-attnedit sensitivity",
        description="Edit one layer at a time, without training, and measure how far the model moves. With --budget also "
        "print a pattern that keeps full the layers whose editing costs most per cached byte; it goes into a recipe. "
        "ProgressiveUnfreezing takes the file as its order.",
    )
    parser.add_argument("--teacher", required=True, help=TEACHER_HELP)
    parser.add_argument(
        "--target",
        required=True,
        type=yaml_value,
        help="as in a recipe: '{type: gate_swa, window: 64, sinks: 4}', or several by letter: '{S: ..., M: ...}'",
    )
    help_ = "text, as a recipe's data.source; its training split is read (default builtin:)"
    text = parser.add_argument("--text", type=expanduser, default="builtin:", help=help_)
    earlier_spelling(parser, "--source", text)
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a sequence (default 512)")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of a batch (default 4)")
    parser.add_argument(
        "--tokens", type=int, default=16384, help="to measure on, and as many others to calibrate on (default 16384)"
    )
    parser.add_argument(
        "--by",
        choices=("kl", "answers"),
        default="kl",
        help="what a layer's cost is: KL on the text (default), or what answers lose that stand far back in the context, "
        "of the tasks needle_4 and copy; KL is measured, too",
    )
    parser.add_argument(
        "--answer-context", type=int, help="with --by answers: tokens of a prompt; default 8192, or the teacher's limit"
    )
    parser.add_argument(
        "--answers", type=int, default=32, help="with --by answers: prompts, half of each task (default 32)"
    )
    parser.add_argument("--budget", type=float, help="KV budget of the plan: cached bytes, student / teacher")
    parser.add_argument("--context", type=int, help="of the budget, in tokens; default 32k, or the teacher's limit")
    device_option(parser)
    parser.add_argument("--dtype", default="auto", help="of all weights; default the teacher's own")
    out_option(parser, "sensitivity.json", "file for the result (default sensitivity.json)")
    json_option(parser)
    options = parser.parse_args(list(arguments))
    at_least(1, options, "batch_size", "tokens", "context", "answer_context")
    at_least(2, options, "seq_len")
    at_least(4, options, "answers")
    if options.budget is not None and options.budget >= 1:
        raise invalid("--budget", options.budget, "must be below 1: at 1 nothing is edited")
    check_output("--out", options.out)
    result = _measure(options)
    show(result, _table(result), write_atomically(options.out, json_text(result)), as_json=options.json)
    return 0


def _measure(options: Any) -> dict[str, Any]:
    from pl_attnedit.data.lookups import check_judged
    from pl_attnedit.distillation.settings import parse_targets, plain_targets
    from pl_attnedit.eval.fidelity.untrained import UntrainedPlans, cached_by_letter, single_edits
    from pl_attnedit.eval.progress import Progress
    from pl_attnedit.modeling import EditPlan
    from pl_attnedit.modeling.kv import kv_context
    from pl_attnedit.modeling.ranking import COST, Sensitivity
    from pl_attnedit.teachers.sources.resolve import load_teacher

    check_judged("--text", options.text)
    parsed = parse_targets(options.target)
    targets = parsed if isinstance(parsed, dict) else {"S": parsed}
    EditPlan("", targets)  # checks the letters
    device = torch_device(options.device)
    teacher, tokenizer = load_teacher(options.teacher, options.dtype, device)
    layers, limit = teacher.config.num_hidden_layers, teacher.config.max_position_embeddings
    context = kv_context(teacher) if options.context is None else options.context
    if context > limit:
        raise invalid("--context", context, f"must be at most {limit}, the teacher's limit")
    if options.answer_context is not None and options.answer_context > limit:
        raise invalid("--answer-context", options.answer_context, f"must be at most {limit}, the teacher's limit")
    cached = None if options.budget is None else cached_by_letter(teacher, targets, context)
    if cached is not None:  # a budget that cannot be kept is an error before the work
        Sensitivity({letter: [1.0] * layers for letter in targets}).plan(cached, options.budget)
    calibration, batches = _text(options, tokenizer, targets)
    questions = _questions(options, tokenizer, batches, limit) if options.by == "answers" else []
    progress = Progress(every=5)
    progress.say("init of all layers")
    plans = UntrainedPlans(teacher, targets, calibration)
    singles = [plan for letter in targets for plan in single_edits(layers, letter)]
    rows = _rows(plans, singles, batches, questions, progress)
    columns = {letter: rows[i * layers : (i + 1) * layers] for i, letter in enumerate(targets)}
    text = {"source": options.text, "seq_len": options.seq_len, "tokens": sum(batch.numel() for batch in batches)}
    found = {"teacher": options.teacher, "targets": plain_targets(targets), "text": text}
    found |= {"by": options.by, "layers": columns}
    if cached is not None:
        scores = Sensitivity({letter: [row[COST[options.by]] for row in column] for letter, column in columns.items()})
        chosen = {"plan": scores.plan(cached, options.budget)}
        found |= {"context": context, **_plans(plans, chosen, cached, batches, questions, progress)}
    return found


def _rows(plans: Any, letters: list[str], batches: Any, questions: Any, progress: Any) -> list[Any]:
    """What `UntrainedPlans` measures on the text, and on answers where there are questions."""
    progress.begin(len(letters) * (len(batches) + len(questions)), dict)
    rows = plans.measure(letters, batches, progress)
    if questions:
        for row, of_answers in zip(rows, plans.measure(letters, questions, progress)):
            row |= {"answer_loss": of_answers["nll_difference"], "answer_error": of_answers["nll_error"]}
    return rows


def _questions(options: Any, tokenizer: Any, batches: Any, limit: int) -> list[Any]:
    """(ids, mask of what predicts the answer), a prompt each, the filler out of the text that is measured."""
    import torch

    from pl_attnedit.eval.harness.retrieval import answered_prompts

    context = min(8192, limit) if options.answer_context is None else options.answer_context
    texts = [tokenizer.decode(row, skip_special_tokens=True) for batch in batches for row in batch]
    found = []
    for task in ("needle_4", "copy"):
        for ids, answer in answered_prompts(texts, tokenizer, task, context, options.answers // 2):
            mask = torch.zeros(1, len(ids), dtype=torch.bool)
            mask[0, -answer - 1 : -1] = True
            found.append((torch.tensor([ids]), mask))
    return found


def _text(options: Any, tokenizer: Any, targets: dict[str, Any]) -> tuple[Any, Any]:
    """Batches to calibrate on, where a target needs it, and others to measure on; both from the training split."""
    import torch

    from pl_attnedit.attention import init_of
    from pl_attnedit.data import TextDataModule

    data = TextDataModule(tokenizer, options.text, seq_len=options.seq_len, batch_size=options.batch_size)
    calibrates = any(init_of(target, "calibrated").needs_text for target in targets.values())
    limit = len(data.train_sequences) // (1 + calibrates) * options.seq_len
    if options.tokens > limit:
        half = " half of" if calibrates else ""
        raise invalid("--tokens", options.tokens, f"must be at most {limit},{half} the training split")
    tokens = max(options.tokens, options.seq_len)  # at least one sequence of each kind
    if not calibrates:
        return None, [batch["input_ids"] for batch in data.calibration_batches(tokens)]
    both = torch.cat([batch["input_ids"] for batch in data.calibration_batches(2 * tokens)])
    return both[0::2].split(options.batch_size), both[1::2].split(options.batch_size)


def _plans(
    plans: Any, chosen: dict[str, str], cached: dict[str, Any], batches: Any, questions: Any, progress: Any
) -> dict[str, Any]:
    """The plan for a budget, measured as a whole, beside as many full layers evenly spread."""
    from pl_attnedit.modeling.ranking import kv_share, spread_evenly
    from pl_attnedit.teachers import editable_layers

    if len(plans.targets) == 1 and "F" in chosen["plan"]:
        chosen["evenly_spread"] = spread_evenly(
            chosen["plan"], next(iter(plans.targets)), editable_layers(plans.teacher.config)
        )
    measured = _rows(plans, list(chosen.values()), batches, questions, progress)
    return {
        name: {"pattern": letters, "kv_budget": kv_share(cached, letters), **row}
        for (name, letters), row in zip(chosen.items(), measured)
    }


def _table(result: dict[str, Any]) -> str:
    from pl_attnedit.eval.report.formatting import with_error

    columns = result["layers"]
    answers = result["by"] == "answers"
    more = f" {'answers':>9} {'+-':>8}" if answers else ""
    heads = [f"{letter}: {'KL':>7} {'+-':>8} {'NLL diff':>9}{more}" for letter in columns]
    lines = ["layer  " + "   ".join(heads)]
    for index, rows in enumerate(zip(*columns.values())):
        cells = [_cells(row, answers) for row in rows]
        lines.append(f"{index:5}  " + "   ".join(cells))
    for name in ("plan", "evenly_spread"):
        if name in result:
            row = result[name]
            lines.append(
                f"{name.replace('_', ' ')}: KV budget {row['kv_budget']:.1%} at {result['context']} tokens, untrained KL "
                f"{with_error(row['kl'], row['kl_error'])}, top-1 agreement {row['top1']:.1%}\npattern: {row['pattern']}"
            )
    return "\n".join(lines)


def _cells(row: dict[str, Any], answers: bool) -> str:
    error = "" if row["kl_error"] is None else f"{row['kl_error']:.5f}"
    text = f"{row['kl']:10.5f} {error:>8} {row['nll_difference']:9.5f}"
    return f"{text} {row['answer_loss']:9.5f} {row['answer_error']:8.5f}" if answers else text
