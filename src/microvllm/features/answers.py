"""Answer lookup: propose tokens of earlier answers to the same prompt.

In epochs of reinforcement learning, in retries, and where several samples are drawn from one
prompt, answers resemble each other. Answers that have ended are kept, and a new answer to the same
prompt is expected to continue as they did:

    it begins as one of them did     what comes next there
    else                             what followed its last tokens, in them or in the text itself

This is prompt lookup (features/lookup.py) in a longer text. After new weights an earlier answer is
only right less often.
"""

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Set
from weakref import WeakKeyDictionary

from ..engine import Request
from ..runner import Extension
from ..scheduler import Sequence
from .lookup import NgramTable, PromptLookup

ANSWERS_OF_PROMPT = 8  # the latest ones
MAX_TOKENS = 2**22  # of all prompts and answers, 16 MB; the prompts longest unused are dropped

MAX_HISTORY = 2048  # tokens of earlier answers in which a text's last tokens are looked for
BORDER = -1  # between two texts; no token


class EarlierAnswers(Extension):
    """Keeps the answers to each prompt."""

    def __init__(self, max_tokens: int = MAX_TOKENS):
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self.by_prompt: OrderedDict[bytes, deque[array]] = OrderedDict()  # the latest used last

    def on_sample_output(self, request: Request, seq: Sequence, output: dict) -> None:
        """Keep an answer that the model ended, or that reached its length."""
        if seq.finish_reason in ("stop", "length") and len(seq.token_ids) > seq.num_prompt:
            self.add(seq.token_ids[: seq.num_prompt], seq.output)

    def add(self, prompt: list[int], answer: list[int]) -> None:
        """Keep an answer, and drop the oldest ones beyond the limits. One that is kept already
        becomes the latest."""
        key = key_of(prompt)
        answers = deque(self.by_prompt.get(key, ()))
        self.drop(key)
        new = array("i", answer)
        if new in answers:
            answers.remove(new)
        answers.append(new)
        if len(answers) > ANSWERS_OF_PROMPT:
            answers.popleft()
        self.by_prompt[key] = answers
        self.num_tokens += count_tokens(key, answers)
        while self.num_tokens > self.max_tokens:
            self.drop(next(iter(self.by_prompt)))

    def drop(self, key: bytes) -> None:
        """Drop the answers to a prompt, if there are any."""
        if key in self.by_prompt:
            self.num_tokens -= count_tokens(key, self.by_prompt[key])
            del self.by_prompt[key]

    def get(self, prompt: list[int]) -> list[list[int]]:
        """The answers to a prompt, the latest last."""
        key = key_of(prompt)
        if key not in self.by_prompt:
            return []
        self.by_prompt.move_to_end(key)
        return [answer.tolist() for answer in self.by_prompt[key]]


class AnswerLookup(PromptLookup):
    """A DraftProposer. limit, never: as of PromptLookup; earlier: the answers."""

    def __init__(self, limit: int, earlier: EarlierAnswers, never: Set[int] = frozenset()):
        super().__init__(limit, never)
        self.earlier = earlier
        self.answers: WeakKeyDictionary[Sequence, AnswerTable] = WeakKeyDictionary()

    def table(self, seq: Sequence) -> NgramTable:
        if seq not in self.tables:
            answers = self.earlier.get(seq.token_ids[: seq.num_prompt])
            never = seq.stop_token_ids | self.never
            self.tables[seq] = AnswerTable(self.limit, never, seq.num_prompt, answers)
        return self.tables[seq]


class AnswerTable(NgramTable):
    """An NgramTable of a text behind earlier answers. num_prompt: tokens of the prompt; answers: to
    it, the latest last."""

    def __init__(
        self, limit: int, never: Set[int], num_prompt: int, answers: Iterable[list[int]] = ()
    ):
        super().__init__(limit, never | {BORDER})
        self.num_prompt = num_prompt
        self.answers = list(answers)
        self.alike = self.answers  # those that begin as the text does
        self.num_compared = 0  # tokens of the text that were compared with them
        history = [token_id for answer in self.answers for token_id in [*answer, BORDER]]
        self.history = history[-MAX_HISTORY:]

    def propose(self, token_ids: list[int], max_tokens: int) -> list[int]:
        """Up to max_tokens tokens that may follow these."""
        answer = self.longest_alike(token_ids[self.num_prompt :])
        if answer is None:
            return super().propose(self.history + token_ids, max_tokens)
        start = len(token_ids) - self.num_prompt
        following = answer[start : start + min(self.num_next, max_tokens)]
        return self.copy(following, len(following))

    def longest_alike(self, output: list[int]) -> list[int] | None:
        """The latest of the answers that begin with this output and continue."""
        start = self.num_compared
        stop = len(output)
        if stop < start:  # the text was cut
            self.alike = self.answers
            start = 0
        new = output[start:]
        self.alike = [answer for answer in self.alike if answer[start:stop] == new]
        self.num_compared = stop
        longer = [answer for answer in self.alike if len(answer) > stop]
        return longer[-1] if longer else None


def key_of(prompt: list[int]) -> bytes:
    """A prompt as a key."""
    return array("i", prompt).tobytes()


def count_tokens(key: bytes, answers: Iterable[array]) -> int:
    """The tokens of a prompt and its answers."""
    return len(key) // array("i").itemsize + sum(map(len, answers))
