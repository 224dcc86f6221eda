"""A Hugging Face model as lm-eval sees it, made quick enough for a CPU.

lm-eval runs context + choice once for every choice of a question. `SharedPrefixLM` runs the context once, keeps its
cache, and scores all choices from there: with four choices of 12 tokens after 128, 176 tokens instead of 560. It also
skips the logits of the context. The numbers are the same up to rounding; it is the path that generation takes, too.
A GPU does so after long contexts only: a pass over few tokens takes it as long as its kernel launches, and short contexts
of many lengths fill whole batches when each choice is a row of its own.

Texts become tokens once, many at a time on all cores: of a question with four choices lm-eval would do the context eight
times, which for long ones takes longer than the model does. Where memory does not suffice for a batch, it is tried again
in halves, and later ones are as small. Whole rows and what is generated lm-eval then asks anew, longest first: that is where
memory ends, so little was done.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pl_attnedit.data.encoding import beginning, encode, frame
from pl_attnedit.data.tokens import batches
from pl_attnedit.errors import invalid

# "auto" starts here and halves; a CPU is no quicker with more.
LARGEST_BATCH = {"cpu": 4}
LARGEST_BATCH_ELSEWHERE = 64
LONG_CONTEXT = 1024  # tokens, from which on a GPU is busy with one of them
# (strings, context tokens, continuation tokens): lm-eval's form of a request; rolling windows have no strings.
Request = tuple[tuple[str, str] | None, list[int], list[int]]
Prefix = tuple[int, ...]
Result = TypeVar("Result")


class SharedPrefixLM(HFLM):
    """`HFLM` around a loaded causal LM, which stays on its device and in its dtype; log-probabilities in float32.

    Args:
        name: how the progress bar names the model.
        max_length: longest window in tokens, also of the rolling perplexity.
        batch_size: sequences of `max_length` per forward pass; of shorter ones a GPU gets as many more. "auto" starts
            large and halves where memory does not suffice.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        max_length: int,
        batch_size: int | str,
    ) -> None:
        self._halves = batch_size == "auto"
        if self._halves:
            batch_size = LARGEST_BATCH.get(model.device.type, LARGEST_BATCH_ELSEWHERE)
        super().__init__(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # HFLM gives it a padding token
            max_length=max_length,
            batch_size=batch_size,
            softmax_dtype="float32",
            prefix_token_id=next(reversed(beginning(tokenizer)), None),
        )
        self.name = name
        self._begin = frame(tokenizer)[0]
        self._encoded: dict[str, list[int]] = {}

    def tok_encode(self, string, add_special_tokens=None, left_truncate_len=None, **kwargs):
        """As in training; lm-eval asks for the middle of a text by `add_special_tokens=False`."""
        if add_special_tokens is False:
            return self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        known = self._encoded.get(string)
        return self._within(encode(self.tokenizer, [string])[0] if known is None else known, left_truncate_len)

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
        """(ids, mask) of the prompts, each begun as in training."""
        rows = [self._within(ids, left_truncate_len) for ids in encode(self.tokenizer, strings)]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def _within(self, ids: list[int], most: int | None) -> list[int]:
        """The end of a prompt that has more tokens than `most`, begun as all prompts are."""
        if most is None or len(ids) <= most:
            return ids
        begin = self._begin if ids[: len(self._begin)] == self._begin and most > len(self._begin) else []
        return [*begin, *ids[len(begin) + len(ids) - most :]]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Summed log-likelihood of each text's own tokens, window by window: what begins it is given, not asked."""
        windows = [self._windows(request.args[0]) for request in requests]
        asked = [(None, context, text) for of_text in windows for context, text in of_text]
        with self._progress(None, "perplexity"):
            scores = iter(self._loglikelihood_tokens(asked))
        return [sum(next(scores)[0] for _ in of_text) for of_text in windows]

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """(context, tokens) of disjoint windows; the first one's context is what training shows before a text."""
        ids = encode(self.tokenizer, [text])[0][len(self._begin) :]
        rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
        return [make_disjoint_window(window) for window in rolling]

    def loglikelihood(self, requests, disable_tqdm=False):
        """(log-likelihood, is it the greedy choice) of each continuation; see `HFLM`."""
        # What lm-eval asks `tok_encode` for, one text at a time and each context once per choice.
        pairs = [request.args for request in requests]
        texts = list({text: None for context, choice in pairs for text in (context.rstrip(), context + choice) if text})
        found = (zip(some, encode(self.tokenizer, some)) for some in batches(texts))
        self._encoded = dict(itertools.chain.from_iterable(found))
        with self._progress(None, "choices"):
            return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests, disable_tqdm=False):
        """What the model writes after each prompt; see `HFLM`."""
        return self._fitting(lambda: super(SharedPrefixLM, self).generate_until(requests, disable_tqdm))

    def _fitting(self, compute: Callable[[], Result]) -> Result:
        """What `compute` returns. While memory does not suffice for it, the batch size is halved, for all that comes."""
        while True:
            try:
                return compute()
            except RuntimeError as error:
                if not (self._halves and int(self.batch_size) > 1 and should_reduce_batch_size(error)):
                    raise
            self.batch_size_per_gpu = int(self.batch_size) // 2
            clear_device_cache(garbage_collection=True)

    def _model_call(self, inps, attn_mask=None, labels=None):
        """Logits of whole rows, which nothing follows: `HFLM` would fill a cache."""
        with torch.no_grad():
            return self.model(inps, use_cache=False).logits

    def _progress(self, total: int | None, what: str) -> tqdm:
        self._bar = tqdm(
            total=total, desc=f"{self.name}: {what}", unit="tok", file=sys.stderr, leave=False, disable=False
        )
        return self._bar

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._encoded = {}  # lm-eval has them all, and scoring takes long
        if self._bar.total is None:
            self._bar.reset(total=sum(len(continuation) for _, _, continuation in requests))
        most = max((len(continuation) for _, _, continuation in requests), default=0)
        if most > self.max_length:
            raise invalid("max_length", self.max_length, f"sequences must have at least {most} tokens for this task")
        requests = [(s, self._within(c, self.max_length + 1 - len(asked)), asked) for s, c, asked in requests]
        by_context: dict[Prefix, list[int]] = defaultdict(list)
        for index, (_, context, _) in enumerate(requests):
            by_context[tuple(context)].append(index)
        shared, single = {}, []
        for prefix, indices in by_context.items():
            longest = max(len(requests[i][2]) for i in indices)
            # A short prefix (rolling windows share a single token) is cheaper to repeat than to keep.
            least = longest + 1 if self.device.type == "cpu" else max(longest + 1, LONG_CONTEXT)
            if len(indices) > 1 and least <= len(prefix) <= self.max_length - longest:
                shared[prefix] = indices
            else:
                single += indices
        results: dict[int, tuple[float, bool]] = {}
        for group in _equal_lengths(list(shared)):
            while group:
                some, group = self._fitting(partial(self._score_some, group, shared, requests))
                results.update(some)
                self._bar.update(sum(len(requests[i][2]) for i in some))
        if single:
            plain = [requests[i] for i in single]
            with self._rows(max(len(context) + len(asked) for _, context, asked in plain)):
                score = partial(super()._loglikelihood_tokens, plain, True, override_bs)
                results.update(zip(single, self._fitting(score)))
            self._bar.update(sum(len(continuation) for _, _, continuation in plain))
        return [results[i] for i in range(len(requests))]

    @contextmanager
    def _rows(self, longest: int) -> Iterator[None]:
        """Batches of as many tokens as `batch_size` rows of `max_length` have: launches, not tokens, take a GPU's time."""
        times = 1 if self.device.type == "cpu" else max(1, self.max_length // longest)
        self.batch_size_per_gpu = int(self.batch_size) * times
        try:
            yield
        finally:
            self.batch_size_per_gpu = max(1, int(self.batch_size) // times)

    def _score_some(
        self, prefixes: list[Prefix], asked: dict[Prefix, list[int]], requests: Sequence[Request]
    ) -> tuple[dict[int, tuple[float, bool]], list[Prefix]]:
        """Scores by request of what is asked after the first prefixes, a batch of them, and the other prefixes."""
        batch, others = prefixes[: int(self.batch_size)], prefixes[int(self.batch_size) :]
        rows = [i for prefix in batch for i in asked[prefix]]
        copies = [row for row, prefix in enumerate(batch) for _ in asked[prefix]]
        return dict(zip(rows, self._score_after_prefix(batch, copies, [requests[i][2] for i in rows]))), others

    @torch.inference_mode()
    def _score_after_prefix(
        self, prefixes: list[Prefix], copies: list[int], continuations: list[list[int]]
    ) -> list[tuple[float, bool]]:
        """Score `continuations[i]` after `prefixes[copies[i]]`; the prefixes all have the same length."""
        tokens_BT = torch.tensor(prefixes, device=self.device)
        # The last token of the prefix goes with the continuation, whose first token it predicts.
        cache = self.model(tokens_BT[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        cache.reorder_cache(torch.tensor(copies, device=self.device))  # beam search's way to copy rows
        longest = max(map(len, continuations))
        inputs_NC = torch.zeros(len(continuations), longest, dtype=torch.long, device=self.device)
        for row, (copied, continuation) in enumerate(zip(copies, continuations)):
            inputs_NC[row, : len(continuation)] = torch.tensor([prefixes[copied][-1], *continuation[:-1]])
        logits_NCV = self.model(inputs_NC, past_key_values=cache, use_cache=True).logits
        results = []
        for logits_CV, continuation in zip(logits_NCV, continuations):
            target_C = torch.tensor(continuation, device=self.device)
            logp_CV = logits_CV[: len(continuation)].log_softmax(-1, dtype=torch.float32)
            score = logp_CV.gather(-1, target_C[:, None]).sum()
            results.append((float(score), bool((logp_CV.argmax(-1) == target_C).all())))
        return results


def _equal_lengths(prefixes: list[Prefix]) -> list[list[Prefix]]:
    """Groups of prefixes of one length, long ones first: padding before or inside a cached prefix would move positions."""
    by_length: dict[int, list[Prefix]] = defaultdict(list)
    for prefix in prefixes:
        by_length[len(prefix)].append(prefix)
    return [by_length[length] for length in sorted(by_length, reverse=True)]
