"""A procedural world of birds: pictures, controls, true identities, and an oracle that knows the answers.

Names load on first use: `fresh_pair`, `caption`, `CAPTION_WORDS`, `write_world`, `Oracle`.
"""

from __future__ import annotations

import importlib

_HOME = {
    "fresh_family": "fresh",
    "fresh_pair": "fresh",
    "fresh_scenes": "fresh",
    "fresh_captions": "fresh",
    "fresh_disguise": "fresh",
    "caption": "captions",
    "CAPTION_WORDS": "captions",
    "write_world": "writer",
    "Oracle": "oracle",
}
__all__ = [
    "CAPTION_WORDS",
    "Oracle",
    "caption",
    "fresh_captions",
    "fresh_disguise",
    "fresh_family",
    "fresh_pair",
    "fresh_scenes",
    "write_world",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
