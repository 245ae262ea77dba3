"""Figures under the project's own settings, whatever the user's matplotlibrc and MPLBACKEND say.

    with new_figure(Path("curves.png"), figsize=(8, 4)) as figure:
        figure.subplots().plot(losses)

Import matplotlib's names from here: a notebook sets MPLBACKEND to a backend of its own, with which other environments
cannot even import matplotlib.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from cli import write_atomically

os.environ["MPLBACKEND"] = "agg"

import matplotlib  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

__all__ = ["Axes", "Figure", "new_figure"]


@contextlib.contextmanager
def new_figure(path: Path, figsize: tuple[float, float], *, dpi: int = 150, software: str = "") -> Iterator[Figure]:
    """Yield a figure to draw on; when the block succeeds, it becomes the PNG file `path`.

    software: written into the PNG's metadata, so that a script recognises its own files.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=figsize, layout="constrained")
        yield figure
        with write_atomically(path) as temporary:
            metadata = {"Software": software} if software else None
            figure.savefig(temporary, format="png", dpi=dpi, metadata=metadata)
