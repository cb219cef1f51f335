"""Which model a command gets for which words, and what it says to the wrong ones."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from crate_fast.errors import UserError
from crate_fast.eval.models import open_model, split_label
from crate_fast.eval.white_box import main as white_box

SMALL = ["depth=2", "dim=32", "heads=2", "img_size=32"]
NAME = "crate_tiny_patch8_224"


def test_labels():
    assert split_label("CRATE-S/8=runs/a") == ("CRATE-S/8", "runs/a")
    assert split_label("ours=runs/a@12") == ("ours", "runs/a@12")
    assert split_label("runs/a") == ("a", "runs/a")
    assert split_label("vit_x@untrained") == ("vit_x@untrained", "vit_x@untrained")


def test_a_run_its_steps_and_its_untrained_twin(tiny_run):
    best, at_four, again = (open_model(f"{tiny_run}{which}") for which in ("", "@4", "@4"))
    assert best.label == "tiny"
    assert best.config.image_size == 32
    assert (
        at_four.facts["weights_sha256"]
        == again.facts["weights_sha256"]
        != open_model(f"{tiny_run}@8").facts["weights_sha256"]
    )
    twins = [open_model(f"{tiny_run}@untrained", seed=seed) for seed in (0, 0, 1)]
    hashes = [twin.facts["weights_sha256"] for twin in twins]
    assert hashes[0] == hashes[1] != hashes[2]
    assert twins[0].facts["parameters"] == best.facts["parameters"]
    with pytest.raises(UserError, match=r"no checkpoint at step 5: choose one of \[4, 8\]"):
        open_model(f"{tiny_run}@5")
    with pytest.raises(ValueError, match="write @STEP or @untrained"):
        open_model(f"{tiny_run}@latest")
    with pytest.raises(UserError, match="is no run"):
        open_model(str(tiny_run.parent) + "@untrained")


def test_files_are_loaded_strictly(tmp_path):
    source = timm.create_model(NAME, num_classes=7, depth=2, dim=32, heads=2, img_size=32)
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, tmp_path / "w.safetensors")
    torch.save({"model": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "w.pth")
    subjects = [open_model(f"mine={NAME}@{tmp_path / name}", model_args=SMALL) for name in ("w.safetensors", "w.pth")]
    assert subjects[0].label == "mine"
    assert subjects[0].model.num_classes == 7  # read from the file
    for subject in subjects:
        assert torch.equal(subject.model.mlp_head[1].weight, source.mlp_head[1].weight)
    with pytest.raises(ValueError, match=r"(?s)does not hold the weights of.*--model-args"):
        open_model(f"{NAME}@{tmp_path / 'w.pth'}", model_args=["depth=3", *SMALL[1:]])
    with pytest.raises(ValueError, match="does not hold the weights of vit_tiny_patch16_224"):
        open_model(f"vit_tiny_patch16_224@{tmp_path / 'w.pth'}")
    with pytest.raises(UserError, match="no such checkpoint file"):
        open_model(f"{NAME}@{tmp_path / 'absent.pth'}")


def test_timm_vits_from_a_file(tmp_path):
    source = timm.create_model("vit_small_patch8_224.dino", depth=1, img_size=32)
    torch.save(source.state_dict(), tmp_path / "dino.pth")
    subject = open_model(
        f"vit_small_patch8_224.dino@{tmp_path / 'dino.pth'}", image_size=64, model_args=["depth=1", "img_size=32"]
    )
    assert subject.extract.grid == (8, 8)
    mean = torch.tensor(subject.model.pretrained_cfg["mean"])
    white = subject.normalize(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8))
    torch.testing.assert_close(white[0, :, 0, 0], (1 - mean) / torch.tensor(subject.model.pretrained_cfg["std"]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/absent", "neither the folder of a run nor a model that timm knows"),
        (NAME, f"say whose weights: {NAME}@FILE"),
        (f"{NAME}@pretrained", f"Give a file of its weights, as in {NAME}@FILE"),
        ("resnet18@untrained", "no patch features can be read from a ResNet"),
    ],
)
def test_wrong_words(name, message):
    with pytest.raises((ValueError, TypeError), match=message):
        open_model(name)


def test_a_run_takes_no_model_arguments(tiny_run, tmp_path, capsys):
    assert open_model(str(tiny_run), model_args=["depth=7"]).facts["model_args"] == {}
    assert white_box([str(tiny_run), "--model-args", "depth=7", "--output", str(tmp_path)]) == 2
    assert "a run knows its own model" in capsys.readouterr().err


def test_wrong_arguments():
    with pytest.raises(ValueError, match="write KEY=VALUE"):
        open_model(f"{NAME}@untrained", model_args=["depth"])
    with pytest.raises(ValueError, match="image size 30 is not a multiple"):
        open_model(f"{NAME}@untrained", image_size=30, model_args=SMALL)
