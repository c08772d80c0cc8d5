"""Reading pictures and what is known about them, and making the model's inputs: one geometry for every command."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from nabla_jax import images
from nabla_jax.conditioning.geometry import Placement
from nabla_jax.config import CONTROL_GROUP, Conditioning, known_controls
from nabla_jax.data import skeleton
from nabla_jax.data.dataset import Example
from nabla_jax.errors import UserError
from nabla_jax.hashing import file_sha256
from nabla_jax.images import Array, Method, PathLike

WHITE = 255
BLACK = 0

read_image = images.read_rgb
picture_size = images.picture_size


@dataclasses.dataclass(frozen=True)
class View:
    """A picture and what is known about its bird, all at the picture's own size.

    Attributes:
      image: [H, W, 3] uint8.
      mask: [H, W] bool, the bird's silhouette.
      depth: [H, W] uint8, near is bright; only control depth needs it.
      keypoints: [parts, 3] int (row, column, visible), parts as in ``skeleton.PARTS``; only control keypoints needs it.
    """

    image: Array
    mask: Array
    depth: Array | None = None
    keypoints: Array | None = None


@dataclasses.dataclass(frozen=True)
class Control:
    """A spatial control: how it is drawn at native size, and how it gets onto the canvas.

    Attributes:
      draw: a view with all that ``needs`` names -> [H, W, 3] uint8.
      fill: grey level of the canvas round the picture.
      filter: how the square is resized.
      needs: the field of an example (and of a view) without which there is no such control, beside its mask.
    """

    draw: Callable[[View, Conditioning], Array]
    fill: int
    filter: Method
    needs: Literal["depth", "keypoints"] | None = None


def _fill(view: View, _: Conditioning) -> Array:
    """The picture with the silhouette cut out: black. The canvas round it is white, like that of every picture."""
    return np.where(view.mask[:, :, None], np.uint8(0), view.image)


def _depth(view: View, _: Conditioning) -> Array:
    assert view.depth is not None
    return np.repeat(view.depth[:, :, None], 3, axis=2)


def _keypoints(view: View, conditioning: Conditioning) -> Array:
    assert view.keypoints is not None
    height, width = view.image.shape[:2]
    return skeleton.draw(
        view.keypoints, height, width, conditioning.skeleton, dot=conditioning.dot, line=conditioning.line
    )


CONTROLS: dict[str, Control] = {
    "fill": Control(_fill, WHITE, "bilinear"),
    # Nearest: between two depths, or two parts' colours, lies a third that is not there.
    "depth": Control(_depth, BLACK, "nearest", needs="depth"),
    "keypoints": Control(_keypoints, BLACK, "nearest", needs="keypoints"),
}
"""The spatial controls that are built in, by the name that ``conditioning.control`` gives."""


def find_control(kind: str) -> Control:
    """The control named ``kind``: a built-in one, or an entry point of the group ``nabla_jax.controls``.

    Raises UserError for an unknown name, and for an entry point that is not a ``Control``.
    """
    return CONTROLS[kind] if kind in CONTROLS else _installed_control(kind)


@functools.cache
def _installed_control(kind: str) -> Control:
    known = known_controls()
    entry = known.get(kind)
    if entry is None:
        raise UserError(f"conditioning.control: found {kind!r}, expected one of {', '.join(known)}")
    control = entry.load()
    if not isinstance(control, Control):
        raise UserError(
            f"conditioning.control: {kind!r} of {CONTROL_GROUP} is {entry.value}, found a {type(control).__name__}, "
            "expected a nabla_jax.data.controls.Control"
        )
    return control


# ------------------------------------------------------------------------------------------------------------
# Canvases
# ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Canvas:
    """A picture on the model's square canvas and where it lies there."""

    pixels: Array  # [size, size, 3] uint8
    placement: Placement


def target_canvas(image: Array, size: int, placement: Placement | None = None) -> Canvas:
    """The target picture, padded white, Lanczos: what the model learns to draw.

    ``placement`` places it (see ``target_placement``); by default the whole of it.
    """
    placement = placement or Placement.square(image.shape[0], image.shape[1], size)
    return Canvas(placement.apply(image, WHITE, "lanczos"), placement)


def target_placement(mask: Array, size: int, window: float) -> Placement:
    """The whole picture of a bird's silhouette [H, W], or a square round the bird, ``window`` times its box.

    Raises UserError for an empty mask.
    """
    return Placement.around(mask, size, window) if window else Placement.square(mask.shape[0], mask.shape[1], size)


def repaint_canvas(mask: Array, placement: Placement) -> Array:
    """The part to repaint [H, W] bool as placed on the canvas: [size, size] uint8, 1 is repainted.

    Of a bird smaller than a pixel of the canvas every pixel that it touches.
    """
    white = mask.astype(np.uint8) * np.uint8(255)
    inside = placement.apply(white, BLACK, "bilinear") > 127
    if not inside.any():
        inside = placement.apply(white.astype(np.float32), BLACK, "area") > 0
    return inside.astype(np.uint8)


def subject_canvas(image: Array, mask: Array, size: int, expansion: float = 1.0) -> Canvas:
    """The box round the subject, background kept, padded white to ``expansion`` times its size, Lanczos.

    Raises UserError for an empty mask.
    """
    placement = Placement.subject(mask, size, expansion)
    return Canvas(placement.apply(image, WHITE, "lanczos"), placement)


def control_canvas(view: View, conditioning: Conditioning) -> Canvas:
    """The control ``conditioning.control`` of the target ``view``, on the same placement as the target itself.

    A compact one is as much smaller as ``conditioning.compact`` says.

    Raises UserError for an unknown control, for a view without what the control is made of, and for a drawing of
    another shape or dtype than the picture's.
    """
    control = find_control(conditioning.control)
    if control.needs is not None and getattr(view, control.needs) is None:
        raise UserError(f"control {conditioning.control}: the target has no {control.needs}, expected them with it")
    drawn = control.draw(view, conditioning)
    if drawn.shape != view.image.shape or drawn.dtype != np.uint8:
        raise UserError(
            f"control {conditioning.control}: drew {drawn.dtype} of shape {drawn.shape}, expected uint8 "
            f"{view.image.shape}, as the picture"
        )
    placement = Placement.square(view.image.shape[0], view.image.shape[1], conditioning.condition_size)
    return Canvas(placement.apply(drawn, control.fill, control.filter), placement)


def latent_mask(mask: Array, size: int, factor: int = 8, placement: Placement | None = None) -> Array:
    """The target's foreground coverage of each latent, 0..255 uint8 [size / factor, size / factor].

    ``placement`` is that of the target's canvas; by default of the whole picture.
    """
    placement = placement or Placement.square(mask.shape[0], mask.shape[1], size)
    placement = dataclasses.replace(placement, size=size // factor)
    return placement.apply(mask.astype(np.uint8) * np.uint8(255), 0, "area")


# ------------------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------------------


def read_mask(path: PathLike, height: int, width: int) -> Array:
    """The mask as [height, width] bool: stored values above 127 are foreground.

    Raises UserError naming the file when it cannot be read, has another size than its picture, or is empty.
    """
    mask = images.read_mask(path, (height, width))
    if not mask.any():
        raise UserError(f"{path}: mask is empty, expected foreground pixels above 127")
    return mask


def read_depth(path: PathLike, height: int, width: int) -> Array:
    """The depth map as [height, width] uint8, near is bright. Raises UserError as ``read_mask`` does."""
    return images.read_grey(path, (height, width), "depth map")


def read_keypoints(path: PathLike, height: int, width: int) -> Array:
    """Keypoints of one picture from a text file: a line ``part x y visible`` for each part, in any order.

    These are the lines of NABirds' ``part_locs.txt`` without the picture's id. Returns [11, 3] int32 (row, column,
    visible). Raises UserError naming file and line.
    """
    try:
        with open(path, encoding="utf-8") as file:
            numbered = [(n, line.split()) for n, line in enumerate(file, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    found: dict[int, tuple[int, int, int]] = {}
    for number, words in numbered:
        try:
            part, x, y, visible = (int(word) for word in words)
        except ValueError:
            raise UserError(f"{path}:{number}: found {' '.join(words)!r}, expected part x y visible") from None
        if part in found or not 0 <= part < len(skeleton.PARTS):
            raise UserError(f"{path}:{number}: part {part}, expected each of 0 to {len(skeleton.PARTS) - 1} once")
        found[part] = (y, x, visible)
    if len(found) != len(skeleton.PARTS):
        raise UserError(f"{path}: found {len(found)} parts, expected {len(skeleton.PARTS)}")
    keypoints = np.array([found[part] for part in sorted(found)], np.int32)
    check_keypoints(keypoints, height, width, str(path))
    return keypoints


def check_keypoints(keypoints: Array, height: int, width: int, where: str) -> None:
    """Raises UserError if a visible keypoint lies far outside its picture, as it does when the picture was turned.

    Annotators click a little beside the border: a tenth of the picture's size is let through.
    """
    if keypoints.shape != (len(skeleton.PARTS), 3):
        raise UserError(f"{where}: found {keypoints.shape[0]} keypoints, expected {len(skeleton.PARTS)}")
    rows, columns = keypoints[keypoints[:, 2] != 0, :2].T
    margin = max(height, width) / 10
    outside = (rows < -margin) | (rows > height + margin) | (columns < -margin) | (columns > width + margin)
    if outside.any():
        row, column = rows[outside][0], columns[outside][0]
        raise UserError(
            f"{where}: keypoint at row {row}, column {column} lies outside its picture of {height}x{width} "
            "(height x width)"
        )


def read_pair(image: PathLike, mask: PathLike) -> tuple[Array, Array]:
    """A picture [H, W, 3] uint8 and its mask [H, W] bool. Raises UserError like the two readers."""
    pixels = read_image(image)
    return pixels, read_mask(mask, *pixels.shape[:2])


def read_view(example: Example, *kinds: str) -> View:
    """Everything that the subject and the controls ``kinds`` are made of.

    Raises UserError for files that are absent, cannot be read or are of another size than the picture.
    """
    require([example], *kinds)
    assert example.mask is not None
    image, mask = read_pair(example.image, example.mask)
    depth, keypoints = _read_needed(example, kinds, *image.shape[:2])
    return View(image, mask, depth, keypoints)


def require(examples: Sequence[Example], *kinds: str) -> None:
    """Raises one UserError if examples lack their mask or what the controls ``kinds`` are made of; opens no file."""
    listed = "keypoints.json (parts/part_locs.txt in NABirds) to list them"
    expected = {"mask": "a PNG for each", "depth": "a PNG for each", "keypoints": listed}
    for field in ("mask", *needed_fields(kinds)):
        require_field(examples, field, expected[field])


def require_field(examples: Sequence[Example], field: str, expected: str) -> None:
    """Raises one UserError, ending with what was ``expected``, if examples lack ``field``."""
    absent = [example for example in examples if not _has(example, field)]
    if absent:
        raise UserError(
            f"{absent[0].image}: has no {field}; {len(absent)} of {len(examples)} pictures have none, "
            f"expected {expected}; python -m nabla_jax.extract makes them"
        )


def _has(example: Example, field: str) -> bool:
    value = getattr(example, field)
    return bool(value.strip()) if isinstance(value, str) else value is not None


def check(example: Example, *kinds: str) -> str:
    """Checks the files of an example that ``require`` let pass, opening the picture's header only.

    Returns hashes of all that its records depend on. Raises UserError like ``read_view``.
    """
    assert example.mask is not None
    size = picture_size(example.image)
    read_mask(example.mask, *size)
    hashes = [file_sha256(example.image), file_sha256(example.mask)]
    depth, keypoints = _read_needed(example, kinds, *size)
    if depth is not None:
        assert example.depth is not None
        hashes.append(file_sha256(example.depth))
    if keypoints is not None:
        hashes.append(hashlib.sha256(keypoints.astype("<i4").tobytes()).hexdigest())
    return " ".join(hashes)


def needed_fields(kinds: Sequence[str]) -> tuple[str, ...]:
    """The fields of an example that the controls need beside its mask, each once."""
    return tuple(dict.fromkeys(needs for kind in kinds if (needs := find_control(kind).needs) is not None))


def _read_needed(example: Example, kinds: Sequence[str], height: int, width: int) -> tuple[Array | None, Array | None]:
    needs = needed_fields(kinds)
    depth = keypoints = None
    if "depth" in needs:
        assert example.depth is not None
        depth = read_depth(example.depth, height, width)
    if "keypoints" in needs:
        assert example.keypoints is not None
        keypoints = example.keypoints
        check_keypoints(keypoints, height, width, str(example.image))
    return depth, keypoints
