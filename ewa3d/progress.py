"""How far a long job is: a live bar with the time that is left on a terminal, now and then a plain line elsewhere."""
import logging
import sys
import time
from collections.abc import Iterable, Iterator

from mmengine.logging import MMLogger, print_log

__all__ = ['Progress', 'on_terminal', 'track']

LINE_SECONDS, DRAW_SECONDS = 5.0, 0.1  # between two plain lines, and two drawings of the bars


def on_terminal() -> bool:
    """Whether a live bar can be drawn: standard output is a terminal that can move its cursor."""
    return sys.stdout.isatty() and not _console().is_dumb_terminal


def track(items: Iterable, what: str, total: int | None = None) -> Iterator:
    """``items``, with the progress shown while they are gone through.

    Args:
        what: a word or two about the job. total: how many there are, where ``len(items)`` does not say.
    """
    with Progress(what, len(items) if total is None and hasattr(items, '__len__') else total) as progress:
        for item in items:
            yield item
            progress.advance()


class Progress:
    """One job on the display; several may run at once, each has a line. A context manager.

    Args:
        what: a word or two about the job.
        total: how many steps it has; ``None`` where nobody knows.
        done: steps already done.
        lines: where there is no terminal, log a line every five seconds.
    """

    def __init__(self, what: str, total: int | None = None, done: int = 0, lines: bool = True):
        self.what, self.total, self.done, self.lines = what, total, done, lines
        self._first, self._started = done, time.perf_counter()
        self._told, self._text = self._started, ''
        self._task = _Display.add(what, total, done) if on_terminal() else None

    def advance(self, count: int = 1, text: str | None = None) -> None:
        """``count`` more steps are done; ``text`` stands behind the bar, or in the line, from now on."""
        self.update(self.done + count, text)

    def update(self, done: int, text: str | None = None) -> None:
        """``done`` steps are done in all."""
        self.done, self._text = done, self._text if text is None else text
        if self._task is not None:
            _Display.update(self._task, done, text)
        elif self.lines and time.perf_counter() - self._told > LINE_SECONDS:
            self._told = time.perf_counter()
            print_log(self._line(), 'current')

    def stop(self) -> None:
        """Take the line off the display. Calling it again does nothing."""
        if self._task is not None:
            task, self._task = self._task, None
            _Display.remove(task)

    def _line(self) -> str:
        known, here = self.total is not None, self.done - self._first
        left = (self._told - self._started) / here * (self.total - self.done) if known and here > 0 else None
        return f'{self.what}: {self.done}{f"/{self.total}" if known else ""}' + \
            ('' if left is None else f', {left:.0f} s left') + (f'  {self._text}' if self._text else '')

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(self, *exc) -> None:
        self.stop()


class _Display:
    """The one live display of the process, there while a job is on it. Log lines scroll by above it.

    It is drawn when a job goes on, not by a thread of its own: data workers are forked, and a thread's lock with them.
    """
    live = None
    drawn = 0.
    moved: tuple[tuple[logging.StreamHandler, object], ...] = ()

    @classmethod
    def add(cls, what: str, total: int | None, done: int):
        if cls.live is None:
            from rich import progress
            cls.live = progress.Progress(
                progress.TextColumn('{task.description}'), progress.BarColumn(bar_width=24),
                progress.MofNCompleteColumn(), progress.TimeElapsedColumn(), progress.TextColumn('eta'),
                progress.TimeRemainingColumn(), progress.TextColumn('{task.fields[text]}', markup=False),
                console=_console(), transient=True, auto_refresh=False)
            streams = (sys.stdout, sys.stderr)
            cls.live.start()  # sys.stdout and sys.stderr now write above the bars; loggers hold the old ones
            handlers = [h for h in MMLogger.get_current_instance().handlers
                        if isinstance(h, logging.StreamHandler) and h.stream in streams]
            cls.moved = tuple((handler, handler.setStream(sys.stdout)) for handler in handlers)
        return cls.live.add_task(what, total=total, completed=done, text='')

    @classmethod
    def update(cls, task, done: int, text: str | None) -> None:
        cls.live.update(task, completed=done, **({} if text is None else dict(text=text)))
        now = time.perf_counter()
        if now - cls.drawn > DRAW_SECONDS:
            cls.drawn = now
            cls.live.refresh()

    @classmethod
    def remove(cls, task) -> None:
        cls.live.remove_task(task)
        if not cls.live.tasks:
            for handler, stream in cls.moved:
                handler.setStream(stream)
            live, cls.live, cls.moved = cls.live, None, ()
            live.stop()


def _console():
    from rich.console import Console
    return Console()
