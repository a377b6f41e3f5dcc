"""The wheel and the source distribution: what they hold, and that a stranger can install them."""

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.metadata import metadata
from pathlib import Path

import pytest

import ausm_hf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "ausm_hf"


def source_files(*folders: str) -> set[str]:
    """What git knows and what it would not ignore."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("this is no git checkout")
    return {name for name in listing.stdout.splitlines() if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> dict[str, Path]:
    """The source distribution, and the wheel that is made from it."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", folder, ROOT], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(distributions):
    names = set(zipfile.ZipFile(distributions["wheel"]).namelist())
    about = {name for name in names if ".dist-info/" in name}
    wanted = {name.removeprefix("src/") for name in source_files("src")}
    assert names - about == wanted
    assert {"ausm_hf/py.typed", "ausm_hf/checkpoints/ausm-nano/model.safetensors"} <= wanted
    licences = {"LICENSE", "MODEL_CARD.md"}  # of the code, and of the checkpoint
    assert {Path(name).name for name in about} == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", *licences}


@pytest.mark.slow
def test_the_source_distribution_holds_the_repository(distributions):
    with tarfile.open(distributions["sdist"]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    wanted = {name for name in source_files() if not name.startswith(".")}
    assert names - {"PKG-INFO", ".gitignore"} == wanted


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(distributions, tmp_path):
    """With the requirements borrowed from here, without this checkout."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", distributions["wheel"]]
    subprocess.run(install, check=True, cwd=tmp_path)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    own = tmp_path / "venv" / "lib" / f"python{version}" / "site-packages"
    # Later than its own packages, and without the hooks of editable installs, which only whole folders have.
    (own / "zz_borrowed.pth").write_text(f"import sys; sys.path.append({sysconfig.get_paths()['purelib']!r})\n")
    code = """
import ausm_hf
from transformers import pipeline
segment = pipeline("video-segmentation")
import numpy as np
print(ausm_hf.__file__)
print(len(segment(np.zeros((2, 64, 64, 3), dtype=np.uint8))), "frames")
"""
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *_, where, frames = done.stdout.splitlines()
    assert Path(where).is_relative_to(own) and frames == "2 frames"
    done = subprocess.run([own.parents[2] / "bin" / "ausm", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "segment" in done.stdout


def test_it_says_that_it_is_typed_and_where_it_runs():
    assert (PACKAGE / "py.typed").is_file()
    about = metadata("ausm-hf")
    assert about["Requires-Python"] == ">=3.10"
    assert {"cuda", "train", "eval", "demo", "onnx", "dev"} <= set(about.get_all("Provides-Extra"))
    assert about["License-Expression"] == "Apache-2.0 AND CC-BY-NC-4.0"


def test_a_missing_extra_fails_with_the_install_line(tmp_path):
    code = "import sys; sys.modules['gradio'] = None\nfrom ausm_hf.cli import main; sys.exit(main(['demo']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert 'pip install "ausm-hf[demo]"' in done.stderr and "Traceback" not in done.stderr


def test_the_citation_names_this_version():
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ausm_hf.__version__ and citation["license"] == "Apache-2.0"
    assert citation["preferred-citation"]["title"] == "Autoregressive Universal Video Segmentation Model"
