"""A headless Chromium for tests of pages: what it says on its console, and the page after its scripts."""
import shutil
import subprocess

import pytest

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')


def open_page(path, profile) -> tuple[str, list[str]]:
    """The document as the browser sees it, and lines of its console; skips where there is no browser."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f'no browser is here: none of {", ".join(NAMES)}')
    command = [program, '--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-extensions',
               '--disable-background-networking', '--enable-logging=stderr', '--v=0',
               f'--user-data-dir={profile}', '--proxy-server=127.0.0.1:9', '--dump-dom', path.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if 'CONSOLE' in line]
