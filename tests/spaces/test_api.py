"""The demo as programs use it: `gradio_client` against a page served here."""

import json
import os
import re
import urllib.request
import zipfile
from pathlib import Path
from urllib.error import HTTPError

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'ausm-hf[demo]'")

from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from ausm_hf.demo.api import read_prompts  # noqa: E402
from ausm_hf.demo.unpack import Limits, Refused  # noqa: E402


@pytest.fixture(scope="module")
def page(serve):
    return serve(limits=Limits(num_frames=20, megabytes=1))


@pytest.fixture(scope="module")
def client(page, tmp_path_factory):
    return Client(page.local_url, verbose=False, download_files=tmp_path_factory.mktemp("downloads"))


@pytest.fixture
def first_masks(moving_square, tmp_path):
    Image.fromarray(moving_square[1][0] * 3).save(tmp_path / "first.png")
    return tmp_path / "first.png"


def test_the_functions_are_named_and_described(client):
    described = client.view_api(return_format="dict")["named_endpoints"]
    assert set(described) == {"/track", "/find", "/preview"}
    for endpoint in described.values():
        assert len(endpoint["description"]) > 60
    parameters = described["/track"]["parameters"]
    assert [item["parameter_name"] for item in parameters] == ["video", "prompts", "masks", "backward"]
    assert parameters[-1]["parameter_default"] is True


def test_track_by_masks(client, clip_file, first_masks, moving_square):
    video, masks, objects, coco, youtube_vis, table = client.predict(
        handle_file(clip_file), [], handle_file(first_masks), api_name="/track"
    )
    with zipfile.ZipFile(masks) as archive, archive.open("masks/00000.png") as file:
        np.testing.assert_array_equal(np.array(Image.open(file)), moving_square[1][0] * 3)
    assert [item["id"] for item in json.loads(Path(objects).read_text())["objects"]] == [3]
    assert json.loads(Path(coco).read_text())["images"][5]["height"] == 48
    assert len(json.loads(Path(youtube_vis).read_text())["annotations"][0]["segmentations"]) == 6
    assert table[0]["id"] == 3 and len(table[0]["areas"]) == 6
    video = video["video"] if isinstance(video, dict) else video
    assert Path(video).read_bytes()[4:8] == b"ftyp"


@pytest.mark.parametrize("how", [{}, {"backward": False}])
def test_track_from_a_later_frame(client, clip_file, how):
    prompts = [{"frame": 3, "object": 1, "box": [16, 8, 40, 32]}]
    _, masks, *_, table = client.predict(handle_file(clip_file), prompts, None, **how, api_name="/track")
    with zipfile.ZipFile(masks) as archive:
        seen = [np.array(Image.open(archive.open(f"masks/{index:05d}.png"))).any() for index in range(6)]
    assert seen[3] and any(seen[:3]) == (not how)
    assert (table[0]["areas"][2] > 0) == (not how)


def test_find(client, clip_file):
    *_, table = client.predict(handle_file(clip_file), 0.01, 2, "pets", api_name="/find")
    assert table and {item["label"] for item in table} <= {"cat", "dog"}


def test_names_are_one_line_of_a_length_that_can_be_drawn():
    marks, names = read_prompts(
        [
            {"frame": 0, "object": n, "box": [1, 1, 9, 9], "name": name}
            for n, name in enumerate([" a\n dog ", "x" * 40, " "])
        ]
    )
    assert len(marks) == 3 and names == {0: "a dog", 1: "x" * 30}


@pytest.mark.parametrize("key", ["frame", "object"])
def test_numbers_are_whole_ones_however_they_are_written(key):
    entry = {"frame": 1, "object": 1, "box": [1, 1, 9, 9]}
    (mark,), _ = read_prompts([{**entry, key: 2.0}])
    assert (mark.frame, mark.object_id) == ((2, 1) if key == "frame" else (1, 2))
    for number in (1.9, None, True, "1", float("inf"), float("nan"), [1]):
        with pytest.raises(Refused, match=f"The {key} can't be understood; wanted is a whole number"):
            read_prompts([{**entry, key: number}])


@pytest.mark.parametrize("on", [True, False, 1, 0, 1.0, 0.0, 2, -1, "0", None])
def test_a_point_is_on_the_object_or_not(on):
    entry = {"frame": 0, "object": 1, "points": [[5, 5, on]]}
    if on in (0, 1):
        assert read_prompts([entry])[0][0].add == bool(on)
    else:
        with pytest.raises(Refused, match="The prompts can't be understood"):
            read_prompts([entry])


def test_a_gif_from_a_program(client, moving_square, tmp_path):
    frames = [Image.fromarray(frame) for frame in moving_square[0]]
    frames[0].save(tmp_path / "square.gif", save_all=True, append_images=frames[1:], duration=100)
    picture = client.predict(handle_file(tmp_path / "square.gif"), [], 5.0, api_name="/preview")
    with Image.open(picture) as picture:
        assert picture.size == (64, 48)


BAD = {
    "no prompt": (lambda video: ([], None, "/track"), "Nothing is marked"),
    "an unknown key": (lambda video: ([{"frame": 0, "object": 1, "polygon": [[1, 2]]}], 0, "/preview"), "polygon"),
    "an entry that says nothing": (lambda video: ([{"frame": 0, "object": 1}], 0, "/preview"), "without points"),
    "prompts of another kind": (lambda video: ({"a": 1}, 0, "/preview"), "can't be understood"),
    "a frame too far": (lambda video: ([{"frame": 9, "object": 1, "points": [[1, 2, 1]]}], 0, "/preview"), "frame 9"),
    "a place outside": (lambda video: ([{"frame": 0, "object": 1, "box": [0, 0, 99, 9]}], 0, "/preview"), "outside"),
    "masks that are a video": (lambda video: ([], handle_file(video), "/track"), "masks can't be read"),
    "a threshold": (lambda video: (1.5, 10, "pets", "/find"), "between 0 and 1"),
    "object 1.9": (lambda video: ([{"frame": 0, "object": 1.9, "box": [0, 0, 9, 9]}], 0, "/preview"), "The object"),
    "half a frame": (lambda video: ([], 1.5, "/preview"), "The frame can't be understood; wanted is a whole number"),
    "no frame": (lambda video: ([], None, "/preview"), "The frame can't be understood; wanted is a whole number"),
    "half an object to find": (lambda video: (0.5, 2.5, "pets", "/find"), "number of objects can't be understood"),
    "no number of objects": (lambda video: (0.5, None, "pets", "/find"), "number of objects can't be understood"),
    "too many objects": (lambda video: (0.5, 101, "pets", "/find"), "number of objects is 1 to 100"),
    "a label set": (lambda video: (0.5, 10, "cars", "/find"), "there are: pets"),
}


def rooms_now() -> set[Path]:
    return set(Path(os.environ["GRADIO_TEMP_DIR"], "rooms").iterdir())


@pytest.mark.parametrize("name", ["track", "find"])
def test_only_results_stay_on_the_server(client, clip_file, first_masks, name):
    before = rooms_now()
    arguments = {"track": ([], handle_file(first_masks)), "find": (0.5, 2, "pets")}[name]
    client.predict(handle_file(clip_file), *arguments, api_name=f"/{name}")
    (room,) = rooms_now() - before
    assert [path.name for path in room.iterdir()] == ["run"] and (room / "run" / "masks.zip").exists()


def test_a_preview_leaves_nothing_on_the_server(client, clip_file):
    before = rooms_now()
    prompts = [{"frame": 0, "object": 1, "box": [8, 8, 30, 30]}]
    with Image.open(client.predict(handle_file(clip_file), prompts, 0, api_name="/preview")) as picture:
        assert picture.size == (64, 48)
    assert rooms_now() == before


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_a_sentence(client, clip_file, kind):
    arguments, message = BAD[kind]
    *arguments, name = arguments(clip_file)
    before = rooms_now()
    with pytest.raises(AppError, match=message) as caught:
        client.predict(handle_file(clip_file), *arguments, api_name=name)
    assert os.environ["GRADIO_TEMP_DIR"] not in str(caught.value)
    assert rooms_now() == before


def test_hostile_uploads_are_sentences(client, tmp_path, monkeypatch):
    before = rooms_now()
    (tmp_path / "holiday.mp4").write_text("#EXTM3U\n#EXTINF:9,\nfile:///etc/passwd\n")
    with pytest.raises(AppError, match="no video that can be read here") as caught:
        client.predict(handle_file(tmp_path / "holiday.mp4"), 0.5, 10, "pets", api_name="/find")
    assert os.environ["GRADIO_TEMP_DIR"] not in str(caught.value) and "passwd" not in str(caught.value)
    assert rooms_now() == before


def test_too_large_an_upload_is_not_even_taken(client, page, tmp_path):
    (tmp_path / "large.mp4").write_bytes(bytes(3 * 2**20))
    with pytest.raises(Exception, match="(?i)413|size|large"):
        client.predict(handle_file(tmp_path / "large.mp4"), 0.5, 10, "pets", api_name="/find")
    assert not list(Path(os.environ["GRADIO_TEMP_DIR"]).rglob("large.mp4"))


def call(page, data, api_name="find"):
    """The last answer to a call whose data nobody has made proper."""

    def post(path, content):
        request = urllib.request.Request(
            f"{page.local_url}gradio_api{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        return json.loads(urllib.request.urlopen(request, timeout=60).read())

    event = post(f"/call/{api_name}", {"data": data})["event_id"]
    return urllib.request.urlopen(f"{page.local_url}gradio_api/call/{api_name}/{event}", timeout=60).read().decode()


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../etc/passwd", "http://127.0.0.1:9/a.mp4", "https://example.org/a"]
)
@pytest.mark.parametrize("meta", [True, False])
def test_other_files_and_addresses_are_not_read(page, path, meta, monkeypatch):
    """In place of an upload: files of the server, and addresses that it would fetch."""
    import socket

    asked = []
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **named: asked.append(host) or real("127.0.0.1", *rest, **named)
    )
    file = {"path": path, **({"meta": {"_type": "gradio.FileData"}} if meta else {})}
    answer = call(page, [file, 0.5, 10, "pets"])
    assert "event: error" in answer
    assert "root:" not in answer and os.environ["GRADIO_TEMP_DIR"] not in answer and str(Path.cwd()) not in answer
    assert not [host for host in asked if "example.org" in str(host)]


@pytest.mark.parametrize(
    "path",
    [
        "process_recording",
        "vibe-edit",
        "proxy=https://example.org/a.mp4",
        "file=https://example.org/a",
        "file=%68ttp://a",
    ],
)
def test_what_gradio_serves_beside_the_page_is_closed(page, path, monkeypatch):
    """It would decode recordings without bounds, and fetch addresses."""
    import socket

    asked = []
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **named: asked.append(host) or real(host, *rest, **named)
    )
    body = b"--x\r\nContent-Disposition: form-data; name=video; filename=a.mp4\r\n\r\nno video\r\n--x--\r\n"
    for method in ("GET", "POST"):
        request = urllib.request.Request(
            f"{page.local_url}gradio_api/{path}",
            body if method == "POST" else None,
            {"Content-Type": "multipart/form-data; boundary=x"},
        )
        with pytest.raises(HTTPError) as caught:
            urllib.request.urlopen(request, timeout=30)
        assert caught.value.code == 404 and caught.value.read() == b"There is nothing here."
    assert not [host for host in asked if "example.org" in str(host) or host == "a"]


def test_nobody_sees_the_files_of_others(page, client, clip_file, first_masks):
    """Results lie under names that can't be guessed, and no folder is listed."""
    Client(page.local_url, verbose=False, download_files=False).predict(
        handle_file(clip_file), [], handle_file(first_masks), api_name="/track"
    )
    root = Path(os.environ["GRADIO_TEMP_DIR"])
    rooms = list((root / "rooms").iterdir())
    assert rooms and all(re.fullmatch(r"[\w-]{32}", room.name) for room in rooms)
    for folder in (root, root / "rooms", rooms[0], rooms[0] / "run"):
        with pytest.raises(HTTPError) as caught:
            urllib.request.urlopen(f"{page.local_url}gradio_api/file={folder}", timeout=30)
        assert caught.value.code in (403, 404)
    for path in ("/etc/passwd", f"{root}/../../etc/passwd", __file__):
        with pytest.raises(HTTPError):
            urllib.request.urlopen(f"{page.local_url}gradio_api/file={path}", timeout=30)


def test_what_the_page_calls_is_not_for_programs(page):
    config = json.loads(urllib.request.urlopen(f"{page.local_url}config", timeout=30).read())
    public = {item["api_name"] for item in config["dependencies"] if item["api_visibility"] == "public"}
    assert public == {"track", "find", "preview"}


def test_unforeseen_trouble_shows_nothing_of_the_server(page, client, clip_file, monkeypatch, caplog):
    def explode(*args, **kwargs):
        raise RuntimeError("/home/secret/model.safetensors is on fire")

    monkeypatch.setattr("ausm_hf.demo.api.check_find", explode)
    with pytest.raises(AppError, match="Something went wrong on the server") as caught:
        client.predict(handle_file(clip_file), 0.5, 10, "pets", api_name="/find")
    assert "secret" not in str(caught.value)
    assert "on fire" in caplog.text  # but whoever runs it can read it
