"""Pictures or latents to branches of a forward pass."""
