"""What the transformer is conditioned on: placed pictures as branches, and encoded prompts."""
