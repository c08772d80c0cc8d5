"""Safetensors files of any size that hold no data: the header is real, the rest is a hole in the file."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


def write_sparse(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A file with the names, shapes and dtypes of ``tensors`` (on the meta device); its values read as zero."""
    header, offset = {}, 0
    for name, value in tensors.items():
        size = math.prod(value.shape) * value.dtype.itemsize
        header[name] = {
            "dtype": CODES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
