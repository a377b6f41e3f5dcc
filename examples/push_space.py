"""Puts the demo on the Hub as a Space. Log in once with `hf auth login`.

    python examples/push_space.py me/ausm
    python examples/push_space.py me/ausm --model me/my-ausm     # a checkpoint of yours instead of ausm-nano

The package of this checkout goes along as a wheel, which the Space's requirements.txt names by its address; so the
Space is public: nobody could install from a private one.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

ROOT = Path(__file__).parents[1]
REQUIREMENT = "ausm-hf[demo]"


def push_space(repo_id: str, model: str | None = None) -> str:
    """Puts `spaces/` and the package on the Hub, in one commit. Returns where the Space is."""
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, str(ROOT)]
        subprocess.run(build, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        address = f"{api.endpoint}/spaces/{repo_id}/resolve/main/{wheel.name}"
        for name in ("app.py", "README.md", "requirements.txt"):
            text = (ROOT / "spaces" / name).read_text(encoding="utf-8")
            if name == "requirements.txt":
                text = text.replace(REQUIREMENT, f"{REQUIREMENT} @ {address}")
            text = re.sub(r'Client\("user/name"\)', f'Client("{repo_id}")', text)
            (Path(folder) / name).write_text(text, encoding="utf-8")
        url = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", exist_ok=True, private=False)
        if model:
            api.add_space_variable(repo_id, "AUSM_MODEL", model)
        elif "AUSM_MODEL" in api.get_space_variables(repo_id):
            api.delete_space_variable(repo_id, "AUSM_MODEL")
        api.upload_folder(
            repo_id=repo_id, repo_type="space", folder_path=folder, commit_message="Upload the AUSM demo",
            delete_patterns="*.whl",
        )  # fmt: skip
    return str(url)


def main() -> None:
    parser = argparse.ArgumentParser(description="Put the demo on the Hub as a Space.")
    parser.add_argument("repo_id", help="user/name")
    parser.add_argument("--model", help="a checkpoint on the Hub (default: the ausm-nano of the package)")
    print(push_space(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
