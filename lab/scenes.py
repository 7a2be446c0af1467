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
# (the step before which it arrives, (text, number of its tokens), samples, new tokens); blocks,
# including the null block; the largest number of tokens in a step
PREDICT = {
    11: ([(0, (SEA, 40), 2, 8), (2, (NIGHT, 50), 1, 4)], 30, 32),
    12: ([(0, (SEA, 60), 1, 40), (0, (NIGHT, 60), 1, 40)], 10, 256),
}
PLANTED = [
    (0, (SEA, 52), 1, 3),
    (4, (NIGHT, 100), 1, 40),
    (6, (MILL, 86), 1, 3),
    (12, (CITY, 40), 1, 40),
    (20, (SEA, 52), 1, 6),
    (30, (MILL, 60), 1, 6),
]


class Planted(BlockPool):
    """A BlockPool with a mistake."""

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
        events = demo.record(trace, PLANTED, 17, pool_class=Planted)
    else:
        events = demo.record(trace, *PREDICT[number])
    write_page(events, page)
    return events, page


def third_step(events: list[dict]) -> dict:
    """The answer to exercise 11: the events of step 3."""
    from microvllm.trace import unspan

    of = [event for step, event in demo.numbered(events) if step == 3]
    begin = next(event for event in of if event["e"] == "begin")
    return {
        "decodes": list(unspan(begin["decodes"])),
        "prefills": [tuple(chunk) for chunk in begin["prefills"]],
        "copies": sum(event["e"] == "copy" for event in of),
        "fresh": sum(len(event["blocks"]) for event in of if event["e"] == "allocate"),
    }


def preemption(events: list[dict]) -> dict:
    """The answer to exercise 12: the preempted sequence, and its next admission."""
    found: dict = {}
    for step, event in demo.numbered(events):
        if event["e"] == "preempt":
            found = {"seq": event["seq"], "step": step}
        elif event["e"] == "admit" and event["seq"] == found.get("seq"):
            return found | {"back": step, "found": event["computed"]}
    raise AssertionError("no preempted sequence is admitted again")


def wrong_hit(events: list[dict]) -> dict:
    """The answer to exercise 13: the first hit on blocks with another text."""
    from microvllm.trace import Replay

    replay, texts = Replay(), {}  # hash of a block -> all tokens up to its end
    for step, event in demo.numbered(events):
        replay.apply(event)
        if event["e"] not in ("publish", "hit"):
            continue
        life, size = replay.seqs[event["seq"]], replay.block_size
        if event["e"] == "publish":
            place = life.table.index(event["block"])
            texts[event["hash"]] = life.tokens[: (place + 1) * size]
            continue
        held = [texts.get(replay.hash_of.get(block)) for block in event["blocks"]]
        wrong = [
            b for i, b in enumerate(event["blocks"]) if held[i] != life.tokens[: (i + 1) * size]
        ]
        if wrong:
            return {"step": step, "blocks": wrong, "mistake": "hash"}
    raise AssertionError("no hit is wrong")


ANSWERS = {11: third_step, 12: preemption, 13: wrong_hit}
