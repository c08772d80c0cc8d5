"""Look-alike pairs: what is proposed, how verdicts become a list that evaluation reads, and what is refused."""

import csv
import itertools
import json
import shutil

import numpy as np
import pytest

from benchmarks import curation as benchmark
from nabla_jax import curate
from nabla_jax.curation import looks, proposals, review, verdicts
from nabla_jax.curation.proposals import Looks
from nabla_jax.data import pair_lists, read_dataset
from nabla_jax.data.pairs import benchmark_pairs
from nabla_jax.data.problems import Problems
from nabla_jax.errors import UserError
from nabla_jax.images import read_rgb, write_image
from nabla_jax.metrics.birds import colours, masked_bird
from nabla_jax.toybirds import Oracle
from nabla_jax.toybirds.world import plumage_vector
from tests import fixtures


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return fixtures.write_small_world(tmp_path_factory.mktemp("world"), images=240)


@pytest.fixture
def data(world, tmp_path):
    """A NABirds folder of our own, without the list it came with."""
    folder = shutil.copytree(world / "nabirds", tmp_path / "nabirds")
    (folder / "pairs.csv").unlink()
    return folder


@pytest.fixture(scope="module")
def page(world, tmp_path_factory):
    """A review of the small world, and where its features are."""
    out = tmp_path_factory.mktemp("review")
    curate.main(["propose", str(world / "nabirds"), "--out", str(out)])
    return out


def read(path):
    with path.open(newline="") as text:
        return list(csv.DictReader(text))


def write(path, rows, reviewer="Ann"):
    """Verdicts as the page downloads them: rows are (class_id, image_1, image_2, verdict)."""
    lines = [",".join(verdicts.COLUMNS), *(",".join((*row[:3], reviewer, row[3])) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def told(page):
    return json.loads((page / "review_files" / "pairs.js").read_text().removeprefix("nablaReview(")[:-3])


# ------------------------------------------------------------------------------------------------------------
# Proposals
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "count"), [(2, 1), (3, 5), (40, 4), (41, 30), (600, 3)])
def test_disjoint_pairs_are_those_of_taking_the_closest_left_again_and_again(n, count):
    rng = np.random.default_rng(n)
    vectors = unit(rng.standard_normal((n + 5, 6)))
    members = list(rng.permutation(n + 5)[:n])
    refused = {frozenset((int(a), int(b))) for a, b in zip(members[::2], members[1::2], strict=False) if n > 3}
    expected, left = [], set(map(int, members))
    candidates = sorted((float(1 - vectors[a] @ vectors[b]), a, b) for a, b in itertools.combinations(sorted(left), 2))
    for distance, a, b in candidates:
        if {a, b} <= left and frozenset((a, b)) not in refused and len(expected) < count:
            left -= {a, b}
            expected.append((a, b, distance))
    found = proposals.disjoint(Looks(vectors, 1.0), members, count, refused)
    assert [(p.first, p.second) for p in found] == [(a, b) for a, b, _ in expected]
    assert np.allclose([p.distance for p in found], [d for _, _, d in expected], atol=1e-12)


def test_an_average_pair_has_distance_one_in_either_kind_of_feature():
    rng = np.random.default_rng(0)
    classes = {3: (0, 1, 2, 3), 5: (4, 5, 6), 8: (7,)}
    kinds = [(0.3, unit(rng.standard_normal((8, 5)))), (0.7, unit(rng.standard_normal((8, 9))))]
    pairs = [pair for own in classes.values() for pair in itertools.combinations(own, 2)]
    apart = [np.array([1 - v[a] @ v[b] for a, b in pairs]) for _, v in kinds]
    expected = sum(weight * d / d.mean() for (weight, _), d in zip(kinds, apart, strict=True))
    looks = proposals.combine(kinds, classes)
    found = [looks.radius - looks.vectors[a] @ looks.vectors[b] for a, b in pairs]
    assert np.allclose(found, expected) and np.isclose(np.mean(found), 1)
    assert np.isclose(looks.spread(classes[5]), expected[6:].mean())


def test_a_class_that_varies_more_than_the_others_is_marked():
    rng = np.random.default_rng(1)
    rows = unit(np.concatenate([[1.0, 0, 0] + s * rng.standard_normal((6, 3)) for s in (0.1, 0.1, 0.5)]))
    classes = {c: tuple(range(6 * c, 6 * c + 6)) for c in range(3)}
    found = proposals.propose(proposals.combine([(1.0, rows)], classes), classes, dict.fromkeys(classes, 2), varied=2)
    assert [c.varied for c in found] == [False, False, True] and [len(c.pairs) for c in found] == [2, 2, 2]


def test_colours_are_compared_by_how_much_of_the_silhouette_has_them():
    def bird(*bands):
        picture = np.full((8, 12, 3), 77, np.uint8)  # background, which must not count
        for i, band in enumerate(bands):
            picture[2:6, 2 + 4 * i : 6 + 4 * i] = band
        mask = np.zeros((8, 12), bool)
        mask[2:6, 2 : 2 + 4 * len(bands)] = True
        return colours(masked_bird(picture, mask))

    red, blue, dark = (255, 0, 0), (0, 0, 255), (204, 0, 0)
    assert np.isclose(bird(red, blue) @ bird(red, blue), 1)
    assert np.isclose(bird(red, blue) @ bird(red), np.sqrt(1 / 2))  # sum of sqrt(p q)
    assert bird(red) @ bird(blue) == 0
    # 204 is the centre of the bin below 255's; a pixel between belongs to both.
    assert bird(red) @ bird(dark) == 0
    assert np.isclose(bird(red) @ bird((229, 0, 0)), np.sqrt((229 - 204) / 51))


def test_pairs_of_species_are_half_as_far_apart_as_random_ones_and_those_of_leaves_are_closer_than_random(
    world, tmp_path
):
    """The world's own knowledge of its individuals is the judge; all figures: ``python -m benchmarks.curation``."""
    leaves = read_dataset(world / "nabirds")
    oracle = Oracle(leaves.root)
    identities = {e.id: plumage_vector(oracle.identity(e.id)) for e in leaves.examples}
    by_species = benchmark.label_by_species(leaves, tmp_path / "species")
    assert len(by_species.classes) < len(leaves.classes)
    settings = review.Settings(pairs=5)
    shares = [
        benchmark.measure(review.propose(d, settings, tmp_path / "features"), identities) for d in (leaves, by_species)
    ]
    print(shares)
    assert shares[1].perfect < shares[1].proposed <= 0.5
    assert shares[0].perfect < shares[0].proposed < 1


def test_proposals_are_disjoint_of_one_class_and_of_the_split(page, world):
    dataset = read_dataset(world / "nabirds")
    by_file = {e.image.relative_to(dataset.root).as_posix(): e for e in dataset.examples}
    rows = read(page / "proposals.csv")
    files = [row[c] for row in rows for c in ("image_1", "image_2")]
    assert len(set(files)) == len(files) == 2 * len(rows) > 40
    assert all(by_file[f].split == "test" for f in files)
    assert all(by_file[r[c]].class_id == int(r["class_id"]) for r in rows for c in ("image_1", "image_2"))
    tests = [sum(dataset.examples[p].split == "test" for p in own) for own in dataset.classes.values()]
    assert [int(c["pairs"]) for c in read(page / "classes.csv")] == [min(n // 2, 10) for n in tests]
    data = told(page)
    assert [[data["pictures"][p]["image"] for p in pair[1:3]] for pair in data["pairs"]] == [
        [row["image_1"], row["image_2"]] for row in rows
    ]
    assert {f.name for f in (page / "review_files/pictures").iterdir()} == {p["file"] for p in data["pictures"]}


def test_the_page_shows_the_bird_with_a_margin(page, world):
    dataset = read_dataset(world / "nabirds")
    data = told(page)
    shown = data["pictures"][0]
    example = next(e for e in dataset.examples if e.image.relative_to(dataset.root).as_posix() == shown["image"])
    mask = read_rgb(example.mask)[:, :, 0] > 127
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    margin = round(0.2 * max(np.ptp(rows) + 1, np.ptp(columns) + 1))
    expected = read_rgb(example.image)[
        max(rows[0] - margin, 0) : rows[-1] + 1 + margin, max(columns[0] - margin, 0) : columns[-1] + 1 + margin
    ]
    found = read_rgb(page / "review_files/pictures" / shown["file"])
    assert found.shape == expected.shape and np.abs(found.astype(int) - expected).mean() < 6
    assert shown["credit"]


# ------------------------------------------------------------------------------------------------------------
# Verdicts
# ------------------------------------------------------------------------------------------------------------


def test_accepted_pairs_become_a_list_that_is_read_and_checked_like_any_other(page, data, tmp_path, capsys):
    rows = [(r["class_id"], r["image_1"], r["image_2"]) for r in read(page / "proposals.csv")]
    ann = [(*row, ("accept", "accept", "reject", "skip")[i % 4]) for i, row in enumerate(rows)]
    # The second reviewer saw the first pairs mirrored, and is against one that the first accepts.
    bob = [(c, b, a, "reject" if i == 1 else "accept") for i, (c, a, b) in enumerate(rows[:3])]
    files = [write(tmp_path / "ann.csv", ann), write(tmp_path / "bob.csv", bob, "Bob")]
    curate.main(["collect", str(data), *map(str, files)])
    told = capsys.readouterr().out
    accepted = [r for i, r in enumerate(rows) if i % 4 < 2 and i != 1]
    rejected = sum(i % 4 == 2 for i in range(3, len(rows)))
    assert f"pairs: {len(accepted)}, of" in told and f"{rejected} rejected, 2 disputed" in told
    listed = read(data / "pairs.csv")
    assert sorted((r["class_id"], r["image_1"], r["image_2"]) for r in listed) == sorted(accepted)
    assert {r["verdict"] for r in listed} == {"accept"}
    assert [r["reviewer"] for r in listed if r["image_1"] == rows[0][1]] == ["Ann; Bob"]
    pairs = benchmark_pairs(data)
    assert len(pairs) == 2 * len(accepted)
    problems = Problems()
    (report,) = pair_lists.report_all([data / "pairs.csv"], problems, read_dataset(data), published=False)
    assert not len(problems) and report.unique == len(accepted) and report.reused == 0
    curate.main(["collect", str(data), *map(str, files), "--agree", "2", "--list", str(data / "sure.csv")])
    assert [r["image_1"] for r in read(data / "sure.csv")] == [rows[0][1]]
    assert len(benchmark_pairs(data / "sure.csv")) == 2


def test_a_second_round_proposes_only_what_is_missing(page, world, tmp_path):
    dataset = read_dataset(world / "nabirds")
    first = read(page / "proposals.csv")
    of_class = [r for r in first if r["class_id"] == first[0]["class_id"]]
    rows = [
        (r["class_id"], r["image_1"], r["image_2"], ("accept", "reject", "skip")[min(i, 2)])
        for i, r in enumerate(of_class)
    ]
    file = write(tmp_path / "ann.csv", rows)
    settings = review.Settings(pairs=3)
    found = review.propose(dataset, settings, page / "features", verdicts.read([file], dataset))
    again = [row[1:3] for row in found.rows if row[0] == first[0]["class_id"]]
    accepted, rejected = set(rows[0][1:3]), set(rows[1][1:3])
    assert len(again) == 2  # one of three is there
    assert all(not accepted & set(pair) and set(pair) != rejected for pair in again)
    others = [row for row in found.rows if row[0] != first[0]["class_id"]]
    assert {row[0] for row in others} == {r["class_id"] for r in first} - {first[0]["class_id"]}
    assert f"beside {1} that are accepted already" in "\n".join(review.describe(found, 3))


def test_features_are_stored_and_used_again(page, world, monkeypatch):
    stored = {f.name: f.stat().st_mtime_ns for f in (page / "features").iterdir()}
    curate.main(["propose", str(world / "nabirds"), "--out", str(page), "--pairs", "10"])
    assert {f.name: f.stat().st_mtime_ns for f in (page / "features").iterdir()} == stored


# ------------------------------------------------------------------------------------------------------------
# Other sources
# ------------------------------------------------------------------------------------------------------------


def manifest(folder, rows, columns="image,class,split"):
    folder.mkdir(exist_ok=True)
    (folder / "manifest.csv").write_text("\n".join([columns, *rows]) + "\n")
    return folder


def fish(folder, n=6):
    """Pictures of two species without masks; the last of the first is a copy of its first file."""
    rows = []
    for i in range(n):
        for name in ("cod", "hake"):
            write_image(fixtures.picture(40 + i, 50, i + 100 * len(name))[0], folder / "photos" / f"{name}{i}.png")
            rows.append(f"photos/{name}{i}.png,{name},test")
    shutil.copy(folder / "photos/cod0.png", folder / f"photos/cod{n - 1}.png")
    return manifest(folder, rows)


def test_anything_with_a_manifest_can_be_curated(tmp_path, capsys):
    folder = fish(tmp_path / "fish")
    curate.main(
        ["propose", str(folder), "--out", str(tmp_path / "out"), "--crop", "image", "--colour", "1", "--least", "4"]
    )
    told = capsys.readouterr().out
    assert "pairs: 6, of 2 classes" in told and "1 pairs of files are byte for byte the same" in told
    assert "2 have fewer than 4 pairs: cod, hake" in told
    rows = read(tmp_path / "out" / "proposals.csv")
    assert all({r["image_1"], r["image_2"]} != {"photos/cod0.png", "photos/cod5.png"} for r in rows)
    judged = [(r["class_id"], r["image_1"], r["image_2"], "accept") for r in rows]
    curate.main(["collect", str(folder), str(write(tmp_path / "v.csv", judged))])
    assert len(benchmark_pairs(folder)) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "yes"}, r"v.csv:2: verdict: found 'yes'; write one of accept, reject, skip"),
        ({"image_2": "photos/eel.png"}, r"v.csv:2: image_2: photos/eel.png is not a picture of"),
        ({"image_2": "photos/hake1.png"}, r"v.csv:2: class_id 0000, but image_2 is of class 1"),
        ({"image_2": "photos/cod0.png"}, r"v.csv:2: image_1 and image_2 are one picture"),
        ({"reviewer": ""}, r"v.csv:2: reviewer is empty"),
    ],
)
def test_wrong_verdicts_are_refused(change, message, tmp_path):
    folder = fish(tmp_path / "fish")
    row = {"image_2": "photos/cod1.png", "reviewer": "Ann", "verdict": "accept"} | change
    file = write(tmp_path / "v.csv", [("0000", "photos/cod0.png", row["image_2"], row["verdict"])], row["reviewer"])
    with pytest.raises(UserError, match=message):
        curate.main(["collect", str(folder), str(file)])


def test_one_reviewer_has_one_opinion_of_a_pair(tmp_path):
    folder = fish(tmp_path / "fish")
    rows = [
        ("0000", "photos/cod0.png", "photos/cod1.png", "accept"),
        ("0000", "photos/cod1.png", "photos/cod0.png", "skip"),
    ]
    with pytest.raises(UserError, match=r"v.csv:3: Ann says skip here and accept at .*v.csv:2"):
        curate.main(["collect", str(folder), str(write(tmp_path / "v.csv", rows))])


def test_a_list_that_nobody_judged_is_not_overwritten(tmp_path):
    folder = fish(tmp_path / "fish")
    file = write(tmp_path / "v.csv", [("0000", "photos/cod0.png", "photos/cod1.png", "accept")])
    (folder / "pairs.csv").write_text("image_1,image_2\na,b\n")
    with pytest.raises(UserError, match="is a list without reviewers: name another with --list"):
        curate.main(["collect", str(folder), str(file)])
    with pytest.raises(UserError, match="expected a file in .*fish"):
        curate.main(["collect", str(folder), str(file), "--list", str(tmp_path / "mine.csv")])
    curate.main(["collect", str(folder), str(file), "--list", str(folder / "mine.csv")])
    curate.main(["collect", str(folder), str(file), "--list", str(folder / "mine.csv")])  # its own, again
    assert (folder / "pairs.csv").read_text() == "image_1,image_2\na,b\n" and len(read(folder / "mine.csv")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), r"found no mask, nor for 11 more of 12 pictures; .*--crop image"),
        (("--crop", "box"), "found no box"),
        (("--crop", "fin"), "--crop: found 'fin', expected one of mask, box, image"),
        (("--colour", "1.5"), "--colour: found 1.5, expected 0 to 1"),
        (("--crop", "image", "--dinov2", ""), "--dinov2: found nothing"),
        (("--pairs", "0"), "--pairs: found 0, expected at least 1"),
        (("--split", "train"), "found no picture of split train"),
        (("--crop", "image", "--dinov2", "asset:toy-siglip"), "dinov2"),
    ],
)
def test_what_cannot_be_proposed_is_told_before_anything_is_read(arguments, message, tmp_path):
    folder = fish(tmp_path / "fish")
    with pytest.raises(UserError, match=message):
        curate.main(["propose", str(folder), "--out", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_a_box_stands_for_a_silhouette(tmp_path):
    folder = tmp_path / "fish"
    write_image(fixtures.picture(40, 60, 0)[0], folder / "a.png")
    manifest(folder, ["a.png,cod,test,10 5 30 25"], "image,class,split,box")
    (example,) = read_dataset(folder).examples
    picture, inside = looks.read(example, "box")
    expected = np.zeros((40, 60), bool)
    expected[5:25, 10:30] = True  # the list says left top right bottom
    assert picture.shape == (40, 60, 3) and (inside == expected).all()
    assert looks.shown(example, "box") == (1, 6, 29, 34)  # a fifth of 20 round it
    assert looks.shown(example, "image") == (0, 0, 40, 60)


def test_an_empty_silhouette_is_left_out_and_named(tmp_path, capsys):
    folder = tmp_path / "fish"
    for seed, n in enumerate("abc"):
        picture, mask = fixtures.picture(40, 60, seed)
        write_image(picture, folder / f"{n}.png")
        write_image(np.where(mask & (n != "b"), 255, 0).astype(np.uint8), folder / "masks" / f"{n}.png")
    manifest(folder, [f"{n}.png,cod,test,masks/{n}.png" for n in "abc"], "image,class,split,mask")
    curate.main(["propose", str(folder), "--out", str(tmp_path / "out")])
    assert "1 pictures have an empty mask and are left out: b" in capsys.readouterr().out
    assert [(r["image_1"], r["image_2"]) for r in read(tmp_path / "out" / "proposals.csv")] == [("a.png", "c.png")]


def test_observations_have_pairs_of_their_own(world, tmp_path):
    with pytest.raises(UserError, match="iNaturalist observations, .* manifest.csv"):
        curate.main(["propose", str(world / "inat" / "na"), "--out", str(tmp_path / "out")])


def test_text_of_the_data_stays_text(tmp_path):
    markup = "<img src=x onerror=1>"
    folder = manifest(tmp_path / "a &<b>", [f"{n}.png,{markup},test" for n in "xy"])
    for seed, n in enumerate("xy"):
        write_image(fixtures.picture(30, 30, seed)[0], folder / f"{n}.png")
    curate.main(["propose", str(folder), "--out", str(tmp_path / "out"), "--crop", "image"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<b>" not in page and "a &amp;&lt;b&gt;" in page and "onerror" not in page
    assert told(tmp_path / "out")["classes"][0]["name"] == markup
