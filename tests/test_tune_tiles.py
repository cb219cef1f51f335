"""The offline tuner: its choice, what it rules out, and the row it writes; on small problems in the interpreter."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tune_tiles

from crate_fast.kernels import tiles
from crate_fast.kernels.tiles import TABLE, Tile


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(tune_tiles, "SHORT_SHAPE", (1, 17, 1))
    monkeypatch.setattr(tune_tiles, "LONG_SHAPE", (1, 33, 1))
    monkeypatch.setattr(tune_tiles, "ROWS", 80)
    monkeypatch.setattr(tune_tiles, "WIDTH", 32)
    few = [Tile(32, 32, 4, 1, 32), Tile(64, 32, 4, 1, 32), Tile(64, 64, 4, 1, 32)]
    monkeypatch.setattr(tune_tiles, "candidates", lambda _: few)


@pytest.mark.parametrize(
    ("kernel", "precision"), sorted({(kernel, name) for kernel, _, name, _ in TABLE if name in ("ieee", "mixed")})
)
@pytest.mark.parametrize("alternative", [3.5, 2.5])
def test_the_fastest_that_agrees_is_chosen(kernel, precision, alternative, device):
    wanted = tune_tiles.problems(kernel, 32, device, precision)
    candidates = tune_tiles.candidates(kernel)
    milliseconds = iter([ms for ms in (5.0, 4.0, 3.0, 9.0, alternative) for _ in wanted])

    def measure(call):
        call()
        return next(milliseconds)

    best, measured = tune_tiles.tune(kernel, Tile(16, 32, 4, 1, 32), wanted, measure)
    beaten = kernel == "output_map" and alternative < 3.0
    assert best == replace(candidates[1], chosen=not beaten)
    others = [alternative] * (kernel == "output_map")
    assert [round(value, 6) for value in measured.values()] == [5.0, 4.0, 3.0, 9.0, *others]


def test_a_wrong_or_refused_tile_is_ruled_out(device, monkeypatch):
    (short, _) = tune_tiles.problems("attention_forward", 32, device, "ieee")

    class Wrong:
        def run(self):
            short.output.fill_(7.0)

    def plan(tile):
        if tile.block_m == 32:
            return Wrong()
        if tile.block_n == 64:
            raise MemoryError("out of shared memory")
        return short.plan(tile)

    problem = tune_tiles.Problem(plan, short.output)
    best, measured = tune_tiles.tune("attention_forward", Tile(16, 16, 4, 1), [problem], lambda call: 1.0)
    assert best == Tile(16, 16, 4, 1)
    reasons = [value for value in measured.values() if isinstance(value, str)]
    assert len(reasons) == 2
    assert "differs" in reasons[0]
    assert "out of shared memory" in reasons[1]


def test_a_present_row_that_fails_is_an_error(device):
    (short, _) = tune_tiles.problems("attention_forward", 32, device, "ieee")
    calls = []

    def plan(tile):
        calls.append(tile)
        if len(calls) > 1:
            raise MemoryError("no")
        return short.plan(tile)

    with pytest.raises(RuntimeError, match="the present row"):
        tune_tiles.tune(
            "attention_forward", Tile(16, 16, 4, 1), [tune_tiles.Problem(plan, short.output)], lambda _: 1.0
        )


def test_a_row_is_written(tmp_path):
    path = tmp_path / "tiles.py"
    shutil.copy(tiles.__file__, path)
    key = ("ista_forward", "sm_90", "half", 0)
    before = path.read_text().splitlines()
    tune_tiles.write_row(key, Tile(64, 32, 4, 5, 16, chosen=False), path)
    changed = [line for line in path.read_text().splitlines() if line not in before]
    assert changed == ['    ("ista_forward", "sm_90", "half", 0): Tile(64, 32, 4, 5, 16, chosen=False),']
    with pytest.raises(ValueError, match="0 rows"):
        tune_tiles.write_row(("ista_forward", "sm_20", "half", 0), Tile(64, 32, 4, 5, 16), path)


def test_every_row_of_the_table_reads_as_the_tuner_writes_it():
    source = Path(tiles.__file__).read_text().splitlines()
    for key, tile in TABLE.items():
        assert tune_tiles.row_source(key, tile) in source


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu():
    with pytest.raises(SystemExit, match="finds none here"):
        tune_tiles.main([])
