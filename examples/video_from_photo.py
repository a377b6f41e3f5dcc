"""Make a short video from a photograph: `python examples/video_from_photo.py astronaut.mp4 [PHOTO]`.

A view moves, turns and zooms over the picture, as in the pseudo-videos that the paper trains on. By default the
picture is NASA's portrait of Eileen Collins, which ships with scikit-image.
"""

import sys

import numpy as np
from PIL import Image

from ausm_hf import VideoWriter


def moving_views(photo: Image.Image, num_frames: int = 32, size: tuple[int, int] = (320, 320)) -> list[np.ndarray]:
    """`num_frames` RGB frames (height, width, 3) of a camera that sways over `photo`."""
    height, width = size
    frames = []
    for phase in np.linspace(0, 2 * np.pi, num_frames):
        # The affine map takes pixels of the frame to pixels of the photograph.
        scale = min(photo.width / width, photo.height / height) * (0.74 + 0.08 * np.cos(phase))
        angle = np.radians(8) * np.sin(phase)
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        sway = np.array([0.06 * np.sin(phase), 0.04 * np.sin(2 * phase)])
        shift = np.array(photo.size) * (0.5 + sway) - turn @ [width / 2, height / 2]
        matrix = (*turn[0], shift[0], *turn[1], shift[1])
        view = photo.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
        frames.append(np.asarray(view))
    return frames


def main():
    if len(sys.argv) > 2:
        photo = Image.open(sys.argv[2]).convert("RGB")
    else:
        from skimage import data

        photo = Image.fromarray(data.astronaut())
    frames = moving_views(photo)
    with VideoWriter(sys.argv[1], fps=12, size=frames[0].shape[:2]) as writer:
        for frame in frames:
            writer.write(frame)


if __name__ == "__main__":
    main()
