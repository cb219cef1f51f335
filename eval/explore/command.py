"""Explore models layer by layer on a local web page: attention of CLS or a patch, components, masks and sparsity.

    crate-fast explore                                            the newest run and the models of the package
    crate-fast explore --checkpoint runs/NAME CRATE=runs/A        one model or several
    crate-fast explore --checkpoint runs/NAME --images PHOTOS     with the images of a folder

Only this computer can open the page, unless --host names another address. The page loads nothing from other hosts and
writes nothing to disk; uploads stay in memory.
"""

import argparse
import contextlib
import socket
import sys
import threading
import webbrowser
from pathlib import Path

import uvicorn

from crate_fast.errors import UserError
from crate_fast.eval.common.models import check_labels, split_label, split_source
from crate_fast.eval.explore.inspection import Explorer, ModelChoice
from crate_fast.eval.explore.pictures import Pictures
from crate_fast.eval.explore.server import application
from crate_fast.options import PORT, main_of
from crate_fast.pretrained import FOLDER, is_model_folder, packaged_models, record
from crate_fast.train import checkpoint
from crate_fast.train.distributed import choose_device
from crate_fast.train.runs import checkpoint_steps

_LOOPBACK = ("127.0.0.1", "localhost")


def model_choices(specification: str) -> list[ModelChoice]:
    """Return the menu entries of a model on the command line; for a run, its checkpoints and the untrained model."""
    label, source = split_label(specification)
    place, which = split_source(source)
    if which or not Path(place).is_dir() or is_model_folder(place):
        return [ModelChoice(specification, label, label, which == "untrained")]
    steps = checkpoint_steps(Path(place))
    best = checkpoint.best_step(Path(place) / "checkpoints") or steps[-1]
    return [
        ModelChoice(f"{place}@{best}", f"{label}, best (step {best:,})", label),
        ModelChoice(f"{place}@untrained", f"{label}, untrained", label, True),
        *(ModelChoice(f"{place}@{step}", f"{label}, step {step:,}", label) for step in steps),
    ]


def default_choices(runs: Path = Path("runs")) -> tuple[list[ModelChoice], str]:
    """Return the menu entries without --checkpoint (newest run, packaged models, their twins), and a note on them."""
    found = [path.parent for path in runs.glob("**/config.yaml") if checkpoint.newest(path.parent / "checkpoints")]
    if found:
        choices = model_choices(str(max(found, key=lambda run: (run / "checkpoints").stat().st_mtime)))
        note = f"The newest run below {runs}/ comes first. Open other models with --checkpoint."
    else:
        choices = []
        note = f"There is no run below {runs}/. These small models come with the package."
    names, group = packaged_models(), "models of the package"
    choices += [ModelChoice(f"shipped:{name}", record(str(FOLDER / name))["description"], group) for name in names]
    choices += [ModelChoice(f"shipped:{name}@untrained", f"{name}, untrained", group, True) for name in names]
    return choices, note


def open_explorer(options: argparse.Namespace) -> Explorer:
    """Build the explorer from the command-line options and open its first model."""
    opening = {"device": choose_device(options.device), "image_size": options.image_size}
    opening |= {"model_args": options.model_args, "seed": options.seed}
    pictures, note = Pictures(options.images), ""
    check_labels(options.checkpoint or ())  # raises if two are equal
    choices = [choice for name in options.checkpoint or () for choice in model_choices(name)]
    if not choices:
        choices, note = default_choices()
    explorer = Explorer(choices, note, pictures, **opening)
    explorer.model(0)  # raises before the page is served
    return explorer


def _listen(host: str, port: int | None) -> socket.socket:
    """Return a listening socket at the port or, when None, at the first free port from the default on."""
    for candidate in [port] if port else range(PORT, PORT + 50):
        try:
            return socket.create_server((host, candidate))  # early requests wait for the server
        except (OSError, OverflowError) as error:
            last = error
    raise UserError(f"--host {host} --port {port or PORT}: {last}; give another --port or --host") from last


def _serve(options: argparse.Namespace) -> None:
    explorer = open_explorer(options)
    listener = _listen(options.host, options.port)
    everywhere = options.host in ("0.0.0.0", "::")
    name = socket.gethostname() if everywhere else options.host
    address = f"http://{name}:{listener.getsockname()[1]}"
    print(f"{address} (stop with Ctrl-C)", flush=True)
    if options.host not in _LOOPBACK:
        print(f"--host {options.host}: everyone who can reach this computer can use the page", file=sys.stderr)
    elif not options.no_browser:
        threading.Timer(1.0, webbrowser.open, [address]).start()
    app = application(explorer, (name, *_LOOPBACK), addresses=everywhere)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after its shutdown
        server.run(sockets=[listener])


main = main_of("explore", _serve)
