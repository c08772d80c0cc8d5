"""Folders of single networks in their published layout: the ones that judge pictures or turn them into prompts.

- SigLIP and SigLIP 2 at fixed resolution (``google/siglip-*``, ``google/siglip2-*``): ``config.json`` and
  ``model.safetensors`` or shards with an index, of both towers or of the vision tower alone
- DINOv2 (``facebook/dinov2-{small,base,large}``): ``config.json`` and ``model.safetensors``
- FLUX.1-Redux: ``image_encoder/`` (a SigLIP vision tower) and ``image_embedder/`` (two linear layers), each with
  ``config.json`` and weights
- LPIPS: ``config.json`` and ``model.safetensors``; published as two torch files, see ``write_lpips``
- keypoint heads: ``config.json`` and ``model.safetensors``, made by ``python -m nabla_jax.keypoints``

Every tensor of a file must have its place, except those that a model's module lists as unused.
"""

import functools
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from nabla_jax.checkpoints.pipeline import Component, Part, load_model, save_model, write_json
from nabla_jax.checkpoints.safetensors_io import check_tree, flatten, read_header, save_tree, unflatten
from nabla_jax.errors import UserError
from nabla_jax.hashing import file_sha256
from nabla_jax.models import dinov2, keypoint_head, layers, lpips, redux, siglip

StrPath = str | os.PathLike[str]

NETWORKS = {
    "siglip": Part(siglip.SiglipVisionConfig, siglip.SiglipVision, "model.safetensors", siglip.TABLE, siglip.STACKED),
    "dinov2": Part(dinov2.Dinov2Config, dinov2.Dinov2, "model.safetensors", dinov2.TABLE, dinov2.STACKED),
    "lpips": Part(lpips.LpipsConfig, lpips.Lpips, "model.safetensors", lpips.TABLE),
    "keypoints": Part(keypoint_head.KeypointHeadConfig, keypoint_head.KeypointHead, "model.safetensors"),
}
REDUX = {
    "image_encoder": NETWORKS["siglip"],
    "image_embedder": Part(redux.ReduxEmbedderConfig, redux.ReduxEmbedder, "diffusion_pytorch_model.safetensors"),
}


def load_siglip(folder: StrPath, *, dtype: DTypeLike = "float32", sharding: Any = None) -> Component:
    """The vision tower of a SigLIP folder with parameters in ``dtype``; computations follow it.

    ``sharding`` is a ``jax.sharding.Sharding``, a tree of them, or a function from the abstract parameters to such
    a tree. Raises UserError naming what does not fit.
    """
    return load_model(Path(folder), NETWORKS["siglip"], dtype=dtype, sharding=sharding)


def load_dinov2(folder: StrPath, *, dtype: DTypeLike = "float32", sharding: Any = None) -> Component:
    """The backbone of a DINOv2 folder; see ``load_siglip``."""
    return load_model(Path(folder), NETWORKS["dinov2"], dtype=dtype, sharding=sharding)


def load_lpips(folder: StrPath, *, dtype: DTypeLike = "float32", sharding: Any = None) -> Component:
    """The network of an LPIPS folder, which ``write_lpips`` makes; see ``load_siglip``."""
    return load_model(Path(folder), NETWORKS["lpips"], dtype=dtype, sharding=sharding)


def load_keypoint_head(
    folder: StrPath, dinov2: StrPath, *, dtype: DTypeLike = "float32", sharding: Any = None
) -> Component:
    """The head of a folder that ``python -m nabla_jax.keypoints`` wrote; see ``load_siglip``.

    Raises UserError also if ``dinov2`` is not the folder of the very DINOv2 that the head was trained on.
    """
    check_keypoint_head(folder, dinov2)
    return load_model(Path(folder), NETWORKS["keypoints"], dtype=dtype, sharding=sharding)


def check_keypoint_head(folder: StrPath, dinov2: StrPath) -> None:
    """Raises UserError if the head in ``folder`` was trained on another DINOv2 than that of the folder ``dinov2``."""
    expected = _config(Path(folder), NETWORKS["keypoints"]).dinov2_sha256
    found = weights_sha256(dinov2)
    if found != expected:
        raise UserError(
            f"{folder}: keypoint head of another DINOv2: trained on weights with sha256 {expected[:12]}, found "
            f"{found[:12]} at {dinov2}"
        )


def weights_sha256(folder: StrPath) -> str:
    """SHA-256 (hex) of the weights that would be loaded: of the one file, or of the hashes of all shards."""
    hashes = [file_sha256(file) for file in read_header(folder).files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def load_redux(folder: StrPath, *, dtype: DTypeLike = "float32", sharding: Any = None) -> Component:
    """Tower and embedder of a FLUX.1-Redux folder as one model (``models.redux.Redux``); see ``load_siglip``."""
    folder = Path(folder)
    configs = {name: _config(folder / name, part) for name, part in REDUX.items()}
    config = redux.ReduxConfig(**configs)
    config.check(str(folder))
    graphdef, abstract = layers.abstract(lambda rngs: redux.Redux(config, rngs=rngs, dtype=dtype))
    if callable(sharding):
        sharding = sharding(abstract)
    params = {}
    for name, part in REDUX.items():
        whole = sharding is None or isinstance(sharding, jax.sharding.Sharding)
        own = sharding if whole else sharding[name]
        params[name] = load_model(folder / name, part, dtype=dtype, sharding=own).params
    return Component(config, graphdef, params)


def check_network(folder: StrPath, name: str) -> None:
    """Raises UserError, as loading would, if the folder does not hold the network ``name`` of ``NETWORKS``.

    Config and headers are read, no weights: minutes of loading are not spent on a folder of another model.
    """
    part = NETWORKS[name]
    config = _config(Path(folder), part)
    _, abstract = layers.abstract(lambda rngs: part.model(config, rngs=rngs))
    check_tree(folder, abstract, part.table, stacked=part.stacked)


def check_redux(folder: StrPath, width: int) -> None:
    """Raises UserError unless the folder holds a FLUX.1-Redux whose tokens are ``width`` wide; reads no weights."""
    folder = Path(folder)
    for name, part in REDUX.items():
        config = _config(folder / name, part)
        _, abstract = layers.abstract(functools.partial(_build, part, config))
        check_tree(folder / name, abstract, part.table, stacked=part.stacked)
    redux.ReduxConfig(**{name: _config(folder / name, part) for name, part in REDUX.items()}).check(str(folder))
    if config.txt_in_features != width:
        raise UserError(
            f"{folder}/image_embedder/config.json: txt_in_features: found {config.txt_in_features}, expected {width}, "
            "the joint_attention_dim of the base"
        )


def save_network(
    folder: StrPath, name: str, config: Any, params: layers.Params, *, dtype: DTypeLike | None = None
) -> None:
    """Writes a network of ``NETWORKS`` as the folder that ``load_*`` (and transformers, but for LPIPS) reads."""
    save_model(Path(folder), NETWORKS[name], config, params, dtype=dtype)


def save_redux(
    folder: StrPath, config: redux.ReduxConfig, params: layers.Params, *, dtype: DTypeLike | None = None
) -> None:
    """Writes ``image_encoder/`` and ``image_embedder/``; the inverse of ``load_redux``."""
    for name, part in REDUX.items():
        save_model(Path(folder) / name, part, getattr(config, name), params[name], dtype=dtype)


def write_redux_index(folder: StrPath) -> None:
    """Writes a Redux folder's ``model_index.json``: the classes by which diffusers opens its parts."""
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"), [None, None])
    index = {
        "_class_name": "FluxPriorReduxPipeline",
        "_diffusers_version": "0.35.1",
        "feature_extractor": ["transformers", "SiglipImageProcessor"],
        "image_embedder": ["flux", "ReduxImageEncoder"],
        "image_encoder": ["transformers", "SiglipVisionModel"],
        **absent,
    }
    write_json(Path(folder) / "model_index.json", index)


def write_lpips(folder: StrPath, vgg: Mapping[str, Any], lin: Mapping[str, Any]) -> None:
    """Writes an LPIPS folder from the contents of the two published files, once and for all without torch.

    The files are torchvision's VGG16 (``vgg16-397923af.pth``) and the lpips package's ``weights/v0.1/vgg.pth``:

        import torch
        from nabla_jax.checkpoints.transformers_folder import write_lpips
        vgg, lin = (torch.load(f, weights_only=True) for f in ("vgg16-397923af.pth", "vgg.pth"))
        write_lpips("lpips-vgg16", vgg, lin)

    Args:
      folder: where ``config.json`` and ``model.safetensors`` (float32, no classifier) go.
      vgg: ``features.*`` and ``classifier.*`` by name, torch or numpy arrays on the host.
      lin: ``lin0.model.1.weight`` .. ``lin4.model.1.weight``.

    Raises:
      UserError: a tensor is missing, not expected or of another shape; nothing is written.
    """
    tensors = {**vgg, **lin}
    arrays = {name: np.asarray(value, np.float32) for name, value in tensors.items() if not _unused(name)}
    names = [f"lin{level}.model.1.weight" for level in range(len(lpips.DEPTHS))]
    missing = [name for name in names if name not in arrays]
    if missing:
        raise UserError(f"LPIPS weights: missing: {', '.join(missing)}")
    config = lpips.LpipsConfig(tuple(int(arrays[name].size) for name in names))
    _, abstract = layers.abstract(lambda rngs: lpips.Lpips(config, rngs=rngs))
    expected = {name: leaf.shape for name, leaf in flatten(abstract).items()}
    problems = [f"{name} is missing" for name in expected if name not in arrays]
    problems += [f"{name} is not expected" for name in arrays if name not in expected]
    problems += [
        f"{name}: found {arrays[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in arrays and arrays[name].shape != shape
    ]
    if problems:
        raise UserError(f"LPIPS weights: {'; '.join(problems)}")
    folder = Path(folder)
    save_tree(unflatten({name: arrays[name] for name in expected}), folder / NETWORKS["lpips"].file)
    write_json(folder / "config.json", config.to_json())


def _build(part: Part, config: Any, rngs: nnx.Rngs) -> nnx.Module:
    return part.model(config, rngs=rngs)


def _config(path: Path, part: Part) -> Any:
    return part.config.from_json(path / "config.json")


def _unused(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in lpips.UNUSED)
