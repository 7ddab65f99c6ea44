"""Writes the measured tables of README.md and docs/ from benchmarks/results/*.json."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def cpu_table(path: Path) -> str:
    """One line per cell, then where and how it was measured."""
    data = json.loads(path.read_text())
    lines = ["| work | shape | dtype | heed ms | torch SDPA ms | speed-up |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {c['work']} | {c['shape']} | {c['dtype']} | {c['heed_ms']:.2f} | {c['torch_ms']:.2f} "
        f"| **{c['ratio']:.2f}x** |"
        for c in data["cells"]
    ]
    m = data["machine"]
    lines += [
        "",
        f"{m['cpu']}, {m['threads']} threads, kernels `{m['isa']}`, torch {m['torch']}, {m['date']}, "
        f"commit `{m['commit']}`: `{m['command']}`",
    ]
    return "\n".join(lines)


def fill(text: str) -> str:
    """Replaces what stands between <!-- table: NAME --> and <!-- end --> by the table of NAME.json."""

    def replace(match: re.Match[str]) -> str:
        table = cpu_table(ROOT / "benchmarks" / "results" / f"{match[1]}.json")
        return f"<!-- table: {match[1]} -->\n{table}\n<!-- end -->"

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
