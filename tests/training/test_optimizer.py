import math

import pytest
import torch

from ausm_hf.training.optimizer import build_optimizer, learning_rate_factor, set_learning_rate
from ausm_hf.training.recipe import OptimRecipe


def settings_by_name(model, optimizer):
    name_of = {id(p): name for name, p in model.named_parameters()}
    return {name_of[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


def test_parameter_groups(tiny):
    model = tiny.TinyModel(tiny.TinyConfig())
    groups = settings_by_name(model, build_optimizer(model, OptimRecipe(lr=1.0, weight_decay=0.05)))
    assert set(groups) == {name for name, _ in model.named_parameters()}
    decaying = {name for name, group in groups.items() if group["weight_decay"] == 0.05}
    assert decaying == {"backbone.0.weight", "head.weight"}
    assert {group["weight_decay"] for name, group in groups.items() if name not in decaying} == {0.0}
    for name, group in groups.items():
        assert group["lr"] == pytest.approx(0.1 if name.startswith("backbone.") else 1.0)


def test_frozen_parameters_are_left_out(tiny):
    model = tiny.TinyModel(tiny.TinyConfig())
    model.backbone.requires_grad_(False)
    groups = settings_by_name(model, build_optimizer(model, OptimRecipe()))
    assert groups and not any(name.startswith("backbone.") for name in groups)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(model, OptimRecipe())


def test_a_tied_parameter_is_there_once():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    parameters = [p for g in build_optimizer(model, OptimRecipe()).param_groups for p in g["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == 3


def test_schedules():
    def curve(**kwargs):
        recipe = OptimRecipe(warmup_steps=10, max_steps=110, **kwargs)
        return [learning_rate_factor(step, recipe) for step in range(110)]

    linear = curve(schedule="linear")
    assert linear[0] == 0.1 and linear[9] == 1.0 and linear[10] == 1.0
    assert linear[60] == pytest.approx(0.5) and linear[109] == pytest.approx(0.01)
    cosine = curve(schedule="cosine")
    assert cosine[35] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    stepped = curve(schedule="step", milestones=[50, 80])
    assert (stepped[49], stepped[50], stepped[80]) == pytest.approx((1.0, 0.1, 0.01))
    assert set(curve(schedule="constant")[9:]) == {1.0}


def test_learning_rate_reaches_all_groups(tiny):
    model = tiny.TinyModel(tiny.TinyConfig())
    recipe = OptimRecipe(lr=1.0, warmup_steps=4, max_steps=10)
    optimizer = build_optimizer(model, recipe)
    set_learning_rate(optimizer, 1, recipe)
    groups = settings_by_name(model, optimizer)
    assert groups["head.weight"]["lr"] == pytest.approx(0.5)
    assert groups["backbone.0.weight"]["lr"] == pytest.approx(0.05)
