"""The stream moves on: one frame in, the network once, who is who out (`identities_ausm.py`)."""

import operator
from collections.abc import Iterator
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from transformers.utils import logging

from .history_ausm import AusmHistory
from .identities_ausm import Answer, finish_frame, put_objects, seen_objects
from .masks_ausm import within_reach, without_specks
from .pixels_ausm import AusmFrameFeatures
from .prompts_ausm import ObjectPrompt, history_mask, refine_signals, signal_of_marks
from .session_ausm import AusmInferenceSession, AusmVideoSegmentationOutput, FollowedObject


def step_session(
    model, session: AusmInferenceSession, frame: torch.Tensor | AusmFrameFeatures
) -> AusmVideoSegmentationOutput:
    """
    Segment the next frame of the stream: the recurrent form of the paper, with identities.

    Args:
        model ([`AusmForUniversalSegmentation`]): The network; its `step` is a function of tensors.
        session ([`AusmInferenceSession`]): The stream; it advances by one frame.
        frame (`torch.FloatTensor` of shape `(3, H, W)` or `(1, 3, H, W)`, or [`AusmFrameFeatures`]): The next frame,
            preprocessed, or what `model.encode_frames` made of it.

    Returns:
        [`AusmVideoSegmentationOutput`]

    Raises:
        ValueError: if the frame is no preprocessed frame or has another size than those before it, or more objects
            are prompted than there are ID vectors. The session is then as it was.
    """
    return step_sessions(model, [session], [frame])[0]


@torch.inference_mode()
def step_sessions(
    model, inference_sessions: list[AusmInferenceSession], frames: list[torch.Tensor | AusmFrameFeatures]
) -> list[AusmVideoSegmentationOutput]:
    """
    Segment the next frame of each of several streams, in one pass of the network (two where some are at their first
    frame and some are not; one more for each further label set, for each box, point or scribble that marks an object
    in this frame, and for points without a box; the frame encoder runs but once). The results are those of
    [`step_session`] on each, but for rounding.

    Args:
        model ([`AusmForUniversalSegmentation`]): The network.
        inference_sessions (list of [`AusmInferenceSession`]): The streams, each once; each advances by one frame.
        frames (list of `torch.FloatTensor` of shape `(3, H, W)` or `(1, 3, H, W)`, or of [`AusmFrameFeatures`]): The
            next frame of each, all of one size.

    Returns:
        A list of [`AusmVideoSegmentationOutput`], one per stream.

    Raises:
        ValueError: as [`step_session`], or if the lists differ in length, a session comes twice or frames differ in
            size. All sessions are then as they were.
    """
    sessions, frames = list(inference_sessions), list(frames)
    if not sessions or len(sessions) != len(frames) or len({id(session) for session in sessions}) != len(sessions):
        raise ValueError(
            f"sessions must be one or more, each once, with one frame each, got {len(sessions)} sessions "
            f"({len({id(session) for session in sessions})} different) and {len(frames)} frames"
        )
    with ExitStack() as unless_done:
        for session in sorted(sessions, key=id):  # in one order, so that no two threads wait for each other
            unless_done.enter_context(session.as_it_was_on_error())
        return _step_sessions(model, sessions, _encoded_frames(model, sessions, frames, takes_frames=True))


def _step_sessions(
    model, sessions: list[AusmInferenceSession], inputs: list[AusmFrameFeatures]
) -> list[AusmVideoSegmentationOutput]:
    # Prompts for the first frame are M_0: that frame is itself predicted from them.
    masks = {i: _prompt_masks(model, s, inputs[i], {}) for i, s in enumerate(sessions) if s.history is None}
    objects: list[list[FollowedObject]] = [list(session.objects) for session in sessions]
    histories: list = [session.history for session in sessions]
    for i, given in masks.items():
        objects[i], histories[i] = _start(model, sessions[i], inputs[i], given)
    groups: dict[tuple, list[int]] = {}  # of streams that can go together
    for i, session in enumerate(sessions):
        groups.setdefault((session.history is None, session.label_set), []).append(i)
    answers: dict[int, Answer] = {}
    for (_, label_set), group in groups.items():
        together = AusmFrameFeatures.join([inputs[i] for i in group])
        asked = [histories[i] for i in group], [objects[i] for i in group]
        answers |= zip(group, _ask(model, together, *asked, label_set))

    seen = [seen_objects(model, session, objects[i], answers[i]) for i, session in enumerate(sessions)]
    for i, session in enumerate(sessions):
        if i not in masks:
            masks[i] = _prompt_masks(model, session, inputs[i], seen[i])
    outputs = [
        finish_frame(model, session, inputs[i], objects[i], seen[i], masks[i], answers[i])
        for i, session in enumerate(sessions)
    ]
    for session, output in zip(sessions, outputs):
        if session.results is not None:
            session.results[output.frame_idx] = output
    return outputs


@torch.inference_mode()
def preview_prompts(
    model, inference_session: AusmInferenceSession, frame: torch.Tensor | AusmFrameFeatures
) -> dict[int, torch.Tensor]:
    """
    The masks that the prompts given for the next frame will have, without moving the stream on: what a user sees while
    still clicking.

    Args:
        model ([`AusmForUniversalSegmentation`]): The network.
        inference_session ([`AusmInferenceSession`]): The stream; it stays as it is.
        frame (`torch.FloatTensor` of shape `(3, H, W)` or `(1, 3, H, W)`, or [`AusmFrameFeatures`]): The next frame,
            preprocessed, or what `model.encode_frames` made of it.

    Returns:
        `dict[int, torch.BoolTensor]`: for each prompted object its mask, at the frame's size before preprocessing.

    Raises:
        ValueError: as [`step_session`].
    """
    session = inference_session
    with session.lock:
        (encoded,) = _encoded_frames(model, [session], [frame])
        seen: dict[int, torch.Tensor] = {}
        if session.history is not None and session.prompts.get(session.next_frame_idx):  # it may correct what is seen
            (answer,) = _ask(model, encoded, [session.history], [session.objects], session.label_set)
            seen = seen_objects(model, session, session.objects, answer)
        said = set(session.warnings_given)
        try:
            return _prompt_masks(model, session, encoded, seen)
        finally:
            session.warnings_given = said  # what is wrong with them is said again should they come to be followed


def propagate_in_video_iterator(
    model,
    inference_session: AusmInferenceSession,
    start_frame_idx: int | None = None,
    max_frame_num_to_track: int | None = None,
    show_progress_bar: bool = False,
) -> Iterator[AusmVideoSegmentationOutput]:
    """
    Segment the video that the session was made with, one frame at a time.

    Args:
        model ([`AusmForUniversalSegmentation`]): The network.
        inference_session ([`AusmInferenceSession`]): Made with a video.
        start_frame_idx (`int`, *optional*): First frame to segment; frames before it are passed over. If not given,
            the next one of the stream, or, where nothing is followed or looked for before it, the first one that has
            prompts.
        max_frame_num_to_track (`int`, *optional*): How many frames to segment after that one, all if not given.
        show_progress_bar (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.

    Yields:
        [`AusmVideoSegmentationOutput`] for each frame.

    Raises:
        ValueError: if the session has no video, `start_frame_idx` is past or beyond the video or passes over a
            prompted frame, or `max_frame_num_to_track` is negative; at the video's end, if a prompted frame is beyond
            it.
    """
    session = inference_session
    if session.video is None:
        raise ValueError(
            "inference_session must be made with a video, init_video_session(video=...), to run through it; "
            "one made without is given its frames by model(inference_session=..., frame=...)"
        )
    for name, number in (("start_frame_idx", start_frame_idx), ("max_frame_num_to_track", max_frame_num_to_track)):
        try:
            operator.index(0 if number is None else number)
        except TypeError:
            raise ValueError(f"{name} must be an integer, got {number!r}") from None
    start = session.next_frame_idx if start_frame_idx is None else operator.index(start_frame_idx)
    if start_frame_idx is None and session.prompts and not session.objects and not session.find_new_objects:
        start = min(session.prompts)
    if start < session.next_frame_idx:
        raise ValueError(
            f"start_frame_idx must be at least {session.next_frame_idx}, the next frame of the stream, got {start}"
        )
    if session.num_frames is not None and start > session.num_frames:
        raise ValueError(f"start_frame_idx must be at most {session.num_frames}, the length of the video, got {start}")
    _check_passed_over(session, start)
    if max_frame_num_to_track is not None and max_frame_num_to_track < 0:
        raise ValueError(f"max_frame_num_to_track must not be negative, got {max_frame_num_to_track}")
    return _propagate(model, session, start, max_frame_num_to_track, show_progress_bar)


def _check_passed_over(session: AusmInferenceSession, start: int):
    if passed_over := [frame_idx for frame_idx in session.prompts if frame_idx < start]:
        raise ValueError(f"start_frame_idx must not pass over the prompts of frame {min(passed_over)}, got {start}")


def _propagate(model, session, start, max_frames, show_progress_bar) -> Iterator[AusmVideoSegmentationOutput]:
    while session.next_frame_idx < start:
        with session.lock:
            _check_passed_over(session, start)  # some may have come since this was called
            if not session.pass_over_video_frame():
                raise ValueError(
                    f"start_frame_idx must be at most {session.next_frame_idx}, the video's length, got {start}"
                )
            session.next_frame_idx += 1
    total = None if max_frames is None else max_frames + 1
    if session.num_frames is not None:
        remaining = session.num_frames - start
        total = remaining if total is None else min(total, remaining)
    with logging.tqdm(total=total, desc="propagate in video", disable=not show_progress_bar) as progress:
        done = 0
        while max_frames is None or done <= max_frames:
            frame = session.next_video_frame()
            if frame is None:
                if session.prompts:
                    raise ValueError(
                        f"frame_idx must be below {session.next_frame_idx}, the length of the video, got prompts for "
                        f"frame {min(session.prompts)}"
                    )
                return
            yield step_session(model, session, frame)
            progress.update()
            done += 1


def _encoded_frames(
    model,
    sessions: list[AusmInferenceSession],
    frames: list[torch.Tensor | AusmFrameFeatures],
    takes_frames: bool = False,
) -> list[AusmFrameFeatures]:
    """
    What the network sees in each stream's frame alone; refused if a stream can't go on with its frame.

    Args:
        takes_frames: Whether the streams move on with these frames.
    """
    inputs: list[torch.Tensor | AusmFrameFeatures] = []
    for number, (session, frame) in enumerate(zip(sessions, frames)):
        try:
            if takes_frames and session.video is not None and frame is not session.video_frame:
                raise ValueError(
                    "inference_session was made with a video, whose frames propagate_in_video_iterator takes; one "
                    "that is to be given its frames is made without"
                )
            inputs.append(_checked_frame(model, session, frame))
            if (size := _frame_size(inputs[-1])) != (first := _frame_size(inputs[0])):
                raise ValueError(
                    f"frames must be of one size to go through the network together, {first} (height, width) as that "
                    f"of session 0, got {size}"
                )
        except ValueError as error:
            if len(sessions) == 1:
                raise
            raise ValueError(f"session {number} of {len(sessions)}: {error}") from error
    images = [frame for frame in inputs if isinstance(frame, torch.Tensor)]
    encoded = iter(model.encode_frames(torch.cat(images)).split() if images else [])
    return [next(encoded) if isinstance(frame, torch.Tensor) else frame for frame in inputs]


def _frame_size(frame: torch.Tensor | AusmFrameFeatures) -> tuple[int, int]:
    return (frame.shape[-2], frame.shape[-1]) if isinstance(frame, torch.Tensor) else frame.size


def _checked_frame(
    model, session: AusmInferenceSession, frame: torch.Tensor | AusmFrameFeatures
) -> torch.Tensor | AusmFrameFeatures:
    """A frame as (1, 3, H, W), where the model is, or encoded; refused if the stream can't go on with it."""
    if session.label_set not in (None, *model.config.label_sets):
        raise ValueError(f"label_set must be one of {sorted(model.config.label_sets)}, got {session.label_set!r}")
    if isinstance(frame, AusmFrameFeatures):
        if len(frame.stride_4) != 1:
            raise ValueError(f"frame must hold what is seen in one frame, got {len(frame.stride_4)} frames")
    else:
        frame = _checked_pixel_values(frame).to(model.device, model.dtype)
    if session.history is not None and session.history.masks.device != model.device:  # as that of a saved stream
        session.history = session.history.to(model.device)
        for followed in session.objects:
            followed.looks = None if followed.looks is None else followed.looks.to(model.device)
    if session.history is not None and not session.history.is_of(model.config):
        raise ValueError("inference_session was begun with a network of other sizes, and can go on with no other")
    if session.frame_size is not None and _frame_size(frame) != session.frame_size:
        raise ValueError(
            f"frame must have the size of the frames before it, {session.frame_size} (height, width), got "
            f"{_frame_size(frame)}"
        )
    num_slots = model.config.num_id_vectors
    prompted = {x.object_id for x in session.objects if x.prompted}
    prompted |= set(session.prompts.get(session.next_frame_idx, {}))
    if len(prompted) > num_slots:
        raise ValueError(
            f"obj_ids must be at most {num_slots}, the number of ID vectors, got {len(prompted)} objects (in an image "
            "of masks every value is one: soft edges make many)"
        )
    return frame


def _checked_pixel_values(frame: torch.Tensor) -> torch.Tensor:
    if not isinstance(frame, torch.Tensor) or not frame.is_floating_point():
        got = frame.dtype if isinstance(frame, torch.Tensor) else type(frame).__name__
        raise ValueError(f"frame must be a floating point tensor, as the processor makes it, got {got}")
    pixel_values = frame if frame.ndim == 4 else frame[None]
    if pixel_values.ndim != 4 or pixel_values.shape[:2] != (1, 3):
        raise ValueError(f"frame must have shape (3, H, W) or (1, 3, H, W), got {tuple(frame.shape)}")
    if not pixel_values.isfinite().all():  # it would be in all of the stream's future
        raise ValueError("frame must hold finite values, got infinite ones or NaN")
    return pixel_values


def _prompt_masks(
    model, session: AusmInferenceSession, frame: AusmFrameFeatures, seen: dict[int, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """
    The mask of each object prompted in the next frame, bool and of the video's size: the one given, or what one pass
    of the network makes of box, points and scribble, which ends where the box ends, nearly. Points and scribble
    without a box correct the mask of an object that is `seen` (object id -> mask logits of this frame). A point on one
    object is not on another.

    Where that pass gives nothing, or nothing at any of the positive points, the signal itself is the mask.
    """
    size, prompts = session.video_size, session.prompts.get(session.next_frame_idx, {})
    if size is None or not prompts:
        return {}
    by_hand = {x.object_id for x in session.objects if x.prompted}
    masks, signals, marked = {}, {}, []
    for object_id, prompt in prompts.items():
        if prompt.mask is not None:
            masks[object_id] = prompt.mask.to(frame.stride_4.device)
            continue
        others = prompt.not_on(list(prompts.values()))
        known = None
        if prompt.box is None and object_id in seen:
            shown = without_specks(seen[object_id][None], [object_id in by_hand])
            known = F.interpolate(shown[None], size, mode="bilinear")[0, 0].gt(0).cpu()
        signal = signal_of_marks(model, frame, prompt, size, known, others)
        if not signal.any() and others.points:  # they are all around its own
            others = ObjectPrompt()
            signal = signal_of_marks(model, frame, prompt, size, known)
        if signal.any():
            signals[object_id] = signal
            marked.append(prompt.with_points(others))
        else:
            session.warn_once(
                f"nothing left {object_id}",
                f"Negative points leave nothing of object {object_id} in frame {session.next_frame_idx}: they are not "
                "followed. remove_object lets go of an object.",
            )
    for object_id, mask in zip(signals, refine_signals(model, frame, list(signals.values()), marked)):
        if not prompts[object_id].agrees(mask):
            mask = signals[object_id].to(mask.device)
            session.warn_once(
                f"signal itself {object_id}",
                f"The network finds no object where object {object_id} is marked in frame {session.next_frame_idx}: "
                "the marked pixels themselves are followed. (Points are x, y in pixels from the upper left corner.)",
            )
        masks[object_id] = mask
    return {object_id: masks[object_id] for object_id in prompts if object_id in masks}


def _start(
    model, session: AusmInferenceSession, frame: AusmFrameFeatures, masks: dict[int, torch.Tensor]
) -> tuple[list[FollowedObject], AusmHistory]:
    """The objects of the first frame and the history before it."""
    slots = session.draw_slots(len(masks), model.config.num_id_vectors, [])
    objects = [FollowedObject(object_id, slot, prompted=True) for object_id, slot in zip(masks, slots)]
    size = (frame.stride_4.shape[-2], frame.stride_4.shape[-1])
    small = {object_id: history_mask(mask, size) for object_id, mask in masks.items()}
    return objects, put_objects(model.init_history(1), objects, small, size, frame.stride_4)


def _ask(
    model,
    frames: AusmFrameFeatures,
    histories: list[AusmHistory],
    objects: list[list[FollowedObject]],
    label_set: str | None,
) -> list[Answer]:
    """One pass of the network over a frame of each of several streams. Columns that a stream lacks are padding."""
    numbers = [len(followed) for followed in objects]
    config = model.config
    most, radius = max(numbers), config.mask_propagation_radius
    output = model.step(frames, AusmHistory.join(histories), label_set=label_set)
    answers = []
    for i, (number, history) in enumerate(zip(numbers, output.history.split(numbers))):
        rows = [*range(number), *range(most, output.foreground_queries_logits.shape[1])]
        masks = output.masks_queries_logits[i, rows].float()
        prompted = [x.prompted for x in objects[i]]
        if radius and not all(prompted):
            masks[:number] = within_reach(masks[:number], history.masks[0], radius, prompted)
        foreground = output.foreground_queries_logits[i, rows].float()
        looks = None
        if number and config.likeness_scale:
            looks = model.describe_objects(history, masks[None, :number])[0]
            likeness = torch.stack([x.likeness(look) for x, look in zip(objects[i], looks)])
            foreground[:number] += config.likeness_scale * (likeness - config.likeness_offset) * (likeness != 0)
        answers.append(
            Answer(
                masks=masks,
                non_empty=(masks > 0).flatten(1).any(1).tolist(),
                foreground=foreground.sigmoid().tolist(),
                # Whether there is an object is the foreground's to say, not that of "no object".
                classes=output.class_queries_logits[i, rows, :-1].float().softmax(-1).cpu(),
                looks=looks,
                history=history,
            )
        )
    return answers


__all__ = ["preview_prompts", "propagate_in_video_iterator", "step_session", "step_sessions"]
