"""A folder of one's own videos: frames as `read_video` shows them, masks as they were drawn."""

import json
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from trees import HEIGHT, WIDTH, draw_frame, index_mask, write_frames, write_mask

from ausm_hf import read_video
from ausm_hf.data.check import check_clips, find_problems
from ausm_hf.data.clips import load_clip, mask_values
from ausm_hf.data.mask_folders import image_files
from ausm_hf.data.video_folder import video_folder


def write_video(path: Path, pictures: list[np.ndarray], **options: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "1", **options})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def greys(count: int) -> list[np.ndarray]:
    return [np.full((HEIGHT, WIDTH, 3), 8 * t, np.uint8) for t in range(count)]


def frames_folder(root: Path, masks: list[np.ndarray]) -> None:
    for part in ("videos/dive", "masks/dive"):
        (root / part).mkdir(parents=True)
    for t, mask in enumerate(masks):
        Image.fromarray(draw_frame(t)).save(root / "videos" / "dive" / f"{t:05d}.png")
        write_mask(root / "masks" / "dive" / f"{t:05d}.png", mask)


@pytest.mark.filterwarnings("ignore:video 'walk' should have")
@pytest.mark.parametrize("kind", ["trimmed", "avi"])
def test_frames_of_a_file_are_counted_as_it_is_read(tmp_path, kind):
    if kind == "avi":  # stores no times to show frames at, and these are coded in another order
        path = tmp_path / "videos" / "walk.avi"
        write_video(path, greys(24), bf="2")
    else:  # cut without coding it anew, as phones do: an edit list hides the frames before
        path = tmp_path / "videos" / "walk.mp4"
        write_video(tmp_path / "full.mp4", greys(24), bf="0", g="12")
        path.parent.mkdir()
        unchanged = {"avoid_negative_ts": "disabled"}
        with av.open(str(tmp_path / "full.mp4")) as full, av.open(str(path), "w", options=unchanged) as cut:
            stream = cut.add_stream_from_template(full.streams.video[0])
            for packet in full.demux(video=0):
                if packet.dts is not None:
                    shift = int(5 / 24 / packet.time_base)
                    packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                    cut.mux(packet)
    shown = [frame.mean() for frame in read_video(path)]
    assert len(shown) == (24 if kind == "avi" else 19)
    numbers = [0, 3, 7, len(shown) - 1]
    for number in numbers:
        write_mask(tmp_path / "masks" / "walk" / f"{number}.png", index_mask(0, [1]))
    clip = load_clip(video_folder(str(tmp_path))[0], [2, 0, 3, 1])
    assert np.allclose(clip.frames.float().mean(dim=(1, 2, 3)), [shown[numbers[k]] for k in (2, 0, 3, 1)], atol=0.1)
    write_mask(tmp_path / "masks" / "walk" / f"{len(shown)}.png", index_mask(0, [1]))
    row = video_folder(str(tmp_path))[0]
    with pytest.raises(ValueError, match=f"frame {len(shown)} is wanted of .*, which has {len(shown)} frames"):
        load_clip(row, [4])


@pytest.mark.parametrize("matrix", [(-1, 0, 0, -1), (0, 1, -1, 0)], ids=["180", "90"])
def test_a_turned_video_is_upright(tmp_path, matrix):
    path = tmp_path / "videos" / "walk.mp4"
    write_video(path, [draw_frame(t) for t in range(2)])
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44
    a, b, c, d = ((1 << 16) * value for value in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    upright = list(read_video(path))
    write_mask(tmp_path / "masks" / "walk" / "1.png", np.ones(upright[1].shape[:2], np.uint8))
    clip = load_clip(video_folder(str(tmp_path))[0], [0])
    assert np.array_equal(clip.frames[0].permute(1, 2, 0), upright[1])


def test_photographs_are_upright(tmp_path):
    frames_folder(tmp_path, [np.ones((WIDTH, HEIGHT), np.uint8)])
    exif = Image.Exif()
    exif[0x112] = 6  # turn it by 90 degrees
    photograph = tmp_path / "videos" / "dive" / "00000.png"
    Image.fromarray(draw_frame(0)).save(photograph, exif=exif)
    clip = load_clip(video_folder(str(tmp_path))[0], [0])
    assert np.array_equal(clip.frames[0].permute(1, 2, 0), next(iter(read_video(photograph.parent))))
    assert clip.frames.shape[2:] == (WIDTH, HEIGHT)


def test_frames_come_in_the_order_of_their_numbers(tmp_path):
    names = [f"{t}.png" for t in range(12)]
    for part in ("videos/dive", "masks/dive"):
        (tmp_path / part).mkdir(parents=True)
        for t, name in enumerate(names):
            Image.fromarray(np.full((HEIGHT, WIDTH), 1 + t, np.uint8)).save(tmp_path / part / name)
        (tmp_path / part / "._3.png").write_bytes(b"left by a file system")
    (tmp_path / "videos" / "._dive.mp4").write_bytes(b"left by a file system")
    (tmp_path / "masks" / "dive" / ".cache").mkdir()
    clips = video_folder(str(tmp_path))
    check_clips(clips, open_files=True)
    assert [Path(frame["path"]).name for frame in clips[0]["frames"]] == names and len(clips) == 1
    clip = load_clip(clips[0], list(range(12)))
    assert clip.frames[:, 0, 0, 0].tolist() == [int(f[0, 0, 0]) for f in read_video(tmp_path / "videos" / "dive")]
    padded = tmp_path / "padded"
    padded.mkdir()
    for t in (3, 20, 100):
        (padded / f"{t:05d}.jpg").touch()
    assert image_files(padded) == sorted(padded.iterdir())


def test_objects_that_labels_do_not_name_are_objects(tmp_path):
    frames_folder(tmp_path, [index_mask(t, [1, 2]) for t in range(2)])
    (tmp_path / "labels.json").write_text(json.dumps({"dive": {"2": "fish"}}))
    clip = load_clip(video_folder(str(tmp_path), "sea", exhaustive=True)[0], [0, 1])
    assert clip.labels == ["fish", None] and not clip.ignore.any()
    assert np.array_equal(clip.masks[:, 1], np.stack([index_mask(1, [1, 2]) == i for i in (2, 1)]))


def test_what_is_no_number_of_an_object_is_refused(tmp_path):
    masks = [index_mask(t, [1]) for t in range(5)]
    masks[0][-1] = 255  # unknown pixels beside an object are fine
    frames_folder(tmp_path, masks)
    folder = tmp_path / "masks" / "dive"
    clips = video_folder(str(tmp_path))
    check_clips(clips, open_files=True)
    assert load_clip(clips[0], [0]).ignore.sum() == WIDTH
    Image.fromarray(index_mask(1, [255])).save(folder / "00001.png")
    Image.fromarray(np.stack([index_mask(2, [1])] * 3, axis=-1)).save(folder / "00002.png")
    Image.fromarray(index_mask(3, [1]).astype(np.uint16) * 300).save(folder / "00003.png")
    Image.fromarray(index_mask(4, [7]).astype(np.uint16)).save(folder / "00004.png")
    complaints = {
        1: "with no value but 0 and 255; number objects from 1 to 254: 255 marks pixels of which nothing is known",
        2: "of mode RGB; each pixel must be the number of its object, as in an indexed PNG",
        3: "with a value above 255; number objects from 1 to 254",
    }
    with pytest.raises(ValueError) as found:
        check_clips(clips, open_files=True)
    for t, complaint in complaints.items():
        assert f"1 masks {complaint}:\n    {folder / f'0000{t}.png'}" in str(found.value)
        with pytest.raises(ValueError) as refused:
            load_clip(clips[0], [t])
        assert str(refused.value) == f"{folder / f'0000{t}.png'} is a mask {complaint}"
    assert "00004" not in str(found.value) and load_clip(clips[0], [4]).masks.sum() == 100
    # Whoever lists it means it.
    (tmp_path / "labels.json").write_text(json.dumps({"dive": {"255": "fish"}}))
    assert load_clip(video_folder(str(tmp_path))[0], [1]).masks.sum() == 100


@pytest.mark.parametrize("what", ["number", "size", "size, no object"])
def test_masks_that_do_not_fit_their_video_are_found(tmp_path, what):
    write_video(tmp_path / "videos" / "a.mp4", greys(6))
    size = (HEIGHT, WIDTH) if what == "number" else (24, 32)
    for t in (0, 6 if what == "number" else 5):
        write_mask(tmp_path / "masks" / "a" / f"{t}.png", np.full(size, what != "size, no object", np.uint8))
    clips = video_folder(str(tmp_path))
    assert find_problems(clips) == {}
    (problem,) = find_problems(clips, open_files=True)["not to be loaded"]
    assert problem.startswith("a: ") and ("has 6 frames" if what == "number" else "(24, 32)") in problem


def test_the_check_loads_every_frame(tmp_path):
    write_frames(tmp_path / "videos" / "a", [f"{t:02d}" for t in range(20)])
    for t in range(20):
        write_mask(tmp_path / "masks" / "a" / f"{t:02d}.png", index_mask(t, [1]))
    check_clips(video_folder(str(tmp_path)), open_files=True)
    write_mask(tmp_path / "masks" / "a" / "19.png", np.ones((8, 8), np.uint8))
    with pytest.raises(ValueError, match="frame 19 of a, or a mask of it, is \\(8, 8\\)"):
        check_clips(video_folder(str(tmp_path)), open_files=True)


@pytest.mark.parametrize(
    ("stray", "complaint"),
    [
        ("masks/fall/00000.png", "masks names videos that aren't in .*videos: fall; want .*files that end in .mp4"),
        ("masks/dive/0.png", "dive/0.png is the mask of no frame of"),
        ("masks/dive/00001.jpg", "dive/00001.jpg is the mask of no frame of"),
        (
            "masks/walk/00001.png",
            "walk/00001.png is the mask of no frame of .* or in a folder per object",
        ),
        ("masks/walk/1/1.png", "walk/1/1.png is the mask of no frame of"),
        ("masks/take/first.png", "take.mp4 must be PNGs named by frame number, got first.png"),
        ("masks/take/0.jpg", "take.mp4 must be PNGs named by frame number, got 0.jpg"),
        ("videos/dive.mp4", "has several videos of the name dive"),
    ],
)
def test_nothing_is_passed_over(tmp_path, stray, complaint):
    frames_folder(tmp_path, [index_mask(t, [1]) for t in range(2)])
    write_frames(tmp_path / "videos" / "walk", ["00000", "00001"])
    write_mask(tmp_path / "masks" / "walk" / "1" / "00000.png", index_mask(0, [1]))
    write_video(tmp_path / "videos" / "take.mp4", greys(2))
    write_mask(tmp_path / "masks" / "take" / "0.PNG", index_mask(0, [1]))
    (tmp_path / "masks" / "dive" / "00000.png").rename(tmp_path / "masks" / "dive" / "00000.PNG")
    clips = video_folder(str(tmp_path))
    check_clips(clips, open_files=True)
    assert [sum(row["annotated"]) for row in clips] == [2, 1, 1]
    (tmp_path / stray).parent.mkdir(exist_ok=True)
    (tmp_path / stray).touch()
    with pytest.raises(ValueError, match=complaint):
        video_folder(str(tmp_path))


def test_a_phone_video_is_a_video(tmp_path):
    write_video(tmp_path / "videos" / "take.m4v", greys(2))
    write_mask(tmp_path / "masks" / "take" / "1.png", index_mask(1, [1]))
    assert load_clip(video_folder(str(tmp_path))[0], [0]).masks.sum() == 100


def test_a_video_file_without_masks_is_said_to_have_none(tmp_path):
    write_video(tmp_path / "videos" / "take.mp4", greys(2))
    (tmp_path / "masks").mkdir()
    assert find_problems(video_folder(str(tmp_path))) == {"no masks": ["take"]}


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_no_part_of_an_object(tmp_path, mode):
    write_frames(tmp_path / "videos" / "dive", ["00000"])
    mask = index_mask(0, [1]) > 0
    cut_out = Image.new(mode, (WIDTH, HEIGHT), "white")
    cut_out.putalpha(Image.fromarray(mask))
    (tmp_path / "masks" / "dive" / "1").mkdir(parents=True)
    cut_out.save(tmp_path / "masks" / "dive" / "1" / "00000.png")
    assert np.array_equal(load_clip(video_folder(str(tmp_path))[0], [0]).masks[0, 0], mask)


def test_grey_masks_with_transparent_parts(tmp_path):
    write_frames(tmp_path / "frames", ["00000"])
    index = index_mask(0, [1, 2])
    grey = Image.fromarray(index)
    grey.putalpha(Image.fromarray(np.where(index == 2, 0, 255).astype(np.uint8)))
    grey.save(tmp_path / "00000.png")
    with Image.open(tmp_path / "00000.png") as image:
        assert image.mode == "LA"
        assert np.array_equal(mask_values(image, "mask", binary=False), np.where(index == 1, 1, 0))
        assert np.array_equal(mask_values(image, "mask", binary=True), index == 1)


def test_labels_the_wrong_way_round_are_named(tmp_path):
    frames_folder(tmp_path, [index_mask(0, [1])])
    (tmp_path / "labels.json").write_text(json.dumps({"dive": {"1": "fish"}}), encoding="utf-8-sig")
    assert video_folder(str(tmp_path), "sea")[0]["objects"][0]["label"] == "fish"
    (tmp_path / "labels.json").write_text(json.dumps({"dive": {"fish": 1}}))
    with pytest.raises(ValueError, match=r'labels.json has {"fish": 1} in dive; want the number of an object and its'):
        video_folder(str(tmp_path), "sea")
