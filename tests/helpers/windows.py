"""Requests whose contexts are longer than the short attention window of an era."""

from .engines import greedy, ids, sampled
from .naive import naive

WINDOWED = ["era2", "era3", "era3b", "era4", "era5"]


def beyond(name: str) -> list:
    """Contexts that are longer than the short window, 104 to 256 tokens, or come to be so."""
    short = min(naive(name).model.windows)
    start = ids(short + 9, 1)
    return [
        (start, greedy(14)),
        (start + ids(40, 2), sampled(9, seed=1)),
        (start[: short - 3], greedy(12)),
        (ids(short + 70, 3), sampled(8, seed=2, n=2)),
        (start + ids(40, 2), greedy(6)),
    ]
