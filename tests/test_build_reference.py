"""The API reference has every public name and every kernel, and needs no network."""

import html
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pdoc = pytest.importorskip("pdoc")
pytest.importorskip("triton")


def test_the_reference_has_every_public_name_and_every_kernel(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    build_reference = importlib.import_module("build_reference")
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S | re.M)[1]
    assert list(build_reference.PACKAGES) == re.findall(r'"(.+?)"', listed)
    modules = build_reference.modules()
    before = {module.__name__: dict(vars(module)) for module in modules}
    files = [path for folder in ("crate_fast", "kernels", "train", "eval") for path in (ROOT / folder).rglob("*.py")]
    assert len(before) == len(modules) == len(files)
    monkeypatch.setattr(sys, "path", list(sys.path))
    plain = {"highlight": lambda doc: html.escape(doc.source)}  # syntax highlighting takes most of the time
    monkeypatch.setattr(pdoc.render.env, "filters", pdoc.render.env.filters | plain)
    assert build_reference.main([str(tmp_path)]) == 0
    for module in modules:
        assert all(vars(module).get(name) is value for name, value in before[module.__name__].items()), module
    assert (tmp_path / "index.html").is_file()
    assert "crate_fast.kernels.attention" in (tmp_path / "search.js").read_text()
    for name, content in before.items():
        page = (tmp_path / f"{name.replace('.', '/')}.html").read_text()
        anchors = set(re.findall(r'<section id="([^"]+)"', page))
        kernels = set(re.findall(r"^def (\w+_kernel)\(", Path(content["__file__"]).read_text(), re.M))
        own = [key for key, value in content.items() if callable(value) and value.__module__ == name]
        public = content.get("__all__", [key for key in own if not key.startswith("_")])
        assert anchors >= {*public, *kernels}, name
        assert not re.search(r'<(?:script|img|link)[^>]*(?:src|href)="https?:', page), f"{name} needs a network"
        assert not re.search("JITFunction|InterpretedFunction", page)
    page = (tmp_path / "crate_fast" / "kernels" / "attention.html").read_text()
    assert page.count("and their log-sum-exp (paper, Eq. 5)") >= 2  # as text, and in the kernel's source
