"""Write the measured tables into README.md and docs/, between their markers.

python benchmarks/update_readme.py
python benchmarks/update_readme.py --from FOLDER      # first copy the results of a GPU check
"""

import argparse
import json
import re
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from harness import RESULTS, earlier_rows, write_results

from gpu_report import FACTS, facts_of, markdown_table, summary, times

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/results/gpu.md", "docs/results/cpu.md")
NOT_MEASURED = "Not yet measured: no GPU run has been committed.\n"
OURS = "ours"
COMMAND = {"command": "bash benchmarks/gpu_check.sh first; bash benchmarks/gpu_check.sh second"}
KEYS = ("problem", "pass", "peer")  # identify a measured row


def cpu_table(file: str = "cpu", dtype: str = "fp32") -> str:
    """Make the table of speed and memory of ours and its peers from a result of bench_cpu.py."""
    content = json.loads((RESULTS / f"{file}.json").read_text())
    found: dict[tuple, dict[str, dict]] = {}
    for row in content["rows"]:
        found.setdefault((row["model"], row["pass"], row["batch"]), {})[row["peer"]] = row
    rows = []
    for (model, what, batch), peers in found.items():
        ms = {peer: row["latency_ms"] for peer, row in peers.items()}
        memory = [peers[peer]["peak_mib"] if batch > 1 else None for peer in ("released", OURS)]
        faster = min(ms["released"], ms["released, compiled"]) / ms[OURS]
        rows.append(
            {
                f"CPU, {dtype}, ms": f"{model}, {what}, batch {batch}",
                "released": ms["released"],
                "compiled": ms["released, compiled"],
                "ViT, faster": min(ms["ViT (timm)"], ms["ViT (timm), compiled"]),
                "onnxruntime": ms.get("ours, onnxruntime"),
                "ours": ms[OURS],
                "ours, compiled": ms["ours, compiled"],
                "over the faster released": f"**{faster:.2f}×**",
                "floor / ours": f"{peers[OURS]['of_floor']:.0%}",
                "MiB, released → ours": None if None in memory else f"{memory[0]:,.0f} → {memory[1]:,.0f}",
            }
        )
    rows = [{name: value for name, value in row.items() if any(other[name] for other in rows)} for row in rows]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in content["rows"]))
    note = (
        f"{content['device']}, torch {content['torch']}, commits {commits}; same weights, outputs and gradients "
        "compared first. Compiled: the released code under `torch.compile`. ViT: timm's of the same sizes, eager or "
        f"compiled. {'onnxruntime runs our exported file. ' if 'onnxruntime' in rows[0] else ''}Floor: the time of "
        "the model's operations at the rate of a large product in the same run."
    )
    return f"{markdown_table(rows)}\n{note}\n"


def _cell(row: dict | None, show: Callable[[dict], object]) -> object:
    """Format a measured row; "**red**" if ours was wrong or failed, "n/a" if nothing was measured."""
    if row is None or row["latency_ms"] is None:
        return "**red**" if row is not None and row.get("red") else "n/a"
    return show(row)


def _problems(rows: list[dict]) -> list[dict]:
    """Make a line for each problem and whole pass: ours, and its speed relative to each peer."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        if row["pass"] not in ("forward", "backward"):
            found.setdefault((row["problem"], row["pass"]), {})[row["peer"]] = row
    lines = []
    for (problem, what), by_peer in found.items():
        ours, size = by_peer.get(OURS), next(iter(by_peer.values()))
        ours_ms = ours and ours["latency_ms"]
        if "model" in size:
            line = {f"CRATE, {size['dtype']}": f"{problem}, batch {size['batch']}"}
            line |= {"images/s": _cell(ours, lambda row: row["images_per_s"])}
            line |= {"MFU": _cell(ours, lambda row: f"{row['mfu']:.0%}")}
        else:
            keys = ("batch", "n_tokens", "heads", "head_dim", "rows", "width")
            sizes = "×".join(str(size[key]) for key in keys if key in size)
            line = {size["dtype"]: f"{problem}, {sizes}, {what}"}
            line |= {"TFLOP/s": _cell(ours, lambda row: row["tflops_per_s"])}
            line |= {"floor / ours": _cell(ours, lambda row: f"{row['of_floor']:.0%}")}
        line |= {"ours, ms": _cell(ours, lambda row: row["latency_ms"])}
        line |= {"ours, peak MiB": _cell(ours, lambda row: row["peak_mib"] or "n/a")}
        for peer in dict.fromkeys(row["peer"] for row in rows if row["peer"] != OURS):
            shown = by_peer.get(peer) if ours_ms else ours
            # with ours measured beside this peer
            line[peer] = _cell(
                shown, lambda row, ours_ms=ours_ms: f"{row.get('ours_faster') or row['latency_ms'] / ours_ms:.2f}×"
            )
        lines.append(line)
    return lines


def _gpu_tables(results: Path, names: tuple[str, ...], root: str = "") -> list[str]:
    parts = []
    for name in names:
        path = results / f"{name}.json"
        if path.exists() and (lines := _problems((content := json.loads(path.read_text()))["rows"])):
            facts = ", ".join(f"{key} {content[key]}" for key in ("driver", "torch", "triton", "ptxas", "commit"))
            parts.append(
                f"{markdown_table(lines)}\nPeers: how many times as fast as each ours is. {content['device']}, "
                f"{facts}; in the same run a matrix product reached {content['matrix_tflops_per_s']:.0f} TFLOP/s "
                f"and a copy {content['copy_gb_per_s']:,.0f} GB/s. Every pass, and why a peer is n/a or red: "
                f"[{name}.md]({root}benchmarks/results/{name}.md).\n"
            )
    return parts


def gpu_table(results: Path = RESULTS) -> str:
    """Make the tables of a GPU check, subspace attention and ISTA, or a sentence if there are no results."""
    return "\n".join(_checks(results) + _gpu_tables(results, ("mssa", "ista"))) or NOT_MEASURED


def models_table(results: Path = RESULTS) -> str:
    """Make the tables of whole models on a GPU, or a sentence if there are no results."""
    return "\n".join(_gpu_tables(results, ("crate", "model", "growth"), "../../")) or NOT_MEASURED


# --- results of a GPU check ---------------------------------------------------------------------------------------


def _checks(results: Path) -> list[str]:
    """Count the passed probes and GPU tests in gpu_check.json, and name the others."""
    path = results / "gpu_check.json"
    if not path.exists():
        return []
    rows, lines = json.loads(path.read_text())["rows"], []
    for stage, what in (("probes", "kernel probes are right"), ("tests", "GPU tests pass")):
        ran = [row for row in rows if row["stage"] == stage and row["status"] != "n/a"]
        ran = [row for row in ran if stage != "probes" or "probe" in row]  # peers are compiled in the same stage
        red = list(dict.fromkeys(row["item"] for row in ran if row["status"] == "red"))
        ran = {row["item"] for row in ran}  # a test that lost the GPU has two rows
        if ran:
            named = ": **red**: " + ", ".join(f"`{item.rpartition('::')[2]}`" for item in red[:10]) if red else ""
            lines.append(f"{len(ran) - len(red)} of {len(ran)} {what}{named}{', …' if len(red) > 10 else ''}.")
    page = "[gpu_check.md](benchmarks/results/gpu_check.md)"
    return ["\n".join([*lines, f"All red rows, and the tiles: {page}."]) + "\n"] if lines else []


def take(source: Path, results: Path = RESULTS) -> None:
    """Copy the rows of a GPU check into the results.

    Measured rows replace those of the same problem, pass and peer in their benchmark's file. The other rows replace
    those of the same stages in gpu_check.json. Rows of another commit, device or torch are dropped. `source` is a
    gpu_check_….tar.gz or a folder of them.
    """
    archives = sorted(source.glob("gpu_check_*.tar.gz")) if source.is_dir() else [source]
    if not archives:
        raise SystemExit(f"{source} holds no gpu_check_*.tar.gz")
    rows = []
    for archive in archives:
        with tarfile.open(archive) as tar:
            brought = [json.loads(line) for line in tar.extractfile("rows.jsonl").read().decode().splitlines()]
        facts = _facts(facts_of(brought))
        same = {key: facts[key] for key in ("commit", "device", "torch") if key in facts}
        rows += [facts | row for row in brought]
    for name in ("mssa", "ista", "crate", "model", "growth"):
        measured = [row["row"] for row in rows if row.get("bench") == name]
        if measured:
            found: dict[tuple, dict] = {}  # the first row with a time
            for row in measured:
                old = found.setdefault(tuple(row[key] for key in KEYS), row)
                if old["latency_ms"] is None and row["latency_ms"] is not None:
                    found[tuple(row[key] for key in KEYS)] = row
            merged = earlier_rows(results / f"{name}.json", measured, KEYS, same) + list(found.values())
            write_results(results, name, merged, times(merged), _facts(measured[0]) | COMMAND)
    kept = [row | {"reason": row["reason"] and str(row["reason"])[:300]} for row in rows if "bench" not in row]
    kept = earlier_rows(results / "gpu_check.json", kept, ["stage"], same) + kept
    write_results(results, "gpu_check", kept, summary(kept, "all"), facts | COMMAND)


def _facts(row: dict) -> dict:
    return {key: row[key] for key in FACTS if key in row}


def updated(text: str) -> str:
    """Return a page with new tables."""
    makers = {
        "cpu": cpu_table,
        "cpu-bf16": partial(cpu_table, "cpu_bfloat16", "bf16"),
        "cpu-zen3": partial(cpu_table, "cpu_zen3"),
        "gpu": gpu_table,
        "models": models_table,
    }
    for name, make in makers.items():
        pattern = rf"(<!-- {name}-table:begin -->\n).*(<!-- {name}-table:end -->)"
        text = re.sub(pattern, lambda match, make=make: match[1] + make() + match[2], text, flags=re.S)
    return text


def main(argv: list[str] | None = None) -> int:
    """Rewrite the pages; with --from, copy the results of a GPU check first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", type=Path, dest="source", metavar="TAR_OR_FOLDER", help="results of gpu_check.py")
    options = parser.parse_args(argv)
    if options.source:
        take(options.source)
    for page in PAGES:
        (ROOT / page).write_text(updated((ROOT / page).read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
