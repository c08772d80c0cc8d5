"""The written world: its layout, the real data's traps, repeatability, and the oracle."""

import collections
import csv
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid

import numpy as np
import pytest
from PIL import Image

from nabla_jax import prepare
from nabla_jax.data import clips, read_dataset
from nabla_jax.errors import UserError
from nabla_jax.toybirds import Oracle, write_world
from nabla_jax.toybirds import world as plan
from nabla_jax.toybirds.render import KEYPOINTS, render
from nabla_jax.toybirds.world import Settings, scene_of

SMALL = {"seed": 5, "size": 32, "images": 100, "orders": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("worlds") / "one", **SMALL, workers=1, progress=False)


def table(path):
    rows = [line.split(" ", 1) for line in path.read_text(encoding="ascii").splitlines()]
    assert len({key for key, _ in rows}) == len(rows)
    return dict(rows)


def digests(root):
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


def rmse(a, b, mask):
    return float(np.sqrt(((a.astype(float) - b.astype(float))[mask] ** 2).mean()))


def test_the_same_settings_give_the_same_bytes_for_any_number_of_workers(world, tmp_path):
    twin = write_world(tmp_path / "two", **SMALL, workers=2, progress=False)
    assert digests(world) == digests(twin)
    other = write_world(tmp_path / "three", **{**SMALL, "seed": 6}, workers=1, progress=False)
    assert not set(digests(world).values()) & {v for k, v in digests(other).items() if k.endswith((".jpg", ".JPG"))}


def test_the_metadata_files_join_by_id_and_match_the_pictures(world):
    root = world / "nabirds"
    images = table(root / "images.txt")
    assert len(images) == SMALL["images"] and list(images) == sorted(images)
    labels, sizes = table(root / "image_class_labels.txt"), table(root / "sizes.txt")
    split, boxes = table(root / "train_test_split.txt"), table(root / "bounding_boxes.txt")
    for other in (labels, sizes, split, boxes, table(root / "photographers.txt")):
        assert list(other) == list(images)
    for image_id, path in images.items():
        folder, name = path.split("/")
        assert uuid.UUID(image_id).version == 4 and name.split(".")[0] == image_id.replace("-", "")
        assert folder == f"{int(labels[image_id]):04d}" and not labels[image_id].startswith("0")
        width, height = map(int, sizes[image_id].split())
        stem = path.rsplit(".", 1)[0]
        with Image.open(root / "images" / path) as picture:
            assert picture.size == (width, height) and picture.mode == "RGB"
            assert picture.layer == [(1, 1, 1, 0), (2, 1, 1, 1), (3, 1, 1, 1)]  # no chroma subsampling
        mask = np.asarray(Image.open(root / "masks" / f"{stem}.png"))
        depth = np.asarray(Image.open(root / "depth" / f"{stem}.png"))
        assert mask.shape == depth.shape == (height, width) and set(np.unique(mask)) <= {0, 255}
        np.testing.assert_array_equal(mask > 128, depth > 0)
        x, y, w, h = map(int, boxes[image_id].split())
        rows, columns = np.nonzero(mask)
        assert x <= columns.min() and columns.max() < x + w and y <= rows.min() and rows.max() < y + h
    captions = json.loads((root / "captions.json").read_text(encoding="utf-8"))
    assert set(captions) == set(images) == set(json.loads((root / "captions_long.json").read_text(encoding="utf-8")))


def test_classes_form_a_tree_of_depth_three_and_four_with_gaps_and_odd_names(world):
    root = world / "nabirds"
    names, parents = table(root / "classes.txt"), table(root / "hierarchy.txt")
    assert set(names) - set(parents) == {"0"} and set(names) == {str(k) for k in range(len(names))}
    leaves = set(table(root / "image_class_labels.txt").values())
    assert not leaves & set(parents.values())

    def depth(node):
        return 0 if node == "0" else 1 + depth(parents[node])

    assert {depth(leaf) for leaf in leaves} == {3, 4}
    ids = sorted(map(int, leaves))
    assert ids != list(range(ids[0], ids[-1] + 1))
    lines = (root / "classes.txt").read_text(encoding="ascii").splitlines()
    assert any("  (" in line for line in lines) and any(" )" in line for line in lines)
    assert any(line.endswith(" ") for line in lines)
    # Some species occur twice: an inner node and a leaf of one name.
    assert collections.Counter(names.values()).most_common(1)[0][1] == 2
    assert any("(" in names[leaf] for leaf in leaves) and any("(" not in names[leaf] for leaf in leaves)


def test_keypoint_rows_are_whole_numbers_and_zero_when_invisible(world):
    root = world / "nabirds"
    parts = table(root / "parts" / "parts.txt")
    assert [parts[str(k)] for k in range(11)] == list(KEYPOINTS)
    lines = [line.split() for line in (root / "parts" / "part_locs.txt").read_text().splitlines()]
    assert len(lines) == 11 * SMALL["images"]
    assert {line[4] for line in lines} == {"0", "1"}
    assert all(line[2:4] == ["0", "0"] for line in lines if line[4] == "0")
    sizes = table(root / "sizes.txt")
    for image_id, _, x, y, visible in lines:
        width, height = map(int, sizes[image_id].split())
        assert visible == "0" or (0 <= int(x) < width and 0 <= int(y) < height)


def test_the_real_datas_traps_are_there(world):
    root = world / "nabirds"
    sizes, boxes = table(root / "sizes.txt"), table(root / "bounding_boxes.txt")
    outside = [
        key
        for key, box in boxes.items()
        if int(box.split()[0]) + int(box.split()[2]) > int(sizes[key].split()[0])
        or int(box.split()[1]) + int(box.split()[3]) > int(sizes[key].split()[1])
    ]
    assert 1 <= len(outside) < 15
    shapes = {tuple(map(int, size.split())) for size in sizes.values()}
    assert any(w > h for w, h in shapes) and any(w < h for w, h in shapes) and (32, 32) in shapes
    suffixes = collections.Counter(path.rsplit(".", 1)[1] for path in table(root / "images.txt").values())
    assert suffixes["jpg"] > suffixes["JPG"] >= 1


def test_pairs_are_look_alikes_of_the_test_split_with_two_repeats(world):
    root = world / "nabirds"
    rows = list(csv.DictReader((root / "pairs.csv").open(encoding="utf-8", newline="")))
    ids = {f"./images/{path}": key for key, path in table(root / "images.txt").items()}
    split, labels = table(root / "train_test_split.txt"), table(root / "image_class_labels.txt")
    for row in rows:
        assert re.fullmatch(r"\d{4}", row["class_id"]) and row["image_1"] != row["image_2"]
        for column in ("image_1", "image_2"):
            image_id = ids[row[column]]
            assert split[image_id] == "0" and int(labels[image_id]) == int(row["class_id"])
    ordered = collections.Counter((r["image_1"], r["image_2"]) for r in rows)
    assert sum(n - 1 for n in ordered.values()) == 1
    assert sum((b, a) in ordered for a, b in ordered) == 2  # one mirrored pair, found from both sides
    assert {row["class_id"] for row in rows} == {f"{int(c):04d}" for c in labels.values()}
    assert [row["class_id"] for row in rows] != sorted(row["class_id"] for row in rows)
    assert any(row["image_1"].endswith(".JPG") or row["image_2"].endswith(".JPG") for row in rows)


@pytest.mark.parametrize("subset, columns", [("na", 13), ("unseen", 12)])
def test_inat_folders_hold_true_pairs_with_the_official_columns(world, subset, columns):
    root = world / "inat" / subset
    rows = list(csv.DictReader((root / "final_pairs.csv").open(encoding="utf-8", newline="")))
    assert all(len(row) == columns + 1 and row["taxonomy"].count(" > ") == 2 for row in rows) and len(
        {r["observation_id"] for r in rows}
    ) == len(rows)
    captions = json.loads((root / "captions_short.json").read_text(encoding="utf-8"))
    assert not any(part in text for text in captions.values() for part in ("cap", "head", "belly", "wings"))
    oracle = Oracle(root)
    for row in rows:
        ids = []
        for column in ("image_1", "image_2"):
            stem = row[column].removesuffix(".jpg")
            control = f"{row['relative_path'].removeprefix('images/')}/{stem}.png"
            size = Image.open(root / row["relative_path"] / row[column]).size
            assert Image.open(root / "mask" / control).size == Image.open(root / "depth" / control).size == size
            ids.append(f"{row['observation_id']}_{stem}")
        assert ids[0] in captions and ids[1] in oracle
        assert oracle.identity(ids[0]) == oracle.identity(ids[1])  # one true individual
        assert oracle.scene(ids[0]) != oracle.scene(ids[1])
    assert any(row["image_1"].startswith("photo_") for row in rows)
    assert any(not row["image_1"].startswith("photo_") for row in rows)
    shapes = {re.sub(r"\d", "9", row["observed_on"]) for row in rows}
    assert len(shapes) >= 2
    if subset == "unseen":
        assert any(not row["common_name"].isascii() for row in rows)


def listed(path):
    return list(csv.DictReader(path.open(encoding="utf-8", newline="")))


def test_pictures_of_the_first_worlds_are_as_they_were():
    """What decides their pixels, hashed before clips, rows of seen species and the column taxonomy were added."""
    settings = Settings(**SMALL)
    images = plan.nabirds_images(settings, plan.hierarchy(settings))
    observed = [o for subset, n in (("na", 24), ("unseen", 18)) for o in plan.observations(settings, subset)[:n]]
    for observation in observed:
        del observation.row["taxonomy"]
    assert hashlib.sha256(repr((images, observed)).encode()).hexdigest() == (
        "50b689ff5cfc1486baf5a0cdc33a03b5135c578c76aad263268b9896484143da"
    )
    pictures = [i.picture for i in images] + [p for o in observed for p in o.pictures]
    assert hashlib.sha256(repr([scene_of(settings, p) for p in pictures]).encode()).hexdigest() == (
        "c813e70ab79526ba8667c234e58442abdf568e9a4c6acd80becb10fa25b9080d"
    )


def test_strictly_unseen_species_are_not_in_nabirds(world):
    seen = {" ".join(n.split("(")[0].split()) for n in table(world / "nabirds" / "classes.txt").values()}
    rows = listed(world / "inat" / "unseen" / "strict_unseen.csv")
    na = listed(world / "inat" / "na" / "final_pairs.csv")
    assert not {row["common_name"] for row in rows} & seen
    assert {row["common_name"] for row in na} <= seen


def test_the_strict_list_is_the_one_that_the_command_writes(world, tmp_path, capsys):
    unseen, strict = (world / "inat" / "unseen" / name for name in ("final_pairs.csv", "strict_unseen.csv"))
    command = ["--validate", "--strict_unseen", str(tmp_path / "strict.csv"), "--pairs"]
    prepare.main([*command, str(world / "inat" / "na" / "final_pairs.csv"), str(unseen)])
    assert (tmp_path / "strict.csv").read_bytes() == strict.read_bytes()
    assert "22 rows = 18 strictly unseen + 4 of seen species" in capsys.readouterr().out
    # NABirds' species names alone find the two rows that carry one.
    prepare.main([*command, str(unseen), "--lists_only", str(world / "nabirds")])
    assert "22 rows = 20 strictly unseen + 2 of seen species" in capsys.readouterr().out


def test_rows_that_are_not_truly_unseen_come_last_in_four_ways_and_show_their_species(world):
    rows = listed(world / "inat" / "unseen" / "final_pairs.csv")
    strict = listed(world / "inat" / "unseen" / "strict_unseen.csv")
    assert rows[: len(strict)] == strict
    same, renamed, below, crossed = rows[len(strict) :]
    species = {row["common_name"]: row["scientific_name"] for row in listed(world / "inat" / "na" / "final_pairs.csv")}
    assert species[same["common_name"]] == same["scientific_name"]
    assert species[renamed["common_name"]] != renamed["scientific_name"]
    assert below["scientific_name"].rsplit(" ", 1)[0] in species.values() and below["common_name"] not in species
    names = crossed["common_name"].split(" × ")
    genus, first, _, second = crossed["scientific_name"].split()
    assert [species[name] for name in names] == [f"{genus} {first}", f"{genus} {second}"]
    # The birds are of the species that the rows hide: order, family and species are those of the seen list.
    known = {}
    seen = Oracle(world / "inat" / "na")
    for row in listed(world / "inat" / "na" / "final_pairs.csv"):
        key = f"{row['observation_id']}_{row['image_1'].removesuffix('.jpg')}"
        known[row["scientific_name"]] = seen._images[key]["identity"][:3]
    for row, name in ((same, same["scientific_name"]), (renamed, species[renamed["common_name"]]),
                      (below, below["scientific_name"].rsplit(" ", 1)[0]), (crossed, f"{genus} {first}")):  # fmt: skip
        for column in ("image_1", "image_2"):
            key = f"{row['observation_id']}_{row[column].removesuffix('.jpg')}"
            assert Oracle(world / "inat" / "unseen")._images[key]["identity"][:3] == known[name]


def test_clips_show_one_individual_each_on_the_move(world):
    root = world / "clips"
    dataset, oracle = read_dataset(root), Oracle(root)
    rows = listed(root / "clips.csv")
    assert len(rows) == len(dataset.classes) == 6 and len(dataset.examples) == len(oracle) == 36
    assert len({row["species"] for row in rows}) == 3 and len({row["individual"] for row in rows}) == 6
    assert {row["species"] for row in rows} <= {row["common_name"] for row in listed(world / "inat/na/final_pairs.csv")}
    for positions in dataset.classes.values():
        frames = [dataset.examples[i] for i in positions]
        assert all(frame.mask is not None and frame.depth is not None and frame.split == "test" for frame in frames)
        birds = [oracle.identity(frame.id) for frame in frames]
        scenes = [oracle.scene(frame.id) for frame in frames]
        assert all(bird == birds[0] for bird in birds[1:])
        assert len({scene.canvas for scene in scenes}) == len({scene.blobs for scene in scenes}) == 1
        # The pose changes a little from frame to frame, and more between those that are paired.
        steps = [abs(b.pitch - a.pitch) for a, b in zip(scenes, scenes[1:], strict=False)]
        np.testing.assert_allclose(steps, np.mean(steps), atol=1e-9)
        assert 0 < steps[0] < np.radians(6.1) and scenes[3].pitch - scenes[0].pitch == pytest.approx(
            3 * (scenes[1].pitch - scenes[0].pitch)
        )
        assert sum(a.facing != b.facing for a, b in zip(scenes, scenes[1:], strict=False)) <= 1
        for frame in frames:
            mask = np.asarray(Image.open(frame.mask)) > 128
            np.testing.assert_array_equal(oracle.mask(frame.id), mask)
    assert len({oracle.identity(dataset.examples[p[0]].id) for p in dataset.classes.values()}) == 6


def test_the_right_answer_of_a_pair_of_frames_is_the_target_itself(world):
    dataset, oracle = read_dataset(world / "clips"), Oracle(world / "clips")
    pairs = clips.frame_pairs(dataset)
    assert len(pairs) == 18 and len({id for pair in pairs for id in pair}) == 36
    for first, second in pairs:
        a, b = dataset.by_id[first], dataset.by_id[second]
        assert a.individual == b.individual and int(b.image.stem) - int(a.image.stem) == 6 * 30  # six seconds
        np.testing.assert_array_equal(oracle.right(first, second), oracle.right(second, second))
        assert (oracle.right(first, second) != oracle.right(first, first)).any()


def test_clips_do_not_grow_beyond_a_dozen_species():
    assert len(plan.clips(Settings())) == len(plan.clips(Settings(orders=60, images=10**5))) == 24
    assert len(plan.disguised(Settings(orders=60, images=10**5))) == 4


def test_the_world_of_an_older_version_is_refused(world, tmp_path):
    for name in ("world.json", "clips/oracle.json"):
        found = json.loads((world / name).read_text(encoding="utf-8"))
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({**found, "version": 2}), encoding="utf-8")
    with pytest.raises(UserError, match="version: found 2, expected 3.*delete it"):
        write_world(tmp_path, **SMALL, progress=False)
    with pytest.raises(UserError, match="version: found 2, expected 3; delete .* python -m nabla_jax.toybirds"):
        Oracle(tmp_path / "clips")


def test_the_default_world_is_large_enough_for_intervals_clustered_by_class():
    settings = Settings()
    settings.check()
    nodes = plan.hierarchy(settings)
    images = plan.nabirds_images(settings, nodes)
    assert len(images) == 1600 and len({image.class_id for image in images}) >= 60
    assert len({row.row["common_name"] for row in plan.observations(settings, "unseen")}) >= 24
    counts = collections.Counter((image.class_id, image.train) for image in images)
    assert min(counts.values()) >= 2 and len(counts) == 2 * len({image.class_id for image in images})
    assert len({image.picture.image_id for image in images}) == 1600
    names = [node.name for node in nodes if node.leaf is not None]
    assert len({" ".join(name.split()) for name in names}) == len(names)


def test_a_finished_world_is_left_alone_and_another_is_refused(world):
    before = {p: p.stat().st_mtime_ns for p in world.rglob("*")}
    assert write_world(world, **SMALL, workers=1, progress=False) == world
    assert before == {p: p.stat().st_mtime_ns for p in world.rglob("*")}
    with pytest.raises(UserError, match="seed: found 5, expected 6"):
        write_world(world, **{**SMALL, "seed": 6}, progress=False)


@pytest.mark.parametrize(
    "bad, message",
    [({"images": 10}, "images: found 10"), ({"size": 4}, "size: found 4"), ({"orders": 61}, "orders"),
     ({"pose": "wild"}, "pose"), ({"seed": -1}, "seed")],
)  # fmt: skip
def test_settings_out_of_range_are_named(tmp_path, bad, message):
    with pytest.raises(UserError, match=message):
        write_world(tmp_path / "w", **{**SMALL, **bad}, progress=False)
    assert not list(tmp_path.iterdir())


def test_foreign_folders_and_files_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="without world.json"):
        write_world(tmp_path / "mine", **SMALL, progress=False)
    with pytest.raises(UserError, match="found a file"):
        write_world(tmp_path / "mine" / "notes.txt", **SMALL, progress=False)
    with pytest.raises(UserError, match="cannot write"):
        write_world(tmp_path / "mine" / "notes.txt" / "w", **SMALL, progress=False)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_no_half_world_and_the_next_one_completes_it(world, tmp_path, kill):
    out = tmp_path / "w"
    command = [sys.executable, "-m", "nabla_jax.toybirds", "--out", str(out), "--workers", "2"]
    command += [f"--{name}={value}" for name, value in SMALL.items()]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = tmp_path / f".w.partial.{process.pid}"
    deadline = time.monotonic() + 60
    while not list(partial.rglob("*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, kill)
    assert process.wait(60) == (-9 if kill == signal.SIGKILL else 130)
    assert not out.exists()
    write_world(out, **SMALL, workers=1, progress=False)
    assert digests(out) == digests(world)
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


def test_the_command_prints_the_folder_and_one_line_for_a_mistake(world):
    command = [sys.executable, "-m", "nabla_jax.toybirds", "--out", str(world)]
    good = subprocess.run([*command, *(f"--{k}={v}" for k, v in SMALL.items())], capture_output=True, text=True)
    assert good.returncode == 0 and good.stdout.strip() == str(world)
    bad = subprocess.run(command, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "other settings" in bad.stderr


# ---------------------------------------------------------------- the oracle


def pairs_by_id(root):
    ids = {f"./images/{path}": key for key, path in table(root / "images.txt").items()}
    for row in csv.DictReader((root / "pairs.csv").open(encoding="utf-8", newline="")):
        yield ids[row["image_1"]], ids[row["image_2"]]


def test_the_right_answer_of_a_picture_about_itself_is_that_picture(world):
    root = world / "nabirds"
    oracle, paths = Oracle(root), table(root / "images.txt")
    assert len(oracle) == len(paths)
    for image_id, path in list(paths.items())[:25]:
        right = oracle.right(image_id, image_id)
        picture = oracle.settings
        np.testing.assert_array_equal(right, render(oracle.identity(image_id), oracle.scene(image_id)).rgb)
        written = np.asarray(Image.open(root / "images" / path)).astype(float)
        assert picture.size == 32 and np.abs(written - right).mean() < 4  # JPEG at quality 95
        mask = np.asarray(Image.open(root / "masks" / f"{path.rsplit('.', 1)[0]}.png")) > 128
        np.testing.assert_array_equal(oracle.mask(image_id), mask)


def test_answers_share_the_targets_mask_and_rank_as_they_should(world):
    oracle = Oracle(world / "nabirds")
    same, sibling, plumage = [], [], []
    for subject, target in list(pairs_by_id(world / "nabirds"))[:15]:
        mask, right = oracle.mask(target), oracle.right(subject, target)
        same.append(rmse(oracle.right(target, target), right, mask))
        sibling.append(rmse(oracle.sibling(subject, target), right, mask))
        other = oracle.sibling_plumage(subject, target)
        if other is not None:
            plumage.append(rmse(other, right, mask))
        np.testing.assert_array_equal(oracle.sibling(subject, target), oracle.sibling(subject, target, seed=0))
    assert 0 < np.mean(same) < 12 < np.mean(plumage) < np.mean(sibling) and np.mean(sibling) > 45


def test_the_line_up_starts_with_the_right_answer_and_shows_ten_different_species(world):
    oracle = Oracle(world / "nabirds")
    subject, target = next(pairs_by_id(world / "nabirds"))
    shown = oracle.lineup(subject, target)
    assert len(shown) == 10
    np.testing.assert_array_equal(shown[0], oracle.right(subject, target))
    mask = oracle.mask(target)
    errors = [rmse(a, b, mask) for i, a in enumerate(shown) for b in shown[:i]]
    assert min(errors) > 10
    again = oracle.lineup(subject, target, n=4, seed=1)
    assert len(again) == 4 and any((a != b).any() for a, b in zip(again[1:], shown[1:], strict=False))
    # Members of the subject's family come first: their palette is nearer than a stranger's.
    assert np.mean([rmse(shown[0], x, mask) for x in shown[1:6]]) < np.mean(
        [rmse(shown[0], x, mask) for x in shown[6:]]
    )


def test_the_oracle_names_what_is_wrong(world, tmp_path):
    with pytest.raises(UserError, match=r"oracle\.json"):
        Oracle(tmp_path)
    with pytest.raises(UserError, match="nobody"):
        Oracle(world / "nabirds").right("nobody", "nobody")
    found = json.loads((world / "nabirds" / "oracle.json").read_text(encoding="utf-8"))
    (tmp_path / "oracle.json").write_text(json.dumps({**found, "version": 999}))
    with pytest.raises(UserError, match="version: found 999"):
        Oracle(tmp_path)
