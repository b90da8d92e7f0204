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

    Attributes:
        usage: by source of data, how inputs are prepared and outputs named (:class:`ewa3d.inference.Usage`);
            :func:`ewa3d.build` sets it.

    Raises:
        ValueError: a task without a head, a modality without tokenizer, a batch that no task learns from; both
            ``tasks`` and a ``head`` or ``neck``.
    """

    def __init__(self, backbone: dict | nn.Module, neck: dict | nn.Module | None = None,
                 head: dict | nn.Module | None = None, expand: Sequence[dict] | None = None,
                 pretrained: str | dict | None = None, data_preprocessor: dict | nn.Module | None = None,
                 tasks: dict | None = None, trainable: Sequence[str] | None = None):
        super().__init__(data_preprocessor)
        self.usage = {}
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

    def extract(self, points, out_indices: Sequence[int] | None = None):
        """Features: the head's input, or what blocks of the backbone give.

        Args:
            points: what the model takes, a tensor ``(B, N, 3 + F)`` or ``dict(points=…)``, as it is. Anything else, one
                cloud ``(N, 3 + F)``, numpy arrays, paths and lists of them, goes through the test pipeline first, see
                :meth:`prepare`; that is without gradients and in eval mode.
            out_indices: blocks of the backbone, negative ones counted from the end.

        Returns:
            pooled features, those of every point, or those of object queries; with tasks, a dict of that of each whose
            modality is given. With ``out_indices`` a tuple of the tokens behind each of these blocks,
            ``(B, num_prefix_tokens + L, C)``.
        """
        if not isinstance(points, (Tensor, Mapping)) or (isinstance(points, Tensor) and points.ndim == 2):
            from ewa3d.inference import evaluating
            inputs = self.prepare(points)
            with evaluating(self):
                return self.extract(inputs, out_indices)
        inputs = inputs_of(points)
        if out_indices is not None:
            return self._blocks(inputs, out_indices)
        if self.tasks is not None:
            return features_by_task(self.backbone, tasks_of_batch(self.tasks, inputs), inputs)
        if hasattr(self.neck, 'out_indices'):
            return self.neck(*self.backbone.located(inputs, self.neck.out_indices), inputs)
        feats = self.backbone(inputs)
        return feats if self.neck is None else self.neck(feats)

    def _blocks(self, inputs: Mapping, out_indices: Sequence[int]) -> tuple[Tensor, ...]:
        if isinstance(out_indices, (str, int)) or not len(out_indices):
            raise ValueError(f'out_indices must name blocks, such as (-1,), got {out_indices!r}')
        if hasattr(self.backbone, 'located') and not hasattr(self.backbone, 'modalities'):
            return self.backbone.located(inputs, out_indices)[0]
        return self.backbone(inputs, out_indices)

    def predict(self, points, category=None, task: str | None = None, threshold: float | None = None,
                pipeline: Sequence | None = None, batch_size: int = 32):
        """What the model says about clouds (images, clips) as people have them, with names.

        They go through the config's test pipeline, as the data set's own samples do: they need not be normalised,
        sampled or of one size. A cloud of fewer points than the pipeline takes repeats some. The model's mode and
        gradients are left as they are.

        Args:
            points: ``(N, 3 + F)`` numpy or torch, the path of a file (see :func:`ewa3d.datasets.io.read_cloud`), a list
                of them, or a batch ``(B, N, 3 + F)``; for images ``(H, W, C)`` bytes (torch: ``(C, H, W)``) or paths.
            category: of part segmentation, where the model is told it: a name or number, or one for each cloud.
            task: which one, of a model with several.
            threshold: boxes of a lower objectness are left out; by default the evaluation's.
            pipeline: another one than the config's.
            batch_size: how many go through the model at once.

        Returns:
            a :class:`~ewa3d.predictions.ClassPrediction` (label, name, score), a
            :class:`~ewa3d.predictions.PartPrediction` (a part for each of the points that were given) or a
            :class:`~ewa3d.predictions.BoxPrediction`; a list of them where a list or a batch was given.

        Raises:
            TypeError: what is no array of numbers or path. ValueError: another shape, NaN, a model without a pipeline,
                a category or task that is missing or unknown. FileNotFoundError: no such file.
        """
        from ewa3d.inference import predict
        return predict(self, points, category, task, threshold, pipeline, batch_size)

    def prepare(self, points, category=None, task: str | None = None, pipeline: Sequence | None = None):
        """The inputs, a dict of batches on the model's device, that :meth:`predict` would give to the model."""
        from ewa3d.inference import prepare
        return prepare(self, points, category, task, pipeline)

    def forward(self, inputs: dict | Tensor, data_samples: Sequence[Sample] | None = None, mode: str = 'tensor'):
        check_mode(mode)
        if self.tasks is not None:
            return self._forward_tasks(inputs_of(inputs), data_samples, mode)
        feats = self.extract(inputs_of(inputs))
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
