"""Two traces side by side: every frame is what a Replay says at that step."""

import json
import re

import pytest
from helpers.lives import long_life

from microvllm import cli
from microvllm.trace import Replay, write_comparison
from microvllm.trace.compare import NAMES, Film

POOL = {"e": "pool", "version": 2, "blocks": 9, "block_size": 2, "hashes": {}, "cached": []}


@pytest.mark.parametrize("guesses", [False, True])
def test_every_frame_is_the_pool_of_its_step(guesses):
    events = long_life(1, guesses).sim.trace.events
    film, replay, looks = Film(), Replay(), {}
    for event in events:
        film.apply(event)
    frame = iter(film.frames)
    seen = 0
    for event in events:
        replay.apply(event)
        if event["e"] == "begin":
            numbers, changed = next(frame)
            looks |= dict(zip(changed[::2], changed[1::2], strict=True))
            said = dict(zip(NAMES, numbers, strict=True))
            assert said["blocks in use"] == replay.num_used
            assert said["running"] == replay.states["running"]
            for block in range(1, replay.num_blocks):
                kind = replay.state(block)
                assert (looks.get(block, 0) < 0) == (kind == "shared"), (seen, block)
                assert (looks.get(block, 0) > 1) == (kind == "used"), (seen, block)
                assert (looks.get(block, 0) == 1) == (kind == "cached"), (seen, block)
            seen += 1
    assert seen == len(film.frames) > 40


def pair(tmp_path, *tokens: list[int]) -> list:
    paths = []
    for name, prompt in zip("ab", tokens, strict=True):
        arrive = {"e": "arrive", "t": 0, "seq": 0, "request": 0, "sample": 0, "samples": 1,
                  "tokens": prompt, "prompt": len(prompt), "limit": 9, "score": 0}  # fmt: skip
        lines = [json.dumps(event) + "\n" for event in (POOL, arrive)]
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(lines))
    return paths


@pytest.mark.parametrize("same", [True, False])
def test_the_command_writes_one_page_and_says_if_the_prompts_differ(tmp_path, capsys, same):
    a, b = pair(tmp_path, [1, 2], [1, 2] if same else [1, 3])
    cli.main(["trace", str(a), str(b), "-o", str(tmp_path / "diff.html")])
    assert "0 and 0 steps" in capsys.readouterr().out
    page = (tmp_path / "diff.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script id="runs" [^>]*>(.+?)</script>', page, re.S)[1])
    assert data["same"] is same and [run["name"] for run in data["runs"]] == ["a", "b"]
    assert "http:" not in page and "https:" not in page and "innerHTML" not in page
    cli.main(["trace", str(a), str(b), "--json"])  # the page lies beside the first trace
    assert json.loads(capsys.readouterr().out)["files"] == [str(tmp_path / "a-diff.html")]


def test_mistakes_are_one_line(tmp_path, capsys):
    a, b = pair(tmp_path, [1], [1])
    for flags, said in (
        ([a, b, "--chrome", "x.json"], "--chrome"),
        ([a, tmp_path / "absent.jsonl"], "absent.jsonl"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["trace", *map(str, flags)])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and said in err and err.count("\n") == 1
    with pytest.raises(ValueError, match="not an event"):
        write_comparison([[POOL], [POOL, {"e": "evict", "block": []}]], ["a", "b"], tmp_path / "x")
    with pytest.raises(ValueError, match="not an event"):
        write_comparison([[POOL], [POOL, {"e": "free", "seq": []}]], ["a", "b"], tmp_path / "x")
