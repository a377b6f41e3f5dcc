"""Does an object that takes over the slot of another see that one's past?

    python benchmarks/slot_reuse.py --root DAVIS [--split dev] [--model ID_OR_PATH] [--output slot_reuse.json]

The object of each DAVIS 2016 sequence is followed for some frames and removed. At once a second object is prompted, a
patch of the frame away from it, and followed on. It holds

- **the same slot** that the first one has just given back: what must not happen;
- **another slot**: what the session chooses, one that nobody has held or that was given back longest ago;
- **another slot, no past**: and nobody was followed before: what to compare with.

If the old id bled into the new object, its mask would reach to where the first object is. Printed are the share of
the first object that it covers, and its IoU with what it is without a past, means over the frames.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ausm_hf.data.clips import load_frames, load_masks
from ausm_hf.data.davis import davis
from ausm_hf.files import WholeOrNothing
from ausm_hf.segment import load_model

BEFORE, AFTER = 10, 5  # frames
FIRST, SECOND = 3, 2  # slots
WAYS = ("same slot", "another slot", "another slot, no past")


def patch_away(first: np.ndarray) -> np.ndarray:
    """A quarter of the frame's height and width, the one in a grid of sixteen that is farthest from the object."""
    height, width = first.shape[0] // 4, first.shape[1] // 4
    middle = np.argwhere(first).mean(0)
    row, column = max(np.ndindex(4, 4), key=lambda i: np.hypot(*((np.array(i) + 0.5) * (height, width) - middle)))
    patch = np.zeros_like(first)
    patch[row * height : (row + 1) * height, column * width : (column + 1) * width] = True
    return patch & ~first


def hold(session, slot: int) -> None:
    """The next object that is marked gets this slot, bystanders get others."""

    def draw_slots(number: int, num_slots: int, objects: list) -> list[int]:
        held = {x.slot for x in objects}
        free = [i for i in range(num_slots) if i not in held | {FIRST, SECOND}]
        return (free if slot in held else [slot, *free])[:number]

    session.draw_slots = draw_slots


def second_masks(model, processor, frames: list, first: np.ndarray, patch: np.ndarray, way: str) -> list[np.ndarray]:
    """The second object's mask in the frames after its prompt."""
    session = processor.init_video_session(seed=0, find_new_objects=False)
    add = processor.add_inputs_to_inference_session
    masks = []
    for t, frame in enumerate(frames):
        if t == 0 and way != "another slot, no past":
            hold(session, FIRST)
            add(session, None, 1, input_masks=first, original_size=first.shape)
        if t == BEFORE:
            if session.obj_ids:
                session.remove_object(1)
            hold(session, FIRST if way == "same slot" else SECOND)
            add(session, None, 2, input_masks=patch, original_size=first.shape)
        output = model(inference_session=session, frame=processor(images=frame)["pixel_values"])
        if t > BEFORE:
            (result,) = processor.post_process_instance_segmentation(output, target_sizes=[first.shape])
            masks.append((result["segmentation"] == 2).cpu().numpy())
    return masks


def iou(a: np.ndarray, b: np.ndarray) -> float:
    union = (a | b).sum()
    return (a & b).sum() / union if union else 1.0


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="DAVIS 2016 in its official layout")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--model", help="checkpoint (default: the ausm-nano of the package)")
    parser.add_argument("--output", type=Path, default=Path("slot_reuse.json"))
    args = parser.parse_args(arguments)
    model, processor = load_model(args.model)

    sequences = {}
    for row in tqdm(davis(args.root, year=2016, split=args.split), "sequences"):
        frames = load_frames(row, list(range(BEFORE + 1 + AFTER)))
        size = frames[0].shape[:2]
        true = [load_masks(row, t, *size)[0][1] for t in range(len(frames))]
        patch = patch_away(true[BEFORE])
        masks = {way: second_masks(model, processor, frames, true[0], patch, way) for way in WAYS}
        sequences[row["video_id"]] = {
            way: {
                "share of the first": np.mean(
                    [(m & t).sum() / t.sum() for m, t in zip(masks[way], true[BEFORE + 1 :])]
                ),
                "IoU": np.mean([iou(a, b) for a, b in zip(masks[way], masks[WAYS[-1]])]),
            }
            for way in WAYS
        }
    print("| | share of the first object covered | IoU with no past |\n| --- | --- | --- |")
    for way in WAYS:
        means = [np.mean([of[way][key] for of in sequences.values()]) for key in ("share of the first", "IoU")]
        print(f"| {way} | " + " | ".join(f"{100 * mean:.1f}" for mean in means) + " |")
    with WholeOrNothing(args.output) as file:
        file.partial.write_text(
            json.dumps({"model": args.model or "ausm-nano", "sequences": sequences}, indent=2) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
