"""The paper's numbers (Emergence of Segmentation with Minimalistic White-Box Transformers).

Scores are in percent, accuracies from 0 to 1. Tables 1 and 2 report different detection scores of CRATE-S/8, although
the paper describes the same setting.
"""

_BOX, _MASK, _MIOU = ("box AP50", "box AP75", "box AP"), ("mask AP50", "mask AP75", "mask AP"), "VOC mIoU"


def _table1(box: tuple[float, float, float], mask: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(_BOX + _MASK, box + mask, strict=True))


def _table2(box: tuple[float, float, float], miou: float) -> dict[str, float]:
    return dict(zip(_BOX, box, strict=True)) | {_MIOU: miou}


TABLES: dict[str, dict[str, dict[str, float]]] = {
    "table1": {
        "CRATE-S/8": _table1((2.9, 1.0, 1.1), (1.8, 0.7, 0.8)),
        "CRATE-B/8": _table1((2.9, 1.0, 1.3), (2.2, 0.7, 1.0)),
        "ViT-S/8": _table1((0.1, 0.1, 0.0), (0.0, 0.0, 0.0)),
        "ViT-B/8": _table1((0.8, 0.2, 0.4), (0.7, 0.5, 0.4)),
        "DINO-S/8": _table1((5.0, 2.0, 2.4), (4.0, 1.3, 1.7)),
        "DINO-B/8": _table1((5.1, 2.3, 2.5), (4.1, 1.3, 1.8)),
    },
    "table2": {
        "CRATE": _table2((2.1, 0.7, 0.8), 23.9),
        "CRATE-MLP": _table2((0.2, 0.2, 0.2), 22.0),
        "CRATE-MHSA": _table2((0.1, 0.1, 0.0), 18.4),
        "ViT": _table2((0.1, 0.1, 0.0), 14.1),
    },
    "figure4": {
        "CRATE-S/8": {_MIOU: 23.9},
        "CRATE-B/8": {_MIOU: 23.6},
        "ViT-S/8": {_MIOU: 14.1},
        "ViT-B/8": {_MIOU: 19.2},
        "DINO-S/8": {_MIOU: 27.0},
        "DINO-B/8": {_MIOU: 27.3},
    },
}
_TRANSFERRED = ("CRATE-T/8", "CRATE-S/8", "CRATE-B/8", "ViT-T/8", "ViT-B/8")
# Table 3: data set → model → top-1 accuracy after pre-training on ImageNet-21k and fine-tuning all weights
TRANSFER: dict[str, dict[str, float]] = {
    name: dict(zip(_TRANSFERRED, row, strict=True))
    for name, row in {
        "imagenet": (0.627, 0.742, 0.795, 0.718, 0.858),
        "cifar10": (0.941, 0.972, 0.981, 0.972, 0.989),
        "cifar100": (0.767, 0.841, 0.879, 0.844, 0.901),
        "flowers102": (0.822, 0.922, 0.967, 0.921, 0.995),
        "pets": (0.770, 0.864, 0.907, 0.862, 0.918),
    }.items()
}


def find(table: str, label: str) -> dict[str, float]:
    """Return the paper's numbers for a model name, ignoring case; {} if the table has no such row.

    >>> find("figure4", "crate-s/8")
    {'VOC mIoU': 23.9}
    """
    return next((row for name, row in TABLES[table].items() if name.lower() == label.lower()), {})
