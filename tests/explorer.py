"""Helpers of the explorer's tests: a running server and picture files."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import uvicorn
from image_data import encoded
from PIL import Image

from crate_fast.eval.explore.command import model_choices
from crate_fast.eval.explore.inspection import Explorer
from crate_fast.eval.explore.pictures import Pictures
from crate_fast.eval.explore.server import application

SHIPPED = ("shipped:CRATE", "shipped:ViT", "shipped:CRATE@untrained")


def explorer_with(*models: str, folder: Path | None = None, **opening) -> Explorer:
    """Return an explorer of models, named as on the command line, with a folder's pictures or only scenes."""
    opening = {"device": "cpu", "image_size": None, "model_args": None, "seed": 0} | opening
    choices = [choice for model in models for choice in model_choices(model)]
    with mock.patch("crate_fast.eval.explore.pictures.free_photographs", dict):
        return Explorer(choices, "", Pictures(folder), **opening)


@contextmanager
def served(explorer: Explorer, hosts=("127.0.0.1", "localhost"), addresses=False) -> Iterator[str]:
    """Serve the explorer inside the block, and yield its address."""
    app = application(explorer, hosts, addresses)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive(), "the server does not stop"


def picture_file(seed: int = 0, size: tuple[int, int] = (96, 64), kind: str = "PNG", **options) -> bytes:
    """Return an image file of random coloured blocks; `size` is (width, height)."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return encoded(Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST), kind, **options)
