"""What teacher and student write after the same prompts, sampled and greedy, as the teacher sees it.

Likelihoods of given texts hide what generation loses: a student that goes its own way leaves what it was trained on. Both
models sample with the same random numbers, so that equal models write the same texts, and are compared document by
document: prompts of one are not independent.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pl_attnedit.data.encoding import encode, frame
from pl_attnedit.errors import invalid
from pl_attnedit.eval.fidelity.by_position import compare_together
from pl_attnedit.eval.fidelity.continuations import eos_of, first_difference
from pl_attnedit.eval.harness.answers import Sample, circumstances, kept

KINDS = ("sampled", "greedy")
VERSION = 4  # raise it when other texts would be written
# Prompts that are continued together and kept together; a GPU waits for kernel launches.
BATCH = {"cpu": 16}
BATCH_ELSEWHERE = 256
SCORED = 16  # texts that are scored together: few launches, and little memory for long ones
NGRAM = 4
# of each prompt, compared by the mean of each document; higher is better
METRICS = {
    "sampled_nll": False,  # the teacher's nats per token for what is written
    "greedy_nll": False,
    "greedy_agreement": True,  # tokens up to where the teacher's greedy text parts from it
    "path_kl": False,  # KL(teacher || student), nats per token, along what the model has sampled
    "sampled_repetition": False,  # share of 4-grams that stood before in what is written
    "greedy_repetition": False,
    "sampled_length": True,  # tokens, up to and with the end of the text
    "greedy_length": True,
}
log = logging.getLogger(__name__)


def prompts_of(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompts: int, prompt_tokens: int
) -> tuple[torch.Tensor, list[int]]:
    """(prompts, tokens) and the index of each one's document: beginnings of documents, spread evenly over those that are
    long enough. Where these are too few, what follows on them begins a prompt, too; fewer prompts where there is no more.

    Raises:
        UserError: less than two such documents.
    """
    encoded = encode(tokenizer, documents)
    rows = {number: row for number, row in enumerate(encoded) if len(row) > prompt_tokens}
    if len(rows) < 2:
        raise invalid(
            "generation.prompt_tokens", prompt_tokens, f"only {len(rows)} documents are longer: give more by --text"
        )
    begin, ids, of = frame(tokenizer)[0], list[list[int]](), list[int]()
    for start in range(0, max(map(len, rows.values())), prompt_tokens):
        there = [number for number, row in rows.items() if len(row) > start + prompt_tokens]
        count = min(prompts - len(ids), len(there))
        for number in (there[i * len(there) // count] for i in range(count)):
            stretch = rows[number][start : start + prompt_tokens]
            ids.append([*begin, *stretch[len(begin) :]])
            of.append(number)
    if len(ids) < prompts:
        log.warning("generation: the documents give only %d of %d prompts", len(ids), prompts)
    return torch.tensor(ids), of


class SameDraws(LogitsProcessor):
    """Makes greedy decoding sample: the token at which the distribution function passes a uniform number. Of one seed, place
    and step it is the same number, whatever the model and the batch.

    Args:
        places: of the rows among all prompts.
        begun: tokens of a prompt.
    """

    def __init__(self, places: Sequence[int], begun: int, new_tokens: int, seed: int) -> None:
        self.begun = begun
        drawn = [np.random.default_rng((seed, place)).random(new_tokens, np.float32) for place in places]
        self.drawn_BT = torch.from_numpy(np.stack(drawn))

    def __getitem__(self, rows: slice) -> SameDraws:
        """Those of some rows."""
        some = copy.copy(self)
        some.drawn_BT = self.drawn_BT[rows]
        return some

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn_B1 = self.drawn_BT[:, input_ids.shape[1] - self.begun, None].to(scores.device)
        below_BV = scores.float().softmax(-1).cumsum(-1)
        chosen_B1 = torch.searchsorted(below_BV, drawn_B1 * below_BV[:, -1:], right=True)
        chosen_B1 = chosen_B1.clamp(max=scores.shape[-1] - 1)  # where the product is rounded up to the sum itself
        return torch.full_like(scores, -torch.inf).scatter(1, chosen_B1, 0.0)


@torch.inference_mode()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts_BT: torch.Tensor,
    new_tokens: int,
    draws: SameDraws | None = None,
) -> list[list[int]]:
    """What the model writes after each prompt, up to and with the end of the text; greedy, or sampled by `draws`."""
    ids, ends = prompts_BT.to(model.device), eos_of(model, tokenizer)
    settings = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=(ends or [0])[0]
    )
    processors = LogitsProcessorList([] if draws is None else [draws])
    output = model.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings, logits_processor=processors
    )
    rows = output[:, ids.shape[1] :].tolist()
    return [row[: next((i + 1 for i, id in enumerate(row) if id in ends), len(row))] for row in rows]


def generations(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts_NT: torch.Tensor,
    of: Sequence[int],
    new_tokens: int,
    *,
    prints: tuple[str, str],
    folders: tuple[Path | None, Path | None],
    seed: int = 0,
) -> dict[str, list[Sample]]:
    """Both models' texts with their `METRICS`, as samples like lm-eval's, by "teacher" and "student".

    Args:
        of: the document of each prompt.
        prints: fingerprints of the two models.
        folders: where what the teacher, and what the student has written is kept, batch by batch.
    """
    found: dict[str, list[Sample]] = {"teacher": [], "student": []}
    batch = BATCH.get(teacher.device.type, BATCH_ELSEWHERE)
    with tqdm(total=len(prompts_NT), desc="generation", unit="prompt", leave=False, disable=False) as bar:
        for first in range(0, len(prompts_NT), batch):
            prompts_BT = prompts_NT[first : first + batch]
            asked = {
                "generation": [VERSION, *prompts_BT.shape, new_tokens, seed, first],
                "text": hashlib.sha256(prompts_BT.numpy().tobytes()).hexdigest(),
            }
            draws = SameDraws(range(first, first + len(prompts_BT)), prompts_BT.shape[1], new_tokens, seed)
            keys = [{"model": known, **circumstances(model)} for known, model in zip(prints, (teacher, student))]
            written = []
            for model, key, folder in zip((teacher, student), keys, folders):
                compute = partial(_texts, model, tokenizer, prompts_BT, new_tokens, draws)
                written.append(kept(folder, {**asked, **key}, compute)[0])
            compute = partial(_scores, teacher, student, prompts_BT, written)
            scores, _ = kept(folders[1], {**asked, "scores": keys}, compute)
            for name, texts, of_model in zip(found, written, scores["scores"]):
                for row, prompt_T in enumerate(prompts_BT):
                    place = {"doc_id": first + row, "doc_hash": asked["text"], "document": of[first + row]}
                    place["prompt"] = tokenizer.decode(prompt_T)
                    both = {kind: texts[kind][row] for kind in KINDS}
                    parts_at = first_difference(written[0]["greedy"][row], both["greedy"])
                    agreement = len(both["greedy"]) if parts_at is None else parts_at
                    more = {"path_kl": of_model["sampled"][row][1], "greedy_agreement": agreement}
                    for kind, ids in both.items():
                        more |= {kind: tokenizer.decode(ids), f"{kind}_nll": of_model[kind][row][0]}
                        more |= {f"{kind}_repetition": repetition(ids), f"{kind}_length": len(ids)}
                    found[name].append({**place, "filter": "none", "metrics": list(METRICS), **more})
            bar.update(len(prompts_BT))
    return found


def by_document(samples: Sequence[Sample]) -> list[Sample]:
    """Of each document the means of its prompts' metrics: these are independent, the prompts of a document are not."""
    prompts: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        prompts[sample["document"]].append(sample)
    return [
        {**of[0], **{name: float(np.mean([one[name] for one in of])) for name in METRICS}} for of in prompts.values()
    ]


def _texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts_BT: torch.Tensor,
    new_tokens: int,
    draws: SameDraws,
) -> dict[str, Any]:
    """By kind what `write` gives; in halves where memory does not suffice for all prompts at once."""
    try:
        return {
            kind: write(model, tokenizer, prompts_BT, new_tokens, draws if kind == "sampled" else None)
            for kind in KINDS
        }
    except RuntimeError as error:
        if len(prompts_BT) == 1 or not should_reduce_batch_size(error):
            raise
    clear_device_cache(garbage_collection=True)
    half = len(prompts_BT) // 2
    halves = [
        _texts(model, tokenizer, prompts_BT[part], new_tokens, draws[part]) for part in (slice(half), slice(half, None))
    ]
    return {kind: [text for texts in halves for text in texts[kind]] for kind in KINDS}


def _scores(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    prompts_BT: torch.Tensor,
    written: list[dict[str, list[list[int]]]],
) -> dict[str, Any]:
    """By model, kind and prompt: the teacher's nats per token of the text and KL(teacher || student) along it."""

    def score(prompts_bT: torch.Tensor, texts: list[list[int]]) -> list[list[float]]:
        longest, begun = max(map(len, texts)), prompts_bT.shape[1]
        padded = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])  # nothing before it sees it
        values_b4T = compare_together(teacher, student, torch.cat([prompts_bT, padded], 1))[:, :, begun - 1 : -1]
        spans = [values_4T[:, : len(text)].mean(1) for values_4T, text in zip(values_b4T, texts)]
        return [[nll.item(), kl.item()] for kl, _, nll, _ in spans]

    def scores(texts: list[list[int]]) -> list[list[float]]:
        parts = [slice(at, at + SCORED) for at in range(0, len(texts), SCORED)]
        return [each for part in parts for each in score(prompts_BT[part], texts[part])]

    return {"scores": [{kind: scores(of_model[kind]) for kind in KINDS} for of_model in written]}


def repetition(ids: Sequence[int]) -> float:
    """The share of 4-grams that stood before; 0 for a text that has none."""
    grams = list(zip(*(ids[i:] for i in range(NGRAM))))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
