"""Runs a program that a model wrote, like nanochat's execution.py, and checks for errors.

The program runs in its own interpreter with limits of time, memory and file size, an empty
environment, and a working directory that is deleted afterwards. Functions that can do harm by
accident are removed. This is not a sandbox: a malicious program can read files and open sockets.
Evaluate models that you do not trust in a container.
"""

import subprocess
import sys
import tempfile

SECONDS = 5.0
MEMORY_BYTES = 256 * 2**20
FILE_BYTES = 2**26

# runs in the program's process before it, and removes what nanochat's version removes
PREPARE = """
import builtins, faulthandler, os, shutil, subprocess, sys
try:
    import resource
except ImportError:
    resource = None
if resource is not None and sys.platform != "darwin":
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_STACK):
        resource.setrlimit(limit, ({memory}, {memory}))
    resource.setrlimit(resource.RLIMIT_FSIZE, ({file}, {file}))
faulthandler.disable()
os.environ["OMP_NUM_THREADS"] = "1"
removed = [
    (builtins, "exit quit help"),
    (shutil, "rmtree move chown"),
    (subprocess, "Popen"),
    (os, "kill killpg system fork forkpty putenv setuid getcwd chdir fchdir chroot"),
    (os, "remove removedirs rmdir unlink rename renames replace truncate"),
    (os, "chmod fchmod lchmod chown fchown lchown lchflags"),
]
for module, names in removed:
    for name in names.split():
        setattr(module, name, None)
for name in "resource psutil joblib ipdb tkinter".split():
    sys.modules[name] = None
"""


def runs_without_error(program: str, seconds: float = SECONDS) -> bool:
    """Run a Python program. Returns False if it raises, exits with a status other than 0, or takes
    longer than `seconds`, after which it is killed. Its output is discarded."""
    prepare = PREPARE.format(memory=MEMORY_BYTES, file=FILE_BYTES)
    run = f"exec(compile({program!r}, '<program>', 'exec'), {{'__name__': '__main__'}})"
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = subprocess.run(
                [sys.executable, "-I", "-c", f"{prepare}\n{run}\n"],
                cwd=folder,
                env={"PATH": "/usr/bin:/bin"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=seconds,
            )
        except (subprocess.TimeoutExpired, ValueError, OSError):  # also a NUL, or too long
            return False
    return result.returncode == 0
