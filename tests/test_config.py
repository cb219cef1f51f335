"""Settings of training: recipes, command line, and their errors."""

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from crate_fast.train import pretrain
from crate_fast.train.config import TrainConfig, build_config, dump_config, load_recipe


def _config(*argv: str):
    return build_config(list(argv), "test", "shape_scenes")[0]


TABLE_3 = {"optimizer": "adamw", "lr": 5e-5, "weight_decay": 0.01, "batch_size": 256, "image_size": 224}
TABLE_3 |= {"auto_augment": "randaugment-n2-m14", "schedule": "cosine", "head": "new"}
PUBLISHED = {f"finetune_{data}": TABLE_3 for data in ("cifar10", "cifar100", "flowers102", "in1k", "pets")} | {
    "in21k_paper": {"optimizer": "lion", "lr": 9.6e-5, "weight_decay": 0.05, "batch_size": 4096, "epochs": 90}
    | {"crop": "center", "hflip": 0.5, "mean": "imagenet", "image_size": 224},
    "in1k_released": {"optimizer": "lion", "lr": 2e-4, "weight_decay": 0.05, "batch_size": 512, "epochs": 200}
    | {"warmup_epochs": 20, "schedule": "released", "label_smoothing": 0.1, "decay_all": True},
    "probe_in1k": {"optimizer": "lars", "lr": 0.1, "lr_scaling": "linear", "weight_decay": 0.0, "epochs": 90}
    | {"batch_size": 16384, "warmup_epochs": 10, "frozen": True, "label_smoothing": 0.0, "clip_grad": 0},
}


def test_recipes_have_the_published_settings():
    for recipe, published in PUBLISHED.items():
        config = _config("--recipe", recipe, "--data-dir", "x", "--init", "x")
        assert {name: getattr(config, name) for name in published} == published, recipe


def test_the_command_line_overrides_the_recipe_and_the_recipe_the_defaults(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("epochs: 7\nlr: 3e-4\ndim: 96\n")
    config = _config("--recipe", str(recipe), "--epochs", "2", "--no-compile", "--decay-all")
    assert (config.epochs, config.lr, config.dim) == (2, 3e-4, 96)
    assert (config.compile, config.decay_all) == (False, True)
    assert config.batch_size == TrainConfig().batch_size


def test_a_recipe_for_other_data_loses_its_transforms_on_shape_scenes():
    config = _config("--recipe", "finetune_cifar10", "--dataset", "shape_scenes", "--init", "x")
    assert (config.crop, config.auto_augment, config.lr) == ("none", "", 5e-5)


def test_a_dumped_configuration_is_a_recipe(tmp_path):
    config, path = _config("--lr", "0.003", "--dim", "64"), tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert _config("--recipe", str(path)) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "cifar"], "no recipe 'cifar': did you mean 'cifar10'?"),
        (["--dataset", "cifar100"], "dataset='cifar100' needs data_dir"),
        (["--dataset", "shape_scene"], "dataset='shape_scene': did you mean 'shape_scenes'?; choose one of shape_"),
        (["--head", "new"], "head='new' needs initial weights: pass --init"),
        (["--frozen", "--mixup", "0.5"], "leave out mixup, cutmix and layer_decay"),
        (["--random-erasing", "1.5"], "random_erasing=1.5: it must be between 0 and 1"),
        (["--attn-drop-rate", "1"], "attn_drop_rate=1.0: it must be at least 0, and below 1"),
        (["--epochs", "0"], "epochs=0: it must be at least 1"),
        (["--layer-decay", "1.5"], "layer_decay=1.5: it must be above 0"),
        (["--dropout", "0.1"], "unknown argument '--dropout': did you mean '--drop-rate'"),
        (["--lr", "inf"], "lr=inf: it must be positive and finite"),
        (["--min-lr", "nan"], "min_lr=nan: it must be at least 0"),
        (["--compile-mode", "max-autotune"], "compile_mode='max-autotune' needs compile=True: pass --compile too"),
        (
            ["--compile", "--compile-mode", "reduce-overhead", "--accumulate", "2"],
            "PyTorch's CUDA graphs overwrite gradients with accumulate=2; use compile_mode='default' or",
        ),
        (
            ["--compile", "--compile-mode", "reduce-overhead", "--parallel", "fsdp"],
            "but parallel='fsdp' moves them: use compile_mode='default', or parallel='ddp'",
        ),
        (["--batch-size", "10", "--accumulate", "3"], "not a multiple of accumulate=3"),
        (["--min-lr", "0.1"], "min_lr=0.1 is above the peak learning rate 0.003: lower min_lr"),
        (["--threads", "100000"], "threads=100000: it must be at least 0, and at most 1024"),
        (["--device", "meta"], "device='meta' cannot be used here: choose auto, cpu"),
        (["--optimizer", "fusedadam", "--train-samples", "128"], "optimizer='fusedadam' cannot be used here"),
        (["--optimizer", "qqqq"], "optimizer='qqqq': timm has no such optimiser"),
        (["--optimizer", "madgrad"], "could not be resumed: choose another"),
        (["--optimizer", "adahessian"], "second derivatives"),
        (["--model", "vit_tiny_patch16_224.nope"], "did you mean 'vit_tiny_patch16_224'?"),
        (["--model", "resnet18"], "models without img_size cannot be trained here"),
        (["--model", "vit_tiny_patch16_224", "--heads", "7"], "cannot be built with {'img_size'"),
        (["--train-samples", "96"], "the training split has 96 images, fewer than batch_size=128"),
        (["--heads", "7"], "heads=7 does not divide dim=128: choose another number of heads"),
        (["--recipe", "RECIPE"], "is not valid YAML: while parsing"),
        (["--resume"], "--resume needs the folder of the run to continue: pass --output"),
        (["--crop", "random"], "crop='random' has no effect on dataset='shape_scenes', which generates its images"),
        (["--recipe", "SCENES"], "crop_scale=0.5 has no effect on dataset='shape_scenes'"),
        (["--recipe", "cifar10", "--data-dir", "x", "--crop-scale", "0.5"], "crop_scale=0.5 needs crop='random'"),
    ],
)
def test_bad_command_lines_are_one_line_errors(arguments, message, capsys, tmp_path):
    files = {"RECIPE": "lr: [1\nb: }", "SCENES": "dataset: shape_scenes\ncrop_scale: 0.5"}
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    arguments = [str(tmp_path / f"{word}.yaml") if word in files else word for word in arguments]
    arguments = arguments if "--resume" in arguments else [*arguments, "--output", str(tmp_path / "run")]
    assert pretrain.main(arguments) == 2
    error = capsys.readouterr().err
    assert (error.startswith("error: "), error.count("\n")) == (True, 1)
    assert message in error
    assert not (tmp_path / "run").exists()


def test_bad_recipes_are_errors(tmp_path):
    path = tmp_path / "bad.yaml"
    for text, message in {
        "epoch: 3": r"unknown key 'epoch': did you mean 'epochs'\?",
        "epochs: three": "epochs='three' must be int",
        "lr: fast": "lr='fast' is not a number",
        "decay_all: 1": "decay_all=1 must be bool",
        "- a\n- b": "a recipe is a mapping of settings, not list",
        "yes: 3": "unknown key True",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=f"bad.yaml.*{message}"):
            load_recipe(str(path))


def test_the_error_is_in_torchruns_report(tmp_path, monkeypatch, capsys):
    """torch.distributed.elastic shows the error file of the first failed process."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("RANK", "1")
    assert pretrain.main(["--lr", "-1"]) == 2
    assert capsys.readouterr().err == ""
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file=str(file))
    assert "error: lr=-1.0: it must be positive" in ChildFailedError("pretrain.py", {1: failure}).format_msg()


def test_a_model_named_on_the_command_line_keeps_its_own_sizes():
    config, _ = build_config(["--model", "crate_tiny_patch16_224", "--depth", "2"], "", "shape_scenes")
    assert (config.model, config.depth) == ("crate_tiny_patch16_224", 2)
    assert (config.patch_size, config.dim, config.heads) == (None, None, None)
    assert config.optimizer == "nmuon"
