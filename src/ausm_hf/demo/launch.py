"""Starts the demo."""

import atexit
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from PIL import Image

from .unpack import Limits

logger = logging.getLogger(__name__)


def launch(
    model: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    on_gpu: Callable = lambda function: function,
    webcam: bool = True,
    wait: bool = True,
    limits: Limits | None = None,
):
    """
    Serves the page until it is interrupted; where, it prints. `GRADIO_SERVER_NAME` and `GRADIO_SERVER_PORT` say where
    it listens, by default on this machine alone.

    Args:
        model, device, dtype: As in [`~ausm_hf.load_model`].
        on_gpu: Decorator of the functions that use the model, for places that lend a GPU for one call.
        webcam: Whether to offer the camera: its stream lives longer than one call.
        wait: False returns at once; the page is served until this process ends.
        limits: What visitors may upload.

    Returns:
        The `gradio.Blocks`, when it doesn't wait.

    Raises:
        ValueError: if the model can't be loaded.
        ImportError: if Gradio is not installed.
    """
    root = Path(tempfile.mkdtemp(prefix="ausm-demo-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    if wait:
        _leave_nothing(root)
    # Uploads and results in one place, to be swept. Gradio looks once when it is imported, and again later.
    os.environ["GRADIO_TEMP_DIR"] = str(root)

    import gradio as gr
    from starlette.middleware import Middleware

    from ..segment import load_model
    from .network import Network
    from .page import make_page, style

    network = Network(*load_model(model, device, dtype), on_gpu)
    limits = limits or Limits()
    # A picture that unpacks to more than a frame can have is refused before it is unpacked.
    Image.MAX_IMAGE_PIXELS = limits.max_side**2 // 2
    # In place of a file a program can send an address, and Gradio would fetch it.
    gr.processing_utils.async_ssrf_protected_download = _fetch_nothing
    page = make_page(network, root, limits, webcam)
    page.queue(max_size=32)
    page.launch(
        css=style(),
        max_file_size=f"{limits.megabytes}mb",
        footer_links=["api"],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        prevent_thread_lock=True,
        app_kwargs={"middleware": [Middleware(_OnlyThePage)]},
    )
    sweeper = threading.Event()
    threading.Thread(target=_sweep, args=(page, sweeper), daemon=True).start()
    if not wait:
        return page

    page.block_thread()


def _leave_nothing(root: Path):
    """Removes the folder when this process is told to end, or its terminal is closed."""

    def stop(number, _):
        # A thread in the middle of a frame goes on meanwhile: what it writes goes too, and what it misses is no news.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        give_up = time.monotonic() + 5
        while root.exists() and time.monotonic() < give_up:
            shutil.rmtree(root, ignore_errors=True)
        with suppress(OSError):  # the terminal is gone
            sys.stdout.flush()
        os._exit(128 + number)  # at once: such a thread would abort an orderly end

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # as nohup makes it
            with suppress(ValueError):  # not in the main thread
                signal.signal(number, stop)


class _OnlyThePage:
    """
    Refuses what Gradio serves beside the page: it would hand a stranger's recording to ffmpeg without any bounds, and
    fetch addresses for whoever asks.
    """

    UNWANTED = re.compile(r"/(process_recording|(undo-)?vibe-|proxy=|file=\s*https?:)", re.IGNORECASE)

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and self.UNWANTED.search(scope["path"]):
            from starlette.responses import PlainTextResponse

            await PlainTextResponse("There is nothing here.", status_code=404)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


async def _fetch_nothing(*args, **kwargs):
    import gradio as gr

    raise gr.Error("Addresses are not taken here; please upload the file itself.", print_exception=False)


def _sweep(page, stopped: threading.Event):
    while not stopped.wait(60):
        try:
            page.sweep()
        except Exception:  # visitors' files come and go while it looks; the next round is soon
            logger.exception("in a sweep")
