import os
import re
import struct
import subprocess
import sys
import time
import traceback
import warnings
from contextlib import suppress
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

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


def test_three_frames_of_a_long_file_cost_a_fraction_of_all(tmp_path):
    path = write(tmp_path / "long.mp4", [frame for frame in smooth_frames(4, 240, 320) for _ in range(150)])

    def seconds(count):
        start = time.process_time()
        for _, _ in zip(range(count), read_video(path)):
            pass
        return time.process_time() - start

    assert min(seconds(3) for _ in range(3)) < seconds(600) / 5


def test_memory_does_not_grow_with_length(tmp_path):
    """Peak memory of reading and writing 300 frames is that of 40, in a process of its own."""
    code = """
import resource, sys
from ausm_hf.video import VideoWriter, read_video
import numpy as np
peaks = []
for count in (40, 40, 300):
    frame = np.zeros((240, 320, 3), np.uint8)
    with VideoWriter(sys.argv[1], 24, (240, 320)) as writer:
        for i in range(count):
            frame[:, i % 320] = i % 256
            writer.write(frame)
    assert sum(1 for _ in read_video(sys.argv[1])) == count
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[1], peaks[2])
"""
    pytest.importorskip("resource")
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.mp4")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == 0, result.stderr
    short, long = map(int, result.stdout.split())
    assert long < 1.05 * short  # 260 more frames would be 60 MB


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
        assert float(container.duration / av.time_base) == pytest.approx(0.6 + 1 / 25, abs=1e-3)


def test_times_start_at_zero_and_go_on(tmp_path):
    source = read_video(write(tmp_path / "late.mp4", smooth_frames(4), times=[5, 5.5, 5.5, 6]))
    times = [time for time, _ in source.with_times()]
    assert times == pytest.approx([0, 0.5, 0.5, 1], abs=1e-3)
    assert all(later > earlier for earlier, later in zip(times, times[1:]))


@pytest.mark.parametrize(
    "degrees_clockwise, matrix", [(90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1)), (270, (0, -1, 1, 0))]
)
def test_rotation_of_phone_videos_is_undone(tmp_path, degrees_clockwise, matrix):
    """The display matrix of the MP4 header (ISO 14496-12, tkhd) is patched by hand; the picture must turn with it."""
    upright = smooth_frames(1, 48, 64)[0]
    upright[:16, :16] = 255  # a mark in the upper left corner
    path = write(tmp_path / "phone.mp4", [upright, upright])
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: 40 bytes from the version field to the matrix
    one, end = 1 << 16, 1 << 30
    assert struct.unpack(">9i", data[at : at + 36]) == (one, 0, 0, 0, one, 0, 0, 0, end)
    a, b, c, d = (one * value for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, end)
    path.write_bytes(data)

    source = read_video(path)
    turned = {90: Image.Transpose.ROTATE_270, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_90}
    wanted = np.asarray(Image.fromarray(upright).transpose(turned[degrees_clockwise]))  # PIL turns counterclockwise
    assert source.size == wanted.shape[:2]
    assert psnr(wanted, next(iter(source))) > 30


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
    rgb = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
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
        (np.zeros((4, 6, 2), np.uint8), "shape"),
        (np.zeros((3, 4, 6), np.uint8), "shape"),
        (np.zeros((1, 2, 4, 6), np.uint8), "shape"),
        (np.zeros((0, 6, 3), np.uint8), "no pixels"),
        (np.zeros((4, 6), np.int64), "dtype int64"),
        (np.full((4, 6), 200.0), "spans 200 to 200"),
        (np.full((4, 6), np.nan), "spans nan"),
        (torch.zeros(5, 6, 3), "tensor of shape"),
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
    with pytest.raises(ValueError, match="has no images"):
        read_video(tmp_path / "folder")
    with pytest.raises(ValueError, match="has no frames"):
        read_video([])
    with pytest.raises(ValueError, match="has no frames"):
        read_video(iter([]))
    with pytest.raises(ValueError, match="no camera"):
        read_video("camera:99")
    with pytest.raises(ValueError, match="source is a int"):
        read_video(5)
    with pytest.raises(ValueError, match="'live.mp4' can't be opened") as caught:
        read_video("http://user:{0}@127.0.0.1:9/live.mp4?token={0}".format("hunter" + "2"))
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


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
                seen.extend(read_video(path))
            except ValueError as error:
                assert re.search(r"frame \d+ of 'cut' can't be decoded", str(error))
            else:
                assert f"should have 60 frames, {len(seen)} could be read" in str(caught[0].message)
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
    with pytest.raises(ValueError, match="size"):
        VideoWriter(tmp_path / "a.mp4", 25, (0, 6))
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
