"""What a visitor marks in the frames: clicks, boxes and brush strokes; and the masks that they make."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ..model.prompts_ausm import ObjectPrompt
from .unpack import Refused

MAX_OBJECTS = 10
MAX_MARKS = 500
MAX_STROKE = 2000  # points of one brush stroke
MAX_NAME = 30  # letters of an object's name
KINDS = ("point", "box", "paint", "away")

# (frame, prompts, known) -> masks: see `Network.refine`
Refine = Callable[[np.ndarray, list[ObjectPrompt], list[np.ndarray | None]], list[np.ndarray]]


@dataclass(frozen=True)
class Mark:
    """
    One thing that a visitor did to one object in one frame.

    Attributes:
        frame (`int`): Index of the frame.
        object_id (`int`): 1 to MAX_OBJECTS.
        kind (`str`): `"point"`, `"box"` (two opposite corners), `"paint"` (a stroke) or `"away"`: the object is not in
            the frame, whatever was said of it there before.
        points (`tuple`): `(x, y)` in pixels of the frame, x to the right.
        add (`bool`): Whether this belongs to the object, or doesn't.
        radius (`float`): Of the brush, in pixels.
    """

    frame: int
    object_id: int
    kind: str
    points: tuple[tuple[float, float], ...]
    add: bool = True
    radius: float = 8

    def check(self, size: tuple[int, int], num_frames: int) -> "Mark":
        """Raises Refused for what doesn't fit a clip of this size (height, width) and length."""
        height, width = size
        if not 0 <= self.frame < num_frames:
            raise Refused(f"There is no frame {self.frame}; the video has the frames 0 to {num_frames - 1}.")
        if not 1 <= self.object_id <= MAX_OBJECTS:
            raise Refused(f"Objects are numbered 1 to {MAX_OBJECTS}; {self.object_id} is none of them.")
        wanted = {"point": (1, 1), "box": (2, 2), "paint": (1, MAX_STROKE), "away": (0, 0)}[self.kind]
        if not wanted[0] <= len(self.points) <= wanted[1]:
            raise Refused(f"A {self.kind} has {wanted[0]} to {wanted[1]} points; these are {len(self.points)}.")
        for x, y in self.points:
            has_pixel = 0 <= x < width and 0 <= y < height
            on_edge = 0 <= x <= width and 0 <= y <= height
            if not (has_pixel if self.kind == "point" else on_edge):
                raise Refused(f"The point ({x:g}, {y:g}) is outside the picture of {width} x {height} pixels.")
        if not 0.5 <= self.radius <= max(size):
            raise Refused("The brush is too small or too large.")
        if self.kind == "box" and min(abs(a - b) for a, b in zip(*self.points)) < 1:
            raise Refused("The box is too small; draw it around the object, from one corner to the opposite one.")
        return self


def read_name(text) -> str:
    """An object's name on one line, cut to a length that can be drawn; empty for none."""
    return " ".join(str(text or "").split())[:MAX_NAME]


def read_whole(number, name: str) -> int:
    """A whole number of what a program sent; JSON may have 1.0 for 1. Raises Refused, with `name`, for all else."""
    if isinstance(number, float) and number.is_integer():
        return int(number)
    if not isinstance(number, int) or isinstance(number, bool):
        raise Refused(f"The {name} can't be understood; wanted is a whole number.")
    return number


def read_mark(content: dict, object_id: int) -> Mark:
    """A mark from what a browser sent. Raises Refused if it can't be one."""
    try:
        mark = Mark(
            frame=read_whole(content["frame"], "frame"),
            object_id=object_id,
            kind=str(content["kind"]),
            points=tuple((float(x), float(y)) for x, y in content["points"][: MAX_STROKE + 1]),
            add=bool(content["add"]),
            radius=float(content.get("radius", 8)),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise Refused("That mark could not be understood.") from error
    if mark.kind not in KINDS:
        raise Refused("That mark could not be understood.")
    return mark


def marks_that_count(marks: list[Mark]) -> list[Mark]:
    """The marks of a frame without those of an object that somebody then said is not in it."""
    away = {mark.object_id: i for i, mark in enumerate(marks) if mark.kind == "away"}
    return [mark for i, mark in enumerate(marks) if i >= away.get(mark.object_id, 0)]


def masks_of_frame(
    marks: list[Mark], frame: np.ndarray, refine: Refine, known: dict[int, np.ndarray] | None = None
) -> dict[int, np.ndarray]:
    """
    The masks of the objects that are marked in a frame.

    Clicks and boxes say roughly where the object is, and the network makes its mask; brush strokes then add pixels to
    it or take them away, exactly. Of a mask that is known already (the result of an earlier run) the clicks are
    corrections, too.

    Args:
        marks: Those of this frame, in the order in which they were made.
        frame: uint8 RGB array (H, W, 3).
        refine: Makes masks of prompts, see `Network.refine`.
        known: Masks, bool (H, W), by object id.

    Returns:
        A mask, bool (H, W), by object id. They don't overlap: the object that was marked last has the pixel. Empty if
        the object is not in the frame: because a mark says so, or marks leave nothing of what was known.

    Raises:
        Refused: if marks leave nothing of a new object, or another one has all of its pixels.
    """
    marks = marks_that_count(marks)
    away = {mark.object_id for mark in marks if mark.kind == "away"}
    size = frame.shape[:2]
    known = {object_id: mask for object_id, mask in (known or {}).items() if object_id not in away}
    objects = list(dict.fromkeys(mark.object_id for mark in marks))
    prompts = {}
    for object_id in objects:
        mine = [mark for mark in marks if mark.object_id == object_id]
        clicks = [mark for mark in mine if mark.kind == "point"]
        boxes = [mark.points for mark in mine if mark.kind == "box"]
        if not clicks and not boxes:
            continue
        if not boxes and object_id not in known and not any(mark.add for mark in clicks):
            raise Refused("First click on the object; then click on what does not belong to it.")
        box = None
        if boxes:  # the last one counts
            (x0, y0), (x1, y1) = boxes[-1]
            box = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
        prompts[object_id] = ObjectPrompt(
            box=box,
            points=tuple(mark.points[0] for mark in clicks),
            labels=tuple(int(mark.add) for mark in clicks),
        )
    before = [known.get(object_id) if prompt.box is None else None for object_id, prompt in prompts.items()]
    masks = dict(zip(prompts, refine(frame, list(prompts.values()), before)))

    masks |= {object_id: np.zeros(size, dtype=bool) for object_id in away - masks.keys()}
    for mark in marks:
        if mark.kind == "paint":
            mask = masks.get(mark.object_id)
            if mask is None:
                mask = known.get(mark.object_id, np.zeros(size, dtype=bool))
            stroke = _stroke(mark, size)
            masks[mark.object_id] = mask | stroke if mark.add else mask & ~stroke

    last = sorted(objects, key=lambda object_id: max(i for i, mark in enumerate(marks) if mark.object_id == object_id))
    taken = np.zeros(size, dtype=bool)
    for object_id in reversed(last):
        is_away = object_id in away | known.keys() and not masks[object_id].any()
        masks[object_id] = masks[object_id] & ~taken
        taken |= masks[object_id]
        if not masks[object_id].any() and not is_away:
            raise Refused(
                f"That would leave nothing of object {object_id}, so nothing was changed. Draw a box around it, or "
                "paint it; if it is in other frames but not in this one, say so with the button above the picture."
            )
    return {object_id: masks[object_id] for object_id in sorted(objects)}


def _stroke(mark: Mark, size: tuple[int, int]) -> np.ndarray:
    """The pixels that a brush stroke covers: bool (H, W)."""
    image = Image.new("1", size[::-1])
    draw = ImageDraw.Draw(image)
    radius = mark.radius
    draw.line(mark.points, fill=1, width=max(1, round(2 * radius)))
    for x, y in mark.points:  # round ends and bends
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
    return np.array(image)
