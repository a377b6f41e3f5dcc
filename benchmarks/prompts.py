"""How good is a box, and how good are 1, 3 and 5 clicks, beside the object's true mask?

    python benchmarks/prompts.py --root DAVIS [--split dev] [--model ID_OR_PATH] [--frames N] [--seed N]
        [--output prompts.json]

ROOT is DAVIS 2016 in its official layout. The object is prompted in the first frame and followed through the sequence:

- **mask**: the true mask of the first frame;
- **box**: its bounding box, from which the network makes a mask;
- **box, filled**: the same box, filled, taken for the mask as it is: what there is without that pass of the network;
- **N clicks**: the first in the middle of the object (the pixel farthest from its edge), each further one in the
  middle of the largest region in which the mask made of the clicks so far is wrong: positive where it is missing,
  negative where it is too much.

J of the first frame says what the network makes of the prompt, J of the others (without the last, as DAVIS counts)
what following gives. The seed draws the ID vectors, which moves J a little. Prints a table and writes all
numbers to a JSON file.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from tqdm import tqdm

from ausm_hf.data.clips import load_frames, load_masks
from ausm_hf.data.davis import davis
from ausm_hf.evaluation.metrics.jf import region_similarity
from ausm_hf.files import WholeOrNothing
from ausm_hf.model.prompts_ausm import fill_box
from ausm_hf.segment import load_model

CLICKS = (1, 3, 5)
WAYS = ("mask", "box", "box, filled", *(f"{n} click{'s' * (n > 1)}" for n in CLICKS))


def next_click(mask: np.ndarray, true: np.ndarray) -> tuple[list[float], int] | None:
    """Where a user would click next, (x, y) and label; None if nothing is wrong."""
    best = None
    for label, wrong in ((1, true & ~mask), (0, mask & ~true)):
        regions, number = ndimage.label(wrong)
        if not number:
            continue
        areas = np.bincount(regions.flat)[1:]
        if best is None or areas.max() > best[0]:
            best = (areas.max(), label, regions == 1 + areas.argmax())
    if best is None:
        return None
    _, label, region = best
    depth = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return [x + 0.5, y + 0.5], label


def first_prompts(model, processor, frame: np.ndarray, true: np.ndarray, seed: int) -> dict[str, dict]:
    """The prompt of each way, as arguments of `add_inputs_to_inference_session`."""
    y, x = true.nonzero()
    box = [float(x.min()), float(y.min()), float(x.max() + 1), float(y.max() + 1)]
    prompts = {
        "mask": {"input_masks": true},
        "box": {"input_boxes": box},
        "box, filled": {"input_masks": fill_box(true.shape, box)},
    }
    pixel_values = processor(images=frame)["pixel_values"]
    points, labels, mask = [], [], np.zeros_like(true)
    for number in range(1, max(CLICKS) + 1):
        if click := next_click(mask, true):
            points, labels = [*points, click[0]], [*labels, click[1]]
        clicks = {"input_points": points, "input_labels": labels}
        session = processor.init_video_session(seed=seed)
        processor.add_inputs_to_inference_session(session, 0, 1, original_size=true.shape, **clicks)
        mask = model.preview_prompts(session, pixel_values)[1].cpu().numpy()
        if number in CLICKS:
            prompts[f"{number} click{'s' * (number > 1)}"] = clicks
    return prompts


def follow(model, processor, frames: list[np.ndarray], prompt: dict, seed: int) -> list[np.ndarray]:
    """The object's mask in each frame."""
    size = frames[0].shape[:2]
    session = processor.init_video_session(seed=seed)
    processor.add_inputs_to_inference_session(session, 0, 1, original_size=size, **prompt)
    masks = []
    for frame in frames:
        output = model(inference_session=session, frame=processor(images=frame)["pixel_values"])
        (result,) = processor.post_process_instance_segmentation(output, target_sizes=[size])
        masks.append((result["segmentation"] == 1).cpu().numpy())
    return masks


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="DAVIS 2016 in its official layout")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--model", help="checkpoint (default: the ausm-nano of the package)")
    parser.add_argument("--frames", type=int, help="only the first frames of each sequence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("prompts.json"))
    args = parser.parse_args(arguments)
    model, processor = load_model(args.model, device=args.device)

    sequences: dict[str, dict[str, dict[str, float]]] = {}
    for row in davis(args.root, year=2016, split=args.split):
        frames = load_frames(row, list(range(len(row["annotated"])))[: args.frames])
        size = frames[0].shape[:2]
        true = [load_masks(row, t, *size)[0].get(1, np.zeros(size, bool)) for t in range(len(frames))]
        scores = sequences[row["video_id"]] = {}
        with torch.no_grad():
            prompts = first_prompts(model, processor, frames[0], true[0], args.seed)
        for way in tqdm(WAYS, row["video_id"]):
            masks = follow(model, processor, frames, prompts[way], args.seed)
            j = [region_similarity(mask, t) for mask, t in zip(masks, true)]
            scores[way] = {"first": j[0], "followed": float(np.mean(j[1:-1])) if len(j) > 2 else None}

    def mean(way: str, key: str) -> float | None:
        values = [scores[way][key] for scores in sequences.values()]
        return None if None in values else float(np.mean(values))

    means = {way: {key: mean(way, key) for key in ("first", "followed")} for way in WAYS}
    print("| first frame | J there | J of the others |\n| --- | --- | --- |")
    for way, scores in means.items():
        print(f"| {way} | " + " | ".join("" if j is None else f"{100 * j:.1f}" for j in scores.values()) + " |")
    content = {
        "model": args.model or "ausm-nano",
        "split": args.split,
        "frames": args.frames,
        "seed": args.seed,
        "mean": means,
        "sequences": sequences,
    }
    with WholeOrNothing(args.output) as file:
        file.partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
