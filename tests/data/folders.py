"""Small dataset folders in the true layouts, with the real data's traps in them."""

import json
import uuid
from pathlib import Path

import numpy as np
from PIL import Image

# Class id -> (name as written, parent). Ids have gaps; leaves lie at depth 3 and 4; names hold odd spaces.
CLASSES = {
    0: ("Birds", None),
    2: ("Ducks, Geese,  and Swans", 0),
    7: ("Perching Birds", 0),
    31: ("Ducks and Geese", 2),
    40: ("Sparrows", 7),
    41: ("Jays  and Crows", 7),
    100: ("Blue-winged Teal", 31),
    295: ("Blue-winged Teal  (Male)", 100),
    297: ("Blue-winged Teal (Female )", 100),
    640: ("Dark-eyed Junco", 40),
    817: ("Dark-eyed Junco (Oregon)", 640),
    1010: ("American Crow", 41),
}
LEAVES = (295, 297, 817, 1010)


def id_of(class_id: int, number: int) -> str:
    """A picture id with dashes, unrelated to the order in which pictures are listed."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{class_id}-{number}"))


def file_of(class_id: int, number: int) -> str:
    # One capital suffix, as 35 of the real pictures have.
    suffix = "JPG" if (class_id, number) == (817, 0) else "jpg"
    return f"{class_id:04d}/{id_of(class_id, number).replace('-', '')}.{suffix}"


def size_of(class_id: int, number: int) -> tuple[int, int]:
    """(height, width)."""
    return 30 + 7 * number + class_id % 5, 52 - 5 * number


def picture(class_id: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Image [H, W, 3] uint8 and mask [H, W] bool."""
    height, width = size_of(class_id, number)
    rng = np.random.default_rng([class_id, number])
    rows, columns = np.mgrid[:height, :width]
    mask = ((rows - height / 2) / (height / 3)) ** 2 + ((columns - width / 2) / (width / 4)) ** 2 < 1
    image = np.repeat(rng.integers(60, 190, (1, 1, 3)), height, 0).repeat(width, 1) + rows[:, :, None] % 30
    image[mask] = rng.integers(0, 256, 3)
    return image.astype(np.uint8), mask


def write_nabirds(root: Path, per_class: int = 4) -> Path:
    """A NABirds folder: pictures 0, 1 of a class are for training, the others for testing."""
    items = [(c, n) for c in LEAVES for n in range(per_class)]
    (root / "parts").mkdir(parents=True)
    names = ["images", "image_class_labels", "train_test_split", "bounding_boxes", "sizes", "photographers"]
    tables: dict[str, list[str]] = {name: [] for name in names}
    parts = []
    for c, n in items:
        image, mask = picture(c, n)
        for folder, suffix, pixels in (
            ("images", None, image),
            ("masks", ".png", mask.astype(np.uint8) * 255),
            ("depth", ".png", mask.astype(np.uint8) * 99),
        ):
            path = root / folder / file_of(c, n)
            path = path.with_suffix(suffix) if suffix else path
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, **({"quality": 95} if suffix is None else {}))
        height, width = size_of(c, n)
        id = id_of(c, n)
        tables["images"].append(f"{id} {file_of(c, n)}")
        tables["image_class_labels"].append(f"{id} {c}")
        tables["train_test_split"].append(f"{id} {int(n < 2)}")
        # The second picture's box runs past the border on two sides.
        box = (width - 9, -3, 20, height + 9) if n == 1 else (4, 6, 20, 15)
        tables["bounding_boxes"].append(f"{id} {' '.join(map(str, box))}")
        tables["sizes"].append(f"{id} {width} {height}")
        tables["photographers"].append(f"{id} Ann  van der  Photo")
        parts += [f"{id} {p} {10 + p} {20 + p} {p % 2}" for p in reversed(range(11))]
    for number, (name, rows) in enumerate(tables.items()):
        # Each list in its own order: joining by line number would mix everything up.
        rows = rows[number:] + rows[:number]
        (root / f"{name}.txt").write_text("\n".join(rows) + "\n")
    (root / "parts" / "part_locs.txt").write_text("\n".join(parts) + "\n")
    classes = [f"{i} {name}" for i, (name, _) in CLASSES.items()]
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    links = [f"{i} {parent}" for i, (_, parent) in CLASSES.items() if parent is not None]
    (root / "hierarchy.txt").write_text("\n".join(reversed(links)) + "\n")
    (root / "captions.json").write_text(json.dumps({id_of(295, 0): "A teal on a pond."}))
    pairs = [
        (c, f"./images/{file_of(c, n)}", f"./images/{file_of(c, n + 1)}") for c, n in ((817, 0), (295, 2), (1010, 2))
    ]
    pairs += [pairs[1], (295, pairs[1][2], pairs[1][1])]  # one exact and one mirrored repetition
    lines = ["class_id,image_1,image_2"] + [f"{c:04d},{a},{b}" for c, a, b in pairs]
    (root / "pairs.csv").write_text("\n".join(lines) + "\n")
    return root


INAT_ROWS = [
    # observation, common name, image_1, image_2; photo_1.jpg occurs in two observations
    ("111", "Cactus Wren", "9001.jpg", "9002.jpg"),
    ("222", "Tūī", "photo_1.jpg", "photo_2.jpg"),
    ("333", "Cactus Wren", "photo_1.jpg", "9003.jpg"),
]


def write_inat(root: Path) -> Path:
    """An iNaturalist pair-list folder; a folder above it is called images, as an unlucky user's may be."""
    columns = "observation_id,common_name,scientific_name,relative_path,observed_on,user_login,image_1,image_2"
    lines = [columns]
    for number, (observation, name, first, second) in enumerate(INAT_ROWS):
        folder = f"images/{name.replace(' ', '_')}/{observation}"
        for k, file in enumerate((first, second)):
            image, mask = picture(10 + number, k)
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / folder / file, quality=95)
            path = (root / folder.replace("images", "mask", 1) / file).with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask.astype(np.uint8) * 255).save(path)
        lines.append(f'{observation},{name},"Genus, sp",{folder},2025-08-31T17:58,user{number},{first},{second}')
    (root / "final_pairs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (root / "captions_short.json").write_text(json.dumps({"222_photo_2": "A bird on flax."}))
    return root
