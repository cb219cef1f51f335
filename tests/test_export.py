"""Exported models compute the model's outputs at new batches and sizes; a wrong export is not written."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm import create_model

from crate_fast import CRATE, CRATEMAE, cli, export
from crate_fast.errors import UserError
from crate_fast.eval.common.models import LoadedModel, open_model
from crate_fast.export import OUTPUTS, PortableCRATE, choose_outputs, export_model, resampling_matrix
from crate_fast.exported import compare, open_exported
from crate_fast.model import ALPHA_OPTIONS
from crate_fast.train.data.shape_scenes import CLASSES
from crate_fast.whitebox import trace

SIZES = [(4, 32, 32), (1, 16, 16), (2, 88, 40)]
SMALL = ["--model-args", "depth=2", "dim=32", "heads=2", "img_size=32"]


def _model(**options) -> CRATE:
    sizes = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 32, "depth": 2, "heads": 2, "dim_head": 12}
    return CRATE(**(sizes | options)).eval()


def _largest_difference(model: CRATE, plain: PortableCRATE) -> float:
    differences = compare(torch.no_grad()(plain), model, plain)
    assert {d.output for d in differences} == set(plain.outputs)
    return max(d.relative for d in differences)


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory, pytestconfig) -> tuple[LoadedModel, Path, str]:
    """A run's model, the folder of its exports with every output of both layers, and the command's printed text."""
    pytest.importorskip("onnxruntime")
    folder, out = tmp_path_factory.mktemp("exported"), io.StringIO()
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")  # loggers keep the stream of their creation
    capture.read_global_capture()
    words = ["--outputs", ",".join(OUTPUTS), "--layers", "all", "--input", "uint8", "--tolerance", "1e-5"]
    with contextlib.redirect_stdout(out):
        assert cli.main(["export", str(tiny_run), *words, "--output", str(folder)]) == 0
    assert capture.read_global_capture().err == ""  # the exporter's own remarks are not shown
    return open_model(str(tiny_run)), folder, out.getvalue()


@pytest.mark.parametrize("file", ["model.onnx", "model.pt2"])
@torch.no_grad()
def test_every_output_equals_the_models_at_new_batches_and_sizes(exported, file):
    loaded, folder, _ = exported
    model, run = loaded.model, open_exported(folder / file)
    for shape in SIZES:
        images = torch.randint(256, (shape[0], 3, *shape[1:]), dtype=torch.uint8)
        found, pixels = run(images), loaded.normalize(images)
        model.set_input_size(shape[1:])
        first, last = trace(model, pixels)
        wanted = {"logits": model(pixels), "features": model.mlp_head[0](model.forward_features(pixels)[:, 0])}
        wanted["attention"] = torch.stack([first.cls_attention(), last.cls_attention()], dim=1)
        wanted["subspace_tokens"] = torch.stack([first.subspace_tokens, last.subspace_tokens], dim=1)
        assert found.keys() == wanted.keys()
        for name, values in wanted.items():
            torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_an_exported_program_loads_without_crate_fast(exported, tmp_path):
    loaded, folder, _ = exported
    images = torch.randint(256, (2, 3, 48, 24), dtype=torch.uint8)
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys; sys.modules['crate_fast'] = None\n"
        "import torch\n"
        "facts = {'crate_fast.json': ''}\n"
        "program = torch.export.load(sys.argv[1] + '/model.pt2', extra_files=facts)\n"
        "assert '\"patch_size\": [8, 8]' in facts['crate_fast.json'], facts\n"
        "torch.save(program.module()(torch.load('images.pt', weights_only=True))['logits'].detach(), 'found.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=tmp_path, check=True)
    loaded.model.set_input_size((48, 24))
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    torch.testing.assert_close(found, loaded.model(loaded.normalize(images)), rtol=1e-4, atol=1e-5)


def test_exported_files_describe_themselves(exported, tiny_run):
    onnx = pytest.importorskip("onnx")
    _, folder, printed = exported
    assert "model.onnx  attention, images 1×3×32×32: largest difference" in printed
    assert {path.name for path in folder.iterdir()} == {"model.json", "model.onnx", "model.pt2"}
    written = onnx.load(folder / "model.onnx")
    assert {node.domain for node in written.graph.node} <= {"", "ai.onnx"}  # no operators of crate_fast
    assert [(o.domain, o.version) for o in written.opset_import] == [("", 18)]
    metadata = {entry.key: entry.value for entry in written.metadata_props}
    facts = json.loads((folder / "model.json").read_text())
    assert metadata["model"] == facts["model"] == str(tiny_run)
    assert json.loads(metadata["mean"]) == facts["mean"] == facts["std"] == [0.5] * 3
    assert facts["layers"] == [0, 1]
    assert facts["classes"] == list(CLASSES)
    assert {(d["output"], *d["images"][2:]) for d in facts["differences"]["model.onnx"]} >= {("attention", 56, 40)}


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "mhsa", "sparsifier": "mlp", "pool": "avg"},
        {"attention": "mhsa", "residual": "paper", "pool": "mean"},
        {"threshold": "soft", "head_hidden": True, "patch_size": (2, 4), "channels": 1},
        {"sparsifier": "mlp", "embed_norm": False, "num_classes": 0, "heads": 1, "dim_head": 32},
        ALPHA_OPTIONS,
    ],
)
def test_portable_ablations_compute_the_same(options):
    model = _model(**options)
    outputs = [name for name in OUTPUTS if name != "subspace_tokens" or "attention" not in options]
    outputs = [name for name in outputs if name != "logits" or model.num_classes]
    assert _largest_difference(model, PortableCRATE(model, outputs, range(2))) < 1e-5


def test_portable_models_of_timm_and_encoders_of_autoencoders_compute_the_same():
    sizes = {"img_size": 32, "depth": 2, "dim": 32, "heads": 2}
    mae = CRATEMAE(**sizes, patch_size=8, decoder_depth=1, decoder_num_heads=2)
    for model in (create_model("crate_small_patch8_224", **sizes, num_classes=3), mae.encoder()):
        plain = PortableCRATE(model)
        assert plain.outputs == (("logits",) if model.num_classes else ("features",))
        assert _largest_difference(model, plain) < 1e-5


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
            self.pos_embedding = torch.nn.Parameter(self.pos_embedding.flip(1), requires_grad=False)
        if mutant == "threshold":
            self.transformer.layers[0][1].fn.shift *= 1.1
        if mutant == "scale":
            self.transformer.layers[1][0].fn.scale *= 1.02
        if mutant == "nan":
            self.cls_token = torch.nn.Parameter(self.cls_token * float("nan"), requires_grad=False)


@pytest.mark.parametrize("mutant", ["none", "cubic", "positions", "threshold", "scale", "nan"])
def test_the_comparison_finds_a_wrong_model(mutant, monkeypatch):
    if mutant == "cubic":  # PyTorch's value without antialiasing: right only at the training size
        monkeypatch.setattr(export, "_CUBIC", -0.75)
    model = _model(depth=2)
    wrong = _Wrong(model, mutant=mutant)
    differences = compare(torch.no_grad()(wrong), model, wrong)
    within = [d.relative <= 1e-4 for d in differences]
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


def test_exported_files_refuse_sizes_that_are_not_multiples_of_the_patch(exported):
    _, folder, _ = exported
    images = torch.zeros(1, 3, 32, 36, dtype=torch.uint8)
    with pytest.raises(AssertionError, match="Guard failed"):
        open_exported(folder / "model.pt2")(images)
    with pytest.raises(Exception, match="running Reshape"):  # onnxruntime's own kind
        open_exported(folder / "model.onnx")(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ["tflite"]}, r"formats=\['tflite'\]: choose from onnx, torch"),
        ({"formats": []}, r"formats=\[\]"),
        ({"outputs": ["maps"]}, "choose from logits, features, attention, subspace_tokens"),
        ({"layers": [3]}, "layer 3: the model has layers 0 to 1"),
        ({"layers": []}, r"layers=\[\]"),
        ({"raw": True}, "give the statistics"),
        ({"raw": True, "statistics": ([0.5], [0.5])}, "of 3 channels"),
        ({"tolerance": 0.0}, r"tolerance=0\.0"),
        ({"opset": 17}, "opset=17: give one from 18 to"),
        ({"opset": 99}, "opset=99"),
    ],
)
def test_wrong_options_are_errors_and_nothing_is_written(options, message, tmp_path):
    if "opset" in options:
        pytest.importorskip("onnxruntime")
    formats = ["onnx"] if "opset" in options else ["torch"]
    with pytest.raises(ValueError, match=message):
        export_model(_model(), tmp_path / "new", **({"formats": formats} | options))
    assert not (tmp_path / "new").exists()


def test_outputs_that_a_model_does_not_have_are_errors():
    with pytest.raises(ValueError, match="separate query, key and value"):
        choose_outputs(_model(attention="mhsa"), ["subspace_tokens"])
    with pytest.raises(ValueError, match="no classifier and no logits; request features"):
        choose_outputs(_model(num_classes=0), ["logits"])
    with pytest.raises(TypeError, match="a Linear cannot be exported"):
        PortableCRATE(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"ends in \.onnx or \.pt2"):
        open_exported("model.tflite")


def test_a_missing_package_is_an_error_before_the_export(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"the package onnxruntime: pip install -e \"\.\[export\]\""):
        export_model(_model(), tmp_path / "new", formats=["onnx"])
    assert not (tmp_path / "new").exists()


def test_the_command_refuses_other_models(tmp_path, refuses):
    words = ["export", "vit_tiny_patch16_224@untrained", "--model-args", "depth=1", "--format", "torch"]
    refuses("exports CRATE, its ablations", cli.main, [*words, "--output", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
