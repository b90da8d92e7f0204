"""A site on the loopback that serves files well or badly."""
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STEP = 1000  # bytes that are sent at a time


@dataclass
class Answer:
    """How a path is answered.

    Attributes:
        ends: the connection ends after so many bytes of the body, one entry a request; then no more.
        hangs: after so many bytes nothing comes any more.
    """
    content: bytes = b''
    status: int = 200
    etag: str | None = '"a"'
    modified: str | None = None
    ranges: bool = True
    length: bool = True
    chunked: bool = False
    location: str | None = None
    ends: list[int] = field(default_factory=list)
    hangs: int | None = None
    statuses: list[int] = field(default_factory=list)
    headers: dict = field(default_factory=dict)


class Site:
    """``site['/x'] = Answer(…)``; ``site.url('/x')``; ``site.asked`` is what it was asked for: path and range."""

    def __init__(self):
        self.answers, self.asked, self.over = {}, [], threading.Event()

    def __setitem__(self, path: str, answer: Answer) -> None:
        self.answers[path] = answer

    def __getitem__(self, path: str) -> Answer:
        return self.answers[path]

    def url(self, path: str) -> str:
        return f'http://127.0.0.1:{self.port}{path}'


@contextmanager
def serve() -> Iterator[Site]:
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'

        def log_message(self, *args):
            pass

        def do_GET(self):
            site.asked.append((self.path, self.headers.get('Range'), self.headers.get('If-Range')))
            answer = site.answers.get(self.path, Answer(status=404))
            status = answer.statuses.pop(0) if answer.statuses else answer.status
            if status != 200:
                self.send_response(status)
                if answer.location:
                    self.send_header('Location', answer.location)
                self.send_header('Content-Length', '0')
                self.end_headers()
                return
            self.send(answer)

        def send(self, answer: Answer) -> None:
            size, start = len(answer.content), 0
            found = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range') or '')
            wanted = self.headers.get('If-Range')
            if found and answer.ranges and wanted in (None, answer.etag, answer.modified):
                start = int(found[1])
                if start >= size:
                    self.send_response(416)
                    self.send_header('Content-Range', f'bytes */{size}')
                    self.send_header('Content-Length', '0')
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header('Content-Range', f'bytes {start}-{size - 1}/{size}')
            else:
                self.send_response(200)
            for key, value in dict({'ETag': answer.etag, 'Last-Modified': answer.modified}, **answer.headers).items():
                if value:
                    self.send_header(key, value)
            if answer.chunked:
                self.send_header('Transfer-Encoding', 'chunked')
            elif answer.length:
                self.send_header('Content-Length', str(size - start))
            self.end_headers()
            self.close_connection = True
            end = min(start + answer.ends.pop(0), size) if answer.ends else size
            for at in range(start, end, STEP):
                piece = answer.content[at:min(at + STEP, end)]
                if answer.hangs is not None and at >= answer.hangs:
                    site.over.wait()
                    return
                self.wfile.write(b'%x\r\n%s\r\n' % (len(piece), piece) if answer.chunked else piece)
                self.wfile.flush()
            if answer.chunked and end == size:
                self.wfile.write(b'0\r\n\r\n')

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # the client may go away
    site.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.01), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
