"""Run all checks and measurements that need a GPU, in calls with a time limit and partial results.

    python benchmarks/gpu_check.py prepare     # with a network: writes an assembler and the commit into .gpu/
    bash benchmarks/gpu_check.sh first         # at most 410 s: probes, tiles, operators and their peers, tests
    bash benchmarks/gpu_check.sh second        # at most 230 s: whole models, a profile, hardware counters
    bash benchmarks/gpu_check.sh first --stages warm tiles --limit 120    # compiled peers need `probes` too
    bash benchmarks/gpu_check.sh all --rehearse          # on a CPU, with stand-ins: tests the program itself

Stages are independent. Every probe and every worker is a process with a time limit, and its rows count however it
ends. Each stage has a share of the time; after a delay the later stages get less.

Results, in $OUT or --output: gpu_check_PART.tar.gz (rows.jsonl and logs), found_tiles.json (for CRATE_FAST_TILES;
`second` also finds a copy in .gpu/) and summary_PART.md. `python benchmarks/update_readme.py --from FOLDER` makes the
README's tables from them.

It needs no network and no installation, only Python with torch, triton, timm and pytest. If this copy of the tree is
not a git checkout, $COMMIT or .gpu/commit gives the commit.
"""

import argparse
import importlib.util
import json
import lzma
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_report import NO_GPU, Rows, found_tiles, kept_of, pack
from isolation import Job, Process, run_jobs, tail

ROOT = Path(__file__).resolve().parent.parent
CARRIED = ROOT / ".gpu"  # ignored by git; copied to the GPU machine with the tree
TILES, PTXAS = "found_tiles.json", "ptxas.xz"
WHEEL = "triton>=3.9"  # with an assembler that is correct on Hopper as far as known
TRIAL = "attention-bfloat16-2x785x6x64"  # tests the assembler: older ones miscompile chained products on Hopper
LIMITS = {"first": 410.0, "second": 230.0, "all": 600.0}
NO_TIME = "no time was left"
PACK_SECONDS = 10.0  # for writing the archive

PROBE_S, PROBES_AT_ONCE = 45.0, 14
HANG_S = 3.0  # limit of the hanging probe in a rehearsal
FAULTS = ("fault:crash", "fault:hang", "fault:wrong")  # probes of a rehearsal
MODELS_AT_ONCE = 2  # models that run while others compile, which also need memory
COMPILERS = 6  # processes that compile peers beside the probes
PTXAS_VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
RETRIED = 6  # most red probes that run again


class TimeUp(BaseException):
    """The time is up, or a signal has come."""


@dataclass(frozen=True)
class Stage:
    """A part of a check."""

    name: str
    seconds: float  # share of the time, after which nothing is started
    grace: float  # further seconds for running jobs
    run: "Callable[[Check], None]"


class Check:
    """One call of the program: its folders, deadlines, environment and rows."""

    def __init__(self, options: argparse.Namespace):
        self.part, self.rehearse = options.part, options.rehearse
        self.started = time.monotonic()
        self.end = self.started + options.limit - PACK_SECONDS
        self.output = options.output
        self.folder = options.work / options.part
        shutil.rmtree(self.folder, ignore_errors=True)
        self.logs = self.folder / "logs"
        for folder in (self.output, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        self.rows = Rows(str(self.folder / "rows.jsonl"), "start", time.time())
        Path(self.rows.path).touch()
        self.soft = self.hard = self.end  # deadlines of a stage: for starting jobs, for ending them
        self.cores = os.cpu_count() or 2
        self.items: dict[str, list[dict]] = {}  # by kind
        self.assemblers: dict[str, dict] = {"again": {}}  # runs of a red probe and their environments
        self.environment = self._environment(options.work)

    def _environment(self, work: Path) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [kept.get("PYTHONPATH")])]
        cache = work / "cache"
        added = {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": str(max(2, self.cores - 2)),
            "OMP_NUM_THREADS": "1" if self.rehearse else "2",
        }
        if self.rehearse:
            added |= {"TRITON_INTERPRET": "1", "GPU_CHECK_REHEARSE": "1"}
        found = next(filter(Path.exists, (work / TILES, CARRIED / TILES)), None)
        tiles = {"CRATE_FAST_TILES": str(found)} if self.part == "second" and found is not None else {}
        return tiles | kept | added

    # --- processes ------------------------------------------------------------------------------------------------

    def start(self, job: Job) -> Process:
        """Start a job, which ends with its stage at the latest."""
        return Process(job, ROOT, self.logs, self.environment | self.rows.variables(), self.hard)

    def run(self, jobs: Iterable[Job], done: Callable, parallel: int) -> None:
        """Run jobs until the stage ends; add a row for each job that was not started."""
        for job in run_jobs(jobs, self.start, done, parallel, self.soft):
            for name in [item["name"] for item in job.items] or [job.name]:
                self.rows.add(name, "n/a", NO_TIME)

    def worker(self, *words: str, name: str, limit_s: float, **options) -> Job:
        """Make a job of gpu_worker.py. It compares with float64 itself, so the check of first launches is off."""
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_worker.py"), *words]
        return Job(name, command, limit_s, {"CRATE_FAST_SELF_CHECK": "0"}, **options)

    def items_job(self, items: list[dict], mode: str, stall_s: float, nice: int = 0) -> Job:
        """Make a worker's job for these items, done in order; `nice` lowers its priority."""
        number = len(list(self.folder.glob("work_*.json")))
        file, begun = self.folder / f"work_{number}.json", self.folder / f"begun_{number}"
        work = {"items": items, "mode": mode, "stall_s": stall_s, "nice": nice, "begun": str(begun)}
        file.write_text(json.dumps(work | {"until": time.time() + self.soft - time.monotonic()}))
        name = f"{self.rows.stage}_{mode}_{number}"
        return self.worker("items", str(file), name=name, limit_s=1e6, beat=begun, stall_s=stall_s, items=items)

    def work_through(
        self, items: list[dict], mode: str, workers: int, stall_s: float, more: Sequence[Job] = ()
    ) -> None:
        """Do items, the most important first, in several workers.

        An item that ends its worker or takes longer than `stall_s` is red if it is ours; the rest gets a new worker.
        `mode` is "warm" or "time". The jobs in `more` run at the same time.
        """
        lists = [part for part in (items[i::workers] for i in range(workers)) if part]
        jobs = [self.items_job(part, mode, stall_s) for part in lists]
        self.run([*more, *jobs], self.after_items, workers + len(more))

    def after_items(self, process: Process) -> list[Job]:
        """Add a row for the item that ended its worker, if any; return the job for its remaining items."""
        work = json.loads(Path(process.job.command[-1]).read_text())
        begun = process.job.beat.read_text().splitlines()
        items, reason = process.job.items, f"{process.reason}: {tail(process.log)}"
        left = [item for item in items if item["name"] not in begun]
        if process.reason is not None and begun and begun[-1]:
            current = begun[-1]
            (item,) = [item for item in items if item["name"] == current]
            peers = item.get("peers", ["ours"])
            late = str(process.reason).startswith("timed out after")  # the stage has ended
            if len(peers) > 1 and not late:  # find the peer that ended it
                self.rows.add(current, "n/a", f"ended its worker, so its peers are tried one by one: {reason}")
                alone = [item | {"name": f"{current}: {peer}", "peers": [peer]} for peer in peers]
                left += alone[::-1]  # ours, the likely cause, last
            else:
                ours = peers[0].startswith("ours") and item.get("present", True)  # not a candidate tile
                self.rows.add(current, "red" if ours and not late else "n/a", reason, **kept_of(item))
        elif len(left) == len(items) and process.reason is not None:  # it did not begin
            for item in left:
                self.rows.add(item["name"], "n/a", f"its worker did not start: {reason}")
            return []
        return [self.items_job(left, work["mode"], work["stall_s"], work["nice"])] if left else []

    # --- the whole ------------------------------------------------------------------------------------------------

    def go(self, stages: list[Stage]) -> None:
        """Run the stages, each within its share of the remaining time; an error costs only its own stage."""
        for index, stage in enumerate(stages):
            now = time.monotonic()
            left = self.end - now
            wanted = sum(later.seconds for later in stages[index:])
            last = index == len(stages) - 1
            share = max(0.0, left - stage.grace if last else stage.seconds * left / wanted)
            self.rows.stage = stage.name
            self.soft, self.hard = now + share, min(self.end, now + share + stage.grace)
            print(f"== {stage.name}: {share:.0f} s, after {now - self.started:.0f} s", flush=True)
            for action in (stage.run, Check.pack):  # packed each time, in case the program is killed early
                try:
                    action(self)
                except Exception:
                    self.rows.add(stage.name, "red", f"the check's own error: {traceback.format_exc()}")

    def log_clocks(self) -> Process:
        """Log the card's clocks: throttling, or another process on the card, shows there."""
        fields = "timestamp,clocks.sm,power.draw,utilization.gpu,clocks_event_reasons.active"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-lms", "1000"]
        return self.start(Job("clocks", command, math.inf))

    def pack(self) -> str:
        """Write the archive and the summary; return the summary."""
        return pack(self.rows.read(), self.part, self.folder, self.output)


# --- stages -------------------------------------------------------------------------------------------------------


def environment(check: Check) -> None:
    """Record the versions and the card, list the items of all stages, and test the assembler in .gpu/."""
    items = check.folder / "items.json"
    jobs = [check.worker("environment", str(items), name="environment", limit_s=150)]
    trial, ptxas = check.folder / "trial.json", check.folder / "ptxas"
    carried = dict.fromkeys(PTXAS_VARIABLES, str(ptxas))
    if not check.rehearse:
        jobs += [Job("nvidia-smi", ["nvidia-smi"], 20)]
        if (CARRIED / PTXAS).exists():
            try:
                ptxas.write_bytes(lzma.decompress((CARRIED / PTXAS).read_bytes()))
                version = _ptxas_version(ptxas)
            except (OSError, EOFError, lzma.LZMAError, subprocess.SubprocessError) as error:
                check.rows.add("carried assembler", "red", f"Triton's own is used: {type(error).__name__}: {error}")
            else:
                jobs += [Job("assembler", _probe(TRIAL, trial, "--reruns", "2"), 90, carried)]
                check.assemblers["carried assembler"] = carried
        else:
            check.rows.add("carried assembler", "red", "no .gpu/ptxas.xz: run gpu_check.py prepare and carry .gpu")

    def done(process: Process) -> None:
        if process.reason is not None:
            check.rows.add(process.job.name, "red", f"{process.reason}: {tail(process.log)}")

    check.run(jobs, done, parallel=len(jobs))
    if trial.exists():
        found = json.loads(trial.read_text())
        if found["status"] == "right":
            check.environment |= carried
            del check.assemblers["carried assembler"]
            check.assemblers["Triton's assembler"] = dict.fromkeys(PTXAS_VARIABLES)
            check.rows.add("carried assembler", "ok", facts={"ptxas": version})
        else:
            check.rows.add("carried assembler", "n/a", f"Triton's own is used: {found['status']}")
    if not check.rehearse and PTXAS_VARIABLES[0] not in check.environment:
        # else torch.compile would use the assembler in torch's wheel
        own = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
        check.environment |= dict.fromkeys(PTXAS_VARIABLES, str(own)) if own.exists() else {}
    if items.exists():
        check.items = json.loads(items.read_text())
    elif NO_GPU in tail(check.logs / "environment.log"):
        raise TimeUp(NO_GPU)
    red = [row["item"] for row in check.rows.read() if row["status"] == "red"]
    if "tile table" in red and check.environment.pop("CRATE_FAST_TILES", None):
        check.rows.add("found tiles", "n/a", "their file cannot be used: the table's own tiles run instead")


def _probe(name: str, into: Path, *words: str) -> list[str]:
    """Return the command that runs a probe."""
    return [sys.executable, "-m", "crate_fast.probes", "--probe", name, "--json", str(into), *words]


def warm_models(check: Check) -> None:
    """Fill the compilers' caches for whole models."""
    first, more = (check.items.get(kind, []) for kind in ("models", "more"))
    compiles = {item["name"] for item in first + more if item["peers"][-1].endswith(("compiled", "CUDA graphs"))}
    compiled = [item for item in first if item["name"] in compiles]
    jobs = [check.items_job([item | {"peers": item["peers"][-1:]}], "warm", 90.0) for item in compiled]
    ours = [item | {"peers": item["peers"][:1]} for item in first + more if item["name"] not in compiles]
    check.work_through(ours[: 2 * MODELS_AT_ONCE], "warm", MODELS_AT_ONCE, 40.0, jobs)


def warm(check: Check) -> None:
    """Fill the compilers' caches on all cores; `probes` compiles the operators' peers of torch.compile."""
    ours = [item | {"peers": item["peers"][:1]} for item in check.items.get("operators", [])]
    items = ours + check.items.get("tiles", []) + ([] if check.rehearse else check.items.get("probes", []))
    check.work_through(items, "warm", max(1, check.cores - 2), 40.0)


def probes(check: Check) -> None:
    """Compare every kernel with float64, each in its own process; compile peers beside them.

    A red probe runs again, also with the other assembler; the archive gets the PTX and the cubins of these runs.
    """
    names = [item["probe"] for item in check.items.get("probes", [])]
    chosen = [*FAULTS, *names[:1]] if check.rehearse else names
    words = ["--reruns", "2", "--device", "cpu"] if check.rehearse else ["--reruns", "20"]
    limit_s = 4 * PROBE_S if check.rehearse else PROBE_S  # a CPU may be busy
    files: dict[str, Path] = {}  # by the name of the job

    def job(name: str, label: str = "") -> Job:
        title, environment = f"{name}{label and ', '}{label}", {}
        files[title] = check.folder / f"probe_{len(files)}.json"
        if label:
            cache = {"TRITON_CACHE_DIR": str(check.folder / "failures" / title)}
            environment = check.assemblers[label] | cache
        return Job(
            title, _probe(name, files[title], *words), HANG_S if name == "fault:hang" else limit_s, environment
        )

    jobs, retried = [job(name) for name in chosen], []
    compiled = [item | {"peers": item["peers"][1:]} for item in check.items.get("compiled", [])]
    shares = filter(None, (compiled[part::COMPILERS] for part in range(COMPILERS)))
    compilers = [check.items_job(share, "warm", 90.0, nice=10) for share in shares]

    def done(process: Process) -> list[Job]:
        if process.job.items:  # a compiler
            return check.after_items(process)
        name, limit_s = process.job.name, process.job.limit_s
        if str(process.reason).startswith("timed out after") and process.seconds < limit_s:  # the stage has ended
            check.rows.add(name, "n/a", NO_TIME)
            return []
        found = json.loads(files[name].read_text()) if files[name].exists() else {}
        status = found.get("status")
        right = status == "right" and process.reason is None
        reason = f"{process.reason}: {tail(process.log)}" if status in (None, "right") else status
        if found.get("share") is not None:
            reason += f": {found['share']:.2g} of the error that is allowed, reruns equal: {found['reruns_equal']}"
        again = name not in chosen
        status = "ok" if right else "n/a" if again else "red"
        check.rows.add(name, status, None if right else reason, **{"again" if again else "probe": found})
        if right or again or len(retried) == RETRIED:
            return []
        retried.append(name)
        return [job(name, label) for label in check.assemblers]

    check.run([*compilers, *jobs], done, len(compilers) + (2 if check.rehearse else PROBES_AT_ONCE))


def timings(check: Check) -> None:
    """Time subspace attention and ISTA with their peers: first the eager ones, then the compiled ones."""
    items = check.items.get("operators", [])
    if check.rehearse:
        items = [items[0], {"name": "a fault", "kind": "crash"}, *items[1:2]] if items else []
    check.work_through(items, "time", 1, 60.0)
    check.work_through(check.items.get("compiled", []), "time", 1, 100.0)  # a cold one compiles for most of a minute


def tiles(check: Check) -> None:
    """Time the candidates that compile, fit and do not spill; the next stages use the best, in found_tiles.json."""
    warmed = {row["item"]: row for row in check.rows.read() if row["stage"] == "warm"}
    kept = []
    for item in check.items.get("tiles", []):
        row = warmed.get(item["name"], {"status": "n/a", "reason": NO_TIME})
        spills = row.get("spills") and not item["present"]
        late = str(row["reason"]).startswith((NO_TIME, "timed out after"))  # the stage has ended
        if late or (row["status"] == "ok" and not spills):
            kept.append(item)
        else:
            check.rows.add(item["name"], "n/a", f"left out: {row['reason'] or 'it spills registers'}")
    try:
        check.work_through(kept, "time", 1, 10.0)
    finally:
        rows = check.rows.read()
        served = {item["probe"] for item in check.items.get("probes", []) if item.get("whole_heads")}
        red = {row["item"] for row in rows if row["stage"] == "probes" and row["status"] == "red"}
        measured = [row for row in rows if row["stage"] in ("warm", "tiles")]
        found = found_tiles(measured, check.items.get("tiles", []), whole_heads=not served & red)
        if found:
            folders = [check.output, *([] if check.rehearse else [check.folder.parent])]
            for folder in folders:
                (folder / TILES).write_text(json.dumps(found, indent=1) + "\n")
            check.environment.setdefault("CRATE_FAST_TILES", str(folders[-1] / TILES))


def tests(check: Check) -> None:
    """Run the GPU tests with a time limit each, in parallel if pytest-xdist is installed."""
    words = ["-p", "no:cacheprovider", "-p", "gpu_worker", "-q", "-m", "gpu", "-o", "faulthandler_timeout=50"]
    words += ["--continue-on-collection-errors", "-o", "addopts="]  # those of pyproject.toml need pytest-benchmark
    if not check.rehearse and importlib.util.find_spec("xdist"):
        words += ["-n", str(max(1, check.cores // 2)), "--max-worker-restart", "20"]
    if importlib.util.find_spec("pytest_timeout"):
        words += ["--timeout", "110", "--timeout-method", "thread"]  # torch.compile takes most of a minute
    environment = {} if check.rehearse else {"CRATE_FAST_REQUIRE_GPU": "1"}
    files = sorted((ROOT / "tests").glob("test_*.py"), key=lambda path: path.name != "test_gpu.py")
    files = files[:1] if check.rehearse else [path for path in files if "mark.gpu" in path.read_text()]
    job = Job("tests", [sys.executable, "-m", "pytest", *words, *map(str, files)], 1e6, environment)

    def done(process: Process) -> None:
        if str(process.reason).startswith("timed out"):
            check.rows.add("the other tests", "n/a", NO_TIME)
        elif process.reason not in (None, "exit status 1"):  # 1: failed tests, which have their rows
            check.rows.add("pytest", "red", f"{process.reason}: {tail(process.log)}")

    check.soft = check.hard  # the only job has all of the time
    check.run([job], done, 1)


def _timed(kind: str, stall_s: float) -> Callable[[Check], None]:
    """Make a stage that times as many items of a kind as fit."""
    return lambda check: check.work_through(check.items.get(kind, []), "time", 1, stall_s)


def counters(check: Check) -> None:
    """Read hardware counters of the kernels with ncu."""
    tool = shutil.which("ncu")
    if tool is None:
        check.rows.add("ncu", "n/a", "ncu is not here")
        return
    command = [tool, "--profile-from-start", "off", "--clock-control", "none"]
    for section in ("SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats", "ComputeWorkloadAnalysis"):
        command += ["--section", section]
    until = time.time() + check.soft - time.monotonic() - 5.0  # ncu prints when the program ends
    command += [sys.executable, str(ROOT / "benchmarks" / "gpu_worker.py"), "kernels", "--until", str(until)]

    def done(process: Process) -> None:
        if process.reason is None:
            check.rows.add("ncu", "ok", output=process.log.read_text(errors="replace"))
        else:
            check.rows.add("ncu", "n/a", f"{process.reason}: {tail(process.log)}")

    check.run([Job("ncu", command, 60.0)], done, 1)


_ENVIRONMENT = Stage("environment", 15, 135, environment)  # without its items the other stages do nothing
_FIRST = [
    Stage("warm", 35, 15, warm),
    Stage("probes", 70, 15, probes),
    Stage("tiles", 50, 10, tiles),
    Stage("timings", 140, 15, timings),
    Stage("tests", 90, 0, tests),
]
_SECOND = [
    Stage("warm models", 40, 30, warm_models),
    Stage("profile", 15, 10, _timed("profile", 45.0)),  # of a training step of CRATE-B/16
    Stage("models", 90, 20, _timed("models", 90.0)),  # CRATE-B/16 with its peers, B/8
    Stage("counters", 30, 10, counters),
    Stage("more", 40, 5, _timed("more", 45.0)),  # inference, growth, CRATE-MAE, other sizes
]
PARTS = {
    "first": [_ENVIRONMENT, *_FIRST],
    "second": [_ENVIRONMENT, *_SECOND],
    "all": [_ENVIRONMENT, *_FIRST, *_SECOND],
}


# --- the command --------------------------------------------------------------------------------------------------


def prepare() -> int:
    """Write the commit and the assembler of Triton 3.9 or later into .gpu/, to be copied to the GPU machine."""
    CARRIED.mkdir(exist_ok=True)
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+changes"]
    found = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    commit = os.environ.get("COMMIT") or found or "unknown"
    (CARRIED / "commit").write_text(commit + "\n")
    target = CARRIED / PTXAS
    if not target.exists():
        with tempfile.TemporaryDirectory() as folder:
            words = ["pip", "install", "--no-deps", "--only-binary=:all:", "--target", folder, WHEEL]
            subprocess.run([sys.executable, "-m", *words], check=True)
            tools = Path(folder).glob("triton/backends/nvidia/bin/ptxas*")
            newest = max(tools, key=lambda tool: [int(number) for number in _ptxas_version(tool).split(".")])
            target.write_bytes(lzma.compress(newest.read_bytes(), preset=6))
    print(f"{CARRIED}: commit {commit}, {target.name} {target.stat().st_size / 2**20:.0f} MiB; carry this folder")
    return 0


def _ptxas_version(tool: Path) -> str:
    tool.chmod(0o755)
    text = subprocess.run([str(tool), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"\bV(\d[\d.]*)", text)[1]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=(*LIMITS, "prepare"))
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="only these stages, and the environment")
    parser.add_argument("--limit", type=float, help="seconds in all; default 410 for first, 230 for second")
    output = os.environ.get("OUT") or ROOT / "build" / "gpu_check" / "results"
    parser.add_argument("--output", type=Path, default=Path(output), help="folder of the results; default $OUT")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu_check", help="logs and compilers' caches")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with stand-ins and faults")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a part and write its results; return 0 unless the program itself fails."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.part == "prepare":
        return prepare()
    names = [stage.name for stage in PARTS[options.part]]
    if missing := set(options.stages or []) - set(names):
        parser.error(f"--stages {', '.join(sorted(missing))}: {options.part} has {', '.join(names)}")
    options.limit = options.limit or LIMITS[options.part]
    options.output, options.work = options.output.resolve(), options.work.resolve()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    check = Check(options)
    wanted = {*(options.stages or names), "environment"}

    def stop(number, _frame):
        raise TimeUp(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, check.end - time.monotonic() + 4.0))  # if a stage does not end
    clocks = [] if check.rehearse else [check.log_clocks()]
    try:
        check.go([stage for stage in PARTS[options.part] if stage.name in wanted])
    except TimeUp as reason:
        check.rows.add("check", "n/a", f"stopped by {reason}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        for process in clocks:
            process.kill("the check has ended")
        page = check.pack()
        # callers see the last 12,000 characters
        print(page if len(page) < 10_000 else f"{page[:5000]}\n[...]\n{page[-4500:]}")
        print(f"brought back after {time.monotonic() - check.started:.0f} s: {options.output}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
