"""The explorer's page, driven as a person would in a headless Chromium; skipped where there is none.

`CRATE_FAST_REQUIRE_BROWSER=1` makes a missing browser a failure.
"""

import csv
import io
import re
import shutil
import threading

import numpy as np
import pytest
import timm
from explorer import desk_with, huge_file, picture_file, served
from PIL import Image

from crate_fast.eval.common.features import extractor_for
from crate_fast.eval.common.models import LoadedModel
from crate_fast.eval.explore import offers
from crate_fast.eval.explore.offers import Offer, OpenModel, offers_of
from crate_fast.settings import require_browser
from crate_fast.train.data import Normalize

if not require_browser():
    pytest.importorskip("playwright")

FIGURES = ["picture", "masks", "sparsity", "attention", "components-all", "components-parts", "curves", "classes"]
SHOWN = "#panels > :nth-child({panel})[data-shown='{shown}']:not([aria-busy])"


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        assert not require_browser(), f"no browser here: {', '.join(names)} are not in the path"
        pytest.skip("no Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def desk():
    names = ("shipped:CRATE", "shipped:ViT", "shipped:CRATE@untrained")
    more = [Offer("nocls", "nocls", "nocls"), Offer("crate_tiny_patch16_224@nowhere.pth", "gone", "gone")]
    found = desk_with([offer for name in names for offer in offers_of(name)] + more)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, class_token=False, global_pool="avg", num_classes=0
    )
    subject = LoadedModel("nocls", model.eval(), Normalize("half"), extractor_for(model), {"parameters": 1})
    found.shelf._open[3] = OpenModel(subject, None, threading.Lock())
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(offers, "_OPEN_AT_ONCE", 9)
    yield found
    monkeypatch.undo()


@pytest.fixture(scope="module")
def address(desk):
    with served(desk) as found:
        yield found


class Visit:
    """An open page, and what it fetched and said."""

    def __init__(self, page, address: str):
        self.page, self.said, self.fetched = page, [], []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.fetched.append(request.url))
        page.set_default_timeout(60_000)
        page.goto(address)

    def wait(self, shown: str, panel: int = 1) -> None:
        self.page.wait_for_selector(SHOWN.format(panel=panel, shown=shown))

    def ready(self, figure: str, panel: int = 1):
        card = f"#panels > :nth-child({panel}) [data-figure={figure}]"
        self.page.wait_for_selector(f"{card}:not([hidden]) .png:not([disabled])")
        return self.page.query_selector(card)

    def missing(self, figure: str, panel: int = 1) -> str:
        card = self.page.locator(f"#panels > :nth-child({panel}) [data-figure={figure}]")
        assert card.locator(".png").is_disabled()
        assert not card.locator("canvas").is_visible()
        return card.locator(".caption").inner_text()

    def saved(self, figure: str, kind: str) -> tuple[str, bytes]:
        self.ready(figure)
        with self.page.expect_download() as download:
            self.page.click(f"[data-figure={figure}] .{kind}")
        return download.value.suggested_filename, download.value.path().read_bytes()

    def table(self, figure: str) -> list[dict]:
        return list(csv.DictReader(io.StringIO(self.saved(figure, "csv")[1].decode())))

    def pixels(self, figure: str) -> bytes:
        return self.ready(figure).query_selector("canvas").screenshot()


@pytest.fixture
def visit(browser, address):
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    found = Visit(context.new_page(), address)
    found.wait("0/s0/2/cls")
    yield found
    context.close()


def test_the_first_picture_comes_by_itself_and_nothing_from_elsewhere(visit, address):
    for figure in FIGURES:
        assert len(set(Image.open(io.BytesIO(visit.pixels(figure))).convert("RGB").get_flattened_data())) > 20, figure
    assert all(url.startswith((address, "blob:")) for url in visit.fetched)
    assert not visit.said


def test_upload_click_a_patch_change_the_layer_and_save(visit, desk, tmp_path):
    data = picture_file(7, size=(300, 150))
    photo = tmp_path / "wide photo.png"
    photo.write_bytes(data)
    visit.page.set_input_files("#file", photo)
    key = desk.pictures.add(data, "x")
    visit.wait(f"0/{key}/2/cls")
    canvas = visit.ready("picture").query_selector("canvas")
    box = canvas.bounding_box()
    assert box["width"] / box["height"] == pytest.approx(2, abs=0.05)  # as the picture, which the model sees squashed

    canvas.click(position={"x": box["width"] * 0.53, "y": box["height"] * 0.28})  # column 8, row 4 of 16
    visit.wait(f"0/{key}/2/72")
    rows = visit.table("attention")
    expected = desk.attention(0, key, 2, 72)["heads"]
    assert [float(row["attention"]) for row in rows] == pytest.approx(np.ravel(expected).tolist(), rel=1e-6)
    assert {row["query"] for row in rows} == {"patch 4, 8"}
    assert [(row["head"], row["row"], row["column"]) for row in rows][257] == ("1", "0", "1")

    before = visit.pixels("attention")
    visit.page.locator(".layer").first.focus()
    visit.page.keyboard.press("ArrowLeft")
    visit.wait(f"0/{key}/1/72")
    assert visit.pixels("attention") != before
    name, picture = visit.saved("attention", "png")
    assert name == "attention_shipped-CRATE_wide-photo.png_layer1_patch-4-8.png"
    with Image.open(io.BytesIO(picture)) as file:
        assert file.width == 2000
        assert file.getpixel((0, 0)) == (255, 255, 255, 255)
    rates = [float(row["coding_rate"]) for row in visit.table("curves")]
    assert rates == pytest.approx(desk.summary(0, key)["coding_rate"])
    assert [row["name"] for row in visit.table("classes")] == [entry["name"] for entry in desk.summary(0, key)["top"]]
    objects = {int(row["object"]) for row in visit.table("masks")}
    assert objects == set(range(len(desk.masks(0, key, 1)["masks"]) + 1))
    visit.page.keyboard.press("Tab")
    visit.page.click("#cls")
    visit.wait(f"0/{key}/1/cls")
    assert not visit.said


def test_the_keyboard_alone_is_enough(visit):
    page = visit.page
    page.keyboard.press("Tab")
    for _ in range(40):
        if page.evaluate("document.activeElement.name === 'picture'"):
            break
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    visit.wait("0/s1/2/cls")
    for _ in range(40):
        if page.evaluate("document.activeElement.tagName === 'CANVAS'"):
            break
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")  # from the middle, 8, 8
    visit.wait("0/s1/2/137")
    page.keyboard.press("ArrowUp")
    visit.wait("0/s1/2/121")
    page.keyboard.press("Escape")
    visit.wait("0/s1/2/cls")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.className") in ("png", "csv", "layer")


def test_two_models_side_by_side(visit, desk):
    page = visit.page
    page.check("#compare")
    visit.wait("1/s0/3/cls", panel=2)
    assert "No ISTA" in visit.missing("sparsity", panel=2)
    page.locator(".model").nth(1).select_option(label="shipped:CRATE@untrained")
    visit.wait("2/s0/2/cls", panel=2)  # nobody has chosen a layer: the paper's
    assert page.locator(".untrained").nth(1).is_visible()
    assert not page.locator(".untrained").nth(0).is_visible()
    visit.ready("components-all").query_selector("canvas").click(position={"x": 10, "y": 60})  # the first layer's
    visit.wait("0/s0/0/cls")
    visit.wait("2/s0/0/cls", panel=2)
    page.uncheck("#together")
    page.locator(".layer").nth(1).fill("1")
    visit.wait("2/s0/1/cls", panel=2)
    visit.wait("0/s0/0/cls")
    canvas = visit.ready("picture", panel=2).query_selector("canvas")
    canvas.click(position={"x": 2, "y": 2})
    visit.wait("0/s0/0/0")
    visit.wait("2/s0/1/0", panel=2)
    page.uncheck("#compare")
    assert page.locator(".panel").count() == 1
    rows = visit.table("attention")
    expected = np.ravel(desk.attention(0, "s0", 0, 0)["heads"]).tolist()
    assert [float(row["attention"]) for row in rows] == pytest.approx(expected, rel=1e-6)


def test_quick_hands_see_the_last_choice(visit, desk):
    labels = visit.page.locator("#pictures label")
    for number in (3, 5, 1, 7, 4):
        labels.nth(number).click()
    visit.wait("0/s4/2/cls")
    slider = visit.page.locator(".layer")
    for layer in "0123031":
        slider.fill(layer)
    visit.wait("0/s4/1/cls")
    assert "layer 1" in visit.page.inner_text("#status")
    rows = visit.table("attention")
    assert {row["layer"] for row in rows} == {"1"}
    expected = np.ravel(desk.attention(0, "s4", 1, None)["heads"]).tolist()
    assert [float(row["attention"]) for row in rows] == pytest.approx(expected, rel=1e-6)
    assert not visit.said


def test_what_has_not_been_answered_is_not_labelled_as_if(visit, desk):
    visit.ready("attention")
    visit.page.route("**/api/attention*", lambda route: route.abort())
    visit.page.locator(".layer").fill("1")
    visit.page.wait_for_selector(".fault:not([hidden])")
    visit.page.uncheck("#over")  # draws everything again
    assert "in layer 2" in visit.page.inner_text("[data-figure=attention] .caption")
    name, data = visit.saved("attention", "csv")
    assert "layer2" in name
    rows = list(csv.DictReader(io.StringIO(data.decode())))
    assert {row["layer"] for row in rows} == {"2"}
    expected = np.ravel(desk.attention(0, "s0", 2, None)["heads"]).tolist()
    assert [float(row["attention"]) for row in rows] == pytest.approx(expected, rel=1e-6)
    visit.page.unroute("**/api/attention*")
    visit.page.locator(".layer").fill("0")
    visit.wait("0/s0/0/cls")
    assert not visit.page.is_visible(".fault")


def test_a_model_without_cls_says_so_and_shows_patches(visit):
    visit.page.select_option(".model", label="nocls")
    visit.page.wait_for_selector("#status >> text=no CLS token")
    assert "click a patch" in visit.missing("attention")
    visit.ready("picture").query_selector("canvas").click(position={"x": 3, "y": 3})
    visit.wait("3/s0/1/0")
    assert {row["query"] for row in visit.table("attention")} == {"patch 0, 0"}


@pytest.mark.parametrize("size", [(12, 1200), (1200, 12)])
def test_a_strip_of_a_picture_can_be_seen(visit, tmp_path, size):
    (tmp_path / "strip.png").write_bytes(picture_file(5, size))
    visit.page.set_input_files("#file", tmp_path / "strip.png")
    visit.page.wait_for_selector("#status >> text=attention of CLS")
    box = visit.ready("picture").query_selector("canvas").bounding_box()
    assert 0.3 < box["width"] / box["height"] < 3.1
    with Image.open(io.BytesIO(visit.saved("attention", "png")[1])) as file:
        assert max(file.size) < 10000


def test_a_panel_that_is_closed_asks_and_says_nothing_more(visit):
    visit.page.route("**/api/summary?model=1*", lambda route: route.abort())
    visit.page.check("#compare")
    visit.page.uncheck("#compare")
    visit.page.locator(".layer").fill("1")
    visit.wait("0/s0/1/cls")
    assert visit.page.inner_text("#status").startswith("shipped:CRATE: layer 1")
    assert not [line for line in visit.said if "ERR_FAILED" not in line]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("broken.png", picture_file()[:-50], "cannot be read"),
        ("notes.png", b"a text", "no image that can be read"),
        ("huge.png", huge_file(), "100 megapixels"),
    ],
)
def test_a_bad_picture_is_a_message_and_the_page_goes_on(visit, tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    visit.page.set_input_files("#file", tmp_path / name)
    visit.page.wait_for_selector(f"#problem:not([hidden]) >> text={reason}")
    visit.page.locator("#pictures label").nth(2).click()
    visit.wait("0/s2/2/cls")
    assert not visit.page.is_visible("#problem")


def test_a_picture_that_is_too_large_is_not_sent(visit, tmp_path):
    (tmp_path / "large.png").write_bytes(bytes(21 * 2**20))
    visit.page.set_input_files("#file", tmp_path / "large.png")
    visit.page.wait_for_selector("#problem:not([hidden]) >> text=20 MiB")
    assert not any("pictures" in url for url in visit.fetched)


def test_a_model_that_cannot_be_opened_is_a_message(visit):
    visit.page.select_option(".model", label="gone")
    visit.page.wait_for_selector(".fault:not([hidden]) >> text=nowhere.pth")
    assert visit.page.locator("figure:visible").count() == 0
    assert visit.page.inner_text(".facts") == ""
    visit.page.locator("#pictures label").nth(1).click()
    visit.page.wait_for_selector(".fault:not([hidden]) >> text=nowhere.pth")
    visit.page.select_option(".model", label="shipped:ViT")
    visit.wait("1/s1/3/cls")
    assert not visit.page.is_visible(".fault")


def test_a_files_name_is_text(visit, tmp_path):
    name = "<img src=x onerror=alert(1)>.png"
    (tmp_path / name).write_bytes(picture_file(3))
    visit.page.set_input_files("#file", tmp_path / name)
    visit.page.wait_for_selector(f"#pictures >> text={name}")
    assert visit.page.locator("#pictures img[src=x]").count() == 0


@pytest.mark.parametrize("width", [380, 1024, 1366, 2200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_width(browser, address, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 768}, color_scheme=scheme)
    found = Visit(context.new_page(), address)
    found.wait("0/s0/2/cls")
    found.page.check("#compare")
    found.wait("1/s0/3/cls", panel=2)
    assert found.page.evaluate("document.documentElement.scrollWidth") <= width
    ground = found.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == (scheme == "dark")
    context.close()


def test_a_server_that_has_gone_is_said(browser, desk):
    with served(desk) as address:
        context = browser.new_context()
        found = Visit(context.new_page(), address)
        found.wait("0/s0/2/cls")
        found.page.route("**/api/attention*", lambda route: route.abort())
        found.page.locator(".layer").fill("1")
        found.page.wait_for_selector(".fault:not([hidden]) >> text=is `crate-fast explore` still running")
        found.page.unroute("**/api/attention*")
        found.page.locator(".layer").fill("3")
        found.wait("0/s0/3/cls")
        assert not found.page.is_visible(".fault")
        context.close()
