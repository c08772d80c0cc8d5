"""The page on which pairs are judged: static files that open from disk, pictures and all."""

from __future__ import annotations

import importlib.resources
import json
import string
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nabla_jax import runs
from nabla_jax.conditioning.geometry import Box
from nabla_jax.curation.proposals import ClassProposals
from nabla_jax.data.dataset import Dataset, Example
from nabla_jax.report.gallery import credits_of
from nabla_jax.report.thumbnails import Thumbnail, write_missing

FOLDER = "review_files"
"""Below a review's folder: the page's scripts and its pictures."""


def write(
    out: Path,
    dataset: Dataset,
    examples: Sequence[Example],
    classes: Sequence[ClassProposals],
    boxes: Mapping[str, Box],
    key: str,
    side: int,
    workers: int,
) -> Path:
    """Writes ``out/index.html`` and ``out/review_files``; returns the page's path.

    Args:
      dataset: where ``examples`` are from.
      examples: what positions of ``classes`` mean.
      classes: with their pairs.
      boxes: id of each proposed example -> the part of its picture that is shown.
      key: what the browser keeps the verdicts by.
      side: of pictures, in pixels, at most.
      workers: threads that make the pictures; those that are there already are kept.

    Raises UserError for a picture that cannot be read, and when ``out`` cannot be written.
    """
    thumbnails = {
        p: Thumbnail("picture", (examples[p].image,), boxes[examples[p].id], side)
        for c in classes
        for pair in c.pairs
        for p in (pair.first, pair.second)
    }
    pictures = out / FOLDER / "pictures"
    write_missing(thumbnails.values(), pictures, workers)
    names = {t.name for t in thumbnails.values()}
    with runs.writing(pictures):
        for path in pictures.glob("*.webp"):  # of an earlier proposal
            if path.name not in names:
                path.unlink()
    found = _data(dataset, examples, classes, {p: t.name for p, t in thumbnails.items()}, key)
    text = json.dumps(found, separators=(",", ":"), allow_nan=False)
    runs.write_atomic(out / FOLDER / "pairs.js", f"nablaReview({text});\n")
    runs.write_atomic(out / FOLDER / "review.js", _asset("curation", "review.js") + "\n")
    title = f"Look-alikes of {dataset.name}"
    lead = f"{len(found['pairs']):,} pairs of {len(found['classes']):,} classes, proposed by how alike they look."
    page = string.Template(_asset("curation", "page.html")).substitute(
        title=escape(title),
        lead=escape(lead),
        folder=FOLDER,
        # The scale of differences is of the report alone.
        style=_asset("report", "style.css").replace("$ramp", "none, none") + "\n" + _asset("curation", "review.css"),
    )
    runs.write_atomic(out / "index.html", page)
    return out / "index.html"


def _data(
    dataset: Dataset,
    examples: Sequence[Example],
    classes: Sequence[ClassProposals],
    files: Mapping[int, str],
    key: str,
) -> dict[str, Any]:
    """What the script must know; see ``review.js``."""
    credits = credits_of([examples[p] for p in files], dataset.root)
    numbers = {p: i for i, p in enumerate(files)}
    groups: list[dict[str, Any]] = []
    pairs: list[list[float]] = []
    for c in (c for c in classes if c.pairs):
        any_of = examples[c.pairs[0].first]
        groups.append(
            {
                "id": f"{c.class_id:04d}",
                "name": any_of.class_name,
                "path": " › ".join(any_of.taxonomy[:-1]),
                "varied": c.varied,
                "spread": round(c.spread, 4),
                "start": len(pairs),
                "pairs": len(c.pairs),
            }
        )
        pairs += [[len(groups) - 1, numbers[p.first], numbers[p.second], round(p.distance, 4)] for p in c.pairs]
    shown = [
        {
            "file": file,
            "image": examples[p].image.relative_to(dataset.root).as_posix(),
            "credit": credits[examples[p].id],
            "individual": examples[p].individual or "",
        }
        for p, file in files.items()
    ]
    return {
        "dataset": dataset.name,
        "key": key,
        "folder": f"{FOLDER}/pictures",
        "classes": groups,
        "pictures": shown,
        "pairs": pairs,
    }


def _asset(folder: str, name: str) -> str:
    return importlib.resources.files(f"nabla_jax.{folder}").joinpath(name).read_text(encoding="utf-8").strip()
