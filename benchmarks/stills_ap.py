"""Does the model find all objects of a photograph, and does it know what they are?

    python benchmarks/stills_ap.py --root ROOT [--model ID_OR_PATH] [--output DIR] [--passes 2 | --traversal]

ROOT is what `python -m ausm_hf.data.prepare` wrote. Measured are the photographs of four sets that are kept out of
training: every tenth of `coco_mini`, `cats`, `balloon` and `fashion`, in which every object of the set's classes is
labelled. Nothing is prompted; every photograph is a stream of its own, of one frame, or of as many as `--passes` or
`--traversal` make of it (the paper's inference compute scaling).

- **class-aware**: AP of pycocotools over COCO's classes. A set speaks only for the classes it labels: in `cats` what
  is called a chair counts neither for nor against. Balloons are no class of COCO.
- **class-agnostic**: AP of pycocotools with all objects in one class. Whatever matches no labelled object is wrong.
- **labels**: of the objects with a class that are found (IoU of at least 0.5), how many get the right name?

Writes `stills_ap.json` and prints tables.
"""

import argparse
import contextlib
import io
import json
import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from ausm_hf.data.clips import load_frames, load_masks
from ausm_hf.data.labels import COCO_LABELS
from ausm_hf.data.stills import stills
from ausm_hf.evaluation.metrics.jf import region_similarity
from ausm_hf.evaluation.runner import Inference, predict_video
from ausm_hf.files import WholeOrNothing
from ausm_hf.segment import load_model

SETS = ("coco_mini", "cats", "balloon", "fashion")
FOUND = 0.5  # least IoU
SHARES = (0, 0.01, 0.03, 0.1)  # of the picture, from which on an object is of the next size
MEASURES = ("AP", "AP50", "AP75", "AR1", "AR10", "AR100")


def held_out_photographs(root: str) -> list[dict]:
    """Rows of the photographs to measure on, each with `"classes"`: the classes that its set labels."""
    photographs = []
    for name in SETS:
        folder = os.path.join(root, "stills", name)
        everyone = stills(folder)
        classes = sorted({obj["label"] for row in everyone for obj in row["objects"] if obj["label"] is not None})
        photographs += [{**row, "classes": classes} for row in stills(folder, "held_out")]
    return photographs


def find_objects(row: dict, model, processor, inference: Inference) -> list[dict]:
    """What the model finds in a photograph: `{"mask": bool (H, W), "label", "score"}` each."""
    ((_, result),) = predict_video(row, model, processor, inference)
    return [
        {"mask": result.masks == item["id"], "label": item["label"], "score": item["score"]} for item in result.objects
    ]


def true_objects(row: dict, size: tuple[int, int]) -> tuple[list[dict], np.ndarray]:
    """The labelled objects, `{"mask", "label"}` each, and the pixels (H, W) of which nothing is known."""
    masks, ignore = load_masks(row, 0, *size)
    labels = {obj["id"]: obj["label"] for obj in row["objects"]}
    return [{"mask": mask, "label": labels[i]} for i, mask in masks.items() if mask.any()], ignore


def covered(frame: np.ndarray, true: list[dict], ignore: np.ndarray, model, processor) -> list[tuple[float, bool]]:
    """Of each labelled object its share of the picture, and whether any detection has its mask, whatever its score."""
    with torch.inference_mode():
        logits = model.step(processor(images=frame)["pixel_values"].to(model.device)).masks_queries_logits
    masks = F.interpolate(logits.float(), frame.shape[:2], mode="bilinear")[0].gt(0).cpu().numpy() & ~ignore
    return [
        (float(x["mask"].mean()), any(region_similarity(mask, x["mask"]) >= FOUND for mask in masks)) for x in true
    ]


def by_size(coverage: list[tuple[float, bool]]) -> dict[str, list[int]]:
    """By size, as a share of the picture, how many objects have a mask, and how many there are."""
    sizes = {}
    for low, high in zip(SHARES, [*SHARES[1:], 1]):
        there = [ok for share, ok in coverage if low < share <= high]
        if there:
            sizes[f"{low:.0%} to {high:.0%} of the picture"] = [sum(there), len(there)]
    return sizes


def average_precision(photographs: list[dict], with_classes: bool) -> dict:
    """
    AP as pycocotools has it.

    Args:
        photographs: `{"size": (H, W), "classes": list, "true": list, "found": list}` each.
        with_classes: Objects match only those of the same class; those without one are left out.

    Returns:
        `MEASURES`, -1 where there is nothing to find, and with classes `"per_class"`: AP of each class.
    """
    number = {label: n for n, label in enumerate(COCO_LABELS, 1)} if with_classes else {}
    images, annotations, results = [], [], []
    for image_id, photograph in enumerate(photographs, 1):
        height, width = photograph["size"]
        images.append({"id": image_id, "height": height, "width": width})
        for kind, objects in (("true", annotations), ("found", results)):
            for item in photograph[kind]:
                if with_classes and item["label"] not in photograph["classes"]:
                    continue
                rle = mask_utils.encode(np.asfortranarray(item["mask"], dtype=np.uint8))
                entry = {"image_id": image_id, "category_id": number.get(item["label"], 1), "segmentation": rle}
                if kind == "true":
                    area = int(item["mask"].sum())
                    entry |= {"id": len(annotations) + 1, "iscrowd": 0, "area": area, "bbox": mask_utils.toBbox(rle)}
                else:
                    entry["score"] = item["score"]
                objects.append(entry)
    categories = [{"id": n, "name": label} for label, n in number.items()] or [{"id": 1, "name": "object"}]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports on what it does
        truth = COCO()
        truth.dataset = {"images": images, "annotations": annotations, "categories": categories}
        truth.createIndex()
        if not results:
            return {**dict.fromkeys(MEASURES, 0.0 if annotations else -1.0), "per_class": {}}
        scorer = COCOeval(truth, truth.loadRes(results), "segm")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    scores = dict(zip(MEASURES, scorer.stats[[0, 1, 2, 6, 7, 8]].tolist()))
    precision = scorer.eval["precision"][:, :, :, 0, -1]  # thresholds, recalls, classes; all areas, 100 objects
    per_class = {
        category["name"]: float(precision[:, :, n].mean())
        for n, category in enumerate(categories)
        if (precision[:, :, n] > -1).all()
    }
    return {**scores, "per_class": per_class if with_classes else {}}


def right_labels(photographs: list[dict]) -> dict[str, dict[str, int]]:
    """Per class, of how many objects there are how many are found, and how many of those get the right name.

    The best-scored object takes the labelled one that it covers best, whatever their names.
    """
    counts = defaultdict(Counter)
    for photograph in photographs:
        free = [item for item in photograph["true"] if item["label"] is not None]
        for item in free:
            counts[item["label"]]["objects"] += 1
        for found in sorted(photograph["found"], key=lambda item: -item["score"]):
            iou = [
                np.count_nonzero(found["mask"] & true["mask"]) / np.count_nonzero(found["mask"] | true["mask"])
                for true in free
            ]
            if iou and max(iou) >= FOUND:
                true = free.pop(int(np.argmax(iou)))
                counts[true["label"]]["found"] += 1
                counts[true["label"]]["right"] += found["label"] == true["label"]
    return {label: {key: row[key] for key in ("objects", "found", "right")} for label, row in sorted(counts.items())}


def tables(content: dict) -> str:
    """The results as Markdown."""
    lines = ["| | " + " | ".join(MEASURES) + " |", "| --- " * (len(MEASURES) + 1) + "|"]
    for name in ("class-aware", "class-agnostic"):
        lines.append(f"| {name} | " + " | ".join(f"{100 * content[name][key]:.1f}" for key in MEASURES) + " |")
    lines += ["", "| class | objects | found | right name | AP |", "| --- " * 5 + "|"]
    rows = dict(sorted(content["labels"].items(), key=lambda item: -item[1]["objects"]))
    total = {key: sum(row[key] for row in rows.values()) for key in ("objects", "found", "right")}
    for label, row in {**rows, "all": total}.items():
        ap = content["class-aware"]["AP"] if label == "all" else content["class-aware"]["per_class"].get(label)
        shown = "" if ap is None else f"{100 * ap:.1f}"
        lines.append(f"| {label} | {row['objects']} | {row['found']} | {row['right']} | {shown} |")
    lines += ["", "| objects of | how many | have a mask, whatever its score |", "| --- " * 3 + "|"]
    lines += [f"| {size} | {number} | {count / number:.0%} |" for size, (count, number) in content["covered"].items()]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="what ausm_hf.data.prepare wrote, with stills/")
    parser.add_argument("--model", help="checkpoint (default: the ausm-nano of the package)")
    parser.add_argument("--output", type=Path, default=Path("stills-ap"))
    parser.add_argument(
        "--threshold", type=float, default=0.05, help="least foreground probability; AP ranks what is above"
    )
    parser.add_argument("--passes", type=int, default=1, help="times to show each photograph; the last result counts")
    parser.add_argument("--traversal", action="store_true", help="four views of 90%% between two full ones")
    args = parser.parse_args(arguments)
    if args.traversal and args.passes > 1:
        parser.error("--traversal and --passes don't go together")

    inference = Inference(
        "unprompted", label_set="coco", threshold=args.threshold, passes=args.passes, traversal=args.traversal
    )
    rows = held_out_photographs(args.root)
    model, processor = load_model(args.model)
    if "coco" not in model.config.label_sets:
        parser.error(f"the model has no label set 'coco'; it has {', '.join(model.config.label_sets)}")
    photographs, coverage = [], []
    for row in tqdm(rows, "photographs"):
        frame = load_frames(row, [0])[0]
        true, ignore = true_objects(row, frame.shape[:2])
        coverage += covered(frame, true, ignore, model, processor)
        found = find_objects(row, model, processor, inference)
        for item in found:
            item["mask"] &= ~ignore
        found = [item for item in found if item["mask"].any()]
        photographs.append({"size": frame.shape[:2], "classes": row["classes"], "true": true, "found": found})

    content = {
        "model": args.model or "ausm-nano",
        "photographs": {name: sum(row["video_id"].startswith(f"{name}/") for row in rows) for name in SETS},
        "objects": sum(len(photograph["true"]) for photograph in photographs),
        "threshold": args.threshold,
        "passes": args.passes,
        "traversal": args.traversal,
        "class-aware": average_precision(photographs, True),
        "class-agnostic": average_precision(photographs, False),
        "labels": right_labels(photographs),
        "covered": by_size(coverage),
    }
    with WholeOrNothing(args.output / "stills_ap.json") as file:
        file.partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"{len(rows)} photographs, {content['objects']} objects\n")
    print(tables(content))


if __name__ == "__main__":
    main()
