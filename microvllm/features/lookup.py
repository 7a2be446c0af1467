"""Prompt lookup: guess the next tokens from the text itself, so that a step can check several.

Speculative decoding (Leviathan et al. 2023) without a second model: what followed the same few
tokens earlier, in the prompt or in the output, is guessed to follow them again (Saxena 2023, prompt
lookup decoding). A guess costs a row of the step, which is little where few rows read all the
weights anyway, and never a token: it counts only if it is what is drawn.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import cycle, islice, takewhile

# how many tokens must have been there before, the longest match first. a single one is right in a
# fifth of the cases, and pays where a row more takes a tenth of a step or less
SIZES = 3, 2, 1


class Lookup:
    """Guesses for one sequence.

    limit: tokens guessed at once, at most; ends: tokens that are never guessed, since what comes
    after them is not the model's: those that end the text or call a tool.
    """

    def __init__(self, limit: int, ends: Collection[int] = ()):
        self.limit, self.ends = limit, ends
        self.count = limit  # how many are guessed next
        self.after: dict[tuple[int, ...], int] = {}  # n tokens: the position behind their last ones
        self.seen = 0  # tokens up to which `after` is

    def fork(self) -> Lookup:
        """Of another sample, whose text will be another one."""
        return Lookup(self.limit, self.ends)

    def guess(self, tokens: list[int], room: int) -> list[int]:
        """Up to `room` tokens that may follow these."""
        if self.seen > len(tokens):  # some were cut off
            self.seen = 0
            self.after.clear()
        # those at the very end are what is looked for: they come in with the next token
        for stop in range(self.seen, len(tokens)):
            for n in SIZES:
                if n <= stop:
                    self.after[tuple(tokens[stop - n : stop])] = stop
        self.seen = len(tokens)
        count = min(self.count, room)
        for n in SIZES:
            if at := self.after.get(tuple(tokens[-n:])):
                # where the text ends before the guess does it repeats itself, and so may go on
                copied = islice(cycle(tokens[at : at + count]), count)
                return list(takewhile(lambda token: token not in self.ends, copied))
        return []

    def learn(self, guessed: int, accepted: int) -> None:
        """Guess more while it goes well, and fewer where it does not."""
        if accepted == guessed:
            self.count = min(2 * self.count, self.limit)
        else:
            self.count = max(1, guessed // 2)
