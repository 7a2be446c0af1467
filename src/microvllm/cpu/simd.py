"""What the CPU's kernels are made of; numba compiles them.

Where the compiler makes less of a loop than the processor can do, the loop is written in vectors,
in the compiler's own language (llvmlite.ir).
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


# nothing is rounded or added up in another order than is written, since that would depend on which
# kernel a function is made part of; long sums are written in vectors (see `sum_of`)
EXACT = {"fastmath": False, "error_model": "numpy", "nogil": True}
# numba counts the references to an array in one place: threads that make views of it in a loop wait
# for each other there. A function that makes no arrays, and returns none, can do without
VIEWS = EXACT | {"_nrt": False}

# the files that kernels are made of: of this subpackage, and the layout of low-bit weights
SOURCES = [
    *sorted(Path(__file__).parent.glob("*.py")),
    Path(__file__).parent.parent / "lowbit" / "packing.py",
]
# what tells these sources from others: when each file was written, and its size
STAMP = tuple((file.stat().st_mtime, file.stat().st_size) for file in SOURCES)


@cache
def trusted(folder: str) -> bool:
    """Can only those write the kernels there who can write these sources? They are pickles, and a
    pickle runs code when it is read. In a folder that is not trusted, nothing is read or written.
    """
    if os.name != "posix":
        return True
    owners = {0, os.getuid(), os.stat(__file__).st_uid}
    for place in (Path(folder), *sorted(Path(folder).glob("*.nb[ic]"))):
        try:
            about = place.stat()
        except FileNotFoundError:
            if place == Path(folder):
                raise
            continue  # another process has just replaced it
        private = about.st_gid == about.st_uid  # the user's own group, of which umask 002 comes
        if about.st_uid not in owners or about.st_mode & (0o002 if private else 0o022):
            kernel_cache.unkept = f"{place} may be written by others (chmod -R go-w {folder})"
            log.info("kernels are not kept: %s", kernel_cache.unkept)
            return False
    return True


def kept(**options):
    """numba.njit, with compiled kernels written to disk, for later processes."""

    def compiled(function):
        kernel = numba.njit(**options)(function)
        try:
            # numba looks whether a kernel's own file has changed; it is made of several of ours
            cached = kernel_cache.KernelCache(function, stamp=(STAMP, AMX))
            if not trusted(cached.cache_path):
                cached.disable()
            kernel._cache = cached
        except (RuntimeError, OSError):
            folder = Path(function.__code__.co_filename).parent
            kernel_cache.unkept = f"neither {folder} nor the user's cache can be written"
        return kernel

    return compiled


@numba.njit(**EXACT)
def share(count, thread, threads):
    """The first of a thread's part of `count` equal pieces of work, and the one behind its last."""
    return count * thread // threads, count * (thread + 1) // threads


@numba.njit(**EXACT)
def fewest(count, threads):
    """How many threads to wake for `count` equal pieces: with fewer, one would have more of them
    than the busiest of `threads` has; the others would not end sooner."""
    return -(-count // -(-count // threads)) if count > 0 else 1


@numba.njit(**EXACT)
def row_parts(rows, threads):
    """Runs and parts of a job (team.py) on rows that are normed, rotated or rounded. To hand a part
    over takes as long as a few rows do."""
    runs = fewest(rows, min(threads, 1 + rows // 8))
    return runs, runs * (max(1, min(4, rows // (16 * runs))) if runs > 1 else 1)


@numba.njit(**EXACT)
def piece_parts(pieces, threads):
    """Runs and parts of a job on `pieces` of a matrix. A thread's share has at most four parts, of
    four pieces or more: others can take them if the thread comes late."""
    runs = fewest(pieces, threads)
    return runs, runs * (max(1, min(4, pieces // (4 * runs))) if runs > 1 else 1)


@numba.njit(**EXACT)
def row_cuts(tiles, rows, least, threads):
    """Into how many runs of rows, each of `least` or more, a product of weight tiles is cut, too.

    1 where whole tiles make no thread's share more than 1.2 times the mean; or if no cut does. Few
    rows wait for weights: cut, they would be read once more. So 24 tiles are too few for 32
    threads; their halves would be 48, no more even. A smaller part is a part of a cache line, or
    half a register; and if threads shared the inputs, their sums would have to be added in an order
    that does not depend on how many threads there are: each product would write its parts to memory
    and wait for a second pass.
    """
    for cuts in range(1, max(1, rows // least) + 1):
        pieces = tiles * cuts
        if 5 * threads * -(-pieces // threads) <= 6 * pieces:
            return cuts
    return 1


# what numba compiles for: this processor, or less where it was told so (NUMBA_CPU_NAME=generic)
_, _name, CPU = cpu_target.target_context.codegen().magic_tuple()
CPU = CPU.split(",")
# numbers in a register
LANES = 16 if "+avx512f" in CPU else 8 if "+avx2" in CPU and "+fma" in CPU else 4
NEON = "+neon" in CPU  # ARM's: as few numbers in one, but 32 of them
# the instruction that multiplies four bytes in each lane; ARM's (which LLVM does not look for, and
# each of Apple's has) takes signed ones
SIGNED = NEON and bool(not hasattr(_libc, "getauxval") or _libc.getauxval(16) >> 20 & 1)
FOUR_BYTES = SIGNED or ("+avx512vnni" if LANES == 16 else "+avxvnni") in CPU
# that, or one for two numbers of 16 bits
INTEGERS = FOUR_BYTES or ("+avx512bw" if LANES == 16 else "+avx2") in CPU
EXCESS = 0 if SIGNED else 128  # what multiply_add8 leaves on bytes that are stored plus 128
if SIGNED:
    initialize_native_asmparser()
_bfloat16 = LANES == 16 and "+avx512bf16" in CPU
# the unit that multiplies tiles of matrices, see amx.py: its registers are so large that a process
# has to ask Linux for them (arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA)
AMX = _bfloat16 and {"+amx-tile", "+amx-bf16", "+amx-int8"} <= {*CPU} and sys.platform == "linux"
AMX = AMX and _libc.syscall(158, 0x1023, 18) == 0
# the instruction that multiplies two bfloat16 in each lane: on Intel's processors, which have the
# tiles, it takes longer than two of float32
TWO_HALVES = _bfloat16 and (AMX or _name.startswith("znver"))


class BFloat(ir.Type):
    """bfloat16, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


class Builder:
    """numba's builder of instructions, with methods that make several at once."""

    i1, i8, i16, i32, i64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
    f32 = ir.FloatType()

    def __init__(self, builder):
        self.builder = builder

    def __getattr__(self, name: str):
        return getattr(self.builder, name)

    def kind(self, item, lanes: int = LANES):
        return ir.VectorType(item, lanes) if lanes > 1 else item

    def ask(self, name: str, result, *values, **options):
        """A call of LLVM's own function of that name."""
        kind = ir.FunctionType(result, [value.type for value in values])
        return self.call(self.module.declare_intrinsic(name, (), kind), values, **options)

    def at(self, start, *counts):
        """The address of start[the sum of these counts; a pair (a, b) is a * b]."""
        for count in counts:
            a, b = count if isinstance(count, tuple) else (count, 1)
            a, b = (self.i64(z) if isinstance(z, int) else z for z in (a, b))
            start = self.gep(start, [self.mul(a, b)])
        return start

    def words(self, start):
        """The address of pairs of bfloat16 as that of words of 32 bits; any other as it is."""
        pairs = start.type.pointee == self.i16
        return self.bitcast(start, self.i32.as_pointer()) if pairs else start

    def read(self, start, lanes: int = LANES):
        """Numbers from a pointer on, as float32; those of 16 bits are bfloat16, of 8 integers."""
        item = start.type.pointee
        value = self.load(self.bitcast(start, self.kind(item, lanes).as_pointer()))
        value.align = {self.i8: 1, self.i16: 2}.get(item, 4)
        if item == self.i8:
            value = self.sext(value, self.kind(self.i32, lanes))
            return self.sitofp(value, self.kind(self.f32, lanes))
        if item != self.i16:
            return value
        value = self.zext(value, self.kind(self.i32, lanes))
        value = self.shl(value, self.splat(self.i32(16), lanes))
        return self.bitcast(value, self.kind(self.f32, lanes))

    def write(self, value, start) -> None:
        self.store(value, self.bitcast(start, value.type.as_pointer())).align = 4

    def splat(self, value, lanes: int = LANES):
        """A vector of equal numbers."""
        if lanes == 1:
            return value
        firsts = ir.Constant(self.kind(self.i32, lanes), [0] * lanes)
        vector = ir.Constant(self.kind(value.type, lanes), ir.Undefined)
        vector = self.insert_element(vector, value, self.i32(0))
        return self.shuffle_vector(vector, vector, firsts)

    def _of(self, name: str, *values):
        """LLVM's function of that name of floats, or vectors of them."""
        kind = values[0].type
        end = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
        return self.ask(f"llvm.{name}.{end}", kind, *values)

    def multiply_add(self, a, b, c):
        """a * b + c, rounded once where the processor can."""
        return self._of("fmuladd", a, b, c)

    def floor(self, value):
        return self._of("floor", value)

    def multiply_add8(self, a, b, c):
        """The same in each lane of four unsigned bytes of a and four signed ones of b, exactly;
        if SIGNED, of each byte of a less 128."""
        if SIGNED:
            a = self.xor(a, self.splat(self.i32(-0x7F7F7F80)))  # the highest bit of each
            kind = ir.FunctionType(c.type, [c.type, a.type, b.type])
            text = ".arch_extension dotprod\nsdot $0.4s, $2.16b, $3.16b"
            return self.call(ir.InlineAsm(kind, text, "=w,0,w,w"), [c, a, b])
        if FOUR_BYTES:
            return self.ask(f"llvm.x86.avx512.vpdpbusd.{32 * LANES}", c.type, c, a, b)
        name = "llvm.x86.avx512.pmaddw.d.512" if LANES == 16 else "llvm.x86.avx2.pmadd.wd"
        shorts = ir.VectorType(self.i16, 2 * LANES)
        a, b = self.bitcast(a, shorts), self.bitcast(b, shorts)
        eight = self.splat(self.i16(8), 2 * LANES)
        low_a = self.lshr(self.shl(a, eight), eight)
        low_b = self.ashr(self.shl(b, eight), eight)
        for each in (low_a, low_b), (self.lshr(a, eight), self.ashr(b, eight)):
            c = self.add(c, self.ask(name, c.type, *each))
        return c

    def multiply_add_bf16(self, a, b, c):
        """The same in each lane of two bfloat16 of a and two of b, the first ones first: exact
        products. a: those two, or a pair of vectors of float32."""
        if not isinstance(a, tuple):
            pairs = ir.VectorType(BFloat(), 2 * LANES)
            a, b = self.bitcast(a, pairs), self.bitcast(b, pairs)
            return self.ask(f"llvm.x86.avx512bf16.dpbf16ps.{32 * LANES}", c.type, c, a, b)
        low = self.shl(b, self.splat(self.i32(16)))
        high = self.and_(b, self.splat(self.i32(0xFFFF0000)))
        for value, weight in zip(a, (low, high), strict=True):
            c = self.multiply_add(value, self.bitcast(weight, c.type), c)
        return c

    def relu2(self, value):
        """relu(value)^2; NaN is not below 0."""
        zero = value.type(None)
        value = self.select(self.fcmp_ordered("<", value, zero), zero, value)
        return self.fmul(value, value)

    def multiply_add7(self, a, b, c):
        """The same of bytes of `a` below 128, of which two products fit in 16 bits; c may be sums
        of as many bits, as long as all of them fit: see `widen`."""
        if FOUR_BYTES:
            return self.multiply_add8(a, b, c)
        name = "llvm.x86.avx512.pmaddubs.w.512" if LANES == 16 else "llvm.x86.avx2.pmadd.ub.sw"
        numbers = ir.VectorType(self.i8, 4 * LANES)
        a, b = self.bitcast(a, numbers), self.bitcast(b, numbers)
        pairs = self.ask(name, ir.VectorType(self.i16, 2 * LANES), a, b)
        return self.add(c, pairs) if c.type == pairs.type else self.widen(pairs, c)

    def widen(self, pairs, c):
        """The two numbers of 16 bits in each lane and c, added up."""
        return self.multiply_add16(pairs, self.splat(self.i16(1), 2 * LANES), c)

    def multiply_add16(self, a, b, c):
        """The same in each lane of two numbers of 16 bits of a and of b, exactly."""
        name = "llvm.x86.avx512.pmaddw.d.512" if LANES == 16 else "llvm.x86.avx2.pmadd.wd"
        return self.add(c, self.ask(name, c.type, a, b))

    def start_loading(self, start) -> None:
        byte, hints = self.i8.as_pointer(), (0, 2, 1)  # read; to the second-level cache; data
        values = self.bitcast(start, byte), *map(self.i32, hints)
        self.ask(f"llvm.prefetch.{byte.intrinsic_name}", ir.VoidType(), *values)


def vectorised(result=types.void):
    """A decorator: a function for kernels that body(a Builder, *its arguments) makes, of values of
    LLVM, and of arrays their data and shape. result: numba's type of what it returns."""

    def decorated(body):
        @wraps(body)  # numba looks at the signature
        def function(context, *kinds):
            def codegen(context, builder, signature, values):
                arguments = [
                    context.make_array(kind)(context, builder, value)
                    if isinstance(kind, types.Array)
                    else value
                    for kind, value in zip(signature.args, values, strict=True)
                ]
                made = body(Builder(builder), *arguments)
                return context.get_dummy_value() if result is types.void else made

            return result(*kinds), codegen

        return intrinsic(function)

    return decorated


@vectorised()
def fetch(b, x, start, count):
    """Start loading `count` numbers from x's flat index `start` on: the next block of a sequence
    may lie anywhere, the hardware cannot guess where."""
    line = b.i64({b.i8: 64, b.i16: 32}.get(x.data.type.pointee, 16))
    start = b.at(x.data, start)
    with cgutils.for_range_slice(b, b.i64(0), count, line, b.i64) as (d, _):
        b.start_loading(b.at(start, d))


@vectorised(types.float32)
def multiply_add(b, x, y, z):
    """x * y + z, rounded once where the processor can."""
    return b.multiply_add(x, y, z)


def sum_of(b, n, add, width: int = LANES):
    """The sum of n numbers, whose order the compiler leaves as it is; add(sums, i, lanes) is `sums`
    and, in each lane, one from i on."""
    found, start = [], b.i64(0)
    for count, lanes in ((4, width), (1, width), (1, 1)):
        sums = [cgutils.alloca_once(b, b.kind(b.f32, lanes), zfill=True) for _ in range(count)]
        size = b.i64(count * lanes)
        stop = b.mul(b.udiv(n, size), size)
        with cgutils.for_range_slice(b, start, stop, size, b.i64) as (i, _):
            for j, each in enumerate(sums):
                b.store(add(b.load(each), b.add(i, b.i64(j * lanes)), lanes), each)
        start, found = stop, found + [b.load(each) for each in sums]
    *vectors, last = found
    vector, size = reduce(b.fadd, vectors), width
    while size > 1:  # halves
        size //= 2
        kind = ir.VectorType(b.i32, size)
        ends = [ir.Constant(kind, list(range(at, at + size))) for at in (0, size)]
        vector = b.fadd(*[b.shuffle_vector(vector, vector, end) for end in ends])
    return b.fadd(b.extract_element(vector, b.i32(0)), last)


def lane_sums(b, vectors: list):
    """A vector with the sum of each vector's numbers. The number of vectors is a power of two, at
    most that of lanes: two of them become one, with half as many numbers of each."""
    width = vectors[0].type.count  # numbers of each sum

    def halved(pair):
        """The first halves of all sums in a pair of vectors, plus the second halves."""
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
    """The sum of the first n of x * y."""

    def add(sums, i, lanes):
        return b.multiply_add(b.read(b.at(x.data, i), lanes), b.read(b.at(y.data, i), lanes), sums)

    # x was just written in the compiler's vectors: wider ones would wait until it is in the cache
    return sum_of(b, n, add, min(LANES, 8))


@vectorised(types.float32)
def total(b, x, n):
    """The sum of the first n of x."""
    return sum_of(b, n, lambda sums, i, lanes: b.fadd(sums, b.read(b.at(x.data, i), lanes)))


@vectorised(types.float32)
def above(b, x, n, bound, counting):
    """The sum of those of the first n of x that are above a bound or, if counting, their number."""

    def add(sums, i, lanes):
        value = b.read(b.at(x.data, i), lanes)
        large = b.fcmp_ordered(">", value, b.splat(bound, lanes))
        value = b.select(counting, b.splat(b.f32(1), lanes), value)
        return b.fadd(sums, b.select(large, value, b.splat(b.f32(0), lanes)))

    return sum_of(b, n, add)
