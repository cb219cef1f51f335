"""Look inside models on a local page: attention of CLS or of a patch, components, masks, sparsity, layer by layer.

    crate-fast explore                                            the newest run, or the models of the package
    crate-fast explore --checkpoint runs/NAME CRATE=runs/A        one model or several
    crate-fast explore --checkpoint runs/NAME --images PHOTOS     with the images of a folder

Only this computer can open the page, unless --host says otherwise. Nothing is fetched from elsewhere, and nothing is
written: what a visitor uploads stays in memory.
"""

import argparse
import contextlib
import ipaddress
import socket
import sys
import threading
import webbrowser
from pathlib import Path

from crate_fast.errors import CommandParser, UserError, run_command
from crate_fast.eval.common import models as models_module
from crate_fast.eval.common.command import positive, seed
from crate_fast.eval.explore.desk import Desk
from crate_fast.eval.explore.offers import Shelf, default_offers, offers_of
from crate_fast.eval.explore.pictures import Pictures
from crate_fast.train.distributed import choose_device

__all__ = ["desk_of", "main"]

_PORT = 7470
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_ANY = ("0.0.0.0", "::")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="crate-fast explore",
        description=__doc__.split("\n\n")[0],
        epilog="How to name models:\n\n" + models_module.__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint", nargs="+", metavar="MODEL", help="see below; default: the newest run below runs/"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="a folder of images; default: shape_scenes")
    parser.add_argument("--image-size", type=positive, help="side to which images are squashed; default: the model's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; default auto")
    parser.add_argument("--seed", type=seed, default=0, help="of untrained models; default 0")
    parser.add_argument("--model-args", nargs="+", metavar="KEY=VALUE", help="for models that timm builds")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; default 127.0.0.1, this computer")
    parser.add_argument("--port", type=positive, help=f"default {_PORT}, or the next that is free")
    parser.add_argument("--no-browser", action="store_true", help="only say the address")
    return parser


def desk_of(options: argparse.Namespace) -> Desk:
    """What a command line wants to look at; its first model is opened.

    Raises:
        UserError: A model or the images cannot be opened.
    """
    opening = {"device": choose_device(options.device), "image_size": options.image_size}
    opening |= {"model_args": options.model_args, "seed": options.seed}
    pictures = Pictures(options.images)
    if not options.checkpoint:
        return Desk(*_default_shelf(opening), pictures)
    offered = {name: offers_of(name) for name in options.checkpoint}
    groups = [offers[0].group for offers in offered.values()]
    twice = {group for group in groups if groups.count(group) > 1}
    if twice or len(offered) < len(options.checkpoint):
        name = sorted(twice)[0] if twice else options.checkpoint[0]
        raise UserError(f"--checkpoint: two models are called {name!r}; give each a name, as in NAME=MODEL")
    shelf = Shelf([offer for offers in offered.values() for offer in offers], **opening)
    shelf.get(0)
    return Desk(shelf, "", pictures)


def _default_shelf(opening: dict) -> tuple[Shelf, str]:
    """The newest run and the models of the package; without the run if it cannot be opened."""
    offers, note = default_offers()
    shelf = Shelf(offers, **opening)
    try:
        shelf.get(0)
    except UserError as error:
        others = [offer for offer in offers if offer.group != offers[0].group]
        if not others:
            raise
        shelf, note = Shelf(others, **opening), f"The newest run was left out: {error}"
        shelf.get(0)
    return shelf, note


def _listen(host: str, port: int | None) -> socket.socket:
    """A socket at the port, or at the first free one from the default on.

    Raises:
        UserError: The port is taken, or the address is not this computer's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in [port] if port else range(_PORT, _PORT + 50):
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
        except (OSError, OverflowError) as error:
            listener.close()
            last = error
        else:
            listener.listen()  # so that whoever comes before the server is ready waits
            return listener
    raise UserError(f"--host {host} --port {port or _PORT}: {last}; give another --port or --host") from last


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _serve(options: argparse.Namespace) -> None:
    try:
        import uvicorn

        from crate_fast.eval.explore.server import application
    except ModuleNotFoundError as error:
        raise UserError(f'{error.name} is missing: pip install -e ".[explore]"') from error
    desk = desk_of(options)
    listener = _listen(options.host, options.port)
    port = listener.getsockname()[1]
    address = f"http://[{options.host}]:{port}" if ":" in options.host else f"http://{options.host}:{port}"
    print(f"{address} (stop with Ctrl-C)", flush=True)
    if not _is_loopback(options.host):
        print(f"--host {options.host}: everyone who reaches this computer can use the page", file=sys.stderr)
    elif not options.no_browser:
        threading.Timer(1.0, webbrowser.open, [address]).start()
    hosts = None if options.host in _ANY else (options.host, *_LOOPBACK)
    server = uvicorn.Server(uvicorn.Config(application(desk, hosts), log_level="warning"))
    with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again when it has stopped
        server.run(sockets=[listener])


def main(argv: list[str] | None = None) -> int:
    """Serve the page until it is stopped; returns the exit status."""
    return run_command(lambda: _serve(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
