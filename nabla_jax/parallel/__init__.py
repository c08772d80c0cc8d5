"""Meshes and how arrays are laid out on them (`mesh`); several processes as one run (`processes`)."""
