import functools
import http.server
import io
import itertools
import os
import re
import struct
import subprocess
import sys
import threading
import traceback
import warnings
import weakref
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from ausm_hf.model.pipeline_ausm import read_frames
from ausm_hf.video import VideoSource, VideoWriter, as_rgb_frame, read_video


def smooth_frames(count, height=48, width=64):
    """A pattern that drifts: smooth enough for 4:2:0 and lossy coding to keep."""
    y, x = np.mgrid[:height, :width]
    frames = []
    for t in range(count):
        waves = [np.sin((x + 2 * t) / 9), np.cos((y - t) / 7), np.sin((x + y + t) / 12)]
        frames.append((127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8))
    return frames


def write(path, frames, fps=25, times=None):
    with VideoWriter(path, fps=fps, size=frames[0].shape[:2]) as writer:
        for i, frame in enumerate(frames):
            writer.write(frame, time=times[i] if times else None)
    return path


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_written_video_reads_back(tmp_path, suffix):
    frames = smooth_frames(12)
    source = read_video(write(tmp_path / f"waves{suffix}", frames, fps=Fraction(30000, 1001)))
    assert source.name == "waves"
    assert source.size == (48, 64)
    assert source.fps == Fraction(30000, 1001)
    assert source.num_frames == (None if suffix == ".mkv" else 12)  # Matroska doesn't say
    decoded = list(source)
    assert len(decoded) == 12
    assert all(f.dtype == np.uint8 and f.shape == (48, 64, 3) and f.flags.c_contiguous for f in decoded)
    assert psnr(frames, decoded) > 33
    # Colours come back without a shift but for the rounding of FFmpeg's fast conversion.
    assert abs(np.mean(np.asarray(decoded, float) - np.asarray(frames, float), axis=(0, 1, 2))).max() < 2
    with av.open(str(tmp_path / f"waves{suffix}")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert int(stream.codec_context.colorspace) == 6
        assert psnr([f.to_image() for f in container.decode(stream)], frames) > 33


@pytest.mark.parametrize("height, width", [(1, 1), (47, 64), (48, 63), (31, 33)])
def test_odd_sizes_are_padded_to_even(tmp_path, height, width):
    frames = smooth_frames(3, height, width)
    decoded = list(read_video(write(tmp_path / "odd.mp4", frames)))
    assert decoded[0].shape == (height + height % 2, width + width % 2, 3)
    # Colour has half the resolution, so only brightness can be as it was.
    assert psnr(frames[0].mean(-1), decoded[0][:height, :width].mean(-1)) > 25
    assert abs(decoded[0][-1].astype(int) - decoded[0][height - 1]).max() < 20


def test_frames_come_one_at_a_time():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield np.zeros((4, 4, 3), np.uint8)

    source = read_video(endless())
    assert len(taken) == 1  # the first frame, to know the size
    for index, _ in enumerate(source):
        if index == 2:
            break
    assert len(taken) == 3


def test_three_frames_of_a_long_file_read_a_fraction_of_it(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (100, 240, 320, 3), dtype=np.uint8)
    path = write(tmp_path / "long.mp4", list(noise))
    size, read = path.stat().st_size, []

    class Counted(io.FileIO):
        def read(self, size=-1):
            read.append(super().read(size))
            return read[-1]

    open_container = av.open
    monkeypatch.setattr(av, "open", lambda location, **options: open_container(Counted(location), **options))

    def share(count):
        read.clear()
        for _, _ in zip(range(count), read_video(path)):
            pass
        return sum(map(len, read)) / size

    assert share(3) < 0.2 and share(100) > 0.9


def test_memory_does_not_grow_with_length(tmp_path):
    """
    Peak memory of reading and writing 2000 frames is that of 300, in a process of its own: the first few files let
    the threads of encoder and decoder get up to 4 MB, once, at a time of their choosing.
    """
    code = """
import sys
from ausm_hf.video import VideoWriter, read_video
import numpy as np
peaks = []
for count in (300, 300, 300, 2000):
    frame = np.zeros((240, 320, 3), np.uint8)
    with VideoWriter(sys.argv[1], 24, (240, 320)) as writer:
        for i in range(count):
            frame[:, i % 320] = i % 256
            writer.write(frame)
    assert sum(1 for _ in read_video(sys.argv[1])) == count
    peaks.append(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]))  # ru_maxrss is inherited
print(peaks[2], peaks[3])
"""
    if not Path("/proc/self/status").is_file():
        pytest.skip("peak memory is read from /proc")
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.mp4")],
        capture_output=True,
        text=True,
        # One arena: a new one for a thread takes 3 MB at any time.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_ARENA_MAX": "1"},
    )
    assert result.returncode == 0, result.stderr
    short, long = map(int, result.stdout.split())
    assert long < 1.05 * short  # 1700 more frames would be 390 MB


def test_a_photograph_in_memory_is_upright_too(tmp_path):
    from ausm_hf import AusmImageProcessor

    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    photo = Image.open(tmp_path / "photo.png")
    assert read_video(photo).size == (60, 40) and np.array_equal(next(iter(read_video(photo))), np.rot90(pixels, -1))
    turned, wanted = (AusmImageProcessor()(images=x)["pixel_values"] for x in (photo, np.rot90(pixels, -1).copy()))
    assert torch.equal(turned, wanted)


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def forbidden(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(ValueError, match="can't be read: Permission denied"):
        read_video(tmp_path)


def test_sources_are_read_again_or_say_that_they_cannot(tmp_path):
    frames = smooth_frames(4)
    for source in (read_video(write(tmp_path / "a.mp4", frames)), read_video(frames)):
        assert [len(list(source)), len(list(source))] == [4, 4]
        begun = iter(source)
        next(begun)
        assert len(list(source)) == 4  # two readings don't disturb each other
        assert len(list(begun)) == 3
    once = read_video(iter(frames))
    assert isinstance(once, VideoSource)
    assert len(list(once)) == 4
    with pytest.raises(ValueError, match="only once"):
        list(once)
    assert read_video(once) is once


def test_real_video(shared_data):
    path = shared_data / "davis2016" / "bear.mp4"
    source = read_video(path)
    assert (source.name, source.size, source.num_frames, source.fps) == ("bear", (240, 426), 82, 24)
    with av.open(str(path)) as container:
        for ours, (time, frame) in zip(container.decode(video=0), source.with_times()):
            assert time == pytest.approx(ours.time)
            assert np.array_equal(frame, ours.to_ndarray(format="rgb24"))


def test_variable_frame_rate_is_kept(tmp_path):
    times = [0, 0.1, 0.15, 0.5, 0.6]
    source = read_video(write(tmp_path / "vfr.mp4", smooth_frames(5), times=times))
    assert [time for time, _ in source.with_times()] == pytest.approx(times, abs=1e-4)
    with av.open(str(tmp_path / "vfr.mp4")) as container:
        assert float(container.duration / av.time_base) == pytest.approx(0.6 + 0.1, abs=1e-3)


def test_times_start_at_zero_and_go_on(tmp_path):
    source = read_video(write(tmp_path / "late.mp4", smooth_frames(4), times=[5, 5.5, 5.5, 6]))
    times = [time for time, _ in source.with_times()]
    assert times == pytest.approx([0, 0.5, 0.5, 1], abs=1e-3)
    assert all(later > earlier for earlier, later in zip(times, times[1:]))


def test_times_of_an_avi_whose_frames_are_coded_in_another_order(tmp_path):
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "3", "b_strategy": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for grey in range(40):
            picture = np.full((48, 64, 3), 6 * grey, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    times, frames = zip(*read_video(tmp_path / "a.avi").with_times())
    assert np.allclose(times, np.arange(40) / 25) and np.all(np.diff([frame.mean() for frame in frames]) > 0)


def test_times_go_on_where_recordings_are_joined(tmp_path):
    with av.open(str(tmp_path / "one.ts"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in smooth_frames(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    (tmp_path / "three.ts").write_bytes((tmp_path / "one.ts").read_bytes() * 3)
    times = [time for time, _ in read_video(tmp_path / "three.ts").with_times()]
    assert times == pytest.approx([i / 25 for i in range(15)], abs=1e-3)


@pytest.mark.parametrize(
    "how, matrix",
    [
        ("ROTATE_270", (0, 1, -1, 0)),  # counterclockwise, as PIL counts
        ("ROTATE_180", (-1, 0, 0, -1)),
        ("ROTATE_90", (0, -1, 1, 0)),
        ("FLIP_LEFT_RIGHT", (-1, 0, 0, 1)),
        ("FLIP_TOP_BOTTOM", (1, 0, 0, -1)),
        ("TRANSPOSE", (0, 1, 1, 0)),
        ("TRANSVERSE", (0, -1, -1, 0)),
    ],
)
def test_videos_are_turned_and_mirrored_as_players_do(tmp_path, how, matrix):
    """The display matrix of the MP4 header (ISO 14496-12, tkhd) is patched by hand; the picture must turn with it."""
    upright = smooth_frames(1, 48, 64)[0]
    upright[:16, :16] = 255  # a mark in the upper left corner
    path = tmp_path / "phone.mp4"
    with VideoWriter(path, fps=25, size=(48, 64), pixel_aspect=Fraction(4, 3)) as writer:
        writer.write(upright)
        writer.write(upright)
    assert read_video(path).pixel_aspect == Fraction(4, 3)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: 40 bytes from the version field to the matrix
    one, end = 1 << 16, 1 << 30
    assert struct.unpack(">9i", data[at : at + 36]) == (one, 0, 0, 0, one, 0, 0, 0, end)
    a, b, c, d = (one * value for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, end)
    path.write_bytes(data)

    source = read_video(path)
    wanted = np.asarray(Image.fromarray(upright).transpose(Image.Transpose[how]))
    assert source.size == wanted.shape[:2]
    assert source.pixel_aspect == (Fraction(4, 3) if matrix[0] else Fraction(3, 4))
    assert psnr(wanted, next(iter(source))) > 30
    assert all(np.array_equal(a, b) for a, b in zip(read_frames(path), source, strict=True))  # of a checkpoint


def test_jpegs_with_exif_data_in_a_video(tmp_path):
    """PyAV 18 does not know such data, and then gives no display matrix."""
    exif = Image.Exif()
    exif[0x0112] = 1
    frame = smooth_frames(1)[0]
    Image.fromarray(frame).save(tmp_path / "a.jpg", exif=exif, quality=95)
    (tmp_path / "a.mjpeg").write_bytes((tmp_path / "a.jpg").read_bytes() * 2)
    for read in (read_video, read_frames):
        assert [psnr(frame, shown) > 30 for shown in read(tmp_path / "a.mjpeg")] == [True, True]


@pytest.mark.parametrize(("size", "colors"), [((480, 640), "ITU601"), ((720, 1280), "ITU709")])
def test_colours_that_are_not_named_are_those_that_players_show(tmp_path, size, colors):
    frame = np.zeros((*size, 3), np.uint8)
    frame[:] = np.repeat([(200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 160, 120)], size[1] // 4, axis=0)
    with av.open(str(tmp_path / "unnamed.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "4"})
        (stream.height, stream.width), stream.pix_fmt = size, "yuv420p"
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace=colors, dst_color_range="MPEG")
        container.mux(stream.encode(picture))
        container.mux(stream.encode())
    centers = [size[1] * (2 * i + 1) // 8 for i in range(4)]
    for read in (read_video, read_frames):
        (shown,) = read(tmp_path / "unnamed.mp4")
        assert abs(shown[size[0] // 2, centers].astype(int) - frame[0, centers]).max() <= 4


def test_list_of_paths_of_images(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in ("b", "a", "c")]
    for value, path in enumerate(paths):
        Image.fromarray(np.full((4, 6), 50 * value, np.uint8)).save(path)
    video = read_video([str(path) for path in paths])
    assert video.num_frames == 3 and [frame[0, 0, 0] for frame in video] == [0, 50, 100]
    with pytest.raises(ValueError, match="'b.mp4', which is no image; .* several videos one by one"):
        read_video([paths[0], "b.mp4"])


def test_folder_of_frames_in_natural_order(tmp_path):
    folder = tmp_path / "shots"
    folder.mkdir()
    for value, name in enumerate(["frame2.png", "frame10.PNG", "frame100.bmp"]):
        Image.new("RGB", (6, 4), (value, value, value)).save(folder / name)
    (folder / "notes.txt").write_text("not a frame")
    (folder / ".frame0.png").write_text("hidden, as some file managers leave them")
    source = read_video(folder)
    assert (source.name, source.size, source.num_frames, source.fps) == ("shots", (4, 6), 3, None)
    assert [(time, frame[0, 0, 0]) for time, frame in source.with_times()] == [(None, 0), (None, 1), (None, 2)]
    assert [frame[0, 0, 0] for frame in read_video(str(folder / "*1*"))] == [1, 2]


def test_glob_pattern_of_one_video_and_of_several(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write(tmp_path / name, smooth_frames(2))
    assert read_video(str(tmp_path / "a*.mp4")).num_frames == 2
    with pytest.raises(ValueError, match="matches 2 files"):
        read_video(str(tmp_path / "*.mp4"))
    with pytest.raises(ValueError, match="matches no file"):
        read_video(str(tmp_path / "*.avi"))


def test_the_last_frame_lasts_as_long_as_the_one_before(tmp_path):
    """Whatever the rate says: each picture of an animated image is shown for its own time."""
    for fps in (24, 5):
        path = write(tmp_path / "a.mp4", smooth_frames(8), fps, [i * 0.07 for i in range(8)])
        with av.open(str(path)) as container:
            assert float(container.duration / av.time_base) == pytest.approx(8 * 0.07, abs=1e-3)


@pytest.mark.parametrize("suffix", ["webp", "png"])
def test_an_animated_image_is_a_video(tmp_path, suffix):
    greys = [0, 80, 160, 240]
    pictures = [Image.new("RGB", (16, 12), (grey,) * 3) for grey in greys]
    path = tmp_path / f"a.{suffix}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[40, 60, 40, 40], lossless=True)
    video = read_video(path)
    assert (video.name, video.num_frames, video.size) == ("a", 4, (12, 16))
    for _ in range(2):
        read = list(video.read())
        assert [(index, round(time, 3), frame.mean()) for index, time, frame in read] == list(
            zip(range(4), [0, 0.04, 0.1, 0.14], greys)
        )
    assert [(index, round(time, 3)) for index, time, _ in video.read(2)] == [(2, 0.1), (3, 0.14)]
    if suffix == "png":  # of a WebP that is cut off nothing can be read
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.warns(UserWarning, match="'a.png', frame 3: "):
            assert len(list(read_video(path))) == 3


def test_single_images(tmp_path):
    Image.new("L", (6, 4), 7).save(tmp_path / "grey.png")
    for source in (tmp_path / "grey.png", Image.new("L", (6, 4), 7), np.full((4, 6), 7, np.uint8)):
        frames = list(read_video(source))
        assert len(frames) == 1 and frames[0].shape == (4, 6, 3) and (frames[0] == 7).all()


def test_exif_orientation_of_photographs_is_undone(tmp_path):
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # taken with the phone upright
    image.save(tmp_path / "photo.jpg", exif=exif)
    assert read_video(tmp_path / "photo.jpg").size == (6, 4)


def test_arrays_and_tensors_as_videos():
    array = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    for source in (array, torch.from_numpy(array).permute(0, 3, 1, 2), [Image.fromarray(a) for a in array]):
        video = read_video(source)
        assert (video.num_frames, video.size) == (5, (4, 6))
        assert np.array_equal(np.stack(list(video)), array)


def test_as_rgb_frame_takes_all_common_kinds():
    rgb = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    grey = rgb[:, :, 0]
    alpha = np.dstack([rgb, np.zeros_like(grey)])
    chw = torch.from_numpy(rgb).permute(2, 0, 1)
    same = [
        rgb,
        Image.fromarray(rgb),
        rgb / 255.0,
        (rgb / 255.0).astype(np.float32),
        alpha,
        Image.fromarray(alpha),  # alpha is dropped: nothing shows through, not even where it is 0
        chw,
        (chw / 255.0).requires_grad_(),
        torch.from_numpy(alpha).permute(2, 0, 1),
        np.asfortranarray(rgb),
        np.ascontiguousarray(rgb.transpose(2, 0, 1)),
        torch.from_numpy(rgb),
    ]
    for kind in same:
        frame = as_rgb_frame(kind)
        assert frame.dtype == np.uint8 and frame.flags.c_contiguous
        assert np.array_equal(frame, rgb)
    assert as_rgb_frame(np.array([[0, 0.0019, 0.0021, 0.999, 1.0005]]))[0, :, 0].tolist() == [0, 0, 1, 255, 255]
    assert abs(as_rgb_frame((chw / 255).bfloat16()).astype(int) - rgb).max() <= 1
    for kind in [grey, grey[:, :, None], Image.fromarray(grey), torch.from_numpy(grey.copy()), chw[:1], grey / 255]:
        assert np.array_equal(as_rgb_frame(kind), np.dstack([grey] * 3))
    assert np.array_equal(as_rgb_frame(Image.fromarray(grey > 99)), np.dstack([(grey > 99) * np.uint8(255)] * 3))
    assert as_rgb_frame(np.zeros((1, 1), np.uint8)).shape == (1, 1, 3)


@pytest.mark.parametrize(
    "frame, message",
    [
        (np.zeros((5, 6, 2), np.uint8), "shape"),
        (np.zeros((5, 4, 6), np.uint8), r"shape \(5, 4, 6\)"),
        (np.zeros((1, 2, 4, 6), np.uint8), "shape"),
        (np.zeros((0, 6, 3), np.uint8), "no pixels"),
        (np.zeros((4, 6), np.int64), "dtype int64"),
        (np.full((4, 6), 200.0), "spans 200 to 200"),
        (np.full((4, 6), np.nan), "spans nan"),
        (torch.zeros(5, 6, 2), r"shape \(5, 6, 2\)"),
        (Image.new("I;16", (6, 4)), "I;16"),
        ("frame.png", "is a str"),
        (None, "NoneType"),
    ],
)
def test_as_rgb_frame_refuses(frame, message):
    with pytest.raises(ValueError, match=message):
        as_rgb_frame(frame)


def test_size_change_names_frame_and_sizes(tmp_path):
    frames = [np.zeros((4, 6, 3), np.uint8)] * 2 + [np.zeros((5, 7, 3), np.uint8)]
    source = iter(read_video(frames))
    next(source), next(source)
    with pytest.raises(ValueError, match=r"frame 2 of 'frames' is 7 x 5 .* 6 x 4"):
        next(source)
    with pytest.raises(ValueError, match="frame 1 of 'frames': frame has dtype"):
        list(read_video([np.zeros((4, 6), np.uint8), np.zeros((4, 6), np.int16)]))


def test_broken_sources(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_video(tmp_path / "missing.mp4")
    (tmp_path / "text.mp4").write_text("I am not a video\n" * 50)
    with pytest.raises(ValueError, match="'text' can't be opened"):
        read_video(tmp_path / "text.mp4")
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(ValueError, match="'empty' can't be opened"):
        read_video(tmp_path / "empty.mp4")
    (tmp_path / "text.png").write_text("I am not an image")
    with pytest.raises(ValueError, match="text.png"):
        read_video(tmp_path / "text.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match="cut.png"):
        read_video(tmp_path / "cut.png")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="has no images [^;]*$"):
        read_video(tmp_path / "folder")
    (tmp_path / "folder" / "a.json").touch()
    (tmp_path / "folder" / "one.mp4").touch()
    with pytest.raises(ValueError, match="has no images .*; videos in it are named by a pattern, .*'folder/\\*.mp4'"):
        read_video(tmp_path / "folder")
    with pytest.raises(ValueError, match="source is empty"):
        read_video("")
    with pytest.raises(ValueError, match="has no frames"):
        read_video([])
    with pytest.raises(ValueError, match="has no frames"):
        read_video(iter([]))
    with pytest.raises(ValueError, match="no camera"):
        read_video("camera:99")
    with pytest.raises(ValueError, match="source is a int"):
        read_video(5)
    with open(__file__, "rb") as file, pytest.raises(ValueError, match="source is a BufferedReader; wanted is a path"):
        read_video(file)
    with pytest.raises(ValueError, match="'live.mp4' can't be opened") as caught:
        read_video("http://user:{0}@127.0.0.1:9/live.mp4?token={0}".format("hunter" + "2"))
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def by_one_thread(path) -> tuple[int, int]:
    """How many frames FFmpeg decodes without threads, and how many packets it can't."""
    num_good = num_bad = 0
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "SLICE"
        for packet in container.demux(video=0):
            try:
                num_good += len(packet.decode())
            except av.FFmpegError:
                num_bad += 1
    return num_good, num_bad


def test_video_cut_short(tmp_path):
    """FFmpeg itself reads on to the cut without a word, or stumbles over the last piece."""
    path = write(tmp_path / "cut.mp4", smooth_frames(60))
    whole = path.read_bytes()
    assert len(list(read_video(path))) == 60
    for part in (0.5, 0.6, 0.7, 0.8, 0.9):
        path.write_bytes(whole[: int(len(whole) * part)])
        seen = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                seen.extend(read_video(path, strict=True))
            except ValueError as error:
                assert re.search(r"frame \d+ (of|on) 'cut' can't be (decoded|read)", str(error))
            else:
                assert f"should have 60 frames, {len(seen)} could be read" in str(caught[0].message)
            num_good, num_bad = by_one_thread(path)
            assert len(seen) == num_good > 10
            source = read_video(path)
            assert len(list(source)) == num_good and source.num_skipped == num_bad
            assert caught  # one way or the other it was said
    path.write_bytes(whole[: len(whole) // 20])  # within the header
    with pytest.raises(ValueError, match="can't be opened"):
        read_video(path)


def test_sound_without_picture(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="no pictures"):
        read_video(tmp_path / "sound.mp4")


def test_files_are_closed_after_reading(tmp_path):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc to look at open files")
    path = write(tmp_path / "a.mp4", smooth_frames(5))

    def num_open():
        found = 0
        for descriptor in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                found += os.readlink(f"/proc/self/fd/{descriptor}") == str(path)
        return found

    list(read_video(path))
    for _ in read_video(path):  # left half way
        break
    with pytest.raises(ZeroDivisionError):
        for _ in read_video(path):
            1 / 0  # noqa: B018
    assert num_open() == 0


def test_nothing_is_left_after_an_exception(tmp_path):
    target = tmp_path / "new" / "deeper" / "out.mp4"
    with pytest.raises(ZeroDivisionError), VideoWriter(target, 25, (48, 64)) as writer:
        for frame in smooth_frames(60):
            writer.write(frame)
        assert not target.exists() and writer.partial.exists()
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []

    old = write(tmp_path / "out.mp4", smooth_frames(2)).read_bytes()
    with pytest.raises(ValueError, match="no frame"), VideoWriter(tmp_path / "out.mp4", 25, (48, 64)):
        pass
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "out.mp4", 25, (48, 64)) as writer:
        for frame in smooth_frames(20):
            writer.write(frame)
        assert (tmp_path / "out.mp4").read_bytes() == old
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == old
    write(tmp_path / "out.mp4", smooth_frames(7))
    assert read_video(tmp_path / "out.mp4").num_frames == 7


def test_writer_refuses(tmp_path):
    with pytest.raises(ValueError, match="ends in '.xyz'"):
        VideoWriter(tmp_path / "a.xyz", 25, (4, 6))
    with pytest.raises(ValueError, match="is a folder"):
        VideoWriter(tmp_path, 25, (4, 6))
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="fps"):
            VideoWriter(tmp_path / "a.mp4", fps, (4, 6))
    for size in ((0, 6), (6, 16385)):
        with pytest.raises(ValueError, match="size"):
            VideoWriter(tmp_path / "a.mp4", 25, size)
    writer = VideoWriter(tmp_path / "a.mp4", None, (4, 6))
    assert writer.fps == 24
    with pytest.raises(ValueError, match="with"):
        writer.write(np.zeros((4, 6, 3), np.uint8))
    for frame in (np.zeros((6, 4, 3), np.uint8), np.zeros((4, 6, 3)), np.zeros((4, 6), np.uint8), "frame"):
        with pytest.raises(ValueError, match="frame is"), writer:
            writer.write(frame)
    with pytest.raises(ValueError, match="time is given for some"), writer:
        writer.write(np.zeros((4, 6, 3), np.uint8), time=0.0)
        writer.write(np.zeros((4, 6, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def with_bad_frame(tmp_path):
    """Eight PNG images in a QuickTime file, the fourth (index 3) spoilt; and the eight frames."""
    frames = smooth_frames(8)
    with av.open(str(tmp_path / "spoilt.mov"), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb24"
        for i, frame in enumerate(frames):
            (packet,) = stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24"))
            if i == 3:
                spoilt = av.Packet(b"spoilt" * 50)
                spoilt.pts, spoilt.dts, spoilt.time_base = packet.pts, packet.dts, packet.time_base
                spoilt.stream, packet = packet.stream, spoilt
            container.mux(packet)
    return tmp_path / "spoilt.mov", frames


def test_frame_that_cannot_be_decoded_is_reported_and_left_out(with_bad_frame):
    path, frames = with_bad_frame
    source = read_video(path)
    with pytest.warns(UserWarning, match="frame 3 of 'spoilt' can't be decoded: Invalid data") as caught:
        read = list(source.read())
    assert len(caught) == 1 and source.num_skipped == 1
    assert [index for index, _, _ in read] == [0, 1, 2, 4, 5, 6, 7]
    assert [time for _, time, _ in read] == pytest.approx([0, 0.1, 0.2, 0.4, 0.5, 0.6, 0.7], abs=1e-3)
    assert all(np.array_equal(frame, frames[index]) for index, _, frame in read)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, also when it is read again
        assert [index for index, _, _ in source.read(2, 6)] == [2, 4, 5] and source.num_skipped == 1
    with pytest.raises(ValueError, match="frame 3 of 'spoilt' can't be decoded"):
        list(read_video(path, strict=True))


def h264(path, frames, coding, rate=25, **of_container):
    with av.open(str(path), "w", **of_container) as container:
        stream = container.add_stream("libx264", rate=rate, options=coding)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def numbered(path, count, spoilt):
    """A video whose frames are as light as their numbers say, with noise in these packets; which frames they are."""
    frames = [np.full((48, 64, 3), 5 * number, np.uint8) for number in range(count)]
    h264(path, frames, {"bf": "3", "b_strategy": "0"}, rate=10)
    with av.open(str(path)) as container:
        step = container.streams.video[0].duration // count
        packets = [(x.pos, x.size, x.pts // step) for x in container.demux(video=0) if x.size]
    data = bytearray(path.read_bytes())
    for number in spoilt:
        position, size, _ = packets[number]
        data[position : position + size] = b"\xff" * size
    path.write_bytes(data)
    return [packets[number][2] for number in spoilt]


@pytest.mark.parametrize("spoilt", [5, 6, 7, 20, 33, 37, 38, 39])
def test_the_index_of_a_damaged_frame_is_left_out_whatever_the_order_they_are_coded_in(tmp_path, spoilt):
    """With B-frames a decoder holds some back, and says that one is damaged before it gives those shown earlier."""
    (lost,) = numbered(tmp_path / "a.mp4", 40, spoilt=[spoilt])
    with pytest.warns(UserWarning, match=f"frame {lost} of 'a' can't be decoded"):
        read = list(read_video(tmp_path / "a.mp4").read())
    assert [index for index, _, _ in read] == [index for index in range(40) if index != lost]
    assert [time for _, time, _ in read] == pytest.approx([index / 10 for index, _, _ in read], abs=1e-3)
    # What was coded as a difference to it is damaged too: up to three that are shown before it.
    light = [frame.mean() / 5 for _, _, frame in read]
    assert light[: lost - 3] == pytest.approx(np.arange(lost - 3), abs=0.6)


def test_a_short_piece_of_a_video_begins_with_its_first_frame(tmp_path):
    """The cut is found before the decoder has given any frame."""
    frames = np.random.default_rng(0).integers(0, 255, (5, 48, 64, 3), np.uint8)
    h264(tmp_path / "a.mp4", frames, {"bf": "3", "b_strategy": "0"}, rate=10, options={"movflags": "faststart"})
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) // 2])
    with pytest.warns(UserWarning):
        read = list(read_video(tmp_path / "a.mp4").read())
    assert [index for index, _, _ in read] == [0, 1]


@pytest.mark.parametrize("without", ["some", "the first", "all"])
def test_frames_of_which_nobody_says_when_they_are_shown(tmp_path, without):
    """H.264 in MPEG-TS whose time stamps are blanked: but every twelfth, the first one, all of them."""
    h264(tmp_path / "a.ts", smooth_frames(36), {"bf": "0"})
    data, number = bytearray((tmp_path / "a.ts").read_bytes()), 0
    for at in range(0, len(data), 188):
        packet = data[at : at + 188]
        start = packet.find(b"\x00\x00\x01\xe0")
        if packet[1] & 0x40 and start >= 0:
            flags, length = at + start + 7, packet[start + 8]
            if {"some": number % 12 != 0, "the first": number == 0, "all": True}[without]:
                data[flags] &= 0x3F
                data[flags + 2 : flags + 2 + length] = b"\xff" * length
            number += 1
    assert number == 36
    (tmp_path / "a.ts").write_bytes(data)
    times = [time for time, _ in read_video(tmp_path / "a.ts").with_times()]
    assert times == (pytest.approx(np.arange(36) / 25, abs=1e-3) if without == "some" else [None] * 36)


def test_bad_images_at_both_ends_of_a_folder(tmp_path):
    for i in range(5):
        Image.new("RGB", (6, 4), (i, i, i)).save(tmp_path / f"{i}.png")
    for i in (0, 4):
        (tmp_path / f"{i}.png").write_text("I am not an image")
    with pytest.warns(UserWarning, match="can't be decoded") as caught:
        source = read_video(tmp_path)
        assert [(index, frame[0, 0, 0]) for index, _, frame in source.read()] == [(1, 1), (2, 2), (3, 3)]
    assert source.size == (4, 6) and source.num_frames == 5 and source.num_skipped == len(caught) == 2
    with pytest.raises(ValueError, match="frame 0 of .* can't be decoded"):
        read_video(tmp_path, strict=True)
    for i in (1, 2, 3):
        (tmp_path / f"{i}.png").write_text("nor am I")
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="no frames that can be decoded: .*cannot identify"),
    ):
        read_video(tmp_path)


def test_damaged_h264_goes_on(tmp_path):
    """What a stream looks like after a bad cable: pieces of it overwritten, the rest intact."""
    h264(tmp_path / "cable.ts", smooth_frames(60), {"g": "10"})
    data = bytearray((tmp_path / "cable.ts").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = np.random.default_rng(0).bytes(4000)
    (tmp_path / "cable.ts").write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FFmpeg mends some of it without a word
        read = list(read_video(tmp_path / "cable.ts").read())
    assert 40 < len(read) < 60
    assert psnr(read[-1][2], smooth_frames(60)[-1]) > 30  # after the next key frame all is well again


def test_backward(tmp_path, monkeypatch, with_bad_frame):
    frames = smooth_frames(11)
    sources = [read_video(write(tmp_path / "a.mp4", frames, times=[i * i / 100 for i in range(11)]))]
    (tmp_path / "folder").mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "folder" / f"{i}.png")
    sources += [read_video(tmp_path / "folder"), read_video(frames), read_video(with_bad_frame[0])]
    for held in (1, 3, 100):
        monkeypatch.setattr("ausm_hf.video.HELD_BYTES", held * 48 * 64 * 3)
        for source in sources:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                forward = list(source.read())[:7]
                backward = list(source.backward(forward[-1][0]))
            assert [x[:2] for x in backward] == [x[:2] for x in forward[::-1]]
            assert all(np.array_equal(a[2], b[2]) for a, b in zip(backward, forward[::-1]))
    with pytest.raises(ValueError, match="only once, so not backwards"):
        next(read_video(iter(frames)).backward(3))


def test_backward_holds_one_piece_at_a_time(monkeypatch):
    monkeypatch.setattr("ausm_hf.video.HELD_BYTES", 3 * 48)
    alive = set()

    class Frames:
        def __len__(self):
            return 20

        def __iter__(self):
            for i in range(20):
                frame = np.full((4, 4, 3), i, np.uint8)
                alive.add(i)
                weakref.finalize(frame, alive.discard, i)
                yield frame
                del frame

    most = 0
    for _, _, frame in read_video(Frames()).backward(19):
        del frame
        most = max(most, len(alive))
    assert most <= 5  # three that are held, and those at hand


READER = """
import sys, warnings
from ausm_hf.video import read_video
source = read_video("-", raw_size=eval(sys.argv[1]), strict="strict" in sys.argv)
print(source.name, source.size, source.fps, source.num_frames, source.once, flush=True)
for index, time, frame in source.read():
    print(index, time, frame.tobytes().hex(), flush=True)
"""


def piped(*arguments, script=READER):
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def as_jpeg(frame) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=95)
    return file.getvalue()


def test_mjpeg_on_stdin_comes_out_as_it_comes_in():
    frames = smooth_frames(12)
    with piped("None") as process:
        for frame in frames[:6]:
            process.stdin.write(as_jpeg(frame))
        process.stdin.flush()
        assert process.stdout.readline().decode() == "stdin (48, 64) None None True\n"
        lines = [process.stdout.readline().decode() for _ in range(4)]  # while the pipe is still open
        process.stdin.write(b"".join(as_jpeg(frame) for frame in frames[6:]))
        process.stdin.close()
        lines += process.stdout.read().decode().splitlines()
        errors = process.stderr.read()
    assert len(lines) == 12 and not errors
    for i, line in enumerate(lines):
        index, time, data = line.split()
        assert (index, time) == (str(i), "None")  # no clock: neither JPEG nor pipe says when
        theirs = np.asarray(Image.open(io.BytesIO(as_jpeg(frames[i]))))
        assert psnr(np.frombuffer(bytes.fromhex(data), np.uint8).reshape(48, 64, 3), theirs) > 33


def test_raw_frames_on_stdin():
    frames = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
    with piped("(48, 64)") as process:
        process.stdin.write(frames[:2].tobytes())
        process.stdin.flush()
        lines = [process.stdout.readline().decode() for _ in range(3)]
        process.stdin.write(frames[2].tobytes() + b"half a frame")
        process.stdin.close()
        lines += process.stdout.read().decode().splitlines()
        errors = process.stderr.read()
    assert lines[0] == "stdin (48, 64) None None True\n" and len(lines) == 4
    assert [bytes.fromhex(line.split()[2]) for line in lines[1:]] == [frame.tobytes() for frame in frames]
    assert b"frame 3 of 'stdin' can't be decoded: it has 12 bytes, wanted are 9216" in errors
    with piped("(48, 64)", "strict") as process:
        _, errors = process.communicate(frames.tobytes() + b"half a frame")
    assert process.returncode == 1 and errors.rstrip().endswith(b"it has 12 bytes, wanted are 9216")


STOPPED = """
import sys, threading
from ausm_hf.video import read_video
source = read_video("-", raw_size=eval(sys.argv[1]))
threading.Timer(0.5, source.stop).start()
print(len(list(source)))
"""


@pytest.mark.parametrize("kind", ["raw", "mjpeg"])
def test_stopped_while_no_frame_comes(kind):
    """What waits for a frame does not keep the program from ending, with no error."""
    frames = smooth_frames(6)
    with piped("(48, 64)" if kind == "raw" else "None", script=STOPPED) as process:
        process.stdin.write(b"".join(frame.tobytes() if kind == "raw" else as_jpeg(frame) for frame in frames))
        process.stdin.flush()
        assert process.wait(30) == 0  # while the pipe is still open
        assert int(process.stdout.read()) in ((6,) if kind == "raw" else (4, 5, 6)) and not process.stderr.read()


def test_bytes_of_stdin_that_were_read_before(monkeypatch):
    frames = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)
    stdin = io.TextIOWrapper(io.BufferedReader(io.BytesIO(b"head" + frames.tobytes())))
    assert stdin.buffer.read(4) == b"head"
    monkeypatch.setattr(sys, "stdin", stdin)
    assert np.array_equal(list(read_video("-", raw_size=(48, 64))), frames)


def test_other_stdin():
    with piped("None") as process:
        assert b"ValueError: video 'stdin' can't be opened" in process.communicate(b"I am not a video\n" * 500)[1]
    with piped("None") as process:
        assert b"ValueError: video 'stdin' can't be opened" in process.communicate(b"")[1]
    with piped("(48, 64)") as process:
        assert b"ValueError: video 'stdin' has no frames" in process.communicate(b"")[1]
    with pytest.raises(ValueError, match="raw_size is given; it is for raw frames on standard input"):
        read_video("video.mp4", raw_size=(48, 64))
    with pytest.raises(ValueError, match="raw_size is"):
        read_video("-", raw_size=(0, 64))
    with pytest.raises(ValueError, match="raw_size is given"):
        read_video(np.zeros((2, 48, 64, 3), np.uint8), raw_size=(48, 64))


def test_mp4_on_stdin_needs_its_index_first(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (5, 240, 320, 3), np.uint8)  # more than is looked at first
    path = write(tmp_path / "clip.mp4", list(noise))
    with piped("None") as process:
        assert process.communicate(path.read_bytes())[0].startswith(b"stdin (240, 320)")
    with av.open(str(path)) as source, av.open(str(tmp_path / "late.mp4"), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    with piped("None") as process:
        errors = process.communicate((tmp_path / "late.mp4").read_bytes())[1]
    assert b"its index comes first" in errors and b"or give the file's name" in errors


def test_matroska_on_stdin_keeps_its_clock(tmp_path):
    times = [0, 0.1, 0.15, 0.5, 0.6]
    path = write(tmp_path / "vfr.mkv", smooth_frames(5), times=times)
    with piped("None") as process:
        lines = process.communicate(path.read_bytes())[0].decode().splitlines()
    assert [float(line.split()[1]) for line in lines[1:]] == pytest.approx(times, abs=1e-3)


@pytest.fixture
def web(tmp_path):
    """A web server on this machine: files of `tmp_path`; and, as network cameras send it, JPEGs without end."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if not self.path.startswith("/camera"):
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=next")
            self.end_headers()
            with suppress(OSError):  # the viewer has left
                for frame in itertools.cycle(smooth_frames(30)):
                    data = as_jpeg(frame)
                    head = f"--next\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                    self.wfile.write(head.encode() + data + b"\r\n")

        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_camera(tmp_path, monkeypatch):
    """There is none here: what stands for it is a file, opened as FFmpeg is told to open cameras."""
    path = write(tmp_path / "a.mp4", smooth_frames(3))
    opened, asked = av.open, []

    def camera(location, *args, format=None, **kwargs):
        asked.append((location, format))
        return opened(str(path), *args, **kwargs)

    monkeypatch.setattr(os.path, "exists", lambda name: name == "/dev/video3")
    monkeypatch.setattr(av, "open", camera)
    source = read_video("camera:3")
    assert source.once and source.name == "camera3"
    assert len(list(source)) == 3 and asked == [("/dev/video3", "v4l2")]


def test_file_over_http(web, tmp_path):
    times = [0, 0.1, 0.15, 0.5, 0.6]
    path = write(tmp_path / "vfr.mp4", smooth_frames(5), times=times)
    source = read_video(f"{web}/vfr.mp4?token=secret")
    assert (source.name, source.size, source.once) == ("vfr.mp4", (48, 64), True)
    seen = list(source.with_times())
    assert [time for time, _ in seen] == pytest.approx(times, abs=1e-4)
    assert all(np.array_equal(a, b) for (_, a), b in zip(seen, read_video(path), strict=True))
    with pytest.raises(ValueError, match="'missing.mp4' can't be opened"):
        read_video(f"{web}/missing.mp4")


def test_network_camera(web):
    source = read_video(f"{web}/camera")
    seen = [frame for _, frame in zip(range(40), source)]
    assert source.size == (48, 64) and psnr(seen[0], smooth_frames(1)[0]) > 33


def test_a_title_in_any_encoding(tmp_path):
    path = tmp_path / "titled.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "abcdefgh"
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in (av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24"), None):
            container.mux(stream.encode(frame))
    path.write_bytes(path.read_bytes().replace(b"abcdefgh", b"ab\xff\xfe\xe9fgh"))  # no UTF-8
    assert len(list(read_video(path))) == 1
