"""
Boxes, clicks and scribbles as mask signals: rough masks that one pass of the network turns into an object's mask.

Coordinates are (x, y) in pixels of the frame, x to the right; sizes are (height, width); masks are bool and of shape
(height, width).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .history_ausm import binarize
from .masks_ausm import exclusive, main_piece, marked_pieces
from .pixels_ausm import AusmFrameFeatures

SIGNAL_RADIUS = 0.025  # of a stamped point and of a scribble's line, as a share of the frame's shorter side
# What a wrong point changes: pixels whose features (each of variance 1 / number of features) differ by less than
# about LOOK, nearer than about PLACE of the frame's shorter side, so that the point's own logit is MARGIN.
LOOK, PLACE, MARGIN = 1.0, 0.15, 4.0


def signal_radius(size: tuple[int, int]) -> float:
    """Radius in pixels of a stamped point in a frame of this size; never less than a pixel."""
    return max(1.0, SIGNAL_RADIUS * min(size))


def fill_box(size: tuple[int, int], box: Sequence[float] | Tensor) -> Tensor:
    """
    A box `(x0, y0, x1, y1)`, filled: the pixels whose centre lies in it; of one so thin that there are none, those
    that its middle lies in.
    """
    x0, y0, x1, y1 = (float(value) for value in box)
    height, width = size

    def covered(start: float, end: float, length: int) -> Tensor:
        centres = torch.arange(length, dtype=torch.float32) + 0.5
        inside = (centres >= start) & (centres <= end)
        return inside if inside.any() else torch.arange(length) == int((max(start, 0) + min(end, length)) / 2)

    return covered(y0, y1, height)[:, None] & covered(x0, x1, width)[None, :]


@dataclass(frozen=True)
class ObjectPrompt:
    """
    What the user says of one object in one frame: its mask, or what the network is to make a mask of.

    Attributes:
        mask (`torch.BoolTensor` of shape `(height, width)`, *optional*): Exactly the object. Stands alone. An empty
            one says that the object is not in the frame.
        box (4 numbers, *optional*): `(x0, y0, x1, y1)`.
        points (tuple of pairs, *optional*): Points `(x, y)`.
        labels (tuple of `int`, *optional*): 1 for each point on the object, 0 for one that is not on it.
        scribble (tuple of pairs, *optional*): Points `(x, y)` of a line on the object.
    """

    mask: Tensor | None = None
    box: tuple[float, ...] | None = None
    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()
    scribble: tuple[tuple[float, float], ...] = ()

    @property
    def only_negative(self) -> bool:
        """Whether it says where the object is not, and nothing else."""
        if self.mask is not None:
            return not self.mask.any()
        return self.box is None and not self.scribble and not any(self.labels)

    def with_points(self, more: ObjectPrompt) -> ObjectPrompt:
        """The same, with the points of another after its own."""
        return replace(self, points=self.points + more.points, labels=self.labels + more.labels)

    def not_on(self, prompts: list[ObjectPrompt]) -> ObjectPrompt:
        """Points of a frame's prompts that are on other objects, as not on this one: with a box, those in it."""
        x0, y0, x1, y1 = self.box or (-math.inf, -math.inf, math.inf, math.inf)
        points = [point for prompt in prompts for point in prompt.positive_points]
        points = [(x, y) for x, y in points if x0 <= x <= x1 and y0 <= y <= y1 and (x, y) not in self.positive_points]
        return ObjectPrompt(points=tuple(points), labels=(0,) * len(points))

    def agrees(self, mask: Tensor) -> bool:
        """Whether a mask (height, width) has any pixels, and if there are positive points any of theirs."""
        points = self.positive_points
        return bool(mask.any()) and (not points or any(bool(mask[int(y), int(x)]) for x, y in points))

    @property
    def positive_points(self) -> list[tuple[float, float]]:
        return [point for point, label in zip(self.points, self.labels) if label]

    def check(self, object_id: int, size: tuple[int, int]) -> None:
        """
        Raises:
            ValueError: if there is nothing in it, or it doesn't fit a frame of `size`.
        """
        height, width = size
        of_object = f"for object {object_id}"
        if self.mask is not None:
            if self.box is not None or self.points or self.labels or self.scribble:
                raise ValueError(
                    f"input_masks are exact and stand alone, got a box, points or a scribble beside one {of_object}"
                )
            if tuple(self.mask.shape) != tuple(size):
                raise ValueError(
                    f"input_masks must have the size of the video, {tuple(size)} (height, width), "
                    f"got {tuple(self.mask.shape)} {of_object}"
                )
            return
        if self.box is None and not self.points and not self.labels and not self.scribble:
            raise ValueError(f"a mask, a box, points or a scribble must be given, got nothing {of_object}")
        if self.box is not None:
            x0, y0, x1, y1 = self.box
            # What lies beyond the frame is cut off: detectors give such boxes.
            visible = min(x1, width) > max(x0, 0) and min(y1, height) > max(y0, 0)
            if not all(map(math.isfinite, self.box)) or not visible:
                raise ValueError(
                    f"input_boxes must be (x0, y0, x1, y1) with x0 < x1 and y0 < y1 and have an area within the frame "
                    f"of width {width} and height {height}, got {self.box} {of_object}"
                )
            if max(self.box) <= 1:
                raise ValueError(
                    f"input_boxes must be in pixels of the video, not in parts of its width and height, got "
                    f"{self.box} {of_object}"
                )
        if len(self.labels) != len(self.points):
            raise ValueError(
                f"input_labels must be as many as input_points, got {len(self.labels)} labels and "
                f"{len(self.points)} points {of_object}"
            )
        if wrong := [label for label in self.labels if label not in (0, 1)]:
            raise ValueError(f"input_labels must be 1 (on the object) or 0 (not on it), got {wrong[0]} {of_object}")
        for name, points in (("input_points", self.points), ("input_scribbles", self.scribble)):
            for x, y in points:
                if not (0 <= x < width and 0 <= y < height):
                    raise ValueError(
                        f"{name} must lie within the frame, 0 <= x < {width} and 0 <= y < {height}, got ({x}, {y}) "
                        f"{of_object}"
                    )

    def signal(self, size: tuple[int, int], known: Tensor | None = None) -> Tensor:
        """
        The mask signal: box, discs of the positive points and scribble together, the discs of the negative points cut
        out. Where a positive and a negative disc overlap, the nearer point has the pixel.

        Args:
            size (`tuple[int, int]`): Height and width of the frame.
            known (`torch.BoolTensor` of shape `size`, *optional*): The mask that points and scribble correct.

        Returns:
            `torch.BoolTensor` of shape `size`.
        """
        signal = torch.zeros(size, dtype=torch.bool) if known is None else known.clone()
        if self.box is not None:
            signal |= fill_box(size, self.box)
        negative_points = [point for point, label in zip(self.points, self.labels) if not label]
        to_positive = torch.minimum(
            _distance(size, self.positive_points, line=False), _distance(size, self.scribble, line=True)
        )
        to_negative = _distance(size, negative_points, line=False)
        radius = signal_radius(size)
        signal |= to_positive <= radius
        return signal & ~((to_negative <= radius) & (to_negative <= to_positive))

    def in_turn(self) -> list[ObjectPrompt]:
        """
        The marks that a mask is made of as they came: box and scribble, then one point more each time, the first time
        up to the first positive one. The box is in the first alone: after that the mask made of it stands for it.
        """
        if self.box is None and not self.scribble and any(self.labels):
            first = self.labels.index(1) + 1
        else:
            first = int(self.only_negative)
        numbers = range(first, len(self.points) + 1)
        parts = [replace(self, points=self.points[:n], labels=self.labels[:n]) for n in numbers]
        return [part if i == 0 else replace(part, box=None) for i, part in enumerate(parts)]

    def reach(self, size: tuple[int, int]) -> Tensor:
        """
        Where the object may be, bool (height, width): with a box in it, with a margin, for boxes are drawn by hand,
        and where else it is marked; without one anywhere.
        """
        if self.box is None:
            return torch.ones(size, dtype=torch.bool)
        margin = signal_radius(size)
        x0, y0, x1, y1 = self.box
        return fill_box(size, (x0 - margin, y0 - margin, x1 + margin, y1 + margin)) | self.signal(size)


def signal_of_marks(
    model,
    frame: AusmFrameFeatures,
    prompt: ObjectPrompt,
    size: tuple[int, int],
    known: Tensor | None = None,
    others: ObjectPrompt = ObjectPrompt(),
) -> Tensor:
    """
    The mask signal of an object's marks, of which each corrects what the network makes of those before it: as the user
    sees it who made them. Points without a box show little of an object's shape: where there is no known mask, that
    which they give is corrected by them once more.

    Args:
        model ([`AusmForUniversalSegmentation`]): The network.
        frame ([`AusmFrameFeatures`]): What `model.encode_frames` made of the frame.
        prompt ([`ObjectPrompt`]): Box, points and scribble.
        size (`tuple[int, int]`): Height and width of the frame before preprocessing.
        known (`torch.BoolTensor` of shape `size`, *optional*): The mask that points and scribble correct.
        others ([`ObjectPrompt`], *optional*): Points on other objects, which correct it last.

    Returns:
        `torch.BoolTensor` of shape `size`, for [`refine_signals`].
    """
    *earlier, last = prompt.in_turn()
    if prompt.points and prompt.box is None and known is None:
        earlier.append(last)
    for marks in earlier:
        signal = marks.signal(size, known)
        if signal.any():
            # The box is in the first alone, but all of them are of what is in it.
            (mask,) = refine_signals(model, frame, [signal], [replace(marks, box=prompt.box)])
            known = mask.cpu() if marks.agrees(mask) else signal
    return last.with_points(others).signal(size, known)


def refine_signals(
    model, frame: AusmFrameFeatures, signals: list[Tensor], prompts: list[ObjectPrompt] | None = None
) -> list[Tensor]:
    """
    Objects' masks from their mask signals: for each one pass over the frame, with a history that holds nothing but its
    signal. So an object's mask depends on its own signal alone, up to the pixels that two of them claim.

    A mask that has something of its signal, but is wrong at a point, is corrected around it, see [`heed_points`]. Of
    several pieces those are left that have something of the signal; of those in a box, which holds one object, the
    largest, unless more of it is marked.

    Args:
        model ([`AusmForUniversalSegmentation`]): The network.
        frame ([`AusmFrameFeatures`]): What `model.encode_frames` made of the frame.
        signals (list of `torch.BoolTensor`): One per object, at the frame's size before preprocessing.
        prompts (list of [`ObjectPrompt`], *optional*): What was marked of each: its points, and where it may be.

    Returns:
        A list of `torch.BoolTensor` of the signals' size, in their order. A pixel belongs to the object of the highest
        logit. Only an object that would have nothing left where it is marked, as others claim it all, keeps its mask
        whole.
    """
    if not signals:
        return []
    maps = frame.stride_4
    slots = torch.zeros(1, 1, dtype=torch.int64, device=maps.device)
    prompts = prompts or len(signals) * [ObjectPrompt()]
    answers = []
    for signal, prompt in zip(signals, prompts):
        mask = history_mask(signal.to(maps.device), (maps.shape[-2], maps.shape[-1])).to(maps.dtype)
        history = model.init_history(1).replace_objects(slots, slots == 0, mask[None, None])
        logits = model.step(frame, history).masks_queries_logits[0, 0].float()
        if prompt.points and ((logits > 0) & (mask > 0)).any():
            scale = torch.tensor([signal.shape[1], signal.shape[0]], device=maps.device)
            points = torch.tensor(prompt.points, dtype=torch.float32, device=maps.device) / scale
            logits = heed_points(logits, frame.levels[0][0].float(), points, torch.tensor(prompt.labels) > 0)
        marked = mask > 0
        if prompt.box and not (any(prompt.labels) or prompt.scribble):
            marked = main_piece(torch.where(marked, logits, -logits.abs())) > 0
        logits = marked_pieces(logits, marked)
        logits = F.interpolate(logits[None, None], signal.shape, mode="bilinear")[0, 0]
        reach = prompt.reach((signal.shape[0], signal.shape[1])).to(maps.device)
        answers.append(logits.masked_fill(~reach, -torch.inf))
    masks = exclusive(torch.stack(answers))
    return [mask if prompt.agrees(mask) else own > 0 for prompt, mask, own in zip(prompts, masks, answers)]


def heed_points(logits: Tensor, features: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    """
    Mask logits that are right at points, by Gaussian process regression: what is missing at each point is given to it
    and to what looks alike around it. The network, to which a point is a few marked pixels, may pass over it.

    Args:
        logits (`torch.Tensor` of shape `(h, w)`): Of the mask.
        features (`torch.Tensor` of shape `(D, ., .)`): Of the frame.
        points (`torch.Tensor` of shape `(M, 2)`): x and y in [0, 1].
        labels (`torch.BoolTensor` of shape `(M,)`): Whether the object is there.

    Returns:
        Logits (h, w).
    """
    height, width = features.shape[1:]
    looks = features.flatten(1)
    looks = (looks - looks.mean(1, keepdim=True)) / (looks.std(1, keepdim=True) + 1e-6) / len(looks) ** 0.5
    cells = torch.cartesian_prod(
        *(torch.arange(n, dtype=looks.dtype, device=logits.device) + 0.5 for n in (height, width))
    )
    cells = torch.cat([looks.T / LOOK, cells / (PLACE * min(height, width))], dim=1)
    x, y = (points * points.new_tensor([width, height])).long().unbind(1)
    marked = cells[y.clamp(max=height - 1) * width + x.clamp(max=width - 1)]

    def alike(places: Tensor) -> Tensor:
        return (-torch.cdist(places, marked).square() / 2).exp()

    given = 2 * labels.to(logits.device, logits.dtype) - 1
    said = F.grid_sample(logits[None, None], 2 * points[None, None] - 1, align_corners=False)[0, 0, 0]
    missing = given * (MARGIN - given * said).clamp(min=0)
    noise = 0.05 * torch.eye(len(points), dtype=logits.dtype, device=logits.device)
    change = alike(cells) @ torch.linalg.solve(alike(marked) + noise, missing)
    return logits + F.interpolate(change.view(1, 1, height, width), logits.shape, mode="bilinear")[0, 0]


def history_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask (height, width) of any size as it enters the history, floating point of `size`; thin parts stay."""
    shares = mask.cpu() if mask.device.type == "mps" else mask  # there sizes must divide: pytorch issue 96056
    return binarize(F.interpolate(shares[None, None].float(), size, mode="area")[0, 0]).to(mask.device)


def _distance(size: tuple[int, int], points: Sequence | Tensor, line: bool) -> Tensor:
    """Distance of each pixel's centre to the nearest point, or to the line through the points; inf without points."""
    points = torch.as_tensor(points, dtype=torch.float32).reshape(-1, 2)
    y = (torch.arange(size[0], dtype=torch.float32) + 0.5)[:, None]
    x = (torch.arange(size[1], dtype=torch.float32) + 0.5)[None, :]
    squared = torch.full(size, torch.inf, dtype=torch.float32)
    starts, ends = (points[:-1], points[1:]) if line and len(points) > 1 else (points, points)
    for (x0, y0), (x1, y1) in zip(starts.tolist(), ends.tolist()):
        length = (x1 - x0) ** 2 + (y1 - y0) ** 2
        # The nearest place of the segment, as a share of its length.
        share = (((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length).clamp(0, 1) if length else 0.0
        near_x, near_y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
        squared = torch.minimum(squared, (x - near_x) ** 2 + (y - near_y) ** 2)
    return squared.sqrt()


__all__ = [
    "ObjectPrompt",
    "fill_box",
    "heed_points",
    "history_mask",
    "refine_signals",
    "signal_of_marks",
    "signal_radius",
]
