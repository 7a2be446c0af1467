"""The log-probabilities of given continuations: nothing is written, every token is judged.

A continuation is computed like a prompt, in chunks of the token budget, and each of its tokens is
looked up in the distribution that the row before it gives.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine import LLM, Request, Runner, name_errors
from ..sampler import SamplingParams, cap_logits, on
from ..scheduler import Plan, Scheduler, Sequence


class ScoredSequence(Sequence):
    """A prompt and its continuation, of which the last token is never computed."""

    may_guess = False

    def __init__(self, request_id: int, prompt, params: SamplingParams, targets: list[int]):
        super().__init__(request_id, prompt, params, len(prompt) + len(targets))
        self.targets = targets  # the log-probability of each is wanted, given all before it
        self.scores = [0.0] * len(targets)
        self.tokens.extend(targets[:-1])


class ScoringScheduler(Scheduler):
    """Nothing is sampled of a ScoredSequence; `Plan.scored` has (index into chunks, sequence,
    first, stop): the positions whose next token is judged."""

    def __init__(self, *args, **policies):
        super().__init__(*args, **policies)
        self.judged: set[Sequence] = set()  # the unfinished ones

    def add(self, seq: Sequence) -> None:
        if isinstance(seq, ScoredSequence):
            self.judged.add(seq)
        super().add(seq)

    def cacheable(self, seq: Sequence) -> int:
        # not the last token of the prompt either: the logits after it are needed
        return seq.num_prompt - 1 if seq in self.judged else super().cacheable(seq)

    def samples(self, chunks):
        samples = super().samples(chunks)
        return [s for s in samples if s[1] not in self.judged] if self.judged else samples

    def schedule(self) -> Plan:
        plan = super().schedule()
        plan.scored = [
            (index, seq, max(start, seq.num_prompt - 1), stop)
            for index, (seq, start, stop) in enumerate(plan.chunks if self.judged else ())
            if seq in self.judged and stop >= seq.num_prompt
        ]
        return plan

    def update(self, plan: Plan, token_ids: list[int]) -> list[Sequence]:
        changed = super().update(plan, token_ids)
        scores = iter(plan.results.get("scores") or ())
        for _, seq, first, stop in plan.scored:
            for position in range(first, stop):
                score = next(scores)
                seq.scores[position - seq.num_prompt + 1] = score
            if stop == len(seq.tokens) and not seq.finish_reason:
                changed.append(seq)
                self.finish(seq, "length")
        return changed

    def finish(self, seq: Sequence, reason: str) -> None:
        super().finish(seq, reason)
        self.judged.discard(seq)


class ScoringRunner(Runner):
    """Rows that are judged come after those that are sampled."""

    def batch(self, plan: Plan):
        batch = super().batch(plan)
        if not plan.scored:
            return batch
        rows = list(batch.logit_rows)
        for index, _, first, stop in plan.scored:
            end = int(batch.cu_seqlens[index + 1])
            rows.extend(range(end - (stop - first), end))
        return batch._replace(logit_rows=np.array(rows, np.int32))

    def draw(self, plan: Plan, batch, h: Tensor) -> Tensor | None:
        if plan.scored:
            targets = [
                token
                for _, seq, first, stop in plan.scored
                for token in seq.targets[first - seq.num_prompt + 1 : stop - seq.num_prompt + 1]
            ]
            count = len(plan.samples)
            plan.results["scores"] = self.score(h[count:], targets)
            h = h[:count]
        return super().draw(plan, batch, h)

    def score(self, h: Tensor, targets: list[int]) -> Tensor:
        """(S, C) rows of `forward` to (S,) the log-probability of each row's target, in slices of
        64 MB of logits."""
        model = self.model
        size = self.rows_at_once or max(1, 2**24 // model.config.vocab_size)
        parts = zip(h.split(size), on(h.device, targets).split(size), strict=True)
        return torch.cat([
            -F.cross_entropy(
                cap_logits(model.logits(rows), model.recipe.softcap), wanted, reduction="none"
            )
            for rows, wanted in parts
        ])  # fmt: skip

    def read(self, plan: Plan) -> list[int]:
        token_ids = super().read(plan)
        if plan.scored:
            plan.results["scores"] = plan.results["scores"].tolist()
        return token_ids


class ScoringLLM(LLM):
    """An engine with `score`."""

    def score(self, prompts, continuations) -> list[list[float]]:
        """The model's log-probability of each token of continuations[i] after prompts[i].

        Both are lists of strings or of lists of token ids; a continuation's text is encoded on its
        own, without BOS. Prompts that are equal, or begin equally, share their blocks and are
        computed once. Long ones are computed in chunks of the token budget, and their logits in
        slices, so memory does not grow with the lengths.
        """
        for name, texts in ("prompts", prompts), ("continuations", continuations):
            if not isinstance(texts, (list, tuple)):
                raise TypeError(f"{name} must be a list, got {texts!r:.80}")
        if len(prompts) != len(continuations):
            raise ValueError(f"{len(prompts)} prompts but {len(continuations)} continuations")
        pairs = zip(prompts, continuations, strict=True)
        checked = name_errors("prompts[{0}], continuations[{0}]", self._check_pair, pairs)
        requests = self._queue(checked)
        self._run(requests)
        return [request.output["logprobs"] for request in requests]

    def add_request(
        self, prompt, sampling_params: SamplingParams | None = None, *, continuation=None, **options
    ) -> int:
        """As in the core. With a continuation (text or ids) nothing is written: the output has its
        logprobs, as in score."""
        if continuation is not None:
            return self._add(*self._check_pair(prompt, continuation)).id
        return super().add_request(prompt, sampling_params, **options)

    def _check_pair(self, prompt, tail) -> tuple[list[int], SamplingParams, list[int]]:
        """Token ids, params and targets of a continuation to score; raises as _check does."""
        params = self.parts.params
        tail = self.tokenizer.encode(tail) if isinstance(tail, str) else tail
        tail, _ = self._check(tail, params(max_tokens=1))
        ids, own = self._check(prompt, params(max_tokens=len(tail), seed=0))
        if len(ids) + len(tail) > self.max_model_len:
            limit = f"max_model_len, {self.max_model_len}"
            raise ValueError(f"{len(ids)} tokens and {len(tail)} more are beyond {limit}")
        return ids, own, tail

    def _add(self, ids, params, targets: list[int] | None = None, **options) -> Request:
        if targets is not None:
            options["targets"] = targets
        return super()._add(ids, params, **options)

    def _make_sequence(self, request: Request) -> Sequence:
        if targets := request.options.get("targets"):
            return ScoredSequence(request.id, request.prompt, request.params, targets)
        return super()._make_sequence(request)

    def output(self, request: Request) -> dict:
        if "targets" not in request.options:
            return super().output(request)
        (seq,) = request.done
        return {
            "request_id": request.id, "prompt_token_ids": request.prompt,
            "num_cached_tokens": seq.num_cached or 0, "finish_reason": seq.finish_reason,
            "logprobs": seq.scores,
        }  # fmt: skip


PARTS = {"llm": ScoringLLM, "runner": ScoringRunner, "scheduler": ScoringScheduler}
