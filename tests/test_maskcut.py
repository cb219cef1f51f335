"""MaskCut against its dense definition, its solver's fallbacks, COCO's scores, and the command on a data set."""

import functools
import itertools
import json
import math
import shutil
import threading

import numpy as np
import pytest
import torch
from image_data import write_coco
from maskcut_oracle import affinity, maskcut_oracle, second_eigenvector
from oracle import mutant
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from crate_fast.errors import UserError
from crate_fast.eval import maskcut as protocol
from crate_fast.eval.common import normalized_cut
from crate_fast.eval.common.coco import class_agnostic_scores, detections_of, enlarge, index_of
from crate_fast.eval.common.images import SceneImages
from crate_fast.eval.common.normalized_cut import exact_fp32
from crate_fast.eval.maskcut import maskcut

GRIDS = [(8, 8), (12, 12), (7, 13), (15, 10)]
pytestmark = pytest.mark.usefixtures("unsaved_figures")  # not of the shared run


def _random(seed: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Return features with little structure: noise of random strength around a few directions."""
    draw, grid = np.random.default_rng(seed), GRIDS[seed % len(GRIDS)]
    n, centres = math.prod(grid), draw.standard_normal((draw.integers(2, 6), 16))
    features = centres[draw.integers(len(centres), size=n)] + draw.uniform(0.3, 1.2) * draw.standard_normal((n, 16))
    return features, grid


def _structured(seed: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Return smooth features with rectangles and discs, like an image."""
    draw, grid = np.random.default_rng(1000 + seed), GRIDS[seed % len(GRIDS)]
    rows, columns = np.mgrid[: grid[0], : grid[1]]
    phases = [draw.uniform(0.1, 0.6) * rows + draw.uniform(0.1, 0.6) * columns + draw.uniform(0, 6) for _ in "abcd"]
    features = np.sin(np.stack(phases, axis=-1)) + draw.standard_normal(4)
    for _ in range(draw.integers(1, 4)):
        r, c, size = draw.integers(grid[0]), draw.integers(grid[1]), draw.uniform(1.5, 3.5)
        distance = np.hypot if draw.random() < 0.5 else np.maximum
        features[distance(abs(rows - r), abs(columns - c)) < size] = 2 * draw.standard_normal(4)
    return (features + 0.1 * draw.standard_normal(features.shape)).reshape(-1, 4), grid


@functools.cache
def _expected(make, seed: int) -> np.ndarray:
    return maskcut_oracle(*make(seed), 3, 0.15)


@pytest.mark.parametrize("make", [_random, _structured])
@pytest.mark.parametrize("seed", range(30))
def test_masks_equal_those_of_the_dense_definition(make, seed):
    features, grid = make(seed)
    expected = _expected(make, seed)
    result = maskcut(torch.from_numpy(features), 3, 0.15, grid=grid)
    assert np.array_equal(result.masks[0].numpy(), expected)
    assert result.residuals.nan_to_num().max() < 3e-6
    assert expected[0].any() or (affinity(features, 0.15, 0.0) == 1).all()


def test_a_batch_as_on_a_gpu_has_the_masks_of_its_images():
    """Images end after different numbers of masks; one whose patches are all alike has none."""
    seeds = range(0, 30, len(GRIDS))  # of one grid
    features = [_structured(seed)[0] for seed in seeds]
    batch = torch.from_numpy(np.stack([np.ones_like(features[0]), *features]))
    found = protocol._cut_batch(batch, 3, 0.15, GRIDS[0]).masks.numpy()
    assert not found[0].any()
    for masks, seed in zip(found[1:], seeds, strict=True):
        assert np.array_equal(masks, _expected(_structured, seed))
    assert len({int(masks.any(axis=(1, 2)).sum()) for masks in found}) > 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_masks_of_every_dtype_are_right_and_repeatable(dtype):
    features, grid = torch.from_numpy(_structured(4)[0]).to(dtype), GRIDS[0]
    first, again = (maskcut(features, grid=grid).masks for _ in range(2))
    assert torch.equal(first, again)
    assert np.array_equal(first[0].numpy(), maskcut_oracle(features.double().numpy(), grid, 3, 0.15))


MUTANTS = {
    "sign": (" * vector.gather(-1, first).sign()", ""),
    "component": ("(components == chosen) & (chosen > 0)", "foreground"),
    "no corner rule": (".sum() >= 3", ".sum() >= 5"),
    "two corners": (".sum() >= 3", ".sum() >= 2"),
    "painting": ("present.to(links.device)", "None"),
    "nothing dropped": (" and (turn == 0 or _worth_keeping(mask, previous[i]))", ""),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_oracle_rejects_wrong_versions(name, tmp_path):
    """Without any of MaskCut's rules, some masks of the sixty graphs differ."""
    changed, user = (normalized_cut, protocol) if name == "sign" else (protocol, None)
    wrong, differ = mutant(changed, MUTANTS[name], tmp_path, user).maskcut, 0
    for make, seed in itertools.product((_random, _structured), range(30)):
        features, grid = make(seed)
        differ += not np.array_equal(wrong(torch.from_numpy(features), grid=grid).masks[0], _expected(make, seed))
        if differ > 1:
            return
    pytest.fail(f"{differ} of sixty graphs differ")


def test_the_search_ends_when_all_remaining_patches_are_linked():
    """A documented difference: the reference would separate the painted patches from the rest."""
    features = torch.tensor([1.0, 0.0]).repeat(8, 8, 1)
    for area, solvers in ((0, [0, -1, -1]), (9, [0, 0, -1])):
        result = maskcut(features.flatten(0, 1), num_objects=3)
        assert result.masks[0].sum(dim=(1, 2)).tolist() == [area, 0, 0]
        assert result.solvers[0].tolist() == solvers
        features[2:5, 3:6] = torch.tensor([0.0, 1.0])


@pytest.mark.parametrize("backend", [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul])
def test_the_settings_of_reduced_precision_are_restored(backend):
    before, inside, seen = backend.fp32_precision, threading.Event(), threading.Event()

    def other_thread():
        with exact_fp32():
            inside.set()
            seen.wait(60)

    thread = threading.Thread(target=other_thread)
    try:
        backend.fp32_precision = "tf32"
        with exact_fp32():
            thread.start()
            inside.wait(0.2)
            assert backend.fp32_precision == "ieee"
        inside.wait(60)
        assert backend.fp32_precision == "ieee"  # the other thread still needs it
        seen.set()
        thread.join()
        maskcut(torch.randn(64, 8))
        assert backend.fp32_precision == "tf32"
    finally:
        seen.set()
        backend.fp32_precision = before


@pytest.mark.parametrize(("sizes", "solver"), [((20, 16, 28), 2), ((280, 250, 270, 210), 1), ((80, 36), 0)])
def test_nearly_disconnected_graphs_are_solved_again_in_fp64(sizes, solver):
    """With more than two islands, λ₂ and λ₃ are about 1e-5 apart; with two, no other eigenvalue is near λ₂."""
    block = torch.block_diag(*[torch.ones(n, n) for n in sizes])
    cut = normalized_cut.second_eigenvector(block[None])
    values, vector = second_eigenvector(np.where(block.numpy() > 0, 1.0, 1e-5))
    assert (values[1] - values[0] < 1e-3) == (solver > 0)
    assert cut.solver.tolist() == [solver]
    assert cut.eigenvalue.item() == pytest.approx(values[0], abs=1e-6)
    assert np.array_equal(cut.vector[0].numpy() > cut.vector[0].mean().item(), vector > vector.mean())


def test_the_eigenvector_solves_the_generalised_problem_also_without_convergence_of_the_first_solver(monkeypatch):
    matrix = affinity(_random(1)[0], 0.15, 1e-5)
    links, degrees = torch.from_numpy((matrix > 0.5).astype(np.float32))[None], matrix.sum(axis=1)
    for steps, solver in ((normalized_cut.MAX_STEPS, 0), (3, 2)):
        monkeypatch.setattr(normalized_cut, "MAX_STEPS", steps)
        cut = normalized_cut.second_eigenvector(links)
        v = cut.vector[0].double().numpy()
        v /= np.linalg.norm(np.sqrt(degrees) * v)
        direct = (degrees * v - matrix @ v - cut.eigenvalue.item() * degrees * v) / np.sqrt(degrees)
        assert np.linalg.norm(direct) < 5e-6
        assert cut.eigenvalue.item() == pytest.approx(second_eigenvector(matrix)[0][0], abs=1e-5)
        assert cut.solver.item() == solver


def test_bad_arguments_are_errors():
    for features, settings, message in (
        (torch.ones(60, 4), {}, "60 patches do not form a square grid"),
        (torch.ones(60, 4), {"grid": (5, 5)}, r"grid=\(5, 5\) does not fit the 60 patches"),
        (torch.ones(16, 4) / 0, {}, "NaN or infinity"),
        (torch.ones(4, 4).long(), {}, "torch.int64"),
    ):
        with pytest.raises(UserError, match=message):
            maskcut(features, **settings)


def test_masks_are_enlarged_and_encoded():
    masks = np.zeros((2, 4, 4), bool)
    masks[0, 1:3, :2] = True
    large = enlarge(masks, (40, 80), Image.Resampling.NEAREST)
    assert large[0, 10:30, :40].sum() == large[0].sum() == 20 * 40
    (entry,) = detections_of(large, 7)  # none for the empty mask
    assert (entry["bbox"], entry["image_id"]) == ([0.0, 10.0, 40.0, 20.0], 7)
    assert np.array_equal(rle.decode(entry["segmentation"]).astype(bool), large[0])
    half = enlarge(large, (20, 20), Image.Resampling.BICUBIC)
    assert half[0, 5:15, :10].sum() == half[0].sum() == 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"))


# pycocotools takes id 0 for "no match", and reads annotations of a repeated id twice
@pytest.mark.parametrize("of_annotation", [lambda number: number, lambda _: 7, "a{}".format])
def test_average_precision_equals_pycocotools_with_one_category_for_all_ids_and_categories(folder, of_annotation):
    coco = COCO(folder / "instances_val2017.json")
    content = json.loads((folder / "instances_val2017.json").read_text())
    for image in content["images"]:
        image["id"] = f"image {image['id']}"
    for number, annotation in enumerate(content["annotations"]):
        annotation |= {"id": of_annotation(number), "category_id": (50, "thing", 2)[number % 3]}
        annotation["image_id"] = f"image {annotation['image_id']}"
    renamed, before = index_of(**content), json.dumps(content)
    draw, detections = np.random.default_rng(1), []
    for annotation in coco.dataset["annotations"]:
        annotation["category_id"] = 1
        mask = np.roll(coco.annToMask(annotation)[None] > 0, draw.integers(-4, 5, 2), axis=(1, 2))
        detections += detections_of(mask, annotation["image_id"])
    coco.dataset["categories"] = [{"id": 1, "name": "object"}]
    coco.createIndex()
    named = [detection | {"image_id": f"image {detection['image_id']}"} for detection in detections]
    ours = class_agnostic_scores(renamed, named, list(renamed.imgs))
    for kind, drop in (("bbox", "segmentation"), ("segm", "bbox")):
        results = [{k: v for k, v in d.items() if k != drop} for d in detections]
        theirs = COCOeval(coco, coco.loadRes(results), kind)
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
        assert list(ours[kind].values()) == theirs.stats.tolist()
        assert 0 < ours[kind]["AP"] < 1
    assert json.dumps(content) == before  # the caller's annotations are not changed


def test_scores_of_perfect_and_of_no_detections_and_of_an_image_without_objects(folder):
    scenes = SceneImages(64, 3)
    perfect = [found for i in range(3) for found in detections_of(scenes[i].target.masks.numpy(), i)]
    assert class_agnostic_scores(scenes.coco, perfect, range(3))["segm"]["AP"] == pytest.approx(1.0)
    coco = COCO(folder / "instances_val2017.json")
    nothing = class_agnostic_scores(coco, [], list(coco.imgs))
    assert nothing["bbox"]["AP"] == nothing["segm"]["AR100"] == 0
    assert nothing["bbox"]["APl"] == -1  # pycocotools' value if no object is that large
    with pytest.raises(ValueError, match="none of the 1 images has an annotated object"):
        class_agnostic_scores(coco, [], [6])


def _words(folder, output, *more) -> list[str]:
    model = "crate_tiny_patch8_224@untrained --model-args depth=2 dim=32 heads=2 img_size=64"
    return [*model.split(), "--data", f"coco:{folder}", "--image-size", "64", "--output", str(output), *more]


def _run(folder, output, *more) -> dict:
    assert protocol.main(_words(folder, output, *more)) == 0
    return json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    return output, _run(folder, output, "--batch-size", "4")


def test_a_killed_run_on_a_data_set_continues_to_the_same_results(folder, whole, tmp_path, capsys, refuses):
    output, results = whole
    assert results["results"]["images"] == 6
    assert "box AP" in (output / "table.md").read_text()
    assert (output / "detections.png").stat().st_size > 1000
    detections = json.loads((output / "detections.json").read_text())
    assert len(detections) == results["results"]["detections"] > 0
    records = shutil.copytree(output / "records", tmp_path / "part" / "records") / "records-0.jsonl"
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join(lines[:2]) + lines[2][:40])  # killed while writing
    assert _run(folder, tmp_path / "part")["results"] == results["results"]
    assert "2 of 6 images were done before" in capsys.readouterr().out
    assert (tmp_path / "part" / "detections.json").read_text() == (output / "detections.json").read_text()
    refuses("tau: 0.15 there, 0.3 now", protocol.main, _words(folder, output, "--tau", "0.3"))


def test_unreadable_images_are_counted_also_in_a_resumed_run(tmp_path, capsys, refuses):
    folder, output = write_coco(tmp_path / "coco"), tmp_path / "out"
    refuses("tau=3.0: give a cosine from -1 to 1", protocol.main, _words(folder, output, "--tau", "3"))
    (folder / "val2017" / f"{1:012d}.jpg").write_bytes(b"not an image")
    first = _run(folder, output)
    assert (first["unreadable"]["count"], first["results"]["images"]) == (1, 5)
    assert "000000000001.jpg" in first["unreadable"]["images"][0]
    assert "unreadable images: 1" in capsys.readouterr().out
    again = _run(folder, output)
    assert again == first | {"provenance": again["provenance"]}
    for path in (folder / "val2017").iterdir():
        path.write_bytes(b"not an image")
    refuses("none of the 6 images could be read", protocol.main, _words(folder, tmp_path / "none"))
