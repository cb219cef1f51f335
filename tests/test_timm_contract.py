"""timm's model contract for every registered name, beside timm's VisionTransformer; argument names; drop rates."""

import math
import re

import numpy as np
import pytest
import timm
import torch
from oracle import model_gradients
from timm.layers import DropPath
from timm.models import group_parameters, save_for_hf
from timm.models.vision_transformer import Block, VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn

from crate_fast import CRATE, CRATE_tiny, load_pretrained
from crate_fast.errors import UserError
from crate_fast.layers import ISTA, MSSA, Layer, PreNorm
from crate_fast.train.config import DROP_RATES, TrainConfig
from crate_fast.train.runs import build_model

# with the sizes of `_pair`, every other name builds one of these or differs only in the patch
KINDS = ["crate_tiny_patch16_224", "crate_mae_encoder_tiny_patch16_224", "crate_alpha_base_patch14_224"]
SMALL = {"patch_size": 8, "num_classes": 7, "embed_dim": 48, "depth": 3, "num_heads": 3}


def _pair(name: str = "crate_tiny_patch16_224", **options) -> tuple[CRATE, VisionTransformer, torch.Tensor]:
    """Return a registered model and a ViT of two layers and width 48, and images of four patches."""
    small = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 2 * int(name.split("patch")[1].split("_")[0])}
    ours = timm.create_model(name, **small, **options)
    theirs = VisionTransformer(**small, patch_size=ours.patch_size, **options)
    return ours.eval(), theirs.eval(), torch.randn(2, 3, *ours.image_size)


@pytest.mark.parametrize("name", timm.list_models("crate_*"))
def test_models_take_the_arguments_of_timms_training_script_and_fit_their_default_cfg(name):
    words = {"in_chans": 3, "drop_rate": 0.1, "drop_path_rate": 0.2, "drop_block_rate": None, "pretrained": False}
    words |= {"global_pool": None, "bn_momentum": None, "bn_eps": None, "scriptable": False, "checkpoint_path": ""}
    with torch.device("meta"):
        model = timm.create_model(name, depth=3, **words)
    assert model.head_drop.p == 0.1
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == [0.1, 0.1, 0.2, 0.2]  # none in the first layer
    cfg, state = model.default_cfg, model.state_dict()
    assert cfg["input_size"] == (3, *model.image_size) == (model.in_chans, 224, 224)
    maps = model.forward_intermediates(torch.zeros(1, *cfg["input_size"], device="meta"), 1, intermediates_only=True)
    assert maps[0].shape[2:] == cfg["pool_size"] == model.grid_size
    assert f"{cfg['first_conv']}.weight" in state
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert model.get_classifier().out_features == model.num_classes == cfg["num_classes"]
    assert [model.get_submodule(info["module"]) for info in model.feature_info] == list(model.transformer.layers)
    for info in model.feature_info:
        assert (info["num_chs"], info["reduction"]) == (model.num_features, model.patch_size[0])


@pytest.mark.parametrize("pool", ["token", "avg", ""])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_outputs_and_resets_have_the_shapes_of_a_vit(name, pool):
    ours, theirs, images = _pair(name, num_classes=42, global_pool=pool)
    assert ours.global_pool == theirs.global_pool
    sizes = ("num_features", "head_hidden_size", "embed_dim", "num_classes", "in_chans", "num_prefix_tokens")
    assert [getattr(ours, name) for name in sizes] == [getattr(theirs, name) for name in sizes]
    for reset in (None, (0,), (0, ""), (5, "avg"), (5, "token"), (0, None), (3, "")):
        if reset is not None:
            ours.reset_classifier(*reset)
            theirs.reset_classifier(*reset)
        tokens = ours.forward_features(images)
        assert tokens.shape == theirs.forward_features(images).shape
        logits, features = ours(images), ours.forward_head(tokens, pre_logits=True)
        assert logits.shape == theirs(images).shape, reset
        assert features.shape == theirs.forward_head(tokens, pre_logits=True).shape, reset
        assert isinstance(theirs.get_classifier(), nn.Linear) == isinstance(ours.get_classifier(), nn.Linear)
        torch.testing.assert_close(ours.get_classifier()(features), logits)
        assert (ours.num_classes, ours.global_pool) == (theirs.num_classes, theirs.global_pool)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_feature_maps_have_the_shapes_of_a_vit(name):
    ours, theirs, images = _pair(name, num_classes=0)
    words = {"features_only": True, "out_indices": (0, 1), "embed_dim": 48, "num_heads": 3, "depth": 2}
    wrapped = timm.create_model(name, img_size=ours.image_size, **words)
    maps = wrapped(images)
    assert [m.shape for m in maps] == [m.shape for m in theirs.forward_intermediates(images)[1]]
    assert wrapped.feature_info.channels() == [m.shape[1] for m in maps]
    assert wrapped.feature_info.reduction() == [ours.image_size[0] // m.shape[2] for m in maps]
    for options in ({}, {"return_prefix_tokens": True}, {"intermediates_only": True, "output_fmt": "NLC"}):
        found = ours.forward_intermediates(images, output_dict=True, norm=True, **options)
        wanted = theirs.forward_intermediates(images, output_dict=True, norm=True, **options)
        assert found.keys() == wanted.keys()
        for key, values in wanted.items():
            assert [v.shape for v in found[key]] == [v.shape for v in values]
    for indices in ([1, 0], [-1, 0, 0], [1]):
        found = ours.forward_intermediates(images, indices, intermediates_only=True)
        assert len(found) == len(theirs.forward_intermediates(images, indices, intermediates_only=True))
        in_order = ours.forward_intermediates(images, sorted({i % 2 for i in indices}), intermediates_only=True)
        torch.testing.assert_close(found, in_order)
    for model in (ours, theirs):
        assert model.prune_intermediate_layers([0], prune_norm=True) == [0]
    assert ours(images).shape == theirs(images).shape
    assert ours.transformer.depth == 1


def test_parameter_groups_have_the_scales_of_a_vit_and_weight_decay_for_matrices_only():
    ours, theirs, _ = _pair(num_classes=5)
    names = {parameter: name for name, parameter in ours.named_parameters()}
    assert set(group_parameters(ours, ours.group_matcher(), reverse=True)) == set(names.values())
    groups, others = (param_groups_layer_decay(m, 0.05, m.no_weight_decay(), layer_decay=0.5) for m in (ours, theirs))
    assert {group["lr_scale"] for group in groups} == {group["lr_scale"] for group in others}
    decayed = {names[p] for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    assert decayed == {names[p] for p in names if p.ndim == 2}


@pytest.mark.parametrize("head_hidden", [False, True])
@torch.no_grad()
def test_pools_read_their_tokens_and_resets_keep_the_hidden_layer(head_hidden):
    model = CRATE(**SMALL, img_size=32, head_hidden=head_hidden).eval()
    tokens, before = torch.randn(2, 17, 48), model.mlp_head[:-1]
    read = {"token": tokens[:, 0], "mean": tokens.mean(1), "avg": tokens[:, 1:].mean(1), "": tokens}
    for pool, value in (read | {"cls": tokens[:, 0]}).items():
        for classes in (7, 0):
            model.reset_classifier(classes, pool)
            assert [*model.mlp_head[:-1]] == [*before]
            torch.testing.assert_close(model.forward_head(tokens), model.mlp_head(value))
            torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), before(value))
    with pytest.raises(UserError, match="pool='max': choose one of 'cls', 'mean', 'avg', ''"):
        model.reset_classifier(7, "max")
    assert model.pool == "cls"


@pytest.mark.parametrize("head_hidden", [False, True])
def test_a_file_of_other_classes_loads_through_timm_without_its_classifier(head_hidden, tmp_path):
    sizes = {"depth": 1, "img_size": 32, "head_hidden": head_hidden}
    source = timm.create_model("crate_tiny_patch8_224", **sizes)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    here = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}}
    model = timm.create_model("crate_tiny_patch8_224", **sizes, **here, num_classes=5)
    classifier = model.default_cfg["classifier"]
    assert model.get_submodule(classifier) is model.get_classifier()
    assert model.get_classifier().out_features == 5
    loaded, original = model.state_dict(), source.state_dict()
    for key in loaded:
        assert key.startswith(classifier) or torch.equal(loaded[key], original[key]), key
    with pytest.raises(UserError, match="patches of 192 values and the model has 64: .* in_chans"):
        timm.create_model("crate_tiny_patch8_224", **sizes, **here, in_chans=1)


def _shapes(model: nn.Module) -> dict:
    return {name: value.shape for name, value in model.state_dict().items()}


def test_our_names_and_timms_names_build_the_same_models():
    ours = {"image_size": 32, "channels": 1, "dim": 48, "heads": 3}
    timms = {"img_size": 32, "in_chans": 1, "embed_dim": 48, "num_heads": 3}
    rest = {"patch_size": 8, "depth": 2}
    one = CRATE(**ours, **rest, num_classes=7, dim_head=16)
    other = CRATE(**timms, **rest, num_classes=7, dim_head=16, global_pool="mean", pos_drop_rate=0.1)
    assert (_shapes(other), other.pool, other.dropout.p) == (_shapes(one), "mean", 0.1)
    for names in (ours, timms):
        assert _shapes(timm.create_model("crate_tiny_patch16_224", **names, **rest, num_classes=7)) == _shapes(one)
        assert _shapes(CRATE_tiny(7, **names, **rest)) == _shapes(one)
    same = {"image_size": (32, 32), "img_size": np.int64(32), "pool": "cls", "global_pool": "token", "heads": None}
    equal = CRATE(**SMALL, **same)
    assert (equal.image_size, equal.pool, equal.transformer.heads) == ((32, 32), "cls", 3)


def test_timm_loads_what_it_saved_for_the_hub(tmp_path):
    """timm adds its own names to the arguments of the model, and positions of 1×4 patches are no square of 2×2."""
    arguments = SMALL | {"image_size": (8, 32), "channels": 1, "pool": "mean"}
    source = timm.create_model("crate_tiny_patch8_224", **arguments).eval()
    save_for_hf(source, tmp_path, model_args=arguments, safe_serialization=True)
    images = torch.randn(2, 1, 8, 32)
    for model in (timm.create_model(f"local-dir:{tmp_path}", pretrained=True), load_pretrained(tmp_path)):
        torch.testing.assert_close(model.eval()(images), source(images))


def test_two_values_of_one_argument_are_an_error():
    builders = [CRATE, CRATE_tiny, lambda **words: timm.create_model("crate_tiny_patch16_224", **words)]
    for (name, value), (other, different) in (
        (("image_size", 32), ("img_size", 64)),
        (("image_size", (32, 64)), ("img_size", 32)),
        (("dim", 48), ("embed_dim", 96)),
        (("pool", "mean"), ("global_pool", "avg")),
    ):
        found = re.escape(f"{name}={value!r}"), re.escape(f"{other}={different!r}")
        for build in builders:
            words = {"img_size": 32} | SMALL
            with pytest.raises(UserError, match="{0} and {1}|{1} and {0}".format(*found)):
                build(**(words | {other: different}), **{name: value})


def _zeros(values: torch.Tensor) -> float:
    return (values == 0).float().mean().item()


def test_drop_rate_acts_before_the_classifier_as_in_a_vit():
    ours, theirs, images = _pair(num_classes=5, drop_rate=0.4)
    for model in (ours.train(), theirs.train()):
        with torch.no_grad():
            assert torch.equal(model.forward_features(images), model.forward_features(images))
            tokens = torch.randn(64, 5, 48)
            features = model.forward_head(tokens, pre_logits=True)
            assert _zeros(features) == pytest.approx(0.4, abs=0.05)
            kept = features != 0
            whole = model.eval().forward_head(tokens, pre_logits=True)
            torch.testing.assert_close(features[kept], whole[kept] / 0.6)
            assert torch.equal(model(images), model(images))


def test_released_dropout_keeps_its_meaning():
    model = CRATE(**SMALL, img_size=32, sparsifier="mlp", dropout=0.1, emb_dropout=0.2)
    attention, mlp = (step.fn for step in model.transformer.layers[0])
    assert (attention.dropout_p, attention.to_out[1].p, mlp[2].p, mlp[4].p) == (0.1, 0.1, 0.1, 0.1)
    assert (model.dropout.p, model.head_drop.p) == (0.2, 0.0)


def test_a_layer_with_dropout_equals_a_vits_block_for_the_same_draws():
    rates = {"proj_drop": 0.2, "drop_path": 0.5}
    block = Block(48, 3, qkv_bias=True, **rates).double()
    options = {"attention": "mhsa", "sparsifier": "mlp", "proj_drop_rate": 0.2, "drop_path_rate": 0.5}
    ours = CRATE(**SMALL, img_size=32, dim_head=16, **options).double().transformer.layers[-1]
    parts = {"norm1": ours[0].norm, "attn.qkv": ours[0].fn.qkv, "attn.proj": ours[0].fn.to_out[0]}
    parts |= {"norm2": ours[1].norm, "mlp.fc1": ours[1].fn[0], "mlp.fc2": ours[1].fn[3]}
    for name, part in parts.items():
        part.load_state_dict(block.get_submodule(name).state_dict())
    for norm in (block.norm1, block.norm2):
        norm.eps = ours[0].norm.eps
    x = torch.randn(16, 5, 48, dtype=torch.float64)
    torch.manual_seed(5)
    expected = block(x)
    torch.manual_seed(5)
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("residual", ["released", "paper"])
def test_a_dropped_step_keeps_the_tokens_of_a_sample(residual):
    layer = Layer(PreNorm(48, MSSA(48, 3, 16), 0.5), PreNorm(48, ISTA(48), 0.5), residual).double()
    x = torch.randn(32, 5, 48, dtype=torch.float64)
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    first, second = (DropPath(0.5)(torch.ones_like(x[:, :1, :1])) for _ in range(2))  # 0, or 1 / (1 − rate)
    attention, sparsify = layer
    if residual == "released":
        h = x + first * attention(x)
    else:
        h = x.where(first == 0, attention.norm(x) + attention.fn(attention.norm(x)))
    expected = h.where(second == 0, sparsify(h))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    neither = (first + second == 0).flatten()
    assert 0 < neither.sum() < 32
    assert torch.equal(found[neither], x[neither])
    assert (found[(second > 0).flatten()] == 0).any()  # ISTA's zeros stay
    plain = Layer(PreNorm(48, MSSA(48, 3, 16)), PreNorm(48, ISTA(48)), residual).double()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), plain.train()(x))


VARIANTS = [{"residual": "paper", "threshold": "soft"}, {"attention": "mhsa", "sparsifier": "mlp", "dropout": 0.2}]


@pytest.mark.parametrize("options", VARIANTS)
def test_stochastic_depth_has_the_same_gradients_with_checkpointing_and_compiles(options):
    model = CRATE(**(SMALL | {"depth": 2}), img_size=32, drop_path_rate=0.5, **options)
    images, gradients = torch.randn(4, 3, 32, 32), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(2)
        gradients.append(model_gradients(model, images))
    torch.testing.assert_close(gradients[0], gradients[1])
    model.set_grad_checkpointing(False)
    torch.manual_seed(2)
    logits = torch.compile(model, fullgraph=True, backend="eager")(images)
    torch.testing.assert_close(logits.detach(), gradients[0]["output"])


def test_proj_drop_rate_acts_without_an_output_map():
    fn = MSSA(48, 1, 48, proj_dropout=0.5)
    assert _zeros(fn(torch.randn(4, 17, 48))) == pytest.approx(0.5, abs=0.05)
    assert _zeros(fn.eval()(torch.randn(4, 17, 48))) == 0


def test_bad_rates_are_errors():
    bad = {"drop_rate": 1.0, "drop_path_rate": -0.1, "attn_drop_rate": math.nan, "proj_drop_rate": "0.1"}
    for name, rate in (bad | {"emb_dropout": 2}).items():
        with pytest.raises(UserError, match=f"{name}={rate!r}: give a probability"):
            CRATE(**SMALL, img_size=32, **{name: rate})
    for name, rate in (("attn_drop_rate", 0.2), ("proj_drop_rate", 0.0)):
        with pytest.raises(UserError, match=f"dropout=0.1 and {name}={rate}"):
            CRATE(**SMALL, img_size=32, dropout=0.1, **{name: rate})


@pytest.mark.parametrize(
    "model", ["crate_tiny_patch8_224", "crate_mae_encoder_tiny_patch16_224", "vit_tiny_patch16_224"]
)
def test_the_settings_of_training_have_the_same_effect_on_crate_and_vit(model):
    rates = dict(zip(DROP_RATES, (0.1, 0.2, 0.3, 0.4, 0.5), strict=True))
    built = build_model(TrainConfig(model=model, image_size=32, dim=48, depth=3, heads=3, **rates), 7)
    if isinstance(built, CRATE):
        first, *_, last = (step for step, _ in built.transformer.layers)
        found = first.fn.dropout_p, first.fn.to_out[1].p, built.dropout.p, last.drop_path.drop_prob
    else:
        first, *_, last = built.blocks
        found = first.attn.attn_drop.p, first.attn.proj_drop.p, built.pos_drop.p, last.drop_path1.drop_prob
    assert (built.embed_dim, built.num_classes, built.head_drop.p, *found) == (48, 7, 0.1, 0.2, 0.3, 0.4, 0.5)
    alone = build_model(TrainConfig(model=model, image_size=32, dim=48, depth=3, heads=3, attn_drop_rate=0.2), 7)
    rates = [module.p for module in alone.modules() if isinstance(module, torch.nn.Dropout) and module.p]
    assert rates == ([] if isinstance(built, CRATE) else [0.2] * 3)  # CRATE's attention has no such module
