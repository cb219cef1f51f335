"""Freely licensed photographs that installed packages bring along, for a first look and for figures."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from crate_fast.train.data.image_files import read_image

__all__ = ["FreePhotograph", "free_photographs"]


@dataclass(frozen=True)
class FreePhotograph:
    """A photograph of an installed package.

    Attributes:
        name: One or two words.
        credit: Author and licence.
        path: Its file.
    """

    name: str
    credit: str
    path: Path

    def square(self, size: int) -> Image.Image:
        """Return the central square, RGB, resized to `size` pixels."""
        picture = read_image(self.path)
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        box = (left, top, left + side, top + side)
        return picture.resize((size, size), Image.Resampling.LANCZOS, box=box)


_KNOWN = (  # package, file, name, credit
    ("skimage", "data/chelsea.png", "cat", "Stéfan van der Walt, CC0"),
    ("skimage", "data/coffee.png", "coffee", "Rachel Michetti, CC0"),
    ("skimage", "data/astronaut.png", "astronaut", "NASA, public domain"),
    ("skimage", "data/rocket.jpg", "rocket", "SpaceX, CC0"),
    ("skimage", "data/motorcycle_left.png", "motorcycle", "Daniel Scharstein, CC0"),
    ("sklearn", "datasets/images/flower.jpg", "flower", "vultilion, CC BY 2.0"),
    ("sklearn", "datasets/images/china.jpg", "temple", "danielbuechele, CC BY 2.0"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "portrait", "US Navy, public domain"),
)


def free_photographs() -> list[FreePhotograph]:
    """Return the photographs of scikit-image, scikit-learn and matplotlib, as far as those are installed."""
    found = []
    for package, file, name, credit in _KNOWN:
        specification = importlib.util.find_spec(package)
        path = Path(specification.origin).parent / file if specification and specification.origin else None
        if path is not None and path.is_file():
            found.append(FreePhotograph(name, credit, path))
    return found
