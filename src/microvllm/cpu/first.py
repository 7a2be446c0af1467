"""The first run: who compiles the kernels, and what an engine does meanwhile?

numba compiles for tens of seconds, and keeps what it made on disk. A process that compiles hears no
Ctrl-C. So a helper process does it, once for each kind of engine:

    engine       plain torch ... ... ... ... loads the kernels, calls them     (or it waits)
    helper       compiles, writes to numba's folder, then a file that says so, and ends

The helper is a run of a tiny model of the same kind, whose arrays have the same types, and so is
the loading. Each kernel is on disk as soon as it is compiled: a helper that ends early, as it does
with its engine, leaves less work to the next one. The files hold no code. Where numba can write
nowhere, or no helper lives, an engine that waits compiles by itself.

What takes several steps in one call (crew.py) is a kind of its own, "...-several", that nobody
waits for: single steps have the same result. Its helper comes later, and takes only what time the
processor has left.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numba
import torch

from ..attention import PagedKVCache
from ..checkpoint import empty_model
from ..fused.int8_cache import with_int8_cache
from ..fused.model import FusedGPT, FusedRunner
from ..model import RECIPES, GPTConfig
from ..sampler import SamplingParams
from ..scheduler import BlockManager, Scheduler, Sequence
from .attention import attend_rows
from .vectors import AMX, CPU, STAMP

log = logging.getLogger("microvllm")
# what a person is told by, and whether engines wait for their kernels; see `told`
tell: Callable[[str], object] = log.info
patient = True
several: Callable | None = None  # that of crew.py, which imports this file
TRIES = 2  # helpers that may die before an engine goes on without
SEVERAL = "-several"  # the end of such a kind's name
LATER = 5  # seconds from the first wish for it to its helper: shorter runs end before that does
# what a helper runs; the paths where this process found its packages, and the kind are arguments
RUN = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from {0}.backend import CpuBackend
from {0}.crew import first
first.serve(CpuBackend, sys.argv[2])
"""

_ready: set[str] = set()  # kinds whose kernels this process has, or finds on disk
_told: set[str] = set()  # lines
_helpers: dict[str, list[subprocess.Popen]] = {}  # of each kind, the last one may run
_due: dict[str, float] = {}  # when `offers` looks for a kind again
_lock = threading.RLock()


def run_tiny(backend_class: type, kind: str) -> None:
    """Two steps of a tiny model of this kind, a prompt and a token: each kernel that an engine of
    this kind calls is loaded from disk, or compiled; of several steps another token."""
    store, *parts = kind.split("-")
    width = 64 if "layers" in parts else 24  # of which panels are whole, or not
    config, recipe = GPTConfig(16, 64, 2, 2, 1, width), RECIPES["5"]
    names = empty_model(config, recipe, config.vocab_size).state_dict()
    weights = {name: torch.zeros(weight.shape) for name, weight in names.items()}
    if "int8_cache" in parts:
        backend_class = with_int8_cache(backend_class, torch.device("cpu"))
    backend = backend_class(torch.device("cpu"), torch.float32)
    backend.prepare = lambda model: None  # it does not wait for itself
    store = None if store == "float32" else store
    model = FusedGPT(config, recipe, weights, backend, store=store)
    layout, dtype = model.kv_layout
    cache = PagedKVCache(layout, 8, 4, dtype, backend.device)
    scheduler = Scheduler(blocks := BlockManager(8, 4), 4, 16)
    scheduler.add(Sequence(0, [1, 2, 3], SamplingParams(max_tokens=3, top_k=2, seed=0)))
    runner = FusedRunner(model, cache, blocks)
    with torch.inference_mode():
        for _ in range(2):
            runner.launch(plan := scheduler.schedule())
            scheduler.update(plan, runner.read(plan))
        if "several" in parts:
            several(model, scheduler.schedule(), cache, blocks, 1)


# what is on disk ----------------------------------------------------------------------------------


def place(kind: str) -> Path | None:
    """The file that says that the kernels of a kind are compiled; None if numba keeps none."""
    cache = attend_rows._cache
    if not getattr(cache, "_enabled", False):
        return None
    return Path(cache.cache_path) / f"kernels-{kind}.{sys.implementation.cache_tag}.txt"


def contents() -> str:
    """What the file says: of which sources, compiler and processor they are."""
    return repr((STAMP, AMX, numba.__version__, *CPU))


def compiled(kind: str) -> bool:
    """Are the kernels on disk?"""
    file = place(kind)
    with suppress(OSError, ValueError):
        return bool(file) and file.read_text(encoding="utf-8") == contents()
    return False


def compile_here(backend_class: type, kind: str) -> None:
    """Compile or load the kernels in this process, and say so in the file."""
    run_tiny(backend_class, kind)
    if file := place(kind):
        with suppress(OSError):
            file.write_text(contents(), encoding="utf-8")


@contextmanager
def alone(end: str = "") -> Iterator[None]:
    """Hold a lock of numba's folder, which one process can have; where there is none, do not."""
    try:
        import fcntl

        file = open(place("").with_name(f"kernels{end}.lock"), "w")
    except (ImportError, OSError):
        yield
        return
    with file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# the helper ---------------------------------------------------------------------------------------


def serve(backend_class: type, kind: str) -> None:
    """All that a helper does. It ends when nobody holds the other end of its stdin any more, also
    in the midst of a kernel: so it ends with the engine, however that ends."""

    def follow() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(1)
    end = SEVERAL if kind.endswith(SEVERAL) else ""
    if end and hasattr(os, "nice"):
        os.nice(19)
    with alone(end):  # who compiles what others wait for does not wait for this one
        if not compiled(kind):  # by a helper that had the lock before
            compile_here(backend_class, kind)
    os._exit(0)  # the thread cannot be waited for


def start(kind: str) -> None:
    """Start a helper. Raises OSError if there can be none."""
    if getattr(sys, "frozen", False):
        raise OSError("sys.executable is this program, and no Python")
    root, sources = str(Path(__file__).resolve().parents[2]), [str(x) for x in sys.path if x]
    where = json.dumps(sources if root in sources else [*sources, root])
    # isolated: the folder that happens to be the current one may have a module of any name
    code = RUN.format(__package__)
    command = [sys.executable or "python", "-I", "-c", code, where, kind]
    helper = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C on the terminal is for the engine
    )  # fmt: skip
    _helpers.setdefault(kind, []).append(helper)
    atexit.register(helper.kill)


@contextmanager
def told(how: Callable[[str], object], waits: bool) -> Iterator[None]:
    """Engines made inside tell by how(line) that kernels are compiled; unless waits, they compute
    in plain torch until these are there, where that gives the same but for rounding."""
    global tell, patient
    before = tell, patient
    try:
        tell, patient = how, waits
        yield
    finally:
        tell, patient = before


def say(tell: Callable[[str], object], line: str) -> None:
    """Tell a line, once."""
    if line not in _told:
        _told.add(line)
        tell(line)


# the engine ---------------------------------------------------------------------------------------


def begin(backend_class: type, kind: str, waits: bool) -> bool:
    """Can kernels of this kind be called? If not a helper compiles them, and `poll` knows more; an
    engine that waits comes back when they are there. Ctrl-C ends the waiting."""
    with _lock:
        if kind in _ready or compiled(kind):
            _ready.add(kind)
            return True
        helpers = _helpers.setdefault(kind, [])
        with suppress(OSError):
            if place(kind) and not (helpers and helpers[-1].poll() is None):
                start(kind)
        lives = bool(helpers) and helpers[-1].poll() is None
        doing = "the kernels for this processor are being compiled, once, for about half a minute"
        if lives and not waits and not patient:
            say(tell, f"{doing}: until then answers come more slowly")
            return False
        say(tell, doing)
    if lives:
        helpers[-1].wait()
    with _lock:
        if not compiled(kind):
            compile_here(backend_class, kind)
        _ready.add(kind)
    return True


def poll(backend_class: type, kind: str) -> bool:
    """Can the kernels be called now? If they just were compiled they are loaded. Where helpers die,
    as of too little memory, the engine goes on in plain torch: to compile in the midst of its
    answers would hold up both them and Ctrl-C."""
    if kind in _ready:
        return True
    with _lock:
        helpers = _helpers[kind]
        if helpers[-1].poll() is None:
            return False
        if compiled(kind):
            run_tiny(backend_class, kind)
            _ready.add(kind)
            return True
        with suppress(OSError):
            if len(helpers) < TRIES:
                start(kind)
                return False
    line = "the kernels could not be compiled (exit status %d): this run goes on without them"
    say(log.warning, line % helpers[-1].returncode)
    return False


def offers(backend_class: type, kind: str) -> bool:
    """Can kernels be called that nobody waits for? They are looked for once a second at most, and
    never compiled here."""
    if kind in _ready:
        return True
    with _lock:
        now = time.monotonic()
        if now < _due.get(kind, 0):
            return False
        if compiled(kind):
            run_tiny(backend_class, kind)
            _ready.add(kind)
            return True
        helpers, wished = _helpers.setdefault(kind, []), kind in _due
        _due[kind] = now + (1 if wished else LATER)
        lives = bool(helpers) and helpers[-1].poll() is None
        with suppress(OSError):
            if wished and not lives and len(helpers) < TRIES and place(kind):
                start(kind)
    return False
