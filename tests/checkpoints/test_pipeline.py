"""Pipeline folders: written by diffusers and by the package, read by both."""

import hashlib
import inspect
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from nabla_jax.checkpoints import pipeline
from nabla_jax.checkpoints.safetensors_io import flatten
from nabla_jax.errors import UserError
from tests.checkpoints.pipeline_folder import write_pipeline


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    write_pipeline(folder)
    return folder


@pytest.fixture
def folder(complete, tmp_path):
    return shutil.copytree(complete, tmp_path / "base")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_complete_folder_passes(complete):
    pipeline.check_folder(complete)


def test_models_written_by_diffusers_are_read_tensor_by_tensor(complete):
    transformer = pipeline.load_transformer(complete)
    stored = load_file(complete / "transformer" / "diffusion_pytorch_model.safetensors")
    blocks = transformer.params["transformer_blocks"]["attn"]["to_q"]["weight"]
    np.testing.assert_array_equal(blocks[1], stored["transformer_blocks.1.attn.to_q.weight"])
    assert sum(leaf.size for leaf in jax.tree.leaves(transformer.params)) == sum(v.size for v in stored.values())
    assert transformer.config == pipeline.transformer_config(complete)
    vae = pipeline.load_vae(complete, dtype=jnp.bfloat16)
    stored = load_file(complete / "vae" / "diffusion_pytorch_model.safetensors")
    assert {name: leaf.shape for name, leaf in flatten(vae.params).items()} == {
        name: value.shape for name, value in stored.items()
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(vae.params)} == {jnp.dtype(jnp.bfloat16)}
    assert vae.config == pipeline.vae_config(complete)


@pytest.mark.parametrize("name", ["transformer", "vae"])
def test_models_written_by_the_package_are_read_by_diffusers(complete, tmp_path, name):
    part = pipeline.load_part(complete, name)
    pipeline.save_part(tmp_path, name, part.config, part.params)
    kind = {"transformer": diffusers.FluxTransformer2DModel, "vae": diffusers.AutoencoderKL}[name]
    model, report = kind.from_pretrained(tmp_path / name, output_loading_info=True)
    assert not any(report.values()), report
    original = kind.from_pretrained(complete / name).state_dict()
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), original[key].numpy())


def test_sharding_may_be_a_function_of_the_abstract_parameters(complete):
    mesh = Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    spec = NamedSharding(mesh, PartitionSpec())
    loaded = pipeline.load_vae(complete, sharding=lambda abstract: jax.tree.map(lambda _: spec, abstract))
    assert {leaf.sharding for leaf in jax.tree.leaves(loaded.params)} == {spec}
    jax.tree.map(np.testing.assert_array_equal, loaded.params, pipeline.load_vae(complete).params)


def test_everything_that_is_missing_is_said_at_once(folder):
    (folder / "transformer" / "config.json").unlink()
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    shutil.rmtree(folder / "text_encoder_2")
    (folder / "tokenizer" / "merges.txt").unlink()
    shutil.rmtree(folder / "tokenizer_2")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    edit(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(UserError) as caught:
        pipeline.check_folder(folder)
    message = str(caught.value)
    for expected in (
        str(folder),
        "_class_name: found 'StableDiffusionPipeline'",
        "transformer/config.json: file not found",
        "vae/diffusion_pytorch_model.safetensors: not a complete safetensors file",
        "text_encoder_2/ is missing",
        "tokenizer/merges.txt or tokenizer.json is missing",
        "tokenizer_2/ is missing",
        "scheduler/scheduler_config.json is missing",
    ):
        assert expected in message
    assert "\n" not in message
    assert message.count("missing") == 4


def test_sizes_that_disagree_are_found(folder):
    edit(
        folder / "transformer" / "config.json",
        joint_attention_dim=32,
        pooled_projection_dim=16,
        in_channels=64,
    )
    with pytest.raises(UserError) as caught:
        pipeline.check_folder(folder)
    for expected in (
        "joint_attention_dim is 32, but text_encoder_2/config.json: d_model is 64",
        "pooled_projection_dim is 16, but text_encoder/config.json: hidden_size is 64",
        "64 channels per token, but vae/config.json: latent_channels 4 makes 16",
    ):
        assert expected in str(caught.value)


def test_absent_folders_and_files_are_user_errors(folder, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        pipeline.check_folder(tmp_path / "nowhere")
    (folder / "model_index.json").write_text("{")
    with pytest.raises(UserError, match=r"model_index\.json: not valid JSON"):
        pipeline.check_folder(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(UserError, match=r"model_index\.json is missing"):
        pipeline.check_folder(folder)
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=r"vae.config\.json: file not found"):
        pipeline.load_vae(folder)
    (folder / "tokenizer_2" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer_2/tokenizer\.json is missing"):
        pipeline.load_tokenizers(folder)


@pytest.mark.parametrize("name", pipeline.PARTS)
@pytest.mark.parametrize(
    ("content", "message"), [("{", "not valid JSON"), ("[1]", "found list, expected a JSON object")]
)
def test_a_broken_config_is_one_line_that_names_it(folder, name, content, message):
    (folder / name / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"base/{name}/config.json: {message}") as caught:
        pipeline.load_part(folder, name)
    assert "\n" not in str(caught.value)


def test_a_transformer_that_is_none_of_ours_names_its_file(folder):
    for change, message in (({"num_blocks": 3}, "unknown keys num_blocks"), ({"patch_size": 2}, "patch_size is 2")):
        shutil.copy(folder / "transformer" / "config.json", folder / "kept.json")
        edit(folder / "transformer" / "config.json", **change)
        with pytest.raises(UserError, match=f"transformer/config.json: {message}"):
            pipeline.load_transformer(folder)
        shutil.copy(folder / "kept.json", folder / "transformer" / "config.json")


def test_a_damaged_tokenizer_is_named(folder):
    (folder / "tokenizer" / "vocab.json").write_text("[1")
    with pytest.raises(UserError, match=r"base/tokenizer: the tokenizer cannot be read"):
        pipeline.load_tokenizers(folder)


def test_the_hash_covers_every_weight_and_nothing_else(folder):
    before = pipeline.folder_hash(folder)
    assert before == pipeline.folder_hash(folder)
    assert len(bytes.fromhex(before)) == 32
    edit(folder / "scheduler" / "scheduler_config.json", shift=1.0)
    (folder / "flux1-dev.safetensors").write_bytes(b"another copy of the weights")
    assert pipeline.folder_hash(folder) == before
    seen = {before}
    for name in pipeline.PARTS:
        file = next((folder / name).glob("*.safetensors"))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        seen.add(pipeline.folder_hash(folder))
    assert len(seen) == 5


def test_the_hash_of_everything_sees_names_and_contents(folder):
    seen = {pipeline.folder_hash(folder, everything=True)}
    edit(folder / "scheduler" / "scheduler_config.json", shift=1.0)
    seen.add(pipeline.folder_hash(folder, everything=True))
    (folder / "tokenizer" / "merges.txt").rename(folder / "tokenizer" / "other.txt")
    seen.add(pipeline.folder_hash(folder, everything=True))
    assert len(seen) == 3


def test_the_hash_of_one_model_is_that_of_its_file(complete):
    file = complete / "transformer" / "diffusion_pytorch_model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    line = f"transformer/{file.name} {file.stat().st_size} {digest}\n"
    assert pipeline.folder_hash(complete / "transformer") == hashlib.sha256(line.encode()).hexdigest()


@pytest.mark.parametrize("name", pipeline.PIPELINES)
def test_the_index_names_the_components_of_the_published_pipeline(tmp_path, name):
    pipeline.write_index(tmp_path, name, {"shift": 1.0, "use_dynamic_shifting": False})
    index = json.loads((tmp_path / "model_index.json").read_text())
    components = {key for key in index if not key.startswith("_")}
    published = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}
    assert components == published
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    assert (scheduler.config.shift, scheduler.config.use_dynamic_shifting) == (1.0, False)
    assert (scheduler.config.base_shift, scheduler.config.max_shift) == (0.5, 1.15)


def test_an_unknown_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected one of FluxPipeline"):
        pipeline.write_index(tmp_path, "FluxTurboPipeline")
