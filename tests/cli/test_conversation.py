"""A conversation on the command line: its commands, what is pasted, what is saved."""

import io
import json
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.commands import CALCULATOR, SMALL, Terminal, talk
from helpers.goldens import MODEL, ROOT

from microvllm import LLM, SamplingParams, cli
from microvllm.cli import conversation
from microvllm.cli.conversation import Conversation, command_of

pytestmark = pytest.mark.usefixtures("one_thread")
TURN = ["Who wrote Emma?"]


@pytest.mark.parametrize("word", ["exit", "quit", "EXIT", "Quit", " exit ", "/exit", "/quit"])
def test_these_words_leave(word, command):
    out, _ = command("chat", *SMALL, "--json", stdin=f"{word}\nWho wrote Emma?\n")
    assert (out == "") is (word != "/quit")  # the message for /quit names /exit


@pytest.mark.parametrize("word", ["clear", "Clear", "/clear"])
def test_these_words_start_over(word, command):
    first, second = talk(command, *SMALL, lines=[*TURN, word, *TURN])
    assert first["prompt_tokens"] == second["prompt_tokens"]


def test_words_of_ours_in_a_sentence_and_paths_go_to_the_model():
    for line in ("clear the table", "exit?", "/usr/bin is what?", "/etc holds what", "a /help"):
        assert command_of(line) is None
    assert command_of("/system You are\nbrief.") == ("system", "You are\nbrief.")
    assert command_of("/sytem Be brief.") == ("sytem", "Be brief.")  # told, and not sent
    assert command_of("/save a file.json") == ("save", "a file.json")


def test_help_lists_the_commands(command):
    out, err = command("chat", *SMALL, stdin="/help\n")
    assert out == ""
    for name in ("/clear", "/system TEXT", "/save FILE", "/exit", "/help", "quit", "Ctrl-C"):
        assert name in err


def test_the_system_text_goes_before_the_first_turn(command, monkeypatch):
    prompts, stream = [], LLM.stream

    def seen(self, given, *args, **kwargs):
        prompts.extend(given)
        return stream(self, given, *args, **kwargs)

    monkeypatch.setattr(LLM, "stream", seen)
    lines = [*TURN, "/system Be brief.", *TURN, "/clear", *TURN, "/system", *TURN]
    first, second, third, fourth = talk(command, *SMALL, lines=lines)
    with LLM(MODEL, num_blocks=8) as llm:
        render = llm.tokenizer.render_for_completion
        told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TURN[0]}]
        assert prompts[2] == render(told)
        then = [*told, {"role": "assistant", "content": first["text"]}, told[1]]
        assert prompts[1] == render(then)
        assert len(prompts[3]) == len(render(then[1:])) and prompts[0] == render(told[1:])


def test_a_saved_conversation_is_what_chat_takes(command, tmp_path):
    file = tmp_path / "talk.json"
    lines = ["/system Be brief.", "What is 7*6?", "And now?", f"/save {file}"]
    flags = [*CALCULATOR, "--temperature", "0"]
    _, err = command("chat", *flags, stdin="\n".join(lines))
    assert f"(saved to {file})" in err
    messages = json.loads(file.read_text())
    system, asked, answer, _, _ = messages
    assert system == {"role": "system", "content": "Be brief."}
    assert asked == {"role": "user", "content": "What is 7*6?"}
    texts = {part["type"]: part["text"] for part in answer["content"][:3]}
    assert texts == {"text": "So:", "python": "7*6", "python_output": "42"}
    with LLM(CALCULATOR[1], tokenizer_path=CALCULATOR[3], num_blocks=20) as llm:
        (again,) = llm.chat(messages[:-1], SamplingParams(temperature=0))
        assert again["text"] == "So:`7*6` = 42  yes!"


def test_what_is_forgotten_is_saved_all_the_same_and_plain_answers_are_texts(command, tmp_path):
    file = tmp_path / "talk.json"
    lines = [f"Tell me story {n}." for n in range(6)] + [f"/save {file}"]
    flags = ["--max-model-len", "81", "--max-tokens", "12", "--ignore-eos"]
    _, err = command("chat", *flags, stdin="\n".join(lines))
    assert "are dropped" in err
    messages = json.loads(file.read_text())
    assert [message["content"] for message in messages[::2]] == lines[:-1]
    assert all(isinstance(message["content"], str) for message in messages)


def test_save_overwrites_nothing_and_says_what_is_wrong(command, tmp_path, monkeypatch):
    file = tmp_path / "talk.json"
    file.write_text("mine")
    lines = [f"/save {file}", "/save", f"/save {tmp_path}/no/such/place.json", "/save a\0b"]
    out, err = command("chat", *SMALL, stdin="\n".join(lines))
    assert file.read_text() == "mine" and out == ""
    assert f"(not saved: {file} exists already, give another name)" in err
    assert "(name a file: /save FILE)" in err
    assert err.count("not saved: ") == 3 and f"the folder {tmp_path}/no/such does not exist" in err


def test_a_disk_that_is_full_gets_no_half_of_a_conversation(monkeypatch, tmp_path):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(28, "No space left on device")

    def opened(path, *args, **kwargs):
        Path(path).touch(exist_ok=False)
        return Full()

    with LLM(MODEL, num_blocks=8) as llm:
        talk = Conversation(llm.tokenizer, 100)
        monkeypatch.setattr("builtins.open", opened)
        assert "the disk is full; free space" in talk.save(str(tmp_path / "talk.json"))
    assert not [*tmp_path.iterdir()]


def test_a_line_that_does_not_fit_forgets_nothing():
    with LLM(MODEL, num_blocks=8) as llm:
        talk = Conversation(llm.tokenizer, 60)
        for _ in range(3):
            talk.add("Who wrote Emma?", [5, 6, 7])
        with pytest.raises(ValueError, match="a prompt may have at most 60"):
            talk.prompt("word " * 100)
        assert talk.num_forgotten == 0
        assert len(talk.prompt("word " * 20)) <= 60 and talk.num_forgotten == 2


def test_one_conversation_has_all_of_the_models_context(monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("NO_COLOR", "1")
    cli.main(["chat"])
    loading, banner, *_ = shown.getvalue().splitlines()
    assert loading == "loading oldbooks-d6 ..."
    assert banner.startswith("oldbooks-d6, step 11414: context of 1,024 tokens. /help")


def test_lines_that_wait_on_a_terminal_are_one_turn(monkeypatch):
    typed = ["Who wrote", "Moby Dick?", "/clear", "Who?"]
    monkeypatch.setattr("builtins.input", lambda prompt="": typed.pop(0))
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(conversation, "is_typed", lambda: len(typed) not in (0, 2))
    assert conversation.read_turn() == "Who wrote\nMoby Dick?"
    assert conversation.read_turn() == "/clear"  # a command is one line
    assert conversation.read_turn() == "Who?"


class Child:
    """`microvllm chat` on a terminal of its own."""

    def __init__(self, term: str, *flags: str):
        pty = pytest.importorskip("pty")
        self.ours, theirs = pty.openpty()
        self.shown, self.mark = "", 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "microvllm", "chat", "--temperature", "0", *flags], cwd=ROOT,
            stdin=theirs, stdout=theirs, stderr=theirs,
            env={**os.environ, "TERM": term, "NO_COLOR": "1"},
        )  # fmt: skip
        os.close(theirs)

    def wait_for(self, pattern: str) -> re.Match:
        end = time.monotonic() + 60
        while not (found := re.compile(pattern, re.S).search(self.shown, self.mark)):
            assert time.monotonic() < end, f"{pattern!r} is not in {self.shown[self.mark :]!r}"
            if select.select([self.ours], [], [], 0.5)[0]:
                self.shown += os.read(self.ours, 4096).decode(errors="replace")
        self.mark = found.end()
        return found

    def type(self, text: str) -> None:
        time.sleep(0.3)  # a line editor that is just starting may drop what is typed
        os.write(self.ours, text.encode())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("term", "pasted"),
    [
        ("xterm", "\x1b[200~Who wrote\nMoby Dick?\n\x1b[201~\n"),  # as a terminal brackets it
        ("xterm", "Who wrote\nMoby Dick?\n"),
        ("dumb", "Who wrote\nMoby Dick?\n"),
    ],
)
def test_what_is_pasted_is_one_turn(term, pasted, tmp_path):
    child = Child(term, "--max-tokens", "20")
    try:
        child.wait_for("loading oldbooks-d6.*oldbooks-d6, step 11414.*> ")
        child.type(pasted)
        tokens = child.wait_for(r"\[(\d+) tokens, .*?; (\d+) of 1,024 in the context; ")
        child.wait_for("> ")
        child.type(f"/save {tmp_path}/talk.json\n")
        child.wait_for("saved to")
        child.type("quit\n")
        assert child.process.wait(20) == 0
    finally:
        child.process.kill()
        os.close(child.ours)
    asked, answer = json.loads((tmp_path / "talk.json").read_text())
    assert asked["content"] == "Who wrote\nMoby Dick?" and answer["content"]
    with LLM(MODEL, num_blocks=8) as llm:
        count = len(llm.tokenizer.render_for_completion([asked]))
    assert int(tokens[2]) == count + int(tokens[1])
