"""The stages of a GPU check: what each runs, and what it makes of it."""

import csv
import json
import os
import re
import sys
import time
from pathlib import Path

from gpu_report import facts_of, found_tiles, read_rows
from gpu_session import NO_TIME, ROOT, TILES, Check, Stage
from gpu_worker import COUNTED
from isolation import Job, Process, tail

__all__ = ["PARTS"]

PROBE_S, PROBES_AT_ONCE = 30.0, 10
HANG_S = 12.0  # of the probe that hangs, in a rehearsal
FAULTS = ("fault:crash", "fault:hang", "fault:wrong")  # of a rehearsal
EVIDENCE = 6  # red probes that run once more to leave their PTX and SASS
MODELS_AT_ONCE = 2  # that run while others compile: memory for both
BACKGROUND = 4  # processes that compile peers while kernels are compiled and probed


def environment(check: Check) -> None:
    """Where this is, whether anything runs, which assembler to use, and what there is to do."""
    items, rows = check.folder / "items.json", check.folder / "rows_environment.jsonl"
    jobs = [
        check.worker("environment", "--rows", str(rows), name="environment", limit_s=60),
        check.worker("list", check.part, "--rows", str(rows), "--into", str(items), name="list", limit_s=60),
    ]
    if not check.rehearse:
        jobs += [Job("env", [sys.executable, "-m", "crate_fast.env"], 60), Job("nvidia-smi", ["nvidia-smi"], 20)]
        jobs += [_assembler_job(check, check.folder / "rows_own.jsonl", [])]
        if check.ptxas.exists():
            words = ["--ptxas", str(check.ptxas), "--into", str(check.folder)]
            jobs += [_assembler_job(check, check.folder / "rows_carried.jsonl", words)]
        else:
            check.row("carried assembler", "n/a", f"{check.ptxas} is not here")

    def done(process: Process) -> None:
        if process.reason is not None:
            check.row(process.job.name, "red", f"{process.reason}: {tail(process.log)}")

    check.run(jobs, done, parallel=len(jobs))
    for path in (rows, check.folder / "rows_own.jsonl", check.folder / "rows_carried.jsonl"):
        check.collect(path)
    _choose_assembler(check)
    if items.exists():
        check.work = json.loads(items.read_text())
    red = [row["item"] for row in read_rows(check.rows_file) if row["status"] == "red"]
    if "tile table" in red and check.environment.pop("CRATE_FAST_TILES", None):
        check.row("found tiles", "n/a", "their file cannot be used: the table's own tiles run instead")


def _assembler_job(check: Check, rows: Path, words: list[str]) -> Job:
    return check.worker("assembler", "--rows", str(rows), *words, name=rows.stem, limit_s=40)


def _choose_assembler(check: Check) -> None:
    """The carried one where it has passed its trial; the other is what red probes run again with."""
    rows = read_rows(check.rows_file)
    carried = [row for row in rows if (row["item"], row["status"]) == ("carried assembler", "ok")]
    if carried:
        path = carried[0]["path"]
        check.other_assembler = {name: check.environment.get(name, "") for name in _PTXAS}
        check.environment |= dict.fromkeys(_PTXAS, path)
    facts = {"assembler": carried[0]["version"] if carried else "Triton's own"}
    if "commit" not in facts_of(rows):  # the worker that knows more has failed
        facts["commit"] = check.commit
    check.row("assembler in use", "ok", facts=facts)


_PTXAS = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")


def warm(check: Check) -> None:
    """Fill the compilers' caches on all cores; what torch.compile makes of peers goes on in the background."""
    if check.part == "second":
        models = [item for kind in ("models", "more") for item in check.work.get(kind, []) if item["kind"] == "model"]
        compiled = [item for item in models if item["peers"][-1].endswith("compiled")]
        jobs = [check.items_job([item | {"peers": item["peers"][-1:]}], "warm", 90.0) for item in compiled]
        ours = [item | {"peers": item["peers"][:1]} for item in models if item not in compiled]
        check.work_through(ours[: 2 * MODELS_AT_ONCE], "warm", MODELS_AT_ONCE, 40.0, jobs)
        return
    compiled = [item | {"peers": item["peers"][1:]} for item in check.work.get("compiled", [])]
    hard, check.hard = check.hard, min(check.end, time.monotonic() + 110.0)  # the background outlasts this stage
    for part in range(BACKGROUND):
        if compiled[part::BACKGROUND]:
            job = check.items_job(compiled[part::BACKGROUND], "warm", 90.0, nice=10)
            check.background.append(check.start(job))
    check.hard = hard
    ours = [item | {"peers": item["peers"][:1]} for item in check.work.get("operators", [])]
    items = ours + check.work.get("tiles", []) + ([] if check.rehearse else check.work.get("probes", []))
    check.work_through(items, "warm", max(1, check.cores - 2), 20.0)


def probes(check: Check) -> None:
    """Every kernel against float64, each probe by itself; a red one again, with the other assembler, and for PTX."""
    names = [item["probe"] for item in check.work.get("probes", [])]
    words = ["--reruns", "2", "--device", "cpu"] if check.rehearse else ["--reruns", "20"]
    known: dict[str, tuple[str, str, Path]] = {}  # of a job: probe, why it runs again, where its row goes
    evidence: list[str] = []

    def job(name: str, again: str = "", environment: dict[str, str] | None = None) -> Job:
        title = f"{name}, {again}" if again else name
        path = check.folder / f"probe_{len(known)}.json"
        known[title] = name, again, path
        command = [sys.executable, "-m", "crate_fast.probes", "--probe", name, "--json", str(path), *words]
        return Job(title, command, HANG_S if name == "fault:hang" else PROBE_S, environment or {})

    def done(process: Process) -> list[Job]:
        name, again, path = known[process.job.name]
        found = json.loads(path.read_text()) if path.exists() else {}
        right = found.get("status") == "right" and process.reason is None
        reason = found.get("status") or f"{process.reason}: {tail(process.log)}"
        if found.get("share") is not None:
            reason += f": {found['share']:.2g} of the error that is allowed, reruns equal: {found['reruns_equal']}"
        check.row(process.job.name, "ok" if right else "red", None if right else reason, probe=found)
        more = []
        if not (right or again or check.rehearse):
            if check.other_assembler is not None:
                more.append(job(name, "other assembler", check.other_assembler))
            if len(evidence) < EVIDENCE:
                evidence.append(name)
                more.append(job(name, "for its PTX", {"TRITON_CACHE_DIR": str(check.failures / name)}))
        return more

    chosen = [*FAULTS, *names[:1]] if check.rehearse else names
    check.run([job(name) for name in chosen], done, 2 if check.rehearse else PROBES_AT_ONCE)
    _disassemble(check)


def _disassemble(check: Check) -> None:
    """SASS beside the cubins of red probes."""
    tool = (facts_of(read_rows(check.rows_file)).get("tools") or {}).get("cuobjdump")
    cubins = sorted(check.failures.rglob("*.cubin")) if tool else []

    def done(process: Process) -> None:
        os.replace(process.log, Path(process.job.command[-1]).with_suffix(".sass"))

    jobs = [Job(f"sass_{index}", [tool, "-sass", str(cubin)], 10.0) for index, cubin in enumerate(cubins)]
    check.run(jobs, done, PROBES_AT_ONCE)


def timings(check: Check) -> None:
    """Subspace attention and ISTA beside their peers: first those that need no compiling, then the others."""
    check.stop_background()
    items = check.work.get("operators", [])
    if check.rehearse:
        items = [items[0], {"name": "a fault", "kind": "crash"}, *items[1:2]] if items else []
    check.work_through(items, "time", 1, 25.0)
    check.work_through(check.work.get("compiled", []), "time", 1, 30.0)


def tiles(check: Check) -> None:
    """Time the candidates that compiled, fit and did not spill; the best go to found_tiles.json."""
    check.stop_background()
    warmed = {row["item"]: row for row in read_rows(check.rows_file) if row["stage"] == "warm"}
    kept = []
    for item in check.work.get("tiles", []):
        row = warmed.get(item["name"], {"status": "n/a", "reason": NO_TIME})
        spills = row.get("spills") and not item["present"]
        if row["reason"] == NO_TIME or (row["status"] == "ok" and not spills):
            kept.append(item)
        else:
            check.row(item["name"], "n/a", f"left out: {row['reason'] or 'it spills registers'}")
    try:
        check.work_through(kept, "time", 1, 10.0)
    finally:
        found = found_tiles(row for row in read_rows(check.rows_file) if row["stage"] == "tiles")
        if found:
            for folder in (check.output, check.folder.parent):
                (folder / TILES).write_text(json.dumps(found, indent=1) + "\n")


def tests(check: Check) -> None:
    """The GPU tests, four processes at a time where pytest-xdist is here; each test has a time limit."""
    check.stop_background()
    facts = facts_of(read_rows(check.rows_file))
    rows = check.folder / "rows_tests.jsonl"
    rows.touch()
    words = ["-o", "addopts=-ra --strict-markers", "-p", "no:cacheprovider", "-p", "gpu_rows", "-q", "-m", "gpu"]
    words += [f"--junitxml={check.folder / 'junit.xml'}", "-o", "junit_logging=all", "-o", "faulthandler_timeout=50"]
    if not check.rehearse and not str(facts.get("xdist", "no")).startswith("no"):
        words += ["-n", "4", "--max-worker-restart", "20"]
    if not str(facts.get("pytest_timeout", "no")).startswith("no"):
        words += ["--timeout", "90", "--timeout-method", "thread"]
    files = ["tests/test_gpu.py"] if check.rehearse else _gpu_tests()
    environment = {"GPU_CHECK_ROWS": str(rows)}
    environment |= {} if check.rehearse else {"CRATE_FAST_REQUIRE_GPU": "1"}
    command = [sys.executable, "-m", "pytest", *words, *(str(ROOT / file) for file in files)]
    job = Job("tests", command, 1e6, environment, polite_s=10.0)

    def done(process: Process) -> None:
        check.collect(rows)
        if process.asked:
            check.row("the other tests", "n/a", NO_TIME)
        elif process.reason not in (None, "exit status 1"):  # 1: tests have failed, and have their rows
            check.row("pytest", "red", f"{process.reason}: {tail(process.log)}")

    check.soft = check.hard  # one job: all of the time
    check.run([job], done, 1)


def _gpu_tests() -> list[str]:
    files = sorted((ROOT / "tests").glob("test_*.py"), key=lambda path: path.name != "test_gpu.py")
    return [str(path.relative_to(ROOT)) for path in files if "mark.gpu" in path.read_text()]


def models(check: Check) -> None:
    """A training step of CRATE-B/16 beside its peers, B/8's memory, a profile of a step."""
    check.work_through(check.work.get("models", []), "time", 1, 60.0)


def more(check: Check) -> None:
    """Inference, growth with the number of tokens, CRATE-MAE, other sizes: as many as fit."""
    check.work_through(check.work.get("more", []), "time", 1, 45.0)


def counters(check: Check) -> None:
    """Hardware counters of six kernels by ncu: all in one process, and one by one where that fails."""
    tool = (facts_of(read_rows(check.rows_file)).get("tools") or {}).get("ncu")
    if tool is None:
        check.row("ncu", "n/a", "ncu is not here")
        return
    worker = [sys.executable, str(ROOT / "benchmarks" / "gpu_worker.py"), "kernels"]
    command = [tool, "--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "details"]
    for section in ("SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats", "ComputeWorkloadAnalysis"):
        command += ["--section", section]

    def done(process: Process) -> list[Job]:
        found = _counters(process.log)
        name = process.job.name.removeprefix("ncu_")
        reason = None if found else f"{process.reason}: {tail(process.log)}"
        check.row(f"ncu {name}", "ok" if found else "n/a", reason, counters=found)
        if found or name != "all":
            return []
        return [Job(f"ncu_{kernel}", [*command, *worker, kernel], 30.0) for kernel in COUNTED]

    check.run([Job("ncu_all", [*command, *worker], 60.0)], done, 1)


_WANTED = re.compile("Throughput|Duration|Registers Per Thread|Occupancy|Shared Memory|Issue|Executed Ipc|Warp")


def _counters(log: Path) -> dict[str, dict[str, str]]:
    """ncu's table of values: by kernel, metric and value with its unit."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith('"')]
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines):
        metric = row.get("Metric Name") or ""
        if row.get("Metric Value") and _WANTED.search(metric):
            value = f"{row['Metric Value']} {row.get('Metric Unit') or ''}".strip()
            found.setdefault(row.get("Kernel Name", "?"), {})[metric] = value
    return found


_ENVIRONMENT = Stage("environment", 15, 45, environment)
_FIRST = [
    Stage("warm", 35, 15, warm),
    Stage("probes", 70, 15, probes),
    Stage("timings", 90, 15, timings),
    Stage("tiles", 70, 10, tiles),
    Stage("tests", 120, 0, tests),
]
_SECOND = [
    Stage("models", 100, 20, models),
    Stage("counters", 30, 10, counters),
    Stage("more", 45, 5, more),
]
PARTS = {
    "first": [_ENVIRONMENT, *_FIRST],
    "second": [_ENVIRONMENT, Stage("warm", 40, 15, warm), *_SECOND],
    "all": [_ENVIRONMENT, *_FIRST, *_SECOND],
}
