"""The training loop."""
from mmengine.runner import EpochBasedTrainLoop
from torch import nn

from ewa3d.registry import LOOPS

__all__ = ['TrainLoop']


@LOOPS.register_module()
class TrainLoop(EpochBasedTrainLoop):
    """mmengine's epoch loop that a stop cannot disturb.

    * A checkpoint from before a validation: that validation is run first.
    * A checkpoint from inside an epoch: the batches that were trained on are skipped.
    * A checkpoint from after the last iteration of an epoch, before its end: what happens there is done.
    """

    def start_at(self, iteration: int, epoch: int) -> None:
        """Go on after so many iterations, where a checkpoint says that ``epoch`` epochs had come to their end."""
        self._iter, self._epoch = iteration, iteration // len(self.dataloader)
        if epoch == self._epoch - 1 and iteration == self._epoch * len(self.dataloader):
            self._epoch = epoch

    def run(self) -> nn.Module:
        self.runner.call_hook('before_train')
        if self.runner.pending_validation:
            self.runner.val_loop.run()
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self._decide_current_val_interval()
            if self.validation_due():
                self.runner.val_loop.run()
        self.runner.call_hook('after_train')
        return self.runner.model

    def run_epoch(self) -> None:
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        done = self._iter - self._epoch * len(self.dataloader)
        for index, batch in enumerate(self.dataloader if done < len(self.dataloader) else ()):
            if index >= done:
                self._run_iter(index, batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def _run_iter(self, index: int, batch) -> None:
        try:
            self.run_iter(index, batch)
        except ValueError as error:
            if 'more than 1 value per channel' not in str(error):
                raise
            raise ValueError(
                f'train_dataloader.batch_size is {self.dataloader.batch_size} and this batch leaves a BatchNorm with '
                'one value per channel; at least 2 samples in every batch were expected (drop_last=True), '
                'or a head without BatchNorm') from error

    def validation_due(self) -> bool:
        """Whether this epoch boundary has a validation."""
        return (self.runner.val_loop is not None and self._epoch >= self.val_begin
                and (self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs))
