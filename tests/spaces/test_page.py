"""What the page's buttons answer, without a browser."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

VISITOR = SimpleNamespace(session_hash="somebody")


@pytest.fixture
def page(serve, clip_file, monkeypatch):
    """A function that calls one of the page's functions and gives its last answer, by the ids of the components."""
    monkeypatch.setattr("ausm_hf.demo.network.SECONDS_BETWEEN_NEWS", 0)
    blocks = serve()
    functions = {function.name: function.fn for function in blocks.fns.values()}
    upload = Path(os.environ["GRADIO_TEMP_DIR"]) / "upload"
    upload.mkdir()
    shutil.copy(clip_file, upload / "square.mp4")

    def answers(name, *arguments, **more):
        for answer in functions[name](*arguments, request=VISITOR, **more):
            yield {component.elem_id: value for component, value in answer.items() if component.elem_id}

    *_, taken = answers("on_upload", str(upload / "square.mp4"))
    assert "6 frames" in taken["facts"]
    return SimpleNamespace(answers=answers, functions=functions)


def visible(answer, name):
    return answer[name].visible if hasattr(answer[name], "visible") else answer[name]["visible"]


def test_who_uploads_during_a_run_is_told_nothing_else(page):
    """Gradio takes a run that was stopped for one that went well, and shows what it followed: of no video nothing."""
    run = page.answers("on_find", 0.01, 10, "pets", True)
    next(run)
    next(run)
    removed = page.answers("on_upload", None)
    next(removed)
    assert list(removed) == []
    *_, stopped = run
    assert stopped["live"]["text"].startswith("Stopped") and not visible(stopped, "results")
    assert "image" not in str(page.functions["on_done"](0, 1, request=VISITOR))


def test_results_stay_where_a_later_run_is_stopped_or_refused(page):
    find = ("on_find", 0.01, 10, "pets", True)
    first = page.answers(*find)
    next(first)  # it is starting
    next(first)  # and has news
    page.functions["on_stop"](request=VISITOR)
    *_, stopped = first
    assert stopped["live"]["text"].endswith("Nothing was kept.") and not visible(stopped, "results")

    *_, done = page.answers(*find)
    assert done["live"]["text"].startswith("Done: 6 frames") and visible(done, "results")
    again = page.answers(*find)
    assert not visible(next(again), "results")
    next(again)
    page.functions["on_stop"](request=VISITOR)
    *_, stopped = again
    assert stopped["live"]["text"].endswith("Below is what the run before gave.") and visible(stopped, "results")

    with pytest.raises(Exception, match="Mark something first"):
        for answer in page.answers("on_follow", True):
            last = answer
    assert visible(last, "results")
