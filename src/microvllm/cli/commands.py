"""The work of each command, and the conversion of its flags into arguments."""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..environment import REINSTALL, how_to_install
from . import bench as speed
from . import policies, roofline, terminal
from .conversation import converse
from .learn import learn  # noqa: F401, a command that has its own file

if TYPE_CHECKING:
    from .. import LLM, SamplingParams

MODEL_DIR = speed.MODELS / "oldbooks-d6"


def engine() -> tuple[type[LLM], type[SamplingParams]]:
    """Import the engine. This takes seconds, mainly for torch."""
    with terminal.at_once():
        from .. import LLM, SamplingParams
    return LLM, SamplingParams


def sampling_options(args: argparse.Namespace) -> dict[str, object]:
    """The arguments of SamplingParams that the flags set, except the seed."""
    names = "max_tokens temperature top_k top_p min_p repetition_penalty stop ignore_eos n".split()
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    if args.guide:
        try:
            given["guide"] = json.loads(Path(args.guide).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"--guide {args.guide}: not JSON: {error}") from None
    return given


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The SamplingParams that the flags describe."""
    _, params_class = engine()
    return params_class(**sampling_options(args))


def overrides(args: argparse.Namespace) -> dict[str, object]:
    """--recipe softcap=20 as {"softcap": 20}."""
    try:
        pairs = [item.split("=") for item in args.recipe]
        found = {name: json.loads(value.lower()) for name, value in pairs}
    except ValueError:
        raise ValueError(f"--recipe needs NAME=VALUE, got {' '.join(args.recipe)!r}") from None
    from ..features.checks import CONSTANTS, check_names

    check_names(found, CONSTANTS)
    return found


def use_threads(args: argparse.Namespace) -> None:
    """Set the number of torch's threads in this process to --threads."""
    if args.threads is not None:
        import torch

        from ..features.checks import check_threads

        check_threads("--threads", args.threads)
        torch.set_num_threads(args.threads)


def model_name(args: argparse.Namespace) -> str:
    """The checkpoint of --model, by default the bundled one."""
    if args.model is None and not MODEL_DIR.is_dir():
        raise ValueError("name a model, such as sft or owner/name: this install has no bundled one")
    return args.model or str(MODEL_DIR)


def engine_options(args: argparse.Namespace) -> dict[str, object]:
    """The arguments of LLM that the flags describe."""
    names = "step device num_blocks max_batch_size dtype quantization deterministic max_model_len"
    names += " max_batched_tokens prompt_lookup tensor_parallel trace kv_cache_dtype"
    names += " trust_tokenizer"
    given = {name: getattr(args, name) for name in names.split()}
    given["num_threads"] = args.threads
    given |= {"model_path": model_name(args), "tokenizer_path": args.tokenizer_dir}
    seed = getattr(args, "seed", 0)
    given["seed"] = random.getrandbits(31) if seed is None else seed
    asked = {kind: name for kind in policies.KINDS if (name := getattr(args, kind, None))}
    given |= {kind: policies.find_policy(kind, name) for kind, name in asked.items()}
    return dict(**given, **overrides(args))


def settle(args: argparse.Namespace) -> str:
    """Find the checkpoint, and decide whether prompts are plain text: they are with --raw, and for
    a base model unless the flags say otherwise. Returns a note for the user if the model decided,
    else ""."""
    if getattr(args, "raw", False) and args.chat:
        raise ValueError("--raw and --chat exclude each other: give one of them")
    from ..sources.places import find_checkpoint, is_base

    name = model_name(args)
    directory, args.step = find_checkpoint(name, args.step)
    args.model = str(directory)
    args.base = is_base(directory, args.step)
    if "raw" not in args or args.raw or args.chat or not args.base:
        return ""
    if getattr(args, "task", None) in ("chat", "completion"):
        return ""
    args.raw = True
    base = f"({name} is a base model: it completes plain text, as with --raw"
    return f"{base}; --chat sends chat messages)"


@contextmanager
def starting(args: argparse.Namespace, patient: bool = True) -> Iterator[None]:
    """Find the checkpoint, then run the body, which makes an engine of these flags. Ctrl-C ends the
    process at once during both. patient: wait for the compilation of kernels; otherwise the first
    tokens come sooner, from plain PyTorch."""
    engine()
    note = settle(args)
    from ..loading import has_numba

    with ExitStack() as stack:
        stack.enter_context(terminal.at_once())  # before numba is imported
        if has_numba():
            from ..cpu import compilation

            stack.enter_context(compilation.reporting(terminal.note, patient))
        yield
    if note:
        terminal.note(note)


def started(args: argparse.Namespace, llm: LLM) -> None:
    """Note that the engine exists: an error after its first prompt is a bug, so its traceback is
    shown."""
    args.begun = lambda: speed.counters(llm)["prompt_tokens"]
    if getattr(args, "chat", False) and not llm.tokenizer.has_chat:
        raise ValueError("--chat: the tokenizer has no chat tokens")


def load(args: argparse.Namespace, patient: bool = True) -> LLM:
    """Make the engine that the flags describe. patient: see `starting`."""
    with starting(args, patient):
        build, _ = engine()
        llm = build(**engine_options(args))
    started(args, llm)
    return llm


def chats(llm: LLM, raw: bool) -> bool:
    """Is a prompt a user's turn of a conversation, rather than plain text?"""
    return llm.tokenizer.has_chat and not raw


def encode(llm: LLM, prompts: list[str], raw: bool) -> list[str] | list[list[int]]:
    """Each prompt as a user's turn of a conversation, or unchanged: see `chats`."""
    if not chats(llm, raw):
        return prompts
    render = llm.tokenizer.render_for_completion
    return [render([{"role": "user", "content": prompt}]) for prompt in prompts]


def check_watch(args: argparse.Namespace) -> None:
    """Raise ValueError before a model is loaded if --watch cannot draw."""
    if args.watch and not find_spec("rich"):
        raise ValueError(f"--watch draws with rich: {how_to_install('watch')}")


@contextmanager
def watched(args: argparse.Namespace, llm: LLM) -> Iterator[None]:
    """Draw a picture of the engine while the body runs, if --watch was given."""
    if not args.watch:
        yield
        return
    from ..trace import watching

    with watching(llm):
        yield


def generate(args: argparse.Namespace, llm: LLM, prompts: list, params: SamplingParams, **options):
    """Generate; returns (outputs of the prompts, seconds)."""
    start = time.perf_counter()
    with watched(args, llm):
        outputs = llm.generate(prompts, params, not args.watch, **options)
    return outputs, time.perf_counter() - start


# commands -----------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Answer prompts. The answer to a single prompt is streamed."""
    texts = args.prompts + args.prompt
    if not texts and not sys.stdin.isatty():
        texts = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise ValueError("no prompt: give one, or pipe in one per line")
    for number, text in enumerate(texts, 1):
        if not text.strip() and not args.raw:
            raise ValueError(f"prompt {number} is empty: give a text (--raw allows an empty one)")
    check_watch(args)
    params = sampling_params(args)
    with load(args, patient=False) as llm:
        if len(texts) > 1 or params.n > 1 or args.json or args.watch:
            summary = answer(args, llm, texts, params)
            if sys.stderr.isatty():
                terminal.note(summary)
            return
        turn = chats(llm, args.raw)
        # a completion continues the text of its prompt, so both are printed
        lead = texts[0] if not turn and sys.stdout.isatty() else ""
        (prompt,) = encode(llm, texts, args.raw)
        found = terminal.live(llm, prompt, params, chat=turn, lead=lead)
        if found["finish_reason"] == "abort":
            raise KeyboardInterrupt


def answer(args: argparse.Namespace, llm: LLM, texts: list[str], params: SamplingParams) -> str:
    """Answer all prompts in one batch and print the outputs; returns a line about the speed."""
    turns, prompts = chats(llm, args.raw), encode(llm, texts, args.raw)
    outputs, seconds = generate(args, llm, prompts, params, tools=turns)
    count = terminal.show_all(texts, outputs, params, turns, args.json)
    rate = speed.rate(count, seconds)
    drafts = speed.drafts(speed.counters(llm))
    return f"{len(texts)} prompts, {count} tokens in {seconds:.2f} s: {rate:.0f} tokens/s{drafts}"


def chat(args: argparse.Namespace) -> None:
    """Hold a conversation."""
    name = model_name(args)
    name = Path(name).absolute().name if Path(name).exists() else name
    if sys.stdin.isatty():
        terminal.note(f"loading {name} ...")
    params = sampling_params(args)
    # no more cache than one conversation can fill. where layers have windows, a prompt that takes
    # several steps needs up to twice the blocks that its sequence keeps
    args.max_batch_size = args.max_batch_size or 2
    with load(args, patient=False) as llm:
        if not chats(llm, raw=False):
            remedy = "`microvllm run` completes plain text"
            raise ValueError(f"the tokenizer has no chat tokens: {remedy}")
        step = "" if args.step is None else f", step {args.step}"
        base = ", a base model that was not trained to chat" if args.base else ""
        converse(llm, params, args.json, f"{name}{step}{base}")


def batch(args: argparse.Namespace) -> None:
    """Answer the rows of a file with one engine or several. A rerun resumes the job."""
    sampling_params(args)  # raises ValueError for values that no row may have
    from ..jobs import Ask, Job, answer, carry_out

    told = settle(args)
    columns = {k: v for k, v in vars(args).items() if k.endswith("_column")}
    ask = Ask(args.task, args.raw, sampling_options(args), args.seed, **columns)
    options = engine_options(args)
    if args.tensor_parallel > 1:
        raise ValueError("--tensor-parallel does not work with batch: leave it out")
    if args.ray is not None and args.trace:
        raise ValueError("--trace records one engine: give it without --ray")
    if args.ray is None and (args.replicas, args.gpus_per_replica) != (1, 0):
        raise ValueError("--replicas and --gpus-per-replica need --ray: add it")
    names = "model_path step tokenizer_path dtype quantization deterministic max_model_len".split()
    settings = {name: options[name] for name in names} | overrides(args) | vars(ask)
    if args.kv_cache_dtype != "auto":  # left out, so that jobs of earlier versions can be resumed
        settings["kv_cache_dtype"] = args.kv_cache_dtype
    job = Job(args.input, args.output, ask, settings)
    with ExitStack() as stack:
        if job.num_done == job.num_rows:
            outcomes = iter(())
        elif args.ray is None:
            outcomes = answer(stack.enter_context(load(args)), job.pending(), ask)
        else:
            from ..jobs.ray import answer_on_ray

            where = args.ray, args.replicas, args.gpus_per_replica
            outcomes = answer_on_ray(job, options, *where)
        if told:
            terminal.note(told)
        try:
            found = carry_out(job, outcomes, args.ordered)
        except OSError as error:
            if not args.begun():
                raise
            problem = terminal.path_problem(error)
            args.error(f"{problem}; rerun the command to resume")
    if args.json:
        terminal.say(json.dumps(found))
    elif found["bad"] or sys.stderr.isatty():
        rate = speed.rate(found["new_tokens"], found["seconds"])
        line = f"{found['rows'] - found['bad']} of {found['rows']} rows answered in {job.output}"
        before = found["answered_before"]
        line += f", {before} of them in earlier runs" if before else ""
        line += f"; {found['bad']} bad, see {job.errors}" if found["bad"] else ""
        terminal.note(line + (f"; {rate:.0f} tokens/s" if rate else ""))
    sys.exit(1 if found["bad"] else 0)


def bench(args: argparse.Namespace) -> None:
    """Measure throughput, on texts or on random tokens."""
    check_watch(args)
    length, shared = args.random_input_len, args.shared_prefix
    at_random = bool(length or shared or args.random_output_len)
    if at_random:
        length = length or 256
        args.max_tokens, args.ignore_eos = args.random_output_len or args.max_tokens, True
        what = f"{args.num_prompts} prompts of {length} random tokens after a prefix of {shared}"
    else:
        prompts, source = speed.find_prompts(args.prompts_file, args.num_prompts)
        what = f"{len(prompts)} prompts from {source}"
    if not args.json:
        terminal.say(what)
    params = sampling_params(args)
    engine()  # import before the clock starts
    start = time.perf_counter()
    with load(args) as llm:
        once = {"load_seconds": round(time.perf_counter() - start, 3)}
        if at_random:
            vocabulary = llm.tokenizer.num_ordinary
            prompts = speed.random_prompts(args.num_prompts, length, shared, vocabulary, args.seed)
        else:
            prompts = encode(llm, prompts, args.raw)
        # a trace shows the benchmark without warm-up
        seconds = 0.0 if args.trace else speed.warm_up(llm, params, len(prompts))
        once["warmup_seconds"] = round(seconds, 3)
        with llm.timing() as times:
            outputs, seconds = generate(args, llm, prompts, params)
        found = once | speed.results(outputs, seconds, llm.stats(), times)
        found |= roofline.reading(llm, outputs, found, roofline.precision_of(llm))
    terminal.say(json.dumps(found) if args.json else speed.report(found))


def score(args: argparse.Namespace) -> None:
    """Rank continuations by their log-probability under the model."""
    if bool(args.file) == (len(args.texts) > 1):
        raise ValueError("give PROMPT CONTINUATION..., or --file")
    rows = [{"prompt": "".join(args.texts[:1]), "continuations": args.texts[1:]}]
    if args.file:
        from ..jobs.rows import read_rows

        rows = read_rows(args.file)
    speed.check_choices(rows, args.file or "the command line")
    with load(args) as llm:
        pairs = [(row["prompt"], tail) for row in rows for tail in row["continuations"]]
        prompts = encode(llm, [prompt for prompt, _ in pairs], args.raw)
        found = iter(llm.score(prompts, [tail for _, tail in pairs]))
    for row in rows:
        ranked = [
            {"text": tail, "total": sum(p), "per_token": sum(p) / len(p), "logprobs": p}
            for tail, p in zip(row["continuations"], found, strict=False)
        ]
        ranked.sort(key=lambda r: -r["total"])
        if args.json:
            terminal.say(json.dumps({"prompt": row["prompt"], "continuations": ranked}))
        else:
            terminal.show_ranking(row["prompt"], ranked)


def eval(args: argparse.Namespace) -> None:
    """Run tasks of lm-evaluation-harness, all requests of a kind at once."""
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise ValueError(f"--num-fewshot must be 0 or more, got {args.num_fewshot}")
    if args.include_path and not Path(args.include_path).is_dir():
        raise ValueError(f"--include-path: {args.include_path} is not a folder")
    output = args.output and Path(args.output).absolute()
    if output and (output.is_dir() or not output.parent.is_dir()):
        raise ValueError(f"--output: {args.output} is not a file in an existing folder")
    from ..evals import evaluate, find_tasks

    names = [name.strip() for name in args.tasks.split(",")]
    manager, tasks = find_tasks(names, args.include_path)
    with load(args) as llm:
        if args.chat and not llm.tokenizer.has_chat:
            raise ValueError("--chat: the tokenizer has no chat tokens, leave it out")
        results = evaluate(
            llm, tasks, manager, num_fewshot=args.num_fewshot, limit=args.limit,
            apply_chat_template=args.chat, log_samples=False,
        )  # fmt: skip
    if results is None:  # on all ranks except the first
        return
    from lm_eval.utils import handle_non_serializable, make_table

    text = json.dumps(results, default=handle_non_serializable)
    if args.json:
        terminal.say(text)
    else:
        terminal.say(make_table(results))
        if results.get("groups"):
            terminal.say(make_table(results, "groups"))
        found = results["engine"]
        hits = f"{found['hit_rate']:.0%} of {found['prompt_tokens']} prompt tokens cached"
        terminal.note(f"{found['seconds']} s, {found['tokens_per_second']} tokens/s; {hits}")
    if output:
        try:
            output.write_text(text + "\n", encoding="utf-8")
        except OSError as error:  # the results are on stdout
            args.error(f"--output: {terminal.path_problem(error)}")


def info(args: argparse.Namespace) -> None:
    """Show a checkpoint's architecture and memory needs. Its files are mapped, not loaded."""
    engine()
    from ..devices import find_device
    from ..features.checks import check_device
    from ..sources import strict
    from ..sources.places import find_checkpoint, read_checkpoint

    check_device(args.device)
    device = find_device(args.device)
    directory, step = find_checkpoint(model_name(args), args.step)
    config, recipe, weights = read_checkpoint(directory, step)
    recipe = strict.replace(recipe, **overrides(args))
    found = {"checkpoint": str(directory), "step": step}
    given = args.dtype, args.kv_cache_dtype
    if args.check:
        from ..loading import compare_kernels

        found["check"] = compare_kernels(config, recipe, device, *given)
    found |= roofline.describe(config, recipe, weights, device, *given)
    terminal.say(json.dumps(found) if args.json else roofline.description(found))


def warmup(args: argparse.Namespace) -> None:
    """Compile the CPU kernels for a checkpoint in the foreground, and store them on disk."""
    engine()
    from ..loading import find_checkpoint, load_model
    from ..resources import naming_package

    with naming_package("warmup"):
        from ..cpu import backend, compilation
    if why := compilation.find_store_error():
        raise ValueError(f"kernels cannot be stored, because {why}: {compilation.REMEDY}")
    model_path = find_checkpoint(model_name(args), args.step)
    seconds: dict[str, float] = {}  # for each kind that was not on disk

    def show(kind: str, description: dict, passed: float, last: bool = False) -> None:
        seconds[kind] = passed
        kinds = backend.kinds_for(next(iter(seconds)))
        line = f"kernels {kinds.index(kind) + 1} of {len(kinds)} ({kind}): {passed:.0f} s"
        if description.get("now"):
            line += f", {description['done']} compiled, now {description['now']}"
        terminal.progress(line, last)

    options = {"quantization": args.quantization, "kv_cache_dtype": args.kv_cache_dtype}
    began = time.perf_counter()
    with compilation.reporting(lambda line: None, waits=True, show=show):
        model = load_model(*model_path, "cpu", args.dtype, **options, **overrides(args))
        kinds = backend.kinds_for(model.backend.kind)
        for kind in kinds:
            compilation.begin(backend.CpuBackend, kind, waits=True)
            if kind in seconds:
                show(kind, {}, time.perf_counter() - began, last=True)
            began = time.perf_counter()
    if why := compilation.find_store_error(*kinds):
        reason = f"because {why}: {compilation.REMEDY}"
        raise ValueError(f"kernels were compiled but not stored, {reason}")
    found = {
        "folder": str(compilation.folder()),
        "seconds": {k: round(v, 1) for k, v in seconds.items()},
    }
    found["kinds"] = kinds
    line = f"kernels of {len(kinds)} kinds ({', '.join(kinds)}) are in {found['folder']}"
    terminal.say(json.dumps(found) if args.json else line)


def convert(args: argparse.Namespace) -> None:
    """Write a checkpoint in the other format. Check that both produce the same tokens with the same
    constants, and report how much the constants of the other format change."""
    from .. import LLM, SamplingParams
    from ..sources import exports, places
    from ..sources.places import find_checkpoint, read_checkpoint

    found = find_checkpoint(args.model, args.step)
    checkpoint = config, recipe, _ = read_checkpoint(*found)
    tokenizer = places.open_tokenizer(found[0], args.tokenizer_dir, args.trust_tokenizer)
    prompt = [*range(0, config.vocab_size, 1 + config.vocab_size // 16)]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    options = {"device": "cpu", "plain": True, "max_batch_size": 1, "num_threads": args.threads}
    options["trust_tokenizer"] = args.trust_tokenizer
    options["max_model_len"] = min(32, 10 * config.sequence_len)
    # constants that differ between the formats. if two tokens are almost equally likely, these
    # constants may decide which one is taken
    constants = {"eps": recipe.eps, "round_rotary": recipe.round_rotary}

    def run(place: tuple, tokens: list[int] | None = None, **more) -> tuple[list[int], list[float]]:
        """The greedy tokens after the prompt, and the log-probabilities of prompt and tokens."""
        with LLM(*place, **options, **more) as llm:
            if tokens is None:
                (output,) = llm.generate([prompt], params, use_tqdm=False)
                tokens = output["token_ids"]
            (scores,) = llm.score([prompt[:1]], [prompt[1:] + tokens])
            return tokens, scores

    with exports.converted(checkpoint, *found, tokenizer, args.output) as folder:
        place = find_checkpoint(folder)
        before, scores = run((*found, args.tokenizer_dir), **constants)
        after, theirs = run(place, **constants)
        if before != after:
            raise ValueError(f"{args.output} would produce the tokens {after}, not {before}")
        differs = exports.differences(recipe, read_checkpoint(*place)[1])
        if differs:
            _, theirs = run(place, before)
    most = max(abs(x - y) for x, y in zip(scores, theirs, strict=True))
    told = {"checkpoint": str(found[0]), "step": found[1], "output": args.output}
    told |= {"era": recipe.era, "greedy_tokens": before}
    told |= {"differs": differs, "largest_logprob_difference": most}
    same = f"the same {len(before)} greedy tokens as {found[0]}"
    if differs:
        same += f" with the same constants; in this format {differs}, which changes "
        same += f"{len(scores)} log-probabilities by at most {most:.2g}"
    elif most == 0:
        same += ", exact: no constant and no log-probability differs"
    else:
        same += f"; no constant differs, and log-probabilities differ by at most {most:.2g}"
    terminal.say(json.dumps(told) if args.json else f"{args.output}: era {recipe.era}, {same}")


def quantize(args: argparse.Namespace) -> None:
    """Write a checkpoint with weights of 8, 6, 5 or 4 bits. The rounding is calibrated on a text
    file or on text that the model generates."""
    from .. import LLM, __version__
    from ..lowbit import folder as lowbit_folder
    from ..lowbit.calibration import split_text, write_texts
    from ..lowbit.quantize import quantize
    from ..sources import exports, huggingface, places, strict
    from ..sources.places import find_checkpoint, read_checkpoint

    start, bits = time.perf_counter(), int(args.bits)
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"seed must be from 0 to 2**31 - 1, got {args.seed}")
    use_threads(args)
    directory, step = find_checkpoint(args.model, args.step)
    config, recipe, weights = read_checkpoint(directory, step)
    recipe, base = strict.replace(recipe, **overrides(args)), places.is_base(directory, step)
    checkpoint = config, recipe, weights
    lowbit_folder.check_source(checkpoint, directory, bits)
    tokenizer = places.open_tokenizer(directory, args.tokenizer_dir, args.trust_tokenizer)
    with exports.new_folder(args.output) as folder:
        huggingface.import_safetensors(folder)
        if args.calibration:
            with open(args.calibration, encoding="utf-8") as file:
                text = file.read(32 * args.tokens)  # a token has a few characters
            texts = split_text(
                tokenizer.encode(text), tokenizer.bos_id, args.tokens, config.sequence_len
            )
            if not texts:
                raise ValueError(f"--calibration {args.calibration} is empty: give a text")
        else:
            options = {"device": "cpu", "max_batch_size": 48, **overrides(args)}
            options["max_model_len"] = min(512, config.sequence_len)
            options["trust_tokenizer"] = args.trust_tokenizer
            with LLM(directory, step, args.tokenizer_dir, **options) as llm:
                texts = write_texts(llm, args.tokens, args.seed, tokenizer.has_chat and not base)
        made = quantize(*checkpoint, texts, lambda name: lowbit_folder.bits_of(name, bits))
        told = {"bits": bits, "seed": args.seed, "tokens": sum(map(len, texts)), "base": base}
        told |= {"calibration": args.calibration or "sampled by the model", "source": args.model}
        words = [args.model, "-o", args.output, "--bits", args.bits, "--seed", str(args.seed)]
        words += ["--tokens", str(args.tokens)]
        words += ["--calibration", args.calibration] if args.calibration else []
        words += [word for item in args.recipe for word in ("--recipe", item)]
        told |= {"version": __version__, "command": shlex.join(["microvllm", "quantize", *words])}
        lowbit_folder.write_folder(checkpoint, made, tokenizer, told, folder)
        _, _, written = read_checkpoint(folder, None)  # with the same checks as any checkpoint
    matrices = [w for name, w in written.items() if lowbit_folder.is_matrix(name[:-7])]
    each = 8 * sum(w.nbytes for w in matrices) / sum(w.numel() for w in matrices)
    size = sum(w.nbytes for w in written.values())
    told |= {"output": args.output, "bits_per_weight": round(each, 2), "file_bytes": size}
    told["seconds"] = round(time.perf_counter() - start, 1)
    line = f"{args.output}: {each:.2f} bits per weight of a matrix, {size / 1e6:.1f} MB in total, "
    line += f"calibrated on {told['tokens']} tokens in {told['seconds']} s"
    terminal.say(json.dumps(told) if args.json else line)


def lab(args: argparse.Namespace) -> None:
    """Run a program of lab/."""
    if not (speed.ROOT / "lab" / "__main__.py").is_file():
        raise ValueError(f"the lab is not in this installation: {REINSTALL}")
    sys.path.insert(0, str(speed.ROOT))
    from lab.__main__ import main

    args.begun = lambda: True  # the lab reports mistakes itself
    main(args.words)


def trace(args: argparse.Namespace) -> None:
    """Turn a trace into a web page or into Chrome's format, or two traces into one page."""
    engine()
    from ..trace import read, write_chrome, write_comparison, write_page

    events = read(args.file)
    if args.other:
        if args.chrome:
            raise ValueError("--chrome takes one trace: leave out the second file")
        names = [Path(name).stem for name in (args.file, args.other)]
        if names[0] == names[1]:
            names = [args.file, args.other]
        traces = [events, read(args.other)]
        page = args.output or Path(args.file).with_name(f"{Path(args.file).stem}-diff.html")
        write_comparison(traces, names, page)
        steps = [sum(e["e"] == "begin" for e in events) for events in traces]
        found = {"steps": steps, "files": [str(page)]}
        told = f"{steps[0]:,} and {steps[1]:,} steps: {page}"
        terminal.say(json.dumps(found) if args.json else told)
        return
    page = args.output or (None if args.chrome else Path(args.file).with_suffix(".html"))
    if page:
        write_page(events, page)
    if args.chrome:
        write_chrome(events, args.chrome)
    kinds = [event["e"] for event in events]
    found = {"events": len(events), "steps": kinds.count("begin")}
    found["files"] = [str(path) for path in (page, args.chrome) if path]
    told = f"{found['steps']:,} steps, {found['events']:,} events: {' and '.join(found['files'])}"
    terminal.say(json.dumps(found) if args.json else told)
