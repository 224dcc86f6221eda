"""How close a student is to its teacher without any training, by target and init: one table, one command."""

from __future__ import annotations

import random
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pl_attnedit.attention import GatedDeltaNetConfig, GateSWAConfig, LayerStatistics, MLAConfig, TargetConfig, init_of
from pl_attnedit.data.encoding import encode
from pl_attnedit.data.lookups import LOOKUPS, check_judged
from pl_attnedit.data.sources import open_source, wording_hash
from pl_attnedit.distillation.metrics import Fidelity
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.eval.progress import Progress
from pl_attnedit.eval.report.formatting import aligned
from pl_attnedit.modeling.calibration import collect_statistics
from pl_attnedit.modeling.edit import assemble, build_plan, initialise_from
from pl_attnedit.modeling.kv import promised_bytes
from pl_attnedit.teachers import editable_layers

BATCH = 4  # sequences per forward pass
SEED = 0  # for the random init and the order of calibration documents
BUDGET_CONTEXT = 32768  # tokens of context for the KV budget


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    target: TargetConfig
    init: str = "calibrated"


def _mla(rank: int, rope: int, norm: bool = False, init: str = "calibrated") -> Row:
    name = f"mla {rank}+{rope}{', latent norm' if norm else ''}, {init.replace('_', ' ')}"
    return Row(name, MLAConfig(kv_lora_rank=rank, qk_rope_head_dim=rope, latent_norm=norm), init)


# cache of 128 and of 192 values per token and layer: a third and a half of SmolLM2's 384
ROWS = (
    _mla(92, 36),
    _mla(96, 32),
    _mla(92, 36, norm=True),
    _mla(96, 32, norm=True),
    _mla(96, 32, init="plain_svd"),
    _mla(96, 32, init="random"),
    _mla(144, 48),
    _mla(160, 32),
    _mla(144, 48, norm=True),
    _mla(160, 32, norm=True),
    _mla(160, 32, init="plain_svd"),
    _mla(160, 32, init="random"),
    Row("gate_swa 64, 4 sinks, SSSF", GateSWAConfig(window=64, sinks=4)),
    Row("gate_swa 64, SSSF", GateSWAConfig(window=64)),
    Row("gated_deltanet, SSSF, calibrated", GatedDeltaNetConfig()),
    Row("gated_deltanet, SSSF, random", GatedDeltaNetConfig(), "random"),
)


def bench_init(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    calibration: str,
    heldout: str,
    rows: Sequence[str] | None = None,
    seq_len: int = 512,
    calibration_sequences: int = 64,
    heldout_sequences: int = 16,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """KL(teacher || student) in nats per token and top-1 agreement of untrained students, in the teacher's dtype.

    One teacher pass over the calibration text serves all rows. Documents are joined as the tokenizer encodes them by
    itself, with EOS behind each, held-out ones in file order, of calibration ones a piece each in random order, and cut
    into sequences.

    Args:
        calibration, heldout: local files with text (.parquet, .jsonl, .txt, .md).
        rows: only those of `ROWS` whose name contains one of these; None = all that fit the teacher.

    Raises:
        UserError: no such row, a file that cannot be read or that holds too little text.
    """
    chosen = [row for row in ROWS if rows is None or any(part in row.name for part in rows)]
    if not chosen:
        raise invalid("rows", rows, f"must be part of one of: {'; '.join(row.name for row in ROWS)}")
    check_judged("heldout", heldout)
    text = sequences("calibration", calibration, tokenizer, calibration_sequences, seq_len, shuffle=True)
    needed = any(init_of(row.target, row.init).needs_text for row in chosen)
    source = open_source(calibration.removeprefix(LOOKUPS))  # `lookups:` has pieces of it
    known = {wording_hash(document) for document in source.documents()} if needed else ()
    asked = sequences("heldout", heldout, tokenizer, heldout_sequences, seq_len, known=known).to(teacher.device)
    progress = progress or Progress()
    progress.say(f"statistics of {text.numel():,} tokens")
    start = time.perf_counter()
    statistics = collect_statistics(teacher, editable_layers(teacher.config), text.split(BATCH)) if needed else {}
    seconds = time.perf_counter() - start
    reference = last_hidden(teacher, asked)
    result: dict[str, Any] = {
        "teacher": teacher.config.name_or_path,
        "calibration_tokens": text.numel(),
        "heldout_tokens": asked.numel(),
        "statistics_seconds": round(seconds, 1),
        "rows": [],
    }
    progress.begin(len(chosen), lambda: result)
    for row in chosen:
        progress.next(row.name)
        result["rows"].append(measure(row, teacher, statistics, asked, reference))
    return result


def sequences(
    field: str,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seq_len: int,
    shuffle: bool = False,
    known: Container[int] = (),
) -> torch.Tensor:
    """The first `count` sequences of a file, (count, seq_len) int64, of its documents in file order.

    shuffle: documents shuffled by `SEED`, and of each only a piece of at most `seq_len` tokens: files are often sorted by
    source and some documents long, so the first ones would stand for little of the text.
    known: hashes of documents to leave out, since students were calibrated on them.
    """
    rng = random.Random(SEED)

    def tokens() -> Iterator[int]:
        documents = list(open_source(path).documents())
        if shuffle:
            rng.shuffle(documents)
        for document in documents:
            if not isinstance(document, str):
                raise invalid(field, path, "must hold plain text, not conversations")
            if wording_hash(document) in known:
                continue
            [ids] = encode(tokenizer, [document], ends=True)
            start = rng.randrange(max(len(ids) - seq_len, 0) + 1) if shuffle else 0
            yield from ids[start : start + seq_len] if shuffle else ids

    found = list(islice(tokens(), count * seq_len))
    if len(found) < count * seq_len:
        raise invalid(
            field, path, f"holds {len(found)} new tokens, {count} sequences of {seq_len} need {count * seq_len}"
        )
    return torch.tensor(found).view(count, seq_len)


@torch.no_grad()
def last_hidden(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states (batch, time, hidden) after the final norm."""
    return torch.cat(
        [model.model(input_ids=part, use_cache=False).last_hidden_state for part in input_ids.split(BATCH)]
    )


@torch.no_grad()
def measure(
    row: Row,
    teacher: PreTrainedModel,
    statistics: dict[int, LayerStatistics],
    input_ids: torch.Tensor,
    reference: torch.Tensor,
) -> dict[str, Any]:
    """Builds the row's student on the teacher's trunk and compares it; what does not fit the teacher is said so."""
    pattern = row.target.default_pattern
    start = time.perf_counter()
    torch.manual_seed(SEED)
    try:
        student = assemble(teacher, build_plan(teacher.config, row.target, pattern)).eval()
    except UserError as error:
        return {"name": row.name, "does_not_fit": str(error)}
    initialise_from(student, teacher, row.init, statistics)
    seconds = time.perf_counter() - start
    hidden = last_hidden(student, input_ids)
    fidelity = Fidelity().to(hidden.device)
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    fidelity.update(hidden, reference, student.lm_head, teacher.lm_head, input_ids, mask)
    values = {name: value.item() for name, value in fidelity.compute().items()}
    bytes_student, bytes_teacher = (sum(promised_bytes(model, BUDGET_CONTEXT)) for model in (student, teacher))
    return {
        "name": row.name,
        "target": row.target.to_dict(),
        "pattern": pattern,
        "init": row.init,
        "kv_budget": bytes_student / bytes_teacher,
        **values,
        "init_seconds": round(seconds, 1),
    }


def init_table(result: dict[str, Any]) -> str:
    """The result as aligned text."""
    table = [("without training", "KV budget", "KL", "top-1", "perplexity", "init")]
    for row in result["rows"]:
        if "does_not_fit" in row:
            table.append((row["name"], row["does_not_fit"], "", "", "", ""))
        else:
            values = (f"{row['kv_budget']:.1%}", f"{row['kl']:.4f}", f"{row['top1']:.1%}", f"{row['ppl_student']:.1f}")
            table.append((row["name"], *values, f"{row['init_seconds']:.0f} s"))
    lines = aligned(table)
    fitting = [row for row in result["rows"] if "does_not_fit" not in row]
    if fitting:
        lines.append(f"teacher: perplexity {fitting[0]['ppl_teacher']:.1f} on {result['heldout_tokens']:,} tokens")
    lines.append(f"statistics of {result['calibration_tokens']:,} tokens: {result['statistics_seconds']:.0f} s")
    return "\n".join(lines)
