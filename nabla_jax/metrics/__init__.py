"""How good pictures are: numbers per pair (pixels, identity) and their means with intervals (statistics)."""
