"""The same for programs: named functions for `gradio_client`. Each call brings its video and gets its results."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ..visualization import draw_overlay
from .clips import Clip, Rooms, unpack_clip
from .marks import MAX_MARKS, MAX_OBJECTS, Mark, masks_of_frame, read_mark, read_name, read_whole
from .network import Network, Result
from .unpack import Limits, Refused
from .visits import check_find

PROMPTS = (
    'A list with an entry for each object in each frame where it is marked: {"frame": 0, "object": 1, "name": "dog", '
    '"points": [[x, y, 1], [x, y, 0]], "box": [x0, y0, x1, y1]}. Points say with 1 that they are on the object, with '
    "0 that they are not; coordinates are pixels. One of points and box will do; the name may be left out."
)
MASKS = "masks: an indexed image of the first frame's size (PNG), pixel = object id, 0 = background; or none."
RETURNS = (
    "Returns the video with the objects drawn on it (MP4), the masks (ZIP of indexed PNGs, pixel = object id), "
    "the objects with their masks frame by frame (JSON), the same as COCO and as YouTube-VIS annotations (JSON), and "
    "a list of the objects: id, label, score, number of frames, share of the picture in each frame."
)


def add_api(network: Network, rooms: Rooms, limits: Limits, told: Callable) -> None:
    """Adds the functions `track`, `find` and `preview` to the page that is being made."""

    @contextmanager
    def unpacked(video: str | None) -> Iterator[tuple[Clip, Path]]:
        """A clip, and a folder for its results. These stay, to be fetched, unless something goes wrong."""
        if video is None:
            raise Refused("There is no video.")
        room = rooms.new()
        try:
            *_, clip = unpack_clip(rooms.uploaded(video), room / "clip", limits)
            (room / "run").mkdir()
            yield clip, room / "run"
        except BaseException:
            rooms.remove(room)
            raise
        rooms.remove(room / "clip")

    def outcome(run) -> tuple:
        *_, result = run
        return *[str(result.folder / name) for name in FILES], _table(result)

    @told
    def track(video: str, prompts: list, masks: str | None, backward: bool):
        marks, names = read_prompts(prompts or [])
        with unpacked(video) as (clip, folder):
            of_frames = prompt_masks(clip, marks, network)
            if masks is not None:
                of_frames[0] = {**read_masks(rooms.uploaded(masks), clip.size), **of_frames.get(0, {})}
            if not of_frames:
                raise Refused(f"Nothing is marked. prompts: {PROMPTS} {MASKS}")
            return outcome(network.run(clip, folder, masks=of_frames, names=names, backward=bool(backward)))

    @told
    def find(video: str, threshold: float, top_k: int, label_set: str):
        check_find(network, threshold, top_k, label_set)
        with unpacked(video) as (clip, folder):
            return outcome(network.run(clip, folder, threshold=threshold, max_objects=int(top_k), label_set=label_set))

    @told
    def preview(video: str, prompts: list, frame: int):
        marks, names = read_prompts(prompts)
        frame = read_whole(frame, "frame")
        with unpacked(video) as (clip, folder):
            ids = np.zeros(clip.size, dtype=np.int32)
            for object_id, mask in prompt_masks(clip, marks, network).get(frame, {}).items():
                ids[mask] = object_id
            picture = draw_overlay(clip.frame(frame), ids, names)
        rooms.remove(folder.parent)  # there are no files to fetch
        return picture

    model: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
    with gr.Row(visible=False):  # what the functions take and give, and nothing to see
        video = gr.Video(label="Video", sources=["upload"])
        prompts = gr.JSON([], label="Prompts")
        masks = gr.File(None, label="Masks of the first frame")
        backward = gr.Checkbox(True, label="Also back to the start, from where an object is first marked")
        threshold = gr.Number(network.model.config.foreground_threshold, label="Threshold, 0 to 1")
        top_k = gr.Number(10, label="Objects of a frame to show")
        label_set = gr.Textbox(
            network.model.config.default_label_set, label=f"Label set: {', '.join(network.label_sets)}"
        )
        frame = gr.Number(0, label="Frame")
        picture = gr.Image(label="The frame with its masks", format="png")
        outputs = [
            gr.Video(label="Video with objects"),
            gr.File(label="Masks"),
            gr.File(label="Objects"),
            gr.File(label="COCO"),
            gr.File(label="YouTube-VIS"),
            gr.JSON(label="Table of objects"),
        ]
        button = gr.Button()
        button.click(
            track,
            [video, prompts, masks, backward],
            outputs,
            api_name="track",
            api_description=f"Follows what is marked through a video. prompts: {PROMPTS} {MASKS} {RETURNS}",
            **model,
        )
        button.click(
            find,
            [video, threshold, top_k, label_set],
            outputs,
            api_name="find",
            api_description=f"Finds and follows the objects of a video. {RETURNS}",
            **model,
        )
        button.click(
            preview,
            [video, prompts, frame],
            [picture],
            api_name="preview",
            api_description=f"The masks of what is marked, in one frame, before following it. prompts: {PROMPTS}",
            **model,
        )


FILES = ("overlay.mp4", "masks.zip", "objects.json", "coco.json", "youtube_vis.json")


def _table(result: Result) -> list[dict]:
    return [{**item, "areas": [round(area, 5) for area in item["areas"]]} for item in result.objects]


def read_prompts(prompts) -> tuple[list[Mark], dict[int, str]]:
    """
    Marks and names from what a program sent.

    Raises:
        Refused: if it is not what `PROMPTS` describes.
    """
    wanted = f"The prompts can't be understood. Wanted is: {PROMPTS}"
    if not isinstance(prompts, list) or len(prompts) > MAX_MARKS:
        raise Refused(wanted)
    marks, names = [], {}
    for entry in prompts:
        try:
            if unknown := set(entry) - {"frame", "object", "name", "points", "box"}:
                raise Refused(f"{wanted} There is no {sorted(map(str, unknown))[0]!r} in it.")
            frame, object_id = read_whole(entry["frame"], "frame"), read_whole(entry["object"], "object")
            if name := read_name(entry.get("name")):
                names[object_id] = name
            contents = [
                {"frame": frame, "kind": "point", "points": [[x, y]], "add": _read_label(on)}
                for x, y, on in entry.get("points") or []
            ]
            if entry.get("box"):
                x0, y0, x1, y1 = entry["box"]
                contents.append({"frame": frame, "kind": "box", "points": [[x0, y0], [x1, y1]], "add": True})
            if not contents:
                raise Refused(f"{wanted} There is an entry without points and box.")
        except Refused:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(wanted) from error
        marks += [read_mark(content, object_id) for content in contents]
    if len(marks) > MAX_MARKS:
        raise Refused(f"These are {len(marks)} marks; more than {MAX_MARKS} are not taken.")
    return marks, names


def _read_label(on) -> bool:
    if on not in (0, 1):
        raise ValueError(f"a point is labelled {on!r}")
    return bool(on)


def prompt_masks(clip: Clip, marks: list[Mark], network: Network) -> dict[int, dict[int, np.ndarray]]:
    """Frame -> object -> mask, bool (H, W). Raises Refused for what doesn't fit the clip."""
    for mark in marks:
        mark.check(clip.size, clip.num_frames)
    return {
        frame: masks_of_frame([mark for mark in marks if mark.frame == frame], clip.frame(frame), network.refine)
        for frame in sorted({mark.frame for mark in marks})
    }


def read_masks(path: str, size: tuple[int, int]) -> dict[int, np.ndarray]:
    """Object -> mask, bool (H, W), from an indexed image. Raises Refused if it is none or doesn't fit the clip."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.size != size[::-1] or len(image.getbands()) > 1:
                raise Refused(
                    f"The masks are {image.width} x {image.height} pixels in mode {image.mode}; wanted is an indexed "
                    f"or grey image of the video's {size[1]} x {size[0]} pixels."
                )
            ids = np.array(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused("The masks can't be read; wanted is a PNG image.") from error
    objects = [int(object_id) for object_id in np.unique(ids) if object_id]
    if not 1 <= len(objects) <= MAX_OBJECTS:
        raise Refused(f"The masks show {len(objects)} objects; wanted are 1 to {MAX_OBJECTS}.")
    return {object_id: ids == object_id for object_id in objects}
