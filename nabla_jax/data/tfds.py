"""A prepared TensorFlow Datasets folder, such as CUB-200-2011, without TensorFlow.

    caltech_birds2011/0.2.0/dataset_info.json, features.json, *.array_record-*

Any image classification set whose features hold ``image`` and ``label`` is read; ``bbox``, ``segmentation_mask``,
``image/filename`` and ``label_name`` are used where they are. It must have been prepared in the array_record format:
reading other formats needs TensorFlow. The pictures are written once as the very bytes that the shards hold, to
unpacked/images/, masks to unpacked/masks/. The splits train and test are kept; validation counts as test.
"""

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NotRequired, TypedDict

from nabla_jax import runs
from nabla_jax.conditioning.geometry import clip_box
from nabla_jax.data import unpack
from nabla_jax.data.dataset import Dataset, Example, existing_control
from nabla_jax.data.problems import Problems
from nabla_jax.data.taxonomy import normalise_name
from nabla_jax.errors import UserError
from nabla_jax.images import picture_size
from nabla_jax.untrusted import check, is_file_name, read_json

INFO, FEATURES = "dataset_info.json", "features.json"
_NUMBERED = re.compile(r"\d+\.(.+)$")  # CUB's folders: 001.Black_footed_Albatross
_SPLITS = {"train": "train", "test": "test", "validation": "test", "val": "test"}


class _Shards(TypedDict):
    name: str
    shardLengths: list[Any]


class _Info(TypedDict):
    """What is read of dataset_info.json, where it is there."""

    name: str
    fileFormat: str
    splits: list[_Shards]


class _Features(TypedDict):
    features: dict[str, Any]


class _FeaturesFile(TypedDict):
    featuresDict: _Features


class _Picture(TypedDict):
    """A row of the index of unpacked pictures."""

    id: str
    image: str
    class_id: int
    class_name: str
    split: Literal["train", "test"]
    box: NotRequired[tuple[int, int, int, int] | None]
    mask: NotRequired[str]


def is_layout(root: Path) -> bool:
    """Whether ``root`` is a prepared folder, or holds one as a version."""
    return bool(_versions(root))


def read(root: str | os.PathLike[str]) -> Dataset:
    """Reads a prepared folder; the first time, its pictures are written beside it.

    Raises UserError for another file format, a missing feature, a shard that cannot be read, a folder that cannot be
    written.
    """
    problems = Problems()
    dataset = scan(Path(root), problems)
    problems.refuse(root)
    return dataset


def scan(root: Path, problems: Problems) -> Dataset:
    """Like ``read``, but adds what is wrong to ``problems``."""
    versions = _versions(root)
    if len(versions) != 1:
        found = ", ".join(v.name for v in versions) or "none"
        problems.error(root, None, f"found versions {found}, expected one", "name the version's folder")
        return Dataset(root.name, root, ())
    folder = versions[0]
    info = _json(folder / INFO, _Info, problems)
    features = _json(folder / FEATURES, _FeaturesFile, problems)
    if info is None or features is None:
        return Dataset(root.name, root, ())
    names = features["featuresDict"]["features"]
    missing = [name for name in ("image", "label") if name not in names]
    if missing:
        found = f"lacks the feature {', '.join(missing)}, has {', '.join(names) or 'none'}"
        problems.error(folder / FEATURES, None, found, "choose an image classification set")
    if info["fileFormat"] != "array_record":
        problems.error(
            folder / INFO,
            None,
            f"fileFormat: found {info['fileFormat']!r}, expected 'array_record'",
            f"prepare it again where TensorFlow is installed: tfds build {info['name']} --file_format=array_record",
        )
    for name in _shards(info):
        if not is_file_name(name):
            problems.error(folder / INFO, None, f"a shard is named {name[:100]!r}", "expected the name of a file")
        elif not (folder / name).is_file():
            problems.error(folder / name, None, "no such shard", "copy the whole prepared folder")
    if problems.errors:
        return Dataset(root.name, root, ())
    made_from = {
        "name": info["name"],
        "version": info.get("version"),
        "shards": {name: (folder / name).stat().st_size for name in _shards(info)},
    }
    try:
        place = folder / unpack.FOLDER
        rows = unpack.rows(
            place, made_from, lambda target: _unpack(folder, set(names), target), _Picture, ("image", "mask")
        )
    except UserError as error:
        problems.error(folder, None, str(error), "make the folder writable and the shards whole")
        return Dataset(root.name, root, ())
    examples = tuple(_example(folder, row) for row in rows)
    return Dataset(info["name"], folder, examples)


def _versions(root: Path) -> list[Path]:
    if (root / INFO).is_file() and (root / FEATURES).is_file():
        return [root]
    return sorted(f.parent for f in root.glob(f"*/{INFO}") if (f.parent / FEATURES).is_file())


def _json(path: Path, kind: Any, problems: Problems) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = read_json(path)
        check(found, kind, str(path))
    except UserError as error:
        problems.error(path, None, str(error).removeprefix(f"{path}: "), "copy the whole prepared folder")
        return None
    return found


def _shards(info: dict[str, Any]) -> list[str]:
    """File names of all shards, by the template that TFDS writes."""
    out = []
    for split in info["splits"]:
        lengths = split["shardLengths"]
        template = str(split.get("filepathTemplate", "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"))
        for number in range(len(lengths)):
            values = {
                "DATASET": info["name"],
                "SPLIT": split["name"],
                "FILEFORMAT": info["fileFormat"],
                "SHARD_X_OF_Y": f"{number:05d}-of-{len(lengths):05d}",
            }
            name = template
            for key, value in values.items():
                name = name.replace(f"{{{key}}}", value)
            out.append(name)
    return out


def _unpack(folder: Path, features: set[str], target: Path) -> Iterator[unpack.Row]:
    """Writes pictures and masks of all splits, and yields what the shards say of each."""
    import tensorflow_datasets

    builder = tensorflow_datasets.builder_from_directory(str(folder))
    skip = tensorflow_datasets.decode.SkipDecoding()
    decoders = {name: skip for name in ("image", "segmentation_mask") if name in features}
    labels = builder.info.features["label"]
    for split in builder.info.splits:
        source = builder.as_data_source(split=split, decoders=decoders)
        for number in runs.track(range(len(source)), f"unpack {split}", unit="picture"):
            record = source[number]
            listed = _text(record.get("image/filename", "")) or f"{split}/{number:06d}"
            class_id = int(record["label"])
            name = _class_name(PurePosixPath(listed), _text(record.get("label_name", "")), labels.int2str(class_id))
            data = record["image"]
            relative = _place(listed, f"{class_id:04d}", ".png" if data[:4] == b"\x89PNG" else ".jpg")
            image = target / "images" / relative
            unpack.write(image, data)
            row = {
                "id": str(relative.with_suffix("")),
                "image": f"images/{relative}",
                "class_id": class_id,
                "class_name": name,
                "split": _SPLITS.get(split, "train"),
            }
            if "segmentation_mask" in record:
                mask = f"masks/{relative.with_suffix('.png')}"
                unpack.write(target / mask, _mask(record["segmentation_mask"]))
                row["mask"] = mask
            if "bbox" in record:
                row["box"] = _box(record["bbox"], *picture_size(image))
            yield row


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _place(listed: str, class_folder: str, suffix: str) -> PurePosixPath:
    """CLASS/FILE below images/: the file's own folder where it has one."""
    path = PurePosixPath(listed)
    folder = path.parent.name or class_folder
    return PurePosixPath(folder, path.name if path.suffix else path.name + suffix)


def _class_name(listed: PurePosixPath, label_name: str, label: str) -> str:
    # CUB's label_name is lower-case; its folders keep the capitals.
    numbered = _NUMBERED.match(listed.parent.name)
    return normalise_name((numbered.group(1) if numbered else label_name or label).replace("_", " "))


def _mask(data: bytes) -> bytes:
    """The PNG as it is, or with 1 stretched to 255 where its values are 0 and 1."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        grey = image.convert("L")
    if grey.getextrema()[1] != 1:
        return data
    out = io.BytesIO()
    grey.point(lambda value: 255 * value).save(out, "png")
    return out.getvalue()


def _box(relative: Any, height: int, width: int) -> list[int]:
    """Fractions (top, left, bottom, right) to pixels."""
    top, left, bottom, right = (float(value) for value in relative)
    box = round(top * height), round(left * width), round(bottom * height), round(right * width)
    return list(clip_box(box, height, width))


def _example(folder: Path, row: unpack.Row) -> Example:
    image = folder / unpack.FOLDER / row["image"]
    top, left, bottom, right = row.get("box") or (0, 0, 0, 0)
    own = folder / unpack.FOLDER / row["mask"] if "mask" in row else None
    return Example(
        id=row["id"],
        image=image,
        class_id=row["class_id"],
        class_name=row["class_name"],
        taxonomy=("Birds", row["class_name"]),
        box=(top, left, bottom, right) if bottom else None,
        mask=own or existing_control(folder, image, "masks"),
        depth=existing_control(folder, image, "depth"),
        split=row["split"],
    )
