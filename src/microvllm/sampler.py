"""Which token comes next, and where does the randomness come from?

All the randomness of a row (one token to be sampled) is its noise, a number in [0, 1) made on the
CPU of (seed, sample index, position) and nothing else. So a request with a seed has the same tokens
alone, in a full batch, after a preemption, and as sample i of n. Sampling divides by the
temperature; drops tokens by top_k, then top_p, then min_p; and draws the first token whose
cumulative probability exceeds the noise. R rows, V tokens in the vocabulary.

    probabilities   |-- the 0.42 --|- a 0.31 -|-- one 0.27 --|
    noise           ............................^ 0.75         the token is "one"
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq  # lists and tuples, not the Sequence of scheduler.py
from dataclasses import KW_ONLY, dataclass, field

import numpy as np
import torch
from torch import Tensor

# least and greatest value of each number; where they are integers, the value must be one
RANGES = {
    "temperature": (0.0, 1e38), "top_p": (1e-6, 1.0), "min_p": (0.0, 1.0),
    "max_tokens": (1, 2**31 - 1), "n": (1, 2**31 - 1), "top_k": (0, 2**31 - 1),
    "seed": (0, 2**64 - 1), "sample_index": (0, 2**31 - 1),
}  # fmt: skip


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Raises ValueError or TypeError when built with a value that makes
    no sense. Seam: subclasses add fields, for a feature's Runner or Text."""

    temperature: float = 1.0  # 0 is greedy: the argmax, of equal ones the lowest id
    max_tokens: int = 256  # new tokens at most
    top_k: int | None = None  # sample among the k largest logits; None or 0 is off
    ignore_eos: bool = False  # do not stop at the tokenizer's end tokens
    _: KW_ONLY
    n: int = 1  # samples of the prompt, which is computed once for all
    top_p: float = 1.0  # keep the most likely tokens that together have this probability
    min_p: float = 0.0  # keep tokens at least this times as likely as the most likely one
    stop_token_ids: tuple[int, ...] = ()  # further tokens that end the text, also with ignore_eos
    seed: int | None = None  # None: the engine draws one
    sample_index: int = 0  # of the first sample; n=1 with i here gives sample i of n
    truncated: bool = field(init=False, repr=False, compare=False)  # by top_k, top_p or min_p

    def __post_init__(self):
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name} must be between {least} and {most}, got {value!r}")
        # logits divided by less would overflow float32: tiny temperatures are greedy
        self.put("temperature", self.temperature if self.temperature >= 1e-30 else 0.0)
        self.put("stop_token_ids", tuple(self.stop_token_ids))
        drops = self.top_k or self.top_p < 1 or self.min_p  # but not the argmax, which greedy takes
        self.put("truncated", bool(self.temperature and drops))

    def put(self, name: str, value: object) -> None:
        """Set a field while the object is built: the class is frozen, and refuses `self.x = y`."""
        object.__setattr__(self, name, value)

    def token_fields(self) -> dict[str, Iterable[int]]:
        """The fields that hold token ids: a feature checks that the vocabulary has them."""
        return {"stop_token_ids": self.stop_token_ids}


def noise(seeds: Seq[int], samples: Seq[int], positions: Seq[int]) -> np.ndarray:
    """(R,) float32 in [0, 1), each from its row's seed, sample index and position alone, by rounds
    of the hash splitmix64 (Steele, Lea and Flood, 2014): the noise of neighbours is unrelated. The
    top 24 bits are kept: float32 has all multiples of 2**-24."""
    x = np.zeros(len(seeds), np.uint64)
    for part in (seeds, samples, positions):
        x = (x ^ np.array(part, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def on(device: torch.device, values) -> Tensor:
    """A list or an array as a tensor on the device; the CPU does not wait for the copy."""
    values = torch.as_tensor(values)
    if device.type == "cuda":  # without pinned memory torch waits for the GPU's queue
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def sample(
    logits: Tensor, params: Seq[SamplingParams], temperature: Tensor, uniform: Tensor,
    softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """(R,) token ids, -1 where there is none to draw. logits (R, V), not yet capped at +-softcap
    (0: no cap); temperature, uniform (R,) float32: params[i].temperature and the noise of row i."""
    # greedy rows: the argmax of the logits before the cap, since the cap keeps their order but may
    # round two of them to one value
    tokens = logits.argmax(-1)
    if any(p.temperature for p in params):
        scaled = cap_logits(logits, softcap) / temperature.clamp(min=1e-30)[:, None]
        tokens = torch.where(temperature > 0, draw(truncate(scaled, params), uniform), tokens)
    return torch.where(logits.amax(-1) > -torch.inf, tokens, -1)  # -1 for NaN too


def cap_logits(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap) in float32 and in new memory; 0 is no cap. Computed with
    tanh(x) = 2 sigmoid(2x) - 1: on a CPU five times as fast as torch's tanh, and within 4e-6."""
    if not softcap:
        return logits.to(torch.float32, copy=True)
    return torch.sigmoid(logits.float() * (2 / softcap)).mul_(2 * softcap).sub_(softcap)


def truncate(logits: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """Set logits to -inf, in place, where a row's top_k, top_p or min_p drops the token."""
    for keep, values in (
        (keep_top_k, [p.top_k if p.truncated else None for p in params]),
        (keep_top_p, [p.top_p if p.truncated and p.top_p < 1 else None for p in params]),
        (keep_min_p, [p.min_p if p.truncated else None for p in params]),
    ):
        if rows := [i for i, value in enumerate(values) if value]:
            index = on(logits.device, rows)
            logits[index] = keep(logits[index], [values[i] for i in rows])
    return logits


def keep_top_k(logits: Tensor, k: list[int]) -> Tensor:
    """Keep the k[i] largest logits of row i, and all that equal the smallest of these."""
    k = [min(count, logits.shape[1]) for count in k]
    kth = logits.topk(max(k)).values.gather(1, on(logits.device, k)[:, None] - 1)
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits: Tensor, p: list[float]) -> Tensor:
    """Keep the tokens of row i before which, ordered by probability, are less than p[i] of it, and
    all that equal the last of these (Holtzman et al. 2020)."""
    weights = torch.softmax(logits, -1)
    ordered = weights.sort(-1, descending=True).values
    above = ordered.cumsum(-1) - ordered  # probability of all tokens before, in that order
    count = (above < on(logits.device, p)[:, None]).sum(-1, keepdim=True)
    last = (count - 1).clamp(min=0)  # count is 0 for a row of -inf: its softmax is NaN
    return logits.masked_fill(weights < ordered.gather(1, last), -torch.inf)


def keep_min_p(logits: Tensor, p: list[float]) -> Tensor:
    """Keep the tokens of row i at least p[i] times as likely as the first (Nguyen et al. 2024)."""
    least = logits.amax(-1, keepdim=True) + on(logits.device, p)[:, None].log()
    return logits.masked_fill(logits < least, -torch.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """(R,) the first ids whose cumulative probability (CDF) exceeds uniform (R,), the noise."""
    cdf = torch.softmax(logits, -1).cumsum(-1)
    # the CDF ends at 1 only up to rounding, so the noise is scaled by its end. A dropped token has
    # the CDF of the token before it, so it is never the first one above the target.
    target = uniform[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)
