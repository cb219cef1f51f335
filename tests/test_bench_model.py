"""The benchmark of whole models as far as a CPU can tell: smoke run, gate, peers that fail, operations, tables."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import bench_model
import gpu
import gpu_timing
import harness
import model_peers
import model_work
import pytest
import torch
import update_readme
from bench_model import Part
from model_peers import COMPILED, INFERENCE, OURS, RELEASED, TRAINING, UNFUSED, VISIBLE, VIT, Size, build_model
from model_problem import make_problem, peers
from tile_work import padded
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crate_fast.kernels.tiles import lookup

TINY = Size(32, 2, 2, 16, on_gpu=2, on_cpu=3, image=64, classes=10)  # 17 tokens, 51 in the batch
BOTH = (TRAINING, INFERENCE)
CPU = torch.device("cpu")


def _run(tmp_path: Path, dtype: str = "float32") -> gpu.Run:
    options = argparse.Namespace(smoke=True, dtype=dtype, rounds=1, output=tmp_path, commit=None, budget=None)
    run = gpu.open_run(options, on_cpu=True)
    run.ceilings = gpu_timing.Ceilings(1.0, 100.0)
    run.facts |= {"matrix_tflops_per_s": 1.0, "copy_gb_per_s": 100.0}
    return run


@pytest.fixture
def run(tmp_path, monkeypatch) -> gpu.Run:
    """A smoke run in fp32 with ceilings of 1 TFLOP/s and 100 GB/s, and short measurements."""
    monkeypatch.setattr(gpu_timing, "MEASUREMENT_MS", 5.0)
    return _run(tmp_path)


def _rows(run: gpu.Run) -> dict[tuple[str, str], dict]:
    return {(row["pass"], row["peer"]): row for row in run.rows}


# --- running ------------------------------------------------------------------------------------------------------


def test_the_smoke_run_measures_every_peer_of_every_part(capsys):
    before = {(path.name, path.stat().st_mtime) for path in harness.RESULTS.iterdir()}
    assert bench_model.main(["--smoke"]) == 0
    lines = capsys.readouterr().out.splitlines()
    crates = [("tiny", what, peer) for what in BOTH for peer in bench_model.CRATE_PEERS]
    maes = [("tiny MAE", TRAINING, peer) for peer in bench_model.MAE_PEERS]
    growth = [(n, what, peer) for n in bench_model.SMOKE_GROWTH for what in BOTH for peer in bench_model.GROWTH_PEERS]
    for model, what, peer in crates + maes + growth:
        (line,) = [line for line in lines if line.startswith(f"| {model} | 2 | {what} | {peer} |")]
        assert "n/a" not in line
    assert {(path.name, path.stat().st_mtime) for path in harness.RESULTS.iterdir()} == before


def test_growth_and_models_are_not_asked_for_together(capsys):
    with pytest.raises(SystemExit):
        bench_model.main(["--growth", "--models", "T/16"])
    assert "leave --models out" in capsys.readouterr().err


def test_the_sizes_are_the_models():
    counts = {name: sum(p.numel() for p in model_work._meta(OURS, size).parameters()) / 1e6
              for name, size in bench_model.CRATES.items()}  # fmt: skip
    assert {name: round(count, 2) for name, count in counts.items() if "16" in name} == {
        "T/16": 6.09, "S/16": 13.12, "B/16": 22.80, "L/16": 77.64,
    }  # fmt: skip
    assert [size.n_tokens for size in bench_model.GROWTH.values()] == [197, 785, 3601, 16385]


def test_a_whole_measurement_goes_the_gpus_way(run, pretended_gpu):
    run.timer = pretended_gpu
    assert bench_model.measure(Part("crate", {"tiny": TINY}, BOTH, [OURS, RELEASED]), run, 0)
    for row in run.rows:
        assert row["latency_ms"] == 1.0  # one event to the next: nothing between calls
        assert row["calls"] == 10  # two rounds of 5 ms
        assert row["peak_mib"] == 2.0
        assert row["images_per_s"] == 3000
        assert row["mfu"] == pytest.approx(row["flops"] / 1e9)


# --- the gate -----------------------------------------------------------------------------------------------------


class _Scaled(model_peers.CRATE):
    def __init__(self, **options):
        super().__init__(**options)
        self.transformer.layers[1][0].fn.scale *= 1.2


class _Stepped(model_peers.CRATE):
    def __init__(self, **options):
        super().__init__(**options)
        self.transformer.layers[0][1].fn.step_size *= 1.02


class _Detached(model_peers.CRATE):
    def embed(self, images):
        tokens = super().embed(images)
        return tokens.detach() + 0.0 * tokens


class _NotFinite(model_peers.CRATE):
    def forward(self, images):
        return super().forward(images) * float("nan")


@pytest.mark.parametrize("mutant", [_Scaled, _Stepped, _Detached, _NotFinite])
def test_a_wrong_model_gives_no_numbers_and_the_others_do(run, monkeypatch, capsys, mutant):
    right = model_peers.CRATE
    monkeypatch.setattr(
        model_peers, "CRATE", lambda **options: (mutant if options["dim"] == 32 else right)(**options)
    )
    sizes = {"wrong": TINY, "right": replace(TINY, width=64)}
    assert not bench_model.measure(Part("crate", sizes, (TRAINING,), [OURS, RELEASED]), run, 0)
    assert {row["model"] for row in run.rows} == {"right"}
    assert "no numbers for wrong, training step" in capsys.readouterr().err


def test_a_wrong_autoencoder_gives_no_numbers(run, monkeypatch, capsys):
    size = replace(TINY, masked=True)
    assert bench_model.measure(Part("model", {"MAE": size}, (TRAINING,), [OURS, RELEASED, VISIBLE]), run, 0)
    forward = model_peers.ReleasedCRATEMAE.forward
    monkeypatch.setattr(
        model_peers.ReleasedCRATEMAE, "forward", lambda *a, **o: tuple(1.001 * value for value in forward(*a, **o))
    )
    assert not bench_model.measure(Part("model", {"MAE": size}, (TRAINING,), [OURS, RELEASED]), run, 0)
    assert "the peers disagree: output" in capsys.readouterr().err


def test_under_autocast_the_gate_knows_rounding_from_a_broken_model(tmp_path, monkeypatch):
    run = _run(tmp_path, "bfloat16")
    problem = make_problem("tiny", replace(TINY, width=64, on_cpu=8), TRAINING, run, {})
    assert problem.cast == torch.bfloat16
    problem.gate(run)
    (ours,) = peers(problem, [OURS], run)
    problem.check(ours, problem.results(ours.build()), None)
    for broken in (_Detached, _NotFinite):
        monkeypatch.setattr(model_peers, "CRATE", broken)
        with pytest.raises(gpu.Red):
            problem.check(ours, problem.results(ours.build()), None)


def test_in_chunks_the_gate_finds_the_same(run):
    problem = make_problem("tiny", TINY, TRAINING, run, {})
    trial = problem.trial(RELEASED, None)
    torch.testing.assert_close(trial.outcome(2), trial.outcome(3), rtol=1e-4, atol=1e-6)


# --- peers that fail ----------------------------------------------------------------------------------------------


def _out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_peer_that_fails_has_rows_that_say_why(run, monkeypatch):
    monkeypatch.setattr(torch, "compile", _out_of_memory)
    part = Part("crate", {"tiny": TINY}, BOTH, [OURS, RELEASED, VIT + COMPILED])
    assert bench_model.measure(part, run, 0)
    rows = _rows(run)
    for what in BOTH:
        assert "out of memory" in rows[what, VIT + COMPILED]["reason"]
        assert rows[what, RELEASED]["images_per_s"] > 0
        assert rows[what, OURS]["of_vit"] is None
    text = bench_model.table(run.rows)
    assert "* n/a: tiny, training step, ViT (timm), compiled: OutOfMemoryError: CUDA out of memory" in text


def test_without_memory_for_the_released_form_ours_is_compared_with_pytorchs_path(run, monkeypatch):
    monkeypatch.setattr(model_peers.ReleasedCRATE, "forward", _out_of_memory)
    assert bench_model.measure(Part("growth", {"tiny": TINY}, BOTH, [OURS, RELEASED]), run, 0)
    rows = _rows(run)
    assert all(row["compared_with"] == UNFUSED for row in rows.values())
    assert all(rows[what, OURS]["latency_ms"] and not rows[what, RELEASED]["latency_ms"] for what in BOTH)


def test_on_a_cpu_logits_beyond_the_memory_are_not_tried(run, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    assert bench_model.measure(Part("growth", {"tiny": TINY}, (INFERENCE,), [OURS, RELEASED]), run, 0)
    assert "of the machine's memory" in _rows(run)[INFERENCE, RELEASED]["reason"]


def test_where_ours_does_not_run_the_rows_say_so_and_the_next_model_is_measured(run, monkeypatch):
    outcome = model_peers.Trial.outcome

    def failing(trial, chunk):
        if isinstance(trial.model, model_peers.CRATE) and trial.model.embed_dim == 32:
            _out_of_memory()
        return outcome(trial, chunk)

    monkeypatch.setattr(model_peers.Trial, "outcome", failing)
    sizes = {"large": TINY, "small": replace(TINY, width=64)}
    assert not bench_model.measure(Part("crate", sizes, (INFERENCE,), [OURS, RELEASED]), run, 0)
    reasons = {(row["model"], row["peer"]): row["reason"] for row in run.rows}
    assert "ours does not run: OutOfMemoryError" in reasons["large", RELEASED]
    assert reasons["small", OURS] is None


def test_compiled_peers_are_the_first_to_go_when_the_time_is_short(run):
    run.budget = gpu.Budget(20.0)
    assert bench_model.measure(Part("crate", {"tiny": TINY}, (INFERENCE,), [OURS, RELEASED, OURS + COMPILED]), run, 0)
    assert "--budget" in _rows(run)[INFERENCE, OURS + COMPILED]["reason"]


def test_the_vit_gets_the_attention_that_runs_here():
    qkv = torch.randn(2, 17, 3, 2, 16, requires_grad=True)
    assert model_peers.fastest_sdpa(qkv, gpu_timing.Timer(CPU)) == SDPBackend.FLASH_ATTENTION
    assert model_peers.best_sdpa(TINY, 2, gpu_timing.Timer(CPU), CPU, torch.float32) is None


# --- operations and bytes -----------------------------------------------------------------------------------------


def _counted(model: torch.nn.Module, images: torch.Tensor) -> tuple[int, int]:
    """PyTorch's own count: forward, and with backward."""
    with FlopCounterMode(display=False) as counter:
        logits = model(images)
        forward = counter.get_total_flops()
        logits.sum().backward()
    return forward, counter.get_total_flops()


def _work(peer: str, size: Size, what: str, dtype: torch.dtype = torch.float32) -> gpu.Work:
    return model_work.work(peer, size, size.on_cpu, what, CPU, dtype)


@pytest.mark.parametrize("peer", [RELEASED, VIT + COMPILED])
def test_executed_operations_are_pytorchs_count(peer):
    model = build_model(peer, TINY)
    expected = _counted(model, torch.randn(TINY.on_cpu, 3, TINY.image, TINY.image))
    assert tuple(_work(peer, TINY, what).executed_flops for what in (INFERENCE, TRAINING)) == expected


@pytest.mark.parametrize("batch", [1, 3], ids=["fewer tokens than channels", "more"])
def test_executed_operations_of_ours_on_a_cpu_are_pytorchs_count(batch):
    size = replace(TINY, on_cpu=batch)
    with sdpa_kernel(SDPBackend.MATH):
        forward, step = _counted(model_work._meta(OURS, size), torch.empty(batch, 3, 64, 64, device="meta"))
    logits_again = batch * 2 * 2 * 17**2 * 32  # ours computes them once more in backward
    assert _work(OURS, size, INFERENCE).executed_flops == forward
    assert _work(OURS, size, TRAINING).executed_flops == step + logits_again


def test_nominal_operations_by_hand():
    size = replace(bench_model.CRATES["B/16"], on_cpu=2)
    n, c, layers = 197, 768, 12
    ends = 2 * 196 * 768 * c + 2 * c * 1000
    products, attention = 3 * 2 * n * c**2, 4 * n**2 * c
    forward = 2 * (ends + layers * (products + attention))
    step = 2 * (3 * ends + layers * (3 * products + attention + attention * 10 // 4))
    for peer in (OURS, RELEASED, OURS + COMPILED, RELEASED + COMPILED):
        assert (_work(peer, size, INFERENCE).flops, _work(peer, size, TRAINING).flops) == (forward, step)
    vit = 12 * 2 * n * c**2
    forward = 2 * (ends + layers * (vit + attention))
    step = 2 * (3 * ends - 2 * 196 * 768 * c + layers * (3 * vit + attention + attention * 10 // 4))
    found = _work(VIT + COMPILED, size, INFERENCE).flops, _work(VIT + COMPILED, size, TRAINING).flops
    assert found == (forward, step)


def test_on_a_gpu_whole_tiles_and_the_folds_are_executed(monkeypatch):
    monkeypatch.setattr(model_work, "explain_backend", lambda *_, **__: ("triton", ""))
    size = replace(bench_model.CRATES["B/16"], on_cpu=2)
    found = _work(OURS, size, INFERENCE, torch.bfloat16)
    once = 3 * 64 * 64 + 3 * 64 * 16 + 16 * 256  # three blocks, the rest of 5 as 16 keys, and as 16 rows of 256 keys
    attention = 2 * 64 * 24 * (2 * once + 3 * 3 * 64 * 64 - 2 * 197**2)  # three pairs of blocks, three products each
    tile = lookup("ista_forward", CPU, "mixed")
    ista = 2 * 768**2 * (padded(394, tile.block_m) - 394)  # 768 is whole blocks
    assert found.executed_flops - found.flops == 12 * (attention + ista + 2 * 768**3)
    training = _work(OURS, size, TRAINING, torch.bfloat16)
    backward = 2 * 64 * 24 * (5 * once + 7 * 3 * 64 * 64 - 5 * 197**2)
    assert training.executed_flops - training.flops > 12 * (attention + backward + 2 * 2 * 768**3)


def test_an_autoencoders_operations_follow_its_tokens():
    size = bench_model.MAES["CRATE-MAE-T"]
    whole, visible = (_work(peer, size, TRAINING) for peer in (OURS, VISIBLE))
    assert visible.flops < 0.75 * whole.flops
    assert visible.moved_bytes < whole.moved_bytes
    assert _work(RELEASED, size, TRAINING).executed_flops > whole.flops


def test_bytes_by_hand():
    weights = 4 * sum(p.numel() for p in build_model(OURS, TINY).parameters())
    images, outputs = 4 * 3 * 3 * 64 * 64, 2 * 3 * 17 * 32 * 2
    assert _work(OURS, TINY, INFERENCE, torch.bfloat16).moved_bytes == images + weights + 2 * outputs
    assert _work(OURS, TINY, TRAINING, torch.bfloat16).moved_bytes == images + 10 * weights + 5 * outputs


# --- results ------------------------------------------------------------------------------------------------------


def test_results_of_other_models_are_kept_and_the_readmes_table_comes_from_them(run, tmp_path, monkeypatch):
    assert update_readme.models_table(tmp_path) == update_readme.NOT_MEASURED
    run.smoke = False
    monkeypatch.setattr("model_problem.peak_mib", lambda call: 1.0)
    run.facts |= {"triton": "3", "driver": "none", "ptxas": "none"}
    run.budget = gpu.Budget(0.0)  # nothing is compiled
    part = Part("crate_gpu", {"B/16": TINY}, BOTH, bench_model.CRATE_PEERS)
    assert bench_model.measure(part, run, 0)
    other = replace(part, sizes={"T/16": TINY})
    run.rows = bench_model._kept(other, run)
    assert bench_model.measure(other, run, 0)
    rows = json.loads((tmp_path / "crate_gpu.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["B/16"] * 10 + ["T/16"] * 10
    assert len(bench_model._kept(part, run)) == 10
    run.facts["commit"] = "another"
    assert bench_model._kept(part, run) == []

    run.rows = []
    assert bench_model.measure(Part("growth_gpu", {"N = 17": TINY}, BOTH, bench_model.GROWTH_PEERS), run, 0)
    table = update_readme.models_table(tmp_path)
    assert "| B/16, training step, batch 3 |" in table
    assert "| n/a |" in table
    assert "| 17 tokens, inference |" in table
    assert "1 TFLOP/s" in table
