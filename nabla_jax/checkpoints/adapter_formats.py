"""Names and fused matrices of adapter files: every published scheme to and from one linear per matrix pair.

An adapter is a pair ``lora_A`` [r, in], ``lora_B`` [out, r] for each linear, here under the module names of
diffusers' transformer, ``transformer_blocks.0.attn.to_q``. Files carry them as

- ``peft``: those names, after ``transformer.``, ``base_model.model.`` or both, with ``lora_A``/``lora_B``
- ``kohya``: names of the original single file with underscores, ``lora_unet_double_blocks_0_img_attn_qkv``
- ``comfyui``: names of the original single file with dots, ``diffusion_model.double_blocks.0.img_attn.qkv``
- ``onetrainer``: diffusers' names with underscores, ``lora_transformer_transformer_blocks_0_attn_to_q`` (read only)

and with ``lora_down``/``lora_up`` and one ``alpha`` per linear in the last three. The original file fuses the
projections of queries, keys and values (and of the MLP in single blocks) into one linear. Both directions are exact:

- *splitting* a pair (A, B) on a fused linear gives each part the whole A and its own rows of B;
- *fusing* pairs (A_i, B_i) of rank r on n parts gives A = [A_1; …; A_n] of rank n r and B = diag(B_1, …, B_n), because
  no pair of smaller rank computes the same in general; parts that share one A (they came from splitting) give back the
  pair that they came from. alpha grows with the rank, so that alpha / rank stays.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from nabla_jax.checkpoints import bfl
from nabla_jax.checkpoints.safetensors_io import collapse
from nabla_jax.errors import UserError

Format = Literal["peft", "kohya", "comfyui"]
FORMATS: dict[str, Format] = {name: name for name in get_args(Format)}
Array = np.ndarray


class Pair(NamedTuple):
    """The matrices of one linear: ``lora_A`` [r, in] and ``lora_B`` [out, r]."""

    lora_A: Array
    lora_B: Array


def _linears(modules: Mapping[str, tuple[str, ...]], original: str = "", ours: str = "") -> dict[str, tuple[str, ...]]:
    # Norms have no adapter.
    return {original + m: tuple(ours + p for p in parts) for m, parts in modules.items() if not m.endswith("_norm")}


# Linears of the original single file and the linears of diffusers' layout that they are cut into, in order.
_ORIGINAL: dict[str, tuple[str, ...]] = {
    **_linears(bfl.OUTER),
    **_linears(bfl.DOUBLE, "double_blocks.#.", "transformer_blocks.#."),
    **_linears(bfl.SINGLE, "single_blocks.#.", "single_transformer_blocks.#."),
}
# The original's last modulation gives shift, scale; diffusers' gives scale, shift.
_SWAPPED = "norm_out.linear"
_HOME = {part: original for original, parts in _ORIGINAL.items() for part in parts}

_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
_KINDS = (
    (re.compile(r"(.+)\.(?:lora_A|lora_down|lora\.down)(?:\.[^.]+)?\.weight"), "lora_A"),
    (re.compile(r"(.+)\.(?:lora_B|lora_up|lora\.up)(?:\.[^.]+)?\.weight"), "lora_B"),
    (re.compile(r"(.+)\.alpha"), "alpha"),
)


def _underscored(names: Iterable[str]) -> dict[str, str]:
    """Names with ``.`` and ``#`` as regular expressions over underscored names, each with the name it stands for."""
    return {re.escape(n.replace(".", "_")).replace(r"\#", r"(\d+)"): n for n in names}


_STYLES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("peft", "", {re.escape(n).replace(r"\#", r"(\d+)"): n for n in _HOME}),
    ("comfyui", "", {re.escape(n).replace(r"\#", r"(\d+)"): n for n in _ORIGINAL}),
    ("kohya", "lora_unet_", _underscored(_ORIGINAL)),
    ("onetrainer", "lora_transformer_", _underscored(_HOME)),
)


@dataclass(frozen=True)
class Entry:
    """The tensors of one linear as a file names it.

    Attributes:
      parts: the linears of diffusers' layout that it stands for; several when it is fused.
      names: tensor name by kind: lora_A, lora_B and perhaps alpha.
    """

    parts: tuple[str, ...]
    names: dict[str, str]


# Formats with the linears of the original single file.
ORIGINAL = ("kohya", "comfyui")


def recognise(names: Iterable[str], path: object) -> tuple[str, list[Entry]]:
    """The format of an adapter file and its linears, from the names of its tensors.

    Raises:
      UserError: a tensor that belongs to no linear of a FLUX transformer or is no plain LoRA, one of a pair is
        missing, or two schemes are mixed.
    """
    found: dict[str, dict[str, str]] = {}
    homes: dict[str, tuple[str, tuple[str, ...]]] = {}
    strange = []
    for name in names:
        module, kind = _kind(name)
        home = None if module is None else _home(module)
        if module is None or home is None:
            strange.append(name)
            continue
        homes[module] = home
        if kind in found.setdefault(module, {}):
            raise UserError(f"{path}: {found[module][kind]} and {name} are the same matrix")
        found[module][kind] = name
    if strange or not found:
        listed = collapse(strange) or "no tensor"
        raise UserError(
            f"{path}: not a LoRA of a FLUX transformer: {listed}; expected names such as "
            "transformer.transformer_blocks.0.attn.to_q.lora_A.weight or "
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"
        )
    missing = [_missing(module, kinds) for module, kinds in found.items() if not {"lora_A", "lora_B"} <= kinds.keys()]
    if missing:
        raise UserError(f"{path}: {len(missing)} missing: {collapse(sorted(missing))}")
    formats = sorted({style for style, _ in homes.values()})
    if len(formats) > 1:
        raise UserError(f"{path}: the names mix the formats {', '.join(formats)}, expected one")
    entries = [Entry(homes[m][1], kinds) for m, kinds in found.items()]
    parts = [part for entry in entries for part in entry.parts]
    twice = sorted({p for p in parts if parts.count(p) > 1}) if len(set(parts)) < len(parts) else []
    if twice:
        raise UserError(f"{path}: more than one pair of matrices for {collapse(twice)}")
    return formats[0], entries


def _missing(module: str, kinds: Mapping[str, str]) -> str:
    """The name of the matrix that a linear lacks."""
    for there, lacking in (("A", "B"), ("B", "A"), ("down", "up"), ("up", "down")):
        for name in kinds.values():
            if re.search(rf"lora[._]{there}\b", name):
                return re.sub(rf"(lora[._]){there}\b", rf"\g<1>{lacking}", name)
    return f"{module}.lora_A.weight"


def _kind(name: str) -> tuple[str | None, str]:
    for pattern, kind in _KINDS:
        match = pattern.fullmatch(name)
        if match:
            return match[1], kind
    return None, ""


def _home(module: str) -> tuple[str, tuple[str, ...]] | None:
    """(format, linears of diffusers' layout) of a module name as files have it."""
    bare = module
    while prefix := next((p for p in _PREFIXES if bare.startswith(p)), None):
        bare = bare.removeprefix(prefix)
    for style, prefix, patterns in _STYLES:
        if not bare.startswith(prefix):
            continue
        for pattern, name in patterns.items():
            match = re.fullmatch(pattern, bare.removeprefix(prefix))
            if match:
                number = match[1] if match.groups() else ""
                parts = _ORIGINAL.get(name, (name,)) if style in ORIGINAL else (name,)
                return style, tuple(p.replace("#", number) for p in parts)
    return None


def pattern_of(module: str) -> str:
    """``transformer_blocks.3.attn.to_q`` -> ``transformer_blocks.*.attn.to_q``: the linear in every block."""
    return re.sub(r"^((?:single_)?transformer_blocks)\.\d+\.", r"\1.*.", module)


def patterns(modules: Iterable[str]) -> tuple[str, ...]:
    """The sorted patterns of a set of linears."""
    return tuple(sorted({pattern_of(module) for module in modules}))


def split(
    pair: Pair, parts: Sequence[str], *, original: bool, rank: int | None, targets: Sequence[str]
) -> dict[str, Pair]:
    """The pairs of the parts of a (possibly fused) linear; exact, see the module's docstring.

    Args:
      pair: as stored.
      parts: the linears it stands for, in order.
      original: whether it is a linear of the original single file.
      rank: of a pair before fusing, where the file says so; otherwise a block-diagonal B of equal blocks is
        recognised by its zeros.
      targets: patterns of the adapted linears, where the file says so; other parts are left out.

    Raises ValueError for sizes that do not fit.
    """
    if len(parts) == 1:
        swap = original and parts[0] == _SWAPPED
        return {parts[0]: Pair(pair.lora_A, _swap_halves(pair.lora_B) if swap else pair.lora_B)}
    sizes = _sizes(pair.lora_A.shape[1], parts)
    if sum(sizes) != pair.lora_B.shape[0]:
        raise ValueError(f"lora_B has {pair.lora_B.shape[0]} rows, expected {sum(sizes)} for {', '.join(parts)}")
    rows = dict(zip(parts, np.split(pair.lora_B, np.cumsum(sizes)[:-1]), strict=True))
    kept = [p for p in parts if not targets or pattern_of(p) in targets]
    total = pair.lora_A.shape[0]
    if total == rank or not (rank or _is_block_diagonal(list(rows.values()), total)):
        return {p: Pair(pair.lora_A, rows[p]) for p in kept}
    count = len(kept)
    if rank and total != rank * count:
        raise ValueError(f"rank {total}, expected {rank} or {count} times {rank} for {', '.join(kept)}")
    step = total // count
    return {
        p: Pair(pair.lora_A[i * step : (i + 1) * step], np.ascontiguousarray(rows[p][:, i * step : (i + 1) * step]))
        for i, p in enumerate(kept)
    }


def fuse(pairs: Mapping[str, Pair], parts: Sequence[str]) -> Pair:
    """The pair on the original's linear that the parts make up; parts without a pair contribute nothing. Exact."""
    if len(parts) == 1:
        pair = pairs[parts[0]]
        return Pair(pair.lora_A, _swap_halves(pair.lora_B)) if parts[0] == _SWAPPED else pair
    present = [p for p in parts if p in pairs]
    first = pairs[present[0]]
    sizes = _sizes(first.lora_A.shape[1], parts)
    offsets = dict(zip(parts, np.cumsum([0, *sizes[:-1]]), strict=True))
    shared = all(np.array_equal(pairs[p].lora_A, first.lora_A) for p in present)
    down = first.lora_A if shared else np.concatenate([pairs[p].lora_A for p in present])
    up = np.zeros((sum(sizes), down.shape[0]), first.lora_B.dtype)
    column = 0
    for part in present:
        block = pairs[part].lora_B
        rows = slice(offsets[part], offsets[part] + block.shape[0])
        up[rows, column : column + block.shape[1]] = block
        column += 0 if shared else block.shape[1]
    return Pair(down, up)


def write(modules: Mapping[str, Pair], scale: float, format: Format) -> dict[str, Array]:
    """Tensors of a file by name, in a fixed order.

    ``peft`` gets ``alpha`` (float32 scalars) only where alpha / rank is not 1, which readers assume; the other formats
    always have it.
    """
    out: dict[str, Array] = {}
    if format == "peft":
        for module in sorted(modules, key=_natural):
            pair = modules[module]
            out[f"transformer.{module}.lora_A.weight"] = pair.lora_A
            out[f"transformer.{module}.lora_B.weight"] = pair.lora_B
            if scale != 1:
                out[f"transformer.{module}.alpha"] = np.array(scale * pair.lora_A.shape[0], np.float32)
        return out
    homes: dict[str, tuple[str, ...]] = {}
    for module in modules:
        number = re.search(r"transformer_blocks\.(\d+)\.", module)
        original = _HOME[module if number is None else module.replace(f".{number[1]}.", ".#.", 1)]
        index = "" if number is None else number[1]
        homes[original.replace("#", index)] = tuple(p.replace("#", index) for p in _ORIGINAL[original])
    for original in sorted(homes, key=_natural):
        pair = fuse(modules, homes[original])
        name = f"lora_unet_{original.replace('.', '_')}" if format == "kohya" else f"diffusion_model.{original}"
        out[f"{name}.lora_down.weight"], out[f"{name}.lora_up.weight"] = pair
        out[f"{name}.alpha"] = np.array(scale * pair.lora_A.shape[0], np.float32)
    return out


def _sizes(width: int, parts: Sequence[str]) -> list[int]:
    """Rows of each part: queries, keys and values have the model's width, the MLP four times that."""
    return [4 * width if p.endswith("proj_mlp") else width for p in parts]


def _swap_halves(up: Array) -> Array:
    return np.concatenate(np.split(up, 2)[::-1])


def _is_block_diagonal(rows: Sequence[Array], rank: int) -> bool:
    """Whether B has equal blocks on its diagonal and nothing else. A B of zeros is taken for an ordinary pair."""
    step, rest = divmod(rank, len(rows))
    if rest or not any(block.any() for block in rows):
        return False
    return not any(block[:, : i * step].any() or block[:, (i + 1) * step :].any() for i, block in enumerate(rows))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
