"""Several objects of a photograph, one click each: does the click on one tell where the others end?

    python benchmarks/clicks.py --root ROOT [--model ID_OR_PATH] [--output DIR]

ROOT is what `python -m ausm_hf.data.prepare` wrote. In the photographs that are kept out of training, each object of
more than 3% of the picture is clicked in its middle (the pixel farthest from its edge), where there are two to five of
them: each by itself, and all together, where a point on one object is not on another.

Writes `clicks.json` and prints J of the masks that the clicks give.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from prompts import next_click
from tqdm import tqdm

from ausm_hf.data.clips import load_frames, load_masks
from ausm_hf.data.stills import stills
from ausm_hf.evaluation.metrics.jf import region_similarity
from ausm_hf.files import write_text
from ausm_hf.segment import load_model

SETS = ("cats", "coco_mval", "coco_mini", "street", "pennfudan")


def clicked(frame: np.ndarray, masks: dict[int, np.ndarray], model, processor) -> dict[int, np.ndarray]:
    """The mask that each object gets by a click in its middle, all of them made together."""
    session = processor.init_video_session(seed=0)
    for object_id, mask in masks.items():
        point, _ = next_click(np.zeros_like(mask), mask)
        processor.add_inputs_to_inference_session(
            session, obj_ids=object_id, input_points=[[[point]]], original_size=mask.shape
        )
    given = model.preview_prompts(session, processor(images=frame)["pixel_values"].to(model.device))
    return {object_id: mask.cpu().numpy() for object_id, mask in given.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="what ausm_hf.data.prepare wrote, with stills/")
    parser.add_argument("--model", help="checkpoint (default: the ausm-nano of the package)")
    parser.add_argument("--output", type=Path, default=Path("clicks"))
    args = parser.parse_args(arguments)

    model, processor = load_model(args.model)
    content: dict = {"model": args.model or "ausm-nano", "sets": {}}
    print("| set | objects | J, each by itself | J, together |\n| --- | --- | --- | --- |")
    for name in SETS:
        rows = stills(str(args.root / "stills" / name), "held_out")
        scores = []
        for row in tqdm(rows, name, leave=False):
            frame = load_frames(row, [0])[0]
            masks, _ = load_masks(row, 0, *frame.shape[:2])
            masks = {i: mask for i, mask in masks.items() if mask.mean() > 0.03}
            if not 2 <= len(masks) <= 5:
                continue
            together = clicked(frame, masks, model, processor)
            for i, mask in masks.items():
                alone = clicked(frame, {i: mask}, model, processor)[i]
                scores.append((region_similarity(alone, mask), region_similarity(together[i], mask)))
        alone, together = 100 * np.mean(scores, axis=0) if scores else (0.0, 0.0)
        content["sets"][name] = {"objects": len(scores), "alone": float(alone), "together": float(together)}
        print(f"| {name} | {len(scores)} | {alone:.1f} | {together:.1f} |", flush=True)
    write_text(args.output / "clicks.json", json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
