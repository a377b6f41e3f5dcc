"""Annotation files that were cut, damaged or edited by hand: they are read, or refused with a ValueError."""

import copy
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from fuzzing import numbers
from PIL import Image
from pycocotools import mask as coco_mask

from ausm_hf import VideoWriter
from ausm_hf.data.check import check_clips
from ausm_hf.data.clips import load_clip, resolve_row
from ausm_hf.data.coco import coco
from ausm_hf.data.davis import davis
from ausm_hf.data.sa_v import sa_v
from ausm_hf.data.video_folder import video_folder
from ausm_hf.data.vis_json import vis_json
from ausm_hf.data.youtube_vos import youtube_vos

SIZE = (24, 32)
FRAMES = [f"{t:05d}" for t in range(3)]
MASK = np.zeros(SIZE, np.uint8)
MASK[5:15, 4:20] = 1
JUNK = [
    None,
    True,
    -1,
    0,
    3,
    10**12,
    10**30,
    0.5,
    float("nan"),
    "",
    "abc",
    "1",
    "../..",
    "\0",
    [],
    {},
    [[]],
    [1, 2],
    {"size": 1},
]


def run_lengths() -> dict:
    rle = coco_mask.encode(np.asfortranarray(MASK))
    return {"size": list(SIZE), "counts": rle["counts"].decode()}


def write_images(root: Path, folder: str, masks: str | None = None):
    (root / folder).mkdir(parents=True)
    for name in FRAMES:
        Image.new("RGB", SIZE[::-1], (9, 9, 9)).save(root / folder / f"{name}.jpg")
    if masks:
        (root / masks).mkdir(parents=True)
        for name in FRAMES:
            Image.fromarray(MASK).save(root / masks / f"{name}.png")


def write_json(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def make_coco(root: Path):
    write_images(root, "val2017")
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0}
    uncompressed = {"size": list(SIZE), "counts": [100, 50, SIZE[0] * SIZE[1] - 150]}
    content = {
        "images": [{"id": 1, "file_name": "00000.jpg", "height": 24, "width": 32}],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [
            annotation | {"segmentation": [[4, 4, 20, 4, 20, 15]]},
            annotation | {"id": 2, "segmentation": uncompressed, "iscrowd": 1},
            annotation | {"id": 3, "segmentation": run_lengths()},
        ],
    }
    return write_json(root / "annotations" / "instances_val2017.json", content), lambda: coco(str(root), "val2017")


def make_youtube_vis(root: Path):
    write_images(root, "JPEGImages/dive")
    annotation = {"id": 1, "video_id": 1, "category_id": 1, "iscrowd": 0, "segmentations": [run_lengths(), None]}
    annotation["segmentations"].append([[4, 4, 20, 4, 20, 15]])
    content = {
        "videos": [{"id": 1, "file_names": [f"dive/{name}.jpg" for name in FRAMES], "height": 24, "width": 32}],
        "categories": [{"id": 1, "name": "fish"}],
        "annotations": [annotation],
    }
    path = write_json(root / "instances.json", content)
    return path, lambda: vis_json(str(root / "JPEGImages"), str(path))


def make_davis(root: Path):
    write_images(root, "JPEGImages/480p/bear", "Annotations/480p/bear")
    path = root / "ImageSets" / "2017" / "val.txt"
    path.parent.mkdir(parents=True)
    path.write_text("bear\n")
    return path, lambda: davis(str(root), 2017, "val")


def make_davis2016(root: Path):
    write_images(root, "JPEGImages/480p/bear", "Annotations/480p/bear")
    path = root / "ImageSets" / "480p" / "val.txt"
    path.parent.mkdir(parents=True)
    lines = [f"/JPEGImages/480p/bear/{name}.jpg /Annotations/480p/bear/{name}.png" for name in FRAMES]
    path.write_text("\n".join(lines))
    return path, lambda: davis(str(root), 2016, "val")


def make_davis_mask(root: Path):
    """The damaged file is a mask."""
    _, read = make_davis(root)
    return root / "Annotations" / "480p" / "bear" / "00000.png", read


def make_sa_v(root: Path):
    content = {
        "video_id": "sav_000001",
        "video_height": 24,
        "video_width": 32,
        "masklet_id": [0, 1],
        "masklet": [[run_lengths(), run_lengths()], [run_lengths(), run_lengths()]],
    }
    with VideoWriter(root / "sav_000001.mp4", fps=24, size=SIZE) as writer:
        for _ in range(6):
            writer.write(np.full((*SIZE, 3), 90, np.uint8))
    return write_json(root / "sav_000001_manual.json", content), lambda: sa_v(str(root))


def make_youtube_vos(root: Path):
    write_images(root / "train", "JPEGImages/abc", "Annotations/abc")
    content = {"videos": {"abc": {"objects": {"1": {"category": "penguin", "frames": FRAMES}}}}}
    return write_json(root / "train" / "meta.json", content), lambda: youtube_vos(str(root), "train")


def make_video_folder(root: Path):
    write_images(root, "videos/dive", "masks/dive")
    return write_json(root / "labels.json", {"dive": {"1": "fish"}}), lambda: video_folder(str(root))


MAKERS = {
    function.__name__.removeprefix("make_"): function
    for function in (
        make_coco,
        make_youtube_vis,
        make_davis,
        make_davis2016,
        make_davis_mask,
        make_sa_v,
        make_youtube_vos,
        make_video_folder,
    )
}


def places(content) -> list[tuple]:
    """Where in a JSON something could be changed: container and key."""
    items = list(content.items() if isinstance(content, dict) else enumerate(content))
    found = [(content, key) for key, _ in items]
    for _, value in items:
        if isinstance(value, (dict, list)):
            found += places(value)
    return found


def damaged(original: bytes, rng: random.Random) -> bytes:
    """The bytes of a file after something went wrong with it."""
    kind = rng.choice(["cut", "bytes", "value", "value", "value", "key", "twice"])
    if kind == "cut":
        return original[: rng.randrange(len(original))]
    if kind == "bytes":
        changed = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    try:
        content = json.loads(original)
    except ValueError:  # no JSON: lines
        lines = original.split(b"\n")
        line = rng.choice([b"", b"no such", b"a b c", b"\xff\xfe", b"..", b"/", b"\0", *lines])
        lines[rng.randrange(len(lines))] = line
        return b"\n".join(lines)
    for _ in range(rng.randint(1, 2)):
        container, key = rng.choice(places(content) or [(content, None)])
        if key is None:
            break
        if kind == "value":
            container[key] = copy.deepcopy(rng.choice(JUNK))
        elif kind == "key":
            del container[key]
        elif isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        else:
            container[str(key) + "2"] = container[key]
    return json.dumps(content).encode()


def read_all(read):
    """All that training does with a data set, and the check before it."""
    clips = read()
    check_clips(clips, open_files=True)
    for row in clips:
        row = resolve_row(row)
        clip = load_clip(row, list(range(len(row["annotated"]))))
        assert clip.masks.shape[1:] == clip.ignore.shape and len(clip.labels) == len(clip.masks)


@pytest.mark.parametrize("name", MAKERS)
@numbers(8, 2000)
def test_damaged(name, examples, tmp_path):
    path, read = MAKERS[name](tmp_path)
    read_all(read)
    original = path.read_bytes()
    rng = random.Random(name)
    refused = 0
    for number in range(examples):
        content = damaged(original, rng)
        path.write_bytes(content)
        try:
            read_all(read)
        except ValueError as error:
            assert str(error)
            refused += 1
        except Exception as error:
            raise AssertionError(f"{name}, number {number}: {error!r} for\n{content[:3000]!r}") from error
    assert 0 < refused <= examples
    shutil.rmtree(tmp_path)
