"""The web app in a real Chromium: photos in, painted masks, a picture and its manifest out, plates, refusals.

One process of the app serves all tests; each has a page of its own. `make test-browser` makes the environment with
gradio that the process runs in.
"""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from nabla_jax import assets, images, plates
from nabla_jax.data import controls
from tests.browser.many_pairs import MARKUP
from tests.test_app import bomb

PYTHON = Path(".venv-app/bin/python").absolute()
BIRDS = assets.resolve("asset:toy-birds")
MEGABYTES = 2
STEPS = 2
SHOTS = Path(tempfile.gettempdir()) / "nabla_jax-screenshots"
TOAST = "[...document.querySelectorAll('.toast-body')].map(e => e.innerText).join(' ')"


class App:
    """The running command and its address."""

    def __init__(self, folder):
        assert PYTHON.is_file(), f"found no {PYTHON}, expected the one that make test-browser makes"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address, self.log = f"http://127.0.0.1:{self.port}", folder / "log"
        words = [PYTHON, "-m", "nabla_jax.app", "--port", self.port, "--max_upload_mb", MEGABYTES]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(word) for word in words],
                stdout=log,
                stderr=log,
                env={**os.environ, "TMPDIR": str(folder)},
            )
        end = time.monotonic() + 180
        while self.address not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise AssertionError(f"the app does not listen: {self.log.read_text()}")
            time.sleep(0.1)

    def end(self):
        """Interrupts it as Ctrl-C does; returns its exit status, negative if it had to be killed."""
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@pytest.fixture(scope="session")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    app = App(folder)
    yield app
    status = app.end()
    log = app.log.read_text()
    assert "Traceback" not in log, log
    assert status == 0, log
    # What was uploaded and drawn is gone; gradio leaves an empty folder.
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["log"]


@pytest.fixture
def page(browser, app, tmp_path):
    page = browser.page(1400, 1300)
    page.download_to(tmp_path / "down")
    page.open(app.address)
    seen(page, "#examples tbody tr", 60)
    seen(page, "#subject canvas")
    seen(page, "#target canvas")
    yield page
    # Warnings are of gradio's editor: names that its drawing library will drop, and drawing without a GPU.
    assert [p for p in page.problems(app.address) if not (isinstance(p, dict) and kind(p) == "warning")] == []
    page.close()


def kind(problem):
    """warning or error, of a message of the console or of the browser."""
    return problem.get("level", problem.get("type"))


def seen(page, selector, timeout=60):
    """Waits until there is such an element."""
    page.wait(f"document.querySelector({json.dumps(selector)}) !== null", timeout)


def upload(page, button, path):
    """Gives a file to the input that stands before an upload button."""
    found = "e => e.tagName === 'INPUT' && e.type === 'file'"
    page.js(
        f"(() => {{ let e = document.querySelector('#{button}');"
        f"while (!({found})(e)) e = e.previousElementSibling; e.setAttribute('data-for', '{button}'); }})()"
    )
    page.give(f"[data-for={button}]", path)


def wait_for(what, says, timeout=60.0):
    """Until ``what()`` is true; returns its value. ``says`` names it in the message if it never is."""
    end = time.monotonic() + timeout
    while not (found := what()):
        assert time.monotonic() < end, f"not within {timeout} s: {says}"
        time.sleep(0.1)
    return found


def wait_for_change(page, name, before, share):
    """Waits until more than a share of an editor's pixels differ from ``before``."""
    wait_for(
        lambda: (page.pixels(f"#{name} canvas")[1] != before).any(-1).mean() > share,
        f"the editor #{name} shows something else",
    )


def set_steps(page, name, value):
    page.js(
        f"(() => {{ const e = document.querySelector('#{name}-steps input[type=number]'); e.value = '{value}';"
        "e.dispatchEvent(new Event('input', {bubbles: true})); e.dispatchEvent(new Event('blur')); })()"
    )


def click(page, name):
    page.js(f"document.querySelector('#{name}').click()")


def download(page, button, folder, suffix):
    """The file that a download button gives."""
    click(page, button)
    return wait_for(lambda: next(folder.glob(f"*{suffix}"), None), f"#{button} gives a {suffix}")


def unpacked(page, name, folder):
    """What is in the archive of a result: file name -> path."""
    with zipfile.ZipFile(download(page, f"{name}-everything", folder / "down", ".zip")) as archive:
        archive.extractall(folder / "all")
    return {path.name: path for path in (folder / "all").iterdir()}


def toast(page):
    """What the page says in its corner, once it has come in."""
    page.wait("[...document.querySelectorAll('.toast-body')].some(e => getComputedStyle(e).opacity === '1')", 60)
    return page.js(TOAST)


def drawn(page, name):
    """Waits until the picture of a result is shown whole."""
    page.wait(f"document.querySelector('#{name} img')?.naturalWidth > 0", 180)
    page.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")


def sha256(pixels):
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def inputs(folder, number):
    """An example's photos as PNG, the subject under a name that is markup, and its masks."""
    found = {}
    for name in ("subject", "target"):
        pixels, found[f"{name}_mask"] = (
            controls.read_image(BIRDS / f"{name}_{number}.jpg"),
            BIRDS / f"{name}_{number}_mask.png",
        )
        found[name] = folder / (f"{MARKUP}.png" if name == "subject" else "target.png")
        images.write_image(pixels, found[name])
    return found


def test_from_upload_to_download(page, tmp_path):
    given = inputs(tmp_path, 0)
    for name in ("subject", "target"):
        blank = page.pixels(f"#{name} canvas")[1]
        upload(page, f"{name}-photo", given[name])
        wait_for_change(page, name, blank, 0.2)
        photo = page.pixels(f"#{name} canvas")[1]
        upload(page, f"{name}-mask", given[f"{name}_mask"])
        wait_for_change(page, name, photo, 0.05)
    set_steps(page, "repose", 12)
    page.js(
        "window.said = new Set(); new MutationObserver(() => { for (const e of document.querySelectorAll('#result *'))"
        " if (!e.children.length && /steps/.test(e.textContent)) window.said.add(e.textContent.trim()); })"
        ".observe(document.body, {subtree: true, childList: true, characterData: true})"
    )
    click(page, "draw")
    drawn(page, "result")
    page.screenshot(SHOTS / "app-repose.png")
    said = page.js("[...window.said]")
    assert len(said) > 1 and any(re.search(r"\b\d+/12 steps", text) for text in said), said
    files = unpacked(page, "result", tmp_path)
    assert sorted(files) == ["repose.json", "repose.png", "subject_mask.png", "target_mask.png"]
    manifest = json.loads(files["repose.json"].read_text())
    for name in ("subject", "target"):
        pixels, mask = controls.read_pair(given[name], given[f"{name}_mask"])
        assert manifest[name]["pixels_sha256"] == sha256(pixels)
        assert manifest[name]["mask_sha256"] == sha256(mask * np.uint8(255))
        np.testing.assert_array_equal(images.read_mask(files[f"{name}_mask.png"]), mask)
    alone = download(page, "result-picture", tmp_path / "down", ".png")
    assert alone.read_bytes() == files["repose.png"].read_bytes()
    assert manifest["sha256"] == hashlib.sha256(files["repose.png"].read_bytes()).hexdigest()
    assert (manifest["steps"], manifest["control"]) == (12, "fill")
    target, mask = controls.read_pair(given["target"], given["target_mask"])
    result = images.read_rgb(files["repose.png"])
    assert result.shape == target.shape
    # The place is the target's, and the bird has been drawn anew.
    apart = np.abs(result.astype(int) - target).mean(-1)
    assert apart[~mask].mean() < 40 and apart[mask].mean() > 10
    assert page.js("window.broken") is None


def test_a_mask_is_painted(page, tmp_path):
    given, (_, blank) = inputs(tmp_path, 12), page.pixels("#target canvas")
    page.js("document.querySelectorAll('#examples tbody tr')[4].click()")
    for name in ("subject", "target"):
        wait_for(
            lambda name=name: (page.pixels(f"#{name} canvas")[1].std(-1) > 5).mean() > 0.1, f"the example in #{name}"
        )
    before = page.pixels("#target canvas")[1]
    # The same photo without its mask, in another format: nothing is painted, and drawing says so.
    with PIL.Image.open(given["target"]) as picture:
        picture.save(tmp_path / "target.gif")
    upload(page, "target-photo", tmp_path / "target.gif")
    wait_for_change(page, "target", before, 0.02)
    set_steps(page, "repose", STEPS)
    click(page, "draw")
    assert "target.gif: there is no mask" in toast(page)
    (x, y), shown = page.pixels("#target canvas")
    # The square that is painted on, which fills most of the editor, has changed; labels and tools round it have not.
    square = (shown != blank).any(-1)
    rows, columns = (np.flatnonzero(square.mean(axis) > 0.5) for axis in (1, 0))
    middle = (x + (columns[0] + columns[-1] + 1) / 2, y + (rows[0] + rows[-1] + 1) / 2)
    reach = len(columns) / 6
    page.drag([(middle[0] + reach * (2 * i / 20 - 1), middle[1]) for i in range(21)])
    wait_for(lambda: (page.pixels("#target canvas")[1] != shown).any(-1).sum() > 500, "the stroke")
    page.screenshot(SHOTS / "app-painted.png")
    click(page, "draw")
    drawn(page, "result")
    files = unpacked(page, "result", tmp_path)
    mask = images.read_mask(files["target_mask.png"])
    height, width = images.read_rgb(given["target"]).shape[:2]
    assert mask.shape == (height, width)
    rows, columns = np.nonzero(mask)
    size = max(height, width)
    # A stroke through the middle, a third of the square long and as high as the brush.
    assert abs(rows.mean() - (height - 1) / 2) < 1.5 and abs(columns.mean() - (width - 1) / 2) < 1.5
    assert size / 3 <= np.ptp(columns) + 1 <= size / 3 + 5 and 2 <= np.ptp(rows) + 1 <= 4


def test_what_is_refused_is_one_line(page, tmp_path):
    bomb(tmp_path / "bomb.png", 20_000)
    upload(page, "subject-photo", tmp_path / "bomb.png")
    said = toast(page)
    assert "bomb.png" in said and "limit" in said and "Traceback" not in said and "/" not in said
    page.screenshot(SHOTS / "app-bomb.png")


def test_an_upload_that_is_too_large_is_refused(page, app, tmp_path):
    rng = np.random.default_rng(0)
    images.write_image(rng.integers(0, 256, (1000, 1000, 3), dtype=np.uint8), tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > MEGABYTES * 1e6
    upload(page, "subject-photo", tmp_path / "large.png")
    assert "maximum" in toast(page)
    # The page looks at the size itself; the server does, too.
    with (tmp_path / "large.png").open("rb") as file:
        body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="l.png"\r\n\r\n' + file.read()
    request = urllib.request.Request(
        f"{app.address}/gradio_api/upload",
        body + b"\r\n--b--\r\n",
        {"Content-Type": "multipart/form-data; boundary=b"},
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    assert caught.value.code == 413


def test_files_of_the_machine_are_not_served(app):
    for path in (
        "/etc/passwd",
        str(Path(__file__).absolute()),
        f"{BIRDS}/../../api.py",
        f"{BIRDS}/%2e%2e/%2e%2e/api.py",
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{app.address}/gradio_api/file={path}", timeout=60)
        assert caught.value.code in (403, 404)


def test_several_birds_on_a_plate(page, tmp_path):
    page.js("[...document.querySelectorAll('button[role=tab]')].find(e => e.textContent.trim() === 'Compare').click()")
    seen(page, "#example-plate")
    click(page, "add")
    assert "there is no photo" in toast(page)
    click(page, "example-plate")
    page.wait("document.querySelectorAll('#birds img').length === 5", 60)
    set_steps(page, "compare", STEPS)
    click(page, "draw-plate")
    drawn(page, "plate")
    page.screenshot(SHOTS / "app-compare.png", full=True)
    files = unpacked(page, "plate", tmp_path)
    manifest = json.loads(files["plate.json"].read_text())
    listed = plates.read_birds(BIRDS / "plate.csv")
    assert [row["label"] for row in manifest["birds"]] == [bird.label for bird in listed]
    assert {row["seed"] for row in manifest["birds"]} == {42}
    target, mask = controls.read_pair(BIRDS / "target_77.jpg", BIRDS / "target_77_mask.png")
    np.testing.assert_array_equal(images.read_mask(files["target_mask.png"]), mask)
    # The page is what plates makes of the birds' pictures that are in the archive.
    birds = [
        plates.Drawn(bird.label, controls.read_image(bird.picture), images.read_rgb(files[row["file"]]))
        for bird, row in zip(listed, manifest["birds"], strict=True)
    ]
    page_of_plates = images.read_rgb(files["plate.png"])
    assert np.abs(page_of_plates.astype(int) - plates.compose(birds, [], target, mask)).mean() < 1
    assert not (images.read_rgb(files["01.png"]) == images.read_rgb(files["02.png"])).all()
