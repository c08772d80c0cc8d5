"""From nothing to a small base checkpoint: pictures, autoencoder, text encoders, transformer."""
