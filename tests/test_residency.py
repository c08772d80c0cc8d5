"""One network at a time on the device where prompts are fixed: bytes of all live arrays at the embedded size."""

import gc
from pathlib import Path
from typing import Any

import jax
import pytest

from nabla_jax import api, train, training
from nabla_jax.checkpoints import pipeline
from nabla_jax.config import Conditioning
from tests import fixtures


def live() -> int:
    """Bytes of all arrays that something still holds."""
    return sum(array.nbytes for array in jax.live_arrays())


def size(component: pipeline.Component) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(component.params))


class Watch:
    """Bytes beyond those at the start, before and after each load of a part of the pipeline."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gc.collect()
        self.start = live()
        self.events: list[tuple[str, int, int]] = []
        self.sizes: dict[str, int] = {}
        original = pipeline.load_part

        def load_part(path: Any, name: str, **options: Any) -> pipeline.Component:
            before = live() - self.start
            component = original(path, name, **options)
            self.events.append((name, before, live() - self.start))
            self.sizes[name] = size(component)
            return component

        monkeypatch.setattr(pipeline, "load_part", load_part)

    def check(self) -> None:
        """Text encoders were read before the transformer, and were gone when it was."""
        order = [name for name, *_ in self.events]
        assert order.index("text_encoder_2") < order.index("transformer")
        before = {name: before for name, before, _ in self.events}
        after = {name: after for name, _, after in self.events}
        encoders = self.sizes["text_encoder"] + self.sizes["text_encoder_2"]
        assert after["text_encoder_2"] >= encoders
        others = self.sizes["vae"] if "vae" in order else 0
        assert before["transformer"] <= others + encoders // 100
        assert max(after.values()) <= others + max(encoders, self.sizes["transformer"]) + encoders // 100


def test_loading_a_base_with_a_fixed_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    reposer = api.load("asset:toy-flux-kontext", conditioning=Conditioning(size=48, text_length=12), quantise="nf4")
    watch.check()
    held = watch.sizes["transformer"] + watch.sizes["vae"]
    assert held <= live() - watch.start < held + watch.sizes["text_encoder"]
    assert isinstance(reposer.text, tuple)


def test_training_on_pictures_that_are_encoded_when_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Enough(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Enough

    fixtures.write_small_world(tmp_path / "world", images=76)
    overrides: dict[str, Any] = {"train__workdir": str(tmp_path / "run"), "base__path": "asset:toy-flux-kontext"}
    overrides |= {"data__mode": "on_the_fly", "data__prepared": str(tmp_path / "none")}
    monkeypatch.setattr(training, "run_batches", stop)
    watch = Watch(monkeypatch)
    with pytest.raises(Enough):
        train.main(["--config", str(fixtures.write_config(tmp_path, tmp_path / "config.py", **overrides))])
    watch.check()
