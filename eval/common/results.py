"""Files of an evaluation: tables, settings, and records for resuming."""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from crate_fast.errors import UserError
from crate_fast.train.checkpoint import write_text


def _columns(rows: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def markdown_table(rows: Sequence[dict], digits: int = 3) -> str:
    """Format rows as a Markdown table. Columns are in order of appearance; a missing value becomes –.

    >>> print(markdown_table([{"model": "A", "AP": 0.5}, {"model": "B"}]), end="")
    | model | AP |
    | --- | --- |
    | A | 0.500 |
    | B | – |
    """

    def cell(value: object) -> str:
        text = "–" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|")

    columns = _columns(rows)
    lines = [[cell(row.get(name)) for name in columns] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in [columns, ["---"] * len(columns), *lines])


def csv_table(rows: Sequence[dict]) -> str:
    """Format rows as CSV with unrounded numbers; a missing value becomes empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def make_folder(folder: Path) -> Path:
    """Create an output folder if necessary and return it; raise a `UserError` if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be created ({error.strerror}): name another folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--output {folder} is not writable: name another folder")
    return folder


def file_name(label: str) -> str:
    """Return a model's label as a file name: CRATE-S/8 → CRATE-S_8."""
    return re.sub(r"[^\w.@-]+", "_", label)


def reserve_folder(folder: Path, file: str, settings: dict, option: str = "--output") -> None:
    """Reserve a folder for results of these settings: write them to `file`, or raise a UserError if it has others."""
    make_folder(folder)
    path, settings = folder / file, json.loads(json.dumps(settings))
    if not path.is_file():
        write_text(path, json.dumps(settings, indent=2) + "\n")
        return
    before = json.loads(path.read_text())
    names = sorted(name for name in before.keys() | settings.keys() if before.get(name) != settings.get(name))
    if names:
        found = "; ".join(f"{name}: {before.get(name)!r} there, {settings.get(name)!r} now" for name in names)
        raise UserError(f"{folder} holds results of other settings ({found}): give another {option}, or remove it")


class Records:
    """Records of a resumable evaluation, one line per image or checkpoint.

        settings.json      the settings that the records depend on
        records-0.jsonl    one record per line

    An incomplete line of a killed process is ignored, so its image is processed again. `key` is the name of the field
    that identifies a record.
    """

    def __init__(self, folder: Path, settings: dict, key: str = "image_id"):
        self.path, self.key = folder / "records-0.jsonl", key
        if not self.read():
            (folder / "settings.json").unlink(missing_ok=True)
        reserve_folder(folder, "settings.json", settings)

    def read(self) -> dict[str | int, dict]:
        """Return key → record."""
        text = self.path.read_text() if self.path.is_file() else ""
        records = map(json.loads, text.split("\n")[:-1])
        return {record[self.key]: record for record in records}

    def append(self, records: Iterable[dict]) -> None:
        """Write records as they come; each is flushed to the operating system before the next is computed."""
        if self.path.is_file():
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
        with self.path.open("a") as file:
            for record in records:
                file.write(json.dumps(record) + "\n")
                file.flush()
