"""A headless Chromium driven over its own pipe: the DevTools protocol, no port and no library between."""

import base64
import contextlib
import io
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

FLAGS = (
    "--headless",
    "--no-sandbox",  # containers; the pages are our own
    "--disable-gpu",
    "--enable-unsafe-swiftshader",  # the app's editor draws by WebGL, here without a GPU
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


def executable():
    """Chromium's path. Raises AssertionError saying how to get it."""
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    assert found, "found no chromium, expected one on the PATH: scripts/ensure_chromium.sh installs Debian's"
    return found


class Browser:
    """One process; messages are JSON ended by a zero byte, written to its descriptor 3 and read from its 4."""

    def __init__(self):
        self.profile = tempfile.mkdtemp(prefix="chromium-")
        inward, self.out = os.pipe()
        self.inward, outward = os.pipe()
        words = [executable(), *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        # The shell puts the pipe's ends where Chromium looks for them.
        script = f'exec "$@" 3<&{inward} 4>&{outward}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", *words],
            pass_fds=(inward, outward),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(inward)
        os.close(outward)
        self.number, self.buffer = 0, b""
        self.events = []

    def close(self):
        with contextlib.suppress(OSError):
            self.send("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.out)
        os.close(self.inward)
        shutil.rmtree(self.profile, ignore_errors=True)

    def send(self, method, session=None, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.out, data) :]
        return self.number

    def receive(self, deadline):
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.inward], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "Chromium did not answer in time"
            data = os.read(self.inward, 1 << 20)
            assert data, "Chromium has ended"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method, session=None, timeout=120.0, **parameters):
        """Sends a command and returns its result; events on the way are kept."""
        number, deadline = self.send(method, session, **parameters), time.monotonic() + timeout
        while True:
            message = self.receive(deadline)
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self.events.append(message)

    def page(self, width=1280, height=900, dark=False, mobile=False):
        """A new empty tab that shares nothing with the others."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, width, height, dark, mobile)
        page.context = context
        return page


class Page:
    """A tab that records every console error, uncaught exception and request."""

    def __init__(self, browser, session, width, height, dark, mobile):
        self.browser, self.session = browser, session
        for domain in ("Page", "Runtime", "Log", "Network", "Performance"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def call(self, method, **parameters):
        return self.browser.call(method, self.session, **parameters)

    def events(self, *methods):
        return [e for e in self.browser.events if e.get("sessionId") == self.session and e["method"] in methods]

    def open(self, path, anchor=""):
        """Goes to a file, or to an address that begins with http, and waits until it is loaded; returns seconds."""
        address = path if str(path).startswith("http://") else Path(path).resolve().as_uri()
        start = time.monotonic()
        before = len(self.events("Page.loadEventFired"))
        answer = self.call("Page.navigate", url=address + anchor)
        assert "errorText" not in answer, answer
        while len(self.events("Page.loadEventFired")) == before:
            self.browser.events.append(self.browser.receive(start + 120))
        return time.monotonic() - start

    def js(self, expression):
        """The value of an expression; promises are waited for."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression, timeout=10.0):
        """Until the expression is true; returns its value."""
        end = time.monotonic() + timeout
        while not (value := self.js(expression)):
            assert time.monotonic() < end, f"not true within {timeout} s: {expression}"
            time.sleep(0.01)
        return value

    def press(self, key, text=None):
        """A key as from a keyboard: a name of KEYS or a character."""
        code = {"windowsVirtualKeyCode": KEYS[key]} if key in KEYS else {}
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else None)
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **code, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    def choose(self, selector, value):
        """Sets a control as a person would: value, then its input event."""
        self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.value = {json.dumps(value)};"
            "e.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )

    def processor_time(self):
        """Seconds that the page's main thread has worked."""
        metrics = self.call("Performance.getMetrics")["metrics"]
        return next(m["value"] for m in metrics if m["name"] == "ThreadTime")

    def close(self):
        self.call("Page.close")

    def give(self, selector, *files):
        """Chooses files in an input for files."""
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")["result"]
        assert "objectId" in found, f"found no {selector}"
        self.call("DOM.setFileInputFiles", files=[str(file) for file in files], objectId=found["objectId"])

    def download_to(self, folder):
        """Where files go that the page gives to keep; without it they are refused."""
        self.browser.call(
            "Browser.setDownloadBehavior",
            behavior="allow",
            browserContextId=self.context,
            downloadPath=str(folder),
        )

    def mouse(self, kind, x, y, pressed=True):
        """A mouse event (mouseMoved, mousePressed, mouseReleased) at a place of the window."""
        button = {"button": "left", "buttons": 1} if pressed else {"button": "none", "buttons": 0}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, clickCount=1, pointerType="mouse", **button)

    def drag(self, places):
        """Moves the mouse to the first place (x, y), presses it, and releases it at the last one."""
        self.mouse("mouseMoved", *places[0], pressed=False)
        self.mouse("mousePressed", *places[0])
        for place in places:
            self.mouse("mouseMoved", *place)
        self.mouse("mouseReleased", *places[-1])

    def problems(self, origin=None):
        """What a person would see red in the console: errors, warnings, exceptions, requests that are not files.

        Requests to ``origin`` are a page's own.
        """
        self.js("1")  # lets pending events arrive
        found = [e["params"]["exceptionDetails"] for e in self.events("Runtime.exceptionThrown")]
        found += [
            e["params"] for e in self.events("Runtime.consoleAPICalled") if e["params"]["type"] in ("error", "warning")
        ]
        found += [e["params"]["entry"] for e in self.events("Log.entryAdded")]
        addresses = [e["params"]["request"]["url"] for e in self.events("Network.requestWillBeSent")]
        own = ("file:", "data:", "about:") if origin is None else ("data:", "about:", "blob:", origin)
        return found + [a for a in addresses if not a.startswith(own)]

    def pixels(self, selector):
        """What is seen of an element: its corner (x, y) in the window, and the pixels [H, W, 3] there."""
        x, y, width, height = self.js(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            "return [r.x, r.y, r.width, r.height]; })()"
        )
        clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
        answer = self.call("Page.captureScreenshot", format="png", clip=clip)
        return (x, y), np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["data"]))).convert("RGB"))

    def screenshot(self, path, full=False):
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(base64.b64decode(answer["data"]))
