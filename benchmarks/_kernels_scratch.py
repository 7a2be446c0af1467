"""Scratch: time the kernels on a GPU. `--warm i n`: only compile jobs i::n."""
import sys, time, statistics
from types import SimpleNamespace
import torch, torch.nn.functional as F, triton
sys.path.insert(0, "microvllm")
import kernels_gpu as K

dev = torch.device("cuda", 0)
bf = torch.bfloat16
OPT = K._device(dev)[2]
WARM = "--warm" in sys.argv
jobs = []
def job(f): jobs.append(f); return f
def rnd(*s, dtype=bf): return torch.empty(s, dtype=dtype, device=dev).normal_()
def bench(fn, n=20, reps=7):
    fn(0)
    if WARM: return 1.0
    torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    s = torch.cuda.Stream()
    with torch.cuda.stream(s):
        fn(0)
        s.synchronize()
        with torch.cuda.graph(g, stream=s):
            for i in range(n): fn(i)
    g.replay(); torch.cuda.synchronize()
    ts = []
    for _ in range(reps):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); g.replay(); b.record(); torch.cuda.synchronize()
        ts.append(a.elapsed_time(b) * 1e3 / n)
    return statistics.median(ts)
def out(*a):
    if not WARM: print(*a, flush=True)
def i32(t): return torch.as_tensor(t, dtype=torch.int32, device=dev)

def kv_case(rows_lens, layers=1, bs=16, kv=17, D=128):
    lens = [n for _, n in rows_lens]; rows = [r for r, _ in rows_lens]
    blocks = [-(-n // bs) for n in lens]
    total = sum(blocks) + 1
    cache = rnd(layers, 2, total, kv, bs, D)
    perm = torch.randperm(total - 1) + 1
    tab = torch.zeros(len(lens), max(blocks), dtype=torch.int32); at = 0
    for b, n in enumerate(blocks):
        tab[b, :n] = perm[at:at + n]; at += n
    cu = [0]
    for r in rows: cu.append(cu[-1] + r)
    nd = next((i for i, r in enumerate(rows) if r > 1), len(rows))
    batch = SimpleNamespace(seq_lens=i32(lens), cu_seqlens=i32(cu), block_tables=tab.to(dev), num_decodes=nd, max_query=max(rows), max_seq=max(lens))
    q = rnd(sum(rows), kv, D)
    return q, cache, batch, sum(lens) * kv * D * 4

def decode_launch(q, k, v, batch, tile, warps, splits, stages=3):
    T, H, D = q.shape
    o = torch.empty_like(q); parts, lse = o, None
    if splits > 1:
        parts = torch.empty((T, H, splits, D), dtype=torch.float32, device=dev); lse = torch.empty((T, H, splits), dtype=torch.float32, device=dev)
    K._decode[(H, T, splits)](q, k, v, batch.block_tables, batch.seq_lens, parts, lse, batch.block_tables.stride(0), k.stride(0), 0.1275, -1,
        H, 1, D, k.shape[2], D, 1, tile, splits, num_warps=warps, num_stages=stages, **OPT)
    if splits > 1:
        K._combine[(T * H,)](parts, lse, o, D, D, splits, triton.next_power_of_2(splits), num_warps=4, **OPT)
    return o

@job
def copy():
    a = torch.empty(2**30, dtype=torch.uint8, device=dev); b = torch.empty_like(a)
    t = bench(lambda i: b.copy_(a), 4)
    out(f"copy {2 * a.numel() / t / 1e6:.2f} TB/s")
    a = rnd(8192, 8192); b = rnd(8192, 8192)
    t = bench(lambda i: a @ b, 4)
    out(f"matmul 8192 {2 * 8192**3 / t / 1e6:.0f} TFLOP/s")

def decode_job(nseq, maxlen, configs):
    @job
    def run():
        torch.manual_seed(1)
        lens = [maxlen] if nseq == 1 else torch.randint(maxlen // 2, maxlen + 1, (nseq,)).tolist()
        layers = 34 if nseq == 1 else (4 if maxlen < 100 else 1)
        q, cache, batch, nbytes = kv_case([(1, n) for n in lens], layers)
        for tile, warps, splits in configs:
            t = bench(lambda i: decode_launch(q, cache[i % layers, 0], cache[i % layers, 1], batch, tile, warps, splits), 34 if nseq == 1 else 8)
            out(f"decode {nseq}x{maxlen} tile {tile} warps {warps} splits {splits}: {t:.1f} us {nbytes / t / 1e6:.2f} TB/s")
many = [(16, 1, 1), (32, 1, 1), (32, 2, 1), (64, 2, 1), (64, 4, 1), (32, 4, 1)]
decode_job(512, 88, many)
decode_job(512, 512, many)
decode_job(64, 1024, [(16, 1, 1), (32, 2, 1), (64, 2, 1), (64, 4, 1), (16, 1, 2), (16, 1, 4), (32, 1, 4), (32, 2, 4), (64, 4, 4)])
decode_job(1, 256, [(16, 1, 1), (16, 1, 4), (16, 1, 8), (16, 1, 16), (32, 2, 8), (64, 4, 4), (32, 1, 8), (32, 4, 8)])
decode_job(1, 2000, [(16, 1, 16), (32, 1, 16), (32, 2, 16), (64, 4, 16), (64, 4, 8), (16, 1, 32), (32, 2, 32), (64, 4, 32)])

def chunk_job(name, seqs, configs):
    @job
    def run():
        q, cache, batch, _ = kv_case(seqs)
        k, v = cache[0]
        flops = sum(4 * 17 * 128 * (r * n - r * (r - 1) / 2) for r, n in seqs)
        o = torch.empty_like(q)
        for bm, tile, warps, stages in configs:
            def go(i):
                K._chunk[(17, q.shape[0] // bm + len(seqs))](q, k, v, batch.block_tables, batch.seq_lens, batch.cu_seqlens, o, 0, len(seqs),
                    batch.block_tables.stride(0), k.stride(0), 0.1275, -1, 17, 1, 128, 16, 128, 1, bm, tile, num_warps=warps, num_stages=stages, **OPT)
            t = bench(go, 10)
            out(f"chunk {name} bm {bm} tile {tile} warps {warps} stages {stages}: {t:.1f} us {flops / t / 1e6:.0f} TFLOP/s")
big = [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)]
chunk_job("1x2048", [(2048, 2048)], big)
chunk_job("4x2048", [(2048, 2048)] * 4, big[1:4])
torch.manual_seed(3)
lens = torch.randint(6, 41, (256,)).tolist()
chunk_job("256x23", [(n, n) for n in lens], [(16, 64, 4, 2), (16, 32, 1, 2), (32, 32, 2, 2), (32, 64, 4, 2), (64, 64, 4, 2), (128, 64, 8, 2)])

@job
def fused():
    x = [rnd(4096, 2176) for _ in range(4)]
    x0, y = rnd(4096, 2176), rnd(4096, 2176)
    a = torch.ones((), device=dev)
    for T in (1, 512, 4096):
        for warps in (4, 8, 16):
            o, h = torch.empty_like(x0[:T]), torch.empty_like(x0[:T])
            t = bench(lambda i: K._add_norm[(T,)](x[i % 4], y, x0, a, a, o, h, 1e-7, 2176, 4096, num_warps=warps, **OPT))
            out(f"add_norm {T} warps {warps}: {t:.2f} us {T * 2176 * 10 / t / 1e6:.2f} TB/s")
        z = [rnd(T, 8704) for _ in range(4)]
        for blk, warps in ((1024, 4), (2048, 4), (4096, 4), (4096, 8)):
            n = T * 8704
            t = bench(lambda i: K._relu2[(triton.cdiv(n, blk),)](z[i % 4], z[i % 4], n, blk, num_warps=warps, **OPT))
            out(f"relu2 {T} block {blk} warps {warps}: {t:.2f} us {n * 4 / t / 1e6:.2f} TB/s")
@job
def rope():
    cos = torch.rand(4096, 64, device=dev); sin = torch.rand(4096, 64, device=dev)
    for T in (1, 512, 4096):
        qkv = [rnd(T, 51 * 128) for _ in range(4)]; h = rnd(T, 2176)
        ve, gate = rnd(65536, 2176), rnd(17, 32)
        cache = rnd(2, 4096 // 16 + 1, 17, 16, 128)
        pos = torch.arange(T, dtype=torch.int32, device=dev)
        q = rnd(T, 17, 128)
        for heads, warps in ((4, 1), (8, 1), (8, 2), (16, 4), (64, 8)):
            for v_e in (None, ve):
                t = bench(lambda i: K._rope_store[(T, triton.cdiv(51, heads))](qkv[i % 4], h, v_e, None if v_e is None else gate, cos, sin, pos, pos, pos,
                    cache[0], cache[1], q, 2176, cache.stride(1), 1.2, 3.0, 1e-7, 17, 17, 128, 16, 32, heads, 64, num_warps=warps, **OPT))
                out(f"rope_store {T} heads {heads} warps {warps} ve {v_e is not None}: {t:.2f} us {T * 51 * 128 * 4 / t / 1e6:.2f} TB/s")
def sample_job(chunk):
    @job
    def run():
        for R in (1, 512):
            x = [rnd(R, 65536) * 3 for _ in range(3)]; temp = torch.full((R,), 0.7, device=dev); u = torch.rand(R, device=dev)
            K.SAMPLE_CHUNK = chunk
            t = bench(lambda i: K.sample(x[i % 3], temp, u, 15.0), 9)
            out(f"sample {R} chunk {chunk}: {t:.1f} us {R * 65536 * 2 / t / 1e6:.2f} TB/s")
for c in (1024, 2048, 4096): sample_job(c)

def linear_job(name, N, Kd, norm, configs, rows=1):
    @job
    def run():
        copies = max(2, int(300e6 // (N * Kd * 2)))
        w = [rnd(N, Kd) for _ in range(copies)]
        x = rnd(rows, Kd); s = rnd(rows, N); y = torch.empty_like(s); h = rnd(rows, 32)
        t = bench(lambda i: F.linear(x, w[i % copies]))
        out(f"linear {name} rows {rows} cublas: {t:.2f} us {N * Kd * 2 / t / 1e6:.2f} TB/s")
        for bn, bk, warps in configs:
            t = bench(lambda i: K._linear[(triton.cdiv(N, bn),)](x, w[i % copies], y, h if norm else None, None if norm else s, None, None, None, 1e-7, rows, N,
                Kd, 32 if norm else 0, norm, name == "fc", bn, bk, triton.cdiv(Kd, bk), num_warps=warps, **OPT))
            out(f"linear {name} rows {rows} bn {bn} bk {bk} warps {warps}: {t:.2f} us {N * Kd * 2 / t / 1e6:.2f} TB/s")
small = [(4, 256, 1), (4, 512, 2), (8, 512, 2), (8, 1024, 4), (2, 512, 2)]
linear_job("qkv", 6528, 2176, True, small)
linear_job("proj", 2176, 2176, False, small)
linear_job("fc", 8704, 2176, True, small)
linear_job("mlp", 2176, 8704, False, [(4, 2048, 8), (2, 2048, 8), (2, 1024, 4), (4, 1024, 4), (1, 1024, 4)])
linear_job("head", 65536, 2176, True, small[:3])
for r in (2, 4, 8):
    linear_job("fc", 8704, 2176, True, [(4, 512, 2)], r)
    linear_job("mlp", 2176, 8704, False, [(4, 2048, 8)], r)

@job
def chain():
    L, C = (2 if WARM else 34), 2176
    W = [(rnd(3 * C, C), rnd(C, C), rnd(4 * C, C), rnd(C, 4 * C)) for _ in range(L)]
    for ws in W:
        for w in ws: w.mul_(0.02)
    head = rnd(65536, C).mul_(0.02); x_in = rnd(1, C); cos = torch.rand(4096, 64, device=dev)
    a = torch.ones((), device=dev); temp, u = torch.full((1,), 0.7, device=dev), torch.rand(1, device=dev)
    def step(ctx, splits, lambdas=False):
        q, cache, batch, _ = kv_case([(1, ctx)], L)
        batch.max_seq = 2048
        batch.positions = i32([ctx - 1]); batch.slots = i32([int(batch.block_tables[0, (ctx - 1) // 16]) * 16 + (ctx - 1) % 16]); batch.ids = i32([5])
        mix = (x_in, a, a) if lambdas else (None, None, None)
        def go(i):
            x = x_in
            for l in range(L):
                qkv, proj, fc, mp = W[l]; k, v = cache[l]
                y, h = K.norm_linear(x, qkv, 1e-7, *mix)
                q = K.rope_store(y, h, None, None, cos, cos, batch, k, v, 17, 1.0, 1.0, 1e-7)
                y = K.paged_attention(q, k, v, batch, -1, num_splits=splits)
                x = K.linear_add(y.view(1, C), proj, x, *mix)
                y, _ = K.norm_linear(x, fc, 1e-7, relu2=True)
                x = K.linear_add(y, mp, x)
            y, _ = K.norm_linear(x, head, 1e-7)
            K.sample(y, temp, u, 15.0)
        return go
    nbytes = 2 * (L * 12 * C * C + 65536 * C)
    for pdl in ((True,) if WARM else (True, False)):
        if not pdl: K._device = lambda d: (132, 232448, {"PDL": False})
        for ctx, splits in ((192, 1), (192, 2), (192, 4), (192, 8), (1024, 8), (1024, 16)):
            t = bench(step(ctx, splits), 2)
            out(f"chain pdl {pdl} ctx {ctx} splits {splits}: {t:.0f} us a token, {1e6 / t:.0f} tok/s, {nbytes / t / 1e6:.2f} TB/s")
    K._device = lambda d: (132, 232448, OPT)
    t = bench(step(192, 4, True), 2)
    out(f"chain with lambdas: {t:.0f} us")
    if not WARM:
        x = rnd(512, C); torch.cuda.synchronize(); t = time.time()
        for _ in range(200): K.add_norm(x, x, None, None, None, 1e-7)
        torch.cuda.synchronize(); out(f"eager add_norm host {(time.time() - t) / 200 * 1e6:.1f} us")
        q, cache, batch, _ = kv_case([(1, 100)] * 64); torch.cuda.synchronize(); t = time.time()
        for _ in range(200): K.paged_attention(q, *cache[0], batch, -1)
        torch.cuda.synchronize(); out(f"eager attention host+gpu {(time.time() - t) / 200 * 1e6:.1f} us")

if __name__ == "__main__":
    if WARM:
        i, n = int(sys.argv[-2]), int(sys.argv[-1])
        todo = jobs[i::n]
    else:
        names = [a for a in sys.argv[1:]]
        todo = jobs
    for f in todo:
        try: f()
        except Exception as e: print("FAILED", f.__name__, type(e).__name__, str(e)[:300], flush=True)
        torch.cuda.empty_cache()
