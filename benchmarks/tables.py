"""Writes the tables of README.md and docs/ from benchmarks/results/*.json; --check only compares.

<!-- table: NAME --> stands for the table of NAME.json, <!-- table: NAME PART --> for a part of it.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


COMMON = ("scalar", "reference")  # kernels of any CPU
FAMILIES = {
    "sm80": "NVIDIA GPUs of sm_80 and newer",
    "sm90": "Hopper: H100, H200",
    "amx_bf16": "tiles of bf16: Intel Xeon from Sapphire Rapids on",
}


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def support_table(data: dict) -> str:
    """One line per family of the tables of kernels, as `heed list --json` prints them on x86-64 and
    on aarch64."""
    aarch64 = json.loads((ROOT / "benchmarks" / "results" / "kernels_aarch64.json").read_text())
    kernels = [row for row in data["kernels"] if row["arch"] not in COMMON]
    kernels += aarch64["kernels"]
    lines = []
    for arch in dict.fromkeys(row["arch"] for row in kernels):
        rows = [row for row in kernels if row["arch"] == arch]
        passes = dict.fromkeys(row["pass"] for row in rows)
        dtypes = dict.fromkeys(row["dtype"] for row in rows)
        dots = [
            row["dtype"] for row in rows if row["pass"] == "forward" and row["operand"] == "bf16"
        ]
        notes = ["aarch64"] if arch.startswith("neon") else []
        notes += ["bf16 dot products"] if dots else []
        note = FAMILIES.get(arch, ", ".join(notes))
        # The rows of a GPU are one per head_dim, the last for all that are smaller.
        most = min(max(r["max_head_dim"] for r in rows if r["pass"] == name) for name in passes)
        name = f"`{arch}`{f' ({note})' if note else ''}"
        lines.append([name, ", ".join(passes), ", ".join(dtypes), f"1 to {most}"])
    return table(["kernels", "passes", "tensors", "head_dim"], lines)


def cpu_table(data: dict, part: str) -> str:
    """What bench.py saved of each CPU. Without a part: the first CPU's main cells."""
    machines = data["machines"]
    if not part:
        return cpu_main(machines[0])
    if part == "machines":
        return cpu_machines(machines)
    if part == "cells":
        return beside(machines, ["work", "shape", "dtype", "goal"], cpu_cells)
    if part == "ratios":
        return beside(machines, ["", "goal"], cpu_ratios)
    each = {"decode": cpu_decode, "short": cpu_short}[part]
    return "\n\n".join(f"{short_name(result, machines)}:\n\n{each(result)}" for result in machines)


def cpu_of(result: dict) -> str:
    return f"{result['machine']['cpu']}, {result['machine']['threads']} threads"


def short_name(result: dict, machines: list[dict]) -> str:
    """Brand, family, model and threads, where a name has them: EPYC 25-17, 2T. With the kernels
    where the machines would be called the same otherwise."""
    m = result["machine"]
    found = re.search(r"(EPYC|Xeon).*family (\d+) model (\d+)", m["cpu"])
    name = f"{found[1]} {found[2]}-{found[3]}" if found else m["cpu"]
    if sum(cpu_of(other) == cpu_of(result) for other in machines) > 1:
        name += f" {m['kernels']}"
    return f"{name}, {m['threads']}T"


def cpu_machines(machines: list[dict]) -> str:
    """What the other tables call a machine, and what ran on it."""
    head = ["", "CPU", "threads", "kernels", "torch", "date", "commit"]
    rows = []
    for result in machines:
        m = result["machine"]
        name = short_name(result, machines)
        row = [name, m["cpu"], m["threads"], f"`{m['kernels']}`", m["torch"]]
        others: dict[str, list[str]] = {}  # works that were measured at another commit
        for cell in result["cells"]:
            if cell.get("commit", m["commit"]) != m["commit"]:
                others.setdefault(cell["commit"], []).append(cell["work"])
        commits = [f"`{m['commit']}`"]
        commits += [f"`{c}`: {', '.join(dict.fromkeys(works))}" for c, works in others.items()]
        rows.append([*row, m["date"], "; ".join(commits)])
    return "\n\n".join([table(head, rows), commands(machines)])


def ran_on(result: dict) -> str:
    m = result["machine"]
    return versions(m, f"{cpu_of(result)}, kernels `{m['kernels']}`")


def commands(machines: list[dict]) -> str:
    """Each once; where there are several, with the CPUs that ran it."""
    ran: dict[str, list[str]] = {}
    for result in machines:
        ran.setdefault(result["machine"]["command"], []).append(short_name(result, machines))
    if len(ran) == 1:
        return f"`{next(iter(ran))}`"
    return "\n\n".join(f"{'; '.join(cpus)}: `{command}`" for command, cpus in ran.items())


def beside(
    machines: list[dict], head: list[str], rows_of: Callable[[dict], dict[tuple[str, ...], str]]
) -> str:
    """A column per CPU, and a line for what any of them has: `head` names what its key says."""
    columns = [rows_of(result) for result in machines]
    keys = dict.fromkeys(key for column in columns for key in column)
    return table(
        [*head, *(short_name(result, machines) for result in machines)],
        ([*key, *(column.get(key, "-") for column in columns)] for key in keys),
    )


def in_main_table(cell: dict) -> bool:
    if cell["dtype"] == "fp16" or "100%" in cell["shape"]:
        return False
    return cell["work"] in ("forward", "backward", "padded") or cell["shape"] in (
        "1 x 32768 H32/8 D128",
        "8 x 8192 H32/8 D128",
    )


def cpu_main(result: dict) -> str:
    head = ["work", "shape", "dtype", "heed ms", "torch SDPA ms", "speed-up"]
    rows = []
    for c in filter(in_main_table, result["cells"]):
        row = [c["work"], c["shape"], c["dtype"], f"{c['heed_ms']:.2f}", f"{c['torch_ms']:.2f}"]
        rows.append([*row, f"**{c['ratio']:.2f}x**", f"{c['share']:.0%} of {c['bound']}"])
    shares = table([*head, "heed's share of the limit"], rows)
    return f"{shares}\n\n{ran_on(result)}: {commands([result])}"


def cpu_cells(result: dict) -> dict[tuple[str, ...], str]:
    """Share of the measured peak and, where PyTorch ran beside it, the speed-up."""
    cells = {}
    for c in result["cells"]:
        if c["work"] in ("decode", "short"):
            continue
        goal = f"{c['goal']:.0%}" if c["goal"] else "-"
        speed_up = f", **{c['ratio']:.2f}x**" if c["ratio"] else ""
        cells[c["work"], c["shape"], c["dtype"], goal] = f"{c['share']:.0%}{speed_up}"
    return cells


def cpu_decode(result: dict) -> str:
    """A line per dtype, heads and count of queries, a column per length of the cache."""
    cells = {}
    for c in result["cells"]:
        if c["work"] == "decode":
            queries, _, keys, heads, _ = c["shape"].split()
            parts = [
                f"{c['bytes'] / c['heed_ms'] * 1e-6:.1f} GB/s",
                f"{c['share']:.0%} of {c['bound']}",
            ]
            if c.get("cached_ms"):
                parts.append(f"{c['cached_ms'] / c['heed_ms']:.0%} from L3")
            cells[(c["dtype"], heads, queries), int(keys)] = ", ".join(
                [*parts, f"**{c['ratio']:.1f}x**"]
            )
    keys = sorted({key for _, key in cells})
    lines = dict.fromkeys(line for line, _ in cells)
    return table(
        ["dtype", "heads", "queries", *(f"{key} keys" for key in keys)],
        ([*line, *(cells.get((line, key), "-") for key in keys)] for line in lines),
    )


def cpu_short(result: dict) -> str:
    """torch's time over heed's: a line per length, a column per batch."""
    short = [c for c in result["cells"] if c["work"] == "short"]
    cells = {(c["dtype"], *c["shape"].split()[:2]): c for c in short}
    batches = list(dict.fromkeys(key[1] for key in cells))
    rows = []
    for dtype, length in dict.fromkeys((key[0], key[2]) for key in cells):
        ratios = [f"{cells[dtype, batch, length]['ratio']:.2f}x" for batch in batches]
        rows.append([f"{length} {dtype}", *ratios])
    return table(["", *batches], rows)


def cpu_ratios(result: dict) -> dict[tuple[str, ...], str]:
    """What is a comparison of cells; those of a CPU that has both."""
    cells = {(c["work"], c["shape"], c["dtype"]): c for c in result["cells"]}
    threads = int(result["machine"]["threads"])
    ratios = {}

    def compare(name: str, part: float | None, whole: float | None, goal: float | None) -> None:
        if part and whole:
            ratios[name, f"{goal:.2f}" if goal else "-"] = f"{part / whole:.2f}"

    def rate(cell: dict | None) -> float | None:
        return cell["flops"] / cell["heed_ms"] if cell else None

    def peak(cell: dict | None) -> float | None:
        return cell["peaks"]["fma"] if cell else None

    for dtype in ("fp32", "bf16"):
        for dim in (128, 64):
            shape, name = f"B1 H8 S2048 D{dim}", f"forward D{dim} {dtype}"
            full = cells.get(("forward", f"{shape} full", dtype))
            causal = cells.get(("forward", f"{shape} causal", dtype))
            one = cells.get(("1 thread", f"{shape} full", dtype))
            compare(f"{name}, causal over full, per visible score", rate(causal), rate(full), 0.93)
            linear = threads * (rate(one) or 0)
            compare(f"{name}, rate over 1 thread's by threads", rate(full), linear, 0.95)
            if dtype == "fp32":
                linear = threads * (peak(one) or 0)
                name = f"the FMA peak beside D{dim}, over 1 thread's by threads"
                compare(name, peak(full), linear, None)
                half = cells.get(("forward", f"{shape} full", "fp16"))
                compare(f"forward D{dim}, rate of fp16 over fp32", rate(half), rate(full), 0.9)
        padded = [c for key, c in cells.items() if key[0] == "padded" and key[2] == dtype]
        if padded:
            whole, part = sorted(padded, key=lambda c: -c["flops"])
            name = f"padded {dtype}, rate per real token squared, 55 % fill over full"
            compare(name, rate(part), rate(whole), 0.9)
    if calls := result["host"]:
        ratios["microseconds of a call, C++", "3"] = f"{calls['cpp_us']:.2g}"
        ratios["microseconds of a call, PyTorch", "10"] = f"{calls['torch_us']:.2g}"
    return ratios


def versions(m: dict, where: str) -> str:
    """Machine and software, date and commit."""
    software = [
        f"{name} {m[key]}"
        for name, key in (("torch", "torch"), ("Transformers", "transformers"), ("cuDNN", "cudnn"))
        if key in m
    ]
    return f"{', '.join([where, *software, m['date']])}, commit `{m['commit']}`"


def caption(m: dict, where: str) -> str:
    return f"{versions(m, where)}: `{m['command']}`"


def gpu_caption(m: dict) -> str:
    return caption(m, f"{m['gpu']}, driver {m['driver']}")


def model_table(data: dict) -> str:
    """One line per cell with the attentions side by side, then where and how it was measured."""
    names = list(dict.fromkeys(name for cell in data["cells"] for name in cell["ms"]))
    head = ["work", "shape", *(f"{name} ms" for name in names), "speed-up over sdpa"]
    rows = []
    for cell in data["cells"]:
        ms = cell["ms"]
        times = [
            "-" if not (t := ms.get(n)) else f"{t:.0f}" if t >= 100 else f"{t:.3g}" for n in names
        ]
        ratio = f"**{ms['sdpa'] / ms['heed']:.2f}x**" if ms["sdpa"] and ms["heed"] else "-"
        rows.append([cell["work"], cell["shape"], *times, ratio])
    return f"{table(head, rows)}\n\n{gpu_caption(data['machine'])}"


def serving_table(data: dict) -> str:
    """One line per workload with the attentions side by side, then where it was measured."""
    names = list(dict.fromkeys(name for cell in data["cells"] for name in cell["requests_per_s"]))
    head = ["work", "shape", "dtype", *(f"{name} requests/s" for name in names), "heed over sdpa"]
    judged = all("judged" in cell for cell in data["cells"])  # not in results before 2026-11-25
    if judged:
        head += [f"{name}: fp32's tokens, worst behind" for name in names]
    rows = []
    for cell in data["cells"]:
        rate = cell["requests_per_s"]
        rates = [f"{rate[name]:.3g}" if name in rate else "-" for name in names]
        over = f"**{rate['heed'] / rate['sdpa']:.2f}x**"
        row = [cell["work"], cell["shape"], cell["dtype"], *rates, over]
        for name in names if judged else ():
            told = cell["judged"][name]
            row.append(f"{told['same']:.1%}, {told['behind']:.2g}")
        rows.append(row)
    m = data["machine"]
    threads = "1 thread" if m.get("threads") == "1" else f"{m.get('threads')} threads"
    where = m.get("gpu") or f"{m['cpu']}, {threads}, kernels `{m['kernels']}`"
    return f"{table(head, rows)}\n\n{caption(m, where)}"


def scaling_table(data: dict) -> str:
    """One line per sequence length, number of GPUs and kernels, beside the same kernels on one."""
    names = {"heed": "heed", "torch": "PyTorch's flash"}
    head = ["seqlen", "GPUs", "kernels", "forward ms", "x", "forward and backward ms", "x"]
    rows = []
    alone = {cell["seqlen"]: cell for cell in data["cells"] if cell["gpus"] == 1}
    for cell in sorted(data["cells"], key=lambda c: (c["seqlen"], c["gpus"])):
        for name in (n for n in names if n in cell):
            row = [str(cell["seqlen"]), str(cell["gpus"]), names[name]]
            for work in ("forward", "training"):
                ms = cell[name][work]
                row += [f"{ms:.3g}", f"**{alone[cell['seqlen']][name][work] / ms:.2f}x**"]
            rows.append(row)
    heads, m = data["shape"], data["machine"]
    where = f"One row, {heads['heads']}/{heads['key_heads']} heads of {heads['head_dim']}, bf16. "
    return f"{table(head, rows)}\n\n{where}{gpu_caption(m)}"


def tests_table(data: dict) -> str:
    """One line per recorded test run."""
    head = ["run", "Python", "PyTorch", "Transformers", "system", "kernels", "passed", "skipped"]
    rows = []
    for run in data["runs"].values():
        system = [run["os"], f"glibc {run['glibc']}", run["processor"]]
        system += [f"{name} {run[name]}" for name in ("nvcc", "cuda", "gpu") if name in run]
        kernels = [run["kernels"], ", ".join(run["gpu_kernels"]) or "no CUDA kernels"]
        row = [f"`{run['command']}`", run["python"], run["torch"], run["transformers"]]
        row += [", ".join(system), "; ".join(kernels)]
        row += [", ".join(f"{part['passed']} {part['kind']}" for part in run["parts"])]
        row += [str(sum(part["skipped"] for part in run["parts"]))]
        rows.append([*row, f"{run['date']}, `{run['commit']}`"])
    return table([*head, "recorded"], rows)


PEERS = {
    "heed": "heed",
    "flash": "SDPA flash",
    "cudnn": "SDPA cuDNN",
    "fa4": "FlashAttention-4",
    "cublas": "cuBLAS 8192^3",
}


def gpu_kernel_table(data: dict, part: str) -> str:
    """A line per cell of a pass; `summary`: geometric means of the passes that have peers."""
    if part == "summary":
        return gpu_summary(data)
    cells = data["passes"][part]["cells"]
    peers = [p for p in PEERS if any(p in c["ms"] for c in cells)]
    unit = {c["unit"] for c in cells}
    others = [p for p in peers if p != "heed"]
    head = ["work", "shape", *(f"{PEERS[p]} {'/'.join(sorted(unit))}" for p in peers)]
    head += ["ms", *(f"over {PEERS[p]}" for p in others)]
    by_tile = all("over_dense" in c for c in cells)
    head += ["per FLOP of its tiles, over dense causal"] if by_tile else []
    rows = []
    for c in cells:
        ms, rate = c["ms"], c["rate"]
        row = [c["work"], c["shape"], *(f"{rate[p]:.3g}" if p in rate else "-" for p in peers)]
        row += [f"{ms['heed']:.3g}"]
        row += [f"**{ms[p] / ms['heed']:.2f}x**" if p in ms else "-" for p in others]
        rows.append(row + ([f"{c['over_dense']:.3f}"] if by_tile else []))
    return f"{table(head, rows)}\n\n{gpu_caption(data['passes'][part]['machine'])}"


def gpu_summary(data: dict) -> str:
    passes = {p: run for p, run in data["passes"].items() if len(run["cells"][0]["ms"]) > 1}
    present = {name for run in passes.values() for cell in run["cells"] for name in cell["ms"]}
    peers = [p for p in PEERS if p in present - {"heed", "cublas"}]
    head = ["pass", "cells", *(f"over {PEERS[p]}" for p in peers), "commit"]
    rows = []
    for name, run in passes.items():
        row = [name, str(len(run["cells"]))]
        for peer in peers:
            ratios = [c["ms"][peer] / c["ms"]["heed"] for c in run["cells"] if peer in c["ms"]]
            mean = f"**{statistics.geometric_mean(ratios):.2f}x**" if ratios else "-"
            row.append(f"{mean} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-")
        rows.append([*row, f"`{run['machine']['commit']}`"])
    m = next(iter(passes.values()))["machine"]
    where = f"{m['gpu']}, driver {m['driver']}, torch {m['torch']}, cuDNN {m['cudnn']}, {m['date']}"
    return f"{table(head, rows)}\n\nGeometric means. {where}: `make bench-gpu`"


def counter_table(data: dict) -> str:
    """A line per case: each counter of every peer."""
    peers = [p for p in PEERS if any(p in c["peers"] for c in data["cells"])]
    names = list(data["cells"][0]["peers"]["heed"])
    head = ["case", *(f"{name}, {' / '.join(PEERS[p] for p in peers)}" for name in names)]
    rows = []
    for c in data["cells"]:
        values = [
            " / ".join(f"{c['peers'][p][name]:.3g}" if p in c["peers"] else "-" for p in peers)
            for name in names
        ]
        rows.append([c["shape"], *values])
    return f"{table(head, rows)}\n\n{gpu_caption(data['machine'])}"


def cuda_build_table(data: dict, part: str) -> str:
    """What kernels of a family cost on sm_90, a line per pass and head_dim; sm90_forward,
    sm90_backward: of one pass; `totals`: what the build costs."""
    m, t, limits = data["machine"], data["totals"], data["limits"]
    where = f"nvcc {m['nvcc']}, {m['date']}, commit `{m['commit']}`: `{m['command']}`"
    if part == "totals":
        whole, files = f"whole build, {m['jobs']} jobs", f"CUDA files ({t['files']})"
        costs = [
            [whole, f"{t['minutes']:.1f} min", f"{limits['minutes']} min"],
            [f"{files}, CPU time together", f"{t['cuda_cpu_minutes']:.1f} min", ""],
            ["slowest file, CPU time", f"{t['file_seconds']:.1f} s", f"{limits['file_seconds']} s"],
            ["largest compiler process", f"{t['file_mb']} MB", f"{limits['file_mb']} MB"],
            ["`_heed.so`, stripped", f"{t['library_mb']:.1f} MB", f"{limits['library_mb']} MB"],
        ]
        on = f"{m['cpu']}, load average {m['load']}, GPUs `{m['archs']}`"
        return f"{table(['', 'measured', 'limit'], costs)}\n\n{on}, {where}"
    family, _, of_pass = (part or "sm80").partition("_")
    code = {"sm80": "sm_90", "sm90": "sm_90a"}[family]
    scores = ["plain", "softcap", "general"]
    if family == "sm90":
        scores = ["plain"] if of_pass == "backward" else ["plain", "softcap"]
    head = ["pass", "head_dim", "tile", "warps", "shared memory", "registers"]
    head += [f"spill bytes, {score}" for score in scores]
    rows = []
    groups: dict[tuple, list[dict]] = {}
    for k in data["kernels"]:
        if k.get("family") == family and code in k["archs"]:
            pass_name = re.sub(rf"^{family}_|_hdim.*$", "", k["file"])
            groups.setdefault((pass_name, k["tile"]["head_dim"]), []).append(k)
    for name in [p for p in PASSES if p.startswith(of_pass)]:
        for dim in sorted(d for n, d in groups if n == name):
            group = groups[name, dim]
            tile = group[0]["tile"]
            if family == "sm90" and "consumers" not in tile:  # backward
                tile_m, warps = tile["tile_m"], 4 + 4 * 2  # two consumers
            elif family == "sm90":
                tile_m, warps = 64 * tile["consumers"], 4 + 4 * tile["consumers"]
            else:
                tile_m = tile["tile_m"]
                warps = tile.get("warps") or tile["tile_n"] // tile["keys"] * tile["share"]
            size = f"{tile_m} x {tile['tile_n']}"
            narrow = f"v{tile['head_dim_v']}" if tile.get("head_dim_v", dim) < dim else ""
            row_name = (
                f"{family}/{group[0]['kernel']}/bf16/hdim{dim}{narrow}/plain/"
                f"{size.replace(' ', '')}"
            )
            smem = data["smem_bytes"].get(row_name)
            spills = []
            for score in scores:
                of_score = [k["archs"][code] for k in group if k["score"] == score]
                spills.append(str(max((c["spill_bytes"] for c in of_score), default="-")))
            registers = max(k["archs"][code]["registers"] for k in group)
            row = [name, str(dim), size, str(warps), f"{smem / 1024:.0f} KB" if smem else "-"]
            rows.append([*row, str(registers), *spills])
    return f"{table(head, rows)}\n\nStores and loads together, the larger of bf16 and f16. {where}"


PASSES = ["forward", "forward_short", "forward_narrow", "decode", "decode_compact", "decode_wide"]
PASSES += ["backward", "backward_compact"]


def table_of(data: dict, part: str) -> str:
    if "smem_bytes" in data:
        return cuda_build_table(data, part)
    if "machines" in data:
        return cpu_table(data, part)
    if "runs" in data:
        return tests_table(data)
    if "kernels" in data:
        return support_table(data)
    if "passes" in data:
        return gpu_kernel_table(data, part)
    if "peers" in data["cells"][0]:
        return counter_table(data)
    if "gpus" in data["cells"][0]:
        return scaling_table(data)
    if "requests_per_s" in data["cells"][0]:
        return serving_table(data)
    return model_table(data)


def fill(text: str) -> str:
    """Replaces what stands between <!-- table: NAME --> and <!-- end --> by the table of NAME.json.

    A table without results stays as it is.
    """

    def replace(match: re.Match[str]) -> str:
        path = ROOT / "benchmarks" / "results" / f"{match[2]}.json"
        if not path.exists():
            return match[0]
        return f"{match[1]}\n{table_of(json.loads(path.read_text()), match[3] or '')}\n<!-- end -->"

    return re.sub(
        r"(<!-- table: ([\w-]+)(?: (\w+))? -->)\n.*?<!-- end -->", replace, text, flags=re.S
    )


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
