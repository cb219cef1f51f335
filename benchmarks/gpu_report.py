"""The results of a GPU check: rows, best tiles, summary, archive. Uses only the standard library."""

import json
import os
import tarfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

NO_GPU = "PyTorch finds no GPU"
WORTH = 0.98  # a tile must take less than this share of the present tile's time to replace it
SHOWN = 40  # most red rows in a summary
MOST_LOG_BYTES = 40_000  # of each log in the archive
MOST_CODE_BYTES = 20_000_000  # of compiled kernels in the archive
FACTS = ("device", "driver", "commit", "torch", "timm", "python", "triton", "ptxas")
FACTS += ("matrix_tflops_per_s", "copy_gb_per_s")
MODELS_CAPTION = (
    "released, ViT: speed relative to the eager released form and to timm's compiled ViT. MFU: nominal "
    "FLOPs, of the matrix rate measured in the run. Peak: above the weights; on a CPU with the optimiser's moments.\n"
)
TILE_KEY = ("kernel", "architecture", "precision", "block_d")


class Rows:
    """The rows of a check: lines of JSON in a file, to which all of its processes append."""

    def __init__(self, path: str, stage: str, started: float):
        self.path, self.stage, self.started = path, stage, started

    @classmethod
    def of_environment(cls) -> "Rows":
        """Return the rows of the process that started this one."""
        return cls(*json.loads(os.environ["GPU_CHECK_ROWS"]))

    def variables(self) -> dict[str, str]:
        """Return the variable for `of_environment`."""
        return {"GPU_CHECK_ROWS": json.dumps([self.path, self.stage, self.started])}

    def add(self, item: str, status: str, reason: str | None = None, **more: object) -> None:
        """Append a row; `status` is "ok", "red" (ours is wrong or fails) or "n/a"."""
        line = {"stage": self.stage, "item": item, "status": status, "reason": reason, **more}
        line["at_s"] = round(time.time() - self.started, 1)
        with open(self.path, "ab", buffering=0) as file:  # in one piece, beside those of others
            file.write(f"{json.dumps(line, ensure_ascii=False, default=str)}\n".encode())

    def fail(self, item: str, error: Exception, red: bool = True, **more: object) -> None:
        """Append an error."""
        from measuring import error_in_a_line

        self.add(item, "red" if red else "n/a", error_in_a_line(error), **more)

    def measured(self, item: str, bench: str, rows: list[dict]) -> None:
        """Append the rows of a benchmark, which become part of its results."""
        for row in rows:
            status = "red" if row.get("red") else "n/a" if row["latency_ms"] is None else "ok"
            self.add(f"{item}: {row['pass']}, {row['peer']}", status, row["reason"], bench=bench, row=row)

    def read(self) -> list[dict]:
        """Return all rows so far, except incomplete ones."""
        rows = []
        for line in Path(self.path).read_text(errors="replace").splitlines():
            with suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows


def kept_of(item: dict) -> dict[str, object]:
    """Return what the row of a tile keeps of its item; nothing for other items."""
    return {key: item[key] for key in (*TILE_KEY, "tile", "present") if key in item}


def facts_of(rows: Iterable[dict]) -> dict[str, object]:
    """Merge the facts of rows: card, versions, commit, ceilings, tools."""
    facts: dict[str, object] = {}
    for row in rows:
        facts |= row.get("facts") or {}
    return facts


def found_tiles(rows: list[dict], items: Iterable[dict], whole_heads: bool = True) -> list[dict]:
    """Return the best tiles in the format of `CRATE_FAST_TILES`; the present tile stays unless 2 % are gained.

    A kernel of whole heads that is slower than blocks of rows, or red, gets None, so that blocks of rows run; without
    `whole_heads` all do. Else blocks of rows run at longer shapes only, and the longest decides on their tile.
    """
    best, found = _best(rows), []
    red = {_key(row) for row in rows if row["status"] == "red" and row.get("present")}

    def by_rows(key: tuple) -> bool:
        if not key[0].startswith("whole_head"):
            return False
        return not whole_heads or (_is_slower(best[key]) if key in best else key in red)

    whole = [key for key in best if key[0].startswith("whole_head") and not by_rows(key)]
    at_long = {(key[0].replace("whole_head", "attention"), *key[1:]) for key in whole}
    best |= _best([row for row in rows if _key(row) in at_long], longest=True)
    for key in dict.fromkeys(map(_key, items)):
        if by_rows(key):
            found.append(dict(zip(TILE_KEY, key, strict=True)) | {"tile": None})
        elif key in best:
            tile = best[key]["tile"] | {"chosen": not _is_slower(best[key])}
            found.append(dict(zip(TILE_KEY, key, strict=True)) | {"tile": tile})
    return found


def _key(row: dict) -> tuple:
    return tuple(row.get(name) for name in TILE_KEY)


def _is_slower(row: dict) -> bool:
    """Return True if the alternative to a kernel is faster than its tile."""
    return row["alternative_ms"] is not None and row["alternative_ms"] < row["latency_ms"]


def _best(rows: Iterable[dict], longest: bool = False) -> dict[tuple, dict]:
    """Return by key the row of the best tile: at the shape B×N×H×D of most tokens, or by the mean of all shapes."""

    def time_of(row: dict) -> float:
        shapes = row["shapes"]
        return shapes[max(shapes, key=lambda shape: int(shape.split("×")[1]))] if longest else row["latency_ms"]

    timed: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["status"] == "ok" and row.get("latency_ms") is not None and "kernel" in row:
            timed.setdefault(_key(row), []).append(row)
    best = {}
    for key, candidates in timed.items():
        quickest = min(candidates, key=time_of)
        present = next((row for row in candidates if row["present"]), None)
        keep = present is not None and time_of(quickest) > WORTH * time_of(present)
        best[key] = present if keep else quickest
    return best


# --- tables and a page --------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Format with three significant digits, or as an integer from 100 on."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def markdown_table(rows: list[dict], columns: Iterable[str] | None = None) -> str:
    """Format rows as a Markdown table; floats as `number`, None as –."""

    def cell(value: object) -> str:
        text = "–" if value is None else number(value) if isinstance(value, float) else str(value)
        return text.replace("|", "\\|")

    columns = list(columns or rows[0])
    lines = [columns, ["---"] * len(columns), *([cell(row[column]) for column in columns] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def times(rows: list[dict]) -> str:
    """Format a benchmark's rows as Markdown: operators, whole models, and reasons for missing times."""
    unit, scale = ("GFLOP/s", 1000) if all(row.get("driver") == "none" for row in rows) else ("TFLOP/s", 1)
    shown: dict[bool, list[dict]] = {False: [], True: []}
    for row in rows:

        def value(key: str, show: Callable[[float], str] = number, row: dict = row) -> str:
            return "" if row.get(key) is None else show(row[key])

        whole, missing = "model" in row, "**red**" if row.get("red") else "n/a"
        factor, share = "{:.2f}×".format, "{:.0%}".format
        line = {"model": row["model"], "batch": row["batch"]} if whole else {"problem": row["problem"]}
        line |= {"pass": row["pass"], "peer": row["peer"]}
        line |= {"images/s": value("images_per_s") or missing} if whole else {}
        line |= {"ms": value("latency_ms") or missing}
        line |= {"20–80 %": f"{value('low_ms')}–{value('high_ms')}".strip("–")}
        if whole:
            line |= {"released": value("of_released", factor), "ViT": value("of_vit", factor)}
            line |= {"floor, ms": value("floor_ms"), "MFU": value("mfu", lambda part: f"{100 * part:.3g} %")}
        else:
            line |= {unit: value("tflops_per_s", lambda rate: number(scale * rate)), "floor, ms": value("floor_ms")}
            line |= {"of floor": value("of_floor", share), "ours": value("ours_faster", factor)}
        shown[whole].append(line | {"first call, s": value("first_call_s"), "peak MiB": value("peak_mib")})
    tables = [
        markdown_table(lines, [column for column in lines[0] if any(line[column] for line in lines)])
        for lines in shown.values()
        if lines
    ]
    return "\n".join([*tables, *([MODELS_CAPTION] if shown[True] else [])]) + _why_missing(rows)


def _why_missing(rows: list[dict]) -> str:
    reasons = dict.fromkeys(
        f"* {'**red**' if row.get('red') else 'n/a'}: {row['problem']}, {row['peer']}: {row['reason']}\n"
        for row in rows
        if row["reason"] is not None
    )
    return "\n" + "".join(reasons) if reasons else ""


def summary(rows: list[dict], part: str) -> str:
    """Summarise a check as Markdown: facts, rows of each stage, red rows, times, tiles, profile."""
    facts = facts_of(rows)
    lines = [f"# GPU check, {part}\n", ", ".join(f"{key} {facts[key]}" for key in FACTS if key in facts) + "\n"]
    stages = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        found = [row for row in rows if row["stage"] == stage]
        counts = {status: sum(row["status"] == status for row in found) for status in ("ok", "red", "n/a")}
        stages.append({"stage": stage, **counts, "until, s": str(max(row.get("at_s", 0) for row in found))})
    lines += [markdown_table(stages)] if stages else []
    red = [f"* {row['stage']}, {row['item']}: {' '.join(str(row['reason']).split())[:300]}\n"
           for row in rows if row["status"] == "red"]  # fmt: skip
    lines += [f"## Red: {len(red)}\n", "".join(red[:SHOWN])] if red else []
    measured = [row["row"] for row in rows if "row" in row]
    lines += ["## Times\n", times(measured)] if measured else []
    return "\n".join(lines + _tiles(rows) + _profile(rows))


def _tiles(rows: list[dict]) -> list[str]:
    timed = sorted((row for row in rows if row.get("latency_ms") is not None and "kernel" in row),
                   key=lambda row: row["latency_ms"])  # fmt: skip
    shown = []
    for kernel in dict.fromkeys(row["kernel"] for row in timed):
        for rank, row in enumerate(row for row in timed if row["kernel"] == kernel):
            if rank < 3 or row["present"]:
                line = {"tile": row["item"], "ms": row["latency_ms"], "alternative, ms": row["alternative_ms"]}
                shown.append(line | {"": "in the table" if row["present"] else ""})
    title = "## Tiles: the best three of each kernel, and the table's\n"
    note = "Alternatives: blocks of rows instead of whole heads, and PyTorch's product for the output map.\n"
    return [title, markdown_table(shown), note] if shown else []


def _profile(rows: list[dict]) -> list[str]:
    return [
        f"## One training step: {row['span_us']:,} µs, with the profiler's own\n\n```\n{row['table']}```\n"
        for row in rows
        if row.get("item") == "profile" and "table" in row
    ]


# --- the archive --------------------------------------------------------------------------------------------------


def pack(rows: list[dict], part: str, folder: Path, output: Path) -> str:
    """Write the summary and the archive of a part's folder into `output`; return the summary."""
    with tarfile.open(output / f"gpu_check_{part}.tar.gz", "w:gz", compresslevel=6) as tar:
        tar.add(folder / "rows.jsonl", "rows.jsonl")
        for log in sorted((folder / "logs").glob("*.log")):
            if log.stat().st_size > MOST_LOG_BYTES:  # keep both ends
                text = log.read_bytes()
                log.write_bytes(text[: MOST_LOG_BYTES // 4] + b"\n[...]\n" + text[-MOST_LOG_BYTES // 2 :])
            tar.add(log, f"logs/{log.name}")
        left = MOST_CODE_BYTES
        for code in sorted((folder / "failures").rglob("*")):  # compilers' caches of red probes
            if code.suffix in (".ptx", ".cubin") and code.stat().st_size <= left:
                tar.add(code, code.relative_to(folder))
                left -= code.stat().st_size
    page = summary(rows, part)
    (output / f"summary_{part}.md").write_text(page)
    return page
