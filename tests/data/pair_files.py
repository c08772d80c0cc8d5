"""Generated pair lists with as many of each trap as the published ones have."""

import uuid
from pathlib import Path

SEEN_COLUMNS = (
    "observation_id,common_name,scientific_name,relative_path,observed_on,photo_count,latitude,longitude,user_login,"
    "inat_url,query_species,image_1,image_2"
)
UNSEEN_COLUMNS = SEEN_COLUMNS.replace("query_species,", "")
DATES = ("2023-06-24 18:29:00", "2024-05-01 7:42 PM", "2022-03-05 11:03:27-04:00", "2025-08-31T17:58")
# (common name, scientific name) of unseen rows that are of seen species; species_i of a list is "Genus_i species_i".
SAME = [(f"Bird {i}", f"Genusa{i} specia{i}") for i in range(7)]
BELOW = [
    ("Alaskan Bird", "Genusa10 specia10 oreganus"),
    ("Gray-headed Bird", "Genusa10 specia10 caniceps"),
    ("Domestic Bird", "Genusa11 specia11 domesticus"),
    ("Feral Bird", "Genusa12 specia12 domestica"),
    ("Eurasian × American Bird", "Genusa13 specia13 specia13 × carolinensis"),
    ("Red × Yellow Bird", "Genusa14 specia14 luteus × cafer"),
    *((f"Form {i}", f"Genusa{i} specia{i} forma") for i in range(15, 19)),
]
HALF = ("Black Bird × Bird 20", "Genusa20 nova × specia20")
APART = [("Tūī", "Prosthemadera novaeseelandiae"), ("Hawai’i ʻAmakihi", "Chlorodrepanis virens")]


def _picture(n: int, suffix: str = "jpg", class_id: int = 295) -> str:
    return f"./images/{class_id:04d}/{uuid.UUID(int=n).hex}.{suffix}"


def write_classes(path: Path, rows: int = 4759, classes: int = 539) -> dict[str, list[int]]:
    """4,759 rows: 4 repeat an earlier one, 5 mirror one, 7 hold 9 names in .JPG. Returns the lines of each."""
    fresh = rows - 9
    pairs = []
    for n in range(fresh):
        c = 295 + n % classes
        first, second = _picture(2 * n, class_id=c), _picture(2 * n + 1, class_id=c)
        if n in (10, 20, 30, 40, 50, 60, 70):
            first = first.replace(".jpg", ".JPG")
        if n in (60, 70):
            second = second.replace(".jpg", ".JPG")
        pairs.append((c, first, second))
    exact = [(200 + n, n) for n in range(4)]
    mirrored = [(300 + n, 100 + n) for n in range(5)]
    for at, of in exact:
        pairs.insert(at, pairs[of])
    for at, of in mirrored:
        c, a, b = pairs[of]
        pairs.insert(at, (c, b, a))
    lines = ["class_id,image_1,image_2"] + [f"{c:04d},{a},{b}" for c, a, b in pairs]
    path.write_text("\n".join(lines) + "\n")
    return {
        "exact": [at + 2 for at, _ in exact],
        "mirrored": [at + 2 for at, _ in mirrored],
        "capital": [n + 2 for n, (_, a, b) in enumerate(pairs) if ".JPG" in a + b],
    }


def write_seen(path: Path, rows: int = 677, species: int = 395) -> list[int]:
    """677 rows of 395 species, 29 by position, dates in four formats. Returns the lines by position."""
    lines, positional = [SEEN_COLUMNS], []
    for n in range(rows):
        k = n % species
        names = [f"{10**8 + 2 * n}.jpg", f"{10**8 + 2 * n + 1}.jpg"]
        if n % 23 == 3 and len(positional) < 29:
            names = ["photo_1.jpg", "photo_2.jpg"] if n % 2 else ["photo_2.jpg", names[0]]
            positional.append(n + 2)
        query = "Ground-Bird 5" if k == 5 else f"Bird {k}"
        common = "Ground Bird 5" if k == 5 else f"Bird {k}"
        id = 5 * 10**7 + n
        date = DATES[0] if n % 50 else DATES[(n // 50) % 4]
        lines.append(
            f"{id},{common},Genusa{k} specia{k},images/Bird_{k}/{id},{date},3,0.0,0.0,user{n % 40},"
            f"https://www.inaturalist.org/observations/{id},{query},{','.join(names)}"
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return positional


def write_unseen(path: Path, rows: int = 396) -> tuple[list[int], int]:
    """396 rows, 17 of seen species in 7 + 10 ways. Returns their lines and that of a cross with one seen parent."""
    special = [*SAME, *BELOW, HALF, *APART]
    names = [(f"Stranger {n}", f"Alienus{n} novus{n}") for n in range(rows - len(special))]
    for place, name in enumerate(special):
        names.insert(17 * place, name)
    lines = [UNSEEN_COLUMNS]
    for n, (common, scientific) in enumerate(names):
        id = 9 * 10**7 + n
        lines.append(
            f"{id},{common},{scientific},images/{scientific.replace(' ', '_')}/{id},{DATES[0]},2,0.0,0.0,user{n % 30},"
            f"https://www.inaturalist.org/observations/{id},{7 * 10**8 + 2 * n}.jpg,{7 * 10**8 + 2 * n + 1}.jpg"
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [n + 2 for n, name in enumerate(names) if name in SAME + BELOW], names.index(HALF) + 2
