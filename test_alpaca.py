"""Throughput on Alpaca's instructions: python test_alpaca.py --num-prompts 512 --max-tokens 64

The instructions come from --prompts-file, else from the tatsu-lab/alpaca data set where the
`datasets` package can reach it, else from the bundled file. The name is the original's: this is
a script, and pytest does not collect it.
"""

import argparse
import importlib.util
import json
import os
import threading
import time
import urllib.request
from pathlib import Path

from run import encode, load, make_parser

DATASET = "tatsu-lab/alpaca"
BUNDLED = Path(__file__).resolve().parent / "models" / "prompts" / "oldbooks_instructions.json"


def read_rows(path: str | Path) -> list:
    """The rows of an Alpaca-format file, unchecked: .json (a list), .jsonl or .parquet.

    Raises ValueError, with the file's name (and line), for what is not such a file.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"{path}: reading Parquet needs `pip install pyarrow`") from None
        data = Path(path).read_bytes()
        try:
            return pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path}: not a Parquet file: {error}") from None
    if suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path}: expected a file named .json, .jsonl or .parquet")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from None
    if suffix == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        if not isinstance(rows, list):
            raise ValueError(f"{path}: expected a list of rows, not {type(rows).__name__}")
        return rows
    rows = []
    # not splitlines(): a JSON string may hold U+2028 and its like as they are
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} is not JSON: {error}") from None
    return rows


def alpaca_prompt(row: object, where: str) -> str:
    """The instruction and, where there is an input, a blank line and the input.

    Raises ValueError, beginning with `where`, for a row that has no such fields.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with 'instruction', not {row!r:.40}")
    instruction, context = row.get("instruction"), row.get("input") or ""
    if not isinstance(instruction, str) or not instruction.strip():
        raise ValueError(f"{where}: 'instruction' must be a text, not {instruction!r:.40}")
    if not isinstance(context, str):
        raise ValueError(f"{where}: 'input' must be a text, not {context!r:.40}")
    return f"{instruction}\n\n{context}" if context else instruction


def read_prompts(path: str | Path) -> list[str]:
    """All prompts of an Alpaca-format file. Raises ValueError naming the file and the row."""
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path}: no rows in it")
    return [alpaca_prompt(row, f"{path}: row {number}") for number, row in enumerate(rows, 1)]


def hub_answers(timeout: float = 3.0) -> bool:
    """Whether the hub is there. `datasets` itself would retry for half a minute."""
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answers = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=timeout).close()
            answers.append(True)
        except (OSError, ValueError):  # no network, a refusal; an HF_ENDPOINT that is no address
            pass

    # in a thread, since looking up a name has no time limit of its own
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(answers)


def find_prompts(path: str | None, count: int) -> tuple[list[str], str]:
    """(the first `count` prompts, or as many as there are, and where they come from)."""
    if path is not None:
        return read_prompts(path)[:count], path
    bundled, source = read_prompts(BUNDLED)[:count], f"the bundled {BUNDLED.name}"
    if importlib.util.find_spec("datasets") is None:
        return bundled, f"{source} (`pip install datasets` for {DATASET})"
    if not hub_answers():
        os.environ["HF_HUB_OFFLINE"] = "1"  # read on import: its local copy, or an error at once
    try:
        from datasets import load_dataset

        rows = list(load_dataset(DATASET, split=f"train[:{count}]"))
    except Exception as error:  # whatever went wrong out there, there are prompts here
        return bundled, f"{source} (no {DATASET}: {type(error).__name__})"
    return [alpaca_prompt(row, f"{DATASET}: row {n}") for n, row in enumerate(rows, 1)], DATASET


def run(args: argparse.Namespace) -> None:
    if args.num_prompts < 1:
        raise ValueError(f"--num-prompts is {args.num_prompts}: give 1 or more")
    prompts, source = find_prompts(args.prompts_file, args.num_prompts)
    print(f"{len(prompts)} prompts from {source}")

    from microvllm import SamplingParams

    params = SamplingParams(
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        top_k=args.top_k,
        ignore_eos=args.ignore_eos,
    )
    with load(args) as llm:
        prompts = encode(llm, prompts, args.raw)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - start
        stats = llm.stats()
    report(outputs, seconds, stats)


def rate(count: int, seconds: float) -> float:
    """Count per second; nothing was done in no time."""
    return round(count / seconds, 1) if seconds else 0.0


def report(outputs: list, seconds: float, stats: dict) -> None:
    """Print the results for people, then as one line of JSON."""
    tokens = sum(len(output["token_ids"]) for output in outputs)
    # the first token of a request comes out of the step that ends its prompt
    decoded = tokens - len(outputs)
    prefill_rate = rate(stats["prefill_tokens"], stats["prefill_seconds"])
    decode_rate = rate(decoded, stats["decode_seconds"])
    print(f"""
Total prompts: {len(outputs)}
Total output tokens: {tokens}
Total time: {seconds:.2f} s
Throughput: {rate(tokens, seconds)} tokens/s
Latency per request: {1000 * seconds / len(outputs):.1f} ms (total time / prompts)

Prefill: {stats["prefill_tokens"]} tokens, {prefill_rate} tokens/s
Decode: {decoded} tokens, {decode_rate} tokens/s
Prefix-cache hits: {stats["cached_tokens"]} of {stats["prompt_tokens"]} prompt tokens
Preemptions: {stats["preemptions"]}
KV blocks used at peak: {stats["peak_blocks"]} of {stats["num_blocks"]}, of \
{stats["block_size"]} tokens each
""")
    result = {
        "total_prompts": len(outputs),
        "total_output_tokens": tokens,
        "total_seconds": round(seconds, 3),
        "tokens_per_second": rate(tokens, seconds),
        "seconds_per_request": round(seconds / len(outputs), 5),
        "prefill_tokens_per_second": prefill_rate,
        "decode_tokens_per_second": decode_rate,
    }
    print(json.dumps(result | stats))


def main() -> None:
    parser = make_parser(
        "Throughput on Alpaca's instructions.", max_tokens=64, temperature=0.7, top_k=0
    )
    parser.add_argument(
        "--num-prompts", type=int, default=512, help="the first so many (%(default)s)"
    )
    parser.add_argument(
        "--prompts-file", help=f".json, .jsonl or .parquet ({DATASET}, else the bundled prompts)"
    )
    args = parser.parse_args()
    try:
        run(args)
    except (ValueError, OSError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
