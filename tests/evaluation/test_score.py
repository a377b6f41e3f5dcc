"""Scoring folders of PNGs, as a function and as a command."""

import json

import numpy as np
import pytest
from PIL import Image

from ausm_hf.evaluation.score import format_table, main, score_folder


def picture(*rows: str) -> np.ndarray:
    return np.array([[0 if c == "." else int(c) for c in row] for row in rows], dtype=np.uint8)


EMPTY = picture("....", "....", "....", "....")
SQUARE = picture("....", ".11.", ".11.", "....")
RIGHT = picture("....", "..11", "..11", "....")


def write(folder, masks):
    folder.mkdir(parents=True)
    for t, mask in enumerate(masks):
        Image.fromarray(mask).save(folder / f"{t:05d}.png")


@pytest.fixture
def folders(tmp_path):
    pred, gt = tmp_path / "pred", tmp_path / "gt"
    write(gt / "a", [SQUARE] * 4)
    write(gt / "b", [SQUARE] * 4)
    write(pred / "a", [EMPTY, SQUARE, RIGHT, EMPTY])
    write(pred / "b", [SQUARE * 5] * 4)
    return pred, gt


def test_folders(folders):
    pred, gt = folders
    result = score_folder(pred, gt, ["a"])
    assert result["J"] == pytest.approx((1 + 2 / 6) / 2)
    best = score_folder(pred, gt, mode="best-track")  # of which all frames count
    assert best["sequences"]["b"]["J"] == 1
    assert best["J"] == pytest.approx(((1 + 2 / 6) / 4 + 1) / 2)
    best = score_folder(pred, gt, mode="best-track", skip_first=True, skip_last=True)
    assert best["J"] == pytest.approx(((1 + 2 / 6) / 2 + 1) / 2)
    assert score_folder(pred, gt, mode="union", skip_first=False)["sequences"]["a"]["J"] == pytest.approx(
        (0 + 1 + 2 / 6) / 3
    )


def test_hidden_files_are_passed_over(folders):
    pred, gt = folders
    (gt / ".ipynb_checkpoints").mkdir()
    (gt / "a" / "._00001.png").write_bytes(b"of a Mac")
    assert score_folder(pred, gt, ["a"])["J"] == pytest.approx((1 + 2 / 6) / 2)
    assert score_folder(pred, gt, mode="best-track")["sequences"].keys() == {"a", "b"}


def test_tracks_of_black_and_white_truth_stay_apart(tmp_path):
    two = SQUARE.copy()
    two[:2] *= 2
    write(tmp_path / "gt" / "a", [SQUARE * 255] * 4)
    write(tmp_path / "pred" / "a", [EMPTY, two, two, EMPTY])
    ids = {"mode": "best-track", "binary": True}
    assert score_folder(tmp_path / "pred", tmp_path / "gt", **ids)["J"] == 0.5  # without the ends, one of two ids
    assert score_folder(tmp_path / "pred", tmp_path / "gt", mode="union")["J"] == 1
    with pytest.raises(ValueError, match="is not in ground truth"):
        score_folder(tmp_path / "pred", tmp_path / "gt", binary=True)


def test_black_and_white_predictions(tmp_path):
    for folder in ("pred", "gt"):
        write(tmp_path / folder / "a", [SQUARE * 255] * 3)
    write(tmp_path / "coloured" / "a", [np.stack([SQUARE * 255] * 3, -1)] * 3)
    for pred in ("pred", "coloured"):
        assert score_folder(tmp_path / pred, tmp_path / "gt", binary=True)["J"] == 1


def test_kinds_of_png(tmp_path):
    """1-bit, grey, 16-bit and palette files, whatever their colours."""
    palette = Image.fromarray(SQUARE)
    palette.putpalette([0, 0, 0, 255, 10, 10] + [0] * 762)
    kinds = {
        "1-bit": Image.fromarray(SQUARE.astype(bool)),
        "grey": Image.fromarray(SQUARE),
        "16-bit": Image.fromarray(SQUARE.astype(np.uint16)),
        "palette": palette,
    }
    for name, image in kinds.items():
        (tmp_path / "pred" / name).mkdir(parents=True)
        write(tmp_path / "gt" / name, [SQUARE] * 3)
        for t in range(3):
            image.save(tmp_path / "pred" / name / f"{t:05d}.png")
    assert score_folder(tmp_path / "pred", tmp_path / "gt")["J"] == 1
    write(tmp_path / "white" / "a", [SQUARE * 255] * 3)
    write(tmp_path / "found" / "a", [SQUARE] * 3)
    assert score_folder(tmp_path / "found", tmp_path / "white", binary=True)["J"] == 1


def test_frames_count_in_their_natural_order(tmp_path):
    """The last frame, which DAVIS leaves out, is 10.png and not 9.png."""
    for folder, last in (("gt", SQUARE), ("pred", EMPTY)):
        write(tmp_path / folder / "a", [SQUARE] * 10 + [last])
        for path in (tmp_path / folder / "a").iterdir():
            path.rename(path.with_stem(str(int(path.stem))))
    assert score_folder(tmp_path / "pred", tmp_path / "gt")["J"] == 1


def test_sparse_ground_truth(folders):
    pred, gt = folders
    (gt / "a" / "00001.png").unlink()
    assert score_folder(pred, gt, ["a"])["J"] == pytest.approx(2 / 6)  # frames 0, 2, 3 are left


def test_one_report_of_all_problems(folders):
    pred, gt = folders
    (pred / "a" / "00001.png").unlink()
    (pred / "a" / "00003.png").unlink()
    Image.fromarray(SQUARE[:3]).save(pred / "a" / "00002.png")
    (pred / "b" / "00000.png").write_text("not a PNG")
    write(gt / "c", [SQUARE] * 4)
    write(gt / "d", [])
    write(pred / "e", [SQUARE] * 4)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(pred / "b" / "00001.png")
    with pytest.raises(ValueError) as error:
        score_folder(pred, gt)
    report = str(error.value)
    for problem in (
        "a: 2 of 4 frames are not predicted: 00001.png, 00003.png",
        "a, frame 00002.png: the prediction is 3 x 4, ground truth 4 x 4",
        "b/00000.png can't be read: cannot identify image file",
        "b/00001.png is a mask of mode RGB; each pixel must be the number of its object",
        "b: predicted id 5",
        "c: not predicted",
        "d: no ground truth",
        "e: predicted, but not in ground truth",
    ):
        assert problem in report
    with pytest.raises(ValueError, match="`pred_dir`"):
        score_folder(pred / "nowhere", gt)
    with pytest.raises(ValueError, match="`mode` is 'best'"):
        score_folder(pred, gt, mode="best")


def test_command(folders, tmp_path, capsys):
    pred, gt = folders
    names, out = tmp_path / "dev.txt", tmp_path / "scores.json"
    names.write_text("a\nb\n")
    main([str(pred), str(gt), "--sequences", str(names), "--mode", "best-track", "--json", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["sequence", "a", "b", "mean"]
    assert lines[1].split()[:4] == ["a", "1", "41.7", "33.3"]
    assert json.loads(out.read_text())["sequences"]["a"]["J"] == pytest.approx(1 / 3)
    with pytest.raises(SystemExit, match="b: predicted id 5"):
        main([str(pred), str(gt)])


def test_table_is_in_percent(folders):
    pred, gt = folders
    table = format_table(score_folder(pred, gt, ["a"]))
    assert table.splitlines()[-1].split()[:4] == ["mean", "1", "83.3", "66.7"]
