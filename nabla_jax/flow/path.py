"""The straight path between data and noise, its loss, and the token layout it runs on.

Rectified flow (Liu et al. 2023, arXiv:2209.03003), logit-normal times (Esser et al. 2024, arXiv:2403.03206):
`x_t = (1 - t) x0 + t x1`, x0 data, x1 standard normal noise, and the model learns `dx_t/dt = x1 - x0`.

Letters in shapes: B batch, C latent channels, H W height and width of a latent, N tokens, D token width.
"""

import jax
import jax.numpy as jnp

from nabla_jax.errors import UserError

PATCH = 2
"""Edge of the square of latent pixels which makes one token."""


def interpolate(x0: jax.Array, x1: jax.Array, time: jax.Array) -> jax.Array:
    """The point of the path at `time`.

    Args:
        x0: data [B, ...].
        x1: noise, the shape of `x0`.
        time: [B] in [0, 1]; 0 is data, 1 is noise.

    Returns:
        [B, ...] float32: at bfloat16's 8 bits neighbouring times would give the same point.
    """
    time = time.astype(jnp.float32).reshape(time.shape + (1,) * (x0.ndim - time.ndim))
    return (1 - time) * x0.astype(jnp.float32) + time * x1.astype(jnp.float32)


def velocity(x0: jax.Array, x1: jax.Array) -> jax.Array:
    """What the model learns to predict, `x1 - x0` (noise minus data), float32, the shape of its arguments."""
    return x1.astype(jnp.float32) - x0.astype(jnp.float32)


def logit_normal_time(key: jax.Array, shape: tuple[int, ...] = (), mean: float = 0.0) -> jax.Array:
    """Times `sigmoid(mean + n)` with n standard normal, float32 in (0, 1), not shifted by resolution.

    Args:
        key: one random key. For draws that do not depend on the batch, `vmap` over keys folded per sample.
        shape: of the result.
        mean: of the logit; above 0 favours noise.
    """
    return jax.nn.sigmoid(mean + jax.random.normal(key, shape, jnp.float32))


def velocity_loss(prediction: jax.Array, x0: jax.Array, x1: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """Mean squared error of the predicted velocity.

    Args:
        prediction: [B, N, D].
        x0, x1: data and noise, [B, N, D].
        weight: None or [B, N], one non-negative weight per token, not all zero in any picture. Weights are
            divided by their mean over each picture: equal weights of any size give the plain mean and a small
            bird counts as much as a large one.

    Returns:
        float32 scalar.
    """
    error = jnp.square(prediction.astype(jnp.float32) - velocity(x0, x1))
    if weight is None:
        return jnp.mean(error)
    weight = weight.astype(jnp.float32)
    return jnp.mean(error * (weight / jnp.mean(weight, axis=-1, keepdims=True))[..., None])


def foreground_weight(mask: jax.Array, factor: float) -> jax.Array:
    """Weights for `velocity_loss`: 1 on the background, `factor` on the foreground, linear in between.

    Args:
        mask: [B, H, W] at latent resolution, coverage in [0, 1].
        factor: weight of a token that the foreground covers wholly; positive.

    Returns:
        [B, N] float32, N in the order of `pack`.
    """
    coverage = jnp.mean(pack(mask.astype(jnp.float32)[:, None]), axis=-1)
    return 1 + (factor - 1) * coverage


def pack(latents: jax.Array) -> jax.Array:
    """Folds every 2x2 square of latent pixels into one token.

    Args:
        latents: [B, C, H, W], H and W even.

    Returns:
        [B, (H/2)(W/2), 4C]; tokens row by row, channel index `4 c + 2 dy + dx`.

    Raises:
        UserError: H or W is odd.
    """
    batch, channels, height, width = latents.shape
    rows, columns = _grid(height, width)
    patches = latents.reshape(batch, channels, rows, PATCH, columns, PATCH)
    return patches.transpose(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * PATCH * PATCH)


def unpack(tokens: jax.Array, height: int, width: int) -> jax.Array:
    """Inverse of `pack`.

    Args:
        tokens: [B, (H/2)(W/2), 4C].
        height, width: of the latent (H, W), both even.

    Returns:
        [B, C, H, W].

    Raises:
        UserError: the size is odd or does not fit the number of tokens.
    """
    rows, columns = _grid(height, width)
    batch, count, features = tokens.shape
    if count != rows * columns or features % (PATCH * PATCH):
        raise UserError(
            f"unpack: a {height}x{width} latent has {rows * columns} tokens of 4 C channels, "
            f"found {count} tokens of {features} channels"
        )
    patches = tokens.reshape(batch, rows, columns, features // (PATCH * PATCH), PATCH, PATCH)
    return patches.transpose(0, 3, 1, 4, 2, 5).reshape(batch, -1, height, width)


def _grid(height: int, width: int) -> tuple[int, int]:
    if height % PATCH or width % PATCH:
        raise UserError(f"latents are folded in 2x2 squares: height and width must be even, found {height}x{width}")
    return height // PATCH, width // PATCH
