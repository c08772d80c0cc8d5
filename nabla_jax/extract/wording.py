"""What a caption of a background must not say: which bird it is, and what it wears."""

import dataclasses
import re
from collections.abc import Iterable

from nabla_jax.data.taxonomy import species_name

COLOURS = (
    "amber", "beige", "black", "blue", "bluish", "bronze", "brown", "brownish", "buff", "buffy", "chestnut",
    "cinnamon", "colorful", "colourful", "cream", "crimson", "dark", "golden", "gray", "grayish", "green", "greenish",
    "grey", "greyish", "iridescent", "ivory", "maroon", "mottled", "navy", "olive", "orange", "pale", "pink", "purple",
    "red", "reddish", "rufous", "rusty", "scarlet", "silver", "slate", "speckled", "spotted", "streaked", "striped",
    "tan", "tawny", "turquoise", "vibrant", "violet", "white", "whitish", "yellow", "yellowish",
)  # fmt: skip
PLUMAGE = (
    "adult", "barred", "beak", "belly", "bellied", "bill", "breast", "breasted", "cheek", "chest", "collar", "crest",
    "crested", "crown", "crowned", "eyebrow", "eyed", "eyering", "feather", "feathered", "feathers", "female", "flank",
    "flanks", "forehead", "head", "headed", "immature", "juvenile", "legged", "legs", "male", "mantle", "markings",
    "molting", "nape", "neck", "necked", "patterned", "plumage", "primaries", "rump", "supercilium", "tail", "tailed",
    "throat", "throated", "underparts", "underside", "upperparts", "wing", "winged", "wingbar", "wingbars", "wings",
)  # fmt: skip
"""Words of a bird's looks. Some mean other things too; a background can be told without them."""
_GENERIC = {"and", "bird", "birds", "allies", "other", "the"}
_CLAUSE = re.compile(r"(?<=[.,;!?])\s+")
_COLOUR = rf"(?:{'|'.join(COLOURS)})(?:-\w+)?"
_COLOUR_LIST = rf"{_COLOUR}(?:(?:,\s*|\s+and\s+|\s+){_COLOUR})*"


@dataclasses.dataclass(frozen=True)
class _Patterns:
    names: re.Pattern[str] | None
    plumage: re.Pattern[str]
    coloured: re.Pattern[str]


class Wording:
    """The words that captions of one dataset must not hold."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        """``names``: of species and groups, with or without qualifiers in brackets."""
        found = sorted(_phrases(names), key=lambda phrase: (-len(phrase), phrase))
        spelled = "|".join(re.escape(phrase).replace(r"\ ", r"[\s-]+").replace(r"\-", r"[\s-]+") for phrase in found)
        self._patterns = _Patterns(
            re.compile(rf"\b(?:{spelled})(?:s|es|'s)?\b", re.IGNORECASE) if found else None,
            re.compile(rf"\b(?:{'|'.join(PLUMAGE)})\b", re.IGNORECASE),
            # A colour before the bird, with at most one word between, or said of it, or of a part: blue-headed.
            re.compile(
                rf"\b{_COLOUR_LIST}(?=(?:\s+[\w'-]+)?\s+birds?\b)"
                rf"|\bbirds?\s+(?:is|are|was|has|of)\s+(?:(?:a|mostly|largely|mainly)\s+)?{_COLOUR}\b"
                rf"|\b(?:{'|'.join(COLOURS)})-\w+ed\b",
                re.IGNORECASE,
            ),
        )

    def forbidden(self, caption: str) -> list[str]:
        """The words of ``caption`` that tell the bird, in the order of the kinds: names, looks, colours."""
        patterns = self._patterns
        found = []
        if patterns.names is not None:
            found = [m.group() for m in patterns.names.finditer(caption)]
            caption = patterns.names.sub("bird", caption)
        found += [m.group() for m in patterns.plumage.finditer(caption)]
        return found + [m.group().strip() for m in patterns.coloured.finditer(caption)]

    def without(self, caption: str) -> str:
        """``caption`` with names replaced by 'bird' and every clause left out that still tells the bird."""
        if self._patterns.names is not None:
            caption = self._patterns.names.sub("bird", caption)
        caption = re.sub(rf"\b{_COLOUR_LIST}\s+(?=birds?\b)", "", caption, flags=re.IGNORECASE)
        caption = re.sub(r"\b([Aa])n(?=\s+birds?\b)", r"\1", caption)
        caption = re.sub(r"\bbird(\s+birds?\b)+", "bird", caption)
        kept = [clause for clause in _CLAUSE.split(caption) if not self.forbidden(clause)]
        text = " ".join(kept).strip(" ,;")
        return text[:1].upper() + text[1:] if text else ""


def _phrases(names: Iterable[str]) -> set[str]:
    """Whole names without qualifiers, the members of enumerations, and the last word of each: its kind of bird."""
    found = set()
    for name in names:
        for part in re.split(r",|\band\b|&|/", species_name(name)):
            words = [word for word in part.lower().split() if re.search(r"[^\W\d_]", word)]
            if not words or set(words) <= _GENERIC:
                continue
            found.add(" ".join(words))
            for last in {words[-1], words[-1].removesuffix("s")} - _GENERIC:
                if len(last) > 2:
                    found.add(last)
    return found
