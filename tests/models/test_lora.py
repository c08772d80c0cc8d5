"""Adapters against peft and diffusers: which linears, what they compute, and the files both ways."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from nabla_jax.checkpoints import adapter_formats as formats
from nabla_jax.checkpoints import pipeline
from nabla_jax.checkpoints.adapters import AdapterMetadata, load_adapter, save_adapter
from nabla_jax.errors import UserError
from nabla_jax.hashing import file_sha256
from nabla_jax.models import flux, layers, lora
from nabla_jax.models.flux import Flux, FluxConfig
from nabla_jax.models.lora import Adapter
from tests.golden import golden
from tests.models import test_flux

RANK = 4
# The pattern with which the published adapters were trained.
PUBLISHED = golden.case("omini_kontext").config["lora"]["target_modules"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> tuple[FluxTransformer2DModel, pipeline.Component]:
    model = test_flux.reference(guidance_embeds=True)
    return model, test_flux.load(model, tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapted(base, tmp_path: Path):
    """(diffusers' model with a random adapter of peft, the adapter's file); removed again afterwards."""
    model, _ = base
    config = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=PUBLISHED)
    model.add_adapter(config, adapter_name="default")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(model))
    yield model, tmp_path / "pytorch_lora_weights.safetensors"
    model.delete_adapters("default")


def run(component: pipeline.Component, data, adapter: Adapter | None) -> np.ndarray:
    """The velocity with the adapter on the whole sequence, as peft applies it."""
    name = None if adapter is None else "default"
    streams = [dataclasses.replace(branch, adapter=name) for branch in test_flux.branches(data, 1.0)]
    return test_flux.run(component, streams, adapters={} if adapter is None else {"default": adapter})


def selected(component_params: layers.Params, pattern: str) -> set[str]:
    found = lora.targets(component_params, pattern, flux.STACKED)
    return {n for path, shape in found.items() for n in lora.module_names(path, shape, flux.STACKED)}


@pytest.mark.parametrize("pattern", [lora.FLUX_TARGETS, PUBLISHED], ids=["ours", "published"])
def test_the_full_model_has_the_published_343_linears(pattern: str) -> None:
    config = FluxConfig.kontext()
    _, abstract = layers.abstract(lambda rngs: Flux(config, rngs=rngs))
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config.to_json())
    linears = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    expected = {name for name in linears if re.fullmatch(PUBLISHED, name)}
    assert len(expected) == 343
    assert selected(abstract, pattern) == expected


def test_the_same_linears_as_peft(adapted, base) -> None:
    model, path = adapted
    _, component = base
    injected = {name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")}
    assert selected(component.params, lora.FLUX_TARGETS) == injected
    stored = {name.removeprefix("transformer.").rsplit(".lora_", 1)[0] for name in load_file(path)}
    assert stored == injected


def test_the_same_output_as_peft(adapted, base) -> None:
    model, path = adapted
    _, component = base
    data = test_flux.inputs(2, (3, 4))
    adapter, metadata = load_adapter(path, component.params, stacked=flux.STACKED)
    assert (metadata.rank, metadata.alpha, adapter.scale) == (RANK, RANK, 1.0)
    expected = test_flux.run_reference(model, data, 1.0)
    np.testing.assert_allclose(run(component, data, adapter), expected, rtol=0, atol=test_flux.ATOL[1.0])
    model.disable_adapters()
    plain = test_flux.run_reference(model, data, 1.0)
    model.enable_adapters()
    np.testing.assert_allclose(run(component, data, None), plain, rtol=0, atol=test_flux.ATOL[1.0])
    assert np.abs(expected - plain).max() > 0.01


def test_alpha_over_rank_scales_as_in_peft(adapted, base) -> None:
    model, path = adapted
    _, component = base
    data = test_flux.inputs(1, (2, 3))
    adapter, _ = load_adapter(path, component.params, stacked=flux.STACKED)
    save_adapter(path, adapter, AdapterMetadata(rank=RANK, alpha=2 * RANK), stacked=flux.STACKED)
    scaled, metadata = load_adapter(path, component.params, stacked=flux.STACKED)
    assert metadata.alpha == 2 * RANK
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 2.0)
    expected = test_flux.run_reference(model, data, 1.0)
    np.testing.assert_allclose(run(component, data, scaled), expected, rtol=0, atol=test_flux.ATOL[1.0])


def test_files_both_ways(adapted, base, tmp_path: Path) -> None:
    """Ours read by diffusers; diffusers' read and written again without a change."""
    model, path = adapted
    _, component = base
    adapter, _ = load_adapter(path, component.params, stacked=flux.STACKED)
    metadata = AdapterMetadata(rank=RANK, alpha=RANK, base="tiny", control="fill", size=96, step=7)
    ours = tmp_path / "again" / "ours.safetensors"
    save_adapter(ours, adapter, metadata, stacked=flux.STACKED)
    theirs, again = load_file(path), load_file(ours)
    assert theirs.keys() == again.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(again[name], value)
    with safe_open(ours, framework="numpy") as file:
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()["nabla_jax"])["step"] == 7
    reread, described = load_adapter(ours, component.params, stacked=flux.STACKED)
    assert described == dataclasses.replace(metadata, targets=described.targets)
    assert described.targets == tuple(sorted({formats.pattern_of(n) for n in selected(component.params, PUBLISHED)}))
    jax.tree.map(np.testing.assert_array_equal, reread, adapter)

    data = test_flux.inputs(1, (2, 2))
    fresh = FluxTransformer2DModel.from_config(model.config).eval()
    fresh.load_state_dict({k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "lora_" not in k})
    fresh.load_lora_adapter(load_tensors(ours), prefix="transformer", adapter_name="ours")
    expected = test_flux.run_reference(fresh, data, 1.0)
    np.testing.assert_allclose(run(component, data, adapter), expected, rtol=0, atol=test_flux.ATOL[1.0])


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in load_file(path).items()}


def test_a_fresh_adapter_changes_nothing_and_is_drawn_like_peft_draws(base) -> None:
    _, component = base
    adapter = lora.initialize(jax.random.key(0), component.params, rank=RANK, alpha=2.0, stacked=flux.STACKED)
    assert adapter.scale == 2.0 / RANK
    leaves = jax.tree_util.tree_flatten_with_path(adapter.params)[0]
    first = [np.asarray(leaf).ravel() for path, leaf in leaves if path[-1].key == "lora_A"]
    second = [leaf for path, leaf in leaves if path[-1].key == "lora_B"]
    assert all(leaf.dtype == jnp.float32 for _, leaf in leaves)
    assert all(not leaf.any() for leaf in second)
    # Normal with standard deviation 1 / r; the sample's own spread is 1 / sqrt(2 n) of it.
    drawn = np.concatenate(first)
    assert abs(drawn.std() * RANK - 1) < 5 / np.sqrt(2 * drawn.size)
    assert abs(drawn.mean()) < 5 / RANK / np.sqrt(drawn.size)
    assert len({round(float(leaf[0]), 12) for leaf in first}) == len(first)
    data = test_flux.inputs(1, (2, 2))
    # Two programs, fused differently: equal up to rounding.
    np.testing.assert_allclose(run(component, data, adapter), run(component, data, None), rtol=0, atol=2e-6)


def test_an_adapter_on_one_branch_leaves_the_linears_of_others_alone(adapted, base) -> None:
    """An adapted stream that nobody sees changes nothing elsewhere, to the last bit."""
    _, path = adapted
    _, component = base
    adapter, _ = load_adapter(path, component.params, stacked=flux.STACKED)
    data, other = test_flux.inputs(1, (3, 3)), test_flux.inputs(1, (2, 2), seed=1)
    text, noise = (dataclasses.replace(b, sees=(0, 1)) for b in test_flux.branches(data, 1.0))
    condition = dataclasses.replace(test_flux.branches(other, 1.0)[1], sees=(0, 1, 2))
    found = {
        name: test_flux.run(
            component,
            [text, noise, dataclasses.replace(condition, adapter=name)],
            adapters={"default": adapter},
        )
        for name in (None, "default")
    }
    np.testing.assert_array_equal(found[None], found["default"])


def test_gradients_belong_to_the_adapters_in_use(adapted, base) -> None:
    _, path = adapted
    _, component = base
    adapter, _ = load_adapter(path, component.params, stacked=flux.STACKED)
    data = test_flux.inputs(1, (2, 2))
    streams = [dataclasses.replace(b, adapter="used") for b in test_flux.branches(data, 1.0)]

    def loss(adapters):
        return (layers.bind(component.graphdef, component.params)(streams, adapters=adapters) ** 2).mean()

    gradients = jax.jit(jax.grad(loss))({"used": adapter, "idle": adapter})
    assert jax.tree.structure(gradients["used"]) == jax.tree.structure(adapter)
    assert all(bool(leaf.any()) for leaf in jax.tree.leaves(gradients["used"]))
    assert not any(bool(leaf.any()) for leaf in jax.tree.leaves(gradients["idle"]))


def test_patterns_that_match_nothing_or_half_a_stack(base) -> None:
    _, component = base
    with pytest.raises(UserError, match="matches no linear"):
        lora.targets(component.params, r"transformer_blocks\.\d+\.attn\.to_z", flux.STACKED)
    with pytest.raises(UserError, match="some blocks only"):
        lora.targets(component.params, r"transformer_blocks\.0\.attn\.to_q", flux.STACKED)


def test_adapter_files_that_do_not_fit_the_base(adapted, base, tmp_path: Path) -> None:
    _, path = adapted
    _, component = base
    tensors = load_file(path)
    name = "transformer.transformer_blocks.1.attn.to_q.lora_A.weight"
    broken = {
        "missing": {k: v for k, v in tensors.items() if k != name},
        "extra": tensors | {name.replace(".1.", ".9."): tensors[name]},
        "shape": tensors | {name: np.ascontiguousarray(tensors[name][:, 1:])},
    }
    for kind, content in broken.items():
        file = tmp_path / f"{kind}.safetensors"
        save_file(content, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"transformer_blocks\.[19]\.attn\.to_q"):
            load_adapter(file, component.params, stacked=flux.STACKED)
    other = tmp_path / "other.safetensors"
    save_file({"unet.down.lora_A.weight": np.zeros((4, 4), np.float32)}, other)
    with pytest.raises(UserError, match="not a LoRA of a FLUX transformer: unet.down"):
        load_adapter(other, component.params, stacked=flux.STACKED)
    assert file_sha256(path) != file_sha256(other)
