"""The transformer against diffusers' FluxTransformer2DModel: tiny random weights through the loader."""

import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel

from nabla_jax.checkpoints import pipeline
from nabla_jax.checkpoints.safetensors_io import flatten
from nabla_jax.conditioning import omini
from nabla_jax.errors import UserError
from nabla_jax.models import flux, layers
from nabla_jax.models.flux import Branch, Flux, FluxConfig

TINY = {
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "joint_attention_dim": 10,
    "pooled_projection_dim": 7,
    "axes_dims_rope": (2, 2, 4),
    "in_channels": 12,
}
# Rounding of the time embedding's argument in float32, by guidance scale.
ATOL = {None: 2e-5, 1.0: 2e-5, 3.5: 3e-4}


def reference(seed: int = 0, **config) -> FluxTransformer2DModel:
    """A diffusers transformer whose every parameter is random."""
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(**(TINY | config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(batch: int, grid: tuple[int, int], text: int = 5, channels: int = 12, seed: int = 0):
    rng = np.random.default_rng(seed)
    return {
        "hidden_states": rng.normal(size=(batch, grid[0] * grid[1], channels)).astype(np.float32),
        "encoder_hidden_states": rng.normal(size=(batch, text, TINY["joint_attention_dim"])).astype(np.float32),
        "pooled_projections": rng.normal(size=(batch, TINY["pooled_projection_dim"])).astype(np.float32),
        "timestep": rng.uniform(0.05, 1, batch).astype(np.float32),
        "img_ids": omini.grid_ids(*grid),
        "txt_ids": np.zeros((text, 3), np.float32),
    }


def run_reference(model: FluxTransformer2DModel, data, guidance: float | None) -> np.ndarray:
    tensors = {name: torch.from_numpy(value) for name, value in data.items()}
    scale = None if guidance is None else torch.full((len(data["timestep"]),), guidance)
    with torch.no_grad():
        return model(**tensors, guidance=scale).sample.numpy()


def branches(data, guidance: float | None) -> list[Branch]:
    return omini.branches(
        data["encoder_hidden_states"],
        data["pooled_projections"],
        data["hidden_states"],
        data["img_ids"],
        data["timestep"],
        guidance=guidance,
    )


def load(model: FluxTransformer2DModel, folder: Path, **options) -> pipeline.Component:
    model.save_pretrained(folder / "transformer", **options)
    return pipeline.load_transformer(folder)


def run(component: pipeline.Component, streams: list[Branch], **options) -> np.ndarray:
    forward = jax.jit(lambda params: layers.bind(component.graphdef, params)(streams, **options))
    return np.asarray(forward(component.params))


@pytest.mark.parametrize(
    ("guidance", "batch", "grid", "scan"),
    [
        (None, 1, (4, 4), True),
        (None, 2, (3, 5), False),
        (1.0, 2, (4, 4), True),
        (1.0, 1, (5, 2), False),
        (3.5, 2, (2, 6), True),
    ],
)
def test_equals_diffusers(guidance, batch: int, grid: tuple[int, int], scan: bool, tmp_path: Path) -> None:
    model = reference(guidance_embeds=guidance is not None)
    data = inputs(batch, grid)
    found = run(load(model, tmp_path), branches(data, guidance), scan=scan)
    np.testing.assert_allclose(found, run_reference(model, data, guidance), rtol=0, atol=ATOL[guidance])


def test_equals_diffusers_with_other_output_channels(tmp_path: Path) -> None:
    """FLUX.1-Fill: more channels in than out; its weights in several files."""
    model = reference(guidance_embeds=True, in_channels=20, out_channels=6)
    data = inputs(2, (3, 3), channels=20)
    component = load(model, tmp_path, max_shard_size="100KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    found = run(component, branches(data, 1.0))
    assert found.shape == (2, 9, 6)
    np.testing.assert_allclose(found, run_reference(model, data, 1.0), rtol=0, atol=ATOL[1.0])


def test_reference_pictures_in_the_noisy_stream(tmp_path: Path) -> None:
    """FLUX.1-Kontext's own use: tokens of index 1 beside the noise, at the same time."""
    model = reference(guidance_embeds=True)
    data, picture = inputs(1, (3, 4)), inputs(1, (2, 5), seed=1)
    ids = omini.grid_ids(2, 5, index=1)
    both = {
        **data,
        "hidden_states": np.concatenate([data["hidden_states"], picture["hidden_states"]], 1),
        "img_ids": np.concatenate([data["img_ids"], ids]),
    }
    streams = omini.native(
        data["encoder_hidden_states"],
        data["pooled_projections"],
        data["hidden_states"],
        data["img_ids"],
        data["timestep"],
        guidance=1.0,
        references=[(picture["hidden_states"], ids)],
    )
    found = run(load(model, tmp_path), streams)
    np.testing.assert_allclose(found, run_reference(model, both, 1.0), rtol=0, atol=ATOL[1.0])


def test_splitting_the_noisy_stream_changes_nothing(tmp_path: Path) -> None:
    """A condition at the noise's own time and guidance that sees everything is the native formulation."""
    model = reference(guidance_embeds=True)
    data = inputs(2, (4, 3))
    component = load(model, tmp_path)
    text, noise = branches(data, 1.0)
    parts = [slice(0, 7), slice(7, 12)]
    split = [Branch(noise.tokens[:, p], noise.ids[p], noise.time, noise.guidance, noise.pooled) for p in parts]
    whole = run(component, [text, noise])
    found = [run(component, [text, *split], output=i) for i in (1, 2)]
    np.testing.assert_allclose(np.concatenate(found, 1), whole, rtol=0, atol=1e-5)
    # The same numbers in another array object: not merged with the text's modulation, equal all the same.
    apart = Branch(noise.tokens, noise.ids, noise.time + 0, noise.guidance + 0, noise.pooled + 0)
    np.testing.assert_allclose(run(component, [text, apart]), whole, rtol=0, atol=1e-5)


def test_a_branch_that_is_not_seen_has_no_influence(tmp_path: Path) -> None:
    component = load(reference(guidance_embeds=True), tmp_path)
    data, other = inputs(1, (3, 3)), inputs(1, (2, 2), seed=1)
    text, noise = branches(data, 1.0)
    extra = Branch(other["hidden_states"], other["img_ids"], noise.time, noise.guidance, noise.pooled)
    blind = [Branch(**{**vars(b), "sees": (0, 1)}) for b in (text, noise)]
    alone = run(component, [text, noise])
    np.testing.assert_allclose(run(component, [*blind, extra]), alone, rtol=0, atol=1e-5)
    assert np.abs(run(component, [text, noise, extra]) - alone).max() > 1e-3


def test_rematerialisation_saves_memory_in_shallow_models() -> None:
    """Of 4 + 4 blocks the backward pass needs far more than the blocks' inputs, which is all that ``full`` keeps."""
    config = FluxConfig.from_json({**TINY, "num_layers": 4, "num_single_layers": 4})
    graphdef, shapes = layers.abstract(lambda rngs: Flux(config, rngs=rngs))
    data = inputs(1, (16, 16))

    def temporaries(remat: flux.Remat) -> int:
        def loss(params, tokens):
            streams = branches({**data, "hidden_states": tokens}, None)
            return (layers.bind(graphdef, params)(streams, remat=remat) ** 2).sum()

        compiled = jax.jit(jax.grad(loss, argnums=1)).lower(shapes, data["hidden_states"]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries("full") < 0.5 * temporaries("none")


def test_sampling_holds_no_second_copy_of_large_weights() -> None:
    config = FluxConfig.from_json({**TINY, "num_layers": 2, "num_single_layers": 6, "num_attention_heads": 64})
    graphdef, shapes = layers.abstract(lambda rngs: Flux(config, rngs=rngs))
    data = inputs(1, (4, 4))

    def sample(params, tokens):
        def step(_, tokens):
            return layers.bind(graphdef, params)(branches({**data, "hidden_states": tokens}, None))

        return jax.lax.fori_loop(0, 2, step, tokens)

    compiled = jax.jit(sample).lower(shapes, data["hidden_states"]).compile()
    # One block at a time lies beside the stacks.
    assert compiled.memory_analysis().temp_size_in_bytes < 0.75 * layers.tree_bytes(shapes["transformer_blocks"])


@pytest.mark.parametrize("remat", ["none", "full", "save_attention"])
def test_gradients_do_not_depend_on_rematerialisation(remat: flux.Remat, tmp_path: Path) -> None:
    model = reference(guidance_embeds=False)
    data = inputs(1, (2, 3))
    component = load(model, tmp_path)

    def loss(tokens):
        streams = branches({**data, "hidden_states": tokens}, None)
        return (layers.bind(component.graphdef, component.params)(streams, remat=remat) ** 2).sum()

    found = jax.jit(jax.grad(loss))(data["hidden_states"])
    tensors = {name: torch.from_numpy(value) for name, value in data.items()}
    tensors["hidden_states"].requires_grad_()
    (model(**tensors).sample ** 2).sum().backward()
    expected = tensors["hidden_states"].grad.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["schnell", "dev", "kontext", "fill"])
def test_published_sizes_have_the_published_tensors(name: str) -> None:
    """Every name and shape of the full-size model, nothing allocated."""
    config = getattr(FluxConfig, name)()
    assert FluxConfig.from_json(config.to_json()) == config
    _, abstract = layers.abstract(lambda rngs: Flux(config, rngs=rngs))
    found = {}
    for path, leaf in flatten(abstract).items():
        head, _, rest = path.partition(".")
        if head in flux.STACKED:
            found |= {f"{head}.{i}.{rest}": leaf.shape[1:] for i in range(leaf.shape[0])}
        else:
            found[path] = leaf.shape
    with torch.device("meta"):
        published = FluxTransformer2DModel.from_config(config.to_json())
    assert found == {key: tuple(value.shape) for key, value in published.state_dict().items()}


def test_guidance_must_fit_the_model(tmp_path: Path) -> None:
    data = inputs(1, (2, 2))
    for embeds, guidance in itertools.product((True, False), (None, 1.0)):
        component = load(reference(guidance_embeds=embeds), tmp_path / f"{embeds}-{guidance}")
        if embeds == (guidance is not None):
            continue
        with pytest.raises(ValueError, match="guidance"):
            run(component, branches(data, guidance))


def test_configurations_that_cannot_work() -> None:
    with pytest.raises(UserError, match="axes_dims_rope"):
        FluxConfig(axes_dims_rope=(16, 56, 55))
    with pytest.raises(UserError, match="patch_size"):
        FluxConfig.from_json({"patch_size": 2})
    with pytest.raises(UserError, match="num_layer"):
        FluxConfig.from_json({"num_layer": 2})
