"""Features of CRATE, its ablations and timm's ViTs, against queries and keys computed by hand."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from crate_fast import CRATE
from crate_fast.errors import UserError
from crate_fast.eval.common.features import Features, extractor_for
from crate_fast.whitebox import trace

SIZES = {"image_size": 32, "patch_size": 8, "num_classes": 3, "dim": 32, "depth": 3, "heads": 2, "dim_head": 16}


def _vit(**more) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 3}
    return VisionTransformer(**sizes, **more)


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


@pytest.mark.parametrize("model", [CRATE(**SIZES), _vit()])
def test_the_image_size_can_be_changed(model):
    extract = extractor_for(model)
    extract.set_image_size(48)
    features = extract(torch.randn(1, 3, 48, 48))
    assert (features.grid, features.keys(extract.default_layer).shape) == ((6, 6), (1, 36, 32))
    with pytest.raises(ValueError, match="image size 50 is not a multiple.*--image-size 48"):
        extract.set_image_size(50)
    with pytest.raises(UserError, match="layer 3: this model has layers 0 to 2"):
        extract(torch.randn(1, 3, 48, 48), [3])
    assert extract.resolve_layer(-1) == 2


def test_other_models_and_missing_layers_are_errors():
    with pytest.raises(UserError, match="no patch features can be read from a Linear"):
        extractor_for(nn.Linear(2, 2))
    with pytest.raises(UserError, match="layer 2 was not extracted"):
        Features((2, 2), {}).keys(2)
