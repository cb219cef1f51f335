"""What every evaluation leaves behind: results.json with its origin, tables in three formats, unreadable
images named."""

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from crate_fast.env import provenance
from crate_fast.errors import UserError
from crate_fast.train.checkpoint import write_text

__all__ = [
    "csv_table",
    "file_name",
    "latex_table",
    "make_folder",
    "markdown_table",
    "raise_failures",
    "say_written",
    "write_results",
    "write_table",
]


def _cell(value: object, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _columns(rows: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def markdown_table(rows: Sequence[dict], digits: int = 3) -> str:
    """Rows as a Markdown table; columns in order of appearance, a missing value as –.

    >>> print(markdown_table([{"model": "A", "AP": 0.5}, {"model": "B"}]), end="")
    | model | AP |
    | --- | --- |
    | A | 0.500 |
    | B | – |
    """
    columns = _columns(rows)
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(name), digits).replace("|", "\\|") for name in columns] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def csv_table(rows: Sequence[dict]) -> str:
    """Rows as CSV, numbers in full; a missing value is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def latex_table(rows: Sequence[dict], digits: int = 3) -> str:
    """Rows as a LaTeX `tabular` for the booktabs package."""
    special = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "–": "--", "−": "$-$", "…": r"\dots"}
    special |= {
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
    }

    def escape(text: str) -> str:
        return "".join(special.get(letter, letter) for letter in text)

    columns = _columns(rows)
    lines = [" & ".join(escape(_cell(row.get(name), digits)) for name in columns) + r" \\" for row in rows]
    head = " & ".join(escape(name) for name in columns) + r" \\"
    body = "\n".join(lines)
    return (
        f"\\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}\n\\toprule\n{head}\n\\midrule\n{body}\n\\bottomrule\n"
        "\\end{tabular}\n"
    )


def make_folder(folder: Path) -> Path:
    """Return a folder to write into, made if it is not there.

    Raises:
        UserError: It cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: no such folder can be made ({error.strerror}); name another") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--output {folder}: nothing can be written there; name another folder")
    return folder


def file_name(label: str) -> str:
    """A model's label as part of a path: CRATE-S/8 → CRATE-S_8."""
    return re.sub(r"[^\w.@-]+", "_", label)


def raise_failures(failures: Sequence[str], folder: Path | None = None) -> None:
    """End a command some of whose models could not be scored; does nothing if all were.

    Args:
        failures: One line a model.
        folder: Where the results of the others are; None if there are none.

    Raises:
        UserError: There is a failure.
    """
    if failures:
        others = "" if folder is None else f"; the other models' results are in {folder}"
        raise UserError("; ".join(failures) + others)


def say_written(paths: Sequence[Path], problems: Sequence[str]) -> None:
    """The last lines of every command: how many images could not be read, and which files there are."""
    print(f"unreadable images: {len(problems)}\nwritten:", *map(str, paths), sep="\n  ")


def _write(path: Path, text: str) -> None:
    """Write a file; where that fails, print what it was to hold, for it may have taken hours."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        print(text)
        raise UserError(
            f"{path} cannot be written ({error.strerror}), and its content is printed instead: free some space, or "
            "see to its permissions"
        ) from error


def write_table(folder: Path, name: str, rows: Sequence[dict], digits: int = 3) -> str:
    """Write `name`.md, `name`.csv and `name`.tex into a folder; returns the Markdown."""
    text = markdown_table(rows, digits)
    _write(folder / f"{name}.md", text)
    _write(folder / f"{name}.csv", csv_table(rows))
    _write(folder / f"{name}.tex", latex_table(rows, digits))
    return text


def write_results(folder: Path, protocol: str, config: dict, results: dict, problems: Sequence[str] = ()) -> Path:
    """Write results.json: what was asked, what came out, where it comes from, which images could not be read.

    Args:
        folder: Made if it is not there.
        protocol: Such as "maskcut".
        config: Every setting that decides the result.
        results: Plain values.
        problems: One line an unreadable image.

    Returns:
        The file.
    """
    content = {
        "protocol": protocol,
        "config": config,
        "results": results,
        "unreadable": {"count": len(problems), "images": list(problems)},
        "provenance": provenance(),
    }
    path = folder / "results.json"
    _write(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path
