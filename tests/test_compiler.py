"""Every row of the tile table compiles without a GPU, fits into shared memory and, with the Triton versions that the
table was made for, does not spill."""

import json
import multiprocessing
import os
from operator import attrgetter

import compile_report
import pytest
import torch
import triton

from crate_fast.errors import UserError
from crate_fast.kernels import launch
from crate_fast.kernels.launch import ARCHITECTURES, TABLE, find, lookup, table_row

BOTH = ("attention_forward", "attention_backward", "ista_forward", "ista_backward_input", "weight_gradient")
KERNELS = dict.fromkeys(BOTH, ("half", "tf32"))
KERNELS |= dict.fromkeys(("whole_head_forward", "whole_head_backward", "output_map"), ("half",))


def test_the_table_is_complete_and_small():
    assert {key[:2] for key in TABLE} == {(kernel, word) for kernel, words in KERNELS.items() for word in words}
    for architecture in ARCHITECTURES:
        for kernel, words in KERNELS.items():
            widths = (64,) if kernel.startswith("whole") else (32, 64, 128) if "attention" in kernel else (0,)
            for word in words:
                missing = [width for width in widths if table_row(kernel, word, architecture, width) is None]
                on_chip = architecture == "sm_90" or not kernel.startswith("whole_head")
                assert (missing == []) == on_chip


def test_the_most_specific_row_is_used(monkeypatch):
    rows = {("k", "half"): 1, ("k", "half", 64): 2, ("k", "half", "sm_90"): 3, ("k", "half", "sm_90", 128): 4}
    monkeypatch.setattr(launch, "TABLE", rows)
    for architecture, widths in (("sm_80", {32: 1, 64: 2, 128: 1}), ("sm_90", {32: 3, 64: 3, 128: 4})):
        assert {width: table_row("k", "half", architecture, width) for width in widths} == widths
        assert table_row("k", "tf32", architecture, 64) is None


def test_measured_tiles_take_precedence(tmp_path, monkeypatch):
    tile = {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 3}
    row = {"kernel": "attention_forward", "architecture": "sm_90", "precision": "half", "block_d": 64, "tile": tile}
    rows, cpu = [row, row | {"kernel": "whole_head_forward", "tile": None}], torch.device("cpu")
    (tmp_path / "tiles.json").write_text(json.dumps(rows))
    monkeypatch.setenv("CRATE_FAST_TILES", str(tmp_path / "tiles.json"))
    monkeypatch.setattr(launch, "_measured", launch._measured.__wrapped__)
    assert [lookup("attention_forward", cpu, "half", width).num_warps for width in (64, 128)] == [4, 8]
    assert find("whole_head_forward", cpu, "half", 64) is None
    for content in ("{", '[{"kernel": 1}]', None):
        (tmp_path / "tiles.json").write_text(content) if content else (tmp_path / "tiles.json").unlink()
        with pytest.raises(UserError, match=r"CRATE_FAST_TILES=.*tiles\.json cannot be used .*: correct the path"):
            find("whole_head_forward", cpu, "half", 64)


ATTENTION = [f"attention_{way} {width}" for way in ("forward", "backward") for width in (64, 128)]
PRODUCTS = ["ista_forward 768 norm", "weight_gradient 768", "output_map 768 mixed norm"]  # the last not in TF32
HOPPER = ["attention_forward 80", "attention_backward 48", "attention_backward 80"]
HOPPER += ["whole_head_forward 240×48", "whole_head_forward 240×48 rest"]
HOPPER += ["whole_head_backward 256×64", "whole_head_backward 240×48", "whole_head_backward 240×48 rest"]
HOPPER += ["ista_forward 384 norm", "ista_forward 768 masked", "ista_backward_input 768 mixed"]
HOPPER += ["output_map 384 mixed norm", *(f"{kernel} 768" for kernel in compile_report.ROWWISE)]
# Of each tile, the sizes with the most code, registers and shared memory: on Hopper heads of 240×48 have the masks of
# 197×48 and 197×64, and heads of 32 the code of 64.
TESTED = {
    ("sm_80", "half"): PRODUCTS,  # its other tiles are also those of sm_86, which has less shared memory
    ("sm_86", "half"): ATTENTION + PRODUCTS,
    ("sm_86", "tf32"): ATTENTION + PRODUCTS[:2],
    ("sm_90", "half"): ATTENTION + PRODUCTS + HOPPER,
    ("sm_90", "tf32"): ATTENTION + PRODUCTS[:2],
    ("sm_100", "half"): ATTENTION[1:] + PRODUCTS,  # in TF32 it has Hopper's tiles
}
# the same kernel, with more registers
STANDS_IN = {("ista_backward_input", "half"): "output_map", ("ista_backward_input", "tf32"): "ista_forward"}


def test_every_row_compiles_and_fits(monkeypatch, capsys):
    """`compile_report.py` compiles in another process, because this one interprets; it exits with 0 on success."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tested = {(*row, name) for row, names in TESTED.items() for name in names}
    cases = [c for c in compile_report.cases() if (c.architecture, c.precision, f"{c.kernel} {c.size}") in tested]
    assert len(cases) == len(tested)
    row_of = attrgetter("architecture", "kernel", "precision", "tile")
    rows, shown = set(map(row_of, compile_report.cases())), set(map(row_of, cases))
    for architecture, kernel, *row in rows - shown:
        alike = {("sm_80", row[0]): "sm_86", ("sm_100", "tf32"): "sm_90"}.get((architecture, row[0]), architecture)
        names = {kernel, STANDS_IN.get((kernel, row[0]))}
        found = {(chip, name, *row) for chip in (architecture, alike) for name in names}
        assert kernel in compile_report.ROWWISE or found & shown
    monkeypatch.setattr(compile_report, "cases", lambda architectures: cases)
    status = compile_report.main(["--processes", "1"])
    printed = capsys.readouterr().out
    assert status == 0, printed[-4000:]
    assert f"triton {triton.__version__}: {len(cases)} kernels compile and fit" in printed


def test_the_report_finds_every_problem():
    good = {"kernel": "attention_forward", "architecture": "sm_90", "precision": "half", "size": "64", "error": None}
    good |= {"spilled_bytes": 0, "shared_kib": 40.0, "matrix_instructions": {"wgmma.mma_async": 8}}
    good |= {"async_copies": 2, "serialized": False}
    assert compile_report.problems([good], True) == []
    bad = {"error": "boom", "spilled_bytes": 8, "shared_kib": 228.0, "matrix_instructions": {"mma.sync": 8}}
    bad |= {"async_copies": 0, "serialized": True}
    said = ("boom", "spills 8 bytes", "228.0 KiB of shared memory", "no wgmma", "no asynchronous", "serialises")
    for change, message in zip(bad.items(), said, strict=True):
        (problem,) = compile_report.problems([good | dict([change])], True)
        assert message in problem
    assert compile_report.problems([good | {"spilled_bytes": 8}], False) == []


def test_an_unknown_kernel_is_an_error(capsys):
    with pytest.raises(SystemExit):
        compile_report.main(["--kernels", "ista"])
    assert "invalid choice: 'ista'" in capsys.readouterr().err


def _die(case):
    os._exit(1)


def test_a_crash_of_the_compiler_is_reported(monkeypatch):
    fork = multiprocessing.get_context("fork")  # imports nothing again
    monkeypatch.setattr(compile_report, "compile_case", _die)
    monkeypatch.setattr(compile_report, "get_context", lambda _: fork)
    rows = compile_report.compile_all(compile_report.cases(("sm_90",))[:1], processes=1)
    assert [row["error"] for row in rows] == ["the compiler killed its process"]
