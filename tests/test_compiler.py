"""What the compiler makes of every row of the tile table, without a GPU: it fits, and nothing spills."""

import json
import os
import subprocess
import sys

import compile_report
import torch

from crate_fast.kernels.tiles import TABLE, Tile


def test_the_table_is_complete():
    attention = {
        (f"attention_{way}{dropout}", precision, block_d)
        for way in ("forward", "backward")
        for dropout in ("", "_dropout")
        for precision in ("half", "tf32", "ieee")
        for block_d in (32, 64, 128)
    }
    attention |= {(f"attention_delta{dropout}", "ieee", d) for dropout in ("", "_dropout") for d in (32, 64, 128)}
    products = {
        (kernel, precision, 0)
        for kernel in ("ista_forward", "ista_backward_input", "output_map", "weight_gradient")
        for precision in ("half", "mixed", "tf32", "ieee")
        if (kernel, precision) not in {("output_map", "tf32"), ("output_map", "ieee"), ("weight_gradient", "mixed")}
    }
    whole_heads = {("whole_head_forward", "half", 64), ("whole_head_backward", "half", 64)}
    for architecture in compile_report.ARCHITECTURES:
        rows = {(kernel, precision, d) for kernel, name, precision, d in TABLE if name == architecture}
        assert rows == attention | products | (whole_heads if architecture in ("sm_90", "sm_100") else set())


def test_every_row_compiles_fits_and_does_not_spill(tmp_path):
    """`compile_report.py` in a process of its own, since this one interprets; its exit code is the verdict.

    What the committed report was made of, by the compiler's own fingerprint, is compiled again only by samples:
    every kernel on one architecture.
    """
    rows = tmp_path / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, compile_report.__file__, "--json", str(rows), "--unless-reported"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    compiled = json.loads(rows.read_text())
    assert len(compiled) == len(compile_report.cases())


def test_the_committed_report_is_of_this_table():
    report = json.loads((compile_report.RESULTS / "compile.json").read_text())["rows"]
    reported = [(row["kernel"], row["architecture"], row["precision"], row["size"]) for row in report]
    cases = compile_report.cases()
    assert reported == [(case.kernel, case.architecture, case.precision, case.size) for case in cases]
    for row, case in zip(report, cases, strict=True):
        assert Tile(**row["tile"]) == compile_report.plan(case).tile
    torch.set_float32_matmul_precision("highest")  # which plan sets


def test_samples_are_every_kernel_once_on_all_architectures():
    found = compile_report.samples()
    assert sorted(case.kernel for case in found) == sorted({case.kernel for case in compile_report.cases()})
    assert {case.architecture for case in found} == set(compile_report.ARCHITECTURES)


def test_the_report_finds_what_is_wrong():
    good = {
        "kernel": "attention_forward", "architecture": "sm_90", "precision": "half", "size": 64, "error": None,
        "spilled_bytes": 0, "shared_kib": 40.0, "matrix_instructions": {"HGMMA": 8}, "async_copies": 2,
        "serialized": False,
    }  # fmt: skip
    assert compile_report.problems([good]) == []
    for change, message in (
        ({"error": "boom"}, "boom"),
        ({"spilled_bytes": 8}, "spills 8 bytes"),
        ({"shared_kib": 228.0}, "228.0 KiB of shared memory"),
        ({"matrix_instructions": {"HMMA": 8}}, "no HGMMA"),
        ({"async_copies": 0}, "no asynchronous copies"),
        ({"serialized": True}, "serialises"),
    ):
        (problem,) = compile_report.problems([good | change])
        assert message in problem


def test_a_compiler_that_dies_is_reported(monkeypatch):
    wanted = compile_report.cases(("sm_90",))[:2]
    monkeypatch.setattr(compile_report, "compile_case", _die)
    rows = compile_report.compile_all(wanted, processes=1)
    assert [row["error"] for row in rows] == ["the compiler killed its process"] * 2


def _die(case):
    os.abort()
