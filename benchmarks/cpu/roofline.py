"""Draws benchmarks/results/cpu.json as rooflines, one a CPU, into docs/kernels/cpu_roofline.svg."""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
COLORS = {"fp32": "#1f77b4", "bf16": "#d62728"}
MARKERS = {"forward": "o", "backward": "s", "decode": "^"}


def drawable(result: dict) -> list[dict]:
    return [c for c in result["cells"] if c["work"] in MARKERS and c["dtype"] in COLORS]


def draw(axes: plt.Axes, result: dict) -> None:
    cells = drawable(result)
    peaks = [c["peaks"] for c in cells]
    read = sum(p["read"] for p in peaks) / len(peaks)
    tops = {"fp32": [p["fma"] for p in peaks], "bf16": [max(p["fma"], p["dot"]) for p in peaks]}
    for dtype, all_tops in tops.items():
        top = sum(all_tops) / len(all_tops)
        x = [0.25, top / read, 2e3]
        axes.plot(x, [read * x[0], top, top], color=COLORS[dtype], label=f"{dtype} limit")
    for c in cells:
        if "causal" in c["shape"]:
            continue
        # q, k, v and out; backward also dout, dq, dk and dv; each once.
        dim = int(c["shape"].split("D")[-1].split()[0])
        tensors = {"forward": 4, "backward": 8}.get(c["work"], 0)
        moved = c["bytes"] or tensors * 8 * 2048 * dim * (2 if c["dtype"] == "bf16" else 4)
        for ms, fill in ((c["heed_ms"], COLORS[c["dtype"]]), (c["torch_ms"], "none")):
            axes.plot(
                c["flops"] / moved,
                c["flops"] / ms * 1e-6,
                MARKERS[c["work"]],
                color=COLORS[c["dtype"]],
                markerfacecolor=fill,
                markersize=5,
            )
    for work, marker in MARKERS.items():
        axes.plot([], [], marker, color="black", label=f"{work}: heed")
        axes.plot([], [], marker, color="black", markerfacecolor="none", label=f"{work}: SDPA")
    axes.set(xscale="log", yscale="log", xlabel="flop per byte of tensors", ylabel="GFLOP/s")
    m = result["machine"]
    axes.set_title(f"{m['cpu']}, {m['threads']} threads, {m['kernels']}", fontsize=9)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=7)


def main() -> None:
    results = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())["machines"]
    results = [result for result in results if drawable(result)]
    if not results:
        raise SystemExit(f"cpu.json has no cells of {', '.join(MARKERS)}: bench.py --save first")
    plt.rcParams["svg.hashsalt"] = "heed"
    lines = (len(results) + 1) // 2
    figure, axes = plt.subplots(lines, 2, figsize=(13, 4.5 * lines), squeeze=False)
    for at, result in zip_longest(axes.flat, results):
        if result is None:
            at.axis("off")
        else:
            draw(at, result)
    figure.tight_layout()
    figure.savefig(ROOT / "docs/kernels/cpu_roofline.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
