"""Videos from end to end with a tiny network: prompts in any frame, both directions, every format, all or nothing."""

import builtins
import json
import platform
import re
import subprocess
import sys
import threading
import warnings

import av
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_tools
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from ausm_hf import AusmImageProcessor, AusmProcessor, VideoWriter, read_video, segment_video
from ausm_hf.export import JsonlWriter, to_supervision
from ausm_hf.model import identities_ausm
from ausm_hf.model.pipeline_ausm import start_session
from ausm_hf.segment import FORMATS, FrameSegments, load_model, save_segments, segment_videos


@pytest.fixture(scope="module")
def processor():
    return AusmProcessor(AusmImageProcessor(size={"shortest_edge": 64}))


@pytest.fixture
def run(tiny_model, processor):
    return lambda source, **arguments: list(segment_video(source, tiny_model, processor, **arguments))


def same(one, other):
    assert [(a.index, a.objects) for a in one] == [(b.index, b.objects) for b in other]
    assert all(np.array_equal(a.masks, b.masks) and np.array_equal(a.frame, b.frame) for a, b in zip(one, other))


def same_but_for_rounding(one, other):
    """With another number of threads torch adds in another order."""
    for a, b in zip(one, other, strict=True):
        assert a.index == b.index and np.array_equal(a.masks, b.masks) and np.array_equal(a.frame, b.frame)
        assert a.objects == [item | {"score": pytest.approx(item["score"], abs=1e-6)} for item in b.objects]


def renumbered(results, index):
    return [FrameSegments(index(r.index), r.time, r.frame, r.masks, r.objects) for r in results]


def test_frames_are_encoded_ahead(run, moving_square, encoding_threads, five_threads):
    """With several threads in another one, to the same results; not those of a stream that is still being made."""
    frames, masks = moving_square
    results = run(frames, masks=masks[2], prompt_frame=2, backward=True)
    assert len(encoding_threads) == 7 and threading.main_thread() not in encoding_threads
    torch.set_num_threads(1)
    same_but_for_rounding(results, run(frames, masks=masks[2], prompt_frame=2, backward=True))
    assert set(encoding_threads[7:]) == {threading.main_thread()}
    torch.set_num_threads(5)
    encoding_threads.clear()
    same_but_for_rounding(run(iter(list(frames)), masks=masks[0]), run(frames, masks=masks[0]))
    assert set(encoding_threads[:6]) == {threading.main_thread()}
    assert threading.main_thread() not in encoding_threads[6:]


def test_prompt_in_a_later_frame(run, moving_square):
    frames, masks = moving_square
    results = run(frames, masks=masks[2] * 3, prompt_frame=2)
    assert [r.index for r in results] == list(range(6))
    assert not any(r.masks.any() or r.objects for r in results[:2])
    assert np.array_equal(results[2].masks, masks[2] * 3)
    same(results[2:], renumbered(run(frames[2:], masks=masks[2] * 3), lambda i: i + 2))
    assert {item["id"] for r in results for item in r.objects} == {3}


def test_a_stream_of_ones_own_may_begin_in_a_later_frame(run, tiny_model, processor, moving_square):
    frames, masks = moving_square
    session = start_session(processor, frames[0].shape[:2], masks[2])
    results = run(frames, session=session, prompt_frame=2)
    same(results, run(frames, masks=masks[2], prompt_frame=2))
    assert results[2].masks.any() and session.next_frame_idx == 4
    with pytest.raises(ValueError, match="backward are given without masks or prompts"):
        run(frames, session=session, backward=True)
    other = processor.init_video_session()
    processor.add_inputs_to_inference_session(other, obj_ids=1, input_masks=masks[0].T, original_size=(64, 48))
    with pytest.raises(ValueError, match=r"session is of a video of \(64, 48\) .*this one has \(48, 64\)"):
        segment_video(frames, tiny_model, processor, session=other)


def test_a_bar_tells_of_the_part_that_goes_backward(run, moving_square, capsys):
    frames, masks = moving_square
    run(frames, masks=masks[3], prompt_frame=3, backward=True)
    assert re.search(r"back to the start: +\d+%.* \d/4 ", capsys.readouterr().err)
    disable_progress_bar()
    try:
        run(frames, masks=masks[3], prompt_frame=3, backward=True)
    finally:
        enable_progress_bar()
    assert not capsys.readouterr().err


def test_backward_is_the_video_played_backwards(run, moving_square, monkeypatch):
    monkeypatch.setattr(identities_ausm, "PRESENCE_THRESHOLD", 0.0)  # untrained, a network is not sure of anything
    frames, masks = moving_square
    results = run(frames, masks=masks[3], prompt_frame=3, backward=True)
    played_back = run(frames[3::-1], masks=masks[3])
    assert played_back[1].masks.any()
    same(results[:3], renumbered(played_back, lambda i: 3 - i)[:0:-1])
    same(results[3:], renumbered(run(frames[3:], masks=masks[3]), lambda i: i + 3))
    same(run(frames, masks=masks[0], backward=True), run(frames, masks=masks[0]))


def test_boxes_and_points(run, tiny_model, processor, moving_square):
    """They arrive at the network as its processor takes them, beside masks of other objects."""
    frames, masks = moving_square
    prompts = {"boxes": {2: [44, 2, 60, 14]}, "points": {5: [[40, 40], [2, 2]]}, "labels": {5: [1, 0]}}
    results = run(frames, masks=masks[0] * 7, prompts=prompts)
    assert {item["id"] for item in results[0].objects} <= {2, 5, 7} and np.array_equal(results[0].masks == 7, masks[0])
    for wrong, message in [
        ({"boxes": {2: [8, 12, 8, 30]}}, "input_boxes"),
        ({"points": {2: [[400, 400]]}}, "input_points"),
        ({"circles": {2: [1, 1, 1]}}, r"prompts has \['circles'\]"),
        ({"boxes": {7: [8, 12, 26, 30]}}, "which masks has too"),
    ]:
        with pytest.raises(ValueError, match=message):
            segment_video(frames, tiny_model, processor, masks=masks[0] * 7, prompts=wrong)


@pytest.mark.parametrize("thing", ["astronaut", "coffee"])
def test_a_marked_object_that_is_gone_claims_nothing_and_is_itself_again(thing):
    """With the package's checkpoint: a round piece of one picture before another, away from the sixth frame to the
    tenth."""
    from skimage import data

    thing, ground = (
        np.array(Image.fromarray(picture).resize((192, 128))) for picture in (getattr(data, thing)(), data.rocket())
    )
    y, x = np.mgrid[:128, :192]
    mask = ((y - 55) / 42) ** 2 + ((x - 92) / 46) ** 2 < 1
    shown = np.where(mask[:, :, None], thing, ground)
    frames = [np.roll(ground if 5 <= k < 10 else shown, k, axis=1) for k in range(13)]
    model, processor = load_model()
    results = list(segment_video(frames, model, processor, mask))
    for k, result in enumerate(results):
        truth, claimed = np.roll(mask, k, axis=1), result.masks == 1
        if 5 <= k < 10:
            assert not claimed.any() and result.objects == []
        elif k != 10:
            assert (truth & claimed).sum() > 0.9 * (truth | claimed).sum()


def test_new_objects_beside_prompts(run, moving_square):
    frames, masks = moving_square
    results = run(frames, masks=masks[2] * 3, prompt_frame=2, find_new_objects=True, threshold=0.0)
    ids = [{item["id"] for item in r.objects} for r in results]
    assert ids[0] and 3 not in ids[0] | ids[1] and 3 in ids[2]  # found before the prompt; then the prompt
    assert np.array_equal(results[2].masks == 3, masks[2])


def test_frames_that_cannot_be_decoded(run, moving_square, tmp_path):
    frames, masks = moving_square
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_text("not an image")
    with pytest.warns(UserWarning, match="frame 2 of"):
        results = run(tmp_path, masks=masks[0])
    left = [0, 1, 3, 4, 5]
    assert [r.index for r in results] == left
    same(results, renumbered(run(frames[left], masks=masks[0]), lambda i: left[i]))
    for find_new_objects in (None, True):
        with (
            pytest.raises(ValueError, match="frame 2 of .* has prompts; it can't be decoded, or the video ends"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            run(tmp_path, masks=masks[2], prompt_frame=2, find_new_objects=find_new_objects)
    with pytest.warns(UserWarning, match="frame 2 of"):
        results = run(tmp_path, masks=masks[3], prompt_frame=3, backward=True)
    assert [r.index for r in results] == left
    same(results[:2], renumbered(run(frames[[3, 1, 0]], masks=masks[3])[:0:-1], lambda i: 2 - i))


def test_arguments_that_do_not_fit(tiny_model, processor, moving_square):
    frames, masks = moving_square
    for arguments, message in [
        ({"prompt_frame": 1}, "given without masks or prompts"),
        ({"backward": True}, "given without masks or prompts"),
        ({"masks": masks[0], "prompt_frame": 6}, "prompt_frame is 6; the video has 6 frames"),
        ({"masks": masks[0], "prompt_frame": -1}, "prompt_frame is -1"),
        ({"masks": masks[0], "prompt_frame": "1"}, "prompt_frame is '1'; wanted is an integer"),
        ({"masks": masks[0], "backward": True, "find_new_objects": True}, "backward and find_new_objects"),
        ({"masks": masks[0], "session": processor.init_video_session()}, "beside session"),
    ]:
        with pytest.raises(ValueError, match=message):
            segment_video(frames, tiny_model, processor, **arguments)
    with pytest.raises(ValueError, match="can be read only once"):
        segment_video(iter(frames), tiny_model, processor, masks=masks[0], backward=True)
    assert len(list(segment_video(frames, tiny_model, processor, masks=masks[0], prompt_frame=np.int64(5)))) == 6
    session = processor.init_video_session()
    processor.add_inputs_to_inference_session(session, 9, 1, input_masks=masks[0] > 0, original_size=masks[0].shape)
    assert len(list(segment_video(frames, tiny_model, processor, session=session))) == 6  # its next video may have it
    for find_new_objects in (None, True):
        arguments = {"masks": masks[0], "prompt_frame": 6, "find_new_objects": find_new_objects}
        with pytest.raises(ValueError, match="prompt_frame is 6; the video has 6 frames"):
            list(segment_video(iter(frames), tiny_model, processor, **arguments))


def test_every_format(run, moving_square, tmp_path):
    frames, masks = moving_square
    results = run(frames, masks=masks[0] * 3)
    paths = save_segments(results, tmp_path / "out", FORMATS, fps=10, name="square")
    assert [p.name for p in paths] == [
        "overlay.mp4", "masks", "objects.json", "frames.jsonl", "coco.json", "youtube_vis.json",
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in paths)
    lines = [json.loads(line) for line in (tmp_path / "out/frames.jsonl").read_text().splitlines()]
    coco = json.loads((tmp_path / "out/coco.json").read_text())
    vis = json.loads((tmp_path / "out/youtube_vis.json").read_text())
    for r, line in zip(results, lines, strict=True):
        written = np.array(Image.open(tmp_path / f"out/masks/{r.index:05d}.png"))
        assert np.array_equal(written, r.masks)
        of_frame = [a["segmentation"] for a in coco["annotations"] if a["image_id"] == r.index + 1]
        of_frame += [x["segmentation"] for x in line["objects"]]
        of_frame += [a["segmentations"][r.index] for a in vis["annotations"] if a["segmentations"][r.index]]
        assert len(of_frame) == 3 * len(r.objects)
        assert all(np.array_equal(rle_tools.decode(rle), r.masks == 3) for rle in of_frame)


def test_variable_frame_rate_is_kept(run, moving_square, tmp_path):
    times = [0, 0.1, 0.15, 0.5, 0.6, 0.7]
    with VideoWriter(tmp_path / "in.mp4", fps=25, size=(48, 64)) as writer:
        for frame, time in zip(moving_square[0], times, strict=True):
            writer.write(frame, time)
    source = read_video(tmp_path / "in.mp4")
    save_segments(run(source, masks=moving_square[1][0]), tmp_path / "out", ["mp4", "jsonl"], source.fps)
    overlay = read_video(tmp_path / "out/overlay.mp4").with_times()
    assert [time for time, _ in overlay] == pytest.approx(times, abs=1e-3)
    lines = (tmp_path / "out/frames.jsonl").read_text().splitlines()
    assert [json.loads(line)["time"] for line in lines] == pytest.approx(times, abs=1e-3)


def test_time_lapse_of_ten_minutes_a_frame(run, moving_square, tmp_path):
    with VideoWriter(tmp_path / "lapse.mp4", fps=1, size=(48, 64)) as writer:
        for t, frame in enumerate(moving_square[0][:3]):
            writer.write(frame, time=600.0 * t)
    source = read_video(tmp_path / "lapse.mp4")
    assert source.fps < 0.01
    save_segments(run(source, threshold=0), tmp_path, ("mp4", "json"), source.fps)
    video = json.loads((tmp_path / "objects.json").read_text())["video"]
    assert video["times"] == pytest.approx([0, 600, 1200]) and video["fps"] == float(source.fps)
    assert [t for t, _ in read_video(tmp_path / "overlay.mp4").with_times()] == pytest.approx([0, 600, 1200])


def test_prompt_in_a_later_part_of_a_file(run, moving_square, tmp_path):
    """The header of an MP4 in fragments, as recorders write it, counts the frames of the first one."""
    options = {"movflags": "frag_keyframe"}
    with av.open(str(tmp_path / "parts.mp4"), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "2", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in moving_square[0]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    source = read_video(tmp_path / "parts.mp4")
    assert source.num_frames < 6
    results = run(source, masks=moving_square[1][5], prompt_frame=5)
    assert [r.index for r in results] == list(range(6)) and (results[5].masks == moving_square[1][5]).all()
    with pytest.raises(ValueError, match="prompt_frame is 6; the video has 6 frames"):
        run(tmp_path / "parts.mp4", masks=moving_square[1][5], prompt_frame=6)


@pytest.mark.parametrize("bad", ["write_text", "mux"])
def test_if_one_file_cannot_be_finished_none_appears(run, moving_square, tmp_path, monkeypatch, bad):
    """The disk is full just when the last file is completed."""
    results = run(moving_square[0], masks=moving_square[1][0])

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if bad == "mux":
        monkeypatch.setattr("ausm_hf.export.OverlayVideoWriter._finish", full)
    else:
        monkeypatch.setattr("ausm_hf.export.ObjectsJsonWriter._write_out", full)
    for formats in (["mp4", "png", "jsonl", "json"], ["json", "png", "jsonl", "mp4"]):
        with pytest.raises(OSError, match="No space"):
            save_segments(results, tmp_path / "out", formats)
        assert not (tmp_path / "out").exists()


def test_supervision(moving_square):
    sv = pytest.importorskip("supervision")
    masks = np.zeros((48, 64), np.int32)
    masks[10:20, 5:9], masks[30:33, 40:64] = 4, 9
    objects = [
        {"id": 9, "label": "dog", "label_id": 1, "score": 0.75},
        {"id": 4, "label": None, "label_id": -1, "score": 1.0},
    ]
    detections = to_supervision(FrameSegments(0, None, moving_square[0][0], masks, objects))
    assert detections.tracker_id.tolist() == [9, 4] and detections.class_id.tolist() == [1, -1]
    assert detections.xyxy.tolist() == [[40, 30, 63, 32], [5, 10, 8, 19]]
    assert detections.confidence.tolist() == [0.75, 1.0]
    assert detections["class_name"].tolist() == ["dog", "object"]
    assert np.array_equal(detections.mask, [masks == 9, masks == 4])
    # Its own tools take them: an annotator draws on the objects and nowhere else.
    frame = np.zeros((48, 64, 3), np.uint8)
    drawn = sv.MaskAnnotator(opacity=1.0).annotate(frame.copy(), detections)
    assert np.array_equal(drawn.any(-1), masks != 0)
    assert len(detections[detections.confidence > 0.9]) == 1
    assert len(to_supervision(FrameSegments(0, None, frame, masks * 0, []))) == 0


def test_supervision_from_a_video(run, moving_square):
    pytest.importorskip("supervision")
    results = run(moving_square[0], threshold=0.0)
    assert any(r.objects for r in results)
    for r in results:
        ids = to_supervision(r).tracker_id
        assert set([] if ids is None else ids.tolist()) == set(np.unique(r.masks)) - {0}


def test_supervision_is_missing(monkeypatch, moving_square):
    def absent(name, *args, **kwargs):
        if name == "supervision":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match="`pip install supervision`"):
        to_supervision(FrameSegments(0, None, moving_square[0][0], moving_square[1][0], []))


def test_many_videos(tiny_model, processor, moving_square, tmp_path, run):
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i, frame in enumerate(moving_square[0]):
            Image.fromarray(frame[:, :: -1 if name == "b" else 1]).save(tmp_path / "in" / name / f"{i}.png")
    (tmp_path / "in/b/3.png").write_text("not an image")
    with pytest.warns(UserWarning, match="frame 3 of"):
        lines = list(
            segment_videos([tmp_path / "in/*"], tmp_path / "out", tiny_model, processor, ["png"], threshold=0)
        )
    assert [(line["name"], line["frames"], line["skipped"]) for line in lines] == [("a", 6, 0), ("b", 5, 1)]
    for r in run(tmp_path / "in/a", threshold=0):
        assert np.array_equal(np.array(Image.open(tmp_path / f"out/a/masks/{r.index:05d}.png")), r.masks)


@pytest.mark.parametrize("wrong", [{"threshold": 30}, {"max_objects": 0}])
def test_wrong_numbers_blame_no_video(tiny_model, processor, tmp_path, wrong):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="threshold must be|at least 1"):
        segment_videos([tmp_path / "in/*"], tmp_path / "out", tiny_model, processor, ["png"], **wrong)
    assert not (tmp_path / "out").exists()


def test_many_videos_with_other_weights(tiny_model, processor, moving_square, tmp_path):
    """A checkpoint may be trained on under its name: its results are not mixed with the earlier ones."""
    for i, frame in enumerate(moving_square[0][:2]):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(frame).save(tmp_path / "in" / f"{i}.png")

    def segment():
        return list(segment_videos([tmp_path / "in"], tmp_path / "out", tiny_model, processor, ["json"]))

    assert segment() == segment()
    name, weight = next(iter(tiny_model.named_parameters()))
    before = weight.data.clone()
    try:
        weight.data *= 1.2
        with pytest.raises(ValueError, match="holds results made with model '[0-9a-f]{16}', not '"):
            segment()
    finally:
        weight.data.copy_(before)
    tiny_model.config.foreground_threshold, threshold = 0.9, tiny_model.config.foreground_threshold
    try:
        with pytest.raises(ValueError, match="made with model"):
            segment()
    finally:
        tiny_model.config.foreground_threshold = threshold
    # On another machine it may lie elsewhere.
    tiny_model.config._name_or_path, path = "elsewhere/model", tiny_model.config._name_or_path
    assert len(segment()) == 1
    tiny_model.config._name_or_path = path


def test_a_frame_too_wide_for_an_overlay_fails_alone(tiny_model, processor, moving_square, tmp_path):
    for name, frame in (("a", np.zeros((20, 16400, 3), np.uint8)), ("b", moving_square[0][0])):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.fromarray(frame).save(tmp_path / "in" / name / "0.png")
    lines = list(segment_videos([tmp_path / "in/*"], tmp_path / "out", tiny_model, processor, ["mp4"]))
    assert [line["status"] for line in lines] == ["failed", "done"]
    assert "size is (20, 16400); wanted are" in lines[0]["error"]


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch knows CUDA")
def test_a_torch_without_cuda(tiny_checkpoint):
    with pytest.raises(ValueError, match="device 'cuda' can't be used: Torch not compiled with CUDA"):
        load_model(tiny_checkpoint, device="cuda")


def test_each_process_takes_the_device_of_its_number(monkeypatch, tiny_checkpoint):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert load_model(tiny_checkpoint)[0].device.type in ("cpu", "cuda", "mps")  # one device: that one
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("meta"))
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    seen = []
    monkeypatch.setattr("torch.nn.Module.to", lambda self, device, *_, **__: seen.append(device) or self)
    load_model(tiny_checkpoint)
    assert seen[-1] == "meta:1"


def test_on_a_mac_the_cpu_is_taken_unless_its_gpu_is_asked_for(monkeypatch, tiny_checkpoint):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert load_model(tiny_checkpoint)[0].device.type == "cpu"
    with pytest.raises(ValueError, match="device 'mps' can't be used"):
        load_model(tiny_checkpoint, device="mps")


def test_a_build_for_cuda_without_a_gpu_takes_the_cpu(monkeypatch, tiny_checkpoint):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert load_model(tiny_checkpoint)[0].device.type == "cpu"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep memory by rules of their own")
def test_memory_is_kept_from_frame_to_frame(tiny_checkpoint):
    code = f"""
import resource, torch
from ausm_hf import load_model
load_model({str(tiny_checkpoint)!r}, device="cpu")
def frame():
    return [torch.ones(size * 2**18) for size in (8, 8, 15, 15)]  # MiB
for number in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    frame()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # pages of 4 KiB; all of them would be 11776


def test_a_frame_is_written_while_the_next_one_is_segmented(tmp_path, monkeypatch):
    asked = [threading.Event() for _ in range(3)]

    def results():
        for index in range(3):
            asked[index].set()
            yield FrameSegments(index, None, np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.int32), [])

    write = JsonlWriter.write

    def waits(self, index, *rest):
        assert index == 2 or asked[index + 1].wait(30), "the next frame waits for this one to be written"
        write(self, index, *rest)

    monkeypatch.setattr(JsonlWriter, "write", waits)
    save_segments(results(), tmp_path, ["jsonl"])
    lines = (tmp_path / "frames.jsonl").read_text().splitlines()
    assert [json.loads(line)["frame"] for line in lines] == [0, 1, 2]
