"""`ausm`: what it writes, and how it refuses."""

import http.server
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import unittest.mock
import warnings
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_tools
from tiny_backbones import TINY_SWIN

import ausm_hf
from ausm_hf import VideoWriter, read_video
from ausm_hf.cli import _until_interrupted, main, parse_prompts


@pytest.fixture(scope="module")
def clip(moving_square, tmp_path_factory):
    """A video file, and the mask of its first frame: object 3."""
    folder = tmp_path_factory.mktemp("clip")
    with VideoWriter(folder / "square.mp4", fps=10, size=(48, 64)) as writer:
        for frame in moving_square[0]:
            writer.write(frame)
    Image.fromarray(moving_square[1][0] * 3).save(folder / "first.png")
    return folder / "square.mp4", folder / "first.png"


def ausm(*arguments):
    main([str(x) for x in arguments])


def test_segment_prompted(clip, tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    ausm("segment", clip[0], "--masks", clip[1], "--model", tiny_checkpoint, "--output", out)
    assert capsys.readouterr().out.split() == [str(out / name) for name in ("overlay.mp4", "masks", "objects.json")]
    assert sorted(p.name for p in out.iterdir()) == ["masks", "objects.json", "overlay.mp4"]

    overlay = read_video(out / "overlay.mp4")
    assert overlay.size == (48, 64) and overlay.fps == 10 and len(list(overlay)) == 6
    written = [np.array(Image.open(out / "masks" / f"{i:05d}.png")) for i in range(6)]
    assert len(list((out / "masks").iterdir())) == 6
    assert (written[0] == np.array(Image.open(clip[1]))).all()  # the prompt comes back as it was given
    assert all(mask.shape == (48, 64) and set(np.unique(mask)) <= {0, 3} for mask in written)

    content = json.loads((out / "objects.json").read_text())
    assert content["video"]["name"] == "square" and content["video"]["num_frames"] == 6
    (tracked,) = content["objects"]
    assert tracked["id"] == 3 and tracked["label"] in ("cat", "dog") and 0 <= tracked["score"] <= 1
    seen = [i for i, mask in enumerate(written) if (mask == 3).any()]
    assert (tracked["first_frame"], tracked["last_frame"]) == (seen[0], seen[-1])
    for i in seen:
        assert (rle_tools.decode(tracked["segmentations"][str(i)]) == (written[i] == 3)).all()


def test_pixels_that_are_not_square_stay_so(moving_square, tiny_checkpoint, tmp_path):
    for name in ("a", "b"):
        with VideoWriter(tmp_path / f"{name}.mp4", fps=10, size=(48, 64), pixel_aspect=Fraction(4, 3)) as writer:
            writer.write(moving_square[0][0])
    options = ["--model", tiny_checkpoint, "--formats", "mp4", "--output", tmp_path / "out"]
    ausm("segment", tmp_path / "a.mp4", *options)
    ausm("segment", tmp_path / "*.mp4", *options)
    for place in ("out", "out/a"):
        assert read_video(tmp_path / place / "overlay.mp4").pixel_aspect == Fraction(4, 3)


def test_segment_unprompted_and_formats(clip, tiny_checkpoint, tmp_path):
    ausm("segment", clip[0], "--model", tiny_checkpoint, "--output", tmp_path, "--formats", "json", "--threshold", 0)
    assert [p.name for p in tmp_path.iterdir()] == ["objects.json"]
    assert json.loads((tmp_path / "objects.json").read_text())["objects"]
    ausm("segment", clip[0], "--model", tiny_checkpoint, "--output", tmp_path, "--formats", "json", "--threshold", 1)
    assert not json.loads((tmp_path / "objects.json").read_text())["objects"]


def test_twice_the_same(clip, tiny_checkpoint, tmp_path):
    for name in ("a", "b"):
        ausm("segment", clip[0], "--model", tiny_checkpoint, "--output", tmp_path / name, "--threshold", 0)
    assert_same(tmp_path / "a", tmp_path / "b")


def test_segment_folder_keeps_size_and_odd_frames(tiny_checkpoint, tmp_path):
    """A folder of one grey, odd-sized frame is a video too."""
    (tmp_path / "in").mkdir()
    Image.new("L", (33, 17), 90).save(tmp_path / "in" / "0.png")
    ausm("segment", tmp_path / "in", "--model", tiny_checkpoint, "--output", tmp_path / "out", "--formats", "png,mp4")
    assert Image.open(tmp_path / "out" / "masks" / "00000.png").size == (33, 17)


@pytest.fixture(scope="module")
def bad(clip, tiny_checkpoint, moving_square, tmp_path_factory):
    """A folder of wrong things, by name."""
    folder = tmp_path_factory.mktemp("bad")
    frames, masks = moving_square
    (folder / "broken.mp4").write_bytes(b"this is no video")
    cut = clip[0].read_bytes()
    (folder / "header.mp4").write_bytes(cut[:400])
    (folder / "empty").mkdir()
    (folder / "growing").mkdir()
    for i in range(3):
        Image.fromarray(frames[i][: 48 - i // 2 * 8]).save(folder / "growing" / f"{i}.png")
    (folder / "half").mkdir()
    for i in range(3):
        Image.fromarray(frames[i]).save(folder / "half" / f"{i}.png")
    (folder / "half" / "2.png").write_bytes((folder / "half" / "2.png").read_bytes()[:200])
    Image.fromarray(masks[0].T.copy()).save(folder / "turned.png")
    Image.fromarray(masks[0] * 0).save(folder / "nothing.png")
    Image.fromarray((np.arange(48 * 64).reshape(48, 64) % 6).astype(np.uint8)).save(folder / "crowded.png")
    Image.fromarray(frames[0]).save(folder / "photo.png")
    Image.fromarray(masks[0]).save(folder / "lossy.jpg")
    (folder / "text.png").write_text("text")
    Image.new("1", (15000, 15000)).save(folder / "huge.png")
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (folder / "unknown").mkdir()
    (folder / "unknown" / "config.json").write_text('{"model_type": "no_such_model"}')
    (folder / "config_only").mkdir()
    (folder / "config_only" / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    return folder


BAD = {
    "missing video": (["missing.mp4"], "no such file or folder"),
    "broken video": (["broken.mp4"], "can't be opened"),
    "cut video": (["header.mp4"], "has no frames that can be decoded"),
    "folder without images": (["empty"], "has no images"),
    "frame changes its size": (["growing"], "frame 2 of 'growing'"),
    "broken frame": (["half", "--strict"], "frame 2 of 'half' can't be decoded"),
    "mask of another size": (["CLIP", "--masks", "turned.png"], "wanted is the size of the video"),
    "empty mask": (["CLIP", "--masks", "nothing.png"], "masks is empty"),
    "too many objects": (["CLIP", "--masks", "crowded.png"], "at most 4, the number of ID vectors"),
    "coloured mask": (["CLIP", "--masks", "photo.png"], "wanted is an indexed or grey one"),
    "mask that is no image": (["CLIP", "--masks", "text.png"], "can't be read"),
    "mask that loses details": (
        ["CLIP", "--masks", "lossy.jpg"],
        "is a JPEG, whose pixels aren't quite",
    ),
    "missing mask": (["CLIP", "--masks", "missing.png"], "can't be read"),
    "mask of too many pixels": (["CLIP", "--masks", "huge.png"], "can't be read: Image size"),
    "another model type": (["CLIP", "--model", "bert"], "can't be loaded: it is of type 'bert'; wanted is 'ausm'"),
    "unknown model type": (["CLIP", "--model", "unknown"], "no_such_model"),
    "checkpoint without weights": (["CLIP", "--model", "config_only"], "can't be loaded"),
    "folder that is no checkpoint": (["CLIP", "--model", "empty"], "can't be loaded"),
    "threshold": (["CLIP", "--threshold", "1.5"], "threshold"),
    "threshold that is no number": (["CLIP", "--threshold", "high"], "invalid float value"),
    "format": (["CLIP", "--formats", "mp4,gif"], "wanted are some of mp4,png,json"),
    "no format": (["CLIP", "--formats", ""], "wanted are some of mp4,png,json"),
    "device": (["CLIP", "--device", "abacus"], "can't be used"),
    "dtype": (["CLIP", "--dtype", "int8"], "wanted is auto, float32, bfloat16 or float16"),
    "unknown option": (["CLIP", "--colour"], "unrecognized arguments"),
    "box of three numbers": (["CLIP", "--boxes", "1:2,3,4"], "--boxes holds '1:2,3,4'; wanted is ID:X0,Y0,X1,Y1 for"),
    "box without id": (["CLIP", "--boxes", "1,2,3,4"], "as in '1:10,20,110,220 2:200,40,260,90'"),
    "box twice": (["CLIP", "--boxes", "1:2,2,9,9", "--boxes", "1:2,2,8,8"], "--boxes holds object 1 more than once"),
    "box of no area": (["CLIP", "--boxes", "1:9,9,2,2"], "x0 < x1"),
    "box of an id too large": (["CLIP", "--boxes", "3000000000:2,2,9,9"], "below 2**30, got "),
    "box of an id of many digits": (["CLIP", "--boxes", "99999999999999999999:2,2,9,9"], "below 2**30, got "),
    "no box": (["CLIP", "--boxes", ""], "--boxes holds ''; wanted is ID:X0"),
    "point of one number": (
        ["CLIP", "--points", "1:2,3;4"],
        "holds '1:2,3;4'; wanted is ID:X,Y;X,Y for each",
    ),
    "point outside": (["CLIP", "--points", "1:2,3;64,4"], "input_points must lie within the frame"),
    "only negative points": (["CLIP", "--points", "1:-2,3"], "negative points alone"),
    "box of a marked object": (["CLIP", "--masks", "MASK", "--boxes", "3:2,2,9,9"], "which masks has too"),
    "prompted frame beyond": (["CLIP", "--boxes", "1:2,2,9,9", "--prompt-frame", "6"], "the video has 6 frames"),
    "backward without prompts": (["CLIP", "--backward"], "--backward is for objects that --boxes, --points or"),
    "no name": ([""], "source is empty"),
    "URL among several": (["CLIP", "http://127.0.0.1:9/a.mp4"], "a URL, a camera or - is among several inputs"),
    "size of a file": (["CLIP", "--raw-size", "64x48"], "it is for raw frames on standard input"),
    "size of one number": (["-", "--raw-size", "64"], "--raw-size is '64'; wanted is WIDTHxHEIGHT, as in 640x360"),
    "prompts for several": (["CLIP", "CLIP", "--boxes", "1:2,2,9,9"], "--boxes is for one video; INPUT names several"),
    "one of several missing": (["CLIP", "gone.mp4"], "'gone.mp4': no such file or folder"),
    "pattern that the shell took apart": (["half/0.png", "half/1.png"], "quote the pattern, or name the folder"),
    "pattern without matches": (["*.avi"], "matches no file"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments, message, bad, clip, tiny_checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(bad)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = [{"CLIP": str(clip[0]), "MASK": str(clip[1])}.get(x, x) for x in arguments]
    if "--model" not in arguments:
        arguments += ["--model", str(tiny_checkpoint)]
    before = sorted(bad.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        ausm("segment", *arguments, "--output", tmp_path / "deep" / "out")
    assert stopped.value.code == 2
    last = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ausm: error: ")]
    assert len(last) == 1 and message in last[0]
    assert not list(tmp_path.iterdir()) and sorted(bad.rglob("*")) == before


def test_a_video_is_not_replaced_by_its_own_result(clip, tiny_checkpoint, tmp_path, capsys):
    video = tmp_path / "overlay.mp4"
    shutil.copy(clip[0], video)
    with pytest.raises(SystemExit):
        ausm("segment", video, "--model", tiny_checkpoint, "--output", tmp_path)
    assert "would be replaced by its own result" in capsys.readouterr().err
    assert video.read_bytes() == clip[0].read_bytes()
    ausm("segment", video, "--model", tiny_checkpoint, "--output", tmp_path, "--formats", " PNG, json")


@pytest.mark.parametrize("pattern", [False, True])
def test_masks_and_frames_are_not_replaced_by_results(clip, tiny_checkpoint, tmp_path, capsys, pattern):
    """A mask to start from, or the frames that a pattern matches, where results would go."""
    (tmp_path / "masks").mkdir()
    for number in range(2):
        shutil.copy(clip[1], tmp_path / "masks" / f"{number:05d}.png")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    video = [tmp_path / "masks" / "*.png"] if pattern else [clip[0], "--masks", tmp_path / "masks" / "00000.png"]
    with pytest.raises(SystemExit):
        ausm("segment", *video, "--model", tiny_checkpoint, "--output", tmp_path)
    assert "would be replaced by its own result" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}


def test_a_file_where_a_folder_is_wanted_is_told_before_the_model_is_loaded(clip, tmp_path, capsys):
    (tmp_path / "notes").write_text("")
    for output in ("notes", "notes/out"):
        with pytest.raises(SystemExit):
            ausm("segment", clip[0], "--model", "none", "--output", tmp_path / output)
        assert f"{str(tmp_path / 'notes')!r} is no folder" in capsys.readouterr().err


def test_results_of_an_earlier_run_that_stay_are_told(clip, tiny_checkpoint, tmp_path):
    ausm("segment", clip[0], "--model", tiny_checkpoint, "--output", tmp_path, "--formats", "png,json")
    (tmp_path / "masks" / ".DS_Store").touch()  # somebody looked at them
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ausm("segment", clip[0], "--model", tiny_checkpoint, "--output", tmp_path)
    with pytest.warns(UserWarning, match="keeps overlay.mp4, masks of an earlier run; this one writes others"):
        ausm("segment", clip[0], "--model", tiny_checkpoint, "--output", tmp_path, "--formats", "json")


def test_nothing_found_is_told(clip, tiny_checkpoint, tmp_path, capsys):
    ausm("segment", clip[0], "--model", tiny_checkpoint, "--output", tmp_path, "--threshold", "1")
    assert "ausm: nothing was found; a --threshold below 1 finds more\n" in capsys.readouterr().err


def test_warnings_stand_on_lines_of_their_own(bad, tiny_checkpoint, tmp_path):
    command = [sys.executable, "-m", "ausm_hf.cli", "segment", str(bad / "half"), "--model", str(tiny_checkpoint)]
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0
    (line,) = [line for line in re.split(r"[\r\n]", done.stderr) if "warning" in line]
    assert line.startswith("ausm: warning: frame ")


def test_output_in_the_way(clip, tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        ausm("segment", clip[0], "--model", tiny_checkpoint, "--output", tmp_path)
    assert stopped.value.code == 2 and "mine.txt" in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob("*")] == ["masks", "mine.txt"]


def test_exit_code_of_the_process():
    done = subprocess.run(
        [sys.executable, "-m", "ausm_hf.cli", "segment", "missing.mp4"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "ausm: error: source 'missing.mp4': no such file or folder\n"


def test_init_tiny_sizes(tmp_path, monkeypatch, tiny_config, capsys):
    """`ausm init` writes what the Auto classes load; with a tiny network in the preset's place, to be quick."""
    from transformers import AutoModel, AutoProcessor, pipeline

    monkeypatch.setattr(ausm_hf.AusmConfig, "from_preset", lambda preset: {"base": tiny_config}[preset])
    ausm("init", tmp_path / "ausm-base", "--preset", "base")
    assert capsys.readouterr().out.strip() == str(tmp_path / "ausm-base")
    assert [p.name for p in tmp_path.iterdir()] == ["ausm-base"]
    assert type(AutoModel.from_pretrained(tmp_path / "ausm-base")).__name__ == "AusmModel"
    assert AutoProcessor.from_pretrained(tmp_path / "ausm-base").image_processor.size["shortest_edge"] == 1024
    assert (tmp_path / "ausm-base" / "modeling_ausm.py").is_file()
    assert pipeline("video-segmentation", model=str(tmp_path / "ausm-base"), device="cpu")


def test_init_from_mask2former(tmp_path, capsys):
    """A Mask2Former of few parameters; what its weights become is tested beside `from_mask2former`."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    config = Mask2FormerConfig(
        backbone_config=TINY_SWIN,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        num_attention_heads=4,
        dim_feedforward=32,
        decoder_layers=2,
        num_queries=7,
        id2label={0: "cat", 1: "dog"},
    )
    theirs = Mask2FormerForUniversalSegmentation(config)
    theirs.save_pretrained(tmp_path / "mask2former")
    ausm("init", tmp_path / "new", "--preset", "tiny", "--from", tmp_path / "mask2former")
    ours = ausm_hf.AusmForUniversalSegmentation.from_pretrained(tmp_path / "new")
    assert ours.config.id2label == {0: "cat", 1: "dog"} and ours.config.num_detection_queries == 7
    assert (ours.class_heads["coco"].weight == theirs.class_predictor.weight).all()


def test_init_refuses(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, message in [
        ([tmp_path / "new", "--preset", "huge"], "There is no preset 'huge'"),
        ([tmp_path / "full", "--preset", "tiny"], "exists and is not empty"),
        ([tmp_path / "full" / "file", "--preset", "tiny"], "exists and is not empty"),
        ([tmp_path / "new", "--from", "mask2former"], "preset 'nano' is trained already"),
        ([tmp_path / "new", "--preset", "base", "--from", str(tmp_path / "missing")], "missing"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            ausm("init", *arguments)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "full"]


def test_help(capsys):
    for arguments in (["--help"], ["segment", "--help"], ["init", "--help"], ["train", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            ausm(*arguments)
        assert stopped.value.code == 0
    assert "RECIPE" in capsys.readouterr().out


def test_prompts_on_the_command_line():
    assert parse_prompts(["1:10,20,30.5,40 2:0,.5,7,8", "9:-1,-.5,3,4"], ["1:5,6;-7,8.25", " 3:0,0  4:-1,1;2,2 "]) == {
        "boxes": {1: [10, 20, 30.5, 40], 2: [0, 0.5, 7, 8], 9: [-1, -0.5, 3, 4]},
        "points": {1: [[5, 6], [7, 8.25]], 3: [[0, 0]], 4: [[1, 1], [2, 2]]},
        "labels": {1: [1, 0], 3: [1], 4: [0, 1]},
    }
    for wrong in ("1:5", "1:5,6;", "x:5,6", "1:5,6,7", "1:+5,6", "1:5,--6", "1:nan,6", "1 :5,6", "1:5, 6"):
        with pytest.raises(ValueError, match="--points holds .*; wanted is ID:X,Y;X,Y for each object, with - before"):
            parse_prompts([], [wrong])


def test_boxes_and_points_reach_the_network(clip, tiny_checkpoint, tmp_path):
    ausm(
        "segment", clip[0], "--boxes", "4:24,12,42,30", "--points", "4:30,20;-2,2 6:50,40", "--prompt-frame", 4,
        "--backward", "--model", tiny_checkpoint, "--output", tmp_path, "--formats", "png,jsonl",
    )  # fmt: skip
    model, processor = ausm_hf.load_model(tiny_checkpoint)
    prompts = {
        "boxes": {4: [24, 12, 42, 30]},
        "points": {4: [[30, 20], [2, 2]], 6: [[50, 40]]},
        "labels": {4: [1, 0], 6: [1]},
    }
    results = ausm_hf.segment_video(clip[0], model, processor, prompts=prompts, prompt_frame=4, backward=True)
    lines = (tmp_path / "frames.jsonl").read_text().splitlines()
    assert {x["id"] for line in lines for x in json.loads(line)["objects"]} <= {4, 6}
    for result in results:
        written = np.array(Image.open(tmp_path / "masks" / f"{result.index:05d}.png"))
        assert (written == result.masks).all()


def stdin_of(monkeypatch, data: bytes):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))


def test_raw_frames_on_stdin(clip, moving_square, tiny_checkpoint, tmp_path, monkeypatch):
    stdin_of(monkeypatch, moving_square[0].tobytes())
    options = ["--masks", clip[1], "--model", tiny_checkpoint, "--formats", "png,mp4"]
    ausm("segment", "-", "--raw-size", "64x48", *options, "--output", tmp_path / "raw")
    (tmp_path / "frames").mkdir()
    for i, frame in enumerate(moving_square[0]):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{i}.png")
    ausm("segment", tmp_path / "frames", *options, "--output", tmp_path / "files")
    assert_same(tmp_path / "raw", tmp_path / "files")


def test_frames_that_cannot_be_decoded_are_told(bad, tiny_checkpoint, tmp_path):
    with pytest.warns(UserWarning, match="frame 2 of 'half' can't be decoded") as told:
        ausm("segment", bad / "half", "--model", tiny_checkpoint, "--output", tmp_path, "--formats", "png")
    line = warnings.formatwarning(told[0].message, UserWarning, "file", 1)
    assert line.startswith("ausm: warning: frame 2 of 'half'") and line.count("\n") == 1
    assert sorted(p.name for p in (tmp_path / "masks").iterdir()) == ["00000.png", "00001.png"]


def assert_same_file(one: Path, other: Path):
    """To the byte; of a video the frames, nearly: now and then x264 encodes the same pictures in another way."""
    if one.suffix != ".mp4":
        assert one.read_bytes() == other.read_bytes()
        return
    frames, others = (np.stack(list(read_video(path))).astype(int) for path in (one, other))
    assert frames.shape == others.shape
    # Seven other ways to encode some pictures were at most 1.4 from the usual one; another digit in a score is 2.4.
    assert np.abs(frames - others).mean(axis=(1, 2, 3)).max() < 2


def assert_same(one: Path, other: Path):
    """All files that aren't hidden are the same."""
    names, others = (
        {p.relative_to(x) for p in x.rglob("*") if p.is_file() and ".ausm" not in p.parts} for x in (one, other)
    )
    assert names == others and names
    for name in names:
        assert_same_file(one / name, other / name)


@pytest.fixture(scope="module")
def videos(moving_square, tmp_path_factory):
    """Five videos in two folders, one of them broken."""
    folder = tmp_path_factory.mktemp("archive")
    (folder / "deep").mkdir()
    for number, name in enumerate(["a.mp4", "b.mkv", "deep/a.mp4", "deep/c.mov"]):
        with VideoWriter(folder / name, fps=10, size=(48, 64)) as writer:
            for frame in np.roll(moving_square[0], 5 * number, axis=2):
                writer.write(frame)
    (folder / "deep" / "broken.mp4").write_bytes(b"this is no video")
    return folder


def test_many_videos(videos, tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--model", tiny_checkpoint, "--threshold", 0]
    for _ in range(2):  # the second time there is nothing left to do
        with pytest.raises(SystemExit) as stopped:
            ausm("segment", videos / "**" / "*.m*", "--output", out, *options)
        assert stopped.value.code == 1
        told = capsys.readouterr()
        assert told.out == f"{out}/manifest.jsonl\n"
        assert "ausm: 1 of 5 videos failed" in told.err and "broken.mp4: video 'broken' can't be opened" in told.err
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [(line["name"], line["status"]) for line in lines] == [
        ("a", "done"), ("b", "done"), ("deep/a", "done"), ("deep/broken", "failed"), ("deep/c", "done"),
    ]  # fmt: skip
    ausm("segment", videos / "deep" / "c.mov", "--output", tmp_path / "alone", *options)
    (out / "deep" / "c" / "video.json").unlink()
    assert_same(out / "deep" / "c", tmp_path / "alone")
    assert not (out / "deep" / "broken").exists()
    with pytest.raises(SystemExit):
        ausm("segment", videos / "*.m*", "--output", out, "--formats", "png", *options)
    assert "holds results made with formats" in capsys.readouterr().err


@contextmanager
def disk_that_holds(num_bytes: int):
    """No file of this process can grow beyond."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("formats", ["mp4", "json", "jsonl", "coco,youtube_vis", "png,mp4,json"])
def test_disk_full(clip, tiny_checkpoint, tmp_path, capsys, formats):
    options = ["--model", tiny_checkpoint, "--threshold", 0, "--formats", formats, "--output", tmp_path / "out"]
    with disk_that_holds(200), pytest.raises(SystemExit) as stopped:
        ausm("segment", clip[0], *options)
    assert stopped.value.code == 2 and "ausm: error: [Errno 27] File too large" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_disk_full_among_many(videos, tiny_checkpoint, tmp_path, capsys):
    options = ["--model", tiny_checkpoint, "--output", tmp_path / "out", "--formats", "mp4,png"]
    with disk_that_holds(600), pytest.raises(SystemExit) as stopped:
        ausm("segment", videos / "*.m*", *options)
    assert stopped.value.code == 2 and "[Errno 27] File too large" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".ausm"]  # no video is blamed
    ausm("segment", videos / "*.m*", *options)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".ausm", "a", "b", "manifest.jsonl"]


def test_output_that_cannot_be_written_to(clip, tiny_checkpoint, capsys):
    if not Path("/proc/self").is_dir():
        pytest.skip("there is no /proc, which nobody can write to")
    for inputs in ([clip[0]], clip):
        with pytest.raises(SystemExit) as stopped:
            ausm("segment", *inputs, "--model", tiny_checkpoint, "--output", "/proc/ausm")
        error = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and error.startswith("ausm: error: [Errno ") and "/proc/ausm" in error, error


# Children of a server that has everything imported and no threads: a fork of this process might inherit a lock.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ausm_hf.cli", "ausm_hf.segment", "tqdm"])


def in_child(*arguments) -> multiprocessing.Process:
    """The command, started in a child."""
    child = FORKS.Process(target=main, args=([str(argument) for argument in arguments],))
    child.start()
    return child


def ended(child: multiprocessing.Process) -> int:
    child.join()
    return child.exitcode


def seconds_of(*arguments) -> float:
    started = time.monotonic()
    ended(in_child(*arguments))
    return time.monotonic() - started


@pytest.mark.parametrize(
    "command, missing, extra",
    [
        (["train", "recipe.yaml"], "accelerate", "train"),
        (["train", "recipe.yaml"], "datasets", "train"),
        (["evaluate", "--benchmark", "davis2016", "--root", "davis"], "datasets", "eval"),
    ],
)
def test_without_an_extra_it_says_how_to_install_it(command, missing, extra):
    code = f"import sys; sys.modules[{missing!r}] = None; from ausm_hf.cli import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("ausm: error: ")
    assert done.stderr.strip().endswith(f' needs {missing}, which is not installed: pip install "ausm-hf[{extra}]"')


READING = """
import signal, sys
from ausm_hf.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what shells start in the background
sys.stdin = open(stdin)
main(arguments)
"""


@contextmanager
def reading(tmp_path, data: bytes, *arguments):
    """The command, started in a child; `data` comes on its standard input, and then nothing."""
    os.mkfifo(tmp_path / "stdin")
    child = FORKS.Process(
        target=exec,
        args=(READING, {"stdin": tmp_path / "stdin", "arguments": [str(argument) for argument in arguments]}),
    )
    child.start()
    try:
        with open(tmp_path / "stdin", "wb", buffering=0) as stream:
            stream.write(data)
            yield child
    finally:
        child.kill()
        child.join()


def written_lines(out: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in out.glob(".frames.partial-*"))


def wait_until(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def as_jpeg(frame) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG")
    return file.getvalue()


@contextmanager
def silent_camera(frames):
    """A network camera that sends these frames, and then nothing."""
    done = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=next")
            self.end_headers()
            for data in map(as_jpeg, frames):
                head = f"--next\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                self.wfile.write(head.encode() + data + b"\r\n")
            done.wait(600)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/camera"
        done.set()
        server.shutdown()


@pytest.mark.parametrize("kind", ["raw", "mjpeg", "network"])
def test_interrupt_completes_the_files_while_no_frame_comes(kind, moving_square, tiny_checkpoint, tmp_path):
    frames, out = moving_square[0], tmp_path / "out"
    options = ["--model", tiny_checkpoint, "--output", out, "--formats", "mp4,json,jsonl"]
    with ExitStack() as stack:
        source, data = ["-"], b"".join(map(as_jpeg, frames))
        if kind == "raw":
            source, data = ["-", "--raw-size", "64x48"], frames.tobytes()
        if kind == "network":
            source, data = [stack.enter_context(silent_camera([*frames] * 3))], b""
        child = stack.enter_context(reading(tmp_path, data, "segment", *source, *options))
        wait_until(lambda: written_lines(out) >= 4)
        seen = 0
        while seen < (seen := written_lines(out)):  # until no more comes
            time.sleep(1)
        os.kill(child.pid, signal.SIGINT)
        child.join(20)
        assert child.exitcode == 0
    assert sorted(path.name for path in out.iterdir()) == ["frames.jsonl", "objects.json", "overlay.mp4"]
    written = (out / "frames.jsonl").read_text().splitlines()
    assert seen <= len(written) == len(list(read_video(out / "overlay.mp4")))  # one may have been under way


def test_a_second_interrupt_stops_everything():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        source = read_video(np.zeros((3, 4, 6, 3), np.uint8))
        source.stop = unittest.mock.Mock()
        with pytest.raises(KeyboardInterrupt), _until_interrupted(source):
            os.kill(os.getpid(), signal.SIGINT)
            source.stop.assert_called_once_with()
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_while_a_stream_is_looked_into(clip, tiny_checkpoint, tmp_path, number, code):
    transport = tmp_path / "clip.ts"
    with av.open(str(clip[0])) as source, av.open(str(transport), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    options = ["--model", tiny_checkpoint, "--output", tmp_path / "out"]
    with reading(tmp_path, transport.read_bytes()[:2000], "segment", "-", *options) as child:
        time.sleep(1)
        assert child.is_alive()
        os.kill(child.pid, number)
        child.join(20)
        assert child.exitcode == code and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_at_any_moment_leaves_only_whole_files(clip, tiny_checkpoint, tmp_path):
    options = ["--model", tiny_checkpoint, "--threshold", 0, "--formats", "mp4,png,json,jsonl,coco,youtube_vis"]
    command = ["segment", clip[0], *options, "--output"]
    most = min(seconds_of(*command, tmp_path / "whole") for _ in range(2))  # the first starts the server of forks
    names = {"overlay.mp4", "masks", "objects.json", "frames.jsonl", "coco.json", "youtube_vis.json"}
    rng, found = random.Random(0), []
    for number in range(50):
        out = tmp_path / str(number)
        child = in_child(*command, out)
        time.sleep(rng.uniform(0, 1.1 * most))
        child.kill()
        ended(child)
        seen = [p for p in (out.iterdir() if out.exists() else []) if not p.name.startswith(".")]
        found.append(len(seen))
        for path in seen:
            assert path.name in names
            if path.is_dir():
                assert_same(path, tmp_path / "whole" / path.name)
            else:
                assert_same_file(path, tmp_path / "whole" / path.name)
    assert 0 in found  # some were killed midway


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_terminated_while_a_library_makes_another_error_of_it(monkeypatch, capsys, number, code):
    def init(args):
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        except SystemExit:
            raise ValueError("trying to pop from empty mode stack") from None

    monkeypatch.setattr("ausm_hf.cli.init", init)
    before = signal.signal(number, signal.SIG_DFL)  # nohup has it ignored
    try:
        with pytest.raises(SystemExit) as caught:
            main(["init", "folder"])
    finally:
        signal.signal(number, before)
    assert caught.value.code == code and not capsys.readouterr().err


def test_a_closed_terminal_is_ignored_under_nohup(monkeypatch):
    def init(args):
        os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr("ausm_hf.cli.init", init)
        main(["init", "folder"])
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_terminated_leaves_nothing(clip, tiny_checkpoint, tmp_path):
    command = ["segment", clip[0], "--model", tiny_checkpoint, "--threshold", 0, "--output"]
    most = min(seconds_of(*command, tmp_path / "whole") for _ in range(2))
    codes = []
    for number in range(10):
        child = in_child(*command, tmp_path / "out")
        time.sleep(most * (number + 0.5) / 10)
        child.terminate()
        codes.append(ended(child))
        if codes[-1] == 143:
            assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert set(codes) <= {143, 0, -signal.SIGTERM} and 143 in codes


def start(*arguments, launcher=("-m", "ausm_hf.cli")):
    """The command in a process of its own, on one thread: torchrun gives each of several so many, if nobody else does.

    Sums over another number of threads are rounded otherwise, and where masks hang on a hair, as those of a network
    that was never trained, they differ.
    """
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_processes_share_many_videos_and_one_is_killed(videos, tiny_checkpoint, tmp_path):
    source = tmp_path / "in"
    for number in range(6):
        shutil.copytree(videos, source / str(number))
    command = ["segment", source / "**" / "*.m*", "--model", tiny_checkpoint, "--threshold", 0, "--output"]
    assert start(*command, tmp_path / "alone").wait() == 1  # the broken ones

    out = tmp_path / "out"
    first, second = start(*command, out), start(*command, out)
    while not list(out.rglob("video.json")):
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert first.returncode == -signal.SIGKILL and len(list(out.rglob("video.json"))) < 24
    first = start(*command, out)
    assert (first.wait(), second.wait()) == (1, 1)
    assert_same(out, tmp_path / "alone")
    assert len(list(out.rglob("video.json"))) == 24


@pytest.mark.slow
def test_many_videos_under_torchrun(videos, tiny_checkpoint, tmp_path):
    (videos / "deep" / "broken.mp4").rename(videos / "deep" / "broken.txt")
    try:
        command = ["segment", videos / "**" / "*.m*", "--model", tiny_checkpoint, "--output"]
        assert start(*command, tmp_path / "alone").wait() == 0
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "ausm_hf.cli"]
        assert start(*command, tmp_path / "out", launcher=launcher).wait() == 0
    finally:
        (videos / "deep" / "broken.txt").rename(videos / "deep" / "broken.mp4")
    assert_same(tmp_path / "out", tmp_path / "alone")
