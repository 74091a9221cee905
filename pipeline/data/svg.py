"""Render SVG drawings in a separate process.

If a drawing crashes the renderer, or takes too long, only that process is lost. This file is also the program of the process.
"""

from __future__ import annotations

import codecs
import os
import re
import resource
import subprocess
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection

from pipeline.runtime.errors import UserError

DRAWING_SECONDS = 60.0  # time to render one drawing
RENDERER_BYTES = 4 * 2**30  # address space of the process
XML_ENCODING = re.compile(rb"\s*<\?xml[^>]*\sencoding\s*=\s*[\"']([\w.:-]+)")
XML_STARTS = {  # byte order marks, longer ones first, and "<" without one
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
    b"<\0": "utf-16-le",
    b"\0<": "utf-16-be",
}
NO_CHARSETS = ("idna", "punycode", "raw-unicode-escape", "unicode-escape")  # of Python; some take the square of the time
_SUCCESS = b"+"  # first byte of a reply with a PNG; any other reply is the reason why there is none


@dataclass(frozen=True)
class Renderer:
    """A process that renders drawings, with a pipe for requests and one for replies."""

    owner: int  # id of the process that started it; a process that is forked from that one must start its own renderer
    process: subprocess.Popen[bytes]
    requests: Connection
    replies: Connection

    @staticmethod
    def start() -> Renderer:
        """Start a process that renders drawings."""
        command = [sys.executable, "-P", __file__]  # -P: modules in this folder must not hide those of Python's library
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdin is not None
        assert process.stdout is not None
        requests = Connection(os.dup(process.stdin.fileno()), readable=False)
        replies = Connection(os.dup(process.stdout.fileno()), writable=False)
        process.stdin.close()
        process.stdout.close()
        return Renderer(os.getpid(), process, requests, replies)

    def end(self) -> None:
        """Kill the process, even while it renders."""
        self.process.kill()
        self.process.wait()
        self.requests.close()
        self.replies.close()


_thread = threading.local()  # its attribute `renderer` is the renderer of this thread


def decode_xml(data: bytes) -> str:
    """Return the text of an XML file in the encoding that its first bytes or its declaration name; else UTF-8.

    Raises:
        ValueError: it is not in that encoding.
        LookupError: there is no such encoding.
    """
    for start, encoding in XML_STARTS.items():
        if data.startswith(start):
            return data.decode(encoding)
    found = XML_ENCODING.match(data)
    declared = found[1].decode() if found else "utf-8"
    if codecs.lookup(declared).name in NO_CHARSETS:
        raise LookupError(f"unknown encoding: {declared}")
    return data.decode("utf-8" if declared.lower().startswith(("utf-16", "utf-32")) else declared)  # that would be no ASCII


def draw_svg(drawing: str, size: int) -> bytes:
    """Render an SVG to a PNG on a white background.

    Args:
        drawing: text of the SVG.
        size: width and height in pixels; a drawing that is not square is smaller in one of them.

    Raises:
        UserError: it cannot be rendered; with the reason.
    """
    renderer: Renderer | None = getattr(_thread, "renderer", None)
    if renderer is None or renderer.owner != os.getpid():
        renderer = _thread.renderer = Renderer.start()
    try:
        renderer.requests.send_bytes(f"{size} {drawing}".encode())
        if not renderer.replies.poll(DRAWING_SECONDS):
            raise TimeoutError(f"drawing it takes more than {DRAWING_SECONDS:g} seconds")
        reply = renderer.replies.recv_bytes()
    except (EOFError, OSError) as error:
        _thread.renderer = None
        renderer.end()
        raise UserError(str(error) if isinstance(error, TimeoutError) else "it brings its renderer down") from error
    if not reply.startswith(_SUCCESS):
        raise UserError(reply.decode())
    return reply.removeprefix(_SUCCESS)


def _reply_to(request: bytes) -> bytes:
    """Return the reply to a request of `draw_svg`."""
    size, _, drawing = request.decode().partition(" ")
    try:
        from resvg_py import svg_to_bytes  # only SVG files need it, and only the demo extra installs it
    except ImportError:
        return b"rendering SVG needs the package resvg-py; run: pip install resvg-py"
    # CSS says 96 dots per inch for sizes in mm, pt or in; with the default of resvg-py such drawings are refused
    pixels = {"width": int(size), "height": int(size), "background": "white"}
    try:
        return _SUCCESS + bytes(svg_to_bytes(svg_string=drawing, skip_system_fonts=True, dpi=96, **pixels))
    except ValueError as error:
        return str(error).encode()


def _serve() -> None:
    """Reply to requests until the other end of the pipe is closed."""
    resource.setrlimit(resource.RLIMIT_AS, (RENDERER_BYTES, RENDERER_BYTES))
    requests, replies = Connection(0, writable=False), Connection(1, readable=False)
    while True:
        try:
            request = requests.recv_bytes()
        except EOFError:
            return
        replies.send_bytes(_reply_to(request))


if __name__ == "__main__":
    _serve()
