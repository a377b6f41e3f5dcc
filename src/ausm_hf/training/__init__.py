"""Training: a recipe (YAML), a loop on Accelerate, checkpoints that resume exactly."""

from .loop import train
from .recipe import Recipe, load_recipe, recipe_from_dict

__all__ = ["Recipe", "load_recipe", "recipe_from_dict", "train"]
