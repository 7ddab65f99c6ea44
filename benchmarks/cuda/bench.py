"""Kernels against PyTorch SDPA on one GPU, interleaved: python3 bench.py LIBRARY forward|backward|decode [quick]."""
import ctypes
import datetime
import statistics
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

LIB = ctypes.CDLL(sys.argv[1])
PASS = sys.argv[2]
QUICK = len(sys.argv) > 3


class Call(ctypes.Structure):
    _fields_ = (
        [(n, ctypes.c_void_p) for n in "q k v out lse dout dq dk dv workspace intervals".split()]
        + [("workspace_bytes", ctypes.c_int64)]
        + [(n, ctypes.c_int32) for n in "batch seqlen_q seqlen_k heads_q heads_k head_dim f16 causal left splits deterministic".split()]
    )


WORKSPACE = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")


def make_call(q, k, v, causal, **more):
    b, sq, hq, d = q.shape
    t = dict(q=q, k=k, v=v, out=torch.empty_like(q), lse=torch.empty(b, hq, sq, device="cuda"))
    t.update({n: x for n, x in more.items() if isinstance(x, torch.Tensor)})
    for n, like in (("dq", q), ("dk", k), ("dv", v)):
        t[n] = torch.empty_like(like)
    c = Call(batch=b, seqlen_q=sq, seqlen_k=k.shape[1], heads_q=hq, heads_k=k.shape[2], head_dim=d,
             f16=int(q.dtype == torch.float16), causal=int(causal), left=-1, deterministic=int(more.get("deterministic", 0)), splits=more.get("splits", 0),
             workspace=WORKSPACE.data_ptr(), workspace_bytes=WORKSPACE.numel())
    for n, x in t.items():
        setattr(c, n, x.data_ptr())
    return c, t


def start(name, c):
    rc = getattr(LIB, "heed_" + name)(ctypes.byref(c), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
    assert rc == 0, rc


def timed(functions, rounds=7, inner=5):
    times = [[] for _ in functions]
    for f in functions:
        f()
        f()
    for _ in range(rounds):
        for i, f in enumerate(functions):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(inner):
                f()
            end.record()
            end.synchronize()
            times[i].append(begin.elapsed_time(end) / inner)
    return [statistics.median(t) for t in times]


def sdpa(q, k, v, causal):
    return torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, enable_gqa=q.shape[2] != k.shape[2])


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


print(torch.cuda.get_device_name(), datetime.date.today(), "torch", torch.__version__)
torch.manual_seed(0)
flops_total = []
for d in (64, 128, 256):
    heads = 2048 // d
    for seqlen in ((2048, 8192) if QUICK else (512, 1024, 2048, 4096, 8192, 16384)):
        batch = 16384 // seqlen
        for causal in (False, True):
            if PASS not in ("forward", "backward"):
                continue
            q, k, v, dout = (torch.randn(batch, seqlen, heads, d, device="cuda", dtype=torch.bfloat16) for _ in range(4))
            c, t = make_call(q, k, v, causal, dout=dout)
            flops = 4 * batch * heads * seqlen * seqlen * d * (0.5 if causal else 1)
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                if PASS == "forward":
                    ours, theirs = timed([lambda: start("forward", c), lambda: sdpa(q, k, v, causal)])
                    e = error(t["out"], sdpa(q, k, v, causal).transpose(1, 2))
                else:
                    flops *= 2.5
                    start("forward", c)
                    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
                    out = sdpa(*leaves, causal)
                    grads = lambda: torch.autograd.grad(out, leaves, dout.transpose(1, 2), retain_graph=True)
                    ours, theirs = timed([lambda: start("backward", c), grads])
                    e = max(error(t[n], g) for n, g in zip(("dq", "dk", "dv"), grads()))
            if PASS == "backward":
                c.deterministic = 1
                ordered, = timed([lambda: start("backward", c)], rounds=3, inner=2)
                same = True
                first = [t[n].clone() for n in ("dq", "dk", "dv")]
                for _ in range(3):
                    start("backward", c)
                    same = same and all(torch.equal(a, t[n]) for a, n in zip(first, ("dq", "dk", "dv")))
                print(f"    deterministic {ordered:.3f} ms, same bits {same}")
            flops_total.append(theirs / ours)
            print(f"{PASS} d{d} b{batch} s{seqlen} {'causal' if causal else 'full':6s} heed {ours:8.3f} ms {flops / ours / 1e9:6.0f} TFLOPS"
                  f"  flash {theirs:8.3f} ms {flops / theirs / 1e9:6.0f}  ratio {theirs / ours:5.2f}  difference {e:.1e}", flush=True)
if PASS == "decode":
    for b, n, hq, hk, d in ((1, 8192, 32, 8, 128), (16, 8192, 32, 8, 128), (64, 8192, 32, 8, 128), (1, 131072, 32, 8, 128), (64, 2048, 64, 8, 64)):
        q = torch.randn(b, 1, hq, d, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(b, n, hk, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        c, t = make_call(q, k, v, False)
        choices = [s for s in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 33, 48, 64, 66, 98, 132) if n // s >= 128]
        def split(s):
            def f():
                c.splits = s
                start("decode", c)
            return f
        spent = timed([split(s) for s in choices], rounds=3, inner=10)
        splits = choices[spent.index(min(spent))]
        c.splits = splits
        kr, vr = (x.repeat_interleave(hq // hk, 2) if n * b < 200000 else x for x in (k, v))
        run = [lambda: start("decode", c)]
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            def call(backend=backend):
                with sdpa_kernel(backend):
                    return sdpa(q, k, v, False)
            try:
                call()
                run.append(call)
            except RuntimeError:
                pass
        graphs = []
        for f in run:
            s = torch.cuda.Stream()
            with torch.cuda.stream(s):
                f()
            torch.cuda.synchronize()
            g = torch.cuda.CUDAGraph()
            with torch.cuda.graph(g):
                f()
            graphs.append(g.replay)
        times = timed(graphs, inner=20)
        size = 2 * 2 * b * n * hk * d
        with sdpa_kernel(SDPBackend.MATH):
            small = min(b, 2)
            e = error(t["out"][:small], sdpa(q[:small], k[:small], v[:small], False).transpose(1, 2))
        print(f"decode b{b} k{n} {hq}/{hk} d{d} splits {splits}: " + ", ".join(
            f"{name} {x * 1e3:.1f} us {size / x / 1e9:.2f} TB/s" for name, x in zip(("heed", "flash", "cudnn"), times)) + f", difference {e:.1e}", flush=True)
if PASS == "masks":
    for d in (64, 128):
        b, n, h = 2, 8192, 2048 // d
        q, k, v, dout = (torch.randn(b, n, h, d, device="cuda", dtype=torch.bfloat16) for _ in range(4))
        k4, v4 = (x[:, :, : h // 4].contiguous() for x in (k, v))
        rows = torch.arange(n, device="cuda", dtype=torch.int32)
        causal = torch.stack([torch.zeros_like(rows), rows + 1], -1).expand(b, n, 2).contiguous()
        length = torch.tensor([100, 3000, 700, 2500, 1892], device="cuda")
        begin = torch.repeat_interleave(length.cumsum(0) - length, length).int()
        packed = torch.stack([begin, rows + 1], -1).expand(b, n, 2).contiguous()
        dense = 4 * b * h * n * n * d / 2
        cases = [("causal band", q, k, v, True, None, -1, dense), ("causal intervals", q, k, v, False, causal, -1, dense),
                 ("window 1024", q, k, v, True, None, 1023, dense * (2 * 1024 / n)), ("gqa 4:1", q, k4, v4, True, None, -1, dense),
                 ("5 packed documents by intervals", q, k, v, False, packed, -1, dense * float((length.double() ** 2).sum() / n**2))]
        for name, q_, k_, v_, is_causal, intervals, left, flops in cases:
            more = {} if intervals is None else {"intervals": intervals}
            c, t = make_call(q_, k_, v_, is_causal, dout=dout, **more)
            c.left = left
            f, g = timed([lambda: start("forward", c), lambda: start("backward", c)], rounds=5, inner=3)
            print(f"masks d{d} b{b} s{n} {name:32s} forward {f:.3f} ms {flops / f / 1e9:.0f} TFLOPS, backward {g:.3f} ms {2.5 * flops / g / 1e9:.0f} TFLOPS", flush=True)
if flops_total:
    print(f"geomean {statistics.geometric_mean(flops_total):.3f} worst {min(flops_total):.3f}")
