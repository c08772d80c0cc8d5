"""The results as one folder of static HTML: the paper's table, plots, a gallery of every pair.

Opens from disk, without server or network.
"""

from nabla_jax.report.pages import write

__all__ = ["write"]
