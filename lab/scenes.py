"""Three traced runs of the engine on the bundled model, for exercises 11 to 13.

Lengths are fixed and no text ends early, so the events are the same on every machine. Solve
exercise 13 before you read this file: it contains the bug.
"""

from __future__ import annotations

from pathlib import Path

from microvllm.blocks import BlockPool

from . import demo

SEA = demo.BOOK * 2
NIGHT = "It was a dark and stormy night, and two travellers came to the door of an old inn. " * 5
MILL = "Once upon a time there was a miller who had a daughter and a mill by the river. " * 5
CITY = "In the great city the lamps were lit, and the carriages went to and fro in the rain. " * 5
# the requests: (the step before which it arrives, (text, number of its tokens), samples, new
# tokens); the number of blocks, including the null block; the largest number of tokens in a step
PREDICT = {
    11: ([(0, (SEA, 40), 2, 8), (2, (NIGHT, 50), 1, 4)], 30, 32),
    12: ([(0, (SEA, 60), 1, 40), (0, (NIGHT, 60), 1, 40)], 10, 256),
}
BUG_SCENE = [
    (0, (SEA, 52), 1, 3),
    (4, (NIGHT, 100), 1, 40),
    (6, (MILL, 86), 1, 3),
    (12, (CITY, 40), 1, 40),
    (20, (SEA, 52), 1, 6),
    (30, (MILL, 60), 1, 6),
]


class BuggyBlockPool(BlockPool):
    """A BlockPool with the bug of exercise 13."""

    def allocate(self) -> int:
        if self.blank:
            return super().allocate()
        block = self.eviction(self)
        del self.cached[block]
        del self.hash_of[block]  # the bug: block_of still contains it, so a prompt can find it
        self.ref_count[block] = 1
        return block


def record(number: int, folder: Path) -> tuple[list[dict], Path]:
    """Run the scene of an exercise, and write its trace and page into a folder. Returns (events,
    path of the page)."""
    from microvllm.trace import write_page

    folder.mkdir(parents=True, exist_ok=True)
    trace, page = (folder / f"exercise-{number}.{end}" for end in ("jsonl", "html"))
    if number == 13:
        events = demo.record(trace, BUG_SCENE, 17, pool_class=BuggyBlockPool)
    else:
        events = demo.record(trace, *PREDICT[number])
    write_page(events, page)
    return events, page


def third_step(events: list[dict]) -> dict:
    """The answer to exercise 11: the events of step 3."""
    from microvllm.trace import unspan

    step_events = [event for step, event in demo.numbered(events) if step == 3]
    begin = next(event for event in step_events if event["e"] == "begin")
    return {
        "decodes": list(unspan(begin["decodes"])),
        "prefills": [tuple(chunk) for chunk in begin["prefills"]],
        "copies": sum(event["e"] == "copy" for event in step_events),
        "fresh": sum(len(event["blocks"]) for event in step_events if event["e"] == "allocate"),
    }


def preemption(events: list[dict]) -> dict:
    """The answer to exercise 12: the preempted sequence, and its next admission."""
    answer: dict = {}
    for step, event in demo.numbered(events):
        if event["e"] == "preempt":
            answer = {"seq": event["seq"], "step": step}
        elif event["e"] == "admit" and event["seq"] == answer.get("seq"):
            return answer | {"back": step, "found": event["computed"]}
    raise AssertionError("no preempted sequence is admitted again")


def wrong_hit(events: list[dict]) -> dict:
    """The answer to exercise 13: the first hit on blocks with another text."""
    from microvllm.trace import Replay

    replay, texts = Replay(), {}  # hash of a block -> all tokens up to its end
    for step, event in demo.numbered(events):
        replay.apply(event)
        if event["e"] not in ("publish", "hit"):
            continue
        token_ids = replay.seqs[event["seq"]].tokens
        size = replay.block_size
        if event["e"] == "publish":
            place = replay.seqs[event["seq"]].table.index(event["block"])
            texts[event["hash"]] = token_ids[: (place + 1) * size]
            continue
        block_texts = [texts.get(replay.hash_of.get(block)) for block in event["blocks"]]
        wrong_blocks = [
            block
            for i, block in enumerate(event["blocks"])
            if block_texts[i] != token_ids[: (i + 1) * size]
        ]
        if wrong_blocks:
            return {"step": step, "blocks": wrong_blocks, "mistake": "hash"}
    raise AssertionError("no hit is wrong")


ANSWERS = {11: third_step, 12: preemption, 13: wrong_hit}
