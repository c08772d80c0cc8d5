"""What several test files need: a pipeline folder with random weights, a small world, and configurations for them."""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from nabla_jax import config as configs
from nabla_jax import prepare, train
from nabla_jax.checkpoints import pipeline
from nabla_jax.models import autoencoder, clip, flux, layers, t5
from nabla_jax.pretrain import text
from nabla_jax.toybirds import write_world

SIZE = 32
WORDS = ("a", "photo", "of", "bird", ".")


def random_params(make: Callable[[nnx.Rngs], nnx.Module], rng: np.random.Generator) -> layers.Params:
    """Parameters drawn on the host, matrices scaled by their fan-in, norms near 1. Compiles nothing."""

    def draw(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.standard_normal(leaf.shape, np.float32)
        if path[-1].key == "bias":
            return np.float32(0.1) * values
        if len(leaf.shape) == 1 or "norm_" in path[-2].key:
            return 1 + np.float32(0.1) * values
        axes = leaf.shape[2:] if path[0].key in flux.STACKED else leaf.shape[1:]
        return values * np.float32(np.prod(axes) ** -0.5)

    return jax.tree_util.tree_map_with_path(draw, layers.abstract(make)[1])


def write_base(folder: Path, seed: int = 0, *, schnell: bool = False) -> Path:
    """A complete pipeline folder, weights drawn from ``seed``.

    FLUX.1-Kontext's structure, or FLUX.1-schnell's, at a very small width.
    """
    rng = np.random.default_rng(seed)
    text.write_tokenizers(folder, WORDS)
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    pieces = json.loads((folder / "tokenizer_2" / "tokenizer.json").read_text())["model"]["vocab"]
    vae = autoencoder.AutoencoderKLConfig(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=SIZE
    )
    transformer = flux.FluxConfig(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=not schnell,
        axes_dims_rope=(4, 6, 6),
    )
    text_encoder = clip.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=text.CLIP_LENGTH,
        bos_token_id=vocabulary[text.BOS],
        eos_token_id=vocabulary[text.EOS],
    )
    text_encoder_2 = t5.T5Config(vocab_size=len(pieces), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    configs_of = {
        "vae": vae,
        "transformer": transformer,
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
    }
    for name, part_config in configs_of.items():
        model = pipeline.PARTS[name].model
        params = random_params(lambda r, m=model, c=part_config: m(c, rngs=r), rng)
        pipeline.save_part(folder, name, part_config, params)
    if schnell:
        pipeline.write_index(folder, "FluxPipeline", pipeline.SCHNELL)
    else:
        pipeline.write_index(folder)
    return folder


def write_small_world(folder: Path, seed: int = 0, images: int = 144) -> Path:
    """A world of small pictures in the layouts of its real counterparts."""
    write_world(out=folder, seed=seed, size=48, images=images, orders=1, workers=1, progress=False)
    return folder


def values(root: Path, **overrides: Any) -> dict[str, Any]:
    """The values of a configuration for ``root/base`` and ``root/world``; dotted overrides with __ for the dot."""
    config = {
        "base": {"path": str(root / "base")},
        "data": {"root": str(root / "world" / "nabirds"), "prepared": str(root / "prepared")},
        "benchmarks": {"nabla": str(root / "world" / "nabirds")},
        "conditioning": {"size": SIZE, "text_length": 8},
        "lora": {"rank": 2, "alpha": 2.0, "name": "fill"},
        "optim": {"d0": 1e-3},
        "train": {
            "workdir": str(root / "run"),
            "steps": 4,
            "batch": 2,
            "log_every": 1,
            "save_every": 2,
            "sample_every": 0,
            "dtype": "float32",
            "remat": "none",
        },
        "sample": {"steps": 2, "batch": 3},
    }
    for key, value in overrides.items():
        section, _, leaf = key.partition("__")
        config[section][leaf] = value
    return config


def config(root: Path, **overrides: Any) -> configs.Config:
    """The configuration of ``values``."""
    return configs.from_dict(values(root, **overrides))


def write_config(root: Path, path: Path, **overrides: Any) -> Path:
    """The same as a file for the command line."""
    path.write_text(f"def get_config(arg=''):\n    return {values(root, **overrides)!r}\n")
    return path


@functools.cache
def prepared_root() -> Path:
    """A folder with ``base``, ``world`` and ``prepared``, made once per process. Tests must not change it."""
    root = Path(tempfile.mkdtemp(prefix="nabla_jax_tests_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    write_base(root / "base")
    write_small_world(root / "world")
    made = config(root)
    prepare.prepare(made, prepare.load_encoders(made))
    return root


@functools.cache
def trained_run() -> Path:
    """The run folder of four uninterrupted training steps on ``prepared_root``. Tests must not change it."""
    root = prepared_root()
    config_file = write_config(root, root / "config.py")
    train.main(["--config", str(config_file)])
    return root / "run"
