"""The microvllm command: what each subcommand prints, a conversation's memory, mistakes, Ctrl-C."""

import contextlib
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers.commands import CALCULATOR, SMALL, Terminal, talk
from helpers.goldens import ERAS, MODEL, ROOT

from microvllm import LLM, SamplingParams, cli, engine
from microvllm.checkpoint import load_model
from microvllm.cli import bench, commands, conversation, flags, roofline, terminal
from microvllm.cli.flags import make_parser
from microvllm.features import stats
from microvllm.features.windows import group_layers
from microvllm.scheduler import Scheduler

CHOICES = [f"Emma was written by {name}." for name in ("Mark Twain", "Jane Austen", "H.G. Wells")]


pytestmark = pytest.mark.usefixtures("one_thread")


def process(*flags: str, **kwargs) -> subprocess.Popen:
    """The command as a process of its own, in which Ctrl-C means what it does in a shell."""
    return subprocess.Popen(
        [sys.executable, "-m", "microvllm", *flags],
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **kwargs,
    )


# help and mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sub",
    [
        [],
        *(
            [name]
            for name in "run chat batch bench score eval info convert quantize lab trace".split()
        ),
    ],
)
def test_help_shows_examples_that_parse(sub, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*sub, "--help"])
    assert stop.value.code == 0
    examples = re.findall(r"^  microvllm (.*)$", capsys.readouterr().out, re.M)
    assert len(examples) >= 2
    for example in examples:
        words = re.findall(r'"[^"]*"|\S+', re.split(" [<#] ", example)[0])
        args = make_parser().parse_args([word.strip('"') for word in words])
        assert args.command.__name__ == words[0] == (sub or words)[0]


def test_without_a_command_there_is_help_and_the_status_of_git(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    out, err = capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert (stop.value.code, err) == (1, "") and out == capsys.readouterr().out


def test_help_has_each_command_once_in_a_group(capsys):
    names = " ".join(flags.GROUPS.values()).split()
    assert sorted(names) == sorted(work.__name__ for work in flags.PAGES)
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    for title, group in flags.GROUPS.items():
        listed = out.partition(f"  {title}:\n")[2].partition("\n\n")[0].splitlines()
        assert [line.split()[0] for line in listed] == group.split()
        assert all(len(line.split()) > 3 for line in listed)


COMMANDS = [[], *([work.__name__] for work in flags.PAGES)]


@pytest.mark.parametrize("sub", COMMANDS, ids=str)
def test_help_fits_into_a_terminal_of_80_columns(sub, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([*sub, "--help"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) < 80
    usage = out.partition("\n\n")[0]
    assert usage.startswith("usage: microvllm") and "\n" not in usage and "[options]" in usage


@pytest.mark.parametrize("sub", COMMANDS[1:], ids=str)
def test_each_flag_says_what_it_is_and_what_its_default_is(sub):
    parser = make_parser()._subparsers._group_actions[0].choices[sub[0]]
    no_default = {"prompt", "stop", "recipe", "guide", "trace", "output", "calibration", "other"}
    no_default |= {"chrome", "start", "include_path", "file"}
    for action in parser._actions:
        told = action.help % vars(action) if action.help else ""
        assert len(told.split()) > 2, action.dest
        # a flag with a value has a default, which is named, but for those that add something
        if action.option_strings and action.nargs != 0 and not action.required:
            assert "default" in told or action.dest in no_default, (action.dest, told)
        if action.default not in (None, [], False) and action.nargs != 0:
            assert f"(default: {action.default})" in told, (action.dest, told)


def test_required_flags_are_in_the_usage(capsys):
    for name, usage in (
        ("batch", "batch -o OUTPUT [options] INPUT"),
        ("quantize", "quantize -o DIR --bits 8|6|5|4 [options] CHECKPOINT"),
        ("run", "run [options] [PROMPT ...]"),
        ("trace", "trace [options] FILE [FILE]"),
    ):
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: microvllm {usage}\n")


def test_help_is_instant():
    flags = ["-X", "importtime", "-m", "microvllm", "run", "--help"]
    done = subprocess.run([sys.executable, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: microvllm run")
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "microvllm.cli" in imported
    assert not imported & {"torch", "numpy", "numba", "tiktoken", "urllib.request"}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["walk"], "walk"),
        (["run"], "no prompt"),
        (["run", "-m", "no/such/place", "hi"], "no/such/place"),
        (["run", "--temperature", "-1", "hi"], ": --temperature must"),
        (["run", "--recipe", "softcap", "hi"], "NAME=VALUE"),
        (["run", "--recipe", "charm=3", "hi"], "charm"),
        (["run", *SMALL, "word " * 2000], "--max-model-len is 1024"),
        (["run", *SMALL, "hi", "--prompt", "word " * 2000], "prompts[1]"),
        (["run", "--json", "--num-blocks", "2", "hi"], "raise --num-blocks or lower --max-tokens"),
        (["chat", "--step", "7"], "7"),
        (["bench", "--num-prompts", "0"], "--num-prompts"),
        (["bench", "--shared-prefix", "few"], "--shared-prefix"),
        (["bench", "--json", *SMALL, "--random-input-len", "2000"], "2000"),
        (["bench", "--prompts-file", "absent.json"], "absent.json"),
        (["score"], "PROMPT CONTINUATION"),
        (["score", "a prompt"], "PROMPT CONTINUATION"),
        (["score", "a prompt", "more", "--file", "rows.jsonl"], "--file"),
        (["score", "a prompt", ""], "no continuation empty"),
        (["score", "--file", "absent.jsonl"], "absent.jsonl"),
        (["score", *SMALL, "a prompt", "word " * 2000], "continuations[0]"),
        (["eval"], "--tasks"),
        (["eval", "--tasks", "x", "--num-fewshot", "-1"], "--num-fewshot must be 0 or more"),
        (["eval", "--tasks", "x", "--limit", "0"], "--limit"),
        (["eval", "--tasks", "x", "--include-path", "absent"], "--include-path: absent"),
        (["eval", "--tasks", "x", "-o", "absent/results.json"], "--output: absent/results.json"),
        (["eval", "--tasks", "x", "-o", str(ROOT)], "--output: "),
        (["info", "no/such/place"], "no/such/place"),
        (["info", "--device", "abacus"], "abacus"),
        (["info", "--recipe", "charm=3"], "charm"),
        (["convert", str(MODEL)], "--output"),
        (["convert", "no/such/place", "-o", "out"], "no/such/place"),
        (
            ["convert", str(MODEL), "-o", str(ROOT / "docs")],
            "docs exists and is not an empty directory",
        ),
        (["convert", str(MODEL), "-o", "out", "--step", "7"], "model_000007.pt"),
        (["convert", str(MODEL), "-o", "no/such/place"], "no/such is not a directory"),
        (["quantize", str(MODEL), "-o", "out"], "--bits"),
        (["quantize", str(MODEL), "-o", "out", "--bits", "3"], "--bits"),
        (
            ["quantize", str(MODEL), "-o", "no/such/place", "--bits", "4"],
            "no/such is not a directory",
        ),
        (["quantize", str(MODEL), "-o", "out", "--bits", "4", "--seed", "-1"], "--seed"),
        (["quantize", str(MODEL), "-o", "out", "--bits", "4", "--calibration", "no"], "no"),
        (["trace", "absent.jsonl"], "absent.jsonl"),
        (["trace", str(ROOT / "pyproject.toml")], "line 1"),
        (
            ["run", *SMALL, "--trace", "no/such/place/run.jsonl", "hi"],
            "no/such/place does not exist",
        ),
        (["run", *SMALL, "--trace", str(ROOT), "hi"], f"{ROOT}: this is a folder; give the path"),
        (["run", "--guide", "absent.json", "hi"], "absent.json: there is no such file; check"),
        (["batch", "absent.jsonl", "-o", "out.jsonl"], "there is no file absent.jsonl"),
        (["run", "--threads", "0", "hi"], "--threads"),
        (["run", "--threads", "9999", "hi"], ": --threads must be between 1 and "),
        (
            ["quantize", str(MODEL), "-o", "x", "--bits", "4", "--threads", "9999"],
            "--threads must be",
        ),
        (["convert", str(MODEL), "-o", "x", "--threads", "9999"], "--threads must be between 1"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, named, mistake):
    assert named in mistake(*flags)


def test_a_path_that_the_system_refuses_is_told_in_words_with_a_remedy(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path, mode, told in (
        (tmp_path / "absent", "r", "there is no such file; check its name"),
        (tmp_path / "no" / "x", "w", f"the folder {tmp_path / 'no'} does not exist; create it"),
        (tmp_path, "w", "this is a folder; give the path of a file"),
        (file / "x", "r", "a part of this path is a file, not a folder"),
        (file, "x", "this exists already; give another path"),
        (loop, "r", "its symbolic links lead back to itself"),
        (tmp_path / ("x" * 300), "r", "the name is too long; give a shorter one"),
    ):
        with pytest.raises(OSError) as info:
            open(path, mode)
        line = terminal.path_problem(info.value)
        assert line.startswith(f"{path}: ") and told in line
    assert terminal.path_problem(PermissionError(13, "x", "a")).startswith("a: permission denied;")
    assert terminal.path_problem(PermissionError(13, "x", b"a")).startswith("a: permission denied;")
    assert terminal.path_problem(OSError(28, "x")).startswith("the disk is full; free space")
    assert terminal.path_problem(OSError(5, "Input/output error", "a")) == "a: Input/output error"
    assert terminal.path_problem(FileNotFoundError("words of our own")) == "words of our own"
    assert terminal.path_problem(OSError(2, "x", 7)).startswith("there is no such file")  # an fd


def test_nanochats_base_directory_is_refused_with_the_names_in_it(mistake, monkeypatch, tmp_path):
    home = ERAS / "era5"
    chat = sorted(path.name for path in (home / "chatsft_checkpoints").iterdir())
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(home))
    line = mistake("run", "-m", home, "hi")
    assert f"{home} is nanochat's base directory and not a checkpoint: give one of " in line
    assert all(f"sft:{tag}" in line for tag in chat) and "set NANOCHAT_BASE_DIR" not in line
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert f"and set NANOCHAT_BASE_DIR={home}" in mistake("run", "-m", home, "hi")
    below = home / "chatsft_checkpoints"
    line = mistake("info", below)
    assert f"{below} has no checkpoint of its own" in line and f"{below / chat[-1]}" in line
    # an error with neither keeps its message
    assert f"{tmp_path}" in mistake("info", tmp_path)


@pytest.mark.parametrize("flag", [["--threads", "1"], []])
@pytest.mark.parametrize(
    "words",
    [["run", "hi"], ["chat"], ["score", "a", " b"], ["bench", "--num-prompts", "2", "--json"]],
    ids=lambda words: words[0],
)
def test_threads_of_the_flag_are_the_engines(words, flag, command, monkeypatch):
    numbers, plan_step = [], engine.LLM.plan_step

    def seen(self):
        numbers.append((self.num_threads, torch.get_num_threads()))
        return plan_step(self)

    monkeypatch.setattr(engine.LLM, "plan_step", seen)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    more = [] if words[0] == "score" else ["--max-tokens", "2"]
    command(*words, *SMALL, *flag, *more, stdin="hi\n")
    assert {number for number, _ in numbers} == {1 if flag else None}


def test_every_command_that_runs_a_model_takes_threads():
    runs = {"run", "chat", "batch", "bench", "score", "eval", "convert", "quantize"}
    choices = make_parser()._subparsers._group_actions[0].choices
    assert {
        name for name, sub in choices.items() if "--threads" in sub._option_string_actions
    } == runs
    parser = terminal.Parser()
    flags.add_flags(parser, flags.ENGINE)  # that of run.py
    assert parser.parse_args(["--threads", "2"]).threads == 2


def test_evaluations_name_the_package_that_they_need(mistake, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in ("microvllm.evals", "microvllm.evals.harness"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert "pip install -e '.[eval]'" in mistake("eval", "--tasks", "arc_easy")


def test_a_model_that_completes_only_text_cannot_chat(mistake, monkeypatch):
    real = LLM.__init__

    def without_chat(self, *args, **kwargs):
        real(self, *args, **kwargs)
        self.tokenizer.has_chat = False

    monkeypatch.setattr(LLM, "__init__", without_chat)
    assert "microvllm run" in mistake("chat", *SMALL)


def test_an_install_without_the_bundled_model_asks_for_one(mistake, monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "MODEL_DIR", tmp_path / "oldbooks-d6")
    assert "sft" in mistake("run", "hi")
    assert "sft" in mistake("info")


@pytest.mark.parametrize(
    "flags",
    [
        ["run", "hi"],
        ["run", "hi", "there"],
        ["bench", "--num-prompts", "2"],
        ["score", "a prompt", "more"],
        ["chat"],
    ],
)
def test_a_bug_in_the_engine_is_not_passed_off_as_a_mistake(flags, command, monkeypatch):
    def broken(self):
        raise ValueError("a bug")

    monkeypatch.setattr(LLM, "plan_step", broken)
    with pytest.raises(ValueError, match="a bug"):
        command(*flags, *SMALL, stdin="hi\n")


# run ----------------------------------------------------------------------------------------------


def test_run_prints_the_answer_alone(command):
    out, err = command("run", *SMALL, "--temperature", "0", "Who wrote Moby Dick?")
    assert (out, err) == ("Moby Dick was written by Herman Melville.\n", "")


def test_run_streams_what_generate_returns(command):
    flags = ["--seed", "3", "--max-tokens", "40", "--temperature", "1", "--top-k", "0"]
    out, _ = command("run", *SMALL, "--raw", *flags, "It was a dark")
    with LLM(MODEL, num_blocks=40, seed=3) as llm:
        params = SamplingParams(max_tokens=40, temperature=1.0, top_k=0)
        (output,) = llm.generate("It was a dark", params, use_tqdm=False)
    assert out == output["text"] + "\n"


def test_run_on_a_terminal_shows_the_prompt_it_completes_and_the_speed(monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    flags = ["run", *SMALL, "--raw", "--max-tokens", "3", "--ignore-eos", "It was a dark"]
    monkeypatch.delenv("NO_COLOR", raising=False)
    cli.main(flags)
    line, speed, rest = shown.getvalue().split("\n")
    assert line.startswith("It was a dark") and len(line) > 13 and rest == ""
    pattern = (
        r"\033\[2m\[3 tokens, [\d.]+ tokens/s; 0 of \d prompt tokens cached; cut by .*\]\033\[0m"
    )
    assert re.fullmatch(pattern, speed)

    shown.truncate(shown.seek(0))
    monkeypatch.setenv("NO_COLOR", "1")
    cli.main(flags)
    assert "\033" not in shown.getvalue() and "[3 tokens, " in shown.getvalue()


def test_run_answers_the_lines_it_is_piped(command):
    flags = ["run", *SMALL, "--temperature", "0"]
    out, err = command(*flags, stdin="Who wrote Emma?\n\nWho wrote Moby Dick?\n")
    first, second = out.strip().split("\n\n")
    assert first == "> Who wrote Emma?\nEmma was written by Jane Austen."
    assert second.startswith("> Who wrote Moby Dick?\n") and err == ""


def test_run_prints_json_for_machines(command):
    flags = ["run", *SMALL, "--json", "--max-tokens", "5", "--ignore-eos"]
    out, err = command(*flags, "One", "--prompt", "Two")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == ["One", "Two"] and err == ""
    for row in rows:
        assert len(row["token_ids"]) == 5 and row["finish_reason"] == "length"
        assert isinstance(row["text"], str) and "samples" not in row

    (row,) = [json.loads(line) for line in command(*flags, "-n", "3", "One")[0].splitlines()]
    assert len({sample["text"] for sample in row["samples"]}) == 3


def test_run_prints_each_of_several_samples(command):
    flags = ["-n", "2", "--max-tokens", "4", "--ignore-eos", "--temperature", "1"]
    out, _ = command("run", *SMALL, *flags, "Tell me a story.")
    assert out.count("> Tell me a story.\n") == out.count("[cut at 4 tokens]") == 2


def test_run_ends_before_a_stop_string(command):
    flags = [*SMALL, "--temperature", "0", "--stop", " Herman", "Who wrote Moby Dick?"]
    assert command("run", *flags)[0] == "Moby Dick was written by\n"
    both, _ = command("run", *flags, "--prompt", "Who wrote Emma?")  # many: another way to print
    assert both.startswith("> Who wrote Moby Dick?\nMoby Dick was written by\n\n")


def test_run_marks_what_the_calculator_did(command):
    out, _ = command("run", *CALCULATOR, "--temperature", "0", "What is 7*6?")
    assert out == "So:`7*6` = 42  yes!\n"
    many, _ = command("run", *CALCULATOR, "--temperature", "0", "What is 7*6?", "-n", "2")
    assert many.count("\nSo:`7*6` = 42  yes!\n") == 2


def test_run_takes_constants_that_the_weights_cannot_tell(command):
    flags = ["run", *SMALL, "--json", "--temperature", "0", "Tell me a story."]
    plain, odd = (
        json.loads(command(*flags, *more)[0]) for more in ([], ["--recipe", "qk_scale=2"])
    )
    assert plain["token_ids"] != odd["token_ids"]


# chat ---------------------------------------------------------------------------------------------


def test_each_turn_finds_the_blocks_of_the_last_one(command):
    lines = ["Who wrote Moby Dick?", "", "What is the capital of France?", "What is 7+8?"]
    turns = talk(command, *SMALL, lines=lines)
    assert [turn["prompt"] for turn in turns] == [line for line in lines if line]
    assert "Herman Melville" in turns[0]["text"] and turns[0]["cached_tokens"] == 0
    for before, turn in zip(turns, turns[1:], strict=False):
        known = before["prompt_tokens"] + len(before["token_ids"]) - 1  # the last is not computed
        assert turn["cached_tokens"] == known // 16 * 16 > 0


def test_the_history_is_what_was_generated_and_ends_each_answer(command, monkeypatch):
    prompts = []
    stream = LLM.stream

    def seen(self, given, *args, **kwargs):
        prompts.extend(given)
        return stream(self, given, *args, **kwargs)

    monkeypatch.setattr(LLM, "stream", seen)
    first, _ = talk(command, *CALCULATOR, lines=["What is 7*6?", "And now?"])
    with LLM(CALCULATOR[1], tokenizer_path=CALCULATOR[3], num_blocks=8) as llm:
        tokenizer = llm.tokenizer
    asked = tokenizer.render_for_completion([{"role": "user", "content": "What is 7*6?"}])
    assert prompts[0] == asked
    assert tokenizer.encode_special("<|output_start|>") in first["token_ids"]
    assert prompts[1][: len(asked) + len(first["token_ids"])] == asked + first["token_ids"]

    prompts.clear()
    cut, _ = talk(command, *SMALL, "--max-tokens", "3", lines=["Tell me a story.", "More."])
    assert cut["finish_reason"] == "length"
    with LLM(MODEL, num_blocks=8) as llm:
        end = llm.tokenizer.encode_special("<|assistant_end|>")
    length = len(prompts[0]) + 3
    assert prompts[1][: length + 1] == [*prompts[0], *cut["token_ids"], end]


def test_clear_starts_over_and_exit_leaves(command):
    lines = ["Who wrote Emma?", "/clear", "Who wrote Emma?", "/exit", "Who wrote Emma?"]
    first, second = talk(command, *SMALL, lines=lines)
    assert first["prompt_tokens"] == second["prompt_tokens"]
    assert first["token_ids"] == second["token_ids"]


def test_a_command_that_there_is_not_is_not_said_to_the_model(command):
    out, err = command("chat", *SMALL, "--json", stdin="/claer\nWhat is /clear?\n")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["What is /clear?"]
    assert "(there is no command /claer: did you mean /clear? /help lists them)" in err


@pytest.mark.parametrize("limit", [["--max-model-len", "81"], ["--num-blocks", "6"]])
def test_a_full_context_forgets_the_older_half_and_says_so(limit, command, capsys):
    lines = "".join(f"Tell me story {n}.\n" for n in range(6))
    flags = ["--json", "--temperature", "0", "--max-tokens", "12", "--ignore-eos", *limit]
    out, err = command("chat", *flags, stdin=lines)
    turns = [json.loads(line) for line in out.splitlines()]
    assert len(turns) == 6 and all(len(turn["token_ids"]) == 12 for turn in turns)
    assert all(turn["prompt_tokens"] + 12 <= 81 for turn in turns)
    assert "(the context of 81 tokens is full: the oldest 2 of 3 turns are dropped)" in err
    assert any(turn["cached_tokens"] for turn in turns)


def test_a_line_that_can_never_fit_is_not_sent(command):
    lines = "Who wrote Emma?\n" + "word " * 100 + "\nWho wrote Emma?\n"
    out, err = command("chat", "--json", "--max-model-len", "100", stdin=lines)
    assert len(out.splitlines()) == 2
    assert re.search(r"^\(not sent: \d+ tokens, but a prompt may have at most 75\)$", err, re.M)


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(monkeypatch, capsys):
    with LLM(MODEL, num_blocks=40) as llm:
        plan_step, steps = LLM.plan_step, []

        def interrupted(self):
            if len(steps) == 5:
                steps.clear()
                raise KeyboardInterrupt
            steps.append(1)
            return plan_step(self)

        monkeypatch.setattr(LLM, "plan_step", interrupted)
        monkeypatch.setattr(sys, "stdin", io.StringIO("Tell me a story.\nWho wrote Emma?\n"))
        conversation.converse(llm, SamplingParams(temperature=0, ignore_eos=True), as_json=True)
        assert llm.is_finished()
        assert llm.stats()["free_blocks"] == llm.stats()["num_blocks"]
    first, second = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert first["finish_reason"] == second["finish_reason"] == "abort"
    assert len(first["token_ids"]) == 5
    assert second["prompt_tokens"] > first["prompt_tokens"] + 5


def test_ctrl_c_at_the_prompt_drops_the_line_and_ctrl_d_leaves(monkeypatch, capsys):
    keys = [KeyboardInterrupt, "hello", EOFError]

    def pressed(prompt=""):
        key = keys.pop(0)
        if isinstance(key, str):
            return key
        raise key

    monkeypatch.setattr("builtins.input", pressed)
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert conversation.read_turn() == "hello"
    assert "(to leave, press Ctrl-D or type /exit)" in capsys.readouterr().err
    assert conversation.read_turn() is None

    keys.append(KeyboardInterrupt)
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # a pipe has no person to go on
    with pytest.raises(KeyboardInterrupt):
        conversation.read_turn()


# bench, score, info -------------------------------------------------------------------------------


def test_bench_measures_a_random_workload(command):
    sizes = ["--random-input-len", "20", "--random-output-len", "6", "--shared-prefix", "32"]
    flags = ["--num-blocks", "60", "--num-prompts", "5", *sizes]
    out, err = command("bench", *flags)
    assert out.startswith("5 prompts of 20 random tokens after a prefix of 32\n") and err == ""
    assert "Prefix-cache hits: 128 of 260 prompt tokens" in out and "GB/s of " in out
    assert "{" not in out  # JSON is printed only with --json
    found = json.loads(command("bench", *flags, "--json")[0])
    assert (found["prompt_tokens"], found["total_output_tokens"]) == (260, 30)
    assert found["cached_tokens"] == 4 * 32 and found["peak_blocks"] > 0
    assert found["tokens_per_second"] > 0 and found["preemptions"] == 0
    assert found["decode_bytes_per_second"] > 0

    flags = ["--json", "--num-blocks", "20", "--num-prompts", "6", "--max-tokens", "40"]
    out, _ = command("bench", *flags, "--random-input-len", "30")
    (line,) = out.splitlines()
    found = json.loads(line)
    assert found["total_output_tokens"] == 240 and found["preemptions"] > 0  # 26 blocks into 19


def test_bench_measures_no_loading_and_each_prompt_by_itself(command, monkeypatch):
    """A clock that goes on by one second a step, and by 1,000 while the first step loads."""
    clock, steps, real = [0.0], [], Scheduler.schedule

    def schedule(self):
        clock[0] += 1.0 if steps else 1000.0
        steps.append(len(self.running) + len(self.waiting))
        return real(self)

    monkeypatch.setattr(Scheduler, "schedule", schedule)
    for module in (bench, commands, stats):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    sizes = ["--random-input-len", "20", "--random-output-len", "6", "--num-prompts", "3"]
    flags = ["--num-blocks", "60", "--max-batch-size", "2", "--json", *sizes]
    found = json.loads(command("bench", *flags, "--device", "cpu")[0])
    assert found["warmup_seconds"] >= 1000.0 and found["load_seconds"] == 0.0
    # two prompts run first, the third when they are done: their first tokens come after 1, 1 and 7
    # seconds, and then one each second
    assert found["total_seconds"] == 12.0 == found["prefill_seconds"] + found["decode_seconds"]
    assert found["tokens_per_second"] == 1.5
    assert found["median_seconds_to_first_token"] == 1.0
    assert found["median_seconds_between_tokens"] == 1.0
    assert found["prefill_seconds"] == 2.0 and found["decode_tokens"] == 15
    # the counters are of the benchmark alone, and so is the cache
    assert found["requests"] == 3 and found["steps"] == 12 and found["prompt_tokens"] == 60
    assert found["output_tokens"] == 18 and found["cached_tokens"] == 0
    assert found["peak_blocks"] < 10


def test_bench_traces_the_benchmark_alone(command, tmp_path):
    file = tmp_path / "run.jsonl"
    flags = [*SMALL, "--num-prompts", "2", "--random-input-len", "9", "--random-output-len", "3"]
    out, _ = command("bench", *flags, "--trace", file)
    assert "Warm-up: none, so the first steps include the loading of kernels\n" in out
    events = [json.loads(line) for line in file.read_text().splitlines()]
    assert sum(event["e"] == "arrive" for event in events) == 2
    assert bench.latencies([]) == dict.fromkeys(
        ["median_seconds_to_first_token", "median_seconds_between_tokens"]
    )


def test_the_warm_up_leaves_no_trace_in_the_engine():
    params = SamplingParams(temperature=1.0, max_tokens=5, top_k=3)
    with LLM(MODEL, device="cpu", num_blocks=40, seed=7, plain=True) as llm:
        expected = llm.generate(["It was"], params, use_tqdm=False)[0]["token_ids"]
    with LLM(MODEL, device="cpu", num_blocks=40, seed=7, plain=True) as llm:
        assert bench.warm_up(llm, params, 4) > 0
        assert not llm.scheduler.blocks.pool.block_of and llm.stats()["steps"] == 0
        llm.scheduler.blocks.check([])
        assert llm.generate(["It was"], params, use_tqdm=False)[0]["token_ids"] == expected
    with LLM(MODEL, device="cpu", num_blocks=2, block_size=1, plain=True) as tiny:
        assert bench.warm_up(tiny, params, 4) == 0.0 or tiny.stats()["steps"] == 0


def test_random_prompts_share_exactly_their_prefix():
    first, second = bench.random_prompts(2, 8, 4, 1000, seed=1)
    assert first[:4] == second[:4] and first[4:] != second[4:]
    assert len(first) == len(second) == 12 and max(first + second) < 1000
    assert [first, second] == bench.random_prompts(2, 8, 4, 1000, seed=1)
    assert first != bench.random_prompts(1, 8, 4, 1000, seed=2)[0]


def test_score_ranks_the_author_first(command):
    out, _ = command("score", *SMALL, "Who wrote Emma?", *CHOICES)
    question, header, *rows = out.strip().split("\n")
    assert question == "> Who wrote Emma?" and header.split() == ["total", "per", "token", "tokens"]
    assert rows[0].split()[1::2][:2] == ["#1", "#1"] and rows[0].endswith(CHOICES[1])
    assert [row.split()[1] for row in rows] == ["#1", "#2", "#3"]
    totals = [float(row.split()[0]) for row in rows]
    assert totals == sorted(totals, reverse=True)


def test_score_ranks_by_total_and_says_how_tokens_rank(capsys):
    def row(*logprobs: float) -> dict:
        total = sum(logprobs)
        text, mean = f"{len(logprobs)} tokens", total / len(logprobs)
        return {"text": text, "total": total, "per_token": mean, "logprobs": logprobs}

    terminal.show_ranking("?", [row(-3.0), row(-2.0, -2.0)])
    first, second = capsys.readouterr().out.strip().split("\n")[2:]
    assert first.split() == ["-3.00", "#1", "-3.000", "#2", "1", "1", "tokens"]
    assert second.split() == ["-4.00", "#2", "-2.000", "#1", "2", "2", "tokens"]


def test_score_reads_rows_and_prints_what_the_engine_says(command, tmp_path):
    rows = [{"prompt": "The capital of", "continuations": [" France", " the old England"]}]
    rows.append({"prompt": "", "continuations": ["Once"]})
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    out, _ = command("score", *SMALL, "--raw", "--json", "--file", file)
    found = [json.loads(line) for line in out.splitlines()]
    with LLM(MODEL, num_blocks=40) as llm:
        expected = llm.score(["The capital of"] * 2 + [""], [" France", " the old England", "Once"])
    scores = {r["text"]: r["logprobs"] for row in found for r in row["continuations"]}
    assert scores[" France"] == pytest.approx(expected[0], abs=1e-4)
    assert scores[" the old England"] == pytest.approx(expected[1], abs=1e-4)
    assert scores["Once"] == pytest.approx(expected[2], abs=1e-4)
    for r in found[0]["continuations"]:
        assert r["total"] == pytest.approx(sum(r["logprobs"]))
        assert r["per_token"] == pytest.approx(r["total"] / len(r["logprobs"]))


@pytest.mark.parametrize(
    "row",
    ['["a"]', "{}", '{"prompt": "a", "continuations": "b"}', '{"prompt": "a", "continuations": []}']
    + ['{"prompt": 3, "continuations": ["b"]}', '{"prompt": "a", "continuations": ["b", 3]}'],
)
def test_score_names_the_row_at_fault(row, mistake, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "continuations": ["b"]}\n' + row)
    assert f"{file}: row 2: " in mistake("score", "--file", file)


def test_info_counts_k_and_v_in_int8(command):
    found = json.loads(command("info", "--kv-cache-dtype", "int8", "--json")[0])
    options = {"kv_cache_dtype": "int8", "attention": "sdpa"}
    with LLM(MODEL, device="cpu", num_blocks=10, **options) as llm:
        layers, depth = len(llm.model.windows), len(llm.cache.data)
        slots = llm.cache.num_blocks * 16
        assert found["kv_bytes_per_token"] // layers * depth * slots == llm.stats()["cache_bytes"]


def test_info_shows_how_the_kernels_of_a_gpu_compare(command, monkeypatch):
    results = {"card": "a card, 9.0", "versions": ["2.13"], "kernels": {"draw": "", "norm": "off"}}
    monkeypatch.setattr("microvllm.loading.compare_kernels", lambda *_: results)
    monkeypatch.setattr(roofline, "bandwidth", lambda device: 1e9)
    assert json.loads(command("info", "--check", "--json")[0])["check"] == results
    out, _ = command("info", "--check")
    assert "kernels   on a card, 9.0 (2.13)" in out
    assert "draw: matches plain torch" in out and "norm: off" in out


def test_info_agrees_with_the_engine(era, command):
    flags = [f"--recipe={name}={value}" for name, value in era.overrides.items()]
    found = json.loads(command("info", era.directory, "--json", *flags)[0])
    tokenizer = {"tokenizer_path": era.tokenizer, "num_blocks": 10}
    with LLM(era.directory, **tokenizer, **era.overrides) as llm:
        assert found["recipe"] == vars(llm.model.recipe)
        assert found["windows"] == llm.model.windows
        assert found["config"] == vars(llm.model.config)
        depth, layers = len(llm.cache.data), len(llm.model.windows)
        slots = llm.cache.num_blocks * 16
        assert found["kv_bytes_per_token"] // layers * depth * slots == llm.cache.data.nbytes
    weights = load_model(era.directory).state_dict()
    assert found["parameters"] == sum(w.numel() for w in weights.values())
    length = found["config"]["sequence_len"]
    # layers with a window w need the blocks of w + 1 tokens, wherever they begin
    blocks = [
        length // 16 if not 0 <= w < length - 1 else -(-w // 16) + 1 for w in found["windows"]
    ]
    groups = group_layers(found["windows"], length)
    blocks = sum(blocks[group[0]] for _, group in groups) * depth  # of one layer each
    wanted = blocks * 16 * found["kv_bytes_per_token"] // layers
    assert found["kv_bytes_per_sequence"] == wanted
    assert found["dtype"] == "float32" and found["weight_bytes"] == 4 * found["parameters"]


def test_the_roofline_counts_what_a_decode_step_reads(command, monkeypatch):
    monkeypatch.setattr(roofline, "bandwidth", lambda device: 1e9)
    monkeypatch.setattr("microvllm.environment.free_memory", lambda device: 10**9)
    found = json.loads(command("info", "--json", "--dtype", "bfloat16")[0])
    file = torch.load(MODEL / "model_011414.pt", weights_only=True, mmap=True)
    read = sum(2 * w.numel() for key, w in file.items() if "wte" not in key)
    read -= sum(2 * w.numel() for key, w in file.items() if key.startswith("value_embeds"))
    # half of 1,024 tokens: the layers with a window of 256 see that and themselves
    seen = 2 * 2 * 64 * 2 * (4 * 257 + 2 * 512)
    limits = {int(batch): limit for batch, limit in found["decode_limits"].items()}
    expected = {batch: batch * 1e9 / (read + batch * seen) for batch in (1, 8, 64)}
    assert limits == pytest.approx(expected, rel=1e-3)
    room = (10**9 - found["weight_bytes"]) / 2
    assert found["full_sequences_that_fit"] == int(room / ((64 * 2 + 17 * 4) * 16 * 2 * 2 * 64 * 2))


@pytest.fixture
def compiles(tmp_path, monkeypatch):
    """Kinds that were compiled, in a folder without kernels, with no helper and no compiler."""
    first = pytest.importorskip("microvllm.cpu.compilation")
    kinds = []

    def begin(backend_class, kind, waits):
        if kind not in kinds:
            kinds.append(kind)
            first.progress(kind, {"now": "a_kernel", "done": 2}, 7.0)
        return True

    monkeypatch.setattr(first, "place", lambda kind: tmp_path / kind)
    monkeypatch.setattr(first, "begin", begin)
    monkeypatch.setattr(first, "_helpers", {})
    monkeypatch.setattr(first.kernel_cache, "store_error", None)
    return kinds


def test_warmup_compiles_all_that_a_checkpoint_needs(command, compiles, tmp_path):
    """A live module's, too; it says where kernels are kept."""
    out, err = command("warmup")
    if compiles[0] == "float32-layers":
        assert compiles[1:] == ["float32-shared-layers", "float32"]
    else:
        assert compiles == ["float32"]
    assert str(tmp_path) in out and out.count("\n") == 1
    numbers = [f"kernels {i + 1} of {len(compiles)} ({kind}): " for i, kind in enumerate(compiles)]
    assert [line[: len(x)] for line, x in zip(err.splitlines(), numbers, strict=True)] == numbers
    compiles.clear()
    flags = ["-m", MODEL, "--quantization", "int4", "--kv-cache-dtype", "int8", "--json"]
    out, _ = command("warmup", *flags)
    found = json.loads(out)
    assert found["folder"] == str(tmp_path) and found["kinds"] == compiles
    assert list(found["seconds"]) == compiles and compiles[0].startswith("int4-int8_cache")


def test_warmup_shows_what_is_compiled(command, compiles, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    _, err = command("warmup")
    lines = err.split("\r\033[K")
    assert f"({compiles[0]}): 7 s, 2 compiled, now a_kernel" in lines[1] and "\n" not in lines[1]
    assert lines[2].endswith(" s\n")


def test_warmup_where_nothing_can_be_kept(mistake, compiles, monkeypatch):
    from microvllm.cpu import compilation

    monkeypatch.setattr(compilation.kernel_cache, "store_error", "/here cannot be written")
    assert "/here cannot be written: set NUMBA_CACHE_DIR to a folder" in mistake("warmup")
    assert not compiles
    monkeypatch.setattr(compilation, "place", lambda kind: None)
    monkeypatch.setattr(compilation.kernel_cache, "store_error", None)
    assert "set NUMBA_CACHE_DIR to a folder of your own" in mistake("warmup")


def test_what_is_noted_in_the_midst_of_an_answer_comes_after_it(capsys, monkeypatch):
    """Such as that kernels could not be compiled."""
    written = []
    monkeypatch.setattr(terminal, "print", lambda text, **_: written.append(text), raising=False)

    def stream(*_, **__):
        for number in range(2):
            yield SimpleNamespace(text=f"word{number} ", token_ids=[number], finish_reason=None)
            terminal.note(f"note {number}")

    counts = {"prompt_tokens": 1, "cached_tokens": 0}
    llm = SimpleNamespace(stream=stream, stats=lambda: counts, request_options=())
    terminal.live(llm, "prompt", None, chat=False)
    assert [text.strip() for text in written] == ["word0", "word1", "", "note 0", "note 1"]
    terminal.note("later")
    assert written[-1] == "later"


def test_info_tells_what_each_precision_takes(command, monkeypatch):
    monkeypatch.setattr(roofline, "bandwidth", lambda device: 1e9)
    monkeypatch.setattr("microvllm.cpu.compilation.begin", lambda *_: True)  # no kernel is called
    found = json.loads(command("info", "--json")[0])
    words = ["float32", "bfloat16", "int8", "int6", "int5", "int4"]
    assert list(found["precisions"]) == words
    given = found["precisions"]["float32"]
    assert given == {key: found[key] for key in given} and given["weight_bytes"] == (
        4 * found["parameters"]
    )
    file = torch.load(MODEL / "model_011414.pt", weights_only=True, mmap=True)
    matrices = [w for key, w in file.items() if re.search(r"c_(q|k|v|proj|fc)\.|lm_head", key)]
    for name, dtype, quantization in ("bfloat16", "bfloat16", None), ("int8", "auto", "int8"):
        each = found["precisions"][name]
        # numbers, and of int8 a scale and a correction for each row; the rest is in bfloat16
        sizes = [w.numel() * (1 if quantization else 2) for w in matrices]
        sizes += [8 * len(w) for w in matrices if quantization]
        others = found["parameters"] - sum(w.numel() for w in matrices)
        assert each["weight_bytes"] == sum(sizes) + 2 * others
        options = {"dtype": dtype, "quantization": quantization, "num_blocks": 10}
        with LLM(MODEL, device="cpu", **options) as llm:
            depth, slots = len(llm.cache.data), llm.cache.num_blocks * 16
            per_token = each["kv_bytes_per_token"] // len(llm.model.windows) * depth
            assert per_token * slots == llm.cache.data.nbytes
            kept = [linear.weight for linear in llm.model.linears.values()]
            if quantization and all(isinstance(weight, tuple) for weight in kept):
                assert sum(part.nbytes for weight in kept for part in weight) == sum(sizes)
        # one sequence: half of 1,024 tokens; four layers attend to 257 of them
        seen = each["kv_bytes_per_token"] / 6 * (4 * 257 + 2 * 512)
        limit = 1e9 / (sum(sizes) + seen)
        assert each["decode_limits"]["1"] == pytest.approx(limit, rel=1e-3)


def test_bench_tells_how_fast_decoding_read_memory(monkeypatch):
    monkeypatch.setattr(roofline, "bandwidth", lambda device: 4e9)
    with LLM(MODEL, device="cpu", num_blocks=60) as llm:
        prompts = [[1, *range(300, 340)], [1, 300, 301]]
        params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        stats = llm.stats()
        # the prompts' step, then four of one row for each
        assert (stats["steps"], stats["decode_steps"]) == (5, 4.0)
        stats |= {"decode_seconds": 2.0}
        found = roofline.reading(llm, outputs, stats, "float32")
        config, windows = llm.model.config, llm.model.windows
        assert min(w for w in windows if w >= 0) > 45  # all is seen
        c = config.n_embd
        numbers = config.n_layer * (10 * c * c + 2 * c * 2 * 64) + config.vocab_size * c
        contexts = sum(range(42, 46)) + sum(range(4, 8))
        read = 4 * (4 * numbers + contexts * config.n_layer * 2 * 2 * 64)
        assert found == {"decode_bytes_per_second": round(read / 2), "bytes_per_second": 4e9}
        told = bench.share(found)
        assert told.startswith(", reading ") and "GB/s of 4 measured (" in told
        assert roofline.reading(llm, [], stats | {"decode_seconds": 0.0}, "float32") == {}
    assert bench.share({}) == ""


def test_the_bandwidth_of_reading_is_measured_in_a_second():
    start = time.perf_counter()
    assert 1e8 < roofline.bandwidth(torch.device("cpu")) < 1e12
    assert time.perf_counter() - start < 5  # of a busy machine


def test_info_describes_a_checkpoint_to_people(command):
    out, _ = command("info")
    assert out.startswith(f"{MODEL}, step 11414\n  era       5: softcap 15, ")
    assert "6,144 bytes per token, 3.21 MB per sequence of 1,024 tokens" in out
    assert "3 x 256, 1 x 1024, 1 x 256, 1 x 1024 (layers x tokens back)" in out
    assert re.search(r"roofline  an estimate: at the measured [\d.]+ [GM]B/s", out)
    assert max(map(len, out.splitlines()[1:])) <= 96


# real terminals, pipes and signals ----------------------------------------------------------------


def test_a_conversation_on_a_terminal():
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    flags = ["chat", "--temperature", "0", "--ignore-eos", "--max-tokens", "900"]
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    shown, mark = "", 0
    with process(*flags, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as child:
        os.close(theirs)

        def wait_for(pattern: str) -> re.Match:
            nonlocal shown, mark
            end = time.monotonic() + 120  # it may be the first that compiles the kernels
            while not (found := re.compile(pattern, re.S).search(shown, mark)):
                assert time.monotonic() < end, f"never saw {pattern!r} after {shown[mark:]!r}"
                if select.select([ours], [], [], 0.5)[0]:
                    shown += os.read(ours, 4096).decode(errors="replace")
            mark = found.end()
            return found

        try:
            wait_for("> ")
            os.write(ours, b"Tell me a story.\n")
            wait_for("story.\r\n.{150}")  # it is being written
            child.send_signal(signal.SIGINT)
            wait_for(r"\033\[2m\[\d+ tokens, .*; 0 of 10 prompt tokens cached; stopped\]\033\[0m")
            wait_for("> ")
            os.write(ours, b"Another one.\n")
            wait_for("one.\r\n.{10}")
            child.send_signal(signal.SIGINT)
            hits = int(wait_for(r"; (\d+) of \d+ prompt tokens cached; stopped\]")[1])
            assert hits >= 16
            for _ in range(60):  # a line editor that is just starting may drop what was typed
                if child.poll() is not None:
                    break
                os.write(ours, b"\x04")
                if select.select([ours], [], [], 0.5)[0]:
                    with contextlib.suppress(OSError):  # its end of the terminal is closed
                        os.read(ours, 4096)
            assert child.wait(5) == 0
        finally:
            child.kill()
            os.close(ours)


def test_ctrl_c_ends_run_with_130_and_no_traceback():
    flags = ["run", *SMALL, "--raw", "--ignore-eos", "--max-tokens", "600", "It was"]
    with process(*flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, b"")


def test_a_reader_who_goes_away_is_no_error():
    flags = ["run", *SMALL, "--json", "--max-tokens", "1", "One", "Two"]
    with process(*flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.close()
        err = child.stderr.read()
    assert (child.returncode, err) == (141, b"")


# trace --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["run", "--max-tokens", "3", "hi"],
        ["run", "--max-tokens", "3", "hi", "there"],
        ["bench", "--num-prompts", "2", "--max-tokens", "3"],
        ["score", "a prompt", " and more"],
        ["chat", "--max-tokens", "3"],
    ],
)
def test_every_command_that_runs_a_model_can_be_traced(flags, command, tmp_path):
    file = tmp_path / "run.jsonl"
    command(flags[0], *SMALL, "--trace", file, *flags[1:], stdin="hi\n")
    kinds = [json.loads(line)["e"] for line in file.read_text().splitlines()]
    assert kinds[0] == "pool" and {"arrive", "begin", "end", "finish"} <= set(kinds)


def test_a_trace_becomes_a_page_and_chromes_format(command, tmp_path):
    file, page, chrome = (tmp_path / name for name in ("run.jsonl", "run.html", "chrome.json"))
    command("run", *SMALL, "--trace", file, "--max-tokens", "3", "--ignore-eos", "hi")
    out, _ = command("trace", file)
    assert out.startswith("3 steps, ") and str(page) in out
    assert "<!doctype html>" in page.read_text() and "/*events*/" not in page.read_text()
    page.unlink()
    found = json.loads(command("trace", file, "--chrome", chrome, "--json")[0])
    assert found["files"] == [str(chrome)] and not page.exists()
    assert json.loads(chrome.read_text())["traceEvents"]
    out, _ = command("trace", file, "-o", tmp_path / "other.html", "--chrome", chrome)
    assert "other.html" in out and "chrome.json" in out


def test_watch_draws_beside_the_answers(command):
    pytest.importorskip("rich", reason="needs pip install rich")
    flags = [*SMALL, "--temperature", "0", "--watch"]
    out, err = command("run", *flags, "Who wrote Moby Dick?")
    assert out == "> Who wrote Moby Dick?\nMoby Dick was written by Herman Melville.\n\n"
    assert "the pool: 39 blocks" in err and "done 1" in err
    out, err = command("bench", *flags, "--num-prompts", "2", "--max-tokens", "4", "--json")
    assert json.loads(out) and "the pool: 39 blocks" in err


def test_watch_without_rich_says_what_to_install(mistake, monkeypatch):
    monkeypatch.setattr(commands, "find_spec", lambda name: None)
    assert "pip install -e '.[watch]'" in mistake("run", "--watch", "hi")
    assert "pip install -e '.[watch]'" in mistake("bench", "--watch")
