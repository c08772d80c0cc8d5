"""The web app without a browser: masks as they are painted, uploads, settings, adapters, manifests."""

import hashlib
import json
import re
import socket
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nabla_jax import api, images, plates
from nabla_jax.app import __main__ as command
from nabla_jax.app import work
from nabla_jax.checkpoints import adapters
from nabla_jax.config import Extract
from nabla_jax.errors import UserError
from tests import fixtures


def photo(height: int, width: int, seed: int = 0, masked: bool = True) -> work.Photo:
    pixels, mask = fixtures.oval_picture(height, width, seed)
    return work.Photo(f"{seed}.png", pixels, mask if masked else None)


def bomb(path: Path, side: int) -> Path:
    """A PNG of side x side grey pixels, all zero, that takes a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    squeezer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    rows = b"".join(squeezer.compress(row) for _ in range(side)) + squeezer.flush()
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


# ------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("size", [(48, 48), (48, 37), (31, 200), (1000, 700), (1, 5), (513, 512)])
def test_a_loaded_mask_comes_back_from_the_editor_bit_for_bit(size: tuple[int, int]) -> None:
    shown = photo(*size)
    shown.mask[0, 0] = True
    np.testing.assert_array_equal(work.painted_mask(shown, work.editor_value(shown)), shown.mask)


def test_what_is_painted_lies_on_the_picture_where_it_was_painted() -> None:
    shown = photo(60, 120, masked=False)
    value = work.editor_value(shown)
    # 120 columns fill the square of 512 pixels; 60 rows are its middle half.
    assert (value["background"][:127] == value["background"][0, 0]).all()
    layer = value["layers"][0]
    layer[128 : 128 + 128, 256:] = (255, 0, 0, 128)  # the upper half of the picture, on the right
    layer[:100] = 255  # beside the picture
    expected = np.zeros((60, 120), bool)
    expected[:30, 60:] = True
    np.testing.assert_array_equal(work.painted_mask(shown, value), expected)


def test_a_correction_changes_a_fine_mask_only_where_it_was_painted() -> None:
    shown = photo(2048, 2048)
    shown.mask[:] = np.indices((2048, 2048)).sum(0) % 2  # finer than the editor's pixels
    value = work.editor_value(shown)
    value["layers"][0][128:256, 128:256] = 0  # erased
    found = work.painted_mask(shown, value)
    outside = np.ones_like(found)
    outside[512:1024, 512:1024] = False
    np.testing.assert_array_equal(found[outside], shown.mask[outside])


def test_nothing_painted_is_no_mask() -> None:
    shown = photo(40, 40, masked=False)
    for editor in (None, work.editor_value(shown)):
        with pytest.raises(UserError, match=r"^0\.png: there is no mask; paint the bird, or load its mask$"):
            work.painted_mask(shown, editor)
    with pytest.raises(UserError, match="the editor's paint"):
        work.painted_mask(shown, {"layers": [np.zeros((4, 4, 4), np.uint8)]})


# ----------------------------------------------------------------------------------------------------- uploads


def test_a_photo_and_its_mask_are_read_upright_and_named_without_their_folder(tmp_path: Path) -> None:
    pixels, mask = fixtures.picture(20, 30, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise makes it upright
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(np.rot90(mask, -1)).save(tmp_path / "m.png")
    found = work.read_photo(str(tmp_path / "a.png"), tmp_path, 1)
    np.testing.assert_array_equal(found.pixels, np.rot90(pixels, -1))
    assert found.name == "a.png"
    masked = work.read_mask(found, str(tmp_path / "m.png"), tmp_path, 1)
    np.testing.assert_array_equal(masked.mask, np.rot90(mask, -1))
    Image.fromarray(mask).save(tmp_path / "turned.png")
    with pytest.raises(UserError, match=r"^turned\.png: mask is 20x30 \(height x width\), expected 30x20"):
        work.read_mask(found, str(tmp_path / "turned.png"), tmp_path, 1)
    with pytest.raises(UserError, match="choose its photo first"):
        work.read_mask(None, str(tmp_path / "m.png"), tmp_path, 1)


def test_bad_uploads_are_one_line_that_names_the_file_alone(tmp_path: Path) -> None:
    inside = tmp_path / "uploads"
    inside.mkdir()
    pixels, _ = fixtures.picture(300, 300, 0)
    Image.fromarray(pixels).save(inside / "large.png")
    Image.fromarray(pixels).save(tmp_path / "outside.png")
    (inside / "link.png").symlink_to(tmp_path / "outside.png")
    (inside / "text.png").write_text("no picture")
    Image.fromarray(pixels[:50]).save(inside / "other.png", format="TGA")
    (inside / "cut.png").write_bytes((inside / "large.png").read_bytes()[:5000])
    (inside / "folder.png").mkdir()
    for name, expected in (
        (bomb(inside / "bomb.png", 20_000), "limit"),
        (bomb(inside / "less.png", 10_000), "found 10000x10000 pixels, expected 1 to 80,000,000"),
        (inside / "large.png", "found 0.3 MB, expected at most 0.2 MB"),
        (inside / ".." / "outside.png", "no uploaded file"),
        (inside / "link.png", "no uploaded file"),
        (inside / "folder.png", "no uploaded file"),
        (inside / "none.png", "no uploaded file"),
        (Path("/etc/passwd"), "no uploaded file"),
        (inside / "text.png", "not a picture in a known format"),
        (inside / "other.png", "not a picture in a known format"),
        (inside / "cut.png", "truncated or damaged picture"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(name.name)}: .*{re.escape(expected)}") as caught:
            work.read_photo(str(name), inside, 0.2)
        assert "\n" not in str(caught.value) and str(tmp_path) not in str(caught.value)
    assert (inside / "bomb.png").stat().st_size < 60_000


# ---------------------------------------------------------------------------------------------- what is drawn


class Recorder:
    """In the place of ``api.Reposer``: draws the subject's mean colour and keeps what it was called with."""

    conditioning = api.Conditioning(size=32)
    defaults = api.Sample()
    adapter_path = Path("a.safetensors")
    adapter_sha256 = base_sha256 = "0" * 64
    base_path = Path("base")

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def repose(self, subject, target, subject_mask, target_mask, *, steps, on_step, **further):  # type: ignore[no-untyped-def]
        self.calls.append((subject, target, subject_mask, target_mask, {"steps": steps, **further}))
        for step in range(steps):
            on_step(step + 1)
        return Image.fromarray(np.broadcast_to(subject.mean((0, 1)).astype(np.uint8), target.shape).copy())


def sha256(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def test_the_manifest_says_what_the_picture_was_made_of(tmp_path: Path) -> None:
    reposer, subject, target = Recorder(), photo(40, 50, 0), photo(30, 20, 1)
    said: list[int] = []
    place = work.place(reposer, target, target.mask, None, None, "", Extract())  # type: ignore[arg-type]
    settings = work.Settings(7, 3)
    made = work.repose(reposer, subject, subject.mask, place, settings, said.append)  # type: ignore[arg-type]
    assert made.pixels.shape == (30, 20, 3) and said == [1, 2, 3]
    *pictures, options = reposer.calls[0]
    for found, expected in zip(pictures, (subject.pixels, target.pixels, subject.mask, target.mask), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert (options["seed"], options["steps"]) == (7, 3)
    picture, everything = work.save(made, tmp_path / "out", "repose")
    np.testing.assert_array_equal(images.read_rgb(picture), made.pixels)
    with zipfile.ZipFile(everything) as archive:
        archive.extractall(tmp_path / "all")
    names = ["repose.json", "repose.png", "subject_mask.png", "target_mask.png"]
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == names
    for name, shown in (("subject", subject), ("target", target)):
        np.testing.assert_array_equal(images.read_mask(tmp_path / "all" / f"{name}_mask.png"), shown.mask)
    assert (tmp_path / "all" / "repose.png").read_bytes() == picture.read_bytes()
    read = json.loads((tmp_path / "all" / "repose.json").read_text())
    assert read["sha256"] == hashlib.sha256(picture.read_bytes()).hexdigest()
    for name, shown in (("subject", subject), ("target", target)):
        assert read[name] == {
            "name": shown.name,
            "pixels_sha256": sha256(shown.pixels),
            "mask_sha256": sha256(shown.mask * np.uint8(255)),
        }
    assert (read["seed"], read["steps"], read["control"], read["adapter"]) == (7, 3, "fill", "a.safetensors")


def test_a_plate_is_that_of_plates_with_one_row_for_each_bird() -> None:
    reposer, target = Recorder(), photo(30, 20, 9)
    place = work.Place(target, target.mask)
    birds = [work.Bird(f"bird {n}", photo(40, 40, n), photo(40, 40, n).mask) for n in range(3)]
    said: list[int] = []
    made = work.plate(reposer, birds, place, None, work.Settings(1, 2), said.append)  # type: ignore[arg-type]
    drawn = [
        plates.Drawn(
            b.label, b.photo.pixels, np.broadcast_to(b.photo.pixels.mean((0, 1)).astype(np.uint8), (30, 20, 3))
        )
        for b in birds
    ]
    np.testing.assert_array_equal(made.pixels, plates.compose(drawn, [], target.pixels, target.mask))
    assert said == [1, 2, 3, 4, 5, 6]
    assert [row["label"] for row in made.manifest["birds"]] == [b.label for b in birds]
    for row, each in zip(made.manifest["birds"], drawn, strict=True):
        np.testing.assert_array_equal(made.files[Path(row["file"]).stem], each.result)
    assert len({call[4]["seed"] for call in reposer.calls}) == 1


def test_birds_of_a_plate_have_labels_of_their_own() -> None:
    shown = photo(20, 20)
    for labels, expected in (
        ([], "found 0 birds"),
        (["a"] * 21, "found 21 birds"),
        (["a", "a"], "found 'a' twice"),
        (["a", " "], "expected 1 to 80 characters"),
        (["*"], "found '\\*' twice or for every bird"),
    ):
        with pytest.raises(UserError, match=expected):
            work.check_birds([work.Bird(label, shown, shown.mask) for label in labels])


@pytest.mark.parametrize(
    ("seed", "steps", "said"),
    [
        (-1, 5, "seed: found -1"),
        (2**32, 5, "seed"),
        (1.5, 5, "seed"),
        (None, 5, "seed"),
        (1, 0, "steps"),
        (1, 101, "steps"),
    ],
)
def test_settings_out_of_range(seed: object, steps: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        work.Settings(seed, steps)  # type: ignore[arg-type]


def test_a_control_without_its_file_says_what_is_missing() -> None:
    reposer, target = Recorder(), photo(30, 20)
    for control, expected in (("depth", "extract.depth_anything"), ("keypoints", "extract.")):
        reposer.conditioning = api.Conditioning(size=32, control=control)
        with pytest.raises(UserError, match=expected):
            work.place(reposer, target, target.mask, None, None, "", Extract())  # type: ignore[arg-type]


def test_examples_are_there_whole_and_known_to_the_adapter() -> None:
    for number in range(len(work.example_files())):
        for shown in work.example(number):
            assert shown.mask is not None and shown.mask.any() and shown.mask.shape == shown.pixels.shape[:2]
    birds, target = work.example_plate()
    assert len(birds) == 5 and target.mask is not None
    work.check_birds(birds)


# ---------------------------------------------------------------------------------------------------- adapters


def test_adapters_are_found_by_control_and_loaded_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = fixtures.prepared_root() / "base"
    names = []
    for name, control in (("one", "fill"), ("two", "depth"), ("three", "fill")):
        metadata = adapters.AdapterMetadata(rank=2, alpha=2.0, size=32, control=control)
        names.append(str(fixtures.write_adapter(tmp_path / f"{name}.safetensors", base, metadata)))
    studio = work.Studio(None, work.read_adapters(names, None))
    assert studio.controls() == ["depth", "fill"]
    assert (studio.names("fill"), studio.names("depth")) == (["one", "three"], ["two"])
    loaded: list[Path] = []
    monkeypatch.setattr(
        work.nabla_jax, "load", lambda adapter, conditioning: loaded.append(adapter) or Recorder(), raising=False
    )
    assert studio.reposer("one") is studio.reposer("one")
    studio.reposer("three")
    assert [path.stem for path in loaded] == ["one", "three"]
    with pytest.raises(UserError, match="adapter: found 'four', expected one of one, two, three"):
        studio.reposer("four")
    with pytest.raises(UserError, match="twice"):
        work.read_adapters([names[0], names[0], names[0]], None)


# ----------------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "0"], "--port: found 0, expected 1 to 65535"),
        (["--max_upload_mb", "0"], "--max_upload_mb: found 0"),
        (["--config", "none.py"], "none.py"),
        (["--config", "configs/omk_fill.py:toy"], "--adapter: found none"),
        (["--config", "configs/omk_fill.py"], "generate is missing"),
        (["--host", "no.such.host.invalid"], "--host: found 'no.such.host.invalid'"),
    ],
)
def test_settings_are_checked_before_anything_loads(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "nabla_jax.app.page", None)  # importing it would fail
    with pytest.raises(UserError, match=f"^.*{re.escape(said)}") as caught:
        command.main(words)
    assert "\n" not in str(caught.value)


def test_a_port_in_use_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="cannot be listened on"):
            command.check_address("127.0.0.1", taken.getsockname()[1])


def test_an_address_that_others_reach_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command.check_address("127.0.0.1", port)
    assert capsys.readouterr().out == ""
    command.check_address("0.0.0.0", port)
    assert "no password" in capsys.readouterr().out


def test_without_gradio_the_command_says_how_to_get_it() -> None:
    code = "import sys; sys.modules['gradio'] = None\n"
    code += "from nabla_jax import runs; from nabla_jax.app.__main__ import main; runs.run_main(main, [])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "the app needs gradio, which is not installed: pip install 'nabla_jax[app]'\n"
