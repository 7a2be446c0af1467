"""Compilation of the kernels: which process does it, and what does an engine do meanwhile?

numba compiles for tens of seconds, and keeps what it made on disk. A process that compiles hears no
Ctrl-C. So a helper process (helper_process.py) does it, once for each kind of engine:

    engine       plain torch ... ... ... ... loads the kernels, calls them     (or it waits)
    helper       compiles, writes to numba's folder, then a file that says so, and ends

The helper is a run of a tiny model of the same kind, whose arrays have the same types, and so is
the loading. Each kernel is on disk as soon as it is compiled. The files hold no code.

A helper that no engine waits for has the lowest priority and outlives the engine, so that a run of
four seconds leaves compiled kernels to the next one. There is one at a time in a folder, and its
lock file says what it does (process_lock.py). An engine that waits has a helper of its own, at its
own priority; once that engine is gone it is like the others. Where nothing can be written, or no
helper can be started, an engine that waits compiles by itself.

MICROVLLM_HELPER=attached: helpers end with their engine; =none: there are none.
"""

from __future__ import annotations

import json
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
from ..blocks import BlockManager, BlockPool
from ..checkpoint import empty_model
from ..fused.int8_cache import with_int8_cache
from ..fused.model import FusedGPT
from ..model import RECIPES, GPTConfig
from ..runner import Hooks, Runner
from ..sampler import SamplingParams
from ..scheduler import Scheduler, Sequence
from . import helper_process, kernel_cache, process_lock
from .attention import attend_rows
from .helper_process import ATTACHED, BACKGROUND, FOREGROUND, UNKEPT, describe, description
from .simd import AMX, CPU, STAMP

TRIES = 2  # helpers that may die before an engine goes on without
PATIENCE = 60.0  # seconds that an engine waits for a helper of the lowest priority
REMEDY = "set NUMBA_CACHE_DIR to a folder of your own"
LOCKS = {FOREGROUND: "kernels.lock", BACKGROUND: "kernels-background.lock"}

_ready: set[str] = set()  # kinds whose kernels this process has, or finds on disk
_told: set[str] = set()  # lines
_helpers: dict[str, list[subprocess.Popen]] = {}  # of each kind, the last one may run
_due: dict[str, float] = {}  # when a kind is looked for again
_lock = threading.RLock()


def to_stderr(line: str) -> None:
    """Tell a person who uses the library."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):  # closed
            print(f"microvllm: {line}", file=sys.stderr, flush=True)


# where lines for a person go, whether engines wait for their kernels, and what is called meanwhile
# with the kind, what its helper says of itself, and seconds; see `told`
tell: Callable[[str], object] = to_stderr
patient = True
progress: Callable[[str, dict, float], object] | None = None
_listeners: dict[str, Callable[[str], object]] = {}  # `tell` of the engines that do not wait


def run_tiny(backend_class: type, kind: str) -> None:
    """Two steps of a tiny model of this kind, a prompt and a token: each kernel that an engine of
    this kind calls is loaded from disk, or compiled."""
    store, *parts = kind.split("-")
    width = 64 if "layers" in parts else 24  # its weight tiles are whole, or not
    config, recipe = GPTConfig(16, 64, 2, 2, 1, width), RECIPES["5"]
    names = empty_model(config, recipe, config.vocab_size).state_dict()
    weights = {name: torch.zeros(weight.shape) for name, weight in names.items()}
    if "int8_cache" in parts:
        backend_class = with_int8_cache(backend_class, torch.device("cpu"))
    backend = backend_class(torch.device("cpu"), torch.float32)
    backend.prepare = lambda model: None  # it does not wait for itself
    store = None if store == "float32" else store
    share = "shared" in parts
    model = FusedGPT(config, recipe, weights, backend, share=share, store=store)
    layout, dtype = model.kv_layout
    cache = PagedKVCache(layout, 8, 4, dtype, backend.device)
    blocks = BlockManager(BlockPool(8), block_size=4)
    scheduler = Scheduler(blocks, max_batch_size=4, max_batched_tokens=16)
    params = SamplingParams(max_tokens=3, top_k=2)
    scheduler.add(Sequence(0, [1, 2, 3], params, seed=0, max_length=6))
    runner = Runner(model, cache, blocks, Hooks(), backend.sample)
    for _ in range(2):
        plan = scheduler.schedule()
        scheduler.update(plan, runner.run(plan))
    if "layers" not in parts:  # a live module's product, too
        weight = backend.linear_class(None, True, 64, torch.float32)(
            [torch.zeros(4, 64)], backend, torch.float32
        )
        weight.multiply(torch.zeros(1, 64))


# what is on disk ----------------------------------------------------------------------------------


def place(kind: str) -> Path | None:
    """The file that says that the kernels of a kind are compiled; None if numba keeps none."""
    cache = attend_rows._cache
    if not getattr(cache, "_enabled", False):
        return None
    return Path(cache.cache_path) / f"kernels-{kind}.{sys.implementation.cache_tag}.txt"


def folder() -> Path:
    """Where kernels are kept, if they are."""
    return Path(os.path.abspath(place("any").parent))


def contents(files: dict[str, int]) -> str:
    """What the file says: the sources, compiler and processor of the kernels, and the size of each
    of their files in bytes."""
    return json.dumps([repr((STAMP, AMX, numba.__version__, *CPU)), files])


def compiled(kind: str) -> bool:
    """Are the kernels on disk, all of them whole?"""
    file = place(kind)
    if file is None:
        return False
    with suppress(OSError, ValueError, TypeError, AttributeError):
        text = file.read_text(encoding="utf-8")
        _, files = json.loads(text)
        sizes = {name: (file.parent / name).stat().st_size for name in files}
        return text == contents(sizes)
    return False


def compile_here(backend_class: type, kind: str) -> None:
    """Compile or load the kernels in this process, and say so in the file."""
    run_tiny(backend_class, kind)
    file = place(kind)
    if file is None or kernel_cache.unkept:
        return
    with suppress(OSError):
        mine = [path for path in sorted(kernel_cache.used) if path.parent == file.parent]
        file.write_text(contents({path.name: path.stat().st_size for path in mine}), "utf-8")


# the helper ---------------------------------------------------------------------------------------


def serve(backend_class: type, kind: str, said: dict) -> None:
    """What a helper does once it has imported all. said: its description (helper_process.py)."""

    def report(name: str) -> None:
        said.update(now=name, done=len(kernel_cache.used))

    torch.set_num_threads(1)
    kernel_cache.compiling = report
    if not compiled(kind):  # by another process meanwhile
        compile_here(backend_class, kind)
    os._exit(0 if compiled(kind) else UNKEPT)  # threads that wait cannot be waited for


def sources() -> list[str]:
    """The places where this process found its modules, and this package for sure: numba keeps
    kernels by the path of their source, so a helper must find the same one. The current folder is
    none of them, unless the package is there: it may have a module of any name."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    places = []
    for place in sys.path:
        if place:
            places.append(os.path.abspath(place))
        elif os.path.exists(root) and os.path.samefile(root, os.curdir):
            places.append(root)
    return places if root in places else [*places, root]


def start(kind: str, role: str) -> subprocess.Popen | None:
    """Start a helper, FOREGROUND or BACKGROUND. Returns None where another process has one of that
    role. Raises OSError if there can be none."""
    setting = os.environ.get("MICROVLLM_HELPER")
    if getattr(sys, "frozen", False):
        raise OSError("sys.executable is this program, and no Python")
    if setting == "none":
        raise OSError("MICROVLLM_HELPER=none")
    arguments = {
        "path": sources(), "package": __package__, "kind": kind,
        "role": ATTACHED if setting == "attached" else role,
    }  # fmt: skip
    env = dict(os.environ)
    if numba.config.CACHE_DIR:
        env["NUMBA_CACHE_DIR"] = os.path.abspath(numba.config.CACHE_DIR)
    lock = process_lock.take(place(kind).with_name(LOCKS[role]))
    if lock is None:
        return None
    try:
        passes = os.name == "posix"  # elsewhere no descriptor is passed on
        arguments["lock"] = lock if passes else None
        # isolated: what `sources` names, and nothing else
        command = [sys.executable or "python", "-I", helper_process.__file__, json.dumps(arguments)]
        process = subprocess.Popen(
            command, env=env, pass_fds=(lock,) if passes else (),
            stdin=subprocess.DEVNULL if arguments["role"] == BACKGROUND else subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C on the terminal is for the engine
            creationflags=getattr(subprocess, "IDLE_PRIORITY_CLASS", 0) * (role == BACKGROUND),
        )  # fmt: skip
        if passes:
            describe(lock, description(kind, arguments["role"], process.pid))
    finally:
        os.close(lock)  # the helper has it
    # no zombie is left, whether or not an engine looks for its helper again
    threading.Thread(target=process.wait, daemon=True).start()
    return process


def at_work() -> list[dict]:
    """What the helpers of this folder say of themselves, whichever process started them."""
    file = place("any")
    paths = [file.with_name(name) for name in LOCKS.values()] if file else []
    found = [process_lock.holder(path) for path in paths]
    return [said for said in found if said is not None]


def lives(kind: str) -> bool:
    """Does a helper run that this process has started?"""
    started = _helpers.setdefault(kind, [])
    return bool(started) and started[-1].poll() is None


# what a person hears ------------------------------------------------------------------------------


@contextmanager
def told(
    how: Callable[[str], object], waits: bool, shows: Callable | None = None
) -> Iterator[None]:
    """Engines made inside tell by how(line) that kernels are compiled, and while they wait call
    shows(kind, what the helper says, seconds) about ten times a second. Unless waits, they compute
    in plain torch until the kernels are there, where that gives the same but for rounding."""
    global tell, patient, progress
    before = tell, patient, progress
    try:
        tell, patient, progress = how, waits, shows
        yield
    finally:
        tell, patient, progress = before


def say(tell: Callable[[str], object], line: str) -> None:
    """Tell a line, once."""
    if line not in _told:
        _told.add(line)
        tell(line)


def precision(kind: str) -> str:
    """A kind in words."""
    store, *parts = kind.split("-")
    store += ", of a live module" if "shared" in parts else ""
    return store + (", K and V in int8" if "int8_cache" in parts else "")


def warmup(kind: str) -> str:
    """The command that compiles a kind."""
    store, *parts = kind.split("-")
    flags = {"float32": "", "bfloat16": " --dtype bfloat16"}.get(store, f" --quantization {store}")
    if "int8_cache" in parts:
        flags += " --kv-cache-dtype int8"
    return f"`microvllm warmup{flags}`"


def being_compiled(kind: str, said: dict, waits: bool) -> str:
    """The line for kernels that a helper compiles. said: what a helper says that another process
    started, {} for one of this process."""
    by = ""
    if said.get("kind") == kind:
        by = f" by process {said.get('pid')}"
    elif said:
        by = f" after those that process {said.get('pid')} compiles now"
    line = f"the kernels for this processor ({precision(kind)}) are being compiled{by}, once, for "
    line += f"about half a minute, and are kept in {folder()}"
    if not waits:
        line += "; until they are there answers come more slowly"
    return f"{line}; {warmup(kind)} does it beforehand"


def compiled_here(kind: str) -> str:
    """The line for kernels that this process compiles."""
    line = f"the kernels for this processor ({precision(kind)}) are compiled in this process, for "
    line += "about half a minute"
    if (why := not_kept(kind)) is None:
        return f"{line}, since no helper process could do it, and are kept in {folder()}"
    return f"{line}, and again in each later one, because {why}: {REMEDY}"


def not_kept(*kinds: str) -> str | None:
    """Why kernels are not kept on disk, None if they are. kinds: what helpers have compiled."""
    if place("any") is None:
        return kernel_cache.unkept or "numba keeps none"
    ended = [process.returncode for kind in kinds for process in _helpers.get(kind, [])]
    if UNKEPT in ended:
        return f"{folder()} cannot be written"
    return kernel_cache.unkept


# the engine ---------------------------------------------------------------------------------------


def begin(backend_class: type, kind: str, waits: bool) -> bool:
    """Can kernels of this kind be called? If not a helper compiles them, and `poll` knows more; an
    engine that waits comes back when they are there. Ctrl-C ends the waiting."""
    waits = waits or patient
    with _lock:
        if kind in _ready or compiled(kind):
            _ready.add(kind)
            return True
        if not waits and place(kind):
            with suppress(OSError):
                said = find_helper(kind)
                _listeners[kind] = tell
                say(tell, being_compiled(kind, said, waits))
                return False
    if place(kind):
        wait(kind)
    with _lock:
        if not compiled(kind):
            say(tell, compiled_here(kind))
            if progress:
                progress(kind, {}, 0.0)
            compile_here(backend_class, kind)
        _ready.add(kind)
    return True


def find_helper(kind: str) -> dict:
    """See that a helper compiles a kind, which no engine waits for. Returns what it says of itself
    if another process started it, or if it has another kind to compile before this one; else {}.
    Raises OSError if there can be none."""
    if lives(kind):
        return {}
    others = at_work()
    for said in others:
        if said.get("kind") == kind:
            return said
    if not others and (process := start(kind, BACKGROUND)):
        _helpers[kind].append(process)
        return {}
    return others[0] if others else {}


def wait(kind: str) -> None:
    """Come back when a kind is compiled, or when no helper can do that.

    A helper that another engine waits for is waited for here, too. One of the lowest priority gets
    no time at all where other programs are busy: after a minute this engine's own helper compiles
    what is left, beside it.
    """
    began, own, tries, is_told = time.monotonic(), None, 0, False
    try:
        while not compiled(kind):
            others, seconds = at_work(), time.monotonic() - began
            same = next((said for said in others if said.get("kind") == kind), {})
            waited_for = any(said.get("role") != BACKGROUND for said in others)
            if not (lives_on(own) or waited_for or (same and seconds < PATIENCE)):
                if tries == TRIES or (own and own.returncode == UNKEPT) or compiled(kind):
                    return  # the last one: a helper may have ended just now
                try:
                    own = start(kind, FOREGROUND)
                except OSError:
                    return
                if own:
                    tries += 1
                    _helpers.setdefault(kind, []).append(own)
            if (own or any(others)) and not is_told:
                is_told = True
                say(tell, being_compiled(kind, {} if own else (same or others[0]), waits=True))
            if progress:
                progress(kind, same, seconds)
            time.sleep(0.1)
    finally:
        if own and own.stdin:
            own.stdin.close()  # after Ctrl-C it goes on, at the lowest priority


def lives_on(process: subprocess.Popen | None) -> bool:
    return process is not None and process.poll() is None


def poll(backend_class: type, kind: str) -> bool:
    """Can the kernels be called now? If they just were compiled they are loaded. Where helpers die,
    as of too little memory, the engine goes on in plain torch: to compile in the midst of its
    answers would hold up both them and Ctrl-C."""
    if kind in _ready:
        return True
    with _lock:
        if lives(kind):
            return False
        if compiled(kind):
            run_tiny(backend_class, kind)
            _ready.add(kind)
            return True
        ended = [process.returncode for process in _helpers[kind]]
        if len(ended) < TRIES and UNKEPT not in ended:
            now = time.monotonic()
            if now >= _due.get(kind, 0):
                _due[kind] = now + 0.5
                with suppress(OSError):
                    find_helper(kind)
            return False
    why = f"exit status {ended[-1]}" if UNKEPT not in ended else f"{not_kept(kind)}: {REMEDY}"
    line = f"the kernels could not be compiled ({why}); this run goes on without them"
    say(_listeners.get(kind, tell), line)
    return False
