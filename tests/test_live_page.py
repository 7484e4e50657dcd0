"""The page in a real browser: it connects, shows words, moves meters, draws what the memory learns, and says in words what is wrong.

`MOSHI_TTT_PICTURES=docs/pictures pytest tests/test_live_page.py` keeps the screenshots there.
"""

import os
import shutil
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from live_client import noise, serving, without_a_clock
from tiny import speaking_model

from modeling_moshi_ttt import MoshiTTTForConditionalGeneration, packaged
from modeling_moshi_ttt.data.audio import write_audio
from modeling_moshi_ttt.live.clips import demo_clips

playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright, of the extra dev")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page is tested in Chromium, which is not installed here")
FAKE = [
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
    "--no-sandbox",
]


@pytest.fixture
def browse(tmp_path, monkeypatch):
    """Open a page: `browse(port, path, microphone=True, **context)`; a message on its console fails the test."""
    without_a_clock(monkeypatch)
    said, asked = [], []
    write_audio(tmp_path / "user.wav", 3 * np.concatenate([frame.repeat(25) for frame in noise(4, 0)]), 24000)
    with playwright.sync_playwright() as driver:
        browsers = []

        def start(port, path="/", microphone=True, scripts=(), **context):
            sound = [f"--use-file-for-fake-audio-capture={tmp_path / 'user.wav'}"] if microphone else []
            fake = FAKE if microphone else [flag for flag in FAKE if "media-stream" not in flag]
            browsers.append(driver.chromium.launch(executable_path=CHROMIUM, args=[*fake, *sound]))
            page = browsers[-1].new_context(**context).new_page()
            page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: asked.append(urlsplit(request.url)))
            for script in scripts:
                page.add_init_script(script)
            page.goto(f"http://127.0.0.1:{port}{path}")
            return page

        yield start
        for browser in browsers:
            browser.close()
    assert said == []
    assert {url.hostname for url in asked if url.scheme != "data"} <= {"127.0.0.1"}  # it asks nothing of other servers


def picture(page, name: str, tmp_path) -> None:
    page.screenshot(path=Path(os.environ.get("MOSHI_TTT_PICTURES", tmp_path)) / f"{name}.png")


def words(page) -> str:
    return " ".join(page.locator("#transcript .moshi").all_text_contents())


def until(condition, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert condition()


def test_a_visitor_without_a_microphone_sees_that_it_remembers(processor, browse, tmp_path):
    model = MoshiTTTForConditionalGeneration.from_pretrained(packaged("model", "remembering")).eval()
    with serving(model, processor, tmp_path / "kept", clips=demo_clips(), name="remembering", sampling={"do_sample": False}) as (
        engine,
        port,
    ):
        page = browse(port, microphone=False, viewport={"width": 1280, "height": 800}, color_scheme="light")
        page.get_by_role("button", name="Tell it a name").click()
        until(lambda: engine.callers() and engine.callers()[0].frames > 150)  # attention reaches 70 frames
        page.get_by_role("button", name="Ask for the name").click()
        until(lambda: "Ana" in words(page))
        assert page.locator("#layers tr").count() == 2
        assert "layer 1" in page.locator("#losses").get_attribute("aria-label")
        assert float(page.locator("#factor").text_content()) > 0
        assert page.locator("#latency").text_content().endswith(" ms")
        picture(page, "page", tmp_path)
        page.set_viewport_size({"width": 390, "height": 844})
        picture(page, "page_phone", tmp_path)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.emulate_media(color_scheme="dark")
        page.set_viewport_size({"width": 1280, "height": 800})
        picture(page, "page_dark", tmp_path)


def test_talking_pausing_saving_hanging_up_and_going_on(processor, browse, tmp_path):
    with serving(speaking_model(), processor, tmp_path / "kept") as (engine, port):
        page = browse(port)
        page.keyboard.press("Tab")  # to the settings, to the transcript, to the microphone: all by keyboard
        page.locator("#call").focus()
        page.keyboard.press("Enter")
        until(lambda: words(page) != "")
        until(lambda: float(page.locator("#level-you").get_attribute("aria-valuenow")) > 0.1)
        until(lambda: float(page.locator("#level-moshi").get_attribute("aria-valuenow")) > 0.1)
        page.get_by_role("button", name="Pause").click()
        until(lambda: engine.callers()[0].paused)
        page.locator("#pause").click()
        until(lambda: not engine.callers()[0].paused)
        page.get_by_role("button", name="Save").click()
        until(lambda: "resume=" in (page.locator("#notice").text_content() or ""))
        with page.expect_download() as kept:
            page.get_by_role("button", name="Download sound").click()
        assert Path(kept.value.path()).read_bytes()[:4] == b"RIFF"
        page.get_by_role("button", name="Hang up").click()
        until(lambda: not engine.callers())
        before = len(words(page))
        page.locator("#resume").click()
        until(lambda: len(words(page)) > before)


def test_without_webcodecs_sound_goes_as_samples(processor, browse, tmp_path):
    with serving(speaking_model(), processor, tmp_path / "kept") as (_, port):
        page = browse(port, scripts=["delete window.AudioEncoder"])
        page.locator("#call").click()
        until(lambda: words(page) != "")
        assert page.evaluate("typeof AudioEncoder") == "undefined"


def test_what_is_wrong_stands_on_the_page_in_words(processor, browse, tmp_path):
    with serving(speaking_model(), processor, tmp_path / "kept", rows=1, token="secret") as (engine, port):
        page = browse(port, microphone=False)
        problem = page.locator("#problem")
        page.locator("#call").click()
        until(lambda: "`token` is missing or wrong" in (problem.text_content() or ""))
        page = browse(port, "/?token=secret&resume=" + 22 * "x", microphone=False)
        problem = page.locator("#problem")
        page.locator("#resume").click()
        until(lambda: "no conversation is kept" in (problem.text_content() or ""))
        engine.join(lambda event: None)
        page.locator("#call").click()
        until(lambda: "all 1 places are taken" in (problem.text_content() or ""))


def test_a_microphone_that_is_not_there_is_named(processor, browse, tmp_path):
    with serving(speaking_model(), processor, tmp_path / "kept") as (_, port):
        page = browse(port, microphone=False)
        page.locator("#call").click()
        until(lambda: "microphone" in (page.locator("#problem").text_content() or ""))


def test_no_serious_fault_for_screen_readers(processor, browse, tmp_path):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="accessibility is judged by axe, of the extra dev").Axe()
    with serving(speaking_model(), processor, tmp_path / "kept", clips=demo_clips()) as (_, port):
        for scheme in ("light", "dark"):
            page = browse(port, color_scheme=scheme, bypass_csp=True)
            page.locator("#call").click()
            until(lambda page=page: words(page) != "")
            found = [fault for fault in axe.run(page).response["violations"] if fault["impact"] in ("serious", "critical")]
            assert [(fault["id"], [node["html"] for node in fault["nodes"]]) for fault in found] == []
