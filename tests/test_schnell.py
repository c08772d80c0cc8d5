"""Om-S: its configurations differ from Om-K's in the base alone. That they run: see test_configurations.py."""

import pytest

from nabla_jax import config as configs

CONTROLS = ("fill", "depth", "keypoints")
BASE = {"base.path", "base.obtain", "data.prepared", "lora.name", "train.workdir", "sample.steps", "sample.guidance"}


@pytest.mark.parametrize("size", ["", ":toy"])
@pytest.mark.parametrize("control", CONTROLS)
def test_the_other_base_changes_nothing_else(control: str, size: str) -> None:
    kontext = configs.flatten(configs.to_dict(configs.load(f"configs/omk_{control}.py{size}")))
    config = configs.load(f"configs/oms_{control}.py{size}")
    schnell = configs.flatten(configs.to_dict(config))
    differing = {key for key in kontext.keys() | schnell.keys() if kontext.get(key) != schnell.get(key)}
    # The small bases are shipped: nothing is said of how to obtain them.
    assert differing == BASE - ({"base.obtain"} if size else set()) | {"source"}
    assert (config.lora.name, config.sample.steps, config.conditioning.control) == (f"oms_{control}", 4, control)
    assert config.base.path == ("asset:toy-flux-schnell" if size else "checkpoints/FLUX.1-schnell")
