"""Makes docs/images/plate.png: five related species of the embedded world in one pose, with arrows to what differs.

python -m scripts.toy_plate --world data/toybirds/nabirds --adapter asset:toy-omk-fill

The species are the subject of a benchmark's pair and the nearest ones of its family; the command that is run is
`generate --plate`. The world knows every right answer: printed is the normalised identity of each bird (1: the right
answer, 0: as wrong as another species of the family), and an arrow points to where its right answer differs most from
the others'.
"""

import argparse
import csv
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from nabla_jax import generate, one_target, plates, runs
from nabla_jax.data import Dataset, controls, read_dataset
from nabla_jax.data.pairs import benchmark_pairs
from nabla_jax.images import read_rgb
from nabla_jax.metrics import identity, oracle, retrieval


def related(dataset: Dataset, subject_id: str, count: int) -> list[str]:
    """The subject and the first pictures with a mask of other species, the nearest in the taxonomy first."""
    subject = dataset.by_id[subject_id]
    leaves = retrieval.leaves(dataset)
    near = set(retrieval.siblings(leaves, subject))
    chosen = {subject.species: subject.id}
    for leaf in sorted(leaves, key=lambda leaf: (leaf.class_id not in near, leaf.class_id)):
        pictures = [dataset.examples[i] for i in dataset.classes[leaf.class_id]]
        masked = sorted(e.id for e in pictures if e.mask is not None and e.split == subject.split)
        if masked and leaf.species not in chosen and len(chosen) < count:
            chosen[leaf.species] = masked[0]
    return list(chosen.values())


def write_list(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=Path("data/toybirds/nabirds"))
    parser.add_argument("--config", default="configs/omk_fill.py:toy")
    parser.add_argument("--adapter", default="asset:toy-omk-fill")
    parser.add_argument("--pair", type=int, default=0, help="of the world's benchmark")
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/toy_plate"))
    parser.add_argument("--picture", type=Path, help="where to copy the plate")
    args = parser.parse_args(argv)
    dataset = read_dataset(args.world)
    pair = benchmark_pairs(args.world, dataset)[args.pair]
    birds = [dataset.by_id[name] for name in related(dataset, pair.subject_id, args.count)]
    target = dataset.by_id[pair.target_id]
    mask = controls.read_view(target, "fill").mask

    world = oracle.open_oracle(args.world)
    assert world is not None
    answers = [oracle.ask(world, bird.id, target.id, mask) for bird in birds]
    args.out.mkdir(parents=True, exist_ok=True)
    listed = [
        (bird.species, copied(bird.image, args.out / "photos"), copied(bird.mask, args.out / "masks")) for bird in birds
    ]
    places = [
        (bird.species, *place, "") for bird, place in zip(birds, marks([a for a, _ in answers], mask), strict=True)
    ]
    words = ["--plate", write_list(args.out / "birds.csv", (*plates.BIRDS, "mask"), listed)]
    words += ["--arrows", write_list(args.out / "arrows.csv", plates.ARROWS, places)]
    words += ["--target", target.image, "--target_mask", target.mask, "--out", args.out, "--adapter", args.adapter]
    generate.main(["--config", args.config, *map(str, words)])

    rows = runs.read_rows(args.out / one_target.MANIFEST)
    for row, (_, answer) in zip(rows, answers, strict=True):
        errors = identity.identity_errors(read_rgb(args.out / row["file"])[mask], answer)
        assert errors is not None
        found = identity.normalised_identity([errors.right], [errors.sibling])
        print(f"{row['label']:28s} normalised identity {found:5.2f}   rank of its species among ten: {errors.rank}")
    if args.picture is not None:
        shutil.copyfile(args.out / one_target.PLATE, args.picture)


def copied(file: Path | None, folder: Path) -> str:
    """Copies a file; its path below the folder's own, as a list beside it has it."""
    if file is None:
        return ""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(file, folder / file.name)
    return f"{folder.name}/{file.name}"


def marks(answers: Sequence[np.ndarray], mask: np.ndarray) -> list[tuple[int, int]]:
    """(row, column) per picture [H, W, 3] where it differs most from the others, inside the mask, over 5 x 5 pixels."""
    values = np.stack(answers).astype(float)
    found = []
    for own in values:
        apart = np.sort(np.abs(values - own).sum(-1), axis=0)[1:].mean(0) * mask
        padded = np.pad(apart, 2)
        blurred = sum(padded[i : i + mask.shape[0], j : j + mask.shape[1]] for i in range(5) for j in range(5))
        row, column = np.unravel_index(np.argmax(blurred * mask), mask.shape)
        found.append((int(row), int(column)))
    return found


if __name__ == "__main__":
    runs.run_main(main)
