"""Does the model know what it is that is marked?

    python benchmarks/labels.py --root ROOT [--model ID_OR_PATH] [--output DIR]

ROOT is what `python -m ausm_hf.data.prepare` wrote. Every object with one of COCO's labels in the photographs that
are kept out of fitting the head is marked by its mask, in a stream of one frame, and the label that comes out is
compared with the true one. `coco_mval` has about as many objects of each of the 80 labels; the other sets show what is
frequent.

Writes `labels.json` and prints a table.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ausm_hf.data.clips import load_frames, load_masks
from ausm_hf.data.stills import stills
from ausm_hf.files import WholeOrNothing
from ausm_hf.segment import load_model

SETS = ("coco_mval", "coco_mini", "street", "cats", "pennfudan", "people", "fashion")


def named(row: dict, model, processor) -> list[tuple[str, str]]:
    """The true and the given label of each labelled object of a photograph."""
    frame = load_frames(row, [0])[0]
    masks, _ = load_masks(row, 0, *frame.shape[:2])
    truth = {x["id"]: x["label"] for x in row["objects"] if x["label"] is not None}
    ids = [i for i in masks if i in truth and masks[i].any()]
    pairs = []
    most = model.config.num_id_vectors
    for first in range(0, len(ids), most):
        some = ids[first : first + most]
        session = processor.init_video_session(find_new_objects=False, label_set="coco", seed=0)
        given = torch.from_numpy(np.stack([masks[i] for i in some]))
        processor.add_inputs_to_inference_session(session, 0, some, input_masks=given, original_size=frame.shape[:2])
        output = model(inference_session=session, frame=processor(images=frame)["pixel_values"].to(model.device))
        pairs += [(truth[i], label) for i, label in zip(output.object_ids, output.labels) if i in truth]
    return pairs


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="what ausm_hf.data.prepare wrote, with stills/")
    parser.add_argument("--model", help="checkpoint (default: the ausm-nano of the package)")
    parser.add_argument("--output", type=Path, default=Path("labels"))
    args = parser.parse_args(arguments)

    model, processor = load_model(args.model)
    if "coco" not in model.config.label_sets:
        parser.error(f"the model has no label set 'coco'; it has {', '.join(model.config.label_sets)}")
    content = {"model": args.model or "ausm-nano", "sets": {}}
    print("| set | objects | right name |\n| --- | --- | --- |")
    for name in SETS:
        rows = stills(str(args.root / "stills" / name), "held_out")
        pairs = [pair for row in tqdm(rows, name, leave=False) for pair in named(row, model, processor)]
        right = sum(true == given for true, given in pairs)
        content["sets"][name] = {"objects": len(pairs), "right": right}
        print(f"| {name} | {len(pairs)} | {100 * right / max(1, len(pairs)):.1f}% |", flush=True)
    with WholeOrNothing(args.output / "labels.json") as file:
        file.partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
