"""Put the measured tables into README.md and docs/, between their markers: `python benchmarks/update_readme.py`.

python benchmarks/update_readme.py --from FOLDER      # after a GPU check: copy its results first
"""

import argparse
import json
import re
import statistics
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

from harness import RESULTS, markdown_table, write_results

from gpu_report import facts_of, summary, times

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/evaluation.md", "docs/training.md", "docs/results/gpu.md")  # which have tables
NOT_MEASURED = "Not yet measured: no GPU run has been committed.\n"
BOTH = "forward + backward"
OURS, GRAPHED, COMPILED = "ours", "ours, CUDA graph", "ours, compiled"


def cpu_table() -> str:
    """Make the table of speed and memory against the released form, from cpu.json."""
    content = json.loads((RESULTS / "cpu.json").read_text())
    by_key = {(row["model"], row["what"], row["peer"]): row for row in content["rows"]}
    rows = []
    for model, what in dict.fromkeys((row["model"], row["what"]) for row in content["rows"]):
        released, plain, ours = (by_key[model, what, peer] for peer in ("released", "ours, oneDNN off", "ours"))
        rows.append(
            {
                "CPU, fp32": f"{model}, {what}, batch {ours['batch']}",
                "released, ms": released["latency_ms"],
                "ours, ms": ours["latency_ms"],
                "ours": f"**{ours['speed']:.2f}×**",
                "without oneDNN": f"{plain['speed']:.2f}×",
                "released, peak MiB": released["peak_mib"],
                "ours, peak MiB": ours["peak_mib"],
            }
        )
    note = (
        f"{content['device']}, torch {content['torch']}, commit {content['commit']}; same weights, outputs and "
        "gradients compared first."
    )
    return f"{markdown_table(rows, list(rows[0]))}\n{note}\n"


def _by_problem(rows: list[dict]) -> dict[str, dict[tuple[str, str], dict]]:
    """Group rows by problem, then by (pass, peer)."""
    found: dict[str, dict[tuple[str, str], dict]] = {}
    for row in rows:
        found.setdefault(row["problem"], {})[row["pass"], row["peer"]] = row
    return found


def _cell(row: dict | None, show: Callable[[dict], object]) -> object:
    """Show a measured row; "**red**" where ours was wrong or failed, "n/a" where nothing was measured."""
    if row is None or row["latency_ms"] is None:
        return "**red**" if row is not None and row.get("red") else "n/a"
    return show(row)


def _latency(row: dict | None) -> object:
    return _cell(row, lambda found: found["latency_ms"])


def _than(row: dict | None, peer: dict | None) -> object:
    """Show how many times as fast a row is as a peer's."""
    ours_ms = None if row is None else row["latency_ms"]
    return _cell(row if ours_ms is None else peer, lambda found: f"{found['latency_ms'] / ours_ms:.2f}×")


def _attention_rows(rows: list[dict]) -> list[dict]:
    shown = []
    for name, found in _by_problem(rows).items():
        forward, both = found.get(("forward", OURS)), found.get((BOTH, OURS))
        peers = [row for (what, peer), row in found.items() if what == BOTH and not peer.startswith(OURS)]
        ran = [row for row in peers if row["latency_ms"] is not None]
        fastest = min(ran, key=lambda row: row["latency_ms"], default=None)
        size = next(iter(found.values()))
        sizes = "×".join(str(size[key]) for key in ("batch", "n_tokens", "heads", "head_dim"))
        shown.append(
            {
                f"subspace attention, {size['dtype']}": f"{name}, {sizes}",
                "forward, ms": _latency(forward),
                "TFLOP/s": _cell(forward, lambda row: row["tflops_per_s"]),
                "forward + backward, ms": _latency(both),
                "of the floor": _cell(both, lambda row: f"{row['of_floor']:.0%}"),
                "blocks of rows, ms": _latency(found.get((BOTH, "ours, blocks of rows"))),
                "fastest peer": _cell(fastest, lambda row: f"{row['peer']}, {row['latency_ms']:.3g} ms"),
                "ours": f"**{str(_than(both, fastest)).strip('*')}**",
                "eager": _than(both, found.get((BOTH, "eager, as released"))),
            }
        )
    return shown


def _ista_rows(rows: list[dict]) -> list[dict]:
    shown = []
    for name, found in _by_problem(rows).items():
        both, size = found.get((BOTH, OURS)), next(iter(found.values()))
        peers = ("three products, compiled", "one product, compiled", "one product, cuBLAS")
        shown.append(
            {
                f"ISTA, {size['dtype']}": f"{name}, {size['rows']:,}×{size['width']}",
                "forward + backward, ms": _latency(both),
                "of the matrix rate": _cell(
                    both, lambda row: f"{row['tflops_per_s'] / row['matrix_tflops_per_s']:.0%}"
                ),
                **{peer: _than(both, found.get((BOTH, peer))) for peer in peers},
                "as released": _than(both, found.get((BOTH, "three products, as released"))),
            }
        )
    return shown


def _model_rows(rows: list[dict]) -> list[dict]:
    """Make a row for each pass of each CRATE: the fastest of ours, and its factor over each peer."""
    shown = []
    for found in _by_problem(rows).values():
        by_peer = {peer: row for (_, peer), row in found.items()}
        size, released = next(iter(by_peer.values())), by_peer.get("released")
        ours = [row for peer, row in by_peer.items() if peer in (OURS, GRAPHED, COMPILED)]
        ran = [row for row in ours if row["latency_ms"] is not None]
        best = min(ran, key=lambda row: row["latency_ms"]) if ran else next(iter(ours), None)
        red = [row["peer"] for row in ours if row.get("red")]
        shown.append(
            {
                f"CRATE, {size['dtype']}": f"{size['model']}, {size['pass']}, batch {size['batch']}",
                "images/s": _cell(best, lambda row: row["images_per_s"]),
                "by": _cell(best, lambda row: row["peer"]),
                "red": ", ".join(f"**{peer}**" for peer in red),
                "MFU": _cell(best, lambda row: f"{row['mfu']:.0%}"),
                "released": _than(best, released),
                **{peer: _than(best, by_peer.get(peer)) for peer in ("released, compiled", "ViT (timm), compiled")},
                "peak MiB": _cell(by_peer.get(OURS), lambda row: row.get("peak_mib") or "n/a"),
                "released, peak MiB": _cell(released, lambda row: row.get("peak_mib") or "n/a"),
            }
        )
    return [
        row if any(other["red"] for other in shown) else {k: v for k, v in row.items() if k != "red"} for row in shown
    ]


def _growth_rows(rows: list[dict]) -> list[dict]:
    shown = []
    for found in _by_problem(rows).values():
        by_peer = {peer: row for (_, peer), row in found.items()}
        size = next(iter(by_peer.values()))
        shown.append(
            {
                "CRATE-B, one image": f"{size['n_tokens']:,} tokens, {size['pass']}",
                **{f"{peer}, ms": _latency(by_peer.get(peer)) for peer in ("released", OURS, GRAPHED)},
                **{
                    f"{peer}, peak MiB": _cell(by_peer.get(peer), lambda row: row.get("peak_mib") or "n/a")
                    for peer in ("released", OURS)
                },
            }
        )
    return shown


GPU_TABLES = {  # by file: how its rows are shown, and what they mean
    "mssa": (_attention_rows, "B×N×H×D; ours against the fastest peer that ran, forward + backward."),
    "ista": (_ista_rows, "Rows × width, folding G in every call; how many times faster ours is than each peer."),
    "crate_gpu": (
        _model_rows,
        "How many times as fast as each peer; MFU: nominal FLOPs of the matrix rate measured in the run.",
    ),
    "growth_gpu": (_growth_rows, "Growth with N."),
}


def _run_note(content: dict) -> str:
    return (
        f"{content['device']}, driver {content['driver']}, torch {content['torch']}, triton {content['triton']}, "
        f"ptxas {content['ptxas']}, commit {content['commit']}; in the same run a matrix product reached "
        f"{content['matrix_tflops_per_s']:.0f} TFLOP/s and a copy {content['copy_gb_per_s']:,.0f} GB/s."
    )


def _gpu_tables(results: Path, names: tuple[str, ...]) -> list[str]:
    parts = []
    for name in names:
        path, (rows_of, meaning) = results / f"{name}.json", GPU_TABLES[name]
        if path.exists() and (rows := rows_of((content := json.loads(path.read_text()))["rows"])):
            where = f" Every pass and peer, and why one is n/a or red: [{name}.md](benchmarks/results/{name}.md)."
            parts.append(f"{markdown_table(rows, list(rows[0]))}\n{meaning} {_run_note(content)}{where}\n")
    return parts


def gpu_table(results: Path = RESULTS) -> str:
    """Make the tables of a GPU check, subspace attention and ISTA; a sentence where there are no results."""
    return "\n".join(_checks(results) + _gpu_tables(results, ("mssa", "ista"))) or NOT_MEASURED


def models_table(results: Path = RESULTS) -> str:
    """Make the tables of whole models on a GPU; a sentence where there are no results."""
    return "\n".join(_gpu_tables(results, ("crate_gpu", "growth_gpu"))) or NOT_MEASURED


# --- what a GPU check has brought back ----------------------------------------------------------------------------


def _checks(results: Path) -> list[str]:
    """Count the probes and GPU tests that passed, and name the others, from gpu_check.json."""
    path = results / "gpu_check.json"
    if not path.exists():
        return []
    rows, lines = json.loads(path.read_text())["rows"], []
    for stage, what in (("probes", "kernel probes are right"), ("tests", "GPU tests pass")):
        ran = [row for row in rows if row["stage"] == stage and row["status"] != "n/a"]
        red = [row["item"] for row in ran if row["status"] == "red"]
        if ran:
            named = ": **red**: " + ", ".join(f"`{item.rpartition('::')[2]}`" for item in red[:10]) if red else ""
            lines.append(f"{len(ran) - len(red)} of {len(ran)} {what}{named}{', …' if len(red) > 10 else ''}.")
    page = "[gpu_check.md](benchmarks/results/gpu_check.md)"
    return ["\n".join([*lines, f"All red rows, and the tiles: {page}."]) + "\n"] if lines else []


def take(source: Path, results: Path = RESULTS) -> None:
    """Copy the rows of a GPU check into the results.

    Measured rows go to the file of their benchmark, in place of those of the same problem, pass and peer; the other
    rows, without output, to gpu_check.json, in place of those of the same stages.

    Args:
        source: A gpu_check_….tar.gz, or a folder with some.
        results: The folder of results.
    """
    import bench_model

    archives = sorted(source.glob("gpu_check_*.tar.gz")) if source.is_dir() else [source]
    if not archives:
        raise SystemExit(f"{source} holds no gpu_check_*.tar.gz")
    rows = []
    for archive in archives:
        with tarfile.open(archive) as tar:
            rows += [json.loads(line) for line in tar.extractfile("rows.jsonl").read().decode().splitlines()]
    names = {"mssa": "mssa", "ista": "ista", "crate": "crate_gpu", "model": "model_gpu", "growth": "growth_gpu"}
    facts = facts_of(rows)
    for bench, name in names.items():
        measured = [row["row"] for row in rows if row.get("bench") == bench]
        if measured:
            merged = _merged(results / f"{name}.json", measured, ("problem", "pass", "peer"))
            table = times(merged) if bench in ("mssa", "ista") else bench_model.table(merged)
            write_results(name, merged, table, results, _facts(measured[0]))
    kept = [{key: value for key, value in row.items() if key != "row"} for row in rows if "bench" not in row]
    for row in kept:
        row["reason"] = row["reason"] and str(row["reason"])[:300]
    stages = {row["stage"] for row in kept}
    old = [row for row in _rows(results / "gpu_check.json") if row["stage"] not in stages]
    write_results("gpu_check", old + kept, summary(old + kept, "all"), results, _facts(facts))


def _facts(row: dict) -> dict:
    keys = ("commit", "torch", "device", "driver", "triton", "ptxas", "matrix_tflops_per_s", "copy_gb_per_s")
    return {key: row[key] for key in keys if key in row}


def _rows(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"] if path.exists() else []


def _merged(path: Path, measured: list[dict], keys: tuple[str, ...]) -> list[dict]:
    """Replace a file's rows by those of the same keys; of several alike the first that was measured counts."""
    found: dict[tuple, dict] = {}
    for row in measured:
        key = tuple(row[name] for name in keys)
        if key not in found or (found[key]["latency_ms"] is None and row["latency_ms"] is not None):
            found[key] = row
    old = [row for row in _rows(path) if tuple(row[name] for name in keys) not in found]
    return old + list(found.values())


def maskcut_table() -> str:
    """Make the table of MaskCut against SciPy's eigensolvers, from maskcut.json."""
    content = json.loads((RESULTS / "maskcut.json").read_text())
    images = [row for row in content["rows"] if row["kind"] == "image"]
    growth = [row for row in content["rows"] if row["kind"] == "growth"]

    def median(name: str) -> float:
        return statistics.median(row[name] for row in images)

    rows = [{"MaskCut, 480 px, patch 8": what} for what in ("one eigenvector", "an image's masks, up to three")]
    for column, form, *fields in (
        ("dense, s", None, "dense s", "image, dense s"),
        ("eigsh, s", None, "eigsh s", "image, eigsh s"),
        ("ours, s", None, "eigenproblem, ours s", "image, ours s"),
        ("ours", "**{:.0f}×**", "ratio", "image ratio"),
        ("ours to eigsh", "**{:.1f}×**", "eigsh ratio", "image eigsh ratio"),
    ):
        for row, field in zip(rows, fields, strict=True):
            if field in images[0]:  # results measured without eigsh have no such field
                row[column] = form.format(median(field)) if form else median(field)
    eigsh = '; eigsh: `scipy.sparse.linalg.eigsh(D^-½AD^-½, 2, which="LA")`' if "eigsh s" in images[0] else ""
    largest = [row for row in growth if row["graph"] == "connected"][-1]
    note = (
        f"Medians over {len(images)} images; the same features, masks compared first; dense: "
        f"`scipy.linalg.eigh(D − A, D, subset_by_index=[1, 2])`{eigsh}. {content['device']}, "
        f"torch {content['torch']}, commit {content['commit']}. At {largest['image at patch 8, px']} px "
        f"({largest['patches']:,} patches) ours takes {largest['ours s']:.1f} s and "
        f"{largest['ours peak MiB']:,.0f} MiB; "
        "[more](../benchmarks/results/maskcut.md)."
    )
    return f"{markdown_table(rows, list(rows[0]))}\n{note}\n"


def data_table() -> str:
    """Make the table of the cost of loading an image, from data.json."""
    content = json.loads((RESULTS / "data.json").read_text())
    by_name = {row["what"]: row for row in content["rows"]}
    goal = content["goal_images_per_s"]
    shown = (
        ("decode", "decode"),
        ("random crop and resize", "random crop, resize to 224"),
        ("augment: rand-m9-n2-mstd0.5", "augment: rand-m9-n2-mstd0.5"),
        ("augment: randaugment-n2-m14", "augment: randaugment-n2-m14"),
        ("folder", "**whole batches**: folder"),
        ("tar", "tar"),
        ("hf", "hf"),
        ("shards", "shards"),
        ("shards, randaugment-n2-m14", "shards, randaugment-n2-m14"),
        ("shards, shorter side 256 px", "shards of 256 px"),
        ("shards, shorter side 256 px, randaugment-n2-m14", "shards of 256 px, randaugment-n2-m14"),
    )
    rows = [
        {
            f"{content['images']}, {content['mean_kb']:.0f} KB": label,
            "µs an image": by_name[name]["us"],
            "images/s a core": by_name[name]["images_per_s"],
            f"cores for {goal:,} images/s": f"{goal / by_name[name]['images_per_s']:.0f}",
        }
        for name, label in shown
        if name in by_name
    ]
    note = (
        f"CPU time, medians; {content['device']}, PIL {content['pil']}, commit {content['commit']}; reading and "
        "evaluation: [data.md](../benchmarks/results/data.md)."
    )
    return f"{markdown_table(rows, list(rows[0]))}\n{note}\n"


def updated(text: str) -> str:
    """Return a page with its tables made anew."""
    makers = {
        "cpu": cpu_table,
        "gpu": gpu_table,
        "models": models_table,
        "maskcut": maskcut_table,
        "data": data_table,
    }
    for name, make in makers.items():
        pattern = rf"(<!-- {name}-table:begin -->\n).*(<!-- {name}-table:end -->)"
        text = re.sub(pattern, lambda match, make=make: match[1] + make() + match[2], text, flags=re.S)
    return text


def main(argv: list[str] | None = None) -> int:
    """Rewrite the pages, with the results of a GPU check if there are some, or print a folder's GPU tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", type=Path, dest="source", metavar="TAR_OR_FOLDER", help="of gpu_check.py")
    parser.add_argument("--show", type=Path, metavar="FOLDER", help="print its GPU tables; leave the pages alone")
    options = parser.parse_args(argv)
    if options.source:
        take(options.source)
    if options.show:
        print("\n".join(make(options.show) for make in (gpu_table, models_table)))
    else:
        for page in PAGES:
            (ROOT / page).write_text(updated((ROOT / page).read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
