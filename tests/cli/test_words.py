"""The words that people meet: flags by their names, the nearest one to a mistyped one, what a base
model does, how a job ended, and Ctrl-C before there is anything to stop."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers.commands import SMALL, Terminal
from helpers.goldens import ERAS, ROOT, SRC

import run as script
from microvllm import LLM, cli
from microvllm.cli.flags import make_parser
from microvllm.cli.terminal import Parser
from microvllm.sources import places

pytestmark = pytest.mark.usefixtures("one_thread")
BASE = ["-m", str(ERAS / "era3" / "base_checkpoints" / "d4")]
BASE += ["--tokenizer-dir", str(ERAS / "tokenizer")]
NOTE = "is a base model: it completes plain text, as with --raw; --chat sends chat messages)\n"


# flags --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-tokens", "0"], "--max-tokens must be between"),
        (["--temperature", "nan"], "--temperature must be finite"),
        (["--seed", "-1"], "--seed must be"),
        (["--stop", ""], "--stop must not be empty"),
        (["--device", "abacus"], "--device must be 'auto'"),
        (["--max-model-len", "99999"], "--max-model-len=99999 exceeds"),
        (["--num-blocks", "2"], "--max-tokens=128 need"),
        (["--num-blocks", "2"], "lower --max-tokens, or --max-batched-tokens"),
        (["-n", "300"], "-n=300 samples do not fit --max-batch-size=256"),
        (["--tokenizer-dir", "nowhere"], "give --tokenizer-dir"),
        (["--recipe", "soft_cap=3"], "'soft_cap' (did you mean softcap?): there are eps"),
        (["--recipe", "num_blocks=3"], "unknown argument 'num_blocks': there are eps"),
        (["--raw", "--chat"], "give one of them"),
    ],
)
def test_an_error_names_the_flag_and_not_the_argument(flags, said, mistake):
    line = mistake("run", *flags, "hi")
    assert said in line
    assert not any(name in line for name in ("max_tokens", "max_model_len", "tokenizer_path"))


def test_words_paths_and_values_are_no_flags():
    parser = Parser(prog="p")
    for flag in ("--max-tokens", "--seed", "--prompt", "-n"):
        parser.add_argument(flag)
    parser.add_argument("--ignore-eos", action="store_true")
    for text in (
        "a seed is a number and a prompt is a text",
        "no file max_tokens.jsonl, a/max_tokens/b or max_tokens-1",
        "got 'max_tokens'",
        "max_tokens_2, my_seed=3",
    ):
        assert parser.name_flags(text) == text
    told = parser.name_flags("seed=3, n=2 and ignore_eos=True; n must fit, not max_tokens")
    assert told == "--seed=3, -n=2 and --ignore-eos; -n must fit, not --max-tokens"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--temprature", "0.5", "hi"], "--temprature (did you mean --temperature?)"),
        (["chat", "--max-token=3", "--modle", "sft"], "--modle sft (did you mean --model?)"),
        (["bench", "--num-promts", "3"], "did you mean --num-prompts?"),
        (["info", "--jsno"], "did you mean --json?"),
        (["run", "--xyzzy", "hi"], "unrecognized arguments: --xyzzy\n"),
    ],
)
def test_a_mistyped_flag_is_told_with_the_nearest(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args(words)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and said in line and line.count("\n") == 1


@pytest.mark.parametrize("texts", [[""], ["  "], ["hi", ""], ["hi", "--prompt", ""]])
def test_an_empty_prompt_is_refused(texts, mistake):
    assert f"prompt {len(texts[:2])} is empty" in mistake("run", *SMALL, *texts)


def test_an_empty_text_may_be_completed_where_that_is_said(command):
    out, _ = command("run", *SMALL, "--raw", "--ignore-eos", "--max-tokens", "5", "")
    assert out.strip()


# base models --------------------------------------------------------------------------------------


def test_a_checkpoint_says_whether_it_was_only_pretrained(tmp_path):
    """By its folder, or in any other by what base_train alone writes."""
    for meta in ERAS.glob("*/*/*/meta_*.json"):
        step, base = int(meta.stem[5:]), meta.parent.parent.name == "base_checkpoints"
        assert places.is_base(meta.parent, step) is base, meta
        shutil.copy(meta, tmp_path)
        assert places.is_base(tmp_path, step) is base, meta
    assert not places.is_base(tmp_path, None)  # Hugging Face's format does not tell
    assert places.is_base(tmp_path / "base_checkpoints" / "d20", 5)


@pytest.mark.parametrize("name", ["run", "many", "score", "bench", "run.py"])
def test_a_base_model_completes_and_says_so_once(name, command, monkeypatch, capsys):
    seen, make_request = [], LLM.make_request

    def request(self, prompt_ids, *args, **options):
        seen.append(prompt_ids)
        return make_request(self, prompt_ids, *args, **options)

    monkeypatch.setattr(LLM, "make_request", request)
    flags = [*BASE, "--num-blocks", "60"]
    flags += [] if name == "score" else ["--max-tokens", "2"]
    words = {
        "run": ["run", "hi", *flags], "many": ["run", "hi", "you", *flags],
        "score": ["score", *flags, "hi", "you"], "bench": ["bench", "--num-prompts", "2", *flags],
        "run.py": ["--prompt", "hi", *flags],
    }  # fmt: skip

    with LLM(BASE[1], tokenizer_path=BASE[3], num_blocks=9) as llm:
        mark = llm.tokenizer.encode_special("<|user_start|>")
    for more in ([], ["--raw"], ["--chat"]):
        seen.clear()
        if name == "run.py":
            monkeypatch.setattr(sys, "argv", ["run.py", *words[name], *more])
            script.main()
            err = capsys.readouterr().err
        else:
            _, err = command(words[name][0], *more, *words[name][1:])
        if name == "bench":  # its warm-up is of random tokens
            seen = seen[-2:]
        assert seen and all((mark in ids) is (more == ["--chat"]) for ids in seen)
        assert (err == "") is bool(more)
        assert more or err.endswith(NOTE) and err.count("\n") == 1


def test_a_chat_models_prompts_stay_turns_and_nothing_is_said(command):
    out, err = command("run", *SMALL, "--temperature", "0", "Who wrote Moby Dick?")
    assert "Herman Melville" in out and err == ""


@pytest.mark.parametrize(
    ("flags", "raw", "said"),
    [
        ([], True, True),
        (["--task", "score"], True, True),
        (["--task", "completion"], False, False),
        (["--task", "chat"], False, False),
        (["--chat"], False, False),
        (["--raw"], True, False),
    ],
)
def test_a_job_with_a_base_model_completes_unless_it_is_told_to_chat(
    flags, raw, said, command, capsys, tmp_path
):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "hi", "continuation": "you"}\n')
    words = ["batch", source, "-o", output, *BASE, "--num-blocks", "60", "--max-tokens", "2"]
    for _ in range(2):  # the second time it is the same job
        with pytest.raises(SystemExit) as stop:
            command(*words, *flags)
        assert stop.value.code == 0
        assert (NOTE in capsys.readouterr().err) is said
    assert json.loads((tmp_path / "out.jsonl.job").read_text())["raw"] is raw


def test_chat_says_that_a_base_model_was_not_trained_for_it(monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    monkeypatch.setattr(sys, "stderr", shown)
    cli.main(["chat", *BASE])
    assert "d4, step 2205, a base model that was not trained to chat: con" in shown.getvalue()


# a job's last line --------------------------------------------------------------------------------


def test_the_last_line_of_a_job_counts_what_is_in_which_file(capsys, monkeypatch, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = ['{"prompt": "a"}', '{"prompt": 3}', "no json", '{"prompt": "b"}', '{"prompt": "c"}']
    source.write_text("\n".join(rows))

    def last_line() -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main(["batch", str(source), "-o", str(output), *SMALL, "--max-tokens", "3"])
        assert stop.value.code == 1
        return capsys.readouterr().err.splitlines()[-1]

    told = f"3 of 5 rows answered in {output}"
    bad = f"; 2 bad, see {output}.errors"
    assert last_line().startswith(f"{told}{bad}; ")
    assert len(output.read_text().splitlines()) == 3
    assert last_line() == f"{told}, 3 of them in earlier runs{bad}"  # no tokens, no rate
    output.write_text("".join(output.read_text().splitlines(True)[:1]))
    assert last_line().startswith(f"{told}, 1 of them in earlier runs{bad}; ")


# Ctrl-C -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 0.6, 1.0, 1.6])
@pytest.mark.parametrize(
    "words",
    [["microvllm", "run", "--ignore-eos", "--max-tokens", "900", *SMALL[:1], "60", "hi"],
     ["microvllm", "info"], ["microvllm", "lab", "policies"], ["lab", "policies"]],
    ids=lambda words: " ".join(words[:2]),
)  # fmt: skip
def test_ctrl_c_at_any_moment_leaves_no_traceback(words, seconds):
    child = subprocess.Popen(
        [sys.executable, "-m", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    time.sleep(seconds)
    is_done = child.poll() is not None  # `info` takes little more than a second where all is idle
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    # -2: Python itself was about to end, and does so by the signal
    assert child.returncode in ((0,) if is_done else (130, -2)) and err == b""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [("microvllm.cli.flags", "microvllm run hi"), ("torch", "microvllm run hi"),
     ("torch", "microvllm info"), ("numpy", "lab fig12"), ("numba", "microvllm run hi")],
)  # fmt: skip
def test_ctrl_c_is_not_lost_in_an_import_that_swallows_it(name, words, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Pressed:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {name!r}:\n"
        "            try:\n"
        "                os.kill(os.getpid(), signal.SIGINT)\n"
        "            except KeyboardInterrupt:\n"
        "                if not name[:1] in 'nt': raise\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Pressed())\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", *words.split()], cwd=ROOT, capture_output=True, timeout=60,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{SRC}"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
