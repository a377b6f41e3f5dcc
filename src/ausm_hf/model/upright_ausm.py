"""How a decoded frame of a video is shown."""

from typing import Any

import numpy as np

UNSPECIFIED = 2  # FFmpeg's AVCOL_SPC_UNSPECIFIED


def upright(frame) -> np.ndarray:
    """PyAV's frame as players show it, turned and mirrored as its video says: uint8 RGB `(height, width, 3)`."""
    # Where a video doesn't say what its colours are, players take those of HD for HD, FFmpeg those of SD for all.
    unknown = frame.colorspace == UNSPECIFIED and not frame.format.is_rgb
    hd = unknown and (frame.width >= 1280 or frame.height > 576)
    # Frames are too small for more threads of the colour conversion to pay.
    picture = frame.to_ndarray(format="rgb24", src_colorspace="ITU709" if hd else None, threads=1)
    if _is_mirrored(frame):
        picture = picture[::-1]
    return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90)))


def _is_mirrored(frame) -> bool:
    from av.sidedata.sidedata import SideDataContainer

    side_data: Any = SideDataContainer  # a frame and its own `side_data` would keep each other alive
    try:
        matrix = side_data(frame).get("DISPLAYMATRIX")
    except ValueError:  # PyAV gives none of it where it doesn't know all of it, as the EXIF data of JPEGs
        return False
    return matrix is not None and np.linalg.det(np.frombuffer(matrix, np.int32).reshape(3, 3)[:2, :2]) < 0
