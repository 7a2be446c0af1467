"""Events whose fields are not as they must be: one ValueError that names the line and the field."""

import json
import re

import pytest
from helpers.goldens import ROOT
from helpers.lives import long_life

from microvllm import cli
from microvllm.trace import Replay, read, write_chrome, write_comparison
from microvllm.trace.replay import BLOCKS_EACH, MAX_BLOCKS, MAX_SEQS
from microvllm.trace.schema import FIELDS, check_event

POOL = {
    "e": "pool", "version": 2, "blocks": 99, "block_size": 2, "caching": True,
    "max_batch_size": 4, "max_batched_tokens": 8, "windows": [-1], "model": "m", "device": "cpu",
    "hashes": {"3": "aa", "4": "bb"}, "cached": [3, 4],
}  # fmt: skip
ARRIVE = {
    "e": "arrive", "t": 0.5, "seq": 0, "request": 0, "sample": 0, "samples": 2, "tokens": [1, 2, 3],
    "prompt": 3, "limit": 9, "score": 0,
}  # fmt: skip
# each of them may happen after those before it
EVENTS = [
    POOL,
    {"e": "text", "ids": {"1": "a", "2": "b"}},
    ARRIVE,
    ARRIVE | {"seq": 1, "request": 1},
    {"e": "resume", "seq": 1, "table": [20], "computed": 1},
    {"e": "admit", "t": 1, "seq": 0, "computed": 2},
    {"e": "hit", "seq": 0, "blocks": [3]},
    {"e": "miss", "seq": 0, "count": 2},
    {"e": "evict", "block": 4},
    {"e": "allocate", "seq": 0, "blocks": [4]},
    {"e": "fork", "seq": 2, "parent": 0, "sample": 1, "computed": 3},
    {"e": "begin", "t": 2, "step": 1, "decodes": "0-1", "prefills": [[2, 0, 3]]},
    {"e": "tokens", "step": 1, "seqs": "0-1", "tokens": [1, 2]},
    {"e": "end", "t": 3, "step": 1, "ms": {"wait": 1.5, "forward": 2}},
    {"e": "copy", "seq": 2, "index": 1, "source": 4, "target": 5},
    {"e": "publish", "seq": 2, "block": 5, "hash": "cc"},
    {"e": "force", "seq": 2, "tokens": [7]},
    {"e": "reject", "seq": 2, "computed": 2, "blocks": [5]},
    {"e": "window", "seq": 1, "blocks": [20]},
    {"e": "free", "seq": 0},
    {"e": "preempt", "t": 4, "seq": 0},
    {"e": "finish", "t": 5, "seq": 1, "reason": "stop"},
    {"e": "abort", "t": 5, "seq": 2},
    {"e": "reset", "t": 6},
]
WRONG = [
    None, True, -1, 1.5, 10**400, float("nan"), "", "x", "<b>", [], [1.5], ["x"], [[1]], [-1],
    [True], [10**30], {}, {"a": 1}, {"-5": "a"}, {"1": None}, {"9" * 99: "a"}, {"wait": "1"}, "7-",
    "0 - 1", "0-" + "9" * 99, [[0, 1]], [[0, 2, 1]], [[0, 1, "2"]], [-1] * 1000,
]  # fmt: skip
# of fields that are whatever such a field may be
TEXTS = [wrong for wrong in WRONG if isinstance(wrong, str)]
RIGHT = {
    "cached": [[]],
    "hashes": [{}],
    "ids": [{}],
    "prefills": [[]],
    "ms": [{}, {"a": 1}],
    "t": [1.5],
}
RIGHT |= dict.fromkeys(("model", "device", "hash", "reason"), TEXTS)
RIGHT |= {"tokens": [[]], "blocks": [[]], "table": [[]], "decodes": [""], "seqs": [""]}
RIGHT |= {"caching": [True], "windows": [[-1]]}


def test_a_trace_of_all_events_is_one():
    assert [*dict.fromkeys(event["e"] for event in EVENTS)].sort() == [*FIELDS].sort()
    for event in EVENTS:
        required, optional = FIELDS[event["e"]]
        assert event.keys() - {"e", "t"} <= required.keys() | optional.keys()
    Replay(EVENTS)


def test_the_table_has_the_fields_that_the_documentation_names():
    page = (ROOT / "docs" / "TRACE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|[^|]+\| ([^|]+) \|$", page, re.MULTILINE)
    assert {name for name, _ in rows} == FIELDS.keys()
    for name, words in rows:
        required, optional = FIELDS[name]
        for field in {*required, *optional} - {"t"}:
            assert re.search(rf"\b{field}\b", words), (name, field)


def fails(traces, path) -> list[str]:
    """What the readers of two traces say, each of one trace that is not sound."""
    said = []
    for write in (
        lambda: write_chrome(traces[1], path),
        lambda: write_comparison(traces, "ab", path),
    ):
        with pytest.raises(ValueError) as error:
            write()
        said.append(str(error.value))
    assert not path.exists()
    return said


@pytest.mark.parametrize("at", range(len(EVENTS)), ids=lambda at: f"{at}-{EVENTS[at]['e']}")
def test_a_field_of_another_type_is_one_error_with_line_and_field(at, tmp_path):
    event, path = EVENTS[at], tmp_path / "out"
    replay, seen = Replay(EVENTS[:at]), 0
    for field in event.keys() - {"e"}:
        for wrong in WRONG:
            plain = {k: v for k, v in event.items() if k != field} | {field: wrong}
            right = () if event is POOL and field == "blocks" else RIGHT.get(field, ())
            if any(wrong == value and type(wrong) is type(value) for value in right):
                check_event(plain)
                continue
            with pytest.raises(ValueError) as error:
                replay.follow(plain, "run", at + 1)
            said = str(error.value)
            assert said.startswith(f"run: line {at + 1}: not an event of a trace: {event['e']}: ")
            assert f"field '{field}' must be" in said and len(said) < 300, said
            seen += 1
        for said in fails([EVENTS, [*EVENTS[:at], plain]], path):
            assert f"line {at + 1}: " in said and f"field '{field}' must be" in said
    assert seen >= 20 * (len(event) - 1)
    required, _ = FIELDS[event["e"]]
    for field in required:
        events = [*EVENTS[:at], {k: v for k, v in event.items() if k != field}]
        for said in fails([EVENTS, events], path):
            assert f"line {at + 1}: " in said and f"field '{field}' is missing" in said


@pytest.mark.parametrize(
    "wrong", [5, None, "x", [], [POOL], {}, {"e": None}, {"e": ["a"]}, {"e": "_x"}]
)
def test_what_is_no_event_at_all(wrong, tmp_path):
    for said in fails([EVENTS, [*EVENTS, wrong]], tmp_path / "out"):
        assert f"line {len(EVENTS) + 1}: not an event of a trace: " in said
    file = tmp_path / "run.jsonl"
    file.write_text("".join(json.dumps(event) + "\n" for event in [POOL, wrong]))
    with pytest.raises(ValueError, match="run.jsonl: line 2: not an event of a trace"):
        read(file)


@pytest.mark.parametrize(
    "event, said",
    [
        ({"e": "free", "seq": 9}, "field 'seq': there is no sequence 9"),
        ({"e": "fork", "seq": 3, "parent": 9, "sample": 1, "computed": 0}, "field 'parent': there"),
        ({"e": "begin", "step": 1, "decodes": "0 9", "prefills": []}, "field 'decodes': there is"),
        ({"e": "begin", "step": 1, "decodes": "", "prefills": [[9, 0, 1]]}, "field 'prefills': th"),
        ({"e": "tokens", "step": 1, "seqs": "0", "tokens": []}, "field 'tokens': there are fewer"),
        ({"e": "tokens", "step": 1, "seqs": "", "tokens": [1]}, "field 'tokens': there are more"),
        ({"e": "hit", "seq": 0, "blocks": [99]}, "field 'blocks': there is no block 99"),
        ({"e": "window", "seq": 0, "blocks": [9]}, "field 'blocks': 9 is not in its table"),
        ({"e": "reject", "seq": 0, "computed": 0, "blocks": [9]}, "field 'blocks': they are not"),
        ({"e": "copy", "seq": 0, "index": 7, "source": 3, "target": 9}, "field 'index': its table"),
        ({"e": "copy", "seq": 0, "index": 0, "source": 9, "target": 8}, "field 'source': no table"),
        ({"e": "copy", "seq": 0, "index": 0, "source": 3, "target": 0}, "field 'target': the null"),
        ({"e": "evict", "block": 9}, "field 'block': 9 is not cached"),
        ({"e": "publish", "seq": 0, "block": 99, "hash": "a"}, "field 'block': there is no block"),
        ({"e": "miss", "seq": 9, "count": 1}, "field 'seq': there is no sequence 9"),
    ],
)
def test_what_cannot_happen_names_its_field(event, said, tmp_path):
    start = EVENTS[:8]
    for error in fails([EVENTS, [*start, event]], tmp_path / "out"):
        assert f"line 9: not an event of a trace: {said}" in error


def test_numbers_beyond_all_that_was_told_are_refused():
    """The page has arrays as long as the largest number: one line could make it take gigabytes."""
    pool = POOL | {"blocks": 1 << 24, "hashes": {}, "cached": []}
    start, far = [pool, ARRIVE], (1 << 24) - 1
    assert Replay(start).num_blocks == 1 << 24
    for events in (
        [pool | {"cached": [far]}],
        [pool | {"hashes": {str(far): "a"}}],
        [*start, {"e": "allocate", "seq": 0, "blocks": [1, far]}],
        [*start, {"e": "resume", "seq": 0, "table": [far], "computed": 0}],
        [*start, {"e": "publish", "seq": 0, "block": far, "hash": "a"}],
        [*start, {"e": "hit", "seq": 0, "blocks": [1]},
         {"e": "copy", "seq": 0, "index": 0, "source": 1, "target": far}],
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"no event before has blocks near {far}"):
            Replay(events)
    for event in (
        ARRIVE | {"seq": 10**6},
        {"e": "fork", "seq": 10**6, "parent": 0, "sample": 1, "computed": 0},
    ):
        with pytest.raises(ValueError, match="field 'seq': no event before has sequences near"):
            Replay([*start, event])
    # such numbers are possible after that many blocks were named
    said = [*range(MAX_BLOCKS - 9, MAX_BLOCKS + 1)]
    replay = Replay([*start, {"e": "allocate", "seq": 0, "blocks": said}])
    assert replay.num_used == 10 and MAX_BLOCKS + 10 * BLOCKS_EACH > said[-1]
    Replay([*start, ARRIVE | {"seq": MAX_SEQS}])


def test_a_real_trace_is_as_the_table_says():
    met = set()
    for seed, guesses in (1, False), (2, True):
        for event in long_life(seed, guesses).sim.trace.events:
            required, optional = FIELDS[event["e"]]
            assert event.keys() - {"e", "t"} <= required.keys() | optional.keys()
            met.add(event["e"])
    assert len(met) > 15


def test_the_command_says_it_in_one_line(tmp_path, capsys):
    file, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    file.write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    other.write_text(json.dumps(POOL) + "\n" + json.dumps(ARRIVE | {"tokens": {"a": 1}}) + "\n")
    for arguments in ([other], [file, other], [other, "--chrome", tmp_path / "c.json"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["trace", *map(str, arguments)])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1
        assert "b.jsonl: line 2: " in said and "arrive: field 'tokens' must be a list" in said
