"""Training clips to a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class ClipCollator:
    """Normalise clips and put them into a batch, padded at the bottom and right to the largest (padding is ignored).

    Args:
        image_mean: Mean of the channels of an image in [0, 1].
        image_std: Standard deviation likewise. The defaults are those of EfficientNet-Lite: (x - 127) / 128.
    """

    def __init__(self, image_mean=(127 / 255,) * 3, image_std=(128 / 255,) * 3):
        self.mean = 255 * torch.tensor(image_mean)[:, None, None]
        self.std = 255 * torch.tensor(image_std)[:, None, None]

    def __call__(self, clips: list[dict]) -> dict:
        """Collate.

        Returns:
            `"pixel_values_videos"` `(B, T, 3, H, W)` float32, `"mask_labels"` list of `(N_b, T, H, W)` bool,
            `"class_labels"` list of `(N_b,)` int64, `"class_sets"`, `"exhaustive"`, `"detect"` lists,
            `"annotated_frames"` `(B, T)` bool, `"ignore_masks"` `(B, T, H, W)` bool. Frames that pad a shorter clip
            aren't annotated.

        Raises:
            ValueError: `clips` is empty.
        """
        if not clips:
            raise ValueError("clips is empty, wanted at least one")
        steps, height, width = (max(clip["pixel_values"].shape[d] for clip in clips) for d in (0, 2, 3))

        def pad(x, value, time_dim):
            short = [width - x.shape[-1], height - x.shape[-2]]
            widths = [0, short[0], 0, short[1]] + [0, 0] * (x.dim() - 3 - time_dim) + [0, steps - x.shape[time_dim]]
            return F.pad(x, widths, value=value) if any(widths) else x

        frames = torch.zeros(len(clips), steps, 3, height, width)
        for place, clip in zip(frames, clips):
            t, _, h, w = clip["pixel_values"].shape
            place[:t, :, :h, :w].copy_(clip["pixel_values"]).sub_(self.mean).div_(self.std)
        return {
            "pixel_values_videos": frames,
            "mask_labels": [pad(clip["masks"], False, 1) for clip in clips],
            "class_labels": [clip["class_labels"] for clip in clips],
            "class_sets": [clip["label_set"] for clip in clips],
            "exhaustive": [clip["exhaustive"] for clip in clips],
            "detect": [not clip["first_frame_given"] for clip in clips],
            "annotated_frames": torch.stack(
                [F.pad(clip["annotated_frames"], (0, steps - len(clip["annotated_frames"]))) for clip in clips]
            ),
            "ignore_masks": torch.stack([pad(clip["ignore_mask"], True, 0) for clip in clips]),
        }
