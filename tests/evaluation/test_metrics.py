"""The `evaluate` modules: loaded offline, fed frame by frame, and as a Space without this package."""

import doctest
import os
import sys
import weakref

import numpy as np
import pytest
import torch

evaluate = pytest.importorskip("evaluate")

from ausm_hf.evaluation.metrics import METRICS, load_metric, metric_path, push_metric_to_hub, write_space  # noqa: E402
from ausm_hf.evaluation.metrics.jf import score_sequence, summarize  # noqa: E402


def picture(*rows: str) -> np.ndarray:
    return np.array([[0 if c == "." else int(c) for c in row] for row in rows], dtype=np.uint8)


EMPTY = picture("....", "....", "....", "....")
SQUARE = picture("....", ".11.", ".11.", "....")
RIGHT = picture("....", "..11", "..11", "....")
TWO = picture("2...", ".11.", ".11.", "....")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.mark.parametrize("name", METRICS)
def test_documented_example_works_as_printed(name):
    run_example(load_metric(name))


def run_example(metric):
    test = doctest.DocTestParser().get_doctest(metric.inputs_description, {"metric": metric}, metric.name, None, 0)
    assert test.examples
    assert doctest.DocTestRunner(verbose=False).run(test).failed == 0


def test_vos_jf_streams():
    metric = evaluate.load(metric_path("vos_jf"))
    gt = {"a": [TWO] * 5, "b": [SQUARE] * 4}
    pred = {"a": [EMPTY, TWO, RIGHT, SQUARE, EMPTY], "b": [SQUARE, RIGHT, SQUARE, SQUARE]}
    metric.add_batch(predictions=pred["a"][:2], references=gt["a"][:2], sequence=["a", "a"])
    for mask, true in zip(pred["b"], gt["b"]):  # sequences may come mixed
        metric.add(prediction=mask, reference=true, sequence="b")
    assert len(metric) == 6
    result = metric.compute(predictions=pred["a"][2:], references=gt["a"][2:], sequence=["a"] * 3)
    assert result == summarize({name: score_sequence(pred[name], gt[name]) for name in gt})
    assert result["sequences"]["b"]["J"] == pytest.approx((2 / 6 + 1) / 2)
    with pytest.raises(ValueError, match="Nothing to compute"):
        metric.compute()  # it starts afresh

    metric.add_batch(predictions=pred["b"], references=gt["b"], sequence=["b"] * 4)
    everything = metric.compute(skip_first=False, skip_last=False)
    assert everything["J"] == pytest.approx((1 + 2 / 6 + 1 + 1) / 4)


def test_vos_jf_keeps_no_mask():
    metric = load_metric("vos_jf")
    frames = []
    for t in range(5):
        mask = np.ones((64, 64), np.uint8)
        mask[t:, t:] = 0
        metric.add(prediction=mask, reference=mask, sequence="a")
        frames.append(weakref.ref(mask))
    del mask
    assert [frame() for frame in frames] == [None] * 5
    assert metric.compute()["J"] == 1


def test_vos_jf_best_track_has_its_own_conventions():
    metric = load_metric("vos_jf", "best-track")
    metric.add_batch(predictions=[SQUARE * 9, SQUARE * 9, EMPTY], references=[SQUARE] * 3, sequence=["a"] * 3)
    result = metric.compute()
    assert result["J"] == pytest.approx(2 / 3)  # no frame left out
    assert result["sequences"]["a"]["objects"][1]["predicted_id"] == 9
    with pytest.raises(ValueError, match="`config_name` is 'best'"):
        load_metric("vos_jf", "best")


def test_davis16_unsupervised():
    metric = load_metric("davis16_unsupervised")
    pred = [EMPTY, SQUARE * 3, picture("....", ".1..", ".2..", "...."), EMPTY]
    metric.add_batch(predictions=pred, references=[SQUARE * 255] * 4, sequence=["a"] * 4)
    assert metric.compute()["J"] == pytest.approx((1 + 2 / 4) / 2)
    metric.add_batch(predictions=pred, references=[SQUARE * 255] * 4, sequence=["a"] * 4)
    assert metric.compute(skip_first=False, skip_last=False)["J"] == pytest.approx((0 + 1 + 2 / 4 + 0) / 4)


def test_youtube_vos_g():
    metric = load_metric("youtube_vos_g")
    late = [SQUARE, SQUARE, TWO, TWO]  # object 2 comes in frame 2
    pred = [SQUARE, RIGHT, SQUARE, TWO]
    metric.add_batch(predictions=pred, references=late, sequence=["a"] * 4)
    result = metric.compute(seen={"a": {1: True, 2: False}})
    assert result["J_seen"] == pytest.approx((1 + 2 / 6 + 1 + 1) / 4)
    assert result["J_unseen"] == pytest.approx((0 + 1) / 2)
    parts = [result[part] for part in ("J_seen", "F_seen", "J_unseen", "F_unseen")]
    assert result["G"] == pytest.approx(sum(parts) / 4)

    metric.add_batch(predictions=pred, references=late, sequence=["a"] * 4)
    result = metric.compute(seen={"a": {1: True, 2: True}})
    assert result["J_unseen"] is None and result["F_unseen"] is None
    assert result["G"] == pytest.approx((result["J_seen"] + result["F_seen"]) / 2)

    metric.add_batch(predictions=pred, references=late, sequence=["a"] * 4)
    with pytest.raises(ValueError, match="object 2 is of a seen category"):
        metric.compute(seen={"a": {1: True}})


def test_vis_ap():
    metric = load_metric("vis_ap")

    def one(mask, **more):
        return [{"id": 1, "category_id": 1, "mask": mask, **more}]

    pred = [one(mask, score=0.9) for mask in (SQUARE, SQUARE, RIGHT)]
    metric.add_batch(predictions=pred, references=[one(SQUARE)] * 3, video=["a"] * 3)
    assert metric.compute(categories=[1])["AP"] == pytest.approx(0.5)  # IoU 10 / 14


def test_bad_input():
    metric = load_metric("vos_jf")
    with pytest.raises(ValueError, match="they must be predictions, references, sequence"):
        metric.add_batch(predictions=[SQUARE], references=[SQUARE])
    with pytest.raises(ValueError, match="2 predictions, 1 references"):
        metric.add_batch(predictions=[SQUARE] * 2, references=[SQUARE], sequence=["a"])
    metric.add_batch(predictions=[SQUARE * 4] * 3, references=[SQUARE] * 3, sequence=["a"] * 3)
    metric.add_batch(predictions=[SQUARE[1:]] * 3, references=[SQUARE] * 3, sequence=["b"] * 3)
    with pytest.raises(ValueError) as error:
        metric.compute()
    assert "a: predicted id 4" in str(error.value) and "b, frame 2: the prediction is 3 x 4" in str(error.value)
    assert len(metric) == 0
    metric.add_batch(predictions=[SQUARE.tolist()] * 3, references=[torch.tensor(SQUARE)] * 3, sequence=["a"] * 3)
    with pytest.raises(TypeError, match="skip_frist"):
        metric.compute(skip_frist=True)
    assert metric.compute()["J"] == 1  # the frames are still there
    with pytest.raises(ValueError, match="`num_process` is 2"):
        evaluate.load(metric_path("vos_jf"), num_process=2, process_id=0)
    with pytest.raises(ValueError, match="`name` is 'jf'"):
        metric_path("jf")


@pytest.mark.parametrize("name", METRICS)
def test_space_works_without_this_package(name, tmp_path, monkeypatch):
    folder = write_space(name, tmp_path / name)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and "sdk: static" in card
    with pytest.raises(ValueError, match="not empty"):
        write_space(name, folder)

    for module in list(sys.modules):
        if module == "ausm_hf" or module.startswith(("ausm_hf.", "evaluate_modules")):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "ausm_hf", None)  # importing it fails
    monkeypatch.setattr("evaluate.loading.init_dynamic_modules", fresh_modules(tmp_path, monkeypatch))
    metric = evaluate.load(str(folder))
    assert str(tmp_path) in sys.modules[type(metric).__module__].__file__
    run_example(metric)


def fresh_modules(folder, monkeypatch):
    """A cache of its own for copied modules, under a name that is not imported yet."""
    from evaluate.loading import init_dynamic_modules

    name = f"evaluate_modules_{folder.name.replace('-', '_')}"
    monkeypatch.syspath_prepend(str(folder / "cache"))
    return lambda *args: init_dynamic_modules(name, folder / "cache")


def test_push(monkeypatch):
    calls = []

    class Api:
        def __init__(self, **kwargs):
            calls.append(("init", kwargs))

        def create_repo(self, repo_id, **kwargs):
            calls.append(("create", repo_id, kwargs))

        def upload_folder(self, *, repo_id, folder_path, repo_type):
            calls.append(("upload", repo_id, sorted(os.listdir(folder_path)), repo_type))

            class Commit:
                commit_url = "https://hub/commit"

            return Commit()

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert push_metric_to_hub("vis_ap", "someone/vis_ap", token="t") == "https://hub/commit"
    files = ["README.md", "index.html", "requirements.txt", "streaming.py", "video_ap.py", "vis_ap.py"]
    assert calls == [
        ("init", {"token": "t"}),
        ("create", "someone/vis_ap", {"repo_type": "space", "space_sdk": "static", "exist_ok": True}),
        ("upload", "someone/vis_ap", files, "space"),
    ]
    with pytest.raises(ValueError, match="'user/vis_ap'"):
        push_metric_to_hub("vis_ap", "someone/my-metric")
