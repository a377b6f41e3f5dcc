import av
import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset, load_from_disk
from datasets.table import embed_table_storage
from PIL import Image
from pycocotools import mask as coco_mask
from trees import HEIGHT, WIDTH, draw_frame, index_mask, write_frames, write_mask

from ausm_hf.data.check import find_problems
from ausm_hf.data.clips import (
    FEATURES,
    clip_object,
    clip_row,
    clips_from_rows,
    encode_rle,
    file,
    load_clip,
    load_frames,
)


def rle(mask: np.ndarray) -> dict:
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


@pytest.fixture
def frames(tmp_path) -> list[dict]:
    write_frames(tmp_path / "frames", ["0", "1", "2"])
    return [file(tmp_path / "frames" / f"{t}.png") for t in range(3)]


def row_of(**arguments) -> dict:
    return clips_from_rows([clip_row("v", **arguments)])[0]


def test_ids_of_indexed_pngs_are_found_and_255_is_ignored(tmp_path, frames):
    masks = [index_mask(t, [3, 7]) for t in range(3)]
    masks[1][masks[1] == 7] = 0
    masks[2][0, :5] = 255
    for t, mask in enumerate(masks):
        write_mask(tmp_path / f"{t}.png", mask)
    row = row_of(frames=frames, objects=[], annotations=[file(tmp_path / f"{t}.png") for t in range(3)])
    clip = load_clip(row, [2, 1, 0])
    assert clip.frames.shape == (3, 3, HEIGHT, WIDTH) and clip.frames.dtype == torch.uint8
    assert np.array_equal(clip.frames[0].permute(1, 2, 0), draw_frame(2))
    assert clip.labels == [None, None]
    for n, i in enumerate([3, 7]):
        assert np.array_equal(clip.masks[n], np.stack([masks[t] == i for t in (2, 1, 0)]))
    assert clip.ignore.sum() == 5 and clip.ignore[0, 0, :5].all()


def test_listed_objects_keep_their_place_and_label_when_absent(tmp_path, frames):
    write_mask(tmp_path / "2.png", index_mask(2, [2]))
    objects = [clip_object(1, "cat"), clip_object(2, "dog")]
    row = row_of(frames=frames, objects=objects, annotations=[None, None, file(tmp_path / "2.png")])
    clip = load_clip(row, [0, 2])
    assert clip.annotated.tolist() == [False, True]
    assert clip.labels == ["cat", "dog"]
    assert clip.masks.any(dim=(2, 3)).tolist() == [[False, False], [False, True]]


def test_binary_masks_take_any_value(tmp_path, frames):
    Image.fromarray(index_mask(0, [255])).save(tmp_path / "0.png")
    row = row_of(
        frames=frames[:1], objects=[clip_object(1)], annotations=[file(tmp_path / "0.png")], binary_masks=True
    )
    clip = load_clip(row, [0])
    assert clip.masks.sum() == 100 and not clip.ignore.any()


def test_run_lengths_may_overlap_and_crowds_are_ignored(frames):
    a, b, crowd = np.zeros((3, HEIGHT, WIDTH), dtype=bool)
    a[10:20, 10:20] = b[15:25, 10:20] = crowd[0:20, 0:30] = True
    objects = [
        clip_object(1, "a", segmentations=[rle(a), None, None]),
        clip_object(9, "many", crowd=True, segmentations=[rle(crowd), None, None]),
        clip_object(2, "b", segmentations=[rle(b), rle(b), None]),
    ]
    clip = load_clip(row_of(frames=frames, objects=objects), [0, 1, 2])
    assert clip.labels == ["a", "b"]
    assert np.array_equal(clip.masks[:, 0], np.stack([a, b]))
    assert clip.masks.any(dim=(2, 3)).tolist() == [[True, False, False], [True, True, False]]
    assert np.array_equal(clip.ignore[0], crowd & ~a & ~b)
    assert clip.annotated.all()


@pytest.mark.parametrize("kept", [20, 300])
def test_a_broken_image_is_named(tmp_path, kept):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"^{path} can't be read: "):
        load_frames(clip_row("v", [file(path)], []), [0])


def test_a_mask_of_another_size_is_an_error(tmp_path, frames):
    write_mask(tmp_path / "0.png", np.ones((10, 10), dtype=np.uint8))
    row = row_of(frames=frames[:1], objects=[], annotations=[file(tmp_path / "0.png")])
    with pytest.raises(ValueError, match=r"frame 0 of v.*\(10, 10\).*\(48, 64\)"):
        load_clip(row, [0])


@pytest.mark.parametrize("kind", ["polygon", "counts", "compressed"])
def test_every_kind_of_segmentation_becomes_run_lengths(kind):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[5:15, 10:30] = True
    flat = np.flatnonzero(np.diff(mask.T.ravel().astype(int))) + 1
    segmentation = {
        "polygon": [[10, 5, 30, 5, 30, 15, 10, 15]],
        "counts": {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *flat, mask.size]).tolist()},
        "compressed": rle(mask),
    }[kind]
    assert encode_rle(segmentation, HEIGHT, WIDTH) == rle(mask)
    assert encode_rle(None, HEIGHT, WIDTH) is None


def test_lines_among_polygons_have_no_area():
    square, line = [10, 5, 30, 5, 30, 15, 10, 15], [1, 1, 20, 20]
    assert encode_rle([line], HEIGHT, WIDTH) is None
    assert encode_rle([line, square], HEIGHT, WIDTH) == encode_rle([square], HEIGHT, WIDTH)


def test_frames_of_a_video_file_are_found_by_number(tmp_path):
    # Uneven times and B-frames: what defeats seeking by frame rate.
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "8", "bf": "3", "crf": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for t in range(24):
            frame = av.VideoFrame.from_ndarray(np.full((HEIGHT, WIDTH, 3), 10 * t, dtype=np.uint8), format="rgb24")
            frame.pts = t + (t > 9) * 5
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    row = row_of(frames=[], objects=[], video=file(tmp_path / "v.mp4"), video_frames=list(range(0, 24, 2)))
    Dataset.from_list([row], features=FEATURES).save_to_disk(str(tmp_path / "saved"))
    saved = load_from_disk(str(tmp_path / "saved"))[0]
    for source in (row, saved):
        values = [frame.mean() for frame in load_frames(source, [11, 3, 3, 6])]
        assert np.allclose(values, [220, 60, 60, 120], atol=3)
    assert saved["video"]["bytes"] == (tmp_path / "v.mp4").read_bytes()
    row["video_frames"] = [40]
    with pytest.raises(ValueError, match="frame 40 is wanted of .*v.mp4, which has 24 frames"):
        load_frames(row, [0])


def test_a_video_cut_off_before_its_codec_is_named(tmp_path):
    with av.open(str(tmp_path / "v.mp4"), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(WIDTH, HEIGHT, "yuv420p")))
        container.mux(stream.encode(None))
    cut = tmp_path / "cut.mp4"
    cut.write_bytes((tmp_path / "v.mp4").read_bytes()[:400])
    with pytest.raises(ValueError, match="can't be decoded: its codec is unknown"):
        load_frames(row_of(frames=[], objects=[], video=file(cut), video_frames=[0]), [0])
    problems = find_problems(clips_from_rows([clip_row("cut", [], [], video=file(cut))]), open_files=True)
    assert problems["broken"] == [str(cut)]


def test_many_rows_keep_their_order_and_none_is_no_error(monkeypatch):
    monkeypatch.setattr("ausm_hf.data.clips.ROWS_PER_CHUNK", 2)
    for count in (0, 1, 2, 5):
        clips = clips_from_rows(clip_row(str(n), [], []) for n in range(count))
        assert clips["video_id"][:] == [str(n) for n in range(count)] and clips.features == FEATURES


@pytest.mark.parametrize("way", ["disk", "parquet"])
def test_round_trip_holds_all_that_the_files_held(tmp_path, frames, way):
    write_mask(tmp_path / "m.png", index_mask(0, [1, 2]))
    separate = tmp_path / "separate.png"
    write_mask(separate, index_mask(1, [1]))
    indexed, run_lengths = [file(tmp_path / "m.png"), None, None], rle(index_mask(0, [1]))
    clips = clips_from_rows(
        [
            clip_row("indexed", frames, [clip_object(1, "cat"), clip_object(2)], annotations=indexed),
            clip_row("each", frames[:2], [clip_object(4, masks=[None, file(separate)])], label_set="coco"),
            clip_row("rle", frames[:1], [clip_object(5, segmentations=[run_lengths])]),
        ]
    )
    before = [load_clip(row, list(range(len(row["annotated"])))) for row in clips]
    if way == "disk":
        clips.save_to_disk(str(tmp_path / "saved"))
    else:
        # What `push_to_hub` does to the table before it uploads it.
        embedded = clips.with_format("arrow").map(embed_table_storage, batched=True).with_format(None)
        embedded.to_parquet(str(tmp_path / "clips.parquet"))
    for path in [*(tmp_path / "frames").iterdir(), tmp_path / "m.png", separate]:
        path.unlink()
    if way == "disk":
        loaded = load_from_disk(str(tmp_path / "saved"))
    else:
        loaded = load_dataset("parquet", data_files=str(tmp_path / "clips.parquet"), cache_dir=str(tmp_path / "cache"))
        loaded = loaded["train"]
    assert loaded.features == clips.features
    for old, row, original in zip(before, loaded, clips):
        new = load_clip(row, list(range(len(row["annotated"]))))
        assert torch.equal(old.frames, new.frames) and torch.equal(old.masks, new.masks)
        assert torch.equal(old.ignore, new.ignore) and torch.equal(old.annotated, new.annotated)
        assert old.labels == new.labels
        assert {k: row[k] for k in ("video_id", "label_set", "annotated")} == {
            k: original[k] for k in ("video_id", "label_set", "annotated")
        }
