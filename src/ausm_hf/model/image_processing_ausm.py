"""Frames to tensors, and predictions back to masks of the frame's own size, without torchvision."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, load_image

from .session_ausm import AusmVideoSegmentationOutput


class AusmImageProcessorKwargs(TypedDict, total=False):
    """What `AusmImageProcessor.from_pretrained` may override."""

    do_resize: bool
    size: dict[str, int]
    size_divisor: int
    do_normalize: bool
    image_mean: list[float]
    image_std: list[float]


class AusmImageProcessor(BaseImageProcessor):
    r"""
    Resizes and normalises frames, and brings predicted masks back to the size of the frames.

    Args:
        do_resize (`bool`, *optional*, defaults to `True`):
            Whether to resize. If not, frames must come with sides that are multiples of `size_divisor`.
        size (`dict[str, int]`, *optional*, defaults to `{"shortest_edge": 1024, "longest_edge": 2048}`):
            `shortest_edge`: the shorter side after resizing, the aspect ratio is kept; `longest_edge`, optional: a
            limit to the longer side, and so to the memory that an oblong frame takes. Or `height` and `width`. The
            sides are then rounded to multiples of `size_divisor`. The paper's shorter side is 1024.
        size_divisor (`int`, *optional*, defaults to 32):
            The coarsest stride of the backbone.
        do_normalize (`bool`, *optional*, defaults to `True`):
            Whether to subtract `image_mean` and divide by `image_std`.
        image_mean (`float` or `list[float]`, *optional*, defaults to ImageNet's):
            Mean of red, green and blue, for values in [0, 1].
        image_std (`float` or `list[float]`, *optional*, defaults to ImageNet's):
            Standard deviation of red, green and blue.

    Raises:
        ValueError: for sizes or numbers that no frame can be prepared with.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = AusmImageProcessorKwargs  # type: ignore[assignment]

    def __init__(
        self,
        do_resize: bool = True,
        size: dict[str, int] | None = None,
        size_divisor: int = 32,
        do_normalize: bool = True,
        image_mean: float | list[float] | None = None,
        image_std: float | list[float] | None = None,
        **kwargs,
    ):
        if kwargs.get("do_rescale") is False:
            raise ValueError(
                "do_rescale is False; frames of uint8 are always divided by 255, floating point ones never"
            )
        super().__init__(**kwargs)
        self.do_resize = do_resize
        self.size = _checked_size(size if size is not None else {"shortest_edge": 1024, "longest_edge": 2048})
        self.size_divisor = size_divisor
        self.do_normalize = do_normalize
        self.image_mean = _of_channels("image_mean", IMAGENET_DEFAULT_MEAN if image_mean is None else image_mean)
        self.image_std = _of_channels("image_std", IMAGENET_DEFAULT_STD if image_std is None else image_std)
        if type(size_divisor) is not int or size_divisor < 1:
            raise ValueError(f"size_divisor must be an integer of at least 1, got {size_divisor!r}")
        if 0 in self.image_std:
            raise ValueError(f"image_std must not be 0, by which frames are divided, got {self.image_std}")

    def preprocess(
        self,
        images: Any,
        do_resize: bool | None = None,
        size: dict[str, int] | None = None,
        do_normalize: bool | None = None,
        return_tensors: str | None = None,
        device: str | torch.device | None = None,
    ) -> BatchFeature:
        """
        Args:
            images:
                A frame or several of them: PIL images, paths, URLs, numpy arrays `(H, W)` or `(H, W, C)`, tensors
                `(H, W)` or `(C, H, W)`, or a whole batch of equal frames as one array `(B, H, W, C)` or tensor
                `(B, C, H, W)`. Grey frames are repeated over the channels, an alpha channel is dropped. Values are
                uint8 in 0..255 or floating point in 0..1.
            do_resize (`bool`, *optional*), size (`dict[str, int]`, *optional*), do_normalize (`bool`, *optional*):
                In place of the processor's own.
            return_tensors (`str`, *optional*):
                `"pt"` makes a tensor of `original_sizes` too, `"np"` makes numpy arrays of both.
            device (`str` or `torch.device`, *optional*):
                Where frames are prepared; where they are, or on the CPU, if not given.

        Returns:
            [`BatchFeature`] with `pixel_values`, a float32 tensor of shape `(B, 3, H, W)`, and `original_sizes`, the
            `[height, width]` of each frame.

        Raises:
            ValueError: for anything that is not a frame, and for frames that differ in size after resizing.
        """
        frames = [frame_to_tensor(image) for image in _flatten(images)]
        if device is not None:
            frames = [frame.to(device) for frame in frames]
        if not frames:
            raise ValueError("images is empty; wanted is at least one frame")
        do_resize = self.do_resize if do_resize is None else do_resize
        do_normalize = self.do_normalize if do_normalize is None else do_normalize
        size = _checked_size(self.size if size is None else size)

        original_sizes = [[frame.shape[-2], frame.shape[-1]] for frame in frames]
        targets = [self.target_size(h, w, size) if do_resize else (h, w) for h, w in original_sizes]
        if len(set(targets)) > 1:
            raise ValueError(f"images must have one size to make a batch, got {sorted(set(targets))} (height, width)")
        if any(side % self.size_divisor for side in targets[0]):
            raise ValueError(
                f"images must have sides that are multiples of {self.size_divisor} when do_resize is False, "
                f"got {targets[0]}"
            )
        resized = []
        for frame, target in zip(frames, targets):
            values = frame.float() / 255 if frame.dtype == torch.uint8 else frame.float()
            if values.shape[-2:] != target:
                values = F.interpolate(values[None], target, mode="bilinear", antialias=True)[0]
            resized.append(values)
        pixel_values = torch.stack(resized)
        if do_normalize:
            mean = pixel_values.new_tensor(self.image_mean).view(3, 1, 1)
            std = pixel_values.new_tensor(self.image_std).view(3, 1, 1)
            pixel_values = (pixel_values - mean) / std
        return BatchFeature(
            {"pixel_values": pixel_values, "original_sizes": original_sizes}, tensor_type=return_tensors
        )

    def target_size(self, height: int, width: int, size: dict[str, int] | None = None) -> tuple[int, int]:
        """The `(height, width)` that a frame of this height and width is resized to."""
        size = self.size if size is None else size
        sides: tuple[float, float]
        if "height" in size:
            sides = size["height"], size["width"]
        else:
            scale = size["shortest_edge"] / min(height, width)
            if "longest_edge" in size:
                scale = min(scale, size["longest_edge"] / max(height, width))
            sides = height * scale, width * scale
        height, width = (max(round(side / self.size_divisor), 1) * self.size_divisor for side in sides)
        return height, width

    def post_process_masks(
        self,
        masks: Iterable[torch.Tensor],
        original_sizes: Iterable[tuple[int, int]] | torch.Tensor,
        mask_threshold: float = 0.0,
        binarize: bool = True,
    ) -> list[torch.Tensor]:
        """
        Mask logits at the size of the frames. Masks of one frame may overlap;
        [`~AusmImageProcessor.post_process_instance_segmentation`] gives each pixel to one object.

        Args:
            masks (`list[torch.Tensor]`):
                For each frame its logits, of shape `(num_objects, 1, h, w)`.
            original_sizes (`list[tuple[int, int]]` or `torch.Tensor` of shape `(num_frames, 2)`):
                Height and width of each frame.
            mask_threshold (`float`, *optional*, defaults to 0.0):
                Logit above which a pixel belongs to the object.
            binarize (`bool`, *optional*, defaults to `True`):
                Whether to return bool masks rather than logits.

        Returns:
            `list[torch.Tensor]`: for each frame a tensor of shape `(num_objects, 1, height, width)`.

        Raises:
            ValueError: if there are not as many sizes as frames.
        """
        masks, sizes = list(masks), [(int(height), int(width)) for height, width in original_sizes]
        if len(masks) != len(sizes):
            raise ValueError(f"original_sizes must have one size for each of {len(masks)} frames, got {len(sizes)}")
        resized = [_resize_logits(frame_masks, size) for frame_masks, size in zip(masks, sizes)]
        return [logits > mask_threshold for logits in resized] if binarize else resized

    def post_process_instance_segmentation(
        self,
        outputs: AusmVideoSegmentationOutput | list[AusmVideoSegmentationOutput],
        threshold: float = 0.0,
        target_sizes: list[tuple[int, int]] | None = None,
        return_binary_maps: bool = False,
    ) -> list[dict]:
        """
        The objects of streamed frames. Object ids stay the same over the video.

        Args:
            outputs ([`AusmVideoSegmentationOutput`] or several of them, in a list for instance):
                What the model returned for one frame or several.
            threshold (`float`, *optional*, defaults to 0.0):
                Least score (foreground x class probability) of an object to be kept. Prompted objects always are.
            target_sizes (`list[tuple[int, int]]`, *optional*):
                Height and width of each frame; the size of the logits if not given.
            return_binary_maps (`bool`, *optional*, defaults to `False`):
                Return one mask per object, which may overlap, instead of one map.

        Returns:
            `list[dict]`: for each frame
            - **segmentation** -- an int32 tensor `(height, width)`: the id of the object at each pixel, that of the
              highest logit where several are positive, 0 where there is none; or with `return_binary_maps` a bool
              tensor `(num_objects, height, width)`.
            - **segments_info** -- for each object that has a pixel, its `id`, `label_id` and `label` (-1 and `None`
              where no class is known yet) and `score`.

        Raises:
            ValueError: if there are not as many sizes as frames, or the outputs are not those of a stream.
        """
        several: Any = [outputs] if hasattr(outputs, "pred_masks") else outputs
        if hasattr(outputs, "masks_queries_logits"):
            raise ValueError(
                "outputs are those of whole clips, which say not who is who; wanted are those of a stream"
            )
        outputs = list(several)
        if target_sizes is None:
            target_sizes = [(output.pred_masks.shape[-2], output.pred_masks.shape[-1]) for output in outputs]
        if len(target_sizes) != len(outputs):
            raise ValueError(f"target_sizes must have one size for each of {len(outputs)} frames, got {target_sizes}")
        return [
            _segments(output, threshold, (int(height), int(width)), return_binary_maps)
            for output, (height, width) in zip(outputs, target_sizes)
        ]

    def post_process_panoptic_segmentation(
        self,
        outputs: AusmVideoSegmentationOutput | list[AusmVideoSegmentationOutput],
        threshold: float = 0.0,
        target_sizes: list[tuple[int, int]] | None = None,
    ) -> list[dict]:
        """
        As [`~AusmImageProcessor.post_process_instance_segmentation`], whose map gives every pixel to one object at
        most already: the model knows objects, not regions of stuff, so there is nothing to fuse.
        """
        return self.post_process_instance_segmentation(outputs, threshold, target_sizes)


def frame_to_tensor(image: Any) -> torch.Tensor:
    """
    One frame of any common kind as a uint8 tensor in 0..255, or a floating point one in 0..1, of shape `(3, H, W)`.

    Raises:
        ValueError: for another type, shape, dtype or range, and for a frame without pixels.
    """
    if isinstance(image, (str, Path)):
        image = load_image(str(image))
    if isinstance(image, Image.Image):
        if image.mode[0] in "IF":
            raise ValueError(f"images holds a PIL image of mode {image.mode!r}; wanted are 8 bits per channel")
        image = np.array(ImageOps.exif_transpose(image).convert("RGB"))  # as a photograph is shown
    if isinstance(image, np.ndarray):
        # Contiguous, since torch takes no negative strides (a frame turned by `[..., ::-1]`).
        if not image.flags.writeable:
            image = image.copy()
        tensor, channels_last = torch.from_numpy(np.ascontiguousarray(image)), True
    elif isinstance(image, torch.Tensor):
        tensor, channels_last = image, False
    else:
        raise ValueError(
            f"images holds a {type(image).__name__}; wanted are PIL images, paths, numpy arrays or torch tensors"
        )
    shape = tuple(tensor.shape)
    if tensor.ndim == 2:
        tensor = tensor[None]
    elif tensor.ndim == 3:
        # Numpy frames have their channels last and tensors theirs first, but the other way round is taken where the
        # numbers leave no doubt.
        possible = {"last": tensor.shape[-1] in (1, 3, 4), "first": tensor.shape[0] in (1, 3, 4)}
        if possible["last"] and (channels_last or not possible["first"]):
            tensor = tensor.permute(2, 0, 1)
        elif not possible["first"]:
            raise ValueError(f"images holds a frame of shape {shape}; wanted are 1, 3 or 4 channels")
    else:
        raise ValueError(f"images holds a frame of shape {shape}; wanted are 2 or 3 axes")
    if tensor.numel() == 0:
        raise ValueError(f"images holds a frame of shape {shape}, without pixels")
    if tensor.is_floating_point():
        low, high = tensor.aminmax()
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # the slack is for rounding, of resized frames; NaN fails too
            raise ValueError(
                f"images holds floating point values from {low:g} to {high:g}; wanted are values in 0..1, or uint8"
            )
        tensor = tensor.clamp(0, 1)
    elif tensor.dtype != torch.uint8:
        raise ValueError(f"images holds values of dtype {tensor.dtype}; wanted is uint8, or floating point in 0..1")
    return tensor.expand(3, -1, -1) if tensor.shape[0] == 1 else tensor[:3]


def _flatten(images: Any) -> list:
    """A frame, a list of frames or a batch in one array as a list of frames."""
    if isinstance(images, (list, tuple)):
        return [frame for image in images for frame in _flatten(image)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def _is_length(side: Any) -> bool:
    return isinstance(side, int) and not isinstance(side, bool) and side >= 1


def _of_channels(name: str, values: float | Iterable[float]) -> list[float]:
    numbers = 3 * [values] if isinstance(values, (int, float)) else list(values)
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} must be three numbers, of red, green and blue, or one of all, got {values}")
    return numbers


def _checked_size(size: dict[str, int]) -> dict[str, int]:
    allowed = ({"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"height", "width"})
    if not isinstance(size, dict) or set(size) not in allowed or not all(map(_is_length, size.values())):
        raise ValueError(
            "size must be a dict of positive integers with the keys shortest_edge, shortest_edge and longest_edge, "
            f"or height and width, got {size}"
        )
    return dict(size)


def _resize_logits(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear, of shape (n, 1, h, w); n may be 0."""
    if tuple(logits.shape[-2:]) == size:
        return logits.float()
    if logits.shape[0] == 0:
        return logits.new_zeros((0, 1, *size), dtype=torch.float32)
    # Where nothing shrinks antialiasing changes nothing, but takes several times as long.
    shrinks = size[0] < logits.shape[-2] or size[1] < logits.shape[-1]
    return F.interpolate(logits.float(), size, mode="bilinear", antialias=shrinks)


def _segments(
    output: AusmVideoSegmentationOutput, threshold: float, size: tuple[int, int], return_binary_maps: bool
) -> dict:
    device = output.pred_masks.device
    owner = torch.zeros(size, dtype=torch.int32, device=device)  # index into `kept`, from 1; 0 is background
    highest = torch.zeros(
        size, dtype=torch.float32, device=device
    )  # logit 0: a pixel without a positive logit stays background
    kept, masks = [], []
    # One object at a time: a hundred objects at full HD would take 800 MB at once.
    for i in range(len(output.object_ids)):
        if not output.prompted[i] and output.scores[i] < threshold:
            continue
        logits = _resize_logits(output.pred_masks[i : i + 1], size)[0, 0]
        kept.append(i)
        if return_binary_maps:
            masks.append(logits > 0)
        else:
            owner.masked_fill_(logits > highest, len(kept))
            highest = torch.maximum(highest, logits)
    if return_binary_maps:
        maps = torch.stack(masks) if masks else torch.zeros((0, *size), dtype=torch.bool, device=device)
        visible = maps.flatten(1).any(1).tolist()
        segmentation = maps[torch.tensor(visible, dtype=torch.bool, device=device)]
    else:
        visible = (owner.flatten().bincount(minlength=len(kept) + 1)[1:] > 0).tolist()
        ids = torch.tensor([0, *(output.object_ids[i] for i in kept)], dtype=torch.int32, device=device)
        segmentation = ids[owner]
    return {
        "segmentation": segmentation,
        "segments_info": [
            {
                "id": output.object_ids[i],
                "label_id": output.label_ids[i],
                "label": output.labels[i],
                "score": float(output.scores[i]),
            }
            for i, has_pixels in zip(kept, visible)
            if has_pixels
        ],
    }


__all__ = ["AusmImageProcessor"]
