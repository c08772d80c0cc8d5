"""A data set small enough to reason about, with an oracle: birds are ellipses of two colours.

The upper colour is the species', the lower one its plumage's; the scene is the ellipse's place and size and
the background. Registered as a world through an entry point by the tests that need one.
"""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np

from nabla_jax.images import write_image

NAME = "ellipses"
UPPER = [(200, 40, 40), (40, 60, 200), (220, 200, 50), (30, 160, 70), (240, 240, 240), (30, 30, 30)]
LOWER = [(120, 90, 60), (210, 190, 170)]
# class id -> (family, species, plumage); classes 21 and 22 are two plumages of one species.
CLASSES = {
    20: (0, 0, 0),
    21: (0, 1, 0),
    22: (0, 1, 1),
    23: (0, 2, 0),
    24: (1, 3, 0),
    25: (1, 4, 0),
    26: (1, 5, 0),
}
PICTURES = 4  # per class


@dataclasses.dataclass(frozen=True)
class Scene:
    """Canvas (height, width), centre and radii of the ellipse, grey of the background."""

    canvas: tuple[int, int]
    centre: tuple[float, float]
    radii: tuple[float, float]
    ground: int


def scene(number):
    rng = np.random.default_rng((7, number))
    height, width = ((40, 52), (48, 36))[number % 2]
    centre = (height * rng.uniform(0.4, 0.6), width * rng.uniform(0.4, 0.6))
    radii = (height * rng.uniform(0.2, 0.3), width * rng.uniform(0.2, 0.3))
    return Scene((height, width), centre, radii, int(rng.integers(80, 160)))


def draw(upper, lower, where):
    """(picture [H, W, 3] uint8, mask [H, W] bool)."""
    y, x = np.mgrid[: where.canvas[0], : where.canvas[1]]
    mask = ((y - where.centre[0]) / where.radii[0]) ** 2 + ((x - where.centre[1]) / where.radii[1]) ** 2 < 1
    picture = np.full((*where.canvas, 3), where.ground, np.uint8)
    picture[mask & (y < where.centre[0])] = upper
    picture[mask & (y >= where.centre[0])] = lower
    return picture, mask


def picture_id(class_id, index):
    return f"{class_id:08x}-0000-4000-8000-{index:012x}"


def name_of(class_id):
    _, species, plumage = CLASSES[class_id]
    return f"Bird {species}" + (" (Female)" if plumage else " (Male)" if species == 1 else "")


class Oracle:
    """Right answers of the world in `root`."""

    def __init__(self, root):
        self.values = json.loads((Path(root) / "oracle.json").read_text())

    def _who(self, image_id):
        return CLASSES[self.values["images"][image_id][0]]

    def _draw(self, species, plumage, target_id):
        return draw(UPPER[species], LOWER[plumage], scene(self.values["images"][target_id][1]))[0]

    def right(self, subject_id, target_id):
        _, species, plumage = self._who(subject_id)
        return self._draw(species, plumage, target_id)

    def sibling(self, subject_id, target_id):
        family, species, plumage = self._who(subject_id)
        return self._draw(3 * family + (species + 1) % 3, plumage, target_id)

    def sibling_plumage(self, subject_id, target_id):
        _, species, plumage = self._who(subject_id)
        return self._draw(species, 1 - plumage, target_id) if species == 1 else None

    def lineup(self, subject_id, target_id):
        _, species, plumage = self._who(subject_id)
        order = [species, *(s for s in range(6) if s != species)]
        return [self._draw(s, plumage, target_id) for s in order]


def write_world(root, oracle=True, empty=None):
    """A NABirds folder of 7 classes, 4 pictures and one row of pairs each; the mask of `empty` is blank."""
    lists = {name: [] for name in ("images", "image_class_labels", "train_test_split")}
    rows, known = ["class_id,image_1,image_2"], {}
    for class_id in CLASSES:
        files = []
        for index in range(PICTURES):
            number = class_id * 10 + index
            id = picture_id(class_id, index)
            file = f"{class_id:04d}/{id.replace('-', '')}.png"
            _, species, plumage = CLASSES[class_id]
            picture, mask = draw(UPPER[species], LOWER[plumage], scene(number))
            write_image(picture, root / "images" / file)
            write_image(np.uint8(255) * (mask & (id != empty)), root / "masks" / file)
            lists["images"].append(f"{id} {file}")
            lists["image_class_labels"].append(f"{id} {class_id}")
            lists["train_test_split"].append(f"{id} 0")
            known[id] = [class_id, number]
            files.append(f"./images/{file}")
        rows.append(f"{class_id:04d},{files[0]},{files[1]}")
    lists["classes"] = ["0 Birds", "1 Family A", "2 Family B", *(f"{c} {name_of(c)}" for c in CLASSES)]
    lists["hierarchy"] = ["1 0", "2 0", *(f"{c} {1 + family}" for c, (family, _, _) in CLASSES.items())]
    for name, lines in lists.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (root / "pairs.csv").write_text("\n".join(rows) + "\n")
    if oracle:
        (root / "oracle.json").write_text(json.dumps({"world": NAME, "seed": 7, "version": 1, "images": known}))
    return root


def register(folder):
    """Makes the world an installed one for processes with `folder` on their path; returns `folder`."""
    info = folder / "ellipses-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ellipses\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[nabla_jax.worlds]\n{NAME} = tests.fake_world\n")
    return folder


def write_pictures(root, folder, make, kinds=("right", "shuffled"), seed=0, settings=None):
    """A picture set as generate writes it: `make(right answer, sibling, target, mask)` is the model."""
    from nabla_jax.data import read_dataset
    from nabla_jax.data.pairs import benchmark_pairs, shuffled_subjects
    from nabla_jax.images import read_mask, read_rgb

    dataset = read_dataset(root)
    pairs = benchmark_pairs(root, dataset)
    others = shuffled_subjects(pairs, dataset, seed)
    oracle = Oracle(root)
    for kind in kinds:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        rows = []
        for pair in pairs:
            used = pair.subject_id if kind == "right" else others[pair.key]
            example = dataset.by_id[pair.target_id]
            target = read_rgb(example.image)
            mask = read_mask(example.mask, target.shape[:2])
            right, sibling = oracle.right(used, pair.target_id), oracle.sibling(used, pair.target_id)
            picture = make(right.astype(float), sibling.astype(float), target.astype(float), mask)
            write_image(np.clip(np.rint(picture), 0, 255).astype(np.uint8), folder / kind / f"{pair.key}.png")
            row = {
                "pair": pair.key,
                "subject_id": pair.subject_id,
                "target_id": pair.target_id,
                "subject_used": used,
                "file": f"{pair.key}.png",
                "height": target.shape[0],
                "width": target.shape[1],
                "seed": 0,
                "steps": 4,
                "guidance": 2.5,
                "adapter": "none",
                "adapter_sha256": None,
                "base_sha256": "0" * 64,
                "placement": {},
            }
            rows.append(json.dumps(row | (settings or {})) + "\n")
        (folder / kind / "manifest.jsonl").write_text("".join(rows))


def environment(folder):
    """The environment of a subprocess that knows the world registered in `folder`."""
    root = Path(__file__).resolve().parent.parent
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(root)])}
