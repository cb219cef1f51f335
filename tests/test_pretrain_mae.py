"""Masked autoencoding: a whole run, its masks, and its encoder in fine-tuning and evaluation."""

import json

import numpy as np
import pytest
import torch
from runs import ALONE, TINY, entries, losses, run, same, tiny_config, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crate_fast import CRATEMAE
from crate_fast.checkpoints import released_state_dict
from crate_fast.eval import attention_maps, reconstruction
from crate_fast.eval.common.images import batches, open_images
from crate_fast.eval.common.models import open_model
from crate_fast.mae import encoder_state_dict, sincos_positions
from crate_fast.train import finetune, pretrain, pretrain_mae
from crate_fast.train.faults import diagnosis
from crate_fast.train.objective import Reconstruction, objective_for
from crate_fast.train.reconstruction import reconstructions
from crate_fast.train.runs import build_model, load_model

OPTIONS = ("--ema-decay", "0.9", "--hflip", "0.5")
pytestmark = pytest.mark.usefixtures("unsaved_figures")  # not of the shared run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mae") / "run"
    run(*OPTIONS, "--output", str(folder), script="pretrain_mae")
    return folder


def test_a_run_writes_its_losses_and_figures(finished):
    summary = json.loads((finished / "summary.json").read_text())
    found = {entry["step"]: entry["ema_val_loss"] for entry in entries(finished) if "val_loss" in entry}
    assert summary["best_val_loss"] == min(found.values())
    assert not {"val_accuracy", "chance"} & summary.keys()
    for name in ("reconstruction.png", "attention.png", "curves.png"):
        assert (finished / name).read_bytes()[:4] == b"\x89PNG"
    assert summary["attention_miou"]
    assert losses(finished)[12] < losses(finished)[1]
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    assert "reconstruction" in events.Tags()["images"]
    assert {"loss", "val_loss", "coding_rate/layer_00", "sparsity/layer_01"} <= set(events.Tags()["scalars"])
    model, _, step = load_model(finished)
    assert step == min(found, key=found.get)
    assert same(released_state_dict(model), weights(finished, step, "ema"))


def test_losses_do_not_depend_on_processes_and_accumulation(tmp_path):
    words = [*OPTIONS, "--visible-only", "--epochs", "1", "--train-samples", "48", "--output"]
    one, other = tmp_path / "one", tmp_path / "other"
    assert pretrain_mae.main([*TINY, *words, str(one)]) == 0
    run(*words, str(other), "--parallel", "fsdp", "--accumulate", "2", processes=2, script="pretrain_mae")
    assert losses(other) == pytest.approx(losses(one), rel=2e-4)
    (first,), (second,) = ([e for e in entries(run) if "val_loss" in e] for run in (one, other))
    assert second["val_loss"] == pytest.approx(first["val_loss"], rel=2e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "crate_tiny_patch8_224"], "'crate_tiny_patch8_224' is not a masked autoencoder"),
        (["--mask-ratio", "1"], "mask_ratio=1.0: it must be above 0"),
        (["--beta2", "1"], "beta2=1.0"),
        (["--mixup", "0.5"], "mixup: masked autoencoding does not use"),
        (["--attn-drop-rate", "0.1"], "unexpected keyword argument 'attn_drop_rate'"),
        (["--optimizer", "sgd", "--beta2", "0.9"], "optimizer='sgd' has no such setting"),
        (["--frozen"], "probe its encoder, --model crate_mae_encoder_tiny_patch16_224"),
    ],
)
def test_bad_settings_are_errors(words, message, tmp_path, refuses):
    refuses(message, pretrain_mae.main, [*TINY, *words, "--output", str(tmp_path / "run")])


def test_pretrain_trains_an_autoencoder_of_four_patches(tmp_path):
    words = [*TINY, "--model", "crate_mae_tiny_patch16_224", "--image-size", "16", "--mask-ratio", "0.5"]
    words += ["--visible-only", "--decoder-depth", "1", "--norm-pix-loss", "--epochs", "1", "--output", str(tmp_path)]
    with pytest.warns(UserWarning, match="attention maps are not scored: none of the 12 images has an object"):
        assert pretrain.main(words) == 0
    assert (tmp_path / "reconstruction.png").exists()
    model, _, _ = load_model(tmp_path)
    assert (len(model.decoder_blocks), model.visible_only, model.norm_pix_loss) == (1, True, True)


def test_the_diagnosis_names_the_model_if_only_its_loss_is_not_finite():
    objective = _objective(mask_ratio=0.5)
    objective.model.decoder_pred.bias.data.fill_(1e25)
    text = diagnosis(objective.model, torch.zeros(2, 3, 32, 32), objective.outputs)
    assert "the first output that is not finite is that of the model" in text


def _objective(**settings) -> Reconstruction:
    config = tiny_config(model="crate_mae_tiny_patch16_224", depth=1, val_samples=6, train_samples=8, **settings)
    return objective_for(build_model(config, 0), config, ALONE)


def test_masks_of_training_depend_on_step_and_image():
    objective = _objective()
    seen = [objective.inputs(torch.zeros(8, 3, 32, 32), None, step, 0)[1] for step in (0, 0, 1)]
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert len(seen[0].unique(dim=0)) == 8


def test_fine_tuning_starts_from_the_encoder(finished, tmp_path, capsys):
    words = [*TINY, "--recipe", "finetune_cifar10", "--dataset", "shape_scenes", "--init", f"{finished}@12"]
    assert finetune.main([*words, "--lr", "1e-9", "--epochs", "1", "--output", str(tmp_path)]) == 0
    assert "the encoder of an autoencoder, new classifier (no → 12 classes)" in capsys.readouterr().out
    model, config, _ = load_model(tmp_path)
    assert config.model == "crate_mae_encoder_tiny_patch16_224"
    for name, value in encoder_state_dict(weights(finished, 12, "ema")).items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-5), name


def test_an_autoencoder_is_trained_further_at_another_image_size(finished, tmp_path, capsys, refuses):
    words = [*TINY, "--init", f"{finished}@12", "--image-size", "64", "--epochs", "1", "--lr", "1e-9"]
    assert pretrain_mae.main([*words, "--output", str(tmp_path / "run")]) == 0
    assert "(positions of this image size)" in capsys.readouterr().out
    model, _, _ = load_model(tmp_path / "run")
    torch.testing.assert_close(model.decoder_pos_embed, sincos_positions(32, (8, 8)))
    torch.testing.assert_close(model.mask_token, weights(finished, 12, "ema")["mask_token"], atol=1e-5, rtol=0)
    words += ["--head", "new", "--output", str(tmp_path / "other")]
    refuses("no classifier to replace", pretrain_mae.main, words)


def test_a_released_file_can_be_fine_tuned_and_evaluated(finished, tmp_path, capsys):
    model, _, _ = load_model(finished)
    torch.save({"model": released_state_dict(model)}, tmp_path / "mae.pth")
    words = [*TINY, "--dataset", "shape_scenes", "--init", str(tmp_path / "mae.pth"), "--epochs", "1"]
    words += ["--recipe", "finetune_cifar10", "--model", "crate_mae_encoder_tiny_patch16_224"]
    assert finetune.main([*words, "--dry-run", "--output", str(tmp_path / "run")]) == 0
    assert "the encoder of an autoencoder" in capsys.readouterr().out
    sizes = ["img_size=32", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=2"]
    subject = open_model(f"crate_mae_tiny_patch16_224@{tmp_path / 'mae.pth'}", model_args=sizes)
    assert isinstance(subject.autoencoder, CRATEMAE)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(subject.model(images), model.encoder()(images))


@pytest.mark.usefixtures("drawn")
def test_protocols_read_the_last_layer_but_one_of_the_encoder(finished, tmp_path):
    assert open_model(str(finished)).extract.default_layer == 0  # of two layers
    assert open_model("crate_mae_tiny_patch16_224@untrained").extract.default_layer == 10  # of twelve
    words = ["--data", "shape_scenes", "--limit", "3", "--output", str(tmp_path)]
    assert attention_maps.main([str(finished), *words]) == 0


@pytest.fixture
def subject():
    sizes = ["img_size=32", "patch_size=8", "embed_dim=32", "depth=1", "num_heads=2"]
    return open_model("crate_mae_tiny_patch16_224@untrained", model_args=sizes)


def test_reconstructions_fill_the_hidden_patches(subject):
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    rows = reconstructions(subject.autoencoder, images, subject.normalize, [0.5, 0.75], 0)
    for image, row in zip(images, rows, strict=True):
        plain, half, half_filled, most, most_filled = row
        assert torch.equal(plain, image.permute(1, 2, 0))
        hidden = [(masked == 128).all(dim=-1) for masked in (half, most)]
        assert [mask.sum() for mask in hidden] == [8 * 64, 12 * 64]
        assert (hidden[1] | ~hidden[0]).all()
        for mask, filled in zip(hidden, (half_filled, most_filled), strict=True):
            assert torch.equal(filled[~mask], plain[~mask])
            assert not torch.equal(filled[mask], plain[mask])


def test_reconstruction_errors_by_hand(subject, monkeypatch):
    image_batches = list(batches(open_images("shape_scenes", 32, 5), 2, []))
    rows = reconstruction.evaluate(subject, image_batches, [0.75])
    whole = reconstruction.evaluate(subject, list(batches(open_images("shape_scenes", 32, 5), 5, [])), [0.75])
    assert rows[0] == pytest.approx(whole[0])
    images = torch.cat([batch.images for batch in image_batches]).double() / 255
    noise = np.stack([np.random.default_rng((0, i)).random(16, np.float32) for i in range(5)])
    hidden = torch.from_numpy(noise.argsort(axis=1).argsort(axis=1) >= 4).reshape(5, 1, 4, 4)
    hidden = hidden.repeat_interleave(8, 2).repeat_interleave(8, 3).expand_as(images)
    pairs = zip(images, hidden[:, 0], strict=True)
    error = torch.cat([(image[:, mask] - image[:, ~mask].mean(1, keepdim=True)).flatten() for image, mask in pairs])
    assert rows[0]["rmse_visible_mean"] == pytest.approx(error.square().mean().sqrt().item(), rel=1e-5)
    monkeypatch.setattr(CRATEMAE, "reconstruction", lambda self, images, pred: images)
    assert reconstruction.evaluate(subject, image_batches, [0.75])[0]["rmse"] == pytest.approx(0, abs=1e-6)


def test_the_command_measures_and_draws(finished, tmp_path, refuses):
    words = ["--data", "shape_scenes", "--limit", "4", "--ratios", "0.5,0.75", "--output", str(tmp_path)]
    assert reconstruction.main([f"mae={finished}", *words]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["results"]["mae"]
    assert [row["mask_ratio"] for row in rows] == [0.5, 0.75]
    assert (tmp_path / "mae.png").exists()
    classifier = ["crate_tiny_patch8_224@untrained", *words]
    refuses("is not a CRATE-MAE: name a run of pretrain_mae", reconstruction.main, classifier)
    refuses("decodes 32 px images only", reconstruction.main, [str(finished), *words, "--image-size", "64"])
