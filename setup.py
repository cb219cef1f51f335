"""Packaging: the top-level folders are subpackages of `crate_fast`.

Installing bare top-level names (`kernels`, `train`, `eval`) would overwrite other people's packages of those
names, so every folder is mapped to `crate_fast.<folder>`.
"""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "crate_fast/__init__.py").read_text(), re.M)[1]
EVAL = ["pycocotools", "scikit-learn", "scipy"]
DOCS = ["pdoc"]
EXPORT = ["onnx", "onnxscript", "onnxruntime"]
EXPLORE = [*EVAL, "starlette", "uvicorn"]
NOTEBOOK = ["ipykernel", "ipywidgets", "nbclient"]
SUBPACKAGES = ["kernels", "train", "eval", "eval.emergence", "eval.explore"]

setup(
    name="crate_fast",
    version=VERSION,
    description="CRATE, the white-box vision transformer: fast, complete, and open to inspection",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=["crate_fast", *(f"crate_fast.{name}" for name in SUBPACKAGES)],
    package_dir={"crate_fast.kernels": "kernels", "crate_fast.train": "train", "crate_fast.eval": "eval"},
    package_data={
        "crate_fast.train": ["recipes/*.yaml"],
        "crate_fast.eval": ["weights/*.safetensors"],
        "crate_fast.eval.explore": ["page/*"],
    },
    install_requires=[
        "torch>=2.11",
        "torchvision",
        "timm>=1.0.20",
        "einops",
        "numpy",
        "tqdm",
        "PyYAML",
        "tensorboard",
        "matplotlib",
        "safetensors",
    ],
    extras_require={
        "docs": DOCS,
        "eval": EVAL,
        "crf": [*EVAL, "pydensecrf2"],
        "explore": EXPLORE,
        "export": EXPORT,
        "hf": ["datasets"],
        "notebook": [*EVAL, *NOTEBOOK],
        "wandb": ["wandb"],
        "test": [
            *(*DOCS, *EXPLORE, *EXPORT, *NOTEBOOK, "datasets", "webdataset", "httpx", "playwright"),
            *("pytest", "pytest-benchmark", "pytest-xdist", "ruff"),
        ],
    },
    entry_points={"console_scripts": ["crate-fast = crate_fast.cli:main"]},
)
