"""Segment a video with ONNX Runtime and NumPy, without PyTorch: python run_onnx.py STEP.onnx VIDEO OUT_DIR [MASK.png]

`ausm export-onnx STEP.onnx --like VIDEO` writes the step. MASK.png marks objects of the first frame (pixel = id of the
object, 0 = background); without it objects are found. OUT_DIR gets such a PNG per frame. Shorter than the package:
nothing is followed unseen, a mask may reach anywhere, and onto what is unlike its object, detections aren't merged."""

import json
import sys
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def exclusive(logits):
    """Masks in which a pixel belongs to the object of the highest logit, if that is positive."""
    return (logits > 0) & (logits == logits.max(axis=0))


step = onnxruntime.InferenceSession(sys.argv[1])
(folder := Path(sys.argv[3])).mkdir(parents=True, exist_ok=True)
about = {key: json.loads(value) for key, value in step.get_modelmeta().custom_metadata_map.items()}
# A stream starts with zeros; `next_x` of one frame is `x` of the next.
inputs = {x.name: np.zeros(x.shape, bool if "bool" in x.type else np.float32) for x in step.get_inputs()}
taken, masks = inputs["taken"][0], inputs["masks"][0]  # column i is object i + 1
marked = np.array(Image.open(sys.argv[4])) if len(sys.argv) > 4 else None

for index, frame in enumerate(av.open(sys.argv[2]).decode(video=0)):
    image, mirrored = frame.to_image(), False
    with suppress(KeyError, ValueError):  # there is no matrix, or it is beside data that PyAV does not know
        mirrored = np.linalg.det(np.frombuffer(frame.side_data["DISPLAYMATRIX"], np.int32).reshape(3, 3)) < 0
    image = (ImageOps.flip(image) if mirrored else image).rotate(frame.rotation, expand=True)  # as players show it
    if index == 0 and marked is not None and (marked.shape != image.size[::-1] or marked.max() > len(taken)):
        sys.exit(f"{sys.argv[4]}: wanted are {image.width} x {image.height} pixels, one channel, ids to {len(taken)}")
    for column in [] if index or marked is None else np.unique(marked[marked > 0]) - 1:
        cover = Image.fromarray(np.float32(marked == column + 1)).resize(masks.shape[:0:-1], Image.Resampling.BOX)
        taken[column], masks[column] = True, np.array(cover) >= 0.5
    pixels = np.array(image.resize(inputs["pixel_values"].shape[:1:-1], Image.BILINEAR)) / 255 - about["image_mean"]
    inputs["pixel_values"] = np.float32(pixels / about["image_std"]).transpose(2, 0, 1)[None]
    result = dict(zip([x.name for x in step.get_outputs()], step.run(None, inputs)))
    logits, sure = result["mask_logits"][0], 1 / (1 + np.exp(-result["foreground_logits"][0]))
    rows = {i: i for i in np.flatnonzero(taken) if sure[i] >= about["foreground_threshold"]}  # column -> query
    for row in len(taken) + np.argsort(-sure[len(taken) :]) if marked is None else []:
        covered = (logits[list(rows.values())] > 0).any(axis=0) & (logits[row] > 0)
        is_new = sure[row] > about["foreground_threshold"] and 2 * covered.sum() < (logits[row] > 0).sum()
        if is_new and not taken.all():
            rows[taken.argmin()], taken[taken.argmin()] = row, True
    inputs |= {name.removeprefix("next_"): x for name, x in result.items() if name.startswith("next_")}
    inputs["started"][:] = True
    segments = marked if index == 0 else None
    if segments is None:
        masks[:], segments = 0, np.zeros((image.height, image.width), np.uint8)
        if rows:
            masks[list(rows)] = exclusive(logits := logits[list(rows.values())])
            large = [np.array(Image.fromarray(x).resize(image.size, Image.BILINEAR)) for x in logits]
            segments = (exclusive(np.stack(large)) * (np.uint8(list(rows)) + 1)[:, None, None]).max(axis=0)
    Image.fromarray(segments).save(folder / f"{index:05d}.png")
