"""
The stream: who is followed, what the user said, where it stands. `streaming_ausm.py` moves it on, and
`identities_ausm.py` says who is who.

Users see object ids, positive integers that never repeat within a stream. The network sees slots: object `i` holds row
`slot` of the buffer of `N_id` ID vectors, and gives it back when it has not been seen for long.
"""

import functools
import json
import math
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import ModelOutput, logging

from .history_ausm import AusmHistory
from .prompts_ausm import ObjectPrompt

logger = logging.get_logger(__name__)


@dataclass
class AusmVideoSegmentationOutput(ModelOutput):
    """
    The objects of one streamed frame, all lists in the same order. A found object that is not in the frame is not
    listed; a marked one always is, with an empty mask (and not in what
    [`~AusmProcessor.post_process_instance_segmentation`] makes of it).

    Args:
        object_ids (`list[int]`):
            Ids of the objects, constant over the stream.
        pred_masks (`torch.FloatTensor` of shape `(num_objects, 1, h, w)`):
            Mask logits at a quarter of the network's input size. On a frame that has prompts: at the video's own
            size, so that the prompts come back as they were given, the smaller ones on top. Of found objects, pieces
            that are small and far from the rest are left out. A pixel belongs to the object of the highest logit, if
            that is positive, see [`~AusmProcessor.post_process_instance_segmentation`].
        scores (`torch.FloatTensor` of shape `(num_objects,)`):
            Foreground probability in this frame times class probability, of found objects also times the quality of
            their first mask. The foreground is 1 where the user marks what the network did not see.
        labels (`list[str | None]`):
            Most probable class of each object over the frames so far. `None` on the frame where a prompt introduces
            an object while the stream runs, or moves it to something else: the network answers for it from the next
            frame on.
        label_ids (`list[int]`):
            The same as indices into the label set; -1 for `None`.
        prompted (`list[bool]`):
            Whether the object was given by the user.
        frame_idx (`int`):
            Index of the frame in the stream.
    """

    # All are always given; the defaults are there because a ModelOutput may have one field at most without.
    object_ids: list[int] = None  # type: ignore[assignment]
    pred_masks: torch.Tensor = None  # type: ignore[assignment]
    scores: torch.Tensor = None  # type: ignore[assignment]
    labels: list[str | None] = None  # type: ignore[assignment]
    label_ids: list[int] = None  # type: ignore[assignment]
    prompted: list[bool] = None  # type: ignore[assignment]
    frame_idx: int = None  # type: ignore[assignment]


MAX_LOOKS = 8  # of an object that are remembered
NEW_LOOK = 0.98  # cosine with all that are, below which a look is another one


@dataclass
class FollowedObject:
    """
    An object that holds a slot.

    Attributes:
        object_id (`int`): What the user calls it; negative for a bystander.
        slot (`int`): Its row in the buffer of ID vectors.
        prompted (`bool`): Given by the user: never forgotten.
        absent_frames (`int`): For how many frames, up to now, it has not been seen.
        class_votes (`torch.FloatTensor` of shape `(num_labels,)`, *optional*): Sum over the frames of foreground x
            class probabilities: their mean in which a frame counts by how sure the object is in it. None before the
            network has answered for the object.
        quality (`float`): How good its first mask is, as the foreground of the detection says; 1 for what the user
            marked. A part of its score: once followed, it is only asked whether it is in the frame.
        dismissed (`bool`): The user has said that it isn't in the frame, and it hasn't been seen since.
        looks (`torch.FloatTensor` of shape `(k, D)`, *optional*): What it has looked like, each of length 1: at
            first, and the last times that it looked unlike before, `MAX_LOOKS` at most. None of a bystander.
    """

    object_id: int
    slot: int
    prompted: bool
    absent_frames: int = 0
    class_votes: torch.Tensor | None = None
    quality: float = 1.0
    looks: torch.Tensor | None = None
    dismissed: bool = False

    @property
    def is_bystander(self) -> bool:
        """
        Found where only what is marked is asked for. It is followed so that objects don't take it in, and nobody is
        told of it.
        """
        return self.object_id < 0

    def likeness(self, look: torch.Tensor) -> torch.Tensor:
        """Cosine of a look (D,) with that of its looks which is most like it; 0 without any."""
        return look.new_zeros(()) if self.looks is None else (self.looks @ look).amax()

    def remember(self, look: torch.Tensor) -> None:
        """Keeps a look (D,) of it, unless there is one like it."""
        if self.looks is None:
            self.looks = look[None]
        elif self.likeness(look) < NEW_LOOK:
            self.looks = torch.cat([self.looks[:1], self.looks[1:][2 - MAX_LOOKS :], look[None]])

    def forget_looks(self, look: torch.Tensor, least: float) -> None:
        """Drops what it has learned of something else, the looks whose cosine with a look (D,) is `least` or more."""
        if self.looks is not None:
            others = self.looks @ look < least
            others[0] = True  # at first it was itself
            self.looks = self.looks[others]

    def vote(self, foreground: float, class_probabilities: torch.Tensor) -> None:
        """Counts what a frame says that it is, by how sure it is in that frame."""
        votes = foreground * class_probabilities
        self.class_votes = votes if self.class_votes is None else self.class_votes + votes

    def is_past(self, max_age: int | None) -> bool:
        """
        Whether it is let go: after `max_age` frames in which it was not seen. Nobody was told of a bystander: one that
        is not seen is let go at once, to be found anew.
        """
        if self.prompted:
            return False
        if self.is_bystander:
            return self.absent_frames > 0
        return max_age is not None and self.absent_frames >= max_age


def make_room(
    objects: list[FollowedObject],
    number: int,
    num_slots: int,
    scores: dict[int, float],
    only_absent: bool = False,
) -> list[FollowedObject]:
    """
    Lets go of the fewest found objects for `number` more to fit: bystanders first, then the longest absent, then the
    least sure.
    """
    surplus = len(objects) + number - num_slots
    if surplus <= 0:
        return objects
    found = [x for x in objects if not x.prompted and (x.absent_frames or not only_absent)]
    found.sort(key=lambda x: (not x.is_bystander, -x.absent_frames, scores.get(x.object_id, 0.0)))
    let_go = {x.object_id for x in found[:surplus]}
    return [x for x in objects if x.object_id not in let_go]


def _between_frames(method):
    """Of a session: waits until a frame that another thread is at has been segmented."""

    @functools.wraps(method)
    def waiting(self, *args, **kwargs):
        with self.lock:
            return method(self, *args, **kwargs)

    return waiting


class AusmInferenceSession:
    r"""
    One video as it is being segmented, frame by frame. Make it with [`~AusmProcessor.init_video_session`].

    It holds the network's history and, for each followed object, a few kilobytes: its size doesn't grow with the
    number of frames. One thread hands it its frames; prompts and removals may come from others.

    Args:
        video (iterable of `torch.Tensor` of shape `(3, H, W)`, *optional*):
            Preprocessed frames, for `propagate_in_video_iterator`; taken one at a time.
        num_frames (`int`, *optional*):
            Their number, where it is known.
        video_height (`int`, *optional*), video_width (`int`, *optional*):
            Size of the frames before preprocessing, which is the size of prompts. All frames of a stream have one
            size after it: one of another size is refused.
        foreground_threshold (`float`, *optional*):
            Foreground probability above which a detection becomes an object, and below which one that was found
            counts as absent (a prompted one does below 0.5). `config.foreground_threshold` if not given.
        find_new_objects (`bool`, *optional*):
            Whether detections become objects. If not given: only in a stream without prompts, as far as known at its
            first frame. Where they don't, they are followed as bystanders, which are not in the output.
        label_set (`str`, *optional*):
            Label set that classes are taken from; `config.default_label_set` if not given.
        seed (`int`, *optional*):
            Makes the drawing of ID vectors repeatable; drawn from torch's own generator if not given.
        keep_results (`bool`, *optional*, defaults to `False`):
            Whether to keep each frame's output in `results`, by frame index. Memory then grows with the video.
    """

    def __init__(
        self,
        video: Iterable[torch.Tensor] | None = None,
        num_frames: int | None = None,
        video_height: int | None = None,
        video_width: int | None = None,
        foreground_threshold: float | None = None,
        find_new_objects: bool | None = None,
        label_set: str | None = None,
        seed: int | None = None,
        keep_results: bool = False,
    ):
        if isinstance(foreground_threshold, str) or not 0 <= (foreground_threshold or 0) <= 1:
            raise ValueError(f"foreground_threshold must be a number in 0..1, got {foreground_threshold!r}")
        self.video = iter(video) if video is not None else None
        self.video_frame: torch.Tensor | None = None  # taken from the video, and not segmented yet
        self.num_frames = num_frames
        self.video_height = video_height
        self.video_width = video_width
        self.foreground_threshold = None if foreground_threshold is None else float(foreground_threshold)
        self.find_new_objects = None if find_new_objects is None else bool(find_new_objects)
        self.label_set = label_set
        # A generator of its own, so that a saved stream goes on as it would have.
        self.generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        self.results: dict[int, AusmVideoSegmentationOutput] | None = {} if keep_results else None
        self.lock = threading.RLock()

        self.next_frame_idx = 0
        self.next_object_id = 1
        self.objects: list[FollowedObject] = []  # in the order of their columns in the history
        self.history: AusmHistory | None = None  # from the first frame on
        self.frame_size: tuple[int, int] | None = None  # of preprocessed frames, from the first on
        self.prompts: dict[int, dict[int, ObjectPrompt]] = {}  # frame index -> object id -> prompt
        self.slots_held_until: dict[int, int] = {}  # slot -> last frame in which an object held it
        self.warnings_given: set[str] = set()  # what is said once in a stream

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, lock=threading.RLock())

    def __repr__(self) -> str:
        size = "" if self.video_size is None else f", {self.video_width} x {self.video_height} pixels"
        held = [
            f"{x.object_id}{' (marked)' if x.prompted else ''}{' (away)' if x.absent_frames else ''}"
            for x in self.objects
            if not x.is_bystander
        ]
        coming = sorted(self.prompts)
        prompts = f", prompts for frames {coming}" if coming else ""
        objects = ", ".join(held) or "none"
        return f"{type(self).__name__}(next frame {self.next_frame_idx}{size}, objects: {objects}{prompts})"

    @property
    def video_size(self) -> tuple[int, int] | None:
        """Height and width of the frames before preprocessing, once they are known."""
        if self.video_height is None or self.video_width is None:
            return None
        return self.video_height, self.video_width

    @property
    def obj_ids(self) -> list[int]:
        """Ids of the objects that are followed, absent ones included, and of those marked in frames to come."""
        followed = [x.object_id for x in self.objects if not x.is_bystander]
        return list(dict.fromkeys([*followed, *(x for given in list(self.prompts.values()) for x in list(given))]))

    def get_obj_num(self) -> int:
        """How many objects `obj_ids` has."""
        return len(self.obj_ids)

    def warn_once(self, what: str, message: str) -> None:
        """Warns, but not a second time of the same in this stream."""
        if what not in self.warnings_given:
            self.warnings_given.add(what)
            logger.warning(message)

    @_between_frames
    def add_prompts(
        self, frame_idx: int | None, obj_ids: list[int], prompts: list[ObjectPrompt], video_size: tuple[int, int]
    ) -> None:
        """
        What the user says of objects in the next frame or a later one. In that frame it replaces what the network
        thinks of an object that is followed already, and an earlier prompt of the same object.

        Args:
            frame_idx (`int`, *optional*): Index of the frame, `next_frame_idx` or later; `next_frame_idx` if `None`.
            obj_ids (`list[int]`): Positive ids below 2**30, each once.
            prompts (`list[ObjectPrompt]`): One for each id.
            video_size (`tuple[int, int]`): Height and width of the frames before preprocessing.

        Raises:
            ValueError: if the frame is past or beyond the video, an id is no positive integer or comes twice, or a
                prompt is empty or doesn't fit the frame.
        """
        if frame_idx is None:
            frame_idx = self.next_frame_idx
        if type(frame_idx) is not int or frame_idx < self.next_frame_idx:
            raise ValueError(
                f"frame_idx must be an integer of at least {self.next_frame_idx}, the next frame of the stream, "
                f"got {frame_idx!r}"
            )
        if self.num_frames is not None and frame_idx >= self.num_frames:
            raise ValueError(f"frame_idx must be below {self.num_frames}, the length of the video, got {frame_idx}")
        for object_id in obj_ids:
            if type(object_id) is not int or not 1 <= object_id < 2**30:  # maps of ids are int32; found objects follow
                raise ValueError(f"obj_ids must be positive integers below 2**30, got {object_id!r}")
        if not obj_ids or len(set(obj_ids)) != len(obj_ids):
            raise ValueError(f"obj_ids must name at least one object and each one once, got {obj_ids}")
        expected = {x.object_id for x in self.objects}
        expected |= {x for earlier, given in self.prompts.items() if earlier < frame_idx for x in given}
        for object_id, prompt in zip(obj_ids, prompts, strict=True):
            prompt.check(object_id, video_size)
            if prompt.only_negative and object_id not in expected:
                if prompt.mask is not None:
                    raise ValueError(
                        "input_masks must not be empty where an object is new, got an empty mask for object "
                        f"{object_id}"
                    )
                raise ValueError(
                    "input_labels must have a 1 where an object is new, or there must be a box or a scribble, got "
                    f"negative points alone for object {object_id}"
                )
        self.video_height, self.video_width = video_size
        self.prompts.setdefault(frame_idx, {}).update(zip(obj_ids, prompts))
        self.next_object_id = max(self.next_object_id, *(object_id + 1 for object_id in obj_ids))

    @_between_frames
    def remove_object(self, obj_id: int) -> None:
        """
        Stop following an object, from the next frame on, and forget it and its prompts in frames to come. Others stay
        as they are. With `find_new_objects` the same thing may be found again, as a new object.

        Args:
            obj_id (`int`): Its id.

        Raises:
            ValueError: if there is no such object now.
        """
        known = sorted(self.obj_ids)
        if isinstance(obj_id, torch.Tensor):  # equal to an integer, but another key of a dict
            obj_id = int(obj_id)
        if obj_id not in known:
            raise ValueError(f"obj_id must be one of the objects followed now, {known}, got {obj_id!r}")
        staying = [column for column, followed in enumerate(self.objects) if followed.object_id != obj_id]
        if self.history is not None and len(staying) < len(self.objects):
            gone = [column for column in range(len(self.objects)) if column not in staying]
            self.objects = [self.objects[column] for column in staying]
            history = without_trace(self.history, gone)
            self.history = history.replace_objects(
                history.slots[:, staying], history.taken[:, staying], history.masks[:, staying]
            )
        for given in self.prompts.values():
            given.pop(obj_id, None)
        self.prompts = {frame_idx: given for frame_idx, given in self.prompts.items() if given}
        self.warnings_given -= {f"signal itself {obj_id}", f"nothing left {obj_id}"}

    def next_video_frame(self) -> torch.Tensor | None:
        """The video's next frame, `None` at its end. It stays the next until it is segmented, should that fail."""
        if self.video_frame is None and self.video is not None:
            self.video_frame = next(self.video, None)
        return self.video_frame

    def pass_over_video_frame(self) -> bool:
        """Leaves the video's next frame out, also one that can't be prepared. Whether there was one."""
        taken, self.video_frame = self.video_frame, None
        if taken is not None or self.video is None:
            return taken is not None
        skip = getattr(self.video, "skip", None)  # of a video whose frames the processor prepares
        return skip() if skip is not None else next(self.video, None) is not None

    @contextmanager
    def as_it_was_on_error(self) -> Iterator[None]:
        """What is interrupted in this block changes nothing, and what other threads say waits for its end."""
        with self.lock:
            generator = self.generator.get_state()
            before = vars(self) | {
                "objects": [replace(followed) for followed in self.objects],
                "prompts": {frame_idx: dict(given) for frame_idx, given in self.prompts.items()},
                "slots_held_until": dict(self.slots_held_until),
                "warnings_given": set(self.warnings_given),
            }
            try:
                yield
            except BaseException:
                self.generator.set_state(generator)
                vars(self).update(before)
                raise

    def new_object_id(self) -> int:
        """An id that nobody has had."""
        self.next_object_id += 1
        return self.next_object_id - 1

    def draw_slots(self, number: int, num_slots: int, objects: list[FollowedObject]) -> list[int]:
        """
        Slots that none of `objects` holds: those that nobody has held yet, drawn uniformly without replacement; then
        those given back longest ago, whose trace in the compressed past has faded most.
        """
        held = {followed.slot for followed in objects}
        free = [slot for slot in range(num_slots) if slot not in held]
        drawn = [free[i] for i in torch.randperm(len(free), generator=self.generator).tolist()]
        return sorted(drawn, key=lambda slot: self.slots_held_until.get(slot, -1))[:number]

    @_between_frames
    def save(self, path: str | os.PathLike) -> None:
        """
        Write the stream to one safetensors file, whole or not at all; [`~AusmInferenceSession.load`] goes on from it,
        bit for bit as this session would have.

        A `video` that the session was made with is not saved, nor are the outputs in `results`.

        Args:
            path (`str` or `os.PathLike`): The file; replaced if it exists.

        Raises:
            FileNotFoundError: if there is no such folder.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {str(path.parent)!r}")
        tensors = {"generator": self.generator.get_state()}
        if self.history is not None:
            tensors |= {f"history.{name}": tensor for name, tensor in self.history.tensors().items()}
        for followed in self.objects:
            if followed.class_votes is not None:
                tensors[f"class_votes.{followed.object_id}"] = followed.class_votes
            if followed.looks is not None:
                tensors[f"looks.{followed.object_id}"] = followed.looks
        prompts = []
        for frame_idx, given in self.prompts.items():
            for object_id, prompt in given.items():
                if prompt.mask is not None:
                    tensors[f"mask.{frame_idx}.{object_id}"] = prompt.mask
                prompts.append([frame_idx, object_id, prompt.box, prompt.points, prompt.labels, prompt.scribble])
        state = {name: getattr(self, name) for name in _SAVED}
        state["objects"] = [
            [x.object_id, x.slot, x.prompted, x.absent_frames, x.quality, x.dismissed] for x in self.objects
        ]
        state["prompts"] = prompts
        state["slots_held_until"] = list(self.slots_held_until.items())
        state["warnings_given"] = sorted(self.warnings_given)
        state["keep_results"] = self.results is not None

        unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
        try:
            # Clones: safetensors refuses tensors that share memory.
            tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
            save_file(tensors, unfinished, metadata={"format": "pt", _FILE_TAG: json.dumps(state)})
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu") -> "AusmInferenceSession":
        """
        A stream that [`~AusmInferenceSession.save`] wrote, ready for its next frame.

        Args:
            path (`str` or `os.PathLike`): The file.
            device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where the model is that goes on.

        Returns:
            [`AusmInferenceSession`], without a video: its frames are handed to the model as they come.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is no saved session.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {str(path)!r}")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                state = (file.metadata() or {}).get(_FILE_TAG)
                if state is None:
                    raise ValueError(f"path must be a saved session, got another kind of safetensors file, {path}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"path must be a saved session, got {str(path)!r}: {error}") from error
        try:
            return cls._restore(json.loads(state), tensors)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(f"path must be a saved session, got a damaged one, {str(path)!r}: {error!r}") from error

    @classmethod
    def _restore(cls, state: dict, tensors: dict[str, torch.Tensor]) -> "AusmInferenceSession":
        session = cls(keep_results=state["keep_results"], seed=0)
        for name in _SAVED:
            setattr(session, name, state[name])
        if session.frame_size is not None:
            height, width = session.frame_size
            session.frame_size = height, width
        session.generator.set_state(tensors["generator"].cpu())
        session.slots_held_until = dict(state["slots_held_until"])
        session.warnings_given = set(state["warnings_given"])
        for object_id, slot, prompted, absent_frames, quality, dismissed in state["objects"]:
            votes = tensors.get(f"class_votes.{object_id}")
            votes = None if votes is None else votes.cpu()
            looks = tensors.get(f"looks.{object_id}")
            session.objects.append(
                FollowedObject(object_id, slot, prompted, absent_frames, votes, quality, looks, dismissed)
            )
        for frame_idx, object_id, box, points, labels, scribble in state["prompts"]:
            mask = tensors.get(f"mask.{frame_idx}.{object_id}")
            session.prompts.setdefault(frame_idx, {})[object_id] = ObjectPrompt(
                mask=None if mask is None else mask.cpu(),
                box=None if box is None else tuple(box),
                points=tuple(map(tuple, points)),
                labels=tuple(labels),
                scribble=tuple(map(tuple, scribble)),
            )
        history = {name.removeprefix("history."): x for name, x in tensors.items() if name.startswith("history.")}
        if history:
            states: dict[int, list[torch.Tensor]] = {}
            for name in sorted(name for name in history if name.startswith("states.")):
                states.setdefault(int(name.split(".")[1]), []).append(history.pop(name))
            features = history.pop("features", None)
            session.history = AusmHistory(
                features=features,
                states=tuple(tuple(states[layer]) for layer in sorted(states)) or None,
                **history,
            )
            remembered = [x.looks for x in session.objects if x.looks is not None]
            if any(features is None or x.shape[1:] != features.shape[1:2] for x in remembered):
                raise ValueError("what its objects look like is not of its network")
            if session.history.slots.tolist() != [[followed.slot for followed in session.objects]]:
                raise ValueError("its objects are not those of its history")
        if type(session.next_frame_idx) is not int or type(session.next_object_id) is not int:
            raise ValueError("its frames or objects are not numbered")
        return session


def adopt_bystanders(
    session: AusmInferenceSession, objects: list[FollowedObject], seen: dict[int, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """Bystanders are objects from now on, with ids of their own: `seen` by the new ids."""
    new_ids = {x.object_id: session.new_object_id() for x in objects if x.is_bystander}
    for followed in objects:
        followed.object_id = new_ids.get(followed.object_id, followed.object_id)
    return {new_ids.get(object_id, object_id): mask for object_id, mask in seen.items()}


def without_trace(history: AusmHistory, columns: list[int]) -> AusmHistory:
    """
    The same history without the objects of `columns`: what they looked like is forgotten, and pixels that only they
    mark begin anew, so their marks are gone from the compressed past. Otherwise who is marked next, even elsewhere and
    with another ID vector, is pulled to where they were; `benchmarks/slot_reuse.py` measures it.
    """
    if not columns or history.states is None or history.features is None:
        return history
    height, width = history.features.shape[-2:]
    stride = math.isqrt(height * width // len(history.states[0][0]))  # of the states' map, in cells of the features'
    marked = F.adaptive_max_pool2d(history.masks, (height // stride, width // stride)).flatten(2) > 0  # (1, n, pixels)
    staying = [column for column in range(marked.shape[1]) if column not in columns]
    anew = marked[0, columns].any(0) & ~marked[0, staying].any(0)
    # A state is a row for each pixel, and zeros before the first frame.
    states = tuple(
        tuple(state.masked_fill(anew.view(-1, *[1] * (state.ndim - 1)), 0) for state in layer)
        for layer in history.states
    )
    return replace(history, states=states).forget_appearance(columns)


_FILE_TAG = "ausm_session_v3"

# Attributes of a session that are saved as they are.
_SAVED = (
    "video_height",
    "video_width",
    "foreground_threshold",
    "find_new_objects",
    "label_set",
    "next_frame_idx",
    "next_object_id",
    "frame_size",
)


__all__ = ["AusmInferenceSession", "AusmVideoSegmentationOutput", "FollowedObject"]
