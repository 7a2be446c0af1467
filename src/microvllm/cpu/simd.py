"""Building blocks of the CPU kernels, which numba compiles.

Loops that the compiler does not vectorize well are written with vectors in the compiler's
intermediate language (llvmlite.ir).
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from functools import cache, reduce, wraps
from pathlib import Path

import numba
from llvmlite import ir
from llvmlite.binding import initialize_native_asmparser
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from . import kernel_cache

_libc = ctypes.CDLL(None) if os.name == "posix" else None
log = logging.getLogger("microvllm")


# the compiler must not reorder or round operations differently, because that would depend on the
# kernel that a function is inlined into. Long sums are written with vectors (see `sum_of`)
EXACT = {"fastmath": False, "error_model": "numpy", "nogil": True}
# an array has one reference count. Threads that create views of the array in a loop would wait for
# each other to change it. A function that neither creates nor returns arrays needs no counts
VIEWS = EXACT | {"_nrt": False}

# the source files of the kernels: this subpackage, and the layout of low-bit weights
SOURCES = [
    *sorted(Path(__file__).parent.glob("*.py")),
    Path(__file__).parent.parent / "lowbit" / "packing.py",
]
# identifies these sources: modification time and size of each file
STAMP = tuple((file.stat().st_mtime, file.stat().st_size) for file in SOURCES)


@cache
def trusted(folder: str) -> bool:
    """Return whether only users who can write these sources can write the kernels in the folder.

    Kernels are pickles, and reading a pickle runs code. In a folder that is not trusted, nothing is
    read or written.
    """
    if os.name != "posix":
        return True
    owners = {0, os.getuid(), os.stat(__file__).st_uid}
    for place in (Path(folder), *sorted(Path(folder).glob("*.nb[ic]"))):
        try:
            status = place.stat()
        except FileNotFoundError:
            if place == Path(folder):
                raise
            continue  # another process has just replaced the file
        private = status.st_gid == status.st_uid  # the user's own group may write with umask 002
        if status.st_uid not in owners or status.st_mode & (0o002 if private else 0o022):
            error = f"{place} can be written by other users (chmod -R go-w {folder})"
            kernel_cache.store_error = error
            log.info("kernels are not stored: %s", error)
            return False
    return True


def kept(**options):
    """Return numba.njit with kernels that are stored on disk for later processes."""

    def compiled(function):
        kernel = numba.njit(**options)(function)
        try:
            # numba checks only the kernel's file for changes, but kernels use several files
            cached = kernel_cache.KernelCache(function, stamp=(STAMP, AMX))
            if not trusted(cached.cache_path):
                cached.disable()
            kernel._cache = cached
        except (RuntimeError, OSError):
            folder = Path(function.__code__.co_filename).parent
            kernel_cache.store_error = f"neither {folder} nor the user's cache can be written"
        return kernel

    return compiled


@numba.njit(**EXACT)
def share(count, thread, threads):
    """Return the start and the end of a thread's part of `count` equal pieces of work."""
    return count * thread // threads, count * (thread + 1) // threads


@numba.njit(**EXACT)
def fewest(count, threads):
    """Return the smallest number of threads with which no thread gets more of `count` equal pieces
    than with `threads`."""
    return -(-count // -(-count // threads)) if count > 0 else 1


@numba.njit(**EXACT)
def row_parts(rows, threads):
    """Return the runs and parts of a job (team.py) on rows that are normed, rotated or rounded.
    Handing a part to another thread takes as long as a few rows."""
    runs = fewest(rows, min(threads, 1 + rows // 8))
    return runs, runs * (max(1, min(4, rows // (16 * runs))) if runs > 1 else 1)


@numba.njit(**EXACT)
def piece_parts(pieces, threads):
    """Return the runs and parts of a job on `pieces` of a matrix. A thread's share has at most four
    parts, of at least four pieces each. Other threads can take them if the thread is late."""
    runs = fewest(pieces, threads)
    return runs, runs * (max(1, min(4, pieces // (4 * runs))) if runs > 1 else 1)


@numba.njit(**EXACT)
def row_cuts(tiles, rows, least, threads):
    """Return the number of row groups, each of at least `least` rows, that a product of weight
    tiles is cut into.

    This is the smallest number with which no thread's share is larger than 1.2 times the mean, or 1
    if there is none. Fewer groups are better, because each group reads the weights again.

    The outputs of a tile are not divided. For example, 24 tiles are too few for 32 threads, but 48
    halves would not be divided more evenly, and a smaller part would be less than a cache line or a
    register. The inputs are not divided either: each product would have to write partial sums to
    memory and add them in a second pass, in an order that does not depend on the number of threads.
    """
    for cuts in range(1, max(1, rows // least) + 1):
        pieces = tiles * cuts
        if 5 * threads * -(-pieces // threads) <= 6 * pieces:
            return cuts
    return 1


# the target of the compilation: this processor, or a smaller set (NUMBA_CPU_NAME=generic)
_, _name, CPU = cpu_target.target_context.codegen().magic_tuple()
CPU = CPU.split(",")
# numbers in a register
LANES = 16 if "+avx512f" in CPU else 8 if "+avx2" in CPU and "+fma" in CPU else 4
NEON = "+neon" in CPU  # ARM: also 4 numbers in a register, but 32 registers
# whether an instruction multiplies four bytes in each lane. ARM's takes signed bytes; LLVM does not
# detect it, and all of Apple's processors have it
SIGNED = NEON and bool(not hasattr(_libc, "getauxval") or _libc.getauxval(16) >> 20 & 1)
FOUR_BYTES = SIGNED or ("+avx512vnni" if LANES == 16 else "+avxvnni") in CPU
# whether there is such an instruction, or one for two 16-bit numbers
INTEGERS = FOUR_BYTES or ("+avx512bw" if LANES == 16 else "+avx2") in CPU
EXCESS = 0 if SIGNED else 128  # what multiply_add8 leaves of the 128 added to each input byte
if SIGNED:
    initialize_native_asmparser()
_bfloat16 = LANES == 16 and "+avx512bf16" in CPU
# whether to use the matrix unit, see amx.py: its registers are so large that a process has to
# request them from Linux (arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA)
AMX = _bfloat16 and {"+amx-tile", "+amx-bf16", "+amx-int8"} <= {*CPU} and sys.platform == "linux"
AMX = AMX and _libc.syscall(158, 0x1023, 18) == 0
# whether products multiply pairs of bfloat16: with the matrix unit, or with an instruction of AMD's
# processors. On Intel's, this instruction takes longer than two float32 multiplications
TWO_HALVES = _bfloat16 and (AMX or _name.startswith("znver"))


class BFloat(ir.Type):
    """bfloat16, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


class Builder:
    """numba's instruction builder, with methods that emit several instructions at once."""

    i1, i8, i16, i32, i64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
    f32 = ir.FloatType()

    def __init__(self, builder):
        self.builder = builder

    def __getattr__(self, name: str):
        return getattr(self.builder, name)

    def ir_type(self, item, lanes: int = LANES):
        return ir.VectorType(item, lanes) if lanes > 1 else item

    def call_intrinsic(self, name: str, result, *values, **options):
        """Call LLVM's intrinsic function `name`."""
        kind = ir.FunctionType(result, [value.type for value in values])
        return self.call(self.module.declare_intrinsic(name, (), kind), values, **options)

    def at(self, start, *counts):
        """Return the address of start[sum of counts]. A pair (a, b) counts as a * b."""
        for count in counts:
            a, b = count if isinstance(count, tuple) else (count, 1)
            a, b = (self.i64(z) if isinstance(z, int) else z for z in (a, b))
            start = self.gep(start, [self.mul(a, b)])
        return start

    def words(self, start):
        """Return an address of bfloat16 as an address of 32-bit words; others are unchanged."""
        pairs = start.type.pointee == self.i16
        return self.bitcast(start, self.i32.as_pointer()) if pairs else start

    def read(self, start, lanes: int = LANES):
        """Read numbers from an address. bfloat16 and int8 are converted to float32."""
        item = start.type.pointee
        value = self.load(self.bitcast(start, self.ir_type(item, lanes).as_pointer()))
        value.align = {self.i8: 1, self.i16: 2}.get(item, 4)
        if item == self.i8:
            value = self.sext(value, self.ir_type(self.i32, lanes))
            return self.sitofp(value, self.ir_type(self.f32, lanes))
        if item != self.i16:
            return value
        value = self.zext(value, self.ir_type(self.i32, lanes))
        value = self.shl(value, self.splat(self.i32(16), lanes))
        return self.bitcast(value, self.ir_type(self.f32, lanes))

    def write(self, value, start) -> None:
        self.store(value, self.bitcast(start, value.type.as_pointer())).align = 4

    def splat(self, value, lanes: int = LANES):
        """Return a vector of equal numbers."""
        if lanes == 1:
            return value
        firsts = ir.Constant(self.ir_type(self.i32, lanes), [0] * lanes)
        vector = ir.Constant(self.ir_type(value.type, lanes), ir.Undefined)
        vector = self.insert_element(vector, value, self.i32(0))
        return self.shuffle_vector(vector, vector, firsts)

    def _of(self, name: str, *values):
        """Call LLVM's function `name` for floats or vectors of floats."""
        kind = values[0].type
        end = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
        return self.call_intrinsic(f"llvm.{name}.{end}", kind, *values)

    def multiply_add(self, a, b, c):
        """Return a * b + c, rounded only once if the processor supports it."""
        return self._of("fmuladd", a, b, c)

    def floor(self, value):
        return self._of("floor", value)

    def multiply_add8(self, a, b, c):
        """Return a * b + c exactly, in each lane for four unsigned bytes of a and four signed bytes
        of b. If SIGNED, 128 is subtracted from each byte of a."""
        if SIGNED:
            a = self.xor(a, self.splat(self.i32(-0x7F7F7F80)))  # the highest bit of each byte
            kind = ir.FunctionType(c.type, [c.type, a.type, b.type])
            text = ".arch_extension dotprod\nsdot $0.4s, $2.16b, $3.16b"
            return self.call(ir.InlineAsm(kind, text, "=w,0,w,w"), [c, a, b])
        if FOUR_BYTES:
            return self.call_intrinsic(f"llvm.x86.avx512.vpdpbusd.{32 * LANES}", c.type, c, a, b)
        name = "llvm.x86.avx512.pmaddw.d.512" if LANES == 16 else "llvm.x86.avx2.pmadd.wd"
        shorts = ir.VectorType(self.i16, 2 * LANES)
        a, b = self.bitcast(a, shorts), self.bitcast(b, shorts)
        eight = self.splat(self.i16(8), 2 * LANES)
        low_a = self.lshr(self.shl(a, eight), eight)
        low_b = self.ashr(self.shl(b, eight), eight)
        for each in (low_a, low_b), (self.lshr(a, eight), self.ashr(b, eight)):
            c = self.add(c, self.call_intrinsic(name, c.type, *each))
        return c

    def multiply_add_bf16(self, a, b, c):
        """Return a * b + c in each lane for two bfloat16 of a and two of b, the first ones first,
        with exact products. a: vectors of such pairs, or two vectors of float32, with the first and
        the second numbers."""
        if not isinstance(a, tuple):
            pairs = ir.VectorType(BFloat(), 2 * LANES)
            a, b = self.bitcast(a, pairs), self.bitcast(b, pairs)
            name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * LANES}"
            return self.call_intrinsic(name, c.type, c, a, b)
        low = self.shl(b, self.splat(self.i32(16)))
        high = self.and_(b, self.splat(self.i32(0xFFFF0000)))
        for value, weight in zip(a, (low, high), strict=True):
            c = self.multiply_add(value, self.bitcast(weight, c.type), c)
        return c

    def relu2(self, value):
        """Return relu(value)^2. NaN stays NaN."""
        zero = value.type(None)
        value = self.select(self.fcmp_ordered("<", value, zero), zero, value)
        return self.fmul(value, value)

    def multiply_add7(self, a, b, c):
        """Return a * b + c for bytes of `a` below 128: the sum of two products fits in 16 bits. c
        may have 16-bit numbers, if all sums fit: see `widen`."""
        if FOUR_BYTES:
            return self.multiply_add8(a, b, c)
        name = "llvm.x86.avx512.pmaddubs.w.512" if LANES == 16 else "llvm.x86.avx2.pmadd.ub.sw"
        numbers = ir.VectorType(self.i8, 4 * LANES)
        a, b = self.bitcast(a, numbers), self.bitcast(b, numbers)
        pairs = self.call_intrinsic(name, ir.VectorType(self.i16, 2 * LANES), a, b)
        return self.add(c, pairs) if c.type == pairs.type else self.widen(pairs, c)

    def widen(self, pairs, c):
        """Return c plus both 16-bit numbers in each lane."""
        return self.multiply_add16(pairs, self.splat(self.i16(1), 2 * LANES), c)

    def multiply_add16(self, a, b, c):
        """Return a * b + c exactly, in each lane for two 16-bit numbers of a and of b."""
        name = "llvm.x86.avx512.pmaddw.d.512" if LANES == 16 else "llvm.x86.avx2.pmadd.wd"
        return self.add(c, self.call_intrinsic(name, c.type, a, b))

    def start_loading(self, start) -> None:
        byte, hints = self.i8.as_pointer(), (0, 2, 1)  # read; into the second-level cache; data
        values = self.bitcast(start, byte), *map(self.i32, hints)
        self.call_intrinsic(f"llvm.prefetch.{byte.intrinsic_name}", ir.VoidType(), *values)


def vectorised(result=types.void):
    """Make a decorator that turns body(builder, *arguments) into a function for kernels. `body`
    receives a Builder and LLVM values, and for arrays their data and shape. result: numba's type of
    the return value."""

    def decorate(body):
        @wraps(body)  # numba inspects the signature
        def function(context, *kinds):
            def codegen(context, builder, signature, values):
                arguments = [
                    context.make_array(kind)(context, builder, value)
                    if isinstance(kind, types.Array)
                    else value
                    for kind, value in zip(signature.args, values, strict=True)
                ]
                value = body(Builder(builder), *arguments)
                return context.get_dummy_value() if result is types.void else value

            return result(*kinds), codegen

        return intrinsic(function)

    return decorate


@vectorised()
def fetch(b, x, start, count):
    """Start loading `count` numbers from x's flat index `start` on. The hardware cannot predict the
    next block of a sequence, because it may be anywhere in memory."""
    line = b.i64({b.i8: 64, b.i16: 32}.get(x.data.type.pointee, 16))
    start = b.at(x.data, start)
    with cgutils.for_range_slice(b, b.i64(0), count, line, b.i64) as (d, _):
        b.start_loading(b.at(start, d))


@vectorised(types.float32)
def multiply_add(b, x, y, z):
    """Return x * y + z, rounded only once if the processor supports it."""
    return b.multiply_add(x, y, z)


def sum_of(b, n, add, width: int = LANES):
    """Return the sum of n numbers in an order that the compiler keeps. add(sums, i, lanes) adds to
    each lane of `sums` one number, from i on."""
    found, start = [], b.i64(0)
    for count, lanes in ((4, width), (1, width), (1, 1)):
        sums = [cgutils.alloca_once(b, b.ir_type(b.f32, lanes), zfill=True) for _ in range(count)]
        size = b.i64(count * lanes)
        stop = b.mul(b.udiv(n, size), size)
        with cgutils.for_range_slice(b, start, stop, size, b.i64) as (i, _):
            for j, each in enumerate(sums):
                b.store(add(b.load(each), b.add(i, b.i64(j * lanes)), lanes), each)
        start, found = stop, found + [b.load(each) for each in sums]
    *vectors, last = found
    vector, size = reduce(b.fadd, vectors), width
    while size > 1:  # add both halves
        size //= 2
        kind = ir.VectorType(b.i32, size)
        ends = [ir.Constant(kind, list(range(at, at + size))) for at in (0, size)]
        vector = b.fadd(*[b.shuffle_vector(vector, vector, end) for end in ends])
    return b.fadd(b.extract_element(vector, b.i32(0)), last)


def lane_sums(b, vectors: list):
    """Return a vector with the sum of each vector's numbers. The number of vectors must be a power
    of two, at most the number of lanes. Each pass merges two vectors into one, with half as many
    numbers for each sum."""
    width = vectors[0].type.count  # numbers of each sum

    def halved(pair):
        """Add the second halves of all sums in a pair of vectors to the first halves."""
        starts = range(0, sum(vector.type.count for vector in pair), width)
        lanes = [[start + i for start in starts for i in range(width // 2)]]
        lanes.append([lane + width // 2 for lane in lanes[0]])
        kind = ir.VectorType(b.i32, len(lanes[0]))
        return b.fadd(*[b.shuffle_vector(pair[0], pair[-1], ir.Constant(kind, x)) for x in lanes])

    while width > 1:
        pairs = [vectors[i : i + 2] for i in range(0, len(vectors), 2)]
        vectors = [halved(pair) for pair in pairs]
        width //= 2
    return vectors[0]


@vectorised(types.float32)
def dot(b, x, y, n):
    """Return the sum of the first n of x * y."""

    def add(sums, i, lanes):
        return b.multiply_add(b.read(b.at(x.data, i), lanes), b.read(b.at(y.data, i), lanes), sums)

    # the compiler has just written x with narrower vectors: wider loads would wait for these stores
    return sum_of(b, n, add, min(LANES, 8))


@vectorised(types.float32)
def total(b, x, n):
    """Return the sum of the first n of x."""
    return sum_of(b, n, lambda sums, i, lanes: b.fadd(sums, b.read(b.at(x.data, i), lanes)))


@vectorised(types.float32)
def above(b, x, n, bound, counting):
    """Return the sum, or if counting the number, of those of the first n of x above the bound."""

    def add(sums, i, lanes):
        value = b.read(b.at(x.data, i), lanes)
        large = b.fcmp_ordered(">", value, b.splat(bound, lanes))
        value = b.select(counting, b.splat(b.f32(1), lanes), value)
        return b.fadd(sums, b.select(large, value, b.splat(b.f32(0), lanes)))

    return sum_of(b, n, add)
