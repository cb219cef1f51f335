"""The benchmark of whole models on a CPU: smoke run, gate, failing peers, operations, tables."""

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
from torch.nn.attention import SDPBackend

from crate_fast.train.cost import count_flops

TINY = Size(32, 2, 2, 16, on_gpu=2, on_cpu=3, image=64, classes=10)  # 17 tokens, 51 in the batch
BOTH = (TRAINING, INFERENCE)
CPU = torch.device("cpu")


def test_the_smoke_run_measures_every_peer_of_every_part_and_writes_nothing(capsys, monkeypatch):
    monkeypatch.setattr(harness, "write_results", None)
    assert bench_model.main(["--smoke"]) == 0
    lines = capsys.readouterr().out.splitlines()
    crates = [("tiny", what, peer) for what in BOTH for peer in bench_model.CRATE_PEERS]
    maes = [("tiny MAE", TRAINING, peer) for peer in bench_model.MAE_PEERS]
    growth = [(n, what, peer) for n in bench_model.SMOKE_GROWTH for what in BOTH for peer in bench_model.GROWTH_PEERS]
    for model, what, peer in crates + maes + growth:
        (line,) = [line for line in lines if line.startswith(f"| {model} | 2 | {what} | {peer} |")]
        assert "n/a" not in line


def test_growth_excludes_models_and_a_smoke_run_is_tiny_for_all_options(capsys):
    with pytest.raises(SystemExit):
        bench_model.main(["--growth", "--models", "T/16"])
    assert "leave --models out" in capsys.readouterr().err
    for options in ({"growth": True, "models": None}, {"growth": False, "models": ["B/16"]}):
        parts = bench_model._parts(Namespace(smoke=True, **options), on_gpu=True)
        assert {size.width for _, sizes, *_ in parts for size in sizes.values()} == {32}


def test_benchmarked_models_have_the_papers_sizes():
    models = {name: model_problem.meta_model(OURS, size) for name, size in bench_model.CRATES.items() if "16" in name}
    counts = {name: round(sum(p.numel() for p in model.parameters()) / 1e6, 2) for name, model in models.items()}
    assert counts == {"T/16": 6.09, "S/16": 13.12, "B/16": 22.80, "L/16": 77.64, "α-B/16": 72.33}
    assert [size.n_tokens for size in bench_model.GROWTH.values()] == [197, 785, 3601, 16385]


def test_a_measurement_on_a_gpu_fills_every_column(run, pretended_gpu):
    run.timer, pretended_gpu.measurement_ms = pretended_gpu, 5.0
    assert bench_model.measure("crate", {"tiny": TINY}, BOTH, [OURS], run)
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
    assert not bench_model.measure("crate", sizes, (TRAINING,), [OURS, RELEASED], run)
    for row in run.rows:
        wrong = row["model"] != "right" and row["peer"] == OURS
        assert wrong == (row["latency_ms"] is None) == row.get("red", False), row["model"]
        assert not wrong or "WrongResult: " in row["reason"]
    assert "* **red**: _Scaled, training step, ours: WrongResult" in gpu_report.times(run.rows)


def test_a_wrong_autoencoder_gives_no_numbers(run, monkeypatch, capsys):
    size, forward = replace(TINY, masked=True), model_problem.ReleasedCRATEMAE.forward
    wrong = lambda *a, **o: tuple(1.001 * value for value in forward(*a, **o))  # noqa: E731
    monkeypatch.setattr(model_problem.ReleasedCRATEMAE, "forward", wrong)
    assert not bench_model.measure("model", {"MAE": size}, (TRAINING,), [OURS, RELEASED], run)
    assert "the peers disagree: output" in capsys.readouterr().err


def test_under_autocast_the_gate_passes_rounding_and_rejects_broken_models(run, monkeypatch):
    run.dtype = torch.bfloat16
    problem = make_problem("tiny", replace(TINY, width=64, on_cpu=8), TRAINING, run, {})
    assert problem.cast == torch.bfloat16
    problem.gate(run)
    (ours,) = model_problem.peers(problem, [OURS], run)
    problem.check(ours, problem.results(ours.build()), None)
    for broken in (_Detached, _NotFinite):
        monkeypatch.setattr(model_problem, "CRATE", broken)
        with pytest.raises(measuring.WrongResult):
            problem.check(ours, problem.results(ours.build()), None)


def test_the_gates_results_do_not_depend_on_the_chunk_size(run):
    problem = make_problem("tiny", TINY, TRAINING, run, {})
    trial = problem.trial(RELEASED, None)
    torch.testing.assert_close(trial.outcome(2), trial.outcome(3), rtol=1e-4, atol=1e-6)


def test_if_the_released_form_runs_out_of_memory_ours_is_compared_with_pytorchs_path(run, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model_problem.ReleasedCRATE, "forward", out_of_memory)
    assert bench_model.measure("growth", {"tiny": TINY}, BOTH, [OURS, RELEASED], run)
    assert all(row["compared_with"] == UNFUSED for row in run.rows)
    assert all((row["latency_ms"] is None) == (row["peer"] == RELEASED) for row in run.rows)


def test_peers_whose_logits_do_not_fit_are_left_out(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Namespace(total_memory=80 * 2**30))
    assert "9 of 80 GiB" in measuring.too_many_logits(9 * 2**30, torch.device("cuda"))
    assert measuring.too_many_logits(7 * 2**30, torch.device("cuda")) is None
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    assert bench_model.measure("growth", {"tiny": TINY}, (INFERENCE,), [OURS, RELEASED], run)
    assert "of the machine's memory" in run.rows[1]["reason"]


def test_the_vit_uses_the_fastest_sdpa_backend_of_the_device():
    timer = harness.Timer(CPU)
    assert model_problem.fastest_sdpa(TINY, 2, timer, CPU, torch.float32) == SDPBackend.FLASH_ATTENTION


def _work(peer: str, size: Size, what: str, dtype: torch.dtype = torch.float32) -> measuring.Cost:
    return model_problem.cost(peer, size, size.on_cpu, what, dtype)


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
    activations = 5 * 4 * size.on_cpu * size.width
    assert whole.moved_bytes - visible.moved_bytes == activations * size.depth * 147  # hidden in the encoder
    assert _work(RELEASED, size, TRAINING) == whole
