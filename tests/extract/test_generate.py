"""One picture without masks or depth map: they are found where there are checkpoints."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nabla_jax import config as configs
from nabla_jax import extract, generate
from nabla_jax.errors import UserError
from tests.extract.checkpoints import settings
from tests.fixtures import config


class Recorder:
    """Stands in for the model; keeps what it is asked to draw."""

    def repose(self, *pictures: np.ndarray, **further: Any) -> Image.Image:
        self.pictures, self.further = pictures, further
        return Image.fromarray(pictures[1])


@pytest.mark.parametrize("control", ["fill", "depth"])
def test_what_is_left_out_is_found(tmp_path: Path, control: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (50 + i, 70, 3), dtype=np.uint8) for i in range(2)]
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray(image).save(path)
    known = settings("sam2", "grounding_dino", "depth_anything")
    recorder = Recorder()
    monkeypatch.setattr(generate, "_load", lambda *_: recorder)
    monkeypatch.setattr(configs, "check_inputs", lambda *_: None)
    chosen = config(tmp_path, conditioning__control=control)
    argv = ["--config", "x", "--subject", str(paths[0]), "--target", str(paths[1]), "--out", str(tmp_path / "out.png")]
    real = configs.parse_command

    def parse(argv: list[str], *rest: Any) -> Any:
        monkeypatch.setattr(configs, "load", lambda *_: given)
        return real(argv, *rest)

    monkeypatch.setattr(configs, "parse_command", parse)
    given = chosen
    with pytest.raises(UserError, match="missing --subject_mask, --target_mask"):
        generate.main(argv)
    given = dataclasses.replace(chosen, extract=known)
    generate.main(argv)
    for found, image in zip(
        recorder.pictures, [*images, *(extract.mask(i, "a bird.", known) for i in images)], strict=True
    ):
        np.testing.assert_array_equal(found, image)
    depth = recorder.further["target_depth"]
    if control == "fill":
        assert depth is None
    else:
        np.testing.assert_array_equal(depth, extract.depth(images[1], known))
    assert (tmp_path / "out.png").is_file()
