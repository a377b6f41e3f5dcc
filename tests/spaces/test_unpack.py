"""What strangers upload: videos become frames, anything else a sentence that names nothing of the server."""

import errno
import json
import os
import shutil
import struct
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from films import film, tones_in

from ausm_hf.demo import clips
from ausm_hf.demo import unpack as unpacking
from ausm_hf.demo.clips import Clip, Rooms, unpack_clip
from ausm_hf.demo.unpack import Limits, Refused, arguments, demuxer_of, unpack
from ausm_hf.video import VideoWriter, read_video


def write_video(path: Path, frames, times=None, fps=10, pixel_aspect=Fraction(1)) -> Path:
    with VideoWriter(path, fps, frames[0].shape[:2], pixel_aspect) as writer:
        for i, frame in enumerate(frames):
            writer.write(frame, None if times is None else times[i])
    return path


@pytest.fixture
def frames():
    y, x = np.mgrid[:48, :64]
    return [np.stack([(x * 3 + 9 * t) % 256, y * 5, x + y], -1).astype(np.uint8) for t in range(7)]


def by_child(path, folder, limits=None) -> Clip:
    *_, clip = unpack_clip(path, folder, limits or Limits())
    return clip


def number_of_frames(path, folder) -> int:
    """Unpacks in this process, which saves a second."""
    folder.mkdir()
    unpack(path, folder, Limits())
    return json.loads((folder / "clip.json").read_text())["num_frames"]


def test_a_video_becomes_its_frames(frames, tmp_path):
    times = [0, 0.1, 0.2, 0.5, 0.6, 0.9, 1.0]
    path = write_video(tmp_path / "my clip.mp4", frames, times)
    clip = by_child(path, tmp_path / "out")
    assert (clip.name, clip.size, clip.num_frames) == ("my clip", (48, 64), 7)
    np.testing.assert_allclose(clip.times, times, atol=1e-3)
    for mine, wanted in zip(clip, read_video(path)):
        assert np.abs(mine.astype(int) - wanted).mean() < 3  # JPEG
    assert np.abs(clip.frame(5).astype(int) - clip.frame(0)).mean() > 10
    assert not read_video(clip).once  # so that a frame is encoded while the last one is followed
    with pytest.raises(Refused, match="no frame 7"):
        clip.frame(7)


@pytest.mark.parametrize("codec", ["aac", "mp2"])
def test_sound_is_unpacked_if_it_can_be(tmp_path, codec):
    """From the first picture to the last, by decoders of a short list; what can't be heard can be seen."""
    path = film(tmp_path / "a.mkv", seconds=2, sound_at=0.25, codec=codec)
    clip = by_child(path, tmp_path / "out")
    assert clip.num_frames == 50
    if codec == "mp2":
        assert clip.sound is None
        return
    with av.open(str(clip.sound)) as container:
        assert not container.streams.video and 1.9 < container.duration / 1e6 < 2.1
    with VideoWriter(tmp_path / "b.mp4", 25, clip.size, sound=clip.sound) as writer:
        for frame in clip:
            writer.write(frame)
    np.testing.assert_allclose(tones_in(tmp_path / "b.mp4"), [[0.25, 0.75], [1.25, 1.75]], atol=0.003)


def test_sound_that_is_too_much_for_the_decoder_costs_no_picture(tmp_path, monkeypatch):
    """Whatever ends the process when all frames are there."""
    path = film(tmp_path / "a.mp4", seconds=1)
    command = [
        sys.executable,
        "-c",
        """
import os, sys
from pathlib import Path
from ausm_hf.demo import unpack
unpack._unpack_sound = lambda *_, **__: os.kill(os.getpid(), 9)
unpack.unpack(sys.argv[1], Path(sys.argv[2]), unpack.Limits())
""",
    ]
    monkeypatch.setattr(clips, "arguments", lambda file, folder, limits: [*command, str(file), str(folder)])
    clip = by_child(path, tmp_path / "out")
    assert clip.num_frames == 25 and clip.sound is None


def test_a_video_without_sound(frames, tmp_path):
    clip = by_child(write_video(tmp_path / "a.mp4", frames), tmp_path / "out")
    assert clip.sound is None and clip.num_frames == 7


@pytest.mark.parametrize(
    ("suffix", "codec", "plays"), [("mp4", "libx264", True), ("avi", "libx264", False), ("mp4", "mpeg4", False)]
)
def test_whether_browsers_play_it_is_known(frames, tmp_path, suffix, codec, plays):
    path = tmp_path / f"clip.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert by_child(path, tmp_path / "out").plays == plays


def test_the_first_frame_comes_before_the_others(tmp_path):
    rng = np.random.default_rng(0)
    path = write_video(tmp_path / "clip.mp4", [rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)] * 60)
    seen = unpack_clip(path, tmp_path / "out", Limits())
    assert next(seen).shape == (480, 640, 3)
    assert not (tmp_path / "out" / "clip.json").exists()
    seen.close()  # the visitor has left: the decoder goes, too


@pytest.mark.parametrize(("name", "codec", "demuxer"), [("a.webm", "libvpx", "matroska"), ("a.gif", "gif", "gif")])
def test_other_containers(frames, tmp_path, name, codec, demuxer):
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert demuxer_of(tmp_path / name) == demuxer
    assert number_of_frames(tmp_path / name, tmp_path / "out") == 7


def one_black_frame(path: Path, width: int, height: int):
    """In an MKV, coded by FFV1, which has no largest size."""
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "gray"
        picture = av.VideoFrame.from_ndarray(np.zeros((height, width), np.uint8), format="gray")
        container.mux(stream.encode(picture))
        container.mux(stream.encode())


def gif(width: int, height: int, num_frames: int = 1, delay: int = 10) -> bytes:
    """A GIF that claims a size; each frame is one black pixel in its corner."""
    frame = b"\x21\xf9\x04\x00" + struct.pack("<H", delay) + b"\x00\x00"
    frame += b"\x2c" + struct.pack("<4H", 0, 0, 1, 1) + b"\x00\x02\x02\x44\x01\x00"
    head = b"GIF89a" + struct.pack("<2H", width, height) + b"\x80\x00\x00" + b"\x00\x00\x00\xff\xff\xff"
    return head + frame * num_frames + b"\x3b"


def sound_only(path: Path):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
HOSTILE = {
    "text": (lambda path: path.write_text("I am a video, believe me.\n" * 99), "no video that can be read"),
    "empty": (lambda path: path.write_bytes(b""), "no video that can be read"),
    "local playlist": (lambda path: path.write_text(PLAYLIST.format("file:///etc/passwd")), "no video that can be"),
    "network playlist": (lambda path: path.write_text(PLAYLIST.format("http://127.0.0.1:9/a.ts")), "no video that"),
    "list of files": (lambda path: path.write_text("ffconcat version 1.0\nfile /etc/passwd\n"), "no video that can"),
    "session description": (lambda path: path.write_text("v=0\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n"), "no vid"),
    "picture": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), "no video that can be read"),
    "pretends to be MP4": (lambda path: path.write_bytes(b"\0\0\0\x18ftypmp42" + os.urandom(999)), "broken, or none"),
    "100000 x 1": (lambda path: one_black_frame(path, 100_000, 1), "100000 x 1 pixels"),
    "a codec that is not on the list": (lambda path: one_black_frame(path, 64, 64), "coded in a way"),
    "bomb of pixels": (lambda path: path.write_bytes(gif(65_000, 65_000)), "too large to be decoded"),
    "bomb of frames": (lambda path: path.write_bytes(gif(64, 64, 5_000, 1)), "too long"),
    "one frame a day": (lambda path: path.write_bytes(gif(64, 64, 9, 60_000)), "too long"),
    "a strip": (lambda path: path.write_bytes(gif(1600, 64)), "1600 x 64 pixels"),
    "a dot": (lambda path: path.write_bytes(gif(8, 8)), "8 x 8 pixels"),
    "sound": (sound_only, "no pictures"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_video_is_refused_in_a_sentence(kind, tmp_path):
    make, message = HOSTILE[kind]
    path = tmp_path / "holiday.mp4"
    make(path)
    with pytest.raises(Refused, match=message) as caught:
        number_of_frames(path, tmp_path / "out")
    assert str(tmp_path) not in str(caught.value) and "/" not in str(caught.value)
    assert len(list((tmp_path / "out").glob("*.jpg"))) <= Limits().num_frames


def test_a_playlist_inside_a_container_name_reads_nothing_else(tmp_path):
    """FFmpeg itself would follow this list: the first bytes, not the name and not a guess, choose the demuxer."""
    secret = write_video(tmp_path / "secret.mp4", [np.full((64, 64, 3), 200, np.uint8)] * 3)
    (tmp_path / "list.txt").write_text(f"ffconcat version 1.0\nfile {secret}\n")
    with av.open(str(tmp_path / "list.txt"), options={"safe": "0"}) as container:
        assert next(container.decode(video=0)).width == 64
    with pytest.raises(Refused, match="no video that can be read"):
        by_child(tmp_path / "list.txt", tmp_path / "out")


def test_too_large_a_file_is_refused_before_it_is_decoded(frames, tmp_path):
    path = write_video(tmp_path / "clip.mp4", frames)
    with open(path, "ab") as file:
        file.truncate(3 * 2**20)
    with pytest.raises(Refused, match="has 3 MB; wanted are at most 2 MB"):
        by_child(path, tmp_path / "out", Limits(megabytes=2))


@pytest.mark.parametrize("limits", [Limits(decoder_megabytes=40), Limits(decoder_seconds=0)])
def test_a_decoder_without_memory_or_time_ends_in_a_sentence(frames, tmp_path, limits):
    path = write_video(tmp_path / "clip.mp4", frames)
    with pytest.raises(Refused, match="with the memory and the time|takes too long"):
        by_child(path, tmp_path / "out", limits)


def test_where_memory_can_not_be_bounded_videos_are_read_all_the_same(frames, tmp_path, monkeypatch):
    """macOS refuses it."""
    import resource

    from ausm_hf.demo import unpack as module

    def setrlimit(what, limits):
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    (tmp_path / "out").mkdir()
    path = write_video(tmp_path / "clip.mp4", frames)
    monkeypatch.setattr(sys, "argv", ["unpack", *module.arguments(path, tmp_path / "out", Limits())[3:]])
    module.main()
    assert json.loads((tmp_path / "out" / "clip.json").read_text())["num_frames"] == len(frames)


def test_a_cut_file_shows_what_it_has_and_broken_ones_are_refused(frames, tmp_path):
    """Bytes are changed at random: whatever comes of it is a clip or a sentence."""
    whole = write_video(tmp_path / "a.mp4", frames * 4).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    assert 0 < number_of_frames(tmp_path / "cut.mp4", tmp_path / "cut") < 28
    rng = np.random.default_rng(0)
    for i in range(20):
        broken = bytearray(whole)
        for place in rng.integers(0, len(whole), 60):
            broken[place] = rng.integers(256)
        (tmp_path / "b.mp4").write_bytes(broken)
        try:
            assert number_of_frames(tmp_path / "b.mp4", tmp_path / f"b{i}") > 0
        except Refused:
            pass


@pytest.fixture
def with_a_spoilt_packet(frames, tmp_path) -> Path:
    """Seven JPEG images in an MP4 file, the fourth spoilt."""
    path = tmp_path / "spoilt.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for i, frame in enumerate(frames):
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                if i == 3:
                    spoilt = av.Packet(b"spoilt" * 50)
                    spoilt.pts, spoilt.dts, spoilt.time_base = packet.pts, packet.dts, packet.time_base
                    spoilt.stream, packet = packet.stream, spoilt
                container.mux(packet)
    return path


def test_a_damaged_packet_costs_its_frame_alone(with_a_spoilt_packet, tmp_path):
    clip = by_child(with_a_spoilt_packet, tmp_path / "out")
    with pytest.warns(UserWarning, match="can't be decoded"):
        read = list(read_video(with_a_spoilt_packet).with_times())
    assert clip.num_frames == len(read) == 6
    assert clip.times == pytest.approx([time for time, _ in read])
    for mine, (_, wanted) in zip(clip, read):
        assert np.abs(mine.astype(int) - wanted).mean() < 3


@pytest.mark.parametrize("full_at", [0, 4, "the end"])
def test_a_disk_that_becomes_full_is_a_sentence(frames, tmp_path, monkeypatch, full_at):
    path = write_video(tmp_path / "clip.mp4", frames)
    real = unpacking._save

    def save(image, target):
        if target.stem == f"{full_at:05d}":
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        real(image, target)

    def write_text(target, text, encoding):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    if full_at == "the end":
        monkeypatch.setattr(Path, "write_text", write_text)
    else:
        monkeypatch.setattr(unpacking, "_save", save)
    with pytest.raises(Refused, match="no room left for this video. Please try again"):
        number_of_frames(path, tmp_path / "out")
    assert not (tmp_path / "out" / "clip.json").exists()


def test_the_pixels_shape_is_kept(frames, tmp_path):
    """Of a phone's video, too, which is turned when it is shown (the display matrix in the MP4's header)."""
    path = write_video(tmp_path / "clip.mp4", frames, pixel_aspect=Fraction(4, 3))
    clip = by_child(path, tmp_path / "out")
    assert (clip.size, clip.pixel_aspect, clip.shown_size) == ((48, 64), Fraction(4, 3), (64, 36))
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    turned, wanted = by_child(path, tmp_path / "turned"), read_video(path)
    assert (turned.size, turned.pixel_aspect) == (wanted.size, wanted.pixel_aspect) == ((64, 48), Fraction(3, 4))
    assert turned.shown_size == (36, 64)
    write_video(path, frames, pixel_aspect=Fraction(20))
    with pytest.raises(Refused, match="64 x 2 pixels"):
        by_child(path, tmp_path / "thin")


def test_a_mirrored_video(frames, tmp_path):
    path = write_video(tmp_path / "clip.mp4", frames)
    as_it_is = next(iter(by_child(path, tmp_path / "out")))
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", -(1 << 16), 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    mirrored = next(iter(by_child(path, tmp_path / "mirrored")))
    assert np.abs(mirrored[:, ::-1].astype(int) - as_it_is).mean() < 3


def test_only_what_the_page_takes_is_asked_for(tmp_path):
    """Gradio refuses to upload a GIF, by its type."""
    (tmp_path / "text").write_text("I am a video, believe me.")
    with pytest.raises(Refused, match="wanted is MP4 or MOV, WebM or MKV, AVI[.]"):
        demuxer_of(tmp_path / "text")


def test_the_decoder_gets_none_of_the_secrets(frames, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    path = write_video(tmp_path / "clip.mp4", frames)
    started = {}
    real = clips.subprocess.Popen

    def popen(command, **options):
        started.update(options["env"])
        return real(command, **options)

    monkeypatch.setattr(clips.subprocess, "Popen", popen)
    by_child(path, tmp_path / "out")
    assert "PATH" in started and not any("TOKEN" in name or "hf_secret" in value for name, value in started.items())
    assert "hf_secret" not in " ".join(arguments(path, tmp_path, Limits()))


def test_rooms_can_not_be_guessed_and_go_after_an_hour(tmp_path):
    rooms = Rooms(tmp_path)
    old, new = rooms.new(), rooms.new()
    assert old != new and len(old.name) >= 32
    upload = tmp_path / "0123abcd"
    upload.mkdir()
    for folder in (old, upload, tmp_path / "examples"):
        folder.mkdir(exist_ok=True)
        (folder / "clip.mp4").write_bytes(b"")
        for path in (folder / "clip.mp4", folder):
            os.utime(path, (1e9, 1e9))
    rooms.sweep()
    assert not old.exists() and not upload.exists()
    assert new.exists() and (tmp_path / "examples" / "clip.mp4").exists()


def test_a_full_disk_takes_no_more(tmp_path, monkeypatch):
    rooms = Rooms(tmp_path)
    (rooms.new() / "clip").write_bytes(bytes(2000))
    monkeypatch.setattr(clips, "MOST_GIGABYTES", 1e-6)
    with pytest.raises(Refused, match="no room for more"):
        rooms.new()


def test_a_demo_that_ends_takes_no_more(tmp_path):
    rooms = Rooms(tmp_path / "root")
    shutil.rmtree(tmp_path / "root")
    with pytest.raises(Refused, match="being stopped"):
        rooms.new()


def test_files_that_vanish_while_they_are_counted_do_no_harm(tmp_path, monkeypatch):
    rooms = Rooms(tmp_path)
    (rooms.new() / "clip").write_bytes(bytes(2000))
    (tmp_path / "gone").write_bytes(b"")
    lstat = os.lstat

    def vanishing(path, **options):
        if os.fspath(path).endswith("gone"):
            raise FileNotFoundError(path)
        return lstat(path, **options)

    monkeypatch.setattr(os, "lstat", vanishing)
    assert not rooms.is_full()
    monkeypatch.setattr(clips, "MOST_GIGABYTES", 1e-6)
    assert rooms.is_full()


def test_uploads_of_a_full_disk_go_first(tmp_path, monkeypatch):
    rooms = Rooms(tmp_path)
    room = rooms.new()
    for i, name in enumerate(("newer", "older")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "clip.mp4").write_bytes(bytes(2000))
        for path in (tmp_path / name / "clip.mp4", tmp_path / name):
            os.utime(path, (time.time() - 60 * i, time.time() - 60 * i))
    monkeypatch.setattr(clips, "MOST_GIGABYTES", 3000 / 2**30)
    rooms.sweep()
    assert (tmp_path / "newer").exists() and not (tmp_path / "older").exists() and room.exists()


def test_only_uploads_are_read(tmp_path):
    rooms = Rooms(tmp_path / "root")
    for path in ("/etc/passwd", str(tmp_path / "root" / ".." / "x.mp4")):
        with pytest.raises(Refused, match="upload the file"):
            rooms.uploaded(path)
    assert rooms.uploaded(str(tmp_path / "root" / "a" / "x.mp4"))


def test_files_of_uploads_that_were_broken_off_go(tmp_path, monkeypatch):
    """Gradio leaves them beside the folders of whole uploads."""
    rooms = Rooms(tmp_path / "root")
    broken, link, kept = (tmp_path / "root" / name for name in ("tmpold", "link", "tmpnew"))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").touch()
    broken.write_bytes(bytes(2000))
    kept.write_bytes(bytes(2000))
    link.symlink_to(tmp_path / "outside")
    for path in (broken, tmp_path / "outside", tmp_path / "outside" / "file"):
        os.utime(path, (1e9, 1e9))
    os.utime(link, (1e9, 1e9), follow_symlinks=False)
    rooms.sweep()
    assert not broken.exists() and not link.is_symlink() and kept.exists()
    assert (tmp_path / "outside" / "file").exists()

    monkeypatch.setattr(clips, "MOST_GIGABYTES", 1e-6)
    rooms.sweep()
    assert not kept.exists() and not rooms.is_full()
    rooms.remove(kept)  # somebody else was faster


@pytest.mark.parametrize("error", [FileNotFoundError("rooms"), KeyError("a visitor"), RuntimeError("changed size")])
def test_sweeping_goes_on_whatever_happens(error, caplog):
    from ausm_hf.demo import launch

    swept = []

    class Page:
        def sweep(self):
            swept.append(1)
            if len(swept) == 1:
                raise error

    class Stopped:
        def wait(self, seconds):
            return len(swept) == 2

    launch._sweep(Page(), Stopped())
    assert len(swept) == 2 and str(error) in caplog.text
