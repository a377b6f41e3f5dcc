"""`pipeline("video-segmentation")`."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import Pipeline

from .ahead_ausm import encode_ahead
from .processing_ausm import AusmProcessor
from .session_ausm import AusmInferenceSession
from .upright_ausm import upright

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
PROMPTS = {"masks", "boxes", "points", "labels", "scribbles"}
# Arguments of a model's `save_pretrained` that say where to push.
PUSH_ARGUMENTS = ("push_to_hub", "repo_id", "token", "private", "commit_message")


def start_session(
    processor: AusmProcessor,
    size: tuple[int, int],
    masks: np.ndarray | Image.Image | None = None,
    threshold: float | None = None,
    boxes: Mapping[int, Any] | None = None,
    points: Mapping[int, Any] | None = None,
    labels: Mapping[int, Any] | None = None,
    scribbles: Mapping[int, Any] | None = None,
    frame_idx: int = 0,
    find_new_objects: bool | None = None,
) -> AusmInferenceSession:
    """
    A stream whose frames will be handed over one by one, with the objects of its first frame if they are known.

    Args:
        processor ([`AusmProcessor`]): Makes the session.
        size (`tuple[int, int]`): Height and width of the frames.
        masks (integer array `(height, width)` or PIL image, *optional*): Objects of the first frame: a pixel is the
            id of its object, 0 is background.
        threshold (`float`, *optional*): Foreground probability above which something is an object; that of the
            model's configuration by default.
        boxes, points, labels, scribbles (`dict`, *optional*): Further objects of the first frame: from object id to
            a box `(x0, y0, x1, y1)`, to points `[(x, y), ...]`, to a label for each of the points (1 on the object, 0
            not on it; all 1 by default), to the points of a line on the object. See
            [`AusmProcessor.add_inputs_to_inference_session`].
        frame_idx (`int`, *optional*, defaults to 0): The frame that all these are of, if it isn't the first.
        find_new_objects (`bool`, *optional*): See [`AusmInferenceSession`].

    Without any objects the model finds them by itself.

    Returns:
        [`AusmInferenceSession`]

    Raises:
        ValueError: if `masks` has another type or size, negative ids, or no object, an id is in `masks` and elsewhere,
            or a box, point, label or scribble is wrong.
    """
    # ID vectors are drawn at random; with a seed the same video gives the same masks every time.
    session = processor.init_video_session(foreground_threshold=threshold, find_new_objects=find_new_objects, seed=0)
    split = {} if masks is None else _split_masks(masks, size)
    given: dict[str, Mapping[int, Any]] = {}
    named = {"boxes": boxes, "points": points, "labels": labels, "scribbles": scribbles}
    for name, of_objects in named.items():
        if of_objects is not None and not isinstance(of_objects, Mapping):
            raise ValueError(f"{name} is {of_objects!r:.80}; wanted is a dict from object id to its {name}")
        given[name] = of_objects or {}
        if twice := split.keys() & given[name].keys():
            raise ValueError(f"{name} has object {min(twice)}, which masks has too; wanted is each object once")
    for object_id in dict.fromkeys(chain(split, *given.values())):
        inputs: dict[str, Any] = {
            f"input_{name}": None if of_objects.get(object_id) is None else [of_objects[object_id]]
            for name, of_objects in given.items()
        }
        processor.add_inputs_to_inference_session(
            session, frame_idx, object_id, input_masks=split.get(object_id), original_size=(size[0], size[1]), **inputs
        )
    return session


def _split_masks(masks: np.ndarray | Image.Image, size: tuple[int, int]) -> dict[int, np.ndarray]:
    """The mask of each object of an indexed map."""
    if isinstance(masks, Image.Image) and len(masks.getbands()) > 1:
        raise ValueError(
            f"masks is an image of mode {masks.mode}; wanted is an indexed or grey one, pixel = object id"
        )
    kind, masks = type(masks).__name__, np.asarray(masks)
    if masks.dtype == bool:
        masks = masks.astype(np.uint8)
    if masks.ndim != 2 or not np.issubdtype(masks.dtype, np.integer):
        raise ValueError(
            f"masks is a {kind} ({masks.dtype}, {masks.shape}); wanted are integers of shape (height, width), pixel = "
            "object id"
        )
    if masks.shape != tuple(size):
        raise ValueError(f"masks is {masks.shape} (height, width); wanted is the size of the video, {tuple(size)}")
    obj_ids = [int(object_id) for object_id in np.unique(masks) if object_id != 0]
    if not obj_ids:
        raise ValueError("masks is empty: every pixel is 0; wanted is at least one object")
    return {object_id: masks == object_id for object_id in obj_ids}


def read_frames(source: Any) -> Iterable:
    """
    The frames of a video file or of a folder of images (in natural order of their names), upright, decoded one at a
    time; anything else is taken for an iterable of frames.

    With the package `ausm_hf` installed its `read_video` stands in for this: it reads more, and checks more.

    Raises:
        ValueError: if there is no such file or folder, it has no frames, or `source` can't be iterated over.
        ImportError: if a video file is to be decoded and PyAV is not installed.
    """
    if not isinstance(source, (str, Path)):
        if not isinstance(source, Iterable):
            raise ValueError(f"inputs is a {type(source).__name__}; wanted is a path or an iterable of frames")
        return [source] if isinstance(source, Image.Image) else source
    path = Path(source)
    if path.is_dir():
        paths = [p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
        paths.sort(key=lambda p: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", p.name)])
        if not paths:
            raise ValueError(f"folder {str(path)!r} has no images ({', '.join(IMAGE_SUFFIXES)})")
        return (ImageOps.exif_transpose(Image.open(p)) for p in paths)
    if not path.is_file():
        raise ValueError(f"inputs {str(path)!r}: no such file or folder")
    try:
        import av
    except ImportError as error:
        raise ImportError("Decoding a video needs PyAV: `pip install av`, or pass an iterable of frames.") from error

    def decode():
        try:
            with av.open(str(path)) as container:
                if container.streams.video[0].codec_context is None:  # PyAV before version 18 would crash
                    raise ValueError(f"video {str(path)!r} can't be decoded: its codec is unknown")
                for frame in container.decode(video=0):
                    yield upright(frame)
        except (av.FFmpegError, IndexError) as error:  # IndexError: there is no picture in it
            raise ValueError(f"video {str(path)!r} can't be decoded: {error}") from error

    return decode()


class VideoSegmentationPipeline(Pipeline):
    """
    Segments videos: follows the objects that are marked in the first frame, or finds, names and follows them itself.

    ```python
    >>> from transformers import pipeline
    >>> import ausm_hf

    >>> segment = pipeline("video-segmentation")
    >>> for objects in segment("video.mp4", stream=True):
    ...     print([(item["id"], item["label"]) for item in objects])
    ```
    """

    model: Any
    processor: AusmProcessor

    _load_processor: Any = True
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _load_feature_extractor: Any = False
    _load_tokenizer: Any = False

    # Opens what the pipeline is called with; the package puts `ausm_hf.read_video` here.
    read_video: Callable[[Any], Iterable] = staticmethod(read_frames)

    def __init__(self, *args, **kwargs):
        if wrong := sorted({"batch_size", "num_workers"} & {name for name in kwargs if kwargs[name] is not None}):
            raise ValueError(f"{wrong[0]} is given; frames of a video follow each other, and are decoded as they come")
        for name in ("image_processor", "feature_extractor"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is given; wanted is processor=AusmProcessor({name})")
        super().__init__(*args, **kwargs)
        if self.model.config.model_type != "ausm":
            raise ValueError(f"model is of type {self.model.config.model_type!r}; wanted is 'ausm'")
        if not hasattr(self.processor, "init_video_session"):
            raise ValueError(f"processor is {type(self.processor).__name__}; wanted is AusmProcessor")

    def __call__(
        self,
        inputs: Any,
        prompts: dict[str, Any] | None = None,
        threshold: float | None = None,
        stream: bool | None = None,
    ) -> list[list[dict]] | Iterator[list[dict]]:
        """
        Segment one video.

        Args:
            inputs:
                A path to a video or to a folder of images, or the frames: PIL images, numpy arrays `(H, W, 3)`,
                tensors `(3, H, W)`, or all in one array; uint8 in 0..255 or floating point in 0..1.
            prompts (`dict`, *optional*):
                The objects to follow, as they are in the first frame; without it the model finds objects by itself.
                - **masks** -- an integer array or an indexed PIL image of the frame's size, pixel = object id, 0 =
                  background;
                - **boxes** -- a dict from object id to a box `(x0, y0, x1, y1)` in pixels;
                - **points** -- a dict from object id to its points `[(x, y), ...]`;
                - **labels** -- a dict from object id to the labels of its points, 1 on the object and 0 not on it; all
                  1 by default;
                - **scribbles** -- a dict from object id to the points of a line on it.
            threshold (`float`, *optional*):
                Foreground probability above which something is an object; by default what the pipeline was made with,
                or else that of the model's configuration. Prompted objects are not thresholded.
            stream (`bool`, *optional*):
                Yield the results frame by frame, in constant memory, rather than return them all, as is the default
                where the pipeline was not made with it.

        Returns:
            For each frame a list with, for each object that is seen in it,
            - **id** (`int`) -- its id, the same over the whole video;
            - **label** (`str` or `None`) -- its class;
            - **score** (`float`) -- how sure the model is of object and class, 0 to 1;
            - **mask** (`PIL.Image.Image` of mode `L`) -- 255 on the object and 0 elsewhere, at the frame's size.

        Raises:
            ValueError: if the video can't be read, has no frames or changes its size, or the prompts don't fit it.
        """
        if prompts is not None and (not isinstance(prompts, Mapping) or not set(prompts) <= PROMPTS):
            raise ValueError(f"prompts must be a dict with keys of {sorted(PROMPTS)}, got {prompts!r:.100}")
        if prompts is not None and all(
            marked is None or (isinstance(marked, Mapping) and not marked) for marked in prompts.values()
        ):
            raise ValueError(f"prompts must mark an object; to let objects be found give None, got {prompts!r:.100}")
        source = self.read_video(inputs)
        live = getattr(source, "once", isinstance(inputs, Iterator))
        frames = iter(source)
        made_with = self._forward_params
        threshold = made_with.get("threshold") if threshold is None else threshold
        first = next(frames, None)
        if first is None:
            raise ValueError("inputs has no frames")
        size = self.preprocess(first)["size"]
        session = start_session(self.processor, size, threshold=threshold, **(prompts or {}))

        def encode(frame) -> dict:
            model_inputs = self.preprocess(frame, size)
            return model_inputs | {
                "pixel_values": self.model.encode_frames(model_inputs["pixel_values"].to(self.device))
            }

        def step(frame, model_inputs: dict) -> list[dict]:
            return self.postprocess(self.forward(model_inputs, session=session))

        results = encode_ahead(self.model, chain([first], frames), encode, step, live=live)
        return results if (made_with.get("stream") if stream is None else stream) else list(results)

    def _sanitize_parameters(self, **kwargs):
        if unknown := sorted(set(kwargs) - {"threshold", "stream"}):
            raise ValueError(f"unknown arguments {unknown}; wanted are threshold and stream, in a call also prompts")
        return {}, kwargs, {}

    def preprocess(self, frame, size: tuple[int, int] | None = None) -> dict:
        inputs = self.processor(images=frame)
        own_size = tuple(inputs["original_sizes"][0])
        if size is not None and own_size != size:
            raise ValueError(f"inputs has a frame of {own_size} (height, width) after frames of {size}")
        return {"pixel_values": inputs["pixel_values"], "size": own_size}

    def _forward(self, model_inputs: dict, session: AusmInferenceSession) -> dict:
        output = self.model(inference_session=session, frame=model_inputs["pixel_values"])
        return self.processor.post_process_instance_segmentation(output, target_sizes=[model_inputs["size"]])[0]

    def postprocess(self, model_outputs: dict) -> list[dict]:
        segmentation = model_outputs["segmentation"]
        return [
            {
                "id": segment["id"],
                "label": segment["label"],
                "score": segment["score"],
                "mask": Image.fromarray((segmentation == segment["id"]).to(torch.uint8).mul(255).numpy()),
            }
            for segment in model_outputs["segments_info"]
        ]

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """
        Saves model, processor and the code of both and of this pipeline, so that it also loads where the package is
        not installed: `pipeline("video-segmentation", model=..., trust_remote_code=True)`.

        Args:
            save_directory (`str` or `Path`): The folder to write; made if it doesn't exist.
            kwargs: Further arguments of the model's `save_pretrained`, as `push_to_hub=True, repo_id="me/my-ausm"`.
        """
        super().save_pretrained(str(save_directory), **kwargs)
        pushed = {name: kwargs[name] for name in PUSH_ARGUMENTS if name in kwargs}
        self.processor.save_pretrained(str(save_directory), **pushed)


__all__ = ["VideoSegmentationPipeline", "read_frames", "start_session"]
