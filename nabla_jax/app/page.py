"""The app's page (Gradio): its parts, and what happens when they are used. Everything else is in ``work``."""

from __future__ import annotations

import functools
import html
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nabla_jax import api, images
from nabla_jax.app import work
from nabla_jax.errors import UserError

# Read when gradio is imported: nothing is told to anyone, and no newer version asked for.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
import gradio as gr
import PIL.Image

TYPES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp"]  # of images.FORMATS
QUEUE = 20  # jobs that wait; the next one is refused
TITLE = "Re-pose a bird"
_PROGRESS = gr.Progress()  # gradio looks for it among the defaults
INTRODUCTION = """# Re-pose a bird
The bird of the first photo, drawn in the pose and place of the second. Choose both photos, paint each bird (or load its
mask), and draw. What comes out is drawn by a model and is no photograph.
"""
CSS = """
#result img, #plate img { width: 100%; height: 100%; object-fit: contain; }
footer { display: none !important; }
"""


def serve(studio: work.Studio, host: str, port: int, megabytes: float) -> None:
    """Shows the page until it is interrupted. Raises UserError if nothing can listen at ``host`` and ``port``."""
    # Gradio's own readers meet what the page's editors send: no larger than ours take.
    PIL.Image.MAX_IMAGE_PIXELS = images.MAX_PIXELS // 2
    with tempfile.TemporaryDirectory(prefix="nabla_jax-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(studio, Path(folder), megabytes)
        page.queue(max_size=QUEUE, api_open=False)
        try:
            page.launch(
                server_name=host,
                server_port=port,
                max_file_size=int(megabytes * 1e6),
                allowed_paths=[str(path.parent) for path in work.example_files()[0].values()][:1],
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
                css=CSS,
                share=False,
                ssr_mode=False,
                footer_links=[],
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise UserError(f"--host {host} --port {port}: cannot be listened on: {error}") from error
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        page.block_thread()


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` whose UserError is one line in the page."""

    @functools.wraps(function)
    def wrapped(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except UserError as error:
            # An uploaded file is named without its folder, which is no one's business.
            line = re.sub(rf"{re.escape(os.environ['GRADIO_TEMP_DIR'])}/\w+/", "", " ".join(str(error).split()))
            raise gr.Error(html.escape(line), print_exception=False) from None

    return wrapped


class Picker:
    """A photo and its mask: buttons to choose them, and an editor to paint in.

    ``photo`` holds a ``work.Photo`` or None, ``editor`` what is painted.
    """

    def __init__(self, name: str, what: str, studio: work.Studio, folder: Path, megabytes: float) -> None:
        with gr.Column(min_width=280):
            self.photo = gr.State(None)
            self.editor = gr.ImageEditor(
                label=what,
                elem_id=name,
                type="numpy",
                format="png",
                image_mode="RGBA",
                sources=(),
                transforms=(),
                layers=False,
                brush=gr.Brush(colors=[(f"#{bytes(work.PAINT).hex()}", 0.5)], color_mode="fixed", default_size=24),
                eraser=gr.Eraser(default_size=24),
                canvas_size=(work.EDITOR, work.EDITOR),
                fixed_canvas=True,
                height=420,
                placeholder="Choose a photo below",
            )
            with gr.Row():
                choose = gr.UploadButton("Choose photo", file_types=TYPES, elem_id=f"{name}-photo", size="sm")
                load = gr.UploadButton("Load mask", file_types=TYPES, elem_id=f"{name}-mask", size="sm")
                find = gr.Button("Find the bird", visible=work.can_find(studio.extract), size="sm")
        shown = [self.photo, self.editor]

        def show(photo: work.Photo) -> tuple[work.Photo, Any]:
            return photo, work.editor_value(photo)

        choose.upload(told(lambda path: show(work.read_photo(path, folder, megabytes))), choose, shown, **_quiet())
        load.upload(
            told(lambda photo, path: show(work.read_mask(photo, path, folder, megabytes))),
            [self.photo, load],
            shown,
            **_quiet(),
        )
        find.click(told(lambda photo: show(work.found_mask(photo, studio.extract))), self.photo, shown, **_quiet())


class Options:
    """How it is drawn: control, adapter, seed, steps, and the files that some controls take."""

    def __init__(self, name: str, studio: work.Studio) -> None:
        controls = studio.controls()
        first = next(iter(studio.adapters))
        chosen = studio.adapters[first].conditioning.control
        with gr.Row():
            control = gr.Dropdown(controls, value=chosen, label="Control", elem_id=f"{name}-control")
            adapter = gr.Dropdown(studio.names(chosen), value=first, label="Adapter", elem_id=f"{name}-adapter")
            defaults = studio.reposer(first).defaults
            seed = gr.Number(defaults.seed, label="Seed", precision=0, elem_id=f"{name}-seed")
            steps = gr.Slider(
                1, work.MAX_STEPS, value=min(defaults.steps, work.MAX_STEPS), step=1, label="Steps",
                elem_id=f"{name}-steps",
            )  # fmt: skip
        captioned = any(choice.conditioning.caption == "background" for choice in studio.adapters.values())
        with gr.Row(visible=controls != ["fill"] or captioned):
            depth = gr.File(
                label="Depth map of the target (grey, near is bright)", file_types=TYPES, visible="depth" in controls
            )
            keypoints = gr.File(label="Keypoints of the target (part x y visible)", visible="keypoints" in controls)
            caption = gr.Textbox(label="What is round the target's bird", visible=captioned, max_length=500)
        self.inputs = [adapter, seed, steps, depth, keypoints, caption]

        def choices(control: str) -> Any:
            names = studio.names(control)
            return gr.Dropdown(names, value=next(iter(names), None))

        control.change(choices, control, adapter, **_quiet())


def build(studio: work.Studio, folder: Path, megabytes: float) -> gr.Blocks:
    """The page. Uploads lie below ``folder``, results too."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Tab("Re-pose"):
            _repose_tab(studio, folder, megabytes)
        with gr.Tab("Compare"):
            _compare_tab(studio, folder, megabytes)
    return page


def _repose_tab(studio: work.Studio, folder: Path, megabytes: float) -> None:
    with gr.Row():
        subject = Picker("subject", "Subject: whose bird", studio, folder, megabytes)
        target = Picker("target", "Target: which pose and place", studio, folder, megabytes)
        with gr.Column(min_width=280):
            result = _picture("result", "Drawn by the model")
            downloads = _downloads("result")
    options = Options("repose", studio)
    draw = gr.Button("Draw", variant="primary", elem_id="draw")
    files = work.example_files()
    examples = gr.Dataset(
        label="Examples",
        components=[gr.Image(visible=False, type="filepath"), gr.Image(visible=False, type="filepath")],
        headers=["Subject", "Target"],
        samples=[[str(row["subject"]), str(row["target"])] for row in files],
        type="index",
        elem_id="examples",
    )

    def show(number: int) -> tuple[Any, ...]:
        one, other = work.example(number)
        return one, work.editor_value(one), other, work.editor_value(other)

    examples.click(told(show), examples, [subject.photo, subject.editor, target.photo, target.editor], **_quiet())

    @told
    def run(
        one: Any, painted: Any, other: Any, painted_too: Any, name: Any, seed: Any, steps: Any, depth: Any,
        keypoints: Any, caption: Any, progress: Any = _PROGRESS,
    ) -> tuple[str, str, str]:  # fmt: skip
        mask, settings = _mask(one, painted, "subject"), work.Settings(seed, steps)
        place, reposer = _target(studio, folder, megabytes, other, painted_too, name, depth, keypoints, caption)
        return _saved(work.repose(reposer, one, mask, place, settings, _bar(progress, steps)), folder, "repose")

    inputs = [subject.photo, subject.editor, target.photo, target.editor, *options.inputs]
    draw.click(run, inputs, [result, *downloads], **_one_at_a_time())


def _compare_tab(studio: work.Studio, folder: Path, megabytes: float) -> None:
    gr.Markdown("Several birds in one pose and place, side by side on one labelled page: add each with its mask.")
    birds = gr.State([])
    with gr.Row():
        with gr.Column(min_width=280):
            bird = Picker("bird", "Bird to add", studio, folder, megabytes)
            label = gr.Textbox(label="Label", max_length=work.LABEL, elem_id="label")
            add = gr.Button("Add to the plate", elem_id="add")
        target = Picker("plate-target", "Target: which pose and place", studio, folder, megabytes)
    listed = gr.Gallery(
        label="On the plate", columns=5, height=270, interactive=False, elem_id="birds", object_fit="contain",
        format="png", buttons=[],
    )  # fmt: skip
    with gr.Row():
        clear = gr.Button("Empty the plate", elem_id="clear", size="sm")
        example = gr.Button("An example of five birds", elem_id="example-plate", size="sm")
    arrows = gr.File(label="Arrows (CSV: label, row, column, text), may be left out", file_types=[".csv"], height=150)
    options = Options("compare", studio)
    draw = gr.Button("Draw the plate", variant="primary", elem_id="draw-plate")
    result = _picture("plate", "Drawn by the model")
    downloads = _downloads("plate")

    def shown(birds: list[work.Bird]) -> list[tuple[Any, str]]:
        return [(bird.photo.pixels, bird.label) for bird in birds]

    def append(birds: list[work.Bird], photo: Any, painted: Any, label: str) -> tuple[Any, ...]:
        added = [*birds, work.Bird(label.strip(), photo, _mask(photo, painted, "bird to add"))]
        work.check_birds(added)
        return added, shown(added), ""

    add.click(told(append), [birds, bird.photo, bird.editor, label], [birds, listed, label], **_quiet())
    clear.click(lambda: ([], []), None, [birds, listed], **_quiet())

    def show() -> tuple[Any, ...]:
        found, place = work.example_plate()
        return found, shown(found), place, work.editor_value(place)

    example.click(told(show), None, [birds, listed, target.photo, target.editor], **_quiet())

    @told
    def run(
        birds: Any, other: Any, painted: Any, marks: Any, name: Any, seed: Any, steps: Any, depth: Any,
        keypoints: Any, caption: Any, progress: Any = _PROGRESS,
    ) -> tuple[str, str, str]:  # fmt: skip
        work.check_birds(birds)
        settings, list_of_marks = work.Settings(seed, steps), _file(marks, folder, megabytes)
        place, reposer = _target(studio, folder, megabytes, other, painted, name, depth, keypoints, caption)
        bar = _bar(progress, len(birds) * settings.steps)
        return _saved(work.plate(reposer, birds, place, list_of_marks, settings, bar), folder, "plate")

    inputs = [birds, target.photo, target.editor, arrows, *options.inputs]
    draw.click(run, inputs, [result, *downloads], **_one_at_a_time())


# ----------------------------------------------------------------------------------------------------------
# What both tabs share
# ----------------------------------------------------------------------------------------------------------


def _quiet() -> dict[str, Any]:
    return {"api_visibility": "private", "show_progress": "hidden"}


def _one_at_a_time() -> dict[str, Any]:
    """Whatever samples waits in one queue."""
    return {"api_visibility": "private", "concurrency_id": "draw", "concurrency_limit": 1, "trigger_mode": "once"}


def _picture(name: str, label: str) -> gr.Image:
    return gr.Image(
        label=label, elem_id=name, format="png", type="filepath", interactive=False, height=420, buttons=["fullscreen"]
    )


def _downloads(name: str) -> list[gr.DownloadButton]:
    with gr.Row():
        return [
            gr.DownloadButton("Download picture", elem_id=f"{name}-picture", size="sm"),
            gr.DownloadButton("With manifest and masks", elem_id=f"{name}-everything", size="sm"),
        ]


def _mask(photo: work.Photo | None, painted: Any, what: str) -> Any:
    """[H, W] bool. Raises UserError where photo or mask is missing."""
    if photo is None:
        raise UserError(f"{what}: there is no photo, choose one")
    return work.painted_mask(photo, painted)


def _target(
    studio: work.Studio, folder: Path, megabytes: float, photo: Any, painted: Any, name: str, depth: Any,
    keypoints: Any, caption: str,
) -> tuple[work.Place, api.Reposer]:  # fmt: skip
    mask = _mask(photo, painted, "target")
    reposer = studio.reposer(name)
    grey = None if depth is None else images.check_upload(depth, folder, megabytes)
    points = _file(keypoints, folder, megabytes)
    return work.place(reposer, photo, mask, grey, points, caption or "", studio.extract), reposer


def _file(value: str | None, folder: Path, megabytes: float) -> Path | None:
    return None if value is None else images.check_file(value, folder, megabytes)


def _bar(progress: Any, total: int) -> work.OnStep:
    progress(0, desc="Preparing")
    return lambda step: progress((step, total), desc="Drawing", unit="steps")


def _saved(made: work.Made, folder: Path, name: str) -> tuple[str, str, str]:
    """The picture to show, and both files to download, in a folder of their own."""
    picture, everything = work.save(made, Path(tempfile.mkdtemp(dir=folder)), name)
    return str(picture), str(picture), str(everything)
