"""The clip format travels: to a folder, to Parquet, to the Hub and back, with the pictures and masks in it."""

import shutil
import subprocess
import sys
from pathlib import Path

import av
import datasets
import numpy as np
import pytest
import torch
from trees import HEIGHT, WIDTH, index_mask, write_frames, write_mask

from ausm_hf.data.clips import Clip, clip_object, clip_row, clips_from_rows, encode_rle, file, load_clip

SOURCE = str(Path(__file__).parents[2] / "src")


@pytest.fixture
def clips(tmp_path):
    """Frames and masks in all the ways they come: pictures, a video; indexed PNGs, run lengths, a PNG per object."""
    raw = tmp_path / "raw"
    names = ["00000", "00001", "00002"]
    write_frames(raw / "frames", names)
    index, binary, rles = [], [], []
    for t, name in enumerate(names):
        write_mask(raw / "index" / f"{name}.png", index_mask(t, [1, 2]))
        write_mask(raw / "binary" / f"{name}.png", index_mask(t, [255]))
        index.append(file(raw / "index" / f"{name}.png"))
        binary.append(file(raw / "binary" / f"{name}.png"))
        rles.append(encode_rle([[2.0 + t, 2.0, 9.0 + t, 2.0, 9.0 + t, 9.0]], HEIGHT, WIDTH))
    with av.open(str(raw / "video.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for t in range(4):
            grey = np.full((HEIGHT, WIDTH, 3), 50 * t, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))
    frames = [file(raw / "frames" / f"{name}.png") for name in names]
    index[1] = rles[1] = None
    return clips_from_rows(
        [
            clip_row(
                "indexed", frames, [clip_object(1, "cat"), clip_object(2)], annotations=index, first_frame_given=True
            ),
            clip_row("lengths", frames, [clip_object(7, "dog", segmentations=rles)]),
            clip_row("folders", frames, [clip_object(0, masks=binary)], label_set="pets", exhaustive=False),
            clip_row(
                "video", [], [clip_object(3, masks=binary)], video=file(raw / "video.mp4"), video_frames=[0, 2, 3]
            ),
        ]
    )


def decoded(clips: datasets.Dataset) -> list[Clip]:
    return [load_clip(row, [2, 0, 1]) for row in clips]


def assert_same(got: list[Clip], wanted: list[Clip]):
    assert len(got) == len(wanted)
    for mine, theirs in zip(got, wanted):
        for name, value in vars(theirs).items():
            same = torch.equal(getattr(mine, name), value) if torch.is_tensor(value) else getattr(mine, name) == value
            assert same, name


def test_clips_are_saved_with_their_files_or_by_path(clips, tmp_path):
    """`save_to_disk` takes the files along; Parquet, as `datasets` writes it, keeps their paths."""
    wanted = decoded(clips)
    clips.save_to_disk(str(tmp_path / "saved"))
    clips.to_parquet(str(tmp_path / "clips.parquet"))
    whole = datasets.load_from_disk(str(tmp_path / "saved"))
    by_path = datasets.Dataset.from_parquet(str(tmp_path / "clips.parquet"), cache_dir=str(tmp_path / "cache"))
    assert whole.features == by_path.features == clips.features
    assert_same(decoded(by_path), wanted)
    shutil.rmtree(tmp_path / "raw")
    assert_same(decoded(whole), wanted)
    with pytest.raises(FileNotFoundError):
        decoded(by_path)


def test_clips_are_pushed_to_the_hub_and_loaded(clips, tmp_path, hub):
    """By two processes: the second one has neither the files nor a cache."""
    wanted = decoded(clips)
    clips.to_parquet(str(tmp_path / "clips.parquet"))

    def run(home: str, code: str) -> None:
        (tmp_path / home).mkdir()
        environment = {**hub.environment(tmp_path / home), "PYTHONPATH": SOURCE}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]

    push = "datasets.Dataset.from_parquet('clips.parquet').push_to_hub('user/clips', split='train')"
    run("here", f"import datasets; {push}")
    (tmp_path / "clips.parquet").unlink()
    shutil.rmtree(tmp_path / "raw")
    run("there", "import datasets; datasets.load_dataset('user/clips', split='train').save_to_disk('loaded')")
    loaded = datasets.load_from_disk(str(tmp_path / "loaded"))
    assert loaded.features == clips.features
    assert_same(decoded(loaded), wanted)
    assert any(path.endswith(".parquet") for path in hub.repos["datasets/user/clips"])
