"""The command line's parsers: what each command is called, takes and shows as examples.

A command is a page: what it does, behind a `$` each example, and its flags. A line of flags has the
names, what the flag takes and, two spaces on, what --help says of it, where (=1) is its default. It
takes a text or one of TYPES, by the name that --help has for it; or one of a|b; or nothing, and is
a switch. Its first name ends with what MARKS say. A title with a colon begins a group of --help.
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
# of flags that --help shows none of, or that some commands do not have
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
prompts* PROMPT   text of a prompt (default: each line of standard input is one)
--prompt+ PROMPT  one more prompt; may be repeated
-n positive N     number of answers to each prompt (=1)
"""
CHAT = """hold a conversation with a model
$
$ -m rl:d20:650 --temperature 0.9
"""
BATCH = """answer a file of prompts; an interrupted job can be continued
$ prompts.jsonl -o answers.jsonl   # rows: {"prompt": "..."}
$ in.parquet -o out.parquet --prompt-column question --ordered
$ pairs.jsonl -o scores.jsonl --task score
$ in.jsonl -o out.jsonl --ray --replicas 2 --gpus-per-replica 1
input INPUT           file of rows, .jsonl or .parquet
-o! --output OUTPUT   file of answers, .jsonl or .parquet; rows that cannot be answered go to \
                      OUTPUT.errors, and the exit status is then 1
--ordered             write answers in the order of the input (default: in the order in which they \
                      are finished)
-n positive N         number of answers to each prompt (=1)
rows of the input:
--task chat|completion|score  what to do with each row (default: chat if the model can chat, else \
                      completion)
--prompt-column NAME  column of the prompt: a text, token ids or, for chat, a list of messages \
                      (=prompt)
--id-column NAME      column of a text or integer that differs in all rows (default: id if there \
                      is such a column, else the line number)
--params-column NAME  column of an object with sampling parameters, which replace those of the \
                      flags (=params)
--continuation-column NAME    column of a continuation or a list of continuations, for --task \
                      score (=continuation)
several engines:
--ray? ADDRESS        distribute the rows with Ray, on the cluster at ADDRESS, whose network must \
                      be trusted (default: the running cluster, else a new one on this machine)
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
--random-output-len positive N  number of new tokens for each prompt, exactly (default: that of \
                                --max-tokens)
--shared-prefix positive N      number of tokens, the same for all prompts, before the random ones \
                                (default: 0)
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
-o --output FILE         write the results to FILE as JSON, with the time and tokens that they took
"""
INFO = f"""show the shape, memory and speed limits of a checkpoint
$
$ base:d20
$ owner/name --json
model? CHECKPOINT  {CHECKPOINT} (default: the bundled model)
--kv-cache-dtype auto|int8  data type of cached keys and values; auto: as the model computes (=auto)
--check             compare each kernel of a GPU with plain torch, and show the result
"""
WARMUP = f"""compile the CPU kernels that a checkpoint needs
$
$ -m sft --quantization int8
-m --model --model-dir CHECKPOINT  {CHECKPOINT} (default: the bundled model)
--step int N         training step of the checkpoint (default: the last one)
--dtype auto|float32|bfloat16  data type of the weights; auto: float32 (=auto)
--quantization int8|int6|int5|int4  bits of the weights (default: as the checkpoint has them)
--kv-cache-dtype auto|int8  data type of cached keys and values; auto: as the model computes (=auto)
--recipe+ NAME=VALUE  constant of the model that the checkpoint does not contain, such as \
                     softcap=20; may be repeated
"""
CONVERT = f"""convert a checkpoint to Hugging Face's format, or to nanochat's
$ sft -o my-model-hf
$ owner/name -o my-model
model CHECKPOINT     {CHECKPOINT}
-o! --output DIR     folder to write; it must be new or empty
--step int N         training step of the checkpoint (default: the last one)
--tokenizer-dir DIR  folder of tokenizer.pkl or tokenizer.json (default: near the checkpoint)
--trust-tokenizer    accept a tokenizer whose pattern is not one of nanochat's; such a pattern may \
                     take any time for a text
--threads positive N  number of CPU threads (default: PyTorch's number, usually one for each core)
"""
QUANTIZE = f"""write a checkpoint with weights of 8, 6, 5 or 4 bits
$ sft -o my-model-4bit --bits 4
$ owner/name -o my-model --bits 6 --calibration text.txt
model CHECKPOINT     {CHECKPOINT}
-o! --output DIR     folder to write; it must be new or empty
--bits! 8|6|5|4      bits of each weight; with 4, groups of 32 weights share a scale and the \
                     output layer has 6 bits
--calibration FILE   text file on which the rounding is calibrated; it should resemble the text \
                     that the model will process (default: text that the model generates)
--tokens positive N  number of tokens of the calibration text (=23000)
--seed int N         random seed of the text that the model generates (=0)
--step int N         training step of the checkpoint (default: the last one)
--tokenizer-dir DIR  folder of tokenizer.pkl or tokenizer.json (default: near the checkpoint)
--trust-tokenizer    accept a tokenizer whose pattern is not one of nanochat's; such a pattern may \
                     take any time for a text
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
$ 8 --mine                # run the step with your function
number? positive N  step to run (default: list the steps and your progress)
--check             check your solution of the step's exercise; do not run the step
--hint              show the next of three hints for the step's exercise
--mine              run step 6, 8 or 9 with your solution of its exercise in it
--start DIR         copy the exercises to the folder DIR
"""
TRACE = """turn a trace into a web page that shows every block at every step
$ run.jsonl -o run.html
$ run.jsonl --chrome run.json    # for ui.perfetto.dev
$ a.jsonl b.jsonl -o diff.html   # two runs side by side
file FILE         trace to read, which --trace FILE has written
other? FILE       second trace, to compare with the first
-o --output PAGE  HTML file to write (default: FILE with the ending .html; for two traces \
                  FILE-diff.html)
--chrome FILE     write Chrome's trace format to FILE; the page is then written only with --output
"""
# what commands share
MODEL = """model:
--step int N         training step of the checkpoint (default: the last one)
--device DEVICE      device to compute on: cpu, cuda, cuda:1, mps, or auto for cuda where it is \
                     available, else cpu (=auto)
--dtype auto|float32|bfloat16|float16  data type of the weights; auto: bfloat16 on CUDA, else \
                     float32 (=auto)
--recipe+ NAME=VALUE  constant of the model that the checkpoint does not contain, such as \
                     softcap=20; may be repeated
"""
ENGINE = f"""{MODEL}-m --model --model-dir CHECKPOINT  {CHECKPOINT} (default: the bundled model)
--tokenizer-dir DIR           folder of tokenizer.pkl or tokenizer.json (default: near the \
                              checkpoint)
--trust-tokenizer             accept a tokenizer whose pattern is not one of nanochat's; such a \
                              pattern may take any time for a text
--quantization int8|int6|int5|int4|fp8  round the weight matrices to fewer bits: fp8 on a GPU, the \
                              others on a CPU (default: no rounding)
engine:
--kv-cache-dtype auto|int8    data type of cached keys and values; auto: as the model computes, \
                              int8: on a CPU only (=auto)
--threads positive N          number of CPU threads, at most the number of CPUs (default: \
                              PyTorch's number, usually one for each core)
--num-blocks int N            number of blocks of the KV cache, of 16 tokens each (default: as \
                              many as fit into half of the free memory, in 4 GB at most; on CUDA \
                              into 0.9 of it)
--max-batch-size int N        maximum number of sequences that run at once (default: 256; on CUDA \
                              512; in chat 2)
--max-batched-tokens int N    maximum number of tokens that a step computes (default: 1024; on \
                              CUDA 8192)
--max-model-len int N         maximum number of tokens of a prompt and its answer together \
                              (default: the context length of the model)
--deterministic               compute logits that are equal bit for bit, whatever else is in the \
                              batch or the cache; slower
--tensor-parallel positive N  number of processes that share the model, which torchrun has started \
                              (=1)
--trace FILE         write to FILE what happens to every block; `microvllm trace FILE` shows it
"""
RAW = """prompts:
--raw   take prompts as plain text to complete, even if the model can chat
--chat  take prompts as questions of a user, even if the model was not trained to chat
"""
LOOKUP = """options:
--prompt-lookup int N  draft up to N tokens in each step from repetitions in the text, on a CPU: \
                       the answers are the same, and ready sooner if text repeats itself (=0)
"""
POLICIES = """\
policies, each a name of `microvllm lab policies` or FILE.py:FUNCTION:
--eviction POLICY   which cached block is overwritten when no other is free (default: \
                    least_recently_used)
--victim POLICY     which running sequence is interrupted when no block is free (default: youngest)
--admission POLICY  which waiting sequence runs next (default: first_come)
"""
WATCH = "--watch  draw the blocks and the queue in the terminal (pip install -e '.[watch]')\n"
SAMPLING = """sampling:
--max-tokens int N            maximum number of new tokens (={max_tokens})
--temperature float T         randomness; 0 always takes the likeliest token (={temperature})
--top-k int K                 draw only from the K likeliest tokens; 0: from all (={top_k})
--top-p float P               draw only from the likeliest tokens whose probabilities reach the \
                              sum P (default: 1, all tokens)
--min-p float P               draw only tokens at least P times as likely as the likeliest \
                              (default: 0, all tokens)
--repetition-penalty float X  make tokens of the text so far less likely, if X is above 1 \
                              (default: 1)
--stop+ TEXT                  end the answer before TEXT; may be repeated
--guide FILE                  allow only answers that match the JSON schema, regex or choices in \
                              FILE, a JSON object such as {{"regex": "[0-9]+"}} (pip install \
                              -e '.[guided]')
--ignore-eos                  generate --max-tokens tokens, even if the model ends the answer
--seed int N                  random seed; the same seed gives the same answers ({seed})
"""


def sampling(max_tokens: int, temperature: float, top_k: int, seed: str = "=0") -> str:
    """The flags of SamplingParams, with these defaults."""
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
        if name not in ("lab", "learn"):  # which print no results but texts
            sub.add_argument(
                "--json", action="store_true", help="print JSON, an object on each line"
            )
        add_flags(sub, table)
        sub.set_defaults(command=work)
    parser.epilog = "`microvllm COMMAND --help` shows the options of a command.\n\n"
    parser.epilog += "examples:\n" + "".join(firsts)
    parser.set_defaults(command=lambda args: show_help(parser))
    return parser


def list_commands() -> str:
    """What --help says of each command, in groups."""
    summaries = {work.__name__: page.split("\n", 1)[0] for work, page in PAGES.items()}
    text = ""
    for title, names in GROUPS.items():
        lines = [f"  {name:10}{summaries[name]}\n" for name in names.split()]
        text += f"{title}:\n{''.join(lines)}\n"
    return text.rstrip()


def show_help(parser: Parser) -> None:
    """Without a command there is help and the exit status 1, as git has it: a script in which the
    name of the command is empty has failed."""
    parser.print_help()
    parser.exit(1)


def add_flags(parser: Parser, table: str) -> None:
    """Add the flags of a table, or of a page, as described above."""
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
            options["default"] = default[1]  # a text, to which argparse gives its type
        if not takes:
            options["action"] = "store_true"
        elif "|" in takes:
            options["choices"] = takes.split("|")
        else:
            options |= {"type": TYPES.get(kind), "metavar": takes}
        group.add_argument(name, *more.split(), **options)
