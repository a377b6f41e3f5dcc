"""Two more ways to run the network over a training clip than its own `forward` (all frames at once).

`CarriedForm` runs a long clip in pieces and passes the state from piece to piece. `IterativeForm` runs it frame by
frame on the network's own predictions: the baseline that the paper compares its parallel form with.

Letters: B batch, T frames, N objects (padded), h, w size of the predicted masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ausm_hf.model.history_ausm import AusmHistory
from ausm_hf.model.loss_ausm import Instances, TeacherForcing, pad_instances, plan_teacher_forcing
from ausm_hf.model.masks_ausm import exclusive
from ausm_hf.model.modeling_ausm import AusmForUniversalSegmentation


def plan_clip(network: AusmForUniversalSegmentation, inputs: dict[str, Any]) -> tuple[Instances, TeacherForcing]:
    """Ground truth and teacher forcing of whole clips, from what `AusmForUniversalSegmentation.forward` takes."""
    instances = pad_instances(
        inputs["pixel_values_videos"],
        inputs["mask_labels"],
        inputs["class_labels"],
        inputs.get("history_masks"),
        inputs["annotated_frames"],
        inputs["ignore_masks"],
        inputs.get("prompt_masks"),
    )
    plan = plan_teacher_forcing(
        instances,
        network.config.num_id_vectors,
        switch_frames=inputs["switch_frames"],
        id_slots=inputs["id_slots"],
        detect=inputs["detect"],
        exhaustive=inputs["exhaustive"],
    )
    return instances, plan


def split_clip(
    network: AusmForUniversalSegmentation, inputs: dict[str, Any], num_pieces: int
) -> Iterator[dict[str, Any]]:
    """Yields what `CarriedForm` takes, but for the history, for each of `num_pieces` pieces of equal length.

    The plan is made for the whole clip and then cut. So the first frame of a piece gets the masks of the frame before
    it, and an object that was handed over in one piece is tracked in the next.

    Raises:
        ValueError: if the clips can't be cut so.
    """
    total = inputs["pixel_values_videos"].shape[1]
    if total % num_pieces:
        raise ValueError(f"pixel_values_videos: got {total} frames, want a multiple of {num_pieces} (carried_state)")
    instances, plan = plan_clip(network, inputs)
    length = total // num_pieces
    for start in range(0, num_pieces * length, length):
        frames = slice(start, start + length)
        yield {
            "pixel_values_videos": inputs["pixel_values_videos"][:, frames],
            "instances": _cut_instances(instances, frames),
            "plan": _cut_plan(plan, frames),
            "class_sets": inputs["class_sets"],
            "num_instances": inputs.get("num_instances"),
        }


class CarriedForm(nn.Module):
    """The parallel form over one piece of a clip, starting from the state that the piece before left."""

    def __init__(self, network: AusmForUniversalSegmentation):
        super().__init__()
        self.network = network

    def forward(
        self,
        pixel_values_videos: Tensor,
        instances: Instances,
        plan: TeacherForcing,
        class_sets: list[str | None],
        history: AusmHistory | None,
        num_instances: Tensor | None = None,
    ) -> dict[str, Any]:
        """
        Args:
            pixel_values_videos: (B, T, 3, H, W).
            history: features and states after the piece before; None for the first one.
            num_instances: see `AusmLoss`.

        Returns:
            "loss", "loss_dict", "masks_queries_logits" (B, T, N + N_det, h, w) and "history", not detached.
        """
        output = self.network.model(
            pixel_values_videos,
            history_masks=plan.history_masks.to(self.network.dtype),
            id_slots=plan.id_slots,
            taken=plan.taken,
            history=history,
            output_intermediate=True,
        )
        predictions = self.network.layer_predictions(output)
        loss, loss_dict = self.network.criterion(predictions, instances, plan, class_sets, num_instances=num_instances)
        return {
            "loss": loss,
            "loss_dict": loss_dict,
            "masks_queries_logits": output.masks_queries_logits,
            "history": output.history,
        }


class IterativeForm(nn.Module):
    """
    Frame by frame, with the network's own masks as history and gradients through them.

    An object enters the history with its true mask in the frame in which it is handed over (or as its prompt); from
    then on its mask is what the network predicts, unbinarised, so that gradients pass.
    """

    def __init__(self, network: AusmForUniversalSegmentation):
        super().__init__()
        self.network = network

    def forward(self, **inputs) -> dict[str, Any]:
        """Takes what `AusmForUniversalSegmentation.forward` takes for training, and everything of it.

        Returns:
            "loss", "loss_dict" and "masks_queries_logits" (B, T, N + N_det, h, w).
        """
        instances, plan = plan_clip(self.network, inputs)
        predictions = self.unroll(inputs["pixel_values_videos"], plan)
        loss, loss_dict = self.network.criterion(
            predictions, instances, plan, inputs["class_sets"], num_instances=inputs.get("num_instances")
        )
        return {"loss": loss, "loss_dict": loss_dict, "masks_queries_logits": predictions[-1]["masks"]}

    def unroll(self, frames: Tensor, plan: TeacherForcing, output_intermediate: bool = True) -> list[dict[str, Any]]:
        """What `layer_predictions` of the network gives of clips (B, T, 3, H, W), all frames joined.

        Without `output_intermediate` it is that of the last layer alone.
        """
        network = self.network
        history = network.init_history(frames.shape[0])
        own_masks = plan.history_masks[:, 0].to(network.dtype)
        steps = []
        for t in range(frames.shape[1]):
            masks = plan.history_masks[:, t].to(network.dtype)
            if t > 1:
                # The mask of frame t - 1 is its own once it has been tracked there; that of the first was marked.
                masks = torch.where((plan.taken[:, t - 1] & plan.taken[:, t])[..., None, None], own_masks, masks)
            output = network.model(
                frames[:, t : t + 1],
                history_masks=masks.unsqueeze(1),
                id_slots=plan.id_slots,
                taken=plan.taken[:, t : t + 1],
                history=history,
                output_intermediate=output_intermediate,
            )
            predictions = network.layer_predictions(output)
            steps.append(predictions)
            history = output.history
            own_masks = self.own_masks(predictions[-1], plan.taken[:, t])
        return [_join_frames(layer) for layer in zip(*steps)]

    def own_masks(self, prediction: dict[str, Any], tracked: Tensor) -> Tensor:
        """(B, N, h, w) in [0, 1], of what is tracked, bool (B, N); an object that isn't seen leaves no mask."""
        return prediction["masks"][:, 0, : tracked.shape[1]].sigmoid() * self.seen(prediction, tracked)

    def seen(self, prediction: dict[str, Any], tracked: Tensor) -> Tensor:
        """Which objects of the frame are in it, bool (B, N, 1, 1)."""
        probabilities = prediction["foreground"][:, 0, : tracked.shape[1]].sigmoid()
        return (probabilities > self.network.config.foreground_threshold)[..., None, None]


class RollOut(IterativeForm):
    """The network left alone with a clip, without gradient, as at inference: where its own errors lead it."""

    @torch.no_grad()
    def forward(self, **inputs) -> dict[str, Any]:
        """Takes what [`IterativeForm`] takes.

        Returns:
            "masks_queries_logits" (B, T, N + N_det, h, w) and "foreground_queries_logits" (B, T, N + N_det).
        """
        _, plan = plan_clip(self.network, inputs)
        prediction = self.unroll(inputs["pixel_values_videos"], plan, output_intermediate=False)[-1]
        return {
            "masks_queries_logits": prediction["masks"],
            "foreground_queries_logits": prediction["foreground"],
        }

    def own_masks(self, prediction: dict[str, Any], tracked: Tensor) -> Tensor:
        """Binary masks that do not overlap."""
        logits = prediction["masks"][:, 0, : tracked.shape[1]]
        rivals = logits.masked_fill(~(self.seen(prediction, tracked) & tracked[..., None, None]), -torch.inf)
        return exclusive(rivals).to(logits.dtype)


def _join_frames(predictions: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One prediction of T frames from T predictions of one."""
    first = predictions[0]
    return {
        **{name: torch.cat([p[name] for p in predictions], dim=1) for name in first if name != "classes"},
        "classes": {name: torch.cat([p["classes"][name] for p in predictions], dim=1) for name in first["classes"]},
    }


def _cut_instances(instances: Instances, frames: slice) -> Instances:
    return replace(
        instances,
        masks=instances.masks[:, :, frames],
        small_masks=instances.small_masks[:, :, frames],
        history_masks=instances.history_masks[:, :, frames],
        present=instances.present[:, :, frames],
        annotated=instances.annotated[:, frames],
        pixel_weights=instances.pixel_weights[:, frames],
    )


def _cut_plan(plan: TeacherForcing, frames: slice) -> TeacherForcing:
    return replace(
        plan,
        taken=plan.taken[:, frames],
        history_masks=plan.history_masks[:, frames],
        tracked=plan.tracked[:, frames],
        detected=plan.detected[:, frames],
        searched=plan.searched[:, frames],
    )
