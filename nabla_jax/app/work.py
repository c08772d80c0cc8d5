"""What the app does, without its page: pictures in, masks as they are painted, pictures and manifests out.

The drawing itself is ``nabla_jax.load(…).repose``, the plate's page ``nabla_jax.plates``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import nabla_jax
from nabla_jax import api, assets, extract, images, plates, runs
from nabla_jax.checkpoints import adapters as adapter_files
from nabla_jax.config import Conditioning, Config, Extract
from nabla_jax.data import controls, tables
from nabla_jax.data.problems import Problems
from nabla_jax.errors import UserError
from nabla_jax.extract import checkpoints
from nabla_jax.hashing import file_sha256

Array = np.ndarray[Any, Any]
OnStep = Callable[[int], None]

EDITOR = 512  # side in pixels of the square that is painted on
_GROUND = 236  # grey level round a picture that is not square
PAINT = (255, 64, 96)
_OPACITY = 128  # of 255: the bird is seen through the mask that is painted on it
_PAINTED = 32  # a stroke's smoothed edge is paint from here on
MAX_STEPS = 100
MAX_BIRDS = 20
LABEL = 80  # characters
EXAMPLES = "asset:toy-birds"


# ----------------------------------------------------------------------------------------------------------
# Pictures and masks
# ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Photo:
    """A picture that was chosen: its name, its pixels [H, W, 3] uint8, and the mask [H, W] bool that was loaded for it.

    What is painted is in the page's editor, see ``painted_mask``.
    """

    name: str
    pixels: Array
    mask: Array | None = None


def read_photo(path: str, folder: Path, megabytes: float) -> Photo:
    """The uploaded picture. Raises UserError naming the file, not its folder, for whatever is wrong with it."""
    return Photo(Path(path).name, _upload(images.read_rgb, path, folder, megabytes))


def read_mask(photo: Photo | None, path: str, folder: Path, megabytes: float) -> Photo:
    """``photo`` with an uploaded mask. Raises UserError as ``read_photo`` does, and for a mask of another size."""
    if photo is None:
        raise UserError("mask: choose its photo first")
    height, width = photo.pixels.shape[:2]
    return dataclasses.replace(
        photo, mask=_upload(lambda p: controls.read_mask(p, height, width), path, folder, megabytes)
    )


def _upload(read: Callable[[Path], Array], path: str, folder: Path, megabytes: float) -> Array:
    try:
        return read(images.check_upload(path, folder, megabytes))
    except UserError as error:
        raise UserError(str(error).replace(str(path), Path(path).name)) from None


def editor_value(photo: Photo | None) -> dict[str, Any] | None:
    """What the page's editor shows: the picture in a square of ``EDITOR`` pixels, and its mask as paint.

    The square is the same for every picture: where the editor's canvas changes, its layers do not lie on the picture.
    """
    if photo is None:
        return None
    rows, columns = _shown(photo)
    ground = np.full((EDITOR, EDITOR, 3), _GROUND, np.uint8)
    size = rows.stop - rows.start, columns.stop - columns.start
    ground[rows, columns] = images.resize(photo.pixels, *size, "lanczos")
    layer = np.zeros((EDITOR, EDITOR, 4), np.uint8)
    if photo.mask is not None:
        layer[rows, columns][images.resize(photo.mask, *size, "nearest")] = (*PAINT, _OPACITY)
    return {"background": ground, "layers": [layer], "composite": None}


def painted_mask(photo: Photo, editor: Mapping[str, Any] | None) -> Array:
    """The mask [H, W] bool of a photo: the one that was loaded, changed where the editor's paint differs from it.

    Raises UserError where nothing is painted.
    """
    height, width = photo.pixels.shape[:2]
    before = np.zeros((height, width), bool) if photo.mask is None else photo.mask
    rows, columns = _shown(photo)
    shown = images.resize(before, rows.stop - rows.start, columns.stop - columns.start, "nearest")
    painted = np.zeros_like(shown)
    for layer in (editor or {}).get("layers", ()):
        if layer.shape != (EDITOR, EDITOR, 4):
            raise UserError("mask: the editor's paint cannot be read, choose the photo again")
        painted |= layer[rows, columns, 3] >= _PAINTED
    share = images.resize((painted != shown).astype(np.float64), height, width, "area")
    mask = before ^ (share > 0.5)
    if not mask.any():
        raise UserError(f"{photo.name}: there is no mask; paint the bird, or load its mask")
    return mask


def _shown(photo: Photo) -> tuple[slice, slice]:
    """Rows and columns of the editor's square that the picture fills."""
    height, width = photo.pixels.shape[:2]
    factor = EDITOR / max(height, width)
    sides = (max(1, round(height * factor)), max(1, round(width * factor)))
    rows, columns = (slice((EDITOR - side) // 2, (EDITOR - side) // 2 + side) for side in sides)
    return rows, columns


def can_find(settings: Extract) -> bool:
    """Whether birds can be found: the extra ``extract`` is installed and its checkpoints are there."""
    return importlib.util.find_spec("torch") is not None and checkpoints.is_there(settings, "sam2", "grounding_dino")


def found_mask(photo: Photo | None, settings: Extract) -> Photo:
    """``photo`` with the mask of the bird that is found in it. Raises UserError where there is none."""
    if photo is None:
        raise UserError("mask: choose its photo first")
    return dataclasses.replace(photo, mask=extract.mask(photo.pixels, settings.text, settings))


# ----------------------------------------------------------------------------------------------------------
# Examples
# ----------------------------------------------------------------------------------------------------------


def example_files() -> list[dict[str, Path]]:
    """For each example the files of subject, target, subject_mask and target_mask."""
    folder, problems = assets.resolve(EXAMPLES), Problems()
    columns = ("subject", "target", "subject_mask", "target_mask")
    rows = tables.read_csv(folder / "examples.csv", columns, problems, columns)
    problems.refuse()
    return [{name: folder / row[name] for name in columns} for _, row in rows]


def example(number: int) -> tuple[Photo, Photo]:
    """Subject and target of an example, with their masks."""
    files = example_files()[number]
    subject, target = (
        Photo(files[n].name, *controls.read_pair(files[n], files[f"{n}_mask"])) for n in ("subject", "target")
    )
    return subject, target


def example_plate() -> tuple[list[Bird], Photo]:
    """The birds of an example of a plate, and the target."""
    listed = plates.read_birds(assets.resolve(EXAMPLES) / "plate.csv")
    birds = []
    for bird in listed:
        assert bird.mask is not None
        pixels, mask = controls.read_pair(bird.picture, bird.mask)
        birds.append(Bird(bird.label, Photo(bird.picture.name, pixels), mask))
    return birds, example(0)[1]


# ----------------------------------------------------------------------------------------------------------
# Adapters
# ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Choice:
    """An adapter that can be chosen: its file, and the conditions that it is used under."""

    path: Path
    conditioning: Conditioning


def read_adapters(names: Sequence[str], config: Config | None) -> dict[str, Choice]:
    """Name in the page -> adapter, from files, runs and assets. Weights are not read.

    Raises UserError for an adapter that is missing or of which nothing says how it is conditioned.
    """
    found: dict[str, Choice] = {}
    for name in names:
        path = api.find_adapter(name)
        metadata = adapter_files.read_metadata(path)
        asked = None if config is None or metadata.size else config.conditioning
        label = path.stem if path.stem not in found else str(path)
        if label in found:
            raise UserError(f"--adapter: found {name} twice, expected each once")
        found[label] = Choice(path, api.conditioning_of(metadata, path) if asked is None else asked)
    return found


class Studio:
    """The base with one adapter at a time: another one is loaded when it is asked for."""

    def __init__(self, config: Config | None, adapters: Mapping[str, Choice]) -> None:
        self.config, self.adapters = config, adapters
        self.extract = Extract() if config is None else config.extract
        self._lock = threading.Lock()
        self._loaded: tuple[str, api.Reposer] | None = None

    def controls(self) -> list[str]:
        """The controls that there are adapters for."""
        return sorted({choice.conditioning.control for choice in self.adapters.values()})

    def names(self, control: str) -> list[str]:
        """The adapters for a control."""
        return [name for name, choice in self.adapters.items() if choice.conditioning.control == control]

    def reposer(self, name: str) -> api.Reposer:
        """The base with the adapter ``name``. Raises UserError for an unknown one, and as ``nabla_jax.load`` does."""
        if name not in self.adapters:
            raise UserError(f"adapter: found {name!r}, expected one of {', '.join(self.adapters)}")
        with self._lock:
            if self._loaded is None or self._loaded[0] != name:
                self._loaded = None  # two bases may not fit beside each other
                self._loaded = (name, self._load(self.adapters[name]))
            return self._loaded[1]

    def _load(self, choice: Choice) -> api.Reposer:
        if self.config is None:
            return nabla_jax.load(adapter=choice.path, conditioning=choice.conditioning)
        base = self.config.base
        return nabla_jax.load(
            base.path,
            choice.path,
            conditioning=choice.conditioning,
            sample=self.config.sample,
            dtype=self.config.train.dtype,
            redux=base.redux or None,
            quantise=base.quantise,
            mesh=self.config.mesh,
        )


# ----------------------------------------------------------------------------------------------------------
# Drawing
# ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Place:
    """The target: its photo and mask, and what some controls and captions need beside them."""

    photo: Photo
    mask: Array
    depth: Array | None = None
    keypoints: Array | None = None
    caption: str | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of sampling. Raises UserError for a value out of range."""

    seed: int
    steps: int

    def __post_init__(self) -> None:
        for name, value, low, high in (("seed", self.seed, 0, 2**32 - 1), ("steps", self.steps, 1, MAX_STEPS)):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise UserError(f"{name}: found {value!r}, expected a whole number from {low} to {high}")


@dataclasses.dataclass(frozen=True)
class Made:
    """A picture [H, W, 3] uint8, what it was made of, and further pictures and masks by name."""

    pixels: Array
    manifest: dict[str, Any]
    files: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Bird:
    """A bird of a plate."""

    label: str
    photo: Photo
    mask: Array


def place(
    reposer: api.Reposer, photo: Photo, mask: Array, depth: Path | None, keypoints: Path | None, caption: str,
    settings: Extract,
) -> Place:  # fmt: skip
    """The target with all that the adapter's control and caption need; what is not given is made where it can be.

    Raises UserError for a file that does not fit the photo, and for what is missing.
    """
    conditioning = reposer.conditioning
    needs = controls.find_control(conditioning.control).needs
    height, width = photo.pixels.shape[:2]
    shown_depth = points = None
    if needs == "depth":
        if depth is not None:
            shown_depth = controls.read_depth(depth, height, width)
        else:
            shown_depth = extract.depth(photo.pixels, settings)
    if needs == "keypoints":
        if keypoints is not None:
            points = controls.read_keypoints(keypoints, height, width)
        else:
            points = extract.keypoints(photo.pixels, mask, settings)
    words = caption.strip() if conditioning.caption == "background" else None
    return Place(photo, mask, shown_depth, points, words)


def repose(
    reposer: api.Reposer, photo: Photo, mask: Array, target: Place, settings: Settings, on_step: OnStep | None = None
) -> Made:
    """The picture of the target's size, and both masks."""
    result = reposer.repose(
        photo.pixels,
        target.photo.pixels,
        mask,
        target.mask,
        target_depth=target.depth,
        target_keypoints=target.keypoints,
        target_caption=target.caption,
        seed=settings.seed,
        steps=settings.steps,
        on_step=on_step,
    )
    pixels = np.asarray(result)
    row = {"subject": _named(photo, mask), **_shared(reposer, target, settings), "pixels_sha256": _sha256(pixels)}
    return Made(pixels, row, {"subject_mask": mask, "target_mask": target.mask})


def plate(
    reposer: api.Reposer,
    birds: Sequence[Bird],
    target: Place,
    arrows: Path | None,
    settings: Settings,
    on_step: OnStep | None = None,
) -> Made:
    """The page with all birds in the target's pose, each bird's picture and mask, and the target's mask.

    ``on_step`` is called with the steps taken for all birds together. All start from the same noise. Raises UserError
    for no birds or too many, and for arrows that do not fit.
    """
    check_birds(birds)
    height, width = target.photo.pixels.shape[:2]
    labels = [bird.label for bird in birds]
    marks = [] if arrows is None else plates.read_arrows(arrows, labels, height, width)
    drawn, rows, files = [], [], {"target_mask": target.mask}
    for number, bird in enumerate(birds):

        def told(step: int, done: int = number * settings.steps) -> None:
            if on_step is not None:
                on_step(done + step)

        made = repose(reposer, bird.photo, bird.mask, target, settings, told)
        drawn.append(plates.Drawn(bird.label, bird.photo.pixels, made.pixels))
        name = f"{number + 1:02d}"
        rows.append({"label": bird.label, "file": f"{name}.png", **made.manifest})
        files |= {name: made.pixels, f"{name}_mask": bird.mask}
    page = plates.compose(drawn, marks, target.photo.pixels, target.mask)
    arrows_drawn = [dataclasses.asdict(mark) for mark in marks]
    return Made(page, {"birds": rows, "arrows": arrows_drawn, "pixels_sha256": _sha256(page)}, files)


def check_birds(birds: Sequence[Bird]) -> None:
    """Raises UserError for no birds, too many, and for labels that are empty or there twice."""
    if not 1 <= len(birds) <= MAX_BIRDS:
        raise UserError(f"plate: found {len(birds)} birds, expected 1 to {MAX_BIRDS}")
    seen: set[str] = set()
    for bird in birds:
        if not bird.label.strip() or len(bird.label) > LABEL:
            raise UserError(f"label: found {bird.label[:20]!r}, expected 1 to {LABEL} characters")
        if bird.label in seen or bird.label == plates.EVERY:
            raise UserError(f"label: found {bird.label!r} twice or for every bird, expected one of its own")
        seen.add(bird.label)


def save(made: Made, folder: Path, name: str) -> tuple[Path, Path]:
    """Writes ``folder/name.png`` and ``folder/name.zip``: the picture, its manifest ``name.json``, ``made.files``."""
    picture, everything, listing = (folder / f"{name}{suffix}" for suffix in (".png", ".zip", ".json"))
    images.write_image(made.pixels, picture)
    about = {"nabla_jax": nabla_jax.__version__, "file": picture.name, "sha256": file_sha256(picture)}
    runs.write_json(listing, {**about, **made.manifest})
    files = [picture, listing]
    for further, pixels in made.files.items():
        files.append(folder / f"{further}.png")
        images.write_image(_grey(pixels) if pixels.dtype == bool else pixels, files[-1])
    with zipfile.ZipFile(everything, "w") as archive:
        for file in files:
            archive.write(file, file.name)
    return picture, everything


def _shared(reposer: api.Reposer, target: Place, settings: Settings) -> dict[str, Any]:
    conditioning = reposer.conditioning
    return {
        "target": _named(target.photo, target.mask),
        **({} if target.depth is None else {"target_depth_sha256": _sha256(target.depth)}),
        **({} if target.keypoints is None else {"target_keypoints_sha256": _sha256(target.keypoints)}),
        **({} if target.caption is None else {"target_caption": target.caption}),
        "method": conditioning.method,
        "control": conditioning.control,
        "adapter": str(reposer.adapter_path),
        "adapter_sha256": reposer.adapter_sha256,
        "base": str(reposer.base_path),
        "base_sha256": reposer.base_sha256,
        **dataclasses.asdict(settings),
        "guidance": reposer.defaults.guidance,
    }


def _named(photo: Photo, mask: Array) -> dict[str, Any]:
    """Hashes are of decoded pixels: of [H, W, 3] uint8, and of the mask as [H, W] uint8 of 0 and 255."""
    return {"name": photo.name, "pixels_sha256": _sha256(photo.pixels), "mask_sha256": _sha256(_grey(mask))}


def _grey(mask: Array) -> Array:
    return np.where(mask, np.uint8(255), np.uint8(0))


def _sha256(pixels: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
