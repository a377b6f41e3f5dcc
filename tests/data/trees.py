"""Writers of miniature data sets; the layouts are those of the published ones."""

from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 48, 64


def draw_frame(t: int) -> np.ndarray:
    """A frame whose left upper pixel tells its number."""
    frame = np.random.default_rng(t).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    frame[:4, :4] = 10 * t
    return frame


def write_frames(folder: Path, names: list[str], suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for t, name in enumerate(names):
        Image.fromarray(draw_frame(t)).save(folder / f"{name}{suffix}")


def index_mask(t: int, ids: list[int]) -> np.ndarray:
    """Squares side by side, one per id, that move right by a pixel a frame."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    for n, i in enumerate(ids):
        mask[10:20, 5 + 15 * n + t : 15 + 15 * n + t] = i
    return mask


def write_mask(path: Path, mask: np.ndarray) -> None:
    """An indexed PNG whose palette is far from its indices, as DAVIS has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask, mode="P")
    image.putpalette([channel for i in range(256) for channel in ((i * 37) % 256, 0, 255 - i)])
    image.save(path)
