"""From a checkpoint to a file for another runtime, with the proof that it computes the same."""
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import ewa3d
from ewa3d.checks import check_integer, check_number
from ewa3d.engine.checkpoint import check_target, read_checkpoint, select_weights
from ewa3d.engine.plain import to_plain
from ewa3d.export.capture import Captured, capture
from ewa3d.export.deploy import deploy, inputs_of_task
from ewa3d.export.programs import FORMATS, OnnxProgram, TimmWeights, TorchProgram, Weights, require
from ewa3d.fusing import TOLERANCE, config_of, example_inputs, fuse_and_compare, plain_config
from ewa3d.progress import Progress
from ewa3d.registry import nearest

__all__ = ['DTYPES', 'ExportReport', 'export_checkpoint']

DTYPES = {'float32': 1e-4, 'float64': 1e-9, 'float16': 2e-2, 'bfloat16': 1e-1}  # name → tolerance


@dataclass
class ExportReport:
    """What :func:`export_checkpoint` did; ``str()`` is what the command prints.

    Attributes:
        record: what the file says about itself.
        written: whether there is a file.
    """
    out: Path
    record: dict
    tolerance: float
    written: bool = False
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        record, difference = self.record, self.record['difference']
        lines = [*self.notes, f'inputs: {_shapes(record["inputs"])}', f'outputs: {_shapes(record["outputs"])}',
                 _may_vary(record['varies'])]
        checked = ', '.join(' × '.join(map(str, size.values())) for size in difference['checked'])
        lines.append(f'checked with {difference["runtime"]} on {" × ".join(difference["checked"][0])}: {checked}')
        lines.append(f'largest output difference: {difference["absolute"]:.3g} absolute, '
                     f'{difference["relative"]:.3g} relative, in {difference["output"]}')
        lines.append(f'wrote {self.out} ({self.out.stat().st_size / 1e6:.1f} MB)' if self.written else
                     f'refused to write {self.out}: {difference["relative"]:.3g} is more than {self.tolerance:g}')
        return '\n'.join(lines)


def export_checkpoint(checkpoint: str | Path, out: str | Path, config=None, *, task: str | None = None,
                      features: bool = False, timm: bool = False, dynamic: bool = True, batch_size: int | None = None,
                      num_points: int | None = None, opset: int | None = None, dtype: str = 'float32',
                      tolerance: float | None = None, check_batches: Sequence[int] = (1, 2, 5),
                      check_points: Sequence[int] | None = None, seed: int = 0, force: bool = False) -> ExportReport:
    """Fuse the model of ``checkpoint``, write it for another runtime, compare what that computes with torch.

    The suffix of ``out`` says what is written: ``.onnx``; ``.pt2``, of ``torch.export``; ``.safetensors``, which
    :func:`ewa3d.build` opens. The tokenizer is in the graph: farthest points and nearest neighbours, too. Files say
    about themselves what they are, see :func:`~ewa3d.export.programs.read_metadata`.

    Args:
        checkpoint: a file that training, fusing or another project wrote.
        config: a config that you trust; by default the one in the checkpoint, as data.
        task: of a model with several.
        features: the model without its head.
        timm: a ``.safetensors`` with the names of plain timm, for a model whose backbone is of timm.
        dynamic: leave the size of the batch and the number of points open, instead of ``batch_size`` (1) and
            ``num_points`` (the config's).
        opset: of ONNX; by default what the exporter writes.
        dtype: of weights, inputs and outputs.
        tolerance: the largest output difference, relative to the largest output, at which ``out`` is written; by
            default that of ``DTYPES``.
        check_batches, check_points: the sizes that are compared, besides that of the config; by default of points the
            least that there may be, and a third more than usual.
        seed: of the inputs that are drawn for that.
        force: replace ``out`` where it exists.

    Raises:
        FileExistsError, OSError, ValueError, TypeError: what is asked for cannot be done; nothing was written.
        ModuleNotFoundError: a package that the format needs. NotImplementedError: the model, or a module in it, has no
            form there; the message names it.
    """
    checkpoint, out = Path(checkpoint), check_target(out, checkpoint, tuple(FORMATS))
    if out.exists() and not force:
        raise FileExistsError(f'{out} is there already; --force replaces it')
    tolerance = _checked(out, dtype, tolerance, opset, timm, batch_size, num_points, check_batches, check_points)
    require(*(TimmWeights if timm else FORMATS[out.suffix]).packages)
    with Progress(f'export {out.name}', 3 + max(len(check_batches), len(check_points or (1, 2, 3)))) as bar:
        content = read_checkpoint(checkpoint)
        cfg = config_of(content, config, checkpoint)
        expanded = ewa3d.build(cfg, checkpoint).eval().requires_grad_(False)
        example = inputs_of_task(expanded, example_inputs(cfg, num_points=num_points), task)
        notes, fused, plain = _fuse(expanded, example_inputs(cfg))
        usual = num_points or _size(example).get('points')

        def draw(batch: int, points: int | None, number: int = 0) -> dict[str, Tensor]:
            found = example_inputs(cfg, batch, seed + number, points)
            return {key: value.to(getattr(torch, dtype)) if value.is_floating_point() else value
                    for key, value in found.items() if key in example}

        model = deploy(plain.to(getattr(torch, dtype)), tuple(example), task, features)
        first = draw(max(batch_size or 2, 2) if dynamic else batch_size or 1, usual)  # 1 would be built into the graph
        bar.advance(text='tracing')
        captured = None if out.suffix == '.safetensors' else capture(model, first, dynamic)
        about = dict(_about(cfg, content, plain, task), source=checkpoint.name, fused=fused)
        bar.advance(text=f'converting to {out.suffix}')
        if out.suffix == '.onnx':
            program = OnnxProgram(captured, opset)
        elif out.suffix == '.pt2':
            program = TorchProgram(captured)
        elif timm:
            program = TimmWeights(plain, cfg)
            model = model if program.timm['num_classes'] else _Tokens(plain)
        else:
            meta = dict(content.get('meta') or {}, weights=select_weights(content)[1])
            program = Weights(model, about, meta, tuple(example))
        cases = list(_cases(captured, usual, check_batches, check_points)) if dynamic else [_size(first)]
        bar.advance(text='comparing')

        def drawn() -> Iterator[dict[str, Tensor]]:
            for number, case in enumerate(cases):
                yield draw(*_pair(case), number)
                bar.advance()

        difference = _compare(model, program.run, drawn())
    record = dict(about, **_sizes(captured, model, first), difference=dict(
        difference, tolerance=tolerance, checked=cases, runtime=program.runtime,
        against=f'torch {torch.__version__} {dtype}'))
    report = ExportReport(out, record, tolerance, notes=notes)
    if difference['relative'] <= tolerance:  # NaN is refused too
        program.write(out, record)
        report.written = True
    return report


class _Tokens(nn.Module):
    """What plain timm's ``forward_features`` gives."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.backbone = model.backbone

    def forward(self, img: Tensor) -> dict[str, Tensor]:
        return dict(features=self.backbone.model.forward_features(img))


def _checked(out: Path, dtype: str, tolerance: float | None, opset: int | None, timm: bool, batch_size: int | None,
             num_points: int | None, check_batches: Sequence[int], check_points: Sequence[int] | None) -> float:
    """The tolerance, if the options are some that go together."""
    if dtype not in DTYPES:
        raise ValueError(f'dtype={dtype!r}; {nearest(dtype, DTYPES)}')
    if out.suffix == '.onnx' and dtype == 'bfloat16':
        raise ValueError('dtype=bfloat16: onnxruntime has none on a CPU, so what is written could not be checked')
    if opset is not None and out.suffix != '.onnx':
        raise ValueError(f'opset={opset} is for .onnx, got {out.name}')
    if timm and out.suffix != '.safetensors':
        raise ValueError(f'weights for timm are a .safetensors file, got {out.name}')
    for name, values in (('batch_size', [batch_size]), ('num_points', [num_points]), ('check_batches', check_batches),
                         ('check_points', check_points or ())):
        for value in values:
            if value is not None:
                check_integer(name, value, 1)
    if not check_batches:
        raise ValueError('check_batches is empty; a number was expected')
    if opset is not None:
        check_integer('opset', opset, 18)
    return check_number('tolerance', DTYPES[dtype] if tolerance is None else tolerance, '[0, inf)')


def _fuse(expanded: nn.Module, example: Mapping[str, Tensor]) -> tuple[list[str], dict, nn.Module]:
    """What there is to say about fusing, for people and for the file, and the plain model."""
    plain, rows, difference = fuse_and_compare(expanded, example)
    count = sum(row.status == 'fused' for row in rows)
    kept = sorted({row.before for row in rows if row.status == 'kept'})
    relative = difference['float32']['relative']
    if not relative <= TOLERANCE:
        raise ValueError(f'the fused model is another one: the outputs differ by {relative:.3g} (relative), more than '
                         f'{TOLERANCE:g}')
    notes = [f'fused {count} modules: the outputs differ by {relative:.3g} (relative)' if count else
             'there was nothing to fuse']
    if kept:
        notes.append(f'kept as they are: {", ".join(kept)}')
    return notes, dict(modules=count, difference=difference), plain


# ---------------------------------------------------------------------------------------------------------------------
# The comparison
# ---------------------------------------------------------------------------------------------------------------------
def _cases(captured: Captured | None, usual: int | None, batches: Sequence[int],
           points: Sequence[int] | None) -> Iterator[dict[str, int]]:
    """The sizes that are compared: every one of both lists at least once."""
    if usual is None:
        yield from (dict(batch=batch) for batch in batches)
        return
    least = usual if captured is None else captured.varies.get('points', [usual])[0]
    several = captured is None or 'points' in captured.varies
    points = list(points or ((least, usual, usual + usual // 3) if several else (usual,)))
    for i in range(max(len(batches), len(points))):
        yield dict(batch=batches[i % len(batches)], points=points[i % len(points)])


def _size(inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """How large a batch, and of clouds how many points."""
    name, value = next(iter(inputs.items()))
    return dict(batch=value.shape[0], points=value.shape[-2]) if name == 'points' else dict(batch=value.shape[0])


def _pair(size: Mapping[str, int]) -> tuple[int, int | None]:
    return size['batch'], size.get('points')


@torch.no_grad()
def _compare(model: nn.Module, run: Callable[[dict], dict], inputs: Iterator[dict[str, Tensor]]) -> dict:
    """The largest difference of the outputs of ``run``, ``absolute`` and ``relative`` to the largest value of that
    output, and in which ``output``; NaN where there is one."""
    differences = []
    for given in inputs:
        expected = model(**given)
        for name, value in run(given).items():
            one, other = expected[name].double(), value.double()
            if one.shape != other.shape:
                raise ValueError(f'{name} has the shape {tuple(other.shape)}, {tuple(one.shape)} was expected')
            absolute = float((one - other).abs().max())
            relative = absolute / max(float(one.abs().max()), torch.finfo(expected[name].dtype).tiny)
            differences.append(dict(absolute=absolute, relative=relative, output=name))
    return max(differences, key=lambda found: math.inf if math.isnan(found['relative']) else found['relative'])


# ---------------------------------------------------------------------------------------------------------------------
# What a file says about itself
# ---------------------------------------------------------------------------------------------------------------------
def _sizes(captured: Captured | None, model: nn.Module, first: Mapping[str, Tensor]) -> dict:
    """Shapes and types of what goes in and comes out; of weights alone those of an example."""
    if captured is not None:
        inputs, outputs = ({name: dict(shape=shape, dtype=captured.dtypes[name]) for name, shape in shapes.items()}
                           for shapes in (captured.inputs, captured.outputs))
        return dict(inputs=inputs, outputs=outputs, varies=captured.varies)
    with torch.no_grad():
        found = model(**first)
    inputs, outputs = ({name: dict(shape=['batch', *value.shape[1:]], dtype=str(value.dtype).removeprefix('torch.'))
                        for name, value in values.items()} for values in (first, found))
    varies = dict(batch=[1, None])
    if 'points' in first:
        inputs['points']['shape'][-2], varies['points'] = 'points', [None, None]  # the least is the tokenizer's
    return dict(inputs=inputs, outputs=outputs, varies=varies)


def _about(cfg: Mapping, content: Mapping, plain: nn.Module, task: str | None) -> dict:
    """What the model is for: names of classes and parts, the pipeline, the config."""
    usages = getattr(plain, 'usage', None) or {}
    source = None if plain.tasks is None else plain.tasks[task or next(iter(plain.tasks))].data
    usage = usages.get(source) or usages.get(None)
    known = (content.get('meta') or {}).get('dataset_meta') or {}
    known = (known.get('sources') or {}).get(source) or known
    meta = {**({} if usage is None else usage.metainfo), **known}
    return to_plain(dict(
        ewa3d=ewa3d.__version__, versions=dict(torch=str(torch.__version__), ewa3d=ewa3d.__version__),
        classes=list(meta.get('classes') or []), parts=dict(meta.get('parts') or {}),
        pipeline=[] if usage is None else list(usage.pipeline), config=plain_config(cfg, plain)), 'metadata')


def _shapes(values: Mapping[str, Mapping]) -> str:
    return ', '.join(f'{name} ({", ".join(map(str, value["shape"]))}) {value["dtype"]}'
                     for name, value in values.items())


def _may_vary(varies: Mapping[str, Sequence[int | None]]) -> str:
    if not varies:
        return 'nothing may vary: all sizes are fixed'
    limits = (name if least is None else f'{name} from {least} {"on" if most is None else f"to {most}"}'
              for name, (least, most) in varies.items())
    return f'may vary: {", ".join(limits)}; everything else is fixed'
