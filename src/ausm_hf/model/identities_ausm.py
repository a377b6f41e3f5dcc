"""
Who is who after a frame: what the network says of it becomes objects with ids. All bookkeeping of identities is here
and in `session_ausm.py`, none of it in the network.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from .history_ausm import AusmHistory
from .masks_ausm import exclusive, overlapping, twins, without_duplicates, without_specks
from .pixels_ausm import AusmFrameFeatures
from .prompts_ausm import history_mask
from .session_ausm import (
    AusmInferenceSession,
    AusmVideoSegmentationOutput,
    FollowedObject,
    adopt_bystanders,
    make_room,
    without_trace,
)

PROMPT_LOGIT = 100.0  # logit of a pixel that the user says belongs to an object; above any that the network gives
PRESENCE_THRESHOLD = 0.5  # foreground from which on a marked object is in the frame
SURE_THRESHOLD = 0.9  # foreground from which on an object is believed to look like what its mask covers
RETURN_SLACK = 0.02  # by which one that was said not to be there may look less like itself than `likeness_offset`
BYSTANDER_THRESHOLD = 0.3  # foreground of what is kept off the objects that were marked


@dataclass
class Answer:
    """
    What the network says of one frame of one stream, a row for each followed object and then for each detection.

    Attributes:
        masks (`torch.FloatTensor` of shape `(rows, h, w)`): Logits.
        non_empty (`list[bool]`): Whether any pixel's logit is positive.
        foreground (`list[float]`): Probability that there is an object.
        classes (`torch.FloatTensor` of shape `(rows, num_labels)`): Probabilities of the labels, as if one of them
            were right; on the CPU.
        looks (`torch.FloatTensor` of shape `(objects, D)`, *optional*): What is under the masks of the followed
            objects, where these are judged by their looks.
        history (`AusmHistory`): The history after the frame, its objects still those before it.
    """

    masks: torch.Tensor
    non_empty: list[bool]
    foreground: list[float]
    classes: torch.Tensor
    looks: torch.Tensor | None
    history: AusmHistory


def _threshold(model, session: AusmInferenceSession, for_bystanders: bool = False) -> float:
    """The foreground probability from which on what nobody marked is followed."""
    threshold = session.foreground_threshold
    if threshold is None:
        threshold = model.config.foreground_threshold
    return min(threshold, BYSTANDER_THRESHOLD) if for_bystanders else threshold


def seen_objects(
    model, session: AusmInferenceSession, objects: list[FollowedObject], answer: Answer
) -> dict[int, torch.Tensor]:
    """
    Mask logits of the followed objects that are in the frame. One that was found and then away is back only where a
    detection draws it too, and nobody else: otherwise its id would go to what looks alike.
    """
    overlap = model.config.duplicate_overlap

    def is_likely(row: int, followed: FollowedObject) -> bool:
        if followed.dismissed and followed.looks is not None and answer.looks is not None:
            # The network alone was wrong.
            if followed.likeness(answer.looks[row]) < model.config.likeness_offset - RETURN_SLACK:
                return False
        least = PRESENCE_THRESHOLD if followed.prompted else _threshold(model, session, followed.is_bystander)
        return answer.foreground[row] >= least and answer.non_empty[row]

    likely = [row for row, x in enumerate(objects) if is_likely(row, x)]
    there = [row for row in likely if objects[row].prompted or not objects[row].absent_frames]
    if len(there) < len(likely):
        masks = {objects[row].object_id: answer.masks[row] > 0 for row in there}
        least = _threshold(model, session, for_bystanders=True)
        drawn = [row for row in range(len(objects), len(answer.masks)) if answer.foreground[row] > least]
        detections = [row for row in drawn if not _drawn_anew(answer, row, objects, masks, overlap)]
        same = overlapping(answer.masks[[*range(len(objects)), *detections]], overlap)[:, len(objects) :].any(1)
        there = [row for row in likely if row in there or same[row]]
    return {objects[row].object_id: answer.masks[row] for row in there}


def _drawn_anew(
    answer: Answer, row: int, objects: list[FollowedObject], there: dict[int, torch.Tensor], overlap: float
) -> list[FollowedObject]:
    """
    The objects of which a detection draws more than the part `overlap`, under the name that they have: it is they who
    are seen, perhaps with more of them than before.

    Args:
        row: The detection's.
        there: Bool masks (h, w) of the objects that are in the frame.
    """
    drawn, label_id = answer.masks[row] > 0, int(answer.classes[row].argmax())
    return [
        x
        for x in objects
        if x.object_id in there
        and x.class_votes is not None
        and int(x.class_votes.argmax()) == label_id
        and bool((drawn & there[x.object_id]).sum() > overlap * there[x.object_id].sum())
    ]


def finish_frame(
    model,
    session: AusmInferenceSession,
    frame: AusmFrameFeatures,
    objects: list[FollowedObject],
    seen: dict[int, torch.Tensor],
    prompts: dict[int, torch.Tensor],
    answer: Answer,
) -> AusmVideoSegmentationOutput:
    """
    Who is who after a frame; the session moves on by one.

    Args:
        objects: Those in the history that the network was given.
        seen: Mask logits of those of them that are in the frame.
        prompts: Masks of the objects prompted in this frame, at the video's size; empty ones of those that are not in
            it.
        answer: What the network says.
    """
    config = model.config
    find_new_objects = session.find_new_objects
    if find_new_objects is None:
        find_new_objects = not session.prompts
    size = answer.masks.shape[-2], answer.masks.shape[-1]
    labels = config.label_sets[session.label_set or config.default_label_set]
    for followed in objects:  # resumed with a network of other labels, names are voted on anew
        if followed.class_votes is not None and len(followed.class_votes) != len(labels):
            followed.class_votes = None
    if find_new_objects:
        seen = adopt_bystanders(session, objects, seen)

    marks = {object_id: history_mask(mask, size) for object_id, mask in prompts.items() if mask.any()}
    dismissed = prompts.keys() - marks.keys()
    seen = {object_id: logits for object_id, logits in seen.items() if object_id not in dismissed}
    mistaken = _mistaken(objects, seen, marks, config.duplicate_overlap)
    before = objects
    scores = _count_answers(model, session, before, seen, marks, dismissed, mistaken, answer)
    objects, logits = _join_prompts(model, session, before, seen, marks, scores)
    objects, logits, masks = _join_detections(
        model, session, objects, logits, marks, scores, answer, len(before), find_new_objects
    )

    followed_on = set(map(id, objects))  # a bystander that comes may have the number of one that has just gone
    history = without_trace(answer.history, [i for i, x in enumerate(before) if id(x) not in followed_on])
    history = history.forget_appearance(mistaken)
    _remember_looks(model, before, objects, seen, marks, answer)
    session.history = put_objects(history, objects, masks, size, frame.stride_4)
    session.objects = objects
    session.slots_held_until |= {x.slot: session.next_frame_idx for x in objects}
    session.find_new_objects = find_new_objects
    session.frame_size, session.video_frame = frame.size, None
    session.prompts.pop(session.next_frame_idx, None)
    # Who was marked is told of also while away, with an empty mask.
    away = [(row, x.object_id) for row, x in enumerate(before) if x.prompted and x.object_id not in logits]
    logits |= {object_id: -answer.masks[row].abs() for row, object_id in away}
    asked_for = [x for x in objects if x.object_id in logits and not x.is_bystander]
    theirs = [masks[x.object_id] for x in objects if x.object_id in logits and x.is_bystander]
    if theirs:
        of_bystanders = torch.stack(theirs).any(dim=0)
        logits |= {
            x.object_id: torch.where(of_bystanders, -logits[x.object_id].abs(), logits[x.object_id]) for x in asked_for
        }
    result = _describe(session, asked_for, logits, scores, prompts, labels)
    session.next_frame_idx += 1
    return result


def _count_answers(
    model,
    session: AusmInferenceSession,
    objects: list[FollowedObject],
    seen: dict[int, torch.Tensor],
    marks: dict[int, torch.Tensor],
    dismissed: set[int],
    mistaken: list[int],
    answer: Answer,
) -> dict[int, float]:
    """
    What the network's answer for each followed object counts for: its name, whether it is away, its score.

    Args:
        marks: Masks (h, w) of those that the user marks in this frame.
        dismissed: Those that the user says are not in it.
        mistaken: Rows of those that the answer is not of.
    """
    scores: dict[int, float] = {}
    for row, followed in enumerate(objects):
        is_answer = followed.object_id in seen and row not in mistaken
        if followed.object_id in marks or followed.object_id in dismissed:
            followed.prompted, followed.quality = True, 1.0
        if followed.object_id in marks:
            is_answer |= session.history is None  # the first frame is predicted from its prompts
        if row in mistaken:
            followed.class_votes = followed.looks = None
        if followed.object_id in dismissed and answer.looks is not None:
            followed.forget_looks(answer.looks[row], model.config.likeness_offset - RETURN_SLACK)
        if is_answer:
            followed.vote(answer.foreground[row], answer.classes[row])
        is_here = is_answer or followed.object_id in marks
        followed.absent_frames = 0 if is_here else followed.absent_frames + 1
        followed.dismissed = not is_here and (followed.dismissed or followed.object_id in dismissed)
        scores[followed.object_id] = 1.0 if is_here and not is_answer else answer.foreground[row] * followed.quality
    return scores


def _join_prompts(
    model,
    session: AusmInferenceSession,
    objects: list[FollowedObject],
    seen: dict[int, torch.Tensor],
    marks: dict[int, torch.Tensor],
    scores: dict[int, float],
) -> tuple[list[FollowedObject], dict[int, torch.Tensor]]:
    """
    Prompts are what the user says they are: they replace what the network thought of these objects, and the found
    objects that they are the same as.

    Returns:
        The objects that are followed on, and the mask logits (h, w) of those of them that are in the frame.
    """
    num_slots = model.config.num_id_vectors
    known = {x.object_id for x in objects}
    joining = [FollowedObject(object_id, slot=-1, prompted=True) for object_id in marks if object_id not in known]
    scores |= {x.object_id: 1.0 for x in joining}
    logits = seen | {object_id: (mask * 2 - 1) * PROMPT_LOGIT for object_id, mask in marks.items()}
    prompted = {x.object_id: x.prompted for x in [*objects, *joining]}
    twin_ids = twins(prompted, logits, model.config.duplicate_overlap)
    objects = [x for x in objects if x.object_id not in twin_ids and not x.is_past(model.config.max_age)]
    objects = make_room(objects, len(joining), num_slots, scores)
    for followed, slot in zip(joining, session.draw_slots(len(joining), num_slots, objects)):
        followed.slot = slot
    objects = [*objects, *joining]
    return objects, {x.object_id: logits[x.object_id] for x in objects if x.object_id in logits}


def _join_detections(
    model,
    session: AusmInferenceSession,
    objects: list[FollowedObject],
    logits: dict[int, torch.Tensor],
    marks: dict[int, torch.Tensor],
    scores: dict[int, float],
    answer: Answer,
    first_row: int,
    find_new_objects: bool,
) -> tuple[list[FollowedObject], dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """
    What is seen that is not followed yet becomes objects, or bystanders, as far as there is room.

    Returns:
        The objects, the mask logits (h, w) of those that are in the frame, and their masks `M_t`, in which each pixel
        belongs to one of them (but for marks, which may overlap).
    """
    num_slots = model.config.num_id_vectors
    objects, rows, grown = _detections(model, session, objects, logits, answer, first_row, find_new_objects)
    objects = make_room(objects, len(rows), num_slots, scores, only_absent=True)
    num_free = num_slots - len(objects)
    if len(rows) > num_free:
        rows = rows[:num_free]
        if find_new_objects:
            session.warn_once(
                "full buffer",
                f"All {num_slots} ID vectors are taken: of the objects found in frame {session.next_frame_idx} "
                "only the best can be followed. A higher foreground threshold finds fewer objects.",
            )
    owned = exclusive(torch.cat([*(x[None] for x in logits.values()), answer.masks[rows]]))
    kept = owned[len(logits) :].flatten(1).any(1).tolist()  # a detection that is left without a pixel is none
    masks = dict(zip(logits, owned)) | marks
    found = [(row, mask) for row, mask, keep in zip(rows, owned[len(logits) :], kept) if keep]
    objects, logits = list(objects), dict(logits)
    for (row, mask), slot in zip(found, session.draw_slots(len(found), num_slots, objects)):
        if row in grown:
            new = replace(grown[row], slot=slot, quality=answer.foreground[row], looks=None)
        else:
            object_id = session.new_object_id() if find_new_objects else min([0, *(x.object_id for x in objects)]) - 1
            new = FollowedObject(object_id, slot, prompted=False, quality=answer.foreground[row])
        new.vote(answer.foreground[row], answer.classes[row])
        objects.append(new)
        logits[new.object_id] = answer.masks[row]
        scores[new.object_id] = answer.foreground[row]
        masks[new.object_id] = mask
    return objects, logits, masks


def _mistaken(
    objects: list[FollowedObject], seen: dict[int, torch.Tensor], marks: dict[int, torch.Tensor], overlap: float
) -> list[int]:
    """
    Rows of the objects in place of which something else was followed, as their marks (h, w) say: name and looks are
    not theirs. Of one that was away nothing was taken for it, and what it is stays known.
    """

    def is_mistaken(object_id: int) -> bool:
        if object_id not in marks or object_id not in seen:
            return False
        both = torch.stack([seen[object_id], marks[object_id].to(seen[object_id]) - 0.5])
        return not overlapping(both, overlap)[0, 1]

    return [row for row, x in enumerate(objects) if is_mistaken(x.object_id)]


def _detections(
    model,
    session: AusmInferenceSession,
    objects: list[FollowedObject],
    logits: dict[int, torch.Tensor],
    answer: Answer,
    first_row: int,
    find_new_objects: bool,
) -> tuple[list[FollowedObject], list[int], dict[int, FollowedObject]]:
    """
    What is seen that is not followed yet: the queries after those of the followed objects.

    Args:
        objects: Those that are followed on.
        logits: Mask logits (h, w) of those of them that are in the frame; of those that begin anew they are taken out.
        first_row: That of the first detection.

    Returns:
        The objects but for those that begin anew; rows of detections; by row, the objects that begin anew with it. One
        that draws a found object with more of it, as a person after the head, is that object. They are the first rows,
        and then the surest.
    """
    overlap = model.config.duplicate_overlap
    least = _threshold(model, session, for_bystanders=not find_new_objects)
    rows = [
        row
        for row in range(first_row, len(answer.foreground))
        if answer.foreground[row] > least and answer.non_empty[row]
    ]
    rows.sort(key=lambda row: -answer.foreground[row])
    rows = without_duplicates(rows, answer.masks, list(logits.values()), overlap)
    grown: dict[int, FollowedObject] = {}
    for row in rows if find_new_objects else []:
        there = dict(zip(logits, exclusive(torch.cat([answer.masks[:0], *(x[None] for x in logits.values())]))))
        same = _drawn_anew(answer, row, objects, there, overlap)
        if len(same) == 1 and not same[0].prompted:
            grown[row] = same[0]
            answer.masks[row] = torch.maximum(answer.masks[row], logits.pop(same[0].object_id))
            objects = [x for x in objects if x is not same[0]]
    return objects, [*grown, *(row for row in rows if row not in grown)], grown


def _remember_looks(
    model,
    before: list[FollowedObject],
    objects: list[FollowedObject],
    seen: dict[int, torch.Tensor],
    marks: dict[int, torch.Tensor],
    answer: Answer,
):
    """What objects look like is said by their marks, and by what was surely them since."""
    looks: dict[int, torch.Tensor] = {}
    if answer.looks is not None:
        stayed = {id(x) for x in objects}
        for x, look, foreground in zip(before, answer.looks, answer.foreground):
            if x.object_id in seen and id(x) in stayed and foreground >= SURE_THRESHOLD:
                looks[x.object_id] = look
    if marks and model.config.likeness_scale:
        looks |= zip(marks, model.describe_objects(answer.history, torch.stack(list(marks.values()))[None])[0])
    for followed in objects:
        if not followed.is_bystander and followed.object_id in looks:
            followed.remember(looks[followed.object_id])


def put_objects(history, objects: list[FollowedObject], masks: dict[int, torch.Tensor], size, like: torch.Tensor):
    """The history with `A` = the objects' slots and `M` = their masks, zeros for those that have none."""
    stacked = torch.zeros(1, len(objects), *size, dtype=like.dtype, device=like.device)
    for i, followed in enumerate(objects):
        if followed.object_id in masks:
            stacked[0, i] = masks[followed.object_id]
    slots = torch.tensor([[followed.slot for followed in objects]], dtype=torch.int64, device=like.device)
    return history.replace_objects(slots, torch.ones_like(slots, dtype=torch.bool), stacked)


def _describe(session, seen, logits, scores, prompts, labels) -> AusmVideoSegmentationOutput:
    """The output for the objects seen in this frame."""
    if seen:
        pred_masks = torch.stack([logits[x.object_id] for x in seen])
        pred_masks = without_specks(pred_masks, [x.prompted for x in seen])[:, None]
    else:
        pred_masks = session.history.masks[0, :0, None].float()
    if prompts:
        pred_masks = F.interpolate(pred_masks, session.video_size, mode="bilinear")
        by_area = sorted(prompts, key=lambda object_id: int(prompts[object_id].sum()))
        for i, followed in enumerate(seen):
            if followed.object_id in prompts:
                # Of marks that share pixels the smaller one is on top, as what a person holds.
                logit = PROMPT_LOGIT + len(prompts) - 1 - by_area.index(followed.object_id)
                pred_masks[i, 0] = torch.where(prompts[followed.object_id], logit, -PROMPT_LOGIT)
    label_ids, object_scores = [], []
    for followed in seen:
        label_id, score = -1, scores[followed.object_id]
        if followed.class_votes is not None:
            votes = followed.class_votes
            class_probability, index = (votes / votes.sum()).max(0)
            label_id, score = int(index), score * float(class_probability)
        label_ids.append(label_id)
        object_scores.append(score)
    return AusmVideoSegmentationOutput(
        object_ids=[x.object_id for x in seen],
        pred_masks=pred_masks,
        scores=torch.tensor(object_scores, dtype=torch.float32, device=pred_masks.device),
        labels=[labels[label_id] if label_id >= 0 else None for label_id in label_ids],
        label_ids=label_ids,
        prompted=[x.prompted for x in seen],
        frame_idx=session.next_frame_idx,
    )
