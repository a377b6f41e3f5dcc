"""Segment videos from end to end: frames in, masks with ids out, files written. Constant memory."""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils.logging import tqdm

from ._register import BUNDLED_CHECKPOINT
from .archive import find_videos, work_through
from .export import (
    CocoWriter,
    JsonlWriter,
    ObjectsJsonWriter,
    OverlayVideoWriter,
    PngMaskWriter,
    YoutubeVisWriter,
)
from .model.ahead_ausm import encode_ahead
from .model.modeling_ausm import AusmForUniversalSegmentation
from .model.pipeline_ausm import start_session
from .model.processing_ausm import AusmProcessor
from .model.session_ausm import AusmInferenceSession
from .video import read_video

# And what each is written to, within the folder of the results.
FORMATS = {
    "mp4": "overlay.mp4",
    "png": "masks",
    "json": "objects.json",
    "jsonl": "frames.jsonl",
    "coco": "coco.json",
    "youtube_vis": "youtube_vis.json",
}
USUAL_FORMATS = ("mp4", "png", "json")


@dataclass
class FrameSegments:
    """
    What was found in one frame.

    Attributes:
        index (`int`): Number of the frame in the video, from 0. Those of frames that can't be decoded are left out.
        time (`float` or `None`): Seconds since the first frame, where the source has a clock.
        frame (`np.ndarray`): uint8 RGB `(H, W, 3)`.
        masks (`np.ndarray`): int32 `(H, W)`: the id of the pixel's object, 0 is background.
        objects (`list[dict]`): `{"id": int, "label": str or None, "label_id": int, "score": float}` of each object in
            `masks`; `label_id` is the label's index in the model's label set, -1 for `None`.
    """

    index: int
    time: float | None
    frame: np.ndarray
    masks: np.ndarray
    objects: list[dict]


class FollowedBack:
    """What was followed back to frames before its prompt, kept until these frames are due."""

    def __init__(self):
        self._kept: dict[int, tuple[bytes, list[dict]]] = {}

    def keep(self, index: int, masks: np.ndarray, objects: list[dict]):
        """Of frame `index`, `masks` and `objects` as in [`FrameSegments`]."""
        # Compressed, a map is about as small as its run-lengths: a few kB.
        self._kept[index] = zlib.compress(masks.tobytes(), 1), objects

    def add_to(self, result: FrameSegments) -> FrameSegments:
        """The frame with what was kept of it too, in the pixels that `result` leaves."""
        if result.index not in self._kept:
            return result
        kept, objects = self._kept.pop(result.index)
        earlier = np.frombuffer(zlib.decompress(kept), np.int32).reshape(result.masks.shape)
        masks = np.where(result.masks == 0, earlier, result.masks)
        shown = np.unique(masks)
        return replace(
            result, masks=masks, objects=[*result.objects, *(item for item in objects if item["id"] in shown)]
        )


def load_model(
    model: str | os.PathLike | None = None, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> tuple[AusmForUniversalSegmentation, AusmProcessor]:
    """
    A model and its processor, ready to segment.

    Args:
        model: Folder of a checkpoint or its id on the Hub; the checkpoint that comes with the package by default.
        device: A device of torch; `"auto"` is the accelerator if there is one, else the CPU (on Macs the CPU: nothing
            was measured on their GPUs, which `"mps"` asks for). Among several, a process
            that `torchrun` or `accelerate launch` started takes the one of its number.
        dtype: float32, bfloat16 or float16, or the name of one; `"auto"` is what the checkpoint says.

    Raises:
        ValueError: if there is no such checkpoint, device or dtype, or the checkpoint is of another model type, lacks
            weights, or holds some that are not finite or of another shape. Weights are read from safetensors alone:
            nothing is unpickled.
    """
    name = str(BUNDLED_CHECKPOINT if model is None else model)
    if device == "auto":
        # A build of torch for CUDA names it also on a machine that has no GPU.
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator is not None and accelerator.type == "mps":
            accelerator = None  # nothing was measured on Apple's GPUs
        device = "cpu" if accelerator is None else accelerator.type
        # `torchrun` and `accelerate launch` number the processes of a machine: each takes a device of its own.
        if accelerator is not None and "LOCAL_RANK" in os.environ and torch.accelerator.device_count() > 1:
            device = f"{device}:{int(os.environ['LOCAL_RANK']) % torch.accelerator.device_count()}"
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {dtype!r}; wanted is auto, float32, bfloat16 or float16")
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "ausm":
            raise ValueError(f"it is of type {config.model_type!r}; wanted is 'ausm'")
        loaded: Any
        about: Any
        loaded, about = AusmForUniversalSegmentation.from_pretrained(
            name, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        if about["missing_keys"]:
            raise ValueError(f"it lacks {len(about['missing_keys'])} weights, such as {min(about['missing_keys'])}")
        for key, weights in loaded.state_dict().items():
            if weights.is_floating_point() and not weights.isfinite().all():
                raise ValueError(f"its weights {key} are not finite")
        processor = AusmProcessor.from_pretrained(name)
    # RuntimeError: weights of another shape; SafetensorError: a file that was cut; StrictDataclassError: sizes in the
    # configuration that can't be.
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"model {name!r} can't be loaded: {error}") from error
    try:
        loaded = loaded.to(device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise ValueError(f"device {device!r} can't be used: {error}") from error
    if loaded.device.type == "cpu":
        # glibc gives memory back that is freed at the end of a frame, and the kernel clears it anew for the next one:
        # a tenth of the time. Having freed a block as large as this, glibc keeps up to twice as much.
        torch.empty(31 * 2**20, dtype=torch.uint8)
    return loaded.eval(), processor


# Settings that say where and how a model was stored.
STORAGE = "_name_or_path architectures auto_map custom_pipelines dtype processor_class transformers_version".split()


def fingerprint(model: AusmForUniversalSegmentation, processor: AusmProcessor) -> str:
    """What tells one model from another, wherever it lies: 16 letters of its weights and its settings."""
    told = [_settings(model.config.to_dict()), _settings(processor.image_processor.to_dict())]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _settings(content: dict) -> dict:
    """What a model is, but for `STORAGE`."""
    return {
        name: _settings(value) if isinstance(value, dict) else value
        for name, value in content.items()
        if name not in STORAGE
    }


def segment_video(
    source: Any,
    model: AusmForUniversalSegmentation,
    processor: AusmProcessor,
    masks: np.ndarray | Image.Image | None = None,
    threshold: float | None = None,
    session: AusmInferenceSession | None = None,
    max_objects: int | None = None,
    prompts: dict[str, dict[int, Any]] | None = None,
    prompt_frame: int = 0,
    find_new_objects: bool | None = None,
    backward: bool = False,
) -> Iterator[FrameSegments]:
    """
    Segments a video frame by frame.

    Args:
        source: Anything that [`~ausm_hf.video.read_video`] takes.
        model, processor: As [`load_model`] returns them.
        masks: Objects of the prompted frame, integers `(H, W)` or an indexed image, pixel = object id, 0 =
            background. Without it and `prompts` the model finds objects by itself.
        threshold: Foreground probability above which something is an object; the model's own by default.
        session: A stream made ready by the caller instead of one made here; then none of the other arguments that
            say what to look for is given. Its next frame is `prompt_frame`, the first one by default.
        max_objects: How many objects of a frame to show at most: those with the best scores (prompted ones always).
            The model follows the others all the same.
        prompts: Further objects of the prompted frame: `{"boxes": {id: (x0, y0, x1, y1)}, "points": {id: [(x, y),
            ...]}, "labels": {id: [1 on the object or 0 not on it, ...]}, "scribbles": {id: [(x, y), ...]}}`, each as
            far as wanted, in pixels.
        prompt_frame: Index of the frame that `masks` and `prompts` belong to. Nothing is looked for in the frames
            before it, unless `find_new_objects` or `backward`.
        find_new_objects: Whether the model looks for objects by itself; only without prompts, by default.
        backward: Follow the prompted objects from the prompted frame back to the first one too. That part is worked
            on first, reading the video piece by piece from its end (see [`~ausm_hf.video.VideoSource.backward`]), and
            its masks are kept, compressed, until their frames are due; a progress bar tells of it
            (`transformers.utils.logging.disable_progress_bar()` for none). Not for sources that can be read only once,
            nor with `find_new_objects`.

    Yields:
        [`FrameSegments`] of each frame, in the order of the video.

    Raises:
        ValueError: at once if the video can't be read, prompts don't fit it or arguments don't fit together; later,
            if a frame changes its size, or the prompted one is not there.
    """
    _check_max_objects(max_objects)
    if unknown := set(prompts or {}) - {"boxes", "points", "labels", "scribbles"}:
        raise ValueError(
            f"prompts has {sorted(unknown)}; wanted are boxes, points, labels or scribbles, and masks beside it"
        )
    prompted = masks is not None or any((prompts or {}).values())
    if session is not None and (prompted or threshold is not None or find_new_objects is not None):
        raise ValueError(
            "masks, prompts, threshold or find_new_objects are given beside session; wanted is a session that has them"
        )
    if not prompted and (backward or (prompt_frame != 0 and session is None)):
        raise ValueError("prompt_frame or backward are given without masks or prompts")
    if backward and find_new_objects:
        raise ValueError("backward and find_new_objects are given; backwards only what is prompted can be followed")
    source = read_video(source)
    if backward and source.once:
        raise ValueError(f"backward is given; video {source.name!r} can be read only once")
    if not isinstance(prompt_frame, (int, np.integer)) or prompt_frame < 0:
        raise ValueError(f"prompt_frame is {prompt_frame!r}; wanted is an integer of at least 0")
    prompt_frame = int(prompt_frame)
    # Images and lists have no rate, and their number is sure; a file's header may count the first of its parts alone.
    if source.fps is None and source.num_frames is not None and prompt_frame >= source.num_frames:
        raise ValueError(f"prompt_frame is {prompt_frame}; the video has {source.num_frames} frames, counted from 0")

    if session is not None and session.video_size not in (None, source.size):
        raise ValueError(f"session is of a video of {session.video_size} (height, width); this one has {source.size}")

    is_own = session is None  # prompts in another's session may be of what is segmented next
    # A session starts with its first prompts, unless there is something to find before them.
    start = 0 if find_new_objects else prompt_frame

    def new_session():
        return start_session(
            processor,
            source.size,
            masks,
            threshold,
            **(prompts or {}),
            frame_idx=prompt_frame - start,
            find_new_objects=find_new_objects,
        )

    def follow(session, frames, first):
        """Segments `frames`, of which the session's next one has the index `first`."""
        offset = session.next_frame_idx - first

        def encode(frame):
            return model.encode_frames(processor(images=frame[2])["pixel_values"].to(model.device))

        def step(frame, features):
            index, time, image = frame
            session.next_frame_idx = offset + abs(index - first) + first  # frames may be missing
            if lost := [frame_idx for frame_idx in session.prompts if frame_idx < session.next_frame_idx]:
                raise ValueError(
                    f"frame {min(lost) - offset} of {source.name!r} has prompts; it can't be decoded, or the video "
                    "ends before it"
                )
            output = model(inference_session=session, frame=features)
            least = 0.0
            if max_objects is not None and len(output.scores) > max_objects:
                least = float(output.scores.topk(max_objects).values[-1])
            result = processor.post_process_instance_segmentation(output, least, target_sizes=[source.size])[0]
            return FrameSegments(
                index, time, image, result["segmentation"].cpu().numpy(), [dict(x) for x in result["segments_info"]]
            )

        return encode_ahead(model, frames, encode, step, live=source.once)

    def results(session):
        earlier = FollowedBack()
        if backward and prompt_frame > 0:
            back = follow(new_session(), source.backward(prompt_frame), prompt_frame)
            for result in tqdm(back, "back to the start", prompt_frame + 1, unit="frame", leave=False):
                earlier.keep(result.index, result.masks, result.objects)
        frames = source.read()
        index = -1
        for index, time, frame in frames:
            if index >= start:
                break
            yield earlier.add_to(FrameSegments(index, time, frame, np.zeros(source.size, np.int32), []))
        if index < start:
            raise ValueError(f"prompt_frame is {prompt_frame}; the video has {index + 1} frames, counted from 0")
        for result in follow(session, chain([(index, time, frame)], frames), start):
            yield result
            last = result.index
        if is_own and session.prompts:
            raise ValueError(f"prompt_frame is {prompt_frame}; the video has {last + 1} frames, counted from 0")

    return results(new_session() if session is None else session)


def save_segments(
    results: Iterable[FrameSegments],
    output: str | os.PathLike,
    formats: Iterable[str] = USUAL_FORMATS,
    fps: float | Fraction | None = None,
    name: str | None = None,
    pixel_aspect: Fraction = Fraction(1),
    sound: str | os.PathLike | None = None,
) -> list[Path]:
    """
    Writes results to files while they come, all of them or, if anything goes wrong, none.

    Args:
        results: As [`segment_video`] yields them.
        output: Folder to write into; made if it doesn't exist.
        formats: Which of
            - `"mp4"`: `overlay.mp4`, the video with its objects drawn on it, and its `sound`;
            - `"png"`: `masks/00000.png` ..., indexed, of the frames' size;
            - `"json"`: `objects.json`, per object id, label, score, first and last frame and run-length masks;
            - `"jsonl"`: `frames.jsonl`, a line per frame with the same;
            - `"coco"`: `coco.json`, an image per frame; `"youtube_vis"`: `youtube_vis.json`. Annotations as in the
              data sets of these names, for the tools that read them.
        fps, name, pixel_aspect, sound: Of the video ([`~ausm_hf.video.VideoSource`]), for the files.

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
    # Where each frame has its time, the rate is but a name: that of a time-lapse may be less than can be written.
    overlay_fps = max(fps, 0.01) if fps is not None and fps > 0 and first.time is not None else fps
    writers: dict[str, Callable] = {
        "mp4": lambda path: OverlayVideoWriter(path, overlay_fps, first.masks.shape, pixel_aspect, sound),
        "png": PngMaskWriter,
        "json": lambda path: ObjectsJsonWriter(path, name, fps),
        "jsonl": JsonlWriter,
        "coco": lambda path: CocoWriter(path, name, fps),
        "youtube_vis": lambda path: YoutubeVisWriter(path, name, fps),
    }
    with ExitStack() as stack:
        opened = [stack.enter_context(writers[key](output / FORMATS[key])) for key in formats]

        def write(result: FrameSegments):
            for writer in opened:
                writer.write(result.index, result.frame, result.masks, result.objects, result.time)

        # A frame is drawn and encoded while the next one is segmented. The thread ends before the writers close.
        thread = stack.enter_context(ThreadPoolExecutor(1))
        written = thread.submit(write, first)
        for result in results:
            written.result()
            written = thread.submit(write, result)
        written.result()
        for writer in opened:
            writer.finish()
    return [writer.path for writer in opened]


def segment_videos(
    inputs: Iterable[str | os.PathLike],
    output: str | os.PathLike,
    model: AusmForUniversalSegmentation,
    processor: AusmProcessor,
    formats: Iterable[str] = USUAL_FORMATS,
    threshold: float | None = None,
    max_objects: int | None = None,
    strict: bool = False,
) -> Iterator[dict]:
    """
    Finds and follows objects in many videos, each once, in this process and in any others, on this machine and on any
    others, that were started in the same way and share the folder `output`. A process may be killed and started again
    at any time. How they agree, and what the same results to the byte depend on, is told at the top of
    [`ausm_hf.archive`].

    Args:
        inputs: See [`~ausm_hf.archive.find_videos`].
        output: Folder to write into. The results of a video come to lie in `output/<its path without suffix>/`, all
            at once; beside them `video.json`, the video's line of the manifest. Results of a video that has changed
            since are replaced. What a pattern matches in `output` is no video.
        model, processor: As [`load_model`] returns them.
        formats: See [`save_segments`].
        threshold, max_objects: See [`segment_video`].
        strict: Whether a video fails if one of its frames can't be decoded.

    Yields:
        for each video, when it is finished by whichever process, its line of `output/manifest.jsonl`: `{"name",
        "video": path, "status": "done" or "failed", "error": str or None}`, and of one that is done also `"frames"`
        and `"skipped"`: how many frames it has, and how many more could not be decoded.

    Raises:
        ValueError: if there are no such videos or formats, or `output` holds results made with other settings.
    """
    formats = check_formats(formats)
    _check_max_objects(max_objects)
    processor.init_video_session(foreground_threshold=threshold)  # refuses a wrong one, before a video is blamed
    videos = find_videos(inputs, output)

    def work(path: str, folder: Path) -> dict:
        source = read_video(path, strict=strict)
        num_frames = 0

        def counted(results):
            nonlocal num_frames
            for num_frames, result in enumerate(results, 1):  # noqa: B007
                yield result

        results = counted(segment_video(source, model, processor, threshold=threshold, max_objects=max_objects))
        save_segments(results, folder, formats, source.fps, source.name, source.pixel_aspect, source.sound)
        return {"frames": num_frames, "skipped": source.num_skipped}

    settings = {
        "model": fingerprint(model, processor),
        "dtype": str(model.dtype),
        "formats": formats,
        "threshold": threshold,
        "max_objects": max_objects,
        "strict": strict,
    }
    return work_through(videos, output, work, settings)


def _check_max_objects(max_objects: int | None):
    if max_objects is not None and max_objects < 1:
        raise ValueError(f"max_objects is {max_objects}; wanted is at least 1")


def read_mask(path: str | os.PathLike) -> Image.Image:
    """The image of masks at `path`. Raises ValueError if it can't be read, or is a JPEG, which blurs ids."""
    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise ValueError(f"masks {str(path)!r} can't be read: {error}") from error
    if image.format in ("JPEG", "MPO"):
        raise ValueError(f"masks {str(path)!r} is a JPEG, whose pixels aren't quite what was drawn; wanted is a PNG")
    return image


def check_formats(formats: Iterable[str]) -> list[str]:
    """The formats, each once. Raises ValueError if there is none or an unknown one."""
    if isinstance(formats, str):
        formats = formats.split(",")
    formats = list(dict.fromkeys(formats))
    if not formats or not set(formats) <= set(FORMATS):
        raise ValueError(f"formats is {','.join(formats)!r}; wanted are some of {','.join(FORMATS)}")
    return formats


__all__ = ["FrameSegments", "load_model", "save_segments", "segment_video", "segment_videos"]
