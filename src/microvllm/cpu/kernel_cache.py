"""Compiled kernels on disk: numba's cache, in which a damaged file only causes a recompilation.

numba stores an index for each function (.nbi, maps types to a file) and a file for each kernel
(.nbc). A power failure, a full disk or another process may damage a file, and numba then raises in
every later process. This cache treats a damaged file as a miss: it removes the damaged files, and
numba compiles again.

    load    index -> file -> checksum of sources, types and contents -> the kernel
    save    the file first, then the index, so that the index never names a missing file
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from numba.core.caching import FunctionCache, IndexDataCacheFile

log = logging.getLogger("microvllm")
DIGEST = 32  # bytes of the checksum in front of a kernel

used: set[Path] = set()  # files of kernels that this process has loaded or written
store_error: str | None = None  # why the last compiled kernel could not be written
compiling: Callable[[str], object] | None = None  # called before a function is compiled


class KernelCache(FunctionCache):
    """numba's cache of one function. stamp: what its kernels depend on besides the function."""

    def __init__(self, function, stamp: object):
        super().__init__(function)
        base = self._impl.filename_base
        self._cache_file = KernelFiles(self._cache_path, base, stamp)

    def _load_overload(self, sig, target_context):
        kernel = None
        try:
            kernel = super()._load_overload(sig, target_context)
        except Exception as error:
            # a damaged file fails each time, but an exception of a signal handler occurs only once
            if self._fails_again(sig, target_context):
                log.info("%s: the kernels cannot be read: %r", self._cache_path, error)
                self._cache_file.remove()
            else:
                raise
        if kernel is None and compiling:
            compiling(self._py_func.__name__)
        return kernel

    def _fails_again(self, sig, target_context) -> bool:
        try:
            super()._load_overload(sig, target_context)
        except Exception:
            return True
        return False

    def _save_overload(self, sig, data):
        global store_error
        if not os.path.isdir(self._cache_path):
            store_error = f"{self._cache_path} was removed"  # with the package: do not recreate it
            return
        try:
            super()._save_overload(sig, data)
        except OSError as error:
            if error.errno is None:  # raised by a signal handler
                raise
            store_error = f"{self._cache_path} cannot be written: {os.strerror(error.errno)}"


class KernelFiles(IndexDataCacheFile):
    """numba's index and files of one function. Each file has a checksum and its own name."""

    def load(self, key):
        """Return the kernel's data, or None if there is none. Raises any error for a bad index."""
        name = self._load_index().get(key)
        if name is None:
            return None
        path = Path(self._data_path(name))
        try:
            content = path.read_bytes()
        except (FileNotFoundError, PermissionError):
            return None
        digest, data = content[:DIGEST], content[DIGEST:]
        if digest != self._digest(key, data):
            log.info("%s is damaged and will be compiled again", path)
            self._unlink(path)
            return None
        used.add(path)
        return pickle.loads(data)

    def save(self, key, data):
        """Write a kernel. Two processes that write at the same time both leave complete files."""
        overloads = self._load_index()
        if not overloads:
            self.remove()  # kernels of older sources
        # the name depends only on the types, so no other kernel is ever written to this file
        number = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")
        name, data = self._data_name(number), self._dump(data)
        self._write(self._data_path(name), self._digest(key, data) + data)
        self._save_index(overloads | {key: name})
        used.add(Path(self._data_path(name)))

    def _write(self, path: str, content: bytes) -> None:
        with self._open_for_write(path) as file:
            file.write(content)

    def _digest(self, key, data: bytes) -> bytes:
        """Return the checksum of a kernel and of its sources and types. So the file of an old
        kernel has another checksum."""
        identity = repr((self._version, self._source_stamp, key)).encode()
        return hashlib.blake2b(identity + data, digest_size=DIGEST).digest()

    def remove(self) -> None:
        """Remove the function's index and all its kernels."""
        index = Path(self._index_path)
        for path in index.parent.glob(f"{index.stem}.*"):
            self._unlink(path)

    @staticmethod
    def _unlink(path: Path) -> None:
        with suppress(OSError):
            path.unlink()
