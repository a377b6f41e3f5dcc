"""`ausm demo`."""

import sys

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
    message = f"ausm: error: the demo needs {missing}, which is not installed: pip install 'ausm-hf[demo]'"
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
