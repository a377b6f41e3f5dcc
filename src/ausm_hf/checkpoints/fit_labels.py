"""
Fits the classification head of COCO's labels to photographs, and leaves all else in a checkpoint as it is:

    python -m ausm_hf.checkpoints.fit_labels CHECKPOINT --root data/nano

The head is a logistic regression from what the frozen network says of each labelled object (`class_features`), marked
and found, and of what is found beside them, which is "no object": none of the labels. ROOT is what
`python -m ausm_hf.data.prepare` wrote; photographs that are kept out of training are not used. A checkpoint without
`mask_pooling` gets it: what its heads have learned of the queries' states they keep. COCO's labels become its default
ones.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ausm_hf import AusmConfig, AusmForUniversalSegmentation, AusmProcessor
from ausm_hf.data.clips import load_frames, load_masks
from ausm_hf.data.labels import COCO_LABELS
from ausm_hf.data.stills import stills
from ausm_hf.files import WholeFolder

# Sets of photographs, and in how many views each photograph is shown.
SETS = {"coco_mini": 6, "coco_mval": 6, "street": 2, "pennfudan": 1, "people": 1, "cats": 1, "fashion": 1}
FOUND = 0.5  # least IoU of a detection with the object whose label it learns
EXHAUSTIVE = ("coco_mini",)  # where every object of COCO's kinds has its label
BESIDE = 0.1  # most of a detection's pixels that are objects', where it learns that it is none
DOUBTFUL = 0.2  # least foreground probability of such a detection
PENALTY = 3e-3  # of the squares of the weights, for features of variance 1


def views(frame: np.ndarray, masks: np.ndarray, number: int, rng: np.random.Generator) -> Iterator[tuple]:
    """A photograph (H, W, 3) and its masks (n, H, W): as it is, then random parts of it, every other one mirrored."""
    height, width = frame.shape[:2]
    for view in range(number):
        side = 1.0 if view < 2 else rng.uniform(0.5, 1.0)
        h, w = round(side * height), round(side * width)
        top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
        step = -1 if view % 2 else 1
        part = frame[top : top + h, left : left + w][:, ::step]
        yield np.ascontiguousarray(part), np.ascontiguousarray(masks[:, top : top + h, left : left + w][:, :, ::step])


@torch.inference_mode()
def class_features(
    model, processor, frame: np.ndarray, masks: np.ndarray, known: np.ndarray
) -> Iterator[tuple[int, Tensor]]:
    """
    Of each object its number and its class features: marked, and where a detection finds it. Then those of detections
    beside what is `known` (H, W) to be an object, with -1 for a number.
    """
    features = model.encode_frames(processor(images=frame)["pixel_values"])
    size = (features.stride_4.shape[-2], features.stride_4.shape[-1])
    small = F.interpolate(torch.from_numpy(masks)[None].float(), size, mode="area")[0] > 0.5
    seen = [i for i, mask in enumerate(small) if mask.any()][: model.config.num_id_vectors]
    if not seen:
        return
    small = small[seen]
    slots = torch.arange(len(seen))[None]
    history = model.init_history(1).replace_objects(
        slots, torch.ones_like(slots, dtype=torch.bool), small[None].float()
    )
    marked = model.model.step(features, history).class_features[0]
    yield from zip(seen, marked)
    output = model.model.step(features)
    found = output.masks_queries_logits[0] > 0
    shared = torch.einsum("qhw,nhw->qn", found.float(), small.float())
    iou = shared / (found.sum((1, 2))[:, None] + small.sum((1, 2)) - shared).clamp(min=1)
    for i, number in enumerate(seen):
        if iou[:, i].max() >= FOUND:
            yield number, output.class_features[0, iou[:, i].argmax()]
    doubtful = model.foreground_head(output.query_hidden_states)[0, :, 0].sigmoid() >= DOUBTFUL
    beside = F.interpolate(torch.from_numpy(known)[None, None].float(), size, mode="area")[0, 0] == 0
    covered = 1 - (found & beside).sum((1, 2)) / found.sum((1, 2)).clamp(min=1)
    for query in (doubtful & found.any(2).any(1) & (covered <= BESIDE)).nonzero()[:, 0]:
        yield -1, output.class_features[0, query]


def labelled_features(model, processor, root: Path) -> tuple[Tensor, Tensor]:
    """
    Class features (n, size) of all objects with a label of COCO, and their labels' numbers (n,); 80, "no object", for
    what is found beside them in exhaustively labelled sets.
    """
    features, labels = [], []
    for name, number in SETS.items():
        rng = np.random.default_rng(0)
        for row in tqdm(stills(str(root / "stills" / name), "train"), name):
            numbers = {x["id"]: COCO_LABELS.index(x["label"]) for x in row["objects"] if x["label"] is not None}
            frame = load_frames(row, [0])[0]
            masks, ignored = load_masks(row, 0, *frame.shape[:2])
            ids = [i for i in masks if i in numbers]
            if not ids:
                continue
            known = np.any([ignored, *masks.values()], axis=0)
            whole = np.stack([known, *(masks[i] for i in ids)])
            for picture, parts in views(frame, whole, number, rng):
                known, parts = parts[0], parts[1:]
                parts[parts.sum((1, 2)) < whole[1:].sum((1, 2)) / 2] = False
                for i, row_of_features in class_features(model, processor, picture, parts, known):
                    if i >= 0 or name in EXHAUSTIVE:
                        features.append(row_of_features.clone())
                        labels.append(numbers[ids[i]] if i >= 0 else len(COCO_LABELS))
    return torch.stack(features), torch.tensor(labels)


def fit(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (81, size) and bias (81,) of the regression, "no object" the last."""
    mean, deviation = features.mean(0), features.std(0) + 1e-5
    inputs = (features - mean) / deviation
    weight = torch.zeros(len(COCO_LABELS) + 1, features.shape[1], requires_grad=True)
    bias = torch.zeros(len(COCO_LABELS) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(inputs @ weight.T + bias, labels) + PENALTY * weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    weight, bias = weight.detach() / deviation, bias.detach()
    return weight, bias - weight @ mean


def load(checkpoint: Path) -> tuple[AusmForUniversalSegmentation, dict[str, Tensor]]:
    """The network, with `mask_pooling`, and its weights as they are stored."""
    config = AusmConfig.from_pretrained(checkpoint)
    if config.label_sets.get("coco") != COCO_LABELS:
        raise ValueError(f"{checkpoint} has no label set 'coco' with COCO's 80 labels.")
    weights = load_file(checkpoint / "model.safetensors")
    if not config.mask_pooling:
        config.mask_pooling = True
        for name in config.label_sets:
            weight = weights[f"class_heads.{name}.weight"]
            weights[f"class_heads.{name}.weight"] = F.pad(weight, (0, 3 * weight.shape[1]))
    config.default_label_set = "coco"
    model = AusmForUniversalSegmentation(config)
    model.load_state_dict(weights)
    return model.eval(), weights


def fit_labels(checkpoint: Path, root: Path, folder: Path) -> Path:
    """
    Writes the checkpoint with its head for COCO's labels fitted to `folder`, whole or not at all; what is there is
    replaced.

    Args:
        checkpoint (`Path`): As `ausm_hf.checkpoints.make` writes it, with a label set "coco".
        root (`Path`): What `ausm_hf.data.prepare` wrote.
        folder (`Path`): Where to write it; may be `checkpoint`.

    Raises:
        ValueError: If the checkpoint has no label set "coco" with COCO's labels, or there are no photographs.
    """
    model, weights = load(checkpoint)
    features, labels = labelled_features(model, AusmProcessor.from_pretrained(checkpoint), root)
    weight, bias = fit(features, labels)
    weights["class_heads.coco.weight"][:] = weight
    weights["class_heads.coco.bias"][:] = bias
    with WholeFolder(folder) as whole:
        partial = whole.partial
        shutil.copytree(checkpoint, partial, dirs_exist_ok=True)
        config = model.config.to_dict()
        content = json.loads((partial / "config.json").read_bytes())
        content |= {name: config[name] for name in ("mask_pooling", "default_label_set", "id2label", "label2id")}
        (partial / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "model.safetensors").chmod(0o644)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    parser.add_argument("--root", type=Path, required=True, help="what ausm_hf.data.prepare wrote")
    parser.add_argument("--folder", type=Path, help="where to write it (default: in place of the checkpoint)")
    args = parser.parse_args()
    print(fit_labels(args.checkpoint, args.root, args.folder or args.checkpoint))
