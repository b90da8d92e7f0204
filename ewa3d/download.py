"""Downloading large files: continued where they broke off, compared, from the first mirror that has them."""
import hashlib
import http.client
import json
import os
import re
import shutil
import string
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path

from ewa3d.files import atomic_write
from ewa3d.progress import Progress

__all__ = ['Downloaded', 'check_space', 'checksum_of', 'download', 'verify']

TIMEOUT, TRIES, PAUSE = 30., 3, 1.  # seconds without a byte; attempts in a row that brought nothing; first pause
CHUNK, MEGABYTE = 1 << 18, 10 ** 6
TEMPORARY = (408, 425, 429, 500, 502, 503, 504)  # answers of a server that may be another one a little later
KINDS = ('md5', 'sha256')


@dataclass(frozen=True)
class Downloaded:
    """Where a file came from, how many bytes it has, and its sha256."""
    url: str
    size: int
    sha256: str


class _Failed(Exception):
    """A mirror did not deliver. ``again``: the next attempt may."""

    def __init__(self, reason: str, again: bool = True):
        super().__init__(reason)
        self.again = again


def download(urls: Sequence[str], path: str | Path, size: int | None = None, checksum: str | None = None, *,
             timeout: float = TIMEOUT, tries: int = TRIES, sleep: Callable[[float], object] = time.sleep,
             check: Callable[[Path], object] | None = None) -> Downloaded:
    """Download a file to ``path`` from the first of ``urls`` that has it whole.

    What has arrived lies in ``<path>.part`` until it is complete and compared, and is continued by the next call, also
    of another process: only where the server says that its file is still the same one (``If-Range`` with its ETag or
    date), or where ``checksum`` tells in the end. A file of another size or checksum is deleted.

    Args:
        urls: http or https; mirrors, in the order in which they are tried. size: in bytes, where it is known.
        checksum: ``'sha256:…'`` or ``'md5:…'``, where it is known.
        timeout: seconds to wait for an answer, or for the next bytes.
        tries: attempts at a mirror in a row that bring nothing. sleep: waits between them, longer each time.
        check: looks at the whole file; where it raises ``ValueError``, the next mirror is asked.

    Raises:
        ValueError: a URL or checksum of another kind.
        OSError: no mirror delivered (with the reason of each); the disk is full or cannot be written to.
    """
    path = Path(path)
    for url in urls:
        if urllib.parse.urlsplit(url).scheme not in ('http', 'https') or not urllib.parse.urlsplit(url).netloc:
            raise ValueError(f'{url!r} is no URL that begins with http:// or https://')
    if checksum is not None and checksum.partition(':')[0] not in KINDS:
        raise ValueError(f"a checksum is 'sha256:…' or 'md5:…', got {checksum!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    reasons = []
    for url in urls:
        try:
            return _Transfer(url, path, size, checksum, timeout, check).run(tries, sleep)
        except _Failed as error:
            reasons.append(f'{url}: {error}')
    raise OSError(f'{path.name} could not be downloaded: ' + ('; '.join(reasons) or 'there is no URL for it'))


class _Transfer:
    """The attempts at one mirror."""

    def __init__(self, url: str, path: Path, size: int | None, checksum: str | None, timeout: float,
                 check: Callable[[Path], object] | None):
        self.url, self.path, self.size, self.checksum = url, path, size, checksum
        self.timeout, self.check = timeout, check
        self.part = path.with_name(f'{path.name}.part')
        self.state = path.with_name(f'{path.name}.part.json')  # what the server said about the file in .part

    def run(self, tries: int, sleep: Callable[[float], object]) -> Downloaded:
        """Raises:
            _Failed: the mirror does not deliver.
        """
        idle, best = 0, self._have()
        while True:
            try:
                continued = self._once()
                return self._finish(continued)
            except _Failed as error:
                have = self._have()
                idle, best = (0, have) if have > best else (idle + 1, best)
                if not error.again or idle >= tries:
                    raise
                sleep(PAUSE * 2 ** max(0, idle - 1))

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.state.unlink(missing_ok=True)

    def _once(self) -> bool:
        """Download what is missing; whether what was there before is a part of it."""
        have, known = self._have(), self._known()
        headers = self._range(have, known)
        if not headers:
            have = 0
        try:
            response = self._open(headers)
        except urllib.error.HTTPError as error:
            if error.code == 416 and headers:
                if error.headers.get('Content-Range', '').strip() == f'bytes */{have}':
                    return True  # it was all there
                self._forget()
                raise _Failed('the file has changed on the server') from error
            raise _Failed(f'{error.code} {error.reason}', error.code in TEMPORARY) from error
        with response:
            start, total = self._placed(response, have, known)
            if self.size is not None and total not in (None, self.size):
                raise _Failed(f'has {total} bytes, {self.size} were expected', False)
            check_space(self.part.parent, max(0, (total or self.size or 0) - start), f'download {self.path.name}')
            self._receive(response, start, total)
        return start > 0

    # ---- what to ask for --------------------------------------------------------------------------------------------
    def _known(self) -> dict:
        try:
            known = json.loads(self.state.read_text())
            return known if isinstance(known, dict) else {}
        except (OSError, ValueError):
            return {}

    def _range(self, have: int, known: dict) -> dict:
        """The headers that ask for the rest; none where it has to be all of it."""
        if not have:
            return {}
        ask = {'Range': f'bytes={have}-'}
        etag = known.get('etag') or ''
        validator = etag if etag and not etag.startswith('W/') else known.get('modified')
        if known.get('url') == self.url and validator:
            return {**ask, 'If-Range': validator}
        return ask if self.checksum is not None and known.get('total') else {}  # the checksum tells in the end

    def _open(self, headers: dict):
        request = urllib.request.Request(urllib.parse.quote(self.url, safe=string.printable), headers={
            'User-Agent': 'ewa3d', 'Accept-Encoding': 'identity', **headers})
        try:
            return urllib.request.build_opener(_Redirects).open(request, timeout=self.timeout)
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _Failed(self._reason(error)) from error

    def _placed(self, response, have: int, known: dict) -> tuple[int, int | None]:
        """Where the bytes of an answer belong, and how many the file has."""
        headers = response.headers
        if headers.get('Content-Encoding', 'identity').lower() != 'identity':
            raise _Failed(f'sends the file encoded as {headers["Content-Encoding"]}', False)
        if response.status == 206:
            found = re.fullmatch(r'bytes (\d+)-(\d+)/(\d+)', headers.get('Content-Range', '').strip())
            start, total = (int(found[1]), int(found[3])) if found else (-1, -1)
            etag, old = headers.get('ETag'), known.get('etag')
            moved = known.get('url') == self.url and etag and old and etag != old
            if not have or start != have or total != (known.get('total') or total) or moved:
                self._forget()
                raise _Failed('the file has changed on the server')
            return start, total
        if response.status != 200:
            raise _Failed(f'answers {response.status} {response.reason}', False)
        length = headers.get('Content-Length', '')
        return 0, int(length) if length.isdigit() else None

    # ---- what comes -------------------------------------------------------------------------------------------------
    def _receive(self, response, start: int, total: int | None) -> None:
        done, most = start, total if total is not None else self.size
        shown = None if most is None else -(-most // MEGABYTE)
        try:
            with self.part.open('ab' if start else 'wb') as file, \
                    Progress(f'{self.path.name}, MB', shown, start // MEGABYTE) as bar:
                if not start:  # the old file is empty by now: what is written down next is true of the new one
                    self._write_down(response, total)
                while done != total and (chunk := self._read(response, total and total - done)):
                    done += len(chunk)
                    if most is not None and done > most:
                        raise _Failed(f'sends more than the {most} bytes that were expected', False)
                    file.write(chunk)
                    bar.update(done // MEGABYTE)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _written(error, self.part) from error
        if most is not None and done < most:
            raise _Failed(f'the connection ended after {done} of {most} bytes')

    def _write_down(self, response, total: int | None) -> None:
        headers = response.headers
        atomic_write(self.state, json.dumps(dict(url=self.url, etag=headers.get('ETag'), total=total,
                                                 modified=headers.get('Last-Modified'))))

    def _read(self, response, left: int | None) -> bytes:
        try:
            return response.read1(CHUNK if left is None else min(CHUNK, left))  # what has come; read() waits for all
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _Failed(self._reason(error)) from error

    def _reason(self, error: Exception) -> str:
        cause = getattr(error, 'reason', None) or error
        if isinstance(cause, TimeoutError):
            return f'no answer within {self.timeout:g} s'
        return str(cause) or type(cause).__name__

    def _finish(self, continued: bool) -> Downloaded:
        """Compare the file and give it its name."""
        try:
            sha256 = verify(self.part, self.size, self.checksum)
            if self.check is not None:
                self.check(self.part)
        except ValueError as error:
            self._forget()
            raise _Failed(f'{error}; it is deleted', continued) from error
        found = Downloaded(self.url, self._have(), sha256)
        os.replace(self.part, self.path)
        self.state.unlink(missing_ok=True)
        return found


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects to http and https, and never from https to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not newurl.startswith(('https:',) if req.type == 'https' else ('https:', 'http:')):
            raise urllib.error.HTTPError(newurl, code, f'refused: it leads to {newurl}', headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _written(error: OSError, part: Path) -> OSError:
    if error.errno is None:
        return error
    return OSError(error.errno, f'{os.strerror(error.errno)}: what has arrived is kept, the next call continues',
                   str(part))


# ---- what was downloaded --------------------------------------------------------------------------------------------
def verify(path: Path, size: int | None = None, checksum: str | None = None) -> str:
    """Compare a file with what is known of it; returns its sha256.

    Args:
        size: in bytes. checksum: ``'sha256:…'`` or ``'md5:…'``.

    Raises:
        ValueError: naming the file, what was found and what was expected.
    """
    found = path.stat().st_size
    if size is not None and found != size:
        raise ValueError(f'{path} has {found} bytes, {size} were expected')
    kind, _, expected = (checksum or 'sha256:').partition(':')
    digests = checksum_of(path, *{kind, 'sha256'})
    if expected and digests[kind] != expected.lower():
        raise ValueError(f'{path} has the {kind} {digests[kind]}, {expected} was expected')
    return digests['sha256']


def checksum_of(path: Path, *kinds: str) -> dict[str, str]:
    """The checksums of a file, of the kinds ``'md5'`` and ``'sha256'``."""
    digests = {kind: hashlib.new(kind, usedforsecurity=False) for kind in kinds}
    with path.open('rb') as file, Progress(f'checksum of {path.name}, MB', path.stat().st_size // MEGABYTE) as bar:
        while chunk := file.read(CHUNK):
            for digest in digests.values():
                digest.update(chunk)
            bar.update(file.tell() // MEGABYTE)
    return {kind: digest.hexdigest() for kind, digest in digests.items()}


def check_space(folder: Path, size: int, what: str) -> None:
    """Raise where ``size`` bytes do not fit on the disk of a folder.

    Raises:
        OSError: ``ENOSPC``, with how much there is and how much is needed to do ``what``.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(ENOSPC, f'{size / 1e6:.0f} MB are needed to {what}, {free / 1e6:.0f} MB are free', str(folder))
