"""Networks that judge birds: DINOv2, SigLIP, LPIPS and keypoints as functions of pictures, batched over this process's
devices.

A picture becomes a ``Description``, arrays by name:

- ``dinov2``, ``siglip`` [D]: unit vectors of the whole masked picture through the checkpoint's own processor, DINOv2's
  class token and SigLIP's pooled vector
- ``dinov2_box``, ``siglip_box`` [D]: the same of the cut-out bird, resized to the network's input and not cropped
- ``patches`` [n, D] float16: unit vectors of the cut-out's n foreground patches, of the SigLIP (2) of ``patches``

- ``keypoints`` [P, 3] float32: (row, column, probability of being visible) of the parts, in pixels of the picture,
  found in a square round the bird's box, background kept: a silhouette would give the pose away

LPIPS compares two pictures directly. Everything is computed in float32.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nabla_jax import assets
from nabla_jax import config as configs
from nabla_jax.checkpoints import transformers_folder
from nabla_jax.conditioning.geometry import Box
from nabla_jax.errors import UserError
from nabla_jax.hashing import file_sha256
from nabla_jax.keypoints import crops
from nabla_jax.metrics.birds import MaskedBird, patch_shares
from nabla_jax.metrics.patches import foreground_patches
from nabla_jax.metrics.preprocessing import ImageProcessor, lpips_pixels
from nabla_jax.models import layers
from nabla_jax.models.keypoint_head import KeypointHeadConfig
from nabla_jax.models.lpips import MIN_SIDE
from nabla_jax.parallel import mesh as meshes

Array = np.ndarray[Any, Any]
Description = Mapping[str, Array]

WHOLE = ("dinov2", "siglip")
BOX = ("dinov2_box", "siglip_box")
PATCHES = "patches"
ALL = (*WHOLE, *BOX, PATCHES)
"""The arrays of birds on black ground."""
KEYPOINTS = "keypoints"
COLOURS = "colours"
"""``birds.colours`` of the cut-out, which no network gives."""

_LOADERS = {"dinov2": transformers_folder.load_dinov2, "siglip": transformers_folder.load_siglip}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A vision transformer with its processor; ``run`` takes [batch, 3, h, w] float32 to pooled [batch, D] and
    patches [batch, N, D], which stay on the devices.
    """

    run: Callable[[Array], tuple[Array, jax.Array]]
    whole: ImageProcessor
    box: ImageProcessor
    grid: tuple[int, int]  # patches of a cut-out


@dataclasses.dataclass(frozen=True)
class Detector:
    """A keypoint head on its DINOv2; ``run`` takes crops [batch, 3, S, S] float32 to [batch, P, 3] (row, column from 0
    to 1, probability of being visible).
    """

    run: Callable[[Array], Array]
    processor: ImageProcessor
    config: KeypointHeadConfig
    batch: int

    def __call__(self, pictures: Sequence[Array], boxes: Sequence[Box]) -> Array:
        """The keypoints of birds in ``boxes`` (top, left, bottom, right) of pictures [H, W, 3] uint8 of any sizes.

        Returns [n, P, 3] float32: (row, column) in pixels of the picture, probability of being visible.
        """
        found = np.zeros((len(pictures), len(self.config.parts), 3), np.float32)
        for part in _slices(len(pictures), self.batch):
            given = list(zip(pictures[part], boxes[part], strict=True))
            places = [
                crops.place(box, picture.shape[0], picture.shape[1], self.config.margin, self.config.image_size)
                for picture, box in given
            ]
            pixels = self.processor(
                [crops.cut(picture, place) for (picture, _), place in zip(given, places, strict=True)]
            )
            values = self.run(_padded(pixels, self.batch))[: len(given)]
            found[part] = values
            for row, place in zip(found[part], places, strict=True):
                row[:, :2] = crops.to_picture(row[:, :2], place)
        return found


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks of a configuration, on this process's devices; None where it names none.

    ``batch`` pictures go through at a time, ``box`` is the side in pixels of a cut-out for LPIPS. ``fingerprint``
    changes with anything that could change a value.
    """

    dinov2: Encoder | None
    siglip: Encoder | None
    patches: Encoder | None
    lpips: Callable[[Array, Array, Array], Array] | None
    keypoints: Detector | None
    batch: int
    box: ImageProcessor
    fingerprint: str

    @property
    def names(self) -> tuple[str, ...]:
        """The arrays that descriptions have."""
        encoders = {"dinov2": self.dinov2, "siglip": self.siglip, "patches": self.patches}
        return tuple(name for name in ALL if encoders[name.removesuffix("_box")] is not None)


def load_networks(metrics: configs.Metrics) -> Networks | None:
    """Loads what the configuration names; None if it names nothing. Raises UserError for what does not fit."""
    folders = {name: assets.resolve(path) for name, path in metrics.folders.items()}
    if not folders:
        return None
    devices = jax.local_devices()
    mesh = meshes.data_mesh(devices)
    encoders: dict[Path, Encoder] = {}
    for name, folder in folders.items():
        if name in ("dinov2", "siglip", "patches") and folder not in encoders:
            encoders[folder] = load_encoder(folder, "dinov2" if name == "dinov2" else "siglip", mesh)
    found = {name: encoders.get(folder) for name, folder in folders.items()}
    lpips = _load_lpips(folders["lpips"], mesh) if "lpips" in folders else None
    batch = -(-metrics.batch // len(devices)) * len(devices)
    keypoints = None
    if "keypoints" in folders:
        _require_dinov2(metrics)
        keypoints = _load_head(folders["keypoints"], folders["dinov2"], encoders[folders["dinov2"]], mesh, batch)
    return Networks(
        found.get("dinov2"),
        found.get("siglip"),
        found.get("patches"),
        lpips,
        keypoints,
        batch=batch,
        box=ImageProcessor((metrics.box, metrics.box)),
        fingerprint=fingerprint(metrics),
    )


def fingerprint(metrics: configs.Metrics) -> str:
    """Hash of the networks' files and of the settings that change values."""
    digest = hashlib.sha256(f"box {metrics.box}".encode())
    for name, path in metrics.folders.items():
        files = sorted(p for p in assets.resolve(path).iterdir() if p.suffix in (".json", ".safetensors"))
        for file in files:
            digest.update(f"\n{name} {file.name} {file_sha256(file)}".encode())
    return digest.hexdigest()[:16]


def check_networks(metrics: configs.Metrics) -> None:
    """Raises UserError, as loading would, for a folder of another network; reads no weights."""
    for name, path in metrics.folders.items():
        folder = assets.resolve(path)
        transformers_folder.check_network(folder, "siglip" if name == "patches" else name)
        if name == "keypoints":
            _require_dinov2(metrics)
            transformers_folder.check_keypoint_head(folder, assets.resolve(metrics.dinov2))
        elif name != "lpips":
            ImageProcessor.from_json(folder / "preprocessor_config.json")


def _require_dinov2(metrics: configs.Metrics) -> None:
    if not metrics.dinov2:
        raise UserError(
            f"metrics.dinov2: found nothing, expected the folder of the DINOv2 that metrics.keypoints "
            f"({metrics.keypoints}) was trained on"
        )


def load_detector(folder: Path, dinov2: Path, batch: int = 1) -> Detector:
    """A keypoint head and its DINOv2 alone, on one device. Raises UserError for what does not fit."""
    mesh = meshes.data_mesh(jax.local_devices()[:1])
    return _load_head(folder, dinov2, load_encoder(dinov2, "dinov2", mesh), mesh, batch)


def _load_head(folder: Path, dinov2: Path, encoder: Encoder, mesh: jax.sharding.Mesh, batch: int) -> Detector:
    head = transformers_folder.load_keypoint_head(folder, dinov2, sharding=meshes.replicated(mesh))
    find = finder(head.graphdef, encoder)
    return Detector(lambda pixels: find(head.params, pixels), processor_at(encoder, head.config), head.config, batch)


def processor_at(encoder: Encoder, config: KeypointHeadConfig) -> ImageProcessor:
    """The DINOv2's own processor for the head's crops."""
    return dataclasses.replace(encoder.whole, size=(config.image_size, config.image_size), crop=None)


def finder(graphdef: Any, encoder: Encoder) -> Callable[[layers.Params, Array], Array]:
    """(parameters of a head, crops [batch, 3, S, S]) -> what ``Detector.run`` gives."""

    @jax.jit
    def apply(params: layers.Params, patches: jax.Array, pixels: jax.Array) -> jax.Array:
        found = layers.bind(graphdef, params)(patches, pixels)
        return jnp.concatenate([found.positions, jax.nn.sigmoid(found.visible)[..., None]], axis=-1)

    def run(params: layers.Params, pixels: Array) -> Array:
        with jax.default_matmul_precision("highest"):
            return np.asarray(apply(params, encoder.run(pixels)[1], pixels))

    return run


def load_encoder(folder: Path, name: str, mesh: jax.sharding.Mesh) -> Encoder:
    """The vision transformer in ``folder``, of the kind ``dinov2`` or ``siglip``, on the devices of ``mesh``."""
    network = _LOADERS[name](folder, sharding=meshes.replicated(mesh))
    whole = ImageProcessor.from_json(folder / "preprocessor_config.json")
    size = whole.crop or ((whole.size, whole.size) if isinstance(whole.size, int) else whole.size)

    @jax.jit
    def apply(params: layers.Params, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        features = layers.bind(network.graphdef, params)(pixels)
        return features.pooled, features.patches

    def run(pixels: Array) -> tuple[Array, jax.Array]:
        # Accelerators would multiply float32 in fewer bits by themselves.
        with jax.default_matmul_precision("highest"):
            pooled, patches = apply(network.params, meshes.put_batch(pixels, mesh))
        return np.asarray(pooled), patches

    patch = network.config.patch_size
    box = dataclasses.replace(whole, size=size, crop=None)
    return Encoder(run, whole, box, (size[0] // patch, size[1] // patch))


def _load_lpips(folder: Path, mesh: jax.sharding.Mesh) -> Callable[[Array, Array, Array], Array]:
    network = transformers_folder.load_lpips(folder, sharding=meshes.replicated(mesh))
    apply = jax.jit(lambda params, a, b, sizes: layers.bind(network.graphdef, params)(a, b, sizes))

    def run(a: Array, b: Array, sizes: Array) -> Array:
        with jax.default_matmul_precision("highest"):
            return np.asarray(apply(network.params, *meshes.put_batch((a, b, sizes), mesh)))

    return run


def describe(networks: Networks, birds: Sequence[MaskedBird], names: Collection[str] = ALL) -> list[Description]:
    """Descriptions of birds, with those of the arrays ``names`` that there are networks for."""
    found: list[dict[str, Array]] = [{} for _ in birds]
    wanted = [name for name in networks.names if name in names]
    for part in _slices(len(birds), networks.batch):
        for name, value in _describe_batch(networks, birds[part], wanted):
            for row, array in zip(found[part], value, strict=True):
                row[name] = array
    return list(found)


def _describe_batch(
    networks: Networks, birds: Sequence[MaskedBird], wanted: Collection[str]
) -> Iterator[tuple[str, Sequence[Array]]]:
    for name, encoder in (("dinov2", networks.dinov2), ("siglip", networks.siglip)):
        if encoder is not None and name in wanted:
            pooled, _ = encoder.run(_padded(encoder.whole([bird.whole for bird in birds]), networks.batch))
            yield name, list(_unit(pooled[: len(birds)]))
    boxed: dict[int, tuple[Array, Any]] = {}
    users = {"dinov2_box": networks.dinov2, "siglip_box": networks.siglip, PATCHES: networks.patches}
    for name, encoder in users.items():
        if encoder is None or name not in wanted:
            continue
        # One pass serves the pooled vector and the patches of one network.
        if id(encoder) not in boxed:
            boxed[id(encoder)] = encoder.run(_padded(encoder.box([bird.box for bird in birds]), networks.batch))
        pooled, patches = boxed[id(encoder)]
        if name != PATCHES:
            yield name, list(_unit(pooled[: len(birds)]))
            continue
        chosen = [foreground_patches(patch_shares(bird.inside, encoder.grid)) for bird in birds]
        vectors = np.asarray(patches)
        # Half precision: stored by the thousand, and cosines keep four decimals.
        yield name, [_unit(v[c]).astype(np.float16) for v, c in zip(vectors[: len(birds)], chosen, strict=True)]


def whole_distances(networks: Networks, a: Sequence[MaskedBird], b: Sequence[MaskedBird]) -> Array:
    """LPIPS of pairs of whole masked pictures, [n] float32; the pictures of a pair have one size.

    Raises UserError for pictures smaller than LPIPS can see.
    """
    return _distances(networks, [bird.whole for bird in a], [bird.whole for bird in b])


def box_distances(networks: Networks, a: Sequence[MaskedBird], b: Sequence[MaskedBird]) -> Array:
    """LPIPS of pairs of cut-outs brought to one size, [n] float32."""
    return _distances(networks, *([networks.box.resize(bird.box) for bird in side] for side in (a, b)))


def _distances(networks: Networks, a: Sequence[Array], b: Sequence[Array]) -> Array:
    assert networks.lpips is not None
    canvases: dict[tuple[int, int], list[int]] = {}
    for i, picture in enumerate(a):
        height, width = picture.shape[:2]
        if min(height, width) < MIN_SIDE:
            raise UserError(f"LPIPS: picture is {height}x{width}, expected at least {MIN_SIDE}x{MIN_SIDE} pixels")
        canvases.setdefault((_canvas(height), _canvas(width)), []).append(i)
    distances = np.zeros(len(a), np.float32)
    for (height, width), places in canvases.items():
        remaining = iter(places)
        # VGG keeps hundreds of bytes for every pixel: large pictures go through in smaller batches.
        for rows in _portions(len(places), _fitting(networks.batch, height * width)):
            own = list(itertools.islice(remaining, rows))
            canvas = np.zeros((2, len(own), height, width, 3), np.uint8)
            sizes = np.array([a[i].shape[:2] for i in own], np.int32)
            for row, i in enumerate(own):
                for side, picture in enumerate((a[i], b[i])):
                    canvas[side, row, : picture.shape[0], : picture.shape[1]] = picture
            inputs = (lpips_pixels(canvas[0]), lpips_pixels(canvas[1]), sizes)
            distances[own] = networks.lpips(*(_padded(x, rows) for x in inputs))[: len(own)]
    return distances


def _canvas(side: int) -> int:
    """The side of the canvas a picture's side is put on: few different ones, at most a seventh longer."""
    step = max(MIN_SIDE, 1 << max(side.bit_length() - 4, 0))
    return -(-side // step) * step


def _fitting(batch: int, pixels: int) -> int:
    count = len(jax.local_devices())
    return max(min(batch, batch * 224 * 224 // pixels) // count, 1) * count


def _portions(count: int, batch: int) -> list[int]:
    """Sizes of the batches that ``count`` pairs go through in: full ones, then a power of two a device for each bit of
    the rest. A few of each size are common, VGG is too dear to fill a batch, and a program for every count too many.
    """
    devices = len(jax.local_devices())
    full, rest = divmod(count, batch)
    shares = -(-rest // devices)
    return [batch] * full + [devices << bit for bit in reversed(range(shares.bit_length())) if shares >> bit & 1]


def _padded(rows: Array, batch: int) -> Array:
    """Filled up with its last row, so that every batch runs the same program."""
    return rows if len(rows) == batch else np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows), axis=0)])


def _slices(count: int, batch: int) -> list[slice]:
    return [slice(start, min(start + batch, count)) for start in range(0, count, batch)]


def _unit(vectors: Array) -> Array:
    values = vectors.astype(np.float32)
    unit: Array = values / np.linalg.norm(values, axis=-1, keepdims=True)
    return unit
