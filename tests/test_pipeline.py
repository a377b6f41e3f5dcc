"""`pipeline("video-segmentation")`."""

import functools
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

import ausm_hf
from ausm_hf import AusmImageProcessor, AusmProcessor, VideoSegmentationPipeline, VideoWriter
from ausm_hf.model.pipeline_ausm import read_frames


@pytest.fixture(scope="module")
def segment(tiny_checkpoint):
    return pipeline("video-segmentation", model=str(tiny_checkpoint), device="cpu")


@pytest.fixture(scope="module")
def clip(moving_square, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "square.mp4"
    with VideoWriter(path, fps=10, size=(48, 64)) as writer:
        for frame in moving_square[0]:
            writer.write(frame)
    return path


def as_arrays(results):
    return [[(x["id"], x["label"], x["score"], np.asarray(x["mask"]).tolist()) for x in frame] for frame in results]


def test_an_image_processor_that_would_be_passed_over_is_refused(tiny_checkpoint):
    small = AusmImageProcessor(size={"height": 32, "width": 32})
    with pytest.raises(ValueError, match=r"image_processor is given; wanted is processor=AusmProcessor\(image_proc"):
        pipeline("video-segmentation", model=str(tiny_checkpoint), image_processor=small)
    segment = pipeline("video-segmentation", model=str(tiny_checkpoint), processor=AusmProcessor(small))
    assert segment.preprocess(np.zeros((48, 64, 3), np.uint8))["pixel_values"].shape == (1, 3, 32, 32)


def test_same_as_the_session_by_hand(segment, moving_square):
    """The pipeline is the public streaming interface, frame by frame; nothing is added, nothing lost."""
    frames, masks = moving_square
    model, processor = segment.model, segment.processor
    session = processor.init_video_session(video=list(frames), seed=0)
    processor.add_inputs_to_inference_session(session, 0, [1], input_masks=[masks[0] == 1])
    expected = [
        processor.post_process_instance_segmentation(output, target_sizes=[(48, 64)])[0]
        for output in model.propagate_in_video_iterator(session)
    ]

    results = segment(frames, prompts={"masks": masks[0]})
    assert len(results) == len(expected) == 6
    for result, wanted in zip(results, expected):
        assert [x["id"] for x in result] == [x["id"] for x in wanted["segments_info"]]
        for item, info in zip(result, wanted["segments_info"]):
            assert item["label"] == info["label"] and item["score"] == pytest.approx(info["score"])
            assert item["mask"].mode == "L" and item["mask"].size == (64, 48)
            assert (np.asarray(item["mask"]) == 255 * (wanted["segmentation"] == item["id"]).numpy()).all()
    assert (np.asarray(results[0][0]["mask"]) == 255 * masks[0]).all()


def test_prompts_of_every_kind(segment, moving_square):
    """They are what the session is given by hand, all in the first frame."""
    frames, masks = moving_square
    model, processor = segment.model, segment.processor
    prompts = {
        "masks": masks[0] * 2,
        "boxes": {7: [1, 2, 30, 40]},
        "points": {3: [(40, 10), (50, 20)], 7: [(9, 9)]},
        "labels": {3: [1, 0]},
    }
    session = processor.init_video_session(video=list(frames), seed=0)
    processor.add_inputs_to_inference_session(session, 0, 2, input_masks=masks[0])
    boxes = {"input_boxes": [prompts["boxes"][7]]}
    processor.add_inputs_to_inference_session(session, 0, 7, **boxes, input_points=[prompts["points"][7]])
    inputs = {"input_points": [prompts["points"][3]], "input_labels": [[1, 0]]}
    processor.add_inputs_to_inference_session(session, 0, 3, **inputs)
    expected = [
        processor.post_process_instance_segmentation(output, target_sizes=[(48, 64)])[0]
        for output in model.propagate_in_video_iterator(session)
    ]
    results = segment(frames, prompts=prompts)
    for result, wanted in zip(results, expected, strict=True):
        assert [x["id"] for x in result] == [x["id"] for x in wanted["segments_info"]]
        for item in result:
            assert (np.asarray(item["mask"]) == 255 * (wanted["segmentation"] == item["id"]).numpy()).all()
    assert [x["id"] for x in results[0]] == [2, 7, 3]
    ((scribbled,), *_) = segment(frames, prompts={"scribbles": {5: [(10, 14), (20, 28)]}})
    assert scribbled["id"] == 5 and np.asarray(scribbled["mask"]).any()


def test_stream_is_lazy(segment, moving_square):
    taken = []

    def frames():
        for frame in moving_square[0]:
            taken.append(len(taken))
            yield frame

    masks = moving_square[1][0]
    results = segment(frames(), prompts={"masks": masks}, stream=True)
    assert isinstance(results, types.GeneratorType)
    next(results)
    next(results)
    assert len(taken) <= 3
    whole = segment(moving_square[0], prompts={"masks": masks})
    assert as_arrays([*results]) == as_arrays(whole[2:])


def test_frames_are_encoded_ahead(tiny_model, tiny_checkpoint, moving_square, encoding_threads, five_threads):
    """With several threads in another one, to the same results; not those of a stream that is still being made."""
    frames, masks = moving_square
    processor = AusmProcessor.from_pretrained(tiny_checkpoint)
    segment = VideoSegmentationPipeline(tiny_model, processor=processor, device="cpu")
    results = segment(frames, prompts={"masks": masks[0]})
    assert len(encoding_threads) == 6 and threading.main_thread() not in encoding_threads
    alone = segment(iter(frames), prompts={"masks": masks[0]})
    for frame, same in zip(as_arrays(alone), as_arrays(results), strict=True):  # but for rounding: fewer threads
        assert frame == [(i, label, pytest.approx(score, abs=1e-6), mask) for i, label, score, mask in same]
    assert set(encoding_threads[6:]) == {threading.main_thread()}


def test_a_source_that_can_be_read_once_is_not_read_ahead(segment, five_threads):
    taken = []

    def frames():
        for value in range(4):
            taken.append(value)
            yield np.full((48, 64, 3), 10 * value, np.uint8)

    next(segment(ausm_hf.read_video(frames()), stream=True))
    assert taken == [0]


def test_threshold(segment, moving_square):
    frames = moving_square[0]
    none, many = segment(frames, threshold=1.0), segment(frames, threshold=0.0)
    assert not any(none) and any(many)
    prompted = segment(frames, prompts={"masks": moving_square[1][0]}, threshold=1.0)
    assert all(x["id"] == 1 for frame in prompted for x in frame) and len(prompted[0]) == 1


def test_path_and_folder(segment, moving_square, clip, tmp_path):
    prompts = {"masks": moving_square[1][0]}
    for i, frame in enumerate(ausm_hf.read_video(clip)):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    from_folder = as_arrays(segment(tmp_path, prompts=prompts))
    assert len(from_folder) == 6
    assert as_arrays(segment(str(clip), prompts=prompts)) == from_folder
    assert as_arrays(segment(iter(ausm_hf.read_video(clip)), prompts=prompts)) == from_folder


def test_own_reader_without_the_package(moving_square, clip, tmp_path):
    """What a checkpoint's own code reads where the package isn't installed."""
    frames = [np.asarray(frame) for frame in read_frames(str(clip))]
    assert all((a == b).all() for a, b in zip(frames, ausm_hf.read_video(clip), strict=True))
    Image.fromarray(frames[1]).save(tmp_path / "b.png")
    Image.fromarray(frames[0]).save(tmp_path / "a.png")
    assert all((np.asarray(a) == b).all() for a, b in zip(read_frames(tmp_path), frames[:2], strict=True))
    shots = tmp_path / "shots"
    shots.mkdir()
    for number in (1, 2, 10):
        Image.new("L", (8, 4), number).save(shots / f"{number}.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the phone upright
    Image.new("RGB", (16, 8)).save(shots / "a.jpg", exif=exif)
    (shots / "._a.jpg").write_bytes(b"of another system")
    *numbered, photograph = read_frames(shots)
    assert [frame.getpixel((0, 0)) for frame in numbered] == [1, 2, 10] and photograph.size == (8, 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no images"):
        read_frames(tmp_path / "empty")
    with pytest.raises(ValueError, match="no such file"):
        read_frames("missing.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    with pytest.raises(ValueError, match="can't be decoded"):
        list(read_frames(tmp_path / "broken.mp4"))
    (tmp_path / "cut.mp4").write_bytes(Path(clip).read_bytes()[:400])  # no codec is named in so little of it
    with pytest.raises(ValueError, match="can't be decoded: its codec is unknown"):
        list(read_frames(tmp_path / "cut.mp4"))
    with pytest.raises(ValueError, match="wanted is a path or an iterable"):
        read_frames(3)


@pytest.mark.parametrize(
    "prompts, message",
    [
        ({"box": {1: [1, 2, 3, 4]}}, r"prompts must be a dict with keys of \['boxes', 'labels', 'masks'"),
        ({}, "prompts must mark an object; to let objects be found give None"),
        ({"boxes": {}, "masks": None}, "prompts must mark an object"),
        ({"boxes": np.array([[1, 2, 30, 40]])}, r"boxes is array.*; wanted is a dict from object id to its boxes"),
        ({"boxes": [1, 2, 3, 4]}, r"boxes is \[1, 2, 3, 4\]; wanted is a dict from object id to its boxes"),
        ({"masks": np.eye(48, 64, dtype=np.uint8), "boxes": {1: [1, 2, 3, 4]}}, "object 1, which masks has too"),
        ({"boxes": {1: [5, 2, 3, 4]}}, "input_boxes must be"),
        ({"points": {1: [70, 4]}}, "input_points must lie within the frame"),
        ({"labels": {1: [1]}}, "got 1 labels and 0 points for object 1"),
        ({"points": {0: [7, 4]}}, "positive integers"),
        ({"masks": np.zeros((48, 64), np.uint8)}, "masks is empty"),
        ({"masks": np.ones((64, 48), np.uint8)}, "wanted is the size of the video"),
        ({"masks": np.ones((48, 64), np.float32)}, "wanted are integers"),
        ({"masks": np.ones((48, 64, 3), np.uint8)}, "wanted are integers of shape"),
        ({"masks": {1: np.eye(48, 64, dtype=np.uint8)}}, "masks is a dict .* pixel = object id"),
        ({"masks": Image.new("RGB", (64, 48), "red")}, "wanted is an indexed or grey one"),
        ({"masks": np.full((48, 64), -1)}, "positive integers"),
        ({"masks": np.arange(48 * 64).reshape(48, 64) % 6}, "at most 4, the number of ID vectors"),
    ],
)
def test_wrong_prompts(segment, moving_square, prompts, message):
    with pytest.raises(ValueError, match=message):
        segment(moving_square[0], prompts=prompts)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ("missing.mp4", "no such file"),
        ([], "no frames"),
        ([np.zeros((48, 64, 3), np.uint8), np.zeros((64, 48, 3), np.uint8)], "of one size"),
        (7, "wanted is a path"),
        ([np.zeros((48, 64, 3), np.int64)], "dtype int64"),
    ],
)
def test_wrong_inputs(segment, inputs, message):
    with pytest.raises(ValueError, match=message):
        segment(inputs)
    with pytest.raises(ValueError, match=message):
        list(segment(inputs, stream=True))


def test_frames_that_change_size_without_the_package(tiny_model):
    class Plain(VideoSegmentationPipeline):
        read_video = staticmethod(read_frames)

    segment = Plain(tiny_model, processor=AusmProcessor(AusmImageProcessor(size={"height": 32, "width": 32})))
    with pytest.raises(ValueError, match=r"frame of \(40, 64\) \(height, width\) after frames of \(48, 64\)"):
        segment([np.zeros((48, 64, 3), np.uint8), np.zeros((40, 64, 3), np.uint8)])


def test_made_with_arguments(tiny_checkpoint, segment, moving_square):
    made = functools.partial(pipeline, "video-segmentation", model=str(tiny_checkpoint), device="cpu")
    least = made(threshold=0.0, stream=True)
    results = least(moving_square[0])
    assert isinstance(results, types.GeneratorType)
    wanted = segment(moving_square[0], threshold=0.0)
    assert as_arrays(results) == as_arrays(wanted) and wanted[0]
    assert least(moving_square[0], threshold=1.0, stream=False) == [[]] * 6
    for wrong in ("batch_size", "num_workers"):
        with pytest.raises(ValueError, match=f"{wrong} is given; frames of a video follow each other"):
            made(**{wrong: 2})
    with pytest.raises(ValueError, match="unknown arguments .'mask_threshold'.; wanted are threshold and stream"):
        made(mask_threshold=0.5)


def test_unknown_argument(segment, moving_square):
    with pytest.raises(TypeError, match="mask_threshold"):
        segment(moving_square[0], mask_threshold=0.5)


@pytest.mark.parametrize(
    "shape", [(48, 64), (48, 64, 1), (48, 64, 4), (1, 1, 3)], ids=["grey", "grey1", "rgba", "dot"]
)
def test_odd_frames_are_frames(segment, shape):
    masks = np.ones(shape[:2], np.uint8)
    ((item,),) = segment([np.full(shape, 128, np.uint8)], prompts={"masks": masks})
    assert (np.asarray(item["mask"]) == 255 * masks).all()


def test_another_model_is_refused(tiny_model):
    with pytest.raises(ValueError, match="wanted is AusmProcessor"):
        VideoSegmentationPipeline(tiny_model, device="cpu")
    other = torch.nn.Linear(1, 1)
    other.config, other.device = types.SimpleNamespace(model_type="bert"), torch.device("cpu")
    with pytest.raises(ValueError, match="model is of type 'bert'"):
        VideoSegmentationPipeline(other, processor=AusmProcessor(AusmImageProcessor()), device="cpu")


def test_save_and_load(segment, moving_square, tmp_path):
    segment.save_pretrained(tmp_path / "again")
    again = pipeline("video-segmentation", model=str(tmp_path / "again"), device="cpu")
    frames, masks = moving_square
    prompts = {"masks": masks[0]}
    assert as_arrays(again(frames, prompts=prompts)) == as_arrays(segment(frames, prompts=prompts))
    assert "checkpoints" not in (tmp_path / "again" / "config.json").read_text()  # no path of this machine
    assert (tmp_path / "again" / "processor_config.json").is_file()


def test_default_is_the_bundled_checkpoint(tiny_checkpoint, monkeypatch, moving_square):
    from transformers.pipelines import PIPELINE_REGISTRY

    from ausm_hf._register import BUNDLED_CHECKPOINT

    task = PIPELINE_REGISTRY.check_task("video-segmentation")[1]
    assert task["default"]["model"][0] == str(BUNDLED_CHECKPOINT)
    monkeypatch.setitem(task["default"], "model", (str(tiny_checkpoint), "main"))
    segment = pipeline("video-segmentation", device="cpu")
    assert len(segment(moving_square[0])) == 6
