"""Writes the tables of README.md and docs/ from benchmarks/results/*.json; --check only compares."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def support_table(data: dict) -> str:
    """One line per instruction set of the table of kernels, as `heed list --json` prints it."""
    lines = ["| kernels | passes | tensors | head_dim |", "|---|---|---|---|"]
    for arch in dict.fromkeys(row["arch"] for row in data["kernels"]):
        rows = [row for row in data["kernels"] if row["arch"] == arch]
        passes = dict.fromkeys(row["pass"] for row in rows)
        dtypes = dict.fromkeys(row["dtype"] for row in rows)
        dots = [row["dtype"] for row in rows if row["pass"] == "forward" and row["operand"] == "bf16"]
        lines.append(
            f"| `{arch}`{' (bf16 dot products)' if dots else ''} | {', '.join(passes)} "
            f"| {', '.join(dtypes)} | 1 to {min(row['max_head_dim'] for row in rows)} |"
        )
    return "\n".join(lines)


def speed_table(data: dict) -> str:
    """One line per cell, then where and how it was measured."""
    lines = ["| work | shape | dtype | heed ms | torch SDPA ms | speed-up |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {c['work']} | {c['shape']} | {c['dtype']} | {c['heed_ms']:.2f} | {c['torch_ms']:.2f} "
        f"| **{c['ratio']:.2f}x** |"
        for c in data["cells"]
    ]
    m = data["machine"]
    lines += [
        "",
        f"{m['cpu']}, {m['threads']} threads, kernels `{m['kernels']}`, torch {m['torch']}, {m['date']}, "
        f"commit `{m['commit']}`: `{m['command']}`",
    ]
    return "\n".join(lines)


def model_table(data: dict) -> str:
    """One line per cell with the attentions side by side, then where and how it was measured."""
    names = list(dict.fromkeys(name for cell in data["cells"] for name in cell["ms"]))
    lines = [
        f"| work | shape | {' | '.join(f'{name} ms' for name in names)} | speed-up over sdpa |",
        "|---|---|" + "---|" * (len(names) + 1),
    ]
    for cell in data["cells"]:
        ms = cell["ms"]
        times = ["-" if not (t := ms.get(n)) else f"{t:.0f}" if t >= 100 else f"{t:.3g}" for n in names]
        ratio = f"**{ms['sdpa'] / ms['heed']:.2f}x**" if ms["sdpa"] and ms["heed"] else "-"
        lines.append(f"| {' | '.join([cell['work'], cell['shape'], *times, ratio])} |")
    m = data["machine"]
    lines += [
        "",
        f"{m['gpu']}, driver {m['driver']}, torch {m['torch']}, Transformers {m['transformers']}, "
        f"{m['date']}, commit `{m['commit']}`: `{m['command']}`",
    ]
    return "\n".join(lines)


def table_of(data: dict) -> str:
    if "kernels" in data:
        return support_table(data)
    return model_table(data) if "ms" in data["cells"][0] else speed_table(data)


def fill(text: str) -> str:
    """Replaces what stands between <!-- table: NAME --> and <!-- end --> by the table of NAME.json."""

    def replace(match: re.Match[str]) -> str:
        data = json.loads((ROOT / "benchmarks" / "results" / f"{match[1]}.json").read_text())
        return f"<!-- table: {match[1]} -->\n{table_of(data)}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", replace, text, flags=re.S)


def main() -> None:
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text()
        filled = fill(text)
        if filled != text:
            stale.append(path)
            if "--check" not in sys.argv:
                path.write_text(filled)
    for path in stale:
        print(f"{'stale' if '--check' in sys.argv else 'wrote'} {path.relative_to(ROOT)}")
    if stale and "--check" in sys.argv:
        sys.exit(1)


if __name__ == "__main__":
    main()
