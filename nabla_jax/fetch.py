"""Fetches the photos of an iNaturalist pair list: ``python -m nabla_jax.fetch --pairs LIST.csv --out FOLDER --contact
ADDRESS``.

Observations are looked up 30 at a time in iNaturalist's public API, then their photos are downloaded one by one to
where the reader of pair lists expects them:

    images/.../NAME      the bytes as they are served, whatever their format: a PNG keeps the list's name NAME.jpg
    manifest.jsonl       one line per photo of the list: source, licence, attribution, size and sha256, or why it is
                         missing
    observations.jsonl   what the API said
    settings.json        what the content depends on: sha256 of the list, size of the photos
    final_pairs.csv      the rows of the list whose photos are both there; written last

A row names a photo by its number (123.jpg) or by its place in the observation, from 1 (photo_2.jpg); the latter counts
only while the observation still has as many photos as the list says. Photos with all rights reserved are left out
unless asked for.

The same command continues an interrupted run and does only what is missing. Exit status: 0 when everything that can be
had is there, 75 when something failed that may succeed later, 2 for a mistake, 130 or 143 after a signal.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import re
import sys
import tempfile
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import nabla_jax
from nabla_jax import images, runs
from nabla_jax.data import inaturalist
from nabla_jax.download import (
    FORBIDDEN,
    Answer,
    Channel,
    Client,
    Clock,
    Failed,
    Limiter,
    Refused,
    Unavailable,
    check_origin,
    origin,
)
from nabla_jax.errors import UserError
from nabla_jax.hashing import file_sha256

T = TypeVar("T")

HOUR, DAY = 3600.0, 86400.0
API = "https://api.inaturalist.org"
# Openly licensed photos are on the first, the others on the second; the API's answer says which.
MEDIA = ("https://inaturalist-open-data.s3.amazonaws.com", "https://static.inaturalist.org")
SIZES = ("original", "large", "medium")  # longest side at most 2048, 1024, 500 pixels
MANIFEST = "manifest.jsonl"
OBSERVATIONS = "observations.jsonl"
SETTINGS = "settings.json"
SCHEMA = 1
TRY_LATER = 75  # exit status, EX_TEMPFAIL of sysexits.h

# iNaturalist asks for at most 60 requests a minute and 10,000 a day, and for at most 5 GB an hour and 24 GB a day of
# media (https://www.inaturalist.org/pages/api+recommended+practices); the volumes here stay clear of them.
MAX_RATE = 60
REQUESTS_PER_DAY = 9_000
IDS_PER_REQUEST = 30
MAX_ANSWER = 64_000_000  # bytes of one answer of the API
FAILURES_IN_A_ROW = 5  # then the server or the network is down, and the run ends
TYPICAL_BYTES = {"original": 1_500_000, "large": 300_000, "medium": 100_000}  # assumed by --dry_run

_ID = re.compile(r"[0-9]{1,18}")
_BY_ID = re.compile(r"([0-9]{1,18})\.(?:jpe?g|png|gif)", re.IGNORECASE)
_BY_POSITION = re.compile(r"photo_([0-9]{1,4})\.(?:jpe?g|png|gif)", re.IGNORECASE)
_URL_PATH = re.compile(r"(.*/photos/([0-9]{1,18})/)square(\.[A-Za-z0-9]{0,5})")
_TEMPORARY = re.compile(r"\..+\.[0-9]+\.tmp")  # see runs.write_atomic
_FORMATS = {b"\xff\xd8\xff": "jpeg", b"\x89PNG\r\n\x1a\n": "png", b"GIF87a": "gif", b"GIF89a": "gif"}
# S3 gives these to what was stored without a type; the bytes decide.
_UNTYPED = ("", "application/octet-stream", "binary/octet-stream")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line sets; sizes in bytes, times in seconds."""

    contact: str = ""  # an e-mail address or a web page, for the User-Agent
    size: str = "original"
    include_all_rights_reserved: bool = False
    refresh: bool = False  # ask again for what is recorded as missing
    rate: float = MAX_RATE  # requests of the API a minute
    bytes_per_hour: int = 4_000_000_000
    bytes_per_day: int = 20_000_000_000
    max_bytes: int = 32_000_000  # of one photo
    timeout: float = 30.0
    deadline: float = 600.0  # of one answer
    attempts: int = 5
    seed: int = 0
    api: str = API
    media: str | None = None  # replaces scheme and host of both media hosts


@dataclasses.dataclass(frozen=True)
class Photo:
    """One photo of the list. Exactly one of ``id`` and ``position`` (from 1) is set."""

    path: str  # below the folder, with /
    observation: str
    id: str | None
    position: int | None
    photo_count: int | None  # of the observation, as the list has it


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a photo is and whose it is."""

    photo_id: str
    url: str
    license_code: str | None  # None: all rights reserved
    attribution: str

    def to_json(self) -> dict[str, Any]:
        """The manifest's fields."""
        return {
            "photo_id": self.photo_id,
            "source": self.url,
            "license_code": self.license_code,
            "attribution": self.attribution,
        }


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended. ``missing`` and ``failed`` count photos by reason; ``failed`` may succeed later."""

    photos: int
    fetched: int
    there: int  # before this run
    missing: Mapping[str, int]
    failed: Mapping[str, int]
    rows: int
    complete_rows: int
    stopped: str = ""  # why the run ended before everything was tried

    @property
    def status(self) -> int:
        """The exit status."""
        return TRY_LATER if self.failed or self.stopped else 0


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m nabla_jax.fetch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    defaults = Options()
    add("--pairs", type=Path, required=True, help="pair list")
    add("--out", type=Path, required=True, help="folder to make or continue")
    add("--contact", help="your e-mail address or web page: iNaturalist wants to know whom to write to")
    add("--size", choices=SIZES, default=defaults.size)
    add("--include_all_rights_reserved", action="store_true", help="fetch photos without a licence too")
    add("--refresh", action="store_true", help="ask again for what an earlier run found missing")
    add("--rate", type=float, default=defaults.rate, help="requests of the API a minute, at most 60")
    add("--gb_per_hour", type=float, default=defaults.bytes_per_hour / 1e9, help="of photos; iNaturalist's limit is 5")
    add("--gb_per_day", type=float, default=defaults.bytes_per_day / 1e9, help="of photos; iNaturalist's limit is 24")
    add("--max_megabytes", type=float, default=defaults.max_bytes / 1e6, help="of one photo; larger ones are left out")
    add("--timeout", type=float, default=defaults.timeout, help="seconds without a byte")
    add("--attempts", type=int, default=defaults.attempts, help="for each request")
    add("--seed", type=int, default=defaults.seed, help="of the jitter between attempts")
    add("--api", default=API, metavar="URL", help="another server for the look-up")
    add("--media", metavar="URL", help="another server for the photos")
    add("--dry_run", action="store_true", help="say what would be fetched; asks no server")
    words = parser.parse_args(argv)
    options = Options(
        contact=words.contact or "",
        size=words.size,
        include_all_rights_reserved=words.include_all_rights_reserved,
        refresh=words.refresh,
        rate=words.rate,
        bytes_per_hour=_bytes(words.gb_per_hour, 1e9, "--gb_per_hour"),
        bytes_per_day=_bytes(words.gb_per_day, 1e9, "--gb_per_day"),
        max_bytes=_bytes(words.max_megabytes, 1e6, "--max_megabytes"),
        timeout=words.timeout,
        attempts=words.attempts,
        seed=words.seed,
        api=words.api,
        media=words.media,
    )
    if words.dry_run:
        print(plan(words.pairs, words.out, options))
        return
    with runs.StopSignals() as stop:

        def check_stop() -> None:
            if stop.signum is not None:
                raise runs.Interrupted(stop.signum, f"{words.out}: interrupted; the same command continues")

        summary = fetch(words.pairs, words.out, options, check_stop=check_stop)
    print(report(words.out, summary), flush=True)
    if summary.status:
        sys.exit(summary.status)


def _bytes(value: float, unit: float, name: str) -> int:
    if not 0 < value < math.inf:
        raise UserError(f"{name}: found {value}, expected a number above 0")
    return round(value * unit)


def report(out: Path, summary: Summary) -> str:
    """What the command prints at its end."""
    missing, failed = sum(summary.missing.values()), sum(summary.failed.values())
    lines = [
        f"{out}: {summary.photos} photos: {summary.fetched} fetched, {summary.there} already there, "
        f"{missing} missing, {failed} failed"
    ]
    for what, counts in (("missing", summary.missing), ("failed", summary.failed)):
        lines += [f"  {what}: {count} {reason}" for reason, count in sorted(counts.items())]
    if summary.stopped:
        lines.append(f"stopped: {summary.stopped}")
    if summary.status:
        lines.append(f"{inaturalist.LISTS[0]} is not written yet: the same command tries again what failed")
    else:
        lines.append(f"{inaturalist.LISTS[0]}: {summary.complete_rows} of {summary.rows} pairs have both photos")
    return "\n".join(lines)


def plan(pairs: Path, out: Path, options: Options) -> str:
    """What a run would do, from the list and the folder alone. Raises UserError like ``fetch``."""
    check_options(options, contact=False)
    photos = wanted(pairs, read_list(pairs))
    there = sum((out / p.path).is_file() for p in photos)
    observations = len({p.observation for p in photos})
    requests = math.ceil(observations / IDS_PER_REQUEST)
    volume = (len(photos) - there) * TYPICAL_BYTES[options.size]
    hours = volume / options.bytes_per_hour
    return "\n".join(
        [
            f"{pairs}: {len(photos)} photos of {observations} observations",
            f"{out}: {there} are there, {len(photos) - there} to fetch",
            f"look-up: at most {requests} requests, {requests / options.rate:.1f} min",
            f"photos: {volume / 1e9:.1f} GB assuming {TYPICAL_BYTES[options.size] / 1e6:g} MB each, "
            f"{hours * 60:.0f} min at the most that is polite",
        ]
    )


# ----------------------------------------------------------------------------------------------------------
# The list
# ----------------------------------------------------------------------------------------------------------


def read_list(path: Path) -> list[inaturalist.Row]:
    """The rows of a pair list of any name. Raises UserError naming file and line."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    # The reader takes a folder and looks for its own names in it.
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / inaturalist.LISTS[0]
        copy.write_bytes(data)
        try:
            return inaturalist.rows(folder)
        except UserError as error:
            raise UserError(str(error).replace(str(copy), str(path)).replace(folder, str(path))) from error


def wanted(path: Path, rows: Sequence[inaturalist.Row]) -> list[Photo]:
    """The distinct photos of the list ``path``, in its order.

    Raises one UserError with the number of rows that are wrong and the first of them: a path that could leave the
    folder, a name that is neither NUMBER.jpg nor photo_N.jpg, one file of two observations.
    """
    photos: dict[str, Photo] = {}
    problems = []
    for row in rows:
        for column in ("image_1", "image_2"):
            try:
                photo = _photo(row, column)
                if photos.setdefault(photo.path, photo) != photo:
                    raise ValueError(
                        f"{column}: {photo.path} stands in an earlier row with another observation or photo_count"
                    )
            except ValueError as error:
                problems.append(f"{path}:{row.line}: {error}")
    if problems:
        more = f"; {len(problems) - 1} more problems" if len(problems) > 1 else ""
        raise UserError(problems[0] + more)
    return list(photos.values())


def _photo(row: inaturalist.Row, column: str) -> Photo:
    name, folder, count = row.values[column], row.values["relative_path"], row.values.get("photo_count", "")
    if not _ID.fullmatch(row.observation):
        raise ValueError(f"observation_id: found {row.observation!r}, expected a number")
    parts = folder.split("/")
    if parts[0] != "images" or len(parts) > 8 or not all(map(_is_plain, parts)):
        raise ValueError(f"relative_path: found {folder!r}, expected images/... without .., links or odd characters")
    by_id, by_position = _BY_ID.fullmatch(name), _BY_POSITION.fullmatch(name)
    if by_id is None and by_position is None:
        raise ValueError(f"{column}: found {name!r}, expected NUMBER.jpg or photo_NUMBER.jpg")
    if by_position is not None and not re.fullmatch(r"[0-9]{1,4}", count):
        raise ValueError(f"photo_count: found {count!r}, expected the number of photos that {name} counts from")
    return Photo(
        path=f"{folder}/{name}",
        observation=row.observation,
        id=by_id[1] if by_id else None,
        position=int(by_position[1]) if by_position else None,
        photo_count=int(count) if by_position else None,
    )


def _is_plain(part: str) -> bool:
    """Whether ``part`` is one name of a folder that is safe on every system and cannot be one of our own files."""
    odd = any(c in '\\/:*?"<>|' or unicodedata.category(c).startswith(("C", "Z")) and c != " " for c in part)
    return bool(part) and not part.startswith(".") and not odd and part == part.strip() and len(part.encode()) <= 200


# ----------------------------------------------------------------------------------------------------------
# The look-up
# ----------------------------------------------------------------------------------------------------------


def parse_observations(answer: Answer, ids: Sequence[str]) -> list[dict[str, Any]]:
    """What the API says of observations ``ids``, in this order; ``photos`` None for one that it does not know.

    Photos are in the observation's own order. Raises Failed for anything but the documented JSON.
    """
    if answer.media_type != "application/json":
        raise Failed("content_type", f"found {answer.media_type[:100]!r}, expected application/json")
    try:
        results = {str(result["id"]): result for result in json.loads(answer.body)["results"]}
        return [{"observation": i, "photos": _photos(results[i]) if i in results else None} for i in ids]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Failed("unexpected_answer", f"not what the API documents ({type(error).__name__})") from error


def _photos(result: dict[str, Any]) -> list[dict[str, Any]]:
    entries = result["observation_photos"]
    if all(entry.get("position") is not None for entry in entries):
        entries = sorted(entries, key=lambda entry: int(entry["position"]))
    return [
        {
            "id": str(int(entry["photo"]["id"])),
            "url": str(entry["photo"].get("url") or ""),
            "license_code": str(entry["photo"].get("license_code") or "") or None,
            "attribution": str(entry["photo"].get("attribution") or ""),
            "hidden": bool(entry["photo"].get("hidden", False)),
        }
        for entry in entries
    ]


def locate(photo: Photo, answer: Mapping[str, Any], options: Options) -> Source:
    """Where ``photo`` is, by what the API said of its observation. Raises Refused when it is nowhere."""
    found = answer["photos"]
    if found is None:
        raise Refused("observation_missing", "deleted or hidden")
    if photo.position is not None:
        if photo.photo_count != len(found):
            raise Refused("photo_count_changed", f"{photo.photo_count} photos in the list, {len(found)} now")
        if not 1 <= photo.position <= len(found):
            raise Refused("position_out_of_range", f"photo {photo.position} of {len(found)}")
        entry = found[photo.position - 1]
    else:
        matches = [entry for entry in found if entry["id"] == photo.id]
        if not matches:
            raise Refused("photo_missing", f"not among the {len(found)} photos of the observation")
        entry = matches[0]
    if entry["hidden"]:
        raise Refused("photo_hidden", "by iNaturalist's moderators")
    return Source(
        entry["id"], photo_url(entry["url"], entry["id"], options), entry["license_code"], entry["attribution"]
    )


def photo_url(square: str, id: str, options: Options) -> str:
    """The address of ``options.size`` from that of the square thumbnail. Raises Refused for one of another form."""
    check_origin(square, media_origins(options) | frozenset(map(origin, MEDIA)))
    parts = urllib.parse.urlsplit(square)
    match = _URL_PATH.fullmatch(parts.path)
    if match is None or match[2] != id:
        raise Refused("unexpected_url", square[:300])
    base = f"{parts.scheme}://{parts.netloc}" if options.media is None else options.media.rstrip("/")
    return f"{base}{match[1]}{options.size}{match[3]}"


def media_origins(options: Options) -> frozenset[str]:
    """The origins that photos may come from."""
    return frozenset(map(origin, MEDIA if options.media is None else (options.media,)))


# ----------------------------------------------------------------------------------------------------------
# The photos
# ----------------------------------------------------------------------------------------------------------


def check_picture(answer: Answer) -> dict[str, Any]:
    """The manifest's fields of a downloaded picture: format, height, width (upright, pixels), bytes, sha256.

    It is decoded by the reader that will read it later. Raises Refused for another kind of picture or a damaged one,
    Failed for a page in its place: such pages come from proxies and overloaded servers, and pass.
    """
    kind = answer.media_type
    if kind not in _UNTYPED and not kind.startswith("image/"):
        raise Failed("content_type", f"found {ascii(kind)[1:101]}, expected a picture")
    format = next((name for magic, name in _FORMATS.items() if answer.body.startswith(magic)), None)
    if format is None:
        reason = (
            "not_a_picture" if kind in _UNTYPED or kind.split("/")[1] in _FORMATS.values() else "unsupported_format"
        )
        raise Refused(reason, f"found {ascii(kind)[1:101]}, expected JPEG, PNG or GIF")
    with tempfile.NamedTemporaryFile(suffix=f".{format}") as file:
        file.write(answer.body)
        file.flush()
        try:
            height, width = images.read_rgb(file.name).shape[:2]
        except UserError as error:
            raise Refused("not_a_picture", str(error).removeprefix(f"{file.name}: ")) from error
    return {
        "format": format,
        "height": height,
        "width": width,
        "bytes": len(answer.body),
        "sha256": hashlib.sha256(answer.body).hexdigest(),
    }


# ----------------------------------------------------------------------------------------------------------
# The work
# ----------------------------------------------------------------------------------------------------------


def check_options(options: Options, *, contact: bool = True) -> None:
    """Raises UserError for a value that makes no sense or is not polite."""
    if contact and not (re.fullmatch(r"[ -~]{3,200}", options.contact) and re.search(r"@|://", options.contact)):
        raise UserError(f"--contact: found {options.contact!r}, expected an e-mail address or a web page of yours")
    if options.size not in SIZES:
        raise UserError(f"--size: found {options.size!r}, expected one of {', '.join(SIZES)}")
    bounds: list[tuple[str, float, float, float]] = [
        ("--rate", options.rate, 0.01, MAX_RATE),
        ("--gb_per_hour", options.bytes_per_hour / 1e9, 1e-6, 5),
        ("--gb_per_day", options.bytes_per_day / 1e9, 1e-6, 24),
        ("--timeout", options.timeout, 0.01, 3600),
        ("--attempts", options.attempts, 1, 20),
        ("--max_megabytes", options.max_bytes / 1e6, 1e-6, min(options.bytes_per_hour, options.bytes_per_day) / 1e6),
    ]
    for name, value, low, high in bounds:
        if not low <= value <= high:
            raise UserError(f"{name}: found {value:g}, expected {low:g} to {high:g}")
    for name, url in (("--api", options.api), ("--media", options.media)):
        try:
            if url is not None:
                origin(url)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error


def fetch(
    pairs: Path,
    out: Path,
    options: Options,
    *,
    clock: Clock | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> Summary:
    """Makes or continues the folder ``out``; see the module's docstring.

    ``check_stop`` is called between pieces of work; what it raises leaves a folder that can be continued. Raises
    UserError for a mistake in list or options, a folder made from another list or by other means, and files that
    cannot be written.
    """
    check_options(options)
    clock = clock or Clock()
    rows = read_list(pairs)
    photos = wanted(pairs, rows)
    with runs.writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with runs.lock(out / ".lock", f"--out {out}"):
        _claim(out, {"schema": SCHEMA, "list_sha256": file_sha256(pairs), "size": options.size})
        with (
            contextlib.closing(runs.JsonLines(out / MANIFEST, _PhotoRow)) as manifest,
            contextlib.closing(runs.JsonLines(out / OBSERVATIONS, _ObservationRow)) as observations,
        ):
            ours = set(_by(manifest, "image"))
            _keep_what_holds(out, photos, manifest, observations, options.refresh)
            there = {image for image, row in _by(manifest, "image").items() if row["status"] == "fetched"}
            with runs.progress(len(photos), "fetch", done=len(there), unit="photo") as bar:
                servers = _servers(out, options, clock, check_stop, bar.set_postfix_str, manifest)
                outcomes, stopped = _fetch_all(servers, photos, ours, manifest, observations, bar.update)
        done = [outcomes.get(p.path) or _row(p, "failed", None, reason="not_tried", detail="") for p in photos]
        counts = {
            status: Counter(r["reason"] for r in done if r["status"] == status) for status in ("missing", "failed")
        }
        complete = _complete(rows, {row["image"] for row in done if row["status"] == "fetched"})
        summary = Summary(
            photos=len(photos),
            fetched=sum(row["status"] == "fetched" for row in done) - len(there),
            there=len(there),
            missing=counts["missing"],
            failed=counts["failed"],
            rows=len(rows),
            complete_rows=len(complete),
            stopped=stopped,
        )
        answers = _by(observations, "observation")
        order = dict.fromkeys(photo.observation for photo in photos)
        _write_lines(out / OBSERVATIONS, [answers[i] for i in order if i in answers])
        _write_lines(out / MANIFEST, done)
        if summary.status == 0:
            _write_changed(out / inaturalist.LISTS[0], _subset(pairs.read_bytes(), rows, complete))
    return summary


class _PhotoRow(TypedDict):
    """What every row of the manifest has."""

    image: str
    observation: str
    status: str


class _PhotoAnswer(TypedDict):
    id: str
    url: str
    license_code: str | None
    attribution: str
    hidden: bool


class _ObservationRow(TypedDict):
    observation: str
    photos: list[_PhotoAnswer] | None


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Marks the folder as ours and clears what a killed run left half written."""
    path = out / SETTINGS
    if not path.is_file():
        others = sorted(p.name for p in out.iterdir() if p.name != ".lock" and not _TEMPORARY.fullmatch(p.name))
        if others:
            raise UserError(f"{out}: found {others[0]}, expected an empty folder or one made by this command")
        runs.write_json(path, settings)
    before = runs.read_json(path)
    if before != settings:
        there = before if isinstance(before, dict) else {}
        differing = [f"{k}: {there.get(k)!r} there, {v!r} here" for k, v in settings.items() if there.get(k) != v]
        raise UserError(f"{out}: was made with other settings ({'; '.join(differing)}); choose another --out")
    for left in out.rglob(".*.tmp"):
        if _TEMPORARY.fullmatch(left.name):
            left.unlink()


@dataclasses.dataclass(frozen=True)
class _Servers:
    """Whom to ask, how, and for what."""

    out: Path
    options: Options
    client: Client
    api: Channel
    media: Channel

    def get(self, url: str, channel: Channel, check: Callable[[Answer], T]) -> T:
        # The list of complete pairs stands for a finished folder: it goes before anything changes.
        with runs.writing(self.out):
            (self.out / inaturalist.LISTS[0]).unlink(missing_ok=True)
        return self.client.get(url, channel, check)


def _servers(
    out: Path,
    options: Options,
    clock: Clock,
    check_stop: Callable[[], None],
    notice: Callable[[str], None],
    manifest: runs.JsonLines,
) -> _Servers:
    requests = Limiter([(1, 60 / options.rate), (REQUESTS_PER_DAY, DAY)], clock)
    volume = Limiter([(options.bytes_per_hour, HOUR), (options.bytes_per_day, DAY)], clock)
    for age, size in _recent(out, manifest, clock.wall()):
        volume.add(size, age)
    client = Client(
        f"nabla_jax/{nabla_jax.__version__} ({options.contact})",
        attempts=options.attempts,
        timeout=options.timeout,
        deadline=options.deadline,
        give_up_after=FAILURES_IN_A_ROW,
        seed=options.seed,
        clock=clock,
        check_stop=check_stop,
        notice=notice,
    )
    unlimited = Limiter([], clock)
    api = Channel(frozenset((origin(options.api),)), "application/json", MAX_ANSWER, requests, unlimited)
    media = Channel(media_origins(options), "image/jpeg, image/png, image/gif", options.max_bytes, unlimited, volume)
    return _Servers(out, options, client, api, media)


def _recent(out: Path, manifest: runs.JsonLines, now: float) -> list[tuple[float, int]]:
    """(age in seconds, bytes) of the photos of the last day, oldest first: a restart does not forget the limits."""
    stats = [(out / row["image"]).stat() for row in manifest.rows if row["status"] == "fetched"]
    ages = [(max(0.0, now - stat.st_mtime), stat.st_size) for stat in stats]
    return sorted((a for a in ages if a[0] < DAY), reverse=True)


def _keep_what_holds(
    out: Path, photos: Sequence[Photo], manifest: runs.JsonLines, observations: runs.JsonLines, refresh: bool
) -> None:
    """Drops rows whose photo is gone, damaged or no longer wanted, and what is to be asked again."""
    paths = {photo.path for photo in photos}
    good = {
        row["image"]
        for row in (runs.track(list(manifest.rows), "check", unit="photo") if manifest.rows else ())
        # The path is one of the list's, which was checked.
        if row["image"] in paths and row["status"] == "fetched" and _is_whole(out / row["image"], row)
    }

    manifest.keep(lambda row: row["image"] in good or (not refresh and row["image"] in paths and _is_lasting(row)))
    if refresh:
        incomplete = {photo.observation for photo in photos if photo.path not in good}
        observations.keep(lambda row: row["observation"] not in incomplete)


def _is_lasting(row: Mapping[str, Any]) -> bool:
    """Whether a server was asked for the photo and it is missing for good.

    The other reasons follow from the observations and the options, or may pass; every run finds them anew.
    """
    reason = str(row.get("reason", ""))
    known = ("too_large", "redirect_refused", "not_a_picture", "unsupported_format")
    answered = reason.startswith("status_") and reason not in FORBIDDEN
    return row["status"] == "missing" and (reason in known or answered)


def _is_whole(path: Path, row: Mapping[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == row.get("bytes") and file_sha256(path) == row.get("sha256")


def _fetch_all(
    servers: _Servers,
    photos: Sequence[Photo],
    ours: Collection[str],
    manifest: runs.JsonLines,
    observations: runs.JsonLines,
    advance: Callable[[], object],
) -> tuple[dict[str, dict[str, Any]], str]:
    """The manifest's rows by photo, and why the work stopped before its end, or ""."""
    outcomes = _by(manifest, "image")
    ids = dict.fromkeys(photo.observation for photo in photos if photo.path not in outcomes)
    try:
        unanswered = _look_up(servers, list(ids), observations)
        answers = _by(observations, "observation")
        for photo in photos:
            if photo.path in outcomes:
                continue
            source = None
            try:
                if photo.observation in unanswered:
                    raise Failed("look_up", unanswered[photo.observation])
                source = locate(photo, answers[photo.observation], servers.options)
                if source.license_code is None and not servers.options.include_all_rights_reserved:
                    raise Refused("all_rights_reserved", "not licensed for others")
                row = _row(photo, "fetched", source, **_download(servers, photo, source, photo.path in ours))
                manifest.append(row)
            except Refused as error:
                row = _row(photo, "missing", source, reason=error.reason, detail=error.detail)
                if _is_lasting(row):
                    manifest.append(row)
            except Failed as error:
                row = _row(photo, "failed", source, reason=error.reason, detail=error.detail)
            outcomes[photo.path] = row
            advance()
    except Unavailable as error:
        return outcomes, str(error)
    return outcomes, ""


def _look_up(servers: _Servers, ids: Sequence[str], observations: runs.JsonLines) -> dict[str, str]:
    """Asks the API for those of ``ids`` that are not known yet; returns reasons for those it did not answer."""
    known = _by(observations, "observation")
    unknown = [i for i in ids if i not in known]
    unanswered = {}
    for start in range(0, len(unknown), IDS_PER_REQUEST):
        batch = unknown[start : start + IDS_PER_REQUEST]
        url = f"{servers.options.api.rstrip('/')}/v1/observations?id={','.join(batch)}&per_page={len(batch)}"
        try:
            observations.extend(servers.get(url, servers.api, functools.partial(parse_observations, ids=batch)))
        except Failed as error:
            unanswered.update(dict.fromkeys(batch, str(error)))
        except Refused as error:
            raise Unavailable(f"{servers.options.api} refuses to answer ({error})") from error
    return unanswered


def _download(servers: _Servers, photo: Photo, source: Source, ours: bool) -> dict[str, Any]:
    path = servers.out / photo.path

    def check(answer: Answer) -> tuple[bytes, dict[str, Any]]:
        return answer.body, check_picture(answer)

    body, fields = servers.get(source.url, servers.media, check)
    # A killed run leaves at most one photo that is in place but not in the manifest.
    if not ours and path.is_file() and path.read_bytes() != body:
        raise UserError(f"{path}: is in the way, expected nothing or the photo {source.url}")
    runs.write_atomic(path, body)
    return fields


def _row(photo: Photo, status: str, source: Source | None, **fields: Any) -> dict[str, Any]:
    origin = {} if source is None else source.to_json()
    return {"image": photo.path, "observation": photo.observation, "status": status, **origin, **fields}


def _by(file: runs.JsonLines, key: str) -> dict[str, dict[str, Any]]:
    return {row[key]: row for row in file.rows}


def _complete(rows: Sequence[inaturalist.Row], fetched: Collection[str]) -> list[inaturalist.Row]:
    """The rows whose photos are both there."""
    columns = ("image_1", "image_2")
    return [row for row in rows if all(f"{row.values['relative_path']}/{row.values[c]}" in fetched for c in columns)]


def _subset(data: bytes, rows: Sequence[inaturalist.Row], kept: Sequence[inaturalist.Row]) -> bytes:
    """The list ``data`` without the lines of the rows that are not ``kept``; every other byte stays."""
    lines = data.split(b"\n")
    ends = [row.line - 1 for row in rows[1:]] + [len(lines) - 1]
    numbers = {row.number for row in kept}
    gone = {
        i for row, end in zip(rows, ends, strict=True) if row.number not in numbers for i in range(row.line - 1, end)
    }
    return b"\n".join(line for i, line in enumerate(lines) if i not in gone)


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    _write_changed(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _write_changed(path: Path, data: bytes) -> None:
    if not path.is_file() or path.read_bytes() != data:
        runs.write_atomic(path, data)


if __name__ == "__main__":
    runs.run_main(main)
