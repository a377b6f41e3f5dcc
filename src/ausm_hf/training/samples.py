"""A look at the network while it trains: masks that it follows through clips training doesn't use, on a sheet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ausm_hf.files import WholeOrNothing
from ausm_hf.model.image_processing_ausm import AusmImageProcessor
from ausm_hf.model.modeling_ausm import AusmForUniversalSegmentation
from ausm_hf.model.prompts_ausm import ObjectPrompt
from ausm_hf.model.session_ausm import AusmInferenceSession
from ausm_hf.visualization import contact_sheet, draw_overlay

FIRST_CLIP = 2**30  # no training gets so far


class SampleWriter:
    """The default `evaluate` of `train`.

    Follows the objects of the first frame through a few clips, frame by frame as at inference, and writes
    `samples/step-00001000.jpg`: for each clip the truth above the prediction. The clips come from the training data
    (with numbers that training never reaches), so their score says how training goes, not how good the network is.
    """

    def __init__(self, dataset: Dataset, collator: Callable[[list[dict]], dict], num_clips: int = 4):
        self.dataset, self.collator, self.num_clips = dataset, collator, num_clips

    def __call__(self, model: AusmForUniversalSegmentation, step: int, output_dir: Path) -> dict[str, float]:
        """Writes the sheet; returns "sample_iou", the mean IoU of the followed objects after the first frame."""
        rows, scores = [], []
        for number in range(FIRST_CLIP, FIRST_CLIP + self.num_clips):
            clip = self.dataset[number]
            frames = self.collator([clip])["pixel_values_videos"].to(model.device)
            truth = clip["masks"].bool()
            truth = truth[truth[:, 0].flatten(1).any(1)]
            predicted = follow(model, frames, truth[:, 0])
            judged = clip["annotated_frames"].clone()
            judged[0] = False  # the prompts
            scores.append(iou(predicted[:, judged], truth[:, judged]))
            images = clip["pixel_values"].permute(0, 2, 3, 1).numpy()
            for masks in (truth, predicted):
                rows += [draw_overlay(image, _ids(masks[:, t])) for t, image in enumerate(images)]
        path = Path(output_dir) / "samples" / f"step-{step:08d}.jpg"
        with WholeOrNothing(path) as file:
            contact_sheet(rows, columns=len(images)).save(file.partial, quality=90)
        every = torch.cat(scores)
        return {"sample_iou": every.mean().item()} if len(every) else {}


def follow(model: AusmForUniversalSegmentation, frames: Tensor, prompts: Tensor) -> Tensor:
    """Follows prompted objects through a clip, as at inference.

    Args:
        frames: (1, T, 3, H, W), normalised.
        prompts: (N, H, W) bool, masks in the first frame.

    Returns:
        (N, T, H, W) bool, on the CPU.
    """
    size = prompts.shape[-2], prompts.shape[-1]
    ids = list(range(1, len(prompts) + 1))
    session = AusmInferenceSession(find_new_objects=False, seed=0)
    if ids:
        session.add_prompts(0, ids, [ObjectPrompt(mask=prompt.cpu()) for prompt in prompts], size)
    predicted = torch.zeros(len(ids), frames.shape[1], *size, dtype=torch.bool)
    for t, frame in enumerate(frames[0]):
        output = model(inference_session=session, frame=frame)
        (result,) = AusmImageProcessor().post_process_instance_segmentation(output, target_sizes=[size])
        for n, object_id in enumerate(ids):
            predicted[n, t] = result["segmentation"] == object_id
    return predicted


def iou(predicted: Tensor, truth: Tensor) -> Tensor:
    """IoU of (N, T, H, W) bool masks in every frame where one of the two is not empty: (K,)."""
    intersection = (predicted & truth).flatten(2).sum(2)
    union = (predicted | truth).flatten(2).sum(2)
    return (intersection / union)[union > 0]


def _ids(masks: Tensor) -> np.ndarray:
    """(N, H, W) bool masks as one (H, W) image of object ids; the last one lies on top."""
    ids = np.zeros(masks.shape[1:], dtype=np.uint8)
    for number, mask in enumerate(masks.numpy(), start=1):
        ids[mask] = number
    return ids
