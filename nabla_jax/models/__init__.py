"""Pure architecture: arrays in, arrays out. Nothing here reads files or knows pictures."""
