"""Many videos and many processes: each video once, whole, and the same whoever worked on it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ausm_hf import archive
from ausm_hf.archive import are_many, find_videos, work_through


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    return folder


def copy(path: str, folder: Path) -> dict:
    """Stands for the segmentation of a video."""
    text = Path(path).read_text()
    if "broken" in text:
        raise ValueError(f"{path} is\nbroken")
    (folder / "deeper").mkdir(parents=True)
    (folder / "deeper" / "copy.txt").write_text(text.upper())
    return {"frames": len(text)}


def content(folder):
    """What is for the user in an output folder: all but the hidden."""
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return {str(p): (folder / p).read_bytes() for p in files if p.parts[0] != ".ausm"}


def test_names_of_videos(tmp_path, monkeypatch):
    make(tmp_path / "in", "a.mp4", "b/a.mp4", "b/c.x.mkv", "b/notes.txt")
    assert find_videos([tmp_path / "in" / "**" / "*.m*"]) == {
        "a": str(tmp_path / "in/a.mp4"),
        "b/a": str(tmp_path / "in/b/a.mp4"),
        "b/c.x": str(tmp_path / "in/b/c.x.mkv"),
    }
    assert list(find_videos([str(tmp_path / "in/b/*.mp4"), tmp_path / "in/a.mp4"])) == ["a", "b/a"]
    assert list(find_videos([tmp_path / "in/a.mp4"] * 2)) == ["a"]
    assert list(find_videos([tmp_path / "i*"])) == ["in"]  # folders of frames, where a pattern matches no files
    monkeypatch.chdir(tmp_path)
    assert find_videos(["*/*.mp4"]) == find_videos("*/*.mp4") == {"in/a": "in/a.mp4"}
    for inputs, message in [([], "empty"), (["*.avi"], "matches no file"), (["in/a.mp4", "gone"], "'gone': no such")]:
        with pytest.raises(ValueError, match=message):
            find_videos(inputs)


def test_a_link_to_a_folder_above_makes_no_further_videos(tmp_path, monkeypatch):
    """Nor one to a folder elsewhere fewer."""
    (tmp_path / "archive" / "day").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("archive/day/a.mp4", "elsewhere/b.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "archive" / "day" / "all").symlink_to("..")
    (tmp_path / "archive" / "more").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert list(find_videos(["archive/**/*.mp4"])) == ["day/a", "more/b"]
    assert list(find_videos(["archive/day/all/day/*.mp4"])) == ["a"]  # the way there is the user's to choose


def test_results_are_no_videos(tmp_path, monkeypatch):
    """The second run over the same pattern finds the same videos, wherever it writes to."""
    make(tmp_path, "in/a.mp4", "in/b/c.mp4", "out/overlay.mp4", "out/in/a/overlay.mp4")
    make(tmp_path, "in/a/overlay.mp4", "in/a/video.json", "shots/x/0.png", "shots/out/x/objects.json")
    monkeypatch.chdir(tmp_path)
    assert "out/overlay" in find_videos(["**/*.mp4"])
    assert list(find_videos(["**/*.mp4"], "out")) == ["in/a.mp4", "in/a/overlay", "in/b/c"]  # of another one
    assert list(find_videos(["in/**/*.mp4"], tmp_path / "in")) == ["a", "b/c"]
    assert list(find_videos(["shots/*"], "shots/out")) == ["x"]  # folders of frames
    assert list(find_videos(["out/overlay.mp4"], "out")) == ["overlay"]  # if it is named, it is meant
    with pytest.raises(ValueError, match="matches no file"):
        find_videos(["out/*.mp4", "o*/*.mp4"], "out/../out")


def test_names_never_meet(tmp_path):
    make(tmp_path, "a.mp4", "a.mkv", "b.mp4", "b/c.mp4", "manifest.jsonl.mp4")
    assert list(find_videos([tmp_path / "**/*.m*"])) == ["a.mkv", "a.mp4", "b.mp4", "b/c", "manifest.jsonl.mp4"]
    make(tmp_path, "e/Clip.mp4", "e/clip.mov")  # one folder on the disks of macOS and Windows
    assert list(find_videos([tmp_path / "e" / "*"])) == ["Clip.mp4", "clip.mov"]
    make(tmp_path, "d.mp4", "d.mkv", "d.mp4.avi")
    with pytest.raises(ValueError, match="'d.mp4' would lie among those of another"):
        find_videos([tmp_path / "d*"])


def test_one_or_many(tmp_path, monkeypatch):
    make(tmp_path, "0.png", "1.PNG", "a.mp4", "b[1].mp4")
    one = [["a.mp4"], ["*.png"], ["*.[pP]*"], ["b[1].mp4"], ["http://host/a?b=*"], ["camera:0"], ["-"]]
    monkeypatch.chdir(tmp_path)
    assert not any(map(are_many, one))
    many = [["*.mp4"], ["a*"], ["a.mp4", "b[1].mp4"], ["*"], ["-", "a.mp4"], ["0.png", "a.mp4"], ["0.png", "x/0.png"]]
    assert all(map(are_many, many))
    with pytest.raises(ValueError, match="2 images of the folder .*quote the pattern, or name the folder"):
        are_many(["0.png", "1.PNG"])


def test_results_and_manifest(tmp_path):
    videos = find_videos([make(tmp_path / "in", "a.mp4", "b/broken.mp4", "c.mp4") / "**/*.mp4"])
    lines = list(work_through(videos, tmp_path / "out", copy, {"size": (1, 2)}))
    assert [(line["name"], line["status"]) for line in lines] == [
        ("a", "done"), ("b/broken", "failed"), ("c", "done"),
    ]  # fmt: skip
    assert lines[1]["error"] == f"{videos['b/broken']} is broken"
    assert lines[0] == {"name": "a", "video": videos["a"], "status": "done", "error": None, "frames": 16}
    assert sorted(content(tmp_path / "out")) == [
        "a/deeper/copy.txt", "a/video.json", "c/deeper/copy.txt", "c/video.json", "manifest.jsonl",
    ]  # fmt: skip
    assert list(map(json.loads, (tmp_path / "out/manifest.jsonl").read_text().splitlines())) == lines
    assert not [p for p in (tmp_path / "out/.ausm").rglob("*") if p.is_file() and p.parent.name in ("work", "claims")]


def test_who_runs_beside_does_not_try_again_what_has_failed(tmp_path):
    videos = find_videos([make(tmp_path / "in", "a.mp4", "broken.mp4") / "*"])
    worked = []

    def work(path, folder):
        worked.append(Path(path).name)
        return copy(path, folder)

    first, second = (work_through(videos, tmp_path / "out", work, {}) for _ in range(2))
    assert next(first) == next(second)
    time.sleep(0.02)  # the times of files are coarse
    lines = list(first)
    assert list(second) == lines and lines[0]["status"] == "failed" and worked == ["a.mp4", "broken.mp4"]


def test_again_only_what_is_new_failed_or_mended(tmp_path):
    make(tmp_path / "in", "a.mp4", "broken.mp4")
    worked = []

    def work(path, folder):
        worked.append(Path(path).name)
        return copy(path, folder)

    def run():
        worked.clear()
        videos = find_videos([tmp_path / "in" / "*"])
        return [line["status"] for line in work_through(videos, tmp_path / "out", work, {})]

    assert run() == ["done", "failed"] and worked == ["a.mp4", "broken.mp4"]
    assert run() == ["done", "failed"] and worked == ["broken.mp4"]  # the disk may have been away for a moment
    make(tmp_path / "in", "b.mp4")
    assert run() == ["done", "done", "failed"] and worked == ["b.mp4", "broken.mp4"]
    (tmp_path / "in/broken.mp4").write_text("mended")
    assert run() == ["done", "done", "done"] and worked == ["broken.mp4"]
    (tmp_path / "in/a.mp4").write_text("other content")
    assert run() == ["done", "done", "done"] and worked == ["a.mp4"]
    assert (tmp_path / "out/a/deeper/copy.txt").read_text() == "OTHER CONTENT"
    assert not list((tmp_path / "out/.ausm").glob("*.old"))
    (tmp_path / "in/a.mp4").unlink()
    assert run() == ["done", "done"]
    lines = (tmp_path / "out/manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["a", "b", "broken"]  # what was done stays on record


def test_a_folder_of_frames_is_done_again_when_a_frame_has_changed(tmp_path):
    make(tmp_path / "in", "x/0.png", "x/1.png", "y/0.png")
    worked = []

    def work(path, folder):
        worked.append(Path(path).name)
        folder.mkdir(parents=True)
        return {}

    for expected in (["x", "y"], [], ["x"]):
        for hidden in (".DS_Store", "._0.png"):
            (tmp_path / "in" / "y" / hidden).write_text(str(expected))  # somebody looked at them
        worked.clear()
        list(work_through(find_videos([tmp_path / "in" / "*"]), tmp_path / "out", work, {}))
        assert worked == expected
        make(tmp_path / "in", "x/1.png") if expected == [] else None


def test_a_manifest_lost_to_another_run_is_gathered_anew(tmp_path):
    videos = find_videos([make(tmp_path / "in", "a.mp4", "broken.mp4", "b.mp4") / "*.mp4"])
    some, other = {name: videos[name] for name in ("a", "broken")}, {"b": videos["b"]}
    lines = list(work_through(some, tmp_path / "out", copy, {}))
    (tmp_path / "out" / "manifest.jsonl").unlink()  # another run had read it before, and wrote its own now
    make(tmp_path / "out", "a/deeper/video.json")  # of this name, but no result
    lines += work_through(other, tmp_path / "out", copy, {})
    written = map(json.loads, (tmp_path / "out/manifest.jsonl").read_text().splitlines())
    assert list(written) == sorted(lines, key=lambda line: line["name"])


def test_a_name_like_that_of_a_claim(tmp_path):
    videos = find_videos([make(tmp_path / "in", "take.mp4", "take.0/b.mp4") / "**/*.mp4"])

    def work(path, folder):
        if path == videos["take"]:  # meanwhile another process is at the other one
            list(work_through({"take.0/b": videos["take.0/b"]}, tmp_path / "out", copy, {}))
        return copy(path, folder)

    list(work_through(videos, tmp_path / "out", work, {}))
    for name in videos:
        assert (tmp_path / "out" / name / "deeper" / "copy.txt").exists()


@pytest.mark.parametrize("broken", [False, True])
def test_a_video_that_changes_while_it_is_worked_on_is_done_again_by_the_next_run(tmp_path, broken):
    videos = find_videos([make(tmp_path / "in", "a.mp4") / "*"])

    def changes(path, folder):
        line = copy(path, folder)
        Path(path).write_text(Path(path).read_text() + "+")
        if broken:
            raise ValueError("broken")
        return line

    (line,) = work_through(videos, tmp_path / "out", changes, {})
    assert line["status"] == ("failed" if broken else "done")
    assert [line["frames"] for line in work_through(videos, tmp_path / "out", copy, {})] == [17]
    assert (tmp_path / "out/a/deeper/copy.txt").read_text() == "CONTENT OF A.MP4+"


def test_other_settings_or_things_in_the_way(tmp_path):
    videos = find_videos([make(tmp_path / "in", "a.mp4") / "*"])
    make(tmp_path / "out", "a/holiday.jpg")
    with pytest.raises(ValueError, match=r"a' exists already, but is no result"):
        list(work_through(videos, tmp_path / "out", copy, {}))
    (tmp_path / "out/a/holiday.jpg").unlink(), (tmp_path / "out/a").rmdir()
    list(work_through(videos, tmp_path / "out", copy, {"threshold": 0.5}))
    with pytest.raises(ValueError, match=r"made with threshold 0.5, not 0.6; wanted are the same settings"):
        list(work_through(videos, tmp_path / "out", copy, {"threshold": 0.6}))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("bug")])
def test_what_is_not_the_videos_fault_leaves_it_to_others(tmp_path, error):
    videos = find_videos([make(tmp_path / "in", "a.mp4", "b.mp4") / "*"])

    def work(path, folder):
        copy(path, folder)
        if path.endswith("b.mp4"):
            raise error
        return {}

    with pytest.raises(type(error)):
        list(work_through(videos, tmp_path / "out", work, {}))
    assert sorted(content(tmp_path / "out")) == ["a/deeper/copy.txt", "a/video.json", "manifest.jsonl"]
    assert [line["status"] for line in work_through(videos, tmp_path / "out", copy, {})] == ["done"] * 2


def claim_of_another(out, name, number=0, **owner):
    path = out / ".ausm/claims" / f"{name}.{number}.claim"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": "elsewhere", "place": "elsewhere", "process": 1, **owner}))
    return path


def test_claims_of_others_are_waited_for_until_they_die(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "LEASE", 1.0)
    out = tmp_path / "out"
    videos = find_videos([make(tmp_path / "in", "a.mp4", "b.mp4") / "*"])
    theirs = claim_of_another(out, "a")
    make(out, ".ausm/work/a.0.work/half")
    started = time.monotonic()
    names = []
    for line in work_through(videos, out, copy, {}):
        names.append(line["name"])
        if line["name"] == "b":
            assert time.monotonic() - started < 0.9  # nobody waits while there is other work
            os.utime(theirs)  # the other one is alive
            touched = time.monotonic()
    assert names == ["b", "a"] and 0.9 < time.monotonic() - touched < 3
    assert not [p for p in (out / ".ausm").rglob("*") if p.is_file() and p.name != "settings.json"]


def test_process_that_is_gone_from_this_machine_is_not_waited_for(tmp_path):
    out = tmp_path / "out"
    videos = find_videos([make(tmp_path / "in", "a.mp4") / "*"])
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = archive._place()
    if here is None:
        pytest.skip("this system doesn't tell where process ids mean something")
    started = time.monotonic()
    claim_of_another(out, "a", place=here, process=gone.pid)
    claim_of_another(out, "a", number=1, place=here, process=gone.pid)  # who took over has died too
    assert [line["name"] for line in work_through(videos, out, copy, {})] == ["a"]
    assert time.monotonic() - started < archive.LEASE / 4


def test_claims_of_who_died_when_all_was_done_are_removed(tmp_path):
    out = tmp_path / "out"
    videos = find_videos([make(tmp_path / "in", "a.mp4", "broken.mp4") / "*"])
    lines = list(work_through(videos, out, copy, {}))
    assert [line["status"] for line in lines] == ["done", "failed"]
    claims = [claim_of_another(out, "a", number=number) for number in (0, 1)]
    assert list(work_through(videos, out, copy, {})) == lines
    assert not any(path.exists() for path in claims)


def test_what_the_killed_were_writing_is_removed(tmp_path):
    out, hidden = tmp_path / "out", tmp_path / "out/.ausm"
    hidden.mkdir(parents=True)
    old, young = hidden / "0a.partial", hidden / "0b.partial"
    for path in (old, young):
        path.write_text('{"name": ')
    os.utime(old, (0, 0))
    list(work_through(find_videos([make(tmp_path / "in", "a.mp4") / "*"]), out, copy, {}))
    assert not old.exists() and young.exists()  # the other one may still be written


@pytest.mark.parametrize("notices", [False, True])
def test_who_was_taken_for_dead_drops_its_work(tmp_path, notices):
    out = tmp_path / "out"
    videos = find_videos([make(tmp_path / "in", "a.mp4") / "*"])

    def slow(path, folder):
        """While it sleeps, another process takes over and finishes."""
        folder.mkdir(parents=True)
        os.utime(out / ".ausm/claims/a.0.claim", (0, 0))
        others.extend(work_through(videos, out, copy, {}))
        assert not folder.exists()  # the other one cleaned up
        if not notices:
            folder.mkdir()
        (folder / "mine").touch()  # an error, if the folder is gone
        return {"frames": -1}

    others = []
    assert list(work_through(videos, out, slow, {})) == others and others[0]["frames"] == 16
    assert sorted(content(out)) == ["a/deeper/copy.txt", "a/video.json", "manifest.jsonl"]
    assert not [p for p in (out / ".ausm").rglob("*") if p.is_file() and p.name != "settings.json"]


def test_a_claim_is_kept_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "LEASE", 0.6)
    out = tmp_path / "out"
    videos = find_videos([make(tmp_path / "in", "a.mp4") / "*"])

    def slow(path, folder):
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            assert not archive._Archive(out, videos)._is_dead(out / ".ausm/claims/a.0.claim")
            time.sleep(0.05)
        return copy(path, folder)

    monkeypatch.setattr(archive, "_place", lambda: None)  # only the lease counts
    assert [line["status"] for line in work_through(videos, out, slow, {})] == ["done"]


WORKER = """
import os, sys, time
from pathlib import Path
from ausm_hf import archive
sys.path.insert(0, sys.argv[1])
def work(path, folder):
    with open(sys.argv[4], "a") as log:
        log.write(Path(path).name + "\\n")
    (folder / "deeper").mkdir(parents=True)
    for i in range(3):
        (folder / "deeper" / f"{i}.txt").write_text(Path(path).read_text() * 1000)
        time.sleep(0.01)
    if "broken" in path:
        raise ValueError("broken")
    return {"frames": 3}
for line in archive.work_through(archive.find_videos([sys.argv[2] + "/**/*.mp4"]), sys.argv[3], work, {}):
    pass
"""


def start_worker(tmp_path, out, log="log"):
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(tmp_path), str(tmp_path / "in"), str(out), str(tmp_path / log)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_processes_share_the_work_and_some_are_killed(tmp_path):
    names = [f"{i % 4}/{i:02d}.mp4" for i in range(24)] + ["broken.mp4"]
    make(tmp_path / "in", *names)
    assert start_worker(tmp_path, tmp_path / "alone", "log_alone").wait() == 0

    out = tmp_path / "out"
    workers = [start_worker(tmp_path, out) for _ in range(2)]
    killed = 0
    while any(worker.poll() is None for worker in workers):
        time.sleep(0.2)
        if killed < 4 and (out / ".ausm/claims").exists() and len(list(out.rglob("video.json"))) < 20:
            victim = workers[killed % 2]
            victim.send_signal(signal.SIGKILL)
            victim.wait()
            workers[killed % 2] = start_worker(tmp_path, out)
            killed += 1
        for path in out.glob("[0-9]/*"):  # whole, or not there
            assert {p.name for p in path.rglob("*") if p.is_file()} == {"0.txt", "1.txt", "2.txt", "video.json"}
    assert [worker.returncode for worker in workers] == [0, 0] and killed >= 1
    assert content(out) == content(tmp_path / "alone")
    assert len(content(out)) == 24 * 4 + 1
    worked = (tmp_path / "log").read_text().split()
    assert set(worked) == {name.split("/")[-1] for name in names} and len(worked) <= len(names) + killed
    # What a process was writing as it was killed is for a later run to remove.
    left = [p.name for p in (out / ".ausm").rglob("*") if p.is_file() and p.suffix != ".partial"]
    assert left == ["settings.json", "broken.json"]
