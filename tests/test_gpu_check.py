"""The GPU check: ends of processes, time limits, the cost of faults, the archive, and a rehearsal on a CPU."""

import json
import lzma
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import gpu_check
import gpu_report
import gpu_worker
import isolation
import pytest
import update_readme
from gpu_check import TRIAL, Check, Stage
from image_data import write_tree
from isolation import Job, Process
from runs import forked_python, wait_until

from crate_fast import probes

PYTHON = [sys.executable, "-c"]


def test_a_program_that_does_not_start_or_begin_has_a_reason(tmp_path):
    """Other reasons, also no progress: test_faults_cost_only_themselves, and test_check.py."""
    stalls = {"beat": tmp_path / "beat", "stall_s": 9.0, "start_s": 0.2}
    for command, limits, reason in (
        (["/no/such/program"], {}, "does not start"),
        ([*PYTHON, "import time; time.sleep(60)"], stalls, "timed out: no progress for 0 s"),
    ):
        process = Process(Job("job", command, 30.0, **limits), tmp_path, tmp_path, {}, math.inf)
        wait_until(process.check)
        assert reason in process.reason


def test_a_process_is_killed_with_all_its_children(tmp_path):
    """Also children with their own session, such as the compilers' workers."""
    code = """
import pathlib, subprocess, time
children = [subprocess.Popen(["sleep", "60"], start_new_session=new) for new in (True, False)]
pathlib.Path("children").write_text(" ".join(str(child.pid) for child in children))
time.sleep(60)
"""
    process = Process(Job("job", [*PYTHON, code], 60.0), tmp_path, tmp_path, {}, math.inf)
    children = tmp_path / "children"
    wait_until(lambda: children.exists() and len(children.read_text().split()) == 2)
    process.kill("ended")
    wait_until(process.check)
    assert process.reason == "ended"

    def gone(pid: str | int) -> bool:
        with suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"  # a zombie
        return True

    pids = [process.popen.pid, *children.read_text().split()]
    wait_until(lambda: all(map(gone, pids)))


def test_a_process_that_cannot_be_killed_is_abandoned(tmp_path, monkeypatch):
    process = Process(Job("job", [*PYTHON, "import time; time.sleep(60)"], 60.0), tmp_path, tmp_path, {}, math.inf)
    monkeypatch.setattr(isolation, "_kill_all", lambda pid: None)
    process.kill("ended")
    assert not process.check()  # does not wait: others may have to be killed too
    monkeypatch.setattr(isolation, "LAST_SECONDS", -1.0)
    assert process.check()
    assert process.reason == "ended, and cannot be killed"
    process.popen.wait()


STUB = """
import json, os, sys, time
from gpu_report import Rows
work = json.load(open(sys.argv[2]))
with open(work["begun"], "a", buffering=1) as begun:
    for item in work["items"]:
        if time.time() >= work["until"]:
            break
        begun.write(item["name"] + "\\n")
        for what in item.get("peers", [item["name"]]):
            if "crash" in what: os.abort()
            if "hang" in what: time.sleep(60)
            time.sleep(item.get("seconds", 0))
            Rows.of_environment().add(f"{item['name']} {what}", "ok")
    begun.write("\\n")
"""


def _check(tmp_path: Path, limit: float, part: str = "first") -> Check:
    folders = {"output": tmp_path / "out", "work": tmp_path / "work"}
    return Check(Namespace(part=part, rehearse=True, limit=limit, **folders))


@pytest.fixture
def check(tmp_path, monkeypatch):
    """A check of a minute, without a reserve, whose worker is STUB."""
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)

    def worker(_, *words, name, limit_s, **options):
        return Job(name, [sys.executable, str(stub), *words], limit_s, **options)

    monkeypatch.setattr(gpu_check, "PACK_SECONDS", 0.0)
    monkeypatch.setattr(Check, "worker", worker)
    return _check(tmp_path, 60.0)


def _stand_in(monkeypatch, code: Callable[[Job], list[str]]) -> None:
    """Run code(job), Python code and its arguments, instead of each job."""
    start = Check.start
    monkeypatch.setattr(Check, "start", lambda check, job: start(check, replace(job, command=[*PYTHON, *code(job)])))


def _word(job: Job, option: str) -> str:
    return job.command[job.command.index(option) + 1]


def _items(*names: str, **more) -> list[dict]:
    return [{"name": name, **more} for name in names]


def test_faults_cost_only_themselves(check):
    """A stage ends at its hard limit. What crashes, hangs, raises or does not start loses no other result."""

    def unstarted(check):
        failing = [*PYTHON, "raise SystemExit(7)"]
        check.worker = lambda *words, name, limit_s, **options: Job(name, [*failing, *words], limit_s, **options)
        check.work_through(_items("x", "y"), "time", 1, 5.0)

    slow, both = _items("slow", "never", seconds=60), _items("both", peers=["ours", "crash", "theirs"])
    mixed = [*_items("a", "crash", "b", "hang"), *both, *_items("c", "d", "e")]
    stages = [
        Stage("late", 1, 1, lambda check: check.work_through(slow, "time", 1, 60.0)),
        Stage("raises", 1, 0, lambda check: 1 / 0),
        Stage("mixed", 30, 1, lambda check: check.work_through(mixed, "time", 2, 1.0)),
        Stage("unstarted", 20, 1, unstarted),
    ]
    check.go(stages)
    rows = check.rows.read()
    right = {f"{name} {name}" for name in "abcde"} | {"both ours", "both: ours ours", "both: theirs theirs"}
    assert {row["item"] for row in rows if row["status"] == "ok"} == right
    lost = {
        "slow": ("n/a", "timed out"),
        "never": ("n/a", gpu_check.NO_TIME),
        "raises": ("red", "ZeroDivisionError"),
        "crash": ("red", "SIGABRT"),
        "hang": ("red", "no progress for 1 s"),
        "both": ("n/a", "SIGABRT"),
        "both: crash": ("n/a", "SIGABRT"),
        "x": ("n/a", "exit status 7"),
        "y": ("n/a", "exit status 7"),
    }
    assert sorted(row["item"] for row in rows) == sorted(right | lost.keys())
    for row in rows:
        status, reason = lost.get(row["item"], ("ok", ""))
        assert row["status"] == status
        assert reason in (row["reason"] or ""), row
    assert (check.output / "gpu_check_first.tar.gz").exists()


def _work(begun: Path, *items: dict) -> dict:
    return {"items": items, "begun": begun, "until": math.inf, "stall_s": 60.0}


def _rows(folder: Path) -> gpu_report.Rows:
    (folder / "rows.jsonl").touch()
    return gpu_report.Rows(str(folder / "rows.jsonl"), "stage", time.time())


def test_a_worker_opens_the_gpu_before_its_first_item_begins(tmp_path, monkeypatch):
    """Opening it takes seconds, which must not count in an item's time limit."""
    worker, file, begun = gpu_worker.Worker("time", _rows(tmp_path)), tmp_path / "begun", []

    def opened():
        begun.append(file.exists())
        return Namespace(free_memory=lambda: None, synchronize=lambda: None, measure_ceilings=lambda: None)

    monkeypatch.setattr(gpu_worker, "_open_run", opened)
    monkeypatch.setattr(gpu_worker.Worker, "crash", lambda worker, _: worker.run)
    gpu_worker.work_through(_work(file, *_items("a", kind="crash")), worker)
    assert begun == [False]
    assert file.read_text() == "a\n\n"


@pytest.mark.parametrize("poisoned", [False, True])
def test_a_probe_that_fails_during_compilation_is_reported(tmp_path, monkeypatch, poisoned):
    def synchronize():
        if poisoned:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    run = Namespace(device="cuda", free_memory=lambda: None, synchronize=synchronize)
    monkeypatch.setattr(gpu_worker, "_open_run", lambda: run)
    monkeypatch.setattr(probes, "run_probe", lambda *_, **__: {"status": "failed: RuntimeError: CUDA error"})
    rows = _rows(tmp_path)
    with pytest.raises(SystemExit, match="a has poisoned this process") if poisoned else nullcontext():
        items, worker = _items("a", "b", kind="probe", probe=TRIAL), gpu_worker.Worker("warm", rows)
        gpu_worker.work_through(_work(tmp_path / "begun", *items), worker)
    found = rows.read()
    assert [(row["item"], row["status"]) for row in found] == ([] if poisoned else [("a", "n/a"), ("b", "n/a")])
    assert all("CUDA error" in row["reason"] for row in found)


def test_stages_share_the_remaining_time(check, monkeypatch):
    """Three stages of 30 s share 30 s."""
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    check.started, check.end, seen = 100.0, 130.0, []
    check.go([Stage(name, 30, 5, lambda check: seen.append((check.soft - 100, check.hard - 100))) for name in "abc"])
    assert seen == [(10.0, 15.0), (15.0, 20.0), (25.0, 30.0)]


def _packed(archive: Path) -> tuple[list[dict], list[tarfile.TarInfo]]:
    with tarfile.open(archive) as tar:
        rows = [json.loads(line) for line in tar.extractfile("rows.jsonl").read().splitlines()]
        return rows, [member for member in tar if member.name.startswith("logs/")]


def test_the_results_are_packed_when_the_time_is_up_during_a_stage(check):

    def interrupted(check):
        process = check.start(check.items_job(_items("a", "hang"), "time", 60.0))
        wait_until(lambda: "hang" in process.job.beat.read_text())
        process.kill("by the test")
        wait_until(process.check)
        process.log.write_bytes(bytes(2**20))
        raise gpu_check.TimeUp

    with pytest.raises(gpu_check.TimeUp):
        check.go([Stage("timings", 30, 1, interrupted)])
    check.pack()
    rows, (log,) = _packed(check.output / "gpu_check_first.tar.gz")
    assert [row["item"] for row in rows] == ["a a"]
    assert log.size < 50_000  # a long log is shortened


def test_the_gpu_tests_need_no_plugin_of_pytest(check, tmp_path, monkeypatch):
    jobs, tiny = [], tmp_path / "test_tiny.py"
    tiny.write_text("import pytest\n@pytest.mark.gpu\ndef test_tiny(): pass\n")
    broken = tmp_path / "test_broken.py"
    broken.write_text("import no_such_module\n")
    monkeypatch.setattr(check, "run", lambda started, *_: jobs.extend(started))
    gpu_check.tests(check)
    *words, _ = jobs[0].command  # and the file
    words += ["-p", "no:benchmark", "-c", str(gpu_check.ROOT / "pyproject.toml"), str(tiny), str(broken)]
    environment = check.environment | check.rows.variables() | jobs[0].environment
    environment.pop("PYTEST_XDIST_WORKER", None)  # of this test's own process
    assert subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True).returncode == 1
    rows = check.rows.read()
    assert [row["status"] for row in rows] == ["red", "ok"]
    assert "no_such_module" in rows[0]["reason"]


def test_a_probe_ended_by_its_stage_is_not_red(check, monkeypatch):
    check.items = {"probes": [{"probe": name} for name in "ab"]}
    check.rehearse, check.end = False, time.monotonic() + 1.5
    _stand_in(monkeypatch, lambda _: ["import time; time.sleep(30)"])
    check.go([Stage("probes", 1, 1, gpu_check.probes)])
    rows = check.rows.read()
    assert {(row["item"], row["status"]) for row in rows} == {("a", "n/a"), ("b", "n/a")}


@pytest.mark.parametrize("carried_is_used", [True, False])
def test_a_red_probe_runs_again_with_each_assembler_and_its_code_is_packed(check, monkeypatch, carried_is_used):
    """The other assembler finds the second probe right."""
    variable = gpu_check.PTXAS_VARIABLES[0]
    carried = dict.fromkeys(gpu_check.PTXAS_VARIABLES, "carried")
    if carried_is_used:
        check.environment |= carried
    check.assemblers["other"] = dict.fromkeys(carried) if carried_is_used else carried
    check.items, check.rehearse = {"probes": [{"probe": name} for name in ("a", "b", "c")]}, False
    code = f"""
import json, os, pathlib, sys
name, file = sys.argv[1:]
carried = os.environ.get("{variable}") == "carried"
cache = pathlib.Path(os.environ["TRITON_CACHE_DIR"]) / "hash"
cache.mkdir(parents=True, exist_ok=True)
for suffix in ("ptx", "cubin", "json"):
    (cache / f"kernel.{{suffix}}").write_text(f"carried: {{carried}}")
right = name == "a" or (name == "b" and carried != {carried_is_used})
open(file, "w").write(json.dumps({{"status": "right" if right else "wrong"}}))
"""
    _stand_in(monkeypatch, lambda job: [code, _word(job, "--probe"), _word(job, "--json")])
    check.go([Stage("probes", 30, 1, gpu_check.probes)])
    rows, _ = _packed(check.output / "gpu_check_first.tar.gz")
    assert {row["item"]: (row["status"], "probe" in row) for row in rows} == {
        "a": ("ok", True), "b": ("red", True), "b, again": ("n/a", False), "b, other": ("ok", False),
        "c": ("red", True), "c, again": ("n/a", False), "c, other": ("n/a", False),
    }  # fmt: skip
    with tarfile.open(check.output / "gpu_check_first.tar.gz") as tar:
        names = {name for name in tar.getnames() if name.startswith("failures")}
        ptx = tar.extractfile("failures/b, other/hash/kernel.ptx").read()
    runs = (f"failures/{name}, {label}/hash/kernel" for name in "bc" for label in ("again", "other"))
    assert names == {f"{run}.{suffix}" for run in runs for suffix in ("ptx", "cubin")}
    assert ptx == f"carried: {not carried_is_used}".encode()


@pytest.mark.parametrize(
    ("carried", "status", "reason"),
    [
        ("right", "ok", ""),
        ("wrong", "n/a", "Triton's own is used: wrong"),
        ("fails", "red", "Triton's own is used: CalledProcessError"),
        ("damaged", "red", "Triton's own is used: LZMAError"),
    ],
)
def test_the_carried_assembler_is_used_if_its_probe_is_right(check, tmp_path, monkeypatch, carried, status, reason):
    answer = "exit 1" if carried == "fails" else "echo Cuda compilation tools, release 13.4, V13.4.59"
    archive = lzma.compress(f"#!/bin/sh\n{answer}\n".encode())
    (tmp_path / gpu_check.PTXAS).write_bytes(b"no archive" if carried == "damaged" else archive)
    (check.folder / "items.json").write_text('{"probes": []}')
    monkeypatch.setattr(gpu_check, "CARRIED", tmp_path)
    check.rehearse = False
    code = "import os, subprocess, sys; subprocess.run([os.environ['TRITON_PTXAS_PATH']], check=True); "
    code += f"open(sys.argv[1], 'w').write({json.dumps({'status': carried})!r})"
    _stand_in(monkeypatch, lambda job: [code, _word(job, "--json")] if job.name == "assembler" else ["pass"])
    check.go([Stage("environment", 30, 1, gpu_check.environment)])
    (row,) = check.rows.read()
    assert (row["item"], row["status"], check.items) == ("carried assembler", status, {"probes": []})
    assert reason in (row["reason"] or "")
    assert row.get("facts") == ({"ptxas": "13.4.59"} if carried == "right" else None)
    variables = gpu_check.PTXAS_VARIABLES
    ours, tritons = dict.fromkeys(variables, str(check.folder / "ptxas")), dict.fromkeys(variables)
    used = {name: value for name, value in check.environment.items() if name in variables}
    assert used.keys() == {*variables}  # else torch.compile would use another
    assert (used == ours) == (carried == "right")
    assert all(Path(tool).is_file() for tool in used.values())
    others = {"right": {"Triton's assembler": tritons}, "wrong": {"carried assembler": ours}}
    assert check.assemblers == {"again": {}} | others.get(carried, {})


def _tile(kernel: str, block: int, ms: float | None, present: bool = False, **more) -> dict:
    key = {"kernel": kernel, "architecture": "sm_90", "precision": "half", "block_d": 64}
    tile = {"block_m": block, "block_n": 64, "num_warps": 8, "num_stages": 2}
    row = {"item": f"{kernel} {block}", "stage": "tiles", "status": "ok" if ms else "red", "reason": None, **key}
    return (
        row
        | {"tile": tile, "present": present, "latency_ms": ms, "shapes": {"1×9×1×1": ms}, "alternative_ms": None}
        | more
    )


def test_the_fastest_tile_replaces_the_present_one_if_it_gains_enough():
    def best(*rows):
        return {row["kernel"]: row["tile"] and row["tile"]["block_m"] for row in gpu_report.found_tiles(rows, rows)}

    name = "attention_forward"
    present = _tile(name, 128, 1.0, present=True)
    assert best(present, _tile(name, 64, 0.9), _tile(name, 32, None)) == {name: 64}
    assert best(present, _tile(name, 64, 0.99)) == {name: 128}
    assert best(_tile(name, 64, 2.0)) == {name: 64}
    for alternative, chosen in ((2.0, True), (0.5, False)):
        others = {"alternative_ms": alternative}
        rows = [_tile("output_map", 128, 9.0, present=True, **others), _tile("output_map", 64, 1.0, **others)]
        (row,) = gpu_report.found_tiles(rows, rows)
        assert (row["tile"]["block_m"], row["tile"]["chosen"]) == (64, chosen)
    for ms, kept in ((0.5, 64), (1.5, None)):
        assert best(_tile("whole_head_forward", 64, ms, alternative_ms=1.0)) == {"whole_head_forward": kept}
    red = _tile("whole_head_forward", 64, None, present=True)
    assert best(present, red)["whole_head_forward"] is None  # blocks of rows run
    faster = _tile("whole_head_forward", 32, 0.5, alternative_ms=1.0)
    assert best(present, red, faster)["whole_head_forward"] == 32
    assert "| whole_head_forward 32 | 0.5 | 1 |" in gpu_report.summary([present, faster], "first")


def test_beside_whole_heads_the_longest_shape_decides_on_the_tile_of_blocks_of_rows():
    def rows(whole_ms: float) -> list[dict]:
        found = [_tile("whole_head_forward", 64, whole_ms, present=True, alternative_ms=1.0)]
        for block, short, long in ((128, 1.0, 3.0), (64, 3.0, 2.0)):
            shapes = {"shapes": {"1×9×1×1": short, "1×30×1×1": long}}
            found.append(_tile("attention_forward", block, (short * long) ** 0.5, present=block == 128, **shapes))
        return found

    for whole_ms, block in ((0.5, 64), (5.0, 128)):
        found = {row["kernel"]: row["tile"] for row in gpu_report.found_tiles(rows(whole_ms), rows(whole_ms))}
        assert found["attention_forward"]["block_m"] == block


def test_whole_heads_that_crash_are_turned_off(check):
    tile = _tile("whole_head_forward", 64, None, present=True)
    row = {key: tile[key] for key in ("kernel", "architecture", "precision", "block_d", "tile", "present")}
    check.go([Stage("tiles", 30, 1, lambda check: check.work_through(_items("crash", **row), "time", 1, 5.0))])
    key = {name: row[name] for name in gpu_report.TILE_KEY}
    assert gpu_report.found_tiles(check.rows.read(), [row]) == [key | {"tile": None}]


def test_a_red_probe_of_whole_heads_turns_them_off(check):
    kernels = "attention_forward", "whole_head_forward"
    tiles = [_tile(kernel, 64, None, present=True, name=kernel) for kernel in kernels]
    check.items = {"tiles": tiles, "probes": [{"probe": "p", "whole_heads": True}, {"probe": "q"}]}
    for item, whole_heads in (("q", True), ("p", False)):
        check.rows.stage = "probes"
        check.rows.add(item, "red", "wrong")
        check.rows.stage = "tiles"
        for kernel in kernels:
            tile = _tile(kernel, 64, 1.0, present=True)
            check.rows.add(**{name: value for name, value in tile.items() if name != "stage"})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Check, "work_through", lambda *_: None)
            gpu_check.tiles(check)
        written = json.loads((check.output / gpu_check.TILES).read_text())
        kept = {row["kernel"]: row["tile"] is not None for row in written}
        assert kept == {"attention_forward": True, "whole_head_forward": whole_heads}


def test_tiles_that_do_not_compile_or_spill_are_not_timed(check, monkeypatch):
    check.rows.stage, timed = "warm", []
    names = ("fits", "spills", "present spills", "fails", "cold", "cut short")
    check.items = {"tiles": [{"name": name, "kernel": "k", "present": "present" in name} for name in names]}
    for name, spills in (("fits", 0), ("spills", 4), ("present spills", 4)):
        check.rows.add(name, "ok", spills=spills)
    check.rows.add("fails", "n/a", "out of shared memory")
    check.rows.add("cold", "n/a", gpu_check.NO_TIME)
    check.rows.add("cut short", "n/a", "timed out after 50 s: …")
    monkeypatch.setattr(Check, "work_through", lambda _, items, *rest: timed.extend(item["name"] for item in items))
    check.rows.stage = "tiles"
    gpu_check.tiles(check)
    assert timed == ["fits", "present spills", "cold", "cut short"]
    reasons = {row["item"]: row["reason"] for row in check.rows.read() if row["stage"] == "tiles"}
    assert reasons == {"spills": "left out: it spills registers", "fails": "left out: out of shared memory"}


def test_work_is_listed_by_kind_with_unique_names(monkeypatch, tmp_path):
    """If one kind cannot be listed, the others are."""
    rows = _rows(tmp_path)
    listed = gpu_worker.list_items(rows)
    assert listed.keys() == {"operators", "compiled", "tiles", "probes", "models", "profile", "more"}
    for items in listed.values():
        assert len({item["name"] for item in items}) == len(items) > 0
    monkeypatch.setattr(gpu_worker, "_probe_items", lambda: 1 / 0)
    listed = gpu_worker.list_items(rows)
    assert {kind for kind, items in listed.items() if items} == {
        "operators",
        "compiled",
        "tiles",
        "models",
        "profile",
        "more",
    }
    (red,) = rows.read()
    assert (red["item"], red["status"]) == ("list of probes", "red")


def test_prepare_writes_the_wheels_newest_assembler_and_the_commit(tmp_path, monkeypatch):
    def pip(command, **options):
        if "pip" not in command:
            return run(command, **options)
        for name, version in (("ptxas", "12.9.86"), ("ptxas-blackwell", "13.4.59"), ("nvdisasm", "99.9")):
            text = f"#!/bin/sh\necho Cuda compilation tools, release 1, V{version}\n"
            target = Path(command[command.index("--target") + 1])
            write_tree(target, {f"triton/backends/nvidia/bin/{name}": text.encode()})

    run = subprocess.run
    monkeypatch.setattr(gpu_check.subprocess, "run", pip)
    monkeypatch.setattr(gpu_check, "CARRIED", tmp_path / ".gpu")
    monkeypatch.setenv("COMMIT", "abc123")
    assert gpu_check.main(["prepare"]) == 0
    assert b"V13.4.59" in lzma.decompress((tmp_path / ".gpu" / "ptxas.xz").read_bytes())
    assert (tmp_path / ".gpu" / "commit").read_text() == "abc123\n"


def test_the_second_part_uses_the_tiles_found_by_the_first(tmp_path):
    (tmp_path / "work").mkdir()
    found = tmp_path / "work" / gpu_check.TILES
    found.write_text("[]")
    assert _check(tmp_path, 9.0, "second").environment["CRATE_FAST_TILES"] == str(found)
    assert "CRATE_FAST_TILES" not in _check(tmp_path, 9.0).environment


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """Output folder of the whole program on a CPU."""
    folder = tmp_path_factory.mktemp("rehearsal")
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    words = ["all", "--rehearse", "--work", str(folder / "work"), "--output", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMMIT", "abc123")
        patch.setattr(gpu_check, "HANG_S", 1.5)  # twice
        with forked_python(isolation, fresh="environment"):
            assert gpu_check.main(words) == 0
    for number, handler in signals.items():
        signal.signal(number, handler)
    return folder / "out"


def test_a_stage_of_another_part_is_an_error(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["first", "--stages", "warm", "models"])
    assert "--stages models: first has environment, warm, probes, tiles, timings, tests" in capsys.readouterr().err


def test_the_script_starts_the_program():
    command = ["bash", str(gpu_check.ROOT / "benchmarks" / "gpu_check.sh"), "--help"]
    environment = {**os.environ, "PYTHON": sys.executable}
    assert b"--rehearse" in subprocess.run(command, env=environment, capture_output=True, check=True).stdout


def test_the_rehearsal_runs_every_stage_and_faults_are_red_rows(rehearsal):
    rows, logs = _packed(rehearsal / "gpu_check_all.tar.gz")
    assert "logs/fault:crash.log" in [log.name for log in logs]
    red = {row["item"]: row["reason"] for row in rows if row["status"] == "red"}
    assert red.keys() == {"fault:crash", "fault:hang", "fault:wrong", "a fault"}, red
    assert "SIGABRT" in red["fault:crash"]
    assert "timed out" in red["fault:hang"]
    assert "of the error that is allowed" in red["fault:wrong"]
    stages = {row["stage"] for row in rows if row["status"] == "ok"}
    assert stages == {"environment", "warm", "probes", "timings", "tiles", "warm models", "profile", "models", "more"}
    skipped = {"tests", "counters"}  # no GPU
    assert {stage.name for part in gpu_check.PARTS.values() for stage in part} == stages | skipped
    assert {row["item"] for row in rows if "again" in row} == {f"{fault}, again" for fault in gpu_check.FAULTS}
    measured = {(row["bench"], row["row"]["peer"]) for row in rows if row.get("bench")}
    assert {("mssa", "ours"), ("ista", "ours"), ("crate", "ours"), ("growth", "ours"), ("model", "ours")} <= measured
    assert "Self CPU time total" in (rehearsal / "summary_all.md").read_text()  # the profile
    assert json.loads((rehearsal / "found_tiles.json").read_text())[0]["tile"]


def test_the_readmes_tables_are_made_from_the_output(rehearsal, tmp_path):
    row = {"stage": "probes", "status": "ok"}
    rows = [row | {"item": "compiled: a"}, row | {"item": "b", "probe": {}}]
    (tmp_path / "gpu_check.json").write_text(json.dumps({"rows": rows}))
    assert "1 of 1 kernel probes are right" in update_readme.gpu_table(tmp_path)
    (tmp_path / "gpu_check.json").unlink()
    assert update_readme.gpu_table(tmp_path) == update_readme.models_table(tmp_path) == update_readme.NOT_MEASURED
    update_readme.take(rehearsal, tmp_path)
    table = update_readme.gpu_table(tmp_path)
    named = re.search(r"1 of 4 kernel probes are right: \*\*red\*\*: (.*)\.", table)[1]
    assert {*named.split(", ")} == {"`fault:crash`", "`fault:hang`", "`fault:wrong`"}
    assert re.search(r"\| tiny, 1×70×2×32, forward \+ backward \| [\d.e-]+ \|", table)
    assert "| tiny, training step, batch 2 |" in update_readme.models_table(tmp_path)
    assert "SIGABRT" in (tmp_path / "gpu_check.md").read_text()
    kept = json.loads((tmp_path / "gpu_check.json").read_text())["rows"]
    assert len({(row["commit"], row["device"], row["torch"]) for row in kept}) == 1
    rows = json.loads((tmp_path / "mssa.json").read_text())
    for row in rows["rows"]:
        if row["peer"] == "ours":
            row |= {"latency_ms": None, "red": True, "reason": "wrong"}
    (tmp_path / "mssa.json").write_text(json.dumps(rows))
    assert "| tiny, 1×70×2×32, forward + backward | **red** | **red** |" in update_readme.gpu_table(tmp_path)
    older = rows["rows"][0] | {"problem": "of another commit", "commit": "older"}
    (tmp_path / "mssa.json").write_text(json.dumps(rows | {"rows": [*rows["rows"], older]}))
    update_readme.take(rehearsal / "gpu_check_all.tar.gz", tmp_path)  # again: rows replace equal ones
    assert len(json.loads((tmp_path / "mssa.json").read_text())["rows"]) == len(rows["rows"])
    assert "1 of 4 kernel probes" in update_readme.gpu_table(tmp_path)
