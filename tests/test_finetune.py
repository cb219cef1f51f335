"""Fine-tuning and linear probing: weights and settings that are kept, replaced or refused."""

from dataclasses import replace

import pytest
import timm
import torch
from runs import TINY, run, same, tiny_config, weights
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from crate_fast import CRATE, CRATEMAE
from crate_fast.errors import UserError
from crate_fast.eval.common.models import open_model
from crate_fast.train import finetune, linear_probe, pretrain, share
from crate_fast.train.config import TrainConfig, build_config, dump_config
from crate_fast.train.data.loader import check_batch
from crate_fast.train.data.shape_scenes import ShapeScenes
from crate_fast.train.optimizer import build_optimizer
from crate_fast.train.runs import build_model, load_initial, num_classes_of, run_config

pytestmark = pytest.mark.usefixtures("no_figures")
SCENES = ["--recipe", "shape_scenes", *TINY[:4], *TINY[10:]]  # the architecture comes from the run
HEAD = ("mlp_head.1.weight", "mlp_head.1.bias", "head.weight", "head.bias")  # ours and timm's


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folder of a finished run at 32 px with an EMA."""
    folder = tmp_path_factory.mktemp("runs") / "source"
    assert pretrain.main([*TINY, "--output", str(folder), "--ema-decay", "0.8", "--mean", "half"]) == 0
    return folder


def test_architecture_statistics_and_ema_weights_come_from_the_run(source, tmp_path, capsys):
    folder = tmp_path / "run"
    words = [*SCENES, "--init", f"{source}@12", "--lr", "1e-9", "--output", str(folder), "--image-size", "48"]
    assert finetune.main([*words, "--epochs", "1"]) == 0
    config = run_config(folder)
    assert (config.dim, config.depth, config.heads, config.patch_size, config.mean) == (32, 2, 2, 8, "half")
    assert f"from {source} at step 12 (positions resampled)" in capsys.readouterr().out
    before, after = weights(source, 12, "ema"), weights(folder, 6)
    for name in before:
        if name != "pos_embedding":
            assert torch.allclose(before[name], after[name], atol=1e-6), name
    assert after["pos_embedding"].shape == (1, 37, 32)


def test_the_command_line_and_a_runs_own_settings_override_the_initial_run(source, tmp_path):
    def settings(*words: str, recipe: str = "shape_scenes") -> TrainConfig:
        return build_config(list(words), "", recipe, adjust=finetune.inheriting)[0]

    config = settings(*SCENES[2:], "--init", str(source), "--dim", "64")
    assert (config.dim, config.depth) == (64, 2)
    recipe, known = tmp_path / "mine.yaml", run_config(source)
    recipe.write_text(f"init: {source}\nhead: new\n")
    config = settings(recipe=str(recipe))
    for name in ("model", "dim", "depth", "heads"):
        assert getattr(config, name) == getattr(known, name)
    (tmp_path / "config.yaml").write_text(dump_config(replace(config, dim=48)))
    assert settings(recipe=str(tmp_path / "config.yaml")) == replace(config, dim=48)


def test_a_shared_model_is_a_start_with_its_own_settings(source, tmp_path):
    share.write_model_folder(source, tmp_path)
    how = [*SCENES[2:], "--init", str(tmp_path)], "", "shape_scenes"
    config, known = build_config(*how, adjust=finetune.inheriting)[0], run_config(source)
    assert all(getattr(config, name) == getattr(known, name) for name in finetune.INHERITED)
    model = build_model(config, 12)
    load_initial(model, config)
    assert torch.equal(model.cls_token, open_model(str(source)).model.cls_token)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="json is not one of `crate-fast share` .*: pass .*safetensors, with --model"):
        build_config(*how, adjust=finetune.inheriting)


def test_a_missing_start_is_an_error(refuses, tmp_path, source):
    for words, message in (
        ([], "pass --init with a run's folder"),
        (["--init", f"{tmp_path}/nothing"], "neither a file nor the folder of a run"),
        (["--init", f"{source}@best"], "pass RUN@STEP with a step number"),
        (["--init", str(tmp_path)], "has no config.yaml"),
    ):
        refuses(message, finetune.main, [*SCENES, *words, "--output", str(tmp_path / "run")])


def _file(tmp_path, model) -> str:
    save_file(model.state_dict(), path := str(tmp_path / "weights.safetensors"))
    return path


@pytest.mark.parametrize("sizes", [{}, {"model": "vit_tiny_patch16_224", "heads": 4}], ids=["crate", "timm"])
def test_another_number_of_classes_needs_a_new_head(tmp_path, sizes):
    source, model = (build_model(tiny_config(**sizes), classes) for classes in (5, 12))
    path = _file(tmp_path, source)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"has 5 classes, and the data have 12\): pass --head new"):
        load_initial(model, tiny_config(init=path))
    assert same(before, dict(model.state_dict()))
    text = load_initial(model, tiny_config(init=path, head="new"))
    assert "new classifier (5 → 12 classes)" in text
    for name, value in model.state_dict().items():
        assert torch.equal(value, (before if name in HEAD else source.state_dict())[name]), name


def _demo_file(path, **sizes) -> dict:
    """Save weights in the emergence paper's layout, `mlp_head.{0,1}` and the classifier `head`; return them."""
    arguments = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "heads": 2, "dim_head": 16} | sizes
    state = CRATE(num_classes=7, head_hidden=True, **arguments).state_dict()
    state = {name.replace("mlp_head.2.", "head."): value for name, value in state.items()}
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    return state


def test_a_kept_classifier_must_have_the_classes_of_the_data(source, tmp_path):
    share.write_model_folder(source, tmp_path)
    classes = ShapeScenes.classes
    swapped = (classes[1], classes[0], *classes[2:])
    for init in (str(source), str(tmp_path)):
        config = tiny_config(init=init)
        for known in (classes, tuple(map(str, range(12)))):  # the data may have numbers only
            load_initial(build_model(config, 12), config, known)
        with pytest.raises(UserError, match="other classes, or in another order: .*; pass --head new"):
            load_initial(build_model(config, 12), config, swapped)
        load_initial(build_model(config, 12), replace(config, head="new"), swapped)


def test_a_file_with_other_pixel_statistics_is_remarked(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=12, depth=1, img_size=32)  # mean 0.5 by default
    config = tiny_config(init=_file(tmp_path, model))
    assert "pixels normalised as --mean imagenet" in load_initial(model, config)
    assert load_initial(model, replace(config, mean="half")) == config.init
    autoencoder = CRATEMAE(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, decoder_depth=1)
    config = tiny_config(init=_file(tmp_path, autoencoder), mean="half")
    assert load_initial(autoencoder, config).startswith(config.init)  # it has no usual statistics


@pytest.mark.parametrize("frozen", [False, True])
def test_training_can_start_from_the_demo_checkpoint(tmp_path, frozen):
    path = str(tmp_path / "demo.pth")
    state = _demo_file(path)
    assert num_classes_of(state) == 7
    assert num_classes_of({"head.fc.weight": torch.ones(3, 9), "head.pre_logits.fc.weight": torch.ones(9, 9)}) == 3
    config = tiny_config(init=path, frozen=frozen, head="keep" if frozen else "new")
    model = build_model(config, 12)
    assert "new classifier (7 → 12 classes)" in load_initial(model, config)
    for name in state.keys() & model.state_dict().keys() - {"mlp_head.1.weight", "mlp_head.1.bias"}:
        assert torch.equal(model.state_dict()[name], state[name]), name
    if not frozen:
        with pytest.raises(UserError, match="has a classifier with a hidden layer: pass --head new"):
            load_initial(build_model(config, 7), tiny_config(init=path))


def test_the_demo_checkpoint_needs_its_number_of_heads(tmp_path):
    path = str(tmp_path / "demo.pth")
    _demo_file(path, dim=768, heads=6, dim_head=128, depth=1)
    sizes = {"init": path, "head": "new", "model": "crate_base_patch8_224", "dim": None, "depth": 1}
    with pytest.raises(UserError, match="has 6 heads, but the number is not stored: pass --heads 6"):
        load_initial(build_model(config := tiny_config(**sizes, heads=None), 3), config)
    load_initial(build_model(config := tiny_config(**sizes, heads=6), 3), config)


def test_positions_of_a_vit_are_resampled(tmp_path):  # a CRATE's: test_checkpoints.py
    sizes = {"patch_size": 8, "num_classes": 12, "num_heads": 3, "embed_dim": 48, "depth": 1}
    source, target = (timm.create_model("vit_tiny_patch16_224", img_size=size, **sizes) for size in (32, 64))
    config = tiny_config(init=_file(tmp_path, source), image_size=64)
    assert "positions resampled" in load_initial(target, config)
    expected = resample_abs_pos_embed(source.pos_embed.detach(), [8, 8], [4, 4])
    torch.testing.assert_close(target.pos_embed.detach(), expected, rtol=0, atol=0)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = build_model(tiny_config(), 12)
    model.state_dict()["cls_token"][0, 0, 3] = torch.nan
    with pytest.raises(UserError, match=r"holds NaN or infinity in cls_token: the file is damaged"):
        load_initial(build_model(tiny_config(), 12), tiny_config(init=_file(tmp_path, model)))


def test_models_with_other_positions_than_a_vits_load_unchanged(tmp_path):
    """Models without positions, without CLS, and with another layout."""
    for name, sizes in (
        ("test_convnext", {}),
        ("cait_xxs24_224", {"depth": 1}),
        ("hiera_tiny_224", {"embed_dim": 8}),
    ):
        models = [timm.create_model(name, num_classes=12, **sizes) for _ in range(2)]
        path = _file(tmp_path, models[1])
        mean = "half" if name == "test_convnext" else "imagenet"
        assert load_initial(models[0], tiny_config(init=path, mean=mean)) == path
        assert same(dict(models[0].state_dict()), dict(models[1].state_dict()))


def test_weights_of_another_architecture_are_an_error(tmp_path):
    found = r"\(.*(transformer\.layers\.|cls_token: .*\[1, 1, 48\]).*\): set model"
    for change in ({"depth": 3}, {"dim": 48, "heads": 3}, {"sparsifier": "mlp"}):
        path = _file(tmp_path, build_model(tiny_config(**change), 12))
        with pytest.raises(ValueError, match=f"does not hold the weights of this model {found}"):
            load_initial(build_model(tiny_config(), 12), tiny_config(init=path, head="new"))


def test_a_probe_trains_only_its_classifier(source, tmp_path):
    folder = tmp_path / "probe"
    words = "--recipe probe_in1k --dataset shape_scenes --warmup-epochs 1 --lr 10 --lr-scaling none --workers 0 "
    words += f"--optimizer lars --attn-drop-rate 0.3 --init {source}@12 --output {folder}"
    text = run(*words.split(), script="linear_probe", processes=2)
    assert "new classifier (12 → 12 classes)" in text
    before, first, last = weights(source, 12, "ema"), weights(folder, 6), weights(folder, 12)
    for name in before.keys() - set(HEAD):
        assert torch.equal(before[name], last[name]), name
    assert not torch.equal(first["mlp_head.1.1.weight"], last["mlp_head.1.1.weight"])
    assert not torch.equal(first["mlp_head.1.0.running_mean"], torch.zeros(32))
    run(*words.split(), "--resume", script="linear_probe")
    assert same(dict(open_model(f"{folder}@12").model.state_dict()), last)


def test_the_probe_is_that_of_mae():  # its recipe: test_options.py
    model = build_model(tiny_config(frozen=True), 12)
    norm, linear = model.get_classifier()
    assert (norm.affine, norm.eps, linear.weight.std() < 0.02, linear.bias.abs().max()) == (False, 1e-6, True, 0)


def test_lars_by_hand():
    """As in MAE, the trust ratio scales matrices but not biases, before the momentum."""
    config = tiny_config(frozen=True, optimizer="lars", lr=0.5, weight_decay=0.0)
    model = build_model(config, 12)
    linear = model.get_classifier()[1]
    optimizer = build_optimizer(model, config)
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    momentum = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for _ in range(3):
        linear.weight.grad, linear.bias.grad = torch.randn_like(weight), torch.randn_like(bias)
        ratio = 0.001 * weight.norm() / linear.weight.grad.norm()
        momentum[0] = 0.9 * momentum[0] + ratio * linear.weight.grad
        momentum[1] = 0.9 * momentum[1] + linear.bias.grad
        weight, bias = weight - 0.5 * momentum[0], bias - 0.5 * momentum[1]
        optimizer.step()
    torch.testing.assert_close(linear.weight.detach(), weight)
    torch.testing.assert_close(linear.bias.detach(), bias)


def test_a_linear_probe_refuses_to_train_the_model_or_on_single_images(source, refuses):
    words = ["--init", str(source), "--data-dir", "x", "--no-frozen"]
    refuses("a linear probe trains only the classifier", linear_probe.main, words)
    with pytest.raises(UserError, match="batch_size=3: .* at least 2 images .*; make it at least 6"):
        check_batch(TrainConfig(frozen=True, batch_size=3, accumulate=3), 100, 1)
