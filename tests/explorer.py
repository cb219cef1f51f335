"""What the explorer's tests share: a served desk, and pictures good and bad."""

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import uvicorn
from PIL import Image

from crate_fast.eval.explore.desk import Desk
from crate_fast.eval.explore.offers import Shelf
from crate_fast.eval.explore.pictures import Pictures
from crate_fast.eval.explore.server import application


def shelf_of(offers) -> Shelf:
    """A shelf with offers, on the CPU."""
    return Shelf(offers, device="cpu", image_size=None, model_args=None, seed=0)


def desk_with(offers, folder=None) -> Desk:
    """A desk with offers, and the pictures of a folder or scenes."""
    return Desk(shelf_of(offers), "", Pictures(folder))


@contextmanager
def served(desk: Desk, hosts=("127.0.0.1", "localhost")) -> Iterator[str]:
    """The address of a server of the desk, for as long as the block lasts."""
    server = uvicorn.Server(uvicorn.Config(application(desk, hosts), port=0, log_level="warning"))
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
    """A file with blocks of colours of one's own: width and height."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(out, kind, **options)
    return out.getvalue()


def huge_file() -> bytes:
    """A small file of 100 megapixels."""
    out = io.BytesIO()
    Image.new("1", (10000, 10000)).save(out, "PNG")
    return out.getvalue()
