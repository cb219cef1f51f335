"""Command lines are parsed before PyTorch is imported; choices and defaults equal those of the modules."""

import argparse
import json
import re
import subprocess
import sys

import pytest

from crate_fast import export
from crate_fast.cli import COMMANDS, GROUPS
from crate_fast.errors import UserError
from crate_fast.eval import by_layer, comparison
from crate_fast.eval.emergence.protocol import MODELS, SIZES
from crate_fast.options import PARSERS, parse
from crate_fast.train.reconstruction import RATIOS

_ALONE = list(COMMANDS)
_GROUPED = [f"{word} {name}" for word, (_, entries, *_) in GROUPS.items() for name in entries]

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
    commands = [*_ALONE, *_GROUPED]
    lines = [f"{command} {option}" for command in commands for option in ("--help", "--nosuchoption")]
    options = {"input": json.dumps([*lines, *_MISSPELT]), "capture_output": True, "text": True, "check": True}
    answers = json.loads(subprocess.run([sys.executable, "-c", _PROGRAM], **options).stdout)
    for command in commands:
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
        ("eval pca m --data d --layers 1,x", "argument --layers: invalid comma_separated value: '1,x'"),
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


def test_layers_are_a_word_or_numbers():
    assert parse("eval pca", ["m", "--data", "d", "--layers", "all"]).layers == "all"
    assert parse("export", ["m", "--layers", "3,4", "--outputs", "logits"]).layers == [3, 4]
