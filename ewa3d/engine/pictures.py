"""Pictures of what a model predicts, of any task, after a test and while training."""
from collections.abc import Sequence
from pathlib import Path

from mmengine.dataset import pseudo_collate
from mmengine.dist import all_gather_object, get_rank, get_world_size, is_main_process
from mmengine.hooks import Hook

from ewa3d.checks import check_integer
from ewa3d.engine.hooks import unwrapped
from ewa3d.engine.pretrain_hooks import predict, show_picture
from ewa3d.gallery import by_source, write_gallery
from ewa3d.registry import HOOKS

__all__ = ['PicturesHook']


@HOOKS.register_module()
class PicturesHook(Hook):
    """``pictures/`` in the work dir: what the model predicts of samples of the evaluated data.

    After a test ``predictions.png`` and ``.html`` (of several data sets, ``predictions_NAME``): classes below clouds,
    images and clips, half of them wrong ones where there are; parts; boxes beside the true ones; reconstructions. While
    training, ``val_epoch_N.png`` of the same samples every time. All go to the visualizer as well, so to TensorBoard
    where the config asks for it. For the best and the worst parts and boxes, see ``PartPicturesHook`` and
    ``BoxPicturesHook``.

    Args:
        num_samples: of each data set.
        interval: draw after the validation of every so many epochs; ``None`` draws after tests only.
        ply: write the clouds, coloured, as PLY files as well.

    Raises:
        TypeError, ValueError: a number out of range.
    """
    priority = 'LOW'

    def __init__(self, num_samples: int = 8, interval: int | None = None, ply: bool = False):
        self.num_samples = check_integer('PicturesHook: num_samples', num_samples, 1)
        self.interval = None if interval is None else check_integer('PicturesHook: interval', interval, 1)
        self.ply = ply
        self._seen, self._wrong = 0, []

    def before_test_epoch(self, runner) -> None:
        self._seen, self._wrong = 0, []

    def after_test_iter(self, runner, batch_idx: int, data_batch=None, outputs: Sequence | None = None) -> None:
        for sample in outputs or ():
            if 'pred_label' in sample and 'gt_label' in sample and int(sample.pred_label) != int(sample.gt_label):
                self._wrong.append(get_rank() + get_world_size() * self._seen)  # as the sampler deals them out
            self._seen += 1

    def after_test_epoch(self, runner, metrics: dict | None = None) -> None:
        wrong = sorted(place for places in all_gather_object(self._wrong) for place in places)
        if is_main_process():
            self.draw(runner, runner.test_dataloader.dataset, 'predictions', wrong)

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        if self.interval and runner.epoch % self.interval == 0 and is_main_process():
            self.draw(runner, runner.val_dataloader.dataset, f'val_epoch_{runner.epoch}')

    def draw(self, runner, dataset, name: str, wrong: Sequence[int] = ()) -> list[Path]:
        """Write the pictures of samples spread evenly over a data set, half of them of ``wrong`` (of a single one)."""
        written = []
        for source, data, places in by_source(dataset, self.num_samples):
            if wrong and not source:
                count = min(max(len(places) // 2, 1), len(wrong))
                missed = [wrong[i * len(wrong) // count] for i in range(count)]
                others = [place for place in places if place not in missed]
                places = [*missed, *others[:len(places) - count]]
            items = [data[place] for place in places]
            if source:
                for item in items:
                    item['data_samples'].set_metainfo(dict(source=source))
            batch = pseudo_collate(items)
            samples = predict(unwrapped(runner.model), batch)
            items = [dict(inputs=item['inputs'], data_samples=sample) for item, sample in zip(items, samples)]
            stem = Path(runner.work_dir) / 'pictures' / f'{name}{f"_{source}" if source else ""}'
            heading = f'{source or type(data).__name__}: {name.replace("_", " ")}'
            written += write_gallery(items, data, stem, heading, predicted=True, ply=self.ply)
            tag = name.partition('_epoch')[0]
            show_picture(runner, f'{tag}/{source}' if source else tag, stem.with_name(f'{stem.name}.png'))
        runner.logger.info(f'pictures: {", ".join(map(str, written))}')
        return written
