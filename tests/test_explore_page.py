"""The explorer's page in headless Chromium; without one skipped, or failing if CRATE_FAST_REQUIRE_BROWSER=1."""

import csv
import io
import shutil

import numpy as np
import pytest
from explorer import SHIPPED, explorer_with, picture_file, served
from PIL import Image

from crate_fast.settings import require_browser

if not require_browser():
    pytest.importorskip("playwright")

FIGURES = ["picture", "masks", "sparsity", "attention", "components-all", "components-parts", "curves", "classes"]


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        (pytest.fail if require_browser() else pytest.skip)(f"none of {', '.join(names)} is in the path")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def explorer():
    models = (*SHIPPED, "nocls=vit_tiny_patch16_224@untrained", "crate_tiny_patch16_224@nowhere.pth")
    words = "class_token=false global_pool=avg num_classes=0 depth=2 img_size=32"  # of nocls; the others ignore them
    return explorer_with(*models, model_args=words.split())


@pytest.fixture(scope="module")
def address(explorer):
    with served(explorer) as found:
        yield found


class Visit:
    """An open page, the addresses it fetched, and its console messages."""

    def __init__(self, page, address: str):
        self.page, self.errors, self.fetched = page, [], []
        page.on("console", lambda message: self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.fetched.append(request.url))
        page.set_default_timeout(60_000)
        page.goto(address)

    def wait(self, shown: str, panel: int = 1) -> None:
        self.page.wait_for_selector(f"#panels > :nth-child({panel})[data-shown='{shown}']:not([aria-busy])")

    def choose(self, number: int) -> None:
        self.page.locator("#pictures label").nth(number).click()

    def upload(self, name: str, content: bytes) -> None:
        self.page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": content})

    def set_layer(self, layer: int, panel: int = 1) -> None:
        self.page.locator(".layer").nth(panel - 1).fill(str(layer))

    def wait_for_problem(self, words: str, where: str = "#problem") -> None:
        self.page.wait_for_selector(f"{where}:not([hidden]) >> text={words}")

    def hold(self, address: str) -> list:
        """Hold back requests to an address; return the list that collects them."""
        held: list = []
        self.page.route(address, lambda route: held.append(route))
        return held

    def ready(self, figure: str, panel: int = 1):
        """Return the canvas of a figure when it is drawn."""
        card = f"#panels > :nth-child({panel}) [data-figure={figure}]"
        self.page.wait_for_selector(f"{card}:not([hidden]) .png:not([disabled])")
        return self.page.query_selector(f"{card} canvas")

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

    def attends(self, inspection, layer: int, patch: int | None) -> list[dict]:
        """Check the attention table against an inspection, and return it."""
        rows, heads = self.table("attention"), inspection.attention(layer, patch)["heads"]
        assert [float(row["attention"]) for row in rows] == pytest.approx(np.ravel(heads).tolist(), rel=1e-6)
        return rows


@pytest.fixture
def visit(browser, address):
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    found = Visit(context.new_page(), address)
    found.wait("0/s0/2/cls")
    yield found
    context.close()


def test_a_picture_is_uploaded_explored_and_saved(visit, explorer, address):
    for figure in FIGURES:
        drawn = Image.open(io.BytesIO(visit.ready(figure).screenshot())).convert("RGB")
        assert len(drawn.getcolors(2**24)) > 20, figure
    data = picture_file(7, size=(300, 150))
    visit.upload("wide photo.png", data)
    key = explorer.pictures.add(data, "x")
    visit.wait(f"0/{key}/2/cls")
    canvas = visit.ready("picture")
    box = canvas.bounding_box()
    assert box["width"] / box["height"] == pytest.approx(2, abs=0.05)  # the picture's; the model's input is square
    canvas.click(position={"x": box["width"] * 0.53, "y": box["height"] * 0.28})  # row 4, column 8 of 16
    visit.wait(f"0/{key}/2/72")
    rows = visit.attends(explorer.inspection(0, key), 2, 72)
    assert {row["query"] for row in rows} == {"patch 4, 8"}
    assert [(row["head"], row["row"], row["column"]) for row in rows][257] == ("1", "0", "1")
    before = visit.ready("attention").screenshot()
    visit.page.locator(".layer").first.focus()
    visit.page.keyboard.press("ArrowLeft")
    visit.wait(f"0/{key}/1/72")
    assert visit.ready("attention").screenshot() != before
    name, picture = visit.saved("attention", "png")
    assert name == "attention_shipped-CRATE_wide-photo.png_layer1_patch-4-8.png"
    with Image.open(io.BytesIO(picture)) as file:
        assert file.width == 2000
        assert file.getpixel((0, 0)) == (255, 255, 255, 255)
    rates = [float(row["coding_rate"]) for row in visit.table("curves")]
    assert rates == pytest.approx(explorer.inspection(0, key).summary["coding_rate"])
    names = [entry["name"] for entry in explorer.inspection(0, key).summary["top"]]
    assert [row["name"] for row in visit.table("classes")] == names
    objects = {int(row["object"]) for row in visit.table("masks")}
    assert objects == set(range(len(explorer.inspection(0, key).masks(1)["masks"]) + 1))
    visit.page.keyboard.press("Tab")
    visit.page.click("#cls")
    visit.wait(f"0/{key}/1/cls")
    assert not visit.errors
    assert all(url.startswith((address, "blob:")) for url in visit.fetched)


def test_the_page_works_with_the_keyboard_alone(visit):
    page = visit.page

    def tab_to(condition: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate(f"document.activeElement.{condition}"):
                break

    tab_to("name === 'picture'")
    page.keyboard.press("ArrowDown")
    visit.wait("0/s1/2/cls")
    tab_to("tagName === 'CANVAS'")
    page.keyboard.press("ArrowRight")  # from the middle, 8, 8
    visit.wait("0/s1/2/137")
    page.keyboard.press("ArrowUp")
    visit.wait("0/s1/2/121")
    page.keyboard.press("Escape")
    visit.wait("0/s1/2/cls")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.className") in ("png", "csv", "layer")


def test_two_models_are_compared_side_by_side(visit, explorer):
    page = visit.page
    page.check("#compare")
    visit.wait("1/s0/3/cls", panel=2)
    assert "No ISTA" in visit.missing("sparsity", panel=2)
    page.locator(".model").nth(1).select_option(label="shipped:CRATE@untrained")
    visit.wait("2/s0/2/cls", panel=2)  # no layer was chosen: the paper's
    assert page.locator(".untrained").nth(1).is_visible()
    assert not page.locator(".untrained").nth(0).is_visible()
    visit.ready("components-all").click(position={"x": 10, "y": 60})  # the first layer
    visit.wait("0/s0/0/cls")
    visit.wait("2/s0/0/cls", panel=2)
    page.uncheck("#together")
    visit.set_layer(1, panel=2)
    visit.wait("2/s0/1/cls", panel=2)
    visit.wait("0/s0/0/cls")
    visit.ready("picture", panel=2).click(position={"x": 2, "y": 2})
    visit.wait("0/s0/0/0")
    visit.wait("2/s0/1/0", panel=2)
    page.uncheck("#compare")
    assert page.locator(".panel").count() == 1
    visit.attends(explorer.inspection(0, "s0"), 0, 0)
    assert not visit.errors
    page.check("#compare")
    page.goto("about:blank")
    page.go_back()
    visit.wait("0/s0/2/cls")
    assert page.locator(".panel").count() == 1 + page.is_checked("#compare")  # which the browser may restore


def test_after_quick_changes_the_last_choice_is_shown_and_without_an_answer_the_old_figure(visit, explorer):
    for number in (3, 5, 1, 7, 4):
        visit.choose(number)
    visit.wait("0/s4/2/cls")
    for layer in (0, 1, 2, 3, 0, 3, 1):
        visit.set_layer(layer)
    visit.wait("0/s4/1/cls")
    assert "layer 1" in visit.page.inner_text("#status")
    assert {row["layer"] for row in visit.attends(explorer.inspection(0, "s4"), 1, None)} == {"1"}
    assert not visit.errors
    visit.page.route("**/api/attention*", lambda route: route.abort())
    visit.set_layer(2)
    visit.wait_for_problem("is `crate-fast explore` still running", ".fault")
    visit.page.uncheck("#over")  # draws everything again
    assert "in layer 1" in visit.page.inner_text("[data-figure=attention] .caption")
    assert "layer1" in visit.saved("attention", "csv")[0]
    assert {row["layer"] for row in visit.attends(explorer.inspection(0, "s4"), 1, None)} == {"1"}
    visit.page.unroute("**/api/attention*")
    visit.set_layer(0)
    visit.wait("0/s4/0/cls")
    assert not visit.page.is_visible(".fault")


def test_a_model_without_cls_token_shows_the_attention_of_patches(visit):
    visit.page.select_option(".model", label="nocls")
    visit.page.wait_for_selector("#status >> text=no CLS token")
    assert "click a patch" in visit.missing("attention")
    visit.ready("picture").click(position={"x": 3, "y": 3})
    visit.wait("3/s0/1/0")
    assert {row["query"] for row in visit.table("attention")} == {"patch 0, 0"}


def test_a_slow_upload_replaces_no_newer_choice_and_a_file_can_be_dropped(visit, explorer, tmp_path):
    page, held = visit.page, visit.hold("**/api/pictures?name=slow.png*")
    slow, quick = picture_file(31), picture_file(32)
    with page.expect_request("**/api/pictures?name=slow.png*"):
        visit.upload("slow.png", slow)
    visit.upload("quick.png", quick)
    visit.wait(f"0/{explorer.pictures.add(quick, 'x')}/2/cls")
    held[0].continue_()
    page.wait_for_selector("#pictures [title='slow.png']")
    assert page.evaluate("document.querySelector('#pictures :checked').parentElement.title") == "quick.png"
    page.unroute("**/api/pictures?name=slow.png*")
    visit.upload("slow.png", slow)
    visit.wait(f"0/{explorer.pictures.add(slow, 'x')}/2/cls")
    assert page.locator("#pictures [title='slow.png']").count() == 1
    file = tmp_path / "dropped.png"
    file.write_bytes(picture_file(33))
    page.evaluate("document.body.append(Object.assign(document.createElement('input'), {type: 'file', id: 'other'}))")
    page.set_input_files("#other", file)
    drop = """() => {
      const dataTransfer = new DataTransfer();
      dataTransfer.items.add(document.getElementById("other").files[0]);
      document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true }));
    }"""
    page.evaluate(drop)
    visit.wait(f"0/{explorer.pictures.add(picture_file(33), 'x')}/2/cls")
    file.unlink()
    page.evaluate(drop)
    visit.wait_for_problem("dropped.png cannot be read")


def test_a_bad_picture_is_a_message_and_the_page_keeps_working(visit, tmp_path):
    held = visit.hold("**/api/picture?picture=s3&size=640*")
    with visit.page.expect_request("**/api/picture?picture=s3&size=640*"):
        visit.choose(3)
    (tmp_path / "large.png").write_bytes(bytes(21 * 2**20))
    visit.page.set_input_files("#file", tmp_path / "large.png")
    visit.wait_for_problem("20 MiB")
    held[0].continue_()
    visit.wait("0/s3/2/cls")
    assert visit.page.is_visible("#problem")  # newer than the choice
    assert not any("pictures" in url for url in visit.fetched)  # not uploaded
    visit.upload("broken.png", picture_file()[:-50])
    visit.wait_for_problem("cannot be read")
    visit.choose(2)
    visit.wait("0/s2/2/cls")
    assert not visit.page.is_visible("#problem")
    name = "<img src=x onerror=alert(1)>.png"  # shown as text
    visit.upload(name, picture_file(3))
    visit.page.wait_for_selector(f"#pictures >> text={name}")
    assert visit.page.locator("#pictures img[src=x]").count() == 0


def test_a_model_that_cannot_be_opened_and_an_error_of_the_server_are_messages(visit):
    visit.page.select_option(".model", label="crate_tiny_patch16_224@nowhere.pth")
    visit.wait_for_problem("nowhere.pth", ".fault")
    assert visit.page.locator("figure:visible").count() == 0
    assert [visit.page.inner_text(words) for words in (".facts", ".layer-number", "#status")] == [""] * 3
    visit.choose(1)
    visit.wait_for_problem("nowhere.pth", ".fault")
    visit.page.select_option(".model", label="shipped:ViT")
    visit.wait("1/s1/3/cls")
    assert not visit.page.is_visible(".fault")
    failure = {"status": 500, "content_type": "text/plain", "body": "Internal Server Error"}
    visit.page.route("**/api/*", lambda route: route.fulfill(**failure))
    visit.choose(3)
    visit.wait_for_problem("The explorer failed (500)")
    visit.page.reload()
    visit.wait_for_problem("The explorer failed (500)")
    assert visit.page.inner_text("#status") == ""
