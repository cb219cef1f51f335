"""Released checkpoint files in and out: wrappers, prefixes, positions, damage, and code that must not run."""

import pickle

import pytest
import torch
from released import ReleasedCRATE
from safetensors.torch import save_file

from crate_fast import CRATE
from crate_fast.checkpoints import (
    adapt_state_dict,
    load_weights,
    read_state_dict,
    released_state_dict,
    unwrap_state_dict,
)
from crate_fast.errors import UserError

SMALL = {"image_size": 32, "patch_size": 8, "num_classes": 7, "dim": 48, "depth": 2, "heads": 3, "dim_head": 16}


@pytest.fixture
def released():
    return ReleasedCRATE(**SMALL)


WRAPPERS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "best_acc1": torch.tensor(1.0)},
    "model": lambda state: {"model": state, "args": "x"},
    "nested": lambda state: {"model": {"state_dict": state}},
    "module.": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    "compiled DDP": lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_released_files_load_strictly(released, wrapper, tmp_path):
    torch.save(WRAPPERS[wrapper](released.state_dict()), tmp_path / "checkpoint.pth")
    model = load_weights(CRATE(**SMALL), tmp_path / "checkpoint.pth")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), released(images), rtol=1e-4, atol=1e-5)


def test_safetensors_load(released, tmp_path):
    save_file(released.state_dict(), tmp_path / "weights.safetensors")
    model = load_weights(CRATE(**SMALL), tmp_path / "weights.safetensors")
    assert torch.equal(model.cls_token, released.cls_token)


def test_export_loads_into_the_released_module(released):
    model = CRATE(**SMALL)
    released.load_state_dict(released_state_dict(model), strict=True)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(released(images), model(images), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(model)
    assert released_state_dict(compiled).keys() == released.state_dict().keys()


@pytest.mark.parametrize(
    "options", [{"residual": "paper"}, {"attention": "mhsa"}, {"sparsifier": "mlp"}, {"threshold": "soft"}]
)
def test_export_refuses_what_the_released_code_cannot_build(options):
    with pytest.raises(ValueError, match="the released code has no such model"):
        released_state_dict(CRATE(**SMALL, **options))


def test_positions_of_another_size_are_resampled_only_when_asked(released, tmp_path):
    torch.save(released.state_dict(), tmp_path / "weights.pth")
    larger = CRATE(**(SMALL | {"image_size": 64}))
    with pytest.raises(RuntimeError, match="pos_embedding"):
        load_weights(larger, tmp_path / "weights.pth")
    load_weights(larger, tmp_path / "weights.pth", resample=True)
    assert larger.pos_embedding.shape == (1, 65, 48)
    small = CRATE(**SMALL)
    small.load_state_dict(released.state_dict())
    torch.testing.assert_close(larger.pos_embedding, small.position_embedding((8, 8)))
    with pytest.raises(ValueError, match="cannot be resampled"):
        adapt_state_dict({"pos_embedding": torch.zeros(1, 12, 48)}, larger)


def test_another_head_is_an_error(released, tmp_path):
    torch.save(released.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(RuntimeError, match=r"mlp_head\.1\.weight"):
        load_weights(CRATE(**(SMALL | {"num_classes": 3})), tmp_path / "weights.pth", resample=True)


class _Bomb:
    def __reduce__(self):
        return (print, ("code ran",))


def test_pickled_code_is_refused_and_does_not_run(released, tmp_path, capsys):
    torch.save({"model": released.state_dict(), "extra": _Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_state_dict(tmp_path / "bomb.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ValueError, match=r"plain\.pth"):
        read_state_dict(tmp_path / "plain.pth")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
def test_damaged_files_are_named(released, name, tmp_path):
    path = tmp_path / name
    save = save_file if path.suffix == ".safetensors" else torch.save
    save(released.state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        read_state_dict(path)


def test_absent_and_empty_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        read_state_dict(tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"no state dict found.*epoch"):
        unwrap_state_dict({"epoch": 3})
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="the file holds a list"):
        read_state_dict(tmp_path / "list.pth")
    with pytest.raises(ValueError, match="name one parameter"):
        unwrap_state_dict({"cls_token": torch.zeros(1), "module.cls_token": torch.zeros(1)})
