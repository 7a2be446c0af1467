"""Guided text: whatever the model would like to write, what it writes fits the guide; and the rest
of the engine does not notice."""

import json
import random
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from helpers.engine_cases import assert_stream_is_generate
from helpers.engines import question
from helpers.failures import Fault, failing
from helpers.full_engines import everything_is_free, set_overlap
from helpers.goldens import ERAS, MODEL

from microvllm import LLM, SamplingParams, cli, sampler
from microvllm.features import guided, matching
from microvllm.features.guided import MAX_LENGTH, Vocabulary
from microvllm.jobs import Ask, Job, answer, carry_out
from microvllm.runner import Extension
from microvllm.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

both_loops = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "ahead"])
TOY = load_tokenizer(ERAS / "tokenizer")
PYTHON_START = TOY.encode_special("<|python_start|>")

BOOKS = {
    "type": "array", "minItems": 1, "maxItems": 2,
    "items": {
        "type": "object", "required": ["title", "year"], "additionalProperties": False,
        "properties": {
            "title": {"type": "string", "maxLength": 12},
            "year": {"type": "integer", "minimum": 1700, "maximum": 1900},
        },
    },
}  # fmt: skip
NAMES = r"([A-Z][a-z]{2,8}, ){2,3}and [A-Z][a-z]{2,8}\."
CHOICES = ["yes", "no", "yes, of course", "nobody"]
GUIDES = {"json": {"json": BOOKS}, "regex": {"regex": NAMES}, "choices": {"choices": CHOICES}}


def fits(guide: dict, text: str) -> bool:
    """Is it what the guide wants?"""
    if "json" in guide:
        jsonschema.validate(json.loads(text), guide["json"])
        return True
    if "regex" in guide:
        return bool(re.fullmatch(guide["regex"], text))
    return text in guide["choices"]


@pytest.fixture(scope="module")
def llm():
    with LLM(MODEL, num_blocks=400) as llm:
        yield llm


def work(llm) -> tuple[list, list]:
    """Prompts and parameters: each guide with samples that split in a block, and one without."""
    prompts = [question(llm, "Who wrote Dracula?"), question(llm, "Name some books."), "Is it so? "]
    params = [
        SamplingParams(guide=guide, seed=seed, n=2 + seed % 2, max_tokens=90)
        for seed, guide in enumerate(GUIDES.values())
    ]
    return [*prompts, "Once upon"], [*params, SamplingParams(max_tokens=20, seed=4)]


def in_helper(params: SamplingParams) -> SamplingParams:
    """The same, as if the guide were not known to be small."""
    params.set("has_small_guide", False)
    return params


def samples(outputs) -> list[list[tuple]]:
    names = "text", "token_ids", "finish_reason", "stop_reason"
    return [[tuple(sample[name] for name in names) for sample in o["samples"]] for o in outputs]


@pytest.fixture(scope="module")
def wanted(llm):
    """What the work's outputs are when nothing happens."""
    prompts, params = work(llm)
    found = samples(llm.generate(prompts, params, use_tqdm=False))
    for (name, guide), texts in zip(GUIDES.items(), found, strict=False):
        assert all(fits(guide, text) for text, *_ in texts), name
        assert {reason for *_, reason, _ in texts} == {"stop"}
        assert {cause for *_, cause in texts} <= llm.tokenizer.eos_ids
    assert len({text for text, *_ in found[0] + found[1]}) == 5
    return found


# any guide ----------------------------------------------------------------------------------------


def make_schema(rng: random.Random, depth: int = 3) -> dict:
    """A JSON schema whose texts are not too long."""
    kind = rng.choice("string integer number boolean null enum const anyOf array object".split())
    if depth == 0 and kind in ("array", "object", "anyOf"):
        kind = "integer"
    least = rng.randrange(4)
    match kind:
        case "string" if rng.random() < 0.5:
            return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(1, 20)}
        case "string":
            shape = {"pattern": "^" + make_regex(rng, 2) + "$"}, {"format": "date"}
            return {"type": "string"} | rng.choice(shape)
        case "integer":
            low = rng.randrange(-1000, 1000)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(2000)}
        case "number":
            return {"type": "number", "minimum": -least, "maximum": least + 1, "multipleOf": 0.5}
        case "enum":
            return {"enum": rng.sample(["a", "ab", "é", 'say "no"', 1, -2.5, None, [1, 2]], 3)}
        case "const":
            return {"const": rng.choice(["b\n\\", 17, {"x": [1, "y"]}, [], False])}
        case "anyOf":
            return {"anyOf": [make_schema(rng, depth - 1) for _ in range(2)]}
        case "array":
            items = make_schema(rng, depth - 1)
            return {"type": "array", "items": items, "minItems": least, "maxItems": least + 2}
        case "object":
            names = rng.sample(["name", "year", "a b", "ü", "x-1", "", '"'], 1 + least)
            return {
                "type": "object", "properties": {n: make_schema(rng, depth - 1) for n in names},
                "required": rng.sample(names, rng.randrange(len(names) + 1)),
                "additionalProperties": False,
            }  # fmt: skip
        case _:
            return {"type": kind}


def make_regex(rng: random.Random, depth: int = 3) -> str:
    """An expression that Python and Rust read alike."""
    kind = rng.choice(["text", "class", "sequence", "either", "repeat"] if depth else ["text"])
    match kind:
        case "text":
            return rng.choice(["a", "the ", "é", r"\.", r"\(", "0", "It", "-", "😀", " ", r"\n"])
        case "class":
            return rng.choice(["[a-z]", "[^a-z]", r"\d", r"[\w ]", ".", r"\s", "[äöü]", "[A-Z,;]"])
        case "sequence":
            return "".join(make_regex(rng, depth - 1) for _ in range(rng.randrange(1, 5)))
        case "either":
            return "(" + "|".join(make_regex(rng, depth - 1) for _ in range(3)) + ")"
    low = rng.randrange(4)
    # no * and no +: what has no bound the model may write until max_tokens
    count = rng.choice(["?", f"{{{low}}}", f"{{{low},{low + rng.randrange(9)}}}"])
    return f"({make_regex(rng, depth - 1)}){count}"


def assert_all_fit(llm, seeds: range) -> None:
    """A schema and an expression of each seed, all in one batch."""
    guides = [{"json": make_schema(random.Random(seed))} for seed in seeds]
    guides += [{"regex": make_regex(random.Random(seed))} for seed in seeds]
    params = [SamplingParams(guide=g, seed=i, max_tokens=900) for i, g in enumerate(guides)]
    prompts = [question(llm, "Write something.")] * len(guides)
    for guide, output in zip(guides, llm.generate(prompts, params, use_tqdm=False), strict=True):
        assert output["finish_reason"] == "stop", (guide, output["stop_reason"], output["text"])
        assert fits(guide, output["text"]), (guide, output["text"])
    assert everything_is_free(llm)


def test_what_is_written_fits_whatever_the_guide_is(llm):
    assert_all_fit(llm, range(12))


@pytest.mark.slow
def test_what_is_written_fits_two_hundred_schemas_and_two_hundred_expressions(llm):
    assert_all_fit(llm, range(100, 300))


# whatever the engine does -------------------------------------------------------------------------


def test_a_request_has_the_same_text_alone_and_in_a_batch(llm, wanted):
    for prompt, params, found in zip(*work(llm), wanted, strict=True):
        assert samples(llm.generate([prompt], params, use_tqdm=False)) == [found]
        for i in range(params.n):
            alone = replace(params, n=1, sample_index=i)
            assert samples(llm.generate([prompt], alone, use_tqdm=False)) == [[found[i]]]


def test_the_pieces_of_a_stream_joined_are_the_text(llm):
    assert_stream_is_generate(llm, SamplingParams, guide={"regex": r"(\w+ ){2,5}é(\w+ ){9}"})
    assert_stream_is_generate(llm, SamplingParams, guide={"json": BOOKS}, stop="year")


def test_guesses_are_checked_and_change_nothing(llm, wanted):
    with LLM(MODEL, num_blocks=400, prompt_lookup=6, device="cpu") as guessing:
        prompts, params = work(llm)
        assert samples(guessing.generate(prompts, params, use_tqdm=False)) == wanted
        for prompt, p, found in zip(prompts, params, wanted, strict=True):
            alone = replace(p, n=1)
            assert samples(guessing.generate([prompt], alone, use_tqdm=False)) == [found[:1]]
        stats = guessing.stats()
        assert 0 < stats["accepted_tokens"] < stats["guessed_tokens"]
        assert everything_is_free(guessing)


class Copies(Extension):
    """Counts the blocks that steps copy."""

    count = 0

    def on_plan(self, plan):
        self.count += len(plan.copies)


@both_loops
def test_samples_that_make_room_and_copy_blocks_go_on_in_the_grammar(llm, wanted, overlap):
    with LLM(MODEL, num_blocks=28, block_size=4, max_batched_tokens=16) as tiny:
        set_overlap(tiny, overlap)
        copies = Copies()
        tiny.add_extension(copies)
        assert samples(tiny.generate(*work(llm), use_tqdm=False)) == wanted
        assert tiny.scheduler.num_preemptions > 0 and copies.count > 0
        assert everything_is_free(tiny)


@both_loops
@pytest.mark.parametrize("place", ["forward", "sample", "update"])
def test_a_step_that_fails_costs_nothing(llm, wanted, place, overlap):
    prompts, params = work(llm)
    with LLM(MODEL, num_blocks=400, prompt_lookup=0 if overlap else 6, device="cpu") as faulty:
        set_overlap(faulty, overlap)
        ids, outputs = [faulty.add_request(*pair) for pair in zip(prompts, params, strict=True)], {}
        with failing(faulty, place, 9):
            while not faulty.is_finished():
                try:
                    outputs |= {output["request_id"]: output for output in faulty.step()}
                except Fault:
                    ids.append(None)
        assert ids.pop() is None
        assert samples([outputs[i] for i in ids]) == wanted


@pytest.mark.parametrize("large", [False, True], ids=["here", "in a helper"])
def test_a_signal_inside_the_guide_is_not_taken_for_its_own(llm, wanted, monkeypatch, large):
    calls, marker = [], getattr(signal, "SIGUSR1", signal.SIGTERM)

    def struck(*args):
        calls.append(args)
        if len(calls) == 20:
            signal.raise_signal(marker)
        return sampler.to_device(*args)

    def strike(*_):
        raise TimeoutError("a time limit")

    prompts, params = work(llm)
    if large:
        params = [in_helper(p) for p in params]
    before = signal.signal(marker, strike)
    try:
        with LLM(MODEL, num_blocks=400, prompt_lookup=6, device="cpu") as faulty:
            ids, outputs = (
                [faulty.add_request(*pair) for pair in zip(prompts, params, strict=True)],
                {},
            )
            monkeypatch.setattr(guided, "to_device", struck)
            while len(calls) < 20:
                try:
                    outputs |= {output["request_id"]: output for output in faulty.step()}
                except TimeoutError:
                    ids.append(None)
            while not faulty.is_finished():
                outputs |= {output["request_id"]: output for output in faulty.step()}
            assert ids.pop() is None
            assert samples([outputs[i] for i in ids]) == wanted
    finally:
        signal.signal(marker, before)


def test_four_threads_at_once(llm, wanted):
    found = {}

    def serve(i):
        found[i] = samples(llm.generate(*work(llm), use_tqdm=False))

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), wanted)


def test_the_plain_model_writes_the_same(llm, wanted):
    with LLM(MODEL, num_blocks=400, plain=True, device="cpu") as plain:
        assert samples(plain.generate(*work(llm), use_tqdm=False)) == wanted


# in a helper --------------------------------------------------------------------------------------


def test_a_helper_gives_the_same_tokens_and_ends_with_its_engine(llm, wanted):
    prompts, params = work(llm)
    with LLM(MODEL, num_blocks=400, prompt_lookup=6, device="cpu") as other:
        found = other.generate(prompts, [in_helper(p) for p in params], use_tqdm=False)
        assert samples(found) == wanted
        helper = other.guided.guides.helper
        process = helper.process
        assert process.poll() is None and helper.sent
    assert process.poll() is not None


def test_a_helper_that_is_killed_is_replaced_in_the_midst_of_a_text(llm, wanted):
    prompts, params = work(llm)
    params = [in_helper(p) for p in params]
    ids, outputs = [llm.add_request(*pair) for pair in zip(prompts, params, strict=True)], {}
    for turn in range(400):
        if llm.is_finished():
            break
        outputs |= {output["request_id"]: output for output in llm.step()}
        if turn in (3, 9):
            llm.guided.guides.helper.process.kill()
    assert samples([outputs[i] for i in ids]) == wanted


def test_what_interrupts_a_message_does_not_change_the_next_answer(llm):
    """Whatever was under way, the helper that was asked is replaced."""
    guide = llm.check("a", in_helper(SamplingParams(guide=GUIDES["regex"])))[1].logits_processor
    expected, reader, helper = (
        guide.open_reader().allowed([]),
        guide.open_reader(),
        llm.guided.guides.helper,
    )

    def interrupted(text):
        raise TimeoutError(text)

    choices = {"choices": ["one, two, three and four"]}  # one text: the helper asks for its tokens
    other = llm.check("a", in_helper(SamplingParams(guide=choices)))[
        1
    ].logits_processor.open_reader()
    encode, other.encode = other.encode, interrupted
    with pytest.raises(TimeoutError, match="one, two, three and four"):
        other.allowed([])
    assert not helper.is_ready
    assert reader.allowed([]) == expected
    other.encode = encode
    num_read, mask = other.allowed([])
    assert num_read == 0 and sum(byte.bit_count() for byte in mask) == 1
    del reader, other
    reader = guide.open_reader()
    assert helper.dropped and reader.allowed([]) == expected
    assert not helper.dropped


def test_what_is_small_is_known_to_be_small():
    deep = {"type": "array", "items": {"anyOf": [{"$ref": "#"}, {"const": 1}]}}
    small = [
        GUIDES["json"], GUIDES["regex"], GUIDES["choices"], {"regex": ""}, {"json": {}},
        {"json": json.dumps(BOOKS)}, {"json": deep}, {"regex": r"\d{4}-\d\d-\d\d( \(x\))?[^a-c]*"},
        {"choices": [f"choice {i}" for i in range(500)]}, {"json": {"multipleOf": 5}},
    ]  # fmt: skip
    hidden = {"$ref": "#/default/x", "default": {"x": {"allOf": [{"$ref": "#/default/x"}]}}}
    large = [
        {"regex": "(a?){5000}a{5000}"}, {"regex": "((a{0,9}){0,9}){0,9}"}, {"regex": "a?" * 800},
        {"regex": "(?i)a"}, {"regex": r"\p{L}"}, {"regex": "[[a-z]--[aeiou]]"}, {"regex": "a)"},
        {"json": {"multipleOf": 999983}}, {"json": {"multipleOf": 0.001}},
        {"json": {"allOf": [{}]}}, {"json": {"oneOf": [{}]}}, {"json": hidden},
        {"json": {"$ref": "#/$defs/a", "type": "object", "$defs": {"a": {}}}},
        {"json": {"pattern": "(a?){5000}"}}, {"json": {"patternProperties": {"(a?){5000}": {}}}},
        {"json": {"properties": {f"a property {i}": {} for i in range(99)}}},
        {"json": {"x-guidance": {"whitespace_pattern": "(a?){5000}"}}},
        {"choices": ["a" * 10_000]},
    ]  # fmt: skip
    for guide in small:
        assert guided.is_small(guide, guided.grammar_of(guide)), guide
    for guide in large:
        assert not guided.is_small(guide, json.dumps(guide)), guide


COSTLY = {
    "a? a": {"regex": "a?" * 20_000 + "a" * 20_000},
    "multipleOf": {"json": {"type": "integer", "multipleOf": 999_983}},
    "properties": {"json": {"properties": {f"p{i}": {"type": "integer"} for i in range(8_000)}}},
}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the helper has no time limit here")
@pytest.mark.parametrize("name", COSTLY)
def test_a_guide_that_takes_long_is_refused_and_signals_are_heard(llm, name):
    def strike(*_):
        raise TimeoutError

    def refused():
        with pytest.raises(ValueError, match=r"guide.* is too complex: .* give smaller bounds"):
            llm.add_request("a", SamplingParams(guide=COSTLY[name]))

    refused()
    before = signal.signal(signal.SIGALRM, strike)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(TimeoutError):
            refused()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert everything_is_free(llm)


def test_a_helper_ends_what_takes_too_long_or_too_much(monkeypatch):
    """The limits are the helper's own: this process only hears that it has ended."""
    helper, ended = matching.Helper(), 0
    try:
        for code, why in ((matching.TIMED_OUT, "more than 1 s"), (-signal.SIGABRT, "1,024 MiB")):
            with monkeypatch.context() as patch:
                patch.setattr(matching.Helper, "_answer", killed(-code))
                with pytest.raises(ValueError, match=f"the guide is too complex: .*{why}"):
                    helper.ask(("check", 0, "start: 'a'"))
            ended += 1
            assert helper.ask(("check", 0, 'start: "a"')) is None
    finally:
        helper.stop()
    assert ended == 2


def killed(number: int):
    """An exchange during which the helper gets a signal."""

    def answer(helper, message, encode):
        helper.process.send_signal(number)
        return matching.receive(helper.process.stdout)

    return answer


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit addresses")
def test_a_helper_has_a_limit_of_memory_and_of_time_whatever_it_inherits():
    code = """
import signal, sys
signal.signal(signal.SIGPROF, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
sys.path.insert(0, sys.argv[1])
import matching
matching.prepare_limits()
try:
    bytearray(matching.MEMORY)
except MemoryError:
    matching.limit_time(0.05)
    while True:
        pass
"""
    folder = str(Path(matching.__file__).parent)
    done = subprocess.run([sys.executable, "-I", "-c", code, folder], timeout=60)
    assert done.returncode == matching.TIMED_OUT


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the helper has no limits here")
def test_the_limits_of_a_helper_end_it():
    """A regular expression that needs gigabytes, and one that needs a minute."""
    helper = matching.Helper()
    try:
        for size, told in ((20_000, "s a token"), (40_000, "")):
            grammar = guided.grammar_of({"regex": "a?" * size + "a" * size})
            words = Vocabulary(TOY)
            tokens, bos = [token.hex() for token in words.tokens], words.bos_token_id
            about = tokens, words.special_token_ids, bos, [bos]
            with pytest.raises(ValueError, match=f"the guide is too complex: .*{told}"):
                helper.ask(("grammar", 2, 1, grammar), (("vocabulary", 1, *about),), words.encode)
    finally:
        helper.stop()


ENDLESS = {"json": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}}


@pytest.mark.parametrize("large", [False, True], ids=["here", "in a helper"])
def test_a_recursion_without_end_ends_its_own_request_and_no_step(llm, large):
    params = SamplingParams(guide=ENDLESS, max_tokens=60, seed=1)
    params = in_helper(params) if large else params
    bad = llm.add_request("Answer:", params)
    good = llm.add_request("The island was small", SamplingParams(max_tokens=30, temperature=0))
    outputs = {}
    while not llm.is_finished():
        outputs |= {output["request_id"]: output for output in llm.step()}
    assert outputs[bad]["finish_reason"] == "error"
    assert "the guide is too complex here" in outputs[bad]["stop_reason"]
    assert outputs[good]["finish_reason"] in ("stop", "length")
    assert everything_is_free(llm)


def test_a_thread_does_not_see_the_failures_of_anothers_guide(llm):
    found = {}

    def serve(i):
        params = SamplingParams(max_tokens=30, seed=i, guide=ENDLESS if i == 0 else None)
        try:
            found[i] = llm.generate(["The island"], params, use_tqdm=False)[0]["finish_reason"]
        except Exception as error:
            found[i] = repr(error)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.pop(0) == "error" and {*found.values()} <= {"stop", "length"}


# beside other parameters --------------------------------------------------------------------------


def write_one(llm, prompt="It was", **given) -> dict:
    """The output of a request whose seed is 1."""
    return llm.generate([prompt], SamplingParams(**{"seed": 1} | given), use_tqdm=False)[0]


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0}, {"top_k": 1}, {"top_k": 5, "top_p": 0.5, "min_p": 0.1},
        {"repetition_penalty": 1.5, "presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"logit_bias": {0: 1e6, 300: 1e6}}, {"temperature": 50.0}, {"bad_words": [" a", "e"]},
    ],
    ids=lambda given: " ".join(given),
)  # fmt: skip
@pytest.mark.parametrize("name", ["json", "regex"])
def test_the_guide_is_kept_with_any_filter(llm, name, given):
    guide = GUIDES[name]
    assert fits(guide, write_one(llm, guide=guide, max_tokens=200, **given)["text"])


def test_log_probabilities_are_the_models_and_those_of_the_guided_draw(llm):
    prompt = llm.tokenizer.encode("Is it so?", bos=True)
    output = write_one(llm, prompt, guide=GUIDES["choices"], logprobs=4)
    (scores,) = llm.score([prompt], [output["token_ids"]])
    for entry, score in zip(output["logprobs"], scores, strict=True):
        assert entry["logprob"] == pytest.approx(score, abs=1e-4)
        assert entry["sampler_logprob"] > entry["logprob"]  # it has the share of all others
    # what the model likes best does not begin a choice
    assert {other[2] for other in output["logprobs"][0]["top"]} == {-torch.inf}


def test_min_tokens_puts_the_end_off_where_the_text_can_go_on_and_only_there(llm):
    ends = dict.fromkeys(llm.tokenizer.eos_ids, 20)
    given = {"guide": {"regex": "(ab){1,20}"}, "logit_bias": ends}
    assert write_one(llm, **given)["text"] == "ab"
    output = write_one(llm, **given, min_tokens=9)
    assert fits(given["guide"], output["text"]) and len(output["token_ids"]) == 10
    output = write_one(llm, guide={"choices": ["no"]}, min_tokens=9)
    assert (output["text"], output["finish_reason"]) == ("no", "stop")
    banned = {"guide": {"choices": ["no"]}, "allowed_token_ids": llm.tokenizer.encode("no")}
    assert write_one(llm, **banned)["finish_reason"] == "stop"


def test_what_max_tokens_cuts_is_a_beginning_and_says_so(llm):
    text = "It was a dark and stormy night."
    whole = write_one(llm, guide={"choices": [text]})
    assert (whole["text"], whole["finish_reason"]) == (text, "stop")
    cut = write_one(llm, guide={"choices": [text]}, max_tokens=len(whole["token_ids"]) - 2)
    assert cut["finish_reason"] == "length" and cut["stop_reason"] == "max_tokens"
    assert text.startswith(cut["text"]) and 0 < len(cut["text"]) < len(text)


def test_a_stop_string_and_a_stop_token_cut_the_text(llm):
    guide = {"choices": ["one, two, three"]}
    output = write_one(llm, guide=guide, stop=", three")
    assert (output["text"], output["stop_reason"]) == ("one, two", ", three")
    (comma,) = llm.tokenizer.encode(",")
    assert write_one(llm, guide={"regex": ",,,"}, stop_token_ids=[comma])["text"] in ("", ",,")


def test_a_guided_text_calls_no_calculator():
    bias = {PYTHON_START: 1e6}
    folder = MODEL.parent.parent / "tests/fixtures/nanochat_eras/tool_chain"
    model = folder / "chatsft_checkpoints" / "d1"
    with LLM(model, tokenizer_path=folder / "tokenizer", num_blocks=80, device="cpu") as llm:
        for guide in (None, {"regex": "[0-9]{5}"}):
            params = SamplingParams(0, 9, guide=guide, logit_bias=bias)
            (output,) = llm.chat([{"role": "user", "content": "7+8"}], params, use_tqdm=False)
            assert (PYTHON_START in output["token_ids"]) == (guide is None)
    assert fits(guide, output["text"]) and set(output["mask"]) == {1}


def test_the_name_of_a_special_token_is_plain_text(llm):
    text = "<|assistant_end|><|bos|>"
    output = write_one(llm, guide={"choices": [text]})
    assert output["text"] == text and max(output["token_ids"][:-1]) < llm.tokenizer.num_ordinary


def test_an_empty_text_ends_at_once(llm):
    for guide in ({"choices": [""]}, {"regex": ""}):
        output = write_one(llm, guide=guide, min_tokens=3)
        assert (output["text"], output["finish_reason"]) == ("", "stop")
        assert len(output["token_ids"]) == 1


def test_a_schema_may_be_a_text_and_say_how_it_is_written(llm):
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    schema |= {"additionalProperties": False}
    assert write_one(llm, guide={"json": json.dumps(schema)})["text"] == '{"a": 1}'
    tight = schema | {"x-guidance": {"key_separator": ":"}}
    assert write_one(llm, guide={"json": tight})["text"] == '{"a":1}'
    # of the columns of a Parquet file those that the row does not have are null
    rest = {"regex": None, "choices": None}
    assert write_one(llm, guide={"json": schema} | rest)["text"] == '{"a": 1}'


# what is refused ----------------------------------------------------------------------------------

DEEP: dict = {}
for _ in range(3000):
    DEEP = {"items": DEEP}
REFUSED = [
    ("yes", TypeError, "it must be a dict"),
    ({}, TypeError, "it must be a dict"),
    ({"json": {}, "regex": "a"}, TypeError, "it must be a dict"),
    ({"jsonschema": {}}, TypeError, "it must be a dict"),
    ({"json": 3}, TypeError, "it must be a dict"),
    ({"json": {"type": "text"}}, ValueError, "Invalid type: text"),
    ({"json": "{"}, ValueError, "EOF while parsing"),
    ({"json": "true"}, ValueError, "Expecting object schema"),
    ({"json": {"not": {}}}, ValueError, "Unimplemented keys"),
    ({"json": {"$ref": "file:///etc/passwd"}}, ValueError, "does not fetch resources"),
    ({"json": {"type": "string", "pattern": "("}}, ValueError, ": unclosed group$"),
    ({"json": {"const": {1, 2}}}, TypeError, "not JSON serializable"),
    ({"json": {"const": "\ud800"}}, ValueError, "unexpected end of hex escape"),
    ({"json": DEEP}, ValueError, "maximum recursion depth"),
    ({"json": '{"items":' * 3000 + "{}" + "}" * 3000}, ValueError, "recursion limit"),
    ({"regex": "(a"}, ValueError, r"guide {'regex': '\(a'}: unclosed group$"),
    ({"regex": r"(?=a)b"}, ValueError, "look-ahead"),
    ({"regex": r"\bword"}, ValueError, "lookarounds not supported"),
    ({"regex": 3}, TypeError, "it must be a dict"),
    ({"regex": "\ud800"}, ValueError, "surrogates not allowed"),
    ({"regex": "(" * 5000 + "a" + ")" * 5000}, ValueError, "nested parentheses"),
    ({"regex": "a" * (MAX_LENGTH + 1)}, ValueError, "262,144 are allowed"),
    ({"choices": []}, ValueError, "choices must not be empty"),
    ({"choices": "yes"}, TypeError, "choices must be a list, got 'yes'"),
    ({"choices": ["a", 3]}, TypeError, "choices must be strings, got 3"),
    ({"choices": ["\ud800"]}, ValueError, "surrogates not allowed"),
]


@pytest.mark.parametrize(("guide", "kind", "told"), REFUSED, ids=range(len(REFUSED)))
def test_a_guide_that_is_none_is_refused_in_one_line(guide, kind, told):
    with pytest.raises(kind, match=told) as error:
        SamplingParams(guide=guide)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert "guide" in str(error.value)


def test_a_panic_of_llguidance_is_an_error_like_any_other(monkeypatch):
    class PanicException(BaseException):
        pass

    def panic(*args, **options):
        raise PanicException("called unwrap() on None")

    monkeypatch.setattr(matching, "limits", panic)
    with pytest.raises(ValueError, match="guide .*: llguidance cannot work with .* unwrap"):
        SamplingParams(guide={"regex": "a new one"})


def test_what_goes_not_together_is_refused():
    guide = GUIDES["choices"]
    with pytest.raises(ValueError, match="remove ignore_eos"):
        SamplingParams(guide=guide, ignore_eos=True)
    with pytest.raises(ValueError, match="give one of them"):
        SamplingParams(guide=guide, logits_processor=lambda token_ids, logits: logits)


def test_a_guide_that_no_text_fits_is_refused_before_any_work(llm):
    params = [SamplingParams(), SamplingParams(guide={"regex": r"[^\s\S]"})]
    with pytest.raises(ValueError, match=r"^prompts\[1\]: no text fits the guide$"):
        llm.generate(["a", "b"], params)
    with pytest.raises(ValueError, match="^no text fits the guide$"):
        llm.add_request("a", SamplingParams(guide={"json": {"$ref": "#"}}))
    assert everything_is_free(llm)


def test_a_guide_too_complex_ends_its_request_alone(llm, capfd):
    names = [[f"p{i}" for i in range(15)] for _ in range(150)]
    schema = {"anyOf": [{"properties": {name: {} for name in row}} for row in names]}
    schema["anyOf"] = [{"type": "object"} | part for part in schema["anyOf"]]
    params = [SamplingParams(0, 9, guide={"json": schema}), SamplingParams(0, 9)]
    bad, fine = llm.generate(["Once"] * 2, params, use_tqdm=False)
    assert bad["finish_reason"] == "error" and "the guide is too complex here" in bad["stop_reason"]
    assert fine == llm.generate(["Once"], params[1], use_tqdm=False)[0] | {
        "request_id": fine["request_id"], "num_cached_tokens": fine["num_cached_tokens"]
    }  # fmt: skip
    assert capfd.readouterr().err == ""


def test_a_tokenizer_that_cannot_spell_every_text_is_refused():
    ranks = {bytes([byte]): i for i, byte in enumerate(range(1, 256))}
    tokenizer = Tokenizer("no zero", ".|\\n", ranks, {"<|bos|>": 255})
    with pytest.raises(ValueError, match=r"a token for each byte, but there is none for \[0\]"):
        Vocabulary(tokenizer)
    assert len(Vocabulary(TOY).tokens) == TOY.vocab_size


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[guided\]' in ") as error:
        SamplingParams(guide=GUIDES["choices"])
    assert error.value.__suppress_context__
    SamplingParams(max_tokens=3)


def test_the_core_alone_has_no_guide():
    with pytest.raises(TypeError, match="unexpected keyword argument 'guide'"):
        sampler.SamplingParams(guide=GUIDES["choices"])


# files and the command line -----------------------------------------------------------------------


def test_rows_of_a_job_bring_guides_of_their_own(llm, tmp_path):
    rows = [
        {"prompt": "Is it so?", "params": {"guide": GUIDES["choices"]}},
        {"prompt": "Name some.", "params": {"guide": GUIDES["regex"], "max_tokens": 99}},
        {"prompt": "Is it so?", "params": {"guide": {"choices": []}}},
        {"prompt": "Is it so?", "params": {"guide": {"regex": r"[^\s\S]"}}},
        {"prompt": "How many?"},
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"guide": {"regex": "[0-9]{3}"}, "max_tokens": 20}
    job = Job(source, output, Ask(params=common), {})
    assert carry_out(job, answer(llm, job.pending(), job.ask), ordered=True)["bad"] == 2
    first, second, last = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    assert fits(GUIDES["choices"], first) and fits(GUIDES["regex"], second)
    assert fits(common["guide"], last)
    errors = (tmp_path / "out.jsonl.errors").read_text()
    assert '"line": 3' in errors and "must not be empty" in errors
    assert '"line": 4' in errors and "no text fits the guide" in errors


def test_the_command_line_takes_a_guide_from_a_file(tmp_path, capsys):
    file = tmp_path / "guide.json"
    words = ["run", "-m", str(MODEL), "--num-blocks", "60", "--guide", str(file), "Is it so?"]
    file.write_text(json.dumps(GUIDES["choices"]))
    cli.main(words)
    assert capsys.readouterr().out.strip() in CHOICES
    for text, told in (("{", f"--guide {file}: not JSON"), ('{"regex": "("}', "unclosed group")):
        file.write_text(text)
        with pytest.raises(SystemExit):
            cli.main(words)
        assert told in capsys.readouterr().err
