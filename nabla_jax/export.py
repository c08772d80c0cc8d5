"""Adapter files for other tools: converts, merges and inspects.

    python -m nabla_jax.export --inspect FILE
    python -m nabla_jax.export ADAPTER --to kohya --out FILE
    python -m nabla_jax.export ADAPTER --merge BASE --out FOLDER

``ADAPTER`` is a safetensors file in any known format, a training run's folder or ``asset:NAME``. Formats are ``peft``
(diffusers), ``kohya`` and ``comfyui``; every conversion keeps matrices, alpha and metadata, so that converting back
gives the same bits. Only adapters for the whole sequence can be merged: one that acts on condition tokens alone would
change text and noise too. ``--inspect`` takes any adapter, checkpoint file or pipeline folder.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nabla_jax import assets, runs
from nabla_jax.errors import UserError

if TYPE_CHECKING:
    from nabla_jax.checkpoints.safetensors_io import Header

# A tensor that only one kind of checkpoint holds, and what that checkpoint is. Tried in this order.
_CHECKPOINTS = (
    ("single_transformer_blocks.0.attn.to_q.weight", "FLUX transformer (diffusers)"),
    ("single_blocks.0.linear1.weight", "FLUX transformer (original single file)"),
    ("redux_up.weight", "FLUX.1-Redux embedder"),
    ("encoder.down_blocks.0.resnets.0.conv1.weight", "autoencoder (diffusers)"),
    ("encoder.down.0.block.0.conv1.weight", "autoencoder (original single file)"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", "T5 encoder (transformers)"),
    ("vision_model.encoder.layers.0.self_attn.q_proj.weight", "SigLIP or CLIP vision tower (transformers)"),
    ("text_model.encoder.layers.0.self_attn.q_proj.weight", "CLIP text encoder (transformers)"),
    ("encoder.layer.0.attention.attention.query.weight", "DINOv2 (transformers)"),
)
_PREFIXES = ("", "model.", "model.diffusion_model.", "transformer.", "dinov2.")


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m nabla_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("adapter", nargs="?", help="safetensors file, training run, or asset:NAME")
    add("--inspect", metavar="FILE", help="print what a file holds")
    add("--to", metavar="FORMAT", help="convert: peft, kohya or comfyui")
    add("--merge", metavar="BASE", help="merge into a copy of this pipeline folder")
    add("--out", type=Path, help="file of a conversion, folder of a merge")
    add("--dtype", help="of a conversion's matrices: float32, bfloat16 or float16; default as they are")
    add("--applies-to", choices=("all",), help="vouch that an adapter of another tool is for the whole sequence")
    arguments = parser.parse_args(argv)
    actions = [name for name in ("inspect", "to", "merge") if getattr(arguments, name) is not None]
    if len(actions) != 1:
        raise UserError(
            f"export: found {' and '.join(actions) or 'nothing to do'}, expected one of --inspect, --to, --merge"
        )
    if arguments.inspect is not None:
        if arguments.adapter is not None:
            raise UserError(f"export: --inspect takes the file itself, found {arguments.adapter} too")
        print("\n".join(inspect(assets.resolve(arguments.inspect))))
        return
    if arguments.adapter is None or arguments.out is None:
        raise UserError(f"export: --{actions[0]} needs an adapter and --out")
    # Imported here: a mistake on the command line is answered before jax loads.
    from nabla_jax import api

    adapter = api.find_adapter(arguments.adapter)
    if arguments.to is not None:
        print(convert(adapter, arguments.to, arguments.out, arguments.dtype))
        return
    from nabla_jax.checkpoints.merge import merge_adapter

    if arguments.dtype is not None:
        raise UserError("export: --dtype is for --to: a merged base keeps its dtype")
    base = assets.resolve(arguments.merge)
    print(merge_adapter(adapter, base, arguments.out, applies_to=arguments.applies_to))


def convert(adapter: Path, to: str, out: Path, dtype: str | None = None) -> Path:
    """Writes an adapter in another format; see the module's docstring.

    Raises UserError for a file that is no adapter, an unknown format or dtype, and an ``out`` that exists.
    """
    from nabla_jax.checkpoints import adapters
    from nabla_jax.checkpoints.adapter_formats import FORMATS

    format = FORMATS.get(to)
    if format is None:
        raise UserError(f"export: --to: found {to!r}, expected one of {', '.join(FORMATS)}")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"export: --dtype: found {dtype!r}, expected float32, bfloat16 or float16")
    if out.exists():
        raise UserError(f"{out}: exists, expected a file that is to be made")
    file = adapters.read_adapter(adapter)
    with runs.writing(out):
        adapters.write_adapter(out, file.modules, file.metadata, format=format, header=file.header, dtype=dtype)
    return out


def inspect(path: Path) -> list[str]:
    """Lines describing an adapter, a checkpoint file or a pipeline folder.

    Raises UserError for a file that is neither, or is damaged.
    """
    from nabla_jax.checkpoints import pipeline
    from nabla_jax.checkpoints.safetensors_io import read_header

    if (path / "model_index.json").is_file():
        lines = [f"folder: {path}", "format: pipeline folder (diffusers)"]
        for part in pipeline.PARTS:
            if (path / part).is_dir():
                lines += ["", *inspect(path / part)]
        return lines
    if (path / "adapter_model.safetensors").is_file():
        path = path / "adapter_model.safetensors"
    header = read_header(path)
    kind = _checkpoint(header)
    lines = [f"file: {path}"]
    if kind is None:
        lines += _adapter(path)
    else:
        lines.append(f"format: {kind}")
        lines.append(f"parameters: {sum(_size(e.shape) for e in header.tensors.values()):,}")
    counts = Counter(entry.dtype for entry in header.tensors.values())
    files = f" in {len(header.files)} files" if len(header.files) > 1 else ""
    lines.append(f"tensors: {len(header.tensors)}{files}")
    lines.append(f"dtype: {', '.join(f'{name} ({count})' for name, count in sorted(counts.items()))}")
    lines += [f"metadata: {name} = {value}" for name, value in sorted(header.metadata.items()) if name != "nabla_jax"]
    return lines


def _checkpoint(header: "Header") -> str | None:
    return next((kind for name, kind in _CHECKPOINTS if any(p + name in header.tensors for p in _PREFIXES)), None)


def _adapter(path: Path) -> Iterator[str]:
    import dataclasses

    from nabla_jax.checkpoints.adapters import read_adapter

    file = read_adapter(path)
    metadata = dataclasses.asdict(file.metadata)
    names = {
        "peft": "PEFT, diffusers",
        "kohya": "kohya",
        "comfyui": "ComfyUI, names of the original single file",
        "onetrainer": "OneTrainer",
    }
    yield f"format: {file.format} adapter ({names[file.format]})"
    yield f"rank: {metadata.pop('rank')}"
    yield f"alpha: {metadata.pop('alpha'):g}"
    targets = metadata.pop("targets")
    yield f"targets: {len(file.modules)} linears: {', '.join(targets)}"
    known = {name: value for name, value in metadata.items() if value != "" and (value is False or value != 0)}
    for name in ("base", "applies_to"):
        yield f"{name}: {known.pop(name, 'unknown')}"
    if file.metadata.applies_to != "unknown":  # else the rest are defaults that nobody set
        yield from (f"{name}: {value}" for name, value in known.items())


def _size(shape: Sequence[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


if __name__ == "__main__":
    runs.run_main(main)
