"""The model that a runner trains: preprocessor, backbone, neck and head, or several tasks with theirs."""
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ewa3d.layers.temporal import bind_frames
from ewa3d.layers.video_tokens import frames_of_backbone
from ewa3d.models.base import ExpandableModel, build_module, check_mode, inputs_of
from ewa3d.models.tasks import build_branch, build_tasks, features_by_task, predict_tasks, tasks_of_batch
from ewa3d.registry import MODELS
from ewa3d.structures import Sample

__all__ = ['TaskModel']


@MODELS.register_module()
class TaskModel(ExpandableModel):
    """Backbone, neck and head behind mmengine's calls.

    Args:
        backbone, neck, head: modules or configs. What follows from another part is filled in where a config leaves it
            out: the neck's ``num_prefix_tokens``, ``embed_dim``, ``in_channels``, ``skip_origin`` and ``num_frames``,
            the head's ``in_channels``, the ``num_frames`` of every STDHA. A neck with ``out_indices`` is given the
            features of these blocks, where the tokens sit, and the inputs.
        expand, pretrained, trainable: see :meth:`ExpandableModel.finish`.
        data_preprocessor: ``Preprocessor`` unless given.
        tasks: instead of one neck and head, several by name: ``name → dict(head, neck=None, modality=None, data=name,
            loss_weight=1.0)``. ``modality`` is the name of the backbone's tokenizer, ``data`` the source of a
            ``MixedDataset``; several tasks may have the same. A batch is of one source, and the tasks of that source
            learn from it. Losses and metrics have the task's name in front, ``cifar10/loss_cls``. Where
            several tasks predict for a sample, ``sample.by_task[name]`` holds each one's own.

    Shape:
        - inputs ``dict(points=(B, N, 3 + F))`` or ``dict(img=(B, C, H, W))``, of clips ``(B, T, N, 3 + F)`` or
          ``dict(video=(B, T, C, H, W))``, and what else the neck asks for (``category=(B,)``).
        - returns the head's raw output (``mode='tensor'``; with tasks a dict of those whose modality is given), a dict
          of losses (``'loss'``) or samples (``'predict'``).

    Raises:
        ValueError: a task without a head, a modality without tokenizer, a batch that no task learns from; both
            ``tasks`` and a ``head`` or ``neck``.
    """

    def __init__(self, backbone: dict | nn.Module, neck: dict | nn.Module | None = None,
                 head: dict | nn.Module | None = None, expand: Sequence[dict] | None = None,
                 pretrained: str | dict | None = None, data_preprocessor: dict | nn.Module | None = None,
                 tasks: dict | None = None, trainable: Sequence[str] | None = None):
        super().__init__(data_preprocessor)
        self.backbone = build_module(backbone)
        self.tasks = None
        if tasks is not None:
            if neck is not None or head is not None:
                raise ValueError('TaskModel: with tasks, each has a neck and a head of its own; found neck or head '
                                 'beside them')
            self.tasks = build_tasks(self.backbone, tasks)
        elif getattr(self.backbone, 'modalities', ()):
            raise ValueError(f'TaskModel: the backbone has tokenizers for {", ".join(self.backbone.modalities)}; which '
                             'task sees which is said by tasks=dict(name=dict(modality=…, head=…))')
        self.neck, self.head = build_branch(self.backbone, neck, head) if tasks is None else (None, None)
        self.finish(pretrained, expand, trainable)
        bind_frames(self, frames_of_backbone(self.backbone))

    def extract(self, points: Tensor | dict) -> Tensor | dict[str, Tensor]:
        """The head's input, of ``points`` ``(B, N, 3 + F)`` or of ``dict(points=...)``: pooled features, those of
        every point, or those of object queries. With tasks, a dict of that of each whose modality is given."""
        inputs = inputs_of(points)
        if self.tasks is not None:
            return features_by_task(self.backbone, tasks_of_batch(self.tasks, inputs), inputs)
        if hasattr(self.neck, 'out_indices'):
            return self.neck(*self.backbone.located(inputs, self.neck.out_indices), inputs)
        feats = self.backbone(inputs)
        return feats if self.neck is None else self.neck(feats)

    def forward(self, inputs: dict | Tensor, data_samples: Sequence[Sample] | None = None, mode: str = 'tensor'):
        check_mode(mode)
        if self.tasks is not None:
            return self._forward_tasks(inputs_of(inputs), data_samples, mode)
        feats = self.extract(inputs)
        if self.head is None:
            if mode == 'tensor':
                return feats
            raise ValueError(f'mode={mode!r} needs a head; this model has none')
        if mode == 'tensor':
            return self.head(feats)
        if mode == 'predict':
            return self.head.predict(feats, data_samples)
        if data_samples is None:
            raise ValueError("mode='loss' needs data_samples")
        return self.head.loss(feats, data_samples)

    def _forward_tasks(self, inputs: Mapping, data_samples: Sequence[Sample] | None, mode: str):
        if mode == 'loss' and data_samples is None:
            raise ValueError("mode='loss' needs data_samples")
        tasks = tasks_of_batch(self.tasks, inputs, data_samples)
        feats = features_by_task(self.backbone, tasks, inputs)
        if mode == 'tensor':
            return {name: task.head(feats[name]) for name, task in tasks.items()}
        if mode == 'predict':
            return predict_tasks(tasks, feats, data_samples)
        return {f'{name}/{key}': value * task.loss_weight if 'loss' in key else value for name, task in tasks.items()
                for key, value in task.head.loss(feats[name], data_samples).items()}
