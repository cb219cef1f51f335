"""Errors that a user can correct, and how commands report them."""

import argparse
import difflib
import errno
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_EXTRA_OF = {  # import name of a package: the extra that installs it
    **dict.fromkeys(("pycocotools", "scipy", "sklearn", "skimage"), "eval"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "export"),
    **dict.fromkeys(("starlette", "uvicorn"), "explore"),
    "datasets": "hf",
}


_REMEDIES = {  # of system errors that are not bugs
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, or use another folder"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "check its permissions, or use another folder"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "a file is in the place of a folder; name another folder"),
    errno.EIO: "check its disk",
    errno.EMFILE: "raise the limit of open files with ulimit -n",
}


class UserError(ValueError):
    """Error in an argument, a file or a setting that the user can correct.

    The message is one line: what is wrong, with its value, then the remedy.
    """


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ": did you mean …?" with the choice most similar to `word`; "" if none is similar."""
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f": did you mean {match[0]!r}?" if match else ""


class CommandParser(argparse.ArgumentParser):
    """Argument parser that raises `UserError` without the usage, and suggests the nearest option."""

    def __init__(self, **options: Any):
        super().__init__(**({"allow_abbrev": False} | options))
        self._negative_number_matcher = re.compile(r"-\.?\d[\d.,e-]*$")  # argparse: values, not options; also -1,-2

    def parse_known_args(self, args=None, namespace=None):
        """Parse arguments; also ~/ within a word, as in folder:~/PHOTOS, names the home folder."""
        words = sys.argv[1:] if args is None else args
        words = [re.sub(r"(?<=[:=@])~(?=/)", lambda _: os.path.expanduser("~"), word) for word in words]
        return super().parse_known_args(words, namespace)

    def error(self, message):
        """Raise argparse's message as a UserError."""
        _, unknown, words = message.partition("unrecognized arguments: ")
        if unknown:
            word = words.split()[0]
            options = [option for action in self._actions for option in action.option_strings]
            message = f"unknown argument {word!r}{nearest(word.split('=')[0], options)}"
        raise UserError(f"{message}; --help lists the options")


def missing_package(name: str) -> UserError:
    """Return the error for a missing optional package, with the command that installs it."""
    return UserError(
        f'this needs the package {name}: pip install -e ".[{_EXTRA_OF[name]}]", in the clone of crate_fast'
    )


def require(*packages: str) -> None:
    """Raise a UserError now for a missing package (import name) that a command needs later."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise missing_package(name)


def run_command(command: Callable[..., int | None], *arguments: Any) -> int:
    """Run a command; print a `UserError` as one line on stderr, without a traceback.

    System errors, such as a full disk, missing permissions or too little memory, are printed in the same way. All
    other exceptions are bugs and propagate. Under torchrun, rank 0 prints, and each rank writes the message to the
    error file of its process, which torchrun shows at the end of its report.

    Returns:
        The exit status that the command returned, 0 for None; 2 after an error, 130 after Ctrl-C, 141 if the reader
        of the output has ended.
    """
    try:
        return command(*arguments) or 0
    except UserError as error:
        message = str(error)
        if message.startswith("Caught "):  # DataLoader puts a worker's traceback into the message
            message = re.split(r"\n[\w.]*Error: ", message)[-1]
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA_OF:
            raise
        message = str(missing_package(package))
    except (MemoryError, RuntimeError) as error:
        reason = str(error).partition("\n")[0][:300]
        lacking = "out of memory|t allocate memory|^DataLoader worker"  # workers are killed, mostly for memory
        if isinstance(error, RuntimeError) and not re.search(lacking, reason):
            raise
        message = f"too little memory ({reason}): use a smaller batch or image size, or fewer workers"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `crate-fast … | head`
        print("the reader of the output has ended", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes the rest of the output when it ends
        return 141
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        message = f"{error.filename or 'a file'}: {error.strerror}: {_REMEDIES[error.errno]}"
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    message = f"error: {' '.join(message.split())}"
    if error_file:  # torch.distributed.elastic prints py_callstack
        facts = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        Path(error_file).write_text(json.dumps({"message": facts}))
    if os.environ.get("RANK", "0") == "0" or not error_file:
        print(message, file=sys.stderr)
    return 2
