"""The configuration of a run: frozen dataclass → YAML recipe → command line.

Each field's docstring is its `--help` text. An unknown key is an error that suggests the nearest one.
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import os
import textwrap
import typing
from collections.abc import Callable
from pathlib import Path

import yaml

from crate_fast.errors import CommandParser, UserError, nearest
from crate_fast.train.config import TrainConfig, renamed_settings

RECIPES = Path(__file__).parent / "recipes"


@functools.cache
def field_help(config_class: type) -> dict[str, str]:
    """Return the docstring under each field, by the field's name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0].body
    texts = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            texts[field.target.id] = text.value.value
    return texts


def _value_type(annotation) -> type:
    inner = [a for a in typing.get_args(annotation) if a is not type(None)]
    return inner[0] if inner else annotation


def _checked(values: dict, source: str) -> dict:
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    checked = {}
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"{source}: unknown key {name!r}{nearest(str(name), fields)}")
        kind = _value_type(fields[name].type)
        optional = kind is not fields[name].type
        if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
            try:  # YAML reads 1e-3 as a string
                value = float(value)
            except ValueError as error:
                raise UserError(f"{source}: {name}={value!r} is not a number") from error
        if not (value is None and optional) and (type(value) is not kind):
            raise UserError(f"{source}: {name}={value!r} must be {kind.__name__}")
        checked[name] = value
    return checked


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str) -> dict:
    """Load a recipe's settings, by its name from `recipe_names()` or by the path of a YAML file."""
    path = RECIPES / f"{name}.yaml" if name in recipe_names() else Path(name)
    if not path.is_file():
        raise UserError(
            f"no recipe {name!r}{nearest(name, recipe_names())}; "
            f"choose {', '.join(recipe_names())} or a YAML file's path"
        )
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of settings, not {type(values).__name__}")
    return _checked(renamed_settings(values), str(path))


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default=None, help="folder of the run; runs/<recipe>-<date> when absent")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --output")
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything, run two steps, save, load, and leave nothing behind"
    )


def _with_effect(values: dict, given: dict) -> dict:
    """Refuse transforms that the images never meet; leave out a recipe's when it is used on shape_scenes instead."""
    scenes, transforms = TrainConfig.dataset, ("crop", "crop_scale", "auto_augment")
    if (values | given).get("dataset", scenes) == scenes:
        if values.get("dataset", scenes) != scenes:
            values = {name: value for name, value in values.items() if name not in transforms}
        for name in transforms:
            found, default = (values | given).get(name), getattr(TrainConfig, name)
            if found not in (None, default):
                raise UserError(
                    f"{name}={found!r} has no effect on dataset={scenes!r}, whose images are drawn: leave "
                    f"out --{name.replace('_', '-')}, or name another --dataset"
                )
    elif "crop_scale" in given and (values | given).get("crop") != "random":
        raise UserError(f"crop_scale={given['crop_scale']} needs crop='random': pass --crop random too")
    return values


def build_config(
    argv: list[str] | None,
    description: str,
    default_recipe: str,
    *,
    adjust: Callable[[dict, dict], dict] = lambda values, chosen: values | chosen,
    add_options: Callable[[argparse.ArgumentParser], None] = _add_run_options,
):
    """Read the command line: recipe, then single settings, then the command's own options.

    Args:
        argv: Arguments; those of the process when None.
        description: For `--help`.
        default_recipe: Used when `--recipe` is absent.
        adjust: Merges the recipe's settings and the command line's; by default the latter win.
        add_options: Adds the command's own options; by default those of a run, such as `--output`.

    Returns:
        (config, options), options holding `recipe` and the command's own.
    """
    parser = CommandParser(description=description, allow_abbrev=False)
    parser.add_argument(
        "--recipe", default=default_recipe, help=f"{', '.join(recipe_names())}, or a YAML file's path"
    )
    add_options(parser)
    texts = field_help(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        option = "--" + field.name.replace("_", "-")
        kind = _value_type(field.type)
        help_text = texts[field.name].replace("%", "%%")
        if kind is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=help_text)
        else:
            parser.add_argument(option, type=kind, default=None, metavar=kind.__name__.upper(), help=help_text)
    options = parser.parse_args(argv)
    chosen = {f.name: getattr(options, f.name) for f in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in chosen.items() if value is not None}
    config = TrainConfig(**adjust(_with_effect(load_recipe(options.recipe), given), given))
    if getattr(options, "output", "") is not None:  # named, or not an option of this command
        return config, options
    if options.resume:
        raise UserError("--resume continues the run in --output: name its folder with --output")
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise UserError(
            "torchrun --max-restarts: restarted processes look for their run in --output; name its folder"
        )
    return config, options


def dump_config(config) -> str:
    """Return the resolved configuration as YAML that `--recipe` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
