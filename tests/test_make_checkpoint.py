"""`ausm_hf.checkpoints.make`: the package's checkpoint from training runs."""

import copy
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ausm_hf import AusmForUniversalSegmentation
from ausm_hf.checkpoints.make import make_checkpoint


@pytest.fixture
def runs(tmp_path, tiny_config):
    """Two finished runs of the same network."""
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        run = tmp_path / f"run{seed}"
        AusmForUniversalSegmentation(tiny_config).save_pretrained(run / "final")
        recipe = {"output_dir": str(run), "model": {"path": str(tmp_path / "before")}, "data": {"root": str(tmp_path)}}
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (run / "log.jsonl").write_text(f'{{"step": {seed}}}\n')
        paths.append(run)
    return paths


def test_the_mean_of_runs_is_stored_with_the_last_ones_recipe(runs, tmp_path):
    folder = make_checkpoint(runs, tmp_path / "of" / "these" / "made")
    first, second = (load_file(run / "final" / "model.safetensors") for run in runs)
    made = load_file(folder / "model.safetensors")
    assert made.keys() == first.keys()
    for name, tensor in made.items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, ((first[name] + second[name]) / 2).half())
    assert (folder / "log.jsonl").read_text() == '{"step": 1}\n'
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe == {"output_dir": "run1", "model": {"path": "before"}, "data": {"root": tmp_path.name}}
    assert not list(folder.glob("*.py"))
    AusmForUniversalSegmentation.from_pretrained(folder)


def test_an_older_checkpoint_is_replaced(runs, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "old.txt").write_text("old")
    for _ in range(2):
        make_checkpoint(runs, tmp_path / "made")
    assert {"config.json", "model.safetensors"} < {path.name for path in (tmp_path / "made").iterdir()}
    assert not (tmp_path / "made" / "old.txt").exists() and not list(tmp_path.glob(".*"))


def test_no_folder_of_the_sources_stays_in_the_recipe(runs, tmp_path):
    source = {"dataset": "video_folder", "arguments": {"root": str(tmp_path / "mine"), "exhaustive": True}}
    data = {"root": None, "sources": [source, {"dataset": "coco"}]}
    recipe = {"output_dir": str(runs[1]), "model": {"preset": "nano", "path": None}, "data": data}
    (runs[1] / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    made = yaml.safe_load((make_checkpoint(runs, tmp_path / "made") / "recipe.yaml").read_text())
    assert made["data"]["sources"][0]["arguments"] == {"root": "mine", "exhaustive": True}
    assert str(tmp_path) not in str(made)


def test_a_part_that_the_last_run_added_is_its_own(runs, tmp_path, tiny_config):
    config = copy.deepcopy(tiny_config)
    config.remember_appearance = False
    AusmForUniversalSegmentation(config).save_pretrained(runs[0] / "final")
    first, second = (load_file(run / "final" / "model.safetensors") for run in runs)
    made = load_file(make_checkpoint(runs, tmp_path / "made") / "model.safetensors")
    assert made.keys() == second.keys()
    scale, query = "model.history_encoder.appearance.scale", "model.id_vectors.weight"
    assert scale not in first and torch.equal(made[scale], second[scale].half())
    assert torch.equal(made[query], ((first[query] + second[query]) / 2).half())
    with pytest.raises(ValueError, match="networks of the runs differ"):
        make_checkpoint(runs[::-1], tmp_path / "other")


def test_runs_that_make_no_checkpoint(runs, tmp_path, tiny_config):
    config = copy.deepcopy(tiny_config)
    config.num_id_vectors += 1
    AusmForUniversalSegmentation(config).save_pretrained(runs[0] / "final")
    with pytest.raises(ValueError, match="networks of the runs differ"):
        make_checkpoint(runs, tmp_path / "made")
    shutil.rmtree(runs[0] / "final")
    with pytest.raises(ValueError, match="run0 has no folder `final`"):
        make_checkpoint(runs, tmp_path / "made")
    assert not (tmp_path / "made").exists()
