"""What the README and the docstrings say is true: examples run, named files and settings exist."""

import argparse
import doctest
import importlib
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import crate_fast
import crate_fast.eval
import crate_fast.eval.emergence
import crate_fast.eval.explore
import crate_fast.train
from crate_fast import cli, settings
from crate_fast.errors import CommandParser, UserError
from crate_fast.export import FORMATS
from crate_fast.portable import OUTPUTS
from crate_fast.train import plan, trainer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EVALUATION = (ROOT / "docs" / "evaluation.md").read_text()
PAGES = README + "".join(path.read_text() for path in sorted((ROOT / "docs").rglob("*.md")))


def _modules() -> list[str]:
    names = ["crate_fast"]
    evaluation = (crate_fast.eval, crate_fast.eval.emergence, crate_fast.eval.explore)
    for package in (crate_fast, crate_fast.train, *evaluation):
        folder = [str(Path(package.__file__).parent)]
        names += [f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(folder) if not m.ispkg]
    return names


@pytest.mark.parametrize("name", _modules())
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


@pytest.mark.parametrize("name", _modules())
def test_everything_public_is_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for symbol in getattr(module, "__all__", []):
        value = getattr(module, symbol)
        if callable(value):
            assert value.__doc__, f"{name}.{symbol}"


def test_documented_python_runs():
    """The pages of docs/how-to have a test of their own."""
    text = README + EVALUATION + (ROOT / "docs" / "models.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_the_documented_training_commands_are_valid(monkeypatch):
    text = README + (ROOT / "docs" / "training.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^ *(?:srun )?torchrun .*train/(\w+)\.py(.*)$", text, re.M)
    assert {script for script, _ in commands} == {"pretrain", "pretrain_mae", "finetune", "linear_probe"}
    assert len(commands) >= 10
    seen = []
    for script, words in commands:
        module = importlib.import_module(f"crate_fast.train.{script}")
        monkeypatch.setattr(trainer, "launch", lambda config, options: seen.append(config) or 0)
        assert module.main(shlex.split(words, comments=True)) == 0
    assert len(seen) == len(commands)


def test_the_documented_plans_can_be_made(capsys):
    commands = re.findall(r"^crate-fast plan(?: |$)(.*?)(?:--throughput.*)?$", PAGES, re.M)
    assert commands
    for command in commands:
        assert plan.main(shlex.split(command, comments=True)) == 0
        assert "training images" in capsys.readouterr().out


def _only_parsed(monkeypatch) -> list[argparse.Namespace]:
    """The command lines that are read from now on; their commands end there, with the status of a user's error."""
    seen, parse = [], CommandParser.parse_args

    def stop(self, words=None):
        seen.append(parse(self, words))
        raise UserError("only read")

    monkeypatch.setattr(CommandParser, "parse_args", stop)
    return seen


def test_the_documented_evaluation_commands_are_valid(monkeypatch):
    seen = _only_parsed(monkeypatch)
    commands = re.findall(r"^crate-fast eval (\S+)(.*)$", EVALUATION, re.M)
    commands += re.findall(r"^torchrun .*crate_fast\.eval\.(\S+)(.*)$", EVALUATION, re.M)
    for protocol, words in commands:
        module = importlib.import_module(f"crate_fast.eval.{protocol}")
        assert module.main(shlex.split(words, comments=True)) == 2
    assert len(seen) == len(commands)
    assert {protocol for protocol, _ in commands} == set(cli.PROTOCOLS)


def test_the_documented_exports_are_valid(monkeypatch):
    commands = re.findall(r"^ *crate-fast export (.*)$", PAGES, re.M)
    assert commands
    seen = _only_parsed(monkeypatch)
    for words in commands:
        assert cli.main(["export", *shlex.split(words, comments=True)]) == 2
    assert len(seen) == len(commands)
    assert {name for parsed in seen for name in parsed.format} <= set(FORMATS)
    assert {name for parsed in seen for name in parsed.outputs or []} <= set(OUTPUTS)


@pytest.mark.parametrize("page", ["docs/results/README.md", "docs/emergence/protocol.md"])
def test_the_documented_experiments_are_valid(page, monkeypatch):
    text = (ROOT / page).read_text()
    commands = re.findall(r"^ *crate-fast reproduce (\S+)(.*)$", text, re.M)
    assert {name for name, _ in commands} == set(cli.EXPERIMENTS)
    seen = _only_parsed(monkeypatch)
    for name, words in commands:
        module = importlib.import_module(f"crate_fast.eval.{name}.command")
        assert module.main(shlex.split(words, comments=True)) == 2
    assert len(seen) == len(commands)


def test_files_named_in_the_readme_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    tree = README.split("## Files")[1].split("```")[1]
    folder = ROOT
    for line in tree.strip().splitlines():
        if not line.startswith(" "):
            folder = ROOT / line.split()[0]
            assert folder.is_dir(), folder
        for name in re.findall(r"\b[a-z_0-9]+\.py\b", line):
            assert (folder / name).is_file(), folder / name


def test_environment_variables_are_read_in_one_place_and_documented():
    source = Path(settings.__file__).read_text()
    page = (ROOT / "docs" / "settings.md").read_text()
    assert set(re.findall(r"CRATE_FAST_\w+", source)) == set(re.findall(r"CRATE_FAST_\w+", page))
    for path in [
        path for folder in ("crate_fast", "kernels", "train", "eval") for path in ROOT.glob(f"{folder}/*.py")
    ]:
        if path.name != "settings.py":
            assert "CRATE_FAST_" not in re.sub(r'"""(.|\n)*?"""', "", path.read_text()), path


@pytest.mark.parametrize(
    "module", ["crate_fast.env", "crate_fast.train.pretrain", "crate_fast.train.plan", "crate_fast.eval.maskcut"]
)
def test_commands_start_without_warnings(module):
    arguments = [] if module == "crate_fast.env" else ["--help"]
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", module, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    assert "backend on cpu" in result.stdout or "usage:" in result.stdout


def test_importing_needs_no_triton_and_touches_no_device():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "def touched(): raise AssertionError('a device was touched')\n"
        "torch.cuda._lazy_init = touched\n"
        "import crate_fast, crate_fast.kernels, crate_fast.train.pretrain, crate_fast.eval.coarse_segmentation\n"
        "crate_fast.CRATE(image_size=8, patch_size=4, num_classes=2, dim=8, depth=1, heads=1)"
        "(torch.zeros(1, 3, 8, 8)).sum().backward()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_uninstalled_tree_imports_its_folders(tmp_path):
    code = "import crate_fast.kernels as k, crate_fast.train.config, crate_fast.eval; print(k.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert Path(result.stdout.strip()) == ROOT / "crate_fast" / "kernels" / "__init__.py"


def test_static_tools_find_every_module_inside_the_package():
    """Editors follow paths, not import hooks."""
    for name in ("kernels", "train", "eval"):
        assert (ROOT / "crate_fast" / name).resolve() == ROOT / name
    found = [module.name for module in pkgutil.walk_packages(crate_fast.__path__, "crate_fast.")]
    assert len(found) == len(set(found))
    assert {"crate_fast.kernels.attention", "crate_fast.train.pretrain", "crate_fast.eval.explore.server"} <= {*found}
