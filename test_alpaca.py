"""Measure the throughput: python test_alpaca.py --num-prompts 512 --max-tokens 64

The prompts are Alpaca instructions. They come from --prompts-file, else from the data set
tatsu-lab/alpaca if the `datasets` package can download it, else from the bundled file. This is a
script, not a test: pytest does not collect it.
"""

import argparse
import json
import time

from microvllm.cli import bench, commands, flags, roofline, terminal


def run(args: argparse.Namespace) -> None:
    commands.check_watch(args)
    texts, source = bench.find_prompts(args.prompts_file, args.num_prompts)
    if not args.json:
        print(f"{len(texts)} prompts from {source}")

    commands.engine()  # import before the clock starts
    start = time.perf_counter()
    with commands.starting(args):
        from microvllm import LLM, SamplingParams

        llm = LLM(**commands.engine_options(args))
        params = SamplingParams(**commands.sampling_options(args))
    load_seconds = time.perf_counter() - start
    commands.started(args, llm)

    with llm:
        prompts = commands.encode(llm, texts, args.raw)
        warmup_seconds = 0.0  # a trace contains no warm-up
        if not args.trace:
            warmup_seconds = bench.warm_up(llm, params, len(prompts))
        with llm.timing() as times, commands.watched(args, llm):
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=not args.watch)
            seconds = time.perf_counter() - start
        results = {
            "load_seconds": round(load_seconds, 3),
            "warmup_seconds": round(warmup_seconds, 3),
            **bench.results(outputs, seconds, llm.stats(), times),
        }
        results |= roofline.reading(llm, outputs, results, roofline.precision_of(llm))
    print(json.dumps(results) if args.json else bench.report(results))


def main() -> None:
    parser = terminal.Parser(description="Measure throughput on Alpaca instructions.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the report")
    flags.add_flags(parser, flags.ALPACA)
    parser.set_defaults(command=run)
    terminal.execute(parser.parse_args())


if __name__ == "__main__":
    main()
