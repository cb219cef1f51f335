"""CRATE-MAE against the released behaviour; masks, patches, the separate encoder, and bad arguments."""

import math

import pytest
import timm
import torch
from released import ReleasedCRATEMAE
from runs import same
from torch import nn

from crate_fast import CRATE, CRATEMAE, create_mae
from crate_fast.checkpoints import load_weights, released_state_dict
from crate_fast.errors import UserError
from crate_fast.mae import encoder_state_dict, sincos_positions
from crate_fast.registry import is_mae, is_model, model_names

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def _forward_backward(model: nn.Module, *arguments, **options) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    model.zero_grad()
    outputs = model(*arguments, **options)
    outputs[0].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [output.detach() for output in outputs], gradients


def _pair(**changes) -> tuple[ReleasedCRATEMAE, CRATEMAE]:
    theirs, ours = ReleasedCRATEMAE(**(SMALL | changes)).double(), CRATEMAE(**(SMALL | changes)).double()
    nn.init.normal_(theirs.decoder_pos_embed)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


CHANGES = [{}, {"norm_pix_loss": True}, {"decoder_depth": 1}, {"num_heads": 1}, {"img_size": 64, "embed_dim": 12}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_loss_prediction_and_all_gradients_equal_the_released_module_in_float64(changes):
    theirs, ours = _pair(**changes)
    side, mask_ratio = (64, 0.3) if "img_size" in changes else (32, 0.75)
    images, noise = torch.randn(3, 3, side, side).double(), torch.rand(3, (side // 8) ** 2)
    outputs, gradients = _forward_backward(ours, images, mask_ratio, noise=noise)
    released_outputs, released_gradients = _forward_backward(theirs, images, mask_ratio, noise)
    torch.testing.assert_close(outputs, released_outputs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients, released_gradients, rtol=1e-9, atol=1e-10)
    assert {"pos_embed", "decoder_pos_embed", "decoder_embed.weight", "decoder_embed.bias"}.isdisjoint(gradients)


def test_weights_load_from_a_released_file_and_into_the_released_module(tmp_path):
    theirs, ours = _pair()
    torch.save({"model": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "released.pth")
    loaded = load_weights(CRATEMAE(**SMALL).double(), tmp_path / "released.pth")
    assert same(loaded.state_dict(), ours.state_dict())
    theirs.load_state_dict(released_state_dict(CRATEMAE(**SMALL).double()), strict=True)


def test_models_that_the_released_code_cannot_load_are_not_exported():
    changes = {"visible_only": True, "img_size": (32, 16), "patch_size": (16, 4), "sparsity": 0.1, "in_chans": 1}
    for name, value in changes.items():
        with pytest.raises(ValueError, match="released code has no such model"):
            released_state_dict(CRATEMAE(**(SMALL | {name: value})))


def test_models_have_the_papers_numbers_of_parameters():
    for name, millions in {"tiny": 11.56, "small": 25.406, "base": 44.638, "large": 154.27}.items():
        model = create_mae(f"crate_mae_{name}_patch16_224", device="meta")
        digits = len(str(millions).partition(".")[2])
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, digits) == millions, name


def test_initial_distributions_are_the_released_ones():
    model = CRATEMAE(embed_dim=384, depth=1, num_heads=6).to(memory_format=torch.channels_last)
    nn.init.zeros_(model.patch_embed.proj.weight)
    model.reset_parameters()  # in any memory format
    layer, decoder = model.blocks[0].layers[0], model.decoder_blocks[0].layers[0]
    for weight in (layer[0].fn.qkv.weight, model.decoder_pred.weight, model.patch_embed.proj.weight.flatten(1)):
        bound = math.sqrt(6 / sum(weight.shape))  # Xavier
        assert bound * 0.99 < weight.abs().max() <= bound
    for weight in (layer[1].fn.weight, decoder[0].fn.weight):
        bound = math.sqrt(6 / 384)  # Kaiming
        assert bound * 0.99 < weight.abs().max() <= bound
    for token in (model.cls_token, model.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.15)
    assert model.decoder_pred.bias.abs().max() == 0
    assert (layer[1].fn.lambd, layer[1].fn.step_size, model.norm.eps, layer[0].norm.eps) == (0.5, 0.1, 1e-6, 1e-5)


def test_positions_by_hand():
    table = sincos_positions(8, (2, 3))[0]
    assert (table.shape, table[0].abs().max()) == ((7, 8), 0)
    row, column, waves = 1, 2, (math.sin, math.cos)
    expected = [wave(place / 10000 ** (k / 2)) for place in (column, row) for wave in waves for k in (0, 1)]
    torch.testing.assert_close(table[1 + row * 3 + column], torch.tensor(expected))


def test_patchify_is_inverted_by_unpatchify():
    model = CRATEMAE(**(SMALL | {"img_size": (24, 48), "patch_size": (4, 16), "in_chans": 2}))
    images = torch.randn(2, 2, 24, 48)
    patches = model.patchify(images)
    assert torch.equal(model.unpatchify(patches), images)
    second = images[:, :, :4, 16:32].permute(0, 2, 3, 1).flatten(1)  # (row, column, channel)
    assert torch.equal(patches[:, 1], second)
    mask = torch.zeros(2, 18)
    mask[:, 1] = 1
    drawn = model.mask_image(mask)
    assert (drawn.shape, drawn.sum(), drawn[:, :, :4, 16:32].min()) == ((2, 1, 24, 48), 2 * 4 * 16, 1)


def test_the_smallest_noise_stays_visible():
    model, images, noise = CRATEMAE(**SMALL), torch.randn(5, 3, 32, 32), torch.rand(5, 16)
    _, _, mask = model(images, 0.6, noise=noise)
    assert mask.sum(dim=1).tolist() == [16 - int(16 * 0.4)] * 5
    visible, hidden = noise.masked_fill(mask == 1, -1).amax(dim=1), noise.masked_fill(mask == 0, 2).amin(dim=1)
    assert (visible < hidden).all()
    _, _, mask = model(images, noise=torch.zeros(5, 16))
    assert mask[0].tolist() == [0.0] * 4 + [1.0] * 12  # the first of equal values


def test_drawn_masks_are_uniform_and_differ_between_images():
    model = CRATEMAE(**(SMALL | {"embed_dim": 12, "depth": 1}))
    _, _, mask = model(torch.zeros(1, 3, 32, 32).expand(4000, -1, -1, -1))
    share = mask.mean(dim=0)
    assert (share - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 4000)
    assert len(mask.unique(dim=0)) > 1500  # about 1620 of 1820 possible ones are expected


def test_reconstruction_inverts_the_normalisation_of_targets():
    model, images = CRATEMAE(**SMALL, norm_pix_loss=True), torch.randn(2, 3, 32, 32) * 3 + 5
    patches = model.patchify(images)
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(model.reconstruction(images, target), images, rtol=1e-5, atol=1e-5)
    assert model.forward_loss(images, target, torch.ones(2, 16)) < 1e-10
    assert torch.equal(CRATEMAE(**SMALL).reconstruction(images, patches), images)


def test_only_visible_tokens_are_encoded():
    """MAE's definition: encode CLS and the visible patches; decode with mask tokens in the gaps."""
    model = CRATEMAE(**SMALL, visible_only=True).double()
    images, noise = torch.randn(2, 3, 32, 32).double(), torch.rand(2, 16)
    _, pred, mask = model(images, noise=noise)
    for image, hidden, expected in zip(images, mask.bool(), pred, strict=True):
        patches = model.patch_embed(image[None])[0] + model.pos_embed[0, 1:]
        x = torch.cat([model.cls_token[0] + model.pos_embed[0, :1], patches[~hidden]])[None]
        for block in model.blocks:
            x = block(x)
        x = model.decoder_embed(model.norm(x))[0]
        full = model.mask_token[0].expand(16, -1).clone()
        full[~hidden] = x[1:]
        y = (torch.cat([x[:1], full]) + model.decoder_pos_embed[0])[None]
        for block in model.decoder_blocks:
            y = block(y)
        torch.testing.assert_close(model.decoder_pred(model.decoder_norm(y))[0, 1:], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("visible_only", "patch"), [(False, (4, 8)), (True, 8)])
def test_the_encoder_as_a_crate_computes_the_same_tokens(visible_only, patch):
    model = CRATEMAE(**(SMALL | {"patch_size": patch}), visible_only=visible_only).double().eval()
    images = torch.randn(2, 3, 32, 32).double()
    positions = model.pos_embed if visible_only else model.decoder_pos_embed
    x = torch.cat([model.cls_token.expand(2, -1, -1), model.patch_embed(images)], dim=1) + positions
    for block in model.blocks:
        x = block(x)
    encoder = model.encoder(num_classes=7)
    assert isinstance(encoder, CRATE)
    torch.testing.assert_close(encoder.forward_features(images), x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(encoder.forward_head(x, pre_logits=True), model.norm(x)[:, 0], rtol=1e-9, atol=1e-9)
    assert encoder(images).shape == (2, 7)
    assert not encoder.training
    encoder.cls_token.data.zero_()
    assert model.cls_token.abs().max() > 0  # a copy
    with pytest.raises(ValueError, match="released code has no such model"):
        released_state_dict(encoder)
    with pytest.raises(ValueError, match=r"image_size: encoder\(\) keeps the architecture of this model"):
        model.encoder(image_size=64)
    with pytest.raises(ValueError, match="not a state dict of CRATE-MAE: cls_token is missing"):
        encoder_state_dict({"weight": torch.zeros(1)})
    encoder = model.encoder(pool="mean", dropout=0.5, dynamic_img_size=True)
    assert encoder(torch.zeros(1, 3, 64, 64).double()).shape == (1, 48)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, images, noise = CRATEMAE(**SMALL, visible_only=True), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    _, plain = _forward_backward(model, images, noise=noise)
    assert plain.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    model.set_grad_checkpointing()
    torch.testing.assert_close(_forward_backward(model, images, noise=noise)[1], plain)


@pytest.mark.parametrize("visible_only", [False, True])
def test_autocast_stays_near_fp32(visible_only):
    model, images, noise = CRATEMAE(**SMALL, visible_only=visible_only), torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    exact, _, _ = model(images, noise=noise)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = model(images, noise=noise)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)


def test_the_loss_of_a_large_half_precision_batch_is_finite():
    model = CRATEMAE(**SMALL)
    images, mask = torch.zeros(5600, 3, 32, 32, dtype=torch.half), torch.ones(5600, 16, dtype=torch.half)
    loss = model.forward_loss(images, torch.ones(5600, 16, 192, dtype=torch.half), mask)  # 89,600 > 65,504
    assert (loss.item(), loss.dtype) == (1.0, torch.float32)


def test_bad_arguments_and_bad_input_are_errors():
    for message, options in {
        r"image size \(30, 30\) is not a multiple of the patch size": {"img_size": 30},
        "embed_dim=50 is not a multiple of num_heads=3": {"embed_dim": 50},
        "width 6: .* multiple of 4": {"embed_dim": 6},
        "depth=0: give a positive integer": {"depth": 0},
        "backend='cuda': choose one of": {"backend": "cuda"},
    }.items():
        with pytest.raises(ValueError, match=message):
            CRATEMAE(**(SMALL | options))
    for message, (size, options) in {
        "images are 64×64 and the model expects 32×32": ((2, 3, 64, 64), {}),
        r"images have shape \(3, 32, 32\)": ((3, 32, 32), {}),
        "mask_ratio=nan: it must be above 0 and below 1": ((2, 3, 32, 32), {"mask_ratio": math.nan}),
        "mask_ratio=0.95 leaves 0 of 16": ((2, 3, 32, 32), {"mask_ratio": 0.95}),
        r"noise has shape \(2, 15\): .* \[2, 16\]": ((2, 3, 32, 32), {"noise": torch.zeros(2, 15)}),
    }.items():
        with pytest.raises(ValueError, match=message):
            CRATEMAE(**SMALL)(torch.zeros(size), **options)


def test_unknown_names_and_downloads_are_errors():
    with pytest.raises(UserError, match="no weights of crate_mae_tiny_patch16_224 can be downloaded"):
        create_mae("crate_mae_tiny_patch16_224", pretrained=True)
    with pytest.raises(UserError, match="crate_mae_huge_patch16_224.* choose one of crate_mae_tiny_patch16_224, "):
        create_mae("crate_mae_huge_patch16_224")
    with pytest.raises(UserError, match="argument 'num_classes'.* create crate_mae_encoder_tiny_patch16_224"):
        create_mae("crate_mae_tiny_patch16_224", num_classes=10)


def test_timms_registry_has_the_encoders_and_not_the_autoencoders(tmp_path):
    registered = timm.list_models("crate_*")
    assert registered
    assert not any(map(is_mae, registered))
    name, sizes = "crate_mae_tiny_patch16_224", {"img_size": 32, "embed_dim": 96, "num_heads": 2, "depth": 1}
    model = create_mae(name, **sizes)
    assert is_model(name)
    assert name in model_names()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    assert same(create_mae(name, **sizes, checkpoint_path=tmp_path / "weights.pth").state_dict(), model.state_dict())
    encoder = timm.create_model("crate_mae_encoder_tiny_patch16_224", features_only=True, depth=2, out_indices=[1])
    assert encoder(torch.zeros(1, 3, 224, 224))[0].shape == (1, 384, 14, 14)
