"""The benchmark of whole models on a CPU: smoke run, gate, failing peers, operations, tables."""

import itertools
from argparse import Namespace
from dataclasses import replace

import harness

import bench_model
import gpu_report
import measuring
import model_problem
import pytest
import torch
from model_problem import COMPILED, INFERENCE, OURS, RELEASED, TRAINING, UNFUSED, VISIBLE, VIT, Size, make_problem

from crate_fast.train.cost import count_flops

TINY = Size(32, 2, 2, 16, batch=3, image=64, classes=10)  # 17 tokens, 51 in the batch


def test_the_smoke_run_measures_every_peer_of_every_table_and_writes_nothing(capsys, monkeypatch):
    monkeypatch.setattr(harness, "write_results", None)
    assert bench_model.main(["--smoke"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for table, sizes in bench_model.SMOKE.items():
        for model, what, peer in itertools.product(sizes, bench_model.PASSES[table], bench_model.PEERS[table]):
            (line,) = [line for line in lines if line.startswith(f"| {model} | 2 | {what} | {peer} |")]
            assert "n/a" not in line


def test_only_the_named_models_are_measured(run, monkeypatch):
    measured = {}
    monkeypatch.setattr(harness, "open_run", lambda _: replace(run, smoke=False, timer=Namespace(on_gpu=True)))
    monkeypatch.setattr(harness.Run, "measure_ceilings", lambda _: None)
    monkeypatch.setattr(bench_model, "measure", lambda table, sizes, _: measured.update({table: [*sizes]}) or True)
    assert bench_model.main(["--models", "N = 785", "B/16", "T/16"]) == 0
    assert measured == {"crate": ["B/16", "T/16"], "growth": ["N = 785"]}


def test_benchmarked_models_have_the_papers_sizes():
    models = {name: model_problem.meta_model(OURS, size) for name, size in bench_model.CRATES.items() if "16" in name}
    counts = {name: round(sum(p.numel() for p in model.parameters()) / 1e6, 2) for name, model in models.items()}
    assert counts == {"T/16": 6.09, "S/16": 13.12, "B/16": 22.80, "L/16": 77.64, "α-B/16": 72.33}
    assert [size.n_tokens for size in bench_model.GROWTH.values()] == [197, 785, 3601, 16385]


def test_a_measurement_on_a_gpu_fills_every_column(run, pretended_gpu, monkeypatch):
    run.timer, pretended_gpu.measurement_ms = pretended_gpu, 5.0
    monkeypatch.setitem(bench_model.PEERS, "crate", [OURS])
    assert bench_model.measure("crate", {"tiny": TINY}, run)
    known = {"latency_ms": 1.0, "calls": 5, "peak_mib": 2.0, "images_per_s": 3000}  # a round of 5 ms, without pauses
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
    assert not bench_model.measure("model", sizes, run)
    for row in run.rows:
        wrong = row["model"] != "right" and row["peer"] == OURS
        assert wrong == (row["latency_ms"] is None) == row.get("red", False), row["model"]
        assert not wrong or "WrongResult: " in row["reason"]
    assert "* **red**: _Scaled, training step, ours: WrongResult" in gpu_report.times(run.rows)


def test_a_wrong_autoencoder_gives_no_numbers(run, monkeypatch, capsys):
    size, forward = replace(TINY, masked=True), model_problem.ReleasedCRATEMAE.forward
    wrong = lambda *a, **o: tuple(1.001 * value for value in forward(*a, **o))  # noqa: E731
    monkeypatch.setattr(model_problem.ReleasedCRATEMAE, "forward", wrong)
    assert not bench_model.measure("model", {"MAE": size}, run)
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
    assert bench_model.measure("growth", {"tiny": TINY}, run)
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
