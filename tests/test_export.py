"""Exported models compute the model's outputs at new batch sizes; a wrong export is not written."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from crate_fast import CRATE, cli
from crate_fast.errors import UserError
from crate_fast.eval.common.models import LoadedModel, open_model
from crate_fast.export import OUTPUTS, PortableCRATE, compare, export_model, open_exported
from crate_fast.layers import ISTA
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
    words = ["--outputs", ",".join(OUTPUTS), "--layers", "all", "--input", "uint8", "--image-size", "48"]
    words += ["--tolerance", "1e-5", "--output", str(folder)]
    assert cli.main(["export", str(tiny_run), *words]) == 0
    assert capture.read_global_capture().err == ""  # the exporter's own remarks are not shown
    return open_model(str(tiny_run), image_size=48), folder


@pytest.mark.parametrize("file", ["model.onnx", "model.pt2"])
@torch.no_grad()
def test_every_output_equals_the_models_at_new_batches(exported, file):
    loaded, folder = exported
    model, run = loaded.model, open_exported(folder / file)
    for batch in (1, 4):
        images = torch.randint(256, (batch, 3, 48, 48), dtype=torch.uint8)
        found, pixels = run(images), loaded.normalize(images)
        first, last = trace(model, pixels)
        wanted = {"logits": model(pixels), "features": model.mlp_head[0](model.forward_features(pixels)[:, 0])}
        wanted["attention"] = torch.stack([first.cls_attention(), last.cls_attention()], dim=1)
        assert found.keys() == wanted.keys()
        for name, values in wanted.items():
            torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for wrong in (images[..., :32], images.float()):  # another size, another dtype
        with pytest.raises(Exception, match=r"(?i)invalid dimensions|input data type|dtype mismatch|guard failed"):
            run(wrong)


def test_an_exported_program_loads_without_crate_fast(exported, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "crate_fast"]:
        monkeypatch.setitem(sys.modules, name, None)
    program = torch.export.load(exported[1] / "model.pt2")
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {operator.partition(".")[0] for operator in operators} == {"aten"}  # ours would still be registered


def test_a_file_describes_the_exported_model(exported, tiny_run):
    onnx = pytest.importorskip("onnx")
    _, folder = exported
    assert {path.name for path in folder.iterdir()} == {"model.json", "model.onnx", "model.pt2"}
    written = onnx.load(folder / "model.onnx")
    assert {node.domain for node in written.graph.node} <= {"", "ai.onnx"}  # no operators of crate_fast
    assert [(o.domain, o.version) for o in written.opset_import] == [("", 18)]
    facts = json.loads((folder / "model.json").read_text())
    assert (facts["model"], facts["image_size"], facts["layers"]) == (str(tiny_run), [48, 48], [0, 1])
    assert (facts["mean"], facts["std"], facts["classes"]) == ([0.5] * 3, [0.5] * 3, list(CLASSES))
    assert facts["differences"]["model.onnx"].keys() == set(OUTPUTS)


ABLATIONS = [{"attention": "mhsa", "sparsifier": "mlp", "pool": "avg"}, ALPHA_OPTIONS]
ABLATIONS += [{"threshold": "soft", "head_hidden": True, "patch_size": (2, 4), "channels": 1}]
ABLATIONS += [{"attention": "mhsa", "residual": "paper", "pool": "mean"}]
ABLATIONS += [{"sparsifier": "mlp", "embed_norm": False, "num_classes": 0, "heads": 1, "dim_head": 32}]


@pytest.mark.parametrize("options", ABLATIONS)
def test_portable_ablations_compute_the_same(options):
    model = _model(**options)
    model.set_input_size((20, 12))
    plain = PortableCRATE(model, [name for name in OUTPUTS if name != "logits" or model.num_classes], range(2))
    differences = compare(torch.no_grad()(plain), model, plain)
    assert differences.keys() == set(plain.outputs)
    assert max(differences.values()) < 1e-5


class _Halved(ISTA):
    """Step of one's own (docs/how-to/add-a-model.md)."""

    def forward(self, x):
        return super().forward(x) / 2


def test_a_step_of_ones_own_is_exported(tmp_path):
    model = _model(depth=1)
    model.transformer.layers[0][1].fn.__class__ = _Halved
    assert export_model(model, tmp_path, formats=["torch"])  # raises if the outputs differ


class _Wrong(PortableCRATE):
    """A portable model with a fault."""

    def __init__(self, *arguments, mutant):
        super().__init__(*arguments)
        if mutant == "threshold":
            self.model.transformer.layers[0][1].fn.shift *= 1.1
        if mutant == "scale":
            self.model.transformer.layers[0][0].fn.scale *= 1.02
        if mutant == "nan":
            self.model.cls_token.fill_(torch.nan)


@pytest.mark.parametrize("mutant", ["threshold", "scale", "nan"])
def test_a_wrong_model_is_not_written(mutant, monkeypatch, tmp_path):
    (tmp_path / "model.pt2").write_text("an earlier one")
    monkeypatch.setattr("crate_fast.export.PortableCRATE", partial(_Wrong, mutant=mutant))
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
        "choose from logits, features, attention": {"outputs": ["maps"]},
        "layer 3: the model has layers 0 to 1": {"layers": [3]},
        r"layers=\[\]": {"layers": []},
        "give the statistics": {"raw": True},
        "of 3 channels": {"raw": True, "statistics": ([0.5], [0.5])},
        r"tolerance=0\.0": {"tolerance": 0.0},
    }.items():
        with pytest.raises(ValueError, match=message):
            export_model(_model(), tmp_path / "new", **({"formats": ["torch"]} | options))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"the package onnxruntime: pip install -e \"\.\[export\]\""):
        export_model(_model(), tmp_path / "new", formats=["onnx"])
    assert not (tmp_path / "new").exists()


def test_the_default_output_depends_on_the_classifier_and_missing_outputs_are_errors():
    chosen = [PortableCRATE(_model(num_classes=classes)).outputs for classes in (5, 0)]
    assert chosen == [("logits",), ("features",)]
    with pytest.raises(ValueError, match="no classifier and no logits; request features"):
        PortableCRATE(_model(num_classes=0), ["logits"])
    with pytest.raises(TypeError, match="a Linear cannot be exported"):
        PortableCRATE(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"ends in \.onnx or \.pt2"):
        open_exported("model.tflite")


def test_the_command_refuses_other_models_and_layers_without_attention(tmp_path, refuses):
    words = ["export", "vit_tiny_patch16_224@untrained", "--model-args", "depth=1", "--format", "torch"]
    refuses("exports CRATE, its ablations", cli.main, [*words, "--output", str(tmp_path)])
    words = ["export", "shipped:ViT", "--layers", "1"]
    refuses("add attention to --outputs", cli.main, [*words, "--output", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
