import numpy as np
import pytest
from PIL import Image
from trees import index_mask, write_frames, write_mask

from ausm_hf.data.check import check_clips, find_problems
from ausm_hf.data.clips import clip_object, clip_row, clips_from_rows, file


def test_all_problems_are_reported_together(tmp_path):
    write_frames(tmp_path / "frames", [str(t) for t in range(9)])
    for t in range(9):
        write_mask(tmp_path / "masks" / f"{t}.png", index_mask(t, [1]))
    frames = [file(tmp_path / "frames" / f"{t}.png") for t in range(9)]
    masks = [file(tmp_path / "masks" / f"{t}.png") for t in range(9)]
    sound = clips_from_rows([clip_row("sound", frames, [], annotations=masks)])
    check_clips(sound, open_files=True)

    for t in range(7):
        (tmp_path / "frames" / f"{t}.png").unlink()
    (tmp_path / "masks" / "7.png").write_bytes(b"")
    whole = (tmp_path / "masks" / "8.png").read_bytes()
    (tmp_path / "masks" / "8.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "v.mp4").write_bytes(b"no video")
    (tmp_path / "v_manual.json").write_text("{")
    rows = [
        clip_row("files", frames, [], annotations=masks),
        clip_row("lazy", [], [], video=file(tmp_path / "v.mp4"), annotation_file=str(tmp_path / "v_manual.json")),
        clip_row("nothing", [], []),
        clip_row("unlabelled", frames[7:], [clip_object(1)], annotations=[None, None]),
        clip_row("objectless", frames[7:], []),
    ]
    clips = clips_from_rows(rows)
    missing = [str(tmp_path / "frames" / f"{t}.png") for t in range(7)]
    names = {"no frames": ["nothing"], "no masks": ["unlabelled"], "no objects": ["objectless"]}
    empty = {"empty": [str(tmp_path / "masks" / "7.png")]}
    assert find_problems(clips) == {"missing": missing} | empty | names
    broken = [str(tmp_path / name) for name in ("masks/8.png", "v.mp4", "v_manual.json")]
    assert find_problems(clips, open_files=True) == {"missing": missing, "broken": broken} | empty | names

    with pytest.raises(ValueError) as error:
        check_clips(clips, name="mine")
    message = str(error.value)
    assert "mine: problems in 5 videos" in message and "7 missing" in message and "and 2 more" in message
    assert "1 empty" in message and missing[4] in message and missing[5] not in message
    assert "objectless" not in message


def test_frames_of_16_bits_are_found(tmp_path):
    Image.fromarray(np.full((48, 64), 3000, np.uint16)).save(tmp_path / "0.png")
    write_mask(tmp_path / "m.png", index_mask(0, [1]))
    row = clip_row("v", [file(tmp_path / "0.png")], [], annotations=[file(tmp_path / "m.png")])
    (problem,) = find_problems(clips_from_rows([row]), open_files=True)["not to be loaded"]
    assert "0.png is of mode I;16; want 8 bits per channel" in problem
