"""How far the student's next-token distributions are from the teacher's, by position in the context.

A window layer answers as the teacher does until its window is full: the average over all positions hides where it parts.
`compare_positions` measures, `by_position` and `fidelity` sum up: by spans of positions, and over all of them.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pl_attnedit.cache import build_once
from pl_attnedit.data.encoding import encode
from pl_attnedit.distillation.losses import tokens_of_a_chunk
from pl_attnedit.distillation.metrics import log_probabilities
from pl_attnedit.errors import invalid

FIRST_EDGE = 64  # tokens; each further bin is as long as all before it
log = logging.getLogger(__name__)


def packed_sequences(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, sequences: int, context: int
) -> torch.Tensor:
    """(sequences, context) token ids: documents joined as in training, sequences evenly spread over them.

    Raises:
        UserError: less text than one sequence.
    """
    ids = [id for document in encode(tokenizer, documents, ends=True) for id in document]
    there = len(ids) // context
    if there == 0:
        raise invalid(
            "by_position.context", context, f"the held-out text has only {len(ids)} tokens; give more by --text"
        )
    if there < sequences:
        log.warning("by_position: the held-out text gives only %d of %d sequences", there, sequences)
    chosen = sorted({round(i * there / sequences) for i in range(sequences)} if there > sequences else range(there))
    return torch.tensor(ids[: there * context]).view(there, context)[chosen]


def compare_positions(
    teacher: PreTrainedModel, student: PreTrainedModel, tokens_NT: torch.Tensor, *, teacher_kept_in: Path | None = None
) -> torch.Tensor:
    """KL(teacher || student) in nats, whether the most likely tokens are equal (1 or 0), and both models' negative
    log-likelihoods of the next token of the text in nats (0 at the last one, which has none), at every position.

    Args:
        tokens_NT: N sequences of T token ids.
        teacher_kept_in: folder for the teacher's last hidden states, which are computed once for the same text; its name
            must stand for the teacher and its dtype.

    Returns:
        (N, 4, T), float64, on the CPU.
    """
    hidden = teacher_hidden(teacher, tokens_NT, teacher_kept_in)
    values = []
    with tqdm(total=tokens_NT.numel(), desc="by position", unit="tok", leave=False, disable=False) as bar:
        for row_1T, teacher_1TH in zip(tokens_NT.split(1), hidden.split(1)):
            values.append(_compare(teacher, student, teacher_1TH, row_1T))
            bar.update(row_1T.numel())
    return torch.cat(values)


def by_position(values_N4T: torch.Tensor) -> list[dict[str, Any]]:
    """The means of `compare_positions` per token, for positions 0-63, 64-127, 128-255 and so on.

    Returns:
        One dict per bin: `start`, `end` (tokens, the end is not part of it), `n` tokens, `kl`, `top1`, `nll_teacher`,
        `nll_student`.
    """
    sequences, _, length = values_N4T.shape
    sums_4T = values_N4T.sum(0)
    edges = [0, FIRST_EDGE]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    rows = []
    for start, end in zip(edges, [*edges[1:-1], length]):
        n = sequences * (end - start)
        labels = n - sequences * (end == length)  # the last token has no next one
        kl, top1, nll_teacher, nll_student = sums_4T[:, start:end].sum(1).tolist()
        row = {"start": start, "end": end, "n": n, "kl": kl / n, "top1": top1 / n}
        rows.append({**row, "nll_teacher": nll_teacher / max(labels, 1), "nll_student": nll_student / max(labels, 1)})
    return rows


def fidelity(values_N4T: torch.Tensor) -> dict[str, Any]:
    """The means of `compare_positions` over all positions. Tokens of a sequence depend on each other, sequences do not (or
    hardly): the standard errors are those of the mean of N sequences, which all are equally long.

    Returns:
        `kl` in nats per token and `top1` as a share, each with `_stderr` (None for a single sequence); `ppl_teacher` and
        `ppl_student` per token; `sequences`, `tokens`.
    """
    sequences, _, length = values_N4T.shape
    kl_N, top1_N = values_N4T[:, :2].mean(2).unbind(1)
    labels = max(sequences * (length - 1), 1)  # the last token has no next one
    ppl_teacher, ppl_student = (values_N4T[:, 2:].sum((0, 2)) / labels).exp().tolist()

    def stderr(means_N: torch.Tensor) -> float | None:
        return means_N.std().item() / math.sqrt(sequences) if sequences > 1 else None

    return {
        "kl": kl_N.mean().item(),
        "kl_stderr": stderr(kl_N),
        "top1": top1_N.mean().item(),
        "top1_stderr": stderr(top1_N),
        "ppl_teacher": ppl_teacher,
        "ppl_student": ppl_student,
        "sequences": sequences,
        "tokens": sequences * length,
    }


def teacher_hidden(teacher: PreTrainedModel, tokens_NT: torch.Tensor, folder: Path | None) -> torch.Tensor:
    """The teacher's last hidden states, (N, T, hidden), on the CPU in its dtype; kept in `folder` if one is given."""
    if folder is None:
        return torch.cat([_hidden(teacher, row_1T).cpu() for row_1T in tokens_NT.split(1)])
    name = hashlib.sha256(tokens_NT.numpy().tobytes() + str(tuple(tokens_NT.shape)).encode()).hexdigest()[:32]

    def build(part: Path) -> None:
        save_file({"hidden": teacher_hidden(teacher, tokens_NT, None)}, part / "hidden.safetensors")

    return load_file(build_once(folder / name, build) / "hidden.safetensors")["hidden"]


@torch.inference_mode()
def _hidden(model: PreTrainedModel, rows_BT: torch.Tensor) -> torch.Tensor:
    return model.base_model(rows_BT.to(model.device), use_cache=False).last_hidden_state


def compare_together(teacher: PreTrainedModel, student: PreTrainedModel, rows_BT: torch.Tensor) -> torch.Tensor:
    """`compare_positions` of sequences that go through the models together: (B, 4, T)."""
    return _compare(teacher, student, _hidden(teacher, rows_BT), rows_BT)


@torch.inference_mode()
def _compare(
    teacher: PreTrainedModel, student: PreTrainedModel, teacher_BTH: torch.Tensor, rows_BT: torch.Tensor
) -> torch.Tensor:
    """(B, 4, T): KL, agreement of the most likely token, and both negative log-likelihoods (0 at the last token)."""
    student_NH = _hidden(student, rows_BT).flatten(0, 1)
    teacher_NH = teacher_BTH.flatten(0, 1).to(teacher.device)
    heads: list[Any] = [teacher.get_output_embeddings(), student.get_output_embeddings()]
    labels_N = rows_BT.roll(-1, 1).flatten().to(student.device)
    chunk = tokens_of_a_chunk(heads[0].weight.shape[0], student.device)
    parts = []
    for rows, student_log, teacher_log in log_probabilities(student_NH, teacher_NH, heads[1], heads[0], chunk):
        kl = (teacher_log.exp() * (teacher_log - student_log)).sum(-1)
        top1 = teacher_log.argmax(-1) == student_log.argmax(-1)
        nll = [-each.gather(-1, labels_N[rows, None])[:, 0] for each in (teacher_log, student_log)]
        parts.append(torch.stack([kl, top1.float(), *nll]).double().cpu())
    values_B4T = torch.cat(parts, 1).view(4, *rows_BT.shape).transpose(0, 1)
    values_B4T[:, 2:, -1] = 0
    return values_B4T
