"""Build the reference from the docstrings: python docs/build_reference.py [FOLDER]; without a folder, into site/.

Needs pdoc (`pip install -e ".[docs]"`). No network: neither to build the pages nor to read and search them.
"""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
_SUBPACKAGES = ("kernels", "train", "train.data", "eval", "eval.common", "eval.emergence", "eval.explore")
PACKAGES = ("crate_fast", *(f"crate_fast.{name}" for name in _SUBPACKAGES))


def modules() -> list[ModuleType]:
    """Every module of the package, imported; a package stands before its modules."""
    found = []
    for name in PACKAGES:
        package = importlib.import_module(name)
        names = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg]
        found += [package, *(importlib.import_module(f"{name}.{module}") for module in names)]
    return found


@contextmanager
def _as_shown(documented: list[ModuleType]) -> Iterator[None]:
    """While it is open, modules look as the pages are to show them: a package with `__all__` names its modules as
    well, a Triton kernel is the function that it was made from, and is listed though its name begins with `_`."""
    from triton.runtime import KernelInterface

    before = [(module, dict(vars(module))) for module in documented]
    try:
        for module in documented:
            public = vars(module).get("__all__")
            kernels = {name: value.fn for name, value in vars(module).items() if isinstance(value, KernelInterface)}
            own = {name: function for name, function in kernels.items() if function.__module__ == module.__name__}
            vars(module).update(own)
            if public is not None:
                inside = [other.__name__.rpartition(".") for other in documented]
                more = [name for package, _, name in inside if package == module.__name__]
                more += [name for name in own if name.endswith("_kernel")]
                module.__all__ = [*public, *(name for name in more if name not in public)]
        yield
    finally:
        for module, names in before:
            vars(module).update(names)


def build(folder: Path) -> None:
    """Write the pages; `folder/index.html` is where to begin."""
    import pdoc

    documented = modules()
    pdoc.render.configure(docformat="google", footer_text="crate_fast")
    with _as_shown(documented):
        pdoc.pdoc("crate_fast", output_directory=folder)


def main(argv: list[str] | None = None) -> int:
    """Build as the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] + ".")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "site", help="for the pages; default site/")
    options = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))  # so that it runs in a tree that is not installed
    build(options.folder)
    print(f"written: {options.folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
