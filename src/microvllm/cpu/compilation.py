"""Compilation of the kernels in a helper process, and what an engine does in the meantime.

numba compiles for tens of seconds and stores the result on disk. A process does not react to Ctrl-C
while it compiles. So a helper process (helper_process.py) compiles, once for each kind of engine:

    engine       computes in plain torch (or waits) ...   loads the kernels and calls them
    helper       compiles into numba's folder, writes the file that marks the kind, and ends

The helper runs a tiny model of the same kind, whose arrays have the same types. Loading runs the
same tiny model. Each kernel is on disk as soon as it is compiled. The marker files hold no code.

A background helper has the lowest priority and continues after its engine has ended. No engine
waits for it. So even a short run leaves compiled kernels for the next run. A folder has one
background helper at a time. The lock file describes its work (process_lock.py). An engine that
waits starts its own helper, with the engine's priority. When that engine ends, its helper becomes a
background helper. If the folder is not writable, or no helper can be started, an engine that waits
compiles in its own process.

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
from .helper_process import (
    ATTACHED,
    BACKGROUND,
    FOREGROUND,
    NOT_STORED,
    new_description,
    write_description,
)
from .simd import AMX, CPU, STAMP

TRIES = 2  # number of helpers that may fail before the engine continues without kernels
PATIENCE = 60.0  # seconds that an engine waits for a background helper
REMEDY = "set NUMBA_CACHE_DIR to a folder of your own"
LOCKS = {FOREGROUND: "kernels.lock", BACKGROUND: "kernels-background.lock"}

_ready: set[str] = set()  # kinds whose kernels are loaded in this process, or are on disk
_printed_lines: set[str] = set()  # lines that were already printed
_helpers: dict[str, list[subprocess.Popen]] = {}  # for each kind; only the last may still run
_due: dict[str, float] = {}  # time of the next search for a helper, for each kind
_lock = threading.RLock()


def to_stderr(line: str) -> None:
    """Print a line for the user on stderr."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):  # stderr is closed
            print(f"microvllm: {line}", file=sys.stderr, flush=True)


# set by `reporting`
tell: Callable[[str], object] = to_stderr  # receives the lines for the user
patient = True  # whether engines wait for their kernels
# called while an engine waits, with the kind, the description of the helper, and seconds
progress: Callable[[str, dict, float], object] | None = None
_listeners: dict[str, Callable[[str], object]] = {}  # `tell` of the engines that do not wait


def run_tiny(backend_class: type, kind: str) -> None:
    """Run two steps of a tiny model of this kind, with a prompt and with one token. This loads from
    disk, or compiles, every kernel that an engine of this kind calls."""
    store, *parts = kind.split("-")
    width = 64 if "layers" in parts else 24  # with full weight tiles only, or with a partial one
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
    if file is None or kernel_cache.store_error:
        return
    with suppress(OSError):
        kernels = [path for path in sorted(kernel_cache.used) if path.parent == file.parent]
        sizes = {path.name: path.stat().st_size for path in kernels}
        file.write_text(contents(sizes), "utf-8")


# the helper ---------------------------------------------------------------------------------------


def serve(backend_class: type, kind: str, description: dict) -> None:
    """Compile the kernels of a kind in a helper, after its imports. description: the helper's, see
    helper_process.new_description."""

    def report(name: str) -> None:
        description.update(now=name, done=len(kernel_cache.used))

    torch.set_num_threads(1)
    kernel_cache.compiling = report
    if not compiled(kind):  # another process may have compiled the kind in the meantime
        compile_here(backend_class, kind)
    os._exit(0 if compiled(kind) else NOT_STORED)  # a thread may still wait for stdin


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
        can_pass_lock = os.name == "posix"  # only POSIX systems can pass a file descriptor
        arguments["lock"] = lock if can_pass_lock else None
        # isolated: import only from the folders of `sources`
        command = [sys.executable or "python", "-I", helper_process.__file__, json.dumps(arguments)]
        process = subprocess.Popen(
            command, env=env, pass_fds=(lock,) if can_pass_lock else (),
            stdin=subprocess.DEVNULL if arguments["role"] == BACKGROUND else subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C on the terminal reaches only the engine
            creationflags=getattr(subprocess, "IDLE_PRIORITY_CLASS", 0) * (role == BACKGROUND),
        )  # fmt: skip
        if can_pass_lock:
            write_description(lock, new_description(kind, arguments["role"], process.pid))
    finally:
        os.close(lock)  # the helper has its own copy of the descriptor
    # wait for the helper in a thread, so that no zombie process remains if no engine polls it again
    threading.Thread(target=process.wait, daemon=True).start()
    return process


def running_helpers() -> list[dict]:
    """Return the descriptions of the helpers of this folder, started by any process."""
    file = place("any")
    paths = [file.with_name(name) for name in LOCKS.values()] if file else []
    holders = [process_lock.holder(path) for path in paths]
    return [description for description in holders if description is not None]


def has_helper(kind: str) -> bool:
    """Return whether a helper runs that this process started for a kind."""
    helpers = _helpers.setdefault(kind, [])
    return bool(helpers) and is_running(helpers[-1])


def is_running(process: subprocess.Popen | None) -> bool:
    return process is not None and process.poll() is None


# messages to the user -----------------------------------------------------------------------------


@contextmanager
def reporting(
    listener: Callable[[str], object], waits: bool, show: Callable | None = None
) -> Iterator[None]:
    """Set how engines created in this context report that kernels are compiled.

    listener(line) receives the messages. While an engine waits, it calls show(kind, the helper's
    description, seconds) about ten times a second. Unless `waits` is set, engines for which the
    results differ only by rounding compute in plain torch until the kernels are ready."""
    global tell, patient, progress
    before = tell, patient, progress
    try:
        tell, patient, progress = listener, waits, show
        yield
    finally:
        tell, patient, progress = before


def say(tell: Callable[[str], object], line: str) -> None:
    """Send a line to the user, once."""
    if line not in _printed_lines:
        _printed_lines.add(line)
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


def being_compiled(kind: str, description: dict, waits: bool) -> str:
    """Return the message for kernels that a helper compiles. description: that of a helper that
    another process started, {} for a helper of this process."""
    state = "are being compiled"
    if description.get("kind") == kind:
        state += f" by process {description.get('pid')}"
    elif description:
        state = f"will be compiled after those of process {description.get('pid')}"
    line = f"the kernels for this processor ({precision(kind)}) {state}. This happens once and "
    line += f"takes 15 to 60 seconds. The kernels are stored in {folder()}."
    if not waits:
        line += " Until they are ready, answers are slower."
    return f"{line} To compile them in advance, run {warmup(kind)}."


def compiled_here(kind: str) -> str:
    """Return the message for kernels that this process compiles."""
    line = f"this process compiles the kernels for this processor ({precision(kind)}), which takes "
    line += "15 to 60 seconds"
    if (why := find_store_error(kind)) is None:
        return f"{line}. No helper process could be used. The kernels are stored in {folder()}."
    return f"{line}. Every later process will do so again, because {why}: {REMEDY}"


def find_store_error(*kinds: str) -> str | None:
    """Return why kernels are not stored on disk, or None if they are. kinds: those that helpers
    have compiled."""
    if place("any") is None:
        return kernel_cache.store_error or "numba stores no kernels"
    statuses = [process.returncode for kind in kinds for process in _helpers.get(kind, [])]
    if NOT_STORED in statuses:
        return f"{folder()} cannot be written"
    return kernel_cache.store_error


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
                description = find_helper(kind)
                _listeners[kind] = tell
                say(tell, being_compiled(kind, description, waits))
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
    if has_helper(kind):
        return {}
    others = running_helpers()
    for description in others:
        if description.get("kind") == kind:
            return description
    if not others and (process := start(kind, BACKGROUND)):
        _helpers[kind].append(process)
        return {}
    return others[0] if others else {}


def wait(kind: str) -> None:
    """Wait until a kind is compiled, or until no helper can compile it.

    This also waits for a helper of another engine that waits. A background helper gets no processor
    time while other programs are busy. So after PATIENCE seconds this engine starts its own helper,
    which compiles the remaining kernels at the same time.
    """
    began, helper, tries, is_reported = time.monotonic(), None, 0, False
    try:
        while not compiled(kind):
            others, seconds = running_helpers(), time.monotonic() - began
            same = next((other for other in others if other.get("kind") == kind), {})
            has_foreground = any(other.get("role") != BACKGROUND for other in others)
            if not (is_running(helper) or has_foreground or (same and seconds < PATIENCE)):
                if tries == TRIES or (helper and helper.returncode == NOT_STORED) or compiled(kind):
                    return  # check `compiled` last, because a helper may have just ended
                try:
                    helper = start(kind, FOREGROUND)
                except OSError:
                    return
                if helper:
                    tries += 1
                    _helpers.setdefault(kind, []).append(helper)
            if (helper or any(others)) and not is_reported:
                is_reported = True
                other = {} if helper else (same or others[0])
                say(tell, being_compiled(kind, other, waits=True))
            if progress:
                progress(kind, same, seconds)
            time.sleep(0.1)
    finally:
        if helper and helper.stdin:
            helper.stdin.close()  # after Ctrl-C the helper continues as a background helper


def poll(backend_class: type, kind: str) -> bool:
    """Return whether the kernels can be called now. Kernels that were just compiled are loaded.

    If helpers fail, for example for lack of memory, the engine continues in plain torch. Compiling
    during generation would block both the answers and Ctrl-C."""
    if kind in _ready:
        return True
    with _lock:
        if has_helper(kind):
            return False
        if compiled(kind):
            run_tiny(backend_class, kind)
            _ready.add(kind)
            return True
        statuses = [process.returncode for process in _helpers[kind]]
        if len(statuses) < TRIES and NOT_STORED not in statuses:
            now = time.monotonic()
            if now >= _due.get(kind, 0):
                _due[kind] = now + 0.5
                with suppress(OSError):
                    find_helper(kind)
            return False
    why = f"exit status {statuses[-1]}"
    if NOT_STORED in statuses:
        why = f"{find_store_error(kind)}: {REMEDY}"
    line = f"the kernels could not be compiled ({why}); this run continues without them"
    say(_listeners.get(kind, tell), line)
    return False
