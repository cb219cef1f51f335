"""The jobs that `gpu_check.py` runs in separate processes. Each writes its rows at once.

    python benchmarks/gpu_worker.py environment FILE      # lists all items in FILE; versions, ceilings
    python benchmarks/gpu_worker.py items FILE            # does the items of FILE
    python benchmarks/gpu_worker.py kernels               # six operators, for ncu

A worker writes the name of each item that it begins, which shows the item in which it ended. As a pytest plugin (`-p
gpu_worker`) this module writes a row for each test. Heavy modules are imported where they are used, so that a broken
one costs only its own rows.
"""

import argparse
import faulthandler
import json
import os
import sys
import time
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from gpu_report import NO_GPU, Rows

REHEARSED = bool(os.environ.get("GPU_CHECK_REHEARSE"))
ROUNDS = 1 if REHEARSED else 3
MEASUREMENT_MS = 1.0 if REHEARSED else 50.0
ATTENTION = ["tiny"] if REHEARSED else ["B16", "S16", "B8", "S8", "B8-480"]
ISTA = ["tiny"] if REHEARSED else ["B16", "B8"]
PROFILED = 30  # rows in a profile's table
COUNTED = (
    *("whole_head_forward", "whole_head_backward", "ista_forward"),
    *("attention_forward", "attention_backward", "weight_gradient"),
)


def pytest_runtest_logreport(report) -> None:
    """Write a row for each test; with pytest-xdist only in the main process."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    status = {"passed": "ok", "failed": "red", "skipped": "n/a"}[report.outcome]
    reason = None if report.passed else str(report.longrepr)[-1500:]
    Rows.of_environment().add(report.nodeid, status, reason, seconds=round(report.duration, 2))


def pytest_collectreport(report) -> None:
    """Write a row for a file of tests that cannot be imported."""
    if "PYTEST_XDIST_WORKER" not in os.environ and report.failed:
        Rows.of_environment().add(report.nodeid, "red", str(report.longrepr)[-1500:])


def pytest_runtest_logfinish() -> None:
    """End a pytest-xdist worker whose GPU no longer responds; pytest-xdist starts another."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"this test worker ends: {error}", file=sys.stderr, flush=True)
            os._exit(1)


# --- the environment ----------------------------------------------------------------------------------------------


def environment(rows: Rows) -> None:
    """Record the versions and the card, read the tile table, measure the ceilings."""
    run = _open_run()

    from crate_fast.kernels.launch import find

    rows.add("facts", "ok", facts=run.facts)
    try:
        find("attention_forward", run.device, "half", 64)  # reads the file of CRATE_FAST_TILES
        rows.add("tile table", "ok")
    except Exception as error:
        rows.fail("tile table", error)
    run.measure_ceilings()
    rows.add("ceilings", "ok", facts={key: run.facts[key] for key in ("matrix_tflops_per_s", "copy_gb_per_s")})


# --- lists of items -----------------------------------------------------------------------------------------------


def list_items(rows: Rows) -> dict[str, list[dict]]:
    """List the items by kind, the most important first; an error costs only its own kinds.

    Returns:
        "operators" and "compiled" (with compiled peers), "tiles", "probes", "models", "profile" and "more".
    """
    makers = {"operators": _operator_items, "tiles": _tile_items, "probes": _probe_items, "models": _model_items}
    found = {}
    for name, make in makers.items():
        try:
            found |= make()
        except Exception as error:
            rows.fail(f"list of {name}", error)
    return found


def _operator_items() -> dict[str, list[dict]]:
    """List by shape ours with all peers that are not compiled, and ours with each compiled peer."""
    import bench_ista
    import bench_mssa

    plain, compiled = [], []
    cases = [("mssa", shape, None, bench_mssa.PEERS) for shape in ATTENTION]
    for operator in bench_ista.OPERATORS:
        cases += [("ista", shape, operator, bench_ista.peers(operator)) for shape in ISTA]
    for kind, shape, operator, peers in cases:
        peers = [peer for peer in peers if not (REHEARSED and peer.compiles)]
        item = {"kind": kind, "shape": shape, "operator": operator}
        label = " ".join(filter(None, (kind, shape, operator)))
        plain.append(item | {"name": label, "peers": [peer.name for peer in peers if not peer.compiles]})
        for peer in peers:
            if peer.compiles:
                compiled.append(item | {"name": f"{label}: {peer.name}", "peers": ["ours", peer.name]})
    shapes = [*ATTENTION, *ISTA]  # by shape, so that a short run has each peer
    compiled.sort(key=lambda item: shapes.index(item["shape"]))
    return {"operators": plain, "compiled": compiled}


def _tile_items() -> dict[str, list[dict]]:
    import tile_search

    return {"tiles": tile_search.items()[: 3 if REHEARSED else None]}


def _probe_items() -> dict[str, list[dict]]:
    """List the probes, whose kernels fill the compilers' cache; the stage `probes` runs them later."""
    from crate_fast.probes import PROBES

    items = [{"name": f"probe {name}", "kind": "probe", "probe": name} for name in PROBES]
    for item, probe in zip(items, PROBES.values(), strict=True):
        half, sizes = probe.precision in ("bfloat16", "float16"), probe.sizes
        item["whole_heads"] = probe.kernel == "attention" and half and 64 <= sizes[1] <= 256 and 32 < sizes[3] <= 64
    return {"probes": items}


def _model_items() -> dict[str, list[dict]]:
    """List training steps of CRATE-B/16 and B/8; a profile; inference, growth, autoencoders and other models."""
    from bench_model import GROWTH, PEERS
    from model_problem import COMPILED, GRAPHS, INFERENCE, OURS, RELEASED, TRAINING, VIT

    def item(table: str, model: str, what: str, peers: list[str]) -> dict:
        name = f"{model}, {what}" + (f": {peers[-1]}" if peers[-1].endswith((COMPILED, GRAPHS)) else "")
        return {"name": name, "kind": "model", "table": table, "shape": model, "what": what, "peers": peers}

    profiled = {"name": "profile", "kind": "profile", "shape": "B/16"}
    if REHEARSED:
        more = [item("growth", "N = 17", INFERENCE, [OURS]), item("model", "tiny MAE", TRAINING, [OURS])]
        models = [item("crate", "tiny", TRAINING, [OURS, RELEASED])]
        return {"models": models, "profile": [profiled | {"shape": "tiny"}], "more": more}
    compiled = [name for name in PEERS["crate"] if name.endswith((COMPILED, GRAPHS))]
    plain = [name for name in PEERS["crate"] if name not in compiled]
    compiled.sort(key=lambda name: not name.startswith(VIT))  # the peer of the goal first
    beside = [item("crate", "B/16", TRAINING, [OURS, name]) for name in compiled]
    models = [item("crate", "B/16", TRAINING, plain), *beside[:1], item("crate", "B/8", TRAINING, plain), *beside[1:]]
    models += [item("crate", "α-B/16", TRAINING, [OURS, RELEASED + COMPILED])]
    more = [item("crate", "B/16", INFERENCE, plain)]
    more += [item("growth", n, what, PEERS["growth"]) for what in (INFERENCE, TRAINING) for n in GROWTH]
    more += [item("crate", model, TRAINING, [OURS, OURS + GRAPHS]) for model in ("T/16", "S/8")]  # eager: host-bound
    more += [item("model", "CRATE-MAE-B", TRAINING, PEERS["model"])]
    more += [item("crate", model, TRAINING, plain) for model in ("α-B/16", "S/8", "T/16", "L/16")]
    return {"models": models, "profile": [profiled], "more": more}


# --- items --------------------------------------------------------------------------------------------------------


def _open_run():
    """Open a `harness.Run` with few rounds and short measurements."""
    import harness

    run = harness.open_run(argparse.Namespace(smoke=REHEARSED, dtype=None, rounds=ROUNDS, output=Path(".")))
    run.rounds, run.measurement_ms = ROUNDS, MEASUREMENT_MS
    return run


def _model_size(table: str, name: str):
    import bench_model

    return (bench_model.SMOKE if REHEARSED else bench_model.MODELS)[table][name]


class Worker:
    """Mode ("warm" or "time"), rows and run of a worker; the run opens and measures its ceilings at first use.

    The method of an item's kind does the item. It writes rows or raises an exception.
    """

    def __init__(self, mode: str, rows: Rows):
        self.mode, self.rows = mode, rows

    @cached_property
    def run(self):
        """The benchmarks' run."""
        run = _open_run()
        if self.mode == "time":
            run.measure_ceilings()
        return run

    def alive(self) -> bool:
        """Return False if the GPU no longer responds to this process."""
        if "run" not in vars(self):  # it does not open; each item has the error in its row
            return True
        try:
            self.run.synchronize()
        except Exception:  # any error of the driver; another process continues
            return False
        return True

    def mssa(self, item: dict) -> None:
        """Measure subspace attention and its peers."""
        import bench_mssa as bench

        self._operator(item, bench, bench.PEERS)

    def ista(self, item: dict) -> None:
        """Measure the ISTA step, alone or after a LayerNorm, and its peers."""
        import bench_ista as bench

        self._operator(item, bench, bench.peers(item["operator"]), item["operator"])

    def _operator(self, item: dict, bench, peers: list, *operator: str) -> None:
        from measuring import measure_peers

        shape = (bench.SMOKE if REHEARSED else bench.SHAPES)[item["shape"]]
        problem = bench.make_problem(item["shape"], shape, *operator, self.run)
        peers = [peer for peer in peers if peer.name in item["peers"]]
        if self.mode == "time":
            self.rows.measured(item["name"], item["kind"], measure_peers(problem, peers, self.run))
            return
        for peer in peers:
            try:
                problem.results(peer.build())
                self.run.synchronize()
            except Exception as error:
                self.rows.fail(f"{item['name']}, {peer.name}", error, red=peer.ours)
                self.run.synchronize()

    def tile(self, item: dict) -> None:
        """Compile or time a candidate of the tile search."""
        import tile_search
        from gpu_report import kept_of

        kept = kept_of(item)
        try:
            found = tile_search.warm(item) if self.mode == "warm" else tile_search.time_tile(item, self.run)
        except Exception as error:  # it does not compile, does not fit, or is wrong
            self.run.synchronize()
            self.rows.fail(item["name"], error, red=item["present"], **kept)
        else:
            self.rows.add(item["name"], "ok", **kept, **found)

    def probe(self, item: dict) -> None:
        """Compile a probe's kernels; the stage `probes` checks them."""
        from crate_fast.probes import find_probe, run_probe

        status = run_probe(find_probe(item["probe"]), self.run.device, reruns=0)["status"]
        if status != "right":  # this process may no longer use the GPU
            raise RuntimeError(status)

    def model(self, item: dict) -> None:
        """Measure a pass of a whole model and its peers."""
        import bench_model
        from model_problem import make_problem, peers

        run, size = self.run, _model_size(item["table"], item["shape"])
        if self.mode == "warm":
            problem = make_problem(item["shape"], size, item["what"], run)
            for peer in peers(problem, item["peers"], run):
                peer.build().step()
            run.synchronize()
            return
        rows = bench_model.measure_one(item["shape"], size, item["what"], item["peers"], run)
        self.rows.measured(item["name"], item["table"], rows)

    def profile(self, item: dict) -> None:
        """Write the table of PyTorch's profiler for one training step."""
        from model_problem import OURS, TRAINING, Trial, make_problem
        from torch.profiler import ProfilerActivity, profile

        run = self.run
        problem = make_problem(item["shape"], _model_size("crate", item["shape"]), TRAINING, run)
        trial = Trial(problem, OURS, problem.cast)
        for _ in range(1 if REHEARSED else 5):
            trial.step()
        run.synchronize()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.on_gpu else [])]
        with profile(activities=activities) as trace:
            start = time.perf_counter()
            trial.step()
            run.synchronize()
            span_us = round(1e6 * (time.perf_counter() - start))
        order = "self_device_time_total" if run.on_gpu else "self_cpu_time_total"
        self.rows.add(item["name"], "ok", span_us=span_us, table=trace.key_averages().table(order, PROFILED))

    def crash(self, item: dict) -> None:
        """Abort, as a fault of the rehearsal that cannot be caught."""
        os.abort()


def work_through(work: dict, worker: Worker) -> None:
    """Do items in turn until the time is up; raise SystemExit if the GPU no longer responds to this process.

    Args:
        work: "items"; "begun", a file for the name of each item that begins, and an empty line at the end; "until",
            the time after which none begins; "stall_s", the limit of an item.
    """

    def begin(name: str) -> None:
        with open(work["begun"], "a") as file:
            file.write(f"{name}\n")

    # before an item begins: imports and opening the GPU take longer than the limit of some items
    import measuring  # noqa: F401

    with suppress(Exception):  # the first item has the same error in its row
        worker.run.synchronize()
    for item in work["items"]:
        if time.time() >= work["until"]:
            break
        begin(item["name"])
        start = time.perf_counter()
        faulthandler.dump_traceback_later(max(1.0, work["stall_s"] - 1))  # shows where it hangs before it is killed
        try:
            getattr(worker, item["kind"])(item)
            if worker.mode == "warm" and item["kind"] != "tile":  # tiles have their own rows
                worker.rows.add(f"compiled: {item['name']}", "ok", seconds=round(time.perf_counter() - start, 2))
            if item["kind"] != "tile":  # tensors of tiles are kept
                worker.run.free_memory()
        except Exception as error:
            print(f"{item['name']}: {type(error).__name__}: {error}"[:600], file=sys.stderr, flush=True)
            if not worker.alive():
                raise SystemExit(f"{item['name']} has poisoned this process") from error
            worker.rows.fail(item["name"], error, red=worker.mode == "time")
    begin("")
    faulthandler.cancel_dump_traceback_later()


def kernels(until: float) -> None:
    """Run each counted operator once, between cudaProfilerStart and -Stop, as long as there is time."""
    import tile_search
    import torch

    from crate_fast.kernels.launch import find

    for kernel in COUNTED:
        tile = find(kernel, torch.device("cuda"), "half", 64 if kernel.startswith(("attention", "whole_head")) else 0)
        if tile is None or time.time() >= until:
            continue
        problem = tile_search.problems(kernel)[0]
        problem.call(tile)
        torch.cuda.synchronize()
        with torch.cuda.profiler.profile():
            problem.call(tile)
            torch.cuda.synchronize()
        tile_search.problems.cache_clear()


def main(argv: list[str] | None = None) -> int:
    """Do one job of `gpu_check.py`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("environment", "items", "kernels"))
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--until", type=float, default=float("inf"))
    options = parser.parse_args(argv)
    faulthandler.enable()
    if options.job == "kernels":
        kernels(options.until)
        return 0
    rows = Rows.of_environment()
    if options.job == "items":
        from torch._inductor import config

        work = json.loads(options.file.read_text())
        os.nice(work["nice"])
        if work["mode"] == "warm":  # choices made beside other work are not kept, except a graph's products
            config.autotune_local_cache = False
        else:
            config.triton.cudagraph_or_error = True  # else a row of CUDA graphs could be one without
        work_through(work, Worker(work["mode"], rows))
    else:
        import torch

        if not (REHEARSED or torch.cuda.is_available()):
            raise SystemExit(NO_GPU)
        options.file.write_text(json.dumps(list_items(rows)))
        environment(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
