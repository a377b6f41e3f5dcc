"""The webcam: frames come one by one from the browser, and go back with their objects drawn on them."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from ..visualization import draw_overlay, object_labels
from .network import Network
from .unpack import Limits, Refused
from .visits import Visit

PAUSE = 3.0  # seconds without a frame after which a new stream begins


@dataclass
class CameraStream:
    """A stream of the model, and when its last frame came."""

    session: object
    size: tuple[int, int]
    threshold: float
    seen: float
    fps: float = 0.0


@torch.no_grad()
def see(visit: Visit, network: Network, frame: np.ndarray | None, threshold: float, limits: Limits):
    """
    The next frame of a visitor's camera.

    Returns:
        The frame with its objects drawn on it, and a line about them. Raises Refused for a frame that is too large.
    """
    if frame is None:
        return None, ""
    limits.check_size(frame.shape[1], frame.shape[0])
    if not 0 < threshold < 1:
        raise Refused("The threshold is a number between 0 and 1.")
    now = time.monotonic()
    stream = visit.camera
    if stream is None or (stream.size, stream.threshold) != (frame.shape[:2], threshold) or now - stream.seen > PAUSE:
        session = network.processor.init_video_session(foreground_threshold=threshold, seed=0)
        stream = visit.camera = CameraStream(session, frame.shape[:2], threshold, now)
    else:
        rate = 1 / max(1e-3, now - stream.seen)
        stream.fps = rate if stream.fps == 0 else 0.9 * stream.fps + 0.1 * rate
        stream.seen = now
    pixel_values = network.processor(images=frame)["pixel_values"]
    output = network.model(inference_session=stream.session, frame=pixel_values)
    result = network.processor.post_process_instance_segmentation(output, target_sizes=[stream.size])[0]
    objects = result["segments_info"]
    drawn = draw_overlay(frame, result["segmentation"].cpu().numpy(), object_labels(objects))
    rate = f", {stream.fps:.1f} frames per second" if stream.fps else ""
    return drawn, f"Frame {stream.session.next_frame_idx}, objects: {len(objects)}{rate}"
