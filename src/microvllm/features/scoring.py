"""The log-probabilities of given continuations. Nothing is written: a continuation is computed like
a prompt, and each of its tokens is looked up in the distribution that the row before it gives."""

from itertools import chain, islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine import LLM, Request, RequestOutput, Runner, name_errors
from ..sampler import SamplingParams, cap_logits, on
from ..scheduler import Plan, Scheduler, Sequence


class ScoredSequence(Sequence):
    """A prompt and its continuation, of which the last token is never computed."""

    may_guess = False
    cacheable = property(lambda self: self.num_prompt - 1)  # the logits after it are needed

    def __init__(self, request_id: int, prompt, params: SamplingParams, targets: list[int]):
        super().__init__(request_id, prompt, params, len(prompt) + len(targets))
        self.targets = targets  # the log-probability of each is wanted, given all before it
        self.scores: list[float | None] = [None] * len(targets)
        self.greedy: list[bool | None] = [None] * len(targets)  # is it what temperature 0 draws?
        self.tokens.extend(targets[:-1])

    def after(self, first: int, stop: int) -> slice:
        """The targets that follow the positions [first, stop)."""
        return slice(first - self.num_prompt + 1, stop - self.num_prompt + 1)


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
        scores, greedy = (iter(plan.results.get(name, ())) for name in ("scores", "greedy"))
        for _, seq, first, stop in plan.scored:
            span = seq.after(first, stop)
            seq.scores[span] = islice(scores, stop - first)
            seq.greedy[span] = islice(greedy, stop - first)
            if stop == len(seq.tokens) and not seq.finish_reason:
                changed.append(seq)
                self.finish(seq, "length")
        return changed

    def finish(self, seq: Sequence, *reasons) -> None:
        super().finish(seq, *reasons)
        self.judged.discard(seq)

    def reset(self, sequences=None) -> list[Sequence]:
        found = super().reset(sequences)
        self.judged = {seq for seq in found if isinstance(seq, ScoredSequence)}
        return found


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
            parts = [seq.targets[seq.after(*span)] for _, seq, *span in plan.scored]
            count = len(plan.samples)
            found = self.score(h[count:], [*chain(*parts)])
            plan.results["scores"], plan.results["greedy"] = found
            h = h[:count]
        return super().draw(plan, batch, h)

    def score(self, h: Tensor, targets: list[int]) -> tuple[Tensor, Tensor]:
        """(S, C) rows of `forward` to (S,) the log-probability of each row's target, and (S,) bool
        whether it is what temperature 0 draws, in slices of 64 MB of logits."""
        model, softcap, scores, greedy = self.model, self.model.recipe.softcap, [], []
        size = self.rows_at_once or max(1, 2**24 // model.config.vocab_size)
        for rows, wanted in zip(h.split(size), on(h.device, targets).split(size), strict=True):
            logits = model.logits(rows)
            greedy.append(logits.argmax(-1) == wanted)  # before the cap, as `sample` has it
            logits = cap_logits(logits, softcap)
            scores.append(-F.cross_entropy(logits, wanted, reduction="none"))
        return torch.cat(scores), torch.cat(greedy)

    def read(self, plan: Plan) -> list[int]:
        token_ids = super().read(plan)
        if plan.scored:
            for name in ("scores", "greedy"):
                plan.results[name] = plan.results[name].tolist()
        return token_ids


class ScoringLLM(LLM):
    """An engine with `score` and `judge`."""

    def score(self, prompts, continuations) -> list[list[float]]:
        """The model's log-probability of each token of continuations[i] after prompts[i].

        Both are lists of strings or of lists of token ids; a continuation's text is encoded on its
        own, without BOS. Equal beginnings of prompts are computed once, long texts in chunks and
        slices of bounded memory.
        """
        return [output["logprobs"] for output in self.judge(prompts, continuations)]

    def judge(self, prompts, continuations, use_tqdm: bool = False) -> list[RequestOutput]:
        """The outputs of the requests that `score` makes: with `logprobs`, and `greedy`, of each
        token whether temperature 0 would have drawn it. use_tqdm: show a progress bar."""
        for name, texts in ("prompts", prompts), ("continuations", continuations):
            if not isinstance(texts, (list, tuple)):
                raise TypeError(f"{name} must be a list, got {texts!r:.80}")
        if len(prompts) != len(continuations):
            raise ValueError(f"{len(prompts)} prompts but {len(continuations)} continuations")
        pairs = zip(prompts, continuations, strict=True)
        checked = name_errors("prompts[{0}], continuations[{0}]", self._check_pair, pairs)
        requests = [self._request(*pair, owned=True) for pair in checked]
        return self._run(requests, use_tqdm)

    def add_request(
        self, prompt, sampling_params: SamplingParams | None = None, *, continuation=None, **options
    ) -> int:
        """As in the core. With a continuation (text or ids) nothing is written: the output has its
        logprobs and greedy, as in judge."""
        if continuation is None:
            return super().add_request(prompt, sampling_params, **options)
        self._check_options(options)
        request = self._request(*self._check_pair(prompt, continuation), **options)
        self._queue([request])
        return request.id

    def _check_pair(self, prompt, tail) -> tuple[list[int], SamplingParams, list[int]]:
        """Token ids, params and targets of a continuation to score; raises as _check does."""
        kind = self.params_class
        tail = self.tokenizer.encode(tail) if isinstance(tail, str) else tail
        if isinstance(tail, (list, tuple)) and not tail:
            raise ValueError("the continuation is empty: give at least one token")
        tail, _ = self._check(tail, kind(max_tokens=1))
        ids, params = self._check(prompt, kind(max_tokens=len(tail), seed=0))
        if len(ids) + len(tail) > self.max_model_len:
            limit = f"max_model_len, {self.max_model_len}"
            raise ValueError(f"{len(ids)} tokens and {len(tail)} more are beyond {limit}")
        return ids, params, tail

    def _request(self, ids, params, targets: list[int] | None = None, **options) -> Request:
        if targets is not None:
            options["targets"] = targets
        return super()._request(ids, params, **options)

    def _make_sequence(self, request: Request) -> Sequence:
        if targets := request.options.get("targets"):
            return ScoredSequence(request.id, request.prompt, request.params, targets)
        return super()._make_sequence(request)

    def output(self, request: Request) -> dict:
        if "targets" not in request.options:
            return super().output(request)
        (seq,) = request.samples
        return {
            "request_id": request.id, "prompt_token_ids": request.prompt,
            "num_cached_tokens": seq.num_cached or 0, "finish_reason": seq.finish_reason,
            "logprobs": seq.scores, "greedy": seq.greedy,
        }  # fmt: skip


PARTS = {"llm": ScoringLLM, "runner": ScoringRunner, "scheduler": ScoringScheduler}
