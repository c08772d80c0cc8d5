"""From a data set to a folder in which its look-alikes are judged."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nabla_jax import config as configs
from nabla_jax import runs
from nabla_jax.curation import looks, page, proposals, verdicts
from nabla_jax.curation.proposals import ClassProposals
from nabla_jax.data.dataset import Dataset, Example, class_index
from nabla_jax.errors import UserError
from nabla_jax.metrics import networks as nets


@dataclasses.dataclass(frozen=True)
class Settings:
    """What pairs are proposed; see ``proposals.propose`` and ``looks.describe``."""

    split: str = "test"
    pairs: int = 10
    crop: str = "mask"
    dinov2: str = "asset:toy-dinov2"
    colour: float = 0.5
    varied: float = 1.5
    batch: int = 32


@dataclasses.dataclass(frozen=True)
class Review:
    """What was proposed. Positions of ``classes`` count ``examples``; ``left_out`` have an empty mask."""

    dataset: Dataset
    settings: Settings
    examples: tuple[Example, ...]
    left_out: tuple[str, ...]
    identical: int  # pairs of files with equal bytes, which are never proposed
    accepted: Counter[int]  # class id -> pairs that earlier verdicts accept
    classes: tuple[ClassProposals, ...]

    @property
    def rows(self) -> list[tuple[str, str, str, float]]:
        """(class_id, image_1, image_2, distance) of each proposed pair."""
        ids = [e.id for e in self.examples]
        return [
            (*verdicts.row(self.dataset, ids[p.first], ids[p.second]), round(p.distance, 4))
            for c in self.classes
            for p in c.pairs
        ]


def propose(dataset: Dataset, settings: Settings, cache: Path, before: Sequence[verdicts.Verdict] = ()) -> Review:
    """Pairs of the split's pictures that share no picture, class by class; features are stored in ``cache``.

    With earlier verdicts only what is missing is proposed: no pair that somebody accepted or rejected, no picture of
    an accepted pair, and so many fewer of a class.

    Raises UserError for what cannot be used, before any network runs where that is possible.
    """
    examples = sorted(dataset.of_split(settings.split), key=lambda e: e.id)
    looks.require(examples, settings.crop)
    nets.check_networks(configs.Metrics(dinov2=settings.dinov2))
    if not any(len(own) > 1 for own in class_index(e.class_id for e in examples).values()):
        raise UserError(f"{dataset.root}: found no class with two pictures of split {settings.split}, expected some")
    fingerprint = looks.fingerprints(examples, settings.crop)
    kept, found = looks.describe(
        examples, settings.crop, settings.dinov2, settings.colour, settings.batch, cache, fingerprint
    )
    positions = {e.id: i for i, e in enumerate(kept)}
    settled = verdicts.settle(before)
    decided = settled.rejected | settled.disputed | {frozenset((a.first, a.second)) for a in settled.accepted}
    taken = {id for a in settled.accepted for id in (a.first, a.second)}
    accepted = Counter(dataset.by_id[a.first].class_id for a in settled.accepted)
    classes = class_index(e.class_id for e in kept)
    identical = looks.identical(kept, fingerprint)
    refused = {frozenset(positions[id] for id in pair) for pair in decided if pair <= positions.keys()}
    proposed = proposals.propose(
        found,
        classes,
        {c: settings.pairs - accepted[c] for c in classes},
        varied=settings.varied,
        refused=refused | identical,
        taken={positions[id] for id in taken if id in positions},
    )
    left_out = tuple(e.id for e in examples if e.id not in positions)
    return Review(dataset, settings, tuple(kept), left_out, len(identical), accepted, tuple(proposed))


def write(review: Review, out: Path, side: int, workers: int) -> Path:
    """Writes the page and, for other tools, ``proposals.csv`` and ``classes.csv``; returns the page's path."""
    chosen = {p for c in review.classes for pair in c.pairs for p in (pair.first, pair.second)}
    boxes = {review.examples[p].id: looks.shown(review.examples[p], review.settings.crop) for p in sorted(chosen)}
    # Verdicts are kept by the pictures there are, so that they outlive a proposal with other settings.
    ids = "\n".join([review.dataset.name, *sorted(e.id for e in review.dataset.examples)])
    key = hashlib.sha256(ids.encode()).hexdigest()[:16]
    runs.write_atomic(
        out / "proposals.csv", verdicts.table(("class_id", "image_1", "image_2", "distance"), review.rows)
    )
    names = {e.class_id: e.class_name for e in review.examples}
    rows = [
        (f"{c.class_id:04d}", names[c.class_id], c.pictures, len(c.pairs), round(c.spread, 4), int(c.varied))
        for c in review.classes
    ]
    columns = ("class_id", "class", "pictures", "pairs", "spread", "varied")
    runs.write_atomic(out / "classes.csv", verdicts.table(columns, rows))
    return page.write(out, review.dataset, review.examples, review.classes, boxes, key, side, workers)


def describe(review: Review, least: int) -> list[str]:
    """What was proposed, in lines of text; ``least`` pairs are enough for a class."""
    names = {e.class_id: e.class_name for e in review.examples}
    count = sum(len(c.pairs) for c in review.classes)
    split = "" if review.settings.split == "all" else f" of split {review.settings.split}"
    lines = [f"  pairs: {count:,}, of {len(review.classes):,} classes with {len(review.examples):,} pictures{split}"]
    if review.accepted:
        lines.append(f"  beside {review.accepted.total():,} that are accepted already")
    varied = [names[c.class_id] for c in review.classes if c.varied]
    if varied:
        lines.append(f"  {len(varied):,} vary unusually much: {_some(varied)}")
    short = [names[c.class_id] for c in review.classes if len(c.pairs) + review.accepted[c.class_id] < least]
    if short:
        lines.append(f"  {len(short):,} have fewer than {least} pairs: {_some(short)}")
    if review.identical:
        lines.append(f"  {review.identical:,} pairs of files are byte for byte the same and not proposed")
    if review.left_out:
        lines.append(
            f"  {len(review.left_out):,} pictures have an empty mask and are left out: {_some(review.left_out)}"
        )
    return lines


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
