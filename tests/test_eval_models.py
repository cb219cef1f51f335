"""Opening models by name for the evaluation commands; the packaged models; folders of `crate-fast share`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import pil_to_tensor

import crate_fast
from crate_fast import pretrained
from crate_fast.errors import UserError
from crate_fast.eval.common import models as models_module
from crate_fast.eval.common.images import SceneImages, batches, open_images
from crate_fast.eval.common.models import open_model
from crate_fast.eval.common.segmentation import attention_to_mask, average_precision, intersection_over_union
from crate_fast.eval.explore.command import model_choices
from crate_fast.eval.white_box import main as white_box
from crate_fast.train import share
from crate_fast.train.config import TrainConfig
from crate_fast.train.data.shape_scenes import CLASSES
from crate_fast.train.data.transforms import Normalize, eval_transform
from crate_fast.train.runs import build_model, load_model

SMALL = ["depth=2", "dim=32", "heads=2", "img_size=32"]
NAME = "crate_tiny_patch8_224"


def test_a_run_is_opened_at_its_best_step_a_given_step_or_untrained(tiny_run, monkeypatch):
    best, at_four, again, at_eight = (open_model(f"{tiny_run}{which}") for which in ("", "@4", "@4", "@8"))
    assert (best.label, best.config.image_size) == ("tiny", 32)
    twins = [open_model(f"{tiny_run}@untrained", seed=seed) for seed in (0, 0, 1)]
    for models in ((at_four, again, at_eight), twins):
        hashes = [loaded.facts["weights_sha256"] for loaded in models]
        assert hashes[0] == hashes[1] != hashes[2]
    assert twins[0].facts["parameters"] == best.facts["parameters"]
    monkeypatch.setattr(models_module, "run_config", lambda _: replace(best.config, seed=1))
    assert open_model(f"{tiny_run}@untrained").facts["weights_sha256"] == twins[2].facts["weights_sha256"]


def test_folders_and_files_may_have_an_at_in_their_names(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "a@b" / "run@4")
    for before, after in (("", ""), ("mine=", ""), ("", "@8")):
        name, wanted = f"{before}{folder}{after}", open_model(f"{before}{tiny_run}{after}")
        assert open_model(name).facts["weights_sha256"] == wanted.facts["weights_sha256"]
    file, sizes = folder / "w@1.pth", {"depth": 2, "dim": 32, "heads": 2, "img_size": 32}
    torch.save(timm.create_model(NAME, num_classes=7, **sizes).state_dict(), file)
    assert open_model(f"{NAME}@{file}", model_args=SMALL).model.num_classes == 7


def test_files_are_loaded_strictly(tmp_path):
    source = timm.create_model(NAME, num_classes=7, depth=2, dim=32, heads=2, img_size=32)
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, tmp_path / "w.safetensors")
    torch.save({"model": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        loaded = open_model(f"mine={NAME}@{tmp_path / name}", model_args=SMALL)
        assert (loaded.label, loaded.model.num_classes) == ("mine", 7)  # the number of classes is read from the file
        assert torch.equal(loaded.model.mlp_head[1].weight, source.mlp_head[1].weight)
    for other in (["depth=3", *SMALL[1:]], [*SMALL, "img_size=64"]):
        with pytest.raises(UserError, match="does not hold the weights of.*--model-args"):
            open_model(f"{NAME}@{tmp_path / 'w.pth'}", model_args=other)


def test_the_demo_checkpoint_opens_like_any_file_but_needs_its_number_of_heads(tmp_path):
    """A file does not record the heads; with the 12 of crate_base_patch8_224 the results would be silently wrong."""
    name, sizes = "crate_base_patch8_224", {"depth": 1, "img_size": 32, "num_classes": 7}
    source = timm.create_model(name, heads=6, head_hidden=True, **sizes).eval()
    state = {k.replace("mlp_head.2.", "head."): v for k, v in source.state_dict().items()}
    torch.save({"model": {f"module._orig_mod.{k}": v for k, v in state.items()}}, tmp_path / "demo.pth")
    demo, words, images = f"{name}@{tmp_path / 'demo.pth'}", ["depth=1", "img_size=32"], torch.randn(2, 3, 32, 32)
    with pytest.raises(UserError, match="has 6 heads; the number is not in the file: pass --model-args heads=6"):
        open_model(demo, model_args=words)
    for more in ([], ["head_hidden=true"]):
        model = open_model(demo, model_args=[*words, "heads=6", *more]).model
        assert model.num_classes == 7
        assert torch.equal(model(images), source(images))
    with pytest.raises(UserError, match=f"does not hold the weights of {name} .*head_hidden=True"):
        open_model(demo, model_args=[*words, "heads=6", "head_hidden=false"])


def test_a_vit_of_timm_opens_from_a_file_with_its_own_normalisation(tmp_path):
    source = timm.create_model("vit_small_patch8_224.dino", depth=1, img_size=32)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    name, words = f"vit_small_patch8_224.dino@{tmp_path / 'vit.pth'}", ["depth=1", "img_size=32"]
    loaded = open_model(name, image_size=64, model_args=words)
    assert loaded.extract.grid == (8, 8)
    mean, std = (torch.tensor(loaded.model.pretrained_cfg[name]) for name in ("mean", "std"))
    white = loaded.normalize(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8))
    torch.testing.assert_close(white[0, :, 0, 0], (1 - mean) / std)


def test_wrong_model_names_are_errors(tiny_run):
    for name, message in (
        (f"{tiny_run}@5", r"no checkpoint at step 5: choose one of \[4, 8\]"),
        (f"{tiny_run}@latest", "write @STEP or @untrained"),
        (f"{tiny_run.parent}@untrained", "is not a run"),
        ("runs/absent", "neither the folder of a run nor a timm model"),
        ("photographs", "did you mean 'shipped:photographs'"),
        (NAME, f"choose weights: {NAME}@FILE"),
        (f"{NAME}@pretrained", f"Give a file of its weights, as in {NAME}@FILE"),
        (f"{NAME}.nope@untrained", "nor a timm model"),
        ("shipped:../CRATE", "choose one of .*shipped:CRATE"),
        ("shipped:CRATE@4", "write shipped:CRATE or shipped:CRATE@untrained"),
    ):
        with pytest.raises(UserError, match=message):
            open_model(name)


def test_wrong_model_arguments_are_errors(tiny_run, tmp_path, refuses):
    for word, message in (  # each is accepted by timm, or another error there
        ("heads", "write KEY=VALUE"),
        ("num_heads=-3", "'num_heads=-3': give a number of at least 0"),
        ("depth=NaN", "give a number of at least 0"),
        ("mlp_ratio=a", "does not take --model-args .*ValueError"),
        ("norm_layer=a", "does not take --model-args .*KeyError"),
        ("img_size=40", "image size 40 is not a multiple of this model's patch size 16×16"),
        ("num_heads=0", "model='vit_tiny_patch16_224' cannot be built with .*: choose sizes that fit"),
    ):
        with pytest.raises(UserError, match=message):
            open_model("vit_tiny_patch16_224@untrained", model_args=["depth=1", word])
    assert open_model(str(tiny_run), model_args=["depth=7"]).facts["model_args"] == {}
    words = [str(tiny_run), "--model-args", "depth=7", "--output", str(tmp_path)]
    refuses("have their own settings; leave them out", white_box, words)


def test_damaged_files_of_a_run_are_one_line_errors(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    weights = folder / "checkpoints" / "step_00000008" / "model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    with pytest.raises(UserError, match="is a git-lfs pointer.*git lfs pull`. .*step_00000004 is intact"):
        open_model(f"{folder}@8")
    (folder / "checkpoints" / "best.json").write_text("")
    with pytest.raises(UserError, match=r"best\.json cannot be read.*delete it to use the newest"):
        open_model(str(folder))
    (weights.parent / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        open_model(f"{folder}@untrained")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("depth: 2", "depth: 3"))
    message = r"^[^\n]*step 4 does not hold the weights of this model[^\n]*config.yaml[^\n]*$"
    with pytest.raises(UserError, match=message):
        open_model(f"{folder}@4")


@torch.no_grad()
def _maps(name: str, images: torch.Tensor) -> torch.Tensor:
    """Return CLS attention at the default layer, [B, H, P]."""
    loaded = open_model(name)
    layer = loaded.extract.default_layer
    return loaded.features(images, [layer]).cls_attention(layer)


def test_segmentation_emerges_in_the_packaged_crate():
    """mIoU by mass of the best head, on scenes that no model was trained on."""
    (batch,) = batches(SceneImages(128, 32, seed=900_002), 32, [])
    objects = torch.stack([sample.target.on_grid((16, 16))[0][0] for sample in batch.samples])

    def best_head_miou(name: str) -> float:
        masks = attention_to_mask(_maps(name, batch.images), "mass")
        return intersection_over_union(masks, objects[:, None]).amax(dim=1).mean().item()

    assert best_head_miou("shipped:CRATE") > 0.45  # 0.515 on 500 scenes, docs/emergence/earlier/first/report.md
    assert best_head_miou("shipped:ViT") < 0.4  # 0.306
    assert best_head_miou("shipped:CRATE@untrained") < 0.2  # 0.130


def test_the_packages_crate_finds_a_flower_in_a_photograph():
    image = open_images("photographs", 128)[5].image
    orange = F.adaptive_avg_pool2d((image[:1] > 140).float(), 16).flatten() > 0.5
    names = ("shipped:photographs", "shipped:photographs@untrained")
    trained, untrained = (average_precision(_maps(name, image[None]), orange).max() for name in names)
    assert trained > 0.9 > untrained


def test_packaged_models_agree_with_their_records():
    for name in pretrained.packaged_models():
        model = crate_fast.load_pretrained(name)
        photographs = name.startswith("photographs")
        labels, mean = pretrained.record(name)["label_names"], timm.data.resolve_model_data_config(model)["mean"]
        assert list(mean) == list(timm.data.IMAGENET_DEFAULT_MEAN if photographs else [0.5, 0.5, 0.5])
        assert (len(labels) == 100 and "goldfish" in labels) if photographs else labels == list(CLASSES)
        assert (model.num_classes, *model.image_size, model.training) == (len(labels), 128, 128, False)
        assert pretrained.record(name)["description"].startswith("ViT" if name.endswith("ViT") else "CRATE")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_shared_folder_gives_the_outputs_of_its_run(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    share.write_model_folder(tiny_run, Path("CRATE"))  # the name of a packaged model
    share.write_model_folder(tiny_run, Path("half"), half=True, description="a small one")
    share.write_model_folder(tiny_run, Path("large"), image_size=64)
    images, larger = (torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8) for side in (32, 64))
    run, shared, half, large = (open_model(str(name)) for name in (tiny_run, "mine=CRATE", "half", "large"))
    resized = open_model(str(tiny_run), image_size=64)
    with torch.no_grad():
        expected = run.model(run.normalize(images))
        assert torch.equal(shared.model(shared.normalize(images)), expected)
        by_timm = timm.create_model(f"local-dir:{tmp_path / 'CRATE'}", pretrained=True).eval()
        for other in (by_timm, crate_fast.load_pretrained("CRATE")):  # the folder, not the packaged model
            assert torch.equal(other(run.normalize(images)), expected)
        assert half.model(half.normalize(images)) == pytest.approx(expected, abs=5e-3)
        assert not torch.equal(open_model("CRATE@untrained").model(run.normalize(images)), expected)
        expected = resized.model(resized.normalize(larger))
        torch.testing.assert_close(large.model(large.normalize(larger)), expected)
    assert (shared.label, large.facts["image_size"]) == ("mine", [64, 64])
    assert pretrained.record("half")["description"] == "a small one" in Path("half/README.md").read_text()
    config = timm.models._hub.load_model_config_from_path("CRATE")
    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", lambda *_, **__: config)
    hub = open_model("hf-hub:USER/NAME@untrained")
    assert list(shared.classes) == list(run.classes) == list(hub.classes) == list(CLASSES)
    assert [choice.specification for choice in model_choices("CRATE")] == ["CRATE"]


def test_damaged_model_folders_are_one_line_errors(tiny_run, tmp_path):
    share.write_model_folder(tiny_run, tmp_path / "mine")
    save_file({"cls_token": torch.zeros(1)}, tmp_path / "mine" / "model.safetensors")
    with pytest.raises(UserError, match="mine does not hold the weights.*write the folder"):
        crate_fast.load_pretrained(str(tmp_path / "mine"))
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json is not valid"):
        crate_fast.load_pretrained(str(tmp_path / "mine"))
    message = "'Crate' is not a model with weights: pass one of photographs, .*ViT, a folder"
    with pytest.raises(UserError, match=message):
        crate_fast.load_pretrained("Crate")


def test_a_hub_that_does_not_answer_is_a_one_line_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused = pytest.raises(UserError, match="hf-hub:nobody/nothing: .*try again with a network, or pass a folder")
    with refused:
        open_model("hf-hub:nobody/nothing")
    with pytest.raises(UserError, match="'hf-hub:nobody' is not a name on the Hub: pass hf-hub:USER/NAME"):
        crate_fast.load_pretrained("hf-hub:nobody")
    config = {"hf_hub_id": "nobody/nothing", "source": "hf-hub"}  # the config is there, the weights are not
    known = config, "crate_tiny_patch8_224", {"depth": 1, "img_size": 32}
    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", lambda *_, **__: known)
    with refused:
        open_model("hf-hub:nobody/nothing")


@pytest.fixture(scope="module")
def shared(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared") / "model"
    assert share.main([str(tiny_run), str(folder), "--license", "mit"]) == 0
    return folder


@pytest.mark.parametrize("name", ["vit_base_patch8_224", "crate_alpha_base_patch8_224"])
def test_timm_prepares_images_for_the_folder_as_our_evaluation_does(name, tiny_run, tmp_path, monkeypatch):
    config = replace(load_model(tiny_run)[1], model=name)
    monkeypatch.setattr(share, "load_model", lambda run: (build_model(config, 12), config, 8))
    share.write_model_folder(tiny_run, tmp_path / "model")
    opened = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(opened))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    expected = pil_to_tensor(eval_transform(config.image_size)(picture))
    torch.testing.assert_close(prepare(picture)[None], Normalize(config.mean)(expected[None]))


def test_the_card_has_the_runs_scores_and_no_local_paths(shared, tiny_run):
    card = (shared / "README.md").read_text()
    summary = json.loads((tiny_run / "summary.json").read_text())
    assert f"validation accuracy at 32 px: {summary['best_val_accuracy']:.4f}" in card
    for words in ("after the last step at 32 px, average precision, best head", "mean mask"):
        assert words in card
    assert {"license: mit", "dim: 32"} <= {*card.splitlines()}
    assert json.loads((shared / "config.json").read_text())["pretrained_cfg"]["license"] == "mit"
    assert "/tmp" not in card


def test_runs_that_cannot_be_shared_are_errors(shared, tiny_run, tmp_path, refuses, monkeypatch):
    run, new = str(tiny_run), str(tmp_path / "new")
    refuses("already holds a model", share.main, [run, str(shared)])
    refuses("holds no checkpoints", share.main, [str(tmp_path), new])
    monkeypatch.setattr(share, "load_model", lambda run: (None, TrainConfig(frozen=True), 4))
    refuses("a run of a linear probe", share.main, [run, new])
    assert not (tmp_path / "new").exists()


def test_a_failed_upload_gives_the_command_that_uploads_the_folder(tiny_run, tmp_path, monkeypatch, refuses):
    def fail(*arguments, **options):
        raise Exception(f"no network, private={options['private']}")  # no OSError in huggingface_hub 2

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail)
    folder = tmp_path / "model"
    refuses("--private has no effect without --push", share.main, [str(tiny_run), str(folder), "--private"])
    words = [str(tiny_run), str(folder), "--push", "alice/crate", "--private"]
    refuses(f"no network, private=True.*hf upload alice/crate {folder}", share.main, words)
    assert (folder / "model.safetensors").is_file()
    assert 'create_model("hf-hub:alice/crate"' in (folder / "README.md").read_text()
