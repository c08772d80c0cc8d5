"""Makes docs/images/repose.png with the shipped adapter: subject, control, target's place, result, right answer.

python scripts/readme_picture.py --world data/toybirds/nabirds --adapter asset:toy-omk-fill
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import nabla_jax
from nabla_jax.data import controls, pairs, read_dataset
from nabla_jax.images import write_image
from nabla_jax.metrics.oracle import open_oracle

CELL = 176
GAP = 6


def cell(picture: np.ndarray) -> np.ndarray:
    """The picture, enlarged to fit a white square cell."""
    image = Image.fromarray(picture)
    factor = CELL / max(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (CELL, CELL), "white")
    canvas.paste(image, ((CELL - image.width) // 2, (CELL - image.height) // 2))
    return np.asarray(canvas)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", default="data/toybirds/nabirds")
    parser.add_argument("--adapter", default="asset:toy-omk-fill")
    parser.add_argument("--out", default="docs/images/repose.png")
    parser.add_argument("--pairs", type=int, nargs="+", default=[0, 4, 8, 12])
    args = parser.parse_args()
    dataset = read_dataset(Path(args.world))
    listed = pairs.benchmark_pairs(Path(args.world), dataset)
    oracle = open_oracle(Path(args.world))
    birds = nabla_jax.load("asset:toy-flux-kontext", args.adapter)
    columns = []
    for number in args.pairs:
        pair = listed[number]
        subject, target = dataset.by_id[pair.subject_id], dataset.by_id[pair.target_id]
        shown, place = (controls.read_view(example, "fill") for example in (subject, target))
        result = np.asarray(birds.repose(shown.image, place.image, shown.mask, place.mask, key=pair.key))
        right = oracle.right(pair.subject_id, pair.target_id)
        hidden = controls.CONTROLS["fill"].draw(place, birds.conditioning)
        cells = [cell(p) for p in (shown.image, hidden, result, right)]
        columns.append(np.concatenate([np.pad(c, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for c in cells]))
    write_image(np.concatenate(columns, axis=1), Path(args.out))


if __name__ == "__main__":
    main()
