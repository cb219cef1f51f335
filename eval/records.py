"""One line an image (or a checkpoint), kept as it is made: an evaluation can be stopped, killed, and continued."""

import json
from collections.abc import Iterable
from pathlib import Path

from crate_fast.errors import UserError
from crate_fast.eval.results import make_folder
from crate_fast.train.checkpoint import write_text

__all__ = ["Records"]


class Records:
    """The records of an evaluation in a folder.

        settings.json         what decides a record; another setting may not be mixed in
        records-RANK.jsonl    one record a line, appended and flushed by the process of that rank

    A process killed while it writes leaves half a line, which is not read, and its image is done again.

    Args:
        folder: Made if it is not there.
        settings: What decides a record.
        rank: Of this process; the first writes settings.json, and must have made this object before others make
            theirs.
        key: What a record is of, and is called in it.

    Raises:
        UserError: The folder holds records made with other settings, or cannot be written.
    """

    def __init__(self, folder: Path, settings: dict, rank: int = 0, key: str = "image_id"):
        self.folder, self.rank, self.key = folder, rank, key
        make_folder(folder)
        path = folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        if path.is_file() and self.read():
            before = json.loads(path.read_text())
            differing = sorted(k for k in before.keys() | settings.keys() if before.get(k) != settings.get(k))
            if differing:
                told = "; ".join(
                    f"{name}: {before.get(name)!r} there, {settings.get(name)!r} now" for name in differing
                )
                raise UserError(
                    f"{folder} holds records of other settings ({told}): give another --output, or remove it"
                )
        elif rank == 0:
            write_text(path, json.dumps(settings, indent=2) + "\n")

    def read(self) -> dict[str | int, dict]:
        """Key → its record, over all processes; of two records with one key either, since they are equal."""
        records = {}
        for path in sorted(self.folder.glob("records-*.jsonl")):
            with path.open() as file:
                for line in file:
                    if line.endswith("\n"):
                        record = json.loads(line)
                        records[record[self.key]] = record
        return records

    def append(self, records: Iterable[dict]) -> None:
        """Write records as they come; each is on disk, in the operating system's eyes, before the next is made."""
        path = self.folder / f"records-{self.rank}.jsonl"
        _cut_half_line(path)
        with path.open("a") as file:
            for record in records:
                file.write(json.dumps(record) + "\n")
                file.flush()


def _cut_half_line(path: Path) -> None:
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
