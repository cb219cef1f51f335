"""Probes and `crate-fast check`: right kernels pass; wrong, crashed and hanging ones have different statuses."""

import functools
import itertools
import json
import os
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from runs import forked_python

from crate_fast import check, cli, env, isolation, probes
from crate_fast.check import run_probes
from crate_fast.kernels.launch import Launch
from crate_fast.probes import CHECKED, PROBES, find_probe, run_probe

NORM_ISTA = "norm_ista-float16-64x197x384"
MORE = ["attention-bfloat16-2x197x3x64-spread10000", "ista-autocast-64x197x384"]  # inputs not in CHECKED
MORE += ["ista-bfloat16-64x197x384-soft", "compress-autocast-64x197x384-paper"]


def _run(device, monkeypatch, change, reruns: int = 1) -> dict:
    """Run a probe, with `change(kernel's name, arguments)` after each launch."""
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: (run(launch), change(launch.kernel.__name__, launch.arguments)))
    return run_probe(find_probe(NORM_ISTA), device, reruns)


@functools.cache
def _row(name: str) -> dict:
    on_gpu = torch.cuda.is_available()  # the interpreter gives the same bits again
    return run_probe(find_probe(name), "cuda" if on_gpu else "cpu", reruns=int(on_gpu))


@pytest.mark.parametrize("name", [*CHECKED, *MORE])
def test_a_probe_finds_the_kernels_right(name):
    row = _row(name)
    assert (row["status"], row["reruns_equal"], row["launched"] != []) == ("right", True, True)
    assert 0.0 < row["share"] <= 1.0
    assert row["share"] == max(output["share"] for output in row["outputs"].values())
    assert not torch.are_deterministic_algorithms_enabled()
    json.dumps(row, allow_nan=False)


def test_probes_cover_the_kernels():
    launched = " ".join(kernel for name in (*CHECKED[:7], NORM_ISTA) for kernel in _row(name)["launched"])
    parts = "whole_head attention_fwd attention_bwd product weight_gradient masked normalize layer_norm"
    assert not [part for part in parts.split() if part not in launched]


@pytest.mark.parametrize(("argument", "output"), [("dx_ptr", "dx"), ("partial_ptr", "dD"), ("out_ptr", "y")])
def test_an_error_of_ten_percent_is_wrong(argument, output, monkeypatch, device):
    def change(name, arguments):
        if isinstance(arguments.get(argument), torch.Tensor):
            arguments[argument].mul_(1.1)

    row = _run(device, monkeypatch, change)
    assert (row["status"], row["reruns_equal"]) == ("wrong", True)
    assert row["outputs"][output]["share"] > 1.0


def test_a_rerun_with_other_bits_is_wrong(monkeypatch, device):
    count = itertools.count()

    def change(name, arguments):
        if "normalize" in name and next(count) == 2:  # the second rerun
            arguments["normed_ptr"][0, 0] *= 1.001

    row = _run(device, monkeypatch, change, reruns=3)
    assert (row["status"], row["reruns_equal"]) == ("wrong", False)
    assert row["share"] <= 1.0


def test_an_unwritten_output_is_wrong_and_a_kernel_that_raises_has_a_failed_row(monkeypatch, device, capsys):
    monkeypatch.setattr(Launch, "run", lambda launch: None)
    row = run_probe(find_probe(NORM_ISTA), device, reruns=1)
    assert (row["status"], row["share"], row["outputs"]["y"]["max"]) == ("wrong", None, None)
    json.dumps(row, allow_nan=False)
    monkeypatch.setattr(Launch, "run", mock.Mock(side_effect=ValueError("out of\nshared memory")))
    row = run_probe(find_probe(NORM_ISTA), device, reruns=1)
    assert row["status"] == "failed: ValueError: out of shared memory"
    assert "Traceback" in capsys.readouterr().err


def test_timings_name_the_peer_and_the_shape(monkeypatch):
    import triton.testing

    def once(call, rep, return_mode):
        assert len(call()) >= 2  # output and gradients
        return 0.5

    monkeypatch.setattr(triton.testing, "do_bench_cudagraph", once)
    monkeypatch.setattr(probes, "TIMED_IMAGES", 1)
    attention = replace(find_probe("fault:wrong"), kernel="attention")
    expected = {"timed_shape": [1, 17, 1, 32], "ours_ms": 0.5, "peer": "SDPA", "peer_ms": 0.5}
    assert probes.time_probe(attention, "cpu") == expected
    ista = replace(find_probe("ista-float16-64x197x384"), sizes=(2, 8, 32))
    found = probes.time_probe(ista, "cpu")
    assert (found["peer"], found["timed_shape"]) == ("eager", [2, 8, 32])
    row = run_probe(find_probe("ista-float16-64x197x384"), "cpu", 1) | found
    assert check._cells(row)["forward + backward"] == "0.5 ms (eager: 0.5 ms)"


def test_the_module_lists_its_probes_and_refuses_unknown_ones(capsys):
    assert probes.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == list(PROBES)
    assert probes.main(["--probe", "attention"]) == 2
    assert "no probe 'attention': choose one of attention-bfloat16-" in capsys.readouterr().err


def test_a_hanging_probe_is_a_failed_row():
    (row,) = run_probes(["fault:hang"], interpreter=True, limit_s=1.0)
    assert (row["name"], row["status"]) == ("fault:hang", "failed: timed out after 1 s")


def test_the_command_reports_right_wrong_and_crashed_probes(tmp_path, capsys):
    file, names = tmp_path / "check.json", ["ista-autocast-64x197x384", "fault:wrong", "fault:crash"]
    with forked_python(isolation, fresh="fault:wrong"):
        assert cli.main(["check", "--interpreter", "--json", str(file), "--probes", *names]) == 1
    report = json.loads(file.read_text())
    right, wrong, crashed = report["rows"]
    assert [row["name"] for row in report["rows"]] == names
    assert (right["status"], right["reruns"], "output" in right) == ("right", 2, False)
    assert (wrong["status"], wrong["share"] > 1.0) == ("wrong", True)
    assert crashed["status"] == "failed: killed by SIGABRT"
    assert "probes.py" in crashed["output"]  # the traceback
    assert report["environment"]["torch"] == torch.__version__
    assert {"triton", "commit", "time", "backend on cpu"} <= report["environment"].keys()
    out = capsys.readouterr().out
    assert f"| ista | autocast | 2×70×64 | {right['share']:.2f} | 2 of 2 | – | right |" in out
    assert out.endswith(f"1 of 3 right; written to {file}\n")


def test_the_exit_status_is_0_if_all_are_right(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "run_probes", lambda names, _: [_row(name) for name in names])
    assert check.main(["--interpreter", "--json", str(tmp_path / "check.json"), "--probes", NORM_ISTA]) == 0


def test_without_a_gpu_the_check_is_an_error(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check, "explain_backend", lambda device: ("torch", "PyTorch finds no CUDA device"))
    assert check.main([]) == 2
    reason = "PyTorch finds no CUDA device; pass --interpreter to check without a GPU"
    assert capsys.readouterr() == ("", f"error: nothing to check: {reason}\n")
    assert os.listdir() == []


def test_only_right_kernels_are_timed_and_a_crash_keeps_earlier_times(monkeypatch, capsys):
    def crashed(jobs, folder, done):
        (job,) = jobs
        assert job.environment == {"TRITON_INTERPRET": "0"}
        names = job.command[job.command.index("--time") + 1 : job.command.index("--json")]
        assert names == ["a", "c"]
        with open(job.command[job.command.index("--json") + 1], "w") as opened:
            json.dump({"a": {"ours_ms": 1.0}}, opened)
        done(SimpleNamespace(reason="killed by SIGSEGV", log=folder / "none"))

    monkeypatch.setattr(check, "_run_jobs", crashed)
    rows = [{"name": name, "status": status} for name, status in (("a", "right"), ("b", "wrong"), ("c", "right"))]
    check._add_times(rows)
    assert [row.get("ours_ms") for row in rows] == [1.0, None, None]
    assert "timing: killed by SIGSEGV" in capsys.readouterr().err


def test_the_assembler_is_reported_and_missing_tools_are_unknown(monkeypatch):
    from triton.backends.nvidia import compiler

    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for version, warned in (("12.8", True), ("13.2", True), ("13.3", False)):
        monkeypatch.setattr(compiler, "get_ptxas", lambda _, version=version: SimpleNamespace(version=version))
        found = env._ptxas(gpu)
        assert (found.startswith(version), "which can miscompile on Hopper" in found) == (True, warned)
        assert env.compiler_versions(gpu).endswith(f", ptxas {version}")
    monkeypatch.setattr(compiler, "get_ptxas", mock.Mock(side_effect=RuntimeError("Cannot find ptxas")))
    assert "unknown (RuntimeError)" in env.compiler_versions(gpu)
    monkeypatch.setenv("PATH", "")
    assert env.driver_version() == "unknown (FileNotFoundError)"


@pytest.mark.gpu
def test_on_a_gpu_a_probe_runs_and_is_timed():
    rows = run_probes(["attention-bfloat16-2x197x12x64"], interpreter=False)
    check._add_times(rows)
    assert rows[0]["status"] == "right", rows[0]
    assert rows[0]["ours_ms"] > 0.0
