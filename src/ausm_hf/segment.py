"""Segment a video from end to end: frames in, masks with ids out, files written. Constant memory."""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig

from ._register import BUNDLED_CHECKPOINT
from .export import ObjectsJsonWriter, OverlayVideoWriter, PngMaskWriter
from .model.modeling_ausm import AusmForUniversalSegmentation
from .model.pipeline_ausm import start_session
from .model.processing_ausm import AusmProcessor
from .model.session_ausm import AusmInferenceSession
from .video import read_video

FORMATS = ("mp4", "png", "json")


@dataclass
class FrameSegments:
    """
    What was found in one frame.

    Attributes:
        index (`int`): Number of the frame, from 0.
        time (`float` or `None`): Seconds since the first frame, where the source has a clock.
        frame (`np.ndarray`): uint8 RGB `(H, W, 3)`.
        masks (`np.ndarray`): int32 `(H, W)`: the id of the pixel's object, 0 is background.
        objects (`list[dict]`): `{"id": int, "label": str or None, "score": float}` of each object in `masks`.
    """

    index: int
    time: float | None
    frame: np.ndarray
    masks: np.ndarray
    objects: list[dict]


def load_model(
    model: str | os.PathLike | None = None, device: str = "auto", dtype: str = "auto"
) -> tuple[AusmForUniversalSegmentation, AusmProcessor]:
    """
    A model and its processor, ready to segment.

    Args:
        model: Folder of a checkpoint or its id on the Hub; the checkpoint that comes with the package by default.
        device: A device of torch; `"auto"` is the accelerator if there is one, else the CPU.
        dtype: `"float32"`, `"bfloat16"`, `"float16"`; `"auto"` is what the checkpoint says.

    Raises:
        ValueError: if there is no such checkpoint, device or dtype, or the checkpoint is of another model type.
    """
    name = str(BUNDLED_CHECKPOINT if model is None else model)
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator()
        device = "cpu" if accelerator is None else accelerator.type
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {dtype!r}; wanted is auto, float32, bfloat16 or float16")
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "ausm":
            raise ValueError(f"it is of type {config.model_type!r}; wanted is 'ausm'")
        loaded = AusmForUniversalSegmentation.from_pretrained(name, config=config, dtype=dtype)
        processor = AusmProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {name!r} can't be loaded: {error}") from error
    try:
        loaded = loaded.to(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} can't be used: {error}") from error
    return loaded.eval(), processor


def segment_video(
    source: Any,
    model: AusmForUniversalSegmentation,
    processor: AusmProcessor,
    masks: np.ndarray | Image.Image | None = None,
    threshold: float | None = None,
    session: AusmInferenceSession | None = None,
    max_objects: int | None = None,
) -> Iterator[FrameSegments]:
    """
    Segments a video frame by frame.

    Args:
        source: Anything that [`~ausm_hf.video.read_video`] takes.
        model, processor: As [`load_model`] returns them.
        masks: The objects of the first frame, integers `(H, W)` or an indexed image, pixel = object id, 0 =
            background. Without it the model finds objects by itself.
        threshold: Foreground probability above which something is an object; the model's own by default.
        session: A stream made ready by the caller (prompts in later frames, a label set) instead of one made from
            `masks` and `threshold`, which are then not given.
        max_objects: How many objects of a frame to show at most: those with the best scores (prompted ones always).
            The model follows the others all the same.

    Yields:
        [`FrameSegments`]

    Raises:
        ValueError: at once if the video can't be read or masks or threshold don't fit; later, if a frame can't be
            decoded or changes its size.
    """
    if session is not None and (masks is not None or threshold is not None):
        raise ValueError("masks and threshold are given beside session; wanted is a session that has them already")
    if max_objects is not None and max_objects < 1:
        raise ValueError(f"max_objects is {max_objects}; wanted is at least 1")
    source = read_video(source)
    if session is None:
        session = start_session(processor, source.size, masks, threshold)

    def results():
        for index, (time, frame) in enumerate(source.with_times()):
            pixel_values = processor(images=frame)["pixel_values"]
            output = model(inference_session=session, frame=pixel_values)
            least = 0.0
            if max_objects is not None and len(output.scores) > max_objects:
                least = float(output.scores.topk(max_objects).values[-1])
            result = processor.post_process_instance_segmentation(output, least, target_sizes=[source.size])[0]
            objects = [{key: info[key] for key in ("id", "label", "score")} for info in result["segments_info"]]
            yield FrameSegments(index, time, frame, result["segmentation"].cpu().numpy(), objects)

    return results()


def save_segments(
    results: Iterable[FrameSegments],
    output: str | os.PathLike,
    formats: Iterable[str] = FORMATS,
    fps: float | Fraction | None = None,
    name: str | None = None,
) -> list[Path]:
    """
    Writes results to files while they come, all of them or, if anything goes wrong, none.

    Args:
        results: As [`segment_video`] yields them.
        output: Folder to write into; made if it doesn't exist.
        formats: Which of `"mp4"` (`overlay.mp4`), `"png"` (`masks/00000.png` ..., indexed, of the frames' size) and
            `"json"` (`objects.json`, per object id, label, score, first and last frame and run-length masks).
        fps, name: Of the video, to be noted in the files.

    Returns:
        What was written.

    Raises:
        ValueError: for an unknown format, no results, or a place that can't be written to.
    """
    formats = check_formats(formats)
    output = Path(output)
    results = iter(results)
    first = next(results, None)
    if first is None:
        raise ValueError("results is empty; wanted is at least one frame")
    writers = {
        "mp4": lambda: OverlayVideoWriter(output / "overlay.mp4", fps, first.masks.shape),
        "png": lambda: PngMaskWriter(output / "masks"),
        "json": lambda: ObjectsJsonWriter(output / "objects.json", name, fps),
    }
    with ExitStack() as stack:
        opened = [stack.enter_context(writers[key]()) for key in formats]
        for result in chain([first], results):
            for writer in opened:
                writer.write(result.index, result.frame, result.masks, result.objects, result.time)
    return [writer.path for writer in opened]


def read_mask(path: str | os.PathLike) -> Image.Image:
    """The image of masks at `path`. Raises ValueError if it can't be read."""
    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError) as error:  # SyntaxError: a broken PNG
        raise ValueError(f"masks {str(path)!r} can't be read: {error}") from error
    return image


def check_formats(formats: Iterable[str]) -> list[str]:
    """The formats, each once. Raises ValueError if there is none or an unknown one."""
    formats = list(dict.fromkeys(formats))
    if not formats or not set(formats) <= set(FORMATS):
        raise ValueError(f"formats is {','.join(formats)!r}; wanted are some of {','.join(FORMATS)}")
    return formats


__all__ = ["FrameSegments", "load_model", "save_segments", "segment_video"]
