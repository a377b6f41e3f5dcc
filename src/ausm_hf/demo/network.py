"""The model at work on a visitor's clip."""

import base64
import io
import json
import shutil
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..export import ObjectsJsonWriter, PngMaskWriter, to_coco, to_youtube_vis_data
from ..model.prompts_ausm import ObjectPrompt, refine_signals, signal_of_marks
from ..model.session_ausm import AusmInferenceSession
from ..segment import FollowedBack, segment_video
from ..video import VideoWriter
from ..visualization import draw_overlay, object_labels
from .clips import Clip
from .unpack import Refused

NUM_KEY_FRAMES = 8
SECONDS_BETWEEN_NEWS = 0.25
LIVE_WIDTH = 480  # of the frames that are shown while the work goes on, in pixels


class Stopped(Exception):
    """The visitor has stopped the run, or left."""


@dataclass
class News:
    """
    How far a run is.

    Attributes:
        done (`int`): How many frames are done of the part of the run that is going on.
        total (`int`): How many it has.
        fps (`float`): How many are done in a second.
        pictures (`list[str]`): The frames since the last news with their objects drawn on them, as data URLs.
        to_come (`int`): How many frames the part after it has: what goes back to the first frame comes before what
            goes through the video, and shows no pictures.
    """

    done: int
    total: int
    fps: float
    pictures: list[str] = field(default_factory=list)
    to_come: int = 0

    @property
    def seconds_left(self) -> float:
        return (self.total - self.done + self.to_come) / self.fps


@dataclass
class Result:
    """
    What a run has made.

    Attributes:
        folder (`Path`): Holds `overlay.mp4`, `masks/00000.png` ..., `masks.zip`, `objects.json`, `coco.json`,
            `youtube_vis.json` and the key frames `key/00000.jpg` ....
        objects (`list[dict]`): Of each object that was seen its `id`, `label`, `score` (mean), `frames` (the number
            of frames in which it is seen) and `areas` (its share of the picture in each frame).
        seconds (`float`): How long it took.
    """

    folder: Path
    objects: list[dict] = field(default_factory=list)
    seconds: float = 0.0

    def mask(self, index: int) -> np.ndarray:
        """Object ids, integers (H, W), of a frame."""
        try:
            return np.array(Image.open(self.folder / "masks" / f"{index:05d}.png"))
        except OSError as error:
            raise Refused("These results are no longer here: files are removed after an hour.") from error

    def key_frames(self, kind: str = "key") -> list[Path]:
        return sorted((self.folder / kind).glob("*.jpg"))


class Network:
    """
    A model and its processor, for all visitors.

    Args:
        model, processor: As [`~ausm_hf.load_model`] returns them.
        on_gpu: Decorator of the functions that use the model; `spaces.GPU` where GPUs are lent for one call.
    """

    def __init__(self, model, processor, on_gpu: Callable = lambda function: function):
        self.model, self.processor = model, processor
        self.refine = on_gpu(self._refine)
        self._run_on_gpu = on_gpu(self._run)

    @property
    def label_sets(self) -> dict[str, list[str]]:
        return self.model.config.label_sets

    @torch.no_grad()
    def _refine(
        self, frame: np.ndarray, prompts: list[ObjectPrompt], known: list[np.ndarray | None]
    ) -> list[np.ndarray]:
        """
        Masks (bool, H x W) of the objects that are marked in a frame; `known` are those that points correct. See
        `signal_of_marks` and `refine_signals`.
        """
        pixel_values = self.processor(images=frame)["pixel_values"].to(self.model.device)
        features = self.model.encode_frames(pixel_values)
        size = frame.shape[:2]
        signals = [
            signal_of_marks(self.model, features, prompt, size, None if mask is None else torch.from_numpy(mask))
            for prompt, mask in zip(prompts, known)
        ]
        return [mask.cpu().numpy() for mask in refine_signals(self.model, features, signals, prompts)]

    def run(self, clip: Clip, folder: Path, **how) -> Iterator[News | Result]:
        """See `_segment`, whose errors it raises wherever the GPU is."""
        for item in self._run_on_gpu(clip, folder, **how):
            if isinstance(item, Exception):
                raise item
            yield item

    def _run(self, clip: Clip, folder: Path, **how) -> Iterator[News | Result | Exception]:
        """As `_segment`. Who lends a GPU makes another error of one that is raised there, so the last item is it."""
        try:
            yield from self._segment(clip, folder, **how)
        except (Stopped, Refused, OSError) as error:
            yield error

    def _segment(
        self,
        clip: Clip,
        folder: Path,
        masks: dict[int, dict[int, np.ndarray]] | None = None,
        names: dict[int, str] | None = None,
        threshold: float | None = None,
        max_objects: int | None = None,
        label_set: str | None = None,
        show_labels: bool = True,
        backward: bool = False,
    ) -> Iterator[News | Result]:
        """
        Segments a clip into files under `folder`. Yields [`News`] now and then, and at last the [`Result`].

        Args:
            clip, folder: What to read and where to write. A file `stop` in `folder` ends the work.
            masks: Frame index -> object id -> mask, bool (H, W): what to follow; an empty one says that the object is
                not in that frame. Without it objects are found.
            names: What the visitor calls the objects, by id.
            threshold: Foreground probability above which something is an object.
            max_objects: How many objects of a frame to show.
            label_set: Where the labels of found objects come from.
            show_labels: Whether to write them into the video.
            backward: Whether to follow each object from the first of its masks back to the first frame, too.

        Raises:
            Stopped: when a file `stop` appears, or the folder goes.
        """
        names = names or {}
        started = time.monotonic()
        earlier = FollowedBack()
        if masks and backward:
            yield from self._backward(clip, folder, masks, names, label_set, earlier)
        of_frames = _in_turn(masks, sorted(masks)) if masks else {}
        start = min(of_frames, default=0)
        session = self._session(clip, {i - start: x for i, x in of_frames.items()}, threshold, label_set)
        results = segment_video(
            clip.part(range(clip.num_frames)),
            self.model,
            self.processor,
            session=session,
            max_objects=max_objects,
            prompt_frame=start,
        )
        areas: dict[int, list[float]] = defaultdict(lambda: [0.0] * clip.num_frames)
        begun = told = time.monotonic()
        pictures = []
        (folder / "key").mkdir()
        keys = set(np.linspace(0, clip.num_frames - 1, min(NUM_KEY_FRAMES, clip.num_frames)).round().astype(int))
        with ExitStack() as stack:
            video = stack.enter_context(_video_writer(clip, folder / "overlay.mp4"))
            pngs = stack.enter_context(PngMaskWriter(folder / "masks"))
            table = stack.enter_context(ObjectsJsonWriter(folder / "objects.json", clip.name, clip.fps))
            for result in results:
                _stop_if_asked(folder)
                result = earlier.add_to(replace(result, objects=_named(result.objects, names, session)))
                objects = result.objects
                shown = objects if show_labels else [{**item, "label": None} for item in objects]
                at = clip.times[result.index] if clip.times else None
                drawn = draw_overlay(result.frame, result.masks, object_labels(shown))
                video.write(drawn, at)
                pngs.write(result.index, result.frame, result.masks, objects)
                table.write(result.index, result.frame, result.masks, objects, at)
                for object_id, count in zip(*np.unique(result.masks, return_counts=True)):
                    areas[int(object_id)][result.index] = float(count / result.masks.size)
                picture = Image.fromarray(drawn).resize(clip.shown_size)
                if result.index in keys:
                    picture.save(folder / "key" / f"{result.index:05d}.jpg", quality=90)
                picture.thumbnail((LIVE_WIDTH, LIVE_WIDTH))
                pictures.append(data_url(picture))
                now = time.monotonic()
                if now - told >= SECONDS_BETWEEN_NEWS:
                    done = result.index + 1
                    yield News(done, clip.num_frames, done / (now - begun), pictures)
                    told, pictures = now, []
        found = _pack(folder)
        ended = time.monotonic()
        yield News(clip.num_frames, clip.num_frames, clip.num_frames / (ended - begun), pictures)
        objects = [
            {
                "id": item["id"],
                "label": item["label"],
                "score": item["score"],
                "frames": len(item["segmentations"]),
                "areas": areas[item["id"]],
            }
            for item in found
        ]
        yield Result(folder, objects, ended - started)

    def _backward(
        self,
        clip: Clip,
        folder: Path,
        masks: dict[int, dict[int, np.ndarray]],
        names: dict[int, str],
        label_set: str | None,
        earlier: FollowedBack,
    ) -> Iterator[News]:
        """Follows each object from the first of its masks back to the first frame, into `earlier`."""
        first = {
            object_id: index
            for index in sorted(masks, reverse=True)
            for object_id, mask in masks[index].items()
            if mask.any()
        }
        last = max(first.values())
        of_frames = _in_turn(masks, sorted((index for index in masks if index <= last), reverse=True))
        session = self._session(clip, {last - i: x for i, x in of_frames.items()}, None, label_set)
        begun = told = time.monotonic()
        # The first masks are those of the last frame.
        for result in segment_video(clip.part(range(last, -1, -1)), self.model, self.processor, session=session):
            _stop_if_asked(folder)
            done, index = result.index, last - result.index
            ids = [object_id for object_id, frame in first.items() if index < frame]
            earlier.keep(
                index,
                np.where(np.isin(result.masks, ids), result.masks, 0),
                [item for item in _named(result.objects, names, session) if item["id"] in ids],
            )
            now = time.monotonic()
            if done and now - told >= SECONDS_BETWEEN_NEWS:
                yield News(done, last, done / (now - begun), to_come=clip.num_frames)
                told = now

    def _session(
        self,
        clip: Clip,
        masks: dict[int, dict[int, np.ndarray]],
        threshold: float | None,
        label_set: str | None,
    ) -> AusmInferenceSession:
        """A stream in which `masks` are followed, or objects are found if there are none."""
        session = self.processor.init_video_session(
            foreground_threshold=threshold, find_new_objects=not masks, label_set=label_set, seed=0
        )
        for frame_index, of_frame in masks.items():
            self.processor.add_inputs_to_inference_session(
                session, frame_index, list(of_frame), input_masks=list(of_frame.values()), original_size=clip.size
            )
        return session


def _named(objects: list[dict], names: dict[int, str], session: AusmInferenceSession) -> list[dict]:
    """
    The objects of a frame under the names that the visitor gave them. The score of what has one is how sure it is that
    it is there, whatever it may be; that of others, also that they are what their labels say.
    """
    votes = {x.object_id: x.class_votes for x in session.objects}
    named = []
    for item in objects:
        name, of_item = names.get(item["id"]), votes.get(item["id"])
        if name is not None:
            share = 1.0 if of_item is None else float(of_item.max() / of_item.sum())
            item = {**item, "label": name, "score": item["score"] / share}
        named.append(item)
    return named


def _video_writer(clip: Clip, path: Path) -> VideoWriter:
    return VideoWriter(path, clip.fps, clip.size, clip.pixel_aspect, clip.sound)


def _in_turn(masks: dict[int, dict[int, np.ndarray]], indices: list[int]) -> dict[int, dict[int, np.ndarray]]:
    """The masks of these frames in this order: who has not been marked yet need not be said to be away."""
    known: set[int] = set()
    in_turn = {}
    for index in indices:
        known |= {object_id for object_id, mask in masks[index].items() if mask.any()}
        in_turn[index] = {object_id: mask for object_id, mask in masks[index].items() if object_id in known}
    return {index: of_frame for index, of_frame in in_turn.items() if of_frame}


def _stop_if_asked(folder: Path):
    """Raises Stopped if there is a file `stop` in the folder of a run, or the folder is gone."""
    if (folder / "stop").exists() or not folder.exists():
        raise Stopped


def _pack(folder: Path) -> list[dict]:
    """The downloads that are made of other files. Returns the objects of `objects.json`."""
    with zipfile.ZipFile(folder / "masks.zip", "w") as archive:  # not packed further: PNGs are already
        for path in sorted((folder / "masks").iterdir()):
            archive.write(path, f"masks/{path.name}")
    content = json.loads((folder / "objects.json").read_bytes())
    (folder / "coco.json").write_text(json.dumps(to_coco(content)), encoding="utf-8")
    (folder / "youtube_vis.json").write_text(json.dumps(to_youtube_vis_data(content)), encoding="utf-8")
    return content["objects"]


def show_alone(clip: Clip, result: Result, object_id: int) -> tuple[Path, list[Path]]:
    """The video with one object as it is and everything else dark, and its key frames. Made once, then kept."""
    path, key = result.folder / f"object-{object_id}.mp4", f"key-{object_id}"
    if not path.exists():
        shutil.rmtree(result.folder / key, ignore_errors=True)
        (result.folder / key).mkdir()
        wanted = {frame.stem for frame in result.key_frames()}
        with _video_writer(clip, path) as writer:
            for index, frame in enumerate(clip):
                alone = np.where((result.mask(index) == object_id)[:, :, None], frame, frame // 5)
                writer.write(alone, clip.times[index] if clip.times else None)
                if f"{index:05d}" in wanted:
                    picture = Image.fromarray(alone).resize(clip.shown_size)
                    picture.save(result.folder / key / f"{index:05d}.jpg", quality=90)
    return path, result.key_frames(key)


def data_url(picture: Image.Image | np.ndarray, quality: int = 80) -> str:
    """A picture as a browser takes it, in a string."""
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
