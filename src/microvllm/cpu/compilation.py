"""Compilation of the kernels in a helper process, and what an engine does in the meantime.

numba compiles for tens of seconds and stores the result on disk. A process does not react to Ctrl-C
while it compiles. So a helper process (helper_process.py) compiles, once for each kind of engine:

    engine       computes in plain torch (or waits) ...   loads the kernels and calls them
    helper       compiles into numba's folder, writes the file that marks the kind, and ends

The helper runs a tiny model of the same kind, whose arrays have the same types. Loading runs the
same tiny model. Each kernel is on disk as soon as it is compiled. The marker files hold no code.

A background helper, which no engine waits for, has the lowest priority and outlives the engine.
So a run of four seconds leaves compiled kernels to the next run. A folder has one background helper
at a time. The lock file says what it does (process_lock.py). An engine that waits starts a helper
of its own, at the engine's priority. When that engine ends, its helper becomes a background helper.
If the folder is not writable, or no helper can be started, an engine that waits compiles in its own
process.

MICROVLLM_HELPER=attached ends helpers with their engine; MICROVLLM_HELPER=none starts no helper.
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

TRIES = 2  # helpers that may fail before the engine continues without one
PATIENCE = 60.0  # seconds that an engine waits for a background helper
REMEDY = "set NUMBA_CACHE_DIR to a folder of your own"
LOCKS = {FOREGROUND: "kernels.lock", BACKGROUND: "kernels-background.lock"}

_ready: set[str] = set()  # kinds whose kernels are loaded in this process, or are on disk
_told: set[str] = set()  # lines that were already printed
_helpers: dict[str, list[subprocess.Popen]] = {}  # for each kind; only the last may still run
_due: dict[str, float] = {}  # time of the next search for a helper, for each kind
_lock = threading.RLock()


def to_stderr(line: str) -> None:
    """Print a line for the user on stderr."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):  # closed
            print(f"microvllm: {line}", file=sys.stderr, flush=True)


# receives the lines for the user; whether engines wait for their kernels; and a function called
# while they wait, with the kind, the helper's description, and seconds. See `told`
tell: Callable[[str], object] = to_stderr
patient = True
progress: Callable[[str, dict, float], object] | None = None
_listeners: dict[str, Callable[[str], object]] = {}  # `tell` of the engines that do not wait


def run_tiny(backend_class: type, kind: str) -> None:
    """Run two steps of a tiny model of this kind, with a prompt and with one token. This loads from
    disk, or compiles, every kernel that an engine of this kind calls."""
    store, *parts = kind.split("-")
    width = 64 if "layers" in parts else 24  # with whole weight tiles, or with a partial one
    config, recipe = GPTConfig(16, 64, 2, 2, 1, width), RECIPES["5"]
    names = empty_model(config, recipe, config.vocab_size).state_dict()
    weights = {name: torch.zeros(weight.shape) for name, weight in names.items()}
    if "int8_cache" in parts:
        backend_class = with_int8_cache(backend_class, torch.device("cpu"))
    backend = backend_class(torch.device("cpu"), torch.float32)
    backend.prepare = lambda model: None  # the helper must not wait for itself
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
    if "layers" not in parts:  # also the product of a live module
        weight = backend.linear_class(None, True, 64, torch.float32)(
            [torch.zeros(4, 64)], backend, torch.float32
        )
        weight.multiply(torch.zeros(1, 64))


# kernels on disk ----------------------------------------------------------------------------------


def place(kind: str) -> Path | None:
    """Return the file that marks a kind as compiled, or None if numba stores no kernels."""
    cache = attend_rows._cache
    if not getattr(cache, "_enabled", False):
        return None
    return Path(cache.cache_path) / f"kernels-{kind}.{sys.implementation.cache_tag}.txt"


def folder() -> Path:
    """Return the folder of the kernels. Only valid if kernels are stored."""
    return Path(os.path.abspath(place("any").parent))


def contents(files: dict[str, int]) -> str:
    """Return the text of the marker file: the sources, compiler and processor of the kernels, and
    the size in bytes of each kernel's file."""
    return json.dumps([repr((STAMP, AMX, numba.__version__, *CPU)), files])


def compiled(kind: str) -> bool:
    """Return whether all kernels of a kind are on disk and complete."""
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
    """Compile or load the kernels in this process, and write the marker file."""
    run_tiny(backend_class, kind)
    file = place(kind)
    if file is None or kernel_cache.unkept:
        return
    with suppress(OSError):
        mine = [path for path in sorted(kernel_cache.used) if path.parent == file.parent]
        file.write_text(contents({path.name: path.stat().st_size for path in mine}), "utf-8")


# the helper ---------------------------------------------------------------------------------------


def serve(backend_class: type, kind: str, said: dict) -> None:
    """Compile the kernels of a kind in a helper, after its imports. said: the helper's description,
    see helper_process.py."""

    def report(name: str) -> None:
        said.update(now=name, done=len(kernel_cache.used))

    torch.set_num_threads(1)
    kernel_cache.compiling = report
    if not compiled(kind):  # another process may have compiled the kind in the meantime
        compile_here(backend_class, kind)
    os._exit(0 if compiled(kind) else UNKEPT)  # waiting threads cannot be joined


def sources() -> list[str]:
    """Return the folders of this process's modules, always including this package's.

    numba identifies kernels by the path of their source, so a helper must import the same files.
    The current folder is left out unless it holds the package: it may contain a module of any name.
    """
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    places = []
    for place in sys.path:
        if place:
            places.append(os.path.abspath(place))
        elif os.path.exists(root) and os.path.samefile(root, os.curdir):
            places.append(root)
    return places if root in places else [*places, root]


def start(kind: str, role: str) -> subprocess.Popen | None:
    """Start a FOREGROUND or BACKGROUND helper. Return None if another process already has a helper
    of that role. Raises OSError if no helper can be started."""
    setting = os.environ.get("MICROVLLM_HELPER")
    if getattr(sys, "frozen", False):
        raise OSError("sys.executable is this program and not Python")
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
        passes = os.name == "posix"  # other systems cannot pass a descriptor
        arguments["lock"] = lock if passes else None
        # isolated: import only from the folders of `sources`
        command = [sys.executable or "python", "-I", helper_process.__file__, json.dumps(arguments)]
        process = subprocess.Popen(
            command, env=env, pass_fds=(lock,) if passes else (),
            stdin=subprocess.DEVNULL if arguments["role"] == BACKGROUND else subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C on the terminal reaches only the engine
            creationflags=getattr(subprocess, "IDLE_PRIORITY_CLASS", 0) * (role == BACKGROUND),
        )  # fmt: skip
        if passes:
            describe(lock, description(kind, arguments["role"], process.pid))
    finally:
        os.close(lock)  # the helper holds its own copy
    # leaves no zombie process, even if no engine polls its helper again
    threading.Thread(target=process.wait, daemon=True).start()
    return process


def at_work() -> list[dict]:
    """Return the descriptions of the helpers of this folder, started by any process."""
    file = place("any")
    paths = [file.with_name(name) for name in LOCKS.values()] if file else []
    found = [process_lock.holder(path) for path in paths]
    return [said for said in found if said is not None]


def lives(kind: str) -> bool:
    """Return whether a helper runs that this process started."""
    started = _helpers.setdefault(kind, [])
    return bool(started) and started[-1].poll() is None


# messages to the user -----------------------------------------------------------------------------


@contextmanager
def told(
    how: Callable[[str], object], waits: bool, shows: Callable | None = None
) -> Iterator[None]:
    """Set how engines created in this context report that kernels are compiled.

    how(line) receives the messages. While an engine waits, it calls shows(kind, the helper's
    description, seconds) about ten times a second. Unless `waits` is set, engines compute in plain
    torch until the kernels are ready, where the results differ only by rounding."""
    global tell, patient, progress
    before = tell, patient, progress
    try:
        tell, patient, progress = how, waits, shows
        yield
    finally:
        tell, patient, progress = before


def say(tell: Callable[[str], object], line: str) -> None:
    """Send a line to the user, once."""
    if line not in _told:
        _told.add(line)
        tell(line)


def precision(kind: str) -> str:
    """Return a kind in words."""
    store, *parts = kind.split("-")
    store += ", weights of a live module" if "shared" in parts else ""
    return store + (", int8 K and V" if "int8_cache" in parts else "")


def warmup(kind: str) -> str:
    """Return the command that compiles a kind."""
    store, *parts = kind.split("-")
    flags = {"float32": "", "bfloat16": " --dtype bfloat16"}.get(store, f" --quantization {store}")
    if "int8_cache" in parts:
        flags += " --kv-cache-dtype int8"
    return f"`microvllm warmup{flags}`"


def being_compiled(kind: str, said: dict, waits: bool) -> str:
    """Return the message for kernels that a helper compiles. said: the description of a helper that
    another process started, {} for a helper of this process."""
    state = "are being compiled"
    if said.get("kind") == kind:
        state += f" by process {said.get('pid')}"
    elif said:
        state = f"will be compiled when process {said.get('pid')} has compiled its own"
    line = f"the kernels for this processor ({precision(kind)}) {state}. This happens once and "
    line += f"takes about half a minute. The kernels are stored in {folder()}."
    if not waits:
        line += " Until they are ready, answers are slower."
    return f"{line} To compile them in advance, run {warmup(kind)}."


def compiled_here(kind: str) -> str:
    """Return the message for kernels that this process compiles."""
    line = f"this process compiles the kernels for this processor ({precision(kind)}), which takes "
    line += "about half a minute"
    if (why := not_kept(kind)) is None:
        return f"{line}. No helper process could be used. The kernels are stored in {folder()}."
    return f"{line}. Every later process will do so again, because {why}: {REMEDY}"


def not_kept(*kinds: str) -> str | None:
    """Return why kernels are not stored on disk, or None if they are. kinds: those that helpers
    have compiled."""
    if place("any") is None:
        return kernel_cache.unkept or "numba stores no kernels"
    ended = [process.returncode for kind in kinds for process in _helpers.get(kind, [])]
    if UNKEPT in ended:
        return f"{folder()} cannot be written"
    return kernel_cache.unkept


# the engine ---------------------------------------------------------------------------------------


def begin(backend_class: type, kind: str, waits: bool) -> bool:
    """Prepare the kernels of a kind. Return True if they can be called.

    Otherwise a helper compiles them. Without `waits` this returns False, and `poll` reports when
    they are ready. With `waits` it blocks until they are. Ctrl-C ends the wait."""
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
    """Make sure that a background helper compiles a kind.

    Return its description if another process started it, or if it compiles another kind first;
    else {}. Raises OSError if no helper can be started."""
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
    """Wait until a kind is compiled, or until no helper can compile it.

    This also waits for a helper of another engine that waits. A background helper gets no processor
    time while other programs are busy. So after a minute this engine starts its own helper, which
    compiles the remaining kernels beside it.
    """
    began, own, tries, is_told = time.monotonic(), None, 0, False
    try:
        while not compiled(kind):
            others, seconds = at_work(), time.monotonic() - began
            same = next((said for said in others if said.get("kind") == kind), {})
            waited_for = any(said.get("role") != BACKGROUND for said in others)
            if not (lives_on(own) or waited_for or (same and seconds < PATIENCE)):
                if tries == TRIES or (own and own.returncode == UNKEPT) or compiled(kind):
                    return  # `compiled` is checked last: a helper may have ended just now
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
            own.stdin.close()  # after Ctrl-C the helper continues as a background helper


def lives_on(process: subprocess.Popen | None) -> bool:
    return process is not None and process.poll() is None


def poll(backend_class: type, kind: str) -> bool:
    """Return whether the kernels can be called now. Kernels that were just compiled are loaded.

    If helpers fail, for example for lack of memory, the engine continues in plain torch. Compiling
    during generation would block both the answers and Ctrl-C."""
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
    line = f"the kernels could not be compiled ({why}); this run continues without them"
    say(_listeners.get(kind, tell), line)
    return False
