import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ausm_hf.export import (
    JsonlWriter,
    ObjectsJsonWriter,
    OverlayVideoWriter,
    PngMaskWriter,
    to_coco,
    to_youtube_vis,
)
from ausm_hf.video import read_video
from ausm_hf.visualization import davis_palette, draw_overlay

HEIGHT, WIDTH, NUM_FRAMES = 46, 63, 6


def video():
    """Frame, masks and objects of six frames: object 1 always there, 2 absent in frame 2 and 3, 7 only followed."""
    rng = np.random.default_rng(0)
    for t in range(NUM_FRAMES):
        frame = np.full((HEIGHT, WIDTH, 3), 100, np.uint8)
        masks = np.zeros((HEIGHT, WIDTH), np.int32)
        masks[5 + t : 25 + t, 10:30] = rng.random((20, 20)) > 0.2
        if t not in (2, 3):
            masks[20:40, 35 + t : 50 + t] = 2
        objects = [
            {"id": 1, "label": "dog" if t else "cat", "score": 0.5 + 0.1 * t},
            {"id": 2, "label": None, "score": None},
            {"id": 7, "label": "bird", "score": 0.1},
        ]
        yield t, frame, masks, objects


def all_writers(folder):
    return [
        PngMaskWriter(folder / "masks"),
        OverlayVideoWriter(folder / "overlay.mp4", fps=25, size=(HEIGHT, WIDTH)),
        ObjectsJsonWriter(folder / "objects.json", name="clip", fps=25),
        JsonlWriter(folder / "frames.jsonl"),
    ]


def export(writer, times=None):
    with writer:
        for t, frame, masks, objects in video():
            writer.write(t, frame, masks, objects, time=times[t] if times else None)
    return writer.path


def test_png_masks(tmp_path):
    folder = export(PngMaskWriter(tmp_path / "masks"))
    assert sorted(p.name for p in folder.iterdir()) == [f"0000{t}.png" for t in range(NUM_FRAMES)]
    for t, _, masks, _ in video():
        image = Image.open(folder / f"0000{t}.png")
        assert (image.mode, image.size) == ("P", (WIDTH, HEIGHT))
        assert np.array_equal(np.asarray(image), masks)
        assert np.array_equal(np.asarray(image.convert("RGB")), davis_palette()[masks])


def test_png_ids_above_255(tmp_path):
    masks = np.array([[0, 1, 256], [255, 1000, 65535]], np.int32)
    with PngMaskWriter(tmp_path / "masks") as writer:
        writer.write(0, np.zeros((2, 3, 3), np.uint8), np.minimum(masks, 255), [])
        writer.write(100_000, np.zeros((2, 3, 3), np.uint8), masks, [])
    assert Image.open(tmp_path / "masks" / "00000.png").mode == "P"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "masks" / "100000.png")), masks)
    for bad in (65536, -1):
        with pytest.raises(ValueError, match="holds 0 to 65535"), PngMaskWriter(tmp_path / "more") as writer:
            writer.write(0, np.zeros((2, 3, 3), np.uint8), masks.clip(0, 9) * 0 + bad, [])
    assert not (tmp_path / "more").exists()


def test_overlay_video(tmp_path):
    times = [0, 0.1, 0.15, 0.5, 0.6, 0.7]
    source = read_video(export(OverlayVideoWriter(tmp_path / "overlay.mp4", 25, (HEIGHT, WIDTH)), times))
    decoded = list(source.with_times())
    assert [time for time, _ in decoded] == pytest.approx(times, abs=1e-3)
    for (_t, frame, masks, objects), (_, seen) in zip(video(), decoded):
        labels = {1: f"1 {objects[0]['label']} {objects[0]['score']:.2f}", 2: "2"}
        drawn = draw_overlay(frame, masks, labels).mean(-1)  # colour loses detail in 4:2:0, brightness not
        assert abs(seen[:HEIGHT, :WIDTH].mean(-1) - drawn).mean() < 4
    assert len(decoded) == NUM_FRAMES


def test_objects_json(tmp_path):
    path = export(ObjectsJsonWriter(tmp_path / "objects.json", name="clip", fps=25))
    content = json.loads(path.read_text())
    assert content["video"] == {
        "name": "clip", "height": HEIGHT, "width": WIDTH, "fps": 25.0, "num_frames": NUM_FRAMES, "times": None,
    }  # fmt: skip
    assert [item["id"] for item in content["objects"]] == [1, 2]  # 7 was never seen
    dog, unnamed = content["objects"]
    assert (dog["label"], dog["first_frame"], dog["last_frame"]) == ("dog", 0, 5)
    assert dog["score"] == pytest.approx(0.75)
    assert (unnamed["label"], unnamed["score"], unnamed["first_frame"], unnamed["last_frame"]) == (None, None, 0, 5)
    assert list(unnamed["segmentations"]) == ["0", "1", "4", "5"]
    for t, _, masks, _ in video():
        for item in content["objects"]:
            rle = item["segmentations"].get(str(t))
            seen = rle_tools.decode(rle) if rle else np.zeros((HEIGHT, WIDTH))
            assert np.array_equal(seen, masks == item["id"])

    times = [0, 0.1, 0.15, 0.5, 0.6, 0.7]
    export(ObjectsJsonWriter(tmp_path / "objects.json"), times)
    content = json.loads(path.read_text())["video"]
    assert content["times"] == times and content["name"] is None and content["fps"] is None

    with ObjectsJsonWriter(path) as writer:  # frames that can't be decoded are left out
        for t, frame, masks, objects in video():
            if t not in (0, 2, 3):
                writer.write(t, frame, masks, objects, time=times[t])
    assert json.loads(path.read_text())["video"]["times"] == [None, 0.1, None, None, 0.6, 0.7]


def test_label_with_the_highest_scores_wins(tmp_path):
    with ObjectsJsonWriter(tmp_path / "objects.json") as writer:
        for t, (label, score) in enumerate([("cat", 0.3), ("cat", 0.3), ("dog", 0.9)]):
            objects = [{"id": np.int64(1), "label": label, "score": np.float32(score)}]
            writer.write(t, np.zeros((2, 2, 3), np.uint8), np.ones((2, 2), np.uint8), objects)
    (item,) = json.loads((tmp_path / "objects.json").read_text())["objects"]
    assert item["label"] == "dog" and item["score"] == pytest.approx(0.5)


def test_jsonl_can_be_read_while_it_is_written(tmp_path):
    with JsonlWriter(tmp_path / "frames.jsonl") as writer:
        for t, frame, masks, objects in video():
            writer.write(t, frame, masks, objects, time=t / 25)
            lines = writer.partial.read_text().splitlines()
            assert len(lines) == t + 1
            line = json.loads(lines[-1])
            assert (line["frame"], line["time"]) == (t, t / 25)
            assert [{k: item[k] for k in ("id", "label", "score")} for item in line["objects"]] == objects
            assert line["objects"][2]["segmentation"] is None
            for item in line["objects"]:
                rle = item["segmentation"]
                seen = rle_tools.decode(rle) if rle else np.zeros((HEIGHT, WIDTH))
                assert np.array_equal(seen, masks == item["id"])
    assert len((tmp_path / "frames.jsonl").read_text().splitlines()) == NUM_FRAMES


def test_coco_is_read_by_pycocotools(tmp_path, capsys):
    path = export(ObjectsJsonWriter(tmp_path / "objects.json", name="clip"))
    content = to_coco(path)
    (tmp_path / "coco.json").write_text(json.dumps(content))
    coco = COCO(str(tmp_path / "coco.json"))
    assert {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())} == {1: "dog", 2: "object"}
    assert len(coco.getImgIds()) == NUM_FRAMES and coco.imgs[3]["file_name"] == "clip/00002.jpg"
    assert len(coco.getAnnIds()) == 10
    for t, _, masks, _ in video():
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=t + 1)):
            mine = masks == annotation["track_id"]
            assert np.array_equal(coco.annToMask(annotation), mine)
            assert annotation["area"] == mine.sum()
            rows, columns = np.nonzero(mine)
            x, y = columns.min(), rows.min()
            assert annotation["bbox"] == [x, y, columns.max() + 1 - x, rows.max() + 1 - y]

    evaluation = COCOeval(coco, coco.loadRes(content["annotations"]), "segm")  # results against themselves
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


def test_youtube_vis(tmp_path):
    path = export(ObjectsJsonWriter(tmp_path / "objects.json"))
    results = to_youtube_vis(path, video_id=42, categories={"dog": 5, "object": 9, "cat": 1})
    assert results == to_youtube_vis(json.loads(path.read_text()), 42, {"dog": 5, "object": 9, "cat": 1})
    assert [(r["video_id"], r["category_id"], r["score"]) for r in results] == [
        (42, 5, pytest.approx(0.75)),
        (42, 9, 1.0),
    ]
    assert [rle is None for rle in results[1]["segmentations"]] == [False, False, True, True, False, False]
    for t, _, masks, _ in video():
        for object_id, result in zip((1, 2), results):
            rle = result["segmentations"][t]
            assert (rle is None) == (not (masks == object_id).any())
            assert rle is None or np.array_equal(rle_tools.decode(rle), masks == object_id)
    with pytest.raises(ValueError, match=r"lacks the labels \['object'\]"):
        to_youtube_vis(path, categories={"dog": 5})
    with pytest.raises(ValueError, match=r"lacks the labels \['object'\]"):
        to_coco(path, categories={"dog": 5})


@pytest.mark.parametrize("which", range(4))
def test_nothing_is_left_after_an_exception(tmp_path, which):
    writer = all_writers(tmp_path / "new")[which]
    with pytest.raises(ZeroDivisionError), writer:
        for t, frame, masks, objects in video():
            writer.write(t, frame, masks, objects)
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="no frame"), all_writers(tmp_path / "new")[which]:
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("which", range(4))
def test_old_output_is_replaced_only_at_the_end(tmp_path, which):
    def content():
        files = sorted(p for p in tmp_path.rglob("*") if p.is_file())
        return {str(p.relative_to(tmp_path)): p.read_bytes() for p in files}

    export(all_writers(tmp_path)[which])
    old = content()
    assert old and not any("partial" in name for name in old)
    writer = all_writers(tmp_path)[which]
    with pytest.raises(KeyboardInterrupt), writer:
        writer.write(*next(video()))
        assert {name: content()[name] for name in old} == old
        raise KeyboardInterrupt
    assert content() == old
    writer = all_writers(tmp_path)[which]
    with writer:
        writer.write(*next(video()))
        assert {name: content()[name] for name in old} == old
    assert content() != old
    assert len(content()) == 1  # one file, or a folder of which the old frames are gone


def test_folder_of_other_things_is_not_replaced(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(ValueError, match="holiday.jpg"):
        PngMaskWriter(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        PngMaskWriter(tmp_path / "holiday.jpg")
    with pytest.raises(ValueError, match="is a folder"):
        ObjectsJsonWriter(tmp_path)
    with pytest.raises(ValueError, match="holiday.jpg' is no folder"):
        PngMaskWriter(tmp_path / "holiday.jpg" / "masks")
    (tmp_path / "mine" / ".git").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds '.git'"):
        PngMaskWriter(tmp_path / "mine")


def test_a_link_to_a_folder_is_replaced_and_what_it_leads_to_is_kept(tmp_path):
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "00000.png").touch()
    (tmp_path / "masks").symlink_to(tmp_path / "earlier")
    with PngMaskWriter(tmp_path / "masks") as writer:
        writer.write(*next(video()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier", "masks"]
    assert not (tmp_path / "masks").is_symlink() and (tmp_path / "earlier" / "00000.png").stat().st_size == 0


@pytest.mark.parametrize("which", range(4))
def test_writers_refuse(tmp_path, which):
    frame, masks = np.zeros((HEIGHT, WIDTH, 3), np.uint8), np.ones((HEIGHT, WIDTH), np.uint8)
    one = [{"id": 1, "label": None, "score": None}]

    def refused(message, *arguments):
        writer = all_writers(tmp_path)[which]
        with pytest.raises(ValueError, match=message), writer:
            writer.write(0, frame, masks, one)
            writer.write(*arguments)
        assert list(tmp_path.iterdir()) == []

    refused("frame_index is 0", 0, frame, masks, one)
    refused("indexed_mask is", 1, frame, masks[:-1], one)
    refused("indexed_mask is", 1, frame, masks / 2, one)
    refused(r"ids \[1, 1\]", 1, frame, masks, one + one)
    refused(r"ids \[0\]", 1, frame, masks, [{"id": 0, "label": None, "score": None}])
    refused("score nan", 1, frame, masks, [{"id": 1, "label": None, "score": float("nan")}])
    if which in (1, 2):
        refused("size|frame is", 1, frame[:-1], masks[:-1], one)
        refused("time is given for some", 1, frame, masks, one, 0.5)
    if which in (2, 3):
        refused(r"ids \[5\], which objects doesn't list", 1, frame, masks * 5, one)
    with pytest.raises(ValueError, match="with"):
        all_writers(tmp_path)[which].write(0, frame, masks, one)


def test_memory_does_not_grow_with_length(tmp_path):
    """Only the run-lengths of objects.json stay: peak memory of 200 frames is that of 30, in a process of its own."""
    code = """
import sys
from contextlib import ExitStack
from pathlib import Path
import numpy as np
from ausm_hf.export import *
folder = Path(sys.argv[1])
frame, peaks = np.zeros((240, 320, 3), np.uint8), []
objects = [{"id": i, "label": "dog", "score": 0.5} for i in (1, 2)]
for count in (30, 30, 200):
    with ExitStack() as stack:
        writers = [
            stack.enter_context(writer)
            for writer in (
                PngMaskWriter(folder / "masks"),
                OverlayVideoWriter(folder / "overlay.mp4", 24, (240, 320)),
                ObjectsJsonWriter(folder / "objects.json"),
                JsonlWriter(folder / "frames.jsonl"),
            )
        ]
        for t in range(count):
            masks = np.zeros((240, 320), np.uint8)
            masks[20:90, t % 200 :][:, :80], masks[100:200, 40:90] = 1, 2
            for writer in writers:
                writer.write(t, frame, masks, objects)
    peaks.append(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]))  # ru_maxrss is inherited
print(peaks[1], peaks[2])
"""
    if not Path("/proc/self/status").is_file():
        pytest.skip("peak memory is read from /proc")
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == 0, result.stderr
    short, long = map(int, result.stdout.split())
    assert long < 1.05 * short  # 170 more frames would be 40 MB
