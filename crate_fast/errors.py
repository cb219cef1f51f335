"""Errors that a user can correct, and the one place where commands report them."""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["UserError", "missing_package", "require", "run_command"]

_EXTRA_OF = {  # package, as it is imported: the extra that installs it
    **dict.fromkeys(("pycocotools", "scipy", "sklearn"), "eval"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "export"),
    **dict.fromkeys(("starlette", "uvicorn"), "explore"),
    "datasets": "hf",
    "pydensecrf": "crf",
    "wandb": "wandb",
}


class UserError(ValueError):
    """An argument, a file or a setting that the user can correct.

    The message is one line: what is wrong, with its value, then what to do.
    """


def missing_package(name: str) -> UserError:
    """Return the error that says how to install an optional package."""
    return UserError(f'this needs the package {name}: pip install -e ".[{_EXTRA_OF[name]}]"')


def require(*packages: str) -> None:
    """Refuse to begin a command that would fail later for want of a package.

    Args:
        packages: As they are imported.

    Raises:
        UserError: One is not installed; the message says how to install it.
    """
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise missing_package(name)


def run_command(command: Callable[..., int | None], *arguments: Any) -> int:
    """Run a command; print a `UserError` as one line on stderr, without a traceback.

    Every other exception is a fault of ours and passes through. Under torchrun, rank 0 prints and each rank writes
    the message into the error file of its process, so that torchrun's own report ends with it.

    Args:
        command: A function that returns an exit status, or None for 0.
        arguments: What it is called with.

    Returns:
        The exit status; 2 after a `UserError`.
    """
    try:
        return command(*arguments) or 0
    except UserError as error:
        message = str(error)
        if message.startswith("Caught "):  # DataLoader puts a worker's traceback into the message
            message = message.rpartition("Error: ")[2].strip()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA_OF:
            raise
        message = str(missing_package(package))
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    message = f"error: {message}"
    if error_file:  # torch.distributed.elastic prints py_callstack
        facts = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        Path(error_file).write_text(json.dumps({"message": facts}))
    if os.environ.get("RANK", "0") == "0" or not error_file:
        print(message, file=sys.stderr)
    return 2
