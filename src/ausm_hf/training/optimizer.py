"""AdamW's parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from .recipe import OptimRecipe


def is_backbone_parameter(name: str) -> bool:
    """Whether the parameter of that dotted name belongs to the (pretrained) backbone."""
    return "backbone" in name.split(".")


def build_optimizer(model: nn.Module, recipe: OptimRecipe) -> torch.optim.AdamW:
    """AdamW over the parameters that need a gradient.

    Weight decay is for matrices and kernels. Norms, biases, embeddings (`nn.Embedding` and learned vectors or
    queries, i.e. bare parameters that are not the weight of a layer) and parameters flagged `_no_weight_decay` have
    none. The backbone learns at `lr * backbone_lr_factor`.

    Returns:
        AdamW whose groups carry "base_lr", the value that `set_learning_rate` scales.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    # A tied parameter shows up under every module that holds it; the optimizer wants it once.
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            backbone = is_backbone_parameter(f"{module_name}.{name}")
            groups.setdefault((backbone, _decays(module, name, parameter)), []).append(parameter)
    param_groups = []
    for (backbone, decays), parameters in sorted(groups.items(), key=lambda item: item[0]):
        lr = recipe.lr * (recipe.backbone_lr_factor if backbone else 1.0)
        decay = recipe.weight_decay if decays else 0.0
        param_groups.append({"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": decay})
    if not param_groups:
        raise ValueError("model: no parameter needs a gradient, there is nothing to train")
    first, second = recipe.betas
    return torch.optim.AdamW(param_groups, lr=recipe.lr, betas=(first, second))


def learning_rate_factor(step: int, recipe: OptimRecipe) -> float:
    """What the highest learning rate is multiplied with at optimizer step `step` (0-based)."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    if recipe.schedule == "step":
        return 0.1 ** sum(step >= milestone for milestone in recipe.milestones)
    if recipe.schedule == "constant":
        return 1.0
    progress = (step - recipe.warmup_steps) / max(1, recipe.max_steps - recipe.warmup_steps)
    return 1 - progress if recipe.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, recipe: OptimRecipe) -> None:
    """Sets the learning rate of every group for optimizer step `step` (0-based). The schedule has no state."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * learning_rate_factor(step, recipe)


def _decays(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    if getattr(parameter, "_no_weight_decay", False) or isinstance(module, nn.Embedding):
        return False
    # Biases, and the weights of every kind of norm, are vectors. What is left are the weights of layers; a bare
    # parameter of another name (learned queries, ID vectors, level or position embeddings) is an embedding.
    return parameter.ndim > 1 and name.endswith("weight")
