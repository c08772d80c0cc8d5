"""Bytes, machines, meshes and the command of ``python -m nabla_jax.plan``."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from nabla_jax import assets, optim, training
from nabla_jax import config as configs
from nabla_jax.checkpoints import pipeline
from nabla_jax.checkpoints.safetensors_io import read_header
from nabla_jax.data.records import RecordReader, encode_record, write_shard
from nabla_jax.errors import UserError
from nabla_jax.models import flux, layers
from nabla_jax.models.partitioning import AXES
from nabla_jax.parallel import rules
from nabla_jax.plan import ahead, count, machines, memory, meshes, networks, planning, roofline
from nabla_jax.plan.__main__ import main
from tests import fixtures

EMBEDDED = "configs/omk_fill.py:toy"
TINY = flux.FluxConfig(
    num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=4, joint_attention_dim=64,
    pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
)  # fmt: skip


@pytest.fixture(scope="module")
def planner() -> planning.Planner:
    return planning.Planner(configs.load(EMBEDDED), pictures=100, utilisation=0.5)


def one(planner: planning.Planner, **options: Any) -> planning.Plan:
    return planner.plan(machines.topology("cpu"), meshes.parse_mesh("", 1), **options)


# ------------------------------------------------------------------------------------------- what is stored


def test_the_base_has_as_many_bytes_as_its_files(planner: planning.Planner) -> None:
    folder, stored = assets.resolve("asset:toy-flux-kontext"), one(planner).sizes
    for part, found in (("transformer", stored.base), ("vae", stored.vae)):
        entries = read_header(folder / part).tensors.values()
        assert found == 4 * sum(math.prod(entry.shape) for entry in entries)
    encoders = [read_header(folder / part).tensors.values() for part in ("text_encoder", "text_encoder_2")]
    assert stored.text_encoders == 2 * sum(math.prod(entry.shape) for part in encoders for entry in part)


def test_published_sizes_are_known_without_their_folder() -> None:
    config = configs.load("configs/omk_keypoints.py")
    found = networks.read_architecture(config)
    assert found.published == ("checkpoints/FLUX.1-Kontext-dev",) and found.kontext
    # Text encoders and autoencoder of few layers: they are no part of what is looked at.
    embedded = networks.read_architecture(configs.load(EMBEDDED))
    graph = networks.make(config, dataclasses.replace(embedded, transformer=found.transformer))
    # 11.90 B parameters in bfloat16; rank 16 is 57.95 M parameters in float32.
    assert layers.tree_bytes(graph.base) == pytest.approx(2 * 11.90e9, rel=1e-3)
    assert layers.tree_bytes(graph.state["adapters"]) == pytest.approx(4 * 57.95e6, rel=1e-3)


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_a_quantised_base_has_the_bytes_of_its_arrays(planner: planning.Planner, tmp_path: Path, kind: str) -> None:
    config = configs.load(EMBEDDED, {"base.quantise": kind, "train.remat": "full"})
    architecture = dataclasses.replace(planner.architecture, transformer=TINY)
    found = networks.make(config, architecture)
    params = fixtures.random_params(lambda rngs: flux.Flux(TINY, rngs=rngs), np.random.default_rng(0))
    pipeline.save_part(tmp_path, "transformer", TINY, params)
    base = pipeline.load_transformer(tmp_path, dtype=config.train.dtype, quantise=kind).params
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    assert memory.sizes(config, found, 0).base == layers.tree_bytes(found.base) == held
    assert held < layers.tree_bytes(params) / 2
    # Whole weights beside them: of no more than two blocks, and of all where nothing is computed again.
    mesh, each = meshes.parse_mesh("", 1), memory.Activations(0, 0, 0)
    whole = {name: layers.tree_bytes(params[name]) for name in flux.STACKED}
    under_way = memory.per_device(config, found, mesh, each)
    assert under_way.base == held and under_way.gathered == 2 * max(whole.values())
    kept = dataclasses.replace(config, train=dataclasses.replace(config.train, remat="none"))
    assert memory.per_device(kept, found, mesh, each).gathered == sum(whole.values())


@pytest.mark.parametrize("name", ["prodigy", "adamw"])
def test_the_state_is_that_of_a_run(planner: planning.Planner, name: str) -> None:
    config = configs.load(EMBEDDED, {"optim.name": name, "train.ema": "0.9"})
    found = networks.make(config, dataclasses.replace(planner.architecture, transformer=TINY))
    trees = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), found.state["adapters"])
    state = training.initial_state(trees, optim.make(config.optim), config)
    stored = memory.sizes(config, found, 0)
    assert stored.checkpoint == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert stored.average == stored.adapters == stored.gradients
    copies = {"prodigy": 4, "adamw": 2}[name]  # p0, m, v, s; m, v
    assert stored.optimizer == pytest.approx(copies * stored.adapters, abs=64)


def test_records_are_as_large_as_those_on_disk(planner: planning.Planner, tmp_path: Path) -> None:
    config, record = configs.load(EMBEDDED), one(planner).sizes.record
    side = config.conditioning.size // planner.architecture.vae.factor
    channels = 2 * planner.architecture.vae.latent_channels
    moments = {"moments": np.ones((channels, side, side), np.float16)}
    records = []
    for i in range(40):
        meta = {"id": f"{i:036d}", "class_id": "0817", "caption": 0, "index": i, "made": "f" * 64}
        for role, arrays in (
            ("target", {"mask": np.ones((side, side), np.uint8)}),
            ("subject", {}),
            ("control_fill", {}),
        ):
            records.append(encode_record(meta | {"role": role}, moments | arrays))
    path = tmp_path / "shard.array_record"
    write_shard(path, records)
    assert len(RecordReader([path])) == 120
    # An ArrayRecord file has a hash and a place for every record, and is cut into blocks.
    assert 40 * record == pytest.approx(sum(map(len, records)), rel=0.01)
    assert path.stat().st_size == pytest.approx(40 * record, abs=2 * 65536 + 120 * 64)
    unprepared = configs.load("configs/insert_fill.py:toy")
    assert memory.record_bytes(unprepared, planner.architecture) == 0


# ------------------------------------------------------------------------------------------- what is counted


def test_operations_of_loops_branches_and_convolutions() -> None:
    square, picture = jnp.ones((8, 8)), jnp.ones((1, 3, 10, 12))
    assert count.operations(lambda x: x @ x, square) == 2 * 8**3
    looped = lambda x: jax.lax.scan(lambda y, _: (y @ x, None), x, length=7)[0]  # noqa: E731
    assert count.operations(looped, square) == 7 * 2 * 8**3
    assert count.operations(jax.checkpoint(looped), square) == 7 * 2 * 8**3
    branch = lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y, x)  # noqa: E731
    assert count.operations(branch, square) == 2 * 2 * 8**3
    kernel = jnp.ones((5, 3, 3, 3))
    convolved = lambda x, k: jax.lax.conv(x, k, (1, 1), "VALID")  # noqa: E731
    assert count.operations(convolved, picture, kernel) == 2 * (8 * 10 * 5) * (3 * 3 * 3)
    analysis = jax.jit(convolved).lower(picture, kernel).cost_analysis()
    assert count.operations(convolved, picture, kernel) == analysis["flops"]


def test_saved_bytes_are_what_the_gradient_reads() -> None:
    weights, x = jnp.ones((8, 8)), jnp.ones((4, 8))

    def deep(w: jax.Array, x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = jnp.tanh(x @ w)
        return x.sum()

    # Of each layer but the last its result, [4, 8] float32, for the weights of the next; of all of them tanh's slope.
    assert 2 * 4 * 8 * 4 <= count.saved_bytes(deep, weights, x) <= 6 * 4 * 8 * 4
    assert count.saved_bytes(deep, weights, jnp.ones((8, 8))) == 2 * count.saved_bytes(deep, weights, x)
    assert count.saved_bytes(jax.checkpoint(deep), weights, x) == 0
    # What is made of weights alone does not grow with the samples.
    assert count.saved_bytes(lambda w, x: deep(jnp.exp(w), x), weights, x) == count.saved_bytes(deep, weights, x)


def test_activations_by_policy(planner: planning.Planner) -> None:
    found = {remat: one(planner, remat=remat) for remat in ("none", "save_attention", "full")}
    saved = [found[remat].activations.saved for remat in ("none", "save_attention", "full")]
    assert saved[0] > saved[1] > saved[2] > 0
    # Full recomputation keeps the stream before each block, and little else.
    streams, model = found["full"].work.tokens, planner.architecture.transformer
    blocks = model.num_layers + model.num_single_layers
    assert 1 <= saved[2] / (4 * streams * model.width * blocks) < 1.5
    rows = [one(planner, remat="full", batch=batch).held.activations for batch in (1, 3)]
    assert rows[1] == 3 * rows[0]


# --------------------------------------------------------------------------------------- machines and meshes


def test_topologies_and_meshes_are_read_and_refused() -> None:
    assert machines.topology("v5e:4x4").devices == 16 and machines.topology("v5p:2x2x1").devices == 4
    assert machines.topology("h100x8").devices == 8 and machines.topology("h200").devices == 1
    assert machines.topology("cpu").device.memory > 2**28
    for name in ("v5e", "v5e:", "h100:2x4", "v7:2x2", "h100x0", "4x4"):
        with pytest.raises(UserError, match="--topology"):
            machines.topology(name)
    sizes = [one.devices for one in machines.larger(machines.topology("v6e:2x4"))]
    assert sizes == sorted(sizes) and sizes[0] > 8
    assert meshes.parse_mesh("", 8) == {"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1}
    parsed = meshes.parse_mesh("fsdp=4,sequence=2", 8)
    assert parsed == {"data": 1, "fsdp": 4, "tensor": 1, "sequence": 2}
    assert meshes.parse_mesh(meshes.mesh_text(parsed), 8) == parsed
    for text in ("fsdp=3", "model=8", "fsdp", "fsdp=x", "fsdp=0,data=8"):
        with pytest.raises(UserError, match="--mesh"):
            meshes.parse_mesh(text, 8)


def test_bytes_of_a_device_are_those_of_jax_own_shards(planner: planning.Planner) -> None:
    tree = planner.networks.base
    for shape in ({"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 4}):
        mesh = dict.fromkeys(AXES, 1) | shape
        shardings = rules.shardings(tree, AbstractMesh(tuple(mesh.values()), tuple(mesh)))
        shards = jax.tree.map(
            lambda leaf, s: math.prod(s.shard_shape(leaf.shape)) * leaf.dtype.itemsize, tree, shardings
        )
        held = sum(jax.tree.leaves(shards))
        assert rules.device_bytes(tree, mesh) == held
        assert held >= layers.tree_bytes(tree) / (mesh["fsdp"] * mesh["tensor"])


def test_collectives() -> None:
    def sent(backward: bool = True, **axes: int) -> roofline.Collectives:
        mesh = dict.fromkeys(AXES, 1) | axes
        passes = 2 if backward else 1
        return roofline.collectives(
            mesh, base_bytes=800.0, gradient_bytes=80.0, tokens=10, model=TINY, itemsize=2, passes=passes,
            backward=backward,
        )  # fmt: skip

    assert sent().total == 0
    assert sent(data=4) == roofline.Collectives(gradients=2 * 80 * 3 / 4)
    assert sent(fsdp=4) == roofline.Collectives(weights=2 * 800 * 3 / 4, gradients=2 * 80 * 3 / 4)
    assert sent(fsdp=4, backward=False) == roofline.Collectives(weights=800 * 3 / 4)
    stream = 10 * TINY.width * 2
    # A double block adds up twice, a single one once, in both directions; an all-reduce sends nearly twice its size.
    assert sent(tensor=2).tensor == 2 * 3 * 2 * stream * 1 / 2 and sent(tensor=2).weights == 0
    # Keys and values of two blocks, three times, from every other device.
    assert sent(sequence=2).sequence == 3 * 2 * 2 * stream / 2
    time = roofline.seconds(machines.topology("h200").device, 989e12, 4.8e12 / 2, 4.5e11 / 4)
    assert (time.compute, time.memory, time.collectives) == (1.0, 0.5, 0.25)
    assert time.least == 1.0 and time.bound == "compute"


# ---------------------------------------------------------------------------------------- what would fit


def machine(memory: float, devices: int = 1) -> machines.Topology:
    device = dataclasses.replace(machines.topology("h200").device, name="box", memory=memory, usable=1.0)
    return machines.Topology(f"boxx{devices}", device, devices)


def test_the_nearest_setting_that_fits(planner: planning.Planner) -> None:
    def nearest(memory: float, devices: int = 1) -> list[str] | None:
        topology = machine(memory, devices)
        plan = planner.plan(topology, meshes.parse_mesh("", devices))
        assert plan.fits == (plan.held.total <= memory)
        other = planner.nearest(plan)
        assert other is None or other.fits
        return None if other is None else planning.changes(plan, other)

    held = {remat: one(planner, remat=remat).held.total for remat in planning.REMATS}
    assert nearest(held["none"]) == []
    assert nearest(held["save_attention"]) == ["train.remat=save_attention"]
    assert nearest(held["full"]) in (["train.remat=full"], ["train.remat=save_attention"])
    assert nearest(one(planner, remat="full", accumulate=2).held.total) == ["train.remat=full", "train.accumulate=2"]
    # Even the sum of the gradients is too much.
    smaller = nearest(one(planner, remat="full", batch=1).held.total)
    assert smaller == ["train.remat=full", "train.batch=1"]
    # The parameters alone do not fit on one device, halves of them do.
    tight = one(planner, remat="full", batch=1).held.total - one(planner).sizes.base // 2
    assert nearest(tight) is None
    spread = nearest(tight, 4)
    assert spread is not None and any("mesh.fsdp" in change or "mesh.tensor" in change for change in spread)


def test_a_batch_in_parts_holds_the_activations_of_one(planner: planning.Planner) -> None:
    whole, parts = one(planner, remat="full"), one(planner, remat="full", accumulate=4)
    each, adapters = whole.activations, layers.tree_bytes(planner.networks.state["adapters"])
    assert whole.held.activations == 16 * each.total
    assert parts.held.activations == 4 * (each.saved + each.block) + 16 * each.batch
    # The sum of the gradients, beside those of one part.
    assert parts.held.gradients == parts.sizes.gradients == 2 * adapters == 2 * whole.held.gradients
    assert parts.held.base == whole.held.base and parts.held.state == whole.held.state
    assert parts.work == whole.work
    cut = meshes.parse_mesh("fsdp=4", 4)
    sent = [planner.plan(machine(1e12, 4), cut, accumulate=rounds).sent for rounds in (1, 4)]
    assert (sent[1].weights, sent[1].gradients) == (4 * sent[0].weights, 4 * sent[0].gradients)
    odd = planner.plan(machine(1e12, 4), cut, accumulate=8)
    assert not odd.fits and "expected a multiple of data x fsdp = 4 times train.accumulate 8" in odd.problem
    assert planning.changes(whole, parts) == ["train.accumulate=4"]


def test_a_larger_topology_is_the_last_resort(planner: planning.Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    tight = one(planner, remat="full", batch=1).held.total - one(planner).sizes.base // 2
    small, large = machine(tight), machine(tight, 4)
    monkeypatch.setattr(machines, "larger", lambda _: (large,))
    plan = planner.plan(small, meshes.parse_mesh("", 1))
    other = planner.nearest(plan)
    assert other is not None and other.topology == large and "topology=boxx4" in planning.changes(plan, other)


def test_a_batch_that_the_devices_do_not_divide_is_told(planner: planning.Planner) -> None:
    plan = planner.plan(machine(1e12, 3), meshes.parse_mesh("", 3))
    assert not plan.fits and "train.batch: found 16, expected a multiple of data x fsdp = 3" in plan.problem
    other = planner.nearest(plan)
    assert other is not None and planning.changes(plan, other) == ["train.batch=15"]
    many = planner.plan(machine(1e12, 32), meshes.parse_mesh("", 32))
    fewer = planner.nearest(many)
    assert fewer is not None and fewer.config.train.batch <= 16  # parts of heads before a larger batch


# ------------------------------------------------------------------------------------ compiler and command


def test_the_compiled_step_takes_the_bytes_of_the_plan(planner: planning.Planner) -> None:
    config = configs.load(EMBEDDED, {"train.batch": "2", "conditioning.size": "32", "optim.name": "adamw"})
    found = networks.make(config, dataclasses.replace(planner.architecture, transformer=TINY))
    topology, mesh = machines.topology("cpu"), meshes.parse_mesh("", 1)
    compiled = ahead.compile_step(config, found, topology, mesh)
    stored = memory.sizes(config, found, 0)
    batch = layers.tree_bytes(networks.batch_shapes(config, found.architecture, 2))
    assert compiled.fits and compiled.temporaries > 0
    # The mask's weight and whatever else nothing reads is no argument of the program.
    assert compiled.arguments == pytest.approx(stored.base + stored.checkpoint + batch, rel=0.01)
    assert compiled.results < 0.01 * stored.checkpoint  # the state is donated
    # The traced and compiled step itself: more than a page, far less than a gigabyte.
    assert 2**20 < compiled.program < 2**30 and compiled.process >= compiled.total + compiled.program


def test_without_a_compiler_one_line_says_how_to_get_it(planner: planning.Planner, monkeypatch: Any) -> None:
    monkeypatch.setattr(ahead.importlib.util, "find_spec", lambda name: None)
    for name, how in (("v5e:2x4", "make plan-tpu"), ("h100x8", "GPUs have none")):
        topology = machines.topology(name)
        assert not ahead.can_compile(topology)
        with pytest.raises(UserError, match=how):
            ahead.compile_step(configs.load(EMBEDDED), planner.networks, topology, meshes.parse_mesh("", 8))


def test_the_command(
    planner: planning.Planner, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, asked = tmp_path / "plan.json", []

    def traced_already(config: configs.Config, **settings: Any) -> planning.Planner:
        asked.append((config.source, settings))
        return planner

    monkeypatch.setattr(planning, "Planner", traced_already)
    main(["--config", EMBEDDED, "--topology", "h100x8", "--mesh", "fsdp=4,tensor=2", "--json", str(file)])
    assert asked == [(EMBEDDED, {"pictures": 23_929, "utilisation": 0.5})]
    text, found = capsys.readouterr().out, json.loads(file.read_text())
    assert "fits: about" in text and "each of 8 h100, mesh fsdp=4,tensor=2, batch 16" in text
    assert found["fits"] is True and found["nearest"] is None and found["devices"] == 8
    held = found["per_device"]
    assert held["total"] == sum(held[f.name] for f in dataclasses.fields(memory.PerDevice))
    assert found["work"]["hardware"] > found["work"]["model"] > found["work"]["training"]["forward"]
    hours = found["seconds"]["least"] * found["train"]["steps"] * 8 / 3600
    assert found["device_hours"]["training"] == pytest.approx(hours)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology", "v9:2x2"], "--topology"),
        (["--topology", "h100x8", "--mesh", "fsdp=3"], "--mesh"),
        (["--utilisation", "1.5"], "--utilisation"),
        (["--pictures", "-1"], "--pictures"),
        (["--config.base.path=checkpoints/mine"], "base.path: found nothing at checkpoints/mine"),
        (["--config.base.path=asset:toy-flux-fill"], "192 channels a token, expected 64 for method omini"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        main(["--config", EMBEDDED, *words])
    assert message in str(caught.value) and "\n" not in str(caught.value)
