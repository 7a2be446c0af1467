"""Requests, and a function for each kind of traffic."""

from dataclasses import dataclass

from transformer import CONTEXT


@dataclass
class Request:
    """A prompt, the largest number of new tokens, and the number of samples."""

    id: int
    prompt: list[int]
    max_tokens: int
    stop: frozenset[int]
    n: int = 1

    @property
    def max_length(self):
        return len(self.prompt) + self.max_tokens

    def is_done(self, tokens):
        """Has the text ended, by a stop token or at its limit?"""
        return len(tokens) >= self.max_length or (
            len(tokens) > len(self.prompt) and tokens[-1] in self.stop
        )


def ask(model, questions, n=1, before=""):
    """Requests from (question, max_tokens) pairs, rendered as chat prompts."""
    requests = []
    for i, (question, max_tokens) in enumerate(questions):
        turn = {"role": "user", "content": before + question}
        prompt = model.tokenizer.render_for_completion([turn])
        requests.append(Request(i, prompt, max_tokens, model.tokenizer.eos_ids, n))
        assert requests[-1].max_length <= CONTEXT, f"question {i} and its answer are too long"
    return requests


QUESTIONS = [
    ("Who wrote Moby Dick?", 64),
    ("Describe the sea.", 48),
    ("What is 7+8?", 64),
    ("Tell me a story about a dog.", 64),
    ("Name a book by Jane Austen.", 64),
    ("What is the capital of France?", 48),
    ("Write a poem about the moon.", 40),
    ("Hello!", 64),
    ("Who wrote Dracula?", 64),
    ("Where do whales live?", 56),
    ("What is love?", 64),
    ("Who wrote Emma?", 48),
]

TASK = (
    "You are a small model that has read a shelf of old books. Answer the question that follows in "
    "one sentence, and say nothing of which you are not sure. "
)


def questions(model):
    """Twelve questions."""
    return ask(model, QUESTIONS)


def samples(model):
    """Four questions after a common text, and four answers to each."""
    return ask(model, QUESTIONS[3:5] + QUESTIONS[7:9], n=4, before=TASK)


def shared_beginning(model):
    """Twelve questions after a common text."""
    return ask(model, QUESTIONS, before=TASK)


def long_prompt(model):
    """Four questions, and one with a long text."""
    requests = ask(model, QUESTIONS[:4])
    (late,) = ask(model, [("What is 7+8?", 8)], before=4 * TASK)
    late.id = len(requests)
    return [*requests, late]
