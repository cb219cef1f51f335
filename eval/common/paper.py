"""The paper's numbers (Emergence of Segmentation with Minimalistic White-Box Transformers).

Scores are in percent. Tables 1 and 2 report different detection scores of CRATE-S/8, although the paper describes the
same setting.
"""

_MODELS = ("CRATE-S/8", "CRATE-B/8", "ViT-S/8", "ViT-B/8", "DINO-S/8", "DINO-B/8")
_TABLE1 = {  # column → number of each model
    "box AP50": (2.9, 2.9, 0.1, 0.8, 5.0, 5.1),
    "box AP75": (1.0, 1.0, 0.1, 0.2, 2.0, 2.3),
    "box AP": (1.1, 1.3, 0.0, 0.4, 2.4, 2.5),
    "mask AP50": (1.8, 2.2, 0.0, 0.7, 4.0, 4.1),
    "mask AP75": (0.7, 0.7, 0.0, 0.5, 1.3, 1.3),
    "mask AP": (0.8, 1.0, 0.0, 0.4, 1.7, 1.8),
}
_FIGURE4 = {"VOC mIoU": (23.9, 23.6, 14.1, 19.2, 27.0, 27.3)}
_TABLE2 = {
    "box AP50": (2.1, 0.2, 0.1, 0.1),
    "box AP75": (0.7, 0.2, 0.1, 0.1),
    "box AP": (0.8, 0.2, 0.0, 0.0),
    "VOC mIoU": (23.9, 22.0, 18.4, 14.1),
}
_TABLE3 = {  # top-1 after pre-training on ImageNet-21k and fine-tuning all weights
    "imagenet": (62.7, 74.2, 79.5, 71.8, 85.8),
    "cifar10": (94.1, 97.2, 98.1, 97.2, 98.9),
    "cifar100": (76.7, 84.1, 87.9, 84.4, 90.1),
    "flowers102": (82.2, 92.2, 96.7, 92.1, 99.5),
    "pets": (77.0, 86.4, 90.7, 86.2, 91.8),
}


def _by_model(columns: dict[str, tuple[float, ...]], models: tuple[str, ...]) -> dict[str, dict[str, float]]:
    rows = zip(*columns.values(), strict=True)
    return {model: dict(zip(columns, row, strict=True)) for model, row in zip(models, rows, strict=True)}


TABLES: dict[str, dict[str, dict[str, float]]] = {  # table → model → column → number
    "table1": _by_model(_TABLE1, _MODELS),
    "table2": _by_model(_TABLE2, ("CRATE", "CRATE-MLP", "CRATE-MHSA", "ViT")),
    "table3": _by_model(_TABLE3, ("CRATE-T/8", "CRATE-S/8", "CRATE-B/8", "ViT-T/8", "ViT-B/8")),
    "figure4": _by_model(_FIGURE4, _MODELS),
}


def find(table: str, label: str) -> dict[str, float]:
    """Return the paper's numbers for a model name, ignoring case; {} if the table has no such row.

    >>> find("figure4", "crate-s/8")
    {'VOC mIoU': 23.9}
    """
    return next((row for name, row in TABLES[table].items() if name.lower() == label.lower()), {})
