"""What `benchmarks/pasted_objects.py` and `benchmarks/stills_ap.py` count, on masks whose counts one can see."""

import importlib.util
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ausm_hf import AusmImageProcessor, AusmProcessor
from ausm_hf.data.davis import davis


def load_script(name: str):
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pasted_objects():
    return load_script("pasted_objects")


@pytest.fixture(scope="module")
def stills_ap():
    return load_script("stills_ap")


def column(width: int, *columns: int) -> np.ndarray:
    mask = np.zeros((4, width), bool)
    mask[:, list(columns)] = True
    return mask


def test_switched_and_lost_frames_are_counted(pasted_objects):
    """Two objects, given in frame 0: right, swapped, gone, and from frame 4 on the second one is away."""
    first, second = column(4, 0, 1), column(4, 3)
    masks = np.stack([[first] * 5, [second] * 4 + [column(4)]])
    right = first * 1 + second * 2
    swapped = first * 2 + second * 1
    predicted = [right, right, swapped, right * 0, first * 1]
    rows = pasted_objects.score(masks, predicted)
    assert [row["given"] for row in rows] == [0, 0]
    assert rows[0] == {"J": 0.5, "frames": 4, "switched": 1, "lost": 1, "given": 0}
    assert rows[1] == {"J": 0.5, "frames": 3, "switched": 1, "lost": 1, "given": 0}  # J is 1 where it is away
    summary = pasted_objects.summarize([{**row, "pasted": 2, "kind": "own"} for row in rows])
    assert summary[-1]["objects"] == 2 and summary[-1]["switched"] == summary[-1]["lost"] == pytest.approx(2 / 7)


def test_what_is_found_is_named_after_the_objects_and_the_rest_costs_nothing(pasted_objects):
    """Track 2 is object 1, track 5 object 2; track 1 is something that nobody marked."""
    first, second, other = column(6, 0, 1), column(6, 3), column(6, 5)
    masks = np.stack([[first] * 4, [second] * 4])
    predicted = [first * 2 + second * 5 + other] * 3 + [first * 2 + second * 2]
    named = pasted_objects.name_tracks(masks, predicted)
    assert [sorted(np.unique(ids)) for ids in named] == [[0, 1, 2, 3]] * 3 + [[0, 1]]
    rows = pasted_objects.score(masks, named)
    assert [round(row["J"], 3) for row in rows] == [round((1 + 1 + 2 / 3) / 3, 3), round(2 / 3, 3)]
    assert [(row["switched"], row["lost"]) for row in rows] == [(0, 0), (1, 0)]
    nothing = pasted_objects.name_tracks(masks, [first * 0] * 4)
    assert [row["lost"] for row in pasted_objects.score(masks, nothing)] == [3, 3]


def test_objects_are_given_when_a_good_part_of_them_is_seen(pasted_objects):
    enters = torch.zeros(1, 30, 4, 10, dtype=torch.bool)
    for t in range(2, 30):
        enters[0, t, :, : min(t - 1, 10)] = True
    grows_slowly = torch.zeros(1, 30, 4, 40, dtype=torch.bool)
    for t in range(30):
        grows_slowly[0, t, :, : 10 + t] = True
    assert pasted_objects.first_frames(enters) == [6]  # 5 columns of 10
    assert pasted_objects.first_frames(grows_slowly) == [1]  # long before half of its largest area is reached


def test_pasted_clips_are_the_same_every_time(pasted_objects, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "ImageSets" / "2016").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2016" / "dev.txt").write_text("a\nb\n")
    for name in "ab":
        for folder in ("JPEGImages", "Annotations"):
            (tmp_path / folder / "480p" / name).mkdir(parents=True)
        for t in range(12):
            frame, mask = rng.integers(0, 255, (96, 128, 3), dtype=np.uint8), np.zeros((96, 128), np.uint8)
            mask[30:60, 30 + t : 60 + t] = 255
            Image.fromarray(frame).save(tmp_path / "JPEGImages" / "480p" / name / f"{t:05d}.jpg")
            Image.fromarray(mask).save(tmp_path / "Annotations" / "480p" / name / f"{t:05d}.png")
    first, second = davis(str(tmp_path), 2016, "dev")
    clips = [pasted_objects.make_clip(first, [second], [second], 2, seed) for seed in (5, 5, 6)]
    assert clips[0].masks.shape == (3, 12, 96, 128) and clips[0].masks.flatten(1).any(dim=1).all()
    assert (clips[0].masks.sum(0) <= 1).all()  # every pixel is of one object at most
    assert torch.equal(clips[0].frames, clips[1].frames) and torch.equal(clips[0].masks, clips[1].masks)
    assert not torch.equal(clips[0].frames, clips[2].frames)


def test_draws_differ_and_the_first_is_what_published_figures_are_of(pasted_objects):
    assert pasted_objects.seed_of("lucia", 2, 0) == zlib.crc32(b"lucia 2")
    assert len({pasted_objects.seed_of("lucia", pasted, draw) for pasted in (2, 3) for draw in range(3)}) == 6


def photograph(classes, true, found):
    keys = ("mask", "label", "score")
    return {
        "size": (4, 6),
        "classes": classes,
        "true": [dict(zip(keys, item)) for item in true],
        "found": [dict(zip(keys, item)) for item in found],
    }


def test_classes_count_where_they_are_labelled(stills_ap):
    left, middle, right = column(6, 0, 1), column(6, 2, 3), column(6, 4, 5)
    photographs = [
        # In the second set only cats are labelled: its chair is neither right nor wrong.
        photograph(["cat", "dog"], [(left, "cat"), (right, "dog")], [(left, "cat", 0.9), (right, "cat", 0.8)]),
        photograph(["cat"], [(left, "cat"), (middle, None)], [(left, "cat", 0.7), (right, "chair", 0.95)]),
    ]
    scores = stills_ap.average_precision(photographs, with_classes=True)
    # Cats: right, wrong, right: precision 1 up to a recall of 1/2, then 2/3. The dog isn't found.
    assert scores["per_class"]["cat"] == pytest.approx((51 * 1 + 50 * 2 / 3) / 101)
    assert scores["per_class"]["dog"] == 0 and set(scores["per_class"]) == {"cat", "dog"}
    assert scores["AP"] == pytest.approx(scores["per_class"]["cat"] / 2)
    agnostic = stills_ap.average_precision(photographs, with_classes=False)
    # Wrong, right, right, right of four: precision 3/4 up to a recall of 3/4.
    assert agnostic["AP"] == pytest.approx(76 * 0.75 / 101) and agnostic["AR1"] < agnostic["AR10"] == 0.75
    labels = stills_ap.right_labels(photographs)
    assert labels == {
        "cat": {"objects": 2, "found": 2, "right": 2},
        "dog": {"objects": 1, "found": 1, "right": 0},
    }


def test_objects_have_a_mask_by_their_size(stills_ap):
    frame, ignore = np.zeros((20, 20, 3), np.uint8), np.zeros((20, 20), bool)
    true = [np.zeros((20, 20), bool) for _ in range(3)]
    true[0][:10, :10] = true[1][15:17, 15:17] = true[2][:, 12:] = True
    logits = torch.full((1, 2, 20, 20), -5.0)
    logits[0, 0, :10, :8] = 5.0  # IoU 0.8 with the first
    logits[0, 1, 14:19, 14:19] = 5.0  # 4 of 25 with the second

    class Model:
        device = torch.device("cpu")

        @staticmethod
        def step(pixel_values):
            return SimpleNamespace(masks_queries_logits=logits)

    def processor(images):
        return {"pixel_values": torch.zeros(1, 3, 20, 20)}

    coverage = stills_ap.covered(frame, [{"mask": mask} for mask in true], ignore, Model, processor)
    assert coverage == [(0.25, True), (0.01, False), (0.4, False)]
    assert stills_ap.by_size(coverage) == {"0% to 1% of the picture": [0, 1], "10% to 100% of the picture": [1, 2]}


def test_nothing_found_and_nothing_to_find(stills_ap):
    mask = column(6, 0)
    assert stills_ap.average_precision([photograph(["cat"], [(mask, "cat")], [])], True)["AP"] == 0
    assert stills_ap.average_precision([photograph(["cat"], [], [(mask, "cat", 0.5)])], True)["AP"] == -1


def test_names_of_marked_objects_are_compared_object_by_object(tiny_model, monkeypatch):
    """Six objects, more than there are ID vectors, of a model that calls the left half cats."""
    labels, frame = load_script("labels"), np.zeros((64, 96, 3), np.uint8)
    masks = {i: np.zeros((64, 96), bool) for i in range(1, 8)}
    for i, mask in masks.items():
        mask[8:40, 12 * i - 10 : 12 * i] = True
    objects = [{"id": i, "label": "cat" if i < 4 else "dog"} for i in range(1, 7)] + [{"id": 7, "label": None}]
    monkeypatch.setattr(labels, "load_frames", lambda row, indices: [frame])
    monkeypatch.setattr(labels, "load_masks", lambda row, index, height, width: (masks, np.zeros((64, 96), bool)))

    class Namer:
        config, device = tiny_model.config, tiny_model.device

        def __call__(self, inference_session, frame):
            output = tiny_model(inference_session=inference_session, frame=frame)
            output.labels = ["cat" if masks[i][:, :60].any() else "dog" for i in output.object_ids]
            return output

    processor = AusmProcessor(AusmImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}))
    make = processor.init_video_session
    monkeypatch.setattr(processor, "init_video_session", lambda label_set, **given: make(**given))  # it has no COCO
    pairs = labels.named({"objects": objects}, Namer(), processor)
    assert pairs == [("cat", "cat")] * 3 + [("dog", "cat")] * 2 + [("dog", "dog")]
