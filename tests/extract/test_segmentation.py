"""SAM 2 and Grounding DINO, the real classes at a very small size."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from nabla_jax import extract
from nabla_jax.errors import UserError
from nabla_jax.extract import checkpoints, segmentation
from tests.extract.checkpoints import SIDE, grounding_dino, sam2, settings

IMAGE = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
BOX = (5, 6, 40, 60)


@pytest.mark.parametrize("side", [32, 96])
def test_pixels_are_those_of_a_smoothed_bilinear_resize(side: int) -> None:
    """torch's own antialiased resize, to a grey level; then ImageNet's mean and deviation."""
    pixels, _ = segmentation.prepare(IMAGE, BOX, side)
    planes = torch.from_numpy(IMAGE).permute(2, 0, 1)[None].float()
    theirs = torch.nn.functional.interpolate(planes, (side, side), mode="bilinear", antialias=True)[0].numpy()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    grey = (pixels * std[:, None, None] + mean[:, None, None]) * 255
    assert pixels.shape == (3, side, side) and pixels.dtype == np.float32
    np.testing.assert_allclose(grey, theirs, rtol=0, atol=1.01)
    np.testing.assert_allclose(grey, np.rint(grey), atol=1e-3)


def test_boxes_are_those_of_the_published_processor() -> None:
    _, corners = segmentation.prepare(IMAGE, BOX, 1024)
    top, left, bottom, right = BOX
    box = torch.tensor([[[left, top, right, bottom]]], dtype=torch.float32)
    theirs = transformers.Sam2Processor._normalize_coordinates(
        None, 1024, box, (IMAGE.shape[0], IMAGE.shape[1]), is_bounding_box=True
    )
    np.testing.assert_allclose(corners, theirs.numpy().reshape(-1), rtol=1e-6)


@pytest.mark.parametrize("size", [(50, 70), (7, 90), (16, 16)])
def test_masks_are_those_of_torchs_resize(size: tuple[int, int]) -> None:
    logits = np.random.default_rng(1).standard_normal((16, 16)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(torch.from_numpy(logits)[None, None], size, mode="bilinear")[0, 0].numpy()
    ours = segmentation.at_size(logits, *size)
    clear = np.abs(theirs) > 1e-5
    np.testing.assert_array_equal(ours[clear], theirs[clear] > 0)
    assert clear.mean() > 0.99


def test_a_mask_by_box() -> None:
    """The model called by hand on inputs made with torch, at its own resolution."""
    found = segmentation.find(IMAGE, BOX, settings("sam2"))
    model = transformers.Sam2Model.from_pretrained(sam2())
    pixels, _ = segmentation.prepare(IMAGE, BOX, SIDE)
    top, left, bottom, right = BOX
    corners = torch.tensor([left * SIDE / 70, top * SIDE / 50, right * SIDE / 70, bottom * SIDE / 50])
    with torch.inference_mode():
        outputs = model(
            pixel_values=torch.from_numpy(pixels)[None], input_boxes=corners[None, None], multimask_output=False
        )
        logits = torch.nn.functional.interpolate(outputs.pred_masks[0], (50, 70), mode="bilinear")[0, 0].numpy()
    clear = np.abs(logits) > 1e-5
    np.testing.assert_array_equal(found.mask[clear], logits[clear] > 0)
    assert found.quality == pytest.approx(float(outputs.iou_scores.reshape(-1)[0]), rel=1e-4)
    assert found.box == BOX and found.score is None and found.mask.dtype == bool
    np.testing.assert_array_equal(extract.mask(IMAGE, BOX, settings("sam2")), found.mask)


def test_the_hubs_configuration_of_the_video_model_is_taken(tmp_path: Path) -> None:
    """The published folders say sam2_video and hold further weights; the picture model is in them."""
    folder = Path(shutil.copytree(sam2(), tmp_path / "video"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "sam2_video", "architectures": ["Sam2VideoModel"]})
    )
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"memory_encoder.x": np.zeros(3, np.float32)}, folder / "model.safetensors", {"format": "pt"})
    expected, quality = segmentation.segment(IMAGE, BOX, settings("sam2"))
    mask, same = segmentation.segment(IMAGE, BOX, settings(sam2=str(folder)))
    np.testing.assert_array_equal(mask, expected)
    assert same == quality


def test_weights_that_are_missing_are_not_drawn(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sam2(), tmp_path / "cut"))
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if "mask_decoder" in n)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"cut: 1 weights of Sam2Model are missing or misshapen, first mask_decoder"):
        segmentation.segment(IMAGE, BOX, settings(sam2=str(folder)))


def test_the_best_box_for_words() -> None:
    box, score = segmentation.detect(IMAGE, "a bird.", settings("grounding_dino"))
    model = transformers.GroundingDinoForObjectDetection.from_pretrained(grounding_dino())
    tokenizer = transformers.AutoTokenizer.from_pretrained(grounding_dino())
    pictures = transformers.GroundingDinoImageProcessorPil.from_pretrained(grounding_dino())
    inputs = {**pictures(images=IMAGE, return_tensors="pt"), **tokenizer("a bird.", return_tensors="pt")}
    with torch.inference_mode():
        outputs = model(**inputs)
    scores = outputs.logits[0].sigmoid().max(-1).values.numpy()
    best = int(scores.argmax())
    x, y, width, height = outputs.pred_boxes[0, best].numpy() * [70, 50, 70, 50]
    assert score == pytest.approx(float(scores[best]), rel=1e-5)
    expected = (y - height / 2, x - width / 2, y + height / 2, x + width / 2)
    inside = np.clip(expected, 0, [50, 70, 50, 70])
    assert np.abs(np.array(box) - inside).max() <= 1
    assert box[0] <= inside[0] + 1e-3 and box[2] >= min(inside[2], 50) - 1e-3


def test_words_without_a_match_and_malformed_words() -> None:
    with pytest.raises(segmentation.NotFound, match=r"found no 'a bird.' above extract.box_threshold 1.0"):
        segmentation.detect(IMAGE, "a bird.", settings("grounding_dino", box_threshold=1.0))
    for text in ("A bird.", "a bird"):
        with pytest.raises(UserError, match="expected lower case with a full stop"):
            extract.mask(IMAGE, text, settings("grounding_dino"))


def test_words_then_mask() -> None:
    found = segmentation.find(IMAGE, "a bird.", settings("sam2", "grounding_dino"))
    box, score = segmentation.detect(IMAGE, "a bird.", settings("grounding_dino"))
    assert (found.box, found.score) == (box, score)
    np.testing.assert_array_equal(found.mask, segmentation.segment(IMAGE, box, settings("sam2"))[0])


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"extract.sam2: found no nowhere/config.json.*hf download facebook/sam2"):
        extract.mask(IMAGE, BOX, settings())
    with pytest.raises(UserError, match="extract.device: 'abacus' cannot be used"):
        extract.mask(IMAGE, BOX, settings("sam2", device="abacus"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be loaded as Sam2Model"):
        extract.mask(IMAGE, BOX, settings(sam2=str(tmp_path)))
    monkeypatch.setattr(checkpoints.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"torch, which is not installed: pip install 'nabla_jax\[extract\]'"):
        extract.mask(IMAGE, BOX, settings("sam2"))


def test_a_folders_identity_is_its_content(tmp_path: Path) -> None:
    first = checkpoints.identity(sam2())
    folder = Path(shutil.copytree(sam2(), tmp_path / "moved"))
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    note.parent.mkdir(parents=True)
    note.write_text("0123abc\netag\n1.0\n")
    moved = checkpoints.identity(folder)
    assert moved == {"name": "moved", "sha256": first["sha256"], "revision": "0123abc"}
    (folder / "config.json").write_text("{}")
    checkpoints.identity.cache_clear()
    assert checkpoints.identity(folder)["sha256"] != first["sha256"]
