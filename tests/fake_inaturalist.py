"""A local stand-in for iNaturalist's API and media hosts that can misbehave on demand."""

import functools
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image

OPEN = "https://inaturalist-open-data.s3.amazonaws.com"
Behaviour = Callable[["Handler"], None]


@functools.cache
def picture(number: int, format: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    """A small picture of noise, (height, width) ``size``, the same for the same number."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    server: "FakeServer"

    def do_GET(self) -> None:
        site = self.server.site
        with site.lock:
            site.log.append((self.path, dict(self.headers)))
            queue = site.script.get(urlsplit(self.path).path, [])
            behaviour = queue.pop(0) if queue else site.default
        behaviour(self)

    def reply(
        self, body: bytes, kind: str | None = "text/plain", status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        if kind is not None:
            self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:
            self.close_connection = True  # the client did not want the rest

    def log_message(self, *_: Any) -> None:
        pass


class FakeServer(ThreadingHTTPServer):
    site: "Site"
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        pass  # clients under test hang up


class Site:
    """Observations, photos by address, what each address does next (``script``), and every request (``log``)."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.observations: dict[int, dict[str, Any]] = {}
        self.files: dict[str, tuple[str | None, bytes]] = {}
        self.script: dict[str, list[Behaviour]] = {}
        self.log: list[tuple[str, dict[str, str]]] = []
        self.lock = threading.Lock()

    def add(self, observation: int, *photos: int, license_code: str | None = "cc-by-nc", format: str = "JPEG") -> None:
        """An observation with these photos, in this order."""
        entries = []
        for position, id in enumerate(photos):
            extension = {"JPEG": "jpeg", "PNG": "png", "GIF": "gif", "WEBP": "webp"}[format]
            photo = {
                "id": id,
                "license_code": license_code,
                "url": f"{OPEN}/photos/{id}/square.{extension}?1581761020",
                "attribution": f"(c) someone ü, photo {id}",
            }
            entries.append({"id": id + 7, "position": position, "photo": photo})
            data = picture(id, format)
            for size in ("original", "large", "medium"):
                self.files[f"/photos/{id}/{size}.{extension}"] = (f"image/{extension}", data)
        # The order of the answer is not that of the positions.
        self.observations[observation] = {"id": observation, "observation_photos": entries[::-1]}

    def default(self, handler: Handler) -> None:
        parts = urlsplit(handler.path)
        if parts.path == "/v1/observations":
            ids = [int(i) for i in parse_qs(parts.query)["id"][0].split(",")]
            results = [self.observations[i] for i in sorted(ids, reverse=True) if i in self.observations]
            body = {"total_results": len(results), "page": 1, "per_page": 30, "results": results}
            handler.reply(json.dumps(body).encode(), "application/json; charset=utf-8")
        elif parts.path in self.files:
            kind, data = self.files[parts.path]
            handler.reply(data, kind)
        else:
            handler.reply(b"<Error>", "application/xml", 403)  # what S3 says of what it does not have

    def asked(self, part: str) -> list[str]:
        """The addresses asked for that hold ``part``, in order."""
        return [path for path, _ in self.log if part in path]


@contextmanager
def serve() -> Iterator[Site]:
    """A site on a free port."""
    server = FakeServer(("127.0.0.1", 0), Handler)
    server.site = Site(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server.site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
