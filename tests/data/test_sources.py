import json
from pathlib import Path

import numpy as np
import pytest

from nabla_jax.data import read_dataset
from nabla_jax.data.taxonomy import Plumage, Taxonomy, agreed, normalise_name, plumages, qualifier, species_name
from nabla_jax.errors import UserError
from tests.data.folders import CLASSES, LEAVES, file_of, id_of, size_of, write_inat, write_nabirds


@pytest.fixture
def nabirds(tmp_path: Path) -> Path:
    return write_nabirds(tmp_path / "nabirds")


@pytest.fixture
def inat(tmp_path: Path) -> Path:
    return write_inat(tmp_path / "images" / "unseen")


# ----------------------------------------------------------------------------------- NABirds


def test_lists_in_different_orders_are_joined_by_id(nabirds: Path) -> None:
    dataset = read_dataset(nabirds)
    assert len(dataset.examples) == 16
    for c in LEAVES:
        for n in range(4):
            example = dataset.by_id[id_of(c, n)]
            assert example.class_id == c
            assert example.image == nabirds / "images" / file_of(c, n)
            assert example.split == ("train" if n < 2 else "test")
            assert example.mask is not None and example.mask.is_file() and example.mask.stem == example.image.stem
            assert example.depth is not None and example.depth.is_file()
            assert example.credit == "Ann van der Photo"


def test_taxonomy_has_any_depth_and_clean_names(nabirds: Path) -> None:
    by_id = read_dataset(nabirds).by_id
    male = by_id[id_of(295, 0)]
    assert male.taxonomy == ("Birds", "Ducks, Geese, and Swans", "Ducks and Geese", "Blue-winged Teal",
                             "Blue-winged Teal (Male)")  # fmt: skip
    assert by_id[id_of(1010, 0)].taxonomy == ("Birds", "Perching Birds", "Jays and Crows", "American Crow")
    female = by_id[id_of(297, 0)]
    assert female.class_name == "Blue-winged Teal (Female)"
    assert male.species == female.species == "Blue-winged Teal"
    assert by_id[id_of(817, 0)].species == "Dark-eyed Junco"


def test_boxes_are_half_open_rows_first_and_clipped(nabirds: Path) -> None:
    by_id = read_dataset(nabirds).by_id
    assert by_id[id_of(295, 0)].box == (6, 4, 21, 24)
    height, width = size_of(295, 1)
    assert by_id[id_of(295, 1)].box == (0, width - 9, height, width)


def test_keypoints_are_rows_first_in_part_order(nabirds: Path) -> None:
    keypoints = read_dataset(nabirds).by_id[id_of(817, 2)].keypoints
    assert keypoints is not None
    np.testing.assert_array_equal(keypoints, [[20 + p, 10 + p, p % 2] for p in range(11)])


def test_captions_and_optional_lists(nabirds: Path) -> None:
    assert read_dataset(nabirds).by_id[id_of(295, 0)].caption == "A teal on a pond."
    assert read_dataset(nabirds).by_id[id_of(295, 1)].caption is None
    for name in (
        "captions.json",
        "photographers.txt",
        "sizes.txt",
        "bounding_boxes.txt",
        "parts/part_locs.txt",
    ):
        (nabirds / name).unlink()
    example = read_dataset(nabirds).by_id[id_of(295, 0)]
    assert (example.caption, example.credit, example.box, example.keypoints) == (None,) * 4


def test_an_absent_mask_is_none(nabirds: Path) -> None:
    (nabirds / "masks" / file_of(295, 0)).with_suffix(".png").unlink()
    assert read_dataset(nabirds).by_id[id_of(295, 0)].mask is None


def test_class_index_and_splits(nabirds: Path) -> None:
    dataset = read_dataset(nabirds)
    assert tuple(dataset.classes) == LEAVES
    for c, positions in dataset.classes.items():
        assert {dataset.examples[p].class_id for p in positions} == {c} and len(positions) == 4
    assert len(dataset.of_split("train")) == len(dataset.of_split("test")) == 8
    assert len(dataset.of_split("all")) == 16
    with pytest.raises(UserError, match="no picture of split val, the folder has test, train"):
        dataset.of_split("val")


def replace_line(path: Path, number: int, text: str) -> None:
    rows = path.read_text().split("\n")
    rows[number - 1] = text
    path.write_text("\n".join(rows))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("bounding_boxes.txt", "{id} 1 2 x 4", r"bounding_boxes.txt:3: expected 4 integers"),
        ("bounding_boxes.txt", "{id} 1 2 3", r"bounding_boxes.txt:3: found 4 fields, expected 5"),
        ("bounding_boxes.txt", "{id} 1 2 0 5", r"box of 0 x 5 pixels"),
        ("sizes.txt", "nobody 10 10", r"sizes.txt:3: nobody is not in images.txt"),
        ("image_class_labels.txt", "{id} 296", r"class 296, which classes.txt lacks"),
        ("image_class_labels.txt", "", r"image_class_labels.txt: has no line for picture"),
        ("train_test_split.txt", "{id} 2", r"has 2, expected 0 or 1"),
        ("train_test_split.txt", "{id} 0.5", r"train_test_split.txt:3: expected 1 integers"),
        ("parts/part_locs.txt", "{id} 1 2 3", r"part_locs.txt:3: expected id, part, x, y, visible"),
        ("classes.txt", "5x Duck", r"class id '5x', expected an integer"),
        ("classes.txt", "0 Again", r"classes.txt:3: 0 occurs twice"),
        ("hierarchy.txt", "817", r"hierarchy.txt:3: found 1 fields, expected 2"),
    ],
)
def test_a_bad_line_is_named(nabirds: Path, file: str, text: str, message: str) -> None:
    path = nabirds / file
    own = path.read_text().split("\n")[2].split()[0]
    replace_line(path, 3, text.format(id=own))
    with pytest.raises(UserError, match=message):
        read_dataset(nabirds)


def test_a_cycle_in_the_hierarchy_is_refused(nabirds: Path) -> None:
    path = nabirds / "hierarchy.txt"
    path.write_text(path.read_text().replace("640 40", "640 817"))
    with pytest.raises(UserError, match="class 817 has itself among its ancestors"):
        read_dataset(nabirds)


def test_missing_lists_and_pictures(nabirds: Path, tmp_path: Path) -> None:
    (nabirds / "images" / file_of(817, 0)).unlink()
    with pytest.raises(UserError, match=rf"images.txt:\d+: picture images/{file_of(817, 0)} is missing"):
        read_dataset(nabirds)
    (nabirds / "classes.txt").unlink()
    (nabirds / "hierarchy.txt").unlink()
    with pytest.raises(UserError, match="missing classes.txt, hierarchy.txt"):
        read_dataset(nabirds)
    with pytest.raises(UserError, match="no such folder"):
        read_dataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="found none of manifest.csv .*images.txt"):
        read_dataset(tmp_path / "empty")


def test_the_suffix_is_case_sensitive(nabirds: Path) -> None:
    path = nabirds / "images.txt"
    path.write_text(path.read_text().replace(".JPG", ".jpg"))
    with pytest.raises(UserError, match="suffix|is missing"):
        read_dataset(nabirds)


# -------------------------------------------------------------------------------- iNaturalist


def test_photos_are_keyed_by_observation_and_stem(inat: Path) -> None:
    dataset = read_dataset(inat)
    assert list(dataset.by_id) == [
        "111_9001",
        "111_9002",
        "222_photo_1",
        "222_photo_2",
        "333_photo_1",
        "333_9003",
    ]
    first, other = dataset.by_id["222_photo_1"], dataset.by_id["333_photo_1"]
    assert first.image != other.image
    assert (first.class_name, other.class_name) == ("Tūī", "Cactus Wren")
    assert other.class_id == dataset.by_id["111_9001"].class_id != first.class_id
    assert (other.individual, other.credit, other.split) == ("333", "user2", "test")
    assert dataset.by_id["222_photo_2"].caption == "A bird on flax."


def test_a_list_may_name_the_groups_above_its_species(inat: Path) -> None:
    path = inat / "final_pairs.csv"
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    assert {e.taxonomy for e in read_dataset(inat).examples} == {
        ("Birds", e.species) for e in read_dataset(inat).examples
    }
    above = ["Birds > Order A > Family B"] * len(lines)
    path.write_text("\n".join([f"{header},taxonomy", *map(",".join, zip(lines, above, strict=True))]), encoding="utf-8")
    for example in read_dataset(inat).examples:
        assert example.taxonomy == ("Birds", "Order A", "Family B", example.species)
    above[-1] = "Birds > Order C"
    path.write_text("\n".join([f"{header},taxonomy", *map(",".join, zip(lines, above, strict=True))]), encoding="utf-8")
    with pytest.raises(UserError, match=f"final_pairs.csv:{len(lines) + 1}: species .* is Birds > Order C > .* above"):
        read_dataset(inat)


def test_the_fetchers_manifest_says_whose_a_photo_is(inat: Path) -> None:
    image = "images/Cactus_Wren/111/9001.jpg"
    row = {"image": image, "status": "fetched", "license_code": "cc-by", "attribution": "(c) Ann, some rights reserved"}
    (inat / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    first, second, *_ = read_dataset(inat).examples
    assert (first.licence, first.credit) == ("cc-by", "(c) Ann, some rights reserved")
    assert (second.licence, second.credit) == (None, "user0")


def test_only_the_folder_below_the_root_is_exchanged_for_the_mask(inat: Path) -> None:
    for example in read_dataset(inat).examples:
        assert example.mask is not None and example.mask.is_file()
        assert example.mask.relative_to(inat).parts[0] == "mask" and inat.parent.name == "images"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("9001.jpg", "9009.jpg", r"final_pairs.csv:2: image_1: found no picture"),
        ("222,", ",", r"final_pairs.csv:3: observation_id is empty"),
        (",user1,", ",", r"final_pairs.csv:3: found 7 fields, expected 8"),
        ("image_2", "picture_2", r"final_pairs.csv:1: missing column image_2"),
    ],
)
def test_a_bad_row_is_named(inat: Path, old: str, new: str, message: str) -> None:
    path = inat / "final_pairs.csv"
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_dataset(inat)


# -------------------------------------------------------------------------------------- names


def test_names() -> None:
    assert normalise_name("Swainson's Hawk  (Dark morph )") == "Swainson's Hawk (Dark morph)"
    assert species_name("Dark-eyed Junco ( Red-backed/Gray-headed )") == "Dark-eyed Junco"
    assert species_name("Black-crowned (Night) Heron") == "Black-crowned (Night) Heron"
    assert qualifier("Blue-winged Teal  (Male)") == "Male"
    assert qualifier("Mallard") is None


def test_paths_need_names_all_the_way_up() -> None:
    taxonomy = Taxonomy({i: n for i, (n, _) in CLASSES.items()}, {1: 2, 9: 8})
    with pytest.raises(UserError, match="class 8, at or above class 9"):
        Taxonomy({9: "leaf"}, {9: 8}).path(9)
    assert taxonomy.path(0) == ("Birds",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Adult Male", [Plumage(sex="male", age="adult")]),
        ("Adult male", [Plumage(sex="male", age="adult")]),
        ("Female/juvenile", [Plumage(sex="female"), Plumage(age="juvenile")]),
        ("Female, immature", [Plumage(sex="female"), Plumage(age="immature")]),
        ("Female/Eclipse male", [Plumage(sex="female"), Plumage(sex="male", season="eclipse")]),
        ("Nonbreeding/juvenile", [Plumage(season="nonbreeding"), Plumage(age="juvenile")]),
        ("Non-breeding", [Plumage(season="nonbreeding")]),
        ("Light morph adult", [Plumage(age="adult", morph="light")]),
        ("Dark morph", [Plumage(morph="dark")]),
        ("Slate-colored", []),
        ("Myrtle", []),
        ("Male Oregon", []),
        ("Red-backed/Gray-headed", []),
        ("morph", []),
        (None, []),
    ],
)
def test_qualifiers_are_read_whole_or_kept_verbatim(text: str | None, expected: list[Plumage]) -> None:
    assert list(plumages(text)) == expected


def test_a_field_is_said_only_where_all_alternatives_agree() -> None:
    assert agreed(plumages("Female/immature female"), "sex") == "female"
    assert agreed(plumages("Female/immature female"), "age") is None
    assert agreed(plumages("Female/Eclipse male"), "sex") is None
    assert agreed(plumages("Oregon"), "sex") is None


def test_examples_have_the_fields_of_their_leaf(nabirds: Path) -> None:
    by_id = read_dataset(nabirds).by_id
    assert (by_id[id_of(295, 0)].sex, by_id[id_of(297, 0)].sex, by_id[id_of(817, 0)].sex) == ("male", "female", None)
    assert by_id[id_of(817, 0)].plumages == () and qualifier(by_id[id_of(817, 0)].class_name) == "Oregon"


def test_parts_are_those_of_the_list_whatever_a_picture_has(nabirds: Path) -> None:
    names = [
        "bill",
        "crown",
        "nape",
        "left eye",
        "right eye",
        "belly",
        "breast",
        "back",
        "tail",
        "left wing",
        "right wing",
    ]
    (nabirds / "parts" / "parts.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names)))
    path = nabirds / "parts" / "part_locs.txt"
    own = id_of(817, 2)
    path.write_text("\n".join(row for row in path.read_text().splitlines() if not row.startswith(f"{own} 4 ")))
    dataset = read_dataset(nabirds)
    assert dataset.parts == tuple(names)
    keypoints = dataset.by_id[own].keypoints
    assert keypoints is not None
    np.testing.assert_array_equal(keypoints, [[0, 0, 0] if p == 4 else [20 + p, 10 + p, p % 2] for p in range(11)])
