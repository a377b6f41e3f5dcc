"""
The stream: which object is which. All bookkeeping of identities is here, none of it in the network.

Users see object ids, positive integers that never repeat within a stream. The network sees slots: object `i` holds row
`slot` of the buffer of `N_id` ID vectors, and gives it back when it has not been seen for long.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput, logging

from .history_ausm import binarize

logger = logging.get_logger(__name__)

PROMPT_LOGIT = 100.0  # logit of a pixel that the user says belongs to an object; above any that the network gives


@dataclass
class AusmVideoSegmentationOutput(ModelOutput):
    """
    The objects of one streamed frame, all lists in the same order. An object that is not in the frame is not listed.

    Args:
        object_ids (`list[int]`):
            Ids of the objects, constant over the stream.
        pred_masks (`torch.FloatTensor` of shape `(num_objects, 1, h, w)`):
            Mask logits at a quarter of the network's input size. On a frame that has prompts: at the video's own
            size, so that the prompts come back as they were given. A pixel belongs to the object of the highest
            logit, if that is positive, see [`~AusmProcessor.post_process_instance_segmentation`].
        scores (`torch.FloatTensor` of shape `(num_objects,)`):
            Foreground probability in this frame times class probability; 1 where a prompt introduces an object.
        labels (`list[str | None]`):
            Most probable class of each object over the frames so far. `None` on the frame where a prompt introduces
            an object while the stream runs: the network answers for it from the next frame on.
        label_ids (`list[int]`):
            The same as indices into the label set; -1 for `None`.
        prompted (`list[bool]`):
            Whether the object was given by the user.
        frame_idx (`int`):
            Index of the frame in the stream.
    """

    object_ids: list[int] | None = None
    pred_masks: torch.FloatTensor | None = None
    scores: torch.FloatTensor | None = None
    labels: list[str | None] | None = None
    label_ids: list[int] | None = None
    prompted: list[bool] | None = None
    frame_idx: int | None = None


@dataclass
class FollowedObject:
    """
    An object that holds a slot.

    Attributes:
        object_id (`int`): What the user calls it.
        slot (`int`): Its row in the buffer of ID vectors.
        prompted (`bool`): Given by the user: never thresholded, never forgotten.
        absent_frames (`int`): For how many frames, up to now, it has not been seen.
        class_votes (`torch.FloatTensor` of shape `(num_labels,)`, *optional*): Sum over the frames of foreground x
            class probabilities: their mean in which a frame counts by how sure the object is in it. None before the
            network has answered for the object.
    """

    object_id: int
    slot: int
    prompted: bool
    absent_frames: int = 0
    class_votes: torch.Tensor | None = None


class AusmInferenceSession:
    r"""
    One video as it is being segmented, frame by frame. Make it with [`~AusmProcessor.init_video_session`].

    It holds the network's history and, for each followed object, a handful of numbers: its size doesn't grow with the
    number of frames.

    Args:
        video (iterable of `torch.Tensor` of shape `(3, H, W)`, *optional*):
            Preprocessed frames, for `propagate_in_video_iterator`; taken one at a time.
        num_frames (`int`, *optional*):
            Their number, where it is known.
        video_height (`int`, *optional*), video_width (`int`, *optional*):
            Size of the frames before preprocessing, which is the size of prompts.
        foreground_threshold (`float`, *optional*):
            Foreground probability above which a detection becomes an object, and below which a followed object counts
            as absent. `config.foreground_threshold` if not given.
        find_new_objects (`bool`, *optional*):
            Whether detections become objects. If not given: only in a stream without prompts, as far as known at its
            first frame.
        label_set (`str`, *optional*):
            Label set that classes are taken from; `config.default_label_set` if not given.
        seed (`int`, *optional*):
            Makes the drawing of ID vectors repeatable.
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
        if foreground_threshold is not None and not 0 <= foreground_threshold <= 1:
            raise ValueError(f"foreground_threshold must be in 0..1, got {foreground_threshold}")
        self.video = iter(video) if video is not None else None
        self.num_frames = num_frames
        self.video_height = video_height
        self.video_width = video_width
        self.foreground_threshold = foreground_threshold
        self.find_new_objects = find_new_objects
        self.label_set = label_set
        self.generator = torch.Generator().manual_seed(seed) if seed is not None else None
        self.results: dict[int, AusmVideoSegmentationOutput] | None = {} if keep_results else None

        self.next_frame_idx = 0
        self.next_object_id = 1
        self.objects: list[FollowedObject] = []  # in the order of their columns in the history
        self.history = None  # AusmHistory, from the first frame on
        self.frame_size: tuple[int, int] | None = None  # of preprocessed frames, from the first on
        self.mask_prompts: dict[int, dict[int, torch.Tensor]] = {}  # frame index -> object id -> mask
        self.warned_of_full_buffer = False

    @property
    def obj_ids(self) -> list[int]:
        """Ids of the objects that are followed now, absent ones included."""
        return [followed.object_id for followed in self.objects]

    def get_obj_num(self) -> int:
        """How many objects are followed now."""
        return len(self.objects)

    def add_masks(
        self, frame_idx: int, obj_ids: list[int], masks: list[torch.Tensor], video_size: tuple[int, int]
    ) -> None:
        """
        Masks that objects have in a frame still to come. An object that is followed already gets its mask replaced.

        Args:
            frame_idx (`int`): Index of the frame, `next_frame_idx` or later.
            obj_ids (`list[int]`): Positive ids, each once.
            masks (`list[torch.BoolTensor]`, each of shape `video_size`): One for each id.
            video_size (`tuple[int, int]`): Height and width of the frames before preprocessing.

        Raises:
            ValueError: if the frame is past or beyond the video, an id is no positive integer or comes twice, or a
                mask is empty or has another size.
        """
        if type(frame_idx) is not int or frame_idx < self.next_frame_idx:
            raise ValueError(
                f"frame_idx must be an integer of at least {self.next_frame_idx}, the next frame of the stream, "
                f"got {frame_idx!r}"
            )
        if self.num_frames is not None and frame_idx >= self.num_frames:
            raise ValueError(f"frame_idx must be below {self.num_frames}, the length of the video, got {frame_idx}")
        for object_id in obj_ids:
            if type(object_id) is not int or object_id < 1:
                raise ValueError(f"obj_ids must be positive integers, got {object_id!r}")
        if not obj_ids or len(set(obj_ids)) != len(obj_ids):
            raise ValueError(f"obj_ids must name at least one object and each one once, got {obj_ids}")
        if len(masks) != len(obj_ids):
            raise ValueError(f"input_masks must be as many as obj_ids ({len(obj_ids)}), got {len(masks)}")
        for object_id, mask in zip(obj_ids, masks):
            if tuple(mask.shape) != video_size:
                raise ValueError(
                    f"input_masks must have the size of the video, {video_size} (height, width), "
                    f"got {tuple(mask.shape)} for object {object_id}"
                )
            if not mask.any():
                raise ValueError(f"input_masks must not be empty, got an empty mask for object {object_id}")
        self.video_height, self.video_width = video_size
        self.mask_prompts.setdefault(frame_idx, {}).update(zip(obj_ids, masks))
        self.next_object_id = max(self.next_object_id, *(object_id + 1 for object_id in obj_ids))

    def new_object(self, slot: int) -> FollowedObject:
        """An object that was found, with an id that nobody has had."""
        followed = FollowedObject(self.next_object_id, slot, prompted=False)
        self.next_object_id += 1
        return followed

    def draw_slots(self, number: int, num_slots: int, objects: list[FollowedObject]) -> list[int]:
        """Slots that none of `objects` holds, drawn uniformly without replacement."""
        held = {followed.slot for followed in objects}
        free = [slot for slot in range(num_slots) if slot not in held]
        return [free[i] for i in torch.randperm(len(free), generator=self.generator)[:number].tolist()]


@torch.no_grad()
def step_session(model, session: AusmInferenceSession, frame: torch.Tensor) -> AusmVideoSegmentationOutput:
    """
    Segment the next frame of the stream: the recurrent form of the paper, with identities.

    Args:
        model ([`AusmForUniversalSegmentation`]): The network; its `step` is a function of tensors.
        session ([`AusmInferenceSession`]): The stream; it advances by one frame.
        frame (`torch.FloatTensor` of shape `(3, H, W)` or `(1, 3, H, W)`): The next frame, preprocessed.

    Returns:
        [`AusmVideoSegmentationOutput`]

    Raises:
        ValueError: if the frame is no preprocessed frame or has another size than those before it, or more objects
            are prompted than there are ID vectors. The session is then as it was.
    """
    config = model.config
    num_slots = config.num_id_vectors
    threshold = session.foreground_threshold
    if threshold is None:
        threshold = config.foreground_threshold
    pixel_values = _checked_frame(session, frame).to(model.device, model.dtype)
    prompts = {
        object_id: mask.to(model.device)
        for object_id, mask in session.mask_prompts.get(session.next_frame_idx, {}).items()
    }
    num_prompted = len({x.object_id for x in session.objects if x.prompted} | set(prompts))
    if num_prompted > num_slots:
        raise ValueError(f"obj_ids must be at most {num_slots}, the number of ID vectors, got {num_prompted} objects")

    objects, history = list(session.objects), session.history
    find_new_objects = session.find_new_objects
    if history is None:
        # Prompts for the first frame are M_0: that frame is itself predicted from them.
        if find_new_objects is None:
            find_new_objects = not session.mask_prompts
        slots = session.draw_slots(len(prompts), num_slots, [])
        objects = [FollowedObject(object_id, slot, prompted=True) for object_id, slot in zip(prompts, slots)]
        stride_4 = (pixel_values.shape[-2] // 4, pixel_values.shape[-1] // 4)
        masks = {object_id: binarize(_area_average(mask, stride_4)) for object_id, mask in prompts.items()}
        history = _put_objects(model.init_history(1), objects, masks, stride_4, pixel_values)

    output = model.step(pixel_values, history, label_set=session.label_set)
    mask_logits = output.masks_queries_logits[0].float()
    size = tuple(mask_logits.shape[-2:])
    non_empty = (mask_logits > 0).flatten(1).any(1).tolist()
    foreground = output.foreground_queries_logits[0].float().sigmoid().tolist()
    # Whether there is an object is the foreground's to say: classes are compared without "no object", the last one.
    class_probabilities = output.class_queries_logits[0, :, :-1].float().softmax(-1).cpu()

    # Followed objects: the first queries, in the order of the history. `logits` holds those seen in this frame.
    logits: dict[int, torch.Tensor] = {}
    scores: dict[int, float] = {}
    for row, followed in enumerate(objects):
        if followed.object_id in prompts:
            followed.prompted = True
        if followed.prompted or (foreground[row] >= threshold and non_empty[row]):
            followed.absent_frames = 0
            _vote(followed, foreground[row], class_probabilities[row])
            logits[followed.object_id] = mask_logits[row]
            scores[followed.object_id] = foreground[row]
        else:
            followed.absent_frames += 1
    num_followed = len(objects)
    objects = _let_twins_go(objects, logits, config.duplicate_overlap)
    if config.max_age is not None:
        objects = [x for x in objects if x.absent_frames < config.max_age]  # prompted ones are never absent

    # Prompts are what the user says they are, and replace what the network thought of these objects.
    joining = [object_id for object_id in prompts if object_id not in {x.object_id for x in objects}]
    objects = _make_room(objects, len(joining), num_slots, scores)
    logits = {x.object_id: logits[x.object_id] for x in objects if x.object_id in logits}
    for object_id, slot in zip(joining, session.draw_slots(len(joining), num_slots, objects)):
        objects.append(FollowedObject(object_id, slot, prompted=True))
        scores[object_id] = 1.0
    for object_id, mask in prompts.items():
        logits[object_id] = (binarize(_area_average(mask, size)) * 2 - 1) * PROMPT_LOGIT

    # Detections: the queries after those of the followed objects.
    rows = []
    if find_new_objects:
        rows = [row for row in range(num_followed, len(foreground)) if foreground[row] > threshold and non_empty[row]]
        rows.sort(key=lambda row: -foreground[row])
        rows = _without_duplicates(rows, mask_logits, list(logits.values()), config.duplicate_overlap)
        num_free = num_slots - len(objects)
        if len(rows) > num_free:
            rows = rows[:num_free]
            if not session.warned_of_full_buffer:
                session.warned_of_full_buffer = True
                logger.warning(
                    f"All {num_slots} ID vectors are taken: of the objects found in frame {session.next_frame_idx} "
                    "only the best can be followed. A higher foreground threshold finds fewer objects."
                )

    # M_t: each pixel belongs to one object. A detection that is left without a pixel is none.
    exclusive = _exclusive([*logits.values(), *(mask_logits[row] for row in rows)])
    kept = exclusive[len(logits) :].flatten(1).any(1).tolist()
    masks = dict(zip(logits, exclusive))
    masks |= {object_id: binarize(_area_average(mask, size)) for object_id, mask in prompts.items()}
    found = [(row, mask) for row, mask, keep in zip(rows, exclusive[len(logits) :], kept) if keep]
    for (row, mask), slot in zip(found, session.draw_slots(len(found), num_slots, objects)):
        new = session.new_object(slot)
        _vote(new, foreground[row], class_probabilities[row])
        objects.append(new)
        logits[new.object_id] = mask_logits[row]
        scores[new.object_id] = foreground[row]
        masks[new.object_id] = mask

    session.history = _put_objects(output.history, objects, masks, size, pixel_values)
    session.objects = objects
    session.find_new_objects = find_new_objects
    session.frame_size = tuple(pixel_values.shape[-2:])
    session.mask_prompts.pop(session.next_frame_idx, None)
    labels = config.label_sets[session.label_set or config.default_label_set]
    result = _describe(session, [x for x in objects if x.object_id in logits], logits, scores, prompts, labels, size)
    session.next_frame_idx += 1
    if session.results is not None:
        session.results[result.frame_idx] = result
    return result


def propagate_in_video_iterator(
    model,
    session: AusmInferenceSession,
    start_frame_idx: int | None = None,
    max_frame_num_to_track: int | None = None,
    show_progress_bar: bool = False,
) -> Iterator[AusmVideoSegmentationOutput]:
    """
    Segment the video that the session was made with, one frame at a time.

    Args:
        model ([`AusmForUniversalSegmentation`]): The network.
        session ([`AusmInferenceSession`]): Made with a video.
        start_frame_idx (`int`, *optional*): First frame to segment, the next one of the stream if not given. Frames
            before it are passed over.
        max_frame_num_to_track (`int`, *optional*): How many frames to segment, all that follow if not given.
        show_progress_bar (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.

    Yields:
        [`AusmVideoSegmentationOutput`] for each frame.

    Raises:
        ValueError: if the session has no video, `start_frame_idx` is past or beyond the video or passes over a
            prompted frame, or `max_frame_num_to_track` is negative.
    """
    if session.video is None:
        raise ValueError(
            "inference_session must be made with a video, init_video_session(video=...), to run through it; "
            "one made without is given its frames by model(inference_session=..., frame=...)"
        )
    start = session.next_frame_idx if start_frame_idx is None else start_frame_idx
    if start < session.next_frame_idx:
        raise ValueError(
            f"start_frame_idx must be at least {session.next_frame_idx}, the next frame of the stream, got {start}"
        )
    if session.num_frames is not None and start > session.num_frames:
        raise ValueError(f"start_frame_idx must be at most {session.num_frames}, the length of the video, got {start}")
    if passed_over := [frame_idx for frame_idx in session.mask_prompts if frame_idx < start]:
        raise ValueError(f"start_frame_idx must not pass over the prompts of frame {min(passed_over)}, got {start}")
    if max_frame_num_to_track is not None and max_frame_num_to_track < 0:
        raise ValueError(f"max_frame_num_to_track must not be negative, got {max_frame_num_to_track}")
    return _propagate(model, session, start, max_frame_num_to_track, show_progress_bar)


def _propagate(model, session, start, max_frames, show_progress_bar) -> Iterator[AusmVideoSegmentationOutput]:
    while session.next_frame_idx < start:
        if next(session.video, None) is None:
            raise ValueError(
                f"start_frame_idx must be at most {session.next_frame_idx}, the video's length, got {start}"
            )
        session.next_frame_idx += 1
    total = max_frames
    if session.num_frames is not None:
        remaining = session.num_frames - start
        total = remaining if max_frames is None else min(max_frames, remaining)
    with logging.tqdm(total=total, desc="propagate in video", disable=not show_progress_bar) as progress:
        done = 0
        while max_frames is None or done < max_frames:
            frame = next(session.video, None)
            if frame is None:
                return
            yield step_session(model, session, frame)
            progress.update()
            done += 1


def _checked_frame(session: AusmInferenceSession, frame: torch.Tensor) -> torch.Tensor:
    """The frame as (1, 3, H, W)."""
    if not isinstance(frame, torch.Tensor) or not frame.is_floating_point():
        got = frame.dtype if isinstance(frame, torch.Tensor) else type(frame).__name__
        raise ValueError(f"frame must be a floating point tensor, as the processor makes it, got {got}")
    pixel_values = frame if frame.ndim == 4 else frame[None]
    if pixel_values.ndim != 4 or pixel_values.shape[:2] != (1, 3):
        raise ValueError(f"frame must have shape (3, H, W) or (1, 3, H, W), got {tuple(frame.shape)}")
    size = tuple(pixel_values.shape[-2:])
    if session.frame_size is not None and size != session.frame_size:
        raise ValueError(
            f"frame must have the size of the frames before it, {session.frame_size} (height, width), got {size}"
        )
    return pixel_values


def _area_average(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The fraction of each cell that a mask (height, width) covers, so that thin objects don't vanish."""
    return F.interpolate(mask[None, None].float(), size, mode="area")[0, 0]


def _put_objects(history, objects: list[FollowedObject], masks: dict[int, torch.Tensor], size, like: torch.Tensor):
    """The history with `A` = the objects' slots and `M` = their masks, zeros for those that have none."""
    stacked = torch.zeros(1, len(objects), *size, dtype=like.dtype, device=like.device)
    for i, followed in enumerate(objects):
        if followed.object_id in masks:
            stacked[0, i] = masks[followed.object_id]
    slots = torch.tensor([[followed.slot for followed in objects]], dtype=torch.int64, device=like.device)
    return history.replace_objects(slots, torch.ones_like(slots, dtype=torch.bool), stacked)


def _vote(followed: FollowedObject, foreground: float, class_probabilities: torch.Tensor) -> None:
    votes = foreground * class_probabilities
    followed.class_votes = votes if followed.class_votes is None else followed.class_votes + votes


def _make_room(
    objects: list[FollowedObject], number: int, num_slots: int, scores: dict[int, float]
) -> list[FollowedObject]:
    """Lets go of the fewest found objects for `number` more to fit: first the longest absent, then the least sure."""
    surplus = len(objects) + number - num_slots
    if surplus <= 0:
        return objects
    found = [x for x in objects if not x.prompted]
    found.sort(key=lambda x: (-x.absent_frames, scores.get(x.object_id, 0.0)))
    let_go = {x.object_id for x in found[:surplus]}
    return [x for x in objects if x.object_id not in let_go]


def _let_twins_go(
    objects: list[FollowedObject], logits: dict[int, torch.Tensor], max_overlap: float
) -> list[FollowedObject]:
    """Lets go of found objects whose mask has become that of another (by IoU): prompted and older ones stay."""
    seen = sorted((x for x in objects if x.object_id in logits), key=lambda x: (not x.prompted, x.object_id))
    if len(seen) < 2:
        return objects
    masks = torch.stack([logits[x.object_id] for x in seen]).flatten(1).gt(0).float()
    intersection = masks @ masks.T
    area = masks.sum(1)
    twins = (intersection > max_overlap * (area[:, None] + area[None, :] - intersection)).tolist()
    staying: list[int] = []
    for i, followed in enumerate(seen):
        if followed.prompted or not any(twins[i][j] for j in staying):
            staying.append(i)
    let_go = {x.object_id for x in seen} - {seen[i].object_id for i in staying}
    return [x for x in objects if x.object_id not in let_go]


def _without_duplicates(
    rows: list[int], mask_logits: torch.Tensor, known: list[torch.Tensor], max_overlap: float
) -> list[int]:
    """The detections, best first, whose mask is not covered by followed objects and better detections."""
    if not rows:
        return []
    covered = torch.stack(known).gt(0).any(0) if known else torch.zeros_like(mask_logits[0], dtype=torch.bool)
    accepted = []
    for row in rows:
        mask = mask_logits[row] > 0
        if (mask & covered).sum() <= max_overlap * mask.sum():
            accepted.append(row)
            covered = covered | mask
    return accepted


def _exclusive(logits: list[torch.Tensor]) -> torch.Tensor:
    """Bool masks (n, h, w): a pixel belongs to the object of the highest logit, if that is positive."""
    if not logits:
        return torch.zeros(0, 1, 1, dtype=torch.bool)
    stacked = torch.stack(logits)
    owner = stacked.argmax(0)
    return (stacked > 0) & (owner == torch.arange(len(logits), device=owner.device)[:, None, None])


def _describe(session, seen, logits, scores, prompts, labels, size) -> AusmVideoSegmentationOutput:
    """The output for the objects seen in this frame."""
    if seen:
        pred_masks = torch.stack([logits[x.object_id] for x in seen])[:, None]
    else:
        pred_masks = session.history.masks.new_zeros((0, 1, *size), dtype=torch.float32)
    if prompts:
        pred_masks = F.interpolate(pred_masks, (session.video_height, session.video_width), mode="bilinear")
        for i, followed in enumerate(seen):
            if followed.object_id in prompts:
                pred_masks[i, 0] = (prompts[followed.object_id].float() * 2 - 1) * PROMPT_LOGIT
    label_ids, object_scores = [], []
    for followed in seen:
        label_id, score = -1, scores[followed.object_id]
        if followed.class_votes is not None:
            class_probability, index = (followed.class_votes / followed.class_votes.sum()).max(0)
            label_id, score = int(index), score * float(class_probability)
        label_ids.append(label_id)
        object_scores.append(score)
    return AusmVideoSegmentationOutput(
        object_ids=[x.object_id for x in seen],
        pred_masks=pred_masks,
        scores=torch.tensor(object_scores, device=pred_masks.device),
        labels=[labels[label_id] if label_id >= 0 else None for label_id in label_ids],
        label_ids=label_ids,
        prompted=[x.prompted for x in seen],
        frame_idx=session.next_frame_idx,
    )


__all__ = ["AusmInferenceSession", "AusmVideoSegmentationOutput", "propagate_in_video_iterator", "step_session"]
