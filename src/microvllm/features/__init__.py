"""Features of the full engine, one file each. full.py lists them, and params.py has their request
parameters. This file has what several features share: checks of values, and sequences that are
computed without draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from numbers import Integral, Real

from ..sampler import SamplingParams
from ..scheduler import DrawList, Plan, Sequence, Span


class ReadSequence(Sequence):
    """A text that is computed for its hidden states, without draws.

    token_ids: the tokens to compute; first_row: the first position whose hidden state is needed.
    """

    def __init__(
        self,
        request_id: int,
        prompt: list[int],
        params: SamplingParams,
        *,
        token_ids: list[int],
        first_row: int,
    ):
        super().__init__(request_id, prompt, params, max_length=len(token_ids) + 1)
        self.token_ids.extend(token_ids[len(prompt) :])
        self.first_row = first_row

    @property
    def max_cached_tokens(self) -> int:
        """Prefix cache blocks have K and V, but no hidden states."""
        return self.first_row


def request_rows(plan: Plan, sequence_class: type[ReadSequence]) -> bool:
    """Replace the draws of sequences of a class by requests for their rows. Returns whether the
    plan has such sequences."""
    is_read = [isinstance(chunk.seq, sequence_class) for chunk in plan.chunks]
    if not any(is_read):
        return False
    plan.draws = DrawList(draw for draw in plan.draws if not is_read[draw.chunk_index])
    for index, chunk in enumerate(plan.chunks):
        if is_read[index]:
            start = max(chunk.start, chunk.seq.first_row)
            if start < chunk.stop:
                plan.extra_rows.append(Span(index, start, chunk.stop))
    return True


def read_spans(
    plan: Plan, sequence_class: type[ReadSequence]
) -> Iterator[tuple[ReadSequence, Span, slice]]:
    """Yield the sequences of a class whose rows a plan has, with the positions of the rows and
    their slice of the tensors in on_hidden and on_layer."""
    for span, rows in zip(plan.extra_rows, plan.extra_slices, strict=True):
        seq = plan.chunks[span.chunk_index].seq
        if isinstance(seq, sequence_class):
            yield seq, span, rows


def check_number(
    name: str, value: object, least: float = 0, most: float = 2**31 - 1
) -> int | float:
    """Return the value as an int if `least` is an int, else as a float. (Small numpy integers would
    overflow when added to a length.) Raises TypeError or ValueError that names the argument, unless
    least <= value <= most."""
    is_integer = isinstance(least, int)
    python_type = int if is_integer else float
    if type(value) is not python_type:  # the checks below are slow
        number_type = Integral if is_integer else Real
        if isinstance(value, bool) or not isinstance(value, number_type):
            expected = "an integer" if is_integer else "a number"
            raise TypeError(f"{name} must be {expected}, got {value!r:.80}")
    if not least <= value <= most:  # a NaN fails both comparisons
        limits = f"{least} and {most}" if is_integer else f"{least:g} and {most:g}"
        must_be = "must be between" if is_integer else "must be finite and between"
        raise ValueError(f"{name} {must_be} {limits}, got {value!s:.80}")
    return python_type(value)


def check_text(name: str, value: object) -> str:
    """Return the value. Raises TypeError if it is not a string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be strings, got {value!r:.80}")
    return value


def check_list(name: str, values: object, check: Callable = check_number) -> tuple:
    """Return check(name, value) for the values of a list. Raises TypeError if it is not a list."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list, got {values!r:.80}")
    return tuple(check(name, value) for value in values)
