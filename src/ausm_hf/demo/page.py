"""The page: what is where, and which function a button calls."""

import functools
import html
import inspect
import logging
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from ..visualization import color_of
from .api import add_api
from .camera import see
from .clips import Clip, Rooms
from .examples import make_examples
from .marks import MAX_NAME, MAX_OBJECTS, marks_that_count, read_mark
from .network import Network, News, Result, Stopped, data_url, show_alone
from .unpack import Limits, Refused
from .visits import Visit, Visits

logger = logging.getLogger(__name__)
HERE = Path(__file__).parent
CANNOT_PLAY = " Not all browsers play such a file; if the player above says so, it can be followed all the same."

CANVAS = """<div class="ausm-tools" role="toolbar" aria-label="Tools to mark with">
<button type="button" data-kind="point" data-add="1">+ On the object</button>
<button type="button" data-kind="point" data-add="0">&minus; Not on it</button>
<button type="button" data-kind="box" data-add="1">Box</button>
<button type="button" data-kind="paint" data-add="1">Paint</button>
<button type="button" data-kind="paint" data-add="0">Erase</button>
<button type="button" class="away">Not in this frame</button>
<label>Brush <input type="range" min="4" max="80" value="20" aria-label="Size of the brush"></label>
</div>
<div class="stage"><canvas aria-label="The frame to mark objects in"></canvas>
<p class="hint">The first frame of your video appears here. Click on an object, draw a box around it, or paint it.</p>
</div><p class="note" role="status"></p>"""

LIVE = """<div class="ausm-live" aria-live="off"><progress></progress><span class="text" role="status"></span>
<img alt="The newest frame with its objects"><input type="range" min="0" max="0" value="0" step="1"
aria-label="Frame to look at"></div>"""


def told(function):
    """What goes wrong becomes a sentence on the page; what nobody foresaw goes to the log, without its details."""

    def sentence(error: Exception) -> gr.Error:
        if isinstance(error, gr.Error):
            return error
        if isinstance(error, Refused):
            return gr.Error(str(error), title="That did not work", duration=20, print_exception=False)
        logger.error("in %s", function.__name__, exc_info=error)
        return gr.Error("Something went wrong on the server. Please try again.", duration=20, print_exception=False)

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            try:
                yield from function(*args, **kwargs)
            except Exception as error:
                raise sentence(error) from None
    else:

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except Exception as error:
                raise sentence(error) from None

    return wrapped


def make_page(network: Network, root: Path, limits: Limits | None = None, webcam: bool = True) -> gr.Blocks:
    """
    Args:
        network: The model.
        root: Folder for all temporary files; Gradio's GRADIO_TEMP_DIR must be set to it already.
        limits: What visitors may upload.
        webcam: Whether there is a tab for the camera.
    """
    limits = limits or Limits()
    visits = Visits(Rooms(root))
    config = network.model.config
    private: dict[str, Any] = {"api_visibility": "private"}

    with gr.Blocks(title="AUSM: follow objects in a video", analytics_enabled=False, fill_width=True) as page:
        page.sweep = visits.sweep
        gr.HTML(
            "<h1>Follow objects in a video</h1><p>Mark things in a frame, and they are followed from there through "
            "the video, pixel by pixel. Or mark nothing, and what is there is found and followed.</p>",
            elem_classes="ausm-head",
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                upload = gr.Video(label="Your video", sources=["upload"], height=220, elem_id="upload", buttons=[])
            with gr.Column(scale=1, min_width=240):
                gr.Examples(
                    [[str(path)] for path in make_examples(root / "examples")],
                    [upload],
                    label="Or try one of these",
                    api_visibility="private",
                )
        welcome = f"Videos of {limits} will do."
        facts = gr.Markdown(welcome, elem_id="facts")
        with gr.Tabs():
            with gr.Tab("Track what I mark"):
                canvas = gr.HTML(
                    {},
                    html_template=CANVAS,
                    js_on_load=_file("canvas.js"),
                    elem_id="canvas",
                    elem_classes="ausm-canvas",
                    apply_default_css=False,
                )
                frame = gr.Slider(
                    0, 1, 0, step=1, label="Frame to mark", interactive=False, elem_id="frame", buttons=[]
                )
                with gr.Row(equal_height=True):
                    objects = gr.Radio(
                        _choices(Visit(root)), value=1, label="Object to mark", elem_id="objects", scale=3
                    )
                    name = gr.Textbox(
                        label="Its name", max_length=MAX_NAME, max_lines=1, scale=1, min_width=140, elem_id="name"
                    )
                with gr.Row():
                    add = gr.Button("Another object", min_width=120)
                    undo = gr.Button("Undo", min_width=80)
                    clear = gr.Button("Clear all marks", min_width=120)
                backward = gr.Checkbox(
                    True, label="Also back to the start of the video", elem_id="backward",
                    info="Where something is first marked in a later frame: was it there before?",
                )  # fmt: skip
                follow = gr.Button("Follow through the video", variant="primary", elem_id="follow")
            with gr.Tab("Find everything"):
                gr.Markdown("Nothing to mark: objects are found, named and followed from the first frame on.")
                with gr.Row():
                    threshold = gr.Slider(
                        0.05, 0.95, config.foreground_threshold, step=0.05, label="Threshold", elem_id="threshold",
                        info="How sure the model has to be that something is an object.",
                    )  # fmt: skip
                    top_k = gr.Slider(
                        1, config.num_id_vectors, min(10, config.num_id_vectors), step=1, label="Objects at most",
                        info="The best of each frame are shown.", elem_id="top_k",
                    )  # fmt: skip
                with gr.Row():
                    label_set = gr.Dropdown(
                        [(_describe(key, labels), key) for key, labels in network.label_sets.items()],
                        value=config.default_label_set, label="Label names", elem_id="label_set",
                    )  # fmt: skip
                    show_labels = gr.Checkbox(True, label="Write the labels into the video")
                find = gr.Button("Find and follow", variant="primary", elem_id="find")
            if webcam:
                with gr.Tab("Webcam"):
                    gr.Markdown("Live: what your camera shows, found and followed. Nothing is kept.")
                    with gr.Row():
                        camera = gr.Image(
                            sources=["webcam"], type="numpy", streaming=True, label="Camera", elem_id="camera",
                            webcam_options=gr.WebcamOptions(mirror=False, constraints={"video": {"width": 640}}),
                        )  # fmt: skip
                        seen = gr.Image(label="Objects", interactive=False, elem_id="seen", buttons=[], format="jpeg")
                    camera_facts = gr.Markdown("", elem_id="camera_facts")
                    camera_threshold = gr.Slider(0.05, 0.95, config.foreground_threshold, step=0.05, label="Threshold")

        live = gr.HTML({}, html_template=LIVE, js_on_load=_file("live.js"), elem_id="live", apply_default_css=False)
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
        with gr.Column(visible=False, elem_id="results") as results:
            with gr.Row():
                with gr.Column(scale=3, min_width=300):
                    player = gr.Video(
                        label="Result", interactive=False, autoplay=True, loop=True, elem_id="player", buttons=[]
                    )
                with gr.Column(scale=3, min_width=300):
                    table = gr.HTML("", js_on_load=_file("table.js"), elem_id="table", apply_default_css=False)
                    everything = gr.Button("Show all objects", visible=False, elem_id="everything")
            strip = gr.Gallery(
                label="Key frames",
                columns=4,
                height="auto",
                interactive=False,
                elem_id="strip",
                buttons=[],
                object_fit="contain",
            )
            with gr.Row():
                downloads = [
                    gr.DownloadButton(label, elem_id=f"download-{name.split('.')[0]}", min_width=140)
                    for name, label in DOWNLOADS.items()
                ]

        def marked(visit: Visit, index: int, chosen: int) -> dict:
            """What the canvas shows of a frame."""
            return _canvas_value(visit, index, chosen, visit.picture(index, network))

        @told
        def on_upload(file: str | None, request: gr.Request):
            visit = visits.of(request.session_hash)
            visit.stop()
            visit.forget()
            yield {
                canvas: {}, facts: welcome, results: gr.Column(visible=False), live: {},
                objects: gr.Radio(_choices(visit), value=1), name: "", frame: gr.Slider(value=0, interactive=False),
            }  # fmt: skip
            if file is None:
                return
            for item in visit.take(visits.rooms.uploaded(file), limits, visits.rooms):
                if isinstance(item, Clip):
                    height, width = item.size
                    seconds = item.time(item.num_frames - 1) + 1 / (item.fps or 24)
                    yield {
                        canvas: marked(visit, 0, 1),
                        facts: f"{width} x {height} pixels, {item.num_frames} "
                        f"frame{'s' * (item.num_frames != 1)}, {seconds:.1f} seconds."
                        + ("" if item.plays else CANNOT_PLAY),
                        frame: gr.Slider(
                            maximum=max(1, item.num_frames - 1), value=0, interactive=item.num_frames > 1
                        ),
                        objects: gr.Radio(_choices(visit), value=1),
                    }
                else:  # the first frame, while the others are still being read
                    yield {canvas: _canvas_value(visit, 0, 1, item), facts: "Reading the video ..."}

        upload.change(
            on_upload, [upload], [canvas, facts, results, live, objects, name, frame],
            concurrency_id="upload", concurrency_limit=2, show_progress_on=facts, **private,
        )  # fmt: skip

        @told
        def on_mark(chosen: int, request: gr.Request, event: gr.EventData):
            visit = visits.of(request.session_hash)
            visit.the_clip()
            mark = read_mark(event._data, chosen)
            return _canvas_value(visit, mark.frame, chosen, visit.mark(mark, network))

        @told
        def on_frame(index: int, chosen: int, request: gr.Request):
            return marked(visits.of(request.session_hash), int(index), chosen)

        @told
        def on_object(index: int, chosen: int, request: gr.Request):
            visit = visits.of(request.session_hash)
            return visit.names.get(chosen, ""), marked(visit, int(index), chosen) if visit.clip else gr.skip()

        @told
        def on_name(chosen: int, text: str, request: gr.Request):
            visit = visits.of(request.session_hash)
            visit.name(chosen, text)
            return gr.Radio(_choices(visit))

        @told
        def on_add(index: int, request: gr.Request):
            visit = visits.of(request.session_hash)
            visit.the_clip()
            number = visit.add_object()
            return gr.Radio(_choices(visit), value=number), "", marked(visit, int(index), number)

        @told
        def on_undo(index: int, chosen: int, request: gr.Request):
            visit = visits.of(request.session_hash)
            visit.the_clip()
            index = visit.marks.pop().frame if visit.marks else int(index)
            return marked(visit, index, chosen), index

        @told
        def on_clear(index: int, request: gr.Request):
            visit = visits.of(request.session_hash)
            visit.the_clip()
            visit.clear()
            return marked(visit, int(index), 1), gr.Radio(_choices(visit), value=1), ""

        # Marks are taken one after the other, in the order in which they were made.
        quick: dict[str, Any] = {
            "show_progress": "hidden",
            "concurrency_id": "mark",
            "concurrency_limit": 4,
            **private,
        }
        canvas.mark(on_mark, [objects], [canvas], trigger_mode="multiple", **quick)
        frame.input(on_frame, [frame, objects], [canvas], trigger_mode="always_last", **quick)
        objects.input(on_object, [frame, objects], [name, canvas], **quick)
        # Gradio tells of what is typed; of what is pasted only when the field is left.
        for told_of_name in (name.input, name.blur, name.submit):
            told_of_name(on_name, [objects, name], [objects], trigger_mode="always_last", **quick)
        add.click(on_add, [frame], [objects, name, canvas], **quick)
        undo.click(on_undo, [frame, objects], [canvas, frame], **quick)
        clear.click(on_clear, [frame], [canvas, objects, name], **quick)

        shown = [live, stop, results, player, table, everything, strip, *downloads]

        def run(visit: Visit, work):
            """Shows a run while it goes on, and what came of it."""
            number = visit.num_folders + 1
            news = {
                "run": number,
                "done": 0,
                "total": visit.the_clip().num_frames,
                "state": "running",
                "text": "Starting ...",
            }
            yield {live: news, stop: gr.Button(visible=True), results: gr.Column(visible=False)}
            first = 0
            try:
                for item in work:
                    news = _news(number, first, item)
                    first += len(item.pictures)
                    yield {live: news}
            except Stopped:
                left = "Nothing was kept." if visit.result is None else "Below is what the run before gave."
                text = f"Stopped after {news['done']} of {news['total']} frames. {left}"
                yield {live: {**news, "pictures": [], "state": "done", "text": text}, **as_before(visit)}
                return
            except Exception:
                yield {live: {}, **as_before(visit)}
                raise
            result = visit.the_result()
            text = f"Done: {news['total']} frames in {result.seconds:.1f} seconds, {_count(len(result.objects))}."
            yield {
                live: {**news, "pictures": [], "state": "done", "text": text},
                stop: gr.Button(visible=False),
                results: gr.Column(visible=True),
                table: objects_table(result),
                everything: gr.Button(visible=False),
                **look(visit, result.folder / "overlay.mp4", result.key_frames()),
                **{button: str(result.folder / name) for button, name in zip(downloads, DOWNLOADS)},
            }

        def as_before(visit: Visit) -> dict:
            return {stop: gr.Button(visible=False), results: gr.Column(visible=visit.result is not None)}

        def look(visit: Visit, video: Path, key_frames: list[Path]) -> dict:
            captions = [f"{visit.the_clip().time(int(path.stem)):.1f} s" for path in key_frames]
            return {player: str(video), strip: list(zip(map(str, key_frames), captions))}

        @told
        def on_follow(backward: bool, request: gr.Request):
            visit = visits.of(request.session_hash)
            yield from run(visit, visit.follow(network, backward))

        @told
        def on_find(threshold: float, top_k: int, label_set: str, show_labels: bool, request: gr.Request):
            visit = visits.of(request.session_hash)
            yield from run(visit, visit.find(network, threshold, top_k, label_set, show_labels))

        one_at_a_time: dict[str, Any] = {
            "concurrency_id": "model",
            "concurrency_limit": 1,
            "show_progress_on": [live],
            **private,
        }
        followed = follow.click(on_follow, [backward], shown, **one_at_a_time)
        found = find.click(on_find, [threshold, top_k, label_set, show_labels], shown, **one_at_a_time)

        @told
        def on_done(index: int, chosen: int, request: gr.Request):
            """What is followed in the frame to mark is another now."""
            visit = visits.of(request.session_hash)
            return marked(visit, int(index), chosen) if visit.clip else gr.skip()

        for done in (followed, found):
            done.success(on_done, [frame, objects], [canvas], **quick)

        @told
        def on_stop(request: gr.Request):
            visits.of(request.session_hash).stop()

        stop.click(on_stop, None, None, queue=False, **private)

        @told
        def on_choose(request: gr.Request, event: gr.EventData):
            visit = visits.of(request.session_hash)
            chosen = event._data.get("id")
            if chosen not in [item["id"] for item in visit.the_result().objects]:
                raise Refused("There is no such object in the results.")
            video, key_frames = show_alone(visit.the_clip(), visit.the_result(), chosen)
            return {**look(visit, video, key_frames), everything: gr.Button(visible=True)}

        @told
        def on_everything(request: gr.Request):
            visit = visits.of(request.session_hash)
            result = visit.the_result()
            video, key_frames = result.folder / "overlay.mp4", result.key_frames()
            return {**look(visit, video, key_frames), everything: gr.Button(visible=False)}

        table.choose(on_choose, None, [player, strip, everything], show_progress_on=[player], **private)
        everything.click(on_everything, None, [player, strip, everything], **private)

        if webcam:

            @told
            def on_camera(picture, threshold: float, request: gr.Request):
                return see(visits.of(request.session_hash), network, picture, threshold, limits)

            camera.stream(
                on_camera, [camera, camera_threshold], [seen, camera_facts], stream_every=0.1, time_limit=300,
                concurrency_id="camera", concurrency_limit=2, show_progress="hidden", **private,
            )  # fmt: skip

        add_api(network, visits.rooms, limits, told)

        def on_unload(request: gr.Request):
            visits.end(request.session_hash)

        page.unload(on_unload)
    return page


DOWNLOADS = {
    "overlay.mp4": "Video (MP4)",
    "masks.zip": "Masks (PNG, ZIP)",
    "coco.json": "COCO (JSON)",
    "youtube_vis.json": "YouTube-VIS (JSON)",
}


def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def style() -> str:
    """The style sheet, with the colours of the objects beside their names."""
    dots = [
        f"#objects label:nth-of-type({number}) {{ border-left: 6px solid rgb{color_of(number)}; }}"
        for number in range(1, MAX_OBJECTS + 1)
    ]
    return _file("style.css") + "\n".join(dots)


def _choices(visit: Visit) -> list[tuple[str, int]]:
    return [(_called(visit, n), n) for n in range(1, visit.num_objects + 1)]


def _called(visit: Visit, object_id: int) -> str:
    """As in "3 dog"."""
    return f"{object_id} {visit.names.get(object_id, '')}".strip()


def _describe(key: str, labels: list[str]) -> str:
    return f"{key}: {', '.join(labels[:4])}{f' and {len(labels) - 4} more' if len(labels) > 4 else ''}"


def _canvas_value(visit: Visit, index: int, chosen: int, picture: np.ndarray) -> dict:
    of_frame = marks_that_count([mark for mark in visit.marks if mark.frame == index])
    marks = [
        {"kind": mark.kind, "points": mark.points, "add": mark.add, "color": f"rgb{color_of(mark.object_id)}"}
        for mark in of_frame
        if mark.kind in ("point", "box")
    ]
    last = {mark.object_id: mark.kind for mark in of_frame}
    away = [_called(visit, object_id) for object_id in sorted(last) if last[object_id] == "away"]
    width, height = visit.clip.shown_size if visit.clip else (picture.shape[1], picture.shape[0])
    return {
        "image": data_url(picture, quality=90),
        "width": picture.shape[1],
        "height": picture.shape[0],
        "aspect": width / height,
        "frame": index,
        "number": len(visit.marks),
        "marks": marks,
        "note": f"Not in this frame: {', '.join(away)}" if away else "",
        "color": f"rgb{color_of(chosen)}",
    }


def _news(run: int, first: int, news: News) -> dict:
    left = "writing the files ..."
    if news.done < news.total or news.to_come:
        left = f"{news.seconds_left:.0f} seconds left"
    frame = "Back to the start: frame" if news.to_come else "Frame"
    return {
        "run": run, "state": "running", "first": first, "pictures": news.pictures,
        "done": news.done, "total": news.total,
        "text": f"{frame} {news.done} of {news.total}, {news.fps:.1f} frames per second, {left}",
    }  # fmt: skip


def _count(number: int) -> str:
    return {0: "no object", 1: "1 object"}.get(number, f"{number} objects")


def objects_table(result: Result) -> str:
    """A row for each object: number, label, score, in how many frames it is seen, and its area over time."""
    rows = []
    for item in result.objects:
        color = f"rgb{color_of(item['id'])}"
        areas = item["areas"]
        top = max(areas)
        step = 100 / max(1, len(areas) - 1)
        line = " ".join(f"{i * step:.1f},{24 - 22 * area / top:.1f}" for i, area in enumerate(areas))
        rows.append(
            f'<tr><td><button type="button" data-id="{item["id"]}" title="Show it alone">'
            f'<span class="swatch" style="background: {color}"></span>{item["id"]}</button></td>'
            f"<td>{html.escape(item['label'] or '')}</td><td>{item['score']:.2f}</td>"
            f"<td>{item['frames']} of {len(areas)}</td>"
            f'<td><svg viewBox="0 0 100 26" preserveAspectRatio="none" role="img" '
            f'aria-label="at most {100 * top:.0f} percent of the picture"><polyline points="{line}" fill="none" '
            f'stroke="{color}" stroke-width="2" vector-effect="non-scaling-stroke"/></svg></td></tr>'
        )
    if not rows:
        return "<p>No object was found. A lower threshold finds more; so does marking one.</p>"
    return (
        '<div class="ausm-table"><table><thead><tr><th>Object</th><th>Label</th><th>Score</th><th>Seen in</th>'
        f"<th>Area over time</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
