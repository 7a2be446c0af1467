"""The command line's parsers: what each command is called, takes and shows as examples.

A command is a page: what it does, behind a `$` each example, and its flags. A line of flags has the
names, what the flag takes and, two spaces on, what --help says of it, where (=1) is its default. It
takes a text or one of TYPES, by the name that --help has for it; or one of a|b; or nothing, and is
a switch. Its first name ends with what MARKS say. A title with a colon begins a group of --help.
"""

from __future__ import annotations

import re

from .. import __version__
from . import commands
from .terminal import Parser, positive

TYPES = {"int": int, "positive": positive, "float": float}
MARKS = {
    "": {}, "!": {"required": True}, "+": {"action": "append"}, "*": {"nargs": "*"},
    "?": {"nargs": "?", "const": ""}, "...": {"nargs": "..."},
}  # fmt: skip
LINE = r"(\S+?)([!+*?]|\.\.\.|)((?: -\S+)*)(?: (int|positive|float))?(?: (\S.*?))? {2,}(.*)"
# of flags that --help shows none of, or that some commands do not have
DEFAULTS = {
    "dtype": "auto", "json": False, "prompt": [], "prompt_lookup": 0, "random_input_len": None,
    "random_output_len": None, "recipe": [], "shared_prefix": 0, "watch": False,
}  # fmt: skip
CHECKPOINT = "a directory, sft, base:d20, rl:d20:650, or owner/name on the hub (the bundled model)"

RUN = """answer prompts, many at once
$ "Who wrote Moby Dick?"
$ -m sft --temperature 0 "What is 7+8?" "Name a book by Jane Austen."
$ --raw --max-tokens 40 "It was a dark and stormy night, and"
$ --json < questions.txt > answers.jsonl
prompts* PROMPT   (the lines of what is piped in)
--prompt+ PROMPT  may be repeated
-n positive N     answers to each prompt (=1)
"""
CHAT = """talk to a model
$
$ -m rl:d20:650 --temperature 0.9
"""
BATCH = """answer a file of prompts; killed and started again, it goes on where it was
$ prompts.jsonl -o answers.jsonl    # each {"prompt": "..."}, or with "id" and "params"
$ prompts.parquet -o answers.parquet --prompt-column question --ordered --temperature 0
$ pairs.jsonl -o scores.jsonl --task score
$ prompts.jsonl -o answers.jsonl --ray --replicas 2 --gpus-per-replica 1
input INPUT           rows, in .jsonl or .parquet
-o! --output OUTPUT   what becomes of them, in either; bad rows go to OUTPUT.errors (then exit \
                      status 1)
--ordered             in the input's order (as they are done)
-n positive N         answers to each prompt (=1)
rows:
--task chat|completion|score  (chat where the model can, else completion)
--prompt-column NAME  a text, token ids, or for chat a list of messages (=prompt)
--id-column NAME      a text or integer that no other row has (id where there is one, else the line)
--params-column NAME  an object of sampling parameters, in place of the flags' (=params)
--continuation-column NAME    for score: a text, or a list of them (=continuation)
many machines:
--ray? ADDRESS        on Ray: the cluster at ADDRESS, whose network must be trusted (the one that \
                      runs, else a new one of this machine alone)
--replicas positive N         engines (=1)
--gpus-per-replica float N    of each engine, may be a part of one (=0)
"""
BENCH = """measure tokens per second
$ --num-prompts 64
$ --random-input-len 512 --random-output-len 128 --num-prompts 64
$ --shared-prefix 384 --random-input-len 64 --num-prompts 64
"""
TEXTS = """\
--num-prompts positive N  at most (=512)
--prompts-file FILE       .json, .jsonl or .parquet (Alpaca's data set if it can be had, else the \
                          bundled one)
"""
RANDOM = """random workload, in place of texts:
--random-input-len positive N   tokens of each prompt (256)
--random-output-len positive N  new tokens, exactly so many
--shared-prefix positive N      tokens in front of them, the same for all prompts (0)
"""
SCORE = """rank continuations of a prompt by their log-probability
$ "Who wrote Emma?" "Emma was written by Jane Austen." "Emma was written by Mark Twain."
$ --raw "The capital of France is" " Paris" " London"
$ --file rows.jsonl    # each {"prompt": "...", "continuations": ["...", ...]}
texts* PROMPT CONTINUATION  a prompt and what may follow it
--file FILE                 such rows, in .jsonl, .json or .parquet
"""
EVAL = """run tasks of lm-evaluation-harness (microvllm[eval])
$ -m sft --tasks arc_easy,gsm8k --chat -o results.json
$ -m base --tasks hellaswag --num-fewshot 10 --limit 200
$ --tasks mine --include-path my_tasks/
--tasks! NAME,...        tasks, groups or tags; * matches any letters
--include-path DIR       a folder with tasks of your own (YAML)
--num-fewshot int N      examples in front of each question (what the task says)
--limit positive N       questions of each task, the first ones (all)
--chat                   as conversations, examples as turns (plain text)
-o --output FILE         where the results go, with what they cost, as JSON
"""
INFO = f"""say what a checkpoint is and takes
$
$ base:d20
$ owner/name --json
model? CHECKPOINT  {CHECKPOINT}
--kv-cache-dtype auto|int8  of K and V (=auto)
"""
CONVERT = """write a checkpoint in the other format: nanochat's as a Hugging Face folder, or back
$ sft -o my-model-hf
$ owner/name -o my-model
model CHECKPOINT     a directory, sft, base:d20, rl:d20:650, or owner/name on the hub
-o! --output DIR     a new directory, or an empty one
--step int N         training step of the checkpoint (the last one)
--tokenizer-dir DIR  where tokenizer.pkl is (beside the model)
--trust-tokenizer    take a tokenizer whose pattern is not nanochat's: it may take any time
"""
QUANTIZE = """write a checkpoint in 8, 6, 5 or 4 bits, which then runs as any other
$ sft -o my-model-4bit --bits 4
$ owner/name -o my-model --bits 6 --calibration text.txt
model CHECKPOINT     a directory, sft, base:d20, rl:d20:650, or owner/name on the hub
-o! --output DIR     a new directory, or an empty one
--bits! 8|6|5|4      of a weight; 4: in groups of 32, the head in 6
--calibration FILE   a text like those that the model is for (what the model writes itself)
--tokens positive N  of that text (=23000)
--seed int N         of what the model writes (=0)
--step int N         training step of the checkpoint (the last one)
--tokenizer-dir DIR  where tokenizer.pkl is (beside the model)
--trust-tokenizer    take a tokenizer whose pattern is not nanochat's: it may take any time
--recipe+ NAME=VALUE  a constant that the weights cannot tell, such as softcap=20; may be repeated
"""
LAB = """see what a paged KV cache does: the paper's figures, policies, exercises
$
$ fig12 --help
words... NAME  a program (a list of them)
"""
LEARN = """a course: from a naive loop to this engine in ten steps that run
$
$ 1
$ --start my-course    # copies the exercises to a folder of yours
$ 1 --check
number? positive N  a step to run (a list of them, and where you are)
--check             judge the step's exercise in your copy, in place of running the step
--start DIR         copy the exercises to DIR
"""
TRACE = """turn a trace into a web page that replays every block
$ run.jsonl -o run.html
$ run.jsonl --chrome run.json    # for ui.perfetto.dev
$ a.jsonl b.jsonl -o diff.html   # two runs of the same prompts side by side
file FILE         what --trace FILE wrote
other? FILE       a second one, to compare
-o --output PAGE  the page (FILE with .html at its end)
--chrome FILE     Chrome's trace format, in place of the page or beside it
"""
# what commands share
MODEL = """model:
--step int N         training step of the checkpoint (the last one)
--device DEVICE      auto, cpu, cuda or mps (=auto)
--dtype auto|float32|bfloat16|float16  (bfloat16 on CUDA, else float32)
--recipe+ NAME=VALUE  a constant that the weights cannot tell, such as softcap=20; may be repeated
"""
ENGINE = f"""{MODEL}-m --model --model-dir CHECKPOINT  {CHECKPOINT}
--tokenizer-dir DIR           where tokenizer.pkl is (beside the model)
--trust-tokenizer             take a tokenizer whose pattern is not nanochat's: it may take any time
--quantization int8|int6|int5|int4|fp8  of matrices: fp8 on a GPU, the others on a CPU
--kv-cache-dtype auto|int8    of K and V: int8 on a CPU (=auto)
--num-blocks int N            blocks of the KV cache (what memory allows)
--max-batch-size int N        sequences that run at once, at most
--max-batched-tokens int N    tokens that a step computes, at most
--max-model-len int N         prompt plus answer (the context)
--deterministic               the same bits alone or in a batch, cold or warm; slower
--tensor-parallel positive N  share the model among N processes that torchrun started (=1)
--trace FILE         write down what happens to every block; `microvllm trace FILE` shows it
"""
RAW = """\
--raw   prompts are plain text, also where the model can chat
--chat  prompts are a user's, also with a base model
"""
LOOKUP = """options:
--prompt-lookup int N  guess up to N tokens a step from the text so far: the same answer, sooner \
                       (=0)
"""
POLICIES = """\
policies, each by its name in `microvllm lab policies` or as FILE:FUNCTION:
--eviction POLICY   which cached block is given up (least_recently_used)
--victim POLICY     who is preempted when no block is free (youngest)
--admission POLICY  who of the queue is next (first_come)
"""
WATCH = "--watch  draw the blocks and the queue (microvllm[watch])\n"
SAMPLING = """sampling:
--max-tokens int N            at most (={max_tokens})
--temperature float T         0: the likeliest always (={temperature})
--top-k int K                 the likeliest, 0: all (={top_k})
--top-p float P               the likeliest that sum to this probability
--min-p float P               those this likely, as a share of the likeliest
--repetition-penalty float X  above 1: repeat less
--stop+ TEXT                  end before it; may be repeated
--guide FILE                  what they must fit: SamplingParams' guide, in JSON (microvllm[guided])
--ignore-eos                  go on past the end of an answer
--seed int N                  the same seed gives the same answers ({seed})
"""


def sampling(max_tokens: int, temperature: float, top_k: int, seed: str = "=0") -> str:
    """The flags of SamplingParams, with these defaults."""
    return SAMPLING.format(max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed)


ALPACA = TEXTS + ENGINE + RAW + LOOKUP + WATCH + POLICIES + sampling(64, 0.7, 0)  # test_alpaca.py's
PAGES = {
    commands.run: RUN + ENGINE + RAW + LOOKUP + WATCH + POLICIES + sampling(128, 0.8, 50),
    commands.chat: CHAT + ENGINE + LOOKUP + sampling(256, 0.6, 50, seed="random"),
    commands.batch: BATCH + ENGINE + RAW + POLICIES + sampling(128, 0.8, 50),
    commands.bench: BENCH + ALPACA + RANDOM,
    commands.score: SCORE + ENGINE + RAW,
    commands.eval: EVAL + ENGINE,
    commands.info: INFO + MODEL,
    commands.convert: CONVERT,
    commands.quantize: QUANTIZE,
    commands.lab: LAB,
    commands.learn: LEARN,
    commands.trace: TRACE,
}


def make_parser() -> Parser:
    """The parser of the whole command."""
    what = "Inference for nanochat models."
    parser = Parser(prog="microvllm", description=what, epilog="examples:\n")
    parser.add_argument("--version", action="version", version=f"microvllm {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for work, page in PAGES.items():
        name, (what, table) = work.__name__, page.split("\n", 1)
        lines = [f"  microvllm {name}{words}\n" for words in re.findall(r"^\$(.*)", table, re.M)]
        parser.epilog += lines[0]
        epilog = "examples:\n" + "".join(lines)
        sub = subparsers.add_parser(name, help=what, description=what, epilog=epilog)
        if work is not commands.lab:  # whose programs have flags of their own
            sub.add_argument("--json", action="store_true", help="for machines: an object a line")
        add_flags(sub, table)
        sub.set_defaults(command=work)
    return parser


def add_flags(parser: Parser, table: str) -> None:
    """Add the flags of a table, or of a page, as described above."""
    parser.set_defaults(**DEFAULTS)
    group = parser
    for line in re.findall(r"^[^$\n].*", table, re.M):
        if line.endswith(":"):
            group = parser if line == "options:" else parser.add_argument_group(line[:-1])
            continue
        name, mark, more, kind, takes, told = re.fullmatch(LINE, line).groups()
        options = {"help": re.sub(r"\(=.*\)", "(%(default)s)", told), **MARKS[mark]}
        if default := re.search(r"\(=(.*)\)", told):
            options["default"] = default[1]  # a text, to which argparse gives its type
        if not takes:
            options["action"] = "store_true"
        elif "|" in takes:
            options["choices"] = takes.split("|")
        else:
            options |= {"type": TYPES.get(kind), "metavar": takes}
        group.add_argument(name, *more.split(), **options)
