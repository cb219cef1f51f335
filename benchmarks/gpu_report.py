"""What the rows of a GPU check say: the tiles that were best, and a page to read. Only the standard library."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

__all__ = ["facts_of", "found_tiles", "read_rows", "summary", "times", "why_missing"]

WORTH = 0.98  # of the present tile's time: what is not faster than that stays as it is
SHOWN = 40  # red rows of a summary


def read_rows(path: Path) -> list[dict]:
    """Lines of JSON, without one that was cut short; none where there is no file."""
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
    """What the run knew of card, versions, commit and ceilings."""
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
        found.append(dict(zip(_KEY, key, strict=True)) | {"tile": tile})
    return found


_KEY = ("kernel", "architecture", "precision", "block_d")


def _best(rows: Iterable[dict]) -> dict[tuple, tuple[dict, float | None]]:
    """By key, the row of the best tile and the milliseconds of PyTorch's own way."""
    timed: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["status"] == "ok" and row.get("latency_ms") is not None and "kernel" in row:
            timed.setdefault(tuple(row[name] for name in _KEY), []).append(row)
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
    """For a kernel of whole heads: shape → its milliseconds and those of blocks of rows, at the shapes of both."""
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
    """Lines of a table under its title; none where it has no rows."""
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
    """What a check found, as Markdown: where, how many rows of each stage, what is red, and the numbers."""
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
    """A benchmark's rows as a Markdown table, and under it why some have no times."""
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
    """A line for each peer that did not run, or was wrong."""
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
