"""Prompt lookup: guess the next tokens from the text itself, so that a step can check several.

Speculative decoding (Leviathan et al. 2023) without a second model: what followed the same few
tokens earlier, in the prompt or in the output, is guessed to follow them again (Saxena 2023, prompt
lookup decoding). A guess costs a row of the step, which is little where few rows read all the
weights anyway, and never a token: it counts only if it is what is drawn.
"""

from collections.abc import Collection
from copy import copy
from itertools import cycle, islice, takewhile

from ..scheduler import Scheduler, Sequence

FEW_ROWS = 8  # a step of so many takes little longer than one of a single row

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

    def guess(self, tokens: list[int], room: int) -> list[int]:
        """Up to `room` tokens that may follow these."""
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


class LookupScheduler(Scheduler):
    """Sequences that decode guess what comes next, in steps of few rows.

    While a step is planned and run, what was guessed stands at the end of `seq.tokens`, where
    everyone who makes a batch finds it; `update` takes it away again before it appends what was
    drawn.
    """

    num_guesses = 0  # a step, for each sequence, at most; set by the engine

    def __init__(self, *args, **policies):
        super().__init__(*args, **policies)
        self.num_guessed = self.num_accepted = 0  # tokens
        self.known: dict[Sequence, int] = {}  # how many of its tokens are no guesses
        self.lookups: dict[Sequence, Lookup] = {}

    def choose(self):
        chunks, total = super().choose()
        able = [
            i
            for i, (seq, start, stop) in enumerate(chunks if total < FEW_ROWS else ())
            if stop - start == 1 and stop == len(seq.tokens) and not seq.forks
            if getattr(seq, "may_guess", True)  # not where somebody would see what is guessed
        ]
        room = min(FEW_ROWS, self.max_batched_tokens) - total
        for left, i in zip(range(len(able), 0, -1), able, strict=True):
            seq, start, stop = chunks[i]
            most = min(room // left, seq.max_length - 1 - stop)  # the last is never fed back
            found = self.lookup(seq).guess(seq.tokens, most) if most > 0 else []
            # in blocks that nobody else wants
            if found and self.blocks.grow(seq, start, stop + len(found)):
                self.known[seq] = stop
                seq.tokens += found
                chunks[i] = seq, start, stop + len(found)
                room -= len(found)
                total += len(found)
        return chunks, total

    def lookup(self, seq: Sequence) -> Lookup:
        """Whoever guesses for a sequence."""
        if seq not in self.lookups:
            ends = {*seq.stop_ids, *getattr(seq, "tool_ids", ())}
            self.lookups[seq] = Lookup(self.num_guesses, ends)
        return self.lookups[seq]

    def samples(self, chunks):
        samples = super().samples(chunks)
        if not self.known:
            return samples
        return [
            (index, seq, p)
            for index, seq, position in samples
            for p in range(self.known.get(seq, position), position + 1)
        ]

    def update(self, plan, token_ids):
        """Keep the guesses that are what was drawn, up to the first that is not.

        Nothing has to be drawn again for the text to be as likely as without guesses: a token is a
        function of its logits and of the noise of its position, so the one that stands here is the
        one that would have been drawn alone. In the usual scheme (Leviathan et al. 2023) a guess
        that is made without a doubt is kept with the probability that the model gives it, and else
        replaced by a draw among all others: here too, with the same noise for both.
        """
        if not self.known:
            return super().update(plan, token_ids)
        rows: list[int] = []  # those that no wrong guess comes before
        wrong: dict[Sequence, int] = {}  # the position of the first wrong guess
        for row, (_, seq, position) in enumerate(plan.samples):
            if seq not in wrong:
                rows.append(row)
                guessed = seq in self.known and position < len(seq.tokens)
                if guessed and seq.tokens[position] != token_ids[row]:
                    wrong[seq] = position
        for seq in list(self.known):
            count = len(seq.tokens) - self.known[seq]
            self.withdraw(seq)
            accepted = wrong[seq] - len(seq.tokens) if seq in wrong else count
            self.num_guessed += count
            self.num_accepted += accepted
            self.lookup(seq).learn(count, accepted)
            if seq in wrong and seq.table:
                self.shrink(seq, wrong[seq])
        kept = copy(plan)
        kept.samples = [plan.samples[row] for row in rows]
        changed = super().update(kept, [token_ids[row] for row in rows])
        for seq in wrong:
            if not seq.finish_reason:
                seq.stop_reason = None  # what a logits_processor said to a wrong guess
        return changed

    def shrink(self, seq: Sequence, num_tokens: int) -> None:
        """Count only so many tokens as computed, and give back the blocks behind them."""
        count = self.blocks.blocks_for(num_tokens)
        gone = seq.table[count:].tolist()
        del seq.table[count:]
        seq.num_computed, seq.num_writable = num_tokens, 0
        for block in reversed(gone):
            self.blocks.release(block)
        self.blocks.events.note("reject", seq, gone)

    def withdraw(self, seq: Sequence) -> None:
        """Take a sequence's guesses out of its tokens."""
        del seq.tokens[self.known[seq] :]
        del self.known[seq]

    def finish(self, seq: Sequence, *reasons) -> None:
        if seq in self.known:
            self.withdraw(seq)
        super().finish(seq, *reasons)
        self.lookups.pop(seq, None)

    def reset(self, sequences=None) -> list[Sequence]:
        for seq in list(self.known):
            self.withdraw(seq)
        self.lookups.clear()
        return super().reset(sequences)


PARTS = {"guesser": LookupScheduler}
