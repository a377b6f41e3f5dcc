from pathlib import Path

import pytest

from ausm_hf.training.recipe import load_recipe, recipe_from_dict, recipe_to_dict

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


def values(**changes):
    return {"output_dir": "runs/x", "model": {"preset": "nano"}, **changes}


def test_defaults_and_round_trip():
    recipe = recipe_from_dict(values())
    assert recipe.optim.weight_decay == 0.05 and recipe.optim.backbone_lr_factor == 0.1
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe


def test_overrides_replace_what_the_file_says(tmp_path):
    (tmp_path / "r.yaml").write_text("output_dir: runs/x\nmodel: {preset: nano}\noptim: {lr: 1e-4, max_steps: 10}\n")
    recipe = load_recipe(
        tmp_path / "r.yaml", ["optim.lr=3e-4", "data.size=[96, 160]", "ema_decay=0.99", "model.overrides.max_age=5"]
    )
    assert recipe.optim.lr == 3e-4 and recipe.optim.max_steps == 10
    assert recipe.data.size == [96, 160] and recipe.ema_decay == 0.99
    assert recipe.model.overrides == {"max_age": 5}


def test_overrides_reach_into_lists(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "output_dir: x\nmodel: {preset: nano}\ndata: {sources: [{dataset: davis}, {dataset: coco}]}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml", ["data.sources.1.weight=0.5"])
    assert recipe.data.sources == [{"dataset": "davis"}, {"dataset": "coco", "weight": 0.5}]
    with pytest.raises(ValueError, match="^data.sources.2.weight: 2 is no place in a list of 2"):
        load_recipe(tmp_path / "r.yaml", ["data.sources.2.weight=0.5"])


def test_what_is_no_yaml_is_told(tmp_path):
    (tmp_path / "r.yaml").write_text("output_dir: runs/x\nmodel: {preset: nano}\n")
    with pytest.raises(ValueError, match=r"^override 'data.size=\[32,64' is no YAML: "):
        load_recipe(tmp_path / "r.yaml", ["data.size=[32,64"])
    (tmp_path / "r.yaml").write_text("output_dir: [runs/x\n")
    with pytest.raises(ValueError, match=r"^recipe .*r.yaml is no YAML: "):
        load_recipe(tmp_path / "r.yaml")


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    (tmp_path / "r.yaml").write_text("output_dir: runs/x\nmodel: {preset: nano}\noptim: {lr: 1e-4}\n")
    assert load_recipe(tmp_path / "r.yaml").optim.lr == 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "^colour: unknown key"),
        ({"optim": {"learning_rate": 1}}, "^optim.learning_rate: unknown key"),
        ({"optim": {"lr": "fast"}}, "^optim.lr: got 'fast'"),
        ({"optim": {"lr": float("inf")}}, r"^optim.lr: got inf \(float\), want a finite number"),
        ({"optim": {"max_steps": 1.5}}, "^optim.max_steps: got 1.5"),
        ({"optim": {"max_steps": True}}, "^optim.max_steps: got True"),
        ({"optim": 3}, "^optim: got 3"),
        ({"optim": {"betas": [0.9]}}, "^optim.betas"),
        ({"optim": {"schedule": "zigzag"}}, "^optim.schedule: got 'zigzag'"),
        ({"optim": {"schedule": "step"}}, "^optim.milestones: empty"),
        ({"optim": {"milestones": [5]}}, "^optim.milestones: given, but optim.schedule 'linear' has none"),
        ({"data": {"size": [100, 160]}}, "^data.size"),
        ({"data": {"size": ["a", 160]}}, r"^data.size\[0\]"),
        ({"data": {"mixture": "nano"}}, "^data.root: missing"),
        ({"data": {"mixture": "nano", "root": "/no/such/folder"}}, "^data.root: there is no folder"),
        ({"data": {"sources": []}}, "^data.sources: empty"),
        ({"data": {"root": ".", "sources": [{"dataset": "davis"}]}}, "^data.root: given beside data.sources"),
        (
            {"data": {"sources": [{"dataset": "davis", "arguments": {"root": "/no/such"}}]}},
            r"^data.sources\[0\].arguments.root: there is no file or folder /no/such",
        ),
        ({"model": {"preset": "huge"}}, "^model.preset: got 'huge'"),
        ({"model": {"preset": "nano", "reinitialize": ["model."]}}, "^model.reinitialize: given, but without"),
        ({"model": {"preset": "nano", "path": "a/b"}}, "^model: want one of .* got both"),
        ({"seed": -1}, "^seed: got -1, want from 0 to 4294967295"),
        ({"model": {"path": "/no/such/folder"}}, "^model.path: there is no folder"),
        ({"model": {"preset": "base", "imagenet_backbone": True}}, "^model.imagenet_backbone"),
        ({"model": {"preset": "nano", "label_sets": {"mine": []}}}, r"^model.label_sets.mine: got \[\]"),
        ({"model": {"preset": "nano", "label_sets": {"mine": None}}}, "^model.label_sets.mine: has no labels"),
        ({"model": {"preset": "nano", "label_sets": {}}}, "^model.label_sets: empty"),
        (
            {"model": {"preset": "nano", "label_sets": {"my-fish": ["cod"]}}},
            "^model.label_sets.my-fish: want a name of letters, digits and _ that begins with no digit",
        ),
        ({"model": {"preset": "nano", "label_sets": {1: ["cod"]}}}, "^model.label_sets.1: want a name of letters"),
        ({"model": {"preset": "nano", "overrides": {"label_sets": {}}}}, "^model.overrides.label_sets"),
        ({"history_corruption": 2}, "^history_corruption: got 2"),
        ({"mode": "sideways"}, "^mode: got 'sideways'"),
        ({"mode": "iterative", "scheduled_sampling": 0.5}, "^mode: 'iterative'"),
        ({"output_dir": 3}, "^output_dir: got 3"),
    ],
)
def test_a_bad_recipe_names_the_key(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe_from_dict(values(**changes))


def test_output_dir_is_needed():
    with pytest.raises(ValueError, match="^output_dir: missing"):
        recipe_from_dict({"model": {"preset": "nano"}})


def test_override_without_value(tmp_path):
    (tmp_path / "r.yaml").write_text("output_dir: runs/x\nmodel: {preset: nano}\n")
    with pytest.raises(ValueError, match="want key=value"):
        load_recipe(tmp_path / "r.yaml", ["optim.lr"])
    with pytest.raises(ValueError, match="^optim.lr.fast: there is a value where fast wants keys"):
        load_recipe(tmp_path / "r.yaml", ["optim.lr=1", "optim.lr.fast=1"])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid_but_for_the_data(path):
    """All that a recipe of ours may lack is the user's data, or the stage before."""
    try:
        load_recipe(path)
    except ValueError as error:
        assert "there is no f" in str(error), error
