"""Puts a trained checkpoint on the Hub, with a model card. Log in once with `hf auth login`.

    python examples/push_to_hub.py runs/finetune/final me/my-ausm --license cc-by-nc-4.0
    python examples/push_to_hub.py runs/stage3_swin_b/final me/ausm-base --results ausm-evaluation/*/results.json

Then, anywhere: `pipeline("video-segmentation", model="me/my-ausm", trust_remote_code=True)`, or
`AutoModelForUniversalSegmentation.from_pretrained("me/my-ausm", trust_remote_code=True)`.
"""

import argparse

from ausm_hf.checkpoint import push_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description="Put a trained checkpoint on the Hub.")
    parser.add_argument("folder", help="the checkpoint, e.g. the folder `final` of a training run")
    parser.add_argument("repo_id", help="user/name")
    parser.add_argument("--results", nargs="*", default=[], help="results.json files of `ausm evaluate`, for the card")
    parser.add_argument("--license", help="of the weights, e.g. apache-2.0")
    parser.add_argument("--private", action="store_true", default=None, help="make a private repository")
    arguments = parser.parse_args()
    print(push_checkpoint(**vars(arguments)))


if __name__ == "__main__":
    main()
