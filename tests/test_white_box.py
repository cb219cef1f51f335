"""The white box: traces equal the layers' computation; features of CRATE and ViTs; measures by layer, the command."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from timm.layers import HybridEmbed
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, VisionTransformer
from torch import nn

from crate_fast import CRATE, CRATEMAE
from crate_fast.errors import UserError
from crate_fast.eval import white_box
from crate_fast.eval.common.features import Features, extractor_for
from crate_fast.eval.common.images import batches, open_images
from crate_fast.eval.common.models import open_model
from crate_fast.eval.white_box import trend
from crate_fast.functional import ista
from crate_fast.reference import coding_rate_reference, subspace_attention_reference
from crate_fast.whitebox import coding_rate, layer_measures, nonzero_fraction, trace, visit_layers

SMALL = {"image_size": 32, "patch_size": 8, "num_classes": 7, "dim": 48, "depth": 3, "heads": 3, "dim_head": 16}


@pytest.mark.parametrize("residual", ["released", "paper"])
def test_a_trace_reproduces_the_layer(residual):
    model, images = CRATE(**SMALL, residual=residual).double().eval(), torch.randn(2, 3, 32, 32).double()
    x = model.embed(images)
    for layer_trace, layer in zip(trace(model, images), model.transformer.layers, strict=True):
        normed, w = layer[0].norm(x), layer_trace.subspace_tokens
        torch.testing.assert_close(w.flatten(2), normed @ layer[0].fn.qkv.weight.T)
        attended = torch.einsum("bhnm,bmhd->bnhd", layer_trace.attention(), w)
        torch.testing.assert_close(attended, subspace_attention_reference(w))
        h = layer[0].fn.to_out(attended.flatten(2)) + (x if residual == "released" else normed)
        torch.testing.assert_close(layer_trace.after_mssa, h)
        torch.testing.assert_close(layer_trace.after_ista, ista(layer[1].norm(h), layer[1].fn.weight))
        x = layer_trace.after_ista
    torch.testing.assert_close(x, model.forward_features(images))


def test_cls_attention_is_eq_10():
    (layer_trace,) = trace(CRATE(**SMALL).double(), torch.randn(2, 3, 32, 32).double(), [1])
    w, maps = layer_trace.subspace_tokens, layer_trace.cls_attention(scale=1.0)
    assert maps.shape == (2, 3, 16)
    for b, k in itertools.product(range(2), range(3)):
        weights = torch.exp(w[b, 1:, k] @ w[b, 0, k])
        torch.testing.assert_close(maps[b, k], weights / weights.sum())
    full = layer_trace.attention()[:, :, 0, 1:]
    torch.testing.assert_close(layer_trace.cls_attention(), full / full.sum(-1, keepdim=True))


def test_layers_can_be_counted_from_the_end_and_hooks_are_removed():
    model, images = CRATE(**SMALL), torch.zeros(1, 3, 32, 32)
    assert [t.index for t in trace(model, images, [-1, 0])] == [0, 2]
    with pytest.raises(UserError, match="layer 3: the model has layers 0 to 2"):
        trace(model, images, [3])
    with pytest.raises(ValueError, match="images are 64×64"):  # an error during the pass
        trace(model, torch.zeros(1, 3, 64, 64))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_traced_layers_do_not_run_again_in_backward():
    """With gradient checkpointing they would run without the hooks, by other operators if there are kernels."""
    model, runs = CRATE(**SMALL), []
    model.set_grad_checkpointing()
    for layer in model.transformer.layers:
        layer.register_forward_hook(lambda *_: runs.append(1))
    trace(model, torch.randn(1, 3, 32, 32))[-1].after_ista.sum().backward()
    assert len(runs) == 3
    assert model.transformer.grad_checkpointing


def test_a_pass_of_another_thread_does_not_enter_a_trace():
    model, images, other = CRATE(**SMALL), torch.randn(2, 3, 32, 32), torch.randn(1, 3, 32, 32)
    expected, found = trace(model, images), []

    def visit(layer_trace):
        with ThreadPoolExecutor() as pool:
            pool.submit(model, other).result()
        found.append(layer_trace)

    visit_layers(model, images, visit)
    for one, wanted in zip(found, expected, strict=True):
        assert torch.equal(one.queries, wanted.queries)
        assert torch.equal(one.after_ista, wanted.after_ista)


def test_layers_that_are_compiled_alone_are_an_error():
    """Compiled code runs no hooks."""
    model, images = CRATE(**SMALL).eval(), torch.randn(2, 3, 32, 32)
    for layer in model.transformer.layers:
        layer.compile(backend="eager")
    with torch.no_grad():
        model(images)
        with pytest.raises(UserError, match="layer 0 cannot be traced, perhaps because it is compiled"):
            trace(model, images)


def test_the_rate_after_compression_uses_the_projection_of_the_model():
    """Not the weight inside, which an adapter such as LoRA changes."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight = base, base.weight

        def forward(self, x):
            return self.base(x) + x

    model, images = CRATE(**SMALL).double(), torch.randn(2, 3, 32, 32).double()
    for attention, _ in model.transformer.layers:
        attention.fn.qkv = Adapted(attention.fn.qkv)
    attention, h = model.transformer.layers[1][0], trace(model, images)[1].after_mssa
    w = attention.fn.qkv(attention.norm(h)).unflatten(-1, (3, 16))
    found = layer_measures(model, images, after_mssa=True)["coding_rate_after_mssa"][:, 1]
    torch.testing.assert_close(found, coding_rate(w))


def test_wrappers_are_removed_before_a_trace_and_an_autoencoder_is_refused():
    model, images = CRATE(**SMALL), torch.randn(1, 3, 32, 32)
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert torch.equal(trace(wrapped, images)[0].queries, trace(model, images)[0].queries)
        found, wanted = (layer_measures(m, images)["coding_rate"] for m in (wrapped, model))
        assert torch.equal(found, wanted)
    with pytest.raises(UserError, match=r"CRATEMAE cannot be traced: pass .* the encoder\(\) of a CRATE-MAE"):
        trace(CRATEMAE(embed_dim=8, depth=1, num_heads=2, img_size=16, patch_size=8), torch.zeros(1, 3, 16, 16))


SIZES = SMALL | {"dim": 32, "heads": 2}


def _vit(**more) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 3}
    return VisionTransformer(**(sizes | more))


def test_features_of_crate_are_those_of_its_trace():
    model, images = CRATE(**SIZES).eval(), torch.randn(2, 3, 32, 32)
    extract, (layer,) = extractor_for(model), trace(model, images, [1])
    assert (extract.depth, extract.heads, extract.default_layer, extract.grid) == (3, 2, 1, (4, 4))
    features = extract(images, [0, 1])
    assert torch.equal(features.keys(1), layer.subspace_tokens[:, 1:].flatten(2))
    assert torch.equal(features.cls_attention(1), layer.cls_attention())


def test_features_of_ordinary_attention_are_its_queries_and_keys():
    model, images = CRATE(**SIZES, attention="mhsa", sparsifier="mlp").eval(), torch.randn(2, 3, 32, 32)
    features = extractor_for(model)(images)  # of the last layer, as for a ViT
    with torch.no_grad():
        tokens = model.embed(images)
        for layer in model.transformer.layers[:2]:
            tokens = layer(tokens)
        attention = model.transformer.layers[2][0]
        query, key, _ = attention.fn.qkv(attention.norm(tokens)).unflatten(-1, (3, 2, 16)).unbind(dim=2)
    torch.testing.assert_close(features.keys(2), key[:, 1:].flatten(2))
    by_hand = (torch.einsum("bhd,bnhd->bhn", query[:, 0], key[:, 1:]) / 4.0).softmax(dim=-1)
    torch.testing.assert_close(features.cls_attention(2), by_hand)


@pytest.mark.parametrize("more", [{"qk_norm": True}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}])
def test_features_of_timms_vits_are_their_queries_and_keys(more):
    model, images = _vit(**more).eval(), torch.randn(2, 3, 32, 32)
    features, block, seen = extractor_for(model)(images), model.blocks[2], {}  # of the last layer
    block.norm1.register_forward_hook(lambda _m, _i, out: seen.setdefault("x", out))
    with torch.no_grad():
        model(images)
        qkv = block.attn.qkv(seen["x"]).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        query, key = block.attn.q_norm(qkv[0]), block.attn.k_norm(qkv[1])
    prefix = 1 + more.get("reg_tokens", 0) if more.get("class_token", True) else 0
    torch.testing.assert_close(features.keys(2), key[:, :, prefix:].transpose(1, 2).flatten(2))
    assert features.keys(2).shape == (2, 16, 32)
    if prefix:
        by_hand = (query[:, :, :1] @ key[:, :, prefix:].mT / 4.0).softmax(dim=-1)[:, :, 0]
        torch.testing.assert_close(features.cls_attention(2), by_hand)
    else:
        with pytest.raises(ValueError, match="no CLS token"):
            features.cls_attention(2)


HYBRID = _vit(patch_size=4, embed_layer=partial(HybridEmbed, backbone=nn.Conv2d(3, 4, 2, 2)))  # patches of 8 pixels


@pytest.mark.parametrize("model", [CRATE(**SIZES), _vit(), HYBRID])
def test_the_image_size_can_be_changed(model):
    extract = extractor_for(model)
    assert (extract.patch_size, extract.channels) == ((8, 8), 3)
    extract.set_image_size(48)
    features = extract(torch.randn(1, 3, 48, 48))
    assert (features.grid, features.keys(extract.default_layer).shape) == ((6, 6), (1, 36, 32))
    with pytest.raises(ValueError, match="image size 50 is not a multiple.*--image-size 48"):
        extract.set_image_size(50)
    with pytest.raises(UserError, match="layer 3: this model has layers 0 to 2"):
        extract(torch.randn(1, 3, 48, 48), [3])
    assert extract.resolve_layer(-1) == 2


def test_other_models_and_missing_layers_are_errors():
    others = _vit(block_fn=ParallelThingsBlock), _vit(block_fn=ParallelScalingBlock), _vit()
    others[-1].blocks[0].attn = nn.Identity()  # another kind of attention
    for model in (nn.Linear(2, 2), *others, VisionTransformer(depth=0)):
        with pytest.raises(UserError, match=f"no patch features can be read from this {type(model).__name__}"):
            extractor_for(model)
    with pytest.raises(UserError, match="layer 2 was not extracted"):
        Features((2, 2), {}).keys(2)


def test_coding_rate_equals_the_n_by_n_form():
    w = torch.randn(2, 17, 3, 16, dtype=torch.float64)
    for epsilon in (0.01, 0.5):
        torch.testing.assert_close(coding_rate(w, epsilon), coding_rate_reference(w, epsilon), rtol=1e-10, atol=0)
    torch.testing.assert_close(coding_rate(w.float()).double(), coding_rate(w), rtol=1e-4, atol=0)
    assert coding_rate(w.bfloat16()).dtype == torch.float32


def test_measures_under_autocast_stay_near_fp32():
    model, images = CRATE(**SMALL), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer_measures(model, images)["coding_rate"]
    torch.testing.assert_close(low, layer_measures(model, images)["coding_rate"], rtol=0.05, atol=0)


def test_bad_arguments_of_the_coding_rate_are_errors():
    with pytest.raises(ValueError, match="epsilon=0"):
        coding_rate(torch.randn(1, 4, 2, 3), epsilon=0)
    with pytest.raises(ValueError, match=r"shape \(4, 3\)"):
        coding_rate(torch.randn(4, 3))
    (mhsa,) = trace(CRATE(**SMALL, attention="mhsa"), torch.randn(1, 3, 32, 32), [0])
    with pytest.raises(ValueError, match="no subspaces"):
        mhsa.coding_rate()


MODEL = "crate_tiny_patch8_224@untrained"
WORDS = ["depth=3", "dim=32", "heads=2", "img_size=32"]


@torch.no_grad()
def test_measures_equal_those_of_the_traces():
    model, images = open_model(MODEL, model_args=WORDS).model, torch.randn(4, 3, 32, 32)
    measured = layer_measures(model, images, after_mssa=True)
    for layer, layer_trace in enumerate(trace(model, images)):
        torch.testing.assert_close(measured["coding_rate"][:, layer], layer_trace.coding_rate())
        torch.testing.assert_close(measured["sparsity"][:, layer], nonzero_fraction(layer_trace.after_ista))
        attention = model.transformer.layers[layer][0]
        after = attention.fn.qkv(attention.norm(layer_trace.after_mssa)).unflatten(-1, (2, 16))
        torch.testing.assert_close(measured["coding_rate_after_mssa"][:, layer], coding_rate(after))
    assert ((measured["sparsity"] > 0) & (measured["sparsity"] < 1)).all()


def test_measures_do_not_depend_on_the_batch_size():
    loaded, images = open_model(MODEL, image_size=32, model_args=WORDS), open_images("shape_scenes", 32, 7)
    whole, parts = (white_box.evaluate(loaded, batches(images, size, [])) for size in (7, 2))
    assert whole["images"] == parts["images"] == 7
    for a, b in zip(whole["layers"], parts["layers"], strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_trends_by_hand():
    expected = {"first": 3.0, "last": 1.0, "steps_down": 2, "steps": 2, "spearman": -1.0, "falls": "yes"}
    assert trend([3.0, 2.0, 1.0]) == expected
    assert [trend(values)["falls"] for values in ([1.0, 2.0], [3.0, 1.0, 2.0], [2.0])] == ["no", "in part", "no"]
    assert trend([2.0, 2.0])["spearman"] is None


def test_the_command_compares_trained_and_untrained_models(tiny_run, tmp_path):
    models = [str(tiny_run), f"untrained={tiny_run}@untrained", f"mlp={MODEL}", "vit=vit_tiny_patch16_224@untrained"]
    words = ["--model-args", "img_size=32", "depth=2", "--limit", "6", "--output", str(tmp_path)]
    assert white_box.main([*models, *words]) == 0
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert (results["tiny"]["images"], [row["layer"] for row in results["tiny"]["layers"]]) == (6, [0, 1])
    assert results["tiny"]["layers"] != results["untrained"]["layers"]
    assert results["vit"]["left_out"].keys() == {"coding_rate", "coding_rate_after_mssa", "sparsity"}
    assert "no subspaces" in (tmp_path / "trends.md").read_text()
    assert (tmp_path / "white_box.png").stat().st_size > 1000


@pytest.mark.parametrize(("ablation", "missing"), [("attention=mhsa", "coding_rate"), ("sparsifier=mlp", "sparsity")])
def test_measures_that_an_ablation_does_not_have_are_left_out(ablation, missing):
    loaded = open_model(MODEL, image_size=32, model_args=[*WORDS, ablation])
    found = white_box.evaluate(loaded, batches(open_images("shape_scenes", 32, 2), 2, []))
    assert missing in found["left_out"]
    assert missing not in found["layers"][0]
    assert len(found["trends"]) == 3 - len(found["left_out"])
