"""Clips to try, made when the demo starts: a view that sways over a photograph. They need no network."""

from pathlib import Path

import numpy as np
from PIL import Image

from ..video import VideoWriter

# Photographs that ship with scikit-image: NASA's portrait of Eileen Collins, a cat, a cup of coffee.
PHOTOS = ("astronaut", "cat", "coffee")


def make_examples(folder: Path) -> list[Path]:
    """Writes `astronaut.mp4` and so on, 4 seconds of 12 frames each, and returns their paths."""
    from skimage import data

    folder.mkdir(parents=True, exist_ok=True)
    paths, width = [], 432
    for name in PHOTOS:
        photo = Image.fromarray(getattr(data, name)())
        height = round(width * photo.height / photo.width / 2) * 2
        paths.append(folder / f"{name}.mp4")
        with VideoWriter(paths[-1], fps=12, size=(height, width)) as writer:
            for phase in np.linspace(0, 2 * np.pi, 48, endpoint=False):
                zoom = 0.86 + 0.06 * np.cos(phase)
                center = 0.5 + (1 - zoom) / 2 * np.array([0.8 * np.sin(phase), 0.8 * np.sin(2 * phase)])
                corners = np.concatenate([center - zoom / 2, center + zoom / 2]) * (photo.size * 2)
                view = photo.resize((width, height), Image.Resampling.BICUBIC, box=tuple(corners))
                writer.write(np.asarray(view))
    return paths
