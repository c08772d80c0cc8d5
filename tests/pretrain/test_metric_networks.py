"""The command that makes the metric networks, from drawing to folders, at a size of seconds."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from nabla_jax.checkpoints.transformers_folder import load_dinov2, load_lpips, load_siglip
from nabla_jax.errors import UserError
from nabla_jax.metrics.preprocessing import ImageProcessor, lpips_pixels
from nabla_jax.models import layers
from nabla_jax.pretrain.__main__ import main


def write_config(folder: Path, **changes: object) -> str:
    training = {"steps": 2, "families": 2, "learning_rate": 1e-3, "objective": "softmax"}
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    values = {
        "folder": str(folder / "work"),
        "families": {
            "world": "nabla_jax.toybirds", "seed": 3, "families": 102, "species": 2, "views": 2, "size": 16,
        },
        "dinov2": {"output": str(folder / "dinov2"), "model": sizes, "training": training},
        "siglip": {
            "output": str(folder / "siglip"),
            "model": {**sizes, "intermediate_size": 16},
            "training": {**training, "objective": "sigmoid"},
        },
        "lpips": {
            "output": str(folder / "lpips"),
            "model": {"channels": (2, 2, 2, 2, 2)},
            "training": training,
            "judgements": {"count": 10, "steps": 3},
            "vectors": 4,
        },
        **changes,
    }  # fmt: skip
    file = folder / "config.py"
    file.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config(arg=''):\n    return ConfigDict({values!r})\n"
    )
    return str(file)


def test_the_command_makes_what_the_loaders_read_and_keeps_it(tmp_path: Path) -> None:
    file = write_config(tmp_path)
    main(["--config", file, "--workers", "1"])
    picture = np.random.default_rng(0).integers(0, 256, (20, 16, 3), np.uint8)
    for name, load in (("dinov2", load_dinov2), ("siglip", load_siglip)):
        network = load(tmp_path / name)
        pixels = ImageProcessor.from_json(tmp_path / name / "preprocessor_config.json")([picture])
        pooled = jax.jit(lambda x, net=network: layers.bind(net.graphdef, net.params)(x).pooled)(pixels)
        assert pooled.shape == (1, 8)
        # What was written is the average of the training's state, at half the bits.
        saved = load_file(tmp_path / "work" / f"{name}.safetensors")
        assert sum(leaf.size for leaf in jax.tree.leaves(network.params)) * 2 < sum(a.size for a in saved.values())
    network = load_lpips(tmp_path / "lpips")
    distance = jax.jit(lambda a, b: layers.bind(network.graphdef, network.params)(a, b))
    a, b = lpips_pixels([picture]), lpips_pixels([picture[::-1].copy()])
    assert float(distance(a, a)[0]) == pytest.approx(0, abs=1e-9) and float(distance(a, b)[0]) > 0
    for name in ("dinov2", "siglip", "lpips"):
        card = (tmp_path / name / "README.md").read_text()
        assert "2 steps of 2 families (16 pictures" in card and "seed 3 of `nabla_jax.toybirds`" in card
        rows = [json.loads(line) for line in (tmp_path / "work" / f"{name}.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [2] and f"{rows[-1]['auc']:.4f}" in card
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    main(["--config", file, "--workers", "1"])
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == times


def test_mistakes_in_the_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing key dinov2.output"):
        main(["--config", write_config(tmp_path, dinov2={})])
    with pytest.raises(UserError, match="lpips"):
        main(["--config", write_config(tmp_path, lpips=3)])
