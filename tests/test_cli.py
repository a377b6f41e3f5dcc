"""`ausm`: what it writes, and how it refuses."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_tools

import ausm_hf
from ausm_hf import VideoWriter, read_video
from ausm_hf.cli import main


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


def test_segment_unprompted_and_formats(clip, tiny_checkpoint, tmp_path):
    ausm("segment", clip[0], "--model", tiny_checkpoint, "--output", tmp_path, "--formats", "json", "--threshold", 0)
    assert [p.name for p in tmp_path.iterdir()] == ["objects.json"]
    assert json.loads((tmp_path / "objects.json").read_text())["objects"]
    ausm("segment", clip[0], "--model", tiny_checkpoint, "--output", tmp_path, "--formats", "json", "--threshold", 1)
    assert not json.loads((tmp_path / "objects.json").read_text())["objects"]


def test_twice_the_same(clip, tiny_checkpoint, tmp_path):
    for name in ("a", "b"):
        ausm("segment", clip[0], "--model", tiny_checkpoint, "--output", tmp_path / name, "--threshold", 0)
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


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
    (folder / "cut.mp4").write_bytes(cut[: len(cut) // 4])
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
    (folder / "text.png").write_text("text")
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
    "cut video": (["cut.mp4"], "can't be"),
    "folder without images": (["empty"], "has no images"),
    "frame changes its size": (["growing"], "frame 2 of 'growing'"),
    "broken frame": (["half"], "can't be decoded"),
    "mask of another size": (["CLIP", "--masks", "turned.png"], "wanted is the size of the video"),
    "empty mask": (["CLIP", "--masks", "nothing.png"], "masks is empty"),
    "too many objects": (["CLIP", "--masks", "crowded.png"], "at most 4, the number of ID vectors"),
    "coloured mask": (["CLIP", "--masks", "photo.png"], "wanted is an indexed or grey one"),
    "mask that is no image": (["CLIP", "--masks", "text.png"], "can't be read"),
    "missing mask": (["CLIP", "--masks", "missing.png"], "can't be read"),
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
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments, message, bad, clip, tiny_checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(bad)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = [str(clip[0]) if x == "CLIP" else x for x in arguments]
    if "--model" not in arguments:
        arguments += ["--model", str(tiny_checkpoint)]
    before = sorted(bad.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        ausm("segment", *arguments, "--output", tmp_path / "deep" / "out")
    assert stopped.value.code == 2
    last = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ausm: error: ")]
    assert len(last) == 1 and message in last[0]
    assert not list(tmp_path.iterdir()) and sorted(bad.rglob("*")) == before


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
        backbone_config={
            "model_type": "swin",
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 1, 1],
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
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
