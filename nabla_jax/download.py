"""Polite, bounded and suspicious HTTP: limits on requests and volume, retries, hosts that may be asked.

A server is trusted with nothing: every answer is limited in size and time, compared with the length it declares and
handed to a check before it counts; a redirect to a host that is not on the list is refused. Standard library only.
"""

import dataclasses
import datetime
import email.utils
import hashlib
import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

REDIRECTS = 5
BACKOFF = 1.0  # seconds before the second attempt; doubles
MAX_BACKOFF = 60.0
MAX_RETRY_AFTER = 3600.0  # a server that asks for more is left alone: the run ends and can be continued later
FORBIDDEN = ("status_401", "status_403")  # reasons: gone, or blocked for now
_SLICE = 0.5  # seconds: how long a pause may go without looking for a signal
_MOVED = (301, 302, 303, 307, 308)
_PASSING = (408, 425, 429)  # and everything from 500


class Unobtained(Exception):
    """Something was not obtained: ``reason`` is one word of a fixed set, ``detail`` says more in one line."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Refused(Unobtained):
    """It will not get better: gone, too large, not what was asked for, a host that may not be asked."""


class Failed(Unobtained):
    """It may pass: the same request can succeed later."""


class Unavailable(Exception):
    """The server wants to be left alone for now; the work can be continued later."""


@dataclasses.dataclass(frozen=True)
class Clock:
    """Time as this module sees it; tests bring their own."""

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep


class Limiter:
    """Sliding windows: in any ``seconds`` at most ``limit`` of something, for each (limit, seconds) of ``windows``.

    Windows are half open: what happened exactly ``seconds`` ago no longer counts.
    """

    def __init__(self, windows: Sequence[tuple[float, float]], clock: Clock) -> None:
        self._clock = clock
        self._windows = [(limit, seconds, deque[tuple[float, float]]()) for limit, seconds in windows]

    def delay(self, amount: float) -> float:
        """Seconds until ``amount`` fits. Raises ValueError for an amount that never does."""
        now = self._clock.monotonic()
        longest = 0.0
        for limit, seconds, events in self._windows:
            if amount > limit:
                raise ValueError(f"found an amount of {amount}, expected at most {limit}")
            while events and events[0][0] + seconds <= now:
                events.popleft()
            excess = sum(a for _, a in events) + amount - limit
            for moment, a in events:
                if excess <= 0:
                    break
                excess -= a
                longest = max(longest, moment + seconds - now)
        return longest

    def add(self, amount: float, age: float = 0.0) -> None:
        """Counts ``amount``, ``age`` seconds ago. Older events must be added first."""
        moment = self._clock.monotonic() - age
        for _, _, events in self._windows:
            events.append((moment, amount))


@dataclasses.dataclass(frozen=True)
class Channel:
    """One kind of request: where it may go, what it accepts and how much of it is polite."""

    origins: frozenset[str]  # see ``origin``
    accept: str  # the header
    max_bytes: int  # of one answer
    requests: Limiter
    volume: Limiter  # bytes


@dataclasses.dataclass(frozen=True)
class Answer:
    """The body of a status 200 and its media type, in lower case without parameters; "" when it has none."""

    url: str
    media_type: str
    body: bytes


def origin(url: str) -> str:
    """``scheme://host:port`` of an HTTP address. Raises ValueError for anything else, and for credentials in it."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ValueError(f"found {url!r}, expected http://HOST or https://HOST")
    return f"{parts.scheme}://{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


def check_origin(url: str, origins: Collection[str]) -> str:
    """The origin of ``url``. Raises Refused when it is none of ``origins``."""
    try:
        where = origin(url)
    except ValueError:
        where = ""
    if where not in origins or not re.fullmatch(r"[!-~]+", url):
        raise Refused("host_refused", _one_line(url))
    return where


class Client:
    """Asks one thing at a time, each up to ``attempts`` times.

    ``check_stop`` is called between pieces of work and may raise; ``notice`` is told in words of every longer wait;
    ``timeout`` is that of one socket operation, ``deadline`` of one answer, in seconds. The jitter of the back-off
    depends on (``seed``, address, attempt) alone.
    """

    def __init__(
        self,
        user_agent: str,
        *,
        attempts: int = 5,
        timeout: float = 30.0,
        deadline: float = 600.0,
        give_up_after: int = 5,
        seed: int = 0,
        clock: Clock | None = None,
        check_stop: Callable[[], None] = lambda: None,
        notice: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._headers = {"User-Agent": user_agent, "Accept-Encoding": "identity"}
        self._attempts = attempts
        self._timeout = timeout
        self._deadline = deadline
        self._give_up_after = give_up_after
        self._failures = 0  # in a row
        self._seed = seed
        self._clock = clock or Clock()
        self._check_stop = check_stop
        self._notice = notice
        self._not_before: dict[str, float] = {}  # origin -> monotonic time, from Retry-After
        # No handler for errors and redirects: every status comes back as it is. Proxies are the environment's.
        self._opener = urllib.request.OpenerDirector()
        self._opener.addheaders = []
        handlers = (urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler())
        for handler in handlers:
            self._opener.add_handler(handler)

    def get(self, url: str, channel: Channel, check: Callable[[Answer], T]) -> T:
        """``check`` of the answer. It may raise Refused (final) or Failed (tried again) like the request itself.

        Raises Refused, Failed when all attempts failed, Unavailable when ``give_up_after`` requests in a row failed or
        were forbidden or the server asks for too long a wait, and what ``check_stop`` raises.
        """
        try:
            result = self._try(url, channel, check)
        except Unobtained as failure:
            # One forbidden photo is gone; when all are forbidden, we are.
            bad = isinstance(failure, Failed) or failure.reason in FORBIDDEN
            self._failures = self._failures + 1 if bad else 0
            if self._failures >= self._give_up_after:
                raise Unavailable(f"{self._failures} requests in a row failed, the last: {failure}") from failure
            raise
        self._failures = 0
        return result

    def _try(self, url: str, channel: Channel, check: Callable[[Answer], T]) -> T:
        for attempt in range(self._attempts):
            try:
                return check(self._follow(url, channel))
            except Failed as failure:
                if attempt + 1 == self._attempts:
                    raise
                seconds = backoff(self._seed, url, attempt)
                self._pause(seconds, f"{failure.reason}, attempt {attempt + 2} of {self._attempts}")
        raise ValueError(f"found {self._attempts} attempts, expected at least 1")

    def _follow(self, url: str, channel: Channel) -> Answer:
        for _ in range(REDIRECTS + 1):
            answer = self._once(url, channel)
            if isinstance(answer, Answer):
                return answer
            url = answer
        raise Refused("redirect_refused", f"more than {REDIRECTS} redirects")

    def _once(self, url: str, channel: Channel) -> Answer | str:
        """The answer, or the address of a redirect."""
        where = check_origin(url, channel.origins)
        self._wait(where, channel)
        channel.requests.add(1)
        request = urllib.request.Request(url, headers=self._headers | {"Accept": channel.accept})
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                return self._receive(response, url, where, channel)
        except TimeoutError as error:
            raise Failed("timeout", f"no answer within {self._timeout:g} s") from error
        except urllib.error.URLError as error:
            reason = "timeout" if isinstance(error.reason, TimeoutError) else "connection"
            raise Failed(reason, _one_line(error.reason)) from error
        except (http.client.HTTPException, OSError, ValueError) as error:
            raise Failed("connection", _one_line(error) or type(error).__name__) from error

    def _receive(self, response: Any, url: str, where: str, channel: Channel) -> Answer | str:
        status: int = response.status
        headers = response.headers
        if status in _MOVED:
            target = headers.get("Location")
            if not target:
                raise Refused("redirect_refused", "without a target")
            try:
                url = urllib.parse.urljoin(url, target)
                check_origin(url, channel.origins)
            except (Refused, ValueError) as error:
                raise Refused("redirect_refused", f"to {_one_line(target)}") from error
            return url
        if status in _PASSING or status >= 500:
            self._note_retry_after(headers, where)
            raise Failed(f"status_{status}", _one_line(response.reason))
        if status != 200:
            raise Refused(f"status_{status}", _one_line(response.reason))
        if headers.get("Content-Encoding", "identity").lower() != "identity":
            raise Failed("encoding", _one_line(headers["Content-Encoding"]))
        return Answer(
            url, headers.get_content_type() if "Content-Type" in headers else "", self._body(response, channel)
        )

    def _body(self, response: Any, channel: Channel) -> bytes:
        declared = response.headers.get("Content-Length", "")
        length = int(declared) if re.fullmatch(r"[0-9]{1,18}", declared) and not response.chunked else None
        if length is not None and length > channel.max_bytes:
            raise Refused("too_large", f"{length} bytes, at most {channel.max_bytes} allowed")
        if length is None and not response.chunked:
            raise Failed("truncated", "the answer does not say how long it is")
        started = self._clock.monotonic()
        body = bytearray()
        try:
            # read1 returns what has arrived: a server that trickles is noticed between two pieces.
            while piece := response.read1(2**16):
                body += piece
                if len(body) > channel.max_bytes:
                    raise Refused("too_large", f"more than {channel.max_bytes} bytes")
                if self._clock.monotonic() - started > self._deadline:
                    raise Failed("timeout", f"not whole within {self._deadline:g} s")
                self._check_stop()
        finally:
            channel.volume.add(len(body))
        if length is not None and len(body) != length:
            raise Failed("truncated", f"{len(body)} of {length} bytes")
        return bytes(body)

    def _wait(self, where: str, channel: Channel) -> None:
        self._check_stop()
        now = self._clock.monotonic()
        self._pause(self._not_before.get(where, now) - now, "the server asks to wait")
        self._pause(channel.volume.delay(channel.max_bytes), "volume limit")
        self._pause(channel.requests.delay(1), "request rate")

    def _note_retry_after(self, headers: Any, where: str) -> None:
        seconds = retry_after(headers.get("Retry-After"), headers.get("Date"), self._clock.wall())
        if seconds is None:
            return
        if seconds > MAX_RETRY_AFTER:
            raise Unavailable(f"{where} asks to come back in {seconds:.0f} s")
        self._not_before[where] = self._clock.monotonic() + seconds

    def _pause(self, seconds: float, why: str) -> None:
        if seconds <= 0:
            return
        if seconds > 2:
            self._notice(f"waiting {seconds:.0f} s: {why}")
        end = self._clock.monotonic() + seconds
        while (left := end - self._clock.monotonic()) > 0:
            self._clock.sleep(min(left, _SLICE))
            self._check_stop()
        if seconds > 2:
            self._notice("")


def backoff(seed: int, url: str, attempt: int) -> float:
    """Seconds before attempt ``attempt`` + 2: doubling, times a jitter in [0.5, 1) drawn from all three arguments."""
    digest = hashlib.sha256(f"{seed} {attempt} {url}".encode()).digest()
    jitter = int.from_bytes(digest[:6], "little") / 2**48
    return float(min(MAX_BACKOFF, BACKOFF * 2**attempt) * (0.5 + jitter / 2))


def retry_after(value: str | None, date: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks for, at least 0; None when it is absent or makes no sense.

    ``value`` is a number of seconds or a date; a date counts from the server's own ``date`` header if it has one,
    else from ``now`` (seconds since 1970).
    """
    value = (value or "").strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        return float(value)
    until = _timestamp(value)
    if until is None:
        return None
    start = _timestamp(date or "")
    return max(0.0, until - (now if start is None else start))


def _timestamp(text: str) -> float | None:
    try:
        parsed = email.utils.parsedate_to_datetime(text)
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=datetime.UTC)).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def _one_line(value: object) -> str:
    """Text of a server as printable ASCII of bounded length."""
    return ascii(str(value))[1:-1][:300]
