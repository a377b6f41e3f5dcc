import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from trees import HEIGHT, WIDTH, index_mask, write_frames, write_mask

from ausm_hf.data import mixture as mixture_module
from ausm_hf.data.clips import clip_object, clip_row, clips_from_rows, file
from ausm_hf.data.collate import ClipCollator
from ausm_hf.data.mixture import ClipMixture, ClipSource, nano_mixture
from ausm_hf.data.sampling import Cutout


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[ClipSource]:
    folder = tmp_path_factory.mktemp("clips")
    write_frames(folder / "frames", [str(t) for t in range(12)])
    frames = [file(folder / "frames" / f"{t}.png") for t in range(12)]
    for t in range(12):
        write_mask(folder / f"{t}.png", index_mask(t, [1, 2]))
    annotations = [file(folder / f"{t}.png") for t in range(12)]
    labelled = [clip_object(1, "cat"), clip_object(2)]
    video = clips_from_rows([clip_row("video", frames, [], annotations=annotations)])
    still = clips_from_rows(
        [clip_row(str(t), frames[t : t + 1], labelled, annotations=annotations[t : t + 1], label_set="coco",
                  exhaustive=False, first_frame_given=True) for t in range(3)]
    )  # fmt: skip
    return [
        ClipSource(video, strides=(1, 3), paste=0.7, donor=True),
        ClipSource(still, pseudo_video=True, paste=0.5, donor=True),
    ]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def test_items_are_as_promised(sources):
    mixture = ClipMixture(sources, [1, 1], 3, (32, 64), seed=1)
    kinds = set()
    for i in range(40):
        item = mixture[i]
        count = len(item["masks"])
        assert 1 <= count <= 8
        assert item["pixel_values"].shape == (3, 3, 32, 64) and item["pixel_values"].dtype == torch.uint8
        assert item["masks"].shape == (count, 3, 32, 64) and item["masks"].dtype == torch.bool
        assert item["class_labels"].shape == (count,) and item["class_labels"].dtype == torch.int64
        assert item["annotated_frames"].shape == (3,) and item["annotated_frames"].all()
        assert item["ignore_mask"].shape == (3, 32, 64)
        assert item["masks"].flatten(2).any(-1).any(-1).all()
        kinds.add((item["label_set"], item["first_frame_given"], item["exhaustive"]))
        if item["label_set"] is None:
            assert (item["class_labels"] == -100).all()
        else:
            assert set(item["class_labels"].tolist()) <= {15, -100}  # 15 is COCO's cat
    # The one in the middle is video with an object that nobody marks.
    assert kinds == {(None, False, True), (None, True, False), ("coco", True, False)}


def test_item_depends_on_seed_and_number_alone(sources):
    mixture = ClipMixture(sources, [1, 1], 3, (32, 64), seed=1)
    expected = [mixture[i] for i in range(8)]
    again = ClipMixture(sources, [1, 1], 3, (32, 64), seed=1)
    assert all(equal(again[i], expected[i]) for i in reversed(range(8)))
    other = ClipMixture(sources, [1, 1], 3, (32, 64), seed=2)
    assert not any(equal(other[i], expected[i]) for i in range(8))
    for first in (0, 3):  # a run that starts over, and one that goes on
        loader = torch.utils.data.DataLoader(
            mixture, batch_size=None, sampler=range(first, 8), num_workers=2, multiprocessing_context="fork"
        )
        assert all(equal(item, expected[i]) for i, item in zip(range(first, 8), loader, strict=True))


def test_weights_are_how_often_a_source_is_drawn(sources):
    mixture = ClipMixture(sources, [1, 4], 1, (32, 32), seed=0)
    drawn = sum(mixture[i]["label_set"] == "coco" for i in range(50))
    assert 33 <= drawn <= 47


def test_detect_overrides_what_the_rows_say(sources):
    still = ClipSource(sources[1].clips, pseudo_video=True, detect=True)
    assert not ClipMixture([still], [1], 2, (32, 32))[0]["first_frame_given"]


@pytest.mark.parametrize("exhaustive", [True, False])
def test_exhaustive_overrides_what_the_rows_say(sources, exhaustive):
    still = ClipSource(sources[1].clips, pseudo_video=True, exhaustive=exhaustive)
    assert ClipMixture([still], [1], 2, (32, 32))[0]["exhaustive"] == exhaustive


def test_a_group_in_several_pieces_is_a_prompt_only(tmp_path):
    write_frames(tmp_path, ["picture"])
    one = np.zeros((HEIGHT, WIDTH), np.uint8)
    one[10:30, 10:30] = 1
    one[2, 2] = 1  # a speck is no piece
    two = one.copy()
    two[10:30, 40:55] = 1
    for mask, given in ((one, False), (two, True)):
        write_mask(tmp_path / "mask.png", mask)
        row = clip_row("salient", [file(tmp_path / "picture.png")], [], annotations=[file(tmp_path / "mask.png")])
        for grouped in (True, False):
            source = ClipSource(clips_from_rows([row]), pseudo_video=True, grouped=grouped)
            mixture = ClipMixture([source], [1], 2, (64, 96))
            assert mixture[0]["first_frame_given"] == (given and grouped)


def test_the_unmarked_object_is_in_the_picture_and_not_ignored(sources, monkeypatch):
    monkeypatch.setattr(mixture_module, "UNMARKED", 0.0)
    marked = ClipMixture(sources[:1], [1], 3, (64, 96), seed=5)
    before = [marked[i] for i in range(20)]
    monkeypatch.setattr(mixture_module, "UNMARKED", 1.0)
    left = 0
    for i, all_marked in enumerate(before):
        item, count = marked[i], len(all_marked["masks"])
        assert torch.equal(item["pixel_values"], all_marked["pixel_values"])
        if len(item["masks"]) == count:  # nothing was pasted
            continue
        left += 1
        assert len(item["masks"]) == count - 1 and torch.equal(item["ignore_mask"], all_marked["ignore_mask"])
        assert item["first_frame_given"] and not item["exhaustive"]
        there = [any(torch.equal(mask, kept) for kept in item["masks"]) for mask in all_marked["masks"]]
        assert sum(there) == count - 1
    assert left > 5


def test_one_to_three_objects_are_pasted(sources, monkeypatch):
    source = replace(sources[0], paste=1.0)
    asked = []
    original = ClipMixture._cutout
    monkeypatch.setattr(ClipMixture, "_cutout", lambda self, *args: asked.append(1) or original(self, *args))
    mixture, numbers = ClipMixture([source], [1], 2, (32, 64), seed=3), set()
    for i in range(30):
        asked.clear()
        mixture[i]
        numbers.add(len(asked))
    assert numbers == {1, 2, 3}


def test_clips_are_cut_to_another_video_where_everything_is_away(tmp_path):
    rows = []
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), colour, np.uint8)).save(tmp_path / f"{name}.png")
        write_mask(tmp_path / f"{name}-mask.png", np.ones((HEIGHT, WIDTH), np.uint8))
        frames, masks = [file(tmp_path / f"{name}.png")] * 5, [file(tmp_path / f"{name}-mask.png")] * 5
        rows.append(clip_row(name, frames, [], annotations=masks))
    mixture = ClipMixture([ClipSource(clips_from_rows(rows), cut=0.8)], [1], 5, (32, 32), seed=4)
    shown = set()
    for i in range(60):
        item = mixture[i]
        there = item["masks"].flatten(2).any(-1)
        assert there.shape == (1, 5) and there[0, 0]
        colours = item["pixel_values"].flatten(2).float().mean(-1)
        blue = colours[:, 2] > colours[:, 0]
        assert torch.equal(blue == blue[0], there[0])
        assert item["exhaustive"] == bool(there.all())
        shown.add("".join("-x"[seen] for seen in there[0].tolist()))
    assert {"xxxxx", "x----", "xxxx-", "x---x", "xxx-x"} <= shown
    with pytest.raises(ValueError, match="source 0 has cuts; wanted is a second video to cut to"):
        ClipMixture([ClipSource(clips_from_rows(rows[:1]), cut=0.8)], [1], 5, (32, 32))


def test_what_was_pasted_goes_while_the_clip_goes_on(sources, monkeypatch):
    monkeypatch.setattr(mixture_module, "UNMARKED", 0.0)
    monkeypatch.setattr(mixture_module, "jitter_colour", lambda frames, rng: frames)
    monkeypatch.setattr(ClipMixture, "_cutout", lambda self, clip, stride, rng: cutout)
    cutout = Cutout(torch.full((1, 3, 20, 20), 255, dtype=torch.uint8), torch.ones(1, 20, 20, dtype=torch.bool), None)
    monkeypatch.setattr(mixture_module, "PASTED", (1.0, 0.0, 0.0))
    scenes = []
    original = mixture_module.cut_to
    monkeypatch.setattr(
        mixture_module, "cut_to", lambda clip, scene, rng: scenes.append(scene) or original(clip, scene, rng)
    )
    mixture = ClipMixture([replace(sources[0], paste=1.0, cut=1.0), sources[1]], [1, 0.3], 5, (64, 96), seed=2)
    gone = 0
    for i in range(40):
        scenes.clear()
        item = mixture[i]
        scene = scenes[0] if scenes else None  # none in a photograph; of another video nothing has a mask
        if scene is None or len(scene.masks) < 2 or len(item["masks"]) < 3:
            continue
        away = ~item["masks"][2].flatten(1).any(1)
        same = (item["pixel_values"] == scene.frames).flatten(1).all(1)
        assert same.any() and not same[0] and (away | ~same).all()
        assert torch.equal(item["masks"][:2, same], scene.masks[:, same]) and item["exhaustive"]
        gone += 1
    assert gone > 5


def test_more_objects_than_fit_leave_the_clip_inexhaustive(tmp_path):
    write_frames(tmp_path, ["0"])
    mask = np.kron(np.arange(1, 7).reshape(2, 3), np.ones((20, 20))).astype(np.uint8)
    mask = np.pad(mask, ((0, HEIGHT - 40), (0, WIDTH - 60)))
    write_mask(tmp_path / "m.png", mask)
    row = clip_row("v", [file(tmp_path / "0.png")], [], annotations=[file(tmp_path / "m.png")])
    mixture = ClipMixture([ClipSource(clips_from_rows([row]))], [1], 2, (96, 128), max_objects=4)
    for i in range(5):
        item = mixture[i]
        assert 1 <= len(item["masks"]) <= 4 and not item["exhaustive"]


def test_a_label_outside_its_label_set_is_an_error(sources):
    mixture = ClipMixture(sources[1:], [1], 2, (32, 32), label_sets={"coco": ["dog"]})
    with pytest.raises(ValueError, match="label 'cat' isn't in label set 'coco'"):
        [mixture[i] for i in range(10)]


def test_clips_without_objects_are_passed_over_and_an_empty_source_is_an_error(tmp_path, sources):
    write_frames(tmp_path, ["0"])
    write_mask(tmp_path / "m.png", np.zeros((HEIGHT, WIDTH), dtype=np.uint8))
    row = clip_row("v", [file(tmp_path / "0.png")], [], annotations=[file(tmp_path / "m.png")])
    empty = ClipSource(clips_from_rows([row]))
    mixture = ClipMixture([sources[0], empty], [1, 30], 2, (32, 32))  # as from a camera that mostly sees nothing
    assert all(len(mixture[i]["masks"]) for i in range(10))
    with pytest.raises(ValueError, match="no object in view"):
        ClipMixture([empty], [1], 2, (32, 32))[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (30, 64)}, r"size must be .* multiples of 32, got \(30, 64\)"),
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"weights": [1.0]}, "got 2 sources and 1 weights"),
        ({"weights": [1.0, -1.0]}, "weights must be positive"),
        ({"sources": [], "weights": []}, "got 0 sources and 0 weights"),
        ({"max_objects": 2}, "max_objects must be at least 4, got 2"),
    ],
)
def test_bad_arguments(sources, arguments, message):
    arguments = {"sources": sources, "weights": [1, 1], "num_frames": 2, "size": (32, 32)} | arguments
    with pytest.raises(ValueError, match=message):
        ClipMixture(**arguments)


def test_collator_pads_and_normalises(sources):
    small = ClipMixture(sources, [1, 1], 2, (32, 64))[0]
    large = ClipMixture(sources, [1, 1], 3, (64, 32))[1]
    batch = ClipCollator()([small, large])
    assert batch["pixel_values_videos"].shape == (2, 3, 3, 64, 64)
    assert batch["pixel_values_videos"].dtype == torch.float32
    expected = (small["pixel_values"].float() - 127) / 128
    assert torch.allclose(batch["pixel_values_videos"][0, :2, :, :32], expected, atol=1e-5)
    assert (batch["pixel_values_videos"][0, 2:] == 0).all() and (batch["pixel_values_videos"][0, :, :, 32:] == 0).all()
    assert [m.shape for m in batch["mask_labels"]] == [(len(c["masks"]), 3, 64, 64) for c in (small, large)]
    assert torch.equal(batch["mask_labels"][1][..., :32], large["masks"])
    assert not batch["mask_labels"][0][:, 2].any() and not batch["mask_labels"][1][..., 32:].any()
    assert batch["annotated_frames"].tolist() == [[True, True, False], [True, True, True]]
    assert batch["ignore_masks"][0, 2].all() and batch["ignore_masks"][0, :, 32:].all()
    assert torch.equal(batch["ignore_masks"][1, :, :, :32], large["ignore_mask"])
    assert batch["detect"] == [not c["first_frame_given"] for c in (small, large)]
    assert batch["class_sets"] == [c["label_set"] for c in (small, large)]
    assert batch["exhaustive"] == [c["exhaustive"] for c in (small, large)]
    assert all(torch.equal(labels, c["class_labels"]) for labels, c in zip(batch["class_labels"], (small, large)))
    with pytest.raises(ValueError, match="clips is empty"):
        ClipCollator()([])


def test_nano_mixture_reads_what_prepare_writes(tmp_path):
    """The layout alone; how prepare writes it is tested beside it."""
    names = [
        "ecssd",
        "duts",
        "sod",
        "coco_mini",
        "cats",
        "fashion",
        "balloon",
        "coco_mval",
        "pennfudan",
        "people",
        "street",
    ]
    for name in names:
        folder = tmp_path / "stills" / name
        (folder / "images").mkdir(parents=True)
        instances = {str(number): {"1": "cat"} for number in range(10)}
        for stem in instances:
            Image.fromarray(np.full((HEIGHT, WIDTH, 3), 90, dtype=np.uint8)).save(folder / "images" / f"{stem}.webp")
            write_mask(folder / "masks" / f"{stem}.png", index_mask(0, [1]))
        meta = {"name": name, "exhaustive": name == "cats", "instances": instances}
        (folder / "meta.json").write_text(json.dumps(meta))
    write_frames(tmp_path / "davis" / "JPEGImages" / "480p" / "bear", ["00000", "00001"], ".jpg")
    for t in range(2):
        write_mask(tmp_path / "davis" / "Annotations" / "480p" / "bear" / f"0000{t}.png", index_mask(t, [1]))
    (tmp_path / "davis" / "ImageSets" / "2016").mkdir(parents=True)
    (tmp_path / "davis" / "ImageSets" / "2016" / "train.txt").write_text("bear\n")
    mixture = nano_mixture(str(tmp_path), 2, (32, 32), seed=5)
    assert mixture.weights[0] == pytest.approx(0.6 / 1.27)
    items = [mixture[i] for i in range(40)]
    assert all(len(item["masks"]) for item in items)
    assert {item["exhaustive"] for item in items} == {True, False}  # the cats are all there; of the rest nobody knows
    davis, *photographs = mixture.sources
    assert all(len(source.clips) == 9 for source in photographs)  # a tenth is left out
    prompts_only = [
        source.clips[0]["video_id"]
        for source in photographs
        if ClipMixture([replace(source, paste=0.0)], [1], 1, (32, 32))[0]["first_frame_given"]
    ]
    assert prompts_only == ["street/0"]
