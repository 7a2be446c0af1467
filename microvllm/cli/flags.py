"""The command line's parsers: what each command is called, takes and shows as examples."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from .. import __version__
from . import commands
from .terminal import Parser, positive

CHECKPOINT = "a directory, sft, base:d20, rl:d20:650, or owner/name on the hub"


def make_parser() -> Parser:
    """The parser of the whole command."""
    what = "Inference for nanochat models."
    parser = Parser(prog="microvllm", description=what, epilog="examples:\n")
    parser.add_argument("--version", action="version", version=f"microvllm {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(work: Callable, what: str, *examples: str) -> Parser:
        """The parser of a command, which `work` carries out. Its first example is the whole's."""
        lines = [f"  microvllm {work.__name__} {example}".rstrip() + "\n" for example in examples]
        parser.epilog += lines[0]
        epilog = "examples:\n" + "".join(lines)
        sub = subparsers.add_parser(work.__name__, help=what, description=what, epilog=epilog)
        if work is not commands.lab:  # whose programs have flags of their own
            sub.add_argument("--json", action="store_true", help="for machines: an object a line")
        sub.set_defaults(command=work)
        return sub

    for add in (add_run, add_chat, add_batch, add_bench, add_score, add_info, add_lab, add_trace):
        add(command)
    return parser


def add_run(command: Callable) -> None:
    sub = command(
        commands.run,
        "answer prompts, many at once",
        '"Who wrote Moby Dick?"',
        '-m sft --temperature 0 "What is 7+8?" "Name a book by Jane Austen."',
        '--raw --max-tokens 40 "It was a dark and stormy night, and"',
        "--json < questions.txt > answers.jsonl",
    )
    add = sub.add_argument
    add("prompts", nargs="*", default=[], metavar="PROMPT", help="(the lines of what is piped in)")
    add("--prompt", action="append", default=[], metavar="PROMPT", help="may be repeated")
    add("-n", type=positive, default=1, metavar="N", help="answers to each prompt (%(default)s)")
    engine_flags(sub)
    lookup_flag(sub)
    watch_flag(sub)
    sampling_flags(sub, max_tokens=128, temperature=0.8, top_k=50)


def add_chat(command: Callable) -> None:
    sub = command(commands.chat, "talk to a model", "", "-m rl:d20:650 --temperature 0.9")
    engine_flags(sub, raw=False)
    lookup_flag(sub)
    sampling_flags(sub, max_tokens=256, temperature=0.6, top_k=50, seed=None)


def add_batch(command: Callable) -> None:
    sub = command(
        commands.batch,
        "answer a file of prompts; killed and started again, it goes on where it was",
        'prompts.jsonl -o answers.jsonl    # each {"prompt": "..."}, or with "id" and "params"',
        "prompts.parquet -o answers.parquet --prompt-column question --ordered --temperature 0",
        "pairs.jsonl -o scores.jsonl --task score",
        "prompts.jsonl -o answers.jsonl --ray --replicas 2 --gpus-per-replica 1",
    )
    add = sub.add_argument
    add("input", metavar="INPUT", help="rows, in .jsonl or .parquet")
    what = "what becomes of them, in either; bad rows go to OUTPUT.errors (then exit status 1)"
    add("-o", "--output", required=True, metavar="OUTPUT", help=what)
    add("--ordered", action="store_true", help="in the input's order (as they are done)")
    add("-n", type=positive, default=1, metavar="N", help="answers to each prompt (%(default)s)")
    add = sub.add_argument_group("rows").add_argument
    what = "(chat where the model can, else completion)"
    add("--task", choices=["chat", "completion", "score"], help=what)
    what = "a text, token ids, or for chat a list of messages (%(default)s)"
    add("--prompt-column", default="prompt", metavar="NAME", help=what)
    what = "a text or integer that no other row has (id where there is one, else the line)"
    add("--id-column", metavar="NAME", help=what)
    what = "an object of sampling parameters, in place of the flags' (%(default)s)"
    add("--params-column", default="params", metavar="NAME", help=what)
    what = "for score: a text, or a list of them (%(default)s)"
    add("--continuation-column", default="continuation", metavar="NAME", help=what)
    add = sub.add_argument_group("many machines").add_argument
    what = "on Ray: the cluster at ADDRESS (the one that runs, else a new one here)"
    add("--ray", nargs="?", const="", metavar="ADDRESS", help=what)
    add("--replicas", type=positive, default=1, metavar="N", help="engines (%(default)s)")
    what = "of each engine, may be a part of one (%(default)s)"
    add("--gpus-per-replica", type=float, default=0, metavar="N", help=what)
    engine_flags(sub)
    sampling_flags(sub, max_tokens=128, temperature=0.8, top_k=50)


def add_bench(command: Callable) -> None:
    sub = command(
        commands.bench,
        "measure tokens per second",
        "--num-prompts 64",
        "--random-input-len 512 --random-output-len 128 --num-prompts 64",
        "--shared-prefix 384 --random-input-len 64 --num-prompts 64",
    )
    bench_flags(sub)
    add = sub.add_argument_group("random workload, in place of texts").add_argument
    add("--random-input-len", type=positive, metavar="N", help="tokens of each prompt (256)")
    add("--random-output-len", type=positive, metavar="N", help="new tokens, exactly so many")
    shared = "tokens in front of them, the same for all prompts (%(default)s)"
    add("--shared-prefix", type=positive, default=0, metavar="N", help=shared)


def add_score(command: Callable) -> None:
    sub = command(
        commands.score,
        "rank continuations of a prompt by their log-probability",
        '"Who wrote Emma?" "Emma was written by Jane Austen." "Emma was written by Mark Twain."',
        '--raw "The capital of France is" " Paris" " London"',
        '--file rows.jsonl    # each {"prompt": "...", "continuations": ["...", ...]}',
    )
    what = "a prompt and what may follow it"
    sub.add_argument("texts", nargs="*", metavar="PROMPT CONTINUATION", help=what)
    what = "such rows, in .jsonl, .json or .parquet"
    sub.add_argument("--file", metavar="FILE", help=what)
    engine_flags(sub)


def add_info(command: Callable) -> None:
    examples = "", "base:d20", "owner/name --json"
    sub = command(commands.info, "say what a checkpoint is and takes", *examples)
    what = f"{CHECKPOINT} (the bundled model)"
    sub.add_argument("model", nargs="?", metavar="CHECKPOINT", help=what)
    checkpoint_flags(sub)


def add_lab(command: Callable) -> None:
    what = "see what a paged KV cache does: the paper's figures, policies, exercises"
    sub = command(commands.lab, what, "", "fig12 --help")
    what = "a program (a list of them)"
    sub.add_argument("words", nargs=argparse.REMAINDER, metavar="NAME", help=what)


def add_trace(command: Callable) -> None:
    sub = command(
        commands.trace,
        "turn a trace into a web page that replays every block",
        "run.jsonl -o run.html",
        "run.jsonl --chrome run.json    # for ui.perfetto.dev",
    )
    add = sub.add_argument
    add("file", metavar="FILE", help="what --trace FILE wrote")
    add("-o", "--output", metavar="PAGE", help="the page (FILE with .html at its end)")
    add("--chrome", metavar="FILE", help="Chrome's trace format, in place of the page or beside it")


# flags that commands share ------------------------------------------------------------------------


def checkpoint_flags(parser: Parser) -> Callable:
    """How to read and where to run a checkpoint; returns what adds to this group of flags."""
    add = parser.add_argument_group("model").add_argument
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--step", type=int, metavar="N", help="training step of the checkpoint (the last one)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (%(default)s)")
    add("--dtype", default="auto", choices=dtypes, help="(bfloat16 on CUDA, else float32)")
    tell = "a constant that the weights cannot tell, such as softcap=20; may be repeated"
    add("--recipe", action="append", default=[], metavar="NAME=VALUE", help=tell)
    return add


def engine_flags(parser: Parser, raw: bool = True) -> None:
    """What makes an engine; raw: and whether its prompts are plain text."""
    add = checkpoint_flags(parser)
    where = f"{CHECKPOINT} (the bundled model)"
    add("-m", "--model", "--model-dir", dest="model", metavar="CHECKPOINT", help=where)
    add("--tokenizer-dir", metavar="DIR", help="where tokenizer.pkl is (beside the model)")
    add("--quantization", choices=["int8", "fp8"], help="of matrices: int8 on a CPU, fp8 on a GPU")
    add("--num-blocks", type=int, metavar="N", help="blocks of the KV cache (what memory allows)")
    add("--max-batch-size", type=int, metavar="N", help="sequences that run at once, at most")
    add("--max-model-len", type=int, metavar="N", help="prompt plus answer (the context)")
    same = "the same bits alone or in a batch, cold or warm; slower"
    add("--deterministic", action="store_true", help=same)
    among = "share the model among N processes that torchrun started (%(default)s)"
    add("--tensor-parallel", type=positive, default=1, metavar="N", help=among)
    told = "write down what happens to every block; `microvllm trace FILE` shows it"
    add("--trace", metavar="FILE", help=told)
    parser.set_defaults(watch=False, prompt_lookup=0)
    if raw:
        add("--raw", action="store_true", help="plain text, also where the model can chat")


def sampling_flags(parser: Parser, max_tokens: int, temperature: float, top_k: int, seed=0) -> None:
    """What makes SamplingParams; seed None: a random one."""
    add = parser.add_argument_group("sampling").add_argument
    add("--max-tokens", type=int, default=max_tokens, metavar="N", help="at most (%(default)s)")
    greedy = "0: the likeliest always (%(default)s)"
    add("--temperature", type=float, default=temperature, metavar="T", help=greedy)
    add("--top-k", type=int, default=top_k, metavar="K", help="the likeliest, 0: all (%(default)s)")
    add("--top-p", type=float, metavar="P", help="the likeliest that sum to this probability")
    add("--min-p", type=float, metavar="P", help="those this likely, as a share of the likeliest")
    add("--repetition-penalty", type=float, metavar="X", help="above 1: repeat less")
    add("--stop", action="append", metavar="TEXT", help="end before it; may be repeated")
    add("--ignore-eos", action="store_true", help="go on past the end of an answer")
    what = "the same seed gives the same answers " + ("(%(default)s)" if seed == 0 else "(random)")
    add("--seed", type=int, default=seed, metavar="N", help=what)


def bench_flags(parser: Parser) -> None:
    """What test_alpaca.py takes."""
    add = parser.add_argument
    add("--num-prompts", type=positive, default=512, metavar="N", help="at most (%(default)s)")
    where = ".json, .jsonl or .parquet (Alpaca's data set if it can be had, else the bundled one)"
    add("--prompts-file", metavar="FILE", help=where)
    parser.set_defaults(random_input_len=None, random_output_len=None, shared_prefix=0, json=False)
    engine_flags(parser)
    lookup_flag(parser)
    watch_flag(parser)
    sampling_flags(parser, max_tokens=64, temperature=0.7, top_k=0)


def lookup_flag(parser: Parser) -> None:
    what = "guess up to N tokens a step from the text so far: the same answer, sooner (%(default)s)"
    parser.add_argument("--prompt-lookup", type=int, default=0, metavar="N", help=what)


def watch_flag(parser: Parser) -> None:
    parser.add_argument(
        "--watch", action="store_true", help="draw the blocks and the queue (microvllm[watch])"
    )
