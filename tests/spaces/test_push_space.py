"""The Space on the Hub: pushed by the example, then started from nothing but what was pushed."""

import os
import re
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def test_the_spaces_header_is_what_the_hub_reads():
    text = (ROOT / "spaces" / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert (header["sdk"], header["app_file"]) == ("gradio", "app.py")
    assert len(header["short_description"]) <= 60
    gradio = pytest.importorskip("gradio", reason="pip install 'ausm-hf[demo]'")
    major, minor = header["sdk_version"].split(".")[:2]
    assert gradio.__version__.startswith(f"{major}.") and int(minor) <= int(gradio.__version__.split(".")[1])
    assert 'Client("user/name")' in text


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_push_and_start_from_what_was_pushed(hub, tmp_path, moving_square):
    pytest.importorskip("gradio", reason="pip install 'ausm-hf[demo]'")
    environment = hub.environment(tmp_path / "hub-home")
    command = [sys.executable, ROOT / "examples" / "push_space.py", "user/ausm"]
    for model, variables in ([], {}), (["--model", "user/mine"], {"AUSM_MODEL": "user/mine"}), ([], {}):
        # Each push replaces the one before.
        pushed = subprocess.run([*command, *model], capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert pushed.returncode == 0, pushed.stderr
        assert pushed.stdout.strip() == f"{hub.url}/spaces/user/ausm"
        assert hub.variables.get("spaces/user/ausm", {}) == variables
    files = hub.repos["spaces/user/ausm"]
    (wheel,) = [name for name in files if name.endswith(".whl")]
    assert set(files) == {"app.py", "README.md", "requirements.txt", wheel}
    assert files["requirements.txt"].decode().strip() == (
        f"ausm-hf[demo] @ {hub.url}/spaces/user/ausm/resolve/main/{wheel}"
    )
    assert 'Client("user/ausm")' in files["README.md"].decode()
    assert not [name for name, content in files.items() if str(ROOT).encode() in content]

    # A new environment in which the package comes from the Space, and what it needs from this one.
    space = tmp_path / "space"
    space.mkdir()
    for name in ("app.py", "requirements.txt"):
        (space / name).write_bytes(files[name])
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site]
    done = subprocess.run([*install, "-r", space / "requirements.txt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    clean = {name: value for name, value in environment.items() if name in ("PATH", "HF_ENDPOINT", "HF_HOME")}
    process = subprocess.Popen(
        [python, "app.py"],
        cwd=space,
        env={**clean, "GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        from gradio_client import Client, handle_file

        from ausm_hf import VideoWriter

        lines = []
        while not re.search(rf"http://\S+:{port}", "".join(lines)):
            lines.append(process.stdout.readline())
            assert lines[-1], "".join(lines)
        time.sleep(1)
        with VideoWriter(tmp_path / "square.mp4", 10, (48, 64)) as writer:
            for frame in moving_square[0]:
                writer.write(frame)
        client = Client(f"http://127.0.0.1:{port}", verbose=False, download_files=tmp_path / "downloads")
        *_, table = client.predict(handle_file(tmp_path / "square.mp4"), 0.5, 10, "object", api_name="/find")
        assert isinstance(table, list)
        maps = Path(f"/proc/{process.pid}/environ").read_text() if os.path.exists("/proc") else ""
        assert "PYTHONPATH" not in maps
    finally:
        process.terminate()
        process.wait(60)
