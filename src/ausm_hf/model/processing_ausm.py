"""Videos and prompts in, masks out."""

import operator
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .image_processing_ausm import AusmImageProcessor, frame_to_tensor
from .prompts_ausm import ObjectPrompt
from .session_ausm import AusmInferenceSession, AusmVideoSegmentationOutput


class AusmProcessor(ProcessorMixin):
    """
    Prepares frames, videos and prompts for AUSM and turns what it predicts into masks of the video's own size.

    Args:
        image_processor ([`AusmImageProcessor`]): What is done to a frame.
    """

    def __init__(self, image_processor: AusmImageProcessor, **kwargs):
        super().__init__(image_processor, **kwargs)

    def __call__(
        self,
        images: Any = None,
        videos: Any = None,
        masks: Any = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            images:
                Frames, see [`AusmImageProcessor.preprocess`].
            videos:
                A video or a list of videos. A video is an array `(T, H, W, C)`, a tensor `(T, C, H, W)` or an iterable
                of frames. It is held in memory as a whole: for long videos see `init_video_session`.
            masks (`list[torch.Tensor]` or `torch.Tensor`, *optional*):
                For training: the true masks of each video's objects, of shape `(N, T, H, W)` and the frames' size.
            return_tensors (`str`, *optional*):
                As for images.
            kwargs:
                Further arguments of [`AusmImageProcessor.preprocess`]. `do_sample_frames`, which transformers' video
                processors know, may only be false: a history needs every frame.

        Returns:
            [`BatchFeature`] with, for images, `pixel_values` and `original_sizes`; for videos, `pixel_values_videos`,
            a float32 tensor of shape `(B, T, 3, H, W)`; for masks, `mask_labels`, a list of bool tensors
            `(N, T, H, W)` of the size of `pixel_values_videos`.

        Raises:
            ValueError: if there is nothing to do, or something is no frame, or videos differ in length or size.
        """
        if images is None and videos is None:
            raise ValueError("images or videos must be given, got neither")
        if masks is not None and videos is None:
            raise ValueError("masks are those of videos, got no videos")
        if kwargs.pop("do_sample_frames", False):
            raise ValueError("do_sample_frames must be false: sample the frames before, if at all")
        data = {}
        if images is not None:
            data.update(self.image_processor(images, **kwargs))
        if videos is not None:
            videos, masks = _as_batch(videos, masks)
            features = [self.image_processor(list(video), **kwargs) for video in videos]
            shapes = {tuple(feature["pixel_values"].shape) for feature in features}
            if len(shapes) > 1:
                raise ValueError(f"videos must agree in length and size to make a batch, got {sorted(shapes)}")
            data["pixel_values_videos"] = torch.stack([feature["pixel_values"] for feature in features])
            if masks is not None:
                data["mask_labels"] = [
                    _resize_mask_labels(video_masks, feature) for video_masks, feature in zip(masks, features)
                ]
        # The masks of each video stay a tensor of their own: videos differ in their number of objects.
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["mask_labels"])

    def init_video_session(
        self,
        video: Any = None,
        inference_device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        foreground_threshold: float | None = None,
        find_new_objects: bool | None = None,
        label_set: str | None = None,
        seed: int | None = None,
        keep_results: bool = False,
    ) -> AusmInferenceSession:
        """
        A new stream.

        Args:
            video (*optional*):
                Its frames, for `model.propagate_in_video_iterator`: an array `(T, H, W, C)`, a tensor `(T, C, H, W)`
                or any iterable of frames. They are taken and preprocessed one at a time; one that can't be read or
                segmented stays the next. Leave it out to hand the frames to the model as they come.
            inference_device (`str` or `torch.device`, *optional*, defaults to `"cpu"`), dtype (`torch.dtype`,
                *optional*, defaults to `torch.float32`):
                Where and as what the video's frames are prepared; the model moves them to itself.
            foreground_threshold, find_new_objects, label_set, seed, keep_results:
                See [`AusmInferenceSession`].

        Returns:
            [`AusmInferenceSession`]

        Raises:
            ValueError: if the video is empty or no iterable of frames. If a later frame is no frame or has another
                size, the error comes when that frame is reached.
        """
        frames, num_frames, height, width = None, None, None, None
        if video is not None:
            if isinstance(video, (str, bytes)) or not isinstance(video, Iterable):
                raise ValueError(
                    f"video must be an array, a tensor or an iterable of frames, got {video!r}; decode a file first"
                )
            if isinstance(video, (np.ndarray, torch.Tensor)) and video.ndim != 4:
                raise ValueError(
                    f"video must have 4 axes if it is an array or a tensor, got shape {tuple(video.shape)}"
                )
            num_frames = len(video) if isinstance(video, Sized) else None
            iterator = iter(video)
            first = next(iterator, None)
            if first is None:
                raise ValueError("video must have at least one frame, got none")
            height, width = frame_to_tensor(first).shape[-2:]
            prepare = partial(self._prepare, size=(height, width), device=inference_device, dtype=dtype)
            frames = _PreparedFrames(chain([first], iterator), prepare)
        return AusmInferenceSession(
            video=frames,
            num_frames=num_frames,
            video_height=height,
            video_width=width,
            foreground_threshold=foreground_threshold,
            find_new_objects=find_new_objects,
            label_set=label_set,
            seed=seed,
            keep_results=keep_results,
        )

    def _prepare(self, frame_idx: int, frame: Any, size: tuple[int, int], device, dtype) -> torch.Tensor:
        tensor = frame_to_tensor(frame).to(device)
        if tuple(tensor.shape[-2:]) != size:
            raise ValueError(
                f"video must have frames of one size, got {tuple(tensor.shape[-2:])} (height, width) for frame "
                f"{frame_idx} after {size}"
            )
        return self.image_processor(tensor)["pixel_values"][0].to(dtype)

    def add_inputs_to_inference_session(
        self,
        inference_session: AusmInferenceSession,
        frame_idx: int | None = None,
        obj_ids: int | list[int] | None = None,
        input_points: Any = None,
        input_labels: Any = None,
        input_boxes: Any = None,
        input_masks: Any = None,
        original_size: tuple[int, int] | None = None,
        clear_old_inputs: bool = True,
        input_scribbles: Any = None,
    ) -> AusmInferenceSession:
        """
        Say what objects to follow: by their masks, or by boxes, points or scribbles, from which the network makes
        masks when it comes to that frame.

        An id that is followed already gets its mask replaced in that frame. Points and scribbles without a box then
        correct the mask that the network sees in it: they add to it and take from it. Otherwise a box is filled, a
        point stamped as a disc of a fortieth of the frame's shorter side, a scribble drawn with that radius, negative
        discs are cut out, and one pass of the network over the frame makes the object's mask of that signal; what it
        finds farther from the box than that radius is left out. Where it finds nothing, or nothing under any of the
        positive points, the signal itself is the mask, with a warning. The points of an object are taken in turn: each
        corrects what the network makes of those before it, and of box and scribble; without a box, where there is no
        mask to correct, all correct once more what it makes of them. Where the network passes over a point, what is
        near it and looks like it changes with it. `model.preview_prompts` shows the masks before the stream moves on.

        All coordinates are (x, y) in pixels of the video, 0 <= x < width to the right, 0 <= y < height down; what of a
        box lies beyond is cut off. Nested shapes are those of SAM 2, with one image: lists (ragged ones too), arrays
        or tensors. The image level may be left out, with one object its level too, with one point that of points.
        `None` or `[]` stands for an object that has none.

        Args:
            inference_session ([`AusmInferenceSession`]):
                The stream.
            frame_idx (`int`, *optional*):
                The frame that the prompts belong to: the next one of the stream, which is the default, or a later one.
            obj_ids (`int` or `list[int]`):
                What to call the objects: positive integers below 2**30, each once.
            input_points (`[image][object][point][2]`, *optional*):
                Points. One on an object is not on the others that are marked in that frame.
            input_labels (`[image][object][point]`, *optional*):
                1 for each point on the object, 0 for one that is not on it; without them all are on it.
            input_boxes (`[image][object][4]`, *optional*):
                Boxes `(x0, y0, x1, y1)`. What lies beyond the frame is cut off.
            input_masks (array, tensor, PIL image or a list of them, one per object, *optional*):
                Masks of shape `(height, width)`, also with leading axes of 1, at the video's own size. Zero outside
                the object and one other value inside it. They stand alone. An empty one says that an object that is
                followed is not in the frame: it is away until something there looks like it.
            original_size (`tuple[int, int]`, *optional*):
                Height and width of the video before preprocessing. Needed once, if the session was made without a
                video.
            clear_old_inputs (`bool`, *optional*, defaults to `True`):
                Whether what was said before of the same object in the same frame is replaced. If `False`, points are
                added to it.
            input_scribbles (`[image][object][point][2]`, *optional*):
                Points of a line on the object.

        Returns:
            [`AusmInferenceSession`]: the same session.

        Raises:
            ValueError: if the frame is past, an id is no positive integer or comes twice, a mask has several values or
                another size than the video, or is empty where its object is not followed yet, a box has no area in
                the frame, a point lies outside it, labels don't fit the points or are neither 0 nor 1, an object has
                no prompt, an object that is not followed yet has negative points alone, or anything but points is to
                be added.
        """
        session = inference_session
        known_size = session.video_size
        size = known_size if original_size is None else _as_size(original_size)
        if size is None:
            raise ValueError("original_size must be given, since the session was made without a video")
        if known_size is not None and size != known_size:
            raise ValueError(f"original_size must be that of the video, {known_size} (height, width), got {size}")
        if obj_ids is None:
            raise ValueError("obj_ids must be given: a positive integer for each object, got None")
        obj_ids = np.asarray(obj_ids).tolist() if isinstance(obj_ids, (np.ndarray, torch.Tensor)) else obj_ids
        obj_ids = [_as_int(x) for x in (obj_ids if isinstance(obj_ids, (list, tuple, range)) else [obj_ids])]
        masks = [None] * len(obj_ids) if input_masks is None else _as_masks(input_masks, len(obj_ids))
        boxes = _per_object("input_boxes", input_boxes, len(obj_ids), 1)
        points = _per_object("input_points", input_points, len(obj_ids), 2)
        labels = _per_object("input_labels", input_labels, len(obj_ids), 1)
        scribbles = _per_object("input_scribbles", input_scribbles, len(obj_ids), 2)
        if input_labels is None:
            labels = [[1] * len(of_object) for of_object in points]
        prompts = [
            ObjectPrompt(
                mask=mask,
                box=_as_numbers("input_boxes", box, 4) if box else None,
                points=tuple(_as_numbers("input_points", point, 2) for point in of_points),
                labels=tuple(of_labels),
                scribble=tuple(_as_numbers("input_scribbles", point, 2) for point in scribble),
            )
            for mask, box, of_points, of_labels, scribble in zip(masks, boxes, points, labels, scribbles)
        ]
        if not clear_old_inputs and any(x is not None for x in (input_boxes, input_masks, input_scribbles)):
            raise ValueError(
                "clear_old_inputs=False adds points to what was said before; input_boxes, input_masks and "
                "input_scribbles come first, and replace it"
            )
        with session.lock:  # while a frame is segmented in another thread, which is the next one isn't known
            frame_idx = session.next_frame_idx if frame_idx is None else _as_int(frame_idx)
            if not clear_old_inputs:
                before = session.prompts.get(frame_idx, {})
                prompts = [before[x].with_points(more) if x in before else more for x, more in zip(obj_ids, prompts)]
            session.add_prompts(frame_idx, obj_ids, prompts, size)
        return session

    def post_process_masks(self, masks, original_sizes, mask_threshold: float = 0.0, binarize: bool = True):
        """See [`AusmImageProcessor.post_process_masks`]."""
        return self.image_processor.post_process_masks(masks, original_sizes, mask_threshold, binarize)

    def post_process_instance_segmentation(
        self,
        outputs: AusmVideoSegmentationOutput | list[AusmVideoSegmentationOutput],
        threshold: float = 0.0,
        target_sizes: list[tuple[int, int]] | None = None,
        return_binary_maps: bool = False,
    ) -> list[dict]:
        """See [`AusmImageProcessor.post_process_instance_segmentation`]."""
        return self.image_processor.post_process_instance_segmentation(
            outputs, threshold, target_sizes, return_binary_maps
        )

    def post_process_panoptic_segmentation(
        self,
        outputs: AusmVideoSegmentationOutput | list[AusmVideoSegmentationOutput],
        threshold: float = 0.0,
        target_sizes: list[tuple[int, int]] | None = None,
    ) -> list[dict]:
        """See [`AusmImageProcessor.post_process_panoptic_segmentation`]."""
        return self.image_processor.post_process_panoptic_segmentation(outputs, threshold, target_sizes)

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values_videos", "original_sizes", *self.image_processor.model_input_names]


class _PreparedFrames:
    """Frames of a video, prepared as they are asked for. One that can't be read or prepared stays the next."""

    def __init__(self, frames: Iterator, prepare: Callable[[int, Any], torch.Tensor]):
        self.frames, self.prepare = enumerate(frames), prepare
        self.coming: tuple[int, Any] | None = None

    def __iter__(self):
        return self

    def __next__(self) -> torch.Tensor:
        if self.coming is None:
            self.coming = next(self.frames)
        prepared = self.prepare(*self.coming)
        self.coming = None
        return prepared

    def skip(self) -> bool:
        """Passes over the next frame without preparing it. Whether there was one."""
        coming, self.coming = self.coming, None
        return coming is not None or next(self.frames, None) is not None


def _as_batch(videos: Any, masks: Any) -> tuple[list, list | None]:
    """One video or several as a list of videos, and their masks likewise."""
    if isinstance(videos, (np.ndarray, torch.Tensor)):
        if videos.ndim not in (4, 5):
            raise ValueError(f"videos must have 4 axes, or 5 for a batch, got shape {tuple(videos.shape)}")
        several = videos.ndim == 5
    else:
        if isinstance(videos, (str, bytes)) or not isinstance(videos, Iterable):
            raise ValueError(f"videos must be arrays, tensors or iterables of frames, got {videos!r}")
        videos = list(videos)
        first = videos[0] if videos else None
        several = isinstance(first, (list, tuple)) or getattr(first, "ndim", 0) == 4
    if not several:
        videos, masks = [videos], None if masks is None else [masks]
    if strange := [video for video in videos if not hasattr(video, "__len__") or getattr(video, "shape", None) == ()]:
        raise ValueError(f"videos must be arrays, tensors or lists of frames, got {strange[0]!r:.50}")
    if len(videos) == 0 or any(len(video) == 0 for video in videos):
        raise ValueError("videos must have at least one frame each")
    if masks is not None and (not hasattr(masks, "__len__") or getattr(masks, "shape", None) == ()):
        raise ValueError(f"masks must be a tensor, or a list of one tensor per video, got {masks!r:.50}")
    if masks is not None and len(masks) != len(videos):
        raise ValueError(f"masks must be given for each of {len(videos)} videos, got {len(masks)}")
    return list(videos), masks


def _resize_mask_labels(masks: Any, feature: BatchFeature) -> torch.Tensor:
    num_frames, (height, width) = len(feature["original_sizes"]), feature["original_sizes"][0]
    try:
        masks = torch.as_tensor(masks)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"masks of a video must be a tensor or an array of shape (objects, {num_frames}, {height}, {width}), "
            f"got {masks!r:.50}"
        ) from error
    if masks.ndim != 4 or tuple(masks.shape[1:]) != (num_frames, height, width):
        raise ValueError(
            f"masks must have shape (objects, {num_frames}, {height}, {width}) to fit the video, "
            f"got {tuple(masks.shape)}"
        )
    size = tuple(feature["pixel_values"].shape[-2:])
    if masks.shape[0] == 0:
        return torch.zeros((0, num_frames, *size), dtype=torch.bool)
    return F.interpolate(masks.ne(0).to(torch.uint8), size, mode="nearest-exact").bool()


def _as_int(value: Any) -> Any:
    """numpy's and torch's integers as Python's; what is no integer stays what it is and is refused later."""
    if isinstance(value, bool):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


def _as_size(size: Any) -> tuple[int, int]:
    """Height and width, of any kind of sequence."""
    sides = [_as_int(side) for side in size] if isinstance(size, Iterable) else []
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"original_size must be the height and width of the video, got {size!r}")
    return sides[0], sides[1]


def _as_masks(masks: Any, number: int) -> list[torch.Tensor]:
    """One mask per object: a list, or an array of as many as there are objects, or a single mask."""
    if isinstance(masks, (np.ndarray, torch.Tensor)) and masks.ndim >= 3 and len(masks) == number:
        masks = list(masks)
    masks = list(masks) if isinstance(masks, (list, tuple)) else [masks]
    if len(masks) != number:
        raise ValueError(f"input_masks must be as many as obj_ids ({number}), got {len(masks)}")
    return [_as_mask(mask) for mask in masks]


def _per_object(name: str, value: Any, number: int, depth: int) -> list[list]:
    """
    Nested coordinates or labels, one entry for each of `number` objects.

    Args:
        depth: How deep the lists of one object are: 1 for a box or labels, 2 for points. The image level before the
            object level may be there or not, with one object the object level too, and with one point its level.
    """
    if value is None:
        return [[]] * number
    value = _as_lists(value)
    levels = _depth(value)
    if levels == depth + 2:
        if len(value) != 1:
            raise ValueError(f"{name} must be of one image, got {len(value)}")
        (value,) = value
    elif number == 1 and 1 <= levels <= depth:
        for _ in range(depth + 1 - levels):
            value = [value]
    elif levels != depth + 1:
        nesting = {"input_boxes": "[image][object][4]", "input_labels": "[image][object][point]"}
        wanted = nesting.get(name, "[image][object][point][2]")
        raise ValueError(f"{name} must be nested {wanted}, got {levels} levels for {number} objects")
    if len(value) != number:
        raise ValueError(f"{name} must be for as many objects as obj_ids ({number}), got {len(value)}")
    return [[] if of_object is None else of_object for of_object in value]


def _as_lists(value: Any) -> Any:
    """Arrays, tensors and tuples as lists, their scalars as Python numbers, at any level."""
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return value.tolist()
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def _depth(value: Any) -> int:
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0


def _as_numbers(name: str, values: Any, number: int) -> tuple[float, ...]:
    """The coordinates of a box or a point."""
    numbers = values if isinstance(values, list) else [values]
    if len(numbers) != number or not all(type(x) in (int, float) for x in numbers):
        raise ValueError(f"{name} must hold {number} numbers each, got {values!r}")
    return tuple(map(float, numbers))


def _as_mask(mask: Any) -> torch.Tensor:
    """A mask of any kind as a bool tensor (height, width)."""
    if isinstance(mask, Image.Image):
        mask = np.array(mask)
    if not isinstance(mask, (np.ndarray, torch.Tensor)):
        raise ValueError(f"input_masks must be arrays, tensors or PIL images, got {type(mask).__name__}")
    mask = torch.as_tensor(mask)
    while mask.ndim > 2 and mask.shape[0] == 1:
        mask = mask[0]
    if mask.ndim != 2:
        raise ValueError(f"input_masks must have shape (height, width) each, got {tuple(mask.shape)}")
    if mask.is_complex():
        raise ValueError(f"input_masks must hold zero and one other value each, got values of dtype {mask.dtype}")
    if mask.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch can do little with these
        mask = mask.long()
    values = mask.unique()
    if (values != 0).sum() > 1:
        raise ValueError(
            f"input_masks must hold zero and one other value each, got {len(values)} values; "
            "split a map of several objects into one mask per object"
        )
    return mask != 0


__all__ = ["AusmProcessor"]
