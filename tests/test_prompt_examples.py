"""The examples of prompts and streams, on a video of the smallest size with an untrained network."""

import runpy
from pathlib import Path

import numpy as np
import pytest

import ausm_hf
from ausm_hf import AusmImageProcessor, AusmInferenceSession, AusmProcessor

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(tiny_model, monkeypatch, tmp_path, capsys):
    """Runs an example in a folder of its own; returns what it printed."""
    processor = AusmProcessor(AusmImageProcessor(size={"shortest_edge": 64}))
    monkeypatch.setattr(ausm_hf, "load_model", lambda: (tiny_model, processor), raising=False)
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments, **kwargs):
        runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*map(str, arguments), **kwargs)
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def clip(moving_square, tmp_path):
    frames = np.concatenate([moving_square[0]] * 3)
    with ausm_hf.VideoWriter(tmp_path / "square.mp4", fps=10, size=(48, 64)) as writer:
        for frame in frames:
            writer.write(frame)
    return tmp_path / "square.mp4"


@pytest.mark.parametrize(
    "name",
    [
        "segment_webcam",
        "add_and_remove_objects",
        "prompt_with_box",
        "many_streams",
        "run_onnx",  # run in test_onnx_export.py
        "segment_with_ray",  # run in test_ray.py
    ],
)
def test_length(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60


def test_prompt_with_box(run, clip):
    printed = run("prompt_with_box", clip, 8, 12, 26, 30, "out.mp4")
    assert printed[0].startswith("the object covers") and printed[-1] == "18 frames in out.mp4"
    overlays = list(ausm_hf.read_video("out.mp4"))
    assert len(overlays) == 18 and np.abs(overlays[0] - next(iter(ausm_hf.read_video(clip))).astype(int)).max() > 50


def test_add_and_remove_objects(run, clip):
    printed = run("add_and_remove_objects", clip)
    assert len(printed) == 18
    known = [[i for i in (1, 2) if f"{i}: " in line.split(": ", 1)[1]] for line in printed]
    assert known == [[1]] * 4 + [[1, 2]] * 8 + [[1]] * 6
    assert AusmInferenceSession.load("stream.safetensors").next_frame_idx == 9


def test_segment_webcam(run, clip):
    printed = run("segment_webcam", clip, "seen.mp4")
    assert printed[-1].startswith("18 frames, ") and len(list(ausm_hf.read_video("seen.mp4"))) == 18
    assert run("segment_webcam", clip, "short.mp4", 0)[-1].startswith("1 frames, ")


def test_many_streams(run, clip, moving_square, tmp_path):
    with ausm_hf.VideoWriter("short.mp4", fps=10, size=(64, 48)) as writer:
        for frame in moving_square[0][:4]:
            writer.write(np.ascontiguousarray(frame.transpose(1, 0, 2)))
    printed = run("many_streams", clip, tmp_path / "short.mp4", size=(64, 64))
    assert [line.rsplit("/")[-1].split(" frames")[0] for line in printed] == ["short.mp4: 4", "square.mp4: 18"]
