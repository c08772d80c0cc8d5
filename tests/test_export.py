"""The export command: conversions, merging, inspection, and what it refuses. Files made by and for other tools."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file

from nabla_jax import export, flow, runs
from nabla_jax.checkpoints import pipeline
from nabla_jax.checkpoints.adapters import AdapterMetadata, load_adapter, read_adapter, save_adapter
from nabla_jax.models import flux, layers, lora
from nabla_jax.models.lora import Adapter
from tests import fixtures
from tests.golden import flux_golden
from tests.models import test_flux

RANK = 4
FILL = {"guidance_embeds": True, "in_channels": 20, "out_channels": 6}


def command(*words: object) -> None:
    runs.run_main(export.main, [str(word) for word in words])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line with which the command refuses, status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command(*words)
    line = capsys.readouterr().err
    assert stop.value.code == 2
    assert line.count("\n") == 1, line
    return line


@pytest.fixture(scope="module", params=[FILL, {"guidance_embeds": True}], ids=["fill", "kontext"])
def base(request, tmp_path_factory) -> tuple[FluxTransformer2DModel, pipeline.Component]:
    model = test_flux.reference(**request.param)
    return model, test_flux.load(model, tmp_path_factory.mktemp("base"))


def data_for(model: FluxTransformer2DModel):
    return test_flux.inputs(2, (3, 4), channels=model.config.in_channels)


def run_here(component: pipeline.Component, data, adapter: Adapter | None) -> np.ndarray:
    """The velocity with the adapter on all tokens, text and noise alike."""
    name = None if adapter is None else "default"
    streams = [dataclasses.replace(branch, adapter=name) for branch in test_flux.branches(data, 1.0)]
    with flux_golden.reference_frequencies():
        return test_flux.run(component, streams, adapters={} if adapter is None else {"default": adapter})


def run_there(model: FluxTransformer2DModel, data, folder: Path, name: str) -> np.ndarray:
    """The same with the adapter file loaded by diffusers' pipeline."""
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    kind = FluxFillPipeline if model.config.in_channels != 12 else FluxPipeline
    pipe = kind(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model, **parts)
    pipe.load_lora_weights(folder, weight_name=name)
    try:
        return test_flux.run_reference(model, data, 1.0)
    finally:
        pipe.unload_lora_weights()


def trained(component: pipeline.Component, data, alpha: float) -> Adapter:
    """An adapter after a few steps of training on the whole sequence."""
    fresh = lora.initialize(jax.random.key(0), component.params, rank=RANK, alpha=alpha, stacked=flux.STACKED)
    streams = [dataclasses.replace(branch, adapter="default") for branch in test_flux.branches(data, 1.0)]
    rng = np.random.default_rng(1)
    shape = (*data["hidden_states"].shape[:2], component.config.velocity_channels)
    x0, x1 = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    optimizer = optax.adam(0.05)

    def loss(tree):
        adapters = {"default": Adapter(tree, fresh.scale)}
        return flow.velocity_loss(layers.bind(component.graphdef, component.params)(streams, adapters=adapters), x0, x1)

    @jax.jit
    def steps(tree):
        def step(state, _):
            tree, optimizer_state = state
            value, gradient = jax.value_and_grad(loss)(tree)
            updates, optimizer_state = optimizer.update(gradient, optimizer_state)
            return (optax.apply_updates(tree, updates), optimizer_state), value

        (tree, _), values = jax.lax.scan(step, (tree, optimizer.init(tree)), length=4)
        return tree, values

    tree, values = steps(fresh.params)
    assert values[-1] < values[0]
    return Adapter(tree, fresh.scale)


@pytest.mark.parametrize("alpha", [RANK, 2 * RANK], ids=["alpha=r", "alpha=2r"])
def test_diffusers_runs_a_trained_adapter_as_we_do(base, alpha: float, tmp_path: Path) -> None:
    """On the whole sequence: Insert Anything's use, and what tools make of an OminiControl adapter (all tokens)."""
    model, component = base
    data = data_for(model)
    adapter = trained(component, data, alpha)
    metadata = AdapterMetadata(rank=RANK, alpha=alpha, applies_to="all")
    save_adapter(tmp_path / "ours.safetensors", adapter, metadata, stacked=flux.STACKED)
    command(tmp_path / "ours.safetensors", "--to", "kohya", "--out", tmp_path / "kohya.safetensors")
    command(tmp_path / "kohya.safetensors", "--to", "peft", "--out", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "ours.safetensors").read_bytes()
    reread, _ = load_adapter(tmp_path / "kohya.safetensors", component.params, stacked=flux.STACKED)
    found = run_here(component, data, reread)
    expected = run_there(model, data, tmp_path, "back.safetensors")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(found - run_here(component, data, None)).max() > 0.01


def test_an_adapter_saved_by_peft(base, tmp_path: Path) -> None:
    """PEFT's own folder: its prefixes, alpha in its configuration file; every linear of the model is adapted."""
    model, component = base
    data = data_for(model)
    every = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    config = LoraConfig(r=RANK, lora_alpha=3 * RANK, target_modules=every)
    torch.manual_seed(0)
    wrapped = get_peft_model(FluxTransformer2DModel.from_config(model.config), config)
    with torch.no_grad():
        own = dict(model.named_parameters())
        for name, parameter in wrapped.base_model.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
            elif "lora_" not in name:
                parameter.copy_(own[name.replace(".base_layer", "")])
    wrapped.save_pretrained(tmp_path)
    assert all(name.startswith("base_model.model.") for name in load_file(tmp_path / "adapter_model.safetensors"))
    adapter, metadata = load_adapter(tmp_path, component.params, stacked=flux.STACKED)
    assert (metadata.rank, metadata.alpha, metadata.applies_to) == (RANK, 3 * RANK, "unknown")
    assert sorted(read_adapter(tmp_path).modules) == sorted(every)
    expected = test_flux.run_reference(wrapped.base_model.model.eval(), data, 1.0)
    found = run_here(component, data, adapter)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# ------------------------------------------------------------------------------------------ merging, refusing


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return fixtures.write_base(tmp_path_factory.mktemp("folder") / "base")


def random_adapter(folder: Path, path: Path, **metadata: object) -> Adapter:
    component = pipeline.load_transformer(folder)
    fresh = lora.initialize(jax.random.key(0), component.params, rank=RANK, alpha=2, stacked=flux.STACKED)
    rng = np.random.default_rng(0)
    adapter = Adapter(
        jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 4, fresh.params), fresh.scale
    )
    save_adapter(path, adapter, AdapterMetadata(rank=RANK, alpha=2, **metadata), stacked=flux.STACKED)
    return adapter


def test_a_merged_base_computes_what_base_and_adapter_do(folder: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "all.safetensors", tmp_path / "merged"
    sha256 = pipeline.folder_hash(folder / "transformer")
    adapter = random_adapter(folder, file, applies_to="all", base_sha256=sha256)
    command(file, "--merge", folder, "--out", out)
    pipeline.check_folder(out)
    before, after = (pipeline.load_transformer(path) for path in (folder, out))
    rng = np.random.default_rng(0)
    data = test_flux.inputs(1, (2, 3), channels=64)
    data["encoder_hidden_states"] = rng.normal(size=(1, 4, 16)).astype(np.float32)
    data["pooled_projections"] = rng.normal(size=(1, 16)).astype(np.float32)
    expected = run_here(before, data, adapter)
    np.testing.assert_allclose(run_here(after, data, None), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected - run_here(before, data, None)).max() > 0.01
    # Everything else is as it was; what was merged is on record.
    for path in sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file()):
        if path.parts[0] != "transformer" or path.suffix != ".safetensors":
            assert (out / path).read_bytes() == (folder / path).read_bytes(), path
    note = pipeline.read_header(out / "transformer").metadata["nabla_jax_merged"]
    assert json.loads(note)["adapter"] == "all.safetensors"
    FluxTransformer2DModel.from_pretrained(out / "transformer")


def test_merging_keeps_shards_and_half_precision(folder: Path, tmp_path: Path) -> None:
    """Sums are rounded once: the merged weight is the nearest bfloat16 to the exact one."""
    sharded = tmp_path / "sharded"
    model = FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
    shutil.copytree(folder, sharded, ignore=shutil.ignore_patterns("diffusion_pytorch_model.safetensors"))
    shutil.copytree(folder / "vae", sharded / "vae", dirs_exist_ok=True)
    model.save_pretrained(sharded / "transformer", max_shard_size="60KB")
    file, out = tmp_path / "all.safetensors", tmp_path / "merged"
    random_adapter(folder, file, applies_to="all")
    command(file, "--merge", sharded, "--out", out)
    names = sorted(p.name for p in (sharded / "transformer").iterdir())
    assert len(names) > 3
    assert sorted(p.name for p in (out / "transformer").iterdir()) == names
    merged = FluxTransformer2DModel.from_pretrained(out / "transformer", torch_dtype=torch.bfloat16).state_dict()
    adapter = read_adapter(file)
    for name, weight in model.state_dict().items():
        pair = adapter.modules.get(name.removesuffix(".weight"))
        if pair is None or not name.endswith(".weight"):
            assert torch.equal(merged[name], weight), name
            continue
        exact = weight.double() + adapter.metadata.scale * torch.from_numpy(pair.lora_B @ pair.lora_A).double()
        step = 2.0 ** torch.floor(torch.log2(exact.abs().clamp(min=1e-30))) * 2**-8
        assert ((merged[name].double() - exact).abs() <= step * 1.01 + 1e-6).all(), name


def test_merging_what_must_not_be_merged(folder: Path, tmp_path: Path, capsys) -> None:
    file, out = tmp_path / "a.safetensors", tmp_path / "merged"
    random_adapter(folder, file, applies_to="condition")
    line = refused(capsys, file, "--merge", folder, "--out", out)
    assert "acts on condition tokens only" in line
    assert "text and noise" in line
    save_file(load_file(file), file)  # as another tool would write it
    assert "--applies-to all" in refused(capsys, file, "--merge", folder, "--out", out)
    command(file, "--merge", folder, "--out", out, "--applies-to", "all")
    assert "exists" in refused(capsys, file, "--merge", folder, "--out", out, "--applies-to", "all")
    random_adapter(folder, file, applies_to="all", base="another", base_sha256="0" * 64)
    other = tmp_path / "other"
    assert "trained on another" in refused(capsys, file, "--merge", folder, "--out", other)
    tensors = load_file(file)
    name = "transformer.x_embedder.lora_A.weight"
    save_file({**tensors, name: np.zeros((RANK, 384), np.float32)}, file)
    line = refused(capsys, file, "--merge", folder, "--out", other, "--applies-to", "all")
    assert "(4, 384)" in line
    assert "(4, 64)" in line
    assert not other.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "merged"]


def test_inspection(folder: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "a.safetensors"
    random_adapter(folder, file, base="toy", control="depth", applies_to="condition")
    kohya = tmp_path / "kohya.safetensors"
    command(file, "--to", "kohya", "--out", kohya, "--dtype", "bfloat16")
    capsys.readouterr()
    for path, first, dtype in ((file, "peft", "F32 (75)"), (kohya, "kohya", "BF16")):
        command("--inspect", path)
        lines = capsys.readouterr().out.splitlines()
        assert lines[:4] == [
            f"file: {path}",
            next(x for x in lines if x.startswith(f"format: {first} adapter")),
            "rank: 4",
            "alpha: 2",
        ]
        assert next(x for x in lines if x.startswith("targets: ")).startswith("targets: 25 linears: single_")
        assert {"base: toy", "control: depth", "applies_to: condition", "independent_conditions: False"} <= set(lines)
        assert any(x.startswith("dtype: ") and dtype in x for x in lines), lines
    command("--inspect", folder)
    text = capsys.readouterr().out
    for part in (
        "pipeline folder",
        "FLUX transformer (diffusers)",
        "autoencoder (diffusers)",
        "CLIP text encoder",
        "T5 encoder",
    ):
        assert part in text
    tensors = {
        "double_blocks.0.img_attn.qkv.weight": np.zeros((3, 1)),
        "single_blocks.0.linear1.weight": np.zeros((7, 1)),
    }
    save_file(tensors, tmp_path / "flux1.safetensors", metadata={"author": "somebody"})
    command("--inspect", tmp_path / "flux1.safetensors")
    text = capsys.readouterr().out
    assert "FLUX transformer (original single file)\nparameters: 10\n" in text
    assert "metadata: author = somebody" in text


def test_mistakes_on_the_command_line(folder: Path, tmp_path: Path, capsys) -> None:
    file, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    save_file({"other": np.zeros(1)}, file)
    assert "expected one of --inspect, --to, --merge" in refused(capsys)
    assert "inspect and to" in refused(capsys, "--inspect", file, "--to", "peft")
    assert "needs an adapter and --out" in refused(capsys, file, "--to", "peft")
    assert "'webui', expected one of peft, kohya, comfyui" in refused(capsys, file, "--to", "webui", "--out", out)
    assert "float32, bfloat16" in refused(capsys, file, "--to", "peft", "--out", out, "--dtype", "int8")
    assert "not a LoRA" in refused(capsys, file, "--to", "peft", "--out", out)
    assert "not a LoRA" in refused(capsys, "--inspect", file)
    assert "nowhere" in refused(capsys, "--inspect", tmp_path / "nowhere")
    assert "nowhere" in refused(capsys, tmp_path / "nowhere", "--to", "peft", "--out", out)
    out.write_bytes(b"something")
    assert "exists" in refused(capsys, file, "--to", "peft", "--out", out)
    assert out.read_bytes() == b"something"
