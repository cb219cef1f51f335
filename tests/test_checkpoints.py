"""Reading and writing released checkpoint files: wrappers, prefixes, positions, damage, and hidden code."""

import argparse
import io
import os
import pickle
import re
from functools import partial
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from released import ReleasedCRATE, ReleasedCRATEMAE
from runs import same
from safetensors.torch import save, save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from crate_fast import CRATE, CRATEMAE
from crate_fast.checkpoints import adapt_state_dict, load_weights, read_state_dict, released_state_dict
from crate_fast.errors import UserError

SMALL = {"image_size": 32, "patch_size": 8, "num_classes": 7, "dim": 48, "depth": 2, "heads": 3, "dim_head": 16}


@pytest.fixture
def released():
    return ReleasedCRATE(**SMALL)


WRAPPERS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "best_acc1": torch.tensor(1.0)},
    "model": lambda state: {"model": {"state_dict": state}, "args": argparse.Namespace(lr=1)},
    "compiled DDP": lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_released_files_load_strictly(released, wrapper, tmp_path):
    torch.save(WRAPPERS[wrapper](released.state_dict()), tmp_path / "checkpoint.pth")
    model = load_weights(CRATE(**SMALL), tmp_path / "checkpoint.pth")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), released(images), rtol=1e-4, atol=1e-5)
    save_file(released.state_dict(), tmp_path / "weights.safetensors")
    assert torch.equal(load_weights(model, tmp_path / "weights.safetensors").cls_token, released.cls_token)


def test_export_loads_into_the_released_module_and_refuses_what_it_cannot_build(released):
    model, images = CRATE(**SMALL), torch.randn(2, 3, 32, 32)
    released.load_state_dict(released_state_dict(model), strict=True)
    torch.testing.assert_close(released(images), model(images), rtol=1e-4, atol=1e-5)
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        assert released_state_dict(wrapped).keys() == released.state_dict().keys()
    for options in ({"heads": 1, "dim_head": 48}, {"pool": "mean"}):  # the first has no output map
        assert released_state_dict(CRATE(**SMALL | options))
    refused = {"residual": "paper", "attention": "mhsa", "sparsifier": "mlp", "threshold": "soft", "pool": "avg"}
    refused |= {"norm_eps": 1e-6, "num_classes": 0}
    for name, value in refused.items():
        with pytest.raises(ValueError, match=f"the released code has no such model.*{name}="):
            released_state_dict(CRATE(**SMALL | {name: value}))


def _of_grid(grid: tuple[int, int]) -> CRATE:
    return CRATE(**(SMALL | {"image_size": (8 * grid[0], 8 * grid[1])}))


@pytest.mark.parametrize(("old", "new"), [((4, 4), (8, 8)), ((2, 8), (8, 8)), ((3, 5), (5, 3)), ((2, 8), (2, 8))])
def test_positions_are_resampled_to_another_grid_as_timm_does(old, new, tmp_path):
    source, path, given = _of_grid(old), tmp_path / "weights.pth", None if old == (4, 4) else old
    torch.save({"model": nn.DataParallel(source).state_dict()}, path)
    targets = [load_weights(_of_grid(new), path, resample=True, source_grid=given)]
    if given is None:
        overlay, sizes = {"file": str(path), "num_classes": 7}, {"dim": 48, "depth": 2, "heads": 3, "num_classes": 7}
        name, sizes = "crate_tiny_patch8_224", sizes | {"img_size": (8 * new[0], 8 * new[1])}
        targets.append(timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **sizes))
    expected = resample_abs_pos_embed(source.pos_embedding.detach(), list(new), list(old))
    for target in targets:
        torch.testing.assert_close(target.pos_embedding.detach(), expected, rtol=0, atol=0)
        assert torch.equal(target.cls_token, source.cls_token)


def test_as_many_positions_as_the_models_are_kept_and_an_unknown_grid_is_refused():
    wide, plain = _of_grid((2, 8)), _of_grid((4, 4)).state_dict()
    assert torch.equal(adapt_state_dict(plain, wide)["pos_embedding"], plain["pos_embedding"])  # as in timm
    plain = _of_grid((3, 5)).state_dict()
    for given, grid in ((None, "3×3"), ((2, 8), "2×8")):
        with pytest.raises(UserError, match=f"15 patches cannot be resampled as a grid of {grid}: pass source_grid"):
            adapt_state_dict(plain, _of_grid((4, 4)), source_grid=given)
    with pytest.raises(UserError, match="cannot be resampled.*width"):
        adapt_state_dict({"pos_embedding": torch.zeros(1, 17, 32)}, wide)


def test_an_autoencoder_keeps_the_positions_of_its_own_grid(tmp_path):
    sizes = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    square, wide = (CRATEMAE(img_size=size, **sizes) for size in (32, (16, 64)))
    adapted = adapt_state_dict(square.state_dict(), wide)
    assert torch.equal(adapted["decoder_pos_embed"], wide.decoder_pos_embed)
    assert torch.equal(adapted["cls_token"], square.cls_token)
    half = {name: value.bfloat16() for name, value in wide.state_dict().items()}
    assert torch.equal(adapt_state_dict(half, wide)["pos_embed"], half["pos_embed"])
    released = ReleasedCRATEMAE(img_size=32, **sizes).state_dict()
    assert adapt_state_dict(released, square).keys() == square.state_dict().keys()


class Demo(nn.Module):
    """The released model with the demo's classifier: LayerNorm, Linear, and another Linear."""

    def __init__(self):
        super().__init__()
        self.body, self.head = ReleasedCRATE(**(SMALL | {"num_classes": 48})), nn.Linear(48, 5)

    def forward(self, images):
        return self.head(self.body(images))

    def released(self) -> dict:
        return {name.removeprefix("body."): value for name, value in self.state_dict().items()}


HIDDEN = SMALL | {"num_classes": 5, "head_hidden": True}


def test_the_demo_checkpoint_loads_through_every_loader(tmp_path):
    demo, images, path = Demo(), torch.randn(2, 3, 32, 32), tmp_path / "demo.pth"
    torch.save(WRAPPERS["compiled DDP"](demo.released()), path)
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": 5}}
    through_timm = partial(timm.create_model, "crate_tiny_patch8_224", **HIDDEN)
    by_hand = CRATE(**HIDDEN)
    by_hand.load_state_dict(demo.released())
    ours = load_weights(CRATE(**HIDDEN), path)
    for model in (ours, by_hand, through_timm(checkpoint_path=str(path)), through_timm(**overlay)):
        torch.testing.assert_close(model(images), demo(images), rtol=1e-4, atol=1e-5)
    assert same(released_state_dict(by_hand), demo.released())


@pytest.mark.parametrize("names", [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema")])
def test_of_weights_and_their_moving_average_the_average_is_read_with_a_warning(names, released, tmp_path):
    average = {name: value + 1 for name, value in released.state_dict().items()}
    path = tmp_path / "both.pth"
    torch.save({names[0]: released.state_dict(), names[1]: average, "epoch": 3}, path)
    with pytest.warns(UserWarning, match=f"hold {names[1]} and {names[0]}: using {names[1]}; .*save it alone"):
        found = read_state_dict(path)
    assert torch.equal(found["cls_token"], average["cls_token"])
    if names[1] != "ema":  # a name that timm does not read
        sizes = {"num_classes": 7, "dim": 48, "depth": 2, "heads": 3, "img_size": 32}
        through_timm = timm.create_model("crate_tiny_patch8_224", checkpoint_path=str(path), **sizes)
        assert torch.equal(through_timm.cls_token, found["cls_token"])


def _bytes(write) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


_zip = partial(np.savez, x=1)


def _script(buffer) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), buffer)


class _Code:
    """An object whose unpickling runs code."""

    def __reduce__(self):
        return (os.system, ("echo code ran",))


def _saved(content, **options) -> bytes:
    return _bytes(lambda buffer: torch.save(content, buffer, **options))


_saved_before_zip = partial(_saved, _use_new_zipfile_serialization=False)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 91267000\n"
TENSORS, TWICE = {"cls_token": torch.zeros(1, 1, 4)}, {"w": torch.zeros(1), "module.w": torch.zeros(1)}
LINEAR, MORE = nn.Linear(2, 2), r"more than tensors.*nn\.modules\.linear\.Linear"
FILES = {  # kind: name, content, the message, the remedy
    "lfs": ("w.pth", lambda: LFS, "a git-lfs pointer", "git lfs pull"),
    "text": ("w.pth", lambda: "Entry not found: é\n".encode(), "begins with b'Entry not found: ", "download"),
    "zip": ("w.pth", lambda: _bytes(_zip), "an archive or a program", "pass the file inside"),
    "empty": ("w.pth", lambda: b"", "is empty", "download it again"),
    "cut zip": ("w.pth", lambda: _saved(TENSORS)[:-40], "damaged or truncated", "incomplete: download it again"),
    "cut safetensors": ("w.safetensors", lambda: save(TENSORS)[:-4], "damaged, truncated", "download it again"),
    "safetensors as pth": ("w.pth", lambda: save(TENSORS), "a safetensors file", "rename it to end in .safetensors"),
    "pth as safetensors": ("w.safetensors", lambda: _saved(TENSORS), "a torch.save file", "rename it to end in .pth"),
    "torchscript": ("w.pt", lambda: _bytes(_script), "TorchScript", "save only its state dict where it was made"),
    "model": ("w.pth", lambda: _saved(LINEAR), MORE, "save only its state dict"),
    "old model": ("w.pth", lambda: _saved_before_zip(LINEAR), MORE, "save only its state dict"),
    "list": ("w.pth", lambda: _saved([torch.zeros(1)]), "it holds a list", "only its state dict"),
    "code": ("w.pth", lambda: _saved({"w": _Code()}), r"more than tensors.*\(\w+\.system\)", "only its state dict"),
    "pickled code": ("w.pth", lambda: pickle.dumps(_Code()), "a Python pickle", "only its state dict"),
    "complex": ("w.pth", lambda: _saved({"w": torch.zeros(2) * 1j}), "w is not .* of real numbers", "plain model"),
    "meta": ("w.pth", lambda: _saved({"w": torch.zeros(2, device="meta")}), "w is not a dense tensor", "plain model"),
    "no tensors": ("w.pth", lambda: _saved({"epoch": 3}), "it holds the keys epoch", "only its state dict"),
    "two names": ("w.pth", lambda: _saved(TWICE), "'w' and 'module.w' name one parameter", "remove one of them"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("kind", FILES)
def test_a_file_without_weights_is_an_error_with_a_safe_remedy(kind, tmp_path, capfd):
    name, content, what, remedy = FILES[kind]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(UserError, match=f"(?s){name}.*{what}.*{remedy}") as refused:
        read_state_dict(tmp_path / name)
    assert not re.search(r"\n|trust|weights_only", str(refused.value))
    assert "code ran" not in capfd.readouterr().out


def test_quantized_weights_are_refused(released, tmp_path):
    integers = {name: (100 * value).to(torch.int8) for name, value in released.state_dict().items()}
    torch.save(integers, tmp_path / "int8.pth")
    with pytest.raises(UserError, match=r"int8\.pth holds \S+ as torch\.int8, as quantized models do"):
        load_weights(CRATE(**SMALL), tmp_path / "int8.pth")


def test_a_folder_and_an_unreadable_file_are_errors(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is a folder: pass the weight file in it"):
        read_state_dict(tmp_path)
    with pytest.raises(UserError, match=r"none\.pth: no such checkpoint file"):
        read_state_dict(tmp_path / "none.pth")
    (tmp_path / "w.pth").write_bytes(_saved(TENSORS))
    monkeypatch.setattr("pathlib.Path.open", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(UserError, match=r"w\.pth cannot be read \(Permission denied\): check its permissions"):
        read_state_dict(tmp_path / "w.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_randomly_damaged_file_is_read_or_refused_in_one_line(tmp_path):
    refusals = []
    random = np.random.default_rng(0)
    files = {"w.pth": _saved(TENSORS), "old.pth": _saved_before_zip(TENSORS), "w.safetensors": save(TENSORS)}
    for name, data in files.items():
        for trial in range(60):
            changed = bytearray(data)
            for place in random.integers(0, len(data), 3):
                changed[place] = random.integers(256)
            (tmp_path / name).write_bytes(changed if trial % 2 else data[: random.integers(len(data))])
            try:
                read_state_dict(tmp_path / name)
            except UserError as error:
                refusals.append(str(error))
    assert len(refusals) > 90
    assert not [text for text in refusals if "\n" in text or "weights_only" in text or str(tmp_path) not in text]
