"""Segment a video with the checkpoint that comes with the package: `python examples/demo.py [VIDEO]`.

Without a video, one is made from a photograph, as the paper makes its training videos from images: a view that moves,
turns and zooms over the picture.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from ausm_hf import VideoWriter
from ausm_hf.cli import segment


def moving_views(photo: Image.Image, num_frames: int = 32, size: tuple[int, int] = (240, 432)) -> list[np.ndarray]:
    """`num_frames` RGB frames (height, width, 3) of a camera that sways over `photo`."""
    height, width = size
    frames = []
    for phase in np.linspace(0, 2 * np.pi, num_frames):
        zoom = min(photo.width / width, photo.height / height) * (0.82 + 0.08 * np.cos(phase))
        angle = 0.1 * np.sin(phase)
        turn = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        center = np.array([photo.width, photo.height]) * (0.5 + np.array([0.04, 0.03]) * [np.sin(phase), np.cos(phase)])
        shift = center - turn @ [width / 2, height / 2]
        matrix = (*turn[0], shift[0], *turn[1], shift[1])
        frames.append(np.asarray(photo.transform((width, height), Image.Transform.AFFINE, matrix, Image.BICUBIC)))
    return frames


def main():
    with tempfile.TemporaryDirectory() as scratch:
        if len(sys.argv) > 1:
            video = sys.argv[1]
        else:
            from skimage import data

            video = str(Path(scratch) / "cat.mp4")
            frames = moving_views(Image.fromarray(data.cat()))
            with VideoWriter(video, fps=12, size=frames[0].shape[:2]) as writer:
                for frame in frames:
                    writer.write(frame)
        segment(video, output="demo")


if __name__ == "__main__":
    main()
