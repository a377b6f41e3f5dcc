"""J and F: by eye on 4 x 4 masks, and against vos-benchmark and TrackEval."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import distance_transform_edt, gaussian_filter

from ausm_hf.evaluation.metrics.jf import (
    SequenceScorer,
    _dilate,
    boundary_accuracy,
    region_similarity,
    score_sequence,
    statistics,
    summarize,
)


def picture(*rows: str) -> np.ndarray:
    """A mask as one sees it: '.' is background, 'x' void, a digit an object."""
    return np.array([[0 if c == "." else 255 if c == "x" else int(c) for c in row] for row in rows], dtype=np.uint8)


EMPTY = picture("....", "....", "....", "....")
SQUARE = picture("....", ".11.", ".11.", "....")
RIGHT = picture("....", "..11", "..11", "....")
CORNER = picture("....", "....", "....", "...1")
FULL = picture("1111", "1111", "1111", "1111")


# ------------------------------------------------------------------------------------------------------- by eye


def test_j_by_eye():
    assert region_similarity(SQUARE, SQUARE) == 1
    assert region_similarity(RIGHT, SQUARE) == 2 / 6  # two pixels in common, six in either
    assert region_similarity(CORNER, SQUARE) == 0
    assert region_similarity(FULL, SQUARE) == 4 / 16
    assert region_similarity(EMPTY, EMPTY) == 1
    assert region_similarity(EMPTY, SQUARE) == region_similarity(SQUARE, EMPTY) == 0


def test_f_by_eye():
    # The outline lies half a pixel up and left of the true edge, and the images are so small that outlines may be one
    # pixel apart, up, down, left or right:
    #
    #   mask   outline        mask   outline        mask   outline
    #   ....   ###.           ....   .###           ....   ....
    #   .11.   #.#.           ..11   .#..           ....   ....
    #   .11.   ###.           ..11   .###           ....   ..##
    #   ....   ....           ....   ....           ...1   ..#.
    assert boundary_accuracy(SQUARE, SQUARE) == 1
    assert boundary_accuracy(RIGHT, SQUARE) == 1
    # All 3 outline pixels of the corner are near the square's outline; 3 of the 8 of the square are near the corner's.
    assert boundary_accuracy(CORNER, SQUARE) == pytest.approx(2 * 1 * (3 / 8) / (1 + 3 / 8))
    assert boundary_accuracy(SQUARE, CORNER) == pytest.approx(2 * 1 * (3 / 8) / (1 + 3 / 8))
    assert boundary_accuracy(EMPTY, EMPTY) == 1
    assert boundary_accuracy(EMPTY, SQUARE) == boundary_accuracy(SQUARE, EMPTY) == 0
    assert boundary_accuracy(FULL, EMPTY) == 1  # an image that is all object has no outline


def test_f_tolerance_is_a_closed_disk():
    pred, gt = np.zeros((40, 40), bool), np.zeros((40, 40), bool)
    pred[10, 10] = gt[13, 14] = True  # 5 = sqrt(3 * 3 + 4 * 4) pixels apart, and so are their outlines
    assert boundary_accuracy(pred, gt, bound_th=5) == 1
    assert boundary_accuracy(pred, gt, bound_th=4) < 1


@pytest.mark.parametrize("radius", range(1, 25))
def test_dilation_by_a_disk(radius):
    rng = np.random.default_rng(radius)
    for shape in ((80, 70), (1, 50), (3, 3)):
        bits = (1 << rng.integers(0, 8, shape) * (rng.random(shape) < 0.003)).astype(np.uint8) & 0xFE
        dilated = _dilate(bits, radius)
        for bit in range(8):
            absent = bits >> bit & 1 == 0
            wanted = distance_transform_edt(absent) <= radius if not absent.all() else np.zeros(shape, bool)
            assert np.array_equal(dilated >> bit & 1, wanted)


def test_void_pixels_do_not_count():
    void = picture("xxxx", "....", "....", "...x") == 255
    pred = picture("1111", ".11.", ".11.", "...1")
    assert region_similarity(pred, SQUARE) == 4 / 9
    assert region_similarity(pred, SQUARE, void) == 1
    assert boundary_accuracy(pred, SQUARE, void) == 1
    assert region_similarity(pred, SQUARE, np.ones((4, 4), bool)) == 1  # all void: both are empty

    gt = picture("xxxx", ".11.", ".11.", "...x")
    assert score_sequence([pred] * 3, [gt] * 3)[1].j.tolist() == [1]


def test_sequence_by_eye():
    two = picture("2...", ".11.", ".11.", "....")
    gt = [two, two, two, two, two]
    pred = [EMPTY, two, picture("2...", "..11", "..11", "...."), SQUARE, EMPTY]
    scores = score_sequence(pred, gt)
    assert list(scores) == [1, 2]
    assert scores[1].j.tolist() == [1, 2 / 6, 1]  # the first and the last frame are left out
    assert scores[2].j.tolist() == [1, 1, 0]
    assert scores[2].f.tolist() == [1, 1, 0]
    assert scores[1].first_frame == 1
    everything = score_sequence(pred, gt, skip_first=False, skip_last=False)
    assert everything[1].j.tolist() == [0, 1, 2 / 6, 1, 0]

    summary = summarize({"a": scores})
    assert summary["J"] == pytest.approx(((1 + 2 / 6 + 1) / 3 + 2 / 3) / 2)
    assert summary["J_recall"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert summary["J&F"] == pytest.approx((summary["J"] + summary["F"]) / 2)
    assert summary["sequences"]["a"]["objects"][2]["J"] == pytest.approx(2 / 3)
    assert summary["sequences"]["a"]["objects"][2]["frames"] == 3


def test_data_set_mean_weighs_objects_not_sequences():
    two = picture("2...", ".11.", ".11.", "....")
    summary = summarize({"a": score_sequence([two] * 3, [two] * 3), "b": score_sequence([EMPTY] * 3, [SQUARE] * 3)})
    assert summary["J"] == pytest.approx(2 / 3)
    assert summary["sequences"]["b"]["J"] == 0


def test_count_from():
    late = [EMPTY, EMPTY, EMPTY, SQUARE, SQUARE]  # the object comes in frame 3
    early = [EMPTY, EMPTY, SQUARE, SQUARE, SQUARE]  # and is predicted from frame 2 on

    def scored(count_from):
        score = score_sequence(early, late, False, False, count_from=count_from)[1]
        return score.first_frame, score.j.tolist()

    assert scored("start") == (0, [1, 1, 0, 1, 1])
    assert scored("first_seen") == (2, [0, 1, 1])
    assert scored("first_annotated") == (3, [1, 1])


def test_best_track_and_union():
    gt = [SQUARE] * 4
    # id 7 is right in three of four frames, id 9 in one; together they are right in all
    pred = [SQUARE * 7, SQUARE * 7, SQUARE * 7, SQUARE * 9]
    best = score_sequence(pred, gt, False, False, mode="best-track")
    assert best[1].predicted_id == 7
    assert best[1].j.tolist() == [1, 1, 1, 0]
    assert score_sequence(pred, gt, False, False, mode="union")[1].j.tolist() == [1, 1, 1, 1]
    # without the first two frames they tie, and the first wins
    assert score_sequence(pred[1:], gt[1:], True, False, mode="best-track")[1].predicted_id == 7
    # nothing found
    none = score_sequence([EMPTY] * 4, gt, False, False, mode="best-track")
    assert none[1].predicted_id is None and none[1].j.tolist() == [0, 0, 0, 0]


def test_best_track_pairs_one_to_one():
    left, right = picture("1...", "1...", "1...", "1..."), picture("...2", "...2", "...2", "...2")
    both = left + right
    one_track = (both != 0) * np.uint8(5)
    scores = score_sequence([one_track] * 2, [both] * 2, False, False, mode="best-track")
    assert sorted([scores[1].predicted_id is None, scores[2].predicted_id is None]) == [False, True]


def test_best_track_is_paired_by_region_and_outline():
    """As the DAVIS 2017 toolkit pairs in its unsupervised task: by the mean of J and F over the frames."""
    gt = np.zeros((120, 160), np.uint8)
    gt[20:100, 40:120] = 1
    striped, smaller = gt.copy(), np.zeros_like(gt)
    striped[24:96:8, 44:116] = 0  # the higher J, the lower F
    smaller[23:98, 42:118] = 2
    pred = [striped] * 4 + [smaller] * 4
    j, f = (
        [np.mean([measure(mask == i, gt == 1) for mask in pred]) for i in (1, 2)]
        for measure in (region_similarity, boundary_accuracy)
    )
    assert j[0] > j[1] and j[0] + f[0] < j[1] + f[1]
    score = score_sequence(pred, [gt] * 8, False, False, mode="best-track")[1]
    assert score.predicted_id == 2 and score.j.mean() == pytest.approx(j[1]) and score.f.mean() == pytest.approx(f[1])


def test_black_and_white_ground_truth():
    white = SQUARE * 255
    assert score_sequence([SQUARE] * 3, [white] * 3, mode="best-track", binary=True)[1].j.tolist() == [1]
    assert score_sequence([SQUARE * 4] * 3, [white] * 3, mode="union")[1].j.tolist() == [1]
    with pytest.raises(ValueError, match="`binary`"):
        score_sequence([SQUARE] * 3, [white] * 3, mode="best-track")


def test_statistics_by_hand():
    mean, recall, decay = statistics(np.array([1.0, 0.8, 0.6, 0.4, 0.5, 0.2, 0.1, 0.0]))
    assert mean == pytest.approx(0.45)
    assert recall == 3 / 8  # 0.5 itself is not above 0.5
    # quarters of 8 frames share their ends in the DAVIS toolkit: frames 0-2 (2.75 rounds to 3rd) and 5-7
    assert decay == pytest.approx((1 + 0.8 + 0.6) / 3 - (0.2 + 0.1 + 0.0) / 3)
    assert statistics(np.array([0.7])) == (0.7, 1.0, 0.0)
    long = np.linspace(1, 0, 400)  # 8-bit frame numbers would wrap around here
    assert statistics(long)[2] == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32, np.uint16, np.int64])
def test_any_integer_type(dtype):
    assert score_sequence([RIGHT.astype(dtype)] * 3, [SQUARE.astype(dtype)] * 3)[1].j.tolist() == [2 / 6]


def test_bools_that_are_255_inside():
    """As Pillow hands out 1-bit images."""
    inside = (SQUARE * 255).view(bool)
    assert list(score_sequence([inside] * 3, [SQUARE] * 3)) == [1]
    assert list(score_sequence([inside] * 3, [inside] * 3)) == [1]


def test_ids_may_be_large():
    big = SQUARE.astype(np.int32) * 1_000_000_007
    full = np.where(big > 0, big, 3)  # no background at all
    scores = score_sequence([full] * 3, [full] * 3)
    assert {k: v.j.tolist() for k, v in scores.items()} == {3: [1], 1_000_000_007: [1]}


def test_iterables_are_read_one_frame_at_a_time():
    alive = 0

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def masks():
        nonlocal alive
        for _ in range(20):
            frame = SQUARE.copy().view(Counted)
            alive += 1
            assert alive <= 4  # one of each kind, and the next one being made
            yield frame
            del frame

    assert len(score_sequence(masks(), masks())[1].j) == 18


# --------------------------------------------------------------------------------------------------- bad input


def test_one_report_of_all_problems():
    gt = [SQUARE] * 5
    pred = [SQUARE, np.zeros((4, 5), np.uint8), SQUARE * 3, SQUARE.astype(float)]
    with pytest.raises(ValueError) as error:
        score_sequence(pred, gt, name="bear")
    report = str(error.value)
    assert report.startswith("4 problems")
    assert "bear, frame 1: the prediction is 4 x 5, ground truth 4 x 4" in report
    assert "bear, frame 3: the prediction is float64" in report
    assert "bear: 4 predicted frames, 5 frames of ground truth" in report
    assert "bear: predicted id 3 (first in frame 2) is not in ground truth" in report


def test_other_bad_input():
    with pytest.raises(ValueError, match="no frame to score; it has 2 frames without the first and the last"):
        score_sequence([SQUARE] * 2, [SQUARE] * 2)
    with pytest.raises(ValueError, match="no object"):
        score_sequence([EMPTY] * 3, [EMPTY] * 3)
    with pytest.raises(ValueError, match="negative"):
        score_sequence([SQUARE.astype(int) - 1] * 3, [SQUARE] * 3)
    with pytest.raises(ValueError, match="`mode` is 'best'"):
        SequenceScorer(mode="best")
    with pytest.raises(ValueError, match="`count_from` is 'end'"):
        score_sequence([SQUARE] * 3, [SQUARE] * 3, count_from="end")
    with pytest.raises(ValueError, match="ground truth 4 x 4"):
        region_similarity(SQUARE[:3], SQUARE)
    with pytest.raises(ValueError, match="`void`"):
        boundary_accuracy(SQUARE, SQUARE, np.zeros((3, 3)))
    with pytest.raises(ValueError, match="nothing to take a mean over"):
        summarize({})


# ---------------------------------------------------------------------------------- against the official tools


def blobs(rng: np.random.Generator, frames: int, shape: tuple[int, int], ids: list[int]) -> list[np.ndarray]:
    """Smooth random shapes that move a little, and now and then vanish."""
    fields = np.stack([gaussian_filter(rng.standard_normal(shape), 5) for _ in range(len(ids) + 1)])
    fields[0] += 0.02
    values = np.array([0, *ids], dtype=np.uint8)
    out = []
    for _ in range(frames):
        fields = fields + 0.3 * np.stack([gaussian_filter(rng.standard_normal(shape), 5) for _ in fields])
        mask = values[fields.argmax(0)]
        if rng.random() < 0.2:
            mask[mask == rng.choice(ids)] = 0
        out.append(mask)
    return out


def noise(rng: np.random.Generator, frames: int, shape: tuple[int, int], ids: list[int]) -> list[np.ndarray]:
    return [rng.choice(np.array([0, *ids], np.uint8), size=shape) for _ in range(frames)]


def wrecked(masks: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """A prediction for `masks`: shifted by a few pixels, with holes, and empty in one frame."""
    out = [np.roll(mask, rng.integers(-3, 4, 2), axis=(0, 1)) for mask in masks]
    out = [np.where(rng.random(mask.shape) < 0.02, 0, mask).astype(np.uint8) for mask in out]
    out[rng.integers(len(out))][:] = 0
    return out


def cases(frames: int = 7) -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
    """Prediction and ground truth of several sequences, harmless and not."""
    rng = np.random.default_rng(0)
    made = {}
    for index, shape in enumerate([(60, 90), (41, 33), (130, 64)]):
        gt = blobs(rng, frames, shape, [1, 2, 5])
        made[f"blobs{index}"] = wrecked(gt, rng), gt
    gt = noise(rng, frames, (37, 50), [1, 2, 3, 4])
    made["noise"] = noise(rng, frames, (37, 50), [1, 2, 3, 4]), gt
    gt = blobs(rng, frames, (60, 90), [1, 2, 3])
    many = list(range(1, 21))
    made["twenty objects"] = noise(rng, frames, (30, 40), many), noise(rng, frames, (30, 40), many)
    permute = np.array([0, 3, 1, 2], np.uint8)
    made["permuted"] = [permute[mask] for mask in gt], gt
    made["nothing predicted"] = [np.zeros_like(mask) for mask in gt], gt
    made["late"] = gt, [np.zeros_like(gt[0])] * 3 + gt[3:]  # predicted before it is there
    one = np.zeros((20, 30), np.uint8)
    one[7, 9] = 1
    gone = np.zeros_like(one)
    made["one pixel, one frame"] = [gone, gone, one, one, gone, gone, gone], [gone, gone, one, gone, gone, gone, gone]
    full = np.ones_like(one)
    # an image that is all object has no outline
    made["whole image"] = [full, full, full, gone, full, full, full], [full, full, one, full, 2 * full, gone, full]
    edges = np.zeros((20, 30), np.uint8)
    edges[:, -1] = edges[-1] = 1
    corners = np.zeros((20, 30), np.uint8)
    corners[0, 0] = corners[0, -1] = corners[-1, 0] = corners[-1, -1] = 1
    made["borders"] = [edges, corners, edges, one, full, edges, edges], [corners, edges, edges, edges, edges, one, one]
    return made


CASES = cases()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("skip", [True, False])
def test_equals_vos_benchmark(name, skip):
    evaluator_module = pytest.importorskip("vos_benchmark.evaluator")
    pred, gt = CASES[name]
    evaluator = evaluator_module.Evaluator()
    for pred_mask, gt_mask in list(zip(pred, gt))[1:-1] if skip else zip(pred, gt):
        evaluator.feed_frame(pred_mask, gt_mask)
    official_j, official_f = evaluator.conclude()

    ours = score_sequence(pred, gt, skip, skip, count_from="first_seen")
    assert sorted(ours) == sorted(official_j)
    for object_id, score in ours.items():
        assert 100 * score.j.mean() == pytest.approx(official_j[object_id], abs=1e-6)
        assert 100 * score.f.mean() == pytest.approx(official_f[object_id], abs=1e-6)


def write_pngs(folder, masks):
    folder.mkdir(parents=True)
    for t, mask in enumerate(masks):
        image = Image.fromarray(mask)
        image.putpalette(list(range(256)) * 3)
        image.save(folder / f"{t:05d}.png")


def test_equals_trackeval(tmp_path):
    trackeval = pytest.importorskip("trackeval")
    rng = np.random.default_rng(1)
    sequences = dict(CASES)
    # what only TrackEval knows: void pixels, ids of its own, more tracks than objects
    pred, gt = CASES["blobs0"]
    voided = [mask.copy() for mask in gt]
    for mask in voided:
        mask[rng.random(mask.shape) < 0.05] = 255
        mask[10:20, 10:40] = 255
    voided[3][:] = 255
    sequences["void"] = pred, voided
    more = [np.where((mask == 0) & (rng.random(mask.shape) < 0.5), 9, mask * 3).astype(np.uint8) for mask in pred]
    sequences["own ids"] = more, gt
    for name, (pred, gt) in sequences.items():
        write_pngs(tmp_path / "gt" / name, gt)
        write_pngs(tmp_path / "trackers" / "ours" / "data" / name, pred)
    dataset = trackeval.datasets.DAVIS(
        {
            "GT_FOLDER": str(tmp_path / "gt"),
            "TRACKERS_FOLDER": str(tmp_path / "trackers"),
            "PRINT_CONFIG": False,
        }
    )
    metric = trackeval.metrics.JAndF()
    metric.optim_type = "J&F"  # pairs as the DAVIS 2017 toolkit does
    official, scores = {}, {}
    for name, (pred, gt) in sequences.items():
        raw = dataset.get_raw_seq_data("ours", name)
        official[name] = metric.eval_sequence(dataset.get_preprocessed_seq_data(raw, "general"))
        scores[name] = score_sequence(pred, gt, False, False, mode="best-track", name=name)
    summary = summarize(scores)
    together = {**summary["sequences"], "all": summary}
    official["all"] = metric.combine_sequences(official)
    for name, ours in together.items():
        for measure in ("J", "F"):
            for statistic in ("Mean", "Recall", "Decay"):
                mine = measure if statistic == "Mean" else f"{measure}_{statistic.lower()}"
                wanted = official[name][f"{measure}-{statistic}"]
                assert ours[mine] == pytest.approx(wanted, abs=1e-6), (name, measure, statistic)
        assert ours["J&F"] == pytest.approx(official[name]["J&F"], abs=1e-6)


def test_equals_vos_benchmark_on_real_masks(shared_data):
    """The first mask of a real sequence, copied onto all its frames."""
    evaluator_module = pytest.importorskip("vos_benchmark.evaluator")
    with zipfile.ZipFile(shared_data / "davis2016" / "lucia.zip") as archive:
        gt = [np.array(Image.open(io.BytesIO(archive.read(n)))).astype(np.uint8) for n in sorted(archive.namelist())]
    gt = gt[:20]
    evaluator = evaluator_module.Evaluator()
    for mask in gt[1:-1]:
        evaluator.feed_frame(gt[0], mask)
    official_j, official_f = evaluator.conclude()
    ours = score_sequence([gt[0]] * len(gt), gt)[1]
    assert 100 * ours.j.mean() == pytest.approx(official_j[1], abs=1e-6)
    assert 100 * ours.f.mean() == pytest.approx(official_f[1], abs=1e-6)
