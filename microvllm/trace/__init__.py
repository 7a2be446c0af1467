"""See the memory: what happens to every block and request, as events, and pictures made of them.

    LLM(path, trace="run.jsonl"), `--trace run.jsonl` on the command line, or

    with llm.tracing() as trace:
        llm.generate(prompts)
    trace.page("run.html")

A trace is a text file with one JSON object, an event, a line. From the events alone every block's
state can be rebuilt at any time: `Replay` does it in Python, trace.html once more in a browser. `e`
is the event's name, `t` seconds since the trace began, `seq` the number of a sequence, given on
arrival. A list of such numbers is written "0-3 7", which is 0, 1, 2, 3, 7.

    event     what it means                      beside `e`
    pool      always the first: the pool as      version, blocks (block 0, the sink, included),
              it is now                          block_size, caching (is the prefix cache on),
                                                 max_batch_size, max_batched_tokens, hashes {block:
                                                 hash}, cached [block...] the next to be evicted
                                                 first; windows [tokens...] of each group of layers
                                                 with blocks of its own, -1 is none (the entries of
                                                 a table are theirs in turn); model, device, where
                                                 an engine is traced
    text      the first of these tokens follow   ids {token id: its text}; \\udce2 for a byte e2
                                                 that is a part of a character
    arrive    a request waits in the queue       t, seq, request, sample (of the request), samples
                                                 (it will fork into so many), tokens, prompt (how
                                                 many of the tokens are that), limit (it ends at so
                                                 many), score (so many tokens are scored, and none
                                                 written)
    resume    it was running already when the    seq, table [block...], computed
              trace began
    admit     it leaves the queue; its table is  t, seq, computed (tokens that the prefix cache had)
              empty and it gets:
    hit       blocks of the prefix cache, put    seq, blocks (0 for one that its window would
              at the table's end                 have left already)
    miss      the prefix cache had no more       seq, count (full blocks that were looked for and
                                                 not found)
    evict     a cached block is given up for     block
              another text: its hash is
              forgotten
    allocate  blank blocks, put at the table's   seq, blocks
              end
    copy      copy-on-write: another sample      seq, index (in the table), source, target
              also holds the block it is about
              to write, so it gets a copy
    publish   a block is full, and findable      seq, block, hash
              from now on
    fork      another sample of a request        seq, parent, sample, computed (how many tokens,
              begins: same tokens, same table    with the prompt's last, whose step begins next)
    begin     a step is planned and starts.      t, step (1, 2, ...), decodes "seqs" one token each,
              `computed` of all its sequences    prefills [[seq, start, stop]...] chunks of prompts,
              moves on                           of what has to be computed once more, or of a token
                                                 and guesses, where stop is beyond what is known
    reject    it had guessed wrongly: it goes    seq, computed, blocks
              back to fewer computed tokens, and
              so many blocks less at its table's
              end
    tokens    a step's new tokens are known      step, seqs "seqs", tokens [token id...] one for one
    end       the step is over                   t, step, ms {phase: milliseconds of the host}:
                                                 outside (between steps), schedule, batch (arrays),
                                                 forward, sample, wait (for the device), update
    force     a tool wrote these tokens          seq, tokens
    free      its blocks are given back, the     seq
              table's last first: each has one
              holder less. A block without
              holders is cached if it has a
              hash, else blank
    preempt   it was sent back to the queue to   t, seq
              make room, or by a reset
    finish    it is done                         t, seq, reason ("stop", "length", "error")
    abort     it was ended from outside          t, seq
    reset     a step failed, or the weights      t
              changed: steps under way are void
    forget    the prefix cache is emptied        -
    window    blocks have left the window of     seq, blocks
              their layers: one holder less
              each, and 0 stands in the table

A GPU's loop is one step ahead: `begin` of step 8 comes before `tokens` and `end` of step 7, whose
finished sequences are in step 8 by mistake. Scheduler and BlockManager tell most events themselves,
so they can be traced without a model as well, by `Trace.attach`; such a trace has no `end`.

    events.py   Trace, which listens and writes the events; `attach` begins one of an engine
    replay.py   the format, and Replay, which rebuilds the pool and all sequences from the events
    page.py     one HTML file that shows a trace        chrome.py   a file for Chrome and Perfetto
    watch.py    the pool drawn in the terminal while the engine works
"""

from .chrome import write_chrome
from .events import Trace, attach
from .page import TEMPLATE, write_page
from .replay import Life, Replay, read, spans, unspan
from .watch import picture, watching

__all__ = [
    "TEMPLATE", "Life", "Replay", "Trace", "attach", "picture", "read", "spans", "unspan",
    "watching", "write_chrome", "write_page",
]  # fmt: skip
