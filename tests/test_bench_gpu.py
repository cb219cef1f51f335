"""The GPU benchmarks as far as a CPU can tell: smoke runs, mutants of ours, floors, peers that fail, tables."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bench_ista
import bench_mssa
import gpu
import gpu_timing
import harness
import pytest
import torch
import torch.nn.functional as F
import update_readme

from crate_fast.functional import ista
from crate_fast.reference import subspace_attention_reference

BENCHMARKS = Path(gpu.__file__).parent
BOTH = "forward + backward"


@pytest.fixture
def run(tmp_path) -> gpu.Run:
    """A smoke run in fp32 with ceilings of 100 TFLOP/s and 1,000 GB/s."""
    options = argparse.Namespace(smoke=True, dtype="float32", rounds=2, output=tmp_path, commit=None)
    opened = gpu.open_run(options)
    opened.ceilings = gpu_timing.Ceilings(100.0, 1000.0)
    opened.facts |= {"matrix_tflops_per_s": 100.0, "copy_gb_per_s": 1000.0}
    return opened


def _results() -> set[tuple[str, float]]:
    return {(path.name, path.stat().st_mtime) for path in harness.RESULTS.iterdir()}


# --- smoke runs ----------------------------------------------------------------------------------------------------


def _check_table(text: str, problems: list[str], passes: list[str], peers: list[gpu.Peer]) -> None:
    assert "The times below mean nothing" in text
    for problem in problems:
        for what in passes:
            for peer in peers:
                (line,) = [
                    line for line in text.splitlines() if line.startswith(f"| {problem} | {what} | {peer.name} |")
                ]
                assert (" n/a " in line) == (not peer.ours and not peer.smoke)


def test_a_smoke_run_of_attention_without_the_interpreters_flag():
    before = _results()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHMARKS / "bench_mssa.py"), "--smoke"]
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    _check_table(text, list(bench_mssa.SMOKE), ["forward", "backward", BOTH], bench_mssa.PEERS)
    assert _results() == before


@pytest.mark.parametrize("autocast", [[], ["--autocast"]], ids=["plain", "autocast"])
def test_a_smoke_run_of_ista(capsys, autocast):
    before = _results()
    assert bench_ista.main(["--smoke", *autocast]) == 0
    problems = [f"tiny {operator}" for operator in bench_ista.OPERATORS]
    passes = ["forward", "backward", BOTH]
    _check_table(capsys.readouterr().out, problems, passes, bench_ista.training_peers("ista"))
    assert _results() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("benchmark_module", [bench_mssa, bench_ista])
def test_without_a_gpu_the_cpu_path_is_measured_under_a_name_of_its_own(
    benchmark_module, monkeypatch, tmp_path, capsys
):
    tiny = bench_mssa.Shape(1, 2, 33, 32) if benchmark_module is bench_mssa else bench_ista.Shape(70, 32)
    monkeypatch.setattr(benchmark_module, "CPU_SHAPES", {"tiny": tiny})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert benchmark_module.main(["--rounds", "1", "--output", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*_cpu.json")
    rows = json.loads(file.read_text())["rows"]
    assert all(row["latency_ms"] > 0 and row["dtype"] == "float32" for row in rows)
    assert "GFLOP/s" in file.with_suffix(".md").read_text()
    with pytest.raises(SystemExit):
        benchmark_module.main(["--shapes", "B8"])
    assert "--shapes B8: on this device there are tiny" in capsys.readouterr().err


# --- ours is judged ------------------------------------------------------------------------------------------------


def _attend(w, scale=1.0, dropped=0, detach=False):
    keys = w.detach() if detach else w
    keys = keys[:, : w.shape[1] - dropped].transpose(1, 2)
    logits = scale * w.shape[-1] ** -0.5 * w.transpose(1, 2) @ keys.transpose(-1, -2)
    return (logits.softmax(-1) @ keys).transpose(1, 2)


def _unsteady(w, calls=iter(range(100))):  # noqa: B008  (one counter is meant)
    return _attend(w) + 1e-9 * next(calls)


ATTENTION_MUTANTS = {
    "scale": lambda w: _attend(w, scale=1.02),
    "last key": lambda w: _attend(w, dropped=1),
    "gradient path": lambda w: _attend(w, detach=True),
    "identity": lambda w: w.clone(),
    "uniform": lambda w: w.mean(1, keepdim=True).expand_as(w),
    "unsteady": _unsteady,
}


def _reason(problem, function, run) -> str | None:
    """Why ours is red, where `function` takes its place; None where it is right."""
    row = gpu.measure(problem, [gpu.Peer("ours", lambda: function, ours=True)], run)[0]
    assert (row["latency_ms"] is None) == (row["reason"] is not None) == row.get("red", False)
    return row["reason"]


def test_attention_that_is_right_has_times(run):
    problem = bench_mssa.make_problem("right", bench_mssa.Shape(3, 2, 65, 32), run)
    assert _reason(problem, _attend, run) is None


@pytest.mark.parametrize("mutant", ATTENTION_MUTANTS)
def test_a_mutant_of_attention_is_red(run, mutant):
    problem = bench_mssa.make_problem(mutant, bench_mssa.Shape(3, 2, 65, 32), run)
    reason = _reason(problem, ATTENTION_MUTANTS[mutant], run)
    assert ("other bits" if mutant == "unsteady" else "what is allowed") in reason


def test_the_truth_is_the_references_whichever_heads_are_checked(run, monkeypatch):
    problem = bench_mssa.make_problem("truth", bench_mssa.Shape(2, 3, 33, 32), run)
    w = problem.inputs[0].detach().double().requires_grad_()
    expected = subspace_attention_reference(w)
    (dw,) = torch.autograd.grad(expected, w, problem.grad.double())
    torch.testing.assert_close(problem.expected[1], [expected.detach(), dw])
    monkeypatch.setattr(bench_mssa, "CHECKED_LOGITS", 0)  # as for long sequences: first and last head
    problem = bench_mssa.make_problem("long", bench_mssa.Shape(3, 3, 33, 32), run)
    assert problem.expected[1][0].shape == (2, 33, 2, 32)
    assert _reason(problem, _attend, run) is None
    assert "what is allowed" in _reason(problem, ATTENTION_MUTANTS["scale"], run)


ISTA_MUTANTS = {
    "step size": lambda x, d: ista(x, d, 0.102),
    "no threshold": lambda x, d: ista(x, d, sparsity=0.0),
    "transposed dictionary": lambda x, d: ista(x, d.t()),
    "no gradient of D": lambda x, d: ista(x, d.detach()) + 0.0 * d.sum(),
}


def test_ista_that_is_right_has_times(run):
    problem = bench_ista.make_problem("right", bench_ista.Shape(150, 64), "ista", run, False)
    assert _reason(problem, ista, run) is None


@pytest.mark.parametrize("mutant", ISTA_MUTANTS)
def test_a_mutant_of_ista_is_red(run, mutant):
    problem = bench_ista.make_problem(mutant, bench_ista.Shape(150, 64), "ista", run, False)
    assert "what is allowed" in _reason(problem, ISTA_MUTANTS[mutant], run)


def test_where_ours_is_red_the_peers_have_their_times(monkeypatch, capsys):
    monkeypatch.setattr(bench_mssa, "subspace_attention", lambda w, backend: _attend(w, scale=1.02))
    monkeypatch.setattr(bench_ista, "ista", lambda x, d, backend, **options: ista(x, d.t(), **options))
    assert bench_mssa.main(["--smoke"]) == 1
    assert bench_ista.main(["--smoke"]) == 1
    text = capsys.readouterr().out
    for line in text.splitlines():
        if re.match(r"\| (tiny|padded|tiny ista) \| .*ward \| ours \|", line):
            assert "| **red** |" in line
        if "| SDPA, flash |" in line or "| one product, cuBLAS |" in line:
            assert "n/a" not in line
            assert "red" not in line
    assert "* **red**: tiny, ours: Wrong: the error of O is" in text


# --- floors --------------------------------------------------------------------------------------------------------


def test_attentions_work_is_counted_as_stated(run):
    shape = bench_mssa.Shape(2, 3, 70, 48)
    work = bench_mssa.make_problem("work", shape, run).work
    nominal = 70**2 * 48 * 3 * 2
    assert (work["forward"].flops, work["backward"].flops) == (4 * nominal, 10 * nominal)
    tokens = 4 * 2 * 70 * 3 * 48
    assert (work["forward"].moved_bytes, work["backward"].moved_bytes) == (2 * tokens, 4 * tokens)
    assert work[BOTH] == work["forward"] + work["backward"]


def test_istas_work_is_counted_as_stated(run):
    work = bench_ista.make_problem("work", bench_ista.Shape(70, 48), "norm_ista", run, False).work
    product, fold = 2 * 70 * 48**2, 2 * 48**3
    assert (work["forward"].flops, work["backward"].flops) == (product + fold, 2 * product + fold)
    assert work["forward"].moved_bytes == 4 * (2 * 70 * 48 + 48**2)


def test_a_floor_is_the_longer_of_arithmetic_and_bytes():
    ceilings = gpu_timing.Ceilings(100.0, 1000.0)
    assert ceilings.floor_ms(1e12, 1e6) == pytest.approx(10.0)
    assert ceilings.floor_ms(1e9, 1e9) == pytest.approx(1.0)


def test_istas_gradient_is_zero_where_rounding_decides(run):
    run.dtype = torch.bfloat16
    problem = bench_ista.make_problem("clear", bench_ista.Shape(500, 64), "ista", run, False)
    x, dictionary = (tensor.detach().double() for tensor in problem.inputs)
    argument = x + 0.1 * (x @ dictionary - x @ dictionary.t() @ dictionary) - 0.01
    near = argument.abs() <= 4 * torch.finfo(torch.bfloat16).eps
    assert 0 < near.double().mean() < 0.05
    assert not problem.grad[near].any()
    assert (problem.grad[~near] != 0).double().mean() > 0.99


# --- peers and timing ----------------------------------------------------------------------------------------------


def test_a_peer_that_fails_or_is_wrong_is_not_dropped(run):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory")

    late = iter([False] * 2 + [True] * 100)

    def fails_later(w):
        return fail() if next(late) else _attend(w)

    peers = [
        gpu.Peer("ours", lambda: _attend, ours=True),
        gpu.Peer("fails", fail, smoke=True),
        gpu.Peer("fails later", lambda: fails_later, smoke=True),
        gpu.Peer("wrong", lambda: lambda w: _attend(w, scale=3.0), smoke=True),
        gpu.Peer("right", lambda: _attend, smoke=True),
        gpu.Peer("left out", fail),
    ]
    problem = bench_mssa.make_problem("p", bench_mssa.Shape(1, 2, 33, 32), run)
    run.rows = gpu.measure(problem, peers, run)
    assert len(run.rows) == 3 * len(peers)
    reasons = {row["peer"]: row["reason"] for row in run.rows}
    assert "out of memory" in reasons["fails"]
    assert "out of memory" in reasons["fails later"]
    assert "differs from float64" in reasons["wrong"]
    assert reasons["right"] is None
    for row in run.rows:
        assert (row["latency_ms"] is None) == (row["reason"] is not None)
        assert row.keys() >= {
            "commit",
            "device",
            "driver",
            "torch",
            "triton",
            "ptxas",
            "dtype",
            "floor_ms",
            "n_tokens",
        }
    assert "* n/a: p, wrong:" in gpu.times(run.rows)

    peers[0] = gpu.Peer("ours", fail, ours=True)
    rows = {row["peer"]: row for row in gpu.measure(problem, peers, run)}
    assert rows["ours"]["red"]
    assert "out of memory" in rows["ours"]["reason"]
    assert rows["right"]["latency_ms"] > 0
    assert rows["right"]["ours_faster"] is None


def test_another_form_of_ours_that_fails_is_red_too(run):
    def fail():
        raise RuntimeError("no")

    problem = bench_mssa.make_problem("p", bench_mssa.Shape(1, 2, 33, 32), run)
    peers = [
        gpu.Peer("ours", lambda: _attend, ours=True),
        gpu.Peer("ours, blocks of rows", lambda: lambda w: _attend(w, scale=3.0), smoke=True),
        gpu.Peer("SDPA", fail, smoke=True),
    ]
    rows = {row["peer"]: row for row in gpu.measure(problem, peers, run)}
    assert [rows[peer.name].get("red", False) for peer in peers] == [False, True, False]


def test_a_poisoned_process_measures_nothing_more(run, monkeypatch):
    def fail():
        raise RuntimeError("an illegal memory access was encountered")

    problem = bench_mssa.make_problem("p", bench_mssa.Shape(1, 2, 33, 32), run)
    monkeypatch.setattr(run.timer, "synchronize", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gpu.measure(problem, [gpu.Peer("ours", fail, ours=True), gpu.Peer("right", lambda: _attend)], run)


def test_peers_that_write_all_logits_are_kept_from_filling_the_memory(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))
    run.device, run.smoke = torch.device("cuda"), False
    peer = gpu.Peer("eager", lambda: _attend, quadratic=True)
    problem = SimpleNamespace(logits_bytes=9 * 2**30)
    assert "9 of 80 GiB" in gpu._unfit(peer, problem, run)
    problem.logits_bytes = 7 * 2**30
    assert gpu._unfit(peer, problem, run) is None


def test_a_call_is_timed_between_events_with_its_argument_made_before(pretended_gpu):
    seen = []
    step = gpu_timing.Step(lambda argument: seen.append(f"call {argument}"), lambda: seen.append("prepare") or "it")
    assert pretended_gpu.sample(step, 2, 3) == [1.0, 1.0]
    assert seen == ["prepare", "call it"] * 2
    plan = pretended_gpu.plan(step)
    assert plan.calls == 50  # 1 ms and one overwriting of the cache of 1 ms: 100 ms in all
    assert plan.flushes == 1
    assert pretended_gpu.peak_mib(lambda: None) == 2.0


def test_a_whole_measurement_goes_the_gpus_way(pretended_gpu, run):
    run.timer = pretended_gpu
    problem = bench_mssa.make_problem("p", bench_mssa.Shape(1, 1, 17, 32), run)
    peers = [gpu.Peer("ours", lambda: _attend, ours=True), gpu.Peer("right", lambda: _attend, smoke=True)]
    rows = gpu.measure(problem, peers, run)
    assert [row["latency_ms"] for row in rows] == [1.0] * 6
    assert all(row["peak_mib"] == 2.0 and row["calls"] == 100 for row in rows)


# --- results -------------------------------------------------------------------------------------------------------


def _measure_all(run) -> None:
    """Results of both benchmarks in the run's folder, as a real run writes them, of tiny problems."""
    run.smoke = False
    attention = bench_mssa.make_problem("B16", bench_mssa.Shape(1, 2, 17, 32), run)
    eager = [peer for peer in bench_mssa.PEERS if peer.smoke]
    run.rows = gpu.measure(attention, [gpu.Peer("ours", lambda: _attend, ours=True), *eager], run)
    gpu.report("mssa", run, quiet=True)
    step = bench_ista.make_problem("B16", bench_ista.Shape(70, 64), "ista", run, False)
    eager = [peer for peer in bench_ista.training_peers("ista") if peer.smoke]
    run.rows = gpu.measure(step, [gpu.Peer("ours", lambda: ista, ours=True), *eager], run)
    gpu.report("ista", run, quiet=True)


def test_the_readmes_gpu_table_comes_from_the_results(run, tmp_path, monkeypatch, capsys):
    marked = "a\n<!-- gpu-table:begin -->\nold\n<!-- gpu-table:end -->\nb\n"
    monkeypatch.setattr(update_readme, "gpu_table", lambda: update_readme.NOT_MEASURED)
    assert update_readme.updated(marked) == marked.replace("old\n", update_readme.NOT_MEASURED)
    monkeypatch.undo()
    monkeypatch.setattr(gpu_timing, "MEASUREMENT_MS", 2.0)
    assert update_readme.gpu_table(tmp_path) == update_readme.NOT_MEASURED

    _measure_all(run)
    content = json.loads((tmp_path / "mssa.json").read_text())
    assert content["rows"][0]["peer"] == "ours"
    assert f"commit {content['commit']}" in (tmp_path / "mssa.md").read_text()
    table = update_readme.gpu_table(tmp_path)
    assert "| B16, 1×17×2×32 |" in table
    assert "| B16 ista, 70×64 |" in table
    assert "| n/a |" in table  # the compiled peers, which this run did not have
    assert "100 TFLOP/s" in table
    assert update_readme.main(["--show", str(tmp_path)]) == 0
    assert table in capsys.readouterr().out


def test_layer_norm_is_in_front_of_every_peer():
    x, weight, bias = torch.randn(5, 8), torch.rand(8), torch.randn(8)
    dictionary = torch.randn(8, 8)
    expected = bench_ista._released(F.layer_norm(x, (8,), weight, bias), dictionary)
    for peer in bench_ista.training_peers("norm_ista"):
        if not peer.ours and not peer.compiles:
            torch.testing.assert_close(peer.build()(x, weight, bias, dictionary), expected, rtol=1e-4, atol=1e-5)
    for peer in bench_ista.inference_peers("norm_ista", dictionary):
        if not peer.ours and not peer.compiles:
            torch.testing.assert_close(peer.build()(x, weight, bias, dictionary), expected, rtol=1e-4, atol=1e-5)
