"""Downloads from a site on the loopback that breaks in every way that is known of."""
import hashlib
import json
import os
import random
import socket
from errno import ENOSPC

import pytest
from served import Answer, serve

from ewa3d import download as module
from ewa3d.download import check_space, checksum_of, download, verify

CONTENT = random.Random(0).randbytes(10_500)
OTHER = random.Random(1).randbytes(10_500)
SHA256, MD5 = hashlib.sha256(CONTENT).hexdigest(), hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv('no_proxy', '*')
    with serve() as site:
        site['/x'] = Answer(CONTENT)
        yield site


@pytest.fixture
def get(site, tmp_path):
    """``get('/x', …)``: download to ``x``; pauses are not waited for but kept in ``get.pauses``."""

    def get(*paths, **kwargs):
        kwargs = dict(dict(sleep=get.pauses.append, timeout=60), **kwargs)
        return download([p if ':' in p else site.url(p) for p in paths], tmp_path / 'x', **kwargs)

    get.pauses, get.file = [], tmp_path / 'x'
    get.part, get.state = tmp_path / 'x.part', tmp_path / 'x.part.json'
    return get


def whole(get) -> bool:
    return get.file.read_bytes() == CONTENT and sorted(p.name for p in get.file.parent.iterdir()) == ['x']


@pytest.mark.parametrize('known', [{}, dict(size=len(CONTENT)), dict(checksum=f'md5:{MD5}'),
                                   dict(size=len(CONTENT), checksum=f'sha256:{SHA256.upper()}')])
@pytest.mark.parametrize('answer', [{}, dict(length=False), dict(chunked=True), dict(etag=None, ranges=False)])
def test_whole_files(site, get, known, answer):
    site['/x'] = Answer(CONTENT, **answer)
    got = get('/x', **known)
    assert whole(get) and got.sha256 == SHA256 and got.size == len(CONTENT) and got.url == site.url('/x')
    assert get.pauses == []


@pytest.mark.parametrize('at', [1, 999, 5000, 10_499])
@pytest.mark.parametrize('validator', [dict(), dict(etag='W/"a"', modified='Mon, 01 Jan 2024 00:00:00 GMT')])
def test_what_is_cut_off_is_continued(site, get, at, validator):
    site['/x'] = Answer(CONTENT, ends=[at], **validator)
    get('/x')
    assert whole(get)
    told = validator.get('modified', '"a"')
    assert site.asked == [('/x', None, None), ('/x', f'bytes={at}-', told)] and get.pauses == [1]


def test_another_process_continues(site, get):
    site['/x'] = Answer(CONTENT, ends=[4000, 0])
    with pytest.raises(OSError, match='the connection ended after 4000 of 10500 bytes'):
        get('/x', tries=1)
    assert get.part.read_bytes() == CONTENT[:4000] and not get.file.exists()
    get('/x')
    assert whole(get) and site.asked[-1][1] == 'bytes=4000-'


def test_attempts_count_while_they_bring_nothing(site, get):
    site['/x'] = Answer(CONTENT, ends=[1000] * 8)
    get('/x', tries=2)
    assert whole(get) and len(site.asked) == 9 and get.pauses == [1] * 8
    get.file.unlink()
    site['/x'] = Answer(CONTENT, ends=[0] * 9)
    with pytest.raises(OSError, match='after 0 of'):
        get('/x', tries=4)
    assert get.pauses[8:] == [1, 2, 4]


@pytest.mark.parametrize('known', [{}, dict(checksum=f'md5:{MD5}')])
def test_servers_that_know_no_ranges(site, get, known):
    site['/x'] = Answer(CONTENT, ends=[4000, 7000], ranges=False)
    get('/x', **known)
    assert whole(get)


def test_nothing_to_tell_versions_apart_begins_anew(site, get):
    site['/x'] = Answer(CONTENT, ends=[4000], etag=None)
    get('/x')
    assert whole(get) and site.asked[1] == ('/x', None, None)
    get.file.unlink()
    site['/x'] = Answer(CONTENT, ends=[4000], etag=None)
    get('/x', checksum=f'md5:{MD5}')  # which tells in the end
    assert whole(get) and site.asked[3] == ('/x', 'bytes=4000-', None)


@pytest.mark.parametrize('ranges', [True, False])
def test_another_file_is_not_spliced(site, get, ranges):
    site['/x'] = Answer(OTHER, ends=[4000, 0])
    with pytest.raises(OSError, match='ended after'):
        get('/x', tries=1)
    site['/x'] = Answer(CONTENT, etag='"b"', ranges=ranges)
    get('/x')
    assert whole(get)


def test_a_server_that_ignores_if_range(site, get, monkeypatch):
    site['/x'] = Answer(OTHER, ends=[4000, 0])
    with pytest.raises(OSError):
        get('/x', tries=1)
    state = json.loads(get.state.read_text())
    site['/x'] = Answer(CONTENT, etag='"b"')
    monkeypatch.setattr(module._Transfer, '_range', lambda *args: {'Range': 'bytes=4000-'})
    with pytest.raises(OSError, match='changed on the server'):
        get('/x', tries=1)
    assert state['etag'] == '"a"' and not get.part.exists() and not get.state.exists()


def test_a_splice_that_the_checksum_finds(site, get):
    site['/x'] = Answer(OTHER, ends=[4000, 0], etag=None)
    with pytest.raises(OSError):
        get('/x', tries=1, checksum=f'sha256:{SHA256}')
    site['/x'] = Answer(CONTENT, etag=None)  # as many bytes
    get('/x', checksum=f'sha256:{SHA256}')
    assert whole(get) and [asked[1] for asked in site.asked] == [None, *['bytes=4000-'] * 2, None]


def test_a_file_that_had_arrived(site, get):
    get.part.write_bytes(CONTENT)
    get.state.write_text(json.dumps(dict(url=site.url('/x'), etag='"a"', total=len(CONTENT), modified=None)))
    get('/x')
    assert whole(get) and site.asked == [('/x', f'bytes={len(CONTENT)}-', '"a"')]
    get.file.unlink()
    get.part.write_bytes(CONTENT + b'more')
    get.state.write_text(json.dumps(dict(url=site.url('/x'), etag='"a"', total=len(CONTENT), modified=None)))
    get('/x')
    assert whole(get)


@pytest.mark.parametrize('state', ['', '[]', '{"url": 3}', 'null', None])
def test_a_state_that_cannot_be_read(site, get, state):
    get.part.write_bytes(OTHER[:700])
    if state is not None:
        get.state.write_text(state)
    get('/x')
    assert whole(get) and site.asked == [('/x', None, None)]


# ---- mirrors --------------------------------------------------------------------------------------------------------
def closed_port() -> str:
    with socket.socket() as held:
        held.bind(('127.0.0.1', 0))
        return f'http://127.0.0.1:{held.getsockname()[1]}/x'


def test_mirrors_are_tried_in_order(site, get):
    site['/short'] = Answer(CONTENT[:-1])
    site['/wrong'] = Answer(OTHER)
    site['/down'] = Answer(status=503)
    site['/good'] = Answer(CONTENT)
    got = get(closed_port(), '/gone', '/short', '/wrong', '/down', '/good', '/x', size=len(CONTENT),
              checksum=f'sha256:{SHA256}')
    assert whole(get) and got.url == site.url('/good')
    assert [path for path, *_ in site.asked] == ['/gone', '/short', '/wrong', '/down', '/down', '/down', '/good']


def test_the_reason_of_each_mirror_is_told(site, get):
    site['/wrong'] = Answer(OTHER)
    with pytest.raises(OSError) as caught:
        get(closed_port(), '/gone', '/wrong', size=len(CONTENT), checksum=f'sha256:{SHA256}')
    text = str(caught.value)
    for part in ('refused', '/gone: 404', hashlib.sha256(OTHER).hexdigest(), SHA256, 'it is deleted'):
        assert part in text, part
    assert list(get.file.parent.iterdir()) == []
    with pytest.raises(OSError, match='there is no URL'):
        get()


def test_a_mirror_continues_what_another_began_where_a_checksum_tells(site, get):
    site['/a'] = Answer(CONTENT, ends=[4000, 0, 0, 0])
    site['/b'] = Answer(CONTENT, etag='"else"')
    get('/a', '/b', checksum=f'md5:{MD5}', tries=2)
    assert whole(get) and site.asked[-1] == ('/b', 'bytes=4000-', None)
    get.file.unlink()
    site['/a'] = Answer(OTHER, ends=[4000, 0, 0, 0])
    get('/a', '/b', tries=2)
    assert whole(get) and site.asked[-1] == ('/b', None, None)


def test_wrong_sizes(site, get):
    with pytest.raises(OSError, match='has 10500 bytes, 9 were expected'):
        get('/x', size=9)
    site['/x'] = Answer(CONTENT, length=False, etag=None)
    with pytest.raises(OSError, match='sends more than the 9 bytes'):
        get('/x', size=9)
    with pytest.raises(OSError, match='ended after 10500 of 20000'):
        get('/x', size=20_000)


def test_a_look_at_the_file_chooses_the_mirror(site, get):
    site['/page'] = Answer(b'<html>Log in</html>')

    def check(path):
        if path.read_bytes().startswith(b'<'):
            raise ValueError('no archive')

    assert get('/page', '/x', check=check).url == site.url('/x') and whole(get)


def test_answers_that_pass(site, get):
    site['/x'] = Answer(CONTENT, statuses=[503, 429, 500])
    get('/x', tries=4)
    assert whole(get) and get.pauses == [1, 2, 4]
    site['/x'] = Answer(CONTENT, status=403)
    get.file.unlink()
    site.asked.clear()
    with pytest.raises(OSError, match='403'):
        get('/x', tries=4)
    assert len(site.asked) == 1


def test_encoded_answers_are_refused(site, get):
    site['/x'] = Answer(CONTENT, headers={'Content-Encoding': 'gzip'})
    with pytest.raises(OSError, match='encoded as gzip'):
        get('/x')


def test_redirects(site, get, tmp_path):
    site['/old'] = Answer(status=302, location='/x')
    assert get('/old').url == site.url('/old') and whole(get)
    for location in (f'file://{tmp_path}/x', 'ftp://127.0.0.1/x'):
        get.file.unlink(missing_ok=True)
        site['/old'] = Answer(status=302, location=location)
        with pytest.raises(OSError, match=r'not allowed|refused: it leads to'):
            get('/old')
    site['/loop'] = Answer(status=302, location='/loop')
    with pytest.raises(OSError, match='302'):
        get('/loop')
    request = module.urllib.request.Request('https://a/x')
    with pytest.raises(module.urllib.error.HTTPError, match='leads to http://a'):
        module._Redirects().redirect_request(request, None, 302, '', {}, 'http://a/x')


@pytest.mark.parametrize('hangs', [0, 4000])
def test_servers_that_stop_answering(site, get, hangs):
    site['/x'] = Answer(CONTENT, hangs=hangs)
    with pytest.raises(OSError, match=r'no answer within 0\.2 s'):
        get('/x', timeout=.2, tries=1)
    site['/x'] = Answer(CONTENT)
    get('/x')
    assert whole(get)


def test_unicode_in_urls(site, get):
    site['/%C3%BC%20b?k=%C3%A4'] = Answer(CONTENT)
    get('/ü%20b?k=ä')
    assert whole(get)


@pytest.mark.parametrize('url', ['file:///etc/passwd', 'ftp://a/x', 'x.zip', '', 'http:/x'])
def test_other_urls_are_refused(get, url):
    with pytest.raises(ValueError, match='is no URL'):
        download([url], get.file)
    with pytest.raises(ValueError, match='a checksum is'):
        download(['http://a/x'], get.file, checksum='sha1:00')


# ---- the disk -------------------------------------------------------------------------------------------------------
def test_space_is_looked_for_first(site, get, monkeypatch, tmp_path):
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda path: type('', (), dict(free=10_000)))
    with pytest.raises(OSError, match='are needed to download x') as caught:
        get('/x', '/other')
    assert caught.value.errno == ENOSPC and list(tmp_path.iterdir()) == [] and len(site.asked) == 1
    get.part.write_bytes(CONTENT[:4000])
    get.state.write_text(json.dumps(dict(url=site.url('/x'), etag='"a"', total=len(CONTENT), modified=None)))
    get('/x')  # the rest fits
    assert whole(get)
    check_space(tmp_path, 10_000, 'do it')


def test_a_disk_that_fills_up(site, get, monkeypatch):
    fsync = os.fsync

    def full(handle):
        if get.part.exists() and get.part.stat().st_size == len(CONTENT):
            raise OSError(ENOSPC, 'full')
        fsync(handle)

    monkeypatch.setattr(module.os, 'fsync', full)
    with pytest.raises(OSError, match='what has arrived is kept') as caught:
        get('/x', '/other')
    assert caught.value.errno == ENOSPC and caught.value.filename == str(get.part) and get.part.exists()
    monkeypatch.setattr(module.os, 'fsync', fsync)
    get('/x')
    assert whole(get)


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_folders_that_cannot_be_written_to(site, tmp_path):
    (tmp_path / 'a').mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        download([site.url('/x')], tmp_path / 'a' / 'x')


def test_interrupted(site, get, monkeypatch):
    update = module.Progress.update

    def interrupt(bar, *args):
        if get.part.exists():
            raise KeyboardInterrupt
        update(bar, *args)

    monkeypatch.setattr(module.Progress, 'update', interrupt)
    with pytest.raises(KeyboardInterrupt):
        get('/x')
    have = get.part.stat().st_size
    assert 0 < have <= len(CONTENT) and CONTENT.startswith(get.part.read_bytes())
    monkeypatch.setattr(module.Progress, 'update', update)
    get('/x')
    assert whole(get) and site.asked[-1][1] == f'bytes={have}-'


def test_progress(site, get, monkeypatch):
    said, clock = [], iter(range(0, 10_000, 3))
    monkeypatch.setattr('ewa3d.progress.print_log', lambda text, logger: said.append(text))
    monkeypatch.setattr('ewa3d.progress.time.perf_counter', lambda: next(clock))
    monkeypatch.setattr(module, 'MEGABYTE', 100)
    monkeypatch.setattr(module, 'CHUNK', 1000)
    get('/x')
    assert any(text.startswith('x, MB: ') and '/105, ' in text and text.endswith('s left') for text in said)


# ---- what is known of files -----------------------------------------------------------------------------------------
def test_verify(tmp_path):
    file = tmp_path / 'a'
    file.write_bytes(CONTENT)
    assert verify(file) == verify(file, len(CONTENT), f'md5:{MD5}') == SHA256
    assert checksum_of(file, 'md5') == dict(md5=MD5)
    with pytest.raises(ValueError, match='a has 10500 bytes, 3 were expected'):
        verify(file, 3)
    with pytest.raises(ValueError, match=f'a has the md5 {MD5}, {"0" * 32} was expected'):
        verify(file, None, f'md5:{"0" * 32}')
