"""`ausm evaluate` over miniatures of the data sets in their official layouts, with a tiny random network."""

import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from vos_benchmark.benchmark import benchmark as vos_benchmark

from ausm_hf import AusmForUniversalSegmentation, AusmImageProcessor, AusmProcessor
from ausm_hf.cli import main
from ausm_hf.data.labels import LABEL_SETS
from ausm_hf.evaluation import benchmarks, run, runner
from ausm_hf.evaluation.benchmarks import load_benchmark
from ausm_hf.evaluation.metrics.jf import SequenceScorer, summarize
from ausm_hf.evaluation.report import format_results, j_over_time
from ausm_hf.evaluation.run import evaluate
from ausm_hf.evaluation.runner import Inference, first_prompts
from ausm_hf.evaluation.score import read_mask
from ausm_hf.files import visible
from ausm_hf.segment import segment_video

HEIGHT, WIDTH = 48, 64


def draw(t: int, ids: tuple[int, ...] = (1,)) -> np.ndarray:
    """Squares side by side, one per id, that move right by a pixel a frame."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for n, object_id in enumerate(ids):
        mask[14:30, 6 + 22 * n + t : 20 + 22 * n + t] = object_id
    return mask


def write_png(path: Path, mask: np.ndarray):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def write_frame(path: Path, mask: np.ndarray):
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = np.random.default_rng(0).integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    frame[mask > 0] += 180
    Image.fromarray(frame).save(path, quality=95)


def write_davis(root: Path, year: int, lengths: dict[str, int], ids: tuple[int, ...] = (1,), split: str = "val"):
    """DAVIS: 2016 stores 255 for its object."""
    (root / "ImageSets" / str(year)).mkdir(parents=True)
    (root / "ImageSets" / str(year) / f"{split}.txt").write_text("\n".join(lengths))
    for name, length in lengths.items():
        for t in range(length):
            write_frame(root / "JPEGImages" / "480p" / name / f"{t:05d}.jpg", draw(t, ids))
            mask = (draw(t) * 255) if year == 2016 else draw(t, ids)
            if split == "val" or t == 0:
                write_png(root / "Annotations" / "480p" / name / f"{t:05d}.png", mask)
    return root


def write_youtube_vos(root: Path, split: str, full: bool):
    """Two objects, the second from frame 10 on. `full`: a mask for every frame, else where an object is new."""
    names = ["00000", "00005", "00010", "00015", "00020"]
    for t, name in enumerate(names):
        mask = draw(t, (1, 2) if t >= 2 else (1,))
        write_frame(root / split / "JPEGImages" / "abc" / f"{name}.jpg", mask)
        if full or t in (0, 2):
            write_png(root / split / "Annotations" / "abc" / f"{name}.png", mask)
    objects = {"1": {"category": "penguin"}, "2": {"category": "yeti"}}
    (root / split / "meta.json").write_text(json.dumps({"videos": {"abc": {"objects": objects}}}))
    return root


@pytest.fixture(scope="module")
def save_tiny(tiny_config, tmp_path_factory):
    """Saves a tiny network with the classes of a label set and says where."""

    def save(label_set: str | None = None) -> Path:
        config = type(tiny_config).from_dict(tiny_config.to_dict())
        if label_set is not None:
            config.label_sets, config.default_label_set = {label_set: LABEL_SETS[label_set]}, label_set
        config.duplicate_overlap = 1.0  # random masks overlap; let there be several all the same
        torch.manual_seed(3)
        folder = tmp_path_factory.mktemp("checkpoint")
        AusmForUniversalSegmentation(config).save_pretrained(folder)
        AusmProcessor(AusmImageProcessor(size={"shortest_edge": 64})).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def tiny(save_tiny):
    return save_tiny()


@pytest.fixture(scope="module")
def davis2017(tmp_path_factory):
    root = tmp_path_factory.mktemp("davis2017")
    write_davis(root, 2017, {"bear": 5, "swan": 6, "train": 4}, (1, 2))
    shutil.copytree(root / "Annotations", root / "Annotations_unsupervised")
    return root


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def official_jf(truth: Path, predicted: Path, skip: bool = True) -> tuple[float, float, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        jf, j, f, _ = vos_benchmark(
            [str(truth)], [str(predicted)], skip_first_and_last=skip, num_processes=1, verbose=False
        )
    return jf[0], j[0], f[0]


def test_davis2017_prompted(davis2017, tiny, tmp_path):
    out = tmp_path / "out"
    results = evaluate("davis2017", davis2017, model=tiny, output=out)
    assert sorted(p.name for p in visible(out)) == [
        "contact_sheet.png", "j_over_time.png", "masks", "results.json", "settings.json",
    ]  # fmt: skip
    assert json.loads((out / "results.json").read_text())["scores"]["J&F"]["J"] == results["scores"]["J&F"]["J"]
    # the prompt comes back as it was given, and the numbers are those of the official tool on these files
    for name, length in {"bear": 5, "swan": 6, "train": 4}.items():
        assert sorted(p.name for p in (out / "masks" / name).iterdir()) == [f"{t:05d}.png" for t in range(length)]
        assert (read_mask(out / "masks" / name / "00000.png") == draw(0, (1, 2))).all()
    scores = results["scores"]["J&F"]
    jf, j, f = official_jf(davis2017 / "Annotations" / "480p", out / "masks")
    assert 100 * scores["J&F"] == pytest.approx(jf, abs=1e-6)
    assert (100 * scores["J"], 100 * scores["F"]) == pytest.approx((j, f), abs=1e-6)
    assert list(scores["sequences"]) == ["bear", "swan", "train"]
    assert scores["j_over_time"][0] is None and len(scores["j_over_time"]) == 5  # neither first nor last frame
    assert results["settings"]["mode"] == "prompted" and results["settings"]["passes"] == 1
    lines = format_results(results).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["sequence", "bear", "swan", "train", "mean"]


def test_unprompted_davis2016_reports_best_track_and_union(tiny, tmp_path):
    write_davis(tmp_path / "data", 2016, {"bear": 5})
    results = evaluate(
        "davis2016", tmp_path / "data", mode="unprompted", model=tiny, output=tmp_path / "out", threshold=0.0
    )
    truth = [draw(t) for t in range(5)]
    found = [read_mask(p) for p in sorted((tmp_path / "out" / "masks" / "bear").iterdir())]
    ids = {i for mask in found for i in np.unique(mask).tolist()} - {0}
    assert len(ids) > 1

    def mean_j(masks):
        return np.mean([(m & (g > 0)).sum() / (m | (g > 0)).sum() for m, g in list(zip(masks, truth))[1:-1]])

    scores = results["scores"]
    assert scores["union"]["J"] == pytest.approx(mean_j([mask > 0 for mask in found]))
    assert scores["best track"]["J"] == pytest.approx(max(mean_j([mask == i for mask in found]) for i in ids))


def test_unprompted_davis2017_keeps_as_many_tracks_as_the_official_tool_takes(davis2017, tiny, tmp_path, monkeypatch):
    def run(name, max_tracks):
        protocol = replace(benchmarks.PROTOCOLS["davis2017"], max_tracks=max_tracks)
        monkeypatch.setitem(benchmarks.PROTOCOLS, "davis2017", protocol)
        evaluate("davis2017", davis2017, mode="unprompted", model=tiny, output=tmp_path / name, threshold=0.0)
        return [read_mask(p) for p in sorted((tmp_path / name / "masks" / "swan").iterdir())]

    every, few = run("every", 20), run("few", 2)
    pixels = {i: sum((mask == i).sum() for mask in every) for i in range(1, 21)}
    assert sum(count > 0 for count in pixels.values()) > 2
    assert {i for mask in few for i in np.unique(mask).tolist()} == {0, 1, 2}


def test_davis2017_unsupervised_has_masks_of_its_own(davis2017, tmp_path):
    shutil.copytree(davis2017, tmp_path, dirs_exist_ok=True)
    for mode, folder in (("prompted", "Annotations"), ("unprompted", "Annotations_unsupervised")):
        row = load_benchmark("davis2017", tmp_path, mode=mode).rows[0]
        assert row["annotations"][0]["path"] == str(tmp_path / folder / "480p" / "bear" / "00000.png")
    shutil.rmtree(tmp_path / "Annotations_unsupervised")
    with pytest.raises(ValueError, match="masks of DAVIS 2017, unprompted: .*Annotations_unsupervised doesn't"):
        load_benchmark("davis2017", tmp_path, mode="unprompted")
    (tmp_path / "ImageSets" / "2017" / "val.txt").rename(tmp_path / "ImageSets" / "2017" / "test-dev.txt")
    (row, *_) = load_benchmark("davis2017", tmp_path, "test-dev", "unprompted").rows
    assert not any(row["annotated"])  # there is nothing to score by


def test_best_tracks_are_kept_and_numbered_anew(tmp_path):
    with runner.MaskFolder(tmp_path / "bear") as folder:
        folder.write("00000", np.array([[1, 5, 7, 0, 300]]))
        folder.write("00001", np.array([[0, 7, 7, 5, 0]]))
        folder.keep_best({1: 0.5, 5: 2.0, 7: 1.0, 300: 0.1}, 2)
        assert not (tmp_path / "bear").exists()
    assert read_mask(tmp_path / "bear" / "00000.png").tolist() == [[0, 1, 2, 0, 0]]
    assert read_mask(tmp_path / "bear" / "00001.png").tolist() == [[0, 2, 2, 1, 0]]


def test_resume_trusts_only_finished_sequences(davis2017, tiny, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    evaluate("davis2017", davis2017, model=tiny, output=whole)
    with monkeypatch.context() as patch:
        seen = []

        def stop_in_the_second(frame, row, t):
            seen.append((row["video_id"], t))
            if len({name for name, _ in seen}) == 2 and len(seen) > 8:
                raise KeyboardInterrupt

        name = runner.frame_name
        patch.setattr(runner, "frame_name", lambda row, t: stop_in_the_second(None, row, t) or name(row, t))
        with pytest.raises(KeyboardInterrupt):
            evaluate("davis2017", davis2017, model=tiny, output=out)
    assert [p.name for p in (out / "masks").iterdir()] == ["swan"]  # the longest is first
    # what a process that was killed leaves behind isn't taken for a result
    write_png(out / "masks" / ".bear.partial-0123abcd" / "00000.png", draw(0))
    marker = (out / "masks" / "swan" / "00003.png").stat().st_mtime_ns

    with pytest.raises(ValueError, match="holds an earlier run; wanted is --resume"):
        evaluate("davis2017", davis2017, model=tiny, output=out)
    with pytest.raises(ValueError, match="other settings: passes 1 -> 2"):
        evaluate("davis2017", davis2017, model=tiny, output=out, resume=True, passes=2)
    evaluate("davis2017", davis2017, model=tiny, output=out, resume=True)
    assert (out / "masks" / "swan" / "00003.png").stat().st_mtime_ns == marker
    assert files(out) == files(whole)
    # done already: nothing is computed again, and the results are the same
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_masks", None)
        evaluate("davis2017", davis2017, model=tiny, output=out, resume=True)
    assert files(out) == files(whole)


def test_resume_with_other_weights_is_refused(davis2017, tiny, save_tiny, tmp_path):
    evaluate("davis2017", davis2017, model=tiny, output=tmp_path / "out")
    model = AusmForUniversalSegmentation.from_pretrained(tiny)
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    shutil.copytree(tiny, tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other settings: weights"):
        evaluate("davis2017", davis2017, model=tmp_path / "other", output=tmp_path / "out", resume=True)


def run_process(rank: int, port: int, arguments: dict):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    assert (evaluate(**arguments) is None) == (rank == 1)


def test_several_processes_have_the_result_of_one(davis2017, tiny, tmp_path):
    arguments = {"benchmark": "davis2017", "root": davis2017, "model": tiny, "device": "cpu"}
    evaluate(**arguments, output=tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    arguments["output"] = tmp_path / "two"
    processes = [context.Process(target=run_process, args=(rank, port, arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_videos_are_shared_evenly():
    rows = [{"video_id": name, "frames": [None] * n} for name, n in {"a": 3, "b": 9, "c": 4, "d": 5}.items()]
    shares = [[row["video_id"] for row in share] for share in run._deal(rows, 2)]
    assert shares == [["b", "a"], ["d", "c"]]  # 12 frames and 9


@pytest.mark.slow
def test_torchrun_prints_one_table(davis2017, tiny, tmp_path):
    arguments = ["evaluate", "--benchmark", "davis2017", "--root", davis2017, "--model", tiny, "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "ausm_hf.cli"]
        + [str(x) for x in [*arguments, "--output", tmp_path / "out"]],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()][-4:] == ["bear", "swan", "train", "mean"]
    assert done.stdout.count("mean") == 1


def test_youtube_vos_prompts_come_late_and_the_server_scores(tiny, tmp_path):
    write_youtube_vos(tmp_path / "data", "valid", full=False)
    found = load_benchmark("youtube_vos_2019", tmp_path / "data")
    prompts = first_prompts(found.rows[0])
    assert {t: list(masks) for t, masks in prompts.items()} == {0: [1], 2: [2]}
    assert (prompts[2][2] == (draw(2, (1, 2)) == 2)).all()

    results = evaluate("youtube_vos_2019", tmp_path / "data", model=tiny, output=tmp_path / "out")
    assert results["scores"] == {} and "submission.zip" in format_results(results)
    masks = tmp_path / "out" / "masks" / "abc"
    assert all(2 not in read_mask(masks / f"{name}.png") for name in ("00000", "00005"))
    assert ((read_mask(masks / "00010.png") == 2) == (draw(2, (1, 2)) == 2)).all()
    with zipfile.ZipFile(tmp_path / "out" / "submission.zip") as archive:
        names = ["00000", "00005", "00010", "00015", "00020"]
        assert archive.namelist() == [f"Annotations/abc/{name}.png" for name in names]
        assert archive.read("Annotations/abc/00010.png") == (masks / "00010.png").read_bytes()


def test_youtube_vos_with_ground_truth_has_g(tiny, tmp_path):
    write_youtube_vos(tmp_path / "data", "valid", full=True)
    (tmp_path / "data" / "train").mkdir()
    meta = {"videos": {"other": {"objects": {"1": {"category": "penguin"}}}}}
    (tmp_path / "data" / "train" / "meta.json").write_text(json.dumps(meta))
    results = evaluate("youtube_vos_2018", tmp_path / "data", model=tiny, output=tmp_path / "out")
    assert not (tmp_path / "out" / "submission.zip").exists()
    rows = results["scores"]["J&F"]["sequences"]["abc"]["objects"]
    assert (rows[1]["frames"], rows[2]["frames"]) == (5, 3)  # from the first annotated frame on, that one included
    g = results["scores"]["G"]
    assert (g["J_seen"], g["F_unseen"]) == (rows[1]["J"], rows[2]["F"])
    assert g["G"] == pytest.approx((rows[1]["J"] + rows[1]["F"] + rows[2]["J"] + rows[2]["F"]) / 4)
    assert "J_unseen" in format_results(results)


def test_mose(tiny, tmp_path):
    for t in range(4):
        for split in ("train", "valid"):
            write_frame(tmp_path / "data" / split / "JPEGImages" / "0a1b" / f"{t:05d}.jpg", draw(t, (1, 3)))
            if split == "train" or t == 0:
                write_png(tmp_path / "data" / split / "Annotations" / "0a1b" / f"{t:05d}.png", draw(t, (1, 3)))
    results = evaluate("mose", tmp_path / "data", model=tiny, output=tmp_path / "val")
    assert results["scores"] == {}
    with zipfile.ZipFile(tmp_path / "val" / "submission.zip") as archive:
        assert archive.namelist() == [f"0a1b/{t:05d}.png" for t in range(4)]
    results = evaluate("mose", tmp_path / "data", "train", model=tiny, output=tmp_path / "train")
    jf, *_ = official_jf(tmp_path / "data" / "train" / "Annotations", tmp_path / "train" / "masks")
    assert 100 * results["scores"]["J&F"]["J&F"] == pytest.approx(jf, abs=1e-6)


def test_davis2017_test_dev_has_a_submission(tiny, tmp_path):
    write_davis(tmp_path / "data", 2017, {"bear": 3}, (1, 2), split="test-dev")
    evaluate("davis2017", tmp_path / "data", "test-dev", model=tiny, output=tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "out" / "submission.zip") as archive:
        assert archive.namelist() == [f"bear/{t:05d}.png" for t in range(3)]


def test_davis2019_unsupervised_has_a_submission_without_any_mask(tiny, tmp_path):
    """Its list is of other videos than that of 2017."""
    write_davis(tmp_path / "data", 2017, {"bear": 3}, (1, 2), split="test-dev")
    write_davis(tmp_path / "data", 2019, {"swan": 3}, (1, 2), split="test-dev")
    shutil.rmtree(tmp_path / "data" / "Annotations")
    options = {"mode": "unprompted", "model": tiny, "output": tmp_path / "out", "threshold": 0.0}
    results = evaluate("davis2017", tmp_path / "data", "test-dev", **options)
    assert results["scores"] == {} and "its server scores submission.zip" in format_results(results)
    with zipfile.ZipFile(tmp_path / "out" / "submission.zip") as archive:
        assert archive.namelist() == [f"swan/{t:05d}.png" for t in range(3)]
    (tmp_path / "data" / "JPEGImages" / "480p" / "swan" / "00001.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="1 empty"):
        load_benchmark("davis2017", tmp_path / "data", "test-dev", "unprompted")
    with pytest.raises(ValueError, match="1 no masks"):
        load_benchmark("davis2017", tmp_path / "data", "test-dev", "prompted")


def test_davis2016_needs_its_masks(tmp_path):
    """No server scores it, so there is no use for predictions alone."""
    shutil.rmtree(write_davis(tmp_path, 2016, {"bear": 3}) / "Annotations")
    with pytest.raises(ValueError, match="masks of DAVIS 2016: .*Annotations doesn't exist"):
        load_benchmark("davis2016", tmp_path, mode="unprompted")


def test_a_blank_mask_is_no_ground_truth(tiny, tmp_path):
    root = write_davis(tmp_path / "data", 2017, {"bear": 3, "swan": 3}, (1, 2), split="test-dev")
    write_png(root / "Annotations" / "480p" / "swan" / "00002.png", draw(2) * 0)
    results = evaluate("davis2017", root, "test-dev", model=tiny, output=tmp_path / "out")
    assert results["scores"] == {} and (tmp_path / "out" / "submission.zip").is_file()


def test_a_split_that_is_scored_in_part_is_said_to_be(davis2017, tiny, tmp_path, capsys):
    root, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(davis2017, root)
    for path in (root / "Annotations" / "480p" / "swan").iterdir():
        if path.stem != "00000":
            path.unlink()
    arguments = {"--root": root, "--model": tiny, "--output": out, "--benchmark": "davis2017", "--device": "cpu"}
    main(["evaluate", *(str(x) for pair in arguments.items() for x in pair)])
    assert "Only 2 of 3 videos have ground truth here" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert results["not_scored"] == ["swan"] and list(results["scores"]["J&F"]["sequences"]) == ["bear", "train"]
    with zipfile.ZipFile(out / "submission.zip") as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {"bear", "swan", "train"}


def test_sa_v_objects_have_folders_and_may_overlap(tiny, tmp_path):
    """Objects count from 0, annotations are four frames apart, the second object comes late, and they overlap."""
    root, number = tmp_path / "data", 17
    for t in range(number):
        write_frame(root / "JPEGImages_24fps" / "sav_9" / f"{t:05d}.jpg", draw(t))
    for t in range(0, number, 4):
        write_png(root / "Annotations_6fps" / "sav_9" / "000" / f"{t:05d}.png", draw(t) * 255)
        late = np.roll(draw(t), 5, 1) * 255 if t >= 8 else draw(t) * 0
        write_png(root / "Annotations_6fps" / "sav_9" / "001" / f"{t:05d}.png", late)
    (root / "sav_val.txt").write_text("sav_9\n")
    found = load_benchmark("sa_v", root)
    assert {t: list(masks) for t, masks in first_prompts(found.rows[0]).items()} == {0: [0], 8: [1]}
    results = evaluate("sa_v", root, model=tiny, output=tmp_path / "out")
    masks = tmp_path / "out" / "masks" / "sav_9"
    assert [p.name for p in sorted(masks.iterdir())] == ["000", "001"]
    assert [len(list(p.iterdir())) for p in sorted(masks.iterdir())] == [number, number]
    assert (read_mask(masks / "000" / "00000.png") == draw(0)).all()
    # each object by itself, as the tool of SA-V does
    objects = results["scores"]["J&F"]["sequences"]["sav_9"]["objects"]
    assert [(number, row["frames"]) for number, row in objects.items()] == [(0, 3), (1, 2)]
    for object_id in (0, 1):
        for kind, folder in (("truth", root / "Annotations_6fps" / "sav_9"), ("predicted", masks)):
            shutil.copytree(folder / f"{object_id:03d}", tmp_path / kind / f"{object_id}")
        for path in (tmp_path / "predicted" / f"{object_id}").iterdir():
            if not (tmp_path / "truth" / f"{object_id}" / path.name).exists():
                path.unlink()
        for path in (tmp_path / "truth" / f"{object_id}").iterdir():
            Image.fromarray(read_mask(path) // 255).save(path)
    jf, *_ = official_jf(tmp_path / "truth", tmp_path / "predicted")
    assert 100 * results["scores"]["J&F"]["J&F"] == pytest.approx(jf, abs=1e-6)


def vis_content(label_set: str, lengths: dict[int, int], annotated: bool) -> dict:
    labels = LABEL_SETS[label_set]
    content = {
        "videos": [
            {
                "id": number, "width": WIDTH, "height": HEIGHT, "length": length,
                "file_names": [f"v{number}/{t:05d}.jpg" for t in range(length)],
            }
            for number, length in lengths.items()
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(labels, 1)],
    }  # fmt: skip
    if annotated:
        content["annotations"] = [
            {
                "id": n,
                "video_id": n,
                "category_id": n,
                "iscrowd": 0,
                "segmentations": [encode(draw(t)) for t in range(k)],
            }
            for n, k in lengths.items()
        ]
    return content


def encode(mask: np.ndarray) -> dict:
    rle = rle_tools.encode(np.asfortranarray(mask > 0, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def write_vis(root: Path, name: str, label_set: str, annotated: bool) -> Path:
    lengths = {1: 3, 2: 4}
    content = json.dumps(vis_content(label_set, lengths, annotated))
    images = root / "valid" / ("" if name == "ovis" else "JPEGImages")
    for number, length in lengths.items():
        for t in range(length):
            write_frame(images / f"v{number}" / f"{t:05d}.jpg", draw(t))
    places = {"youtube_vis_2019": "valid.json", "youtube_vis_2021": "valid/instances.json"}
    (root / places.get(name, "annotations_valid.json")).write_text(content)
    return root


@pytest.mark.parametrize("name", ["youtube_vis_2019", "youtube_vis_2021", "ovis"])
def test_video_instances_go_to_the_server(name, save_tiny, tmp_path):
    model = save_tiny(name)
    write_vis(tmp_path / "data", name, name, annotated=False)
    results = evaluate(name, tmp_path / "data", model=model, output=tmp_path / "out", threshold=0.0)
    assert results["scores"] == {} and results["settings"]["top_k"] == (20 if name == "ovis" else 10)
    with zipfile.ZipFile(tmp_path / "out" / "submission.zip") as archive:
        assert archive.namelist() == ["results.json"]
        tracks = json.loads(archive.read("results.json"))
    assert {track["video_id"] for track in tracks} == {1, 2}
    for track in tracks:
        assert len(track["segmentations"]) == {1: 3, 2: 4}[track["video_id"]]
        assert 1 <= track["category_id"] <= len(LABEL_SETS[name]) and 0 <= track["score"] <= 1


def test_video_instances_with_ground_truth_have_ap(save_tiny, tmp_path):
    model = save_tiny("ovis")
    write_vis(tmp_path / "data", "ovis", "ovis", annotated=True)
    results = evaluate("ovis", tmp_path / "data", model=model, output=tmp_path / "out", threshold=0.0)
    ap = results["scores"]["AP"]
    assert set(ap["videos"]) == {"1", "2"} and set(ap["categories"]) == {"Person", "Bird"}
    assert not (tmp_path / "out" / "submission.zip").exists()
    assert [line.split()[0] for line in format_results(results).splitlines()[1:]] == [
        "category", "Person", "Bird", "mean",
    ]  # fmt: skip


def test_labels_that_the_data_set_lacks_are_left_out(save_tiny, tmp_path):
    model = save_tiny("ovis")
    source = write_vis(tmp_path / "data", "ovis", "ovis", annotated=False) / "annotations_valid.json"
    evaluate("ovis", tmp_path / "data", model=model, output=tmp_path / "every", threshold=0.0)
    every = json.loads((tmp_path / "every" / "tracks.json").read_text())
    gone = every[0]["category_id"]
    content = json.loads(source.read_text())
    content["categories"] = [category for category in content["categories"] if category["id"] != gone]
    source.write_text(json.dumps(content))
    evaluate("ovis", tmp_path / "data", model=model, output=tmp_path / "fewer", threshold=0.0)
    fewer = json.loads((tmp_path / "fewer" / "tracks.json").read_text())
    assert fewer == [track for track in every if track["category_id"] != gone]


def test_top_k_leaves_the_best_objects_of_each_frame(save_tiny, tmp_path):
    model = save_tiny("ovis")
    write_vis(tmp_path / "data", "ovis", "ovis", annotated=False)
    for top_k in (1, 20):
        out = tmp_path / str(top_k)
        evaluate("ovis", tmp_path / "data", model=model, output=out, threshold=0.0, top_k=top_k)
    one, every = (json.loads((tmp_path / k / "tracks.json").read_text()) for k in ("1", "20"))

    def in_first_frame(tracks):
        return [track for track in tracks if track["video_id"] == 2 and track["segmentations"][0] is not None]

    assert len(in_first_frame(one)) == 1 < len(in_first_frame(every))


def test_a_session_of_ones_own_has_its_prompts_already(tiny, moving_square):
    network, processor = run.load_model(tiny, "cpu")
    session = processor.init_video_session()
    for options in ({"masks": moving_square[1][0]}, {"threshold": 0.5}):
        with pytest.raises(ValueError, match="given beside session"):
            segment_video(moving_square[0], network, processor, session=session, **options)
    with pytest.raises(ValueError, match="max_objects is 0"):
        segment_video(moving_square[0], network, processor, session=session, max_objects=0)


def write_coco(root: Path) -> Path:
    labels, names = LABEL_SETS["coco"], {9: "a.jpg", 12: "b.jpg", 40: "c.jpg"}
    masks = {9: draw(0), 12: draw(7)}  # nothing is in the third image
    for image, name in names.items():
        write_frame(root / "val2017" / name, masks.get(image, draw(0) * 0))
    content = {
        "images": [{"id": i, "file_name": n, "height": HEIGHT, "width": WIDTH} for i, n in names.items()],
        "categories": [{"id": i + 100, "name": name} for i, name in enumerate(labels)],
        "annotations": [
            {
                "id": n, "image_id": image, "category_id": 100 + category, "iscrowd": 0,
                "segmentation": encode(mask), "area": int((mask > 0).sum()), "bbox": [0, 0, 1, 1],
            }
            for n, (image, mask) in enumerate(masks.items(), 1)
            for category in [n]
        ],
    }  # fmt: skip
    crowd = np.zeros((HEIGHT, WIDTH), np.uint8)
    crowd[36:] = 1
    content["annotations"].append(
        {
            "id": 3, "image_id": 9, "category_id": 102, "iscrowd": 1,
            "segmentation": encode(crowd), "area": int(crowd.sum()), "bbox": [0, 36, WIDTH, HEIGHT - 36],
        }
    )  # fmt: skip
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return root


def test_coco_is_scored_as_by_pycocotools(save_tiny, tmp_path, monkeypatch):
    """With predictions that are right in part: the network's are replaced, everything after it is real."""
    root = write_coco(tmp_path / "data")
    label = LABEL_SETS["coco"]

    def predict(row, model, processor, inference):
        frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        if row["video_id"] == "9":
            masks = np.roll(draw(0), 1, 1)
            masks[40:44, 40:44] = 2
            objects = [{"id": 1, "label": label[1], "score": 0.9}, {"id": 2, "label": label[2], "score": 0.95}]
        else:
            masks, objects = draw(7), [{"id": 1, "label": label[2], "score": 0.3}]
        yield 0, runner.FrameSegments(0, None, frame, masks.astype(np.int32), objects)

    monkeypatch.setattr(runner, "predict_video", predict)
    results = evaluate("coco", root, model=save_tiny("coco"), output=tmp_path / "out")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(root / "annotations" / "instances_val2017.json"))
        scorer = COCOeval(truth, truth.loadRes(str(tmp_path / "out" / "tracks.json")), "segm")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    ap = results["scores"]["AP"]
    assert 0 < ap["AP"] < 1
    assert [ap["AP"], ap["AP50"], ap["AP75"], ap["AR1"], ap["AR10"]] == pytest.approx(
        [*scorer.stats[:3], *scorer.stats[6:8]], abs=1e-6
    )
    assert set(ap["videos"]) == {"9", "12"}


def test_coco_test_set_goes_to_the_server(save_tiny, tmp_path):
    root = write_coco(tmp_path / "data")
    source = root / "annotations" / "instances_val2017.json"
    content = json.loads(source.read_text())
    del content["annotations"]
    source.with_name("image_info_test-dev2017.json").write_text(json.dumps(content))
    (root / "val2017").rename(root / "test2017")
    results = evaluate("coco", root, "test-dev2017", model=save_tiny("coco"), output=tmp_path / "out", threshold=0.0)
    assert results["scores"] == {}
    with zipfile.ZipFile(tmp_path / "out" / "submission.zip") as archive:
        assert archive.namelist() == ["detections_test-dev2017_ausm_results.json"]
        assert {item["image_id"] for item in json.loads(archive.read(archive.namelist()[0]))} <= {9, 12, 40}


def test_passes_play_forward_backward_forward():
    assert Inference(passes=1).order(4) == [0, 1, 2, 3]
    assert Inference(passes=2).order(4) == [0, 1, 2, 3, 2, 1, 0]
    assert Inference(passes=3).order(4) == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3]
    assert Inference(passes=3).order(1) == [0, 0, 0]
    assert Inference(traversal=True).order(1) == [0] * 6
    for passes in (1, 2, 3):
        assert sorted(Inference(passes=passes).order(5)[-5:]) == [0, 1, 2, 3, 4]


def test_another_seed_draws_other_id_vectors(davis2017, tiny, tmp_path):
    runs = {"default": {}, "zero": {"seed": 0}, "other": {"seed": 1}}
    for name, options in runs.items():
        evaluate("davis2017", davis2017, model=tiny, output=tmp_path / name, **options)
    settings = json.loads((tmp_path / "other" / "settings.json").read_text())
    assert settings["seed"] == 1
    masks = {name: files(tmp_path / name / "masks") for name in runs}
    assert masks["zero"] == masks["default"]
    assert masks["other"].keys() == masks["default"].keys() and masks["other"] != masks["default"]


@pytest.mark.parametrize("passes", [2, 3])
def test_passes_keep_the_last_predictions_and_the_ids(passes, save_tiny, tmp_path):
    """The same as playing a video by hand; tracks come out in the order of time, also after a backward pass."""
    model = save_tiny("ovis")
    write_vis(tmp_path / "data", "ovis", "ovis", annotated=False)
    out = tmp_path / "out"
    evaluate("ovis", tmp_path / "data", model=model, output=out, threshold=0.0, passes=passes, top_k=3)
    network, processor = run.load_model(model, "cpu")
    session = processor.init_video_session(
        foreground_threshold=0.0, find_new_objects=True, label_set="ovis", seed=runner.zlib.crc32(b"2")
    )
    order = [0, 1, 2, 3, 2, 1, 0, 1, 2, 3][: 7 if passes == 2 else 10]
    wanted = {}
    for t in order:
        with Image.open(tmp_path / "data" / "valid" / "v2" / f"{t:05d}.jpg") as image:
            output = network(inference_session=session, frame=processor(images=image)["pixel_values"])
        least = float(output.scores.topk(min(3, len(output.scores))).values[-1])
        (result,) = processor.post_process_instance_segmentation(output, least, target_sizes=[(HEIGHT, WIDTH)])
        wanted[t] = result["segmentation"].numpy()
    content = json.loads((out / "tracks" / "2.json").read_text())
    got = {t: np.zeros((HEIGHT, WIDTH), int) for t in range(4)}
    for item in content["objects"]:
        assert [int(t) for t in item["segmentations"]] == sorted(int(t) for t in item["segmentations"])
        for t, rle in item["segmentations"].items():
            got[int(t)][rle_tools.decode(rle) > 0] = item["id"]
    assert any(mask.any() for mask in got.values())
    for t in range(4):
        assert (got[t] == wanted[t]).all()


def test_passes_with_prompts_show_no_object_before_it_appears(tiny, tmp_path):
    write_youtube_vos(tmp_path / "data", "valid", full=True)
    evaluate("youtube_vos_2019", tmp_path / "data", model=tiny, output=tmp_path / "out", passes=3)
    masks = tmp_path / "out" / "masks" / "abc"
    assert all(2 not in read_mask(masks / f"{name}.png") for name in ("00000", "00005"))


def test_traversal_shows_four_views_between_two_full_ones(tmp_path):
    frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    frame[:3, :3], frame[:3, -3:], frame[-3:, -3:], frame[-3:, :3] = 50, 100, 150, 200
    Image.fromarray(frame).save(tmp_path / "0.png")
    row = {"frames": [{"path": str(tmp_path / "0.png"), "bytes": None}], "video": None}
    views = list(runner._Frames(row, [0] * 6, traversal=True))
    assert (views[0] == frame).all() and (views[5] == frame).all() and len(views) == 6
    # upper left, upper right, bottom right, bottom left: of the four corners each has one
    seen = [[int(v[0, 0, 0]), int(v[0, -1, 0]), int(v[-1, -1, 0]), int(v[-1, 0, 0])] for v in views[1:5]]
    assert seen == [[50, 0, 0, 0], [0, 100, 0, 0], [0, 0, 150, 0], [0, 0, 0, 200]]


def test_traversal_and_passes_of_an_image(save_tiny, tmp_path):
    model, root = save_tiny("coco"), write_coco(tmp_path / "data")
    for name, options in {"plain": {}, "views": {"traversal": True}, "twice": {"passes": 2}}.items():
        evaluate("coco", root, model=model, output=tmp_path / name, threshold=0.0, **options)
    plain, views, twice = ((tmp_path / n / "tracks.json").read_text() for n in ("plain", "views", "twice"))
    assert plain != views and plain != twice
    assert all(set(item) == {"image_id", "category_id", "segmentation", "score"} for item in json.loads(views))


def test_j_over_time_is_the_mean_over_those_that_count():
    def scores(pairs, **options):
        scorer = SequenceScorer("s")
        for pred, gt in pairs:
            scorer.add(np.array([pred], np.uint8), np.array([gt], np.uint8))
        return scorer.result(False, False, **options)

    early = scores([([1, 0], [1, 0]), ([1, 1], [1, 0]), ([0, 0], [1, 0])])
    late = scores([([0, 0], [0, 0]), ([1, 0], [1, 0])], count_from="first_annotated")
    assert j_over_time({"early": early, "late": late}) == [1.0, 0.75, 0.0]
    assert j_over_time({"late": late}) == [None, 1.0]
    assert summarize({"late": late})["J"] == 1.0


BAD = {
    "unknown benchmark": (["--benchmark", "davis2018"], "wanted is one of davis2016, davis2017"),
    "missing root": (["--root", "nowhere"], "doesn't exist"),
    "unknown split": (["--split", "test"], "split 'test' of DAVIS 2017"),
    "mode": (["--mode", "guessed"], "for davis2017 wanted is prompted or unprompted"),
    "mode that the benchmark lacks": (["--benchmark", "ovis", "--mode", "prompted"], "for ovis wanted is unprompted"),
    "passes": (["--passes", "4"], "wanted is 1, 2 or 3"),
    "traversal of a video": (["--traversal"], "single images"),
    "top k": (["--top-k", "0"], "at least 1"),
    "top k that is no number": (["--top-k", "ten"], "--top-k"),
    "top k of prompts": (["--top-k", "3"], "prompted objects are all reported"),
    "threshold": (["--mode", "unprompted", "--threshold", "2"], "wanted is 0 to 1"),
    "seed": (["--seed", "-1"], "wanted is 0 to 4294967295"),
    "folder that is no model": (["--model", "full"], "can't be loaded"),
    "output that holds other things": (["--output", "full"], "holds no run"),
    "output that is a file": (["--output", "full/file"], "holds no run"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_is_refused_before_work_starts(arguments, message, davis2017, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    usual = ["--benchmark", "davis2017", "--root", str(davis2017), "--model", str(tiny), "--output", "out"]
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", *usual, *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "full"]


def test_what_is_not_installed_is_said_first(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(ValueError, match=r"matplotlib is not installed; wanted is: pip install \"ausm-hf\[eval\]\""):
        evaluate("davis2016", "nowhere")


def test_model_without_the_classes_of_the_benchmark(tiny, tmp_path):
    write_vis(tmp_path / "data", "ovis", "ovis", annotated=False)
    with pytest.raises(ValueError, match="model has no classes of 'ovis', .* those of pets"):
        evaluate("ovis", tmp_path / "data", model=tiny, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_report_of_all_missing_files(davis2017, tiny, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(davis2017, root)
    for path in ("JPEGImages/480p/bear/00001.jpg", "Annotations/480p/swan/00000.png"):
        (root / path).write_bytes(b"")
    shutil.rmtree(root / "JPEGImages" / "480p" / "train")
    with pytest.raises(ValueError) as error:
        evaluate("davis2017", root, model=tiny, output=tmp_path / "out")
    for part in ("bear/00001.jpg", "swan/00000.png", "train", "problems in 3 videos"):
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("gone", ["JPEGImages/480p/bear/00003.jpg", "Annotations/480p/swan/00002.png"])
def test_half_a_data_set_is_not_taken_for_a_whole_one(gone, davis2017, tiny, tmp_path):
    shutil.copytree(davis2017, tmp_path / "data")
    (tmp_path / "data" / gone).unlink()
    with pytest.raises(ValueError, match=rf"1 missing:\n .*/{gone}"):
        evaluate("davis2017", tmp_path / "data", model=tiny, output=tmp_path / "out")


def test_frames_that_the_list_of_a_data_set_has_must_be_there(tiny, tmp_path):
    write_youtube_vos(tmp_path, "valid", full=False)
    listed = {"1": {"category": "penguin", "frames": ["00000", "00005"]}}
    (tmp_path / "valid" / "meta.json").write_text(json.dumps({"videos": {"abc": {"objects": listed}}}))
    (tmp_path / "valid" / "JPEGImages" / "abc" / "00005.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 missing:\n .*/abc/00005.jpg"):
        evaluate("youtube_vos_2019", tmp_path, model=tiny, output=tmp_path / "out")


def test_frames_of_another_size_than_their_annotations(save_tiny, tmp_path):
    source = write_vis(tmp_path / "data", "ovis", "ovis", annotated=False) / "annotations_valid.json"
    video = json.loads(source.read_text())["videos"][0]
    path = source.parent / "valid" / video["file_names"][0]
    with Image.open(path) as image:
        image.resize((image.width // 2, image.height // 2)).save(path)
    with pytest.raises(
        ValueError, match=rf"annotated are {video['width']} x {video['height']}; wanted are the frames"
    ):
        evaluate("ovis", tmp_path / "data", split="valid", model=save_tiny("ovis"), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"videos": [', "can't be read: Expecting value"),
        ('{"videos": []}', "it lacks 'categories'"),
        ("[]", "indices"),
    ],
)
def test_annotations_that_are_none_are_named(content, message, tiny, tmp_path):
    source = write_vis(tmp_path / "data", "ovis", "ovis", annotated=False) / "annotations_valid.json"
    source.write_text(content)
    with pytest.raises(ValueError, match=f"{source}.*{message}"):
        evaluate("ovis", tmp_path / "data", model=tiny, output=tmp_path / "out")


def test_one_report_of_all_videos_that_fail_and_the_rest_is_kept(davis2017, tiny, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(davis2017, root)
    (root / "JPEGImages" / "480p" / "bear" / "00002.jpg").write_text("no image")
    Image.new("RGB", (30, 30)).save(root / "JPEGImages" / "480p" / "train" / "00003.jpg")
    with pytest.raises(ValueError) as error:
        evaluate("davis2017", root, model=tiny, output=tmp_path / "out")
    assert "2 of 3 videos failed" in str(error.value)
    assert "bear: " in str(error.value) and "train: " in str(error.value)
    assert [p.name for p in (tmp_path / "out" / "masks").iterdir()] == ["swan"]
    assert not (tmp_path / "out" / "results.json").exists()

    write_frame(root / "JPEGImages" / "480p" / "bear" / "00002.jpg", draw(2, (1, 2)))
    write_frame(root / "JPEGImages" / "480p" / "train" / "00003.jpg", draw(3, (1, 2)))
    again = evaluate("davis2017", root, model=tiny, output=tmp_path / "out", resume=True)
    straight = evaluate("davis2017", davis2017, model=tiny, output=tmp_path / "straight")
    assert again["scores"] == straight["scores"]


@pytest.fixture(scope="module")
def long_streams():
    path = Path(__file__).parents[2] / "benchmarks" / "long_streams.py"
    spec = importlib.util.spec_from_file_location("long_streams", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_long_streams_writes_everything(long_streams, tiny, tmp_path, capsys):
    root = write_davis(tmp_path / "data", 2016, {"bear": 4, "swan": 5})
    options = {"--root": root, "--model": tiny, "--output": tmp_path / "out", "--times": 3, "--longest-gap": 2}
    options["--processes"] = 1
    long_streams.main([str(x) for pair in options.items() for x in pair])
    assert sorted(p.name for p in visible(tmp_path / "out")) == [
        "long_streams.json",
        "needle.png",
        "tables.md",
        "there_and_back.png",
    ]
    content = json.loads((tmp_path / "out" / "long_streams.json").read_text())
    assert {name: len(j) for name, j in content["j"].items()} == {"bear": 12, "swan": 15} and len(
        content["turns"]
    ) == 3
    assert [(row["mode"], row["gap"], row["needles"]) for row in content["needle"]] == [
        ("prompted", 1, 2), ("prompted", 2, 2), ("unprompted", 1, 2), ("unprompted", 2, 2),
    ]  # fmt: skip
    assert (tmp_path / "out" / "tables.md").read_text() in capsys.readouterr().out


def test_long_streams_plays_there_and_back_and_scores_what_it_shows(long_streams, tmp_path, monkeypatch):
    assert [long_streams.there_and_back(4, k) for k in range(9)] == [0, 1, 2, 3, 2, 1, 0, 1, 2]
    assert [long_streams.there_and_back(1, k) for k in range(3)] == [0, 0, 0]
    (row,) = load_benchmark("davis2016", write_davis(tmp_path, 2016, {"bear": 4})).rows

    def perfect_until_frame_6(frames, model, processor, masks=None):
        for index, frame in enumerate(frames):
            found = (frame.min(2) > 120) if index < 6 else np.zeros(frame.shape[:2], bool)
            yield runner.FrameSegments(index, None, frame, found.astype(np.int32), [])

    monkeypatch.setattr(long_streams, "segment_video", perfect_until_frame_6)
    scores = long_streams.run_there_and_back(row, None, None, times=2)
    assert min(scores[:6]) > 0.95 and scores[6:] == [0.0, 0.0]
    assert long_streams.summarize_there_and_back({"bear": [0.0, 1.0, 0.5, 0.5]}, 2) == [1.0, 0.5]


@pytest.mark.parametrize(
    "before, after, outcome", [(1, 1, "kept"), (1, 2, "new id"), (1, 0, "lost"), (0, 1, None)], ids=str
)
def test_long_streams_tells_what_became_of_a_needle(before, after, outcome, long_streams, tmp_path, monkeypatch):
    root = write_davis(tmp_path, 2016, {"bear": 30, "swan": 3})
    bear, swan = load_benchmark("davis2016", root).rows
    seen = []

    def model_of_a_needle(frames, model, processor, session):
        for index, frame in enumerate(frames):
            k = session["frames"]
            session["frames"] += 1
            # A copy of the stream goes on with the needle, from the frame at which it was made.
            gap = 4 if session is sessions[0] else session.setdefault("gap", k - 10)
            needle = long_streams.needle_frame(bear, swan, k, gap)[1]
            seen.append(bool(needle.any()))
            found = np.where(needle, before if k < 10 else after, 0)
            if k == 10:
                found[0, 0] = before
            yield runner.FrameSegments(index, None, frame, found, [])

    sessions = [{"frames": 0}]
    monkeypatch.setattr(long_streams, "start_session", lambda *arguments: sessions[0])
    monkeypatch.setattr(long_streams, "segment_video", model_of_a_needle)
    results = long_streams.run_needles(bear, swan, None, None, [1, 4], prompted=False)
    assert [(result["gap"], result["outcome"]) for result in results] == [(1, outcome), (4, outcome)]
    if outcome is not None:
        assert seen == [True] * 10 + [False] + [True] * 10 + [False] * 3 + [True] * 10
        assert [result["claimed"] for result in results] == [1, 0.25]


def write_scene(root: Path, frames: Path, masks: Path, binary: bool = False):
    """Object 1 in all of seven frames, object 2 from the fourth on (but for black and white masks)."""
    for t in range(7):
        truth = draw(0, (1,)) * 255 if binary else draw(0, (1, 2) if t >= 3 else (1,))
        write_frame(root / frames / f"{t:05d}.jpg", draw(0, (1, 2)))
        write_png(root / masks / f"{t:05d}.png", truth)


def predict_scene(row, model, processor, inference):
    """Object 1 is there in frames 1, 2, 4 and 5; object 2 is a frame early, and gone in the last two."""
    offset = 0 if inference.mode == "prompted" else 10
    for t in range(7):
        there = [n for n, shown in ((1, t in (1, 2, 4, 5)), (2, t in (2, 3, 4))) if shown]
        masks = np.where(np.isin(draw(0, (1, 2)), there), draw(0, (1, 2)).astype(np.int32) + offset, 0)
        masks[draw(0, (1, 2)) == 0] = 0
        objects = [{"id": n + offset, "label": None, "score": 0.9} for n in there]
        yield t, runner.FrameSegments(t, None, np.zeros((HEIGHT, WIDTH, 3), np.uint8), masks, objects)


@pytest.mark.parametrize(
    "name, mode, measure, wanted",
    [
        # Without the first and the last frame: object 1 is right in 4 of 5.
        ("davis2016", "prompted", "J&F", {1: 4 / 5}),
        ("davis2016", "unprompted", "best track", {1: 4 / 5}),
        # Object 2 is absent, early, right, right, lost.
        ("davis2017", "prompted", "J&F", {1: 4 / 5, 2: 3 / 5}),
        # All frames.
        ("davis2017", "unprompted", "best track", {1: 4 / 7, 2: 4 / 7}),
        # Without the ends, from where either has it.
        ("mose", "prompted", "J&F", {1: 4 / 5, 2: 2 / 4}),
        # All frames, from where ground truth has it.
        ("youtube_vos_2019", "prompted", "J&F", {1: 4 / 7, 2: 2 / 4}),
    ],
)
def test_frames_count_as_agreed_for_each_benchmark(name, mode, measure, wanted, tiny, tmp_path, monkeypatch):
    root, year = tmp_path / "data", name[-4:]
    if name.startswith("davis"):
        frames, split = Path("JPEGImages", "480p", "bear"), "val"
        (root / "ImageSets" / year).mkdir(parents=True)
        (root / "ImageSets" / year / "val.txt").write_text("bear")
        masks = "Annotations_unsupervised" if (name, mode) == ("davis2017", "unprompted") else "Annotations"
        write_scene(root, frames, Path(masks, "480p", "bear"), name == "davis2016")
    else:
        split = "train" if name == "mose" else "valid"
        write_scene(root / split, Path("JPEGImages", "bear"), Path("Annotations", "bear"))
        objects = {"1": {"category": "bear"}, "2": {"category": "bear"}}
        (root / split / "meta.json").write_text(json.dumps({"videos": {"bear": {"objects": objects}}}))

    def predict(*arguments):
        for t, result in predict_scene(*arguments):
            if name == "davis2016":  # which has one object
                result.masks[result.masks % 10 == 2] = 0
            yield t, result

    monkeypatch.setattr(runner, "predict_video", predict)
    results = evaluate(name, root, split, mode, model=tiny, output=tmp_path / "out")
    rows = results["scores"][measure]["sequences"]["bear"]["objects"]
    assert {object_id: row["J"] for object_id, row in rows.items()} == pytest.approx(wanted)


def test_as_many_objects_as_the_benchmarks_take():
    limits = {name: (protocol.top_k, protocol.max_tracks) for name, protocol in benchmarks.PROTOCOLS.items()}
    assert limits["davis2017"] == (None, 20)  # davis2017-evaluation: MAX_N_PROPOSALS
    assert limits["coco"] == (100, None) and limits["ovis"] == (20, None)
    assert limits["youtube_vis_2019"] == limits["youtube_vis_2021"] == (10, None)


def test_a_second_run_keeps_out_of_the_folder_of_one_that_is_at_work(davis2017, tiny, tmp_path, monkeypatch):
    arguments = {"benchmark": "davis2017", "root": davis2017, "model": tiny, "output": tmp_path / "out"}
    refused = []

    def meanwhile(row, *rest):
        for t, result in predict_scene(row, *rest):
            if t == 2 and not refused:
                refused.append(None)
                with pytest.raises(ValueError, match="is being written by another run") as error:
                    evaluate(**arguments, resume=True)
                refused.append(error)
            if t < len(row["frames"]):
                yield t, result

    monkeypatch.setattr(runner, "predict_video", meanwhile)
    evaluate(**arguments)
    assert len(refused) == 2
    assert [len(list((tmp_path / "out" / "masks" / name).iterdir())) for name in ("bear", "swan", "train")] == [
        5,
        6,
        4,
    ]
    evaluate(**arguments, resume=True)  # when it is done


def test_a_folder_that_vanishes_is_not_begun_anew(tmp_path):
    with pytest.raises(FileNotFoundError), runner.MaskFolder(tmp_path / "bear") as folder:
        folder.write("00000", draw(0))
        shutil.rmtree(folder.partial)
        folder.write("00001", draw(0))
    assert not (tmp_path / "bear").exists()


def test_half_a_video_is_not_taken_for_a_whole_one(tiny, tmp_path):
    write_davis(tmp_path / "data", 2017, {"bear": 3}, (1, 2), split="test-dev")
    arguments = {"benchmark": "davis2017", "root": tmp_path / "data", "split": "test-dev", "model": tiny}
    evaluate(**arguments, output=tmp_path / "out")
    before = files(tmp_path / "out")
    (tmp_path / "out" / "masks" / "bear" / "00001.png").unlink()
    evaluate(**arguments, output=tmp_path / "out", resume=True)
    assert files(tmp_path / "out").keys() == before.keys()
    with zipfile.ZipFile(tmp_path / "out" / "submission.zip") as archive:
        assert archive.namelist() == [f"bear/{t:05d}.png" for t in range(3)]


def test_predictions_of_other_frames_are_not_taken_over(davis2017, tiny, tmp_path):
    shutil.copytree(davis2017, tmp_path / "data")
    evaluate("davis2017", davis2017, model=tiny, output=tmp_path / "out")
    evaluate("davis2017", tmp_path / "data", model=tiny, output=tmp_path / "out", resume=True)  # a copy
    write_frame(tmp_path / "data" / "JPEGImages" / "480p" / "swan" / "00002.jpg", draw(9, (1, 2)))
    with pytest.raises(ValueError, match="predictions for 1 videos whose frames were others, such as swan"):
        evaluate("davis2017", tmp_path / "data", model=tiny, output=tmp_path / "out", resume=True)
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    del settings["frames"]  # as of an output of before
    (tmp_path / "out" / "settings.json").write_text(json.dumps(settings))
    evaluate("davis2017", davis2017, model=tiny, output=tmp_path / "out", resume=True)


def test_ground_truth_may_come_later(tiny, tmp_path):
    root = write_davis(tmp_path / "data", 2017, {"bear": 4}, (1, 2))
    masks = root / "Annotations" / "480p" / "bear"
    for t in (1, 2, 3):
        (masks / f"{t:05d}.png").rename(tmp_path / f"{t:05d}.png")
    assert evaluate("davis2017", root, model=tiny, output=tmp_path / "out")["scores"] == {}
    for t in (1, 2, 3):
        (tmp_path / f"{t:05d}.png").rename(masks / f"{t:05d}.png")
    assert "J&F" in evaluate("davis2017", root, model=tiny, output=tmp_path / "out", resume=True)["scores"]


def test_a_folder_that_can_not_be_locked(davis2017, tiny, tmp_path, monkeypatch):
    class NoLock(run.FileLock):
        def _acquire(self):
            raise OSError(37, "No locks available")

    monkeypatch.setattr(run, "FileLock", NoLock)
    with pytest.warns(UserWarning, match="can't be locked .*: let no other run write into it"):
        evaluate("davis2017", davis2017, model=tiny, output=tmp_path / "out")
    assert (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(("turn", "fits"), [(None, False), (1, False), (6, True), (9, False)])
def test_sizes_are_those_of_frames_as_they_are_shown(turn, fits, tmp_path):
    exif = Image.Exif()
    if turn is not None:
        exif[0x0112] = turn
    Image.new("RGB", (40, 60)).save(tmp_path / "0.jpg", exif=exif)
    rows = [{"frames": [{"path": str(tmp_path / "0.jpg"), "bytes": None}]}]
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="annotated are 60 x 40"):
        benchmarks._check_sizes(rows, [{"width": 60, "height": 40}])
    with pytest.raises(ValueError) if fits else contextlib.nullcontext():
        benchmarks._check_sizes(rows, [{"width": 40, "height": 60}])


def test_a_video_without_enough_memory_does_not_stop_the_others(davis2017, tiny, tmp_path, monkeypatch):
    def predict(row, *rest):
        if row["video_id"] == "swan":
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield from ((t, result) for t, result in predict_scene(row, *rest) if t < len(row["frames"]))

    monkeypatch.setattr(runner, "predict_video", predict)
    with pytest.raises(ValueError, match="1 of 3 videos failed.*\n- swan: CUDA out of memory"):
        evaluate("davis2017", davis2017, model=tiny, output=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "masks").iterdir()) == ["bear", "train"]


def test_masks_in_colour_are_refused_unless_they_are_black_and_white(tiny, tmp_path):
    for year in (2016, 2017):
        root = write_davis(tmp_path / str(year), year, {"bear": 3}, (1, 2) if year == 2017 else (1,))
        for path in (root / "Annotations").rglob("*.png"):
            with Image.open(path) as image:
                image.convert("RGB").save(path)
    results = evaluate("davis2016", tmp_path / "2016", model=tiny, output=tmp_path / "out16")
    assert results["scores"]["J&F"]["sequences"]["bear"]["objects"].keys() == {1}
    with pytest.raises(ValueError, match="bear: .*00000.png is a mask of mode RGB; each pixel must be the number"):
        evaluate("davis2017", tmp_path / "2017", model=tiny, output=tmp_path / "out17")


def test_a_video_whose_objects_are_in_no_frame_that_counts(tiny, tmp_path):
    """Object 1 of `gone` is in its first frame; vos-benchmark leaves it out."""
    root = tmp_path / "data"
    for t in range(4):
        for name in ("gone", "bear"):
            write_frame(root / "train" / "JPEGImages" / name / f"{t:05d}.jpg", draw(t))
            mask = draw(t) * (name == "bear" or t == 0)
            write_png(root / "train" / "Annotations" / name / f"{t:05d}.png", mask)
    results = evaluate("mose", root, "train", model=tiny, output=tmp_path / "out")
    masks = tmp_path / "out" / "masks" / "gone"
    assert results["not_scored"] == [] and len(list(masks.iterdir())) == 4
    for t in (1, 2):  # what is predicted where nothing is makes an object count
        write_png(masks / f"{t:05d}.png", draw(0) * 0)
    jf, *_ = official_jf(root / "train" / "Annotations", tmp_path / "out" / "masks")
    results = evaluate("mose", root, "train", model=tiny, output=tmp_path / "out", resume=True)
    assert list(results["scores"]["J&F"]["sequences"]) == ["bear"]
    assert 100 * results["scores"]["J&F"]["J&F"] == pytest.approx(jf, abs=1e-6)
