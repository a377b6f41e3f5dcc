"""
The page in a real browser: Debian's Chromium, driven by Playwright, on the Space's own app.py and the bundled model.

With AUSM_SCREENSHOTS=FOLDER the tests leave pictures of what they see.
"""

import io
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ausm_hf import VideoWriter, read_video

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1200)]

CHROMIUM = "/usr/bin/chromium"
ROOT = Path(__file__).parents[2]
PATIENCE = 120_000  # milliseconds; most is over in two seconds where nothing else runs


@pytest.fixture(scope="module")
def temporary(tmp_path_factory) -> Path:
    """Where the server keeps what visitors bring and get."""
    return tmp_path_factory.mktemp("visitors")


@pytest.fixture(scope="module")
def server(tmp_path_factory, temporary):
    """The address of a Space."""
    pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'ausm-hf[demo]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("space")
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1"}
    environment["TMPDIR"] = str(temporary)
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, ROOT / "spaces" / "app.py"], cwd=folder, env=environment, stdout=log, stderr=log
        )
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "log").read_text()
            try:
                urllib.request.urlopen(address, timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        assert process.wait(30) == 143
        assert "Traceback" not in (folder / "log").read_text()
        assert not list(temporary.glob("ausm-demo-*"))


@pytest.fixture(scope="module")
def browser():
    if not Path(CHROMIUM).exists():
        pytest.skip(f"there is no browser at {CHROMIUM}: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"],
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server):
    """A function that opens the page as a new visitor, with a browser of its own memory."""
    contexts, errors = [], []

    def open_page(query: str = "", **options):
        contexts.append(browser.new_context(permissions=["camera"], **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server + query)
        page.wait_for_selector("#canvas .hint")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors


@pytest.fixture(scope="module")
def astronaut(tmp_path_factory) -> Path:
    """The clip of `make demo`, made shorter."""
    from skimage import data

    photo = Image.fromarray(data.astronaut()).crop((0, 0, 512, 480)).resize((256, 240))
    path = tmp_path_factory.mktemp("clips") / "astronaut.mp4"
    with VideoWriter(path, 12, (240, 240)) as writer:
        for t in range(12):
            writer.write(np.asarray(photo.crop((t, 0, t + 240, 240))))
    return path


def upload(page, path: Path):
    page.set_input_files("#upload input[type=file]", str(path))
    page.wait_for_function("document.querySelector('#facts').innerText.includes('seconds.')")


def at(page, x: float, y: float) -> tuple[float, float]:
    """Where on the screen a place of the frame is; x and y from 0 to 1."""
    canvas = page.locator("#canvas canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    return box["x"] + x * box["width"], box["y"] + y * box["height"]


def drag(page, *places: tuple[float, float]):
    page.mouse.move(*at(page, *places[0]))
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*at(page, *place), steps=4)
    page.mouse.up()


def canvas_picture(page) -> str:
    return page.evaluate("document.querySelector('#canvas canvas').toDataURL()")


def wait_for_canvas(page, frame: int, marks: int):
    """Until the canvas shows what the server made of so many marks, in this frame."""
    page.wait_for_selector(f"[data-marks='{marks}'][data-frame='{frame}'] canvas")


def wait_for_text(page, text: str) -> str:
    page.wait_for_function("text => document.querySelector('#live .text').innerText.includes(text)", arg=text)
    return page.inner_text("#live .text")


def downloaded(page, name: str) -> bytes:
    # Until the result has its size the buttons below it move, and a click that begins on one ends beside it.
    page.wait_for_function(
        """() => {
            const images = [...document.querySelectorAll('#strip img')];
            return document.querySelector('#player video')?.readyState >= 1
                && images.length && images.every((image) => image.complete);
        }"""
    )
    with page.expect_download() as download:
        page.click(f"#download-{name}")
    return Path(download.value.path()).read_bytes()


def downloaded_masks(page) -> list[np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(downloaded(page, "masks"))) as archive:
        return [np.array(Image.open(archive.open(name))) for name in sorted(archive.namelist())]


def shoot(page, name: str, **options):
    folder = os.environ.get("AUSM_SCREENSHOTS")
    if folder:
        page.wait_for_timeout(2000)
        page.screenshot(path=Path(folder) / f"{name}.png", **options)


def test_a_box_a_name_and_masks(visit, astronaut, tmp_path):
    page = visit(viewport={"width": 1200, "height": 900})
    upload(page, astronaut)
    assert "240 x 240 pixels, 12 frames" in page.inner_text("#facts")
    before = canvas_picture(page)
    page.click("button[data-kind=box]")
    drag(page, (0.1, 0.05), (0.8, 0.98))
    wait_for_canvas(page, 0, 1)
    assert canvas_picture(page) != before
    page.locator("#name input, #name textarea").press_sequentially("astronaut")
    page.wait_for_function("document.querySelector('#objects').innerText.includes('astronaut')")
    shoot(page, "space-mark", full_page=True)

    # The page itself notes what it shows: asked from outside, a busy machine would miss some of it.
    page.evaluate(
        """() => {
            window.texts = new Set();
            const note = () => window.texts.add(document.querySelector('#live .text')?.innerText ?? '');
            new MutationObserver(note).observe(document.body, {childList: true, subtree: true, characterData: true});
        }"""
    )
    page.click("#follow")
    page.wait_for_function("[...window.texts].some((text) => text.includes('Done'))")
    texts = page.evaluate("[...window.texts]")
    progress = [re.match(r"Frame (\d+) of 12, [\d.]+ frames per second, (\d+ seconds left|writing)", t) for t in texts]
    assert len([match for match in progress if match]) >= 2, texts
    assert page.is_hidden("#stop")

    masks = downloaded_masks(page)
    assert len(masks) == 12 and {mask.shape for mask in masks} == {(240, 240)}
    assert all(set(np.unique(mask)) <= {0, 1} for mask in masks)
    inside = masks[0][12:235, 24:192]
    assert inside.mean() > 0.3 and inside.sum() > 0.6 * masks[0].sum()
    (tmp_path / "overlay.mp4").write_bytes(downloaded(page, "overlay"))
    assert len(list(read_video(tmp_path / "overlay.mp4"))) == 12
    assert b'"name": "astronaut"' in downloaded(page, "coco")
    assert b'"segmentations"' in downloaded(page, "youtube_vis")

    row = page.inner_text("#table tbody tr")
    assert "astronaut" in row and "12 of 12" in row
    page.wait_for_function("document.querySelector('#player video').readyState >= 2")  # it plays
    assert page.locator("#strip img").count() >= 8
    shoot(page, "space", full_page=True)
    everything = page.get_attribute("#player video", "src")
    page.click("#table button[data-id='1']")
    page.wait_for_selector("#everything", state="visible")
    assert page.get_attribute("#player video", "src") != everything
    page.click("#everything")
    page.wait_for_selector("#everything", state="hidden")
    assert page.get_attribute("#player video", "src") == everything


def test_clicks_paint_a_second_object_and_a_later_frame(visit, astronaut):
    page = visit()
    upload(page, astronaut)
    page.mouse.click(*at(page, 0.3, 0.6))  # the tool that is chosen at first: a point on the object
    wait_for_canvas(page, 0, 1)
    page.get_by_role("button", name="Another object").click()
    page.wait_for_selector("#objects label:nth-of-type(2)")
    page.click("button[data-kind=paint][data-add='1']")
    drag(page, (0.75, 0.2), (0.75, 0.6))
    wait_for_canvas(page, 0, 2)
    page.fill("#frame input[type=number]", "7")
    page.press("#frame input[type=number]", "Enter")
    wait_for_canvas(page, 7, 2)
    drag(page, (0.9, 0.8), (0.95, 0.95))
    wait_for_canvas(page, 7, 3)
    page.fill("#frame input[type=number]", "9")
    page.press("#frame input[type=number]", "Enter")
    wait_for_canvas(page, 9, 3)
    page.get_by_role("button", name="Not in this frame").click()
    wait_for_canvas(page, 9, 4)
    assert page.inner_text("#canvas .note") == "Not in this frame: 2"
    shoot(page, "space-away", full_page=True)
    page.click("#follow")
    assert "2 objects" in wait_for_text(page, "Done")
    masks = downloaded_masks(page)
    assert (masks[0][60:140, 176:184] == 2).all()
    assert (masks[7][200:220, 218:224] == 2).mean() > 0.5
    assert (masks[8] == 2).any() and (masks[9] == 1).any() and not (masks[9] == 2).any()
    assert page.locator("#table tbody tr").count() == 2
    page.get_by_role("button", name="Clear all marks").click()
    page.wait_for_selector("#objects label:nth-of-type(2)", state="detached")
    page.click("#follow")
    page.wait_for_selector("text=Mark something first")
    page.wait_for_selector("#results", state="visible")  # the results stay
    page.click("#name textarea, #name input")
    page.keyboard.insert_text("pasted")
    page.click("#canvas .note, h1", force=True)
    page.wait_for_function("document.querySelector('#objects').innerText.includes('1 pasted')")


def test_a_mark_in_the_last_frame_goes_back_to_the_first_unless_asked_not_to(visit, astronaut):
    page = visit()
    upload(page, astronaut)
    page.fill("#frame input[type=number]", "11")
    page.press("#frame input[type=number]", "Enter")
    wait_for_canvas(page, 11, 0)
    page.click("button[data-kind=box]")
    drag(page, (0.1, 0.05), (0.8, 0.98))
    wait_for_canvas(page, 11, 1)
    page.click("#follow")
    assert "1 object" in wait_for_text(page, "Done: 12 frames")
    assert all((ids == 1).mean() > 0.1 for ids in downloaded_masks(page))
    page.uncheck("#backward input")
    page.click("#follow")
    page.wait_for_function("document.querySelector('#table')?.innerText.includes('1 of 12')")
    assert [bool((ids == 1).any()) for ids in downloaded_masks(page)] == [False] * 11 + [True]


def test_find_everything(visit, astronaut):
    page = visit()
    upload(page, astronaut)
    page.get_by_role("tab", name="Find everything").click()
    page.fill("#threshold input[type=number]", "0.3")
    shoot(page, "space-find")
    page.click("#find")
    wait_for_text(page, "Done")
    masks = downloaded_masks(page)
    rows = page.locator("#table tbody tr").count()
    assert len(masks) == 12
    assert rows == len(set(np.unique(np.stack(masks)).tolist()) - {0})


@pytest.fixture(scope="module")
def long_clip(astronaut, tmp_path_factory) -> Path:
    """One that takes a while: 180 frames."""
    path = tmp_path_factory.mktemp("clips") / "long.mp4"
    frames = list(read_video(astronaut))
    with VideoWriter(path, 12, (240, 240)) as writer:
        for frame in frames * 15:
            writer.write(frame)
    return path


def test_stop_ends_a_run_and_keeps_nothing(visit, long_clip):
    page = visit()
    upload(page, long_clip)
    page.get_by_role("tab", name="Find everything").click()
    page.click("#find")
    wait_for_text(page, "frames per second")
    page.click("#stop")
    text = wait_for_text(page, "Stopped")
    assert 0 < int(re.search(r"after (\d+) of 180 frames", text)[1]) < 180
    assert page.is_hidden("#results") and page.is_hidden("#stop")
    page.click("#find")  # it can be started again
    wait_for_text(page, "frames per second")
    page.click("#stop")
    wait_for_text(page, "Stopped")


def test_closing_the_page_stops_its_run_and_removes_its_files(visit, long_clip, temporary):
    def rooms() -> set[Path]:
        return set(temporary.glob("ausm-demo-*/rooms/*"))

    others = rooms()
    page = visit()
    upload(page, long_clip)
    page.get_by_role("tab", name="Find everything").click()
    page.click("#find")
    wait_for_text(page, "frames per second")
    # A page of before may be closing still, and have a room for a moment; it has no run.
    (run,) = {path for room in rooms() - others for path in room.glob("run-*")}
    room = run.parent
    seen = len(list((run / "key").iterdir()))
    page.close()
    give_up = time.monotonic() + PATIENCE / 1000
    while room.exists():
        assert time.monotonic() < give_up, f"the room is still there, with {seen} key frames when the page was closed"
        time.sleep(0.2)
    time.sleep(3)
    assert not room.exists()  # nor does the run write it anew
    page = visit()  # whoever comes next need not wait for the run of who has left
    upload(page, long_clip)
    page.get_by_role("tab", name="Find everything").click()
    page.click("#find")
    wait_for_text(page, "frames per second")
    page.click("#stop")
    wait_for_text(page, "Stopped")


def test_hostile_uploads_and_missing_marks_are_sentences(visit, astronaut, tmp_path):
    page = visit()
    page.click("#follow")
    page.get_by_text("Upload a video first, or take one of the examples.").wait_for()
    (tmp_path / "holiday.mp4").write_text("#EXTM3U\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n")
    page.set_input_files("#upload input[type=file]", str(tmp_path / "holiday.mp4"))
    page.get_by_text("This is no video that can be read here").wait_for()
    assert "/tmp" not in page.inner_text("body") and "passwd" not in page.inner_text("body")
    shoot(page, "space-refused")
    page = visit()
    upload(page, astronaut)
    page.click("#follow")
    page.get_by_text("Mark something first").wait_for()
    page.click("button[data-kind=point][data-add='0']")
    page.mouse.click(*at(page, 0.5, 0.5))
    page.get_by_text("First click on the object").wait_for()


def test_two_visitors_at_once(visit, astronaut, tmp_path):
    with VideoWriter(tmp_path / "other.mp4", 12, (96, 128)) as writer:
        for frame in list(read_video(astronaut))[:5]:
            writer.write(np.asarray(Image.fromarray(frame).resize((128, 96))))
    pages = [visit(), visit()]
    for page, path in zip(pages, (astronaut, tmp_path / "other.mp4")):
        upload(page, path)
        page.get_by_role("tab", name="Find everything").click()
        page.fill("#threshold input[type=number]", "0.1")
    for page in pages:
        page.click("#find")
    for page, shape, number in zip(pages, ((240, 240), (96, 128)), (12, 5)):
        assert f"{number} frames" in wait_for_text(page, "Done")
        assert [mask.shape for mask in downloaded_masks(page)] == [shape] * number


def test_an_example_on_a_phone_in_the_dark(visit):
    page = visit("?__theme=dark", viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page.locator("#component-0, body").first.wait_for()
    example = page.locator("button.gallery-item").first
    example.locator("video").evaluate("node => node.addEventListener('mouseover', () => { window.hovered = true; })")
    example.click()
    page.wait_for_function("document.querySelector('#facts').innerText.includes('48 frames')")
    assert not page.evaluate("window.hovered")  # Gradio would play the thumbnail, and interrupt that with a pause
    page.tap("button[data-kind=point][data-add='1']")
    page.touchscreen.tap(*at(page, 0.4, 0.7))
    wait_for_canvas(page, 0, 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#name input, #name textarea").press_sequentially("a very long name of an object")
    page.wait_for_function("document.querySelector('#objects').innerText.includes('of an object')")
    page.tap("#follow")
    wait_for_text(page, "Done")
    page.wait_for_selector("#table tbody tr")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert "dark" in page.evaluate("document.body.className")
    shoot(page, "space-phone", full_page=True)


def test_the_webcam(visit, temporary):
    """Chromium's fake camera: a green field with a pacman."""
    page = visit(viewport={"width": 1200, "height": 900})
    page.get_by_role("tab", name="Webcam").click()
    page.locator("#camera button").filter(has_text=re.compile("access", re.I)).first.click()
    page.locator("#camera button").filter(has_text=re.compile("record|start", re.I)).last.click()
    page.wait_for_function("/Frame ([2-9]|1\\d)/.test(document.querySelector('#camera_facts').innerText)")
    assert "frames per second" in page.inner_text("#camera_facts")
    assert page.locator("#seen img").count() == 1
    shoot(page, "space-webcam")
    # The server's end, after this last test, takes a while to remove these; frames still come meanwhile.
    many = next(temporary.glob("ausm-demo-*")) / "many"
    many.mkdir()
    for number in range(20_000):
        (many / str(number)).touch()
