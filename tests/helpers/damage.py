"""Parts of damaged files: steps of pickle programs, and a trace."""

import json
from pathlib import Path

from microvllm import LLM, SamplingParams

from .goldens import ERAS

CHECKPOINT = ERAS / "era1_padded" / "chatsft_checkpoints" / "d5"
TOKENIZER = ERAS / "tokenizer" / "tokenizer.pkl"

# of the pickle of a checkpoint
STEPS = [bytes([op]) for op in b"(.}])]tsubaeQRN0\x85\x86\x87\x88\x89\x8a\x93\x94h\0qK\1M\1\1"]
STEPS += [b"q\0", b"h\0", b"h\0\x86q\0", b"K\1", b"K\0", b"J\xff\xff\xff\x7f", b"X\1\0\0\0a"]
STEPS += [b"X\7\0\0\0storage", b"ctorch\nFloatStorage\n", b"X\1\0\0\x000", b"\x8a\1\xff"]
STEPS += [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n)R"]
STEPS += [b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000NK\x40tQ"]

# of the pickle of a tokenizer
WORDS = [bytes([op]) for op in b"(.0123456789FNaBbcdeghijlopqrstuR\x80\x81\x82\x85\x86\x87\x88\x89"]
WORDS += [bytes([op]) for op in b"\x8a\x8b\x8c\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95\x96\x97\x98]}t)"]


def trace_events(folder: Path) -> list[dict]:
    """A short trace with every kind of event in it. folder: where it is written."""
    path = folder / "run.jsonl"
    with LLM(CHECKPOINT, tokenizer_path=TOKENIZER, num_blocks=9, block_size=4, trace=path) as llm:
        params = SamplingParams(0.9, 9, seed=1, ignore_eos=True, n=2)
        llm.generate([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 8], [3] * 9], params, use_tqdm=False)
    return [json.loads(line) for line in path.read_text().splitlines()]
