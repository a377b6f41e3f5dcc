"""A network and clips that cost nothing, with the shapes of the real ones."""

import torch
import torch.nn.functional as F
import yaml
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ausm_hf.training import recipe_from_dict, train
from ausm_hf.training.recipe import _set_dotted


class TinyConfig(PreTrainedConfig):
    model_type = "tiny_fake"
    num_id_vectors = 8
    dropout: float = 0.1


class TinyModel(PreTrainedModel):
    """Paints ID vectors like the real one, and predicts one mask for all objects with a 1 x 1 convolution."""

    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.norm = nn.LayerNorm(8)
        self.id_vectors = nn.Embedding(config.num_id_vectors, 8)
        self.queries = nn.Parameter(torch.randn(4, 8))
        self.flagged = nn.Linear(8, 8, bias=False)
        self.flagged.weight._no_weight_decay = True
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Conv2d(8, 1, 1)
        self.post_init()

    def forward(
        self,
        pixel_values_videos,
        mask_labels,
        switch_frames,
        id_slots,
        history_masks=None,
        class_labels=None,
        class_sets=None,
        exhaustive=None,
        detect=None,
        annotated_frames=None,
        ignore_masks=None,
        num_instances=None,
    ):
        self.seen = {"mask_labels": mask_labels, "history_masks": history_masks, "switch_frames": switch_frames}
        losses = []
        for i, frames in enumerate(pixel_values_videos):
            self.backbone[1].eval()
            features = self.backbone(frames)
            past = (history_masks or mask_labels)[i].float()
            marks = torch.einsum("nthw,nd->tdhw", past, self.id_vectors(id_slots[i]))
            features = features + torch.cat([marks[:1], marks[:-1]]) + self.queries.mean(0)[:, None, None]
            features = self.flagged(self.norm(features.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
            logits = self.head(self.dropout(features))[:, 0]
            losses.append(F.binary_cross_entropy_with_logits(logits, mask_labels[i].amax(0).float()))
        loss = torch.stack(losses).mean()
        return {"loss": loss, "loss_dict": {"mask": loss}}


class TinyClips(torch.utils.data.Dataset):
    """Clip i is a function of i: one to three squares that move, each of them away in some of the frames."""

    num_frames = 3

    def __init__(self, size=32):
        self.size = size

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        frames = torch.randint(0, 256, (self.num_frames, 3, self.size, self.size), generator=generator).to(torch.uint8)
        masks = torch.zeros(1 + index % 3, self.num_frames, self.size, self.size, dtype=torch.uint8)
        for n in range(len(masks)):
            top, left = torch.randint(0, 16, (2,), generator=generator).tolist()
            for t in range(self.num_frames):
                masks[n, t, top + t : top + t + 10, left : left + 10] = (index + n + t) % 4 != 3
        return {"pixel_values": frames, "masks": masks}


def collate(clips):
    frames = torch.stack([clip["pixel_values"] for clip in clips]).float() / 255
    return {
        "pixel_values_videos": frames,
        "mask_labels": [clip["masks"] for clip in clips],
        "class_labels": [torch.full((len(clip["masks"]),), -100) for clip in clips],
        "class_sets": [None] * len(clips),
        "exhaustive": [True] * len(clips),
        "detect": [True] * len(clips),
        "annotated_frames": torch.ones(frames.shape[:2], dtype=torch.bool),
        "ignore_masks": torch.zeros(*frames.shape[:2], *frames.shape[-2:], dtype=torch.bool),
    }


def make_recipe(output_dir, *overrides):
    values = {
        "output_dir": str(output_dir),
        "model": {"preset": "nano"},
        "data": {"num_frames": 3, "size": [32, 32], "batch_size": 2},
        "optim": {"lr": 0.01, "max_steps": 12, "warmup_steps": 2},
        "save_every": 4,
        "log_every": 1,
        "seed": 7,
    }
    for override in overrides:
        key, _, text = override.partition("=")
        _set_dotted(values, key, yaml.safe_load(text))
    return recipe_from_dict(values)


def run(output_dir, *overrides, dropout=0.1, **kwargs):
    torch.manual_seed(0)
    model = TinyModel(TinyConfig(dropout=dropout))
    return train(make_recipe(output_dir, *overrides), model=model, dataset=TinyClips(), collator=collate, **kwargs)
