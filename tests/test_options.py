"""Command lines are parsed before PyTorch is imported; settings of training, recipes, and their errors."""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.utils.data import DataLoader

from crate_fast import export
from crate_fast.cli import COMMANDS, GROUPS
from crate_fast.errors import UserError, run_command
from crate_fast.eval import by_layer, comparison
from crate_fast.eval.emergence.protocol import MODELS, SIZES
from crate_fast.options import PARSERS, parse
from crate_fast.train import pretrain
from crate_fast.train.config import TrainConfig, build_config, load_recipe
from crate_fast.train.reconstruction import RATIOS

_COMMANDS = [*COMMANDS, *(f"{word} {name}" for word, (_, entries, *_) in GROUPS.items() for name in entries)]

_PROGRAM = """
import contextlib, io, json, sys
sys.argv = ["crate-fast"]
from crate_fast.cli import main
answers = {}
for words in json.loads(sys.stdin.read()):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words.split())
        except SystemExit as end:
            status = end.code
    answers[words] = [status, out.getvalue(), err.getvalue()]
    slow = {"torch", "timm", "triton"} & sys.modules.keys()
    assert not slow, f"{words} imported {slow} first"
print(json.dumps(answers))
"""
_TRAINING = ["pretrain", "pretrain_mae", "finetune", "linear_probe"]
_MISSPELT = {"evl": "did you mean 'eval'", "eval masku": "maskcut"}
_MISSPELT |= {f"{command} --lrr 1": "did you mean '--lr'" for command in _TRAINING}


def test_help_and_misspelt_words_are_answered_before_slow_imports():
    lines = [f"{command} {option}" for command in _COMMANDS for option in ("--help", "--nosuchoption")]
    options = {"input": json.dumps([*lines, *_MISSPELT]), "capture_output": True, "text": True, "check": True}
    answers = json.loads(subprocess.run([sys.executable, "-c", _PROGRAM], **options).stdout)
    for command in _COMMANDS:
        status, text, _ = answers[f"{command} --help"]
        assert status in (0, None)
        assert text.startswith(f"usage: crate-fast {command} ")
        refused, _, error = answers[f"{command} --nosuchoption"]
        assert (refused, error.count("\n")) == (2, 1)
        assert re.match("error: (unknown argument '--nosuchoption'|the following arguments are required)", error)
    for words, said in _MISSPELT.items():
        status, _, error = answers[words]
        assert (status, said in error) == (2, True), error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eval pca m --data d --layers 1,x", "argument --layers: 1,x: give numbers with commas"),
        ("eval maskcut m --data d --figure-images 0", "argument --figure-images: 0: give a positive integer"),
        ("eval reconstruction m --data d --ratios 0.5,1", "argument --ratios: 1.0: a mask ratio is above 0"),
        ("eval attention_maps m --data d --heads 0,one", "argument --heads: one: write numbers, all, mean or best"),
        ("eval white_box m --seed -1", "argument --seed: -1: give an integer from 0"),
        ("eval white_box m --workers -1", "argument --workers: -1: give 0 or a positive integer"),
        ("eval comparison m", "the following arguments are required: --table"),
    ],
)
def test_bad_values_of_options_are_errors(words, message):
    command, name, *rest = words.split()
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        parse(f"{command} {name}", rest)


@pytest.mark.parametrize("words", ["eval pca m --data d --layers -1,0,-3", "export m --layers -1,0,-3"])
def test_a_list_may_begin_with_a_negative_number(words):
    command, rest = words.split(" m ")
    assert parse(command, ["m", *rest.split()]).layers == [-1, 0, -3]


def test_the_home_folder_is_named_by_a_tilde_within_a_word(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options = parse("eval pca", ["A=~/runs/a", "vit@~/w.pth", "~b", "--data", "folder:~/x"])
    assert options.models == ["A=/home/me/runs/a", "vit@/home/me/w.pth", "~b"]
    assert options.data == "folder:/home/me/x"


def test_choices_and_defaults_equal_those_of_the_modules():
    def option(command: str, name: str) -> argparse.Action:
        return next(action for action in PARSERS[command]()._actions if action.dest == name)

    assert tuple(option("eval by_layer", "measures").choices) == by_layer.MEASURES
    assert sorted(option("eval comparison", "table").choices) == sorted(comparison.NEEDS)
    assert tuple(option("eval reconstruction", "ratios").default) == RATIOS
    assert list(option("reproduce emergence", "size").choices) == list(SIZES)
    assert list(option("reproduce emergence", "models").choices) == list(MODELS)
    assert option("export", "format").default == list(export.FORMATS)
    assert all(name in option("export", "outputs").help for name in export.OUTPUTS)


# --- settings of training ---


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--recipe cifar", "no recipe 'cifar': did you mean 'cifar10'?"),
        ("--dataset cifar100", "dataset='cifar100' needs data_dir"),
        ("--dataset shape_scene", "dataset='shape_scene': did you mean 'shape_scenes'?; choose one of shape_"),
        ("--head new", "head='new' needs initial weights: pass --init"),
        ("--frozen --mixup 0.5", "leave out mixup, cutmix and layer_decay"),
        ("--random-erasing 1.5", "random_erasing=1.5: it must be between 0 and 1"),
        ("--attn-drop-rate 1", "attn_drop_rate=1.0: it must be at least 0, and below 1"),
        ("--epochs 0", "epochs=0: it must be at least 1"),
        ("--layer-decay 1.5", "layer_decay=1.5: it must be above 0"),
        ("--dropout 0.1", "unknown argument '--dropout': did you mean '--drop-rate'"),
        ("--lr inf", "lr=inf: it must be positive and finite"),
        ("--min-lr nan", "min_lr=nan: it must be at least 0"),
        ("--compile-mode max-autotune", "compile_mode='max-autotune' needs compile=True: pass --compile too"),
        ("--compile --compile-mode reduce-overhead --accumulate 2", "gradients with accumulate=2; use compile_mode="),
        ("--compile --compile-mode reduce-overhead --parallel fsdp", "parallel='fsdp' moves them: use compile_mode="),
        ("--batch-size 10 --accumulate 3", "not a multiple of accumulate=3"),
        ("--warmup-epochs 9", "warmup_epochs=9 is above epochs=2, so"),
        ("--min-lr 0.1", "min_lr=0.1 is above the peak learning rate 0.003: lower min_lr"),
        ("--threads 100000", "threads=100000: it must be at least 0, and at most 1024"),
        ("--device meta", "device='meta' cannot be used here: choose auto, cpu"),
        ("--optimizer fusedadam --train-samples 128", "optimizer='fusedadam' cannot be used here"),
        ("--optimizer qqqq", "optimizer='qqqq': timm has no such optimiser"),
        ("--optimizer madgrad", "could not be resumed: choose another"),
        ("--optimizer cadamw --parallel fsdp", "optimizer='cadamw' needs whole weights: pass --parallel ddp"),
        ("--optimizer adahessian", "second derivatives"),
        ("--model vit_tiny_patch16_224.nope", "did you mean 'vit_tiny_patch16_224'?"),
        ("--mask-ratio 0.5", "mask_ratio: model='crate_tiny_patch8_224' is not an autoencoder; leave them out"),
        ("--model resnet18", "models without img_size cannot be trained here"),
        ("--model vit_tiny_patch16_224 --heads 7", "cannot be built with {'img_size'"),
        ("--train-samples 96", "the training split has 96 images, fewer than batch_size=128"),
        ("--heads 7", "heads=7 does not divide dim=128: choose another number of heads"),
        ("--recipe RECIPE", "is not valid YAML: while parsing"),
        ("--output '' --resume", "--resume needs the folder of the run to continue: pass --output"),
        ("--crop random", "crop='random' has no effect on dataset='shape_scenes', which generates its images"),
        ("--data-dir x", "data_dir='x' has no effect on dataset='shape_scenes', which generates its images"),
        ("--recipe SCENES", "crop_scale=0.5 has no effect on dataset='shape_scenes'"),
        ("--recipe cifar10 --data-dir x --crop-scale 0.5", "crop_scale=0.5 needs crop='random'"),
    ],
)
def test_bad_command_lines_are_one_line_errors(arguments, message, capsys, tmp_path):
    files = {"RECIPE": "lr: [1\nb: }", "SCENES": "dataset: shape_scenes\ncrop_scale: 0.5"}
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    words = [str(tmp_path / f"{word}.yaml") if word in files else word for word in shlex.split(arguments)]
    assert pretrain.main(words if "--resume" in words else [*words, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert (error.startswith("error: "), error.count("\n")) == (True, 1)
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_place_of_the_output_folder_is_an_error(tmp_path, refuses):
    (file := tmp_path / "file").touch()
    for folder in (file, file / "run"):
        words = ["--train-samples", "128", "--depth", "1", "--output", str(folder)]
        refuses(f"{folder}: .*: a file is in the place of a folder; name another", pretrain.main, words)


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


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("print('x' * 10**6)", 141, "the reader of the output has ended\n"),
        ("signal.default_int_handler(2, None)", 130, "interrupted\n"),
    ],
)
def test_ctrl_c_and_the_end_of_the_reader_are_no_tracebacks(command, status, said):
    code = "import signal, sys; sys.argv = ['crate-fast']\nfrom crate_fast.errors import run_command\n"  # no PyTorch
    code += f"exit(run_command(lambda: {command}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (said, status)


def test_too_little_memory_is_a_one_line_error(capsys):
    class Killed(list):
        def __getitem__(self, _index):
            os.kill(os.getpid(), signal.SIGKILL)

    assert run_command(torch.empty, 10**16) == 2
    assert run_command(next, iter(DataLoader(Killed([0]), num_workers=1))) == 2
    lines = "(error: too little memory .*: use a smaller batch or image size, or fewer workers\n){2}"
    assert re.fullmatch(lines, capsys.readouterr().err)
    with pytest.raises(RuntimeError, match="shape"):
        run_command(torch.ones(3).view, 2)


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
