import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ausm_hf.data.davis import davis
from ausm_hf.data.prepare import prepare
from ausm_hf.data.stills import stills


@pytest.fixture
def packed(tmp_path, shared_data):
    """Two sequences and one set of stills of the real data."""
    source = tmp_path / "packed"
    for part, names in {"davis2016": ["dog-agility", "soccerball"], "stills": ["balloon"]}.items():
        (source / part).mkdir(parents=True)
        for path in (shared_data / part).iterdir():
            if path.stem in names:
                (source / part / path.name).symlink_to(path)
    return source


def test_prepare_agrees_with_the_script_beside_the_data(tmp_path, packed, shared_data):
    prepare(str(packed), str(tmp_path / "ours"))
    command = [sys.executable, shared_data / "unpack.py", tmp_path / "theirs", "--sequences"]
    subprocess.run([*command, "dog-agility", "soccerball"], check=True, capture_output=True)
    ours, theirs = tmp_path / "ours" / "davis", tmp_path / "theirs"
    files = sorted(p.relative_to(theirs) for p in theirs.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(ours) for p in ours.rglob("*") if p.is_file())
    assert len(files) == 2 * (25 + 48) + 2
    for name in files:
        if name.suffix == ".txt":
            assert (ours / name).read_text() == (theirs / name).read_text()
        elif name.stem == "00020":
            assert np.array_equal(np.array(Image.open(ours / name)), np.array(Image.open(theirs / name)))
    assert davis(str(ours), 2016, "dev")["video_id"] == ["dog-agility"]
    assert davis(str(ours), 2016, "train")["video_id"] == ["soccerball"]
    assert len(stills(str(tmp_path / "ours" / "stills" / "balloon"))) == 74


def test_what_is_half_written_is_never_left_in_place(tmp_path, packed):
    (packed / "davis2016" / "soccerball.zip").unlink()
    (packed / "davis2016" / "dog-agility.zip").rename(packed / "davis2016" / "soccerball.zip")
    (packed / "davis2016" / "dog-agility.mp4").unlink()
    with pytest.raises(ValueError, match="soccerball: .* frames, .* masks"):
        prepare(str(packed), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="has no folder 'davis2016'"):
        prepare(str(tmp_path / "nowhere"), str(tmp_path / "other"))
