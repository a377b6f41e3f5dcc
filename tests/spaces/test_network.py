"""Runs of the model: what is written is what the library gives; they can be stopped, and show one object alone."""

import base64
import inspect
import io
import json
import pickle
import runpy
import shutil
import sys
import zipfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from films import film, tones_in
from PIL import Image
from pycocotools import mask as rle_tools

from ausm_hf import AusmForUniversalSegmentation, AusmProcessor, load_model, read_video, segment_video
from ausm_hf.demo.clips import unpack_clip
from ausm_hf.demo.network import Network, News, Result, Stopped, show_alone
from ausm_hf.demo.unpack import Limits, Refused
from ausm_hf.model.prompts_ausm import ObjectPrompt
from ausm_hf.segment import FollowedBack, FrameSegments


@pytest.fixture
def network(tiny_checkpoint):
    return Network(*load_model(tiny_checkpoint, device="cpu"))


@pytest.fixture
def clip(clip_file, tmp_path):
    *_, clip = unpack_clip(clip_file, tmp_path / "clip", Limits())
    return clip


def test_files_of_a_followed_object(network, clip, moving_square, tmp_path):
    (tmp_path / "run").mkdir()
    mask = moving_square[1][0] == 1
    *news, result = network.run(clip, tmp_path / "run", masks={0: {3: mask}}, names={3: "my dog"})
    assert isinstance(result, Result) and all(isinstance(item, News) for item in news)
    assert news[-1].done == news[-1].total == 6
    pictures = [picture for item in news for picture in item.pictures]
    assert len(pictures) == 6 and all(picture.startswith("data:image/jpeg;base64,") for picture in pictures)

    # The library, asked the same
    session = network.processor.init_video_session(find_new_objects=False, seed=0)
    network.processor.add_inputs_to_inference_session(session, 0, [3], input_masks=[mask], original_size=(48, 64))
    wanted = [r.masks for r in segment_video(list(clip), network.model, network.processor, session=session)]
    for index, ids in enumerate(wanted):
        np.testing.assert_array_equal(result.mask(index), ids)
    np.testing.assert_array_equal(result.mask(0) == 3, mask)

    with zipfile.ZipFile(tmp_path / "run" / "masks.zip") as archive:
        assert archive.namelist() == [f"masks/{i:05d}.png" for i in range(6)]
        with archive.open("masks/00000.png") as file:
            np.testing.assert_array_equal(np.array(Image.open(file)) == 3, mask)
    coco = json.loads((tmp_path / "run" / "coco.json").read_text())
    assert coco["categories"] == [{"id": 1, "name": "my dog"}]
    first = next(item for item in coco["annotations"] if item["image_id"] == 1)
    np.testing.assert_array_equal(rle_tools.decode(first["segmentation"]) == 1, mask)
    data = json.loads((tmp_path / "run" / "youtube_vis.json").read_text())
    assert data["categories"] == coco["categories"] and data["videos"][0]["length"] == 6
    (track,) = data["annotations"]
    np.testing.assert_array_equal(rle_tools.decode(track["segmentations"][0]) == 1, mask)
    video = read_video(tmp_path / "run" / "overlay.mp4")
    assert (video.size, len(list(video))) == ((48, 64), 6)
    assert len(result.key_frames()) == 6

    (row,) = result.objects
    assert (row["id"], row["label"]) == (3, "my dog")
    assert row["areas"] == pytest.approx([(ids == 3).mean() for ids in wanted])
    assert row["frames"] == sum((ids == 3).any() for ids in wanted)


@pytest.mark.parametrize("names", [{3: "my dog", 4: "hers"}, {3: "my dog"}, {}])
@pytest.mark.parametrize("first", [0, 3])
def test_scores_are_of_labels_only_where_labels_are_read(tiny_checkpoint, clip, moving_square, tmp_path, names, first):
    """Who calls an object something asks whether it is there, not whether it is a cat."""
    label_sets = {"pets": ["cat", "dog"], "object": ["object"]}
    model = AusmForUniversalSegmentation.from_pretrained(tiny_checkpoint, label_sets=label_sets)
    torch.nn.init.normal_(model.class_heads["object"].weight, std=3.0)
    network = Network(model, AusmProcessor.from_pretrained(tiny_checkpoint))
    (tmp_path / "run").mkdir()
    square = moving_square[1][0] == 1
    marked = {3: square, 4: ~square}
    *_, result = network.run(clip, tmp_path / "run", masks={first: marked}, names=names, backward=True)
    assert [row["label"] for row in result.objects if row["id"] in names] == list(names.values())

    def scores(label_set: str, frames: list) -> dict[int, list[float]]:
        """With the single label "object" a score is how sure it is that something is there."""
        session = network.processor.init_video_session(find_new_objects=False, label_set=label_set, seed=0)
        network.processor.add_inputs_to_inference_session(
            session, 0, [3, 4], input_masks=list(marked.values()), original_size=(48, 64)
        )
        followed = list(segment_video(frames, network.model, network.processor, session=session))
        return {x: [[item["score"] for item in r.objects if item["id"] == x] for r in followed] for x in marked}

    frames = list(clip)
    for row in result.objects:
        label_set = "object" if row["id"] in names else "pets"
        back = scores(label_set, frames[first::-1])[row["id"]][1:] if first else []
        forth = scores(label_set, frames[first:])[row["id"]]
        assert row["score"] == pytest.approx(np.mean(sum([*back, *forth], [])))


def test_what_is_marked_in_a_later_frame_is_followed_back_too(network, clip, moving_square, tmp_path, monkeypatch):
    monkeypatch.setattr("ausm_hf.demo.network.SECONDS_BETWEEN_NEWS", 0)
    mask = moving_square[1][3] == 1
    results = {}
    for backward in (True, False):
        folder = tmp_path / str(backward)
        folder.mkdir()
        *news, results[backward] = network.run(clip, folder, masks={3: {2: mask}}, backward=backward)
        parts = [(item.done, item.total, item.to_come) for item in news]
        assert parts[:-7] == ([(1, 3, 6), (2, 3, 6), (3, 3, 6)] if backward else [])
        assert parts[-7:] == [(done, 6, 0) for done in (1, 2, 3, 4, 5, 6, 6)]
        assert sum(len(item.pictures) for item in news) == 6
    # The library, asked the same
    video, model, processor = list(clip), network.model, network.processor
    wanted = list(segment_video(video, model, processor, mask * 2, prompt_frame=3, backward=True))
    assert any((frame.masks == 2).any() for frame in wanted[:3])
    for index, frame in enumerate(wanted):
        np.testing.assert_array_equal(results[True].mask(index), frame.masks)
        np.testing.assert_array_equal(results[False].mask(index), frame.masks if index >= 3 else 0)
    for backward, (row,) in ((backward, result.objects) for backward, result in results.items()):
        seen = [frame for frame in wanted[0 if backward else 3 :] if frame.objects]
        assert row["frames"] == len(seen)
        assert row["score"] == pytest.approx(np.mean([frame.objects[0]["score"] for frame in seen]))


def test_objects_go_back_from_where_each_is_first_marked(network, clip, tmp_path, monkeypatch):
    everywhere, streams = np.ones((48, 64), bool), []
    left, right = everywhere & (np.arange(64) < 32), everywhere & (np.arange(64) >= 32)

    def results(frames, *_, session, prompt_frame=0, **__):
        frames = list(frames)
        streams.append((frames[prompt_frame:], {index: sorted(prompts) for index, prompts in session.prompts.items()}))
        backward = len(streams) == 1
        # Backward everything is one of two objects; forward the left half is the one, and nothing else any.
        ids = np.where(left, 1, 2 if backward else 0).astype(np.int32)
        objects = [{"id": 1, "label": "cat", "score": 0.9}, {"id": 2, "label": "dog", "score": 0.8}]
        for index, frame in enumerate(frames):
            if index < prompt_frame:
                yield FrameSegments(index, None, frame, 0 * ids, [])
            else:
                yield FrameSegments(index, None, frame, ids, objects if backward else objects[:1])

    monkeypatch.setattr("ausm_hf.demo.network.segment_video", results)
    (tmp_path / "run").mkdir()
    masks = {2: {1: left}, 4: {1: left, 2: right}, 5: {2: right}}
    *_, result = network.run(clip, tmp_path / "run", masks=masks, backward=True)
    (backward, back), (forward, forth) = streams
    assert (back, forth) == ({0: [1, 2], 2: [1]}, {0: [1], 2: [1, 2], 3: [2]})
    np.testing.assert_array_equal(backward, [clip.frame(index) for index in (4, 3, 2, 1, 0)])
    np.testing.assert_array_equal(forward, [clip.frame(index) for index in (2, 3, 4, 5)])
    for index in range(6):
        np.testing.assert_array_equal(result.mask(index) == 1, left)
        np.testing.assert_array_equal(result.mask(index) == 2, right if index < 4 else ~everywhere)
    assert [(row["id"], row["frames"]) for row in result.objects] == [(1, 6), (2, 4)]


def test_who_is_away_is_told_once_it_is_known(network, clip, tmp_path, monkeypatch):
    """Forward of the frames after its first mark, backward of those before its last one."""
    streams = []

    def results(frames, *_, session, prompt_frame=0, **__):
        told = {i: {x: bool(prompt.mask.any()) for x, prompt in of.items()} for i, of in session.prompts.items()}
        streams.append((prompt_frame, told))
        return iter([])

    monkeypatch.setattr("ausm_hf.demo.network.segment_video", results)
    monkeypatch.setattr("ausm_hf.demo.network._pack", lambda folder: [])
    here = np.ones((48, 64), bool)
    masks = {0: {1: ~here}, 2: {1: here}, 3: {1: ~here, 2: ~here}, 4: {2: here}, 5: {2: ~here}}
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="no frame"):  # as none came
        list(network.run(clip, tmp_path / "run", masks=masks, backward=True))
    assert streams == [
        (0, {0: {2: True}, 1: {2: False}, 2: {1: True}, 4: {1: False}}),
        (2, {0: {1: True}, 1: {1: False}, 2: {2: True}, 3: {2: False}}),
    ]


def test_what_goes_forward_has_its_pixels_before_what_goes_back(network, clip, tmp_path, monkeypatch):
    def results(frames, *_, session, prompt_frame=0, **__):
        object_id = 2 if len(session.prompts[0]) == 2 else 1
        for index, frame in enumerate(frames):
            if index < prompt_frame:
                yield FrameSegments(index, None, frame, np.zeros(frame.shape[:2], np.int32), [])
                continue
            ids = np.full(frame.shape[:2], object_id, np.int32)
            yield FrameSegments(index, None, frame, ids, [{"id": object_id, "label": "cat", "score": 0.9}])

    monkeypatch.setattr("ausm_hf.demo.network.segment_video", results)
    (tmp_path / "run").mkdir()
    mask = np.ones((48, 64), bool)
    *_, result = network.run(clip, tmp_path / "run", masks={1: {1: mask}, 3: {1: mask, 2: mask}}, backward=True)
    assert [int(ids) for index in range(6) for ids in np.unique(result.mask(index))] == [2, 1, 1, 1, 1, 1]
    assert [(row["id"], row["frames"]) for row in result.objects] == [(1, 5), (2, 1)]

    one = FrameSegments(0, None, clip.frame(0), mask.astype(np.int32), [{"id": 1, "label": "cat", "score": 0.9}])
    earlier = FollowedBack()
    earlier.keep(0, 2 * one.masks, [{"id": 2, "label": "dog", "score": 0.8}])
    assert earlier.add_to(one).objects == one.objects  # as nothing is to be seen of the other


def test_the_table_says_what_the_files_say(network, clip, tmp_path, monkeypatch):
    def results(frames, *_, **__):
        for index, frame in enumerate(frames):
            found = {"id": 1, "label": "cat", "score": 0.3} if index > 3 else {"id": 1, "label": "dog", "score": 0.9}
            yield FrameSegments(index, None, frame, np.ones(frame.shape[:2], np.int32), [found])

    monkeypatch.setattr("ausm_hf.demo.network.segment_video", results)
    (tmp_path / "run").mkdir()
    *_, result = network.run(clip, tmp_path / "run")
    (row,) = result.objects
    (written,) = json.loads((tmp_path / "run" / "objects.json").read_text())["objects"]
    assert row["label"] == written["label"] == "dog" and row["score"] == written["score"] == pytest.approx(0.7)
    assert (row["frames"], row["areas"]) == (6, [1.0] * 6)


def test_found_objects_take_threshold_number_and_label_set(network, tiny_config, clip, tmp_path):
    torch.manual_seed(1)  # of random networks, one that finds several objects
    network.model.load_state_dict(AusmForUniversalSegmentation(tiny_config).state_dict())

    def found(name, **how):
        (tmp_path / name).mkdir()
        *_, result = network.run(clip, tmp_path / name, label_set="pets", **how)
        return [result.mask(i) for i in range(6)], result

    many, result = found("many", threshold=0.01)
    few, _ = found("few", threshold=0.01, max_objects=1)
    none, empty = found("none", threshold=0.999)
    assert max(len(np.unique(ids)) for ids in many) > 2 >= max(len(np.unique(ids)) for ids in few)
    assert not np.any(none) and empty.objects == []
    assert {item["label"] for item in result.objects} <= {"cat", "dog"}


def test_labels_can_be_left_out_of_the_video_alone(network, clip, tmp_path):
    videos = []
    for show in (True, False):
        (tmp_path / str(show)).mkdir()
        *_, result = network.run(clip, tmp_path / str(show), threshold=0.01, show_labels=show)
        videos.append(np.stack(list(read_video(result.folder / "overlay.mp4"))))
        assert all(item["label"] for item in result.objects)
    assert (videos[0] != videos[1]).any()


def test_a_run_stops_before_its_next_frame_and_leaves_nothing(network, clip, moving_square, tmp_path, monkeypatch):
    monkeypatch.setattr("ausm_hf.demo.network.SECONDS_BETWEEN_NEWS", 0)
    folder = tmp_path / "run"
    folder.mkdir()
    run = network.run(clip, folder, masks={0: {1: moving_square[1][0] == 1}})
    assert next(run).done == 1
    (folder / "stop").touch()
    with pytest.raises(Stopped):
        next(run)
    assert {path.name for path in folder.iterdir()} == {"stop", "key"}

    other = tmp_path / "back"
    other.mkdir()
    run = network.run(clip, other, masks={4: {1: moving_square[1][4] == 1}}, backward=True)
    assert (news := next(run)).done == 1 and news.to_come == 6 and news.seconds_left == pytest.approx(9 / news.fps)
    shutil.rmtree(other)
    with pytest.raises(Stopped):
        next(run)


def test_videos_have_the_sound_of_the_clip(network, tmp_path):
    *_, clip = unpack_clip(film(tmp_path / "in.mp4", seconds=1), tmp_path / "clip", Limits())
    (tmp_path / "run").mkdir()
    *_, result = network.run(clip, tmp_path / "run", masks={0: {1: np.ones(clip.size, bool)}})
    for path in (tmp_path / "run" / "overlay.mp4", show_alone(clip, result, 1)[0]):
        np.testing.assert_allclose(tones_in(path), [[0, 0.5]], atol=0.003)


def test_an_object_alone(network, clip, moving_square, tmp_path):
    (tmp_path / "run").mkdir()
    mask = moving_square[1][0] == 1
    *_, result = network.run(clip, tmp_path / "run", masks={0: {1: mask}})
    path, key_frames = show_alone(clip, result, 1)
    first = next(iter(read_video(path)))
    assert first[~mask].max() < 40 and np.abs(first[mask].astype(int) - clip.frame(0)[mask]).mean() < 12
    assert len(key_frames) == 6
    written = path.stat().st_mtime_ns
    assert show_alone(clip, result, 1)[0].stat().st_mtime_ns == written


def test_prompts_become_masks_of_the_frames_size(network, clip, monkeypatch):
    prompts = [ObjectPrompt(box=(10, 10, 20, 20)), ObjectPrompt(points=((30, 30), (60, 40)), labels=(1, 0))]
    known = np.zeros((48, 64), bool)
    known[25:45, 25:64] = True
    masks = network.refine(clip.frame(0), prompts, [None, known])
    assert [(mask.shape, mask.dtype) for mask in masks] == [((48, 64), np.dtype(bool))] * 2
    assert isinstance(network.processor, AusmProcessor)
    monkeypatch.setattr(
        "ausm_hf.demo.network.refine_signals",
        lambda model, frame, signals, prompts: [s & p.reach((48, 64)) for s, p in zip(signals, prompts)],
    )
    monkeypatch.setattr(
        "ausm_hf.demo.network.signal_of_marks",
        lambda model, frame, prompt, size, known: known if known is not None else torch.ones(size) > 0,
    )
    masks = network.refine(clip.frame(0), prompts, [None, known])
    assert (masks[0] == prompts[0].reach((48, 64)).numpy()).all() and (masks[1] == known).all()


def test_the_decorator_for_lent_gpus_wraps_what_uses_the_model(tiny_checkpoint, clip):
    called = []

    def lend(function):
        def lent(*args, **kwargs):
            called.append(function.__name__)
            return function(*args, **kwargs)

        return lent

    network = Network(*load_model(tiny_checkpoint, device="cpu"), lend)
    network.refine(clip.frame(0), [], [])
    (clip.folder / "run").mkdir()
    next(network.run(clip, clip.folder / "run"))
    assert called == ["_refine", "_run"]


def lend_as_zero_gpu(function):
    """In place of `spaces.GPU`: what a generator yields comes from another process, of its errors only their names."""

    def lent(*args, **kwargs):
        arguments = pickle.loads(pickle.dumps((args, kwargs)))
        try:
            for item in function(*arguments[0], **arguments[1]):
                yield pickle.loads(pickle.dumps(item))
        except Exception as error:
            raise RuntimeError(f"ZeroGPU worker error: {type(error).__name__}") from None

    return lent if inspect.isgeneratorfunction(function) else function


@pytest.mark.parametrize("wanted", [Stopped, Refused, FileNotFoundError])
def test_errors_come_back_from_lent_gpus_as_they_are(tiny_checkpoint, clip, tmp_path, monkeypatch, wanted):
    monkeypatch.setattr("ausm_hf.demo.network.SECONDS_BETWEEN_NEWS", 0)
    network = Network(*load_model(tiny_checkpoint, device="cpu"), lend_as_zero_gpu)
    folder = tmp_path / "run"
    folder.mkdir()
    run = network.run(clip, folder, threshold=0.5)
    assert next(run).done == 1
    if wanted is Stopped:
        (folder / "stop").touch()
    else:
        shutil.rmtree(clip.folder if wanted is Refused else folder / "key")
    with pytest.raises(wanted, match="no longer here" if wanted is Refused else None):
        list(run)


@pytest.mark.parametrize("num_frames, seconds", [(None, 30), (48, 34), (900, 120), (9000, 120)])
def test_the_space_asks_for_a_gpu_as_long_as_a_clip_may_take(clip, monkeypatch, num_frames, seconds):
    asked, launched = {}, {}
    spaces = SimpleNamespace(GPU=lambda **how: asked.update(how) or (lambda function: function))
    monkeypatch.setitem(sys.modules, "spaces", spaces)
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    monkeypatch.setattr("ausm_hf.demo.launch.launch", lambda **how: launched.update(how))
    runpy.run_path(str(Path(__file__).parents[2] / "spaces" / "app.py"))
    assert launched["webcam"] is False and launched["on_gpu"](len) is len
    if num_frames is None:
        assert asked["duration"](clip.frame(0), [], []) == seconds
    else:
        clip = replace(clip, num_frames=num_frames)
        assert asked["duration"](clip, clip.folder, threshold=0.5) == seconds
        masks = {0: {}, 40: {}}
        assert asked["duration"](clip, clip.folder, masks=masks, backward=False) == seconds
        assert asked["duration"](clip, clip.folder, masks=masks, backward=True) == min(120, seconds + 4)


def test_pixels_that_are_no_squares_are_shown_as_they_are_meant(network, clip, moving_square, tmp_path):
    clip = replace(clip, pixel_aspect=Fraction(4, 3))
    (tmp_path / "run").mkdir()
    *news, result = network.run(clip, tmp_path / "run", masks={0: {1: moving_square[1][0] == 1}})
    alone, key_frames = show_alone(clip, result, 1)
    for path in (result.folder / "overlay.mp4", alone):
        assert (read_video(path).size, read_video(path).pixel_aspect) == ((48, 64), Fraction(4, 3))
    for path in (*result.key_frames(), *key_frames):
        with Image.open(path) as picture:
            assert picture.size == (64, 36)
    live = base64.b64decode([picture for one in news for picture in one.pictures][-1].split(",")[1])
    assert Image.open(io.BytesIO(live)).size == (64, 36)
    assert result.mask(0).shape == (48, 64)
