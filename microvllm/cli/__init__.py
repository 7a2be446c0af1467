"""The `microvllm` command: run, chat, batch, bench, score, info, trace, lab.

A user's mistake is one line and exit status 2. torch takes seconds to import, so that is done where
it is needed, once the flags make sense.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from . import bench as speed
from . import terminal
from .terminal import Parser, execute, positive, user_errors

if TYPE_CHECKING:
    from .. import LLM, SamplingParams

MODEL_DIR = speed.MODELS / "oldbooks-d6"
CHECKPOINT = "a directory, sft, base:d20, rl:d20:650, or owner/name on the hub"


# flags --------------------------------------------------------------------------------------------


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


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The SamplingParams that the flags describe."""
    from .. import SamplingParams

    with user_errors(args):
        return SamplingParams(**sampling_options(args))


def sampling_options(args: argparse.Namespace) -> dict[str, object]:
    names = "max_tokens temperature top_k top_p min_p repetition_penalty stop ignore_eos n".split()
    return {k: v for k, v in vars(args).items() if k in names and v is not None}


def overrides(args: argparse.Namespace) -> dict[str, object]:
    """--recipe softcap=20 as {"softcap": 20}."""
    try:
        pairs = [item.split("=") for item in args.recipe]
        return {name: json.loads(value.lower()) for name, value in pairs}
    except ValueError:
        raise ValueError(f"--recipe wants NAME=VALUE, got {' '.join(args.recipe)!r}") from None


def model_name(args: argparse.Namespace) -> str:
    """The checkpoint that is asked for, by default the bundled one."""
    if args.model is None and not MODEL_DIR.is_dir():
        raise ValueError("name a model, such as sft or owner/name: none came with this install")
    return args.model or str(MODEL_DIR)


def load(args: argparse.Namespace) -> LLM:
    """The engine that the flags describe."""
    from .. import LLM

    with user_errors(args):
        return LLM(**engine_options(args))


def engine_options(args: argparse.Namespace) -> dict[str, object]:
    """The arguments of LLM that the flags describe."""
    seed = getattr(args, "seed", 0)
    return dict(
        model_path=model_name(args),
        step=args.step,
        tokenizer_path=args.tokenizer_dir,
        device=args.device,
        num_blocks=args.num_blocks,
        max_batch_size=args.max_batch_size,
        dtype=args.dtype,
        quantization=args.quantization,
        deterministic=args.deterministic,
        max_model_len=args.max_model_len,
        seed=random.getrandbits(31) if seed is None else seed,
        prompt_lookup=args.prompt_lookup,
        tensor_parallel=args.tensor_parallel,
        trace=args.trace,
        **overrides(args),
    )


def encode(llm: LLM, prompts: list[str], raw: bool) -> list[str] | list[list[int]]:
    """Each prompt as the user's turn of a conversation, or as it is: raw, or no chat tokens."""
    if raw or not llm.tokenizer.has_chat:
        return prompts
    render = llm.tokenizer.render_for_completion
    return [render([{"role": "user", "content": prompt}]) for prompt in prompts]


def check_watch(args: argparse.Namespace) -> None:
    """Refuse --watch where it cannot draw, before a model is loaded."""
    if args.watch and not find_spec("rich"):
        args.error("--watch draws with rich: pip install 'microvllm[watch]'")


def watched(args: argparse.Namespace, llm: LLM) -> AbstractContextManager:
    """With --watch, a picture of the engine while it works."""
    if not args.watch:
        return nullcontext()
    from ..trace import watching

    return watching(llm)


# commands -----------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Answer prompts; a single one is seen while it is written."""
    with user_errors(args):
        texts = args.prompts + args.prompt
        if not texts and not sys.stdin.isatty():
            texts = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
        if not texts:
            raise ValueError("no prompt: give one, or pipe some in, one a line")
    check_watch(args)
    params = sampling_params(args)
    with load(args) as llm:
        if len(texts) > 1 or params.n > 1 or args.json or args.watch:
            summary = answer(args, llm, texts, params)
            if sys.stderr.isatty():
                terminal.note(summary)
            return
        chat = llm.tokenizer.has_chat and not args.raw
        # a completion goes on where its prompt stops
        lead = texts[0] if not chat and sys.stdout.isatty() else ""
        with user_errors(args, llm):
            prompt = encode(llm, texts, args.raw)[0]
            found = terminal.live(llm, prompt, params, tools=chat, lead=lead)
        if found["finish_reason"] == "abort":
            raise KeyboardInterrupt


def answer(args: argparse.Namespace, llm: LLM, texts: list[str], params: SamplingParams) -> str:
    """Answer prompts all at once and print what came of them; returns a line about the speed."""
    chat = llm.tokenizer.has_chat and not args.raw
    with user_errors(args, llm):
        prompts = encode(llm, texts, args.raw)
        start = time.perf_counter()
        with watched(args, llm):
            outputs = llm.generate(prompts, params, not args.watch, tools=chat)
    seconds = time.perf_counter() - start
    count = terminal.show_all(llm, texts, outputs, params, chat, args.json)
    rate = speed.rate(count, seconds)
    guesses = speed.guesses(llm.stats())
    return f"{len(texts)} prompts, {count} tokens in {seconds:.2f} s: {rate:.0f} tokens/s{guesses}"


def chat(args: argparse.Namespace) -> None:
    """Hold a conversation."""
    params = sampling_params(args)
    args.max_batch_size = args.max_batch_size or 1  # no more cache than one conversation can fill
    with load(args) as llm:
        if not llm.tokenizer.has_chat:
            args.error("the tokenizer has no chat tokens: `microvllm run` completes plain text")
        terminal.converse(llm, params, args.json)


def batch(args: argparse.Namespace) -> None:
    """Answer the rows of a file, one engine or many; started again, it goes on where it was."""
    from ..checkpoint import find_checkpoint
    from ..jobs.batch import Ask, Job, answer, carry_out

    sampling_params(args)
    with user_errors(args):
        args.model, args.step = find_checkpoint(model_name(args), args.step)
        columns = {k: v for k, v in vars(args).items() if k.endswith("_column")}
        ask = Ask(args.task, args.raw, sampling_options(args), args.seed, **columns)
        options = engine_options(args) | {"model_path": str(args.model)}
        if args.tensor_parallel > 1:
            raise ValueError("--tensor-parallel is not for batch, whose file one process writes")
        if args.ray is not None and args.trace:
            raise ValueError("--trace is for one engine: give it without --ray")
        if args.ray is None and (args.replicas, args.gpus_per_replica) != (1, 0):
            raise ValueError("--replicas and --gpus-per-replica are for --ray: give it too")
        names = ["model_path", "step", "tokenizer_path", "dtype", "quantization", "deterministic"]
        settings = {k: options[k] for k in [*names, "max_model_len"]} | overrides(args) | vars(ask)
        job = Job(args.input, args.output, ask, settings)
    with ExitStack() as stack:
        llm = None
        if job.num_done == job.num_rows:
            outcomes = iter(())
        elif args.ray is None:
            llm = stack.enter_context(load(args))
            outcomes = answer(llm, job.pending(), ask)
        else:
            from ..jobs.ray import answer_on_ray

            where = {"address": args.ray, "replicas": args.replicas, "gpus": args.gpus_per_replica}
            outcomes = answer_on_ray(job, options, **where)
        try:
            with user_errors(args, llm):
                found = carry_out(job, outcomes, args.ordered)
        except OSError as error:
            args.error(f"{error}; the same command goes on from here")
    if args.json:
        print(json.dumps(found))
    elif found["bad"] or sys.stderr.isatty():
        rate = speed.rate(found["new_tokens"], found["seconds"])
        bad = f", {found['bad']} of them bad: see {job.errors}" if found["bad"] else ""
        terminal.note(f"{found['rows']} rows in {job.output}{bad}; {rate:.0f} tokens/s")
    sys.exit(1 if found["bad"] else 0)


def bench(args: argparse.Namespace) -> None:
    """Throughput, on texts or on random tokens."""
    check_watch(args)
    length, shared = args.random_input_len, args.shared_prefix
    at_random = bool(length or shared or args.random_output_len)
    if at_random:
        length = length or 256
        args.max_tokens, args.ignore_eos = args.random_output_len or args.max_tokens, True
        what = f"{args.num_prompts} prompts of {length} random tokens behind a prefix of {shared}"
    else:
        with user_errors(args):
            prompts, source = speed.find_prompts(args.prompts_file, args.num_prompts)
        what = f"{len(prompts)} prompts from {source}"
    if not args.json:
        print(what, flush=True)
    params = sampling_params(args)
    with load(args) as llm:
        if at_random:
            vocabulary = llm.tokenizer.num_ordinary
            prompts = speed.random_prompts(args.num_prompts, length, shared, vocabulary, args.seed)
        with user_errors(args, llm):
            prompts = prompts if at_random else encode(llm, prompts, args.raw)
            start = time.perf_counter()
            with watched(args, llm):
                outputs = llm.generate(prompts, params, not args.watch)
        found = speed.results(outputs, time.perf_counter() - start, llm.stats())
    if not args.json:
        print(speed.report(found))
    print(json.dumps(found))


def score(args: argparse.Namespace) -> None:
    """Rank continuations by the log-probability that the model gives them."""
    with user_errors(args):
        if bool(args.file) == (len(args.texts) > 1):
            raise ValueError("give PROMPT CONTINUATION..., or --file")
        given = [{"prompt": "".join(args.texts[:1]), "continuations": args.texts[1:]}]
        rows = speed.read_rows(args.file) if args.file else given
        speed.check_choices(rows, args.file or "the command line")
    with load(args) as llm:
        pairs = [(row["prompt"], tail) for row in rows for tail in row["continuations"]]
        with user_errors(args, llm):
            prompts = encode(llm, [prompt for prompt, _ in pairs], args.raw)
            found = iter(llm.score(prompts, [tail for _, tail in pairs]))
    for row in rows:
        ranked = []
        for tail in row["continuations"]:
            logprobs = next(found)
            total, mean = sum(logprobs), sum(logprobs) / len(logprobs)
            ranked.append({"text": tail, "total": total, "per_token": mean, "logprobs": logprobs})
        ranked.sort(key=lambda r: -r["total"])
        if args.json:
            print(json.dumps({"prompt": row["prompt"], "continuations": ranked}))
        else:
            terminal.show_ranking(row["prompt"], ranked)


def info(args: argparse.Namespace) -> None:
    """What a checkpoint is and takes, without loading it: its files are mapped."""
    from ..checkpoint import find_checkpoint, pick_device, read_checkpoint

    with user_errors(args):
        device = pick_device(args.device)
        directory, step = find_checkpoint(model_name(args), args.step)
        config, recipe, weights = read_checkpoint(directory, step)
        recipe = recipe.override(**overrides(args))
    found = {"checkpoint": str(directory), "step": step}
    found |= speed.describe(config, recipe, weights, device, args.dtype)
    print(json.dumps(found) if args.json else speed.description(found))


def lab(args: argparse.Namespace) -> None:
    """Run a program of lab/, which a checkout has and an installed package has not."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "lab" / "__main__.py").is_file():
        args.error(
            "the lab is not in this install: clone the project, and `pip install -e .` there"
        )
    sys.path.insert(0, str(root))
    from lab.__main__ import main

    main(args.words)


def trace(args: argparse.Namespace) -> None:
    """Turn a trace into a web page, or into Chrome's format."""
    from ..trace import read, write_chrome, write_page

    with user_errors(args):
        events = read(args.file)
        page = args.output or (None if args.chrome else Path(args.file).with_suffix(".html"))
        if page:
            write_page(events, page)
        if args.chrome:
            write_chrome(events, args.chrome)
    kinds = [event["e"] for event in events]
    found = {"events": len(events), "steps": kinds.count("begin")}
    found["files"] = [str(path) for path in (page, args.chrome) if path]
    told = f"{found['steps']:,} steps, {found['events']:,} events: {' and '.join(found['files'])}"
    print(json.dumps(found) if args.json else told)


# the command line ---------------------------------------------------------------------------------


def make_parser() -> Parser:
    """The parser of the whole command."""
    what = "Inference for nanochat models."
    parser = Parser(prog="microvllm", description=what, epilog="examples:\n")
    parser.add_argument("--version", action="version", version=f"microvllm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(work: Callable, what: str, *examples: str) -> tuple[Parser, Callable]:
        lines = [f"  microvllm {work.__name__} {example}".rstrip() + "\n" for example in examples]
        parser.epilog += lines[0]
        epilog = "examples:\n" + "".join(lines)
        sub = commands.add_parser(work.__name__, help=what, description=what, epilog=epilog)
        if work is not lab:  # whose programs have flags of their own
            sub.add_argument("--json", action="store_true", help="for machines: an object a line")
        sub.set_defaults(command=work)
        return sub, sub.add_argument

    sub, add = command(
        run,
        "answer prompts, many at once",
        '"Who wrote Moby Dick?"',
        '-m sft --temperature 0 "What is 7+8?" "Name a book by Jane Austen."',
        '--raw --max-tokens 40 "It was a dark and stormy night, and"',
        "--json < questions.txt > answers.jsonl",
    )
    add("prompts", nargs="*", default=[], metavar="PROMPT", help="(the lines of what is piped in)")
    add("--prompt", action="append", default=[], metavar="PROMPT", help="may be repeated")
    add("-n", type=positive, default=1, metavar="N", help="answers to each prompt (%(default)s)")
    engine_flags(sub)
    lookup_flag(sub)
    watch_flag(sub)
    sampling_flags(sub, max_tokens=128, temperature=0.8, top_k=50)

    sub, _ = command(chat, "talk to a model", "", "-m rl:d20:650 --temperature 0.9")
    engine_flags(sub, raw=False)
    lookup_flag(sub)
    sampling_flags(sub, max_tokens=256, temperature=0.6, top_k=50, seed=None)

    sub, add = command(
        batch,
        "answer a file of prompts; killed and started again, it goes on where it was",
        'prompts.jsonl -o answers.jsonl    # each {"prompt": "..."}, or with "id" and "params"',
        "prompts.parquet -o answers.parquet --prompt-column question --ordered --temperature 0",
        "pairs.jsonl -o scores.jsonl --task score",
        "prompts.jsonl -o answers.jsonl --ray --replicas 2 --gpus-per-replica 1",
    )
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

    sub, add = command(
        bench,
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

    sub, add = command(
        score,
        "rank continuations of a prompt by their log-probability",
        '"Who wrote Emma?" "Emma was written by Jane Austen." "Emma was written by Mark Twain."',
        '--raw "The capital of France is" " Paris" " London"',
        '--file rows.jsonl    # each {"prompt": "...", "continuations": ["...", ...]}',
    )
    add("texts", nargs="*", metavar="PROMPT CONTINUATION", help="a prompt and what may follow it")
    add("--file", metavar="FILE", help="such rows, in .jsonl, .json or .parquet")
    engine_flags(sub)

    sub, add = command(
        info, "say what a checkpoint is and takes", "", "base:d20", "owner/name --json"
    )
    add("model", nargs="?", metavar="CHECKPOINT", help=f"{CHECKPOINT} (the bundled model)")
    checkpoint_flags(sub)

    what = "see what a paged KV cache does: the paper's figures, policies, exercises"
    sub, add = command(lab, what, "", "fig12 --help")
    add("words", nargs=argparse.REMAINDER, metavar="NAME", help="a program (a list of them)")

    sub, add = command(
        trace,
        "turn a trace into a web page that replays every block",
        "run.jsonl -o run.html",
        "run.jsonl --chrome run.json    # for ui.perfetto.dev",
    )
    add("file", metavar="FILE", help="what --trace FILE wrote")
    add("-o", "--output", metavar="PAGE", help="the page (FILE with .html at its end)")
    add("--chrome", metavar="FILE", help="Chrome's trace format, in place of the page or beside it")
    return parser


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


def main(argv: list[str] | None = None) -> None:
    """The console script."""
    execute(make_parser().parse_args(argv))
