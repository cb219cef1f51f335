"""Packages that this one needs for some of its commands alone, by the extra of setup.py that installs them."""

import importlib.util

__all__ = ["missing", "require"]


def require(extra: str, *packages: str) -> None:
    """Refuse to begin what would fail later for want of a package.

    Args:
        extra: Of setup.py, such as "eval".
        packages: As they are imported.

    Raises:
        ModuleNotFoundError: One is not installed; the message says how to install it.
    """
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(missing(extra, name), name=name)


def missing(extra: str, package: str) -> str:
    """What to tell a user who has not got a package of an extra."""
    return f'this needs the package {package}: pip install -e ".[{extra}]"'
