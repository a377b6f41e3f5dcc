"""Each data set in a miniature of its published layout."""

import json

import av
import numpy as np
import PIL.Image
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from trees import HEIGHT, WIDTH, draw_frame, index_mask, write_frames, write_mask

from ausm_hf.data.clips import load_clip, resolve_row
from ausm_hf.data.coco import coco
from ausm_hf.data.davis import davis
from ausm_hf.data.labels import COCO_LABELS, LABEL_SETS
from ausm_hf.data.mose import mose
from ausm_hf.data.ovis import ovis
from ausm_hf.data.sa_v import sa_v
from ausm_hf.data.sampling import sample_clip
from ausm_hf.data.stills import stills
from ausm_hf.data.video_folder import video_folder
from ausm_hf.data.vis_json import vis_json
from ausm_hf.data.youtube_vis import youtube_vis
from ausm_hf.data.youtube_vos import youtube_vos


@pytest.fixture
def no_reading(monkeypatch):
    """Indexing must not open an image or a video."""
    opened = []

    def refuse(path, *args, **kwargs):
        opened.append(path)
        raise AssertionError(f"indexing opened {path}")

    with monkeypatch.context() as patch:
        patch.setattr(PIL.Image, "open", refuse)
        patch.setattr(av, "open", refuse)
        yield patch


def whole(row: dict):
    row = resolve_row(row)
    return load_clip(row, list(range(len(row["annotated"]))))


def compressed(mask: np.ndarray) -> dict:
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def counts(mask: np.ndarray) -> dict:
    """Run lengths as a list, column by column, beginning with background: the uncompressed form of the JSONs."""
    edges = np.flatnonzero(np.diff(mask.T.ravel().astype(int))) + 1
    runs = np.diff([0, *edges, mask.size]).tolist()
    return {"size": list(mask.shape), "counts": runs if not mask[0, 0] else [0, *runs]}


@pytest.mark.parametrize("year", [2016, 2017])
def test_davis(tmp_path, no_reading, year):
    names = [f"{t:05d}" for t in range(4)]
    for video in ("bear", "swing"):
        write_frames(tmp_path / "JPEGImages" / "480p" / video, names, ".jpg")
        for t, name in enumerate(names):
            mask = index_mask(t, [255] if year == 2016 else [1, 2])
            write_mask(tmp_path / "Annotations" / "480p" / video / f"{name}.png", mask)
    (tmp_path / "ImageSets" / str(year)).mkdir(parents=True)
    (tmp_path / "ImageSets" / str(year) / "train.txt").write_text("bear\nswing\n")
    clips = davis(str(tmp_path), year, "train")
    no_reading.undo()
    assert clips["video_id"] == ["bear", "swing"]
    clip = whole(clips[1])
    assert clip.masks.sum(dim=(2, 3)).tolist() == [[100] * 4] * (1 if year == 2016 else 2)
    assert (clip.exhaustive, clip.first_frame_given) == ((True, False) if year == 2016 else (False, True))
    with pytest.raises(ValueError, match="split 'val' of DAVIS"):
        davis(str(tmp_path), year, "val")
    with pytest.raises(ValueError, match="year is 2018"):
        davis(str(tmp_path), 2018)


def test_the_lists_of_davis_2016_itself(tmp_path, no_reading):
    """Its `ImageSets/480p/*.txt` name a frame and its mask per line, from the root on."""
    lines = []
    for video in ("swing", "bear"):
        write_frames(tmp_path / "JPEGImages" / "480p" / video, [f"{t:05d}" for t in range(3)], ".jpg")
        for t in range(3):
            write_mask(tmp_path / "Annotations" / "480p" / video / f"{t:05d}.png", index_mask(t, [255]))
            lines.append(f"/JPEGImages/480p/{video}/{t:05d}.jpg /Annotations/480p/{video}/{t:05d}.png ")
    (tmp_path / "ImageSets" / "480p").mkdir(parents=True)
    (tmp_path / "ImageSets" / "480p" / "trainval.txt").write_text("\n".join(lines[:-1]) + "\n")
    clips = davis(str(tmp_path), 2016, "trainval")
    no_reading.undo()
    assert clips["video_id"] == ["swing", "bear"]
    swing, bear = map(whole, clips)
    assert swing.masks.sum(dim=(2, 3)).tolist() == [[100] * 3] and len(bear.frames) == 2
    assert (swing.exhaustive, swing.first_frame_given) == (True, False)
    with pytest.raises(ValueError, match="split 'val' of DAVIS 2016"):
        davis(str(tmp_path), 2016, "val")
    with pytest.raises(ValueError, match="split 'trainval' of DAVIS 2017"):
        davis(str(tmp_path), 2017, "trainval")
    (tmp_path / "ImageSets" / "480p" / "val.txt").write_text("bear\n")
    with pytest.raises(ValueError, match="val.txt, line 1: want a frame and its mask, got 'bear'"):
        davis(str(tmp_path), 2016, "val")


def test_youtube_vos_with_an_object_that_comes_late_and_frames_without_masks(tmp_path, no_reading):
    names = ["00000", "00005", "00010", "00015"]
    write_frames(tmp_path / "train" / "JPEGImages" / "abc", names, ".jpg")
    write_mask(tmp_path / "train" / "Annotations" / "abc" / "00000.png", index_mask(0, [1]))
    write_mask(tmp_path / "train" / "Annotations" / "abc" / "00010.png", index_mask(2, [1, 2]))
    objects = {"1": {"category": "penguin", "frames": names}, "2": {"category": "others", "frames": names[2:]}}
    (tmp_path / "train" / "meta.json").write_text(json.dumps({"videos": {"abc": {"objects": objects}}}))
    clips = youtube_vos(str(tmp_path), "train")
    no_reading.undo()
    clip = whole(clips[0])
    assert clip.labels == ["penguin", "others"] and clip.label_set is None
    assert clip.annotated.tolist() == [True, False, True, False]
    assert clip.masks.any(dim=(2, 3)).tolist() == [[True, False, True, False], [False, False, True, False]]
    assert clip.first_frame_given and not clip.exhaustive
    with pytest.raises(ValueError, match="split 'valid' of YouTube-VOS"):
        youtube_vos(str(tmp_path), "valid")


def test_mose(tmp_path, no_reading):
    for t in range(3):
        write_mask(tmp_path / "train" / "Annotations" / "0a1b" / f"{t:05d}.png", index_mask(t, [1, 3]))
    write_frames(tmp_path / "train" / "JPEGImages" / "0a1b", [f"{t:05d}" for t in range(3)], ".jpg")
    clips = mose(str(tmp_path), "train")
    no_reading.undo()
    assert whole(clips[0]).masks.sum(dim=(2, 3)).tolist() == [[100] * 3] * 2
    assert clips[0]["first_frame_given"]


def test_sa_v_train(tmp_path, no_reading):
    folder = tmp_path / "sav_train" / "sav_000"
    folder.mkdir(parents=True)
    no_reading.undo()
    with av.open(str(folder / "sav_000001.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for t in range(9):
            grey = np.full((HEIGHT, WIDTH, 3), 20 * t, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))
    masks = [[index_mask(t, [1]) > 0, np.zeros((HEIGHT, WIDTH), dtype=bool)] for t in range(3)]
    masks[2][1][8:30, 0:30] = True  # the second object comes in frame 8 and overlaps the first
    content = {
        "video_id": "sav_000001", "video_frame_count": 9.0, "video_height": float(HEIGHT), "video_width": float(WIDTH),
        "masklet": [[compressed(mask) for mask in frame] for frame in masks], "masklet_id": [0, 4], "masklet_num": 2,
    }  # fmt: skip
    (folder / "sav_000001_manual.json").write_text(json.dumps(content))
    clips = sa_v(str(tmp_path / "sav_train"))
    assert clips[0]["objects"] == []  # the JSON is read when the row is used
    row = resolve_row(clips[0])
    assert row["video_frames"] == [0, 4, 8] and [obj["id"] for obj in row["objects"]] == [0, 4]
    clip = whole(clips[0])
    assert np.allclose(clip.frames.float().mean(dim=(1, 2, 3)), [0, 80, 160], atol=3)
    assert np.array_equal(clip.masks.numpy(), np.array(masks).swapaxes(0, 1))
    assert clips.map(resolve_row, load_from_cache_file=False)[0] == row
    with pytest.raises(ValueError, match=r"holds no \*_auto.json"):
        sa_v(str(tmp_path), annotations="auto")
    (folder / "sav_000001_manual.json").write_text(json.dumps({**content, "masklet": [], "masklet_id": []}))
    with pytest.raises(ValueError, match="sav_000001 has no frames"):
        sample_clip(resolve_row(sa_v(str(tmp_path / "sav_train"))[0]), 3, 1, False, np.random.default_rng(0))


def test_sa_v_val(tmp_path, no_reading):
    write_frames(tmp_path / "JPEGImages_24fps" / "sav_9", [f"{t:05d}" for t in range(6)], ".jpg")
    for t in (0, 4):
        write_mask(tmp_path / "Annotations_6fps" / "sav_9" / "000" / f"{t:05d}.png", index_mask(t, [1]))
    write_mask(tmp_path / "Annotations_6fps" / "sav_9" / "001" / "00004.png", index_mask(4, [1]))
    (tmp_path / "sav_val.txt").write_text("sav_9\n")
    clips = sa_v(str(tmp_path), "val")
    no_reading.undo()
    clip = whole(clips[0])
    assert clip.annotated.tolist() == [True, False, False, False, True, False]
    assert clip.masks.sum(dim=(2, 3)).tolist() == [[100, 0, 0, 0, 100, 0], [0, 0, 0, 0, 100, 0]]


def vis_content(categories: list[str], video: str, segmentations: list[dict | None], encode) -> dict:
    return {
        "info": {}, "licenses": [],
        "videos": [{
            "id": 7, "width": WIDTH, "height": HEIGHT, "length": len(segmentations),
            "file_names": [f"{video}/{t:05d}.jpg" for t in range(len(segmentations))],
        }],
        "categories": [{"supercategory": "object", "id": i, "name": name} for i, name in enumerate(categories, 1)],
        "annotations": [
            {
                "id": 11, "video_id": 7, "category_id": len(categories), "iscrowd": 0,
                "segmentations": [None if mask is None else encode(mask) for mask in segmentations],
            },
            {
                "id": 12, "video_id": 7, "category_id": 1, "iscrowd": 1,
                "segmentations": [encode(np.tri(HEIGHT, WIDTH, -40) > 0)] + [None] * (len(segmentations) - 1),
            },
        ],
    }  # fmt: skip


@pytest.mark.parametrize("twice", ["videos", "annotations"])
def test_ids_that_come_twice_are_refused(tmp_path, twice):
    content = vis_content(["fish"], "dive", [index_mask(0, [1]) > 0], counts)
    content[twice].append(content[twice][0])
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="several videos of one id|annotation 11 of .* comes twice in video 7"):
        vis_json(str(tmp_path), str(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text(json.dumps(content) + ",")
    with pytest.raises(ValueError, match="a.json can't be read: Extra data"):
        vis_json(str(tmp_path), str(tmp_path / "a.json"))


@pytest.mark.parametrize("name", ["2019", "2021", "ovis"])
def test_youtube_vis_and_ovis(tmp_path, no_reading, name):
    masks = [None, index_mask(1, [1]) > 0, None]
    label_set = name if name == "ovis" else f"youtube_vis_{name}"
    encode = compressed if name == "ovis" else counts
    content = json.dumps(vis_content(LABEL_SETS[label_set], "0b34", masks, encode))
    frames = tmp_path / "train" / ("0b34" if name == "ovis" else "JPEGImages/0b34")
    write_frames(frames, [f"{t:05d}" for t in range(3)], ".jpg")
    if name == "2019":
        (tmp_path / "train.json").write_text(content)
        clips = youtube_vis(str(tmp_path), 2019)
    elif name == "2021":
        (tmp_path / "train" / "instances.json").write_text(content)
        clips = youtube_vis(str(tmp_path), 2021)
    else:
        (tmp_path / "annotations_train.json").write_text(content)
        clips = ovis(str(tmp_path))
    no_reading.undo()
    assert clips[0]["video_id"] == "0b34" and clips[0]["label_set"] == label_set
    clip = whole(clips[0])
    assert clip.labels == [LABEL_SETS[label_set][-1]] and clip.exhaustive and not clip.first_frame_given
    assert clip.masks.any(dim=(2, 3)).tolist() == [[False, True, False]] and clip.annotated.all()
    assert np.array_equal(clip.masks[0, 1], masks[1])
    assert np.array_equal(clip.ignore[0], np.tri(HEIGHT, WIDTH, -40) > 0)


def test_label_sets_have_the_published_number_of_labels():
    assert {name: len(set(labels)) for name, labels in LABEL_SETS.items()} == {
        "coco": 80, "youtube_vis_2019": 40, "youtube_vis_2021": 40, "ovis": 25,
    }  # fmt: skip


def test_own_json_with_polygons_and_its_mistakes(tmp_path, no_reading):
    content = vis_content(["fish", "shark"], "dive", [index_mask(0, [1]) > 0, None], counts)
    content["annotations"][0]["segmentations"][0] = [[5, 10, 15, 10, 15, 20, 5, 20]]
    source = tmp_path / "own.json"
    source.write_text(json.dumps(content))
    write_frames(tmp_path / "images" / "dive", ["00000", "00001"], ".jpg")
    clips = vis_json(str(tmp_path / "images"), str(source), "sea", exhaustive=False, first_frame_given=True)
    no_reading.undo()
    clip = whole(clips[0])
    assert np.array_equal(clip.masks[0, 0], index_mask(0, [1])) and clip.labels == ["shark"]
    assert clip.label_set == "sea" and not clip.exhaustive and clip.first_frame_given

    with pytest.raises(ValueError, match="label_set 'ovis' lacks 2 categories .*fish"):
        vis_json(str(tmp_path), str(source), "ovis")
    content["annotations"][0]["segmentations"].append(None)
    source.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="annotation 11 .* has 3 segmentations, its video 7 has 2 frames"):
        vis_json(str(tmp_path), str(source))
    content["annotations"][0]["category_id"] = 9
    source.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="annotation 11 of .* is of unknown category 9"):
        vis_json(str(tmp_path), str(source))
    content["annotations"][0]["video_id"] = 8
    source.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="unknown video 8"):
        vis_json(str(tmp_path), str(source))
    source.write_text("{}")
    with pytest.raises(ValueError, match="no key 'videos'"):
        vis_json(str(tmp_path), str(source))


def test_videos_whose_frames_lie_in_one_folder_are_told_apart(tmp_path):
    content = vis_content(["fish"], "dive", [index_mask(0, [1]) > 0, None], counts)
    for video_id in (8, 9):
        names = [f"{'flat' if video_id == 8 else 'reef'}/{video_id}_{t}.jpg" for t in range(2)]
        content["videos"].append({**content["videos"][0], "id": video_id, "file_names": names})
    content["videos"].append({**content["videos"][0], "id": 10, "file_names": ["flat/10_0.jpg", "flat/10_1.jpg"]})
    (tmp_path / "own.json").write_text(json.dumps(content))
    clips = vis_json(str(tmp_path), str(tmp_path / "own.json"))
    assert clips["video_id"] == ["7", "8", "9", "10"]


def test_json_of_a_validation_split_has_no_annotations(tmp_path):
    content = vis_content(["fish"], "dive", [None, None], counts)
    del content["annotations"]
    (tmp_path / "valid.json").write_text(json.dumps(content))
    row = vis_json(str(tmp_path), str(tmp_path / "valid.json"))[0]
    assert row["annotated"] == [False, False] and row["objects"] == []


def test_coco_agrees_with_pycocotools(tmp_path, no_reading):
    # Category ids of COCO have gaps; here they are three apart.
    categories = [{"id": 3 * i + 1, "name": name} for i, name in enumerate(COCO_LABELS)]
    segmentations = [
        [[10, 10, 30, 12, 25, 30], [40, 5, 60, 5, 60, 40]],
        counts(index_mask(0, [1]) > 0),
        [[20, 20, 50, 20, 50, 40, 20, 40]],
    ]
    annotations = [
        {"id": 900 + n, "image_id": 5, "category_id": 3 * n + 1, "iscrowd": int(n == 1), "segmentation": s}
        for n, s in enumerate(segmentations)
    ]
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": HEIGHT, "width": WIDTH} for i in (5, 6)]
    source = tmp_path / "annotations" / "instances_train2017.json"
    source.parent.mkdir()
    source.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    write_frames(tmp_path / "train2017", [f"{5:012d}", f"{6:012d}"], ".jpg")
    clips = coco(str(tmp_path))
    no_reading.undo()
    assert len(clips) == 1 and clips[0]["label_set"] == "coco"
    clip = whole(clips[0])
    theirs = COCO(str(source))
    expected = [theirs.annToMask(annotation).astype(bool) for annotation in annotations]
    assert clip.labels == [COCO_LABELS[0], COCO_LABELS[2]]
    assert np.array_equal(clip.masks[:, 0], np.stack([expected[0], expected[2]]))
    assert np.array_equal(clip.ignore[0], expected[1] & ~expected[0] & ~expected[2])


@pytest.mark.parametrize(
    ("names", "exhaustive", "labels", "label_set", "given"),
    [
        (["cat", "pedestrian"], True, ["cat", "person"], "coco", False),
        (["car", "bicyclist"], False, ["car", None], "coco", True),
        (["salient object", "salient object"], False, [None, None], None, False),
    ],
)
def test_stills(tmp_path, no_reading, names, exhaustive, labels, label_set, given):
    (tmp_path / "images").mkdir()
    PIL.Image.fromarray(draw_frame(0)).save(tmp_path / "images" / "00000.webp", lossless=True)
    mask = index_mask(0, [1, 2])
    mask[0, 0] = 255
    write_mask(tmp_path / "masks" / "00000.png", mask)
    instances = {"00000": {str(i): name for i, name in enumerate(names, 1)}}
    meta = {"name": "set", "exhaustive": exhaustive, "instances": instances}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    clips = stills(str(tmp_path))
    no_reading.undo()
    clip = whole(clips[0])
    assert clip.frames.shape[0] == 1 and clip.masks.sum(dim=(1, 2, 3)).tolist() == [100, 100]
    assert clip.ignore.sum() == 1
    assert (clip.labels, clip.label_set, clip.first_frame_given) == (labels, label_set, given)
    assert clip.exhaustive == exhaustive


def test_every_tenth_photograph_is_held_out(tmp_path):
    instances = {f"{i:05d}": {"1": "cat"} for i in reversed(range(25))}
    (tmp_path / "images").mkdir()
    (tmp_path / "meta.json").write_text(json.dumps({"name": "set", "exhaustive": True, "instances": instances}))
    names = {split: stills(str(tmp_path), split)["video_id"] for split in ("all", "train", "held_out")}
    assert names["all"] == [f"set/{i:05d}" for i in range(25)]
    assert names["held_out"] == ["set/00009", "set/00019"]
    assert sorted([*names["held_out"], *names["train"]]) == names["all"]
    with pytest.raises(ValueError, match="split must be .*, got 'val'"):
        stills(str(tmp_path), "val")


def test_video_folder(tmp_path, no_reading):
    no_reading.undo()
    (tmp_path / "videos").mkdir()
    with av.open(str(tmp_path / "videos" / "dive.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for t in range(12):
            grey = np.full((HEIGHT, WIDTH, 3), 20 * t, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))
    for t in (2, 10):
        write_mask(tmp_path / "masks" / "dive" / f"{t}.png", index_mask(t, [4]))
    write_frames(tmp_path / "videos" / "swim", ["a", "b", "c"], ".jpg")
    write_mask(tmp_path / "masks" / "swim" / "b.png", index_mask(1, [1, 2]))
    write_frames(tmp_path / "videos" / "walk", ["a", "b"], ".jpg")
    write_mask(tmp_path / "masks" / "walk" / "6" / "b.png", index_mask(1, [1]))
    labels = {"dive": {"4": "fish"}, "walk": {"6": "crab"}}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(av, "open", None)
        patch.setattr(PIL.Image, "open", None)
        clips = video_folder(str(tmp_path), "sea")
    assert clips["video_id"] == ["dive", "swim", "walk"]
    dive, swim, walk = map(whole, clips)
    assert np.allclose(dive.frames.float().mean(dim=(1, 2, 3)), [40, 200], atol=3) and dive.labels == ["fish"]
    assert dive.masks.sum(dim=(2, 3)).tolist() == [[100, 100]]
    # Of a folder too, only frames with a mask are there.
    assert swim.annotated.tolist() == [True] and len(swim.masks) == 2
    assert walk.annotated.tolist() == [True] and walk.labels == ["crab"] and walk.masks.sum() == 100
    assert [frame["path"][-5:] for clip in (clips[1], clips[2]) for frame in clip["frames"]] == ["b.jpg", "b.jpg"]
    assert dive.label_set == "sea" and dive.first_frame_given and not dive.exhaustive

    (tmp_path / "labels.json").write_text('{"fly": {}}')
    with pytest.raises(ValueError, match="names videos that aren't in .*: fly"):
        video_folder(str(tmp_path))
    (tmp_path / "labels.json").unlink()
    (tmp_path / "masks" / "dive" / "2.png").rename(tmp_path / "masks" / "dive" / "first.png")
    with pytest.raises(ValueError, match="must be PNGs named by frame number, got first.png"):
        video_folder(str(tmp_path))
