"""The calculator against nanochat's own answers, Python's eval, and models that mean harm."""

import json
import sys
import threading
import time
import tracemalloc
import warnings
from collections import deque
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from microvllm.features import calculator
from microvllm.features.calculator import ToolCalls, calculate
from microvllm.tokenizer import Tokenizer, load_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "nanochat_eras"
GOLDENS = json.loads((FIXTURES / "tool_use_goldens.json").read_text(encoding="utf-8"))
CHAIN = json.loads((FIXTURES / "tool_chain" / "goldens.json").read_text(encoding="utf-8"))
TOY = load_tokenizer(FIXTURES / "tokenizer")
PYTHON_START, PYTHON_END, OUTPUT_START, OUTPUT_END = (
    TOY.encode_special(f"<|{name}|>")
    for name in ("python_start", "python_end", "output_start", "output_end")
)
LONGEST, MOST_PARENTHESES = 1024, 50

# eval meets only what is generated below: numbers, + - * /, short strings and their methods
ARITHMETIC = "0123456789*+-/.() "
DIGITS = st.text("0123456789", min_size=1, max_size=8)


def by_eval(expression: str) -> str | None:
    """What nanochat does with an expression that it has let through."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "'int' object is not callable" and the like
        try:
            return str(eval(expression, {"__builtins__": {}}, {}))
        except Exception:
            return None


def fits(expression: str) -> bool:
    return len(expression) <= LONGEST and expression.count("(") <= MOST_PARENTHESES


# calculate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDENS["use_calculator"], ids=lambda case: repr(case["expr"]))
def test_the_answers_are_nanochats(case):
    assert calculate(case["expr"]) == case["result"]


def arithmetic(inner):
    gap = st.sampled_from(["", "", " "])
    sign = st.sampled_from(["-", "+"])
    operation = st.sampled_from(["+", "-", "*", "/", "//"])
    return st.one_of(
        st.builds("({})".format, inner),
        st.builds("{}{}{}".format, sign, gap, inner),
        st.builds("{0}{1}{2}{1}{3}".format, inner, gap, operation, inner),
    )


NUMBERS = st.one_of(
    DIGITS,
    st.integers(0, 99).map(str),
    st.builds("{}.{}".format, DIGITS, DIGITS),
    st.sampled_from(["0.1", "1.", ".5", "1" * 200, "9" * 309 + ".", "()", "..."]),
)


@settings(max_examples=500, deadline=None)
@given(st.recursive(NUMBERS, arithmetic, max_leaves=12).filter(fits))
def test_arithmetic_is_pythons(expression):
    assert calculate(expression) == by_eval(expression)


@settings(max_examples=500, deadline=None)
@given(st.text(ARITHMETIC, max_size=12).filter(lambda text: "**" not in text))
@example("...")
@example("()*3")
@example("1(2)")
@example("()()")
@example("1(*())")
@example("1(*...)")
@example("0*()//1")
@example("(1)-.5")
def test_any_text_in_the_characters_of_arithmetic_is_pythons(expression):
    assert calculate(expression) == by_eval(expression)


QUOTED = st.builds(
    "{1}{0}{2}{0}".format,
    st.sampled_from(["'", '"', "'''"]),
    st.sampled_from(["", "", "r", "U"]),
    st.text("abAB1 .(", max_size=6),
)


def texts(inner):
    plain = st.sampled_from(["lower", "upper", "title", "swapcase", "casefold", "capitalize"])
    either = st.sampled_from(["strip", "lstrip", "rstrip", "split", "count"])
    needs = st.sampled_from(["count", "removeprefix", "removesuffix"])
    return st.one_of(
        st.builds("({})".format, inner),
        st.builds("{} {}".format, inner, inner),
        st.builds("{}.{}()".format, inner, st.one_of(plain, either)),
        st.builds("{}.{}({})".format, inner, st.one_of(either, needs), inner),
    )


@settings(max_examples=500, deadline=None)
@given(st.recursive(st.one_of(QUOTED, st.just("()")), texts, max_leaves=5), QUOTED)
def test_counting_is_pythons(text, part):
    for expression in (f"{text}.count({part})", f"{part}.count({text})"):
        assert not fits(expression) or calculate(expression) == by_eval(expression)


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("'strawberry'.count('r')", "3"),
        ("'Strawberry Rhubarb'.lower().count('r')", "5"),
        ("'the cat and the hat'.split().count('the')", "2"),
        ("'banana'.count('AN'.lower())", "2"),
        ("'''it's'''.count('t')", "1"),
        ("'aXbX'.strip('X').count('X')", "1"),
        ("'hi, there'.count(', ')", "1"),  # of a space: the commas are gone
        ("'100,000'.count('0')", "5"),
        ("'a.count(b)'", "a.count(b)"),  # it contains .count( all the same
        ("'.count('.strip('.count(')", ""),  # nothing, and still an answer
        ("().count('a')", "0"),
        ("'abc'.count(1)", None),
        ("'abc'.count()", None),
        ("'abc'.count", None),  # no parenthesis
        ("'.count('.lower", None),  # eval would print a method and where it lies in memory
    ],
)
def test_counting(expression, result):
    assert calculate(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "not 'abc'.count('a')",
        "'abc'.count('a') or 7",
        "5 if 'abc'.count('a') else 7",
        "'a'.count('b') is None",
        "b'abc'.count(b'a')",
        "f'abc'.count('a')",
        "().count(None)",
        "().count(1j)",
        "'abc'.count('a').real",
        "'abc'.count('a').bit_length()",
        "'abc'.zfill(5).count('0')",
        "'x'.join(c for c in 'abc').count('x')",
    ],
)
def test_only_what_a_calculator_needs_is_computed(expression):
    assert by_eval(expression) is not None
    assert calculate(expression) is None


@pytest.mark.parametrize(
    "word",
    "__ import exec eval compile open file input raw_input globals locals vars dir getattr setattr "
    "delattr hasattr".split(),
)
def test_nanochats_forbidden_words_are_refused_in_any_case_and_inside_others(word):
    for text in (word, word.upper(), f"x{word.title()}y"):
        assert calculate(f"'{text}'.count('z')") is None
    assert calculate("'x'.count('z')") == "0"  # the word was it


@pytest.mark.parametrize(
    "wrong", ["\0", "\n", "\t", "\\", "%", "{", "[", ":", "=", "~", "é", "１", "٣"]
)
def test_foreign_characters_are_refused(wrong):
    assert calculate("1+1") == "2"
    assert calculate(f"1+1{wrong}") is None
    assert calculate(f"{wrong}1+1") is None
    assert calculate("'a b'.count('b')") == "1"
    assert calculate(f"'a{wrong}b'.count('b')") is None


def test_power_is_refused_however_it_is_spelled():
    for expression in ("2**3", "2 ** 3", "2*,*3", "9**9**9**9"):
        assert calculate(expression) is None
    assert calculate("2* *3") is None  # no operator at all


# models that mean harm ---------------------------------------------------------------------------

HOSTILE = {
    "open parentheses": "(" * 100_000,
    "nested parentheses": "(" * 100_000 + "1" + ")" * 100_000,
    "empty calls": "1" + "()" * 50_000,
    "signs": "-" * 100_000 + "1",
    "a long sum": "1" + "+1" * 100_000,
    "a long product": "9" + "*9" * 100_000,
    "a long number": "9" * 100_000,
    "more digits than str() may write": "9" * 5000,
    "squares": "(" * 40 + "9" + ")*9" * 40,
    "a repeated tuple": "()*" + "9" * 100,
    "a repeated string": "'a'*" + "9" * 9 + ".count('a')",
    "padding": "'a'.center(999999999).count('a')",
    "zeros": "'a'.zfill(999999999).count('0')",
    "tabs": "'a'.expandtabs(999999999).count(' ')",
    "joins": "'a'" + ".join('aaaaaaaaaa')" * 12 + ".count('a')",
    "nested counts": "'a'.count(" * 20_000 + "'a'" + ")" * 20_000,
    "chained methods": "'a'" + ".lower()" * 20_000 + ".count('a')",
    "strings side by side": "'a'" * 50_000 + ".count('a')",
    "half open": "(1 if " * 40 + "'.count('",
    "generators": "(a for a in " * 40 + "'.count('" + ")" * 40,
    "commas": "," * 1_000_000,
    "spaces": " " * 1_000_000 + "1",
    "overflow": "9" * 400 + "/1",
    "attributes": "'a'.count('a')." + "__class__.__mro__",
}


def test_hostile_expressions_cost_little_time_and_memory():
    tracemalloc.start()
    began = time.perf_counter()
    answers = [calculate(expression) for expression in HOSTILE.values()]
    seconds = time.perf_counter() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 5  # it is about a hundredth, in all
    assert peak < 16 * 2**20
    assert all(answer is None or len(answer) <= LONGEST for answer in answers)


def test_long_expressions_have_an_answer_up_to_the_bound_and_none_beyond():
    assert calculate("1" + "+1" * 511) == "512"
    assert calculate("-" * (LONGEST - 1) + "1") == "-1"
    assert calculate("9" * LONGEST) == "9" * LONGEST
    assert calculate("9*" * 511 + "9") == str(9**512)
    assert calculate("'" + "a" * (LONGEST - 13) + "'.count('a')") == str(LONGEST - 13)
    assert calculate(" " * (LONGEST - 1) + "1") == "1"
    assert calculate(" " * LONGEST + "1") is None
    assert calculate("(" * MOST_PARENTHESES + "1" + ")" * MOST_PARENTHESES) == "1"
    assert calculate("(" * (MOST_PARENTHESES + 1) + "1" + ")" * (MOST_PARENTHESES + 1)) is None


def test_the_work_is_bounded_by_the_length_of_the_expression(monkeypatch):
    """Counted in operations, and in the digits they work on: a clock proves nothing."""
    values = []

    def counted(operation):
        def compute(*operands):
            values.append(operation(*operands))
            return values[-1]

        return compute

    counting = {node: counted(operation) for node, operation in calculator.OPERATORS.items()}
    monkeypatch.setattr(calculator, "OPERATORS", counting)

    @settings(max_examples=200, deadline=None)
    @given(st.recursive(DIGITS, arithmetic, max_leaves=30))
    @example("9*" * 511 + "9")
    @example("(" * 50 + "99)*(99)*99*99*99*99*99" * 25)
    @example("-" * 1000 + "1")
    @example("99+" * 300 + "99")
    def check(expression):
        values.clear()
        answer = calculate(expression)
        assert answer is None or len(answer) <= max(24, len(expression) + 1)
        assert len(values) <= len(expression)
        assert all(abs(v) < 10 ** len(expression) for v in values if type(v) is int)

    check()


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(max_size=60),
        st.text(ARITHMETIC + ",", max_size=60),
        st.text("'\"().count_ lower abAB019", max_size=60).map(lambda text: text + ".count('a')"),
        st.lists(
            st.sampled_from(
                ["'a'", "(", ")", ".count(", ".", " if ", " else ", " for ", " in ", " not ", "a"]
                + [" lambda ", " await ", " yield ", "True", "1", "0x1", "1e5", "_", "f'", "'''"]
            ),
            max_size=40,
        ).map("".join),
    )
)
def test_nothing_raises_or_warns(expression):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = calculate(expression)
    assert answer is None or (isinstance(answer, str) and len(answer) <= 5 * len(expression) + 24)


def test_no_warning_of_the_parser_is_seen():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert calculate("1if 'a'.count('a')else 2") is None
        assert calculate("1()") is None
    assert caught == []


def test_a_thread_with_a_small_stack_survives_the_deepest_expressions():
    """nanochat answers nothing off the main thread. A stack that overflows ends the process."""
    expressions = {
        "(" * 50 + "1" + ")" * 50: "1",
        "-" * 1023 + "1": "-1",
        "1" + "+1" * 511: "512",
        "(" * 50 + "-" * 800 + "1" + ")" * 50: "1",
        "-(" * 50 + "-" * 800 + "1" + ")" * 50: "1",
        "'a'" + ".lower()" * 49 + ".count('a')": "1",
        "not " * 250 + "'.count('": None,
        "1if 1else " * 100 + "'.count('": None,
        "'a'.count(" * 50 + "'a'" + ")" * 50: None,
    }
    answers = {}
    before = threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(
            target=lambda: answers.update((e, calculate(e)) for e in expressions)
        )
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert answers == expressions


def test_a_caller_deep_in_its_own_recursion_gets_an_answer_or_none():
    def descend(depth):
        return calculate("-" * 1000 + "1") if depth == 0 else descend(depth - 1)

    limit = sys.getrecursionlimit()
    frames, frame = 0, sys._getframe()
    while frame := frame.f_back:
        frames += 1
    answers = [descend(limit - frames - spare) for spare in range(20, 500, 40)]
    assert set(answers) <= {"1", None}


def test_a_lower_limit_for_digits_is_kept():
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    try:
        assert calculate("9" * 640) == "9" * 640
        assert calculate("9" * 641) is None
        assert calculate("9" * 400 + "*" + "9" * 400) is None  # 800 digits, that str() refuses
    finally:
        sys.set_int_max_str_digits(before)


# ToolCalls ---------------------------------------------------------------------------------------


def play(tokenizer, scripts, max_tokens):
    """nanochat's loop with a scripted sampler: (columns, masks), one entry per step, row by row."""
    all_calls = [ToolCalls(tokenizer) for _ in scripts]
    queues, done = [deque() for _ in scripts], [False] * len(scripts)
    columns, masks = [], []
    while len(columns) < max_tokens and not all(done):
        step = len(columns)
        columns.append([])
        masks.append([])
        for row, queue in enumerate(queues):
            script = scripts[row if step else 0]  # the first token is drawn from the shared prefill
            sampled = script[step] if step < len(script) else 0
            masks[-1].append(0 if queue else 1)
            columns[-1].append(queue.popleft() if queue else sampled)
            queue.extend(all_calls[row].push(columns[-1][-1]))
            done[row] |= columns[-1][-1] in tokenizer.eos_ids
    return columns, masks


@pytest.mark.parametrize("case", GOLDENS["cases"], ids=lambda case: case["name"])
def test_nanochats_loop_emits_the_same_tokens_and_masks(case):
    columns, masks = play(TOY, case["sampled_by_row"], case["max_tokens"])
    assert columns == case["emitted_columns"]
    assert masks == case["emitted_masks"]


@pytest.mark.parametrize("run", CHAIN["runs"], ids=lambda run: run["messages"][-1]["content"])
def test_a_real_models_tool_call_is_followed_token_by_token(run):
    tool_calls, queue = ToolCalls(TOY), deque()
    assert 0 in run["masks"]
    for token, mask in zip(run["tokens"], run["masks"], strict=True):
        assert mask == (0 if queue else 1)
        assert not queue or token == queue.popleft()
        queue.extend(tool_calls.push(token))


def push_all(tool_calls, ids):
    return [tool_calls.push(token) for token in ids]


def block(text):
    return [PYTHON_START, *TOY.encode(text), PYTHON_END]


def answer(text):
    return [OUTPUT_START, *TOY.encode(text), OUTPUT_END]


def test_the_answer_comes_at_the_end_of_the_block_and_only_there():
    pushed = push_all(ToolCalls(TOY), [*TOY.encode("so "), *block("6*7"), *TOY.encode(" yes")])
    assert [forced for forced in pushed if forced] == [answer("42")]
    assert pushed[len(TOY.encode("so ")) + len(block("6*7")) - 1] == answer("42")


def test_an_empty_answer_is_an_answer():
    assert push_all(ToolCalls(TOY), block("'.count('.strip('.count(')"))[-1] == answer("")


def test_sequences_side_by_side_do_not_affect_each_other():
    one, other = ToolCalls(TOY), ToolCalls(TOY)
    pushed = []
    for a, b in zip(block("1+1"), block("2*3"), strict=True):
        pushed.append((one.push(a), other.push(b)))
    assert pushed[-1] == (answer("2"), answer("6"))


def test_any_special_token_inside_a_block_spoils_the_expression():
    for name, token in TOY.special_tokens.items():
        ids = [PYTHON_START, *TOY.encode("'x'.count('x"), token, *TOY.encode("')"), PYTHON_END]
        pushed = push_all(ToolCalls(TOY), ids)
        # python_start begins a new block, python_end ends it; the others are text with < and |
        assert not any(pushed), name


def test_a_character_split_over_two_tokens_is_put_together_before_it_is_judged():
    halves = list("é".encode())
    ids = [PYTHON_START, *TOY.encode("'"), *halves, *TOY.encode("'.count('e')"), PYTHON_END]
    assert TOY.decode(ids[1:-1]) == "'é'.count('e')"
    assert not any(push_all(ToolCalls(TOY), ids))


def test_a_block_is_over_after_its_end():
    tool_calls = ToolCalls(TOY)
    assert push_all(tool_calls, block("1+1"))[-1] == answer("2")
    assert not any(push_all(tool_calls, [*TOY.encode("+1"), PYTHON_END]))
    assert push_all(tool_calls, block("3"))[-1] == answer("3")


def bare_tokenizer(*special):
    return Tokenizer(
        name="bytes",
        pat_str=r"\s+|\S+",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={mark: 256 + i for i, mark in enumerate(("<|bos|>", *special))},
    )


def test_a_tokenizer_without_all_four_marks_has_no_calculator():
    marks = ["<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"]
    for missing in [*marks, None]:
        tokenizer = bare_tokenizer(*(mark for mark in marks if mark != missing))
        start, end = (tokenizer.special_tokens.get(mark) for mark in marks[:2])
        ids = [start, *b"1+1", end]
        pushed = push_all(ToolCalls(tokenizer), [id_ for id_ in ids if id_ is not None])
        assert any(pushed) == (missing is None), missing


PIECES = st.one_of(
    st.sampled_from([PYTHON_START, PYTHON_END, OUTPUT_START, OUTPUT_END, TOY.bos_id]),
    st.sampled_from(TOY.encode("0123456789+-*/() ,'")),
    st.integers(0, TOY.vocab_size - 1),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(PIECES.map(lambda id_: [id_]), st.just(block("7*8"))), max_size=30))
def test_any_tokens_at_all(pieces):
    """Against the same thing said backwards: look for the start when the end is seen."""
    ids = sum(pieces, [])
    tool_calls, seen = ToolCalls(TOY), []
    queue = deque(ids)
    while queue:
        seen.append(queue.popleft())
        forced = tool_calls.push(seen[-1])
        expected = []
        if seen[-1] == PYTHON_END:
            before = seen[:-1]
            marks = [i for i, id_ in enumerate(before) if id_ in (PYTHON_START, PYTHON_END)]
            if marks and before[marks[-1]] == PYTHON_START:
                result = calculate(TOY.decode(before[marks[-1] + 1 :]))
                expected = [] if result is None else answer(result)
        assert forced == expected
        queue.extendleft(reversed(forced))  # forced tokens are pushed like any other


def test_512_of_them_are_cheap():
    tracemalloc.start()
    all_calls = [ToolCalls(TOY) for _ in range(512)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 512 * 1024
    assert not any(tool_calls.push(65) for tool_calls in all_calls)
