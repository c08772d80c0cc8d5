"""The plan of a world: its taxonomy, its classes and every picture to be taken. Pure data, no files."""

from __future__ import annotations

import dataclasses
import uuid

import numpy as np

from nabla_jax.errors import UserError
from nabla_jax.toybirds.identity import COLOURS, MARKS, SPECIES_PER_FAMILY, Identity, draw_identity
from nabla_jax.toybirds.rng import chance, generator, order, pick, uniform
from nabla_jax.toybirds.scene import Scene, between, draw_canvas, draw_scene

WORLD = "toybirds"
VERSION = 3  # raise it whenever the same settings would give other bytes
FAMILIES_PER_ORDER = 3
SEEN_SPECIES = 4  # per family; the rest, up to SPECIES_PER_FAMILY, are in inat/unseen alone
SEEN_OBSERVATIONS, UNSEEN_OBSERVATIONS = 2, 3  # true same-individual pairs per species
PAIRS_PER_CLASS = 2  # the nearest look-alikes; enough for intervals clustered by class, quick to re-pose
CLIPS = "clips"
CLIP_SPECIES, CLIP_INDIVIDUALS = 12, 2  # one species of each of the first families, one clip per individual
CLIP_FRAMES, CLIP_STEP, CLIP_RATE = 6, 60, 30  # frames, numbers from one to the next, numbers per second
MAX_ORDERS = 60
IdentityPath = tuple[int, int, int, int, int, int]

_ORDERS = (
    ("Painted Songsters", (("Pebblefinches", "Pebblefinch"), ("Lanternwings", "Lanternwing"),
                           ("Bramble Chats", "Bramble Chat"))),
    ("Stilts, Bobbers, and Allies", (("Reedbobbers", "Reedbobber"), ("Tidepickers", "Tidepicker"),
                                     ("Mudlarks", "Mudlark"))),
    ("Plump Doves and Tumblers", (("Tumblers", "Tumbler"), ("Mossdoves", "Mossdove"),
                                  ("Crooners", "Crooner"))),
    ("Bark Climbers", (("Barkhoppers", "Barkhopper"), ("Tappers", "Tapper"), ("Creeplings", "Creepling"))),
    ("Gapers", (("Dusk Gapers", "Dusk Gaper"), ("Rollers", "Roller"), ("Beeflits", "Beeflit"))),
    ("Meadow Fowl", (("Clovercocks", "Clovercock"), ("Quailings", "Quailing"),
                     ("Stubble Hens", "Stubble Hen"))),
)  # fmt: skip
# Orders beyond these are counted through again, so that a world to train on can have very many classes.
_ADJECTIVES = (
    "Northern", "Highland", "Marsh", "Coastal", "Island", "Valley", "Harlequin", "Marlow's", "Lesser",
    "Greater", "Sedge", "Black-toed", "Old-field", "Mirror",
)  # fmt: skip
_UNSEEN_ADJECTIVES = (
    "Tūī-voiced",
    "Cinder",
    "São Tomé",
    "Lagoon",
    "Müller’s",
    "Far-country",
    "Brook",
    "Ōkārito",
)
_QUALIFIERS = (
    ("Adult male", "Adult Male", "Male", "Breeding", "Breeding male"),
    ("Female", "Female/immature", "Nonbreeding", "Female/Nonbreeding male"),
    ("Juvenile", "Immature", "Female, immature", "Immature/Juvenile"),
)
_GIVEN = ("Ada", "Bruno", "Carla", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jun")
_FAMILY_NAMES = ("Alder", "van der Berg", "Castillo", "Dunn", "Eriksen", "O'Farrell", "Garza-Lowe", "Hill")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides every byte of a world.

    `size` is the pictures' long side in pixels, `images` the number of pictures in nabirds/, `orders` the
    number of orders, each of 3 families of 4 seen and 2 unseen species; `pose` and `pose_range` as in
    `scene.draw_scene`.
    """

    seed: int = 0
    size: int = 48
    images: int = 1600
    orders: int = 4
    pose: str = "photo"
    pose_range: float = 1.0

    def check(self) -> None:
        """Raises UserError for a setting out of range."""
        if self.seed < 0:
            raise UserError(f"toybirds seed: found {self.seed}, expected an integer >= 0")
        if not 16 <= self.size <= 1024:
            raise UserError(f"toybirds size: found {self.size}, expected 16 to 1024 pixels")
        if not 1 <= self.orders <= MAX_ORDERS:
            raise UserError(f"toybirds orders: found {self.orders}, expected 1 to {MAX_ORDERS}")
        if self.pose not in ("photo", "free"):
            raise UserError(f"toybirds pose: found {self.pose!r}, expected 'photo' or 'free'")
        if not 0.0 <= self.pose_range <= 1.0:
            raise UserError(f"toybirds pose_range: found {self.pose_range}, expected a number from 0 to 1")
        least = 4 * sum(len(plumages(*s)) for s in species_list(self.orders, seen=True))
        if self.images < least:
            raise UserError(
                f"toybirds images: found {self.images}, expected at least {least} "
                f"(four per leaf class with orders={self.orders})"
            )

    def to_json(self) -> dict[str, object]:
        """The settings with the world's name and version, as written to world.json."""
        return {"world": WORLD, "version": VERSION, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Node:
    """A class of the hierarchy. `leaf` is (order, family, species, plumage) for classes with pictures."""

    class_id: int
    name: str
    parent: int | None
    leaf: tuple[int, int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture to take: who, how, and where the files go (paths relative to the data-set folder).

    `scene_key` (data set, index) and `canvas` (height, width) rebuild the scene; `fill` overrides its fill.
    """

    image_id: str
    path: str
    identity: IdentityPath
    scene_key: tuple[str, int]
    canvas: tuple[int, int]
    fill: float | None = None


@dataclasses.dataclass(frozen=True)
class NabirdsImage:
    """A picture of nabirds/ with class and split; box_margin is (left, top, right, bottom), pixels."""

    picture: Picture
    class_id: int
    train: bool
    photographer: str
    box_margin: tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Observation:
    """One iNaturalist-like observation: two pictures of one true individual."""

    row: dict[str, str]
    pictures: tuple[Picture, Picture]

    @property
    def seen(self) -> bool:
        """Whether the bird is of a species of nabirds/, whatever the row calls it."""
        return self.pictures[0].identity[3] < SEEN_SPECIES


@dataclasses.dataclass(frozen=True)
class Clip:
    """Some frames of one recording of one true individual, and its row of clips.csv."""

    row: dict[str, str]
    pictures: tuple[Picture, ...]


def plumages(order_index: int, family: int, species: int) -> tuple[int, ...]:
    """The plumages (indices into PLUMAGES) in which a species occurs: one, two or three."""
    pattern = ((1, 2, 1, 2, 2, 1), (1, 1, 2, 3, 1, 3))[(order_index * FAMILIES_PER_ORDER + family) % 2]
    return tuple(range(pattern[species % SPECIES_PER_FAMILY]))


def species_list(orders: int, seen: bool) -> list[tuple[int, int, int]]:
    """(order, family, species) of every seen (nabirds) or unseen (inat/unseen only) species."""
    of_family = range(SEEN_SPECIES) if seen else range(SEEN_SPECIES, SPECIES_PER_FAMILY)
    return [(o, f, s) for o in range(orders) for f in range(FAMILIES_PER_ORDER) for s in of_family]


def species_name(seed: int, order_index: int, family: int, species: int) -> str:
    """A made-up common name, unique within a world; those of unseen species may be non-ASCII."""
    adjectives = _ADJECTIVES if species < SEEN_SPECIES else _UNSEEN_ADJECTIVES
    chosen = order(generator(seed, "names", order_index, family, int(species >= SEEN_SPECIES)), len(adjectives))
    return f"{adjectives[int(chosen[species % SEEN_SPECIES])]} {family_names(order_index, family)[1]}"


def order_name(order_index: int) -> str:
    """A made-up order, unique within a world."""
    return _counted(_ORDERS[order_index % len(_ORDERS)][0], order_index)


def family_names(order_index: int, family: int) -> tuple[str, str]:
    """A made-up family, unique within a world: (all of them, one bird)."""
    several, one = _ORDERS[order_index % len(_ORDERS)][1][family]
    return _counted(several, order_index), _counted(one, order_index)


def _genus(order_index: int) -> str:
    turn, genus = divmod(order_index, len(_GENERA))
    return f"{_PREFIXES[turn]}{_GENERA[genus]}".capitalize()


def scientific_name(order_index: int, family: int, species: int) -> str:
    """A made-up binomial, unique within a world; an order is one genus."""
    return f"{_genus(order_index)} {_epithet(family, species)}"


def _epithet(family: int, species: int) -> str:
    return f"{'nota' if species < SEEN_SPECIES else 'ignota'}{'abc'[family]}{'uvwxyz'[species]}"


def _counted(name: str, order_index: int) -> str:
    turn = order_index // len(_ORDERS)
    return f"{name} {turn + 1}" if turn else name


def scene_of(settings: Settings, picture: Picture) -> Scene:
    """The picture's scene, rebuilt from its key; the frames of a clip lie between two scenes."""
    dataset, index = picture.scene_key

    def drawn(*key: int | str) -> Scene:
        rng = generator(settings.seed, "scene", dataset, *key)
        return draw_scene(rng, settings.size, settings.pose_range, pose=settings.pose, canvas=picture.canvas)

    if dataset == CLIPS:
        clip, frame = divmod(index, CLIP_FRAMES)
        scene = between(drawn(clip, "first"), drawn(clip, "last"), frame / (CLIP_FRAMES - 1))
    else:
        scene = drawn(index)
    return scene if picture.fill is None else dataclasses.replace(scene, fill=picture.fill)


def hierarchy(settings: Settings) -> list[Node]:
    """All classes, ids 0..n-1. Leaf ids have gaps where inner species nodes lie; leaves sit at depth 3 or 4.

    Four leaf names carry the odd spaces of the real file.
    """
    nodes = [Node(0, "Birds", None)]
    family_ids: dict[tuple[int, int], int] = {}
    for o in range(settings.orders):
        nodes.append(Node(len(nodes), order_name(o), 0))
    for o in range(settings.orders):
        for f in range(FAMILIES_PER_ORDER):
            family_ids[o, f] = len(nodes)
            nodes.append(Node(len(nodes), family_names(o, f)[0], 1 + o))
    rng = generator(settings.seed, "hierarchy")
    species = species_list(settings.orders, seen=True)
    odd = ("{name}  ({q})", "{name} ({q} )", "{name}  ({q} )", "{name} ({q})  ")
    made_odd = 0
    for index in order(rng, len(species)):
        o, f, s = species[int(index)]
        name, coats = species_name(settings.seed, o, f, s), plumages(o, f, s)
        parent = family_ids[o, f]
        if len(coats) == 1 and chance(rng, 0.5):
            nodes.append(Node(len(nodes), name, parent, (o, f, s, 0)))
            continue
        internal = len(nodes)
        nodes.append(Node(internal, name, parent))
        for plumage in coats:
            text = name
            if len(coats) > 1:
                form = "{name} ({q})"
                if made_odd < len(odd):
                    form, made_odd = odd[made_odd], made_odd + 1
                text = form.format(name=name, q=pick(rng, _QUALIFIERS[plumage]))
            nodes.append(Node(len(nodes), text, internal, (o, f, s, plumage)))
    return nodes


def _counts(settings: Settings, n_leaves: int) -> list[int]:
    """Pictures per leaf: uneven, at least four, adding up to settings.images."""
    rng = generator(settings.seed, "counts")
    weights = np.array([uniform(rng, 0.6, 1.4) for _ in range(n_leaves)])
    spare = settings.images - 4 * n_leaves
    ideal = spare * weights / weights.sum()
    counts = np.floor(ideal).astype(int)
    counts[np.argsort(counts - ideal, kind="stable")[: spare - counts.sum()]] += 1
    return [4 + int(c) for c in counts]


def _uuid(rng: np.random.Generator) -> str:
    raw = bytearray(int(rng.random() * 256) for _ in range(16))
    return str(uuid.UUID(bytes=bytes(raw), version=4))


def nabirds_images(settings: Settings, nodes: list[Node]) -> list[NabirdsImage]:
    """Every picture of nabirds/, sorted by id; one bird in about fifty runs past the border of its canvas."""
    leaves = [node for node in nodes if node.leaf is not None]
    images: list[NabirdsImage] = []
    for node, count in zip(leaves, _counts(settings, len(leaves)), strict=True):
        assert node.leaf is not None
        for k in range(count):
            index = len(images)
            rng = generator(settings.seed, "nabirds image", index)
            image_id = _uuid(rng)
            # The first pictures of some classes have the suffix that breaks case-sensitive look-ups.
            suffix = "JPG" if node.class_id % 17 == leaves[0].class_id % 17 and k < 2 else "jpg"
            cut = chance(rng, 0.02) or index == 5
            picture = Picture(
                image_id=image_id,
                path=f"images/{node.class_id:04d}/{image_id.replace('-', '')}.{suffix}",
                identity=(settings.seed, *node.leaf, 1 + index),
                scene_key=("nabirds", index),
                canvas=draw_canvas(rng, settings.size),
                fill=uniform(rng, 1.06, 1.16) if cut else None,
            )
            left, top, right, bottom = (int(uniform(rng, 0, 4)) for _ in range(4))
            name = f"{pick(rng, _GIVEN)} {pick(rng, _FAMILY_NAMES)}"
            images.append(NabirdsImage(picture, node.class_id, k % 2 == 0, name, (left, top, right, bottom)))
    return sorted(images, key=lambda image: image.picture.image_id)


def plumage_vector(identity: Identity) -> np.ndarray:
    """Colours and mark positions as one float vector, to measure how alike two individuals are."""
    values = [c for name in COLOURS for c in getattr(identity, name)]
    for name in MARKS:
        mark = getattr(identity, name)
        values += [mark.strength * c for c in (*mark.colour, mark.position)]
    return np.array([*values, identity.back_line, identity.breast_edge, identity.spot_phase])


def look_alike_pairs(settings: Settings, images: list[NabirdsImage]) -> list[tuple[int, str, str]]:
    """(class id, path, path) of disjoint look-alikes in the test split: nearest individuals first.

    As in the real list the rows are not sorted by class, and the last two repeat earlier ones: one as it
    was, one mirrored.
    """
    by_class: dict[int, list[NabirdsImage]] = {}
    for image in images:
        if not image.train:
            by_class.setdefault(image.class_id, []).append(image)
    pairs: list[tuple[int, str, str]] = []
    for class_id, members in sorted(by_class.items()):
        vectors = np.stack([plumage_vector(draw_identity(*m.picture.identity)) for m in members])
        distance = np.sqrt(((vectors[:, None] - vectors[None]) ** 2).sum(-1))
        rows, columns = np.triu_indices(len(members), 1)
        free = set(range(len(members)))
        limit = len(pairs) + PAIRS_PER_CLASS
        for best in np.argsort(distance[rows, columns], kind="stable"):
            i, j = int(rows[best]), int(columns[best])
            if i in free and j in free and len(pairs) < limit:
                free -= {i, j}
                pairs.append((class_id, f"./{members[i].picture.path}", f"./{members[j].picture.path}"))
    pairs = [pairs[int(i)] for i in order(generator(settings.seed, "pair order"), len(pairs))]
    c, a, b = pairs[1]
    return [*pairs, pairs[0], (c, b, a)]


_DATES = ("2023-{m:02d}-{d:02d} 0{h}:15:0{s}", "2024-{m:02d}-{d:02d} {h}:42 PM",
          "2022-{m:02d}-{d:02d} 1{h}:03:2{s}-04:00", "2025-{m:02d}-{d:02d}T1{h}:58")  # fmt: skip
_GENERA = ("Pictavis", "Tibialis", "Columbula", "Corticola", "Hiator", "Pratigallus")
_PREFIXES = ("", "Neo", "Para", "Eu", "Pseudo", "Proto", "Meta", "Archi", "Micro", "Macro")
_USERS = ("wren_watcher", "éloise-b", "kakapo77", "björn.s", "field notes", "m_tanaka", "lagoon-log")


def observations(settings: Settings, subset: str) -> list[Observation]:
    """The observations of inat/na (`subset` 'na', seen species) or inat/unseen ('unseen').

    As in the real list the last few of 'unseen' are not truly unseen: see `disguised`.
    """
    seen = subset == "na"
    repeats = SEEN_OBSERVATIONS if seen else UNSEEN_OBSERVATIONS
    taxa = [
        ((o, f, s), species_name(settings.seed, o, f, s), scientific_name(o, f, s))
        for o, f, s in species_list(settings.orders, seen)
        for _ in range(repeats)
    ]
    out: list[Observation] = []
    for (o, f, s), name, scientific in taxa if seen else [*taxa, *disguised(settings)]:
        index = len(out)
        rng = generator(settings.seed, "observation", subset, index)
        observation_id = str((100_000_000 if seen else 200_000_000) + 1000 * index + int(rng.random() * 1000))
        plumage = pick(rng, plumages(o, f, s))
        identity = (settings.seed, o, f, s, plumage, (1_000_000 if seen else 2_000_000) + index)
        folder = f"{name.replace(' ', '_')}/{observation_id}"
        by_position = index % 9 == 4  # such names count positions in the observation and are not unique
        first = int(rng.random() * 3) + 1
        stems = [
            f"photo_{first + k}" if by_position else str(400_000_000 + 100 * int(rng.random() * 1e6) + k)
            for k in range(2)
        ]
        pictures = [
            Picture(
                f"{observation_id}_{stem}", f"images/{folder}/{stem}.jpg", identity,
                (f"inat/{subset}", 2 * index + k), draw_canvas(rng, settings.size),
            )
            for k, stem in enumerate(stems)
        ]  # fmt: skip
        date = _DATES[0] if index % 7 else _DATES[(index // 7) % 4]
        hyphenated = name.replace("Old-field", "Old Field").replace("Far-country", "Far Country")
        row = {
            "observation_id": observation_id,
            "common_name": name,
            "scientific_name": scientific,
            "relative_path": f"images/{folder}",
            "observed_on": date.format(m=1 + index % 12, d=1 + index % 28, h=1 + index % 9, s=index % 10),
            "photo_count": str(first + 1 + int(rng.random() * 4)),
            "latitude": f"{uniform(rng, -60, 70):.6f}",
            "longitude": f"{uniform(rng, -180, 180):.6f}",
            "user_login": pick(rng, _USERS),
            "inat_url": f"https://www.inaturalist.org/observations/{observation_id}",
            "taxonomy": " > ".join(("Birds", order_name(o), family_names(o, f)[0])),
            **({"query_species": hyphenated} if seen else {}),
            "image_1": f"{stems[0]}.jpg",
            "image_2": f"{stems[1]}.jpg",
        }
        out.append(Observation(row, (pictures[0], pictures[1])))
    return out


def disguised(settings: Settings) -> list[tuple[tuple[int, int, int], str, str]]:
    """(seen species, common name, scientific name) of the rows of inat/unseen that are of seen species.

    One under its own name, one under its common name with another scientific one, a subspecies with a common
    name of its own, and a cross of two seen species, which counts as the first.
    """
    species = species_list(settings.orders, seen=True)
    drawn = order(generator(settings.seed, "disguised"), len(species))
    same, renamed, below, crossed = (species[int(i)] for i in drawn[:4])

    def name(of: tuple[int, int, int]) -> str:
        return species_name(settings.seed, *of)

    other = (*crossed[:2], (crossed[2] + 1) % SEEN_SPECIES)
    return [
        (same, name(same), scientific_name(*same)),
        (renamed, name(renamed), f"Palaeo{scientific_name(*renamed).lower()}"),
        (below, f"Pale {name(below)}", f"{scientific_name(*below)} pallida"),
        (crossed, f"{name(crossed)} × {name(other)}", f"{scientific_name(*crossed)} × {_epithet(*other[1:])}"),
    ]


def clips(settings: Settings) -> list[Clip]:
    """The clips of clips/: of one seen species in each of the first families, some individuals."""
    families = [(o, f) for o in range(settings.orders) for f in range(FAMILIES_PER_ORDER)]
    out: list[Clip] = []
    for o, f in families[:CLIP_SPECIES]:
        s = pick(generator(settings.seed, "clip species", o, f), range(SEEN_SPECIES))
        name = species_name(settings.seed, o, f, s)
        for _ in range(CLIP_INDIVIDUALS):
            index = len(out)
            rng = generator(settings.seed, "clip", index)
            identity = (settings.seed, o, f, s, pick(rng, plumages(o, f, s)), 3_000_000 + index)
            canvas, start = draw_canvas(rng, settings.size), int(rng.random() * CLIP_RATE)
            ring = f"ring {1000 + 7 * index}"
            folder = f"images/{name.replace(' ', '_')}/{ring.replace(' ', '_')}"
            ids = [f"{folder}/{start + CLIP_STEP * k:06d}" for k in range(CLIP_FRAMES)]
            pictures = [
                Picture(id, f"{id}.jpg", identity, (CLIPS, CLIP_FRAMES * index + k), canvas) for k, id in enumerate(ids)
            ]
            row = {
                "clip": folder,
                "species": name,
                "individual": ring,
                "frames_per_second": str(CLIP_RATE),
                "split": "test",
                "credit": pick(rng, _USERS),
                "scientific_name": scientific_name(o, f, s),
            }
            out.append(Clip(row, tuple(pictures)))
    return out
