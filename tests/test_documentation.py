"""The pages of docs/: their commands and Python run, small, in a scratch folder, and links lead somewhere.

Commands run in this process, torchrun's and python's scripts by their `main`: the words behind the script are tested,
not the launcher.
"""

import argparse
import importlib
import json
import re
import shlex
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import uvicorn
from PIL import Image

from crate_fast import cli
from crate_fast.train import trainer

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
HOW_TO = sorted((DOCS / "how-to").glob("*.md"))
RUN = [DOCS / "tutorial.md", *HOW_TO]  # pages whose commands run here
PAGES = sorted(DOCS.glob("*.md")) + sorted((DOCS / "results").glob("*.md")) + HOW_TO

_TRAINING = "--image-size 32 --batch-size 4 --epochs 1 --threads 1 --device cpu"
_SCENES = "--train-samples 8 --val-samples 4 --segmentation-samples 4"
_MODEL = "--patch-size 8 --dim 32 --depth 2 --heads 2"
SMALL = {  # a command's beginning → what is written behind it here, so that seconds do; a later option wins
    "torchrun train/pretrain.py": f"{_TRAINING} {_SCENES} {_MODEL}",
    "torchrun train/finetune.py": f"{_TRAINING}",
    "crate-fast pretrain": f"{_TRAINING} {_SCENES} {_MODEL}",
    "crate-fast explore": "--no-browser",  # its server is told to stop at once
    "crate-fast export": "",
    "crate-fast eval coarse_segmentation": "--limit 8 --device cpu",
    "python -m crate_fast.train.write_shards": "--workers 1",
    "python -m crate_fast.env": "",
    "crate-fast eval classify": "--limit 8 --train-limit 24 --k 1 --device cpu",
    "crate-fast eval attention_maps": "--limit 2 --device cpu",
    "crate-fast eval maskcut": "--limit 2 --image-size 32 --device cpu",
    "crate-fast eval pca": "--limit 3 --device cpu",
    "crate-fast eval by_layer": "--limit 4 --image-size 32 --device cpu",
    "crate-fast eval white_box": "--limit 4 --device cpu",
}
PARSED = {  # commands whose options are only parsed, and why
    "torchrun --nproc_per_node": "several GPUs",
    "bash benchmarks/gpu_check.sh": "a GPU",
    "python benchmarks/": "a GPU, or minutes",
    "pytest": "minutes, and these are tests",
    "CRATE_FAST_REQUIRE_GPU=1 pytest": "a GPU",
    "crate-fast check": "a GPU",
    "crate-fast reproduce": "a minute; test_emergence runs it",
    "pip install": "a network",
    "ruff": "it is no part of the package",
    "python docs/build_reference.py": "test_build_reference runs it",
}


def _commands(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text().replace("\\\n", " "), re.S)
    lines = [line for block in blocks for line in re.split(r"\n| && ", block) if line.strip()]
    return [shlex.join(words) for words in (shlex.split(line, comments=True) for line in lines) if words]


def _begins(command: str, table: dict[str, str]) -> str | None:
    return next((start for start in table if command.startswith(start)), None)


def _main(words: list[str]):
    """(a command's `main`, its arguments)."""
    if words[0] == "crate-fast":
        return cli.main, words[1:]
    if words[:2] == ["python", "-m"]:
        return importlib.import_module(words[2]).main, words[3:]
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    folder, name = words[script].split("/")
    module = importlib.import_module(f"crate_fast.train.{name[:-3]}" if folder == "train" else name[:-3])
    return module.main, words[script + 1 :]


def _picture(number: int, path: Path) -> None:
    """A bright rectangle somewhere on noise."""
    pixels = np.random.default_rng(number).integers(0, 120, (40, 48, 3), dtype=np.uint8)
    pixels[8 + number : 24 + number, 10:30] = (250, 40 * number % 256, 60)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """A working folder with what the pages call DATA and PHOTOS."""
    for number in range(6):
        _picture(number, tmp_path / "PHOTOS" / f"{number}.jpg")
    for split, count in (("train", 8), ("val", 4)):
        for number in range(count):
            _picture(number, tmp_path / "DATA" / split / f"class{number % 2}" / f"{number}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_a_pages_commands_and_python_run_small(page, scratch, tiny_run, monkeypatch, capsys):
    text = page.read_text()
    if not re.search(r"--output RUN\b", text):  # the page does not make it
        (scratch / "RUN").symlink_to(tiny_run)
    monkeypatch.setattr("multiprocessing.get_context", lambda kind: SimpleNamespace(Pool=ThreadPool))  # of shards
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: [socket.close() for socket in sockets])
    for command in _commands(page):
        start = None if _begins(command, PARSED) else _begins(command, SMALL)
        if start is None:
            assert _begins(command, PARSED), f"say in SMALL how to run this small: {command}"
            continue
        main, arguments = _main(shlex.split(command))
        assert main([*arguments, *shlex.split(SMALL[start])]) == 0, f"{command}\n{capsys.readouterr()}"
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(block, page.name, "exec"), {"__name__": page.stem})


def test_the_plan_of_a_large_run_is_made(scratch, tiny_run, capsys):
    plans = [command for command in _commands(DOCS / "training.md") if command.startswith("crate-fast plan")]
    assert plans
    summary = json.loads((tiny_run / "summary.json").read_text())
    planned = {"model": "crate_small_patch8_224", "image_size": 224, "dim": None, "depth": None, "heads": None}
    summary["throughput"] |= planned  # as if it were a short run of the planned model
    (scratch / "runs" / "PILOT").mkdir(parents=True)
    (scratch / "runs" / "PILOT" / "summary.json").write_text(json.dumps(summary))
    for command in plans:
        assert cli.main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
        assert "hours" in capsys.readouterr().out


class _Parsed(Exception):
    pass


@pytest.mark.parametrize("page", [DOCS / "README.md", *RUN], ids=lambda page: page.stem)
def test_options_of_commands_for_gpus_several_devices_and_tools_are_valid(page, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def stop(*arguments):
        if isinstance(arguments[0], argparse.ArgumentParser):
            parse(*arguments)
        raise _Parsed

    for command in _commands(page):
        start, words = _begins(command, PARSED), shlex.split(command)
        if start is None:
            continue
        if start == "pip install":
            extras = re.findall(r"\w+", words[-1].partition("[")[2])
            assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
        elif start == "bash benchmarks/gpu_check.sh":
            import gpu_check

            with monkeypatch.context() as patch:
                patch.setattr(argparse.ArgumentParser, "parse_args", stop)
                with pytest.raises(_Parsed):
                    gpu_check.main(words[2:])
        elif "pytest" in start:
            _check_pytest(words[words.index("pytest") + 1 :])
        elif start == "ruff":
            assert words[1] in ("check", "format")
        else:
            if start == "python docs/build_reference.py":
                monkeypatch.syspath_prepend(DOCS)
            main, arguments = _main(words)
            with monkeypatch.context() as patch:
                if start.startswith("torchrun"):  # further than its parser: its settings must fit each other
                    patch.setattr(trainer, "launch", stop)
                else:
                    patch.setattr(argparse.ArgumentParser, "parse_args", stop)
                with pytest.raises(_Parsed):
                    main(arguments)


def _check_pytest(words: list[str]) -> None:
    files = [ROOT / word for word in words if word.endswith(".py")]
    assert files
    assert all(file.is_file() for file in files)
    if "-k" in words:
        wanted = words[words.index("-k") + 1]
        assert all(re.search(rf"def test_\w*{wanted}", file.read_text()) for file in files)


def test_the_tables_have_no_command_that_no_page_has():
    commands = [command for page in [DOCS / "README.md", *RUN] for command in _commands(page)]
    for start in (*SMALL, *PARSED):
        assert any(command.startswith(start) for command in commands), start


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"<!--.*?-->|^```.*?^```", "", page.read_text(), flags=re.S | re.M)  # code has no links
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in _anchors(other), f"{page.name}: {target}"


def test_the_index_lists_every_page():
    text = re.sub(r"<!--.*?-->", "", (DOCS / "README.md").read_text(), flags=re.S)
    for page in PAGES:
        index = text if page.parent != DOCS / "results" else text + (DOCS / "results" / "README.md").read_text()
        names = (f"]({page.relative_to(DOCS)})", f"]({page.name})")
        assert page == DOCS / "README.md" or any(name in index for name in names), page


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_a_how_to_page_is_short(page):
    assert len(page.read_text().splitlines()) <= 60
