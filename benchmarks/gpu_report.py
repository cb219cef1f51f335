"""The results of a GPU check: rows, the best tiles, a page to read, the archive. Only the standard library."""

import json
import math
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

WORTH = 0.98  # of the present tile's time: a tile must be faster than that to replace it
SHOWN = 40  # red rows in a summary
MOST_BYTES = 15 * 2**20  # size of a file that is brought back
MOST_EVIDENCE_BYTES = 40 * 2**20  # PTX and SASS before compression
FACTS = (  # repeated in every row of the archive
    *("device", "driver", "commit", "torch", "triton", "ptxas", "assembler", "matrix_tflops_per_s", "copy_gb_per_s"),
)
TILE_KEY = ("kernel", "architecture", "precision", "block_d")


def read_rows(path: Path) -> list[dict]:
    """Read lines of JSON, without one that was cut short; none where there is no file."""
    rows = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            rows += [row] if isinstance(row, dict) else []
    return rows


def facts_of(rows: Iterable[dict]) -> dict[str, object]:
    """Merge the facts that rows carry: card, versions, commit, ceilings, tools."""
    facts: dict[str, object] = {}
    for row in rows:
        facts |= row.get("facts") or {}
    return facts


def found_tiles(rows: Iterable[dict]) -> list[dict]:
    """Return the best measured tiles as `CRATE_FAST_TILES` takes them; the present one unless 2 % are gained.

    A kernel of whole heads that loses to blocks of rows gets null, so that blocks of rows run.
    """
    best, found = _best(rows), []
    for key, (row, alternative_ms) in best.items():
        tile = dict(row["tile"])
        if alternative_ms is not None:
            tile["chosen"] = row["latency_ms"] < alternative_ms
        times = _beside_blocks_of_rows(best, key)
        if times and math.prod(rows_ms / whole_ms for whole_ms, rows_ms in times.values()) < 1:
            tile = None
        found.append(dict(zip(TILE_KEY, key, strict=True)) | {"tile": tile})
    return found


def _best(rows: Iterable[dict]) -> dict[tuple, tuple[dict, float | None]]:
    """Find by key the row of the best tile, and the milliseconds of PyTorch's own way."""
    timed: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["status"] == "ok" and row.get("latency_ms") is not None and "kernel" in row:
            timed.setdefault(tuple(row[name] for name in TILE_KEY), []).append(row)
    best = {}
    for key, candidates in timed.items():
        quickest = min(candidates, key=lambda row: row["latency_ms"])
        present = next((row for row in candidates if row["present"]), None)
        keep = present is not None and quickest["latency_ms"] > WORTH * present["latency_ms"]
        others = [list(row["alternative"].values()) for row in candidates if row.get("alternative")]
        alternative_ms = math.prod(others[0]) ** (1 / len(others[0])) if others else None
        best[key] = (present if keep else quickest, alternative_ms)
    return best


def _beside_blocks_of_rows(best: dict[tuple, tuple], key: tuple) -> dict[str, tuple[float, float]]:
    """Pair the milliseconds of a whole-head kernel with those of blocks of rows, by the shapes of both."""
    kernel, *rest = key
    by_rows = best.get((kernel.replace("whole_head", "attention"), *rest))
    if not kernel.startswith("whole_head") or by_rows is None:
        return {}
    whole, rows = best[key][0]["shapes"], by_rows[0]["shapes"]
    return {shape: (whole[shape], rows[shape]) for shape in whole.keys() & rows.keys()}


def _whole_heads(rows: Iterable[dict]) -> list[str]:
    best, lines = _best(rows), []
    for key in best:
        for shape, (whole_ms, rows_ms) in _beside_blocks_of_rows(best, key).items():
            text = f"* {key[0]} at {shape}: {_number(whole_ms)} ms, by blocks of rows {_number(rows_ms)} ms"
            lines.append(f"{text}: {rows_ms / whole_ms:.2f}×")
    return [*lines, ""] if lines else []


# --- a page -------------------------------------------------------------------------------------------------------


def _table(title: str, columns: list[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Format the lines of a table under its title; none where it has no rows."""
    lines = [columns, ["---"] * len(columns), *rows]
    if len(lines) == 2:
        return []
    body = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]
    return [*([title, ""] if title else []), *body, ""]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _line(text: object) -> str:
    return " ".join(str(text).split())[:300]


def summary(rows: list[dict], part: str) -> str:
    """Sum up a check as Markdown: facts, rows of each stage, red rows, times, tiles, profile."""
    facts = facts_of(rows)
    keys = ("device", "driver", "commit", "torch", "triton", "ptxas", "numpy", "matrix_tflops_per_s", "copy_gb_per_s")
    lines = [f"# GPU check, {part}", "", ", ".join(f"{key} {facts[key]}" for key in keys if key in facts), ""]
    stages = dict.fromkeys(row["stage"] for row in rows)
    counts = {stage: Counter(row["status"] for row in rows if row["stage"] == stage) for stage in stages}
    ends = {stage: max(row.get("at_s", 0) for row in rows if row["stage"] == stage) for stage in stages}
    words = ("ok", "red", "n/a")
    lines += _table(
        "",
        ["stage", *words, "until, s"],
        [[stage, *(counts[stage][word] for word in words), ends[stage]] for stage in stages],
    )
    red = [row for row in rows if row["status"] == "red"]
    if red:
        lines += [f"## Red: {len(red)}", ""]
        lines += [f"* {row['stage']}, {row['item']}: {_line(row['reason'])}" for row in red[:SHOWN]]
        lines += [""]
    measured = [row["row"] for row in rows if "row" in row]
    lines += ["## Times", "", times(measured)] if measured else []
    return "\n".join(lines + _tiles(rows) + _profile(rows)) + "\n"


def times(rows: list[dict]) -> str:
    """Format a benchmark's rows as a Markdown table, and under it why some have no times."""
    unit, scale = ("GFLOP/s", 1000) if all(row.get("driver") == "none" for row in rows) else ("TFLOP/s", 1)
    columns = ["problem", "pass", "peer", "ms", "20–80 %", unit, "floor, ms", "of floor", "ours"]
    shown = []
    for row in rows:
        line = [row["problem"], row["pass"], row["peer"]]
        if row["latency_ms"] is None:
            line += ["**red**" if row.get("red") else "n/a", "", "", _number(row["floor_ms"]), "", "", "", ""]
        else:
            line += [_number(row["latency_ms"]), f"{_number(row['low_ms'])}–{_number(row['high_ms'])}"]
            line += [_number(scale * row["tflops_per_s"]), _number(row["floor_ms"]), f"{row['of_floor']:.0%}"]
            line += ["" if row["ours_faster"] is None else f"{row['ours_faster']:.2f}×"]
            line += [_number(row["first_call_s"]), _number(row["peak_mib"])]
        shown.append(line)
    return "\n".join(_table("", [*columns, "first call, s", "peak MiB"], shown)) + why_missing(rows)


def why_missing(rows: list[dict]) -> str:
    """Format a line for each peer that did not run, or was wrong."""
    reasons = dict.fromkeys(
        f"* {'**red**' if row.get('red') else 'n/a'}: {row['problem']}, {row['peer']}: {row['reason']}"
        for row in rows
        if row["reason"] is not None
    )
    return "\n".join(["", *reasons, ""]) if reasons else ""


def _tiles(rows: list[dict]) -> list[str]:
    timed = [row for row in rows if row.get("latency_ms") is not None and "kernel" in row]
    shown = []
    for kernel in dict.fromkeys(row["kernel"] for row in timed):
        ranked = sorted((row for row in timed if row["kernel"] == kernel), key=lambda row: row["latency_ms"])
        for rank, row in enumerate(ranked):
            if rank < 3 or row["present"]:
                shown.append([row["item"], _number(row["latency_ms"]), "in the table" if row["present"] else ""])
    table = _table("## Tiles: the best three of each kernel, and the table's", ["tile", "ms", ""], shown)
    return table + _whole_heads(rows)


def _profile(rows: list[dict]) -> list[str]:
    found = next((row for row in rows if row.get("item") == "profile" and "kernels" in row), None)
    if found is None:
        return []
    gaps = ", ".join(map(str, found["gaps_us"][:5]))
    busy, span = (f"{found[key]:,.0f}" for key in ("busy_us", "span_us"))
    title = f"## One training step: {busy} of {span} µs busy, {found['launches']} launches; largest gaps {gaps} µs"
    return _table(
        title, ["kernel", "calls", "µs"], [[k["kernel"], k["calls"], k["us"]] for k in found["kernels"][:15]]
    )


# --- the archive --------------------------------------------------------------------------------------------------


def pack(rows: list[dict], part: str, folder: Path, output: Path, evidence: bool) -> str:
    """Write the summary and the archive; return the summary.

    Args:
        rows: All rows.
        part: Part of the check.
        folder: Folder with the part's logs, junit.xml and failures.
        output: Folder of what is brought back.
        evidence: Also PTX and SASS of failures, as many as fit.
    """
    facts = {key: value for key, value in facts_of(rows).items() if key in FACTS}
    page = summary(rows, part)
    (output / f"summary_{part}.md").write_text(page)
    whole, failures = folder / "all_rows.jsonl", folder / "failures"
    whole.write_text("".join(json.dumps(facts | row, ensure_ascii=False) + "\n" for row in rows))
    archive = output / f"gpu_check_{part}.tar.gz"
    for space in (MOST_EVIDENCE_BYTES, MOST_EVIDENCE_BYTES // 8, 0) if evidence else (0,):
        with tarfile.open(archive, "w:gz", compresslevel=6) as tar:
            tar.add(whole, "rows.jsonl")
            for path in sorted(folder.glob("junit*.xml")):
                tar.add(path, path.name)
            for log in sorted((folder / "logs").glob("*.log")):
                _shorten(log)
                tar.add(log, f"logs/{log.name}")
            for path in sorted(failures.rglob("*")):
                if path.suffix in (".ptx", ".ttgir", ".sass", ".cubin") and path.stat().st_size < space:
                    space -= path.stat().st_size
                    tar.add(path, f"failures/{path.relative_to(failures)}")
        if archive.stat().st_size < MOST_BYTES:
            break
    return page


def _shorten(log: Path, most: int = 200_000) -> None:
    """Keep both ends of a long log."""
    if log.stat().st_size > most:
        text = log.read_bytes()
        log.write_bytes(text[: most // 4] + b"\n[...]\n" + text[-most // 2 :])
