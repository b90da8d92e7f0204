"""Pictures after a test: the best, the median and the worst samples."""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from mmengine.dataset import pseudo_collate
from mmengine.dist import all_gather_object, get_rank, get_world_size, is_main_process
from mmengine.hooks import Hook
from torch import Tensor

from ewa3d.checks import check_integer
from ewa3d.engine.hooks import unwrapped
from ewa3d.engine.pretrain_hooks import show_picture

__all__ = ['RankedPicturesHook']


class RankedPicturesHook(Hook):
    """After a test, ``pictures/NAME.png`` and, to be turned in a browser, ``pictures/NAME.html`` in the work dir: the
    best, the median and the worst samples.

    Only the score of every sample is kept meanwhile; the chosen ones are predicted once more. A subclass says what is
    scored (:meth:`score`) and what is drawn (:meth:`cells`).

    Args:
        num_samples: so many of the best, of those around the median, and of the worst.

    Raises:
        TypeError, ValueError: a number out of range.
    """
    priority = 'LOW'
    name: ClassVar[str]
    measure: ClassVar[str]
    options: ClassVar[dict] = {}  # of the PNG

    def __init__(self, num_samples: int = 1):
        self.num_samples = check_integer(f'{type(self).__name__}: num_samples', num_samples, 1)
        self._start()

    def _start(self) -> None:
        self._seen, self._scored = 0, []

    def score(self, runner, sample: Mapping, points: Tensor | None) -> float | None:
        """What a predicted sample is worth, in percent; ``None``: it is not drawn."""
        raise NotImplementedError(f'{type(self).__name__} must define score()')

    def cells(self, runner, clouds: Sequence[Tensor], samples: Sequence[Mapping], names: Sequence[str]) -> dict:
        """Keywords for :func:`ewa3d.visualization.draw_clouds` and :func:`ewa3d.viewer.write_html`."""
        raise NotImplementedError(f'{type(self).__name__} must define cells()')

    def before_test_epoch(self, runner) -> None:
        self._start()

    def after_test_iter(self, runner, batch_idx: int, data_batch=None, outputs: Sequence | None = None) -> None:
        clouds = ((data_batch or {}).get('inputs') or {}).get('points')
        for i, sample in enumerate(outputs or ()):
            place = get_rank() + get_world_size() * self._seen  # as the sampler deals them out
            self._seen += 1
            score = self.score(runner, sample.to_dict(), None if clouds is None else clouds[i])
            if score is not None:
                self._scored.append((score, place))

    def after_test_epoch(self, runner, metrics: dict | None = None) -> None:
        scored = [pair for pairs in all_gather_object(self._scored) for pair in pairs]
        if is_main_process() and scored:
            self.draw(runner, sorted(scored, reverse=True), Path(runner.work_dir) / 'pictures')

    def draw(self, runner, scored: Sequence[tuple[float, int]], folder: Path) -> None:
        """Write both files for samples ``(score, place in the data set)``, the best first."""
        from ewa3d.viewer import write_html
        from ewa3d.visualization import draw_clouds
        dataset, count = runner.test_dataloader.dataset, min(self.num_samples, len(scored))
        first = (len(scored) - count) // 2
        chosen = {'best': scored[:count], 'median': scored[first:first + count], 'worst': scored[-count:]}
        rows = [(which, *row) for which, some in chosen.items() for row in some]
        batch = pseudo_collate([dataset[place] for *_, place in rows])
        with torch.no_grad():
            samples = unwrapped(runner.model).test_step(batch)
        names = [f'{which}, {self.measure} {score:.1f}: {sample.get("name", place)}'
                 for (which, score, place), sample in zip(rows, samples)]
        cells = self.cells(runner, batch['inputs']['points'], [sample.to_dict() for sample in samples], names)
        cells['up'] = (dataset.metainfo or {}).get('up_axis') or 'z'
        png = draw_clouds(path=folder / f'{self.name}.png', **cells, **self.options)
        page = write_html(path=folder / f'{self.name}.html', **cells)
        show_picture(runner, self.name, png)
        runner.logger.info(f'pictures: {png}, {page}')
