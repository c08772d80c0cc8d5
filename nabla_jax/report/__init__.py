"""The results as one folder of static HTML: tables, plots, loss curve and a gallery. Opens anywhere,
offline.
"""

from nabla_jax.report.pages import write

__all__ = ["write"]
