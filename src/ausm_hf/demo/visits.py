"""What is kept for each visitor while the page is open."""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pycocotools import mask as rle_tools

from ..visualization import draw_overlay
from .clips import Clip, Rooms, touch, unpack_clip
from .marks import MAX_MARKS, MAX_OBJECTS, Mark, masks_of_frame, read_name, read_whole
from .network import Network, News, Result, Stopped
from .unpack import Limits, Refused


@dataclass
class Visit:
    """
    One visitor's clip, marks and results. Everything that it writes is in `room`.

    Attributes:
        room (`Path`): Folder that only this visitor's requests know.
        clip (`Clip`, *optional*): The video that was brought last.
        marks (`list[Mark]`): In the order in which they were made.
        names (`dict[int, str]`): What the visitor calls the objects.
        num_objects (`int`): How many objects there are to mark.
        result (`Result`, *optional*): Of the last run.
        followed (`Result`, *optional*): The same, if it followed marked objects: what later marks correct.
        before (`dict`): What was followed when an object was first marked in a frame, by `(object_id, frame)`, as
            COCO's run lengths. All marks of the object in that frame correct this, whatever was followed
            by them since, so that they can be undone, and followed again.
        camera (`CameraStream`, *optional*): The stream of the webcam.
        reading (`bool`): Whether a video that was brought is still being read.
    """

    room: Path
    clip: Clip | None = None
    marks: list[Mark] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    num_objects: int = 1
    result: Result | None = None
    followed: Result | None = None
    before: dict[tuple[int, int], dict] = field(default_factory=dict)
    camera: object = None
    reading: bool = False
    running: Path | None = None
    num_folders: int = 0

    def new_folder(self, kind: str) -> Path:
        touch(self.room)
        self.num_folders += 1
        return self.room / f"{kind}-{self.num_folders}"

    def take(self, file: str, limits: Limits, rooms: Rooms) -> Iterator[np.ndarray | Clip]:
        """A new clip in place of the old one; see `unpack_clip`. Raises Refused when the disk is full, too."""
        self.stop()
        self.forget()
        rooms.check_space()
        self.reading = True
        try:
            for item in unpack_clip(file, self.new_folder("clip"), limits):
                if isinstance(item, Clip):
                    self.clip, self.reading = item, False
                yield item
        finally:
            self.reading = False

    def forget(self):
        """As if nothing had been uploaded yet: the files go, too."""
        self.clip, self.marks, self.names, self.num_objects = None, [], {}, 1
        self.result = self.followed = None
        self.before = {}
        for folder in self.room.glob("*"):
            if folder != self.running:  # a run that still writes removes its own at its end
                shutil.rmtree(folder, ignore_errors=True)

    def the_clip(self) -> Clip:
        """Raises Refused if there is none yet."""
        if self.clip is None and self.reading:
            raise Refused("The video is still being read. Please try again in a moment.")
        if self.clip is None:
            raise Refused("Upload a video first, or take one of the examples.")
        touch(self.room)
        return self.clip

    def the_result(self) -> Result:
        """Of the last run. Raises Refused if there is none yet."""
        if self.result is None:
            raise Refused("There are no results yet.")
        return self.result

    def mark(self, mark: Mark, network: Network) -> np.ndarray:
        """Adds a mark. Returns the frame with the masks that are now known of it. Raises Refused, and adds nothing."""
        clip = self.the_clip()
        if len(self.marks) >= MAX_MARKS:
            raise Refused(f"These are {MAX_MARKS} marks; more are not taken.")
        mark.check(clip.size, clip.num_frames)
        elsewhere = [other for other in self.marks if other.object_id == mark.object_id and other.frame != mark.frame]
        if mark.kind == "away" and all(other.kind == "away" for other in elsewhere):
            raise Refused(f"First mark object {mark.object_id} in a frame in which it is.")
        key = (mark.object_id, mark.frame)
        if key not in self.before:
            ids = np.zeros(clip.size, np.int32) if self.followed is None else self.followed.mask(mark.frame)
            self.before[key] = rle_tools.encode(np.asfortranarray(ids == mark.object_id, np.uint8))
        self.marks.append(mark)
        try:
            return self.picture(mark.frame, network)
        except BaseException:
            self.marks = [other for other in self.marks if other is not mark]  # an equal one may be there
            raise

    def add_object(self) -> int:
        """The number of a new object. Raises Refused if there are too many."""
        if self.num_objects >= MAX_OBJECTS:
            raise Refused(f"More than {MAX_OBJECTS} objects are not taken here.")
        self.num_objects += 1
        return self.num_objects

    def name(self, object_id: int, text: str):
        """Calls an object by a name; an empty one takes its name away. Raises Refused for an unknown object."""
        if object_id not in range(1, self.num_objects + 1):
            raise Refused(f"There is no object {object_id}.")
        self.names[object_id] = read_name(text)
        if not self.names[object_id]:
            del self.names[object_id]

    def clear(self):
        """Takes all marks away, and what was followed by them."""
        self.marks, self.names, self.num_objects, self.followed, self.before = [], {}, 1, None, {}

    def masks(self, index: int, network: Network) -> dict[int, np.ndarray]:
        """The masks of the objects marked in a frame, bool (H, W), by object id; empty of those not in it."""
        marks = [mark for mark in self.marks if mark.frame == index]
        if not marks:
            return {}
        known = {object_id: mask for object_id, mask in self._before(index).items() if mask.any()}
        return masks_of_frame(marks, self.the_clip().frame(index), network.refine, known)

    def _before(self, index: int) -> dict[int, np.ndarray]:
        """What was followed of the objects that were marked in a frame, before they were: bool (H, W), by id."""
        return {
            object_id: rle_tools.decode(rle).astype(bool)
            for (object_id, frame), rle in list(self.before.items())
            if frame == index
        }

    def picture(self, index: int, network: Network) -> np.ndarray:
        """
        A frame with what is known of it: the marked objects, those whose marks were undone since the last run as they
        were before, and the others as that run followed them.
        """
        frame = self.the_clip().frame(index)
        ids = np.zeros(frame.shape[:2], dtype=np.int32)
        if self.followed is not None:
            ids[:] = self.followed.mask(index)
        for object_id, mask in {**self._before(index), **self.masks(index, network)}.items():
            ids[ids == object_id] = 0
            ids[mask] = object_id
        return draw_overlay(frame, ids, self.names)

    def follow(self, network: Network, backward: bool = True) -> Iterator[News]:
        """
        Follows the marked objects to the end of the clip, and `backward` to its start too; the outcome is `result`.
        Raises Stopped, Refused.
        """
        self.the_clip()
        marks = list(self.marks)
        frames = sorted({mark.frame for mark in marks})
        masks = {index: self.masks(index, network) for index in frames}
        if not any(mask.any() for of_frame in masks.values() for mask in of_frame.values()):
            raise Refused("Mark something first: click on it, draw a box around it, or paint over it.")
        yield from self._run(network, masks=masks, names=dict(self.names), backward=bool(backward))
        self._keep(self.result, marks)

    def find(
        self, network: Network, threshold: float, max_objects: int, label_set: str, show_labels: bool
    ) -> Iterator[News]:
        """Finds and follows objects; the outcome is `result`. Raises Stopped, Refused."""
        check_find(network, threshold, max_objects, label_set)
        yield from self._run(
            network,
            threshold=float(threshold),
            max_objects=int(max_objects),
            label_set=label_set,
            show_labels=bool(show_labels),
        )
        self._keep(None, [])

    def _keep(self, followed: Result | None, marks: list[Mark]):
        """What is followed from now on, and by which marks. What was before marks that are undone is forgotten."""
        marked = {(mark.object_id, mark.frame) for mark in [*marks, *self.marks]}
        self.before = {key: rle for key, rle in list(self.before.items()) if key in marked}
        self.followed = followed

    def _run(self, network: Network, **how) -> Iterator[News]:
        clip, folder = self.the_clip(), self.new_folder("run")
        self.stop()
        folder.mkdir()
        self.running = folder
        result = None
        try:
            for item in network.run(clip, folder, **how):
                if isinstance(item, Result):
                    result = item
                else:
                    yield item
        except (OSError, Refused) as error:
            if folder.exists() and self.clip is clip:
                raise
            raise Stopped from error  # the files are gone: the visitor has left, or uploaded another clip
        finally:
            if self.running == folder:
                self.running = None
            if result is None or self.clip is not clip:
                shutil.rmtree(folder, ignore_errors=True)
        if self.clip is not clip:  # another one has been uploaded meanwhile
            raise Stopped
        if self.result is not None:
            shutil.rmtree(self.result.folder, ignore_errors=True)
        self.result = result

    def stop(self):
        """Stops the run that is under way, if any: it ends before its next frame."""
        running = self.running
        if running is not None:
            with suppress(OSError):  # its folder is gone already
                (running / "stop").touch()


def check_find(network: Network, threshold: float, max_objects: int, label_set: str):
    """Raises Refused for settings that can't be."""
    if not isinstance(threshold, (int, float)) or not 0 < threshold < 1:
        raise Refused("The threshold is a number between 0 and 1.")
    if not 1 <= read_whole(max_objects, "number of objects") <= 100:
        raise Refused("The number of objects is 1 to 100.")
    if label_set not in network.label_sets:
        raise Refused(f"There is no label set of that name; there are: {', '.join(network.label_sets)}.")


class Visits:
    """The visits that are going on, by the random name that each open page has."""

    def __init__(self, rooms: Rooms):
        self.rooms = rooms
        self._visits: dict[str, Visit] = {}

    def of(self, session_hash: str | None) -> Visit:
        """The visit of a page; a new one if there is none, or its folder has been removed. Raises Refused."""
        if not session_hash:  # it would share the files of all others without a name
            raise Refused("This page has lost its connection. Please load it again.")
        visit = self._visits.get(session_hash)
        if visit is None or not visit.room.exists():
            visit = self._visits[session_hash] = Visit(self.rooms.new())
        return visit

    def end(self, session_hash: str | None):
        """The page was closed: its run stops and its files go."""
        visit = self._visits.pop(session_hash or "", None)
        if visit is not None:
            visit.stop()
            self.rooms.remove(visit.room)

    def sweep(self):
        """Forgets the visits whose files are gone."""
        self.rooms.sweep()
        for session_hash, visit in list(self._visits.items()):
            if not visit.room.exists():
                visit.stop()
                self._visits.pop(session_hash, None)  # the visitor may have left meanwhile
