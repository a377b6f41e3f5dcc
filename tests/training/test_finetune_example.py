"""`examples/finetune_on_your_videos.py`, on two videos of the smallest size."""

import copy
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ausm_hf import (
    AusmForUniversalSegmentation,
    AusmImageProcessor,
    AusmProcessor,
    VideoSegmentationPipeline,
    VideoWriter,
    load_model,
    segment_video,
)

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune_on_your_videos.py"


@pytest.fixture
def videos(moving_square, tmp_path):
    """A video file with masks of some frames, and a folder of frames with masks of all."""
    frames, masks = moving_square
    for name in ("videos/swim", "masks/swim", "masks/dive"):
        (tmp_path / "mine" / name).mkdir(parents=True)
    with VideoWriter(tmp_path / "mine" / "videos" / "dive.mp4", fps=10, size=(48, 64)) as writer:
        for frame in frames:
            writer.write(frame)
    for t in range(6):
        Image.fromarray(frames[t]).save(tmp_path / "mine" / "videos" / "swim" / f"{t:05d}.png")
        Image.fromarray(masks[t] * 3).save(tmp_path / "mine" / "masks" / "swim" / f"{t:05d}.png")
        if t % 2:
            Image.fromarray(masks[t]).save(tmp_path / "mine" / "masks" / "dive" / f"{t:05d}.png")
    return tmp_path / "mine"


@pytest.fixture
def start(tiny_config, tmp_path):
    """A tiny checkpoint with ID vectors for as many objects as a clip may have."""
    config = copy.deepcopy(tiny_config)
    config.num_id_vectors = 8
    processor = AusmProcessor(AusmImageProcessor(size={"shortest_edge": 64}))
    model = AusmForUniversalSegmentation(config)
    VideoSegmentationPipeline(model, processor=processor, device="cpu").save_pretrained(tmp_path / "start")
    return tmp_path / "start"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, arguments)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")


@pytest.mark.parametrize("labels", [None, {"swim": {"3": "fish"}, "dive": {"1": "diver"}}], ids=["unnamed", "named"])
def test_a_folder_of_videos_becomes_a_checkpoint(videos, start, moving_square, tmp_path, monkeypatch, capsys, labels):
    """Without labels from the checkpoint of the package, with labels from another."""
    arguments = [videos, tmp_path / "run", "--steps", 2, "--frames", 2, "--size", 32, 64]
    if labels is not None:
        (videos / "labels.json").write_text(json.dumps(labels), encoding="utf-8-sig")  # as Windows' editors do
        arguments += ["--model", start]
    run(monkeypatch, *arguments)
    final = tmp_path / "run" / "final"
    assert capsys.readouterr().out.strip().splitlines()[-1] == f"trained: {final}"
    model, processor = load_model(final, device="cpu")
    before, _ = load_model(None if labels is None else start, device="cpu")
    wanted = before.config.label_sets if labels is None else {"mine": ["diver", "fish"]}
    assert model.config.label_sets == wanted
    trained = [not torch.equal(old, model.state_dict()[name]) for name, old in before.model.named_parameters("model")]
    assert any(trained)
    results = list(segment_video(moving_square[0], model, processor, masks=moving_square[1][0]))
    assert len(results) == 6 and np.array_equal(results[0].masks, moving_square[1][0])
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert np.isfinite(lines[-1]["loss"])
    assert (lines[-1]["class"] > 0) == (labels is not None)


def test_it_can_be_copied():
    """It is short, and imports nothing that lies beside it."""
    lines = EXAMPLE.read_text().splitlines()
    assert len(lines) <= 60
    assert not [line for line in lines if "__file__" in line]
