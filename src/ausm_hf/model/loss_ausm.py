"""
Teacher forcing and the losses (section "parallel training" of the paper).

Frames are counted from 1 to T in formulas, as in the paper, and from 0 in tensors. `s` of an instance is the frame at
which it passes from detection to tracking: in frame t it is a target of detection if `t <= s`, a target of tracking
if `t > s`, and it is in the history `M_t` if `t >= s`.

Letters: B batch, T frames, N instances (padded), Q = N + N_det queries, h, w size of the predicted masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from .configuration_ausm import AusmConfig
from .history_ausm import binarize
from .maps_ausm import average_maps

MASK_STRIDE = 4


@dataclass
class Instances:
    """
    Ground truth of a batch of clips, padded to the same number of instances.

    Attributes:
        masks (`torch.Tensor` of shape `(B, N, T, H, W)`): True masks.
        small_masks (`torch.Tensor` of shape `(B, N, T, h, w)`): The same, averaged over cells of 4 x 4 pixels.
        history_masks (`torch.Tensor` of shape `(B, N, T, h, w)`): Binary masks that may enter the history.
        prompt_masks (`torch.Tensor` of shape `(B, N, h, w)`): The same before the first frame, `M_0`.
        valid (`torch.BoolTensor` of shape `(B, N)`): False where an instance is padding.
        present (`torch.BoolTensor` of shape `(B, N, T)`): Whether the instance has a pixel in the frame.
        class_labels (`torch.LongTensor` of shape `(B, N)`): -100 where no class is known.
        annotated (`torch.BoolTensor` of shape `(B, T)`): Frames with annotation.
        pixel_weights (`torch.Tensor` of shape `(B, T, h, w)`): Share of annotated pixels in each cell.
    """

    masks: Tensor
    small_masks: Tensor
    history_masks: Tensor
    prompt_masks: Tensor
    valid: Tensor
    present: Tensor
    class_labels: Tensor
    annotated: Tensor
    pixel_weights: Tensor


def _shrink(masks: Tensor) -> Tensor:
    return F.avg_pool2d(masks.flatten(0, -3).float().unsqueeze(1), MASK_STRIDE).view(
        *masks.shape[:-2], masks.shape[-2] // MASK_STRIDE, masks.shape[-1] // MASK_STRIDE
    )


def _pad(tensors: list[Tensor], value: float = 0) -> Tensor:
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def _pad_masks(masks: list[Tensor], device: torch.device) -> Tensor:
    """Of integers what is not 0 belongs to the object, be it 1, an id or 255."""
    masks = [(m if m.is_floating_point() else m.ne(0)).to(device) for m in masks]
    if any(m.is_floating_point() for m in masks):
        masks = [m.float() for m in masks]  # padded, all are of the first one's type
    return _pad(masks)


def pad_instances(
    frames: Tensor,
    mask_labels: list[Tensor],
    class_labels: list[Tensor] | None,
    history_masks: list[Tensor] | None,
    annotated_frames: Tensor | None,
    ignore_masks: Tensor | None,
    prompt_masks: list[Tensor] | None = None,
) -> Instances:
    """
    Checks and pads what [`AusmForUniversalSegmentation.forward`] takes as ground truth.

    Raises:
        ValueError: If a shape does not fit to `frames` (B, T, 3, H, W).
    """
    batch, length, _, height, width = frames.shape
    device = frames.device
    if class_labels is None:
        class_labels = [torch.full((len(masks),), -100) for masks in mask_labels]
    class_labels = [torch.as_tensor(classes, dtype=torch.int64) for classes in class_labels]
    for name, values in (
        ("mask_labels", mask_labels),
        ("class_labels", class_labels),
        ("history_masks", mask_labels if history_masks is None else history_masks),
        ("prompt_masks", mask_labels if prompt_masks is None else prompt_masks),
    ):
        if len(values) != batch:
            raise ValueError(f"`{name}` needs one entry per clip: {batch}, got {len(values)}.")
    for index, (masks, classes) in enumerate(zip(mask_labels, class_labels)):
        if masks.ndim != 4 or tuple(masks.shape[1:]) != (length, height, width):
            raise ValueError(
                f"`mask_labels[{index}]` must have shape (N, {length}, {height}, {width}), got {tuple(masks.shape)}."
            )
        if tuple(classes.shape) != (len(masks),):
            raise ValueError(f"`class_labels[{index}]` must have shape ({len(masks)},), got {tuple(classes.shape)}.")
        if history_masks is not None and history_masks[index].shape != masks.shape:
            raise ValueError(
                f"`history_masks[{index}]` must be shaped as `mask_labels[{index}]`, {tuple(masks.shape)}, got "
                f"{tuple(history_masks[index].shape)}."
            )
        if prompt_masks is not None and prompt_masks[index].shape != masks[:, 0].shape:
            raise ValueError(
                f"`prompt_masks[{index}]` must have shape {tuple(masks[:, 0].shape)}, got "
                f"{tuple(prompt_masks[index].shape)}."
            )
    if annotated_frames is None:
        annotated_frames = torch.ones(batch, length, dtype=torch.bool)
    if tuple(annotated_frames.shape) != (batch, length):
        raise ValueError(
            f"`annotated_frames` must have shape ({batch}, {length}), got {tuple(annotated_frames.shape)}."
        )
    if ignore_masks is None:
        ignore_masks = torch.zeros(batch, length, height, width, dtype=torch.bool)
    if tuple(ignore_masks.shape) != (batch, length, height, width):
        raise ValueError(
            f"`ignore_masks` must have shape ({batch}, {length}, {height}, {width}), got {tuple(ignore_masks.shape)}."
        )
    masks = _pad_masks(mask_labels, device)
    small_masks = _shrink(masks)
    history = small_masks if history_masks is None else _shrink(_pad_masks(history_masks, device))
    history = binarize(history)
    prompts = history[:, :, 0]
    if prompt_masks is not None:
        prompts = binarize(_shrink(_pad_masks(prompt_masks, device)))
    counts = torch.tensor([len(m) for m in mask_labels], device=device)
    return Instances(
        masks=masks,
        small_masks=small_masks,
        history_masks=history,
        prompt_masks=prompts,
        valid=torch.arange(masks.shape[1], device=device) < counts[:, None],
        present=small_masks.flatten(3).amax(dim=-1) > 0,
        class_labels=_pad([c.to(device) for c in class_labels], -100),
        annotated=annotated_frames.to(device),
        pixel_weights=1.0 - _shrink(ignore_masks.to(device)),
    )


@dataclass
class TeacherForcing:
    """
    Who is detected, who is tracked and what the history shows, for every frame of a batch of clips.

    Attributes:
        id_slots (`torch.LongTensor` of shape `(B, N)`): The ID vector of each instance.
        taken (`torch.BoolTensor` of shape `(B, T, N)`): `t > s`: the instance is tracked in the frame.
        history_masks (`torch.Tensor` of shape `(B, T, N, h, w)`): `M_{t-1}`.
        tracked (`torch.BoolTensor` of shape `(B, T, N)`): `taken`, in annotated frames.
        detected (`torch.BoolTensor` of shape `(B, T, N)`): Instances that a detection query should find.
        searched (`torch.BoolTensor` of shape `(B, T)`): Frames in which detection is trained.
        exhaustive (`torch.BoolTensor` of shape `(B,)`): Clips in which whatever is not annotated is background.
    """

    id_slots: Tensor
    taken: Tensor
    history_masks: Tensor
    tracked: Tensor
    detected: Tensor
    searched: Tensor
    exhaustive: Tensor


def draw_switch_frames(
    present: Tensor, detect: Tensor, generator: torch.Generator | None = None, prompt_probability: float = 0.5
) -> Tensor:
    """
    Draws `s` for each instance.

    An instance that is visible in the first frame is a prompt (`s = 0`) with `prompt_probability`; otherwise `s` is
    uniform over 1 .. T and then moved on to the next frame that shows the instance, because nothing can be handed
    over while it is hidden (T, that is never, if no such frame follows). Where detection is not trained every
    instance is given as soon as it appears. The paper draws a frame and says no more.

    Args:
        present (`torch.BoolTensor` of shape `(B, N, T)`): Whether the instance is in the frame.
        detect (`torch.BoolTensor` of shape `(B,)`): Whether detection is trained on the clip.

    Returns:
        `torch.LongTensor` of shape `(B, N)`, on the CPU.
    """
    present, detect = present.cpu(), detect.cpu()
    batch, count, length = present.shape
    device = generator.device if generator is not None else "cpu"
    drawn = torch.randint(1, length + 1, (batch, count), generator=generator, device=device).cpu()
    prompted = torch.rand(batch, count, generator=generator, device=device).cpu() < prompt_probability
    frames = torch.arange(1, length + 1)
    # The next frame from `drawn` on that shows the instance
    candidates = torch.where(present & (frames >= drawn[..., None]), frames, length)
    switch = candidates.amin(dim=-1)
    first = torch.where(present, frames, length).amin(dim=-1)
    given = torch.where(present[..., 0], 0, first)
    switch = torch.where(prompted & present[..., 0], 0, switch)
    return torch.where(detect[:, None], switch, given)


def plan_teacher_forcing(
    instances: Instances,
    num_id_vectors: int,
    switch_frames: list[Tensor] | None = None,
    id_slots: list[Tensor] | None = None,
    detect: list[bool] | None = None,
    exhaustive: list[bool] | None = None,
    generator: torch.Generator | None = None,
) -> TeacherForcing:
    """
    The plan of a batch; draws what is not given.

    Raises:
        ValueError: If a clip has more instances than there are ID vectors, or something given does not fit.
    """
    batch, count, length = instances.present.shape
    device = instances.present.device
    counts = instances.valid.sum(dim=1).tolist()
    if max(counts, default=0) > num_id_vectors:
        raise ValueError(f"A clip has {max(counts)} instances, but there are only {num_id_vectors} ID vectors.")
    for name, flags in (("detect", detect), ("exhaustive", exhaustive)):
        if flags is not None and len(flags) != batch:
            raise ValueError(f"`{name}` needs one entry per clip: {batch}, got {len(flags)}.")
    for name, given, highest in (("switch_frames", switch_frames, length), ("id_slots", id_slots, num_id_vectors - 1)):
        if given is None:
            continue
        if [len(values) for values in given] != counts:
            raise ValueError(f"`{name}` needs {counts} entries per clip, got {[len(values) for values in given]}.")
        for values in given:
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) <= highest:
                raise ValueError(f"`{name}` must lie in 0 .. {highest}, got {values.tolist()}.")
            if name == "id_slots" and len(set(values.tolist())) < len(values):
                raise ValueError(f"`id_slots` of one clip must differ, got {values.tolist()}.")
    is_searched = torch.tensor([True] * batch if detect is None else list(detect), device=device)
    is_exhaustive = torch.tensor([True] * batch if exhaustive is None else list(exhaustive), device=device)

    if switch_frames is None:
        switch = draw_switch_frames(instances.present, is_searched, generator).to(device)
    else:
        switch = _pad([s.to(device) for s in switch_frames], 0)
    if id_slots is None:
        order = torch.rand(
            batch, num_id_vectors, generator=generator, device=generator.device if generator is not None else "cpu"
        )
        slots = order.argsort(dim=1)[:, :count].to(device)
    else:
        slots = _pad([s.to(device) for s in id_slots], 0)

    frames = torch.arange(length, device=device)
    taken = (switch[:, None] <= frames[:, None]) & instances.valid[:, None]
    present = instances.present.transpose(1, 2)
    annotated = instances.annotated[..., None]
    # What frame t may know is M_{t-1}; in the first frame that is the prompt, drawn on the first frame itself.
    previous = torch.cat([instances.prompt_masks[:, None], instances.history_masks.transpose(1, 2)[:, :-1]], dim=1)
    searched = is_searched[:, None] & instances.annotated
    return TeacherForcing(
        id_slots=slots,
        taken=taken,
        history_masks=previous * taken[..., None, None],
        tracked=taken & annotated,
        detected=~taken & present & instances.valid[:, None] & searched[..., None],
        searched=searched,
        exhaustive=is_exhaustive,
    )


def count_targets(
    mask_labels: list[Tensor], switch_frames: list[Tensor], detect: list[bool], annotated_frames: Tensor
) -> int:
    """
    How many masks the losses of a batch are the sum of: visible instances, frame by frame, that are tracked or to be
    detected. Arguments as [`AusmForUniversalSegmentation.forward`] takes them.

    Summed over all passes of an optimizer step and divided by their number it is the `num_instances` with which many
    small passes give the gradient of a single large one.
    """
    total = 0
    for masks, switch, detected, annotated in zip(mask_labels, switch_frames, detect, annotated_frames):
        seen = masks.flatten(2).any(dim=-1) & annotated.to(masks.device)
        frames = torch.arange(seen.shape[1], device=seen.device)
        taken = switch.to(seen.device)[:, None] <= frames
        total += int((seen if detected else seen & taken).sum())
    return total


def match_detections(cost: Tensor, detected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Hungarian matching of detection queries with the instances to be detected, in every frame alone.

    Args:
        cost (`torch.Tensor` of shape `(B, T, N_det, N)`): Cost of each pair.
        detected (`torch.BoolTensor` of shape `(B, T, N)`): Which instances take part.

    Returns:
        Index tensors (clip, frame, detection query, instance) of the matched pairs.
    """
    # Of a pass that was not finite any match will do: its loss isn't finite either, and the step is left out.
    costs = np.nan_to_num(cost.detach().float().cpu().numpy(), nan=1e6, posinf=1e6, neginf=-1e6)
    wanted = detected.cpu().numpy()
    pairs = []
    for clip, frame in zip(*np.nonzero(wanted.any(axis=-1))):
        columns = np.flatnonzero(wanted[clip, frame])
        rows, chosen = linear_sum_assignment(costs[clip, frame][:, columns])
        pairs += [(clip, frame, row, columns[column]) for row, column in zip(rows, chosen)]
    indices = torch.as_tensor(np.array(pairs, dtype=np.int64).reshape(-1, 4), device=cost.device)
    clips, frames, queries, objects = indices.unbind(dim=1)
    return clips, frames, queries, objects


def selection_loss(logits: Tensor, instances: Instances, plan: TeacherForcing) -> Tensor:
    """
    CenterNet's focal loss of the map that detection queries are selected from, summed over objects.

    The target is the cell in the middle of each object that is to be detected, the one with most of the object around
    it; cells near it count less. Where not every object is annotated, only cells of objects count.

    Args:
        logits (`torch.Tensor` of shape `(B, T, h, w)`): As the network gives them.
    """
    size = logits.shape[-2], logits.shape[-1]
    # With one more object that isn't there, so that there always is one.
    masks = F.pad(instances.small_masks.transpose(1, 2).flatten(0, 1), (0, 0, 0, 0, 0, 1))
    wanted = F.pad(plan.detected, (0, 1))[..., None, None]
    cover = average_maps(masks, size)
    around = torch.stack([side * F.avg_pool2d(cover, side, 1, side // 2) for side in (1, 3, 5, 9, 15)]).sum(0)
    middles = around.masked_fill(cover <= 0, -1).flatten(2).argmax(-1).unflatten(0, logits.shape[:2])
    cover = cover.unflatten(0, logits.shape[:2])
    rows, columns = (torch.arange(length, device=logits.device) for length in size)
    squares = (rows - (middles // size[1])[..., None]).square()[..., :, None]
    squares = squares + (columns - (middles % size[1])[..., None]).square()[..., None, :]
    spread = (cover.sum((-2, -1), keepdim=True).sqrt() / 6).clamp(min=0.5)
    near = torch.where(wanted, (-squares / (2 * spread.square())).exp(), 0.0).amax(dim=2)
    positive = (near == 1).float()
    known = average_maps(instances.pixel_weights, size) > 0.5
    everywhere = (plan.searched & plan.exhaustive[:, None])[..., None, None]
    counted = (everywhere & known) | ((cover > 0.5) & wanted).any(dim=2)
    probability = logits.sigmoid()
    found = -F.logsigmoid(logits) * (1 - probability).square() * positive
    false = -F.logsigmoid(-logits) * probability.square() * (1 - near) ** 4 * counted * (1 - positive)
    return found.sum() + false.sum()


def reach_loss(ellipses: Tensor, masks: Tensor) -> Tensor:
    """
    How far ellipses are from those through the corners of the boxes of masks: the distance of their middles in true
    radii, and of the logarithms of their radii, summed over objects and both axes.

    Args:
        ellipses (`torch.Tensor` of shape `(M, 4)`): Middle (x, y) and radii, as parts of the picture.
        masks (`torch.Tensor` of shape `(M, h, w)`): None of them empty.
    """
    middles, radii = [], []
    for axis, length in ((1, masks.shape[2]), (2, masks.shape[1])):
        along = (masks > 0).any(dim=axis).float()
        first, last = along.argmax(1), length - along.flip(1).argmax(1)
        middles.append((first + last) / (2 * length))
        radii.append((last - first) / (2**0.5 * length))
    middle, radius = torch.stack(middles, dim=1), torch.stack(radii, dim=1)
    shift = (ellipses[:, :2] - middle) / radius
    return (shift.abs() + (ellipses[:, 2:].log() - radius.log()).abs()).sum()


def detection_quality(logits: Tensor, instances: Instances, plan: TeacherForcing) -> tuple[Tensor, Tensor, Tensor]:
    """
    What detections are worth, which can be told to be worth nothing, and which nobody can judge.

    Args:
        logits (`torch.Tensor` of shape `(B, T, N_det, h, w)`): Mask logits; they get no gradient.

    Returns:
        `torch.Tensor` of shape `(B, T, N_det)`: the largest IoU of each mask with an object that is to be detected.
        `torch.BoolTensor` of the same shape: whether three quarters of the mask lie in what is annotated. Such a query
        draws an object, a part or a copy of one, though not every object of the clip may be annotated.
        `torch.BoolTensor` of the same shape: whether more than half of the mask lies in pixels of which nothing is
        known, a crowd for instance. Such a query may well draw an object.
    """
    drawn = logits.detach() > 0
    masks = (drawn & (instances.pixel_weights > 0.5).unsqueeze(2)).float()
    objects = (instances.small_masks > 0.5).float()
    area = masks.sum((-2, -1))
    shared = torch.einsum("btqhw,bnthw->btqn", masks, objects)
    together = area.unsqueeze(-1) + objects.sum((-2, -1)).transpose(1, 2).unsqueeze(2) - shared
    iou = (shared / together.clamp(min=1)).clamp(max=1) * plan.detected.unsqueeze(2)  # rounding may exceed 1
    iou = F.pad(iou, (0, 1)).amax(-1)  # 0 where there is no object at all
    covered = torch.einsum("btqhw,bthw->btq", masks, objects.sum(1).clamp(max=1))
    inside = (covered > 0) & (covered >= 0.75 * area)
    return iou, inside, area < 0.5 * drawn.sum((-2, -1))


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Reads maps (M, h, w) at points (M, P, 2), x and y in [0, 1], bilinearly. Returns (M, P)."""
    return F.grid_sample(maps.unsqueeze(1), 2.0 * points.unsqueeze(1) - 1.0, align_corners=False)[:, 0, 0]


def _in_float32(prediction: dict) -> dict:
    return {name: _in_float32(x) if isinstance(x, dict) else x.float() for name, x in prediction.items()}


class AusmLoss(nn.Module):
    """
    Tracking loss (who is who is known) plus detection loss (Hungarian matching), after every layer of the pixel
    decoder. Terms: binary cross-entropy and dice of masks, foreground, and class where one is known.

    An instance that is tracked but not in the frame has foreground target 0 and an empty mask, by binary
    cross-entropy alone. The foreground of a detection says how good its mask is: its target is the IoU of the mask
    with the object that it draws best, matched or not, since copies are told by their masks. What is not matched and
    lies mostly in ignored pixels is not judged. Every term is divided by the number of instances seen, averaged over
    processes (or as the caller says, who knows what else belongs to the optimizer step).
    """

    def __init__(self, config: AusmConfig):
        super().__init__()
        self.config = config

    def forward(
        self,
        predictions: list[dict],
        instances: Instances,
        plan: TeacherForcing,
        label_sets: list[str | None],
        generator: torch.Generator | None = None,
        num_instances: Tensor | float | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            predictions: For each layer `masks` (B, T, Q, h, w), `foreground` (B, T, Q) and `classes`, a dict of label
                set to (B, T, Q, labels + 1); with selected queries `ellipses` (B, T, N_det, 4), and `selection`
                (B, T, ., .) for the first.
            label_sets: The label set of each clip.
            num_instances: What the sums are divided by. By default the number of instances seen in the batch, averaged
                over processes; see [`count_targets`] for passes that share an optimizer step.

        Returns:
            The weighted sum, and its weighted terms by name; not finite if a prediction isn't.
        """
        # In float32: sums over pixels outgrow float16, and bfloat16 rounds them by up to 1 in 256.
        with torch.autocast(predictions[-1]["masks"].device.type, enabled=False):
            return self._loss(predictions, instances, plan, label_sets, generator, num_instances)

    def _loss(self, predictions, instances, plan, label_sets, generator, num_instances):
        self._check_labels(predictions[-1]["classes"], instances, label_sets)
        if num_instances is None:
            present = instances.present.transpose(1, 2)
            num_instances = ((plan.tracked & present).sum() + plan.detected.sum()).float()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(num_instances)
                num_instances = num_instances / torch.distributed.get_world_size()
            num_instances = num_instances.clamp(min=1)

        terms: dict[str, Tensor] = {}
        for prediction in predictions:
            prediction = _in_float32(prediction)
            matched = self._match(prediction, instances, plan, label_sets, generator)
            layer = self._mask_losses(prediction["masks"], instances, plan, matched, generator)
            layer |= self._label_losses(prediction, instances, plan, matched, label_sets)
            if "selection" in prediction:
                layer["selection"] = selection_loss(prediction["selection"], instances, plan)
            if "ellipses" in prediction:
                clips, frames, queries, objects = matched
                drawn = instances.small_masks[clips, objects, frames]
                layer["reach"] = reach_loss(prediction["ellipses"][clips, frames, queries], drawn)
            for name, value in layer.items():
                terms[name] = terms.get(name, 0.0) + getattr(self.config, f"{name}_weight") * value / num_instances
        return torch.stack(list(terms.values())).sum(), {name: value.detach() for name, value in terms.items()}

    def _check_labels(self, classes: dict[str, Tensor], instances: Instances, label_sets: list[str | None]):
        for clip, name in enumerate(label_sets):
            labels = instances.class_labels[clip]
            highest = classes[name].shape[-1] - 2 if name is not None else -100
            wrong = labels[(labels != -100) & ((labels < 0) | (labels > highest))]
            if len(wrong):
                raise ValueError(
                    f"`class_labels[{clip}]` has label {int(wrong[0])}, which label set {name!r} does not have."
                )

    def _match(self, prediction, instances, plan, label_sets, generator):
        config = self.config
        count = instances.valid.shape[1]
        logits = prediction["masks"][:, :, count:].detach()
        targets = instances.small_masks.transpose(1, 2)
        weights = instances.pixel_weights
        if config.train_num_points is None:
            logits, targets, weights = logits.flatten(3), targets.flatten(3), weights.flatten(2)
        else:
            batch, length = weights.shape[:2]
            points = torch.rand(
                batch * length,
                config.train_num_points,
                2,
                generator=generator,
                device=generator.device if generator is not None else logits.device,
            ).to(logits.device)

            def read(maps: Tensor) -> Tensor:
                sampled = F.grid_sample(maps.flatten(0, 1), 2 * points.unsqueeze(1) - 1, align_corners=False)
                return sampled.squeeze(2).unflatten(0, (batch, length))

            logits, targets = read(logits), read(instances.masks.transpose(1, 2).float())
            weights = read(weights.unsqueeze(2)).squeeze(2)
        # For logits x and targets y the binary cross-entropy is softplus(x) - x y: one product for all pairs.
        weights = weights.unsqueeze(2)
        num_pixels = weights.sum(-1, keepdim=True).clamp(min=1)
        weighted_targets = (targets * weights).transpose(-1, -2)
        probabilities = logits.sigmoid()
        bce = ((F.softplus(logits) * weights).sum(-1, keepdim=True) - logits @ weighted_targets) / num_pixels
        size = (probabilities * weights).sum(-1, keepdim=True) + weighted_targets.sum(-2, keepdim=True)
        dice = 1 - (2 * probabilities @ weighted_targets + 1) / (size + 1)
        cost = config.mask_weight * bce + config.dice_weight * dice
        cost = cost - config.foreground_weight * prediction["foreground"][:, :, count:, None].detach().sigmoid()
        for clip, name in enumerate(label_sets):
            if name is None:
                continue
            labels = instances.class_labels[clip]
            classes = prediction["classes"][name][clip, :, count:].detach().softmax(-1)
            known = (labels >= 0).to(classes.dtype)
            cost[clip] -= config.class_weight * classes[..., labels.clamp(min=0)] * known
        return match_detections(cost, plan.detected)

    def _mask_losses(self, masks, instances, plan, matched, generator):
        count = instances.valid.shape[1]
        clips, frames, objects = plan.tracked.nonzero(as_tuple=True)
        detected_clips, detected_frames, queries, detected_objects = matched
        present = torch.cat(
            [instances.present[clips, objects, frames], torch.ones_like(detected_clips, dtype=torch.bool)]
        ).float()
        logits = torch.cat([masks[clips, frames, objects], masks[detected_clips, detected_frames, queries + count]])
        clips = torch.cat([clips, detected_clips])
        frames = torch.cat([frames, detected_frames])
        objects = torch.cat([objects, detected_objects])
        if len(clips) == 0:
            return {"mask": 0.0 * masks.sum(), "dice": 0.0 * masks.sum()}
        weights = instances.pixel_weights[clips, frames]
        if self.config.train_num_points is None:
            targets = instances.small_masks[clips, objects, frames].flatten(1)
            logits, weights = logits.flatten(1), weights.flatten(1)
        else:
            targets = instances.masks[clips, objects, frames].float()
            points = self._hard_points(logits.detach(), targets, self.config.train_num_points, generator)
            targets = sample_points(targets, points)
            logits, weights = sample_points(logits, points), sample_points(weights, points)
        bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * weights
        bce = bce.sum(-1) / weights.sum(-1).clamp(min=1)
        probabilities = logits.sigmoid() * weights
        targets = targets * weights
        dice = 1 - (2 * (probabilities * targets).sum(-1) + 1) / (probabilities.sum(-1) + targets.sum(-1) + 1)
        return {"mask": bce.sum(), "dice": (dice * present).sum()}

    def _hard_points(self, logits: Tensor, targets: Tensor, wanted: int, generator: torch.Generator | None) -> Tensor:
        """
        Mask2Former's points: most where the mask is least certain, or most wrong, the rest anywhere; (M, P, 2) in
        [0, 1].
        """
        config = self.config
        device = generator.device if generator is not None else logits.device
        hard = int(config.importance_sample_ratio * wanted)
        shape = (len(logits), int(config.oversample_ratio * wanted), 2)
        candidates = torch.rand(shape, generator=generator, device=device).to(logits.device)
        hardness = -sample_points(logits, candidates)
        if config.importance_sampling == "wrong":
            hardness = hardness * (2 * sample_points(targets, candidates) - 1)
        else:
            hardness = -hardness.abs()
        chosen = hardness.topk(hard, dim=1).indices.unsqueeze(-1).expand(-1, -1, 2)
        anywhere = torch.rand(len(logits), wanted - hard, 2, generator=generator, device=device).to(logits.device)
        return torch.cat([candidates.gather(1, chosen), anywhere], dim=1)

    def _label_losses(self, prediction, instances, plan, matched, label_sets):
        """Foreground and class. Both are one target and one weight per query; a weight of 0 leaves a query out."""
        config = self.config
        foreground = prediction["foreground"]
        count = instances.valid.shape[1]
        present = instances.present.transpose(1, 2)
        clips, frames, queries, objects = matched
        quality, inside, unknown = detection_quality(prediction["masks"][:, :, count:], instances, plan)
        targets = torch.cat([(plan.tracked & present).to(quality.dtype), quality], dim=-1)
        judged = (plan.exhaustive[:, None, None] | inside) & plan.searched.unsqueeze(-1) & ~unknown
        weights = torch.cat([plan.tracked.to(quality.dtype), judged * config.no_object_weight], dim=-1)
        weights[clips, frames, queries + count] = 1.0
        # Less the targets' own entropy, so that it can vanish.
        entropy = torch.special.entr(targets) + torch.special.entr(1 - targets)
        divergence = F.binary_cross_entropy_with_logits(foreground, targets, reduction="none") - entropy
        losses = {"foreground": (weights * divergence).sum()}

        # A known class for whom there is one, "no object" for who draws none.
        labels = instances.class_labels.unsqueeze(1).expand(-1, foreground.shape[1], -1)
        class_targets = torch.full_like(foreground, -100, dtype=torch.long)
        class_targets[:, :, :count] = torch.where(plan.tracked & present, labels, -100)
        class_targets[:, :, count:] = torch.where(judged & (quality < 0.5), -1, -100)
        class_targets[clips, frames, queries + count] = labels[clips, frames, objects]
        total = foreground.new_zeros(())
        for name, logits in prediction["classes"].items():
            no_object = logits.shape[-1] - 1
            own = torch.tensor([label_set == name for label_set in label_sets], device=logits.device)
            target = torch.where(own[:, None, None], class_targets, -100)
            target = torch.where(target == -1, no_object, target)
            class_weights = torch.ones(no_object + 1, device=logits.device)
            class_weights[no_object] = config.no_object_weight
            total = total + F.cross_entropy(
                logits.flatten(0, 2), target.flatten(), class_weights, reduction="sum", ignore_index=-100
            )
        losses["class"] = total
        return losses
