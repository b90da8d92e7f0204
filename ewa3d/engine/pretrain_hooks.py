"""Pictures of what a model that is being pretrained reconstructs."""
from pathlib import Path

import torch
from mmengine.dataset import pseudo_collate
from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from ewa3d.checks import check_integer
from ewa3d.engine.hooks import get_rng_state, set_rng_state, unwrapped
from ewa3d.registry import HOOKS

__all__ = ['ReconstructionHook', 'predict', 'show_picture']


@HOOKS.register_module()
class ReconstructionHook(Hook):
    """``pictures/epoch_N.png`` in the work dir: clouds as they are, what is visible of them, what is reconstructed.

    All pictures of a run show the same clouds, those of the validation data where there are some (training data are
    augmented otherwise every time), under the same masks. The run itself is not disturbed: its random generators go on
    as if there were no picture.

    Args:
        interval: a picture every so many epochs and at the end.
        num_clouds: how many clouds, spread evenly over the data set.
        seed: of the masks.

    Raises:
        TypeError, ValueError: a number out of range; a model whose predictions have no ``pred_points``.
    """
    priority = 'LOW'

    def __init__(self, interval: int = 10, num_clouds: int = 6, seed: int = 0):
        self.interval = check_integer('ReconstructionHook: interval', interval, 1)
        self.num_clouds = check_integer('ReconstructionHook: num_clouds', num_clouds, 1)
        self.seed = check_integer('ReconstructionHook: seed', seed, 0)

    def after_train_epoch(self, runner) -> None:
        if is_main_process() and (self.every_n_epochs(runner, self.interval) or self.is_last_train_epoch(runner)):
            path = self.draw(runner, Path(runner.work_dir) / 'pictures' / f'epoch_{runner.epoch + 1}.png')
            show_picture(runner, 'reconstructions', path)

    def draw(self, runner, path: Path) -> Path:
        """Write the picture of the model as it is now."""
        from ewa3d.visualization import draw_reconstructions
        loader = runner.train_dataloader if runner.val_loop is None else runner.val_dataloader
        dataset = loader.dataset
        count = min(self.num_clouds, len(dataset))
        batch = pseudo_collate([dataset[i * len(dataset) // count] for i in range(count)])
        clouds, samples = batch['inputs']['points'], predict(unwrapped(runner.model), batch, self.seed)
        if 'pred_points' not in samples[0]:
            raise ValueError(f'ReconstructionHook: {type(unwrapped(runner.model)).__name__} predicts no pred_points, '
                             f'but {sorted(samples[0].keys())}')
        masked = 'visible_points' in samples[0]
        made = [sample.reconstructed_points if masked else sample.pred_points for sample in samples]
        up = (getattr(dataset, 'metainfo', None) or {}).get('up_axis') or 'z'
        return draw_reconstructions(clouds, made, path, visible=[s.visible_points for s in samples] if masked else None,
                                    titles=[str(s.get('name', 'input')) for s in samples], up=up,
                                    heading=f'epoch {runner.epoch + 1}')


def show_picture(runner, tag: str, path: Path | None) -> None:
    """Hand a picture to the visualizer, where it has back ends (TensorBoard)."""
    if path is not None and runner.visualizer._vis_backends:
        from matplotlib.image import imread
        runner.visualizer.add_image(tag, (imread(path)[..., :3] * 255).round().astype('uint8'), step=runner.iter)


@torch.no_grad()
def predict(model, batch: dict, seed: int = 0) -> list:
    """The model's predictions in eval mode with masks of ``seed``; mode and random generators are put back."""
    training, state = model.training, get_rng_state()
    try:
        torch.manual_seed(seed)
        return model.eval().test_step(batch)
    finally:
        model.train(training)
        set_rng_state(state)
