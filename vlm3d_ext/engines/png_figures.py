"""Figures without a screen: made and turned into bytes the same way everywhere."""

from __future__ import annotations

import io
from typing import Any

__all__ = ["as_png", "new_figure"]


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure of a size in inches, which needs no screen."""
    # matplotlib takes a second to import, which only what draws should pay
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def as_png(figure: Any, dpi: int = 120) -> bytes:
    """Return a figure as PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    # matplotlib would write its version into the file, which would change although the picture does not
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
