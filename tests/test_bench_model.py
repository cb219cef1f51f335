"""The benchmarks of whole models and of operators on a CPU: smoke runs, gates, failing peers, operations, tables."""

import itertools
import json
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import harness

import bench_ista
import bench_model
import bench_mssa
import gpu_report
import measuring
import model_problem
import pytest
import torch
from measuring import Peer, measure_peers
from model_problem import COMPILED, INFERENCE, OURS, RELEASED, TRAINING, UNFUSED, VISIBLE, VIT, Size, make_problem

from crate_fast.functional import ista
from crate_fast.reference import subspace_attention_reference
from crate_fast.train.cost import count_flops

TINY = Size(32, 2, 2, 16, batch=3, image=64, classes=10)  # 17 tokens, 51 in the batch


def test_the_smoke_run_measures_every_peer_of_every_table_and_writes_nothing(capsys, monkeypatch):
    monkeypatch.setattr(harness, "write_results", None)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)  # test_benchmarks.py: compiled peers
    assert bench_model.main(["--smoke"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for table, sizes in bench_model.SMOKE.items():
        for model, what, peer in itertools.product(sizes, bench_model.PASSES[table], bench_model.PEERS[table]):
            (line,) = [line for line in lines if line.startswith(f"| {model} | 2 | {what} | {peer} |")]
            assert "n/a" not in line


def _measure(table, sizes, run) -> bool:
    """Measure into the run's rows; return True unless one is red."""
    run.rows = [row for name, size in sizes.items() for row in bench_model.measure(table, name, size, run)]
    return not any(row.get("red") for row in run.rows)


def test_only_the_named_models_are_measured(run, monkeypatch):
    measured = {}
    monkeypatch.setattr(harness, "open_run", lambda _: replace(run, smoke=False))
    monkeypatch.setattr(harness.Run, "on_gpu", True)
    monkeypatch.setattr(harness.Run, "measure_ceilings", lambda _: None)
    monkeypatch.setattr(harness.Run, "report", lambda *_, **__: None)
    monkeypatch.setattr(
        bench_model, "measure", lambda table, name, *_: measured.setdefault(table, []).append(name) or []
    )
    assert bench_model.main(["--models", "N = 785", "B/16", "T/16"]) == 0
    assert measured == {"crate": ["B/16", "T/16"], "growth": ["N = 785"]}


def test_benchmarked_models_have_the_papers_sizes():
    models = {name: model_problem.meta_model(OURS, size) for name, size in bench_model.CRATES.items() if "16" in name}
    counts = {name: round(sum(p.numel() for p in model.parameters()) / 1e6, 2) for name, model in models.items()}
    assert counts == {"T/16": 6.09, "S/16": 13.12, "B/16": 22.80, "L/16": 77.64, "α-B/16": 72.33}
    assert [size.n_tokens for size in bench_model.GROWTH.values()] == [197, 785, 3601, 16385]


def test_a_measurement_on_a_gpu_fills_every_column(pretended_gpu, monkeypatch):
    run = pretended_gpu
    monkeypatch.setitem(bench_model.PEERS, "crate", [OURS])
    assert _measure("crate", {"tiny": TINY}, run)
    known = {"latency_ms": 1.0, "calls": 5, "peak_mib": 2.0, "images_per_s": 3000}
    for row in run.rows:
        assert known.items() <= row.items()
        assert row["mfu"] == pytest.approx(row["flops"] / 1e9)


class _Scaled(model_problem.CRATE):
    def __init__(self, **options):
        super().__init__(**options)
        self.transformer.layers[1][0].fn.scale *= 1.2


class _Stepped(model_problem.CRATE):
    def __init__(self, **options):
        super().__init__(**options)
        self.transformer.layers[0][1].fn.step_size *= 1.02


class _Detached(model_problem.CRATE):
    def embed(self, images):
        tokens = super().embed(images)
        return tokens.detach() + 0.0 * tokens


class _NotFinite(model_problem.CRATE):
    def forward(self, images):
        return super().forward(images) * float("nan")


def test_a_wrong_model_is_red_and_the_other_peers_have_numbers(run, monkeypatch):
    mutants = {32: _Scaled, 64: _Stepped, 96: _Detached, 128: _NotFinite}
    right = model_problem.CRATE
    monkeypatch.setattr(model_problem, "CRATE", lambda **options: mutants.get(options["dim"], right)(**options))
    sizes = {mutant.__name__: replace(TINY, width=width) for width, mutant in mutants.items()}
    sizes["right"] = replace(TINY, width=48)
    monkeypatch.setitem(bench_model.PEERS, "model", [OURS, RELEASED])
    assert not _measure("model", sizes, run)
    for row in run.rows:
        wrong = row["model"] != "right" and row["peer"] == OURS
        assert wrong == (row["latency_ms"] is None) == row.get("red", False), row["model"]
        assert not wrong or "WrongResult: " in row["reason"]
    assert "* **red**: _Scaled, training step, ours: WrongResult" in gpu_report.times(run.rows)


def test_a_wrong_autoencoder_gives_no_numbers(run, monkeypatch, capsys):
    size, forward = replace(TINY, masked=True), model_problem.ReleasedCRATEMAE.forward
    wrong = lambda *a, **o: tuple(1.001 * value for value in forward(*a, **o))  # noqa: E731
    monkeypatch.setattr(model_problem.ReleasedCRATEMAE, "forward", wrong)
    assert not _measure("model", {"MAE": size}, run)
    assert "the peers disagree: output" in capsys.readouterr().err


def test_under_autocast_the_gate_passes_rounding_and_rejects_broken_models(run, monkeypatch):
    run.dtype = torch.bfloat16
    problem = make_problem("tiny", replace(TINY, width=64, batch=8), TRAINING, run)
    assert problem.cast == torch.bfloat16
    problem.gate(run)
    (ours,) = model_problem.peers(problem, [OURS], run)
    problem.check(ours, problem.results(ours.build()), None)
    for broken in (_Detached, _NotFinite):
        monkeypatch.setattr(model_problem, "CRATE", broken)
        with pytest.raises(measuring.WrongResult):
            problem.check(ours, problem.results(ours.build()), None)


def test_if_the_released_form_runs_out_of_memory_ours_is_compared_with_pytorchs_path(run, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model_problem.ReleasedCRATE, "forward", out_of_memory)
    assert _measure("growth", {"tiny": TINY}, run)
    assert all(row["compared_with"] == UNFUSED for row in run.rows)
    assert all((row["latency_ms"] is None) == (row["peer"] == RELEASED) for row in run.rows)


def _work(peer: str, size: Size, what: str, dtype: torch.dtype = torch.float32) -> measuring.Cost:
    return model_problem.cost(peer, size, what, dtype)


def test_a_batch_has_the_operations_of_its_images():
    for kind, forms in ((OURS, (OURS, RELEASED)), (VIT, (VIT,))):
        flops = count_flops(model_problem.meta_model(kind, TINY), TINY.image)
        for peer in (form + suffix for form in forms for suffix in ("", COMPILED)):
            found = _work(peer, TINY, INFERENCE).flops, _work(peer, TINY, TRAINING).flops
            assert found == (3 * flops.forward, 3 * flops.step)


def test_bytes_of_models_by_hand():
    weights = 4 * sum(p.numel() for p in model_problem.build_model(OURS, TINY).parameters())
    images, outputs = 4 * 3 * 3 * 64 * 64, 2 * 3 * 17 * 32 * 2
    assert _work(OURS, TINY, INFERENCE, torch.bfloat16).moved_bytes == images + weights + 2 * outputs
    assert _work(OURS, TINY, TRAINING, torch.bfloat16).moved_bytes == images + 10 * weights + 5 * outputs
    size = replace(bench_model.MAES["CRATE-MAE-T"], depth=4)
    whole, visible = (_work(peer, size, TRAINING) for peer in (OURS, VISIBLE))
    assert visible.flops < 0.75 * whole.flops
    activations = 5 * 4 * size.batch * size.width
    assert whole.moved_bytes - visible.moved_bytes == activations * size.depth * 147  # hidden in the encoder
    assert _work(RELEASED, size, TRAINING) == whole


# --- operators: smoke runs, wrong kernels, floors, failing peers, tables ---

BOTH = "forward + backward"


@pytest.mark.parametrize("bench", [bench_mssa, bench_ista])
def test_a_smoke_run_measures_its_peers_and_writes_nothing(bench, capsys, monkeypatch):
    monkeypatch.setattr(harness, "write_results", None)
    assert bench.main(["--smoke"]) == 0
    text = capsys.readouterr().out
    problems, peers = list(bench_mssa.SMOKE), bench_mssa.PEERS
    if bench is bench_ista:
        problems, peers = ["tiny ista", "tiny norm_ista"], bench_ista.peers("ista")
    elsewhere = () if torch.cuda.is_available() else ("SDPA, cuDNN", "SDPA, efficient")  # only on a GPU
    for problem, what, peer in itertools.product(problems, ("forward", BOTH), peers):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {problem} | {what} | {peer.name} |")]
        assert (" n/a " in line) == (peer.compiles or peer.name in elsewhere)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("benchmark_module", [bench_mssa, bench_ista])
def test_without_a_gpu_the_results_are_named_cpu(benchmark_module, monkeypatch, tmp_path, capsys):
    tiny = bench_mssa.Shape(1, 2, 33, 32) if benchmark_module is bench_mssa else bench_ista.Shape(70, 32)
    monkeypatch.setattr(benchmark_module, "CPU_SHAPES", {"tiny": tiny})
    with pytest.raises(SystemExit, match="TRITON_INTERPRET is set"):
        benchmark_module.main([])
    monkeypatch.setattr(harness, "INTERPRETED", False)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(harness, "MEASUREMENT_MS", 2.0)
    rates = {"matrix_tflops_per_s": 1.0, "copy_gb_per_s": 100.0}
    monkeypatch.setattr(harness.Run, "measure_ceilings", lambda run: run.facts.update(rates))
    assert benchmark_module.main(["--rounds", "1", "--output", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*_cpu.json")
    rows = json.loads(file.read_text())["rows"]
    assert all(row["latency_ms"] > 0 and row["dtype"] == "float32" for row in rows)
    assert "GFLOP/s" in file.with_suffix(".md").read_text()
    with pytest.raises(SystemExit):
        benchmark_module.main(["--shapes", "B8"])
    assert "--shapes B8: on this device there are tiny" in capsys.readouterr().err


def _attend(w, scale=1.0):
    return subspace_attention_reference(w, scale * w.shape[-1] ** -0.5)


def _reason(problem, function, run) -> str | None:
    """Return why `function` is red as ours, or None if it is right."""
    row = measure_peers(problem, [Peer("ours", lambda: function)], run)[0]
    assert (row["latency_ms"] is None) == (row["reason"] is not None) == row.get("red", False)
    return row["reason"]


def test_the_gate_compares_ours_with_the_float64_reference_and_with_a_second_run(run, monkeypatch):
    problem = bench_mssa.make_problem("truth", bench_mssa.Shape(2, 3, 33, 32), run)
    calls = itertools.count()
    assert "other bits" in _reason(problem, lambda w: _attend(w) + 1e-9 * next(calls), run)
    w = problem.drawn.inputs[0].detach().double().requires_grad_()
    expected = subspace_attention_reference(w)
    (dw,) = torch.autograd.grad(expected, w, problem.drawn.grad.double())
    torch.testing.assert_close(problem.expected[1], [expected.detach(), dw])
    monkeypatch.setattr(bench_mssa, "CHECKED_LOGITS", 0)  # as for long sequences: first and last head
    problem = bench_mssa.make_problem("long", bench_mssa.Shape(3, 3, 33, 32), run)
    assert problem.expected[1][0].shape == (2, 33, 2, 32)
    assert _reason(problem, _attend, run) is None
    assert "what is allowed" in _reason(problem, partial(_attend, scale=1.02), run)


def test_if_ours_is_wrong_the_exit_status_is_1(monkeypatch, capsys):
    monkeypatch.setattr(bench_mssa, "subspace_attention", lambda w, backend: _attend(w, scale=1.02))
    monkeypatch.setattr(bench_ista, "ista", lambda x, d, backend, **options: ista(x, d.t(), **options))
    monkeypatch.setattr(bench_mssa, "SMOKE", {"tiny": bench_mssa.Shape(1, 1, 33, 32)})
    assert bench_mssa.main(["--smoke"]) == bench_ista.main(["--smoke"]) == 1
    assert "* **red**: tiny, ours: WrongResult: the error of O is" in capsys.readouterr().out


def test_operations_bytes_and_floors_by_hand(run):
    problem = bench_mssa.make_problem("cost", bench_mssa.Shape(2, 3, 70, 48), run)
    cost = problem.cost
    nominal = 70**2 * 48 * 3 * 2
    assert (cost["forward"].flops, cost[BOTH].flops) == (4 * nominal, 14 * nominal)
    tokens = 4 * 2 * 70 * 3 * 48
    assert (cost["forward"].moved_bytes, cost[BOTH].moved_bytes) == (2 * tokens, 6 * tokens)
    assert problem.cost_of(bench_mssa.PEERS[0], BOTH) == cost[BOTH]
    cost = bench_ista.make_problem("cost", bench_ista.Shape(70, 48), "norm_ista", run).cost
    product, fold = 2 * 70 * 48**2, 2 * 48**3
    assert (cost["forward"].flops, cost[BOTH].flops) == (product + fold, 3 * product + 2 * fold)
    assert cost["forward"].moved_bytes == 4 * (2 * 70 * 48 + 48**2)
    assert cost[BOTH].moved_bytes == 3 * cost["forward"].moved_bytes
    assert run.floor_ms(1e12, 1e6) == pytest.approx(1000.0)  # at 1 TFLOP/s and 100 GB/s
    assert run.floor_ms(1e9, 1e9) == pytest.approx(10.0)


def test_a_failing_or_wrong_peer_has_rows_with_the_reason_until_the_gpu_fails(run, monkeypatch):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory")

    late = iter([False] * 2 + [True] * 100)

    def fails_later(w):
        return fail() if next(late) else _attend(w)

    peers = [
        Peer("ours", lambda: _attend),
        Peer("fails", fail),
        Peer("fails later", lambda: fails_later),
        Peer("wrong", lambda: partial(_attend, scale=3.0)),
        Peer("right", lambda: _attend),
        Peer("left out", fail, compiles=True),
        Peer("ours, another form", lambda: partial(_attend, scale=3.0)),
    ]
    problem = bench_mssa.make_problem("p", bench_mssa.Shape(1, 2, 33, 32), run)
    run.rows = measure_peers(problem, peers, run)
    assert len(run.rows) == 2 * len(peers)
    reasons = {row["peer"]: row["reason"] for row in run.rows}
    assert all("out of memory" in reasons[name] for name in ("fails", "fails later"))
    assert "differs from float64" in reasons["wrong"]
    assert reasons["right"] is None
    assert {row["peer"] for row in run.rows if row.get("red")} == {"ours, another form"}
    assert all((row["latency_ms"] is None) == (row["reason"] is not None) for row in run.rows)
    assert run.rows[0].keys() >= {"commit", "device", "driver", "torch", "triton", "ptxas", "floor_ms", "n_tokens"}
    assert "* n/a: p, wrong:" in gpu_report.times(run.rows)
    peers[0] = Peer("ours", fail)
    rows = {row["peer"]: row for row in measure_peers(problem, peers, run)}
    assert rows["ours"]["red"]
    assert "out of memory" in rows["ours"]["reason"]
    assert rows["right"]["latency_ms"] > 0
    assert rows["right"]["ours_faster"] is None
    monkeypatch.setattr(harness.Run, "synchronize", lambda _: fail())  # the GPU no longer responds to this process
    with pytest.raises(torch.OutOfMemoryError):
        measure_peers(problem, peers, run)


def test_peers_are_measured_in_turn(run, monkeypatch):
    turns = []

    def attend(w, name):
        turns.append(name)
        return _attend(w)

    monkeypatch.setattr(harness.Run, "sample_ms", lambda _, call, graphed: [float(call() is not None)])
    problem, run.rounds = bench_mssa.make_problem("p", bench_mssa.Shape(1, 1, 33, 32), run), 3
    measure_peers(problem, [Peer(name, lambda name=name: partial(attend, name=name)) for name in "ab"], run)
    assert "".join(turns).endswith(2 * run.rounds * "ab")


def test_operators_on_a_gpu_are_timed_in_a_cuda_graph(pretended_gpu, monkeypatch):
    graph = Namespace(replay=lambda: seen.append("replay"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda captured: nullcontext(seen.append("capture")))
    for graphed, expected in ((False, ["call"]), (True, ["call", "capture", "call", "replay"])):
        seen = []
        assert pretended_gpu.sample_ms(lambda seen=seen: seen.append("call"), graphed) == 5 * [1.0]
        assert seen == expected
    monkeypatch.setattr(torch.cuda, "graph", Mock(side_effect=RuntimeError("it synchronises")))
    assert pretended_gpu.sample_ms(lambda: None, True) == 5 * [1.0]  # by the host's clock, and counted
    assert pretended_gpu.uncaptured == 1
    assert pretended_gpu.peak_mib(lambda: None) == 2.0
