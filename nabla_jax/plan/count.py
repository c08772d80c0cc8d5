"""Floating-point operations and saved activations of any function, counted in its trace.

XLA's own count takes the body of a loop once, however often it runs; these take it as often as it runs.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


def operations(function: Callable[..., Any], *arguments: Any) -> float:
    """Multiplications and additions of the matrix products and convolutions in ``function`` of these shapes.

    Loops of a known length count as often as they run; of branches the dearest counts; while loops are not counted,
    because how often they run is not known.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of_jaxpr(jaxpr: Any) -> float:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> float:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left = equation.invars[0].aval.shape
        inner = np.prod([left[axis] for axis in contracted], dtype=np.float64)
        return float(2 * np.prod(equation.outvars[0].aval.shape, dtype=np.float64) * inner)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = parameters["dimension_numbers"].rhs_spec[0]
        per_result = np.prod(kernel, dtype=np.float64) / kernel[outputs]
        return float(2 * np.prod(equation.outvars[0].aval.shape, dtype=np.float64) * per_result)
    if name == "cond":
        return max(_of_jaxpr(branch.jaxpr) for branch in parameters["branches"])
    inside = sum(_of_jaxpr(jaxpr) for jaxpr in _jaxprs(parameters))
    return inside * parameters["length"] if name == "scan" else inside


def _jaxprs(parameters: dict[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        if hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr") and hasattr(value.jaxpr, "eqns"):
            yield value.jaxpr


def saved_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    """Bytes made from the last argument that ``function`` keeps for its gradient by the first.

    Arguments themselves are not counted, and nothing twice. It is what the trace keeps: XLA may fuse some of it away.
    """
    leaves, structure = jax.tree.flatten(arguments[0])

    def forward(leaves: list[Any], *others: Any) -> Any:
        _, backward = jax.vjp(lambda first: function(first, *others), jax.tree.unflatten(structure, leaves))
        # The backward pass is a tree whose leaves are what it remembers.
        return jax.tree.leaves(backward)

    traced = jax.make_jaxpr(forward)(leaves, *arguments[1:]).jaxpr
    given = traced.invars[-len(jax.tree.leaves(arguments[-1])) :]
    made: set[int] = set()
    sources = {id(variable) for variable in given}
    for equation in traced.eqns:
        if any(id(variable) in sources or id(variable) in made for variable in equation.invars):
            made |= {id(variable) for variable in equation.outvars}
    kept = {id(variable): variable.aval for variable in traced.outvars if id(variable) in made}
    return sum(aval.size * aval.dtype.itemsize for aval in kept.values())
