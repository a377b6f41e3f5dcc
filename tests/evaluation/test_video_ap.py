"""Video AP: by eye on 4 x 4 masks, and against pycocotools and TrackEval."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ausm_hf.evaluation.metrics.video_ap import IOU_THRESHOLDS, VideoAP, _rle_lengths
from ausm_hf.evaluation.vis import score_tracks


def picture(*rows: str) -> np.ndarray:
    return np.array([[int(c != ".") for c in row] for row in rows], dtype=np.uint8)


EMPTY = picture("....", "....", "....", "....")
SQUARE = picture("....", ".11.", ".11.", "....")
RIGHT = picture("....", "..11", "..11", "....")
CORNER = picture("....", "....", "....", "...1")


def track(frames, score=None, category=1, name=1, **more):
    """Segments of one track, one per frame."""
    extra = {} if score is None else {"score": score}
    return [{"id": name, "category_id": category, "mask": mask, **extra, **more} for mask in frames]


def ap(*videos, **options):
    """Each video: (predicted tracks, true tracks)."""
    scorer = VideoAP()
    for video, (predictions, references) in enumerate(videos):
        for t in range(len((predictions or references)[0])):
            scorer.add(video, [p[t] for p in predictions], [r[t] for r in references])
    return scorer.result(**options)


# ------------------------------------------------------------------------------------------------------- by eye


def test_ap_by_eye():
    right = ap(([track([SQUARE] * 3, 0.9)], [track([SQUARE] * 3)]))
    assert [right[m] for m in ("AP", "AP50", "AP75", "AR1", "AR10")] == pytest.approx([1] * 5)
    # 4 + 4 + 2 pixels in common, 4 + 4 + 6 in either: IoU 10 / 14 = 0.714 passes 0.50, 0.55, 0.60, 0.65 and 0.70
    close = ap(([track([SQUARE, SQUARE, RIGHT], 0.9)], [track([SQUARE] * 3)]))
    assert close["AP"] == pytest.approx(0.5)
    assert close["AP50"] == pytest.approx(1)
    assert close["AP75"] == 0
    assert close["AR1"] == pytest.approx(0.5)
    # the IoU is that of the whole track, not the mean over frames: here 4 / 12, there (4 + 4) / (4 + 4 + 1)
    assert ap(([track([SQUARE, None, None], 0.9)], [track([SQUARE] * 3)]))["AP50"] == 0
    assert ap(([track([SQUARE, SQUARE, CORNER], 0.9)], [track([SQUARE, SQUARE, None])]))["AP75"] == pytest.approx(1)


def test_wrong_tracks_cost_precision():
    true = track([SQUARE])
    right, wrong = track([SQUARE], 0.5, name=1), track([CORNER], 0.9, name=2)
    assert ap(([right, wrong], [true]))["AP"] == pytest.approx(0.5)  # the better-scored one is wrong
    assert ap(([right, wrong], [true]))["AR1"] == 0
    assert ap(([right, wrong], [true]))["AR10"] == pytest.approx(1)
    late = track([CORNER], 0.1, name=2)
    assert ap(([right, late], [true]))["AP"] == pytest.approx(1)  # full recall was reached before
    double = track([SQUARE], 0.9, name=3)
    assert ap(([right, double], [true]))["AP"] == pytest.approx(1)
    # found twice before the second object is found: precision is 1 up to recall 1/2, and 2/3 beyond
    other, found = track([CORNER], name=2), track([CORNER], 0.1, name=4)
    assert ap(([right, double, found], [true, other]))["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_categories_and_videos():
    a, b = (
        ([track([SQUARE], 0.9, 1)], [track([SQUARE], None, 1)]),
        ([track([SQUARE], 0.9, 1)], [track([SQUARE], None, 2)]),
    )
    result = ap(a, b)
    # category 1: a wrong detection in video 1 has the same score, and comes after; category 2: not found
    assert result["categories"][1]["AP"] == pytest.approx(1)
    assert result["categories"][2]["AP"] == 0
    assert result["AP"] == pytest.approx(0.5)
    assert ap(b, a)["categories"][1]["AP"] == pytest.approx(0.5)  # comes before
    # groups: what lies on them counts neither way
    group = track([SQUARE], None, 1, name=5, iscrowd=1)
    assert ap(([track([SQUARE], 0.9), track([CORNER], 0.5, name=2)], [track([CORNER]), group]))["AP"] == pytest.approx(
        1
    )
    # no ground truth at all
    assert ap(([track([SQUARE], 0.9)], [track([None])]))["AP"] == 0
    assert ap(([track([SQUARE], 0.9)], []))["AP"] == -1


def test_last_score_and_category_stand():
    frames = [
        {"id": 1, "category_id": 2, "score": 0.1, "mask": SQUARE},
        {"id": 1, "category_id": 1, "score": 0.9, "mask": SQUARE},
    ]
    wrong = track([CORNER, CORNER], 0.5, name=2)
    assert ap(([frames, wrong], [track([SQUARE, SQUARE])]))["AP"] == pytest.approx(1)


def test_masks_as_arrays_and_rles_are_the_same():
    rle = mask_utils.encode(np.asfortranarray(SQUARE))
    text = {"size": rle["size"], "counts": rle["counts"].decode()}
    plain = {"size": [4, 4], "counts": [5, 2, 2, 2, 5]}
    for mask in (rle, text, plain, SQUARE.astype(bool), SQUARE * 7):
        assert ap(([track([mask, RIGHT], 0.9)], [track([SQUARE, SQUARE])])) == ap(
            ([track([SQUARE, RIGHT], 0.9)], [track([SQUARE, SQUARE])])
        )


def test_length_of_compressed_rles():
    """All in one go, and each as it would be alone; a broken one takes no other with it."""
    rng = np.random.default_rng(0)
    counts, wanted = [b""], [0]
    for shape in ((1, 1), (1, 7), (40, 30), (300, 700), (2000, 3000)):
        for share in (0, 1e-5, 0.01, 0.5, 1):
            encoded = mask_utils.encode(np.asfortranarray(rng.random(shape) < share, dtype=np.uint8))
            counts.append(encoded["counts"])
            wanted.append(shape[0] * shape[1])
            cut = _rle_lengths([encoded["counts"][:-1]])[0]  # perhaps in the middle of a number
            assert cut is None or cut < shape[0] * shape[1]
    assert _rle_lengths(counts) == wanted and _rle_lengths([]) == []
    assert [_rle_lengths([c])[0] for c in counts] == wanted
    for broken in (b"o" * 20, b"0o", b"J", b"\n"):
        assert _rle_lengths([broken]) == [None]
        assert _rle_lengths([*counts[:3], broken, *counts[3:]]) == [*wanted[:3], None, *wanted[3:]]


def test_tracks_of_fixed_category_score_the_same():
    rng = np.random.default_rng(1)

    def random_tracks(number, score):
        masks = rng.random((number, 3, 12, 10)) < 0.4
        kinds = rng.integers(1, 4, number)
        return [
            [{"id": n, "category_id": int(kinds[n]), "mask": m.astype(np.uint8), **score(n)} for m in masks[n]]
            for n in range(number)
        ]

    predictions = random_tracks(9, lambda n: {"score": n / 10})
    references = random_tracks(5, lambda n: {})
    results = []
    for fixed in (False, True):
        scorer = VideoAP()
        for t in range(3):
            frame = [[track[t] for track in tracks] for tracks in (predictions, references)]
            scorer.add(1, *frame, fixed_categories=fixed)
        results.append(scorer.result())
    assert results[0] == results[1]


# --------------------------------------------------------------------------------------------------- bad input


def test_one_report_of_all_problems():
    scorer = VideoAP()
    good = {"id": 1, "category_id": 1, "mask": SQUARE, "score": 0.5}
    scorer.add(3, [{"id": 1, "mask": SQUARE}], [good])
    scorer.add(3, [good, good], [good])
    scorer.add(3, [{**good, "score": float("nan")}], [good])
    scorer.add(3, [{**good, "mask": SQUARE[:3]}], [good])
    scorer.add(3, [{**good, "mask": {"size": [4, 4], "counts": [3]}}], [good])
    scorer.add(3, [{**good, "mask": {"size": [4, 4], "counts": "~~~"}}], [good])
    scorer.add(3, [{**good, "mask": SQUARE[None]}], [{**good, "mask": "none"}])
    scorer.add(4, [{**good, "category_id": 7}], [good])
    with pytest.raises(ValueError) as error:
        scorer.result(categories=[1, 2])
    lines = str(error.value).splitlines()
    assert lines[0].startswith("9 problems")
    assert lines[1:] == [
        "- video 3, frame 0: a prediction lacks category_id, score",
        "- video 3, frame 1: prediction 1 comes twice",
        "- video 3, frame 2: prediction 1 has score nan, not a finite number",
        "- video 3, frame 3: masks differ in size: prediction 1 is 3 x 4, reference 1 is 4 x 4",
        "- video 3, frame 4: prediction 1 has an RLE of 3 pixels for a mask of 4 x 4",
        "- video 3, frame 5: prediction 1 has an RLE that is not valid",
        "- video 3, frame 6: prediction 1 has a mask of shape (1, 4, 4), not (H, W)",
        "- video 3, frame 6: reference 1 has a mask that is neither an array (H, W) nor a COCO RLE (size, counts) "
        "nor None",
        "- video 4: prediction 1 has unknown category 7",
    ]
    with pytest.raises(ValueError, match="no frame was added"):
        VideoAP().result()


def test_bad_json_is_reported_at_once():
    rle = {"size": [4, 4], "counts": [5, 2, 2, 2, 5]}
    annotations = {
        "videos": [{"id": 1, "height": 4, "width": 4, "length": 2}],
        "categories": [{"id": 1}],
        "annotations": [{"id": 1, "video_id": 1, "category_id": 1, "segmentations": [rle, None]}],
    }
    good = {"video_id": 1, "category_id": 1, "score": 0.5, "segmentations": [rle, None]}
    assert score_tracks([good], annotations)["AP"] == pytest.approx(1)
    bad = [
        good,
        {**good, "segmentations": [rle]},
        {**good, "video_id": 2},
        {**good, "category_id": 9},
        {**good, "score": "high"},
        {**good, "segmentations": [rle, {"size": [5, 4], "counts": [20]}]},
        {"video_id": 1},
        {**good, "segmentations": [rle, [[1, 2]]]},
    ]
    with pytest.raises(ValueError) as error:
        score_tracks(bad, annotations)
    report = str(error.value)
    for problem in (
        "result 1: 1 segmentations for the 2 frames of video 1",
        "result 2: unknown video 2",
        "result 5: mask of 5 x 4 in frame 1 of video 1, which is 4 x 4",
        "result 6: lacks category_id, score, segmentations",
        "result 7: frame 1 of video 1: a polygon is [1, 2], want x and y of each of its points",
        "prediction 4 has score 'high'",
        "prediction 3 has unknown category 9",
    ):
        assert problem in report
    with pytest.raises(ValueError, match="`annotations` lacks categories"):
        score_tracks([good], {"videos": [], "annotations": []})
    with pytest.raises(ValueError, match="`results` must be a list"):
        score_tracks({"AP": 1}, annotations)


def test_lines_among_polygons_have_no_area():
    square = [1, 1, 3, 1, 3, 3, 1, 3]
    annotation = {"id": 1, "video_id": 1, "category_id": 1, "segmentations": [[[0, 0, 1, 1], square], [[0, 0, 3, 3]]]}
    annotations = {
        "videos": [{"id": 1, "height": 4, "width": 4, "length": 2}],
        "categories": [{"id": 1}],
        "annotations": [annotation],
    }
    found = {"video_id": 1, "category_id": 1, "score": 0.5, "segmentations": [[square], None]}
    assert score_tracks([found], annotations)["AP"] == pytest.approx(1)


# ---------------------------------------------------------------------------------- against the official tools

SHAPE = (24, 32)


def rle(mask: np.ndarray | None) -> dict | None:
    if mask is None:
        return None
    encoded = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def plain_rle(mask: np.ndarray | None) -> dict | None:
    """Uncompressed, as YouTube-VIS annotations are."""
    if mask is None:
        return None
    flat = mask.astype(np.uint8).ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": counts if flat[0] == 0 else [0, *counts]}


def box(rng: np.random.Generator) -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    top, left = rng.integers(0, 14), rng.integers(0, 20)
    mask[top : top + rng.integers(2, 10), left : left + rng.integers(2, 12)] = 1
    return mask


def data_set(seed: int, frames: int, videos: int = 6, categories: int = 3) -> tuple[list[dict], dict]:
    """Results and annotations with everything that is awkward: ties in score, IoUs that lie exactly on a threshold,
    empty masks, tracks of one frame and of none, videos without truth or without predictions."""
    rng = np.random.default_rng(seed)
    truth = {
        "videos": [],
        "annotations": [],
        "categories": [{"id": c + 1, "name": f"c{c}"} for c in range(categories)],
    }
    results = []
    for video in range(1, videos + 1):
        names = [f"v{video:03d}/{t}.jpg" for t in range(frames)]
        height, width = SHAPE
        truth["videos"].append({"id": video, "height": height, "width": width, "length": frames, "file_names": names})
        tracks = []
        for _ in range(0 if video == 2 else rng.integers(1, 6)):
            masks = [box(rng) if rng.random() < 0.8 else None for _ in range(frames)]
            category = int(rng.integers(1, categories))  # the last category has no truth
            if tracks and rng.random() < 0.4:  # lies upon the one before, so that a prediction may match both
                before, category = tracks[-1]
                masks = [mask if mask is None else np.roll(mask, rng.integers(0, 2), 1) for mask in before]
            tracks.append((masks, category))
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "video_id": video,
                    "category_id": category,
                    "iscrowd": 0,
                    "height": height,
                    "width": width,
                    "segmentations": [plain_rle(mask) for mask in masks],
                    "areas": [None if mask is None else int(mask.sum()) for mask in masks],
                }
            )
        predicted = []
        for masks, category in tracks:
            for _ in range(rng.integers(0, 4)):
                worse = [
                    np.roll(mask, rng.integers(-1, 2), axis=rng.integers(2))
                    if mask is not None and rng.random() < 0.5
                    else mask
                    for mask in masks
                ]
                predicted.append((worse, category if rng.random() < 0.9 else categories))
        for _ in range(rng.integers(0, 4)):
            predicted.append(([box(rng) if rng.random() < 0.5 else None for _ in range(frames)], 1))
        predicted.append(([np.zeros(SHAPE, np.uint8)] * frames, 1))
        predicted.append(([None] * frames, 1))
        predicted.append(([box(rng)] + [None] * (frames - 1), 1))
        # an IoU of exactly 17 / 20
        truth_mask, part = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
        truth_mask[20, :20], part[20, :17] = 1, 1
        if video == 1:
            truth["annotations"].append(
                {
                    **truth["annotations"][0],
                    "id": len(truth["annotations"]) + 1,
                    "segmentations": [plain_rle(truth_mask)] * frames,
                    "areas": [20] * frames,
                }
            )
            predicted.append(([part] * frames, truth["annotations"][0]["category_id"]))
        for masks, category in predicted:
            results.append(
                {
                    "video_id": video,
                    "category_id": category,
                    "score": float(rng.integers(1, 8)) / 8,  # ties
                    "segmentations": [rle(mask) for mask in masks],
                }
            )
    return results, truth


class VideoEval(COCOeval):
    """COCOeval with the IoU of whole tracks, which is what the YouTube-VIS server runs."""

    def computeIoU(self, video, category):
        truth, found = self._gts[video, category], self._dts[video, category]
        found = [found[i] for i in np.argsort([-d["score"] for d in found], kind="mergesort")]
        found = found[: self.params.maxDets[-1]]
        if not truth and not found:
            return []
        iou = np.zeros((len(found), len(truth)))
        for row, d in enumerate(found):
            for column, g in enumerate(truth):
                common = either = 0
                for a, b in zip(d["segmentations"], g["segmentations"]):
                    masks = [mask_utils.decode(m).astype(bool) for m in (a, b) if m]
                    either += int(np.any(masks, axis=0).sum()) if masks else 0
                    common += int(np.all(masks, axis=0).sum()) if len(masks) == 2 else 0
                iou[row, column] = common / either if either else 0
        return iou


def coco_of(entries: list[dict], truth: dict) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": [{"id": video["id"]} for video in truth["videos"]],
        "categories": truth["categories"],
        "annotations": [
            {
                **entry,
                "id": index,
                "image_id": entry["video_id"],
                "iscrowd": entry.get("iscrowd", 0),
                "area": 1,
                "segmentations": [
                    mask_utils.frPyObjects(m, *m["size"]) if m and isinstance(m["counts"], list) else m
                    for m in entry["segmentations"]
                ],
            }
            for index, entry in enumerate(entries, start=1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def official_coco(evaluation: COCOeval) -> list[float]:
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]] * 4, ["all", "small", "medium", "large"]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = evaluation.stats  # AP, AP50, AP75, by area ..., AR1, AR10
    return [*stats[:3], stats[6], stats[7]]


def ours(results: list[dict], truth: dict, images: bool = False) -> list[float]:
    scored = score_tracks(results, truth, images)
    return [scored[measure] for measure in ("AP", "AP50", "AP75", "AR1", "AR10")]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("crowds", [False, True])
def test_equals_pycocotools_on_tracks(seed, frames, crowds):
    results, truth = data_set(seed, frames)
    if crowds:
        for annotation in truth["annotations"][::3]:
            annotation["iscrowd"] = 1
    evaluation = VideoEval(coco_of(truth["annotations"], truth), coco_of(results, truth), "segm")
    evaluation._prepare = lambda: prepare(evaluation)
    assert ours(results, truth) == pytest.approx(official_coco(evaluation), abs=1e-6)


def prepare(evaluation: COCOeval) -> None:
    """`COCOeval._prepare` without its own masks, which tracks don't have."""
    for store, coco in (("_gts", evaluation.cocoGt), ("_dts", evaluation.cocoDt)):
        grouped = {(v, c): [] for v in evaluation.params.imgIds for c in evaluation.params.catIds}
        for annotation in coco.dataset["annotations"]:
            annotation["ignore"] = annotation["iscrowd"]
            grouped[annotation["image_id"], annotation["category_id"]].append(annotation)
        setattr(evaluation, store, grouped)
    evaluation.evalImgs, evaluation.eval = {}, {}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("crowds", [False, True])
def test_equals_pycocotools_on_images(seed, crowds):
    """Nothing of pycocotools changed: images with instances are videos of one frame."""
    results, truth = data_set(seed, frames=1)
    if crowds:
        for annotation in truth["annotations"][::3]:
            annotation["iscrowd"] = 1
    results = [track for track in results if track["segmentations"][0]]  # pycocotools has no absent detections
    truth["annotations"] = [track for track in truth["annotations"] if track["segmentations"][0]]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": v["id"], "height": v["height"], "width": v["width"]} for v in truth["videos"]],
        "categories": truth["categories"],
        "annotations": [
            {
                "id": a["id"],
                "image_id": a["video_id"],
                "category_id": a["category_id"],
                "segmentation": a["segmentations"][0],
                "area": a["areas"][0],
                "iscrowd": a["iscrowd"],
            }
            for a in truth["annotations"]
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        found = coco.loadRes(
            [
                {
                    "image_id": r["video_id"],
                    "category_id": r["category_id"],
                    "segmentation": r["segmentations"][0],
                    "score": r["score"],
                }
                for r in results
            ]
        )
    wanted = official_coco(COCOeval(coco, found, "segm"))
    assert ours(results, truth, images=True) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_equals_trackeval(seed, tmp_path):
    trackeval = pytest.importorskip("trackeval")
    results, truth = data_set(seed, frames=4)
    for folder, name, content in (
        ("gt/youtube_vis_val", "gt.json", truth),
        ("trackers/youtube_vis_val/ours/data", "results.json", results),
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_text(json.dumps(content))
    dataset = trackeval.datasets.YouTubeVIS(
        {
            "GT_FOLDER": f"{tmp_path}/gt/",
            "TRACKERS_FOLDER": f"{tmp_path}/trackers/",
            "SPLIT_TO_EVAL": "val",
            "PRINT_CONFIG": False,
        }
    )
    dataset.global_tid_counter = 1  # TrackEval takes a match with track 0 for none

    def official(limit):
        metric = trackeval.metrics.TrackMAP(
            {
                "USE_AREA_RANGES": False,
                "USE_TIME_RANGES": False,
                "IOU_THRESHOLDS": IOU_THRESHOLDS,
                "MAX_DETECTIONS": limit,
                "PRINT_CONFIG": False,
            }
        )
        per_class = {}
        for name in dataset.class_list:
            per_video = {}
            for video in dataset.seq_list:
                data = dataset.get_preprocessed_seq_data(copy.deepcopy(raw[video]), name)
                per_video[video] = metric.eval_sequence(data)
            per_class[name] = metric.combine_sequences(per_video)
        # its own mean over classes writes over what it reads
        valid = [result for result in per_class.values() if result["AP_all"][0] > -1]
        return [np.mean([result[field] for result in valid], axis=0) for field in ("AP_all", "AR_all")]

    raw = {video: dataset.get_raw_seq_data("ours", video) for video in dataset.seq_list}
    precision, _ = official(100)
    (_, recall_of_1), (_, recall_of_10) = official(1), official(10)
    wanted = [precision.mean(), precision[0], precision[5], recall_of_1.mean(), recall_of_10.mean()]
    assert 0.1 < wanted[0] < 0.9
    assert ours(results, truth) == pytest.approx(wanted, abs=1e-6)
