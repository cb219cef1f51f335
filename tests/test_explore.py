"""The explorer's server: its numbers are the library's, its visitors do not meet, it shows only what it should."""

import io
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from explorer import desk_with, huge_file, picture_file, served, shelf_of
from PIL import Image
from safetensors.torch import load_file, save_file

from crate_fast.eval.common.models import open_model
from crate_fast.eval.common.principal_components import pca_rgb
from crate_fast.eval.explore import command, desk, offers, pictures
from crate_fast.eval.explore.offers import default_offers, offers_of
from crate_fast.eval.explore.pictures import (
    LARGEST_UPLOAD,
    Pictures,
    UnknownPictureError,
    UnreadablePictureError,
    decode,
)
from crate_fast.eval.maskcut import maskcut
from crate_fast.train.checkpoint import best_step
from crate_fast.train.shape_scenes import CLASSES
from crate_fast.whitebox import layer_measures, trace

SHIPPED = ("shipped:CRATE", "shipped:ViT", "shipped:CRATE@untrained")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pictures, one of them in a folder of its own, beside a file that is none of our business."""
    root = tmp_path_factory.mktemp("explorer")
    (root / "photos" / "more").mkdir(parents=True)
    for number in range(5):
        (root / "photos" / f"{number}.png").write_bytes(picture_file(number))
    (root / "photos" / "more" / "5.jpg").write_bytes(picture_file(5, kind="JPEG"))
    (root / "secret.png").write_bytes(picture_file(99))
    (root / "photos" / "link.png").symlink_to(root / "secret.png")
    return root / "photos"


@pytest.fixture(scope="module")
def address(folder):
    with served(desk_with([offer for name in SHIPPED for offer in offers_of(name)], folder)) as found:
        yield found


def ask(address: str, path: str, **parameters) -> dict:
    answer = httpx.get(f"{address}/api/{path}", params=parameters, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def send(address: str, data: bytes, name: str = "a.png") -> httpx.Response:
    return httpx.post(f"{address}/api/pictures", params={"name": name}, content=data, timeout=60)


def pixels_of(data: bytes, size: int = 128) -> torch.Tensor:
    with Image.open(io.BytesIO(data)) as file:
        squashed = file.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(squashed)).permute(2, 0, 1)[None]


@torch.no_grad()
def test_the_numbers_are_the_librarys(address):
    data = picture_file(17)
    about = {"model": 0, "picture": send(address, data).json()["id"]}
    subject = open_model("shipped:CRATE")
    images = subject.normalize(pixels_of(data))
    layer = trace(subject.model, images, [2])[0]
    summary, measures = ask(address, "summary", **about), layer_measures(subject.model, images)
    assert summary["grid"] == [16, 16]
    assert summary["layer"] == 2
    assert summary["coding_rate"] == pytest.approx(measures["coding_rate"][0].tolist(), rel=1e-5)
    assert summary["sparsity"] == pytest.approx(measures["sparsity"][0].tolist(), rel=1e-5)
    of_patches = (layer.after_ista[0, 1:] != 0).float().mean(dim=1)
    assert summary["patch_sparsity"][2] == pytest.approx(of_patches.tolist(), abs=1e-6)
    probabilities = subject.model(images).softmax(-1)[0]
    assert [entry["class"] for entry in summary["top"]] == probabilities.argsort(descending=True)[:5].tolist()
    assert summary["top"][0]["probability"] == pytest.approx(probabilities.max().item(), rel=1e-5)
    assert summary["top"][0]["name"] in CLASSES

    heads = ask(address, "attention", layer=2, **about)["heads"]
    assert torch.tensor(heads) == pytest.approx(layer.cls_attention()[0], abs=1e-6)
    heads = ask(address, "attention", layer=2, patch=40, **about)["heads"]
    w = layer.subspace_tokens[0, 1:]
    expected = (layer.scale * torch.einsum("hd,phd->hp", w[40], w)).softmax(-1)
    assert torch.tensor(heads) == pytest.approx(expected, abs=1e-6)

    keys = layer.keys[:, 1:].flatten(2)
    colours = (255 * pca_rgb(keys, first=2)[0][0]).round().flatten()
    found = torch.tensor(ask(address, "components", which="all", **about)["layers"][2])
    assert (found - colours).abs().max() <= 1
    masks = ask(address, "masks", layer=2, **about)
    expected = maskcut(keys).masks[0]
    expected = expected[expected.flatten(1).any(dim=1)]
    assert masks["masks"] == expected.flatten(1).int().tolist()
    for mask, (left, top, right, bottom) in zip(expected, masks["boxes"], strict=True):
        outside = mask.clone()
        outside[top:bottom, left:right] = False
        assert not outside.any()
        edges = [mask[:, left], mask[:, right - 1], mask[top], mask[bottom - 1]]
        assert all(edge.any() for edge in edges)


@pytest.mark.parametrize("size", [(64, 64), (1, 1)])
@pytest.mark.parametrize("model", [0, 1])
def test_a_picture_without_objects_has_no_masks(address, size, model):
    out = io.BytesIO()
    Image.new("RGB", size, "white").save(out, "PNG")
    about = {"model": model, "picture": send(address, out.getvalue()).json()["id"]}
    counts = []
    for layer in range(ask(address, "summary", **about)["depth"]):
        masks = ask(address, "masks", layer=layer, **about)
        assert len(masks["masks"]) == len(masks["boxes"])
        counts.append(len(masks["masks"]))
    assert 0 in counts
    for which in ("all", "parts"):
        ask(address, "components", which=which, **about)


def test_a_vit_has_attention_but_no_subspaces(address):
    about = {"model": 1, "picture": "f0"}
    summary = ask(address, "summary", **about)
    assert summary["coding_rate"] is summary["sparsity"] is summary["patch_sparsity"] is None
    assert summary["layer"] == 3
    assert np.sum(ask(address, "attention", layer=3, patch=0, **about)["heads"], axis=1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224@untrained", "crate_tiny_patch16_224@untrained"])
def test_a_timm_model_can_be_looked_at(name):
    found = desk_with(offers_of(name))
    summary = found.summary(0, "s0")
    assert len(summary["top"]) == 5
    assert summary["top"][0]["name"].startswith("class ")
    assert np.shape(found.attention(0, "s0", 11, None)["heads"])[1] == 196
    assert found.setup()["models"][0]["untrained"]


def test_twenty_visitors_at_once_get_what_is_theirs(address):
    files = [picture_file(100 + number) for number in range(20)]
    alone = desk_with([offer for name in SHIPPED for offer in offers_of(name)])
    start = threading.Barrier(20)  # all at the same moment

    def visit(number: int) -> list[dict]:
        model, layer, patch = number % 3, number % 4, 7 * number
        start.wait()
        picture = send(address, files[number], f"{number}.png").json()["id"]
        about = {"model": model, "picture": picture}
        found = [ask(address, "summary", **about)]
        found += [ask(address, "attention", layer=layer, patch=patch + step, **about) for step in range(3)]
        return [*found, ask(address, "masks", layer=layer, **about)]

    with ThreadPoolExecutor(20) as visitors:
        answers = list(visitors.map(visit, range(20)))
    for number, found in enumerate(answers):
        model, layer, patch = number % 3, number % 4, 7 * number
        picture = alone.pictures.add(files[number], "a.png")
        expected = [alone.summary(model, picture)]
        expected += [alone.attention(model, picture, layer, patch + step) for step in range(3)]
        for one, other in zip(found, [*expected, alone.masks(model, picture, layer)], strict=True):
            assert json.dumps(one) == json.dumps(other), number


BAD = {
    "broken": (picture_file()[:-60], "cannot be read"),
    "text.png": (b"this is a text, whatever its name says", "no image"),
    "huge.png": (huge_file(), "100 megapixels"),
    "empty.png": (b"", "no image"),
    "page.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "no image"),
    "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "no image"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_upload_is_refused_with_a_reason(address, name):
    data, reason = BAD[name]
    answer = send(address, data, name)
    assert answer.status_code == 422
    assert reason in answer.json()["error"]
    assert name in answer.json()["error"]
    assert send(address, picture_file()).status_code == 200


def test_an_upload_is_limited_in_size_before_it_is_held(address):
    sent = 0

    def endless():
        nonlocal sent
        while sent < 20 * LARGEST_UPLOAD:
            sent += 2**20
            yield bytes(2**20)

    try:
        answer = httpx.post(f"{address}/api/pictures", params={"name": "b.png"}, content=endless(), timeout=60)
        assert answer.status_code == 413
        assert "20 MiB" in answer.json()["error"]
    except (httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError):
        pass  # the server hung up on it
    assert sent < 10 * LARGEST_UPLOAD
    assert send(address, picture_file()).status_code == 200


def test_an_upload_is_never_unpickled(address, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "caught"),)

    for data in (pickle.dumps(Trap()), _torch_file(Trap())):
        assert send(address, data, "model.pt").status_code == 422
    assert not (tmp_path / "caught").exists()


def _torch_file(value) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def test_nothing_outside_the_folder_can_be_read(address, folder):
    names = [entry["name"] for entry in ask(address, "setup")["pictures"]]
    assert names == ["0.png", "1.png", "2.png", "3.png", "4.png", "more/5.jpg"]  # and not the link out of it
    outside = ("../secret.png", str(folder / "0.png"), "f../secret.png")
    for picture in (*outside, "f6", "f-1", "f٣", "s0", "", "u" + 64 * "0"):
        for path in ("picture", "summary"):
            answer = httpx.get(f"{address}/api/{path}", params={"model": 0, "picture": picture})
            assert answer.status_code == 404, (path, picture)
    paths = ("/../setup.py", "/%2e%2e/setup.py", "/..%2fserver.py", "/server.py", "//etc/passwd", "/page/", "/.git")
    for path in paths:
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            assert b"404" in raw.makefile("rb").readline(), path


def test_a_file_that_becomes_a_link_is_not_followed(folder, tmp_path):
    place = tmp_path / "photos"
    shutil.copytree(folder, place, symlinks=True)
    found = Pictures(place)
    (place / "0.png").unlink()
    (place / "0.png").symlink_to(folder.parent / "secret.png")
    with pytest.raises(UnknownPictureError, match="no longer in the folder"):
        found.view("f0")


def test_other_sites_and_other_names_are_refused(address):
    setup = f"{address}/api/setup"
    assert httpx.get(setup, headers={"Host": "evil.example"}).status_code == 403
    assert httpx.get(setup, headers={"Origin": "https://evil.example"}).status_code == 403
    answer = httpx.post(f"{address}/api/pictures", content=picture_file(), headers={"Origin": "null"})
    assert answer.status_code == 403
    answer = httpx.get(setup, headers={"Origin": address})
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("path", "parameters", "reason"),
    [
        ("summary", {"picture": "f0"}, "lacks model"),
        ("summary", {"model": 9, "picture": "f0"}, "model 9"),
        ("attention", {"model": 0, "picture": "f0", "layer": 4}, "layer 4"),
        ("attention", {"model": 0, "picture": "f0", "layer": "two"}, "'two'"),
        ("attention", {"model": 0, "picture": "f0", "layer": 2, "patch": 256}, "patches 0 to 255"),
        ("attention", {"model": 0, "picture": "f0", "layer": 2, "patch": "-1"}, "'-1'"),
        ("components", {"model": 0, "picture": "f0", "which": "none"}, "'none'"),
        ("masks", {"model": 0, "picture": "f0", "layer": 99}, "layer 99"),
    ],
)
def test_a_wrong_question_is_answered_with_a_sentence(address, path, parameters, reason):
    answer = httpx.get(f"{address}/api/{path}", params=parameters)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]


def test_an_old_upload_is_dropped_and_said_to_be(monkeypatch):
    files = [picture_file(number) for number in range(3)]
    monkeypatch.setattr(pictures, "_UPLOADS_BYTES", sum(map(len, files[1:])))
    found = Pictures(None)
    keys = [found.add(data, "a.png") for data in files]
    with pytest.raises(UnknownPictureError, match="upload it again"):
        found.view(keys[0])
    assert found.view(keys[2]).size == (96, 64)


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(desk, "_KEPT_BYTES", 900_000)  # two pictures of the shipped CRATE
    found = desk_with(offers_of("shipped:CRATE"))
    for number in range(5):
        found.summary(0, f"s{number}")
    assert [key[1] for key in found._kept] == ["s3", "s4"]
    offered = [offer for name in SHIPPED for offer in offers_of(name)] * 2
    shelf = shelf_of(offered)
    for number in range(len(offered)):
        shelf.get(number)
    assert len(shelf._open) == 4


def test_photos_stand_upright_and_keep_their_colours():
    turned = picture_file(3, size=(90, 60), kind="JPEG", exif=_turned(), quality=95)
    assert decode(turned, "a.jpg").size == (60, 90)
    clear = Image.new("RGBA", (8, 8), (10, 200, 30, 255))
    out = io.BytesIO()
    clear.save(out, "PNG")
    assert decode(out.getvalue(), "a.png").getpixel((4, 4)) == (10, 200, 30)


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    return exif


def test_sixteen_bits_and_transparency_look_as_they_should():
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    assert np.abs(np.asarray(decode(_png(Image.fromarray(ramp)), "a"))[..., 0] - ramp / 257).max() < 1.5
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert decode(_png(clear), "a").getpixel((4, 4)) == (255, 255, 255)
    out = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.float32)).save(out, "TIFF")
    with pytest.raises(UnreadablePictureError, match="32 bits"):
        decode(out.getvalue(), "a.tif")


def _png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def test_large_pictures_are_kept_small():
    assert decode(picture_file(1, (5000, 2500), "JPEG"), "a.jpg").size == (2048, 1024)


def test_a_name_that_is_not_text_is_shown_somehow(tmp_path):
    (tmp_path / os.fsdecode(b"\xff\xe9.png")).write_bytes(picture_file())
    with served(desk_with(offers_of("shipped:CRATE"), tmp_path)) as address:
        assert [entry["name"] for entry in ask(address, "setup")["pictures"]] == ["??.png"]
        assert ask(address, "summary", model=0, picture="f0")["depth"] == 4


def test_a_model_being_opened_keeps_nobody_waiting(monkeypatch):
    found = desk_with([offer for name in SHIPPED for offer in offers_of(name)])
    found.summary(0, "s0")
    begun, go_on = threading.Event(), threading.Event()
    opened = offers.open_model

    def slow(specification, **opening):
        begun.set()
        assert go_on.wait(60)
        return opened(specification, **opening)

    monkeypatch.setattr(offers, "open_model", slow)
    other = threading.Thread(target=found.summary, args=(1, "s0"))
    other.start()
    assert begun.wait(60)
    found.attention(0, "s0", 2, None)  # known
    found.summary(0, "s1")  # of an open model
    assert other.is_alive()
    go_on.set()
    other.join(60)
    assert not other.is_alive()


def test_a_model_of_another_kind_is_a_sentence():
    with served(desk_with(offers_of("resnet18@untrained"))) as address:
        answer = httpx.get(f"{address}/api/summary", params={"model": 0, "picture": "s0"}, timeout=60)
    assert answer.status_code == 400
    assert "no patch features" in answer.json()["error"]


def test_a_fault_of_ours_is_not_passed_off_as_the_visitors(monkeypatch):
    found = desk_with(offers_of("shipped:CRATE"))
    monkeypatch.setattr(found, "setup", lambda: int("nonsense"))  # a ValueError, but none of ours
    with served(found) as address:
        assert httpx.get(f"{address}/api/setup").status_code == 500
        assert ask(address, "summary", model=0, picture="s0")["depth"] == 4


def test_an_upload_that_breaks_off_leaves_no_traceback(address, capfd):
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as raw:
        raw.sendall(b"POST /api/pictures?name=a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\nabc")
    assert send(address, picture_file()).status_code == 200
    assert "Traceback" not in capfd.readouterr().err


def test_scenes_are_drawn_at_the_models_size():
    from crate_fast.eval.common.images import SceneImages

    found = Pictures(None)
    assert torch.equal(found.pixels("s3", 64), SceneImages(64, 12)[3].image)
    assert "shape_scenes" in found.note
    assert found.view("s3").size == (256, 256)


def test_a_run_offers_its_checkpoints_and_the_newest_run_comes_first(tiny_run, tmp_path):
    runs = tmp_path / "runs"
    assert [offer.label for offer in default_offers(runs)[0]][:2] == [
        "CRATE, trained on shape_scenes",
        "ViT, trained on shape_scenes",
    ]
    assert "no run below" in default_offers(runs)[1]
    for age, name in ((200, "new"), (100, "old")):
        shutil.copytree(tiny_run, runs / name)
        os.utime(runs / name / "checkpoints", (age, age))
    offered, said = default_offers(runs)
    assert "newest run" in said
    assert [offer.specification for offer in offered[:4]] == [
        f"{runs / 'new'}@{best_step(runs / 'new' / 'checkpoints')}",
        f"{runs / 'new'}@untrained",
        f"{runs / 'new'}@4",
        f"{runs / 'new'}@8",
    ]
    assert [offer.untrained for offer in offered[:4]] == [False, True, False, False]
    found = desk_with(offered[:4])
    heads = [found.attention(number, "s0", 0, None)["heads"] for number in range(4)]
    assert heads[0] in heads[2:]
    assert heads[1] != heads[2] != heads[3]
    assert found.summary(2, "s0")["top"][0]["name"] in CLASSES


def test_a_damaged_checkpoint_is_a_message_and_the_others_go_on(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "checkpoints" / "step_00000004" / "model.safetensors").write_bytes(b"nothing")
    found = desk_with(offers_of(str(run)))
    with served(found) as address:
        steps = [offer.label for offer in found.shelf.offers]
        answer = httpx.get(f"{address}/api/summary", params={"model": steps.index("run, step 4"), "picture": "s0"})
        assert answer.status_code == 422
        assert "model.safetensors" in answer.json()["error"]
        assert ask(address, "summary", model=steps.index("run, step 8"), picture="s0")["depth"] == 2


def test_weights_that_are_not_finite_are_a_message(tmp_path):
    import timm

    model = timm.create_model("crate_tiny_patch16_224", num_classes=3, depth=1)
    model.mlp_head[1].weight.data.fill_(float("nan"))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert load_file(tmp_path / "w.safetensors")
    offered = offers_of(f"crate_tiny_patch16_224@{tmp_path / 'w.safetensors'}")
    with served(desk_with_depth(offered)) as address:
        answer = httpx.get(f"{address}/api/summary", params={"model": 0, "picture": "s0"}, timeout=60)
        assert answer.status_code == 400
        assert "NaN" in answer.json()["error"]


def desk_with_depth(offered):
    found = desk_with(offered)
    found.shelf._opening["model_args"] = ["depth=1"]
    return found


def test_a_newest_run_that_is_damaged_is_left_out_with_a_reason(tiny_run, tmp_path, monkeypatch):
    shutil.copytree(tiny_run, tmp_path / "runs" / "new")
    for weights in (tmp_path / "runs" / "new" / "checkpoints").glob("*/model.safetensors"):
        weights.write_bytes(b"nothing")
    monkeypatch.chdir(tmp_path)
    found = command.desk_of(command._parser().parse_args(["--device", "cpu"]))
    assert "left out" in found.note
    assert "model.safetensors" in found.note
    assert found.summary(0, "s0")["depth"] == 4


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("127.0.0.2", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("pc", False)],
)
def test_which_addresses_are_this_computers_alone(host, alone):
    assert command._is_loopback(host) == alone


def test_the_command_serves_until_it_is_interrupted(tmp_path):
    words = [sys.executable, "-m", "crate_fast.cli", "explore", "--checkpoint", "shipped:CRATE", "--no-browser"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().split()[0]
        assert ask(address, "setup")["models"][0]["label"] == "shipped:CRATE"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "shipped:CRATE", "shipped:CRATE"], "two models are called"),
        (["--checkpoint", "shipped:CRATE", "--port", "99999"], "--port 99999"),
        (["--images", "nowhere"], "no such folder"),
        (["--checkpoint", "nowhere"], "neither the folder of a run nor a model"),
        (["--checkpoint", "shipped:CRATE", "--image-size", "100"], "not a multiple"),
        (["--checkpoint", "shipped:crate"], "shipped:CRATE"),
    ],
)
def test_the_command_says_what_is_wrong(words, message, capsys):
    assert command.main([*words, "--no-browser"]) == 2
    assert message in capsys.readouterr().err


def test_a_taken_port_is_said(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert command.main(["--checkpoint", "shipped:CRATE", "--no-browser", "--port", str(port)]) == 2
    assert f"--port {port}" in capsys.readouterr().err


def test_the_next_port_is_taken_when_none_is_named():
    first = command._listen("127.0.0.1", None)
    second = command._listen("127.0.0.1", None)
    with first, second:
        assert first.getsockname()[1] != second.getsockname()[1]
