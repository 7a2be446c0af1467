"""How engines and outputs look where they are printed, and in a notebook."""

import copy
import html
import json
import pickle
from html.parser import HTMLParser

import pytest
from helpers.full_engines import build, greedy, ids, sampled
from helpers.goldens import MODEL

import microvllm
from microvllm import LLM, RequestOutput, engine
from microvllm.features import display
from microvllm.features.display import OutputList

pytestmark = pytest.mark.usefixtures("one_thread")
HOSTILE = "</pre></td></table><script>hit()</script><img src=x onerror='hit()'>&amp;\""
HOSTILE += "\x1b[31m\u202e\ud800"


class Cells(HTMLParser):
    """The cells of a table, each as its text, row by row; and the elements that there are."""

    def __init__(self, page: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, "an element is not closed"

    def handle_starttag(self, tag, attrs):
        assert not any(name.startswith("on") for name, _ in attrs)
        self.tags.add(tag)
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.rows[-1][-1] += text


def output(**values) -> RequestOutput:
    """An output that no engine made."""
    usual = {"text": "yes", "token_ids": [5, 6], "finish_reason": "stop", "stop_reason": 6}
    return RequestOutput(usual | values)


# an engine


def test_an_engine_is_one_line_in_any_state():
    unmade = LLM.__new__(LLM)
    assert repr(unmade) == "<LLM '': not made>"
    with LLM(MODEL, device="cpu", num_blocks=120, plain=True) as llm:
        line = "<LLM 'oldbooks-d6': era 5, float32 on cpu, 120 blocks of 16 tokens, 1 thread>"
        assert repr(llm) == str(llm) == line
        llm.sleep()
        assert repr(llm) == line
    assert repr(llm) == "<LLM 'oldbooks-d6': closed>"


def test_an_engine_that_could_not_be_made_has_a_line(monkeypatch):
    engines = []

    def refuse(self, *args, **options):
        engines.append(self)
        raise ValueError

    monkeypatch.setattr(engine.LLM, "assemble", refuse)
    with pytest.raises(ValueError):
        LLM(MODEL, device="cpu", plain=True)
    assert repr(engines[0]) == "<LLM 'oldbooks-d6': not made>"


def test_a_name_with_line_ends_stays_one_short_line():
    with build(plain=True) as llm:
        llm.name = "a\n\x1b[31m\u202e" + 500 * "b"
        assert repr(llm).isprintable() and len(repr(llm)) < 200


# outputs


def test_outputs_are_lists_and_dicts_in_all_else():
    with build(plain=True) as llm:
        outputs = llm.generate([ids(5), ids(6)], sampled(4, seed=1, n=2), use_tqdm=False)
    assert isinstance(outputs, list) and isinstance(outputs[0], dict)
    assert all(type(o) is RequestOutput is microvllm.RequestOutput for o in outputs)
    assert isinstance(outputs[0], engine.RequestOutput)
    plain = [dict(o) for o in outputs]
    assert outputs == plain and plain == outputs and outputs[0] == plain[0]
    assert json.loads(json.dumps(outputs)) == plain
    assert type(outputs[:1]) is OutputList and outputs[:1] == plain[:1] and outputs[-1] == plain[-1]
    assert outputs + [] == plain and [*outputs] == plain and outputs[::-1] == plain[::-1]
    first, second = outputs
    assert (first, second) == tuple(plain)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(outputs, protocol))
        assert type(again) is OutputList and type(again[0]) is RequestOutput and again == outputs
        assert again[0].text == outputs[0].text and not vars(again[0])  # no tokenizer in it
        assert len(pickle.dumps(outputs, protocol)) < 3000
    for copied in copy.copy(outputs), copy.deepcopy(outputs):
        assert copied == outputs
    outputs.append(plain[0])
    outputs.sort(key=lambda o: len(o["prompt_token_ids"]))
    assert len(outputs) == 3 and type(outputs) is OutputList


def test_ten_thousand_outputs_are_printed_in_a_few_lines():
    long = {"prompt_token_ids": [*range(3000)], "token_ids": [*range(900)], "text": "a\nb" * 5000}
    sample = {"text": "a\nb" * 5000, "token_ids": [*range(900)]}
    logprobs = [{"token_id": 5, "top": dict.fromkeys(range(20), -1.0)}] * 900
    many = OutputList([output(**long, logprobs=logprobs, samples=[sample] * 100)] * 10_000)
    assert len(repr(many[0])) < 1500 and "\n" not in repr(many[0])
    assert len(repr(many)) < 5000 and repr(many).endswith("... and 9,997 more]")
    assert repr(many[0]).startswith("RequestOutput(text='a\\nba")
    assert repr(OutputList([])) == "[]"
    # the one sample of most requests is not told twice
    assert "samples" not in repr(output(samples=[sample]))


def test_a_notebook_shows_prompt_text_reason_and_tokens():
    with LLM(MODEL, device="cpu", num_blocks=120, plain=True) as llm:
        prompts = ["It was a dark", "The <b>island</b> & its $x^2$"]
        params = [greedy(5), sampled(3, seed=1, n=2)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        scored = llm.judge(["One"], [" two three"])
        events = [*llm.stream(prompts[:1], greedy(2))]
    head, first, *samples = Cells(outputs._repr_html_()).rows
    assert head == ["prompt", "text", "finish reason", "tokens"]
    assert first == ["<|bos|>It was a dark", outputs[0].text, "length: max_tokens", "5"]
    texts = [sample["text"] for sample in outputs[1].samples]
    assert samples[0] == [f"<|bos|>{prompts[1]}", texts[0], "length: max_tokens", "3"]
    assert samples[1] == ["", texts[1], "length: max_tokens", "3"]
    assert Cells(outputs[0]._repr_html_()).rows == [head, first]
    # where the tokenizer is not known
    again = pickle.loads(pickle.dumps(outputs[0]))
    count = len(outputs[0].prompt_token_ids)
    assert Cells(again._repr_html_()).rows[1][:2] == [f"{count} tokens", outputs[0].text]
    (row,) = Cells(scored._repr_html_()).rows[1:]
    assert row == ["<|bos|>One", "", "length", str(len(scored[0].logprobs))]
    assert Cells(events[0]._repr_html_()).rows[1][:2] == ["", events[0].text]
    assert OutputList([3])._repr_html_() is None  # not outputs at all
    assert OutputList([])._repr_html_() is None


def test_what_a_model_writes_is_no_more_than_text():
    shown = output(
        text=HOSTILE, finish_reason=HOSTILE, stop_reason=HOSTILE, samples=[],
        prompt_token_ids=[1, 2],
    )  # fmt: skip
    vars(shown)["_tokenizer"] = type("Hostile", (), {"decode": lambda self, ids: HOSTILE})()
    page = OutputList([shown])._repr_html_()
    cells = Cells(page)
    assert cells.tags == {"table", "tr", "td", "th", "pre"}
    seen = HOSTILE.translate({0x1B: 0xFFFD, 0x202E: 0xFFFD, 0xD800: 0xFFFD})
    assert cells.rows[1][:2] == [seen, seen] and cells.rows[1][2].startswith(seen)
    page.encode("utf-8")
    # formulas are looked for by JupyterLab, but not there
    assert page.count('<pre class="tex2jax_ignore mathjax_ignore"') == 2
    # the file of a notebook, and other languages than ours, keep their own characters
    assert display.visible("é\u3000\u200d✓\n\t") == "é\u3000\u200d✓\n\t"


def test_what_is_shown_of_many_long_outputs_is_bounded():
    sample = {"text": "<" * 10**6, "token_ids": [5] * 10**6, "finish_reason": "length"}
    many = OutputList([output(**sample, samples=[sample] * 50, prompt_token_ids=[7] * 10**6)] * 100)
    decoded = []

    class Counting:
        def decode(self, ids):
            decoded.append(len(ids))
            return "<" * 10 * len(ids)

    vars(many[0])["_tokenizer"] = Counting()
    page = many._repr_html_()
    assert max(decoded) == display.CHARACTERS
    rows = Cells(page).rows
    assert len(rows) == 1 + 20 * 21 + 1 and rows[-1][0] == "and 80 more outputs"
    assert rows[21][1] == "and 30 more samples"
    assert rows[1][1].endswith("\n[1,000,000 characters in all]")
    assert rows[1][0].endswith("\n[1,000,000 tokens in all]")
    assert len(html.unescape(page)) < 20 * 20 * 2500 + 20 * 2500


def test_the_core_alone_has_plain_outputs():
    with engine.LLM(MODEL, device="cpu", num_blocks=50) as llm:
        outputs = llm.generate(["One"], engine.SamplingParams(max_tokens=2))
    assert type(outputs) is list and type(outputs[0]) is engine.RequestOutput
