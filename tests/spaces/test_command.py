"""`ausm demo`."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ausm_hf.cli import main


@pytest.mark.parametrize("missing", ["gradio", "skimage"])
def test_without_what_it_needs_it_says_how_to_install_it(missing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "skimage":  # found missing only when the example clips are made

        def launch(*args):
            import skimage  # noqa: F401

        monkeypatch.setattr("ausm_hf.demo.launch.launch", launch)
    with pytest.raises(SystemExit) as caught:
        main(["demo"])
    assert caught.value.code == 2
    message = f'ausm: error: the demo needs {missing}, which is not installed: pip install "ausm-hf[demo]"'
    assert capsys.readouterr().err.strip() == message


def test_its_options_go_to_the_demo(monkeypatch):
    asked = []
    monkeypatch.setattr("ausm_hf.demo.launch.launch", lambda *args: asked.append(args))
    main(["demo", "--model", "my-ausm", "--device", "cpu"])
    assert asked == [("my-ausm", "cpu", "auto")]


def test_a_checkpoint_that_is_none_is_one_line(capsys, tmp_path):
    pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'ausm-hf[demo]'")
    with pytest.raises(SystemExit):
        main(["demo", "--model", str(tmp_path)])
    assert "can't be loaded" in capsys.readouterr().err


def test_who_is_deaf_to_a_closed_terminal_stays_so(tmp_path):
    """As `nohup` starts it."""
    from ausm_hf.demo.launch import _leave_nothing

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        _leave_nothing(tmp_path)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.parametrize(
    "with_signal, codes", [(signal.SIGTERM, {143}), (signal.SIGINT, {0, 130}), (signal.SIGHUP, {129})]
)
def test_what_ends_it_leaves_no_files(with_signal, codes, tiny_checkpoint, tmp_path):
    pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'ausm-hf[demo]'")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop("GRADIO_SERVER_PORT", None)
    # Shells start programs in the background deaf to SIGINT, nohup to SIGHUP, and these hand that on.
    command = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command += "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    command += "from ausm_hf.cli import main; main(['demo', '--model', sys.argv[1], '--device', 'cpu'])"
    process = subprocess.Popen(
        [sys.executable, "-c", command, tiny_checkpoint],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        lines = []
        while "Running on local URL" not in (line := process.stdout.readline()):
            assert line, "".join(lines)
            lines.append(line)
        assert [path.name[:10] for path in tmp_path.iterdir()] == ["ausm-demo-"]
        time.sleep(1)  # it has said where it serves, and now waits
        process.send_signal(with_signal)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in codes and "Traceback" not in output
    assert not list(tmp_path.glob("ausm-demo-*"))
