"""The parsers of the command line: the name, flags and examples of each command.

Each command has a page of text. The first line is its summary. Lines that begin with `$` are
examples. A line that ends with a colon starts a group of flags in --help. Any other line is a flag:
its names, its value, two or more spaces, and its help text. (=1) in the help text is the default. A
value is a text or one of TYPES, followed by its name in --help, or a|b for a choice. A flag without
a value is a switch. A character of MARKS after the first name says how often the flag may be given.
"""

from __future__ import annotations

import re
from argparse import SUPPRESS

from .. import __version__
from . import commands
from .terminal import Parser, positive

TYPES = {"int": int, "positive": positive, "float": float}
MARKS = {
    "": {}, "!": {"required": True}, "+": {"action": "append"}, "*": {"nargs": "*"},
    "?": {"nargs": "?", "const": ""}, "...": {"nargs": "..."},
}  # fmt: skip
LINE = r"(\S+?)([!+*?]|\.\.\.|)((?: -\S+)*)(?: (int|positive|float))?(?: (\S.*?))? {2,}(.*)"
# defaults that --help does not show, or of flags that only some commands have
DEFAULTS = {
    "dtype": "auto", "json": False, "prompt": [], "prompt_lookup": 0, "random_input_len": None,
    "random_output_len": None, "recipe": [], "shared_prefix": 0, "threads": None, "watch": False,
}  # fmt: skip
# the commands as `microvllm --help` groups them
GROUPS = {
    "use a model": "run chat",
    "process many prompts": "batch bench score eval",
    "inspect and convert checkpoints": "info warmup convert quantize",
    "understand the KV cache": "trace lab learn",
}
CHECKPOINT = """\
a directory; a name in nanochat's base directory, such as sft, base:d20 or rl:d20:650 (source, \
tag, step); or owner/name on the Hugging Face hub"""

RUN = """answer one or more prompts
$ "Who wrote Moby Dick?"
$ -m sft --temperature 0 "What is 7+8?" "Who wrote Emma?"
$ --raw --max-tokens 40 "It was a dark and stormy night, and"
$ --json < questions.txt > answers.jsonl
prompts* PROMPT   text of a prompt (default: each line of standard input)
--prompt+ PROMPT  one more prompt; may be repeated
-n positive N     number of answers to each prompt (=1)
"""
CHAT = """hold a conversation with a model
$
$ -m rl:d20:650 --temperature 0.9
"""
BATCH = """answer a file of prompts; rerun to resume an interrupted job
$ prompts.jsonl -o answers.jsonl   # rows: {"prompt": "..."}
$ in.parquet -o out.parquet --prompt-column question --ordered
$ pairs.jsonl -o scores.jsonl --task score
$ in.jsonl -o out.jsonl --ray --replicas 2 --gpus-per-replica 1
input INPUT           file of rows, .jsonl or .parquet
-o! --output OUTPUT   file of answers, .jsonl or .parquet; rows that cannot be answered go to \
                      OUTPUT.errors, and the exit status is then 1
--ordered             write answers in the order of the input (default: as they finish)
-n positive N         number of answers to each prompt (=1)
rows of the input:
--task chat|completion|score  what to do with each row (default: chat if the model can chat, else \
                      completion)
--prompt-column NAME  column of the prompt: a text, token ids or, for chat, a list of messages \
                      (=prompt)
--id-column NAME      column of a unique text or integer (default: the column id if it exists, \
                      else the line number)
--params-column NAME  column of an object with sampling parameters, which override the flags \
                      (=params)
--continuation-column NAME    column of a continuation or a list of continuations, for --task \
                      score (=continuation)
several engines:
--ray? ADDRESS        distribute the rows with Ray, on the cluster at ADDRESS; trust its network \
                      (default: the running cluster, else a new one on this machine)
--replicas positive N         number of engines, with --ray (=1)
--gpus-per-replica float N    number of GPUs of each engine, with --ray; may be a fraction (=0)
"""
BENCH = """measure tokens per second and latencies
$ --num-prompts 64
$ --random-input-len 512 --random-output-len 128
$ --shared-prefix 384 --random-input-len 64 --json
"""
TEXTS = """\
--num-prompts positive N  maximum number of prompts (=512)
--prompts-file FILE       prompts in Alpaca's format: .json, .jsonl or .parquet (default: the data \
                          set tatsu-lab/alpaca if it can be downloaded, else the bundled file)
"""
RANDOM = """random prompts, in place of texts:
--random-input-len positive N   number of random tokens in each prompt (default: 256)
--random-output-len positive N  exact number of new tokens for each prompt (default: the value of \
                                --max-tokens)
--shared-prefix positive N      number of tokens in a prefix that all prompts share, before the \
                                random ones (default: 0)
"""
SCORE = """rank continuations of a prompt by log-probability
$ "Who wrote Emma?" "It was Jane Austen." "It was Mark Twain."
$ --raw "The capital of France is" " Paris" " London"
$ --file rows.jsonl   # {"prompt": "a", "continuations": ["b"]}
texts* PROMPT CONTINUATION  a prompt, then its continuations
--file FILE                 read prompts and continuations from a .jsonl, .json or .parquet file
"""
EVAL = """run tasks of lm-evaluation-harness (pip install -e '.[eval]')
$ -m sft --tasks arc_easy,gsm8k --chat -o results.json
$ -m base --tasks hellaswag --num-fewshot 10 --limit 200
$ --tasks mine --include-path my_tasks/
--tasks! NAME,...        tasks, groups or tags, separated by commas; * matches any characters
--include-path DIR       folder with more tasks, as YAML files
--num-fewshot int N      number of examples before each question (default: as the task says)
--limit positive N       use only the first N questions of each task (default: all)
--chat                   ask questions as conversations, with examples as earlier turns (default: \
                         as plain text)
-o --output FILE         write the results to FILE as JSON, with the time and tokens they took
"""
INFO = f"""show architecture, memory needs and speed limits of a checkpoint
$
$ base:d20
$ owner/name --json
model? CHECKPOINT  {CHECKPOINT} (default: the bundled model)
--kv-cache-dtype auto|int8  data type of cached keys and values; auto: the compute type (=auto)
--check             compare each GPU kernel with plain PyTorch, and show the result
"""
WARMUP = f"""compile the CPU kernels that a checkpoint needs
$
$ -m sft --quantization int8
-m --model --model-dir CHECKPOINT  {CHECKPOINT} (default: the bundled model)
--step int N         training step of the checkpoint (default: the last one)
--dtype auto|float32|bfloat16  data type of the weights; auto: float32 (=auto)
--quantization int8|int6|int5|int4  format of the weights (default: as in the checkpoint)
--kv-cache-dtype auto|int8  data type of cached keys and values; auto: the compute type (=auto)
--recipe+ NAME=VALUE  constant of the model that the checkpoint does not contain, such as \
                     softcap=20; may be repeated
"""
CONVERT = f"""convert a checkpoint to the Hugging Face format or back
$ sft -o my-model-hf
$ owner/name -o my-model
model CHECKPOINT     {CHECKPOINT}
-o! --output DIR     folder to write; it must be new or empty
--step int N         training step of the checkpoint (default: the last one)
--tokenizer-dir DIR  folder of tokenizer.pkl or tokenizer.json (default: near the checkpoint)
--trust-tokenizer    accept a tokenizer whose pattern is not one of nanochat's; a hostile pattern \
                     can take unlimited time
--threads positive N  number of CPU threads (default: PyTorch's number, usually one for each core)
"""
QUANTIZE = f"""write a checkpoint with weights of 8, 6, 5 or 4 bits
$ sft -o my-model-4bit --bits 4
$ owner/name -o my-model --bits 6 --calibration text.txt
model CHECKPOINT     {CHECKPOINT}
-o! --output DIR     folder to write; it must be new or empty
--bits! 8|6|5|4      bits of each weight; with 4, groups of 32 weights share a scale and the \
                     output layer has 6 bits
--calibration FILE   text file for calibrating the rounding; it should resemble the text that the \
                     model will process (default: text that the model generates)
--tokens positive N  number of calibration tokens (=23000)
--seed int N         random seed of the text that the model generates (=0)
--step int N         training step of the checkpoint (default: the last one)
--tokenizer-dir DIR  folder of tokenizer.pkl or tokenizer.json (default: near the checkpoint)
--trust-tokenizer    accept a tokenizer whose pattern is not one of nanochat's; a hostile pattern \
                     can take unlimited time
--recipe+ NAME=VALUE  constant of the model that the checkpoint does not contain, such as \
                     softcap=20; may be repeated
--threads positive N  number of CPU threads (default: PyTorch's number, usually one for each core)
"""
LAB = """run programs that show how a paged KV cache works
$
$ fig12 --help
words... NAME  program and its flags (default: list the programs)
"""
LEARN = """take a course of ten steps, from a simple loop to this engine
$
$ 1
$ --start my-course   # copies the exercises
$ 1 --check
$ 8 --mine            # runs the step with your function
number? positive N  step to run (default: list the steps and your progress)
--check             check your solution of the step's exercise; do not run the step
--hint              show the next of three hints for the step's exercise
--mine              run step 6, 8 or 9 with your solution of its exercise
--start DIR         copy the exercises to the folder DIR
"""
TRACE = """turn a trace into a web page that shows every block at every step
$ run.jsonl -o run.html
$ run.jsonl --chrome run.json    # for ui.perfetto.dev
$ a.jsonl b.jsonl -o diff.html   # two runs side by side
file FILE         trace to read, written by --trace FILE
other? FILE       second trace, to compare with the first
-o --output PAGE  HTML file to write (default: FILE with the suffix .html; for two traces \
                  FILE-diff.html)
--chrome FILE     write Chrome's trace format to FILE; the page is then written only with --output
"""
# pages that commands share
MODEL = """model:
--step int N         training step of the checkpoint (default: the last one)
--device DEVICE      device to compute on: cpu, cuda, cuda:1, mps or auto; auto: cuda if \
                     available, else cpu (=auto)
--dtype auto|float32|bfloat16|float16  data type of the weights; auto: bfloat16 on CUDA, else \
                     float32 (=auto)
--recipe+ NAME=VALUE  constant of the model that the checkpoint does not contain, such as \
                     softcap=20; may be repeated
"""
ENGINE = f"""{MODEL}-m --model --model-dir CHECKPOINT  {CHECKPOINT} (default: the bundled model)
--tokenizer-dir DIR           folder of tokenizer.pkl or tokenizer.json (default: near the \
                              checkpoint)
--trust-tokenizer             accept a tokenizer whose pattern is not one of nanochat's; a hostile \
                              pattern can take unlimited time
--quantization int8|int6|int5|int4|fp8  round the weight matrices to fewer bits: fp8 on a GPU, the \
                              others on a CPU (default: no rounding)
engine:
--kv-cache-dtype auto|int8    data type of cached keys and values; auto: the compute type; \
                              int8: CPU only (=auto)
--threads positive N          number of CPU threads, at most the number of CPUs (default: \
                              PyTorch's number, usually one for each core)
--num-blocks int N            number of KV cache blocks of 16 tokens each (default: as many as fit \
                              into half of the free memory, at most 4 GB; on CUDA into 0.9 of it)
--max-batch-size int N        maximum number of sequences that run at once (default: 256; on CUDA \
                              512; 2 in chat)
--max-batched-tokens int N    maximum number of tokens that a step computes (default: 1024; on \
                              CUDA 8192)
--max-model-len int N         maximum number of tokens of a prompt and its answer together \
                              (default: the context length of the model)
--deterministic               make the logits of a request independent of the batch and the cache, \
                              bit for bit; slower
--tensor-parallel positive N  number of processes that share the model; torchrun starts them (=1)
--trace FILE         write every event of the KV cache to FILE; `microvllm trace FILE` shows them
"""
RAW = """prompts:
--raw   take prompts as plain text to complete, even if the model can chat
--chat  take prompts as chat messages, even if the model was not trained to chat
"""
LOOKUP = """options:
--prompt-lookup int N  draft up to N tokens in each step from earlier repetitions in the text (CPU \
                       only); the answers are the same, and repetitive text is faster (=0)
"""
POLICIES = """\
policies, each a name from `microvllm lab policies` or FILE.py:FUNCTION:
--eviction POLICY   which cached block to overwrite when no blank block is left (default: \
                    least_recently_used)
--victim POLICY     which running sequence to preempt when no block is free (default: youngest)
--admission POLICY  which waiting sequence to run next (default: first_come)
"""
WATCH = "--watch  draw the blocks and the queue in the terminal (pip install -e '.[watch]')\n"
SAMPLING = """sampling:
--max-tokens int N            maximum number of new tokens (={max_tokens})
--temperature float T         randomness; 0: always the most likely token (={temperature})
--top-k int K                 sample from the K most likely tokens; 0: from all (={top_k})
--top-p float P               nucleus sampling: keep the most likely tokens up to this total \
                              probability (default: 1, all tokens)
--min-p float P               keep tokens at least P times as likely as the most likely one \
                              (default: 0, all tokens)
--repetition-penalty float X  make tokens of the text so far less likely if X is above 1 \
                              (default: 1)
--stop+ TEXT                  stop before this text; may be repeated
--guide FILE                  allow only answers that match the JSON schema, regex or choices in \
                              FILE, a JSON object such as {{"regex": "[0-9]+"}} (pip install \
                              -e '.[guided]')
--ignore-eos                  generate --max-tokens tokens, even if the model ends its answer
--seed int N                  random seed; the same seed gives the same answers ({seed})
"""


def sampling(max_tokens: int, temperature: float, top_k: int, seed: str = "=0") -> str:
    """The table of the flags of SamplingParams, with these defaults."""
    return SAMPLING.format(max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed)


ALPACA = TEXTS + ENGINE + RAW + LOOKUP + WATCH + POLICIES + sampling(64, 0.7, 0)  # test_alpaca.py's
PAGES = {
    commands.run: RUN + ENGINE + RAW + LOOKUP + WATCH + POLICIES + sampling(128, 0.8, 50),
    commands.chat: CHAT + ENGINE + LOOKUP + sampling(256, 0.6, 50, seed="default: random"),
    commands.batch: BATCH + ENGINE + RAW + POLICIES + sampling(128, 0.8, 50),
    commands.bench: BENCH + ALPACA + RANDOM,
    commands.score: SCORE + ENGINE + RAW,
    commands.eval: EVAL + ENGINE,
    commands.info: INFO + MODEL,
    commands.warmup: WARMUP,
    commands.convert: CONVERT,
    commands.quantize: QUANTIZE,
    commands.lab: LAB,
    commands.learn: LEARN,
    commands.trace: TRACE,
}


def make_parser() -> Parser:
    """The parser of the whole command."""
    what = "Fast inference for nanochat language models, with a paged KV cache."
    parser = Parser(prog="microvllm", description=what, usage="%(prog)s COMMAND [options]")
    parser.add_argument("--version", action="version", version=f"microvllm {__version__}")
    subparsers = parser.add_subparsers(
        title="commands", description=list_commands(), help=SUPPRESS, prog=parser.prog
    )
    firsts = []
    for work, page in PAGES.items():
        name, (what, table) = work.__name__, page.split("\n", 1)
        lines = [f"  microvllm {name}{words}\n" for words in re.findall(r"^\$(.*)", table, re.M)]
        firsts.append(lines[0])
        sub = subparsers.add_parser(name, description=what, epilog="examples:\n" + "".join(lines))
        if name not in ("lab", "learn"):  # these two print texts only
            sub.add_argument("--json", action="store_true", help="print JSON, one object per line")
        add_flags(sub, table)
        sub.set_defaults(command=work)
    parser.epilog = "`microvllm COMMAND --help` shows the options of a command.\n\n"
    parser.epilog += "examples:\n" + "".join(firsts)
    parser.set_defaults(command=lambda args: show_help(parser))
    return parser


def list_commands() -> str:
    """The list of commands in --help, in groups."""
    summaries = {work.__name__: page.split("\n", 1)[0] for work, page in PAGES.items()}
    text = ""
    for title, names in GROUPS.items():
        lines = [f"  {name:10}{summaries[name]}\n" for name in names.split()]
        text += f"{title}:\n{''.join(lines)}\n"
    return text.rstrip()


def show_help(parser: Parser) -> None:
    """Without a command, print the help and exit with status 1, as git does: a script whose command
    name is empty by mistake has failed."""
    parser.print_help()
    parser.exit(1)


def add_flags(parser: Parser, table: str) -> None:
    """Add the flags of a table or page; the docstring of this module describes the format."""
    parser.set_defaults(**DEFAULTS)
    group = parser
    for line in re.findall(r"^[^$\n].*", table, re.M):
        if line.endswith(":"):
            group = parser if line == "options:" else parser.add_argument_group(line[:-1])
            continue
        name, mark, more, kind, takes, told = re.fullmatch(LINE, line).groups()
        told = re.sub(" {2,}", " ", told)
        options = {"help": re.sub(r"\(=.*\)", "(default: %(default)s)", told), **MARKS[mark]}
        if default := re.search(r"\(=(.*)\)", told):
            options["default"] = default[1]  # a text: argparse converts it
        if not takes:
            options["action"] = "store_true"
        elif "|" in takes:
            options["choices"] = takes.split("|")
        else:
            options |= {"type": TYPES.get(kind), "metavar": takes}
        group.add_argument(name, *more.split(), **options)
