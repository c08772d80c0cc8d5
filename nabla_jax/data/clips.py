"""Clips of true individuals: video files, or folders of numbered frames.

    ANYTHING/CLIP.mp4             a video: its frames are written once to unpacked/ANYTHING/CLIP.mp4/
    ANYTHING/CLIP/000123.jpg      a frame sequence: the number is the frame's
    clips.csv                     optional list; columns clip (required), species, individual, frames_per_second,
                                  split, licence, credit, scientific_name

Without the list every video and every folder with two or more pictures is a clip of one individual of its own, of the
species that the folder above is named after. With it, rows of the same individual belong together, and clips it does
not name are left out.

Frames are thinned so that any two of one clip are at least ``gap`` seconds apart, and a class is an individual: every
pair that a sampler draws within a class is a pair of frames of one true individual at least that far apart. Video files
are decoded by PyAV (the extra ``video``); frame sequences need nothing.
"""

import dataclasses
import functools
import io
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from nabla_jax import runs
from nabla_jax.data import unpack
from nabla_jax.data.dataset import Dataset, Example, existing_control
from nabla_jax.data.problems import Problems
from nabla_jax.data.tables import read_csv
from nabla_jax.data.taxonomy import normalise_name
from nabla_jax.errors import UserError
from nabla_jax.untrusted import below

if TYPE_CHECKING:
    import PIL.Image

T = TypeVar("T")

LIST = "clips.csv"
REQUIRED = ("clip",)
COLUMNS = (
    *REQUIRED,
    *("species", "individual", "frames_per_second", "split", "licence", "credit", "scientific_name"),
)
VIDEOS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")
PICTURES = (".jpg", ".jpeg", ".png")
# Not clips: what other tools put beside them.
_RESERVED = (unpack.FOLDER, "masks", "depth")
_NUMBER = re.compile(r"(\d+)$")


@dataclasses.dataclass(frozen=True)
class Clip:
    """One recording of one individual."""

    path: PurePosixPath  # below the folder: a video, or a folder of frames
    line: int | None  # of clips.csv
    species: str
    individual: str
    rate: float | None  # frames per second of a frame sequence
    split: str
    values: dict[str, str]


class _Frame(TypedDict):
    """A row of the index of a video's frames."""

    file: str
    seconds: float


def is_layout(root: Path) -> bool:
    """Whether ``root`` has a list of clips, or a video at most two folders down."""
    if (root / LIST).is_file():
        return True
    shallow = itertools.chain.from_iterable(root.glob(pattern) for pattern in ("*", "*/*", "*/*/*"))
    return any(path.suffix.lower() in VIDEOS for path in shallow)


def read(root: str | os.PathLike[str], gap: float = 1.0, rate: float = 0.0) -> Dataset:
    """Reads clips; videos are decoded the first time.

    ``gap`` is the least number of seconds between two frames of a clip, ``rate`` the frames per second of sequences for
    which clips.csv has none (0: none known). Raises UserError naming file and line.
    """
    problems = Problems()
    dataset = scan(Path(root), problems, gap, rate)
    problems.refuse(root)
    return dataset


def scan(root: Path, problems: Problems, gap: float = 1.0, rate: float = 0.0) -> Dataset:
    """Like ``read``, but adds what is wrong to ``problems`` and returns the examples that are whole."""
    clips = _listed(root, problems) if (root / LIST).is_file() else list(_found(root))
    ids = {name: i for i, name in enumerate(sorted({clip.individual for clip in clips}))}
    species: dict[str, str] = {}
    examples = []
    for clip in clips:
        file = root / LIST if clip.line else root / clip.path
        if species.setdefault(clip.individual, clip.species) != clip.species:
            found = f"individual {clip.individual} is a {clip.species} here and a {species[clip.individual]} above"
            problems.error(file, clip.line, found, "give an individual one species")
            continue
        try:
            frames = _video(root, clip, gap) if _is_video(clip.path) else _sequence(root, clip, gap, rate)
        except UserError as error:
            problems.error(file, clip.line, str(error), "mend the clip, or take it out")
            continue
        if len(frames) < 2:
            found = f"clip {clip.path} has {len(frames)} frame at a gap of {gap:g} s, expected two or more for a pair"
            problems.warn(file, clip.line, found, "kept without a partner; choose a smaller data.frame_gap")
        name = f"{clip.species} ({clip.individual.replace('(', '[').replace(')', ']')})"
        examples += [_example(root, clip, ids[clip.individual], name, image) for image in frames]
    if not clips and not problems.errors:
        problems.error(root, None, "found no clip, expected videos or folders of frames", "copy them there")
    return Dataset(root.name, root, tuple(examples))


def frame_pairs(dataset: Dataset) -> list[tuple[str, str]]:
    """Ids of disjoint pairs of frames of one individual, half of its frames apart: a benchmark of true identity."""
    pairs = []
    for positions in dataset.classes.values():
        half = len(positions) // 2
        pairs += [(dataset.examples[positions[i]].id, dataset.examples[positions[i + half]].id) for i in range(half)]
    return pairs


def thin(frames: Iterable[tuple[float, T]], gap: float) -> Iterator[tuple[float, T]]:
    """The (seconds, frame) to keep, in order, so that any two are at least ``gap`` seconds apart."""
    last = None
    for time, frame in frames:
        # A tolerance, because frame 3 of 30 a second is not exactly 0.1 s after frame 0.
        if last is None or time - last >= gap - 1e-6:
            last = time
            yield time, frame


def _is_video(path: PurePosixPath) -> bool:
    return path.suffix.lower() in VIDEOS


def _listed(root: Path, problems: Problems) -> list[Clip]:
    path = root / LIST
    clips = []
    lines: dict[str, int] = {}
    for line, values in read_csv(path, REQUIRED, problems, COLUMNS):
        before = len(problems.errors)
        clip = PurePosixPath(values["clip"])
        if below(root, values["clip"]) is None:
            problems.error(path, line, f"clip {clip} leaves the folder", f"write the path below {root}")
        elif not (root / clip).exists():
            problems.error(path, line, f"found no clip {root / clip}", "copy it there, or correct the path")
        elif (root / clip).is_file() and not _is_video(clip):
            expected = ", ".join(VIDEOS)
            problems.error(path, line, f"{clip} is no video, expected {expected} or a folder", "convert it")
        if lines.setdefault(str(clip), line) != line:
            problems.error(path, line, f"clip {clip} is listed in line {lines[str(clip)]} too", "delete one row")
        rate = values.get("frames_per_second", "")
        number = _positive(rate)
        if rate and number is None:
            problems.error(path, line, f"frames_per_second: found {rate!r}, expected a number above 0", "correct it")
        split = values.get("split") or "train"
        if split not in ("train", "test"):
            problems.error(path, line, f"split: found {split!r}, expected train or test", "write train or test")
        if len(problems.errors) == before:
            species = values.get("species") or _species_of(root, clip)
            individual = values.get("individual") or str(clip)
            clips.append(Clip(clip, line, normalise_name(species), individual, number, split, values))
    return clips


def _found(root: Path) -> Iterator[Clip]:
    for folder, folders, files in os.walk(root):
        if Path(folder) == root:
            folders[:] = [name for name in folders if name not in _RESERVED]
        folders.sort()
        below = PurePosixPath(Path(folder).relative_to(root).as_posix())
        clips = [below / name for name in sorted(files) if _is_video(PurePosixPath(name))]
        if sum(PurePosixPath(name).suffix.lower() in PICTURES for name in files) > 1:
            clips.append(below)
        for clip in clips:
            yield Clip(clip, None, _species_of(root, clip), str(clip), None, "train", {})


def _species_of(root: Path, clip: PurePosixPath) -> str:
    """The folder above, spelled with spaces."""
    return normalise_name((clip.parent.name or root.name).replace("_", " "))


def _positive(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 < number < float("inf") else None


def _sequence(root: Path, clip: Clip, gap: float, rate: float) -> list[Path]:
    """The frames to keep of a folder of pictures. Raises UserError without a frame rate or with unnumbered pictures."""
    rate = clip.rate or rate
    if not rate > 0:
        raise UserError(
            f"{root / clip.path}: found no frame rate, expected frames_per_second in {LIST} or data.frame_rate"
        )
    frames = []
    for image in (root / clip.path).iterdir():
        if image.suffix.lower() in PICTURES:
            number = _NUMBER.search(image.stem)
            if number is None:
                raise UserError(
                    f"{image}: found no frame number at the end of the name, expected one such as 000123.jpg"
                )
            frames.append((int(number.group(1)), image))
    frames.sort()
    return [image for _, image in thin(((number / rate, image) for number, image in frames), gap)]


def _video(root: Path, clip: Clip, gap: float) -> list[Path]:
    """The frames to keep of a video, decoded unless they are there. Raises UserError for one that cannot be decoded."""
    path = root / clip.path
    # The suffix stays in the folder's name: bird.mp4 and bird.mov are two clips.
    folder = root / unpack.FOLDER / clip.path
    status = path.stat()
    made_from = {"bytes": status.st_size, "modified": status.st_mtime_ns, "gap": gap}

    def make(target: Path) -> Iterator[unpack.Row]:
        for time, frame in thin(runs.track(decode(path), f"decode {clip.path}", unit="frame"), gap):
            name = f"{round(1000 * time):09d}.png"
            out = io.BytesIO()
            frame().save(out, "png")
            unpack.write(target / name, out.getvalue())
            yield {"file": name, "seconds": time}

    return [folder / row["file"] for row in unpack.rows(folder, made_from, make, _Frame, ("file",))]


def decode(path: Path) -> Iterator[tuple[float, Callable[[], "PIL.Image.Image"]]]:
    """(seconds, function that gives the upright picture) of each frame of a video, in the order of display.

    Raises UserError without PyAV, and for a file that holds no video or is damaged.
    """
    try:
        import av
    except ImportError as error:
        raise UserError(f"{path}: videos are decoded by PyAV: pip install 'nabla_jax[video]'") from error
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path}: found no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                if frame.time is not None:
                    yield float(frame.time), functools.partial(_upright, frame)
    except av.error.FFmpegError as error:
        raise UserError(f"{path}: cannot be decoded: {error.strerror or error}") from error


def _upright(frame: Any) -> "PIL.Image.Image":
    # Phones store the turn beside the pixels; both angles count counter-clockwise.
    return frame.to_image().rotate(frame.rotation, expand=True)


def _example(root: Path, clip: Clip, class_id: int, name: str, image: Path) -> Example:
    return Example(
        id=image.relative_to(root).with_suffix("").as_posix(),
        image=image,
        class_id=class_id,
        class_name=name,
        taxonomy=("Clips", clip.species, name),
        mask=existing_control(root, image, "masks"),
        depth=existing_control(root, image, "depth"),
        individual=clip.individual,
        split=clip.split,
        licence=clip.values.get("licence") or None,
        credit=clip.values.get("credit") or None,
        scientific_name=clip.values.get("scientific_name") or None,
    )
