"""The app in a real headless Chromium: `make test-browser`. Not collected by `make test`, which must pass without a browser.

Every host but this machine is blocked, so the page must need nobody else. With SCREENSHOTS=folder images of it are left there.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from tests.app.test_app import BUDGET, answer, free_port
from tests.tiny import make_image, tiny_llava, tiny_processor
from visionzip import attach
from visionzip.app.looker import Looker
from visionzip.app.server import serve
from visionzip.app.ui import build

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps",
    "--window-size=1500,2000", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    binary = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.fail("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Address of the app, and the folder of its images. MODEL and IMAGE show it with something else than random weights."""
    folder = tmp_path_factory.mktemp("app")
    make_image(0).save(folder / "a.png")
    make_image(1, (60, 60)).save(folder / "b.png")
    if os.environ.get("MODEL"):
        import visionzip

        model, processor = visionzip.load(os.environ["MODEL"], config=visionzip.ZipConfig(dominant=13, contextual=3))
    else:
        model, processor = tiny_llava(), tiny_processor()
        attach(model, processor, BUDGET)
    start = os.environ.get("IMAGE", str(folder / "a.png"))
    server = serve(build(Looker(model, processor), os.environ.get("MODEL", "tiny"), start), port=free_port())
    yield server.address, folder
    server.close()


@pytest.fixture(scope="module")
def page(browser, setting):
    address, _ = setting
    browser.get(address)
    return Page(browser)


class Page:
    """What a person does to the page."""

    def __init__(self, browser):
        self.browser = browser

    def one(self, name, inner=""):
        return self.browser.find_element("css selector", f"#{name} {inner}".strip())

    def text(self, name):
        return self.one(name).text

    def value(self, name):
        return self.one(name, "textarea").get_attribute("value")

    def until(self, what, seconds=60):
        """Wait for a condition on the page, which Gradio redraws as it likes."""
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if what():
                    return
            except WebDriverException:
                pass
            time.sleep(0.1)
        raise AssertionError(f"waited {seconds} s in vain; errors: {self.errors()}")

    def source(self, name):
        return self.one(name, "img").get_attribute("src")

    def set_number(self, name, value):
        from selenium.webdriver.common.keys import Keys

        box = self.one(name, "input[type=number]")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(str(value), Keys.ENTER)

    def type(self, name, text):
        from selenium.webdriver.common.keys import Keys

        box = self.one(name, "textarea")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(text)
        assert box.get_attribute("value") == text

    def click_at(self, element, x, y):
        """At a share of its width and height."""
        from selenium.webdriver.common.action_chains import ActionChains

        size = element.rect
        ActionChains(self.browser).move_to_element_with_offset(
            element, (x - 0.5) * size["width"], (y - 0.5) * size["height"]
        ).click().perform()

    def errors(self):
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]

    def shoot(self, name):
        folder = os.environ.get("SCREENSHOTS")
        if folder:
            time.sleep(1.5)  # fades
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.browser.save_screenshot(str(Path(folder) / name))


def words(page):
    return page.text("words")


def test_1_opens_with_an_image(page):
    page.until(lambda: "visual tokens" in words(page))
    for name in ("heat", "kept", "merged", "look"):
        page.until(lambda name=name: page.source(name))
    assert page.errors() == []  # nothing asked of another host, no script that failed


def test_2_tokens_change_as_the_slider_moves(page):
    from selenium.webdriver.common.keys import Keys

    before = page.source("kept")
    page.set_number("dominant", 9)
    page.until(lambda: "8 patches and CLS as they are" in words(page))
    page.until(lambda: page.source("kept") != before)
    page.one("dominant", "input[type=range]").send_keys(Keys.ARROW_RIGHT)
    page.until(lambda: "9 patches and CLS as they are" in words(page))


def test_3_click_a_patch(page):
    page.click_at(page.one("look", "img"), 0.55, 0.85)  # row 4, column 3 of 4 × 4; row 8, column 5 of 9 × 9
    page.until(lambda: "Patch " in page.text("patch"))
    assert ("(row 4, column 3)" in page.text("patch")) or ("(row 8, column 5)" in page.text("patch"))
    page.until(lambda: page.source("attends") and page.source("attended"))


def test_4_ask_with_all_tokens_and_with_few(page):
    page.type("question", os.environ.get("QUESTION", "what is this"))
    if not os.environ.get("MODEL"):
        page.set_number("dominant", 5)
        page.until(lambda: "8 of 16 visual tokens" in words(page))
        page.set_number("length", 6)
    else:
        page.set_number("dominant", 13)
        page.until(lambda: "16 of 81 visual tokens" in words(page))
    page.one("ask").click()
    page.until(lambda: page.value("full") and page.value("few"))
    if not os.environ.get("MODEL"):
        assert (page.value("full"), page.value("few")) == (answer(None).text, answer(BUDGET).text)
    page.until(lambda: "compressed" in page.text("times"))
    page.shoot("app.png")


def test_5_another_image(page, setting):
    _, folder = setting
    before = page.source("look")
    page.one("image", "button[aria-label='Remove Image']").click()
    page.until(lambda: not page.browser.find_elements("css selector", "#image img"))
    page.one("image", "input[type=file]").send_keys(str(folder / "b.png"))
    page.until(lambda: page.source("look") != before)
    assert page.errors() == []


def test_6_a_file_that_is_no_image_gets_a_message(page, setting):
    _, folder = setting
    (folder / "broken.png").write_bytes(b"no image")
    page.one("image", "button[aria-label='Remove Image']").click()
    page.until(lambda: not page.browser.find_elements("css selector", "#image img"))
    page.one("image", "input[type=file]").send_keys(str(folder / "broken.png"))
    page.until(lambda: "unreadable image" in page.browser.find_element("tag name", "body").text)


def test_7_dark(browser, setting):
    address, _ = setting
    browser.get(f"{address}?__theme=dark")
    page = Page(browser)
    page.until(lambda: "visual tokens" in words(page))
    background = browser.execute_script("return getComputedStyle(document.querySelector('gradio-app')).backgroundColor")
    assert sum(int(part) for part in background.strip("rgba()").split(",")[:3]) < 150, background
    page.until(lambda: page.source("look"))
    page.shoot("app-dark.png")
