"""Draw SVG in a process of its own: a drawing that brings its renderer down, or has no end, costs that process and no other."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection

DRAWING_SECONDS = 60.0  # for one drawing
RENDERER_BYTES = 4 * 2**30  # of address space
GOOD = b"+"  # before a PNG; anything else comes before a reason


@dataclass(frozen=True)
class Renderer:
    """A process that draws, and the pipes to it and from it."""

    owner: int  # the process that started it; one that is forked from that needs its own
    process: subprocess.Popen[bytes]
    ask: Connection
    answer: Connection

    @staticmethod
    def start() -> Renderer:
        """A renderer at work."""
        command = [sys.executable, "-P", __file__]  # -P: the names of this folder are not to be taken for Python's own
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdin is not None
        assert process.stdout is not None
        ask = Connection(os.dup(process.stdin.fileno()), readable=False)
        answer = Connection(os.dup(process.stdout.fileno()), writable=False)
        process.stdin.close()
        process.stdout.close()
        return Renderer(os.getpid(), process, ask, answer)

    def end(self) -> None:
        """Stop it, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        self.ask.close()
        self.answer.close()


_own = threading.local()  # renderer: of this thread


def draw_svg(drawing: str, size: int) -> bytes:
    """A PNG of an SVG in `size` pixels on white; `ValueError` with the reason when it cannot be drawn."""
    renderer: Renderer | None = getattr(_own, "renderer", None)
    if renderer is None or renderer.owner != os.getpid():
        renderer = _own.renderer = Renderer.start()
    try:
        renderer.ask.send_bytes(f"{size} {drawing}".encode())
        if not renderer.answer.poll(DRAWING_SECONDS):
            raise TimeoutError(f"drawing it takes more than {DRAWING_SECONDS:g} seconds")
        answer = renderer.answer.recv_bytes()
    except (EOFError, OSError) as error:
        _own.renderer = None
        renderer.end()
        raise ValueError(str(error) if isinstance(error, TimeoutError) else "it brings its renderer down") from error
    if not answer.startswith(GOOD):
        raise ValueError(answer.decode())
    return answer.removeprefix(GOOD)


def _draw(question: bytes) -> bytes:
    """What is to be answered to `draw_svg`."""
    size, _, drawing = question.decode().partition(" ")
    try:
        from resvg_py import svg_to_bytes  # only drawings need it, and only the demo extra installs it
    except ImportError:
        return b'rendering SVG needs the package resvg-py; run: pip install "diffalign[demo]"'
    # 96 dots per inch is what CSS says of drawings sized in mm, pt or in; resvg-py's own default refuses them
    pixels = {"width": int(size), "height": int(size), "background": "white"}
    try:
        return GOOD + bytes(svg_to_bytes(svg_string=drawing, skip_system_fonts=True, dpi=96, **pixels))
    except ValueError as error:
        return str(error).encode()


def _serve() -> None:
    """Draw what is asked for, until nobody is left to ask."""
    resource.setrlimit(resource.RLIMIT_AS, (RENDERER_BYTES, RENDERER_BYTES))
    ask, answer = Connection(0, writable=False), Connection(1, readable=False)
    while True:
        try:
            question = ask.recv_bytes()
        except EOFError:
            return
        answer.send_bytes(_draw(question))


if __name__ == "__main__":
    _serve()
