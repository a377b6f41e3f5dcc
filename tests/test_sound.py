"""Sound that goes with pictures: the same clicks at the same times, whatever file they come from."""

import os
import tracemalloc

import av
import numpy as np
import pytest
from films import FPS, RATE, copied, film, heard, tones, tones_in

from ausm_hf import FrameSegments, save_segments
from ausm_hf.cli import main
from ausm_hf.sound import SoundCopy
from ausm_hf.video import VideoWriter, read_video

FILMS = {
    "mp4": ("a.mp4", {}),
    "later": ("a.mp4", {"sound_at": 0.3}),
    "before the pictures": ("a.mkv", {"sound_at": -0.75, "begins": 2.0}),
    "pictures coded in another order": ("a.mp4", {"bf": 2}),
    "a clock that does not begin at 0": ("a.ts", {"begins": 5.0, "bf": 2}),
    "time stamps of milliseconds": ("a.mkv", {"codec": "libopus", "rate": 48_000}),
    "uncompressed": ("a.mov", {"codec": "pcm_s16le", "channels": 2}),
    "stereo": ("a.mp4", {"channels": 2}),
    "surround": ("a.mp4", {"channels": 6}),
    "low rate": ("a.mp4", {"rate": 22_050}),
}


@pytest.mark.parametrize(("name", "how"), FILMS.values(), ids=FILMS)
def test_tones_are_heard_when_they_were(tmp_path, name, how):
    out = copied(film(tmp_path / name, **how), tmp_path / "out.mp4")
    at = how.get("sound_at", 0)
    true = [[at + k, at + k + 0.5] for k in range(3) if at + k >= 0]
    np.testing.assert_allclose(tones_in(out), true, atol=0.012 if at < 0 else 0.002)  # 10 ms are left as they are
    rate, samples = heard(out)
    middle = samples[round((at + 1.1) * rate) : round((at + 1.4) * rate)]
    if how.get("channels") != 6:
        assert np.sqrt((middle**2).mean()) == pytest.approx(0.3 / np.sqrt(2), rel=0.03)
    with av.open(str(out)) as container:
        (track,) = container.streams.audio
        assert (track.codec_context.name, track.rate) == ("aac", 48_000)
        assert track.layout.name == ("mono" if how.get("channels", 1) == 1 else "stereo")


def test_sound_ends_with_the_pictures(tmp_path):
    source = read_video(film(tmp_path / "in.mp4"))
    with VideoWriter(tmp_path / "out.mp4", source.fps, source.size, sound=source.sound) as writer:
        for time, frame in list(source.with_times())[:30]:  # 1.2 seconds
            writer.write(frame, time)
    np.testing.assert_allclose(tones_in(tmp_path / "out.mp4"), [[0, 0.5], [1, 1.2]], atol=0.002)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.duration / 1e6 == pytest.approx(1.2, abs=0.001)


def test_sound_and_pictures_lie_side_by_side(tmp_path):
    """Who plays it over a network needn't load it all first."""
    out = copied(film(tmp_path / "in.mp4", seconds=20), tmp_path / "out.mp4")
    with av.open(str(out)) as container:
        packets = [
            (packet.pos, packet.stream.type, float(packet.dts * packet.time_base))
            for packet in container.demux()
            if packet.dts is not None
        ]
    times = {"video": 0.0, "audio": 0.0}
    for _, kind, time in sorted(packets):
        times[kind] = time
        assert abs(times["video"] - times["audio"]) < 4


def test_silence_where_there_is_no_sound(tmp_path):
    half = tones(0.5)
    out = copied(film(tmp_path / "in.mkv", seconds=6, sounds={1.0: half, 4.5: half}), tmp_path / "out.mp4")
    np.testing.assert_allclose(tones_in(out), [[1, 1.5], [4.5, 5]], atol=0.012)


def test_hours_of_silence_are_not_held_in_memory(tmp_path):
    path = film(tmp_path / "in.mkv", seconds=1, sounds={0.0: tones(0.5), 36_000.0: tones(0.5)})
    container = av.open(str(tmp_path / "out.mp4"), "w")
    copy = SoundCopy(path, container)
    tracemalloc.start()
    for until in range(0, 120, 10):
        copy.copy(until)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e6  # a second of float32 has 192 kB; ten hours 7 GB


def test_damaged_sound_is_silent(tmp_path):
    """Noise in the file where packets of the sound were."""
    path = film(tmp_path / "in.mp4")
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(audio=0)]
    data = bytearray(path.read_bytes())
    for position, size in packets[45:65]:  # from 1.02 to 1.51 seconds
        data[position : position + size] = b"\xff" * size
    path.write_bytes(data)
    heard_tones = tones_in(copied(path, tmp_path / "out.mp4"))
    np.testing.assert_allclose([heard_tones[0], heard_tones[-1]], [[0, 0.5], [2, 2.5]], atol=0.002)


def test_samples_that_are_no_numbers(tmp_path):
    sound = tones(3)
    sound[:, RATE + 100 : RATE + 200] = np.nan
    sound[:, RATE + 200 : RATE + 300] = 1e30
    path = film(tmp_path / "in.mkv", codec="pcm_f32le", sounds={0.0: sound})
    np.testing.assert_allclose(
        tones_in(copied(path, tmp_path / "out.mp4")), [[0, 0.5], [1, 1.5], [2, 2.5]], atol=0.002
    )


def test_sound_that_changes_its_kind(tmp_path):
    """Broadcasts do: here two streams of MPEG-TS, one after the other."""
    first = film(tmp_path / "a.ts", codec="mp2", channels=1)
    second = film(tmp_path / "b.ts", codec="mp2", channels=2, rate=48_000, begins=3.0)
    path = tmp_path / "in.ts"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    out = copied(path, tmp_path / "out.mp4")
    np.testing.assert_allclose(tones_in(out), [[k, k + 0.5] for k in range(6)], atol=0.05)


def test_a_video_without_sound(tmp_path):
    with VideoWriter(tmp_path / "in.mp4", 25, (48, 64)) as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8))
    assert read_video(tmp_path / "in.mp4").sound is None
    with VideoWriter(tmp_path / "out.mp4", 25, (48, 64), sound=tmp_path / "in.mp4") as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8))
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert not container.streams.audio


def test_sound_of_an_unknown_codec(tmp_path):
    path = film(tmp_path / "in.mkv", codec="pcm_s16le")
    path.write_bytes(path.read_bytes().replace(b"A_PCM/INT/LIT", b"A_NEVERHEARD!"))
    with pytest.warns(UserWarning, match="the sound of 'in.mkv' is left out: its codec is unknown"):
        out = copied(path, tmp_path / "out.mp4")
    assert len(list(read_video(out))) == 75 and read_video(out).sound is None


def test_sound_that_can_not_be_converted(tmp_path):
    """FFmpeg knows no way from nine channels to two. The pictures are there all the same."""
    path = film(tmp_path / "in.mkv", codec="pcm_s16le", channels=9)
    with pytest.warns(UserWarning, match="the sound of 'in.mkv' is left out"):
        out = copied(path, tmp_path / "out.mp4")
    assert len(list(read_video(out))) == 75


@pytest.mark.parametrize("part", [0.1, 0.2])
def test_a_recording_that_begins_between_key_frames(tmp_path, part):
    """As one that was cut does: its first pictures can't be decoded, and are not shown."""
    path = film(tmp_path / "in.ts", seconds=6, bf=2, gop=50)
    data = path.read_bytes()
    path.write_bytes(data[188 * int(part * len(data) / 188) :])
    out = copied(path, tmp_path / "out.mp4")
    with av.open(str(path)) as container:
        first = next(container.decode(video=0)).time - 2 / FPS  # as the clock of the whole begins two frames late
    with av.open(str(path)) as container:
        assert next(container.decode(audio=0)).time < first - 0.3  # seconds of sound without a picture
    np.testing.assert_allclose(
        tones_in(out), [[k - first, k + 0.5 - first] for k in range(6) if k > first], atol=0.012
    )


def test_joined_recordings_sound_to_the_end(tmp_path):
    path = film(tmp_path / "in.ts", seconds=2)
    path.write_bytes(2 * path.read_bytes())
    out = copied(path, tmp_path / "out.mp4")
    np.testing.assert_allclose(tones_in(out), [[k, k + 0.5] for k in range(4)], atol=0.05)


def test_a_file_of_sound_that_is_not_there(tmp_path):
    with (
        pytest.raises(ValueError, match="'gone.mp4' can't be opened"),
        VideoWriter(tmp_path / "new" / "out.mp4", 25, (48, 64), sound=tmp_path / "gone.mp4"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_nothing_stays_open(tmp_path):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc to look at open files")
    path = film(tmp_path / "in.mp4")
    source = read_video(path)
    frames = list(source)
    opened = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError), VideoWriter(tmp_path / "out.mp4", 25, source.size, sound=path) as writer:
        writer.write(frames[0])
        assert len(os.listdir("/proc/self/fd")) == opened + 1
        1 / 0  # noqa: B018
    assert len(os.listdir("/proc/self/fd")) == opened
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def test_overlays_of_a_film_have_its_sound(tmp_path):
    source = read_video(film(tmp_path / "in.mp4"))
    objects = [{"id": 1, "label": None, "score": 0.9}]
    results = [
        FrameSegments(index, time, frame, np.ones((48, 64), np.int32), objects) for index, time, frame in source.read()
    ]
    save_segments(results, tmp_path / "out", ["mp4"], source.fps, sound=source.sound)
    np.testing.assert_allclose(tones_in(tmp_path / "out" / "overlay.mp4"), [[0, 0.5], [1, 1.5], [2, 2.5]], atol=0.002)


@pytest.mark.parametrize("of_many", [False, True])
def test_the_command_keeps_the_sound(tmp_path, tiny_checkpoint, of_many):
    (tmp_path / "in").mkdir()
    path = film(tmp_path / "in" / "film.mp4", seconds=1)
    out = tmp_path / "out"
    asked = tmp_path / "in" / "*.mp4" if of_many else path
    main(["segment", str(asked), "--model", str(tiny_checkpoint), "--output", str(out), "--formats", "mp4"])
    (overlay,) = out.rglob("overlay.mp4")
    np.testing.assert_allclose(tones_in(overlay), [[0, 0.5]], atol=0.002)
