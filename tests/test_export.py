"""Exported models compute the model's outputs at new batches and sizes; a wrong export is not written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from crate_fast import CRATE, cli, export
from crate_fast.errors import UserError
from crate_fast.eval.common.models import LoadedModel, open_model
from crate_fast.export import OUTPUTS, PortableCRATE, choose_outputs, export_model, resampling_matrix
from crate_fast.exported import compare, open_exported
from crate_fast.model import ALPHA_OPTIONS
from crate_fast.train.data.shape_scenes import CLASSES
from crate_fast.whitebox import trace


def _model(**options) -> CRATE:
    sizes = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 32, "depth": 2, "heads": 2, "dim_head": 12}
    return CRATE(**(sizes | options)).eval()


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory, pytestconfig) -> tuple[LoadedModel, Path]:
    """A run's model, and the folder of its exports with every output of both layers."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("exported")
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")  # loggers keep the stream of their creation
    capture.read_global_capture()
    words = ["--outputs", ",".join(OUTPUTS), "--layers", "all", "--input", "uint8", "--tolerance", "1e-5"]
    assert cli.main(["export", str(tiny_run), *words, "--output", str(folder)]) == 0
    assert capture.read_global_capture().err == ""  # the exporter's own remarks are not shown
    return open_model(str(tiny_run)), folder


@pytest.mark.parametrize("file", ["model.onnx", "model.pt2"])
@torch.no_grad()
def test_every_output_equals_the_models_at_new_batches_and_sizes(exported, file):
    loaded, folder = exported
    model, run = loaded.model, open_exported(folder / file)
    for batch, height, width in ((4, 32, 32), (1, 16, 16), (2, 88, 40)):
        images = torch.randint(256, (batch, 3, height, width), dtype=torch.uint8)
        found, pixels = run(images), loaded.normalize(images)
        model.set_input_size((height, width))
        first, last = trace(model, pixels)
        wanted = {"logits": model(pixels), "features": model.mlp_head[0](model.forward_features(pixels)[:, 0])}
        wanted["attention"] = torch.stack([first.cls_attention(), last.cls_attention()], dim=1)
        wanted["subspace_tokens"] = torch.stack([first.subspace_tokens, last.subspace_tokens], dim=1)
        assert found.keys() == wanted.keys()
        for name, values in wanted.items():
            torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_an_exported_program_loads_without_crate_fast(exported, tmp_path):
    loaded, folder = exported
    images = torch.randint(256, (2, 3, 48, 24), dtype=torch.uint8)
    torch.save(images, tmp_path / "images.pt")
    code = """
import sys; sys.modules['crate_fast'] = None
import torch
facts = {'crate_fast.json': ''}
program = torch.export.load(sys.argv[1] + '/model.pt2', extra_files=facts)
assert '"patch_size": [8, 8]' in facts['crate_fast.json'], facts
torch.save(program.module()(torch.load('images.pt', weights_only=True))['logits'].detach(), 'found.pt')
"""
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=tmp_path, check=True)
    loaded.model.set_input_size((48, 24))
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    torch.testing.assert_close(found, loaded.model(loaded.normalize(images)), rtol=1e-4, atol=1e-5)


def test_exported_files_describe_themselves(exported, tiny_run):
    onnx = pytest.importorskip("onnx")
    _, folder = exported
    assert {path.name for path in folder.iterdir()} == {"model.json", "model.onnx", "model.pt2"}
    written = onnx.load(folder / "model.onnx")
    assert {node.domain for node in written.graph.node} <= {"", "ai.onnx"}  # no operators of crate_fast
    assert [(o.domain, o.version) for o in written.opset_import] == [("", 18)]
    metadata = {entry.key: entry.value for entry in written.metadata_props}
    facts = json.loads((folder / "model.json").read_text())
    assert metadata["model"] == facts["model"] == str(tiny_run)
    assert json.loads(metadata["mean"]) == facts["mean"] == facts["std"] == [0.5] * 3
    assert (facts["layers"], facts["classes"]) == ([0, 1], list(CLASSES))
    assert {(d["output"], *d["images"][2:]) for d in facts["differences"]["model.onnx"]} >= {("attention", 56, 40)}


ABLATIONS = [{"attention": "mhsa", "sparsifier": "mlp", "pool": "avg"}, ALPHA_OPTIONS]
ABLATIONS += [{"threshold": "soft", "head_hidden": True, "patch_size": (2, 4), "channels": 1}]
ABLATIONS += [{"attention": "mhsa", "residual": "paper", "pool": "mean"}]
ABLATIONS += [{"sparsifier": "mlp", "embed_norm": False, "num_classes": 0, "heads": 1, "dim_head": 32}]


@pytest.mark.parametrize("options", ABLATIONS)
def test_portable_ablations_compute_the_same(options):
    model = _model(**options)
    absent = {"subspace_tokens": "attention" in options, "logits": not model.num_classes}
    plain = PortableCRATE(model, [name for name in OUTPUTS if not absent.get(name)], range(2))
    differences = compare(torch.no_grad()(plain), model, plain)
    assert {d.output for d in differences} == set(plain.outputs)
    assert max(d.relative for d in differences) < 1e-5


def test_resampling_matrices_agree_with_pytorch():
    for old, new in [(1, 5), (4, 1), (7, 3), (14, 13), (14, 30), (28, 60), (60, 28)]:
        points = torch.randn(1, 1, old, 6, dtype=torch.float64)
        wanted = F.interpolate(points, size=(new, 6), mode="bicubic", antialias=True)
        torch.testing.assert_close(resampling_matrix(new, old, points) @ points, wanted, rtol=0, atol=1e-12)
    for side in range(1, 64):
        assert torch.equal(resampling_matrix(side, side, torch.zeros(())), torch.eye(side))


class _Wrong(PortableCRATE):
    """A portable model with a fault."""

    def __init__(self, *arguments, mutant="threshold"):
        super().__init__(*arguments)
        if mutant == "positions":
            self.pos_embedding.copy_(self.pos_embedding.flip(1))
        if mutant == "threshold":
            self.transformer.layers[0][1].fn.shift *= 1.1
        if mutant == "scale":
            self.transformer.layers[1][0].fn.scale *= 1.02
        if mutant == "nan":
            self.cls_token.fill_(torch.nan)


@pytest.mark.parametrize("mutant", ["none", "cubic", "positions", "threshold", "scale", "nan"])
def test_the_comparison_finds_a_wrong_model(mutant, monkeypatch):
    if mutant == "cubic":  # PyTorch's value without antialiasing: right only at the training size
        monkeypatch.setattr(export, "_CUBIC", -0.75)
    model = _model()
    wrong = _Wrong(model, mutant=mutant)
    within = [d.relative <= 1e-4 for d in compare(torch.no_grad()(wrong), model, wrong)]
    assert within == ([True] * 3 if mutant == "none" else [mutant == "cubic", False, False])


def test_a_wrong_model_is_not_written(monkeypatch, tmp_path):
    (tmp_path / "model.pt2").write_text("an earlier one")
    monkeypatch.setattr("crate_fast.export.PortableCRATE", _Wrong)
    model = _model(depth=1)
    model.set_input_size((20, 12))
    with pytest.raises(UserError, match=r"differs from the model's by .* Nothing was written"):
        export_model(model, tmp_path, formats=["torch"])
    assert model.image_size == (20, 12)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_text() == "an earlier one"


def test_wrong_options_and_missing_packages_are_errors_and_nothing_is_written(tmp_path, monkeypatch):
    for message, options in {
        r"formats=\['tflite'\]: choose from onnx, torch": {"formats": ["tflite"]},
        r"formats=\[\]": {"formats": []},
        "choose from logits, features, attention, subspace_tokens": {"outputs": ["maps"]},
        "layer 3: the model has layers 0 to 1": {"layers": [3]},
        r"layers=\[\]": {"layers": []},
        "give the statistics": {"raw": True},
        "of 3 channels": {"raw": True, "statistics": ([0.5], [0.5])},
        r"tolerance=0\.0": {"tolerance": 0.0},
    }.items():
        with pytest.raises(ValueError, match=message):
            export_model(_model(), tmp_path / "new", **({"formats": ["torch"]} | options))
    for opset, message in ((17, "opset=17: give one from 18 to"), (99, "opset=99")):
        pytest.importorskip("onnxruntime")
        with pytest.raises(ValueError, match=message):
            export_model(_model(), tmp_path / "new", formats=["onnx"], opset=opset)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"the package onnxruntime: pip install -e \"\.\[export\]\""):
        export_model(_model(), tmp_path / "new", formats=["onnx"])
    assert not (tmp_path / "new").exists()


def test_the_default_output_depends_on_the_classifier_and_missing_outputs_are_errors():
    chosen = [choose_outputs(_model(num_classes=classes))[0] for classes in (5, 0)]
    assert chosen == [("logits",), ("features",)]
    with pytest.raises(ValueError, match="separate query, key and value"):
        choose_outputs(_model(attention="mhsa"), ["subspace_tokens"])
    with pytest.raises(ValueError, match="no classifier and no logits; request features"):
        choose_outputs(_model(num_classes=0), ["logits"])
    with pytest.raises(TypeError, match="a Linear cannot be exported"):
        PortableCRATE(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"ends in \.onnx or \.pt2"):
        open_exported("model.tflite")


def test_the_command_refuses_other_models(tmp_path, refuses):
    words = ["export", "vit_tiny_patch16_224@untrained", "--model-args", "depth=1", "--format", "torch"]
    refuses("exports CRATE, its ablations", cli.main, [*words, "--output", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
