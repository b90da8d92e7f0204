"""The files: how each format is made, run and written, and its metadata read."""
import copy
import io
import json
import re
import tempfile
import zipfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ewa3d.engine.checkpoint import read_checkpoint, write_checkpoint
from ewa3d.export.capture import Captured, quiet, reason
from ewa3d.export.deploy import Deployed, deploy
from ewa3d.files import atomic_write

__all__ = ['FORMATS', 'OnnxProgram', 'TorchProgram', 'TimmWeights', 'Weights', 'read_metadata', 'require']

MEMBER = 'ewa3d.json'  # of a .pt2 archive
LARGEST = 2**31 - 1  # bytes of a protobuf message


def require(*packages: str) -> None:
    """Raise ``ModuleNotFoundError`` with the command that helps, unless all packages are there; none is imported."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"exporting to ONNX needs {', '.join(packages)}, and {missing[0]} is not installed: "
                                  "pip install 'ewa3d[export]'", name=missing[0])


class OnnxProgram:
    """An ONNX model, run by onnxruntime.

    Raises:
        NotImplementedError: ONNX lacks an operator or this ``opset``, or onnxruntime refuses the graph.
        ValueError: the model does not fit one file.
    """
    packages = ('onnx', 'onnxscript', 'onnxruntime')

    def __init__(self, captured: Captured, opset: int | None = None):
        import onnxruntime
        self.runtime = f'onnxruntime {onnxruntime.__version__}'
        self.captured = captured
        self.proto = self._converted(opset)
        self.opset = max(entry.version for entry in self.proto.opset_import if entry.domain in ('', 'ai.onnx'))
        if opset is not None and self.opset != opset:
            raise NotImplementedError(f'--opset {opset}: the graph cannot be written with it, it has {self.opset}')
        if self.proto.ByteSize() > LARGEST:
            raise ValueError('the model is larger than 2 GiB, which is what one .onnx file can hold; export to .pt2')
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(self.proto.SerializeToString(), options)
        except Exception as error:  # its classes of errors have no common base of their own
            raise NotImplementedError(f'onnxruntime cannot run the graph: {reason(error)}') from error

    def _converted(self, opset: int | None):
        with quiet():
            try:
                program = torch.onnx.export(self.captured.program, dynamo=True, verbose=False, opset_version=opset,
                                            input_names=list(self.captured.inputs),
                                            output_names=list(self.captured.outputs))
                proto = program.model_proto
            except Exception as error:  # one of torch's own, without public names
                raise NotImplementedError(_conversion(error, self.captured)) from error
        _tidy(proto.graph, self.captured.symbols)
        for function in proto.functions:
            _strip(function.node)
        return proto

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name."""
        names = [output.name for output in self.session.get_outputs()]
        found = self.session.run(names, {name: value.numpy() for name, value in inputs.items()})
        return dict(zip(names, map(torch.from_numpy, found)))

    def write(self, path: Path, record: Mapping) -> None:
        """The file, with ``record`` in its metadata."""
        import onnx
        onnx.helper.set_model_props(self.proto, {key: json.dumps(value) for key, value in record.items()})
        atomic_write(path, self.proto.SerializeToString())


class TorchProgram:
    """A file of ``torch.export.save``."""
    packages = ()

    def __init__(self, captured: Captured):
        self.runtime = f'torch {torch.__version__}'
        self.program = captured.program
        with quiet():
            file = io.BytesIO(self._saved({}))
            self.module = torch.export.load(file).module()  # what a reader gets, not what was saved

    def _saved(self, record: Mapping) -> bytes:
        file = io.BytesIO()
        with quiet():
            torch.export.save(self.program, file, extra_files={MEMBER: json.dumps(record)})
        return file.getvalue()

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name."""
        with torch.no_grad():
            return self.module(*inputs.values())

    def write(self, path: Path, record: Mapping) -> None:
        """The file, with ``record`` in its metadata."""
        atomic_write(path, self._saved(record))


class Weights:
    """A ``.safetensors`` file that :func:`ewa3d.build` opens: weights, and the config of the plain model as data.

    Args:
        model: the fused one. meta: of the checkpoint. inputs: the names of the model's.
        about: what is known of it, with its ``config`` and what was ``fused`` of which ``source``.
    """
    packages = ('safetensors',)

    def __init__(self, model: Deployed, about: Mapping, meta: Mapping, inputs: tuple[str, ...]):
        import ewa3d
        self.runtime = f'ewa3d {ewa3d.__version__}'
        self.weights = model.model.state_dict()
        self.meta = {**meta, 'cfg': about['config'], 'fused': dict(about['fused'], source=about['source'])}
        with tempfile.TemporaryDirectory() as folder:
            path = write_checkpoint(Path(folder) / 'weights.safetensors', self.weights, self.meta)
            again = ewa3d.build(path)
        self.again = deploy(again.to(next(model.parameters()).dtype), inputs, model.task, model.features)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name."""
        with torch.no_grad():
            return self.again(**inputs)

    def write(self, path: Path, record: Mapping) -> None:
        """The file, with ``record`` in its metadata."""
        record = {key: value for key, value in record.items() if key != 'config'}  # meta has the whole
        write_checkpoint(path, self.weights, {**self.meta, 'export': record})


class TimmWeights:
    """A ``.safetensors`` file of the weights under timm's own names, for ``load_state_dict(strict=True)``.

    Attributes:
        timm: name, number of classes and keywords of the ``timm.create_model`` that the weights are for.
    """
    packages = ('safetensors', 'timm')

    def __init__(self, model: nn.Module, cfg: Mapping):
        import timm

        from ewa3d.models.timm_backbone import classifiers_of, timm_weights
        self.runtime = f'timm {timm.__version__}'
        self.state = {key: value.contiguous() for key, value in timm_weights(model).items()}
        options = {key: value for key, value in cfg['model']['backbone'].items()
                   if key not in ('type', 'name', 'checkpoint', 'pool', 'num_frames')}
        heads = [self.state[f'{name}.weight'] for name in classifiers_of(model.backbone.model)
                 if f'{name}.weight' in self.state]
        self.timm = dict(name=model.backbone.name, num_classes=heads[0].shape[0] if heads else 0, kwargs=options)
        self.plain = timm.create_model(model.backbone.name, num_classes=self.timm['num_classes'],
                                       **options).to(next(model.parameters()).dtype).eval()
        self.plain.load_state_dict(self.state, strict=True)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name."""
        with torch.no_grad():
            if self.timm['num_classes']:
                return dict(logits=self.plain(inputs['img']))
            return dict(features=self.plain.forward_features(inputs['img']))

    def write(self, path: Path, record: Mapping) -> None:
        """The file, with ``record`` in its metadata."""
        from safetensors.torch import save
        record = {**record, 'timm': self.timm}
        header = {key: json.dumps(value) for key, value in record.items()}
        atomic_write(path, save({key: value.clone() for key, value in self.state.items()},
                                metadata=dict(header, format='pt')))


FORMATS = {'.onnx': OnnxProgram, '.pt2': TorchProgram, '.safetensors': Weights}


def read_metadata(path: str | Path) -> dict:
    """What :func:`ewa3d.export.export_checkpoint` wrote into a file about it; nothing in the file is run.

    Raises:
        FileNotFoundError: there is no such file. ValueError: another suffix, or a file of something else.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f'{path}: an exported model ends in {", ".join(FORMATS)}, got {path.suffix!r}')
    if not path.is_file():
        raise FileNotFoundError(f'{path}: there is no such file')
    found = {'.onnx': _of_onnx, '.pt2': _of_archive, '.safetensors': _of_safetensors}[path.suffix](path)
    if not isinstance(found, dict) or 'ewa3d' not in found:
        raise ValueError(f'{path} was not exported by ewa3d')
    return found


def _of_onnx(path: Path) -> dict:
    require('onnx')
    import onnx
    try:
        proto = onnx.load(path, load_external_data=False)
        return {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    except Exception:  # damaged bytes can make protobuf fail in any way; metadata of others are no JSON
        return {}


def _of_archive(path: Path) -> dict:
    try:
        with zipfile.ZipFile(path) as file:
            name = next((name for name in file.namelist() if name.endswith(f'/{MEMBER}')), None)
            return json.loads(file.read(name)) if name else {}
    except (zipfile.BadZipFile, OSError, ValueError):
        return {}


def _of_safetensors(path: Path) -> dict:
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework='pt') as file:
            header = file.metadata() or {}
        if 'ewa3d' in header:
            return {key: json.loads(value) for key, value in header.items() if key != 'format'}
    except (SafetensorError, ValueError):
        return {}
    meta = read_checkpoint(path).get('meta') or {}
    return {**meta['export'], 'config': meta.get('cfg')} if isinstance(meta.get('export'), dict) else {}


# ---------------------------------------------------------------------------------------------------------------------
# ONNX
# ---------------------------------------------------------------------------------------------------------------------
def _tidy(graph, symbols: Mapping[str, str]) -> None:
    """Dimensions under their names, and no places in source files, in a graph and in those inside it."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r'\bs\d+\b', lambda found: symbols.get(found[0], found[0]), dim.dim_param)
    _strip(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField('g'):
                _tidy(attribute.g, symbols)


def _strip(nodes) -> None:
    for node in nodes:
        node.ClearField('metadata_props')
        node.ClearField('doc_string')


def _conversion(error: Exception, captured: Captured) -> str:
    """The operator that has no translation, and the module that it stands in."""
    chain, text = error, ''
    while chain is not None:
        text += f'\n{chain}'
        chain = chain.__cause__
    found = re.search(r"OpOverload\(op='([\w.]+)', overload='(\w+)'\)", text)
    if found is None:
        return f'the graph cannot be converted to ONNX: {reason(error)}'
    target = f'{found[1]}.{found[2]}'
    nodes = copy.copy(captured.program.graph.nodes)
    node = next((node for node in nodes if str(node.target) == target), None)
    stack = list((node.meta.get('nn_module_stack') or {}).values()) if node is not None else []
    where, kind = (stack[-1][0], str(stack[-1][1]).rpartition('.')[2]) if stack else ('', 'model')
    where = re.sub(r"^.*?model'?\]?\.?", '', where, count=1) or 'the model'
    return f'{where} ({kind}) cannot be exported to ONNX: the exporter knows no {target}'
