"""How much do the log-probabilities of drawn tokens differ between a rollout and the training?

The loss of a policy gradient assumes that tokens were drawn from the distribution that the trained
module computes. Rounding, other kernels, low-bit weights, old weights and filters such as top_k
change the distribution of the rollout:

    rollout     q  the sampler's log-probability of each token that it drew
    training    p  the module's, in the forward pass of the loss
    delta       p - q                                  0 if both are equal
    ratio       exp(delta)                             a PPO loss clips it to [0.8, 1.2]
    KL          mean of exp(delta) - 1 - delta         Schulman's estimator k3, of KL(q || p)

If q can draw every token that p allows, the ratio is 1 on average, however different p and q are. A
mean below 1 shows that some tokens could not be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..environment import how_to_install

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_RATIO = 0.8
MOST_RATIO = 1.2
# a mean ratio below 1 by more than this number of standard errors and by more than this share is
# not a result of chance or rounding
SURE_ERRORS = 5
SURE_SHARE = 1e-3


@dataclass(frozen=True, repr=False)
class Mismatch:
    """The report of `mismatch`. `print(report)` shows it in one line."""

    num_tokens: int  # compared
    num_not_finite: int  # tokens with a NaN or an infinity: no other number includes them
    mean: float  # of |delta|
    largest: float  # |delta|
    share_outside: float  # of ratios outside [0.8, 1.2]
    kl: float  # k3
    mean_ratio: float
    ratio_error: float  # the standard error of mean_ratio
    sampling: str  # the parameters that change the distribution, such as "top_k=50"
    # by position: 0 is the first drawn token of its row
    counts: np.ndarray  # (P,) tokens
    mean_at: np.ndarray  # (P,) mean |delta|, NaN where there is none
    largest_at: np.ndarray  # (P,)

    @property
    def is_cut(self) -> bool:
        """Do the numbers show that the sampler excluded tokens that the training allows?"""
        missing = 1 - self.mean_ratio
        return missing > max(SURE_SHARE, SURE_ERRORS * self.ratio_error)

    def __str__(self) -> str:
        if self.num_tokens == 0:
            return f"mismatch: no tokens to compare{self.about_not_finite()}"
        position = int(np.nanargmax(self.largest_at))
        return (
            f"mismatch of {self.num_tokens:,} tokens: |delta logp| mean {self.mean:.2g}, "
            f"largest {self.largest:.2g} (position {position}); "
            f"{self.share_outside:.2%} of ratios outside [{LEAST_RATIO}, {MOST_RATIO}]; "
            f"KL (k3) {self.kl:.2g}{self.about_not_finite()}{self.about_sampling()}"
        )

    __repr__ = __str__  # a notebook shows the line, not the arrays

    def about_not_finite(self) -> str:
        return f"; {self.num_not_finite:,} more are NaN or infinite" if self.num_not_finite else ""

    def about_sampling(self) -> str:
        """A remark if the distributions of sampler and loss differ, else an empty text."""
        ratio = f"mean ratio {self.mean_ratio:.4f}"
        if self.sampling:
            return (
                f"; {self.sampling} draws from another distribution than the loss assumes ({ratio})"
            )
        if self.is_cut:
            return f"; {ratio}: the sampler excluded tokens that the loss allows (top_k?)"
        return ""

    def scalars(self) -> dict[str, float]:
        """The numbers without the arrays, for a logger such as wandb."""
        return {
            name: value for name, value in vars(self).items() if isinstance(value, (int, float))
        }

    def plot(self, path: str | Path | None = None) -> Figure:
        """Plot |delta| by position, and write the figure to `path`, if there is one. Raises
        ImportError without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError(f"a plot needs matplotlib: {how_to_install('lab')}") from None

        figure = Figure(figsize=(7, 3.2))
        axes = figure.subplots()
        positions = np.arange(len(self.counts))
        axes.plot(positions, self.largest_at, ".", color="#BBBBBB", label="largest")
        axes.plot(positions, self.mean_at, color="#0072B2", label="mean")
        if self.largest > 0:
            axes.set_yscale("log")
        axes.set(xlabel="token of the answer", ylabel="|delta logp|")
        axes.set_title(f"{self.num_tokens:,} tokens {self.sampling}".rstrip(), fontsize=9)
        axes.legend(frameon=False)
        if path is not None:
            figure.savefig(path, dpi=120, bbox_inches="tight")
        return figure


def mismatch(
    training_logprobs: Sequence,
    logprobs: Sequence,
    masks: Sequence,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Mismatch:
    """Compare a rollout with the forward pass of the loss.

    training_logprobs: a tensor (B, T), or B rows, in which column t is the log-probability of token
    t + 1, as the loss of nanochat's chat_rl has them (padding and masked columns may be anything).
    logprobs, masks: of the rollout, B rows of prompt and answer, as `generate_batch(...,
    logprobs=True)` returns them, padded or not; tokens with mask 0 are ignored. temperature, top_k,
    top_p, min_p: the sampling parameters, which the report names; None and 0 mean off. Raises
    TypeError for an argument without rows, and ValueError if the rows do not match.
    """
    arguments = {"training_logprobs": training_logprobs, "logprobs": logprobs, "masks": masks}
    for name, rows in arguments.items():
        if not hasattr(rows, "__len__"):
            raise TypeError(f"{name} must be a tensor or a list of rows, got {rows!r:.80}")
    num_rows = len(training_logprobs)
    if not num_rows == len(logprobs) == len(masks):
        sizes = f"{num_rows} training_logprobs, {len(logprobs)} logprobs and {len(masks)} masks"
        raise ValueError(f"{sizes}: give a row of each for every sample")
    deltas = []
    positions = []
    for row in range(num_rows):
        training, rollout, mask = [
            to_numpy(rows[row], where=f"row {row} of {name}") for name, rows in arguments.items()
        ]
        delta, position = compare_row(training, rollout, mask, row)
        deltas.append(delta)
        positions.append(position)
    sampling = {
        f"temperature={temperature}": temperature != 1,
        f"top_k={top_k}": bool(top_k),
        f"top_p={top_p}": top_p not in (None, 0, 1),
        f"min_p={min_p}": bool(min_p),
    }
    return summarise(
        np.concatenate([np.empty(0), *deltas]),
        np.concatenate([np.empty(0, np.int64), *positions]),
        sampling=" ".join([text for text, is_on in sampling.items() if is_on]),
    )


def to_numpy(row: Sequence, where: str) -> np.ndarray:
    """Convert a row of numbers, or a tensor on any device, to float64. Raises ValueError for other
    values. where: names the row in the error."""
    if hasattr(row, "detach"):
        row = row.detach().double().cpu().numpy()
    try:
        return np.asarray(row, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def compare_row(
    training: np.ndarray, rollout: np.ndarray, mask: np.ndarray, row: int
) -> tuple[np.ndarray, np.ndarray]:
    """The deltas of one row, and the positions of their tokens. row: its number, for errors."""
    if rollout.ndim != 1 or mask.shape != rollout.shape or training.ndim != 1:
        shapes = f"{training.shape}, {rollout.shape} and {mask.shape}"
        raise ValueError(f"row {row} of training_logprobs, logprobs and masks has shapes {shapes}")
    if not np.isin(mask, (0, 1)).all():
        raise ValueError(f"row {row} of masks has other values than 0 and 1: {mask!r:.80}")
    columns = np.flatnonzero(mask)
    if len(columns) and not 1 <= columns[0] <= columns[-1] <= len(training):
        raise ValueError(
            f"row {row}: training_logprobs has {len(training)} columns, and the drawn tokens are "
            f"{columns[0]} to {columns[-1]}: column t is of token t + 1"
        )
    with np.errstate(over="ignore", invalid="ignore"):  # the report counts such values
        delta = training[columns - 1] - rollout[columns]
    return delta, columns - columns[:1]


def summarise(delta: np.ndarray, positions: np.ndarray, sampling: str) -> Mismatch:
    """The report of deltas (N,) at positions (N,)."""
    is_finite = np.isfinite(delta)
    num_not_finite = len(delta) - int(is_finite.sum())
    delta = delta[is_finite]
    positions = positions[is_finite]
    size = np.abs(delta)
    num_tokens = len(delta)
    num_positions = int(positions.max()) + 1 if num_tokens else 0
    counts = np.bincount(positions, minlength=num_positions)
    sums = np.bincount(positions, weights=size, minlength=num_positions)
    mean_at = np.full(num_positions, np.nan)
    np.divide(sums, counts, out=mean_at, where=counts > 0)
    largest_at = np.full(num_positions, np.nan)
    np.fmax.at(largest_at, positions, size)  # fmax of a number and NaN is the number
    # exp of a delta above 709 is infinite: the report shows inf
    with np.errstate(over="ignore", invalid="ignore"):
        ratio = np.exp(delta)
        k3 = np.expm1(delta) - delta
        deviation = ratio.std(ddof=1) if num_tokens > 1 else np.inf
    is_outside = (ratio < LEAST_RATIO) | (ratio > MOST_RATIO)
    return Mismatch(
        num_tokens=num_tokens,
        num_not_finite=num_not_finite,
        mean=mean_of(size),
        largest=float(size.max(initial=0.0)),
        share_outside=mean_of(is_outside),
        kl=mean_of(k3),
        mean_ratio=mean_of(ratio) if num_tokens else 1.0,
        ratio_error=float(deviation / max(1, num_tokens) ** 0.5),
        sampling=sampling,
        counts=counts,
        mean_at=mean_at,
        largest_at=largest_at,
    )


def mean_of(values: np.ndarray) -> float:
    """The mean, or 0 for no values."""
    return float(values.mean()) if len(values) else 0.0
