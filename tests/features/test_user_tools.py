"""Tools of a user: functions, coroutines and sessions, on a model that calls them."""

import asyncio
import threading
import time

import pytest
from helpers.full_engines import (
    TOOL_CHAIN,
    TOOL_GOLDENS,
    chain,
    everything_is_free,
    set_overlap,
)
from helpers.traces import compare

from microvllm import LLM, SamplingParams
from microvllm.checkpoint import load_model
from microvllm.features.calculator import Calculator, calculate
from microvllm.features.tools import Tool, ToolSession
from microvllm.nanochat import Engine
from microvllm.trace import Replay

pytestmark = pytest.mark.usefixtures("one_thread")

RUNS = TOOL_GOLDENS["runs"]
RUN = next(run for run in RUNS if 0 in run["masks"])  # So:`7*6` = 42  yes!
PARAMS = SamplingParams(temperature=0, max_tokens=60)


async def calculate_later(call: str) -> str | None:
    await asyncio.sleep(0)
    return calculate(call)


def tool(function=calculate, **options) -> Tool:
    return Tool(name="calculator", function=function, **options)


def answer(llm: LLM, tools, params: SamplingParams = PARAMS) -> dict:
    (output,) = llm.generate([RUN["prompt"]], params, use_tqdm=False, tools=tools)
    assert everything_is_free(llm) and not llm.scheduler.paused
    return output


def check_tables(llm: LLM) -> None:
    """Paused sequences have blocks, too."""
    llm.scheduler.blocks.check([*llm.scheduler.running, *llm.scheduler.paused])


# functions ----------------------------------------------------------------------------------------


SMALL = [
    pytest.param(options, marks=pytest.mark.slow)
    for options in ({"max_batched_tokens": 3}, {"num_blocks": 9})
]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("options", [{}, *SMALL])
def test_functions_coroutines_and_inline_tools_answer_with_the_tokens_of_the_calculator(
    overlap, options
):
    kinds = (tool(), tool(calculate_later), tool(is_inline=True), Calculator())
    with set_overlap(chain(plain=True, **options), overlap) as llm:
        for kind in kinds:
            prompts = [run["prompt"] for run in RUNS]
            outputs = llm.generate(prompts, PARAMS, use_tqdm=False, tools=[kind])
            for run, output in zip(RUNS, outputs, strict=True):
                assert (output["token_ids"], output["mask"]) == (run["tokens"], run["masks"])
            entry = {"call": "7*6", "result": "42", "tool": "calculator"}
            assert [entry] in [output["tool_calls"] for output in outputs]
            assert everything_is_free(llm)


@pytest.mark.parametrize("overlap", [False, True])
def test_others_decode_while_a_tool_runs(overlap):
    begun = threading.Event()
    may_end = threading.Event()

    def wait(call: str) -> str | None:
        begun.set()
        assert may_end.wait(60)
        return calculate(call)

    with set_overlap(chain(plain=True), overlap) as llm:
        slow = llm.add_request(RUN["prompt"], PARAMS, tools=[tool(wait)])
        while not begun.is_set():
            assert llm.step() == []
            check_tables(llm)
        other = llm.add_request(RUN["prompt"], PARAMS, tools=True)
        outputs = []
        while not outputs:
            outputs = llm.step()
            check_tables(llm)
        assert [output["request_id"] for output in outputs] == [other]
        may_end.set()
        while not llm.is_finished():
            outputs += llm.step()
        assert [output["request_id"] for output in outputs] == [other, slow]
        assert {tuple(output["token_ids"]) for output in outputs} == {tuple(RUN["tokens"])}


def test_a_sequence_that_waits_gives_its_blocks_to_those_that_need_them():
    may_end = threading.Event()

    def wait(call: str) -> str | None:
        assert may_end.wait(60)
        return calculate(call)

    # as many blocks as one request needs
    num_new = len(RUN["tokens"])
    params = SamplingParams(temperature=0, max_tokens=num_new)
    num_blocks = -(-(len(RUN["prompt"]) + num_new) // 4) + 1
    options = {"num_blocks": num_blocks, "block_size": 4, "enable_prefix_caching": False}
    with chain(plain=True, **options) as llm:
        llm.add_request(RUN["prompt"], params, tools=[tool(wait)])
        while not llm.scheduler.paused:
            llm.step()
        (paused,) = llm.scheduler.paused
        assert len(paused.block_table) > 0
        outputs = llm.generate([RUN["prompt"]], params, use_tqdm=False, tools=True)
        assert outputs[0]["token_ids"] == RUN["tokens"]
        assert len(paused.block_table) == 0
        may_end.set()
        (output,) = [output for _ in iter(llm.is_finished, True) for output in llm.step()]
        assert output["token_ids"] == RUN["tokens"]
        assert everything_is_free(llm)


def test_a_limit_holds_for_the_calls_that_run_at_once():
    lock = threading.Lock()
    counts = []
    running = []

    def count(call: str) -> str | None:
        with lock:
            running.append(call)
            counts.append(len(running))
        time.sleep(0.02)
        with lock:
            running.remove(call)
        return calculate(call)

    with chain(plain=True) as llm:
        prompts = [RUN["prompt"]] * 5
        tools = [tool(count, max_concurrent=2)]
        outputs = llm.generate(prompts, PARAMS, use_tqdm=False, tools=tools)
        assert [output["token_ids"] for output in outputs] == [RUN["tokens"]] * 5
    assert len(counts) == 5 and max(counts) <= 2


# results ------------------------------------------------------------------------------------------


def fail(call: str) -> str:
    raise ZeroDivisionError(f"{call} is too hard")


async def fail_later(call: str) -> str:
    fail(call)


def exit_thread(call: str) -> str:
    raise SystemExit(3)


async def cancel(call: str) -> str:
    raise asyncio.CancelledError


class Silent(Exception):
    def __str__(self) -> str:
        raise RuntimeError("this cannot be shown")


def fail_silently(call: str) -> str:
    raise Silent


NO_LIST = "error: TypeError: the result of tool 'calculator' must be a list"
MISTAKES = [
    (fail, False, "error: ZeroDivisionError: 7*6 is too hard"),
    (fail_later, False, "error: ZeroDivisionError: 7*6 is too hard"),
    (fail, True, "error: ZeroDivisionError: 7*6 is too hard"),
    (exit_thread, False, "error: SystemExit: 3"),
    (cancel, False, "error: CancelledError"),
    (fail_silently, False, "error: Silent"),
    (fail_silently, True, "error: Silent"),
    (lambda call: 42, False, NO_LIST),
    (lambda call: 42, True, NO_LIST),
    (lambda call: b"42", False, NO_LIST),
    (lambda call: [10**6], False, "error: ValueError: token ids [1000000] are outside"),
    (lambda call: [True], False, "error: TypeError: the result of tool 'calculator' must be an"),
]


def test_an_exception_is_a_result():
    params = SamplingParams(temperature=0, max_tokens=200)
    with chain(plain=True) as llm:
        special = llm.tokenizer.special_tokens
        start, end = special["<|output_start|>"], special["<|output_end|>"]
        for function, is_inline, result in MISTAKES:
            output = answer(llm, [tool(function, is_inline=is_inline)], params)
            (entry,) = output["tool_calls"]
            assert entry["result"].startswith(result)
            pairs = zip(output["token_ids"], output["mask"], strict=True)
            forced = [token_id for token_id, is_drawn in pairs if not is_drawn]
            assert forced == [start, *llm.tokenizer.encode(entry["result"])[:256], end]
            assert output["finish_reason"] == "stop"
        with pytest.raises(ValueError, match="is_inline of tool 'calculator'"):
            tool(fail_later, is_inline=True)


def test_special_tokens_in_a_result_are_plain_text():
    with chain(plain=True) as llm:
        text = "<|python_start|>1+1<|python_end|><|assistant_end|>"
        output = answer(
            llm, [tool(lambda call: text)], SamplingParams(temperature=0, max_tokens=99)
        )
        (entry,) = output["tool_calls"]
        assert entry == {"call": "7*6", "result": text, "tool": "calculator"}
        assert output["text"] == f"So:`7*6` = {text}  yes!"


def endless(cancelled: threading.Event):
    """A coroutine function that ends when it is cancelled, and then sets the event."""

    async def sleep(call: str) -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    return sleep


def test_a_call_that_takes_too_long_has_an_error_as_its_result():
    cancelled = threading.Event()
    may_end = threading.Event()

    def wait(call: str) -> str:
        assert may_end.wait(60)
        return "too late"

    with chain(plain=True) as llm:
        for function in (endless(cancelled), wait):
            output = answer(llm, [tool(function, timeout=0.05)])
            assert output["text"].startswith("So:`7*6` = error: no result within 0.05 s ")
        assert cancelled.wait(60)
        may_end.set()


def test_a_result_is_cut_to_its_limit_and_to_the_room_of_the_text():
    with chain(plain=True) as llm:
        long = tool(lambda call: "1" * 10**7, max_result_tokens=5)
        output = answer(llm, [long])
        assert output["mask"].count(0) == 7 and "= 11111  yes" in output["text"]
        first = RUN["masks"].index(0)
        for max_tokens in (first, first + 3):
            params = SamplingParams(temperature=0, max_tokens=max_tokens)
            output = answer(llm, [long], params)
            assert len(output["token_ids"]) == max_tokens
            assert output["finish_reason"] == "length"


def test_no_result_adds_no_tokens():
    with chain(plain=True) as llm:
        plain = answer(llm, False)["token_ids"]
        for overlap in (False, True):
            set_overlap(llm, overlap)
            for kind in (tool(lambda call: None), tool(lambda call: None, is_inline=True)):
                output = answer(llm, [kind])
                assert output["token_ids"] == plain and 0 not in output["mask"]
                assert output["tool_calls"][0]["result"] is None


def test_a_result_of_token_ids_is_not_encoded_and_calls_nothing():
    with chain(plain=True) as llm:
        special = llm.tokenizer.special_tokens
        start, end = special["<|python_start|>"], special["<|python_end|>"]
        calls = []

        def call_again(call: str) -> list[int]:
            calls.append(call)
            return [start, *llm.tokenizer.encode("1+1"), end]

        output = answer(llm, [tool(call_again)])
        assert calls == ["7*6"]
        ids = output["token_ids"]
        assert ids[RUN["masks"].index(0) + 1 :][:2] == [start, *llm.tokenizer.encode("1")]


def test_marks_may_be_any_token_ids():
    with chain(plain=True) as llm:
        encode = llm.tokenizer.encode
        (run,) = llm.generate([RUN["prompt"]], PARAMS, use_tqdm=False)
        colon = encode(":")
        kind = tool(
            lambda call: f"<{call}>",
            call_start=encode("S"),
            call_end=colon,
            result_start=(),
            result_end=(),
        )
        output = answer(llm, [kind])
        assert output["tool_calls"][0] == {"call": "o", "result": "<o>", "tool": "calculator"}
        position = run["token_ids"].index(colon[0]) + 1
        assert output["mask"][: position + 3] == [1] * position + [0] * 3


# sessions -----------------------------------------------------------------------------------------


class Counting(Tool):
    """Its sessions count the calls of their samples."""

    def __init__(self, **options):
        super().__init__(name="count", **options)
        self.requests = []
        self.closed = []

    def begin(self, request):
        self.requests.append(request)
        return CountingSession(self, request.sample)


class CountingSession(ToolSession):
    def __init__(self, owner: Counting, sample: int):
        self.owner = owner
        self.sample = sample
        self.num_calls = 0

    def __call__(self, call: str) -> str:
        self.num_calls += 1
        return f"{self.sample}:{self.num_calls}"

    def close(self) -> None:
        self.owner.closed.append(self.sample)


@pytest.mark.parametrize("is_inline", [False, True])
def test_each_sample_has_a_session_which_is_closed_once(is_inline):
    counting = Counting(is_inline=is_inline)
    with chain(plain=True) as llm:
        params = SamplingParams(temperature=0, max_tokens=60, n=3, seed=5)
        output = answer(llm, [counting], params)
        for i, sample in enumerate(output["samples"]):
            assert [entry["result"] for entry in sample["tool_calls"]] == [f"{i}:1"]
        assert sorted(request.sample for request in counting.requests) == [0, 1, 2]
        assert {request.seed for request in counting.requests} == {5}
        assert counting.requests[0].prompt_token_ids == RUN["prompt"]
    assert sorted(counting.closed) == [0, 1, 2]


def test_a_session_that_cannot_begin_or_end_crashes_nothing(caplog):
    class Broken(Counting):
        def begin(self, request):
            if not self.requests:
                self.requests.append(request)
                raise OSError("no sandbox")
            return super().begin(request)

    broken = Broken()
    with chain(plain=True) as llm:
        assert "= error: OSError: no sandbox" in answer(llm, [broken])["text"]
        broken.closed = None  # then `append` fails
        assert "= 0:1" in answer(llm, [broken])["text"]
    assert "the session did not close" in caplog.text


class Late(Counting):
    """Its sessions begin when they may."""

    def __init__(self, **options):
        super().__init__(**options)
        self.has_begun = threading.Event()
        self.may_begin = threading.Event()

    def begin(self, request):
        self.has_begun.set()
        assert self.may_begin.wait(60)
        return super().begin(request)


@pytest.mark.parametrize("how", ["timeout", "abort", "close"])
def test_a_session_that_begins_too_late_is_closed(how):
    late = Late(timeout=0.05 if how == "timeout" else 60)
    with chain(plain=True) as llm:
        number = llm.add_request(RUN["prompt"], PARAMS, tools=[late])
        while not late.has_begun.is_set():
            llm.step()
        if how == "close":
            llm.close()
        elif how == "abort":
            llm.abort(number)
        while how == "timeout" and not llm.is_finished():
            llm.step()
        (thread,) = [t for t in threading.enumerate() if t.name == "microvllm tool count"]
        late.may_begin.set()
        thread.join(60)
    assert late.closed == [0]


# what else may happen -----------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_may_be_aborted_while_it_waits(overlap):
    may_end = threading.Event()

    def wait(call: str) -> str:
        assert may_end.wait(60)
        return "late"

    with set_overlap(chain(plain=True), overlap) as llm:
        number = llm.add_request(RUN["prompt"], PARAMS, tools=[tool(wait)])
        while not llm.scheduler.paused:
            llm.step()
        llm.abort(number)
        (output,) = llm.step()
        assert output["finish_reason"] == "abort"
        assert everything_is_free(llm) and not llm.scheduler.paused
        may_end.set()
        assert answer(llm, True)["token_ids"] == RUN["tokens"]


def test_closing_the_engine_ends_coroutines_and_sessions():
    cancelled = threading.Event()

    llm = chain(plain=True)
    llm.add_request(RUN["prompt"], PARAMS, tools=[tool(endless(cancelled))])
    while not (llm.scheduler.paused and llm.tool_calling.background.loop):
        llm.step()
    (thread,) = [t for t in threading.enumerate() if t.name == "microvllm tools"]
    loop = llm.tool_calling.background.loop
    llm.close()
    assert cancelled.wait(60)
    thread.join(60)
    assert not thread.is_alive() and loop.is_closed()


@pytest.mark.parametrize("overlap", [False, True])
def test_new_weights_come_while_a_sequence_waits(overlap):
    may_end = threading.Event()

    def wait(call: str) -> str | None:
        assert may_end.wait(60)
        return calculate(call)

    model = load_model(TOOL_CHAIN / "chatsft_checkpoints" / "d1")
    with set_overlap(chain(plain=True), overlap) as llm:
        llm.add_request(RUN["prompt"], PARAMS, tools=[tool(wait)])
        while not llm.scheduler.paused:
            llm.step()
        for change in (lambda: llm.update_weights(model.state_dict()), llm.sleep, llm.wake):
            change()
            assert llm.step() == []
            assert len(llm.scheduler.paused) == 1
            check_tables(llm)
        may_end.set()
        (output,) = [output for _ in iter(llm.is_finished, True) for output in llm.step()]
        assert (output["token_ids"], output["mask"]) == (RUN["tokens"], RUN["masks"])
        assert output["version"] > 0


def test_a_tool_may_call_the_engine_but_not_inside_a_step():
    with chain(plain=True) as llm:

        def ask(call: str) -> str:
            (output,) = llm.generate([RUN["prompt"]], PARAMS, False, tools=True)
            return output["tool_calls"][0]["result"]

        assert answer(llm, [tool(ask)])["token_ids"] == RUN["tokens"]
        output = answer(llm, [tool(ask, is_inline=True)])
        assert output["tool_calls"][0]["result"].startswith("error: RuntimeError: a step cannot")


def test_no_tool_is_called_twice_after_an_error():
    calls = []

    def note(call: str) -> str | None:
        calls.append(call)
        time.sleep(0.01)
        return calculate(call)

    for overlap in (False, True):
        with set_overlap(chain(plain=True), overlap) as llm:
            llm.add_request(RUN["prompt"], PARAMS, tools=[tool(note)])
            outputs = []
            while not llm.is_finished():
                outputs += llm.step() + llm.step()
                llm.guard.perform(llm.recover)  # as after an exception
            assert outputs[0]["token_ids"] == RUN["tokens"] and outputs[0]["mask"] == RUN["masks"]
            assert everything_is_free(llm)
    assert calls == ["7*6"] * 2


@pytest.mark.parametrize("n", [1, 2])
def test_a_first_token_whose_step_fails_after_it_ended_the_sample_has_its_text(n):
    """The text is opened in recovery: until then there was no token to read."""
    params = SamplingParams(max_tokens=1, n=n, seed=1, ignore_eos=True)
    with chain(plain=True) as llm:
        (expected,) = llm.generate([RUN["prompt"]], params, use_tqdm=False, tools=[tool()])
        llm.add_request(RUN["prompt"], params, tools=[tool()])
        blocks = llm.scheduler.blocks
        free = blocks.free
        num_calls = iter(range(10))

        def fail_for_the_last_sample(seq):
            if next(num_calls) == n - 1:
                raise OSError("in the middle")
            free(seq)

        blocks.free = fail_for_the_last_sample
        with pytest.raises(OSError, match="in the middle"):
            llm.step()
        (output,) = llm.step()
        assert expected.text and [sample["text"] for sample in output.samples] == [
            sample["text"] for sample in expected.samples
        ]
        assert everything_is_free(llm)


def test_streams_tasks_and_nanochats_functions_take_tools():
    with chain(plain=True) as llm:
        tools = [tool(calculate_later)]
        events = [*llm.stream([RUN["prompt"]], PARAMS, tools=tools)]
        assert "".join(event["text"] for event in events) == "So:`7*6` = 42  yes!"
        assert sum([event["mask"] for event in events], []) == RUN["masks"]
        (output,) = llm.chat(RUN["messages"], PARAMS, False, tools=tools)
        assert output["token_ids"] == RUN["tokens"]
        (output,) = asyncio.run(llm.agenerate([RUN["prompt"]], PARAMS, tools=tools))
        assert output["token_ids"] == RUN["tokens"]
        sizes = {"max_tokens": 60, "temperature": 0}
        expected = llm.generate_batch(RUN["prompt"], num_samples=2, **sizes)
        assert llm.generate_batch(RUN["prompt"], num_samples=2, tools=tools, **sizes) == expected
        columns = [*llm.generate_columns(RUN["prompt"], **sizes)]
        assert [*llm.generate_columns(RUN["prompt"], tools=tools, **sizes)] == columns
        assert columns != [*llm.generate_columns(RUN["prompt"], tools=False, **sizes)]
        model = load_model(TOOL_CHAIN / "chatsft_checkpoints" / "d1")
        engine = Engine(model, llm.tokenizer, plain=True)
        assert engine.generate_batch(RUN["prompt"], num_samples=2, tools=tools, **sizes) == expected
        assert [*engine.generate(RUN["prompt"], tools=tools, **sizes)] == columns


def test_draft_tokens_do_not_reach_past_a_call():
    prompt = RUN["prompt"] + RUN["tokens"] + RUN["prompt"]  # which proposes all of it
    found = []
    for limit in (0, 8):
        with chain(plain=True, prompt_lookup=limit) as llm:
            (output,) = llm.generate([prompt], PARAMS, False, tools=[tool()])
            found.append((output["token_ids"], output["mask"], output["tool_calls"]))
            assert (llm.stats()["accepted_tokens"] > 0) == bool(limit)
    assert found[0] == found[1] and found[0][2]


def test_what_is_no_tool_is_refused_before_any_work():
    with chain(plain=True) as llm:

        def refused(tools, error, message):
            with pytest.raises(error, match=message):
                llm.generate([RUN["prompt"]], PARAMS, False, tools=tools)
            assert llm.is_finished()

        refused("calculator", TypeError, "tools must be True, False or a list of Tool")
        refused(3, TypeError, "got 3")
        refused([calculate], TypeError, "tools must be a list of Tool")
        refused([tool(), Counting()], ValueError, "'count' has the call_start of another tool")
        refused([tool(call_start="<tool>")], ValueError, "call_start .* is no special token")
        refused([tool(call_end=())], ValueError, "call_end of tool 'calculator' is empty")
        refused([tool(result_end=[10**6])], ValueError, "outside the vocabulary")
    for options, error, name in (
        ({"name": ""}, TypeError, "name"),
        ({"name": "a"}, TypeError, "function of tool 'a' must be callable"),
        ({"name": "a", "function": calculate, "timeout": 0}, ValueError, "timeout"),
        ({"name": "a", "function": calculate, "max_result_tokens": 0}, ValueError, "max_result"),
        ({"name": "a", "function": calculate, "max_concurrent": 1.5}, TypeError, "max_concurrent"),
    ):
        with pytest.raises(error, match=name):
            Tool(**options)


def test_whole_numbers_are_written_as_the_engine_or_as_the_training_data_has_them():
    assert Calculator().function("20/2") == "10.0"
    whole = Calculator(writes_whole=True).function
    expressions = ("20/2", "0.2*50", "1/4", "7//2", "1/0", "'a.0'.count('a')", "1,000/1")
    assert [whole(x) for x in expressions] == ["10", "10", "0.25", "3", None, "1", "1000"]
    assert calculate("100000000000.0*100000000000") == "1e+22"
    assert whole("100000000000.0*100000000000") == f"1{22 * '0'}" and whole("0/-5") == "0"


@pytest.mark.parametrize("num_blocks", [200, 9])
def test_a_trace_tells_of_sequences_that_wait(num_blocks):
    def wait(call: str) -> str | None:
        time.sleep(0.01)
        return calculate(call)

    with chain(plain=True, num_blocks=num_blocks) as llm, llm.tracing() as trace:
        replay = Replay()
        num_replayed = 0
        for _ in range(3):
            llm.add_request(RUN["prompt"], PARAMS, tools=[tool(wait)])
        while not llm.is_finished():
            llm.step()
            for event in trace.events[num_replayed:]:
                replay.apply(event)
                num_replayed += 1
            compare(replay, llm.scheduler)
    assert [event["e"] for event in trace.events].count("force") == 3
