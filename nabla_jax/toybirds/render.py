"""Ray-cast a bird of shaded ellipsoids: picture, mask, depth, part map and keypoints in one consistent pass.

World axes: x right, y up, z towards the camera; orthographic. A bird's own axes: x forward, y up, z to its
right. An ellipsoid is a centre and a matrix whose columns are its semi-axes; its canonical coordinates are
the unit sphere's. Only + - * / and sqrt act on arrays, so pictures are bit-identical across processors.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from nabla_jax.toybirds.identity import Colour, Identity, Mark, Shape
from nabla_jax.toybirds.scene import Scene

PARTS = (
    "background", "body", "rear", "neck", "head", "bill", "left eye", "right eye", "tail", "left wing",
    "right wing", "left leg", "right leg",
)  # fmt: skip
_PART = {name: k for k, name in enumerate(PARTS)}
KEYPOINTS = (
    "bill", "crown", "nape", "left eye", "right eye", "belly", "breast", "back", "tail", "left wing",
    "right wing",
)  # fmt: skip
# keypoint -> (owning part, canonical point on its sphere, parts on which it may be seen)
_ANCHORS: tuple[tuple[str, tuple[float, float, float], tuple[str, ...]], ...] = (
    ("bill", (0.93, 0.0, 0.0), ("bill",)),
    ("head", (0.05, 0.90, 0.0), ("head",)),
    ("head", (-0.88, 0.05, 0.0), ("head", "neck", "body")),
    ("left eye", (0.0, 0.0, -1.0), ("left eye",)),
    ("right eye", (0.0, 0.0, 1.0), ("right eye",)),
    ("body", (0.10, -0.90, 0.0), ("body", "rear")),
    ("body", (0.85, -0.20, 0.0), ("body", "neck")),
    ("body", (-0.20, 0.90, 0.0), ("body", "rear", "neck")),
    ("tail", (-0.85, 0.0, 0.0), ("tail",)),
    ("left wing", (0.0, 0.0, -1.0), ("left wing",)),
    ("right wing", (0.0, 0.0, 1.0), ("right wing",)),
)
_FARTHEST_FACING = -0.35  # a keypoint whose surface turns away more than this cannot be seen

F32 = np.float32
Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Render:
    """One picture of H by W pixels.

    rgb uint8 [H, W, 3]; mask bool [H, W]; depth float32 [H, W] (0 background, else 0.3 far .. 1 near);
    parts uint8 [H, W] (indices into PARTS); keypoints float32 [11, 3] (x, y in pixels, visible 0 or 1) in
    the order of KEYPOINTS; box (x, y, width, height), float, the bird's own extent, which
    may pass the border.
    """

    rgb: Array
    mask: Array
    depth: Array
    parts: Array
    keypoints: Array
    box: tuple[float, float, float, float]


# ---------------------------------------------------------------- geometry


def _about_z(angle: float) -> Array:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def _about_y(angle: float) -> Array:
    """Turns x (forward) towards z (the camera) for positive angles."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, 0.0, -s], [0.0, 1.0, 0.0], [s, 0.0, c]])


def _about_x(angle: float) -> Array:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])


def pose_bird(shape: Shape, scene: Scene) -> tuple[Array, Array]:
    """Ellipsoids of PARTS[1:] in world units: centres float64 [12, 3] and semi-axis matrices [12, 3, 3]."""
    yaw = _about_y(scene.yaw)
    body = yaw @ _about_z(shape.pitch + scene.pitch)
    head = yaw @ _about_y(scene.head_yaw) @ _about_z(scene.head_pitch)
    h, w = shape.body_height, shape.body_width
    centres: list[Array] = []
    axes: list[Array] = []

    def add(centre: Array, rotation: Array, radii: tuple[float, float, float]) -> None:
        centres.append(centre)
        axes.append(rotation * np.array(radii))

    neck_direction = np.array([0.62, 0.60, 0.0])
    head_centre = body @ (np.array([0.58, 0.48 * h / 0.7, 0.0]) + (0.38 + 0.5 * shape.neck) * neck_direction)
    neck_centre = 0.5 * (head_centre + body @ np.array([0.38, 0.15, 0.0]))
    neck_axis = head_centre - body @ np.array([0.20, 0.0, 0.0])
    neck_length = float(np.sqrt(neck_axis @ neck_axis))
    forward = neck_axis / neck_length
    side = body[:, 2] - (body[:, 2] @ forward) * forward
    side = side / np.sqrt(side @ side)
    neck_rotation = np.stack([forward, np.cross(side, forward), side], axis=1)

    add(np.zeros(3), body, (1.0, h, w))
    add(body @ np.array([-0.60, 0.06, 0.0]), body @ _about_z(-0.10), (0.80, 0.72 * h, 0.72 * w))
    add(neck_centre, neck_rotation, (0.62 * neck_length, 0.80 * shape.head, 0.76 * shape.head))
    r = shape.head
    add(head_centre, head, (1.05 * r, 0.96 * r, 0.90 * r))
    bill = head @ _about_z(-0.10 - 0.5 * shape.bill_droop)
    bill_reach = 0.80 * r + 0.72 * shape.bill_length
    add(
        head_centre + head @ np.array([0.0, -0.06 * r, 0.0]) + bill @ np.array([bill_reach, 0.0, 0.0]), bill,
        (shape.bill_length, shape.bill_height, 0.85 * shape.bill_height),
    )  # fmt: skip
    for sign in (-1.0, 1.0):
        eye = head @ _about_y(-sign * -0.35)
        add(
            head_centre + head @ np.array([0.42 * r, 0.16 * r, sign * 0.72 * r]),
            eye,
            (0.19 * r, 0.19 * r, 0.19 * r),
        )
    tail = body @ _about_z(shape.tail_angle + scene.tail)
    tail_base = body @ np.array([-1.12, 0.08, 0.0])
    add(
        tail_base + tail @ np.array([-0.72 * shape.tail_length, 0.0, 0.0]),
        tail,
        (shape.tail_length, 0.17, shape.tail_width),
    )
    for sign in (-1.0, 1.0):
        wing = body @ _about_z(0.06 + scene.wing) @ _about_x(sign * 0.16)
        shoulder = body @ np.array([0.50, 0.12 * h, sign * 0.74 * w])
        add(
            shoulder + wing @ np.array([-0.88 * shape.wing_length, 0.0, 0.0]), wing,
            (shape.wing_length, shape.wing_height, 0.24),
        )  # fmt: skip
    for sign in (-1.0, 1.0):
        hip = body @ np.array([-0.05, -0.80 * h, sign * 0.30 * w])
        half = 0.5 * shape.leg_length + 0.12
        add(hip - np.array([0.0, half, 0.0]), yaw @ _about_z(0.12), (0.075, half + 0.05, 0.075))
    return np.stack(centres), np.stack(axes)


def place(shape: Shape, scene: Scene) -> tuple[Array, Array, float, tuple[float, float]]:
    """The posed ellipsoids, pixels per world unit, and the pixel (x, y) of the world's origin.

    The scale makes the bird's projected extent fill `scene.fill` of the canvas.
    """
    centres, axes = pose_bird(shape, scene)
    half = np.sqrt((axes[:, :2, :] ** 2).sum(-1))
    low, high = (centres[:, :2] - half).min(0), (centres[:, :2] + half).max(0)
    height, width = scene.canvas
    extent = high - low
    scale = min(scene.fill * width / extent[0], scene.fill * height / extent[1])
    room = 0.5 * np.maximum(np.array([width, height]) - scale * extent, 0.06 * min(width, height))
    middle = 0.5 * (low + high)
    x = 0.5 * width + scene.shift[1] * room[0] - scale * middle[0]
    y = 0.5 * height + scene.shift[0] * room[1] + scale * middle[1]
    return centres, axes, float(scale), (float(x), float(y))


# ---------------------------------------------------------------- plumage


def _step(x: Array, edge: float, softness: float) -> Array:
    """0 below the edge, 1 above, a cubic over edge +- softness."""
    t = np.clip((x - F32(edge - softness)) * F32(0.5 / softness), F32(0), F32(1))
    return t * t * (F32(3) - F32(2) * t)


def _bump(squared: Array) -> Array:
    """A soft disc: 1 at the centre, 0 from squared distance 1 on, flat top."""
    t = np.clip(F32(1.7) * (F32(1) - squared), F32(0), F32(1))
    return t * t * (F32(3) - F32(2) * t)


class _Coat:
    """Colours [3, N] over N surface points, painted from the bottom layer up."""

    def __init__(self, n: int, colour: Colour) -> None:
        self.colours = np.empty((3, n), F32)
        self.colours[:] = np.array(colour, F32)[:, None]

    def paint(self, colour: Colour, weight: Array) -> None:
        self.colours += weight * (np.array(colour, F32)[:, None] - self.colours)

    def mark(self, mark: Mark, weight: Array) -> None:
        self.paint(mark.colour, weight if mark.strength == 1.0 else weight * F32(mark.strength))


def _torso(bird: Identity, p: Array) -> Array:
    """Body, rear and neck share the body's coordinates, so marks run across their seams."""
    x, y = p[0], p[1]
    coat = _Coat(x.size, bird.belly)
    if bird.spots.strength:
        coat.mark(bird.spots, _spots(bird, x, y))
    coat.paint(bird.breast, _step(x + F32(0.25) * y, bird.breast_edge, 0.10))
    if bird.breast_band.strength:
        across = (x + F32(0.35) * y - F32(bird.breast_band.position)) * F32(1 / bird.breast_band.extent)
        coat.mark(bird.breast_band, _bump(across * across))
    coat.paint(bird.back, _step(y - F32(0.15) * x, bird.back_line, 0.12))
    return coat.colours


def _spots(bird: Identity, x: Array, y: Array) -> Array:
    size = F32(1 / (bird.spots.extent * bird.spots.extent))
    weight = np.zeros_like(x)
    for k in range(5):
        cx = -0.60 + 0.38 * (k % 3) + 0.19 * (k // 3) + 0.16 * bird.spot_phase
        cy = -0.16 - 0.42 * (k // 3) - 0.10 * (k % 2)
        dx, dy = x - F32(cx), y - F32(cy)
        np.maximum(weight, _bump((dx * dx + dy * dy) * size), out=weight)
    return weight


def _head(bird: Identity, p: Array) -> Array:
    x, y = p[0], p[1]
    coat = _Coat(x.size, bird.head)
    if bird.throat.strength:
        dx, dy = (x - F32(0.55)) * F32(1 / bird.throat.extent), (y + F32(0.75)) * F32(1 / bird.throat.extent)
        coat.mark(bird.throat, _bump(dx * dx + dy * dy))
    if bird.cheek.strength:
        dx, dy = (
            (x + F32(0.12)) * F32(1 / bird.cheek.extent),
            (y - F32(bird.cheek.position - 0.12)) * F32(1.45),
        )
        coat.mark(bird.cheek, _bump(dx * dx + dy * dy))
    if bird.cap.strength:
        coat.mark(bird.cap, _step(y - F32(0.15) * x, bird.cap.position - 0.06, 0.11))
    if bird.eye_stripe.strength:
        dy = (y - F32(0.10) * x - F32(bird.eye_stripe.position - 0.08)) * F32(1 / bird.eye_stripe.extent)
        coat.mark(bird.eye_stripe, _bump(dy * dy))
    return coat.colours


def _wing(bird: Identity, p: Array) -> Array:
    x, y = p[0], p[1]
    coat = _Coat(x.size, bird.wing)
    slanted = x + F32(0.30) * y
    if bird.wing_tip.strength:
        coat.mark(bird.wing_tip, _step(-slanted, -bird.wing_tip.position, 0.12))
    if bird.shoulder.strength:
        dx, dy = slanted - F32(bird.shoulder.position), (y - F32(0.1)) * F32(0.6)
        coat.mark(bird.shoulder, _bump((dx * dx + dy * dy) * F32(1 / bird.shoulder.extent**2)))
    if bird.wing_bar.strength:
        d = (slanted - F32(bird.wing_bar.position)) * F32(1 / bird.wing_bar.extent)
        coat.mark(bird.wing_bar, _bump(d * d))
    return coat.colours


def _tail(bird: Identity, p: Array) -> Array:
    coat = _Coat(p.shape[1], bird.tail)
    if bird.tail_tip.strength:
        coat.mark(bird.tail_tip, _step(-p[0], -bird.tail_tip.position, 0.12))
    return coat.colours


def _eye(bird: Identity, p: Array) -> Array:
    coat = _Coat(p.shape[1], bird.eye)
    outward = p[2] * p[2]
    coat.paint((0.03, 0.03, 0.04), _step(outward, 0.45, 0.15))
    return coat.colours


def _plain(colour: Colour, p: Array) -> Array:
    return _Coat(p.shape[1], colour).colours


# ---------------------------------------------------------------- picture


@functools.lru_cache(maxsize=64)
def _grid(height: int, width: int) -> tuple[Array, Array]:
    """Pixel centres relative to the canvas, 0..1: rows [H, 1] and columns [1, W]."""
    rows = ((np.arange(height) + 0.5) / height).astype(F32)[:, None]
    return rows, ((np.arange(width) + 0.5) / width).astype(F32)[None, :]


def _background(scene: Scene, foot: float) -> Array:
    """A smooth backdrop float32 [3, H, W]; `foot` is the pixel row of the bird's feet, where a perch runs."""
    height, width = scene.canvas
    rows, columns = _grid(height, width)
    top, bottom = (
        np.array(scene.ground_top, F32)[:, None, None],
        np.array(scene.ground_bottom, F32)[:, None, None],
    )
    ground = top + (bottom - top) * rows + F32(0.12 * scene.light[0]) * (columns - F32(0.5))
    for cy, cx, radius, colour, strength in scene.blobs:
        dy, dx = rows - F32(cy), columns - F32(cx)
        t = np.maximum(F32(1) - (dy * dy + dx * dx) * F32(1 / (radius * radius)), F32(0))
        ground += (F32(strength) * t * t) * (np.array(colour, F32)[:, None, None] - ground)
    if scene.perch:
        thickness = 0.035 * min(height, width)
        centre = F32(foot + 0.4 * thickness) + F32(scene.perch_slope * width) * (columns - F32(0.5))
        across = (np.arange(height, dtype=F32)[:, None] + F32(0.5) - centre) * F32(1 / thickness)
        weight = np.clip((F32(1.25) - np.abs(across)) * F32(0.5 * thickness), F32(0), F32(1))
        shade = F32(1.0) - F32(0.25) * across
        ground += weight * (np.array(scene.perch_colour, F32)[:, None, None] * shade - ground)
    return ground


def _cast(
    centres: Array, axes: Array, scale: float, origin: tuple[float, float], height: int, width: int
) -> tuple[Array, Array]:
    """z-buffer float32 [H, W] (-inf where empty) and part map uint8 [H, W]."""
    near = np.full((height, width), -np.inf, F32)
    parts = np.zeros((height, width), np.uint8)
    for k in range(len(centres)):
        a = axes[k]
        cov = a @ a.T  # the projected silhouette is d^T inverse(cov[:2, :2]) d = 1
        det = cov[0, 0] * cov[1, 1] - cov[0, 1] ** 2
        qxx, qyy, qxy = cov[1, 1] / det, cov[0, 0] / det, -cov[0, 1] / det
        cx, cy = origin[0] + scale * centres[k, 0], origin[1] - scale * centres[k, 1]
        rx, ry = scale * math.sqrt(cov[0, 0]), scale * math.sqrt(cov[1, 1])
        x0, x1 = max(int(math.ceil(cx - rx - 0.5)), 0), min(int(math.floor(cx + rx - 0.5)) + 1, width)
        y0, y1 = max(int(math.ceil(cy - ry - 0.5)), 0), min(int(math.floor(cy + ry - 0.5)) + 1, height)
        if x0 >= x1 or y0 >= y1:
            continue
        dx = ((np.arange(x0, x1) + 0.5 - cx) / scale).astype(F32)[None, :]
        dy = ((cy - np.arange(y0, y1) - 0.5) / scale).astype(F32)[:, None]
        inside = F32(1) - (F32(qxx) * dx * dx + F32(qyy) * dy * dy) - F32(2 * qxy) * (dy * dx)
        # Along the ray the surface is a plane through the silhouette plus a half ellipse towards the camera.
        slope_x, slope_y = cov[0, 2] * qxx + cov[1, 2] * qxy, cov[0, 2] * qxy + cov[1, 2] * qyy
        bulge = math.sqrt(max(cov[2, 2] - slope_x * cov[0, 2] - slope_y * cov[1, 2], 0.0))
        z = np.sqrt(np.maximum(inside, F32(0))) * F32(bulge)
        z += F32(centres[k, 2]) + F32(slope_x) * dx + F32(slope_y) * dy
        window = near[y0:y1, x0:x1]
        closer = (inside > 0) & (z > window)
        np.copyto(window, z, where=closer)
        np.copyto(parts[y0:y1, x0:x1], np.uint8(k + 1), where=closer)
    return near, parts


_TORSO = (_PART["body"], _PART["rear"], _PART["neck"])


def _paint(
    bird: Identity,
    scene: Scene,
    centres: Array,
    axes: Array,
    scale: float,
    origin: tuple[float, float],
    near: Array,
    parts: Array,
) -> Array:
    """Shaded colours float32 [3, H W], zero where there is no bird."""
    width = near.shape[1]
    flat_parts, flat_near = parts.ravel(), near.ravel()
    out = np.zeros((3, flat_parts.size), F32)
    inverses = np.linalg.inv(axes)
    light = np.array(scene.light) / math.sqrt(sum(v * v for v in scene.light))
    painters = {
        _PART["head"]: _head, _PART["tail"]: _tail, _PART["left wing"]: _wing, _PART["right wing"]: _wing,
        _PART["left eye"]: _eye, _PART["right eye"]: _eye,
    }  # fmt: skip
    for k in range(1, len(PARTS)):
        index = np.flatnonzero(flat_parts == k)
        if not index.size:
            continue
        row = index // width
        d = np.empty((3, index.size), F32)
        d[0] = ((index - row * width).astype(F32) + F32(0.5 - origin[0])) * F32(1 / scale)
        d[1] = (F32(origin[1] - 0.5) - row.astype(F32)) * F32(1 / scale)
        d[2] = flat_near[index]
        offset = d - centres[k - 1].astype(F32)[:, None]
        normal = _matvec(inverses[k - 1].T @ inverses[k - 1], offset)
        length = np.sqrt(normal[0] * normal[0] + normal[1] * normal[1] + normal[2] * normal[2])
        facing = (normal[0] * F32(light[0]) + normal[1] * F32(light[1]) + normal[2] * F32(light[2])) / length
        shade = F32(scene.ambient) + F32((1 - scene.ambient) * 0.5) * (facing + F32(1))
        if k in _TORSO:
            colours = _torso(bird, _matvec(inverses[0], d - centres[0].astype(F32)[:, None]))
        elif k in painters:
            colours = painters[k](bird, _matvec(inverses[k - 1], offset))
        else:
            colours = _plain(bird.bill if k == _PART["bill"] else bird.legs, d)
        if k in (_PART["left eye"], _PART["right eye"]):
            shade = shade + F32(4) * np.maximum(facing - F32(0.93), F32(0)) * F32(6)
        out[:, index] = colours * shade
    return out


def _matvec(matrix: Array, v: Array) -> Array:
    """matrix [3, 3] times v [3, N] written out: BLAS may round differently from machine to machine."""
    m = matrix.astype(F32)
    return np.stack([m[i, 0] * v[0] + m[i, 1] * v[1] + m[i, 2] * v[2] for i in range(3)])


def _keypoints(centres: Array, axes: Array, scale: float, origin: tuple[float, float], parts: Array) -> Array:
    """float32 [11, 3]: x, y, visible, which is whether the camera sees the owning part at that point."""
    height, width = parts.shape
    out = np.zeros((len(KEYPOINTS), 3), F32)
    for row, (owner, point, seen_on) in enumerate(_ANCHORS):
        k = _PART[owner] - 1
        unit = np.array(point)
        world = centres[k] + axes[k] @ unit
        normal = np.linalg.inv(axes[k]).T @ unit
        x, y = origin[0] + scale * world[0], origin[1] - scale * world[1]
        column, line = math.floor(x), math.floor(y)
        turned = normal[2] / math.sqrt(normal @ normal)
        turned_away = turned < _FARTHEST_FACING and owner not in (
            "bill",
            "tail",
        )  # thin parts show from anywhere
        visible = (
            0 <= column < width and 0 <= line < height and not turned_away
            and PARTS[parts[line, column]] in seen_on
        )  # fmt: skip
        out[row] = (x, y, float(visible))
    return out


def _pool(x: Array, n: int) -> Array:
    """Mean over n by n cells of the last two axes."""
    h, w = x.shape[-2] // n, x.shape[-1] // n
    total = np.zeros((*x.shape[:-2], h, w), F32)
    for i in range(n):
        for j in range(n):
            total += x[..., i::n, j::n]
    return total * F32(1 / (n * n))


def render(identity: Identity, scene: Scene, antialias: int | None = None) -> Render:
    """Picture `identity` in `scene`; `antialias` is the number of rays per pixel and axis (>= 1).

    By default 2, and more on small canvases, so that there are at least 192 rays along the long side.
    """
    height, width = scene.canvas
    n = antialias or max(2, math.ceil(192 / max(scene.canvas)))
    centres, axes, scale, origin = place(identity.shape, scene)
    fine_origin = (origin[0] * n, origin[1] * n)
    near, fine_parts = _cast(centres, axes, scale * n, fine_origin, height * n, width * n)
    colours = _paint(identity, scene, centres, axes, scale * n, fine_origin, near, fine_parts)
    covered = (fine_parts > 0).astype(F32)
    coverage = _pool(covered, n)
    bird = _pool(colours.reshape(3, height * n, width * n), n)
    legs = centres[-2:], axes[-2:]
    foot = origin[1] - scale * float((legs[0][:, 1] - np.sqrt((legs[1][:, 1] ** 2).sum(-1))).min())
    picture = bird + (F32(1) - coverage) * _background(scene, foot)
    picture *= np.array(scene.tint, F32)[:, None, None]
    rgb = (np.clip(picture, F32(0), F32(1)) * F32(255) + F32(0.5)).astype(np.uint8).transpose(1, 2, 0)

    mask = coverage >= F32(0.5)
    # Nearness with the bird's own half length as unit: 0.65 is the plane through the body's centre.
    nearness = np.where(fine_parts > 0, np.clip(F32(0.65) + F32(0.25) * near, F32(0.3), F32(1)), F32(0))
    depth = np.where(mask, _pool(nearness, n) / np.maximum(coverage, F32(1e-6)), F32(0)).astype(F32)
    corner = (n - 1) // 2
    parts = np.zeros((height, width), np.uint8)
    for i in range(n):
        for j in range(n):
            sample = fine_parts[i::n, j::n]
            np.copyto(parts, sample, where=(parts == 0) & (sample > 0))
    central = fine_parts[corner::n, corner::n]
    parts = np.where(mask, np.where(central > 0, central, parts), np.uint8(0)).astype(np.uint8)
    keypoints = _keypoints(centres, axes, scale, origin, parts)
    half = np.sqrt((axes[:, :2, :] ** 2).sum(-1))
    low, high = (centres[:, :2] - half).min(0), (centres[:, :2] + half).max(0)
    box = (
        origin[0] + scale * float(low[0]), origin[1] - scale * float(high[1]),
        scale * float(high[0] - low[0]), scale * float(high[1] - low[1]),
    )  # fmt: skip
    return Render(np.ascontiguousarray(rgb), mask, depth, parts, keypoints, box)
