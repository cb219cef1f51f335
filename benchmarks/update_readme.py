"""Put the measured tables into README.md, between their markers: `python benchmarks/update_readme.py`."""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

from harness import RESULTS, markdown_table

README = Path(__file__).parent.parent / "README.md"
NOT_MEASURED = "Not yet measured: no GPU run has been committed.\n"
BOTH = "forward + backward"


def cpu_table() -> str:
    """Speed and memory against the released form, from benchmarks/results/cpu.json."""
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
    """Rows by problem, then by (pass, peer)."""
    found: dict[str, dict[tuple[str, str], dict]] = {}
    for row in rows:
        found.setdefault(row["problem"], {})[row["pass"], row["peer"]] = row
    return found


def _faster(row: dict | None) -> str:
    """How many times faster ours is than a peer's row."""
    return "n/a" if row is None or row["latency_ms"] is None else f"{row['ours_faster']:.2f}×"


def _attention_rows(rows: list[dict]) -> list[dict]:
    shown = []
    for name, found in _by_problem(rows).items():
        forward, both = found["forward", "ours"], found[BOTH, "ours"]
        peers = [row for (what, peer), row in found.items() if what == BOTH and peer != "ours"]
        ran = [row for row in peers if row["latency_ms"] is not None]
        fastest = min(ran, key=lambda row: row["latency_ms"], default=None)
        sizes = f"{both['batch']}×{both['n_tokens']}×{both['heads']}×{both['head_dim']}"
        shown.append(
            {
                f"subspace attention, {both['dtype']}": f"{name}, {sizes}",
                "forward, ms": forward["latency_ms"],
                "TFLOP/s": forward["tflops_per_s"],
                "forward + backward, ms": both["latency_ms"],
                "of the floor": f"{both['of_floor']:.0%}",
                "fastest peer": f"{fastest['peer']}, {fastest['latency_ms']:.3g} ms" if fastest else "n/a",
                "ours": f"**{_faster(fastest)}**",
                "eager": _faster(found.get((BOTH, "eager, as released"))),
            }
        )
    return shown


def _ista_rows(rows: list[dict]) -> list[dict]:
    shown = []
    for name, found in _by_problem(rows).items():
        both = found[BOTH, "ours"]
        matrix_ms = both["flops"] / both["matrix_tflops_per_s"] / 1e9
        shown.append(
            {
                f"ISTA, {both['dtype']}": f"{name}, {both['rows']:,}×{both['width']}",
                "forward + backward, ms": both["latency_ms"],
                "of the matrix rate": f"{matrix_ms / both['latency_ms']:.0%}",
                "three products, compiled": _faster(found.get((BOTH, "three products, compiled"))),
                "one product, compiled": _faster(found.get((BOTH, "one product, compiled"))),
                "one product, cuBLAS": _faster(found.get((BOTH, "one product, cuBLAS"))),
                "as released": _faster(found.get((BOTH, "three products, as released"))),
            }
        )
    return shown


def _run_note(content: dict) -> str:
    return (
        f"{content['device']}, driver {content['driver']}, torch {content['torch']}, triton {content['triton']}, "
        f"ptxas {content['ptxas']}, commit {content['commit']}; in the same run a matrix product reached "
        f"{content['matrix_tflops_per_s']:.0f} TFLOP/s and a copy {content['copy_gb_per_s']:,.0f} GB/s."
    )


def gpu_table(results: Path = RESULTS) -> str:
    """Subspace attention and ISTA against their peers, from mssa.json and ista.json; a sentence where neither is."""
    parts = []
    for name, rows_of, meaning in (
        ("mssa", _attention_rows, "B×N×H×D; ours against the fastest peer that ran, forward + backward."),
        ("ista", _ista_rows, "Rows × width, folding G in every call; how many times faster ours is than each peer."),
    ):
        path = results / f"{name}.json"
        if path.exists():
            content = json.loads(path.read_text())
            rows = rows_of(content["rows"])
            where = f" Every pass and peer, and why a peer is n/a: [{name}.md](benchmarks/results/{name}.md)."
            parts.append(f"{markdown_table(rows, list(rows[0]))}\n{meaning} {_run_note(content)}{where}\n")
    return "\n".join(parts) or NOT_MEASURED


def _model_rows(rows: list[dict]) -> list[dict]:
    """A row for each pass of each CRATE: the faster of ours, and what the others are beside it."""
    shown = []
    for found in _by_problem(rows).values():
        by_peer = {peer: row for (_, peer), row in found.items()}
        ours = [by_peer[peer] for peer in ("ours", "ours, compiled") if by_peer[peer]["latency_ms"] is not None]
        released = by_peer["released"]
        if not ours:
            continue
        best = min(ours, key=lambda row: row["latency_ms"])
        shown.append(
            {
                f"CRATE, {best['dtype']}": f"{best['model']}, {best['pass']}, batch {best['batch']}",
                "images/s": best["images_per_s"],
                "by": best["peer"],
                "MFU": f"{best['mfu']:.0%}",
                "released": _than(best, released),
                "released, compiled": _than(best, by_peer["released, compiled"]),
                "ViT, compiled": _than(best, by_peer["ViT (timm), compiled"]),
                "peak MiB": best["peak_mib"],
                "released, peak MiB": released.get("peak_mib") or "n/a",
            }
        )
    return shown


def _than(ours: dict, row: dict) -> str:
    """How many times as fast ours is as another row."""
    return "n/a" if row["latency_ms"] is None else f"{row['latency_ms'] / ours['latency_ms']:.2f}×"


def _growth_rows(rows: list[dict]) -> list[dict]:
    shown = []
    for found in _by_problem(rows).values():
        (_, ours), (_, released) = sorted((peer, row) for (_, peer), row in found.items())
        ran = released["latency_ms"] is not None
        shown.append(
            {
                "CRATE-B, one image": f"{ours['n_tokens']:,} tokens, {ours['pass']}",
                "released, ms": released["latency_ms"] if ran else "n/a",
                "ours, ms": ours["latency_ms"] if ours["latency_ms"] is not None else "n/a",
                "released, peak MiB": released.get("peak_mib") or "n/a",
                "ours, peak MiB": ours.get("peak_mib") or "n/a",
            }
        )
    return shown


def models_table(results: Path = RESULTS) -> str:
    """Whole models on a GPU, from crate_gpu.json and growth_gpu.json; a sentence where neither is."""
    parts = []
    for name, rows_of, meaning in (
        (
            "crate_gpu",
            _model_rows,
            "How many times as fast as each peer; MFU: nominal FLOPs of the matrix rate measured in the run.",
        ),
        ("growth_gpu", _growth_rows, "Growth with N."),
    ):
        path = results / f"{name}.json"
        if path.exists() and (rows := rows_of((content := json.loads(path.read_text()))["rows"])):
            where = f" Every peer, and why one is n/a: [{name}.md](benchmarks/results/{name}.md)."
            parts.append(f"{markdown_table(rows, list(rows[0]))}\n{meaning} {_run_note(content)}{where}\n")
    return "\n".join(parts) or NOT_MEASURED


def maskcut_table() -> str:
    """MaskCut against the dense eigenproblem, from maskcut.json."""
    content = json.loads((RESULTS / "maskcut.json").read_text())
    images = [row for row in content["rows"] if row["kind"] == "image"]
    growth = [row for row in content["rows"] if row["kind"] == "growth"]

    def median(name: str) -> float:
        return statistics.median(row[name] for row in images)

    rows = [
        {
            "MaskCut, 480 px, patch 8": what,
            "dense, s": median(dense),
            "ours, s": median(ours),
            "ours": f"**{median(times):.0f}×**",
        }
        for what, dense, ours, times in (
            ("one eigenvector", "dense s", "eigenproblem, ours s", "ratio"),
            ("an image's masks, up to three", "image, dense s", "image, ours s", "image ratio"),
        )
    ]
    largest = [row for row in growth if row["graph"] == "connected"][-1]
    note = (
        f"Medians over {len(images)} images; the same features, masks compared first; dense: "
        f"`scipy.linalg.eigh(D − A, D, subset_by_index=[1, 2])`. {content['device']}, torch {content['torch']}, "
        f"commit {content['commit']}. At {largest['image at patch 8, px']} px ({largest['patches']:,} patches) ours "
        f"takes {largest['ours s']:.1f} s and {largest['ours peak MiB']:,.0f} MiB; "
        "[more](benchmarks/results/maskcut.md)."
    )
    return f"{markdown_table(rows, list(rows[0]))}\n{note}\n"


def data_table() -> str:
    """What loading an image costs a core, from data.json."""
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
        "evaluation: [data.md](benchmarks/results/data.md)."
    )
    return f"{markdown_table(rows, list(rows[0]))}\n{note}\n"


def updated(text: str) -> str:
    """The README with its tables made anew."""
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
    """Rewrite README.md, or print the GPU tables of a folder of results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--show", type=Path, metavar="FOLDER", help="print its GPU tables; leave README.md alone")
    options = parser.parse_args(argv)
    if options.show:
        print("\n".join(make(options.show) for make in (gpu_table, models_table)))
    else:
        README.write_text(updated(README.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
