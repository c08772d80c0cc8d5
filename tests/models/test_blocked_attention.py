"""Attention in blocks of queries against torch's: results and gradients, padded keys and queries that fill no block."""

import jax
import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from nabla_jax.models.attention import attend


@pytest.mark.parametrize(("queries", "padding"), [(5, 0), (385, 0), (800, 9)])
def test_equals_torch(queries: int, padding: int) -> None:
    rng = np.random.default_rng(queries)
    shapes = {"q": queries, "k": 30, "v": 30, "by": queries}
    q, k, v, by = (rng.normal(size=(2, n, 3, 8)).astype(np.float32) for n in shapes.values())
    valid = np.ones((2, 30), bool)
    valid[1, 30 - padding :] = False

    def product(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = attend(q, k, v, valid=valid if padding else None, implementation="chunked")
        return (found * by).sum(), found

    (_, found), gradients = jax.jit(jax.value_and_grad(product, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    tensors = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
    mask = torch.from_numpy(valid)[:, None, None]
    expected = scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors), attn_mask=mask).transpose(1, 2)
    (expected * torch.from_numpy(by)).sum().backward()
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=0, atol=2e-6)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        assert tensor.grad is not None
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=0, atol=1e-5)
