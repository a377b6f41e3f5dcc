"""What is refused, in one table: each wrong input, and a part of the sentence that says what is wrong with it.

All are refused with a ValueError before anything is computed or written. What belongs to one module alone stands in
its own tests as well.
"""

import copy
import json
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file, save_file

import ausm_hf
from ausm_hf import AusmConfig, AusmForUniversalSegmentation
from ausm_hf.data.clips import encode_rle, load_clip
from ausm_hf.data.coco import coco
from ausm_hf.data.davis import davis
from ausm_hf.data.video_folder import video_folder
from ausm_hf.data.vis_json import vis_json
from ausm_hf.evaluation.metrics import load_metric
from ausm_hf.evaluation.run import evaluate
from ausm_hf.evaluation.score import score_folder
from ausm_hf.segment import load_model
from ausm_hf.training import load_recipe, recipe_from_dict

SIZE = (48, 64)
INSIDE = np.zeros(SIZE, np.uint8)
INSIDE[10:30, 10:30] = 1


@pytest.fixture(scope="module")
def processor():
    return ausm_hf.AusmProcessor(ausm_hf.AusmImageProcessor(size={"shortest_edge": 64}))


# name: (arguments of add_inputs_to_inference_session for a session whose next frame is 2, a part of the message)
PROMPTS = {
    "point outside the frame": ({"input_points": [[[[64, 10]]]]}, "input_points must lie within the frame"),
    "point above the frame": ({"input_points": [[[[5, -1]]]]}, "input_points must lie within the frame"),
    "point that is no number": ({"input_points": [[[[5, "5"]]]]}, "must hold 2 numbers"),
    "point that is NaN": ({"input_points": [[[[5, float("nan")]]]]}, "input_points must lie within the frame"),
    "box without area": ({"input_boxes": [[[9, 9, 9, 20]]]}, "have an area within the frame"),
    "box turned round": ({"input_boxes": [[[20, 20, 9, 9]]]}, "x0 < x1 and y0 < y1"),
    "box beyond the frame": ({"input_boxes": [[[70, 5, 90, 20]]]}, "have an area within the frame"),
    "labels without points": ({"input_labels": [[[1]]]}, "input_labels"),
    "more labels than points": ({"input_points": [[[[5, 5]]]], "input_labels": [[[1, 0]]]}, "input_labels"),
    "label that is neither 0 nor 1": ({"input_points": [[[[5, 5]]]], "input_labels": [[[2]]]}, "must be 1"),
    "negative points alone": ({"input_points": [[[[5, 5]]]], "input_labels": [[[0]]]}, "negative points alone"),
    "scribble outside the frame": ({"input_scribbles": [[[[5, 5], [80, 5]]]]}, "input_scribbles must lie within"),
    "id twice": ({"obj_ids": [1, 1], "input_masks": [INSIDE, INSIDE]}, "each one once"),
    "id 0": ({"obj_ids": 0, "input_masks": INSIDE}, "positive integers"),
    "id that is no integer": ({"obj_ids": "1", "input_masks": INSIDE}, "positive integers"),
    "no id": ({"obj_ids": None, "input_masks": INSIDE}, "obj_ids must be given"),
    "nothing said of an object": ({}, "must be given, got nothing"),
    "a frame already gone": ({"frame_idx": 1, "input_masks": INSIDE}, "frame_idx must be an integer of at least 2"),
    "empty mask": ({"input_masks": INSIDE * 0}, "input_masks must not be empty"),
    "mask of another size": ({"input_masks": INSIDE.T}, "must have the size of the video"),
    "mask of several objects": ({"input_masks": np.arange(48 * 64).reshape(SIZE) % 3}, "zero and one other value"),
    "mask that is a list": ({"input_masks": [[[1, 0], [0, 1]]]}, "must be arrays, tensors or PIL images"),
    "mask of complex numbers": ({"input_masks": INSIDE.astype(np.complex64)}, "got values of dtype torch.complex64"),
    "mask of several objects in 16 bits": (
        {"input_masks": np.arange(48 * 64, dtype=np.uint16).reshape(SIZE)},
        "one other",
    ),
    "mask beside a box": ({"input_masks": INSIDE, "input_boxes": [[[5, 5, 9, 9]]]}, "stand alone"),
    "fewer masks than ids": ({"obj_ids": [1, 2], "input_masks": [INSIDE]}, "must be as many as obj_ids (2)"),
    "another size of the video": ({"input_masks": INSIDE, "original_size": (64, 48)}, "must be that of the video"),
    "size of the video that is none": ({"input_masks": INSIDE, "original_size": (48,)}, "height and width"),
    "size of the video that is an object": ({"input_masks": INSIDE, "original_size": object()}, "height and width"),
}


@pytest.mark.parametrize("arguments, message", PROMPTS.values(), ids=PROMPTS)
def test_prompts(arguments, message, processor):
    session = processor.init_video_session(np.zeros((4, *SIZE, 3), np.uint8))
    session.next_frame_idx = 2
    with pytest.raises(ValueError) as refused:
        processor.add_inputs_to_inference_session(session, **({"obj_ids": 1} | arguments))
    assert message in str(refused.value) and not session.prompts


def test_more_prompted_objects_than_slots(processor, tiny_model):
    session = processor.init_video_session()
    processor.add_inputs_to_inference_session(
        session, obj_ids=[1, 2, 3, 4, 5], input_masks=[INSIDE] * 5, original_size=SIZE
    )
    with pytest.raises(ValueError, match="at most 4, the number of ID vectors, got 5 objects"):
        tiny_model(inference_session=session, frame=torch.zeros(3, 64, 96))
    assert session.next_frame_idx == 0


# name: (what is called with the processor, a part of the message)
FRAMES = {
    "no frame": (lambda p: p(images=[]), "images is empty"),
    "nothing": (lambda p: p(), "images or videos must be given"),
    "a frame without pixels": (lambda p: p(images=np.zeros((0, 5, 3), np.uint8)), "without pixels"),
    "two channels": (lambda p: p(images=np.zeros((5, 5, 2), np.uint8)), "1, 3 or 4 channels"),
    "values beyond 1": (lambda p: p(images=np.full((5, 5, 3), 2.0)), "wanted are values in 0..1"),
    "NaN": (lambda p: p(images=np.full((5, 5, 3), np.nan)), "wanted are values in 0..1"),
    "integers that aren't uint8": (lambda p: p(images=np.zeros((5, 5, 3), int)), "wanted is uint8"),
    "16 bits": (lambda p: p(images=Image.new("I;16", (5, 5))), "8 bits per channel"),
    "frames of several sizes": (
        lambda p: p(videos=[[np.zeros((64, 64, 3), np.uint8), np.zeros((64, 99, 3), np.uint8)]]),
        "images must have one size",
    ),
    "videos of several lengths": (
        lambda p: p(videos=[[np.zeros((64, 64, 3), np.uint8)] * n for n in (1, 2)]),
        "videos must agree in length",
    ),
    "a video without frames": (lambda p: p(videos=[[]]), "at least one frame each"),
    "a video that is none": (lambda p: p(videos=[[np.zeros((9, 9, 3), np.uint8)], 7]), "videos must be arrays"),
    "masks that are none": (lambda p: p(videos=np.zeros((1, 9, 9, 3), np.uint8), masks=7), "masks"),
    "a path as a session's video": (lambda p: p.init_video_session("a.mp4"), "decode a file first"),
    "a session's video without frames": (lambda p: p.init_video_session([]), "at least one frame"),
    "a threshold": (lambda p: p.init_video_session(foreground_threshold=2), "foreground_threshold"),
    "a threshold in letters": (lambda p: p.init_video_session(foreground_threshold="0.3"), "a number in 0..1, got '0"),
    "no such size": (lambda p: ausm_hf.AusmImageProcessor(size={"width": 3}), "size must be a dict"),
}


@pytest.mark.parametrize("call, message", FRAMES.values(), ids=FRAMES)
def test_frames(call, message, processor):
    with pytest.raises(ValueError) as refused:
        call(processor)
    assert message in str(refused.value)


# name: (what replaces or joins a sound recipe, a part of the message)
RECIPES = {
    "unknown key": ({"lr": 1}, "lr: unknown key"),
    "unknown key further in": ({"optim.rate": 1}, "optim.rate: unknown key"),
    "wrong type": ({"optim.lr": "high"}, "optim.lr"),
    "out of range": ({"history_corruption": 2}, "history_corruption"),
    "missing path": ({"model": {"path": "./no_such"}}, "model.path: there is no folder"),
    "missing path of a source": (
        {"data.sources": [{"dataset": "davis", "arguments": {"root": "./no_such"}}]},
        "arguments.root: there is no file or folder",
    ),
    "label set without labels": ({"model.label_sets": {"mine": None}}, "model.label_sets.mine: has no labels"),
    "label set that is empty": ({"model.label_sets": {"mine": []}}, "want a list of labels"),
    "two networks": ({"model": {"preset": "nano", "path": "a/b"}}, "want one of model.preset and model.path"),
    "no such preset": ({"model.preset": "huge"}, "model.preset"),
    "size": ({"data.size": [100, 100]}, "multiples of 32"),
    "no steps": ({"optim.max_steps": 0}, "optim.max_steps"),
    "no such mode": ({"mode": "sideways"}, "mode"),
    "no output_dir": ({"output_dir": None}, "output_dir"),
}


@pytest.mark.parametrize("changes, message", RECIPES.values(), ids=RECIPES)
def test_recipes(changes, message, tmp_path):
    recipe = {"output_dir": "runs", "model": {"preset": "nano"}, "data": {}, "optim": {}}
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = recipe
        for parent in parents:
            place = place[parent]
        place[last] = value
    with pytest.raises(ValueError) as refused:
        recipe_from_dict(copy.deepcopy(recipe))
    assert message in str(refused.value)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError):
        load_recipe(tmp_path / "recipe.yaml")


def write(folder: Path, name: str, content) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


VIS = {
    "videos": [{"id": 1, "file_names": ["a/0.jpg"], "height": 4, "width": 4}],
    "categories": [{"id": 1, "name": "fish"}],
    "annotations": [{"id": 1, "video_id": 1, "category_id": 1, "segmentations": [None]}],
}


def vis(folder: Path, **changes):
    content = copy.deepcopy(VIS)
    content["annotations"][0].update(changes)
    return vis_json(str(folder), write(folder, "vis.json", content))


# name: (what is called with a folder, a part of the message)
DATA = {
    "no such data set": (lambda f: davis(str(f), 2017, "val"), "split 'val' of DAVIS 2017"),
    "no such year": (lambda f: davis(str(f), 2018), "year is 2018"),
    "a JSON that was cut": (lambda f: vis_json(str(f), write(f, "a.json", '{"videos": [')), "Expecting"),
    "another JSON": (lambda f: vis_json(str(f), write(f, "a.json", {"a": 1})), "has no key 'videos'"),
    "a JSON that is a list": (lambda f: vis_json(str(f), write(f, "a.json", [1])), "has no key 'videos'"),
    "fewer segmentations than frames": (lambda f: vis(f, segmentations=[]), "has 0 segmentations"),
    "an unknown video": (lambda f: vis(f, video_id=7), "unknown video 7"),
    "an unknown category": (lambda f: vis(f, category_id=7), "vis.json is of unknown category 7"),
    "a segmentation that is none": (lambda f: vis(f, segmentations=["abc"]), "want polygons, or run lengths"),
    "run lengths of another size": (
        lambda f: vis(f, segmentations=[{"size": [9, 9], "counts": [81]}]),
        "run lengths are for a mask of [9, 9]",
    ),
    "run lengths that are too long": (
        lambda f: vis(f, segmentations=[{"size": [4, 4], "counts": [10**12]}]),
        "want numbers that sum to 4 x 4",
    ),
    "a polygon far away": (lambda f: vis(f, segmentations=[[[0, 0, 10**12, 0, 9, 9]]]), "a polygon has a point at"),
    "a polygon of odd length": (lambda f: vis(f, segmentations=[[[0, 0, 3, 0, 9]]]), "want x and y"),
    "an absurd size of a frame": (lambda f: encode_rle([[0, 0, 1, 1]], 10**12, 4), "want a height and a width"),
    "COCO without categories": (
        lambda f: coco(str(f), annotations=write(f, "a.json", {"images": [], "annotations": []})),
        "can't be read: it lacks 'categories'",
    ),
    "labels of an unknown video": (
        lambda f: (
            [(f / "videos").mkdir(), (f / "masks").mkdir(), write(f, "labels.json", {"a": {}})]
            and video_folder(str(f))
        ),
        "labels.json names videos that aren't in",
    ),
    "labels that are none": (
        lambda f: (
            [(f / "videos").mkdir(), (f / "masks").mkdir(), write(f, "labels.json", {"a": True})]
            and video_folder(str(f))
        ),
        "labels.json can't be read",
    ),
}


@pytest.mark.parametrize("call, message", DATA.values(), ids=DATA)
def test_data(call, message, tmp_path):
    with pytest.raises(ValueError) as refused:
        call(tmp_path)
    assert message in str(refused.value)


def test_broken_compressed_run_lengths_are_refused_when_they_are_read(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "0.jpg")
    for counts in ("abc", "\0", "é", "0" * 99, "o" * 99):
        (row,) = vis(tmp_path, segmentations=[{"size": [4, 4], "counts": counts}])
        with pytest.raises(ValueError):
            load_clip(row, [0])


def scores_of(folder: Path, truth: dict[str, np.ndarray], predicted: dict[str, np.ndarray]):
    for kind, masks in (("truth", truth), ("predicted", predicted)):
        (folder / kind / "bear").mkdir(parents=True)
        for name, mask in masks.items():
            Image.fromarray(mask).save(folder / kind / "bear" / f"{name}.png")
    return score_folder(folder / "predicted", folder / "truth")


FOUR = {f"{t:05d}": INSIDE for t in range(4)}
# name: (what is called with a folder, a part of the message)
EVALUATION = {
    "a missing frame": (lambda f: scores_of(f, FOUR, {k: FOUR[k] for k in list(FOUR)[:3]}), "00003"),
    "a mask of another size": (lambda f: scores_of(f, FOUR, FOUR | {"00002": INSIDE.T.copy()}), "00002"),
    "an id that ground truth doesn't know": (lambda f: scores_of(f, FOUR, FOUR | {"00001": INSIDE * 9}), "9"),
    "no such benchmark": (lambda f: evaluate("imagenet", f), "benchmark is 'imagenet'"),
    "no such mode": (lambda f: evaluate("davis2016", f, mode="blind"), "blind"),
    "too many passes": (lambda f: evaluate("davis2016", f, passes=4), "passes is 4"),
    "traversal of a video": (lambda f: evaluate("davis2016", f, traversal=True), "traversal is for single images"),
    "top_k of 0": (lambda f: evaluate("ovis", f, top_k=0), "top_k is 0"),
    "a threshold": (lambda f: evaluate("ovis", f, threshold=3), "threshold is 3"),
    "no data": (lambda f: evaluate("davis2016", f), "DAVIS"),
    "no such metric": (lambda f: load_metric("accuracy"), "it must be one of"),
    "not one prediction per frame": (
        lambda f: load_metric("vos_jf").add_batch(predictions=[INSIDE], references=[INSIDE] * 2, sequence=["a"] * 2),
        "one of each for every frame",
    ),
}


@pytest.mark.parametrize("call, message", EVALUATION.values(), ids=EVALUATION)
def test_evaluation(call, message, tmp_path):
    with pytest.raises(ValueError) as refused:
        call(tmp_path)
    assert message in str(refused.value)


ABSURD = {
    "hidden_size": 2**20,
    "num_id_vectors": 10**12,
    "num_detection_queries": 10**9,
    "num_decoder_layers": 10**9,
    "num_compressor_layers": 10**9,
    "mamba_state_size": 10**9,
    "history_local_kernel": 10**9 + 1,
    "mask_refinement_layers": 10**9,
    "mask_propagation_radius": 33,
    "decoder_feedforward_size": 10**12,
    "pixel_encoder_layers": 10**9,
    "hidden_size ": 0,
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_sizes_are_refused_before_memory_is_taken(name, tiny_checkpoint, tmp_path):
    key = name.strip()
    with pytest.raises(StrictDataclassError, match=f"`{key}`"):  # the ecosystem's own
        AusmConfig.from_preset("nano", **{key: ABSURD[name]})
    content = json.loads((tiny_checkpoint / "config.json").read_text())
    write(tmp_path, "config.json", content | {key: ABSURD[name]})
    with pytest.raises(ValueError, match=f"(?s)can't be loaded: .*`{key}`"):
        load_model(tmp_path)


def test_absurd_backbones_are_refused():
    for sizes in ({"widths": [10**9] * 7}, {"depths": [10**9] * 7}, {"stem_width": 10**9}):
        with pytest.raises(StrictDataclassError, match="`backbone_config` must have sizes of at most"):
            AusmConfig.from_preset("nano", backbone_config={"model_type": "efficientnet_lite", **sizes})


class Malice:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    """A copy of a sound checkpoint without its weights, and these."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in tiny_checkpoint.iterdir():
        if path.is_file() and path.name != "model.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder, load_file(tiny_checkpoint / "model.safetensors")


def test_a_checkpoint_is_never_unpickled(checkpoint, tmp_path):
    folder, _ = checkpoint
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Malice(tmp_path / "owned")}))
    with pytest.raises(ValueError, match="can't be loaded"):
        load_model(folder)
    with pytest.raises(Exception), warnings.catch_warnings():  # noqa: B017  (torch's and transformers' own refusals)
        AusmForUniversalSegmentation.from_pretrained(folder)
    assert not (tmp_path / "owned").exists()


def cut(folder: Path, weights: dict):
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def saved_with(change):
    def save(folder: Path, weights: dict):
        name = "foreground_head.weight"
        change(weights, name)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return save


# name: (what makes the weights' file, a part of the message)
WEIGHTS = {
    "a file that was cut": (cut, "can't be loaded"),
    "no weights of this network": (saved_with(lambda w, n: [w.pop(key) for key in list(w) if key != n]), "it lacks"),
    "weights of another shape": (saved_with(lambda w, n: w.update({n: torch.zeros(1, 7)})), "can't be loaded"),
    "weights that are NaN": (saved_with(lambda w, n: w[n].fill_(torch.nan)), "foreground_head.weight are not finite"),
    "a weight that is infinite": (saved_with(lambda w, n: w[n][0, :1].fill_(torch.inf)), "are not finite"),
    "no safetensors file": (lambda f, w: (f / "model.safetensors").write_text("weights"), "can't be loaded"),
}


@pytest.mark.parametrize("make, message", WEIGHTS.values(), ids=WEIGHTS)
def test_weights(make, message, checkpoint):
    folder, weights = checkpoint
    make(folder, weights)
    with pytest.raises(ValueError) as refused:
        load_model(folder)
    assert message in str(refused.value)


def test_sound_weights_load(checkpoint):
    folder, weights = checkpoint
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_model(folder)[0].config.num_id_vectors == 4
