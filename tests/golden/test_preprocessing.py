"""Crops, canvases, controls and masks against the published data pipeline's pictures.

The published box of a bird lacks its last row and column (decision 7): where a crop depends on it, that box is handed
in. OpenCV's bilinear and area filters work in fixed point: one grey level is let through where they were used.
"""

import re

import numpy as np
import pytest

from nabla_jax import draws
from nabla_jax.conditioning import masks
from nabla_jax.conditioning.geometry import Placement, mask_box, scale_box, square_box
from nabla_jax.config import Conditioning
from nabla_jax.data import controls, skeleton
from nabla_jax.images import resize
from tests.golden.golden import case

GOLDEN = case("preprocessing")
NAMES = GOLDEN.config["files"]
SIZE = GOLDEN.config["target_size"][0]
CROPS = GOLDEN.scalar("vision_utils")
ITEMS = GOLDEN.scalar("items")
PAIRS = GOLDEN.scalar("insert_predict")
FINAL = sorted({n.split(".")[1] for n in GOLDEN.names("infer_pair") if n.startswith("final.")})


def source(name: str, kind: str = "image") -> np.ndarray:
    return GOLDEN.tensor("vision_utils", f"{name}.{kind}")


def view(name: str) -> controls.View:
    rows = sorted(GOLDEN.scalar("keypoints")[name])
    assert [GOLDEN.config["parts"][row[0]] for row in rows] == list(skeleton.PARTS)
    keypoints = np.array([[y, x, visible] for _, x, y, visible in rows])
    return controls.View(source(name), source(name, "mask") > 0, source(name, "depth"), keypoints)


def published_box(name: str) -> tuple[int, int, int, int]:
    """(top, left, bottom, right), half-open, of what the published code crops."""
    top, bottom, left, right = CROPS[name]["bbox_yyxx"]
    return top, left, bottom, right


def rows_last(tensor: np.ndarray) -> np.ndarray:
    """[3, H, W] -> [H, W, 3], still a view of the stored tensor."""
    return tensor.transpose(1, 2, 0)


def equal(found: np.ndarray, stored: np.ndarray, grey_levels: int = 0) -> None:
    np.testing.assert_allclose(found.astype(int), stored, rtol=0, atol=grey_levels)


def test_there_is_something_to_compare() -> None:
    assert {"landscape", "portrait_edge", "square", "empty", "few_pixels"} <= set(NAMES)
    assert ITEMS and PAIRS and FINAL and GOLDEN.config["condition_size"][0] == SIZE


# ------------------------------------------------------------------------------------------------ boxes, padding


@pytest.mark.parametrize("name", NAMES)
def test_boxes_hold_the_whole_bird(name: str) -> None:
    """Decision 7: one row and one column more than the published box."""
    mask = source(name, "mask") > 0
    top, left, bottom, right = published_box(name)
    if mask.sum() >= 10:
        assert mask_box(mask) == (top, left, bottom + 1, right + 1)
        assert Placement.subject(mask, SIZE).box == mask_box(mask)
    else:
        assert (top, left, bottom, right) == (0, 0, *mask.shape)
        if mask.any():
            assert Placement.subject(mask, SIZE).box == (top, left, bottom, right)


@pytest.mark.parametrize("name", NAMES)
def test_enlarged_boxes(name: str) -> None:
    """Ours lie about the centre of the whole bird's pixels, half a pixel after the published one."""
    height, width = source(name, "mask").shape
    top, left, bottom, right = published_box(name)
    whole = (top, left, min(bottom + 1, height), min(right + 1, width))
    for ratio in (1.2, 2.0):
        y0, y1, x0, x1 = CROPS[name][f"expand_bbox_{ratio}"]
        np.testing.assert_allclose(scale_box(whole, ratio, height, width), (y0, x0, y1, x1), rtol=0, atol=2)
        square = square_box((y0, x0, y1, x1), height, width)
        y0, y1, x0, x1 = CROPS[name][f"box2square_of_expand_{ratio}"]
        np.testing.assert_allclose(square, (y0, x0, y1, x1), rtol=0, atol=1)


@pytest.mark.parametrize("name", NAMES)
def test_padding_to_a_square(name: str) -> None:
    image, mask = source(name), source(name, "mask")
    placement = Placement.square(*mask.shape, max(mask.shape))
    equal(placement.apply(image, 255), GOLDEN.tensor("vision_utils", f"{name}.pad_to_square_255"))
    equal(placement.apply(mask, 0), GOLDEN.tensor("vision_utils", f"{name}.pad_to_square_mask0"))


RANDOM = [n.split(".")[0] for n in GOLDEN.names("vision_utils") if n.endswith(".pad_to_square_random")]


@pytest.mark.parametrize("name", RANDOM)
def test_padding_at_a_given_place(name: str) -> None:
    """The published draw is handed in."""
    height, width = source(name, "mask").shape
    before, both = CROPS[name]["pad_to_square_random_before"], abs(width - height)
    padding = (before, 0, both - before, 0) if width > height else (0, before, 0, both - before)
    placement = Placement(height, width, (0, 0, height, width), padding, max(height, width))
    equal(placement.apply(source(name), 255), GOLDEN.tensor("vision_utils", f"{name}.pad_to_square_random"))


@pytest.mark.parametrize("name", NAMES)
def test_padding_by_a_ratio(name: str) -> None:
    height, width = source(name, "mask").shape
    for kind, fill in (("image", 255), ("mask", 0)):
        stored = GOLDEN.tensor("vision_utils", f"{name}.expand_{kind}_1.3")
        placement = Placement.crop(height, width, published_box(name), 1).padded(1.3)
        assert placement.side == max(stored.shape[:2])
        square = Placement(height, width, placement.box, placement.padding, placement.side)
        rows, columns = stored.shape[:2]
        top, left = (square.side - rows) // 2, (square.side - columns) // 2
        equal(square.apply(source(name, kind), fill)[top : top + rows, left : left + columns], stored)
    for ratio in (1.1, 1.3, 1.4):
        side = max(CROPS[name][f"expand_image_mask_{ratio}_shape"])
        assert Placement.crop(height, width, published_box(name), 1).padded(ratio).side == side


# ----------------------------------------------------------------------------------------------------- keypoints


def style(variant: str) -> dict[str, object]:
    """What is handed in for a stored variant: skeleton, dot and line."""
    if variant == "dots_only":
        return {"skeleton": "dots", "dot": 9}
    skeleton_name, dot, line = re.fullmatch(r"(\w+)_(\d+)_(\d+)", variant).groups()
    return {"skeleton": skeleton_name, "dot": int(dot), "line": int(line)}


@pytest.mark.parametrize("variant", sorted(GOLDEN.scalar("keypoint_styles")))
def test_colours_and_lines(variant: str) -> None:
    stored, name = GOLDEN.scalar("keypoint_styles")[variant], style(variant)["skeleton"]
    if name in ("dense", "sparse"):
        assert [list(edge) for edge in skeleton.SKELETONS[name]] == stored["edges"]
    assert [list(c) for c in skeleton.husl_palette(len(stored["edges"]))] == stored["edge_colors"]
    assert [list(c) for c in skeleton.husl_palette(len(skeleton.PARTS))] == list(stored["part_colors"].values())


@pytest.mark.parametrize("tensor", GOLDEN.names("keypoints"))
def test_skeletons(tensor: str) -> None:
    variant, name, *native = tensor.split(".")
    size = max(source(name, "mask").shape) if native else SIZE
    conditioning = Conditioning(size, "keypoints", **style(variant))
    equal(controls.control_canvas(view(name), conditioning).pixels, GOLDEN.tensor("keypoints", tensor))


def test_the_published_drawing_is_the_default() -> None:
    default = Conditioning(SIZE)
    assert {k: getattr(default, k) for k in ("skeleton", "dot", "line")} == style("dense_15_10")


def squeezed(name: str) -> np.ndarray:
    """The published evaluation's keypoints: the sparse skeleton on its square, squeezed to the transposed shape."""
    height, width = source(name, "mask").shape
    square = controls.control_canvas(view(name), Conditioning(SIZE, "keypoints", "sparse")).pixels
    return resize(square, width, height, "lanczos")


@pytest.mark.parametrize("tensor", GOLDEN.names("raw_pairs"))
def test_evaluation_has_the_geometry_of_training(tensor: str) -> None:
    """Decision 3: ours is the canvas of training; the published one is squeezed to another shape first."""
    name = tensor.split(".")[1]
    stored = GOLDEN.tensor("raw_pairs", tensor)
    equal(squeezed(name), stored)
    canvas = controls.control_canvas(view(name), Conditioning(SIZE, "keypoints", "sparse"))
    equal(canvas.pixels, GOLDEN.tensor("keypoints", f"sparse_15_10.{name}"))
    assert canvas.placement == controls.target_canvas(source(name), SIZE).placement
    assert stored.shape[:2] == source(name, "mask").shape[::-1]
    assert not np.array_equal(controls.CONTROLS["keypoints"].draw(view(name), Conditioning(SIZE)), stored)


# --------------------------------------------------------------------------------------------- what training reads


@pytest.mark.parametrize("item", [name for name in ITEMS if ".item" in name and name.startswith(("omini", "insert."))])
def test_items(item: str) -> None:
    subject, target, ratio = (ITEMS[item][k] for k in ("ref", "target", "expand_ratio_drawn"))
    shown = {"fill": "condition_fill", "depth": "condition_pose", "keypoints": "condition_keypoints"}
    for kind, tensor in shown.items():
        found = controls.control_canvas(view(target), Conditioning(SIZE, kind)).pixels
        equal(found, rows_last(GOLDEN.tensor("items", f"{item}.{tensor}")), int(kind == "fill"))
    stored = rows_last(GOLDEN.tensor("items", f"{item}.image"))
    if item.startswith("omini"):
        equal(controls.target_canvas(source(target), SIZE).pixels, stored)
    else:
        placement = Placement.square(*source(target, "mask").shape, SIZE)
        equal(placement.apply(source(target), 255, "bilinear"), stored, 1)
    placement = Placement.crop(*source(subject, "mask").shape, published_box(subject), SIZE)
    placement = placement if ratio is None else placement.padded(ratio)
    stored = rows_last(GOLDEN.tensor("items", f"{item}.condition_subject"))
    equal(placement.apply(source(subject), 255, "lanczos"), stored)


WRAPPERS = sorted({n.rsplit(".", 1)[0] for n in GOLDEN.names("items") if n.startswith("insert_wrapper")})


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_two_halves_of_a_diptych(wrapper: str) -> None:
    item = wrapper.replace("insert_wrapper", "insert")
    subject, target, ratio = (ITEMS[item][k] for k in ("ref", "target", "expand_ratio_drawn"))
    place = Placement.crop(*source(subject, "mask").shape, published_box(subject), SIZE).padded(ratio)
    reference = place.apply(source(subject), 255, "lanczos")
    whole = Placement.square(*source(target, "mask").shape, SIZE)
    # The mask handed in is the published one, a depth map (decision 1).
    depth = controls.control_canvas(view(target), Conditioning(SIZE, "depth")).pixels
    fill = controls.control_canvas(view(target), Conditioning(SIZE)).pixels
    right = {
        "result": whole.apply(source(target), 255, "bilinear"),
        "src": fill,
        "mask": depth,
    }
    equal(reference, rows_last(GOLDEN.tensor("items", f"{wrapper}.ref")))
    for name, pixels in right.items():
        left = np.zeros_like(reference) if name == "mask" else reference
        stored = rows_last(GOLDEN.tensor("items", f"{wrapper}.{name}"))
        equal(np.concatenate([left, pixels], axis=1), stored, int(name != "mask"))


# ---------------------------------------------------------------------------------------------- what sampling reads


@pytest.mark.parametrize("tensor", [n for n in GOLDEN.names("infer_pair") if not n.startswith("final.")])
def test_conditions_of_evaluation_and_callback(tensor: str) -> None:
    stage, pair, item = re.fullmatch(r"(.+)\.([^.]+->[^.]+)\.(\w+)", tensor).groups()
    subject, target = pair.split("->")
    stored = rows_last(GOLDEN.tensor("infer_pair", tensor))
    mask = source(target, "mask") > 0
    whole = Placement.square(*mask.shape, SIZE)
    if item == "mask":
        equal(mask[:, :, None] * 255, stored)
    elif item == "condition_0":
        place = Placement.crop(*source(subject, "mask").shape, published_box(subject), SIZE)
        callback = stage.startswith("callback")
        equal(place.apply(source(subject), 255, "area" if callback else "lanczos"), stored, int(callback))
    elif stage == "callback.fill":
        equal(whole.apply(controls.CONTROLS["fill"].draw(view(target), Conditioning(SIZE)), 255, "area"), stored, 1)
    elif stage == "infer.keypoints":
        raw = squeezed(target)
        equal(Placement.square(*raw.shape[:2], SIZE).apply(raw, 0, "nearest"), stored)
    else:
        kind = stage.removeprefix("infer.")
        equal(controls.control_canvas(view(target), Conditioning(SIZE, kind)).pixels, stored, int(kind == "fill"))


@pytest.mark.parametrize("pair", FINAL)
def test_leaving_the_padding(pair: str) -> None:
    """The published crop in whole pixels is handed in; ours reads every pixel at its own place (decision 20)."""
    generated, unpadded, result = (
        GOLDEN.tensor("infer_pair", f"final.{pair}.{name}") for name in ("generated", "unpadded", "result")
    )
    height, width = source(pair.split("->")[1], "mask").shape
    side, longer = len(generated), max(height, width)
    rows, columns = int(side * height / longer), int(side * width / longer)
    top, left = (side - rows) // 2, (side - columns) // 2
    crop = generated[top : top + rows, left : left + columns]
    equal(crop, unpadded)
    equal(resize(crop, height, width, "area"), result, 1)
    ours = Placement.square(height, width, side)
    assert ours.invert(generated).shape == result.shape
    region = ours.region()
    assert all(abs(a - b) < 1 for a, b in zip(region, (top, left, top + rows, left + columns), strict=True))


@pytest.mark.parametrize(("size", "stored"), GOLDEN.scalar("unpad_on_unpadded_image_shape").items())
def test_no_size_loses_a_row(size: str, stored: list[int]) -> None:
    """Decision 20: the published code cuts a row or column of some sizes off."""
    height, width = (int(n) for n in size.split("x"))
    canvas = np.zeros((max(height, width), max(height, width)), np.uint8)
    assert Placement.square(height, width, len(canvas)).invert(canvas).shape == (height, width)
    assert stored == [height, width] or sum((height, width)) - sum(stored) == 1


# -------------------------------------------------------------------------------------------- the repainted window


def published_window(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The dilated bird's box, without its last row and column, enlarged 1.2 and 2 times and made square."""
    height, width = mask.shape
    grown = masks.dilated(mask, np.random.default_rng(0))
    if grown.sum() < 10:
        return 0, 0, height, width
    top, left, bottom, right = mask_box(grown)
    edges = [(top, bottom - 1, height), (left, right - 1, width)]
    for ratio in (1.2, 2.0):
        halves = [ratio * (stop - start + 1) / 2 for start, stop, _ in edges]
        centres = [(start + stop) / 2 for start, stop, _ in edges]
        edges = [
            (max(0, int(c - h)), min(limit, int(c + h)), limit)
            for c, h, (_, _, limit) in zip(centres, halves, edges, strict=True)
        ]
    half = max(stop - start for start, stop, _ in edges) // 2
    longest = max(range(2), key=lambda axis: (edges[axis][1] - edges[axis][0], axis == 0))
    start, stop, limit = edges[1 - longest]
    middle = (start + stop) // 2
    edges[1 - longest] = (max(0, middle - half), min(limit, middle + half), limit)
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


@pytest.mark.parametrize("pair", sorted(PAIRS))
def test_window_mask_and_paste(pair: str) -> None:
    subject, target = pair.split("->")
    stored = GOLDEN.tensors("insert_predict", f"{pair}.")
    place = Placement.crop(*source(subject, "mask").shape, published_box(subject), SIZE)
    reference = place.apply(source(subject), 255, "lanczos")
    equal(reference, stored["ref"])
    mask = source(target, "mask") > 0
    window = Placement.crop(*mask.shape, published_window(mask), SIZE)
    diptych = np.concatenate([reference, window.apply(source(target), 255, "bilinear")], axis=1)
    equal(diptych, stored["diptych"], 1)
    repainted = window.apply(mask.astype(np.uint8) * np.uint8(255), 0, "bilinear") > 127
    equal(np.concatenate([np.zeros_like(repainted), repainted], axis=1) * 255, stored["mask"])
    # The published way back: the whole square at the window's scale, then the padding cut off.
    generated = stored["generated"][:, -SIZE:]
    square = resize(generated, window.side, window.side, "bilinear")
    top, left, bottom, right = window.box
    result = source(target).copy()
    rows, columns = window.crop_size
    result[top:bottom, left:right] = square[window.padding[0] :, window.padding[1] :][:rows, :columns]
    equal(result, stored["result"], 1)
    # Ours agrees but for the outermost canvas pixels, into which no padding bleeds.
    ours = window.paste(generated, source(target)).astype(int)
    margin = int(np.ceil(1.5 * window.side / SIZE))
    inside = np.s_[top + margin : bottom - margin, left + margin : right - margin]
    if window.side > SIZE:
        assert np.abs(ours[inside] - stored["result"][inside]).max() <= 1
    outside = np.ones(mask.shape, bool)
    outside[top:bottom, left:right] = False
    np.testing.assert_array_equal(ours[outside], source(target)[outside])


@pytest.mark.parametrize("name", [n for n in NAMES if source(n, "mask").sum() >= 10])
def test_our_window_holds_the_bird_and_most_of_the_published_one(name: str) -> None:
    mask = source(name, "mask") > 0
    top, left, bottom, right = Placement.around(mask, SIZE).box
    inner = mask_box(mask)
    assert top <= inner[0] and left <= inner[1] and bottom >= inner[2] and right >= inner[3]
    y0, x0, y1, x1 = published_window(mask)
    # The published window is drawn round a dilated bird: at most 2.4 times six pixels farther on each side.
    bound = 2.4 * masks.DILATION + 4
    assert max(abs(a - b) for a, b in zip((top, left, bottom, right), (y0, x0, y1, x1), strict=True)) <= bound


# ------------------------------------------------------------------------------------------------------- mask policies

BIRDS = [n.split(".")[0] for n in GOLDEN.names("probabilistic_mask") if n.endswith(".disable_prob")]


@pytest.mark.parametrize("name", BIRDS)
def test_dilated(name: str) -> None:
    found = masks.repaint_mask(source(name, "mask") > 0, "dilated", draws.generator(0, 0, draws.REPAINT_MASK))
    equal(found * 255, GOLDEN.tensor("probabilistic_mask", f"{name}.disable_prob"))


@pytest.mark.parametrize("name", BIRDS)
def test_box(name: str) -> None:
    """Decision 1: another random stream; the published ratio is always the smallest of the range, its box short."""
    mask = source(name, "mask") > 0
    stored = mask_box(GOLDEN.tensor("probabilistic_mask", f"{name}.box") > 0)
    assert GOLDEN.tensor("probabilistic_mask", f"{name}.box.draws").shape == (1,)
    smallest = scale_box(mask_box(mask), masks.BOX_RATIOS[0], *mask.shape)
    np.testing.assert_allclose(smallest, stored, rtol=0, atol=2)
    assert smallest[2] - smallest[0] >= stored[2] - stored[0] and smallest[3] - smallest[1] >= stored[3] - stored[1]
    largest = scale_box(mask_box(mask), masks.BOX_RATIOS[1], *mask.shape)
    for number in range(5):
        found = masks.repaint_mask(mask, "box", draws.generator(1, number, draws.REPAINT_MASK))
        edges = mask_box(found)
        assert found.sum() == (edges[2] - edges[0]) * (edges[3] - edges[1])
        assert edges != stored
        for axis in range(2):
            assert largest[axis] <= edges[axis] <= smallest[axis]
            assert largest[axis + 2] >= edges[axis + 2] >= smallest[axis + 2]


@pytest.mark.parametrize("name", BIRDS)
def test_bezier(name: str) -> None:
    """Decision 1: another random stream, the same family: four curves of jittered points round the bird's box."""
    mask = source(name, "mask") > 0
    stored = GOLDEN.tensor("probabilistic_mask", f"{name}.bezier") > 0
    published = GOLDEN.tensor("probabilistic_mask", f"{name}.bezier.draws")
    # One number chooses the kind of mask, then two for each point.
    assert len(published) - 1 == 2 * 4 * masks.POINTS
    top, left, bottom, right = mask_box(mask)
    assert stored[top : bottom - 1, left : right - 1].all()
    found = masks.repaint_mask(mask, "bezier", draws.generator(2, 7, draws.REPAINT_MASK))
    assert found[top:bottom, left:right].all() and found.sum() > (bottom - top) * (right - left)
    reach = scale_box((top, left, bottom, right), 1 + 2 * (masks.BULGE + masks.JITTER), *mask.shape)
    assert not np.delete(np.delete(found, np.s_[reach[0] : reach[2]], 0), np.s_[0:0], 1).any()
    assert not np.delete(found, np.s_[reach[1] : reach[3]], 1).any()
    assert not np.array_equal(found, stored)
