"""The CPU and data benchmarks and the tile search run and reject wrong results; the pages' tables."""

import functools
import itertools
import json
import multiprocessing
import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import harness

import bench_cpu
import bench_data
import model_problem
import numpy as np
import pytest
import tile_search
import torch
import update_readme
from explorer import picture_file
from image_data import write_tree

from crate_fast.kernels.launch import TABLE


def test_the_cpu_benchmark_measures_every_peer_and_refuses_a_wrong_one(capsys, monkeypatch):
    monkeypatch.setattr(bench_cpu, "SMOKE", {"smoke α": replace(bench_cpu.SMOKE["smoke α"], depth=1)})
    assert bench_cpu.main(["--smoke", "--cases", "training", "one image"]) == 0
    text = capsys.readouterr().out
    for peer in bench_cpu.PEERS:
        assert len(re.findall(rf"^\| smoke α .*\| {re.escape(peer)} \|", text, re.M)) == 2
    assert text.count(f" | {bench_cpu.ONNX} | ") == 1
    monkeypatch.setattr(bench_cpu, "PEERS", bench_cpu.PEERS[:2])
    right = model_problem.CRATE.forward
    monkeypatch.setattr(model_problem.CRATE, "forward", lambda model, images: 1.01 * right(model, images))
    with pytest.raises(SystemExit, match="ours: WrongResult: the peers disagree: output.*: no numbers"):
        bench_cpu.main(["--smoke", "--cases", "training"])


def test_committed_results_have_no_absolute_paths():
    for path in harness.RESULTS.glob("*.json"):
        assert not re.search(r"[ '\"=](/|~)", json.loads(path.read_text())["command"]), path


def test_peak_memory_is_that_of_the_call(monkeypatch):
    fork = multiprocessing.get_context("fork")  # imports nothing again
    monkeypatch.setattr(harness.multiprocessing, "get_context", lambda _: fork)
    allocate = functools.partial(functools.partial, np.ones, (64, 2**17))
    assert 60 < harness.peak_mib(allocate) < 100


def test_the_tables_of_the_pages_equal_the_committed_results():
    texts = [(update_readme.ROOT / page).read_text() for page in update_readme.PAGES]
    assert [update_readme.updated(text) for text in texts] == texts
    tables = re.findall(r"<!-- (\w+)-table:begin -->", "".join(texts))
    assert sorted(tables) == ["cpu", "gpu", "models"]


def test_the_data_benchmark_times_batches_with_the_options_of_training(tmp_path, capsys, monkeypatch):
    clock = itertools.accumulate([0.0, 9.0, 2.0, 4.0, 6.0])  # 9 s for the first batch, then 4 s in the median
    monkeypatch.setattr(bench_data, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    names = [f"{split}/a/{number}.jpg" for split in ("train", "val") for number in range(4)]
    write_tree(tmp_path, {name: picture_file(seed, (48, 40), "JPEG") for seed, name in enumerate(names)})
    words = ["--data-dir", str(tmp_path), "--image-size", "32", "--batch-size", "4", "--batches", "3"]
    assert bench_data.main(words) == 0
    assert "1,000,000 µs an image, 1 images/s a core\n1.2e+04 cores for 12,000 images/s" in capsys.readouterr().out
    assert bench_data.main(["--dataset", "shards", *words]) == 2


# --- the tile search ---

KERNELS = list(tile_search.CANDIDATES)


@pytest.fixture
def small_tiles(monkeypatch):
    for name in ("TIMED", "WARMED"):
        monkeypatch.setattr(tile_search, name, {"short": (1, 70, 1), "long": (1, 130, 1), "rows": 96})
    monkeypatch.setattr(tile_search, "WIDTH", 64)
    monkeypatch.setattr(tile_search, "CHECKED_ROWS", 20)
    cached = tile_search.problems
    cached.cache_clear()
    yield
    cached.cache_clear()


small_problems = pytest.mark.usefixtures("small_tiles")


def _item(kernel: str) -> dict:
    tile = tile_search.SMALL[next((start for start in tile_search.SMALL if kernel.startswith(start)), "other")]
    return {"kernel": kernel, "tile": asdict(tile), "present": True}


@small_problems
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_right_candidate_is_timed_on_every_problem(kernel, run):
    found = tile_search.warm(_item(kernel))
    assert 0 < found["error"] < 5e-3
    timed = tile_search.time_tile(_item(kernel), run)
    assert timed["shapes"].keys() == {problem.name for problem in tile_search.problems(kernel)}
    shortest, longest = min(timed["shapes"].values()), max(timed["shapes"].values())
    assert 0.999 * shortest < timed["latency_ms"] < 1.001 * longest
    assert (timed["alternative_ms"] is not None) == kernel.startswith(("output_map", "whole_head"))


@small_problems
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("fault", ["scaled", "unwritten"])
def test_a_candidate_with_wrong_or_unwritten_results_is_rejected(kernel, fault, monkeypatch):
    problem = tile_search.problems(kernel)[0]

    def spoiled(tile):
        output = problem.call(tile)
        return 1.05 * output if fault == "scaled" else torch.empty_like(output)

    wrong = replace(problem, call=spoiled)
    monkeypatch.setattr(tile_search, "problems", lambda _, timed: (wrong,))
    with pytest.raises(ValueError, match="differs from float64"):
        tile_search.warm(_item(kernel))


def test_small_problems_compile_the_code_of_the_timed_ones():
    """Sizes divisible by 16 stay divisible."""
    for name, size in tile_search.TIMED.items():
        small = tile_search.WARMED[name]
        assert size % 16 == small % 16 == 0 if name == "rows" else size[1:] == small[1:]


def test_every_kernel_of_the_table_has_candidates_after_the_tables_tile():
    items = tile_search.items()
    assert [item["kernel"] for item in items[: len(KERNELS)]] == KERNELS
    assert all(item["present"] == (index < len(KERNELS)) for index, item in enumerate(items))
    assert {kernel for kernel, *_ in TABLE} == {*KERNELS}
