"""Makes nabla_jax/assets/toy-birds: the pictures that the app offers at once, taken from an embedded world.

python -m scripts.toy_examples --world data/toybirds/nabirds

`examples.csv` pairs a subject with a target, each of which has a mask beside it; `plate.csv` lists the birds of a plate
in the pose of the first example's target (see `scripts.toy_plate`).
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from nabla_jax import plates, runs
from nabla_jax.data import Example, read_dataset
from nabla_jax.data.pairs import benchmark_pairs
from scripts.toy_plate import related, write_list


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=Path("data/toybirds/nabirds"))
    parser.add_argument("--pairs", type=int, nargs="+", default=[77, 0, 4, 8, 12], help="of the world's benchmark")
    parser.add_argument("--count", type=int, default=5, help="birds of the plate")
    parser.add_argument("--out", type=Path, default=Path("nabla_jax/assets/toy-birds"))
    args = parser.parse_args(argv)
    dataset = read_dataset(args.world)
    listed = benchmark_pairs(args.world, dataset)
    args.out.mkdir(parents=True, exist_ok=True)

    def taken(name: str, example: Example) -> str:
        assert example.mask is not None
        shutil.copyfile(example.image, args.out / f"{name}{example.image.suffix}")
        shutil.copyfile(example.mask, args.out / f"{name}_mask{example.mask.suffix}")
        return f"{name}{example.image.suffix}"

    rows = []
    for number in args.pairs:
        pair = (listed[number].subject_id, listed[number].target_id)
        names = [
            taken(f"{role}_{number}", dataset.by_id[i]) for role, i in zip(("subject", "target"), pair, strict=True)
        ]
        rows.append([*names, *map(mask_of, names)])
    write_list(args.out / "examples.csv", ("subject", "target", "subject_mask", "target_mask"), rows)
    birds = [dataset.by_id[i] for i in related(dataset, listed[args.pairs[0]].subject_id, args.count)]
    pictures = [taken(f"plate_{number}", bird) for number, bird in enumerate(birds, 1)]
    listing = [(bird.species, name, mask_of(name)) for bird, name in zip(birds, pictures, strict=True)]
    write_list(args.out / "plate.csv", (*plates.BIRDS, "mask"), listing)


def mask_of(picture: str) -> str:
    return f"{Path(picture).stem}_mask.png"


if __name__ == "__main__":
    runs.run_main(main)
