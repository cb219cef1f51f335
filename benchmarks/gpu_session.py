"""One call of a GPU check: what its stages share, the processes they start, the rows they find, what comes back."""

import json
import os
import shutil
import sys
import tarfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_report import facts_of, read_rows, summary
from isolation import Job, Process, run_jobs, tail

__all__ = ["CARRIED", "NO_TIME", "ROOT", "TILES", "Check", "Stage", "TimeUp"]

ROOT = Path(__file__).resolve().parent.parent
CARRIED = ROOT / ".gpu"  # ignored by git: what travels to the GPU beside the tree
TILES = "found_tiles.json"
NO_TIME = "no time was left"
PACK_SECONDS = 10.0  # at the end, for what brings it back
MOST_BYTES = 15 * 2**20  # of a file that is brought back
MOST_EVIDENCE_BYTES = 40 * 2**20  # of PTX and SASS before it is compressed


@dataclass(frozen=True)
class Stage:
    """A part of a check.

    Args:
        name: For --stages.
        seconds: Its share of the time: nothing is started after it.
        grace: Seconds more for what runs then.
        run: What it does.
    """

    name: str
    seconds: float
    grace: float
    run: "Callable[[Check], None]"


class TimeUp(BaseException):
    """The time is up, or somebody has asked to stop."""


class Check:
    """One call: what its stages share, and what they have found so far."""

    def __init__(self, options: Namespace):
        self.part, self.rehearse = options.part, options.rehearse
        self.started = time.monotonic()
        self.end = self.started + options.limit - PACK_SECONDS
        self.output = options.output
        self.folder = options.work / options.part
        shutil.rmtree(self.folder, ignore_errors=True)
        self.logs, self.failures = self.folder / "logs", self.folder / "failures"
        for folder in (self.output, self.logs, self.failures):
            folder.mkdir(parents=True, exist_ok=True)
        self.rows_file = self.folder / "rows.jsonl"
        self.stage, self.soft, self.hard = "start", self.end, self.end
        self.commit = options.commit
        self.ptxas = options.ptxas
        self.cores = os.cpu_count() or 2
        self.work: dict[str, list[dict]] = {}  # items by kind, once they are listed
        self.other_assembler: dict[str, str] | None = None
        self.background: list[Process] = []
        self.taken: dict[Path, int] = {}  # lines of workers' files that are in ours
        self.environment = self._environment(options)

    def _environment(self, options: Namespace) -> dict[str, str]:
        """Of every process."""
        kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [kept.get("PYTHONPATH")])]
        cache = options.work / "cache"
        added = {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "4",
            "OMP_NUM_THREADS": "1" if self.rehearse else "2",
            "GPU_CHECK_COMMIT": self.commit,
        }
        if self.rehearse:
            added |= {"TRITON_INTERPRET": "1", "GPU_CHECK_REHEARSE": "1"}
        tiles = options.tiles or next(filter(Path.exists, (CARRIED / TILES, options.work / TILES)), None)
        if self.part == "second" and tiles is not None:
            added["CRATE_FAST_TILES"] = str(tiles.resolve())
        return kept | added

    # --- rows -----------------------------------------------------------------------------------------------------

    def row(self, item: str, status: str, reason: str | None = None, **more: object) -> None:
        """Append a row; `status` is "ok", "red" (ours is wrong or fails) or "n/a"."""
        line = {"stage": self.stage, "item": item, "status": status, "reason": reason, **more}
        line["at_s"] = round(time.monotonic() - self.started, 1)
        with open(self.rows_file, "a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if status == "red":
            print(f"  red: {item}: {str(reason)[:200]}", flush=True)

    def collect(self, path: Path) -> tuple[set[str], str | None]:
        """Take over a worker's new rows: the items that it finished, and the one in hand when it ended."""
        ended, in_hand, lines = set(), None, read_rows(path)
        for number, line in enumerate(lines):
            if "begin" in line:
                in_hand = line["begin"]
            elif "end" in line:
                ended.add(line["end"])
                in_hand = None
            elif number >= self.taken.get(path, 0) and {"item", "status"} <= line.keys():
                self.row(**line)
        self.taken[path] = len(lines)
        return ended, in_hand

    # --- processes ------------------------------------------------------------------------------------------------

    def start(self, job: Job) -> Process:
        """Start a job that ends with its stage at the latest."""
        return Process(job, ROOT, self.logs, self.environment, self.hard)

    def run(self, jobs: Iterable[Job], done: Callable, parallel: int) -> None:
        """Run jobs until the stage's end; a row for each that finds no time."""
        for job in run_jobs(jobs, self.start, done, parallel, self.soft):
            for name in [item["name"] for item in job.items] or [job.name]:
                self.row(name, "n/a", NO_TIME)

    def worker(self, *words: str, name: str, limit_s: float, **options) -> Job:
        """A job of gpu_worker.py, which compares with float64 itself: without the check of first launches."""
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_worker.py"), *words]
        return Job(name, command, limit_s, {"CRATE_FAST_SELF_CHECK": "0"}, **options)

    def items_job(self, items: list[dict], mode: str, stall_s: float, nice: int = 0) -> Job:
        """A worker for these items, one after the other; `nice` lets others go first."""
        number = len(list(self.folder.glob("items_*.json")))
        listed, rows = self.folder / f"items_{number}.json", self.folder / f"rows_{number}.jsonl"
        listed.write_text(json.dumps(items))
        until = time.time() + self.soft - time.monotonic()
        words = ("items", "--mode", mode, "--items", str(listed), "--rows", str(rows), "--until", str(until))
        words += ("--stall", str(stall_s), "--nice", str(nice))
        name = f"{self.stage}_{mode}_{number}"
        return self.worker(*words, name=name, limit_s=1e6, beat=rows, stall_s=stall_s, items=items)

    def work_through(
        self, items: list[dict], mode: str, workers: int, stall_s: float, more: Sequence[Job] = ()
    ) -> None:
        """Have items done by a pool; one that ends its worker is red, and the rest gets a new worker.

        Args:
            items: In the order of their importance.
            mode: What to do with them: "warm" or "time".
            workers: Processes at a time.
            stall_s: Seconds that an item may take.
            more: Other workers to run beside them.
        """
        lists = [part for part in (items[i::workers] for i in range(workers)) if part]
        jobs = [self.items_job(part, mode, stall_s) for part in lists]
        self.run([*more, *jobs], lambda process: self.after_items(process, mode, stall_s), workers + len(more))

    def after_items(self, process: Process, mode: str, stall_s: float) -> list[Job]:
        """Rows of a worker that has ended, and who does what it left."""
        ended, in_hand = self.collect(process.job.beat)
        items = process.job.items
        left = [item for item in items if item["name"] not in ended | {in_hand}]
        if in_hand is not None:
            reason = f"{process.reason}: {tail(process.log)}"
            (item,) = [item for item in items if item["name"] == in_hand]
            if len(item.get("peers", ())) > 1:  # one of them has ended it: which?
                self.row(in_hand, "n/a", f"ended its worker, so its peers are tried one by one: {reason}")
                left = [item | {"name": f"{in_hand}: {peer}", "peers": [peer]} for peer in item["peers"]] + left
            else:
                self.row(in_hand, "red", reason)
        if len(left) == len(items) and process.reason is not None and in_hand is None:  # it did not even begin
            for item in left:
                self.row(item["name"], "n/a", f"its worker did not start: {process.reason}: {tail(process.log)}")
            return []
        return [self.items_job(left, mode, stall_s)] if left else []

    def stop_background(self) -> None:
        """End what still compiles: it would be in the times."""
        for process in self.background:
            process.check()
            process.end("stopped: times are measured now")
            _, in_hand = self.collect(process.job.beat)
            if in_hand is not None:
                self.row(f"compiled: {in_hand}", "n/a", process.reason)
        self.background = []

    # --- the whole ------------------------------------------------------------------------------------------------

    def go(self, stages: list[Stage]) -> None:
        """Run the stages, each within its share of the time that is left; a stage's own error costs that stage."""
        for index, stage in enumerate(stages):
            now = time.monotonic()
            left = self.end - now
            wanted = sum(later.seconds for later in stages[index:])
            last = index == len(stages) - 1
            share = max(0.0, left - stage.grace if last else stage.seconds * min(1.0, left / wanted))
            self.stage = stage.name
            self.soft, self.hard = now + share, min(self.end, now + share + stage.grace)
            print(f"== {stage.name}: {share:.0f} s, after {now - self.started:.0f} s", flush=True)
            try:
                stage.run(self)
            except Exception:
                self.row(stage.name, "red", f"the check's own error: {traceback.format_exc()}")
            self.pack(evidence=False)  # should somebody end this before its time

    def pack(self, evidence: bool = True) -> str:
        """Write what is brought back, at most three files; the page that sums it up."""
        for path in self.folder.glob("rows_*.jsonl"):
            self.collect(path)  # of workers that nobody has waited for
        rows = read_rows(self.rows_file)
        facts = {key: value for key, value in facts_of(rows).items() if key in _FACTS}
        page = summary(rows, self.part)
        (self.output / f"summary_{self.part}.md").write_text(page)
        whole = self.folder / "all_rows.jsonl"
        whole.write_text("".join(json.dumps(facts | row, ensure_ascii=False) + "\n" for row in rows))
        archive = self.output / f"gpu_check_{self.part}.tar.gz"
        for room in (MOST_EVIDENCE_BYTES, MOST_EVIDENCE_BYTES // 8, 0) if evidence else (0,):
            with tarfile.open(archive, "w:gz", compresslevel=6) as tar:
                tar.add(whole, "rows.jsonl")
                for path in sorted(self.folder.glob("junit*.xml")):
                    tar.add(path, path.name)
                for log in sorted(self.logs.glob("*.log")):
                    _shorten(log)
                    tar.add(log, f"logs/{log.name}")
                for path in sorted(self.failures.rglob("*")):
                    if path.suffix in (".ptx", ".ttgir", ".sass", ".cubin") and path.stat().st_size < room:
                        room -= path.stat().st_size
                        tar.add(path, f"failures/{path.relative_to(self.failures)}")
            if archive.stat().st_size < MOST_BYTES:
                break
        return page


_FACTS = (
    "device",
    "driver",
    "commit",
    "torch",
    "triton",
    "ptxas",
    "assembler",
    "matrix_tflops_per_s",
    "copy_gb_per_s",
)


def _shorten(log: Path, most: int = 200_000) -> None:
    """Keep both ends of a long log."""
    if log.stat().st_size > most:
        text = log.read_bytes()
        log.write_bytes(text[: most // 4] + b"\n[...]\n" + text[-most // 2 :])
