"""Training steps replayed from a CUDA graph: by a stand-in that calls the function again, and on a GPU."""

import re
from contextlib import contextmanager

import pytest
import torch
from runs import CPU, steps, trainer

from crate_fast.errors import UserError
from crate_fast.train import cuda_graphs, distributed
from crate_fast.train.config import TrainConfig
from crate_fast.train.cuda_graphs import GraphedCall, record
from crate_fast.train.distributed import Processes, check_settings

MAE = {"model": "crate_mae_tiny_patch16_224", "clip_grad": 0.0}


def _replaying(function):
    """`cuda_graphs.record` without a GPU: warm-ups, a result without values, and calls that write them."""
    for _ in range(3):
        function()
    result = function()
    result.fill_(float("nan"))
    return result, lambda: result.copy_(function())


@pytest.fixture
def pretended_graphs(monkeypatch):
    """Graphs on a CPU, which the trainer does not refuse."""
    monkeypatch.setattr(cuda_graphs, "record", _replaying)
    monkeypatch.setattr(distributed, "check_settings", lambda *_: None)


SETTINGS = [
    {},
    {"accumulate": 2, "attn_drop_rate": 0.1, "drop_path_rate": 0.1, "ema_decay": 0.9},
    {"clip_mode": "agc", "clip_grad": 0.01, "optimizer": "lion"},
    {"precision": "fp16", "clip_mode": "value"},
    {"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.5, "channels_last": True},
    {"frozen": True, "optimizer": "lars"},
    MAE,
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ", ".join(settings) or "as they are")
def test_replayed_steps_are_the_eager_ones(settings, pretended_graphs):
    eager, graphed = trainer(**settings), trainer(**settings, cuda_graphs=True)
    assert isinstance(graphed.forward_backward, GraphedCall)
    places = set()
    for expected, found in zip(steps(eager), steps(graphed), strict=True):
        assert found == expected
        places.add(tuple(p.grad.data_ptr() for p in graphed.model.parameters() if p.requires_grad))
    assert len(places) == 1  # gradients stay where the graph writes
    pairs = [(eager.model, graphed.model)]
    pairs += [(eager.ema.module, graphed.ema.module)] if eager.ema is not None else []
    for one, other in pairs:
        for name, value in one.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name


def test_a_step_that_is_not_finite_leaves_nothing_behind(pretended_graphs):
    trainers = [trainer(), trainer(cuda_graphs=True)]
    for each in trainers:
        taken = steps(each)
        next(taken)
        right, each.normalize = each.normalize, lambda images: images * float("nan")
        assert not next(taken).taken
        each.normalize = right
        assert next(taken).taken
    for one, other in zip(*(each.model.parameters() for each in trainers), strict=True):
        assert torch.equal(one, other)


def test_a_restored_trainer_records_anew(pretended_graphs):
    trainers = [trainer(), trainer(cuda_graphs=True)]
    for each in trainers:
        taken = steps(each)
        next(taken)
        saved = each.state()
        next(taken)
        recorded = each.forward_backward
        each.restore(*saved)  # which drops the gradients that the graph writes
        assert (each.forward_backward is not recorded) or not each.config.cuda_graphs
        next(taken)
    for one, other in zip(*(each.model.parameters() for each in trainers), strict=True):
        assert torch.equal(one, other)


def test_a_graphed_call_copies_its_inputs_and_refuses_others(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "record", _replaying)
    seen = []
    call = GraphedCall(lambda x, y: seen.append(x.data_ptr()) or x + y)
    first = call(torch.ones(2), torch.ones(2))
    assert first.tolist() == [2, 2]
    second = call(torch.full((2,), 3.0), torch.ones(2))
    assert second is first
    assert second.tolist() == [4, 4]
    assert len(set(seen)) == 1
    with pytest.raises(ValueError, match=r"recorded with \[2\] in torch.float32, and this is \[1\]"):
        call(torch.ones(1), torch.ones(2))
    with pytest.raises(ValueError, match="torch.float64"):
        call(torch.ones(2), torch.ones(2).double())


def test_what_is_recorded_was_warmed_up_on_a_side_stream(monkeypatch):
    events = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            events.append("replay")

    @contextmanager
    def within(what, **options):
        name = getattr(what, "name", "graph")
        events.append(f"enter {name} {options}")
        yield
        events.append(f"leave {name}")

    current = Stream("current")
    pretended = {"Stream": Stream, "CUDAGraph": Graph, "stream": within, "graph": within}
    pretended |= {"is_available": lambda: True, "current_stream": lambda: current}
    for name, value in pretended.items():
        monkeypatch.setattr(torch.cuda, name, value)
    result, replay = record(lambda: events.append("call") or len(events))
    replay()
    warm = ["side waits for current", "enter side {}", *["call"] * 3, "leave side", "current waits for side"]
    assert events == [*warm, "enter graph {'capture_error_mode': 'thread_local'}", "call", "leave graph", "replay"]
    assert result == 9


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_nothing_is_recorded():
    with pytest.raises(UserError, match="CUDA graphs need a CUDA GPU"):
        record(lambda: None)


# --- what is refused ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compile_mode": "max-autotune"}, "compile_mode='max-autotune' needs compile=True: pass --compile too"),
        (
            {"compile": True, "compile_mode": "reduce-overhead", "cuda_graphs": True},
            "compile_mode='reduce-overhead' has CUDA graphs of its own: leave out cuda_graphs, or the mode",
        ),
        (
            {"compile": True, "compile_mode": "max-autotune", "accumulate": 2},
            "PyTorch's CUDA graphs overwrite gradients with accumulate=2; use cuda_graphs with",
        ),
        ({"cuda_graphs": True, "grad_checkpointing": True}, "cannot record grad_checkpointing=True"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        ({"cuda_graphs": True}, Processes(0, 0, 1, CPU), "cuda_graphs=True needs a CUDA GPU, and this run is on cpu"),
        ({"cuda_graphs": True}, Processes(0, 0, 2, torch.device("cuda")), "is for one process, and there are 2"),
        (
            {"compile": True, "compile_mode": "reduce-overhead", "parallel": "fsdp"},
            Processes(0, 0, 2, torch.device("cuda")),
            "use compile_mode='default', or parallel='ddp'",
        ),
    ],
)
def test_settings_that_do_not_go_with_the_machine(settings, processes, message):
    config = TrainConfig(**settings)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_settings(config, processes)


def test_settings_that_go_together():
    graphs = TrainConfig(cuda_graphs=True, compile=True, compile_mode="max-autotune-no-cudagraphs", accumulate=2)
    check_settings(graphs, Processes(0, 0, 1, torch.device("cuda", 0)))
    check_settings(
        TrainConfig(compile=True, compile_mode="reduce-overhead"), Processes(0, 0, 2, torch.device("cuda"))
    )


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [*SETTINGS, {"compile": True}], ids=str)
def test_on_a_gpu_replayed_steps_are_the_eager_ones(settings):
    alone = Processes(0, 0, 1, torch.device("cuda", 0))
    trainers = [trainer(alone, **settings), trainer(alone, **settings, cuda_graphs=True)]
    expected, found = ([step.measures["loss"] for step in steps(each)] for each in trainers)
    assert found == pytest.approx(expected, rel=0.1 if "attn_drop_rate" in settings else 0.01)
