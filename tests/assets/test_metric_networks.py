"""The embedded DINOv2, SigLIP and LPIPS: other libraries read them, they are small, and they judge birds rightly.

The benchmark's world is seed 0; the other one has been seen by nobody, as neither has been by a training.
"""

import functools
import json

import jax
import numpy as np
import pytest
import torch
from transformers import Dinov2Model, SiglipVisionModel
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from benchmarks import metric_networks as bench
from nabla_jax import assets
from nabla_jax.checkpoints.transformers_folder import load_lpips
from nabla_jax.metrics.preprocessing import ImageProcessor, lpips_pixels
from nabla_jax.models import layers
from nabla_jax.models.lpips import DEPTHS, SCALE, SHIFT

FOLDERS = {name: assets.resolve(f"asset:toy-{name}") for name in ("dinov2", "siglip", "lpips")}
PUBLISHED = {"dinov2": (Dinov2Model, BitImageProcessorPil), "siglip": (SiglipVisionModel, SiglipImageProcessorPil)}
BENCHMARK, OTHER = 0, 7461
# The issue asks for this much on the benchmark's world.
AUC = 0.9
LIMIT = 2_000_000


@functools.cache
def world(seed: int) -> bench.World:
    return bench.draw_world(seed, orders=4 if seed == BENCHMARK else 2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_reads_the_folder_and_computes_the_same(name: str) -> None:
    model, preprocess = PUBLISHED[name]
    folder = FOLDERS[name]
    published = model.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    processor = preprocess.from_pretrained(folder, local_files_only=True)
    # Square, wide and tall canvases.
    shots = world(BENCHMARK).first
    shapes = {shot.masked.shape: shot.masked for shot in shots}
    pictures = list(shapes.values())[:12]
    assert len({(p.shape[0] > p.shape[1]) - (p.shape[0] < p.shape[1]) for p in pictures}) == 3
    pixels = ImageProcessor.from_json(folder / "preprocessor_config.json")(pictures)
    expected = [processor(picture, return_tensors="np")["pixel_values"][0] for picture in pictures]
    np.testing.assert_array_equal(pixels, np.stack(expected))
    with torch.no_grad():
        out = published(torch.from_numpy(pixels))
    pooled = out.last_hidden_state[:, 0] if name == "dinov2" else out.pooler_output
    network = bench.LOADERS[name](folder)
    found = jax.jit(lambda params, x: layers.bind(network.graphdef, params)(x).pooled)(network.params, pixels)
    np.testing.assert_allclose(found, pooled.numpy(), rtol=0, atol=1e-4)
    # Vectors of all pictures alike would agree too.
    assert np.std(pooled.numpy(), axis=0).mean() > 0.05


@pytest.mark.parametrize("name", FOLDERS)
def test_the_folders_are_small(name: str) -> None:
    assert sum(p.stat().st_size for p in FOLDERS[name].rglob("*") if p.is_file()) <= LIMIT


@pytest.mark.parametrize("seed", [BENCHMARK, OTHER])
@pytest.mark.parametrize("name", PUBLISHED)
def test_one_individual_is_more_alike_than_sibling_species(name: str, seed: int) -> None:
    found = bench.identity_aucs(world(seed), bench.encoder(name, FOLDERS[name]))
    assert {what: interval.mean for what, interval in found.items() if interval.mean < AUC} == {}
    assert found["sibling species"].low >= AUC


def test_aucs_without_an_identity_are_chance() -> None:
    """Vectors that know nothing of the birds: the measure itself favours nobody."""

    def vectors(pictures: list[np.ndarray]) -> np.ndarray:
        drawn = np.random.default_rng(len(pictures) + int(pictures[0].sum())).standard_normal((len(pictures), 16))
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    found = bench.identity_aucs(world(BENCHMARK), vectors)
    assert all(0.4 < interval.mean < 0.6 for interval in found.values())


def test_lpips_orders_the_strength_of_every_change() -> None:
    found = bench.orderings(world(BENCHMARK), bench.perceptual_distance(FOLDERS["lpips"]))
    assert set(found) == set(bench.KINDS)
    for kind, ordering in found.items():
        assert ordering.n >= 30, kind
        assert all(np.diff(ordering.means) > 0) and ordering.means[0] > 0, (kind, ordering)
        # Beyond a quarter turn hues are so different already that single birds get nearer again.
        assert ordering.steps > (0.75 if kind == "half turn" else 0.95), (kind, ordering)


def test_lpips_equals_the_formula_in_torch() -> None:
    """Zhang et al. 2018, eq. 1, with torch's layers and the folder's tensors."""
    from safetensors.torch import load_file

    folder = FOLDERS["lpips"]
    tensors = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    assert json.loads((folder / "config.json").read_text())["channels"] == [
        tensors[f"lin{level}.model.1.weight"].numel() for level in range(len(DEPTHS))
    ]
    assert all((tensors[f"lin{level}.model.1.weight"] >= 0).all() for level in range(len(DEPTHS)))
    shots = [s for s in world(BENCHMARK).first if s.masked.shape[:2] == (48, 48)][:8]
    a = lpips_pixels([shot.masked for shot in shots])
    b = lpips_pixels([bench.changed(shot, "hue", 0.5, 0) for shot in shots])

    def levels(x: torch.Tensor) -> list[torch.Tensor]:
        x = (x - torch.tensor(SHIFT)[:, None, None]) / torch.tensor(SCALE)[:, None, None]
        number, found = 0, []
        for level, depth in enumerate(DEPTHS):
            if level:
                x, number = torch.nn.functional.max_pool2d(x, 2), number + 1
            for _ in range(depth):
                weight, bias = tensors[f"features.{number}.weight"], tensors[f"features.{number}.bias"]
                x, number = torch.relu(torch.nn.functional.conv2d(x, weight, bias, padding=1)), number + 2
            found.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return found

    expected = sum(
        torch.nn.functional.conv2d((f - g) ** 2, tensors[f"lin{level}.model.1.weight"]).mean((1, 2, 3))
        for level, (f, g) in enumerate(zip(levels(torch.from_numpy(a)), levels(torch.from_numpy(b)), strict=True))
    )
    network = load_lpips(folder)
    found = layers.bind(network.graphdef, network.params)(a, b)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4)
    assert (np.asarray(found) > 0.01).all()
