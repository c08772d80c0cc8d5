"""The fetcher against a local server that throttles, fails, truncates, redirects and lies."""

import dataclasses
import email.utils
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nabla_jax import fetch as fetch_module
from nabla_jax import images, runs
from nabla_jax.data import inaturalist, read_dataset
from nabla_jax.download import (
    REDIRECTS,
    Answer,
    Client,
    Clock,
    Limiter,
    Refused,
    Unobtained,
    backoff,
    origin,
    retry_after,
)
from nabla_jax.errors import UserError
from nabla_jax.fetch import Options, Summary, check_picture, fetch, parse_observations
from tests.fake_inaturalist import Behaviour, Handler, Site, picture, serve

COLUMNS = "observation_id,common_name,relative_path,photo_count,user_login,image_1,image_2"
API = "/v1/observations"
PHOTO = "/photos/9001/original.jpeg"
ROWS = [
    "111,Cactus Wren,images/Cactus_Wren/111,2,a,9002.jpg,9001.jpg",
    "222,Tūī,images/Tūī_×_’/222,3,b,photo_3.jpg,photo_1.jpg",
    '333,"Wren, Cactus",images/Cactus_Wren/333,2,c,9006.jpg,9007.jpg',
    "444,Redhead,images/Redhead/444,2,d,9008.jpg,photo_2.jpg",
]


class FakeTime:
    """A clock that only ``sleep`` moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.clock = Clock(lambda: self.now, lambda: self.now + 1.7e9, self._sleep)

    def _sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here cuts the power, and the disk is what these tests would wait for."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def site() -> Iterator[Site]:
    with serve() as site:
        site.add(111, 9001, 9002)
        site.add(222, 9003, 9004, 9005)
        site.add(333, 9006, 9007, format="PNG")
        site.add(444, 9008, 9009, format="GIF")
        yield site


def write_list(path: Path, rows: list[str] = ROWS, columns: str = COLUMNS) -> Path:
    path.write_text("\n".join([columns, *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_list(tmp_path / "list.csv")


def options(site: Site, **changes: object) -> Options:
    values = {"contact": "me@example.org", "api": site.url, "media": site.url, "timeout": 5.0} | changes
    return Options(**values)  # type: ignore[arg-type]


def run(site: Site, pairs: Path, out: Path, **changes: object) -> Summary:
    return fetch(pairs, out, options(site, **changes), clock=FakeTime().clock)


def manifest(out: Path) -> dict[str, dict]:
    return {row["image"]: row for row in map(json.loads, (out / "manifest.jsonl").read_text().splitlines())}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def status(code: int, **headers: str) -> Behaviour:
    return lambda h: h.reply(b"no", status=code, headers={k.replace("_", "-"): v for k, v in headers.items()})


def redirect(target: str, code: int = 302) -> Behaviour:
    return lambda h: h.reply(b"", status=code, headers={"Location": target})


def send(body: bytes, kind: str | None = "image/jpeg", **headers: str) -> Behaviour:
    return lambda h: h.reply(body, kind, headers={k.replace("_", "-"): v for k, v in headers.items()})


def truncate(h: Handler) -> None:
    body = picture(9001)
    h.send_response(200)
    h.send_header("Content-Type", "image/jpeg")
    h.send_header("Content-Length", str(len(body)))
    h.end_headers()
    h.wfile.write(body[: len(body) // 2])


def unbounded(h: Handler) -> None:
    h.send_response(200)
    h.send_header("Content-Type", "image/jpeg")
    h.end_headers()
    h.wfile.write(picture(9001)[:-200])


def chunked(h: Handler) -> None:
    h.protocol_version = "HTTP/1.1"
    h.send_response(200)
    h.send_header("Content-Type", "image/jpeg")
    h.send_header("Transfer-Encoding", "chunked")
    h.end_headers()
    for _ in range(100):
        h.wfile.write(b"10000\r\n" + bytes(2**16) + b"\r\n")
    h.wfile.write(b"0\r\n\r\n")
    h.close_connection = True


def endless(h: Handler) -> None:
    h.send_response(200)
    h.send_header("Content-Type", "image/jpeg")
    h.send_header("Content-Length", "1000000000000")
    h.end_headers()


def hang(h: Handler) -> None:
    time.sleep(0.6)
    h.close_connection = True


def trickle(h: Handler) -> None:
    h.send_response(200)
    h.send_header("Content-Type", "image/jpeg")
    h.send_header("Content-Length", "1000")
    h.end_headers()
    for _ in range(1000):
        h.wfile.write(b"\xff")
        h.wfile.flush()
        time.sleep(0.02)


def hang_up(h: Handler) -> None:
    h.close_connection = True
    h.connection.close()


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it is 30,000 x 30,000."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------------------------
# What is fetched
# ------------------------------------------------------------------------------------------------------------


def test_the_reader_reads_what_was_fetched(site: Site, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = run(site, pairs, out)
    assert (summary.photos, summary.fetched, summary.there, summary.status) == (8, 8, 0, 0)
    assert (out / "final_pairs.csv").read_bytes() == pairs.read_bytes()
    dataset = read_dataset(out)
    assert len(dataset.examples) == 8
    # Names to photos: by number, or by place in the observation's own order (the server answers in reverse).
    expected = {
        "images/Cactus_Wren/111/9002.jpg": (9002, "JPEG"),
        "images/Cactus_Wren/111/9001.jpg": (9001, "JPEG"),
        "images/Tūī_×_’/222/photo_3.jpg": (9005, "JPEG"),
        "images/Tūī_×_’/222/photo_1.jpg": (9003, "JPEG"),
        "images/Cactus_Wren/333/9006.jpg": (9006, "PNG"),
        "images/Cactus_Wren/333/9007.jpg": (9007, "PNG"),
        "images/Redhead/444/9008.jpg": (9008, "GIF"),
        "images/Redhead/444/photo_2.jpg": (9009, "GIF"),
    }
    rows = manifest(out)
    assert list(rows) == list(expected)
    for image, (id, format) in expected.items():
        data = picture(id, format)
        assert (out / image).read_bytes() == data
        extension = {"JPEG": "jpeg", "PNG": "png", "GIF": "gif"}[format]
        row = rows[image]
        assert row["source"] == f"{site.url}/photos/{id}/original.{extension}"
        assert (row["photo_id"], row["license_code"]) == (str(id), "cc-by-nc")
        assert row["attribution"] == f"(c) someone ü, photo {id}"
        assert (row["format"], row["height"], row["width"]) == (format.lower(), 40, 30)
        assert (row["bytes"], row["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    for example in dataset.examples:
        assert images.read_rgb(example.image).shape == (40, 30, 3)


def test_requests_say_who_asks(site: Site, pairs: Path, tmp_path: Path) -> None:
    run(site, pairs, tmp_path / "out")
    assert len(site.log) == 1 + 8
    for _, headers in site.log:
        assert headers["User-Agent"].startswith("nabla_jax/") and "(me@example.org)" in headers["User-Agent"]
        assert headers["Accept-Encoding"] == "identity"


def test_the_sizes(site: Site, pairs: Path, tmp_path: Path) -> None:
    run(site, pairs, tmp_path / "out", size="medium")
    assert len(site.asked("/medium.")) == 8


def test_addresses_of_the_real_hosts(site: Site) -> None:
    real = Options(contact="me@example.org")
    square = "https://static.inaturalist.org/photos/12/square.JPG?1234"
    assert fetch_module.photo_url(square, "12", real) == "https://static.inaturalist.org/photos/12/original.JPG"
    for url in (
        "https://static.inaturalist.org.evil.org/photos/12/square.jpg",
        "https://evil.org@127.0.0.1/photos/12/square.jpg",
        "https://static.inaturalist.org@evil.org/photos/12/square.jpg",
        "https://static.inaturalist.org:444/photos/12/square.jpg",
        "http://static.inaturalist.org/photos/12/square.jpg",
        "file:///photos/12/square.jpg",
        "//static.inaturalist.org/photos/12/square.jpg",
        "https://[/photos/12/square.jpg",
        "",
    ):
        with pytest.raises(Refused, match="host_refused"):
            fetch_module.photo_url(url, "12", real)
    for url in (
        "https://static.inaturalist.org/photos/13/square.jpg",
        "https://static.inaturalist.org/assets/copyright-infringement-square.png",
        "https://static.inaturalist.org/photos/12/square.jpg/../x",
    ):
        with pytest.raises(Refused, match="unexpected_url"):
            fetch_module.photo_url(url, "12", real)


def test_all_1073_observations_take_36_requests_of_the_api(site: Site, tmp_path: Path) -> None:
    rows = []
    for i in range(1073):
        names = ("photo_2.jpg", "photo_1.jpg") if i % 37 == 0 else (f"{2 * i + 10}.jpg", f"{2 * i + 11}.jpg")
        rows.append(f"{i + 1000},Bird {i % 395},images/Bird_{i % 395}/{i + 1000},2,u,{names[0]},{names[1]}")
        site.add(i + 1000, 2 * i + 10, 2 * i + 11, license_code=None)
    fake = FakeTime()
    moments: list[float] = []
    default = site.default
    site.default = lambda h: (moments.append(fake.now), default(h))[1]  # type: ignore[method-assign]
    summary = fetch(write_list(tmp_path / "list.csv", rows), tmp_path / "out", options(site), clock=fake.clock)
    assert summary.missing == {"all_rights_reserved": 2146}
    counts = [path.split("id=")[1].split("&")[0].count(",") + 1 for path in site.asked("/v1/observations")]
    assert counts == [30] * 35 + [23]
    assert min(np.diff(moments)) >= 1.0 - 1e-6  # 60 a minute


# ------------------------------------------------------------------------------------------------------------
# What is missing
# ------------------------------------------------------------------------------------------------------------


def delete(site: Site) -> None:
    del site.observations[111]


def withdraw(site: Site) -> None:
    del site.observations[111]["observation_photos"][1]  # 9001


def reserve(site: Site) -> None:
    site.observations[111]["observation_photos"][1]["photo"]["license_code"] = None


def hide(site: Site) -> None:
    site.observations[111]["observation_photos"][1]["photo"]["hidden"] = True


def elsewhere(site: Site) -> None:
    site.observations[111]["observation_photos"][1]["photo"]["url"] = "https://live.staticflickr.com/1/square.jpg"


def moderated(site: Site) -> None:
    site.observations[111]["observation_photos"][1]["photo"]["url"] = f"{site.url}/copyright-square.png"


def does(*behaviours: Behaviour) -> Callable[[Site], None]:
    return lambda site: site.script.update({PHOTO: list(behaviours)})


def loop(site: Site) -> None:
    site.script[PHOTO] = [redirect(PHOTO)] * 50


BEFORE_ASKING = (
    "observation_missing",
    "photo_missing",
    "all_rights_reserved",
    "photo_hidden",
    "host_refused",
    "unexpected_url",
)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (delete, "observation_missing"),
        (withdraw, "photo_missing"),
        (reserve, "all_rights_reserved"),
        (hide, "photo_hidden"),
        (elsewhere, "host_refused"),
        (moderated, "unexpected_url"),
        (does(status(404)), "status_404"),
        (does(status(410)), "status_410"),
        (does(status(304)), "status_304"),
        (does(redirect("http://localhost:1/photos/9001/original.jpeg")), "redirect_refused"),
        (does(redirect("https://static.inaturalist.org/photos/9001/original.jpeg")), "redirect_refused"),
        (does(redirect("file:///etc/passwd")), "redirect_refused"),
        (does(redirect("http://[")), "redirect_refused"),
        (does(redirect("")), "redirect_refused"),
        (loop, "redirect_refused"),
        (does(send(bytes(200_000))), "too_large"),
        (does(chunked), "too_large"),
        (does(endless), "too_large"),
        (does(send(picture(1)[:-700])), "not_a_picture"),
        (does(send(b"<html>sorry</html>")), "not_a_picture"),
        (does(send(b"")), "not_a_picture"),
        (does(send(bomb(), "image/png")), "not_a_picture"),
        (does(send(picture(1, "WEBP"), "image/webp")), "unsupported_format"),
        (does(send(picture(1, "TIFF"), "image/jpeg")), "not_a_picture"),
    ],
)
def test_a_photo_that_cannot_be_had(
    site: Site, pairs: Path, tmp_path: Path, spoil: Callable[[Site], None], reason: str
) -> None:
    spoil(site)
    out = tmp_path / "out"
    summary = run(site, pairs, out, max_bytes=100_000)
    assert summary.missing == {reason: 2 if spoil is delete else 1}
    assert (summary.status, summary.failed, summary.complete_rows) == (0, {}, 3)
    asked = 1 + REDIRECTS if spoil is loop else int(reason not in BEFORE_ASKING)
    assert len(site.asked("photos/9001")) == asked
    row = manifest(out)["images/Cactus_Wren/111/9001.jpg"]
    assert (row["status"], row["reason"]) == ("missing", reason)
    assert not (out / row["image"]).exists()
    # The rest is there, and the reader reads it; the rows that stay are the list's own bytes.
    assert len(read_dataset(out).examples) == 6
    lines = pairs.read_bytes().split(b"\n")
    assert (out / "final_pairs.csv").read_bytes() == b"\n".join(lines[:1] + lines[2:])
    # A further run finds the same without asking again.
    site.log.clear()
    before = contents(out)
    assert run(site, pairs, out, max_bytes=100_000).missing == summary.missing
    assert site.log == [] and contents(out) == before


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("222,Tui,images/Tui/222,2,b,photo_2.jpg,9003.jpg", "photo_count_changed"),
        ("222,Tui,images/Tui/222,3,b,photo_4.jpg,9003.jpg", "position_out_of_range"),
        ("222,Tui,images/Tui/222,3,b,photo_0.jpg,9003.jpg", "position_out_of_range"),
    ],
)
def test_a_place_that_no_longer_means_the_same_photo(site: Site, tmp_path: Path, row: str, reason: str) -> None:
    summary = run(site, write_list(tmp_path / "list.csv", [row]), tmp_path / "out")
    assert (summary.missing, summary.fetched) == ({reason: 1}, 1)
    assert summary.complete_rows == 0 and summary.status == 0


def test_photos_with_all_rights_reserved_are_fetched_when_asked_for(site: Site, pairs: Path, tmp_path: Path) -> None:
    reserve(site)
    out = tmp_path / "out"
    assert run(site, pairs, out).missing == {"all_rights_reserved": 1}
    assert manifest(out)["images/Cactus_Wren/111/9001.jpg"]["attribution"] == "(c) someone ü, photo 9001"
    site.log.clear()
    summary = run(site, pairs, out, include_all_rights_reserved=True)
    assert (summary.fetched, summary.there, summary.missing) == (1, 7, {})
    assert [path for path, _ in site.log] == ["/photos/9001/original.jpeg"]
    assert manifest(out)["images/Cactus_Wren/111/9001.jpg"]["license_code"] is None
    assert (out / "final_pairs.csv").read_bytes() == pairs.read_bytes()


def test_a_forbidden_photo_is_missing_and_asked_for_once_a_run(site: Site, pairs: Path, tmp_path: Path) -> None:
    del site.files[PHOTO]  # the default answer is the 403 of a bucket that does not have it
    for _ in range(2):
        site.log.clear()
        summary = run(site, pairs, tmp_path / "out")
        assert (summary.status, summary.missing) == (0, {"status_403": 1})
        assert len(site.asked(PHOTO)) == 1


def test_a_block_is_not_taken_for_missing_photos(site: Site, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for path in site.files:
        site.script[path] = [status(403)] * 2
    summary = run(site, pairs, out)
    assert summary.status == 75 and "5 requests in a row failed" in summary.stopped
    assert len(site.asked("/photos/")) == 5
    site.script.clear()
    assert run(site, pairs, out).fetched == 8


def test_refresh_asks_again_for_what_was_missing(site: Site, pairs: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    run(site, pairs, whole)
    does(status(404))(site)
    observation = site.observations.pop(333)
    assert run(site, pairs, out).missing == {"status_404": 1, "observation_missing": 2}
    site.observations[333] = observation
    site.log.clear()
    summary = run(site, pairs, out, refresh=True)
    assert (summary.fetched, summary.missing) == (3, {})
    assert len(site.log) == 1 + 3
    assert contents(out) == contents(whole)


# ------------------------------------------------------------------------------------------------------------
# What passes
# ------------------------------------------------------------------------------------------------------------

HTML = b"<html><body>Please sign in</body></html>"


@pytest.mark.parametrize(
    ("path", "behaviours"),
    [
        (PHOTO, [status(500), status(503)]),
        (PHOTO, [truncate]),
        (PHOTO, [unbounded]),
        (PHOTO, [send(HTML, "text/html; charset=utf-8"), send(b"{}", "application/json")]),
        (PHOTO, [send(picture(9001), "image/jpeg", Content_Encoding="gzip")]),
        (PHOTO, [hang_up]),
        (API, [status(500), status(429)]),
        (API, [send(HTML, "text/html")]),
        (API, [send(HTML, "application/json")]),
        (API, [send(b'{"results": [{"id": 111}]}', "application/json")]),
        (API, [send(b'{"results": 5}', "application/json"), send(b"[]", "application/json")]),
        (API, [hang_up]),
    ],
)
def test_a_failure_that_passes_leaves_no_trace(
    site: Site, pairs: Path, tmp_path: Path, path: str, behaviours: list[Behaviour]
) -> None:
    run(site, pairs, tmp_path / "whole")
    site.log.clear()
    site.script[path] = list(behaviours)
    assert run(site, pairs, tmp_path / "out").status == 0
    assert len(site.asked(path)) == len(behaviours) + 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_server_that_hangs_or_trickles(site: Site, pairs: Path, tmp_path: Path) -> None:
    site.script[PHOTO] = [hang, trickle]
    started = time.monotonic()
    clock = Clock(sleep=lambda seconds: time.sleep(seconds / 50))
    given = options(site, timeout=0.3, deadline=0.5)
    # Two waits of the back-off are real time here, shortened: at most 2 + 4 s, in slices.
    summary = fetch(pairs, tmp_path / "out", dataclasses.replace(given, attempts=3), clock=clock)
    assert summary.status == 0 and time.monotonic() - started < 10
    assert len(site.asked(PHOTO)) == 3


def test_content_without_a_type_is_told_by_its_bytes(site: Site, pairs: Path, tmp_path: Path) -> None:
    site.script[PHOTO] = [send(picture(9001), None)]
    site.script["/photos/9002/original.jpeg"] = [send(picture(9002), "binary/octet-stream")]
    assert run(site, pairs, tmp_path / "out").fetched == 8


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_on_the_same_host_is_followed(site: Site, pairs: Path, tmp_path: Path, code: int) -> None:
    site.files["/moved/9001"] = ("image/jpeg", picture(9001))
    site.script[PHOTO] = [redirect("/moved/9001", code)]
    run(site, pairs, tmp_path / "out")
    assert (tmp_path / "out/images/Cactus_Wren/111/9001.jpg").read_bytes() == picture(9001)


@pytest.mark.parametrize("path", [API, PHOTO])
@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(site: Site, pairs: Path, tmp_path: Path, path: str, form: str) -> None:
    fake = FakeTime()
    moments: list[float] = []

    def throttle(h: Handler) -> None:
        moments.append(fake.now)
        seconds = 37
        value = str(seconds) if form == "seconds" else email.utils.formatdate(int(time.time()) + seconds, usegmt=True)
        status(429, Retry_After=value)(h)

    def late(h: Handler) -> None:
        moments.append(fake.now)
        site.default(h)

    site.script[path] = [throttle, late]
    assert fetch(pairs, tmp_path / "out", options(site), clock=fake.clock).status == 0
    # The server's Date has whole seconds and may be one behind.
    assert moments[1] - moments[0] >= 37 - (form == "date")
    assert moments[1] - moments[0] < 45


def test_retry_after_holds_for_the_next_photo_too(site: Site, pairs: Path, tmp_path: Path) -> None:
    fake = FakeTime()
    moments: list[float] = []

    def note(h: Handler) -> None:
        moments.append(fake.now)
        (status(429, Retry_After="100") if len(moments) == 1 else site.default)(h)

    site.script["/photos/9002/original.jpeg"] = [note]
    site.script[PHOTO] = [note]
    summary = fetch(pairs, tmp_path / "out", options(site, attempts=1), clock=fake.clock)
    assert summary.failed == {"status_429": 1}
    assert moments[1] - moments[0] >= 100


def test_retry_after_values() -> None:
    now = 1_700_000_000.0
    date = email.utils.formatdate(now, usegmt=True)
    later = email.utils.formatdate(now + 90, usegmt=True)
    assert retry_after("120", None, now) == 120
    assert retry_after(" 0 ", None, now) == 0
    assert retry_after(later, None, now) == 90
    assert retry_after(later, date, now + 5000) == 90  # our clock is wrong, the server's counts
    assert retry_after(date, later, now) == 0
    for value in (None, "", "soon", "-5", "1e9", "1.5", "²", "Fri, 99 Nov 2099 99:99:99 GMT"):
        assert retry_after(value, None, now) is None


def test_back_off_doubles_with_a_jitter_of_its_own() -> None:
    for attempt in range(12):
        full = min(60.0, 2.0**attempt)
        values = [backoff(0, f"http://x/{i}", attempt) for i in range(400)]
        assert all(full / 2 <= v < full for v in values)
        assert abs(np.mean(values) - 0.75 * full) < 0.04 * full  # uniform: 5 standard errors
        assert len(set(values)) == 400
    assert backoff(0, "u", 3) == backoff(0, "u", 3) != backoff(1, "u", 3)


def test_what_failed_is_tried_by_the_next_run(site: Site, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(site, pairs, tmp_path / "whole")
    site.script[PHOTO] = [status(500)] * 5
    summary = run(site, pairs, out)
    assert (summary.status, summary.failed, summary.fetched) == (75, {"status_500": 1}, 7)
    assert manifest(out)["images/Cactus_Wren/111/9001.jpg"]["status"] == "failed"
    assert not (out / "final_pairs.csv").exists()
    with pytest.raises(UserError):
        inaturalist.read(out)
    site.log.clear()
    summary = run(site, pairs, out)
    assert (summary.status, summary.fetched, summary.there) == (0, 1, 7)
    assert [path for path, _ in site.log] == [PHOTO]
    assert contents(out) == contents(tmp_path / "whole")


def test_a_look_up_that_fails_is_tried_by_the_next_run(site: Site, pairs: Path, tmp_path: Path) -> None:
    site.script[API] = [status(502)] * 5
    summary = run(site, pairs, tmp_path / "out")
    assert (summary.status, summary.failed) == (75, {"look_up": 8})
    assert len(site.log) == 5
    assert run(site, pairs, tmp_path / "out").status == 0


def test_a_server_that_is_down_is_left_alone(site: Site, pairs: Path, tmp_path: Path) -> None:
    for path in site.files:
        site.script[path] = [status(503)] * 100
    summary = run(site, pairs, tmp_path / "out", attempts=3)
    assert summary.status == 75 and "5 requests in a row failed" in summary.stopped
    assert summary.failed == {"status_503": 4, "not_tried": 4}
    assert len(site.asked("/photos/")) == 5 * 3


@pytest.mark.parametrize(
    ("path", "behaviour", "text"),
    [
        (API, status(429, Retry_After="90000"), "asks to come back in 90000 s"),
        (PHOTO, status(503, Retry_After="4000"), "asks to come back in 4000 s"),
        (API, status(403), "refuses to answer"),
        (API, redirect("http://localhost:1/"), "redirect_refused"),
        (API, send(bytes(65_000_000), "application/json"), "too_large"),
    ],
)
def test_a_server_that_says_no_is_not_asked_again(
    site: Site, pairs: Path, tmp_path: Path, path: str, behaviour: Behaviour, text: str
) -> None:
    site.script[path] = [behaviour] * 2
    summary = run(site, pairs, tmp_path / "out")
    assert text in summary.stopped and summary.status == 75
    assert len(site.asked(path)) == 1
    site.script.clear()
    assert run(site, pairs, tmp_path / "out").status == 0


# ------------------------------------------------------------------------------------------------------------
# Limits
# ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 30)), min_size=1, max_size=80),
    st.lists(st.tuples(st.integers(400, 900), st.integers(1, 120)), min_size=1, max_size=3),
)
def test_no_window_ever_holds_more_than_its_limit(jobs: list[tuple[int, int]], windows: list[tuple[int, int]]) -> None:
    fake = FakeTime()
    limiter = Limiter(windows, fake.clock)
    events: list[tuple[float, int]] = []
    for amount, idle in jobs:
        fake.now += idle
        delay = limiter.delay(amount)
        if delay > 0:
            # No longer than needed: a moment earlier some window would be over its limit.
            early = fake.now + delay - 0.5
            assert any(sum(a for t, a in events if t > early - s) + amount > limit for limit, s in windows)
        fake.now += delay
        limiter.add(amount)
        events.append((fake.now, amount))
    for limit, seconds in windows:
        for start, _ in events:
            assert sum(a for t, a in events if start <= t < start + seconds) <= limit


def test_an_amount_that_never_fits_is_an_error() -> None:
    with pytest.raises(ValueError, match="at most 5"):
        Limiter([(5, 60)], FakeTime().clock).delay(6)


def test_the_volume_of_photos_is_capped(site: Site, pairs: Path, tmp_path: Path) -> None:
    size = max(len(data) for _, data in site.files.values())
    fake = FakeTime()
    moments: list[tuple[float, int]] = []
    default = site.default

    def note(h: Handler) -> None:
        if h.path in site.files:
            moments.append((fake.now, len(site.files[h.path][1])))
        default(h)

    site.default = note  # type: ignore[method-assign]
    cap = 3 * size
    given = options(site, max_bytes=size, bytes_per_hour=cap, bytes_per_day=2 * cap)
    fetch(pairs, tmp_path / "out", given, clock=fake.clock)
    assert len(moments) == 8
    for start, _ in moments:
        assert sum(n for t, n in moments if start <= t < start + 3600) <= cap
        assert sum(n for t, n in moments if start <= t < start + 86400) <= 2 * cap
    assert moments[-1][0] - moments[0][0] >= 3600  # it did wait


def test_a_restart_does_not_forget_the_volume(site: Site, pairs: Path, tmp_path: Path) -> None:
    size = max(len(data) for _, data in site.files.values())
    out = tmp_path / "out"
    site.script[PHOTO] = [status(500)] * 5
    run(site, pairs, out)
    photos = [out / row["image"] for row in manifest(out).values() if row["status"] == "fetched"]
    fake = FakeTime()
    for path in photos:
        os.utime(path, (0, fake.clock.wall() - 600))  # ten minutes ago
    given = options(site, max_bytes=size, bytes_per_hour=sum(p.stat().st_size for p in photos) + 1, seed=1)
    start = fake.now
    assert fetch(pairs, out, given, clock=fake.clock).fetched == 1
    assert 3000 <= fake.now - start < 3010


# ------------------------------------------------------------------------------------------------------------
# Stops and continuations
# ------------------------------------------------------------------------------------------------------------


def command(site: Site, pairs: Path, out: Path, *more: str) -> list[str]:
    words = ["--pairs", str(pairs), "--out", str(out), "--contact", "me@example.org", "--api", site.url]
    return [sys.executable, "-m", "nabla_jax.fetch", *words, "--media", site.url, *more]


def start(words: list[str]) -> subprocess.Popen[str]:
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.Popen(words, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def slowly(site: Site, h: Handler) -> None:
    """The answer in pieces."""
    time.sleep(0.01)
    kind, data = site.files[h.path]
    h.send_response(200)
    h.send_header("Content-Type", kind or "")
    h.send_header("Content-Length", str(len(data)))
    h.end_headers()
    for i in range(0, len(data), 1 + len(data) // 3):
        h.wfile.write(data[i : i + 1 + len(data) // 3])
        h.wfile.flush()
        time.sleep(0.005)


def big_site(site: Site, tmp_path: Path) -> Path:
    """40 photos that come slowly."""
    rows = []
    for i in range(20):
        site.add(i + 500, 2 * i + 10, 2 * i + 11)
        rows.append(f"{i + 500},Bird {i},images/Bird_{i}/{i + 500},2,u,{2 * i + 10}.jpg,photo_2.jpg")
    default = site.default
    site.default = lambda h: slowly(site, h) if h.path in site.files else default(h)  # type: ignore[method-assign]
    return write_list(tmp_path / "list.csv", rows)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_kill_9_leaves_a_folder_that_ends_byte_identical(site: Site, tmp_path: Path) -> None:
    pairs = big_site(site, tmp_path)
    run(site, pairs, tmp_path / "whole")
    out = tmp_path / "out"
    rng = np.random.default_rng(0)
    for more in (0, 1, 4, 9):
        site.log.clear()
        process = start(command(site, pairs, out))
        wait_for(lambda count=more: len(site.log) > count)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (out / "final_pairs.csv").exists()
        for path in out.rglob("*.jpg"):
            images.read_rgb(path)  # what has its name is whole
    process = start(command(site, pairs, out))
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "final_pairs.csv: 20 of 20 pairs have both photos" in text
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_folder_to_continue(site: Site, tmp_path: Path, signum: int) -> None:
    pairs = big_site(site, tmp_path)
    run(site, pairs, tmp_path / "whole")
    out = tmp_path / "out"
    site.log.clear()
    process = start(command(site, pairs, out))
    wait_for(lambda: len(site.log) > 5)
    process.send_signal(signum)
    _, message = process.communicate(timeout=30)
    assert process.returncode == 128 + signum
    assert message.splitlines()[-1].endswith("interrupted; the same command continues")
    rows = manifest(out)
    there = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert there == {*rows, ".lock", "manifest.jsonl", "observations.jsonl", "settings.json"}
    assert 4 <= len(rows) < 40
    summary = run(site, pairs, out)
    assert (summary.there, summary.fetched) == (len(rows), 40 - len(rows))
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("lost", range(1, 20))  # all there are
def test_a_death_at_any_write_loses_nothing(
    site: Site, pairs: Path, tmp_path: Path, lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two changes of the folder: a photo in place but not in the manifest among them."""
    run(site, pairs, tmp_path / "whole")
    writes = 0

    def dying(function: Callable) -> Callable:
        def write(*args: object) -> object:
            nonlocal writes
            writes += 1
            if writes == lost:
                raise KeyboardInterrupt
            return function(*args)

        return write

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_atomic", dying(runs.write_atomic))
        patch.setattr(runs.JsonLines, "extend", dying(runs.JsonLines.extend))
        with pytest.raises(KeyboardInterrupt):
            run(site, pairs, out)
    assert run(site, pairs, out).status == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_what_was_damaged_is_fetched_again(site: Site, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(site, pairs, out)
    whole = contents(out)
    site.log.clear()
    damaged = sorted(out.rglob("*.jpg"))
    damaged[0].unlink()
    damaged[1].write_bytes(damaged[1].read_bytes()[:-1] + b"?")
    damaged[2].write_bytes(b"")
    (damaged[3].parent / f".{damaged[3].name}.4242.tmp").write_bytes(b"half")
    with (out / "manifest.jsonl").open("ab") as file:
        file.write(b'{"image": "images/hal')
    summary = run(site, pairs, out)
    assert (summary.fetched, summary.there) == (3, 5)
    assert len(site.log) == 3
    assert contents(out) == whole


def test_a_finished_folder_that_lost_a_photo_is_not_finished(site: Site, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(site, pairs, out)
    (out / "images/Cactus_Wren/111/9001.jpg").unlink()
    site.script[PHOTO] = [status(500)] * 5
    assert run(site, pairs, out).status == 75
    assert not (out / "final_pairs.csv").exists()
    assert run(site, pairs, out).status == 0
    assert (out / "final_pairs.csv").read_bytes() == pairs.read_bytes()


def test_nothing_is_asked_when_everything_is_there(site: Site, pairs: Path, tmp_path: Path) -> None:
    run(site, pairs, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file() and p.name != ".lock"}
    site.log.clear()
    assert run(site, pairs, tmp_path / "out").there == 8
    assert site.log == []
    after = {p: p.stat().st_mtime_ns for p in before}
    assert after == before


# ------------------------------------------------------------------------------------------------------------
# Mistakes
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ("1,A,../outside,2,u,1.jpg,2.jpg", "relative_path"),
        ("1,A,images/../../outside,2,u,1.jpg,2.jpg", "relative_path"),
        ("1,A,/tmp/outside,2,u,1.jpg,2.jpg", "relative_path"),
        ("1,A,images//x,2,u,1.jpg,2.jpg", "relative_path"),
        ("1,A,images/.,2,u,1.jpg,2.jpg", "relative_path"),
        ("1,A,images/.hidden,2,u,1.jpg,2.jpg", "relative_path"),
        ("1,A,mask/x,2,u,1.jpg,2.jpg", "relative_path"),
        ("1,A,images\\..\\x,2,u,1.jpg,2.jpg", "relative_path"),
        ("1,A,images/a\u202eb,2,u,1.jpg,2.jpg", "relative_path"),
        ("1,A,images/a\x00b,2,u,1.jpg,2.jpg", "relative_path"),
        (f"1,A,images/{'x' * 201},2,u,1.jpg,2.jpg", "relative_path"),
        ("1,A,images/x,2,u,../1.jpg,2.jpg", "image_1"),
        ("1,A,images/x,2,u,1.jpg,/etc/passwd", "image_2"),
        ("1,A,images/x,2,u,1.jpg,2.jpg.exe", "image_2"),
        ("1,A,images/x,2,u,1.jpg,final_pairs.csv", "image_2"),
        ("1,A,images/x,,u,1.jpg,photo_1.jpg", "photo_count"),
        ("1&id=2,A,images/x,2,u,1.jpg,2.jpg", "observation_id"),
        ("١,A,images/x,2,u,1.jpg,2.jpg", "observation_id"),
        ("112,Cactus Wren,images/Cactus_Wren/111,2,a,9002.jpg,9001.jpg", "earlier row"),
    ],
)
def test_a_list_that_could_leave_the_folder_is_refused(site: Site, tmp_path: Path, row: str, found: str) -> None:
    pairs = write_list(tmp_path / "list.csv", [*ROWS, row])
    with pytest.raises(UserError, match=found) as error:
        run(site, pairs, tmp_path / "out")
    assert str(error.value).startswith(f"{pairs}:6: ") and "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["list.csv"] and site.log == []


@settings(max_examples=120, deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_every_accepted_path_is_inside(folder: str, name: str) -> None:
    values = {"relative_path": folder, "image_1": name, "photo_count": "2"}
    for values["relative_path"] in (folder, f"images/{folder}", f"images/a/{folder}/b"):
        for values["image_1"] in (name, f"{name}.jpg", "12.jpg", "photo_1.jpg"):
            try:
                photo = fetch_module._photo(inaturalist.Row(0, 2, "1", values), "image_1")
            except ValueError:
                continue
            path = os.path.normpath(os.path.join("/out", photo.path))
            assert path == f"/out/{photo.path}" and path.startswith("/out/images/")


def test_all_problems_are_counted(site: Site, tmp_path: Path) -> None:
    pairs = write_list(tmp_path / "list.csv", [*ROWS, "1,A,images/.x,2,u,1.jpg,2.jpg", "2,A,images/x,2,u,a,b"])
    with pytest.raises(UserError, match="3 more problems"):
        run(site, pairs, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "found"), [(None, "cannot be read"), ("a,b\n1,2\n", "observation_id"), ("", "found no")]
)
def test_an_unreadable_list_is_named(site: Site, tmp_path: Path, text: str | None, found: str) -> None:
    pairs = tmp_path / "my list.csv"
    if text is not None:
        pairs.write_text(text)
    with pytest.raises(UserError, match=found) as error:
        run(site, pairs, tmp_path / "out")
    assert str(error.value).startswith(str(pairs)) and "/tmp/tmp" not in str(error.value)


def test_a_folder_made_otherwise_is_left_alone(site: Site, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "images").mkdir(parents=True)
    write_list(out / "final_pairs.csv")
    before = contents(out)
    with pytest.raises(UserError, match="found final_pairs.csv, expected an empty folder"):
        run(site, pairs, out)
    assert {k: v for k, v in contents(out).items() if k != ".lock"} == before and site.log == []


def test_other_settings_are_refused(site: Site, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(site, pairs, out)
    with pytest.raises(UserError, match="size: 'original' there, 'large' here"):
        run(site, pairs, out, size="large")
    with pytest.raises(UserError, match="list_sha256"):
        run(site, write_list(tmp_path / "other.csv", ROWS[:2]), out)


def test_a_stranger_in_the_way_is_not_overwritten(site: Site, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    site.script[PHOTO] = [status(500)] * 5
    run(site, pairs, out)
    (out / "manifest.jsonl").write_text("")
    mine = out / "images/Cactus_Wren/111/9001.jpg"
    mine.write_bytes(b"mine")
    with pytest.raises(UserError, match="9001.jpg: is in the way"):
        run(site, pairs, out)
    assert mine.read_bytes() == b"mine"


def test_two_runs_in_one_folder_are_refused(site: Site, pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with runs.lock(tmp_path / "out/.lock", "other"), pytest.raises(UserError, match="another process"):
        run(site, pairs, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"contact": ""}, "--contact"),
        ({"contact": "me"}, "--contact"),
        ({"contact": "me@x\r\nHost: y"}, "--contact"),
        ({"rate": 61}, "--rate: found 61, expected 0.01 to 60"),
        ({"rate": float("nan")}, "--rate"),
        ({"bytes_per_hour": 6_000_000_000}, "--gb_per_hour"),
        ({"bytes_per_day": 25_000_000_000}, "--gb_per_day"),
        ({"max_bytes": 5_000_000, "bytes_per_hour": 1_000_000}, "--max_megabytes"),
        ({"attempts": 0}, "--attempts"),
        ({"timeout": float("inf")}, "--timeout"),
        ({"size": "huge"}, "--size"),
        ({"api": "ftp://x"}, "--api"),
        ({"media": "https://user@x"}, "--media"),
    ],
)
def test_options_that_make_no_sense(
    site: Site, pairs: Path, tmp_path: Path, changes: dict[str, object], found: str
) -> None:
    with pytest.raises(UserError, match=found):
        run(site, pairs, tmp_path / "out", **changes)
    assert site.log == [] and not (tmp_path / "out").exists()


def test_a_dry_run_asks_nothing_and_writes_nothing(
    site: Site, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--pairs", str(pairs), "--out", str(tmp_path / "out"), "--api", site.url, "--media", site.url, "--dry_run"]
    fetch_module.main(words)
    text = capsys.readouterr().out
    assert "8 photos of 4 observations" in text and "at most 1 requests" in text
    assert site.log == [] and not (tmp_path / "out").exists()


def test_exit_statuses(site: Site, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    site.script[PHOTO] = [status(404)]
    site.script["/photos/9002/original.jpeg"] = [truncate]
    for code, text in ((75, "failed: 1 truncated"), (0, "final_pairs.csv: 3 of 4 pairs")):
        process = start(command(site, pairs, out, "--attempts", "1"))
        stdout, _ = process.communicate(timeout=60)
        assert (process.returncode, text in stdout) == (code, True)
        assert "missing: 1 status_404" in stdout
    process = start(command(site, pairs, out, "--rate", "100"))
    _, message = process.communicate(timeout=60)
    assert process.returncode == 2 and message == "--rate: found 100, expected 0.01 to 60\n"


# ------------------------------------------------------------------------------------------------------------
# Answers that nobody would send
# ------------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "results", "observation_photos", "photo", "position", "url"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=120, deadline=None)
@given(JSON | st.builds(lambda x: {"results": [{"id": 111, "observation_photos": x}]}, JSON))
def test_any_json_is_an_answer_or_a_failure(value: object) -> None:
    try:
        rows = parse_observations(Answer("u", "application/json", json.dumps(value).encode()), ["111"])
    except Unobtained as error:
        assert error.reason == "unexpected_answer"
    else:
        assert [row["observation"] for row in rows] == ["111"]


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "GIF"]),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=8),
    st.integers(0, 4000),
)
def test_any_bytes_are_a_picture_or_refused(format: str, changes: list[tuple[int, int]], end: int) -> None:
    data = bytearray(picture(3, format))
    for place, value in changes:
        data[place % len(data)] = value
    try:
        fields = check_picture(Answer("u", "image/jpeg", bytes(data[: max(end, 20)])))
    except Refused as error:
        assert error.reason in ("not_a_picture", "unsupported_format")
    else:
        assert fields["height"] > 0


def test_the_client_has_no_other_way_out() -> None:
    """Only http and https are spoken: no file, ftp or data, and no handler that follows a redirect by itself."""
    opener = Client("x")._opener
    assert set(opener.handle_open) <= {"http", "https", "no"}  # type: ignore[attr-defined]
    assert opener.handle_error == {}  # type: ignore[attr-defined]
    for url in ("file:///etc/passwd", "ftp://x/y", "data:,x", "https://u:p@x/", "https:///x"):
        with pytest.raises(ValueError, match="expected http"):
            origin(url)
