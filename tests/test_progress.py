"""Progress: a live bar on a terminal that leaves nothing behind, plain lines elsewhere."""
import gc
import io
import logging
import sys

import pytest
from engine_toys import on_cpu, toy_config  # noqa: F401
from mmengine.logging import MMLogger, print_log
from rich.console import Console

from ewa3d import progress
from ewa3d.engine.runner import Runner
from ewa3d.progress import Progress, track


@pytest.fixture
def terminal(monkeypatch):
    """What a terminal would be sent."""
    screen = io.StringIO()
    monkeypatch.setattr(progress, 'on_terminal', lambda: True)
    monkeypatch.setattr('ewa3d.engine.display_hooks.on_terminal', lambda: True)
    monkeypatch.setattr(progress, '_console', lambda: Console(file=screen, force_terminal=True, width=160))
    return screen


def lines(monkeypatch) -> list[str]:
    said = []
    monkeypatch.setattr(progress, 'print_log', lambda text, logger: said.append(text))
    return said


def test_lines_where_there_is_no_terminal(monkeypatch):
    said, clock = lines(monkeypatch), iter(range(0, 1000, 3))
    monkeypatch.setattr(progress.time, 'perf_counter', lambda: next(clock))
    assert list(track('abcdef', 'letters')) == list('abcdef')
    assert said[0].startswith('letters: ') and '/6, ' in said[0] and said[0].endswith(' s left')
    assert 0 < len(said) < 6
    with Progress('unknown') as job:
        for _ in range(5):
            job.advance()
    assert any(text.startswith('unknown: ') and '/' not in text for text in said)
    with Progress('export', 4) as job:
        job.advance(2, text='tracing')
        job.advance()
    assert said[-1].startswith('export: 3/4, ') and said[-1].endswith(' s left  tracing')
    quiet = len(said)
    with Progress('x', 9, lines=False) as job:
        for _ in range(9):
            job.advance()
    assert len(said) == quiet


def test_a_bar_with_numbers_and_log_lines_above_it(terminal):
    before, logger = sys.stdout, MMLogger.get_current_instance()
    handlers = [h for h in logger.handlers if isinstance(h, logging.StreamHandler)]
    streams = [h.stream for h in handlers]
    with Progress('outer', 10) as outer:
        outer.advance(4, 'loss 0.5')
        with Progress('inner', 3, done=1) as inner:
            inner.advance()
            progress._Display.live.refresh()
        print_log('a line of the log', 'current')
        assert progress._Display.live is not None
    text = terminal.getvalue()
    for part in ('outer', 'inner', '4/10', '2/3', 'loss 0.5', 'eta'):
        assert part in text, part
    assert text.endswith('\x1b[?25h') or '\x1b[?25h' in text[-40:]  # the cursor is back
    assert sys.stdout is before and [h.stream for h in handlers] == streams and progress._Display.live is None
    outer.stop()


def test_an_error_takes_the_bar_away(terminal):
    with pytest.raises(ZeroDivisionError):
        for i in track([1, 0], 'numbers'):
            1 / i
    with pytest.raises(KeyError), Progress('x', 1):
        raise KeyError
    gc.collect()  # the generator may live on with its error
    assert progress._Display.live is None


def test_a_run_on_a_terminal(terminal, tmp_path, monkeypatch):
    Runner.from_cfg(toy_config(tmp_path, epochs=1)).train()
    assert progress._Display.live is None
    text = terminal.getvalue()
    assert 'train' in text and 'loss' in text and '/6' in text
    cfg = toy_config(tmp_path / 'b', epochs=1)
    runner = Runner.from_cfg(cfg)
    monkeypatch.setattr(type(runner.model), 'train_step', lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.train()
    assert progress._Display.live is None  # nothing is left of it


def test_a_run_elsewhere_draws_nothing(tmp_path, capsys):
    Runner.from_cfg(toy_config(tmp_path, epochs=1)).train()
    assert '\x1b[?25' not in capsys.readouterr().out and progress._Display.live is None
