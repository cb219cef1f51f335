"""The tile search on a CPU: its problems reject wrong results, and its candidates are complete."""

from dataclasses import asdict, replace
from types import SimpleNamespace

import harness

import pytest
import tile_search
import torch

from crate_fast.kernels.launch import TABLE

KERNELS = list(tile_search.CANDIDATES)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for name in ("TIMED", "WARMED"):
        monkeypatch.setattr(tile_search, name, {"short": (2, 70, 2), "long": (1, 130, 1), "rows": 96})
    monkeypatch.setattr(tile_search, "WIDTH", 64)
    monkeypatch.setattr(tile_search, "CHECKED_ROWS", 20)
    cached = tile_search.problems
    cached.cache_clear()
    yield
    cached.cache_clear()


def _item(kernel: str) -> dict:
    tile = tile_search.SMALL[next((start for start in tile_search.SMALL if kernel.startswith(start)), "other")]
    return {"kernel": kernel, "tile": asdict(tile), "present": True}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_right_candidate_is_timed_on_every_problem(kernel):
    found = tile_search.warm(_item(kernel))
    assert 0 < found["error"] < 5e-3
    timed = tile_search.time_tile(_item(kernel), harness.Timer(torch.device("cpu")))
    assert timed["shapes"].keys() == {problem.name for problem in tile_search.problems(kernel)}
    assert min(timed["shapes"].values()) <= timed["latency_ms"] <= max(timed["shapes"].values())
    assert (timed["alternative"] is not None) == (kernel == "output_map")
    assert timed["alternative"] is None or timed["alternative"].keys() == timed["shapes"].keys()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("fault", ["scaled", "unwritten"])
def test_a_candidate_with_wrong_or_unwritten_results_is_rejected(kernel, fault, monkeypatch):
    problem = tile_search.problems(kernel)[0]

    def spoil(**_):
        problem.output.mul_(1.05) if fault == "scaled" else problem.output[0].fill_(torch.nan)

    spoiling = SimpleNamespace(kernel={(): spoil}, arguments={}, constants={}, options={}, grid=())
    wrong = replace(problem, plan=lambda tile: [*problem.plan(tile), spoiling])
    monkeypatch.setattr(tile_search, "problems", lambda _, timed: (wrong,))
    with pytest.raises(ValueError, match="differs from float64"):
        tile_search.warm(_item(kernel))


def test_small_problems_compile_the_code_of_the_timed_ones(monkeypatch):
    """Sizes divisible by 16 stay divisible."""
    monkeypatch.undo()
    for name, size in tile_search.TIMED.items():
        small = tile_search.WARMED[name]
        assert size % 16 == small % 16 == 0 if name == "rows" else size[1:] == small[1:]


def test_every_kernel_of_the_table_has_candidates_after_the_tables_tile():
    items = tile_search.items()
    assert len({item["name"] for item in items}) == len(items)
    assert [item["kernel"] for item in items[: len(KERNELS)]] == KERNELS
    assert all(item["present"] == (index < len(KERNELS)) for index, item in enumerate(items))
    assert {kernel for kernel, *_ in TABLE} == {*KERNELS}
