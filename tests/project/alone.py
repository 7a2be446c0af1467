"""A copy of the package at work in a process of its own: `python -I alone.py`, a job on stdin.

Nothing is imported but from the copy, the standard library, and the packages that the job allows.
So a module that was deleted from the copy is not found in an installed one, as an editable install
would have it. The last line on stdout is JSON. With the argument `forks` each line of stdin is a
job, done by a fork of a process that has imported torch, which takes longer than many jobs do.
"""

import importlib
import io
import json
import os
import runpy
import signal
import sys
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from pathlib import Path

QUESTIONS = [
    "Who wrote Moby Dick?",
    "What is the capital of France?",
    "Tell me a story in the manner of Charles Dickens.",
]


class Visible(PathFinder):
    """Finds what lies in sys.path, as far as it may be seen."""

    allowed: set[str] | None = None  # packages; None: all but the hidden ones
    hidden: set[str] = set()

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.partition(".")[0]
        if top == "microvllm" or top in sys.stdlib_module_names or top.startswith("_sysconfigdata"):
            seen = True
        else:
            seen = top not in cls.hidden and (cls.allowed is None or top in cls.allowed)
        return super().find_spec(name, path, target) if seen else None


def isolate(folder: str, allowed: list[str] | None, hidden: list[str]) -> None:
    """See nothing but the package in `folder` and what it may import."""
    assert not any(name.partition(".")[0] == "microvllm" for name in sys.modules)
    Visible.allowed, Visible.hidden = None if allowed is None else {*allowed}, {*hidden}
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Visible]
    sys.path.insert(0, folder)


def loaded(folder: str, hidden: list[str]) -> list[str]:
    """The modules of microvllm that were imported; all of them must come from the folder."""
    names = sorted(name for name in sys.modules if name.partition(".")[0] == "microvllm")
    for name in names:
        file = Path(sys.modules[name].__file__)
        assert Path(folder) in file.parents, f"{name} is {file}, not in {folder}"
    for name in hidden:
        assert name not in sys.modules, f"{name} was imported"
    return names


# what the core gives ------------------------------------------------------------------------------


def checked(LLM) -> type:
    """An engine whose state is checked after every step, and whose copies and forks are counted."""
    from microvllm.runner import Extension

    class Checks(Extension):
        def __init__(self):
            self.counts = Counter()

        def on_plan(self, plan):
            self.counts["forks"] += len(plan.forks)
            self.counts["copies"] += len(plan.copies)

        def on_step(self, plan):
            scheduler = self.engine.scheduler
            scheduler.blocks.check(scheduler.running)
            assert not any(len(seq.block_table) for seq in scheduler.waiting)

    class CheckedLLM(LLM):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.checks = Checks()
            self.add_extension(self.checks)

    return CheckedLLM


def assert_idle(llm) -> None:
    """No request is left, and every block is free again."""
    pool = llm.scheduler.blocks.pool
    assert llm.is_finished() and not llm.scheduler.running and not len(llm.scheduler.waiting)
    assert pool.num_free == pool.num_usable and not any(pool.ref_count[1:])


def tokens(outputs) -> list[list[list[int]]]:
    """Of each output the tokens of its samples."""
    return [[sample["token_ids"] for sample in output["samples"]] for output in outputs]


def tour(LLM, SamplingParams, model: str) -> dict:
    """Everything that an engine without features can do, checked; returns tokens to compare."""
    LLM = checked(LLM)
    greedy = SamplingParams(temperature=0, max_tokens=12)
    with LLM(model, device="cpu", num_blocks=200) as llm:
        prompts = [ask(llm, text) for text in QUESTIONS]
        plain = llm.generate(prompts, greedy, use_tqdm=False)
        # chat is the rendered prompt
        turns = [[{"role": "user", "content": text}] for text in QUESTIONS]
        answers = llm.chat(turns, greedy, use_tqdm=False)
        assert [a["text"] for a in answers] == [p["text"] for p in plain]
        assert all(a["text"] for a in answers)
        # and found its prompt in the prefix cache, but for the last token
        assert any(a["num_cached_tokens"] > 0 for a in answers)
        for answer in answers:
            assert answer["num_cached_tokens"] < len(answer["prompt_token_ids"])
        # a prompt's n samples share its blocks until they write
        params = SamplingParams(temperature=0.9, top_k=50, max_tokens=12, n=3, seed=7)
        counts = llm.checks.counts
        samples = llm.generate(prompts, params, use_tqdm=False)
        assert counts["forks"] == 2 * len(prompts) and counts["copies"] > 0, counts
        for i in range(3):  # each is what it is alone
            alone = SamplingParams(temperature=0.9, top_k=50, max_tokens=12, seed=7, sample_index=i)
            found = llm.generate(prompts, alone, use_tqdm=False)
            assert tokens(found) == [[sample[i]] for sample in tokens(samples)]
        # the pieces of a stream are generate's text
        pieces: dict = {}
        ends = set()
        for event in llm.stream(prompts, params):
            key = event["index"], event["sample"]
            assert key not in ends
            text, ids = pieces.get(key, ("", []))
            pieces[key] = text + event["text"], ids + event["token_ids"]
            if event["finish_reason"]:
                ends.add(key)
        for i, output in enumerate(samples):
            for k, sample in enumerate(output["samples"]):
                assert pieces[i, k] == (sample["text"], sample["token_ids"])
        assert len(ends) == 9
        assert_idle(llm)
        # an abort ends a request that waits and one that runs, and no other
        ids = [llm.add_request(prompt, greedy) for prompt in prompts]
        llm.step()
        late = llm.add_request(prompts[0], greedy)
        llm.abort(ids[1], late)
        outputs = {}
        while not llm.is_finished():
            outputs |= {output["request_id"]: output for output in llm.step()}
        assert {i: o["finish_reason"] == "abort" for i, o in outputs.items()} == {
            ids[0]: False, ids[1]: True, ids[2]: False, late: True,
        }  # fmt: skip
        assert outputs[ids[2]]["token_ids"] == plain[2]["token_ids"]
        assert_idle(llm)
    # a pool that is too small for all: some are sent back to the queue, and lose nothing
    params = SamplingParams(temperature=0.8, max_tokens=40, ignore_eos=True, seed=3)
    with LLM(model, device="cpu", num_blocks=200) as roomy:
        expected = roomy.generate(prompts, params, use_tqdm=False)
        assert roomy.scheduler.num_preemptions == 0
    with LLM(model, device="cpu", num_blocks=28, block_size=4, max_batched_tokens=16) as tiny:
        found = tiny.generate(prompts, params, use_tqdm=False)
        assert tiny.scheduler.num_preemptions > 0
        try:  # one that can never fit is refused when it arrives, with the numbers
            tiny.add_request(prompts[0], SamplingParams(max_tokens=300, ignore_eos=True))
        except ValueError as error:
            blocks = tiny.scheduler.blocks  # groups of layers have more of them
            sizes = (blocks.num_blocks - 1, blocks.pool.num_usable)
            assert any(str(size) in str(error) for size in sizes), error
        else:
            raise AssertionError("27 blocks of 4 tokens would hold 300")
        assert_idle(tiny)
    assert tokens(found) == tokens(expected)
    return {"greedy": tokens(plain), "sampled": tokens(samples), "long": tokens(expected)}


def ask(llm, text: str) -> list[int]:
    """The ids of a user's turn."""
    return llm.tokenizer.render_for_completion([{"role": "user", "content": text}])


def seeded(LLM, SamplingParams, model: str, prompts: list, params: list[dict]) -> list:
    """The tokens of every prompt with every one of these parameters."""
    pairs = [(prompt, SamplingParams(**given)) for prompt in prompts for given in params]
    with checked(LLM)(model, device="cpu", num_blocks=600) as llm:
        return tokens(llm.generate(*map(list, zip(*pairs, strict=True)), use_tqdm=False))


def eras(LLM, SamplingParams, fixtures: list[dict]) -> list[str]:
    """The fixtures whose greedy tokens are not nanochat's."""
    LLM, wrong = checked(LLM), []
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    for fixture in fixtures:
        with LLM(
            fixture["directory"], device="cpu", block_size=5, num_blocks=600,
            max_batched_tokens=50, max_model_len=500, **fixture["overrides"],
        ) as llm:  # fmt: skip
            outputs = llm.generate(fixture["prompts"], params, use_tqdm=False)
        if [output["token_ids"] for output in outputs] != fixture["tokens"]:
            wrong.append(fixture["name"])
    return wrong


# commands -----------------------------------------------------------------------------------------


def commands(lines: list[list[str]]) -> list[dict]:
    """What `microvllm` with these words prints: exit status, stdout, stderr."""
    results = []
    for words in lines:
        sys.argv = ["microvllm", *words]
        out, err, status = io.StringIO(), io.StringIO(), 0
        with redirect_stdout(out), redirect_stderr(err):
            try:
                runpy.run_module("microvllm", run_name="__main__", alter_sys=True)
            except SystemExit as end:
                status = end.code
                if isinstance(status, str):  # python prints it
                    status, err = 1, io.StringIO(status + "\n")
            except Exception as error:
                status = f"{type(error).__name__}: {error}"
        results.append({"status": status, "out": out.getvalue(), "err": err.getvalue()})
    return results


def fork_for_each() -> None:
    """Do jobs until stdin ends. One that fails answers with a string: what it raised."""
    import numpy  # noqa: F401
    import torch  # noqa: F401

    for line in sys.stdin:
        if not (child := os.fork()):
            signal.alarm(300)
            sys.stdin = open(os.devnull)  # the other jobs are not its input
            try:
                do(json.loads(line))
            except BaseException:
                print(json.dumps(traceback.format_exc()))
            sys.stdout.flush()
            os._exit(0)
        if status := os.waitpid(child, 0)[1]:
            print(json.dumps(f"it ended with the wait status {status}"), flush=True)


def do(job: dict) -> None:
    isolate(job["folder"], job.get("allowed"), job["hidden"])
    found: dict = {}
    for name in job.get("modules", ()):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in job.get("optional", ()):
                raise
    if "model" in job:
        import torch

        from microvllm import LLM, SamplingParams

        torch.set_num_threads(1)  # thousands of tiny steps: two threads would wait for each other
        model = job["model"]
        found["tour"] = tour(LLM, SamplingParams, model)
        found["class"] = LLM.__module__
        if "eras" in job:
            found["wrong"] = eras(LLM, SamplingParams, job["eras"])
        if "seeded" in job:
            found["seeded"] = seeded(LLM, SamplingParams, model, **job["seeded"])
    found["commands"] = commands(job.get("commands", []))
    found["loaded"] = loaded(job["folder"], job["hidden"])
    print(json.dumps(found))


if __name__ == "__main__":
    fork_for_each() if sys.argv[1:] == ["forks"] else do(json.load(sys.stdin))
