"""Trains AUSM from a recipe. Copy this file and change what you need.

    python examples/train.py examples/recipes/nano.yaml data.root=data/nano optim.max_steps=2000
    accelerate launch --num_processes 4 examples/train.py examples/recipes/stage1_coco_pseudo_swin_t.yaml

If the recipe's `output_dir` holds a checkpoint, training goes on from it.
"""

import argparse

from ausm_hf.training import load_recipe, train


def main() -> None:
    parser = argparse.ArgumentParser(description="Train AUSM from a recipe.")
    parser.add_argument("recipe", help="a YAML file, see examples/recipes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces what the recipe says")
    arguments = parser.parse_args()
    final = train(load_recipe(arguments.recipe, arguments.overrides))
    print(f"trained: {final}")


if __name__ == "__main__":
    main()
