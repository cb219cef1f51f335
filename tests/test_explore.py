"""The explorer's server: it returns the library's numbers, keeps requests apart, and reads no other files."""

import contextlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from explorer import SHIPPED, explorer_with, picture_file, served
from image_data import encoded, write_tree
from PIL import Image
from runs import Forked, wait_until
from torchvision.ops import masks_to_boxes

from crate_fast.errors import UserError
from crate_fast.eval.common.images import SceneImages, free_photographs
from crate_fast.eval.common.models import open_model
from crate_fast.eval.explore import command
from crate_fast.eval.explore.pictures import MAX_UPLOAD_BYTES, LRUCache, Pictures, decode
from crate_fast.eval.maskcut import maskcut
from crate_fast.eval.pca import pca_rgb
from crate_fast.options import parse
from crate_fast.train.checkpoint import best_step
from crate_fast.train.data.shape_scenes import CLASSES
from crate_fast.whitebox import layer_measures, trace


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of three pictures, one in a sub-folder and one with a name that is not UTF-8, and a link out of it."""
    files = {"photos/0.png": picture_file(0), "photos/more/1.jpg": picture_file(1, kind="JPEG")}
    files[os.fsdecode(b"photos/\xff.png")] = picture_file(2)
    root = write_tree(tmp_path_factory.mktemp("explorer"), files | {"secret.png": picture_file(99)})
    (root / "photos" / "link.png").symlink_to(root / "secret.png")
    return root / "photos"


@pytest.fixture(scope="module")
def address(folder):
    with served(explorer_with(*SHIPPED, folder=folder)) as found:
        yield found


def ask(address: str, path: str, **parameters) -> dict:
    answer = httpx.get(f"{address}/api/{path}", params=parameters, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def send(address: str, data: bytes | Iterator[bytes], name: str = "a.png") -> httpx.Response:
    return httpx.post(f"{address}/api/pictures", params={"name": name}, content=data, timeout=60)


def raw_answer(address: str, request: str) -> bytes:
    """Return the status line of a request that no HTTP client sends."""
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as raw:
        raw.sendall(request.encode())
        return b"" if "Content-Length" in request else raw.makefile("rb").readline()


@torch.no_grad()
def test_the_numbers_equal_the_librarys(address):
    data = picture_file(17)
    about = {"model": 0, "picture": send(address, data).json()["id"]}
    loaded = open_model("shipped:CRATE")
    with Image.open(io.BytesIO(data)) as file:
        squashed = np.array(file.convert("RGB").resize((128, 128), Image.Resampling.BICUBIC))
    images = loaded.normalize(torch.from_numpy(squashed).permute(2, 0, 1)[None])
    layer = trace(loaded.model, images, [2])[0]
    summary, measures = ask(address, "summary", **about), layer_measures(loaded.model, images)
    assert summary["grid"] == [16, 16]
    assert summary["layer"] == 2
    assert summary["coding_rate"] == pytest.approx(measures["coding_rate"][0].tolist(), rel=1e-5)
    assert summary["sparsity"] == pytest.approx(measures["sparsity"][0].tolist(), rel=1e-5)
    of_patches = (layer.after_ista[0, 1:] != 0).float().mean(dim=1)
    assert summary["patch_sparsity"][2] == pytest.approx(of_patches.tolist(), abs=1e-6)
    probabilities = loaded.model(images).softmax(-1)[0]
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
    colours = (255 * pca_rgb(keys, first=2)[0]).round().flatten()
    found = torch.tensor(ask(address, "components", which="all", **about)["layers"][2])
    assert (found - colours).abs().max() <= 1
    masks = ask(address, "masks", layer=2, **about)
    expected = maskcut(keys).masks[0]
    expected = expected[expected.flatten(1).any(dim=1)]
    assert masks["masks"] == expected.flatten(1).int().tolist()
    assert masks["boxes"] == (masks_to_boxes(expected) + torch.tensor([0, 0, 1, 1])).tolist()


@pytest.mark.parametrize("model", [0, 1])
def test_a_picture_without_objects_has_no_masks(address, model):
    about = {"model": model, "picture": send(address, encoded(Image.new("RGB", (1, 1), "white"))).json()["id"]}
    found = [ask(address, "masks", layer=layer, **about) for layer in range(4)]
    assert all(len(masks["masks"]) == len(masks["boxes"]) for masks in found)
    assert not all(masks["masks"] for masks in found)
    for which in ("all", "parts"):
        ask(address, "components", which=which, **about)


def test_simultaneous_requests_do_not_mix():
    """Models are opened at the same time, too; the untrained one has the weights of its seed."""
    visitors = 6
    files = [picture_file(100 + number) for number in range(visitors)]

    def questions(number: int) -> list[tuple[str, dict]]:
        layer = {"layer": number % 4}
        attention = [("attention", {**layer, "patch": 7 * number + step}) for step in range(3)]
        return [("summary", {}), *attention, ("masks", layer)]

    def visit(number: int, address: str) -> list[dict]:
        about = {"model": number % 3, "picture": send(address, files[number], f"{number}.png").json()["id"]}
        return [ask(address, name, **about, **parameters) for name, parameters in questions(number)]

    with served(explorer_with(*SHIPPED)) as address, ThreadPoolExecutor(visitors) as pool:
        answers = list(pool.map(visit, range(visitors), [address] * visitors))
    alone = explorer_with(*SHIPPED)
    for number, found in enumerate(answers):
        picture = alone.pictures.add(files[number], "a.png")
        for answer, (name, parameters) in zip(found, questions(number), strict=True):
            known = getattr(alone.inspection(number % 3, picture), name)
            expected = known if name == "summary" else known(**parameters)
            assert json.dumps(answer) == json.dumps(expected), (number, name)


def test_a_bad_upload_is_refused_with_the_reason_and_never_unpickled(address, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "caught"),)

    torch_file = io.BytesIO()
    torch.save(Trap(), torch_file)
    for name, data, reason in (
        ("model.pkl", pickle.dumps(Trap()), "no image"),
        ("model.pt", torch_file.getvalue(), "no image"),
        ("broken", picture_file()[:-60], "cannot be read"),
        ("huge.png", encoded(Image.new("1", (8000, 7000))), "56 megapixels"),
        ("script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "no image"),
    ):
        answer = send(address, data, name)
        assert answer.status_code == 400
        assert re.search(f"{name}.*{reason}", answer.json()["error"])
    assert not (tmp_path / "caught").exists()
    assert decode(picture_file(1, (5000, 2500), "JPEG"), "a.jpg").size == (2048, 1024)  # large ones are made smaller


def test_a_large_upload_is_refused_before_all_of_it_is_read_and_an_interrupted_one_is_no_bug(address, capfd):
    parts = itertools.repeat(bytes(2**20), 20 * MAX_UPLOAD_BYTES // 2**20)
    with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError):  # it may have hung up
        answer = send(address, parts, "b.png")
        assert answer.status_code == 413
        assert "20 MiB" in answer.json()["error"]
    assert len(list(parts)) > 200  # parts that were not sent
    raw_answer(address, "POST /api/pictures?name=a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\nabc")
    assert send(address, picture_file()).status_code == 200
    assert "Traceback" not in capfd.readouterr().err


def test_nothing_outside_the_folder_can_be_read(address, folder, tmp_path):
    names = [entry["name"] for entry in ask(address, "setup")["pictures"]]
    assert names == ["0.png", "more/1.jpg", r"\udcff.png"]  # and not the link out of it
    assert httpx.get(f"{address}/api/picture", params={"picture": "f2"}).status_code == 200
    outside = ("../secret.png", str(folder / "0.png"), "f../secret.png")
    for picture in (*outside, "f3", "f-1", "f٣", "s0", "", "u" + 64 * "0"):
        for path in ("picture", "summary"):
            answer = httpx.get(f"{address}/api/{path}", params={"model": 0, "picture": picture})
            assert answer.status_code == 400, (path, picture)
    paths = ("/../setup.py", "/%2e%2e/setup.py", "/..%2fserver.py", "/server.py", "//etc/passwd", "/page/", "/.git")
    for path in paths:
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        assert b"404" in raw_answer(address, request), path
    (tmp_path / "0.png").write_bytes(picture_file())
    later = Pictures(tmp_path)
    (tmp_path / "0.png").unlink()
    (tmp_path / "0.png").symlink_to(folder.parent / "secret.png")
    with pytest.raises(UserError, match="no longer in the folder"):
        later.view("f0")


def test_other_sites_and_other_names_are_refused(address):
    setup = f"{address}/api/setup"
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
        assert httpx.get(setup, headers=headers).status_code == 403
        assert httpx.post(f"{address}/api/pictures", content=picture_file(), headers=headers).status_code == 403
    answer = httpx.get(setup, headers={"Origin": address})
    assert answer.status_code == 200
    hosts = {"pc.lan:7470": 200, "evil.example": 403, "10.0.0.7:7470": 200, "[::1]:7470": 200}
    with served(
        explorer_with(*SHIPPED), hosts=("PC.lan",), addresses=True
    ) as named:  # browsers send it in lower case
        for host, status in hosts.items():
            assert httpx.get(f"{named}/api/setup", headers={"Host": host}).status_code == status
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("path", "parameters", "reason"),
    [
        ("summary", {"model": ""}, "lacks model"),
        ("summary", {"model": 9}, "model 9"),
        ("attention", {"layer": "-1"}, "'-1'"),
        ("attention", {"layer": 4}, "layer 4"),
        ("attention", {"layer": 2, "patch": 256}, "patches 0 to 255"),
        ("components", {"which": "none"}, "'none'"),
        ("summary", {"session": "of a former server"}, "the explorer was restarted: reload the page"),
    ],
)
def test_a_wrong_request_is_answered_with_the_reason(address, path, parameters, reason):
    answer = httpx.get(f"{address}/api/{path}", params={"model": 0, "picture": "f0"} | parameters)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]


def test_an_edited_picture_is_inspected_again(tmp_path):
    file = tmp_path / "0.png"
    file.write_bytes(picture_file(0))
    explorer = explorer_with("shipped:CRATE", folder=tmp_path)
    before = explorer.inspection(0, "f0")
    assert explorer.inspection(0, "f0") is before
    file.write_bytes(picture_file(1, size=(64, 64)))
    assert explorer.inspection(0, "f0").summary["top"] != before.summary["top"]


def test_caches_drop_what_was_used_least_recently():
    cache = LRUCache(2)
    for key in "ab":
        cache.put(key, key.upper())
    assert cache.get("a") == "A"
    cache.put("c", "C")
    assert [cache.get(key) for key in "abc"] == ["A", None, "C"]


def test_without_a_folder_there_are_photographs_with_credits_before_scenes_at_the_models_size():
    pictures = Pictures(None)
    listed = {entry["id"]: entry["name"] for entry in pictures.listing()}
    assert "cat (Stéfan van der Walt, CC0)" in listed.values()
    assert list(listed)[: len(free_photographs())] == [f"p{number}" for number in range(len(free_photographs()))]
    assert pictures.view("p0").size == (451, 300)
    assert pictures.pixels("p0", 64).shape == (3, 64, 64)
    assert torch.equal(pictures.pixels("s3", 64), SceneImages(64, 12)[3].image)
    assert pictures.view("s3").size == (256, 256)


def test_a_run_offers_its_checkpoints_and_a_damaged_one_is_an_error_message(tiny_run, tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    choices, note = command.default_choices(runs)
    assert choices[0].specification == "shipped:photographs"
    assert "no run below" in note
    for age, name in ((200, "new"), (100, "old")):
        shutil.copytree(tiny_run, runs / name)
        os.utime(runs / name / "checkpoints", (age, age))
    (choices, note), new = command.default_choices(runs), runs / "new"
    assert "newest run" in note
    versions = [best_step(new / "checkpoints"), "untrained", 4, 8]
    found = [(choice.specification, choice.untrained) for choice in choices[:4]]
    assert found == [(f"{new}@{version}", version == "untrained") for version in versions]
    explorer = explorer_with(str(new))
    heads = [explorer.inspection(number, "s0").attention(0, None)["heads"] for number in range(4)]
    assert heads[0] in heads[2:]
    assert heads[1] != heads[2] != heads[3]
    (new / "checkpoints" / "step_00000004" / "model.safetensors").write_bytes(b"nothing")
    explorer = explorer_with(f"{new}@4", f"{new}@8")
    monkeypatch.setattr(explorer, "setup", lambda: int("nonsense"))  # stands for a bug
    with served(explorer) as address:
        answer = httpx.get(f"{address}/api/summary", params={"model": 0, "picture": "s0"})
        assert answer.status_code == 400
        assert "model.safetensors" in answer.json()["error"]
        assert httpx.get(f"{address}/api/setup").status_code == 500
        assert ask(address, "summary", model=1, picture="s0")["depth"] == 2
    (new / "checkpoints" / "step_00000008" / "model.safetensors").write_bytes(b"nothing")
    shutil.rmtree(runs / "old")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="model.safetensors"):
        command.open_explorer(parse("explore", ["--device", "cpu"]))


def test_the_command_serves_until_it_is_interrupted():
    process = Forked(["--checkpoint", "shipped:CRATE", "--no-browser"], script="eval.explore.command")
    printed = Path(process.log.name)
    wait_until(lambda: "(stop with Ctrl-C)\n" in printed.read_text(), process)
    address = re.search(r"http://\S+", printed.read_text())[0]
    assert ask(address, "setup")["models"][0]["label"] == "shipped:CRATE"
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=60)[0]
    assert process.poll() == 0


def test_bad_arguments_of_the_command_are_errors(refuses):
    with command._listen("127.0.0.1", None) as first, command._listen("127.0.0.1", None) as second:
        taken = first.getsockname()[1]
        assert taken != second.getsockname()[1]  # a port in use is skipped if none is given
        for message, *words in (
            (f"--port {taken}", "--port", str(taken)),
            ("--port 99999", "--port", "99999"),
            ("no such folder", "--images", "nowhere"),
        ):
            refuses(message, command.main, ["--no-browser", "--checkpoint", "shipped:CRATE", *words])
