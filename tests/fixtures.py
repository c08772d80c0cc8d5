"""What several test files need: a pipeline folder with random weights, a small world, and configurations for them."""

import atexit
import contextlib
import functools
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from nabla_jax import config as configs
from nabla_jax import prepare, train
from nabla_jax.checkpoints import adapters, pipeline
from nabla_jax.checkpoints.transformers_folder import save_redux
from nabla_jax.models import autoencoder, clip, flux, layers, lora, redux, siglip, t5
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


def write_base(folder: Path, seed: int = 0, *, fill: bool = False, schnell: bool = False, blocks: int = 2) -> Path:
    """A complete pipeline folder, FLUX.1-Kontext's structure at a very small width, weights drawn from ``seed``.

    With ``fill`` it is FLUX.1-Fill's (noisy latents, those of the masked picture and the mask are a token's channels),
    with ``schnell`` FLUX.1-schnell's. ``blocks``: of each of the two kinds.
    """
    rng = np.random.default_rng(seed)
    text.write_tokenizers(folder, WORDS)
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    pieces = json.loads((folder / "tokenizer_2" / "tokenizer.json").read_text())["model"]["vocab"]
    vae = autoencoder.AutoencoderKLConfig(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=SIZE
    )
    transformer = flux.FluxConfig(
        num_layers=blocks,
        num_single_layers=blocks,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=not schnell,
        axes_dims_rope=(4, 6, 6),
        in_channels=384 if fill else 64,
        out_channels=64 if fill else None,
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
        pipeline.write_index(folder, "FluxFillPipeline" if fill else "FluxKontextPipeline")
    return folder


def write_redux(folder: Path, seed: int = 0, width: int = 16) -> Path:
    """A FLUX.1-Redux folder for ``write_base``: a small SigLIP of 16 patches and the embedder."""
    rng = np.random.default_rng(seed)
    tower = siglip.SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    model = redux.ReduxConfig(tower, redux.ReduxEmbedderConfig(redux_dim=16, txt_in_features=width))
    save_redux(folder, model, random_params(lambda rngs: redux.Redux(model, rngs=rngs), rng))
    return folder


def fake_devices(count: int) -> str:
    """XLA_FLAGS of a command that sees so many devices, beside the suite's own."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"


def free_address() -> str:
    """``localhost:port`` with a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def write_adapter(path: Path, base: Path, metadata: adapters.AdapterMetadata, seed: int = 0) -> Path:
    """An adapter on every linear of a pipeline folder's transformer, with random weights and this metadata."""
    model = pipeline.transformer_config(base)
    _, shapes = layers.abstract(lambda rngs: flux.Flux(model, rngs=rngs))
    make = functools.partial(lora.initialize, params=shapes, rank=metadata.rank, alpha=metadata.alpha)
    fresh = jax.eval_shape(functools.partial(make, stacked=flux.STACKED), jax.random.key(0))
    rng = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32) / metadata.rank, fresh)
    path.parent.mkdir(parents=True, exist_ok=True)
    adapters.save_adapter(path, drawn, metadata, stacked=flux.STACKED)
    return path


def write_small_world(folder: Path, seed: int = 0, images: int = 144) -> Path:
    """A world of small pictures in the layouts of its real counterparts."""
    write_world(out=folder, seed=seed, size=48, images=images, orders=1, workers=1, progress=False)
    return folder


def picture(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A random picture and the mask of a box in it."""
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height // 2, width // 3 : width // 2 + 1] = True
    return _noise(height, width, seed), mask


def oval_picture(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A random picture and the mask of an ellipse in it."""
    y, x = np.mgrid[:height, :width]
    return _noise(height, width, seed), ((y / height - 0.5) / 0.2) ** 2 + ((x / width - 0.4) / 0.15) ** 2 < 1


def _noise(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


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
        config.setdefault(section, {})[leaf] = value
    return config


def config(root: Path, **overrides: Any) -> configs.Config:
    """The configuration of ``values``."""
    return configs.from_dict(values(root, **overrides))


def write_config(root: Path, path: Path, **overrides: Any) -> Path:
    """The same as a file for the command line."""
    return write_values(values(root, **overrides), path)


def write_values(content: dict[str, Any], path: Path) -> Path:
    """A configuration file with this content."""
    path.write_text(f"def get_config(arg=''):\n    return {content!r}\n")
    return path


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the functions that are compiled meanwhile, in their order; what the disk remembers counts, too."""
    names: list[str] = []

    def listen(event: str, seconds: float, **labels: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(labels["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


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


def insert_values(root: Path, **overrides: Any) -> dict[str, Any]:
    """``values`` for method insert, whose base is ``root/fill`` and whose Redux ``root/redux``."""
    settings = {
        "base__path": str(root / "fill"), "base__redux": str(root / "redux"),
        "data__mode": "on_the_fly", "data__prepared": "", "data__threads": 1,
        "conditioning__method": "insert", "conditioning__prompt": "",
        "sample__feather": 2, "train__workdir": str(root / "insert"),
    }  # fmt: skip
    return values(root, **settings | overrides)


@functools.cache
def insert_root() -> Path:
    """``prepared_root`` with ``fill``, ``redux`` and the run folder ``insert`` of four uninterrupted steps."""
    root = prepared_root()
    write_base(root / "fill", fill=True, blocks=1)
    write_redux(root / "redux")
    train.main(["--config", str(write_values(insert_values(root), root / "insert.py"))])
    return root


@functools.cache
def trained_run() -> Path:
    """The run folder of four uninterrupted training steps on ``prepared_root``. Tests must not change it."""
    root = prepared_root()
    config_file = write_config(root, root / "config.py")
    train.main(["--config", str(config_file)])
    return root / "run"
