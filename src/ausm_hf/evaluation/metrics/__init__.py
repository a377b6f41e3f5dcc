"""The scores of the field as `evaluate` modules: `vos_jf`, `youtube_vos_g`, `vis_ap` and `davis16_unsupervised`.

    metric = load_metric("vos_jf")          # offline; the same as evaluate.load(metric_path("vos_jf"))
    write_space("vos_jf", "vos_jf")         # a folder that is a Space: evaluate.load("user/vos_jf") once it is pushed

The arithmetic is in `jf.py` and `video_ap.py`, plain functions and classes that know nothing of `evaluate`; the
modules bring it into `evaluate`'s form. `evaluate` copies a module, and the neighbours that the module itself imports,
to its cache and runs the copy, with or without this package installed: so these files import no others.
"""

import html
import re
import shutil
import tempfile
from pathlib import Path

from ...files import WholeFolder

METRICS = ("vos_jf", "youtube_vos_g", "vis_ap", "davis16_unsupervised")


def metric_path(name: str) -> str:
    """Path of the file of a metric, for `evaluate.load`.

    Args:
        name (`str`): One of `METRICS`.

    Raises:
        ValueError: If there is no such metric.
    """
    if name not in METRICS:
        raise ValueError(f"`name` is {name!r}; it must be one of {', '.join(METRICS)}.")
    return str(Path(__file__).with_name(f"{name}.py"))


def load_metric(name: str, config_name: str | None = None):
    """Loads a metric from this package, with no network.

    Args:
        name (`str`): One of `METRICS`.
        config_name (`str`, *optional*): A configuration; `vos_jf` has `"prompted"` and `"best-track"`.

    Returns:
        `evaluate.Metric`: The metric.
    """
    import evaluate

    return evaluate.load(metric_path(name), config_name)


def write_space(name: str, folder: str | Path) -> Path:
    """Writes a metric as a Space of the Hub: its file, those it needs, a card, a page and its requirements.

    Args:
        name (`str`): One of `METRICS`.
        folder (`str` or `Path`): Where to; it must not exist, or be empty.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If there is no such metric or the folder is not empty.
    """
    source, folder = Path(metric_path(name)), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`folder` is {folder}, which is there and not empty.")
    neighbours = re.findall(r"^from \.(\w+) import", source.read_text(encoding="utf-8"), flags=re.MULTILINE)
    info = load_metric(name).info
    requirements = ["evaluate", "datasets", "numpy", "pycocotools" if "video_ap" in neighbours else "scipy"]
    sections = {"Use": info.inputs_description, "Citation": info.citation}

    with WholeFolder(folder) as whole:
        for file in [source, *(source.with_name(f"{neighbour}.py") for neighbour in neighbours)]:
            shutil.copyfile(file, whole.partial / file.name)
        (whole.partial / "requirements.txt").write_text(
            "".join(f"{line}\n" for line in requirements), encoding="utf-8"
        )
        (whole.partial / "README.md").write_text(
            f"---\ntitle: {name}\nsdk: static\nlicense: apache-2.0\ntags:\n- evaluate\n- metric\n---\n\n# {name}\n"
            f"{info.description}\n"
            + "\n".join(f"## {title}\n\n```text\n{text.strip()}\n```\n" for title, text in sections.items()),
            encoding="utf-8",
        )
        (whole.partial / "index.html").write_text(
            f'<!doctype html><meta charset="utf-8"><title>{name}</title>\n<h1>{name}</h1>\n'
            f"<p>{html.escape(info.description.strip())}</p>\n"
            + "\n".join(
                f"<h2>{title}</h2>\n<pre>{html.escape(text.strip())}</pre>" for title, text in sections.items()
            )
            + "\n",
            encoding="utf-8",
        )
    return folder


def push_metric_to_hub(name: str, repo_id: str, **kwargs) -> str:
    """Pushes a metric to the Hub as a Space, from where `evaluate.load(repo_id)` loads it.

    Args:
        name (`str`): One of `METRICS`.
        repo_id (`str`): `user/name`; `evaluate` finds the metric only if the repository is named like it.
        kwargs: Passed to [`~huggingface_hub.HfApi`], such as `token`.

    Returns:
        `str`: URL of the commit.

    Raises:
        ValueError: If there is no such metric, or the repository has another name.
    """
    from huggingface_hub import HfApi

    metric_path(name)
    if repo_id.count("/") != 1 or repo_id.split("/")[1] != name:
        raise ValueError(f"`repo_id` is {repo_id!r}; it must be 'user/{name}', or `evaluate` won't find the metric.")
    api = HfApi(**kwargs)
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_space(name, Path(temporary) / name)
        api.create_repo(repo_id, repo_type="space", space_sdk="static", exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, repo_type="space").commit_url)
