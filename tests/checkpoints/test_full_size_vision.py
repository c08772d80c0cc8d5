"""Names, shapes and dtypes of the published vision checkpoints, one to one with our trees at their full size.

The published side comes from the libraries' own classes on the meta device with the published configurations; the
files are written with real headers and no data, and go through the production check.
"""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

from nabla_jax.checkpoints.safetensors_io import DTYPES, check_tree, flatten, read_header
from nabla_jax.checkpoints.transformers_folder import NETWORKS, REDUX, check_network
from nabla_jax.errors import UserError
from nabla_jax.models import layers, lpips, siglip
from nabla_jax.models.dinov2 import Dinov2Config
from nabla_jax.models.lpips import LpipsConfig
from nabla_jax.models.redux import ReduxEmbedderConfig
from nabla_jax.models.siglip import SiglipVisionConfig
from tests.checkpoints.sparse_file import write_sparse
from tests.models.vision_reference import Vgg16, lpips_package

SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}


def published_siglip(vision, text):
    """Config and tensors of a folder with both towers; what equals the library's defaults is not in the file."""
    config = {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": {"model_type": "siglip_text_model", **text},
        "vision_config": {"model_type": "siglip_vision_model", **vision},
    }
    with torch.device("meta"):
        model = transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text))
    return config, model.state_dict()


def assert_one_to_one(part, config, tensors, unused=(), dtype="float32"):
    """Every tensor that is not listed as unused is one leaf or one row of a stacked leaf, and the reverse."""
    _, abstract = layers.abstract(lambda rngs: part.model(config, rngs=rngs, dtype=dtype))
    ours = {}
    for name, leaf in flatten(abstract).items():
        prefix = next((p for p in part.stacked if name.startswith(f"{p}.")), None)
        if prefix is None:
            ours[name] = (leaf.shape, leaf.dtype)
            continue
        for i in range(leaf.shape[0]):
            ours[f"{prefix}.{i}.{name.removeprefix(f'{prefix}.')}"] = (leaf.shape[1:], leaf.dtype)
    used = {k: v for k, v in tensors.items() if not any(re.fullmatch(pattern, k) for pattern in unused)}
    expected = {k: (tuple(v.shape), jnp.dtype(str(v.dtype).removeprefix("torch."))) for k, v in used.items()}
    assert ours == expected
    return sum(int(np.prod(shape)) for shape, _ in ours.values())


def check_file(folder, name, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_sparse(folder / "model.safetensors", tensors)
    check_network(folder, name)


@pytest.mark.parametrize(
    ("name", "vision", "text", "ours", "parameters"),
    [
        ("siglip-base-patch16-224", {}, {}, SiglipVisionConfig.base(), 92_884_224),
        ("siglip-base-patch16-256", {"image_size": 256}, {}, SiglipVisionConfig.base(256), 92_930_304),
        ("siglip-base-patch16-384", {"image_size": 384}, {}, SiglipVisionConfig.base(384), 93_176_064),
        (
            "siglip-so400m-patch14-384",
            SO400M | {"image_size": 384, "patch_size": 14},
            SO400M,
            SiglipVisionConfig.so400m(),
            428_225_600,
        ),
        ("siglip2-base-patch16-224", {}, {"vocab_size": 256_000}, SiglipVisionConfig.base(), 92_884_224),
        (
            "siglip2-base-patch16-256",
            {"image_size": 256},
            {"vocab_size": 256_000},
            SiglipVisionConfig.base(256),
            92_930_304,
        ),
    ],
)
def test_siglip(tmp_path, name, vision, text, ours, parameters):
    config, tensors = published_siglip(vision, text)
    assert SiglipVisionConfig.from_json(config) == ours
    assert assert_one_to_one(NETWORKS["siglip"], ours, tensors, siglip.UNUSED) == parameters
    check_file(tmp_path / name, "siglip", config, tensors)
    # What goes unused is the text tower and the loss' two scalars, all of them.
    unused = {k for k in tensors if any(re.fullmatch(pattern, k) for pattern in siglip.UNUSED)}
    assert unused == {k for k in tensors if k.startswith("text_model.")} | {"logit_scale", "logit_bias"}
    with pytest.raises(UserError, match="1 missing: vision_model.encoder.layers.11.mlp.fc2.bias"):
        check_file(
            tmp_path / name,
            "siglip",
            config,
            {k: v for k, v in tensors.items() if k != "vision_model.encoder.layers.11.mlp.fc2.bias"},
        )


DINOV2 = {
    "small": ({"hidden_size": 384, "num_attention_heads": 6}, 22_056_576),
    "base": ({}, 86_580_480),
    "large": ({"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}, 304_368_640),
}
# transformers 5 names the attention's layers otherwise in memory than in files.
IN_FILES = {
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
}


def in_files(name):
    for found, published in IN_FILES.items():
        name = name.replace(found, published)
    return name


@pytest.mark.parametrize("size", DINOV2)
def test_dinov2(tmp_path, size):
    changes, parameters = DINOV2[size]
    config = transformers.Dinov2Config(image_size=518, patch_size=14, **changes)
    with torch.device("meta"):
        tensors = {in_files(k): v for k, v in transformers.Dinov2Model(config).state_dict().items()}
    ours = getattr(Dinov2Config, size)()
    assert Dinov2Config.from_json(config.to_dict()) == ours
    assert assert_one_to_one(NETWORKS["dinov2"], ours, tensors) == parameters
    check_file(tmp_path / "dinov2", "dinov2", config.to_dict(), tensors)


def test_dinov2s_names_are_those_that_transformers_saves(tmp_path):
    config = transformers.Dinov2Config(
        hidden_size=2, num_attention_heads=1, num_hidden_layers=12, image_size=4, patch_size=2, mlp_ratio=1
    )
    model = transformers.Dinov2Model(config)
    model.save_pretrained(tmp_path)
    assert read_header(tmp_path).tensors.keys() == {in_files(name) for name in model.state_dict()}


def test_redux(tmp_path):
    tower_config = transformers.SiglipVisionConfig(image_size=384, patch_size=14, **SO400M)
    with torch.device("meta"):
        # Published in bfloat16, with the prefix that newer versions leave out.
        state = transformers.SiglipVisionModel(tower_config).state_dict()
        tower = {f"vision_model.{name}": value.bfloat16() for name, value in state.items()}
        embedder = {k: v.bfloat16() for k, v in ReduxImageEncoder().state_dict().items()}
    ours = SiglipVisionConfig.from_json(tower_config.to_dict())
    assert ours == SiglipVisionConfig.so400m()
    assert assert_one_to_one(REDUX["image_encoder"], ours, tower, dtype="bfloat16") == 428_225_600
    config = ReduxEmbedderConfig()
    assert assert_one_to_one(REDUX["image_embedder"], config, embedder, dtype="bfloat16") == 64_503_808
    check_file(tmp_path / "image_encoder", "siglip", tower_config.to_dict(), tower)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    write_sparse(file, embedder)
    _, abstract = layers.abstract(lambda rngs: REDUX["image_embedder"].model(config, rngs=rngs))
    assert {DTYPES[entry.dtype] for entry in check_tree(file, abstract).tensors.values()} == {jnp.dtype("bfloat16")}


def test_lpips(tmp_path):
    package = lpips_package()
    with torch.device("meta"):
        vgg = Vgg16().state_dict()
        heads = package.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).state_dict()
    assert sum(value.numel() for value in vgg.values()) == 138_357_544
    # The package keeps each head twice, under its own name and in a list.
    tensors = vgg | {k: v for k, v in heads.items() if re.fullmatch(r"lin\d\.model\..+", k)}
    ours = LpipsConfig()
    assert assert_one_to_one(NETWORKS["lpips"], ours, tensors, lpips.UNUSED) == 14_714_688 + 1_472
    assert {k for k in tensors if any(re.fullmatch(p, k) for p in lpips.UNUSED)} == {
        k for k in vgg if k.startswith("classifier.")
    }
    check_file(tmp_path / "lpips", "lpips", ours.to_json(), tensors)
