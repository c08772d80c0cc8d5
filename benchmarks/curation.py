"""How alike the proposed pairs are: ``python -m benchmarks.curation --world data/toybirds``.

The embedded world knows every individual's colours and marks. For leaf classes (a species' plumages apart) and for the
same pictures labelled by species alone, prints the mean distance between the two identities of a proposed pair as a
share of that of a random pair of the class, for several weights of colours, and the share that perfect knowledge of
the identities reaches with as many pairs of the same pictures.
"""

import argparse
import csv
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nabla_jax.curation import review
from nabla_jax.data import read_dataset
from nabla_jax.data.dataset import Dataset
from nabla_jax.toybirds.oracle import Oracle
from nabla_jax.toybirds.world import plumage_vector

WEIGHTS = (0.0, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class Shares:
    """Mean distances as shares of that of random pairs of the same classes."""

    classes: int
    pairs: int
    proposed: float
    perfect: float


def label_by_species(dataset: Dataset, folder: Path) -> Dataset:
    """The same pictures and ids in a folder of their own, whose manifest names species only."""
    folder.mkdir(parents=True)
    for name in ("images", "masks"):
        (folder / name).symlink_to((dataset.root / name).resolve(), target_is_directory=True)
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text)
        writer.writerow(("image", "id", "class", "split"))
        for e in dataset.examples:
            writer.writerow((e.image.relative_to(dataset.root).as_posix(), e.id, e.species, e.split))
    return read_dataset(folder)


def measure(found: review.Review, identities: dict[str, Any]) -> Shares:
    """Of proposed pairs; a class counts by how many it has."""
    proposed, perfect, random, count = 0.0, 0.0, 0.0, 0
    members: dict[int, list[int]] = {}
    for position, e in enumerate(found.examples):
        members.setdefault(e.class_id, []).append(position)
    vectors = np.stack([identities[e.id] for e in found.examples])
    for own in (c for c in found.classes if c.pairs):
        proposed += sum(float(np.linalg.norm(vectors[p.first] - vectors[p.second])) for p in own.pairs)
        of_class = vectors[members[own.class_id]]
        distances = np.linalg.norm(of_class[:, None] - of_class[None], axis=-1)
        random += len(own.pairs) * float(distances[np.triu_indices(len(of_class), 1)].mean())
        np.fill_diagonal(distances, np.inf)
        for _ in own.pairs:
            i, j = np.unravel_index(np.argmin(distances), distances.shape)
            perfect += float(distances[i, j])
            distances[[i, j]] = np.inf
            distances[:, [i, j]] = np.inf
        count += len(own.pairs)
    return Shares(sum(bool(c.pairs) for c in found.classes), count, proposed / random, perfect / random)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, required=True, help="a folder that python -m nabla_jax.toybirds wrote")
    parser.add_argument("--pairs", type=int, nargs="+", default=[5, 10], help="of a class, at most")
    parser.add_argument("--dinov2", default=review.Settings.dinov2)
    arguments = parser.parse_args(argv)
    leaves = read_dataset(arguments.world / "nabirds")
    oracle = Oracle(leaves.root)
    identities = {e.id: plumage_vector(oracle.identity(e.id)) for e in leaves.examples}
    with tempfile.TemporaryDirectory() as folder:
        levels = {"leaf (species and plumage)": leaves, "species": label_by_species(leaves, Path(folder, "species"))}
        head = ["classes are", "pairs a class", "pairs", *(f"colour {w:g}" for w in WEIGHTS), "perfect knowledge"]
        print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
        for level, dataset in levels.items():
            for pairs in arguments.pairs:
                rows = []
                for weight in WEIGHTS:
                    settings = review.Settings(pairs=pairs, colour=weight, dinov2=arguments.dinov2)
                    found = review.propose(dataset, settings, Path(folder, "features"))
                    rows.append(measure(found, identities))
                cells = [f"{row.proposed:.2f}" for row in rows]
                about = [f"{rows[0].classes} {level}", f"at most {pairs}", str(rows[0].pairs)]
                print(f"| {' | '.join([*about, *cells, f'{rows[0].perfect:.2f}'])} |", flush=True)


if __name__ == "__main__":
    main()
