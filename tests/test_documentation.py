"""The documentation: its commands and code run, its links exist, and every public name has a docstring.

Commands run by their `main` with small sizes, in this process and a scratch folder; torchrun itself is not tested.
"""

import argparse
import doctest
import importlib
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uvicorn
from explorer import picture_file
from image_data import write_tree

import crate_fast
from crate_fast import cli
from crate_fast.train import trainer

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
HOW_TO = sorted((DOCS / "how-to").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md")), *sorted((DOCS / "results").glob("*.md")), *HOW_TO]
PAGES += [DOCS / "emergence" / "photographs" / "protocol.md"]
LINKING = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")), ROOT / "kernels" / "README.md"]
RUN = [DOCS / "tutorial.md", *HOW_TO]  # commands of these pages run here; those of the others are only parsed
PROTOCOLS = {f"{package}.{name}{module}" for _, table, package, module in cli.GROUPS.values() for name in table}
COMMAND_MODULES = {module for module, _ in cli.COMMANDS.values()} | PROTOCOLS

_TRAINING = "--image-size 32 --batch-size 4 --epochs 1 --threads 1 --device cpu"
_PRETRAINING = f"{_TRAINING} --train-samples 8 --val-samples 4 --segmentation-samples 4"
_PRETRAINING += " --patch-size 8 --dim 32 --depth 2 --heads 2"
SMALL = {  # a command's beginning (the first that fits) → options that make it small; a later option wins
    "torchrun train/pretrain.py": _PRETRAINING,
    "torchrun train/finetune.py": _TRAINING,
    "crate-fast pretrain": _PRETRAINING,
    "crate-fast explore": "--no-browser",  # the server is replaced
    "crate-fast export": "",
    "crate-fast share": "",
    "crate-fast eval coarse_segmentation": "--limit 4 --figure-images 1 --device cpu",
    "python -m crate_fast.train.write_shards": "--workers 1",
    "crate-fast env": "",
    "crate-fast eval classify": "--limit 8 --train-limit 24 --k 1 --device cpu",
    "crate-fast eval maskcut": "--limit 2 --image-size 32 --device cpu",
    "crate-fast eval by_layer": "--limit 2 --image-size 32 --device cpu",
    "crate-fast eval": "--limit 2 --device cpu",  # the other protocols
}
PARSED = (  # beginnings of commands that need GPUs or minutes; only their options are parsed
    "torchrun --n",
    "python benchmarks/",
    "bash benchmarks/",
    "crate-fast check",
    "crate-fast export runs/tutorial",  # another page's export runs
    "crate-fast reproduce",
)
IGNORED = ("pip ", "pdoc ", "pytest ", "CRATE_FAST_REQUIRE_GPU=1 pytest", "ruff ")


def _commands(page: Path) -> list[str]:
    """Return the commands of a page's bash blocks and indented lines."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```|^ {4}((?:crate-fast|torchrun) [^\n]*)$", text, re.S | re.M)
    lines = [line for block in blocks for line in re.split(r"\n| && ", "".join(block)) if line.strip()]
    return [shlex.join(words) for words in (shlex.split(line, comments=True) for line in lines) if words]


def _main(command: str):
    """Return a command's `main` and its arguments."""
    words = shlex.split(command)
    if words[0] == "crate-fast":
        return cli.main, words[1:]
    if "-m" in words:
        at = words.index("-m") + 1
        return importlib.import_module(words[at]).main, words[at + 1 :]
    at = next(i for i, word in enumerate(words) if word.endswith((".py", ".sh")))
    script = Path(words[at])
    module = importlib.import_module(f"crate_fast.train.{script.stem}" if script.parts[0] == "train" else script.stem)
    return module.main, words[at + 1 :]


@pytest.fixture
def scratch(tmp_path, monkeypatch, unsaved_figures):
    """A working folder with the pages' DATA and PHOTOS."""
    names = [f"PHOTOS/{number}.jpg" for number in range(6)]
    names += [f"DATA/train/class{number % 2}/{number}.jpg" for number in range(8)]
    names += [f"DATA/val/class{number % 2}/{number}.jpg" for number in range(4)]
    write_tree(tmp_path, {name: picture_file(seed, (48, 40), "JPEG") for seed, name in enumerate(names)})
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_the_commands_and_python_of_a_page_run(page, scratch, tiny_run, monkeypatch, capsys):
    text = page.read_text()
    if not re.search(r"--output RUN\b", text):  # the page does not train RUN itself
        (scratch / "RUN").symlink_to(tiny_run)
    monkeypatch.setattr("crate_fast.train.write_shards.ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: [socket.close() for socket in sockets])
    for command in _commands(page):
        if command.startswith((*PARSED, *IGNORED)):
            continue
        start = next((start for start in SMALL if command.startswith(start)), None)
        assert start, f"add options to SMALL that make this command small: {command}"
        main, arguments = _main(command)
        assert main([*arguments, *shlex.split(SMALL[start])]) == 0, f"{command}\n{capsys.readouterr()}"
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(block, page.name, "exec"), {"__name__": page.stem})


def _parsed_only(page: Path, command: str) -> bool:
    """Return True for a command that does not run here; its options are not in a shell variable."""
    known = re.search(r"\btorchrun .*train/\w+\.py", command)
    known = known or command.startswith(("crate-fast ", "python -m crate_fast", "torchrun ", *PARSED))
    in_a_variable = re.search(r"\.py .*\$", command)
    return bool(known) and not in_a_variable and (page not in RUN or command.startswith(PARSED))


@pytest.mark.parametrize(
    "page",
    [
        page
        for page in PAGES
        if any(_parsed_only(page, command) or "tests/" in command for command in _commands(page))
    ],
    ids=lambda page: page.name,
)
def test_options_of_commands_that_do_not_run_here_are_valid(page, monkeypatch):
    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def stop(*arguments):
        if isinstance(arguments[0], argparse.ArgumentParser):
            parse(*arguments)
        raise Parsed

    monkeypatch.syspath_prepend(DOCS)
    monkeypatch.setattr(trainer, "launch", stop)  # stops training commands after their settings are checked
    for command in _commands(page):
        assert all((ROOT / word).is_file() for word in re.findall(r"\btests/\S+\.py\b", command)), command
        if not _parsed_only(page, command):
            continue
        main, arguments = _main(command)
        with monkeypatch.context() as patch:
            if not re.search(r"\btorchrun .*train/\w+\.py", command):
                patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            with pytest.raises(Parsed):
                main(arguments)


@pytest.mark.parametrize("name", ["README.md", "docs/evaluation.md", "docs/models.md"])
def test_documented_python_runs(name):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec"), {})


def test_documented_plans_run(scratch, tiny_run, capsys):
    plans = [command for page in PAGES for command in _commands(page) if command.startswith("crate-fast plan")]
    assert plans
    pilot = {"config.yaml": b"model: crate_small_patch8_224\nimage_size: 224\n"}
    pilot["summary.json"] = (tiny_run / "summary.json").read_bytes()
    write_tree(scratch / "runs" / "PILOT", pilot)
    for command in plans:
        assert cli.main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
        assert "hours" in capsys.readouterr().out


def test_the_notebook_runs_on_a_run_and_a_packaged_model(tiny_run):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    path = ROOT / "notebooks" / "emergence.ipynb"
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "store it without outputs"
    parameters = next(cell for cell in code if "parameters" in cell.metadata.get("tags", ()))
    parameters.source += f"\nMODEL, OTHER, COUNT = {str(tiny_run)!r}, MODEL, 3"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": path.parent}}).execute()
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"display_data", "stream"}
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 12
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    run, shipped = (float(line.rpartition(" ")[2]) for line in printed.splitlines() if "mean IoU" in line)
    assert shipped > 0.4 > run


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_their_anchors_exist(page):
    text = re.sub(r"<!--.*?-->|^```.*?^```", "", page.read_text(), flags=re.S | re.M)  # code has no links
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in _anchors(other), f"{page.name}: {target}"


def _modules() -> list[str]:
    found = pkgutil.walk_packages(crate_fast.__path__, "crate_fast.", onerror=lambda name: None)
    return ["crate_fast", *(module.name for module in found if not module.name.startswith("crate_fast.kernels."))]


@pytest.mark.parametrize("name", _modules())
def test_public_names_have_docstrings_and_their_examples_run(name):
    module = importlib.import_module(name)
    assert module.__doc__
    own = [symbol for symbol, value in vars(module).items() if getattr(value, "__module__", None) == name]
    for symbol in getattr(module, "__all__", [symbol for symbol in own if not symbol.startswith("_")]):
        value = getattr(module, symbol)
        assert not callable(value) or value.__doc__, f"{name}.{symbol}"
    assert doctest.testmod(module).failed == 0


def test_commands_import_without_triton_or_a_device_from_an_uninstalled_tree(tmp_path):
    code = f"""if True:
        import importlib, pathlib, sys
        sys.modules["triton"] = None
        import torch
        def touched(): raise AssertionError("a device was touched")
        torch.cuda._lazy_init = touched
        import crate_fast, crate_fast.kernels, crate_fast.train, crate_fast.eval
        early = {COMMAND_MODULES} & set(sys.modules)
        assert not early, f"python -m warns of {{early}}, which their packages import"
        for name in {COMMAND_MODULES}:
            importlib.import_module(name)
        model = crate_fast.CRATE(image_size=8, patch_size=4, num_classes=2, dim=8, depth=1, heads=1)
        model(torch.zeros(1, 3, 8, 8)).sum().backward()
        print(crate_fast.kernels.__file__)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == ROOT / "crate_fast" / "kernels" / "__init__.py"


# --- docs/mathematics.md: quoted code equals the source, and claims hold ---

MATHEMATICS = (DOCS / "mathematics.md").read_text()
QUOTES = re.findall(r"^\[(\S+)\]\(\.\./\1\) <!-- from \1 -->\n```python\n(.*?)```", MATHEMATICS, re.S | re.M)
CHECKS = re.findall(r"```python run\n(.*?)```", MATHEMATICS, re.S)


def _is_quoted_from(quoted: str, source: str) -> bool:
    """Return True if the source has the quoted lines in sequence, at any indentation; `…` skips lines."""
    patterns = []
    for part in re.split(r"^\s*…\s*\n", quoted, flags=re.M):
        lines = textwrap.dedent(part).splitlines()
        patterns.append("".join("\n" if not line else rf"(?P=indent){re.escape(line)}\n" for line in lines))
    first = patterns[0].replace("(?P=indent)", r"(?P<indent>[ ]*)", 1)
    return re.search("^" + "(?:.*\n)*?".join([first, *patterns[1:]]), source, re.M) is not None


@pytest.mark.parametrize(("path", "quoted"), QUOTES, ids=[f"{i}-{path}" for i, (path, _) in enumerate(QUOTES)])
def test_quoted_code_equals_the_file(path, quoted):
    assert _is_quoted_from(quoted, (ROOT / path).read_text()), f"{path} has other lines now: update\n{quoted}"


def test_every_block_is_a_quotation_or_runs():
    opened = re.findall(r"^```(.*)$", MATHEMATICS, re.M)[::2]
    assert opened.count("python run") == len(CHECKS) > 0
    assert opened.count("python") == len(QUOTES) > 0
    assert len(opened) == len(CHECKS) + len(QUOTES)


@pytest.mark.parametrize("code", CHECKS, ids=range(len(CHECKS)))
def test_the_claims_hold(code):
    assert "assert " in code
    exec(compile(code, "mathematics.md", "exec"), {})
