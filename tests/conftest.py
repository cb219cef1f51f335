"""Fixtures of all test files: one seed, the kernels' device, and GPU skips that can be forbidden."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads spin between the interpreter's small products

import functools
import gc
import re
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, which timm does
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # `poisoned` needs it on a GPU before torch 2.10

from crate_fast.errors import UserError
from crate_fast.settings import require_gpu

LONGEST = {"test_compiler.py", "test_emergence.py", "test_faults.py", "test_gpu_check.py"}
LONGEST |= {"test_bench_model.py", "test_pretrain_mae.py", "test_transforms_of_model.py"}
LONGEST |= {"test_parallel.py", "test_self_check.py", "test_sweeps.py", "test_train.py"}  # else among the last


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist would start the files with the most tests first, not the longest
    os.fsync = lambda descriptor: None  # a training run waits dozens of times for the disk; no test cuts the power
    together = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))  # processes that test at once
    if together > 1:
        threads = max(1, (os.cpu_count() or 1) // together)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of the processes that tests start


def pytest_sessionstart():
    """Halve the time of small launches in Triton's interpreter.

    Patch triton.language once per function instead of at every call, cache its dtypes, and skip the check for integer
    overflow, whose result is unused.
    """
    from triton.runtime import interpreter

    patch, scope = functools.cache(interpreter._patch_lang), Namespace(restore=lambda: None)
    np_dtype, np_dtypes = interpreter._get_np_dtype, {}

    def patch_once(function):
        patch(function)
        return scope

    def known_np_dtype(dtype):
        if dtype.name not in np_dtypes:
            np_dtypes[dtype.name] = np_dtype(dtype)
        return np_dtypes[dtype.name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, known_np_dtype
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)  # the longest files start first


def pytest_collection_finish():
    gc.freeze()  # garbage collection then skips the imported modules
    gc.set_threshold(50_000, 20, 20)  # by default it runs after every 700 new objects; tracing makes millions


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        (pytest.fail if require_gpu() else pytest.skip)("no GPU here")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Skip tests of fp32 kernels on a GPU, which refuses TF32 by default; the interpreter shows their algebra."""
    try:
        return (yield)
    except UserError as error:
        if torch.cuda.is_available() and "multiply float32 as TF32" in str(error):
            pytest.skip(str(error))
        raise


def pytest_terminal_summary(terminalreporter):
    gpu = [r for r in terminalreporter.stats.get("passed", []) if "gpu" in r.keywords]
    terminalreporter.write_line(f"GPU tests run: {len(gpu)}")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device of the kernels: a GPU, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def bfloat16(device):
    """Let the kernels run in bf16 on a CPU, with a GPU's rounding. A GPU needs no change."""
    if device.type == "cuda":
        yield
        return
    from interpreter_bfloat16 import interpreted_bfloat16

    with interpreted_bfloat16():
        yield


@pytest.fixture
def poisoned(device, monkeypatch):
    """Fill uninitialised memory with NaN, so that unwritten elements show. In the interpreter, also refuse addresses
    outside the launch's tensors, which a GPU may not notice."""
    if device.type == "cpu":
        _guard_addresses(monkeypatch)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(64).isnan().all(), "PyTorch no longer fills empty tensors: poison them some other way"
    yield
    torch.use_deterministic_algorithms(False)


def _guard_addresses(monkeypatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    from crate_fast.kernels.launch import Launch

    tensors, run = [], Launch.run  # (first address, end address) of each tensor of the running launch

    def guarded_run(launch):
        given = [value for value in launch.arguments.values() if isinstance(value, torch.Tensor) and value.numel()]
        lengths = (1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) for t in given)
        tensors[:] = [(t.data_ptr(), t.data_ptr() + n * t.itemsize) for t, n in zip(given, lengths, strict=True)]
        run(launch)

    def guarded(access, place_of_mask):
        def checked_access(builder, pointers, *args, **options):
            used, mask = pointers.data, args[place_of_mask].data
            if not mask.all():
                used = used[np.broadcast_to(mask, used.shape)]
            if used.size:
                start, end = int(used.min()), int(used.max()) + pointers.get_element_ty().primitive_bitwidth // 8
                assert any(first <= start and end <= last for first, last in tensors), "outside every tensor"
            return access(builder, pointers, *args, **options)

        return checked_access

    monkeypatch.setattr(Launch, "run", guarded_run)
    for name, place_of_mask in (("create_masked_load", 0), ("create_masked_store", 1)):
        access = getattr(InterpreterBuilder, name)
        monkeypatch.setattr(InterpreterBuilder, name, guarded(access, place_of_mask))


@pytest.fixture
def refuses(capsys):
    """Check that a command ends with status 2 and an error that matches: `refuses(message, main, words)`."""

    def check(message: str, main, words: list[str]) -> None:
        capsys.readouterr()
        assert main(words) == 2
        error = capsys.readouterr().err
        assert re.search(rf"(?m)^error: .*{message}", error), error

    return check


@contextmanager
def _without_figures():
    from runs import without_figures

    with pytest.MonkeyPatch.context() as patch:
        without_figures(patch.setattr)
        yield


@pytest.fixture(scope="module")
def no_figures():
    """Skip the figures of the module's training runs."""
    with _without_figures():
        yield


@pytest.fixture
def unsaved_figures(monkeypatch):
    """Write empty files for figures, which take longer to save than anything else in a small evaluation."""

    def save_empty(figure, paths):
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    monkeypatch.setattr("crate_fast.eval.common.figures.save_figure", save_empty)


@pytest.fixture
def drawn(monkeypatch):
    """Image grids as a list of (rows, titles), instead of files."""
    found = []
    grid = "crate_fast.eval.common.figures.image_grid"
    monkeypatch.setattr(grid, lambda rows, paths, **titles: found.append((rows, titles)))
    return found


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """Folder of a finished run on shape_scenes, 32 px, with checkpoints at steps 4 and 8."""
    from crate_fast.train import pretrain

    folder = tmp_path_factory.mktemp("run") / "tiny"
    words = "--train-samples 64 --val-samples 16 --batch-size 16 --epochs 2 --dim 32 --depth 2 --heads 2 "
    words += "--image-size 32 --segmentation-samples 8 --keep-checkpoints 9"
    with _without_figures():  # nobody looks at them
        assert pretrain.main([*words.split(), "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def _opened_run():
    import harness

    return harness.open_run(Namespace(smoke=True, dtype="float32", rounds=1, output=None))


@pytest.fixture
def run(_opened_run, tmp_path):
    """A benchmark's smoke run in fp32 with ceilings of 1 TFLOP/s and 100 GB/s."""
    facts = _opened_run.facts | {"matrix_tflops_per_s": 1.0, "copy_gb_per_s": 100.0}
    return replace(_opened_run, output=tmp_path, rows=[], facts=facts)


@pytest.fixture
def pretended_gpu(run, monkeypatch):
    """A benchmark's run that takes the GPU's code path on a CPU; a measurement calls once and finds 5 times 1 ms."""
    from triton import testing

    def do_bench(call, rep, return_mode):
        assert return_mode == "all"
        call()
        return 5 * [1.0]

    monkeypatch.setattr(testing, "do_bench", do_bench)
    monkeypatch.setattr(type(run), "on_gpu", True)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    return run
