"""The page of a run in headless Chromium: point at a word, and see its attention and its mask."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import numpy as np
import pytest

from synthgen import codecs
from synthgen.config import Choice
from synthgen.engines.local import Local
from synthgen.errors import UnitsFailed
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages.filter import Filter
from synthgen.stages.masks import Masks
from synthgen.viewers.page import write_page
from tests.factories import TrueMasks, make_run
from tests.stages.test_status import Picky
from tests.stages.test_view import EVIL, Evil

selenium = pytest.importorskip("selenium", reason="selenium is not installed: pip install -e .[dev]")
from selenium.webdriver import Chrome, ChromeOptions  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.actions.action_builder import ActionBuilder  # noqa: E402
from selenium.webdriver.common.actions.pointer_input import PointerInput  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="chromium or chromedriver is absent: apt-get install chromium chromium-driver"
)

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1200,900"
)
#: Which pixels of a sample's canvas are painted: one look at the middle of each pixel of the image.
PAINTED = """
const [canvas, width] = arguments, scale = canvas.width / width, height = canvas.height / scale;
const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
const rows = [];
for (let y = 0; y < height; y++) {
  rows.push([]);
  for (let x = 0; x < width; x++) {
    const start = 4 * (Math.floor((y + 0.5) * scale) * canvas.width + Math.floor((x + 0.5) * scale));
    rows[y].push([...data.slice(start, start + 4)]);
  }
}
return rows;
"""


class Page:
    """A page in the browser, and what a person does there."""

    def __init__(self, browser: Chrome) -> None:
        self.browser = browser

    def open(self, run: Run) -> Page:
        self.browser.get_log("performance"), self.browser.get_log("browser")  # of the page before
        self.browser.get(write_page(run).as_uri())
        return self

    def all(self, selector: str, root=None):
        return (root or self.browser).find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str, root=None):
        return (root or self.browser).find_element(By.CSS_SELECTOR, selector)

    def card(self, key: str):
        card = self.one(f'.card[data-key="{key}"]')
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", card)
        return card

    def hover(self, element) -> None:
        ActionChains(self.browser, duration=0).move_to_element(element).perform()

    def tap(self, element) -> None:
        finger = PointerInput("touch", "finger")
        actions = ActionBuilder(self.browser, mouse=finger, duration=0)
        actions.pointer_action.move_to(element).pointer_down().pointer_up()
        actions.perform()

    def key(self, *keys: str) -> None:
        ActionChains(self.browser).send_keys(*keys).perform()

    def shown(self, kind: str, word: str, root):
        """The canvas of this kind, once it shows that word."""
        canvas = self.one(f"canvas[data-kind={kind}]", root)
        self.until(lambda: canvas.get_attribute("data-word") == word and "on" in canvas.get_attribute("class").split())
        return canvas

    def until(self, condition) -> None:
        WebDriverWait(self.browser, 10, poll_frequency=0.05).until(lambda _: condition())

    def pixels(self, canvas, width: int = 64) -> np.ndarray:
        """The canvas at each pixel of the image: H W and red, green, blue, alpha."""
        return np.array(self.browser.execute_script(PAINTED, canvas, width))

    def text(self, selector: str) -> str:
        return self.one(selector).text


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = Chrome(options=options, service=Service(executable_path=str(DRIVER)))
    yield chrome
    chrome.quit()


@pytest.fixture
def page(browser: Chrome) -> Iterator[Page]:
    """A page that must fetch nothing and must not complain."""
    yield Page(browser)
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [item["params"] for item in messages if item["method"] == "Network.requestWillBeSent"]
    asked = [one["request"]["url"] for one in sent if one["documentURL"].startswith("file:")]  # not the browser's own
    assert asked
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert browser.get_log("browser") == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("runs") / "demo")


BOTH = "0000000002"  # a disc and a square


def truth(run: Run, key: str) -> np.ndarray:
    members = dict(run.read("masks", int(key[:6])))[key]
    return codecs.decode_masks(key, members).values


def test_pointing_at_a_word_shows_its_attention_and_its_mask(page: Page, run: Run) -> None:
    card = page.open(run).card(BOTH)
    words = page.all(".word", card)
    assert [word.text for word in words] == ["disc", "square"]
    seen = []
    for word, mask in zip(words, truth(run, BOTH), strict=True):
        page.hover(word)
        after = page.pixels(page.shown("after", word.text, card))
        assert np.array_equal(after[..., 3] > 0, mask)  # this word's pixels and no other
        before = page.pixels(page.shown("before", word.text, card))
        brightness = before[..., :3].sum(-1)
        assert brightness[mask].mean() > 2 * brightness[~mask].mean()  # heat where the word's attention is
        assert not np.array_equal(before, after)
        assert [caption.text for caption in page.all(".caption.on", card)] == ["before: attention", "after: mask"]
        seen.append(after)
    assert not np.array_equal(*seen)
    page.hover(page.one("h1"))
    page.until(lambda: not page.all("canvas[data-kind=before].on", card))
    rest = page.pixels(page.shown("after", "", card))
    assert np.array_equal(rest[..., 3] > 0, truth(run, BOTH).any(0))  # at rest: what the masks cut out


def test_pointing_at_an_image_shows_all_words_with_a_legend(page: Page, run: Run) -> None:
    card = page.open(run).card(BOTH)
    page.hover(page.one(".panes", card))
    after = page.pixels(page.shown("after", "all", card))
    disc, square = truth(run, BOTH)
    assert np.array_equal(after[..., 3] > 0, disc | square)
    assert abs(after[disc].mean(0) - after[square].mean(0)).max() > 40  # distinct colours
    page.until(lambda: page.one(".legend.on", card).text.split() == ["disc", "square"])
    assert page.pixels(page.shown("before", "all", card)).any()


def test_tapping_keeps_a_word_until_the_next_tap(page: Page, run: Run) -> None:
    card = page.open(run).card(BOTH)
    disc, square = page.all(".word", card)
    page.tap(square)
    page.shown("after", "square", card)
    page.shown("before", "square", card)
    assert square.get_attribute("aria-pressed") == "true"
    page.tap(disc)
    page.shown("after", "disc", card)
    assert square.get_attribute("aria-pressed") == "false"
    page.tap(disc)
    page.shown("after", "", card)


def test_the_keyboard_reaches_words_and_the_larger_view(page: Page, run: Run) -> None:
    card = page.open(run).card(BOTH)
    page.browser.execute_script("arguments[0].focus()", page.one(".panes", card))
    page.key(Keys.TAB)
    page.shown("after", "disc", card)
    page.key(Keys.TAB)
    page.shown("before", "square", card)
    page.key(Keys.ENTER)
    page.key(Keys.ESCAPE)
    page.shown("after", "", card)
    page.browser.execute_script("arguments[0].focus()", page.one(".panes", card))
    page.key(Keys.ENTER)
    dialog = page.one("dialog[open]")
    page.shown("after", "all", dialog)
    assert BOTH in dialog.text
    assert "0.500" in dialog.text  # the score
    page.hover(page.all("td .word", dialog)[1])
    square = page.pixels(page.shown("after", "square", dialog))
    assert np.array_equal(square[..., 3] > 0, truth(run, BOTH)[1])
    page.key(Keys.ARROW_RIGHT)
    page.until(lambda: "0000000003" in page.one("dialog[open]").text)
    page.key(Keys.ARROW_RIGHT)
    page.until(lambda: "0000000004" in page.one("dialog[open]").text)
    back = ActionChains(page.browser).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT)
    back.send_keys(Keys.ENTER).perform()  # from the button that closes to the one for the next sample
    page.until(lambda: "0000000005" in page.one("dialog[open]").text)
    page.key(Keys.ENTER)
    page.until(lambda: "0000010000" in page.one("dialog[open]").text)
    page.key(Keys.ESCAPE)
    page.until(lambda: not page.all("dialog[open]"))


def test_what_was_measured_of_a_mask_is_in_the_larger_view(page: Page, tmp_path) -> None:
    run = make_run(tmp_path / "measured", units=1, unit_size=3, masks=False)
    run_stage(Masks(min_area=0.1), run, Local(workers=1))
    members = dict(run.read("masks", 0))
    page.open(run)
    for key in members:
        described = json.loads(members[key]["json"])["masks"]
        confident = [mask["confidence"] for mask in described if not mask["dropped"]]
        card = page.card(key)
        assert ("confidence" in card.text) == bool(confident)
        page.one(".panes", card).click()
        dialog = page.one("dialog[open]")
        page.until(lambda dialog=dialog, key=key: key in dialog.text)
        head = [cell.text for cell in page.all("th", dialog)]
        assert head[2:] == ["confidence", "score", "area", "objects", "sharpness", "disagreement"]
        for row, mask in zip(page.all("tbody tr", dialog), described, strict=True):
            if mask["dropped"]:
                assert f"dropped: {mask['dropped']}" in row.text
            else:
                shown = [f"{mask[name]:.3f}" for name in ("confidence", "score")]
                assert row.text.split()[2:4] == shown
                assert row.text.split()[-3:] == ["1", f"{mask['sharpness']:.3f}", f"{mask['disagreement']:.3f}"]
        page.key(Keys.ESCAPE)
        page.until(lambda: not page.all("dialog[open]"))
    assert {bool(mask["dropped"]) for key in members for mask in json.loads(members[key]["json"])["masks"]} == {
        True,
        False,
    }


def test_search_class_and_order(page: Page, run: Run) -> None:
    page.open(run)
    assert [fact.text.rpartition(" ")[0] for fact in page.all(".facts > *")] == [
        "images",
        "masks",
        "words",
        "seed",
        "synthgen",
    ]
    assert page.text(".facts").count("0") == 3  # of the seed and of the version: a count of nothing is not told

    def keys():
        return [card.get_attribute("data-key") for card in page.all(".card") if card.is_displayed()]

    assert len(keys()) == 12
    page.one("#search").send_keys("Square DISC")
    page.until(lambda: len(keys()) == 4)
    assert page.text("#shown") == "4 of 12 shown"
    page.one("#search").send_keys(" zebra")
    page.until(lambda: not keys() and page.text("#empty") == "No sample matches.")
    page.one("#search").clear()
    page.one('#label option[value="square"]').click()
    page.until(lambda: len(keys()) == 4)
    page.one('#label option[value=""]').click()
    page.one('#sort option[value="low"]').click()
    page.until(lambda: len(keys()) == 12)


def test_the_head_tells_counts_timings_and_failures(page: Page, tmp_path) -> None:
    run = make_run(tmp_path / "some run", masks=False)
    with pytest.raises(UnitsFailed):
        run_stage(Picky(), run, Local(workers=1))
    page.open(run)
    assert page.text("h1") == "some run"
    stages = [stage.text for stage in page.all(".stage")]
    assert "12 samples" in stages[0]
    assert "samples/s" in stages[0]
    assert "1 unit failed" in stages[1]
    assert "1 of 2 units" in stages[1]
    assert "the disc is not round" in page.text("#failures")
    page.one('#only option[value="dropped"]').click()
    page.until(lambda: sum(card.is_displayed() for card in page.all(".card")) == 4)
    card = page.card("0000000001")
    page.hover(page.one(".word.lost", card))
    page.until(lambda: "dropped: too small: covers" in card.text)
    assert not page.pixels(page.one("canvas[data-kind=after]", card))[..., 3].any()


def test_the_filter_stands_between_masks_and_shards(page: Page, tmp_path) -> None:
    run = make_run(tmp_path / "run", distinct=5)
    names = ["generate", "masks", "filter", "shards", "pretrain", "evaluate"]
    page.open(run)
    assert [stage.text.split()[0] for stage in page.all(".stage")] == [name for name in names if name != "filter"]
    run_stage(Filter(filters=(Choice("duplicate"),)), run, Local(workers=1))
    page.open(run)
    stages = [stage.text.split() for stage in page.all(".stage")]
    assert [stage[0] for stage in stages] == names
    page.one('#only option[value="warned"]').click()
    page.until(lambda: sum(card.is_displayed() for card in page.all(".card")) == 7)


def test_words_that_were_cut_off_are_counted_apart_from_dropped_masks(page: Page, tmp_path) -> None:
    run = make_run(tmp_path / "run", units=1)
    mark = run.tar("masks", 0).with_suffix(".json")
    words = {"disc": {"samples": 4, "masks": 3, "dropped": {"too small": 1}}, "lamp": {"samples": 2, "cut_off": 2}}
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"tallies": {"labels": {}, "words": words}}))
    page.open(run)
    assert "dropped 1 cut off 2 words 2" in " ".join(page.text(".facts").split())
    page.one(".panel summary").click()
    rows = [row.text.split() for row in page.all(".panel[open] tbody tr")]
    assert rows == [["disc", "4", "3", "1", "1", "too", "small"], ["lamp", "2", "0", "0", "2", "cut", "off"]]


def test_prompts_that_hold_markup_are_shown_as_text(page: Page, tmp_path) -> None:
    run = Run.create(tmp_path / "evil")
    run_stage(Evil(units=1, unit_size=2), run, Local(workers=1))
    page.open(run)
    card = page.card("0000000000")
    assert page.one(".prompt", card).text == " ".join(EVIL.split()) + " a photo of a disc"
    assert page.browser.title == "evil · synthgen"
    assert not page.all("#grid script") + page.all('img[src="x"]') + page.all("#grid b")
    assert not page.all("canvas[data-kind=after]")  # there are no masks yet
    page.hover(page.one(".word", card))
    assert page.pixels(page.shown("before", "disc", card)).any()
    page.one(".panes", card).click()
    assert str(2**63) in page.one("dialog[open]").text


def test_a_run_without_images_says_so(page: Page, tmp_path) -> None:
    page.open(Run.create(tmp_path / "new"))
    assert page.text("#empty") == "No finished images yet."
    assert "synthgen generate" in page.text(".next")


def test_a_phone_needs_no_sideways_scrolling(page: Page, run: Run, tmp_path) -> None:
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        evil = Run.create(tmp_path / "evil")
        run_stage(Evil(units=1, unit_size=2), evil, Local(workers=1))
        run_stage(TrueMasks(), evil, Local(workers=1))
        for one in (run, evil):
            page.open(one)
            assert page.browser.execute_script("return document.documentElement.scrollWidth") == 390
            page.one(".card .panes").click()
            dialog = page.one("dialog[open]")
            assert page.browser.execute_script("return arguments[0].scrollWidth", dialog) <= 390
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
