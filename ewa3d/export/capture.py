"""From a deployed model to the graph of its operators, and what of its input shapes may vary."""
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

__all__ = ['Captured', 'capture', 'quiet', 'reason']


class Captured(NamedTuple):
    """A graph and the names around it.

    Attributes:
        program: torch's.
        inputs, outputs: by name, the shape: numbers, and the names of dimensions that vary (or expressions of them).
        dtypes: of both, by name.
        varies: dimension → its least and its largest size (``None``: no limit).
        symbols: torch's name for a dimension → ours.
    """
    program: ExportedProgram
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    dtypes: dict[str, str]
    varies: dict[str, list[int | None]]
    symbols: dict[str, str]


def capture(model: nn.Module, example: Mapping[str, Tensor], dynamic: bool = True) -> Captured:
    """The graph of ``model`` on inputs like ``example``, which are its arguments in this order.

    Args:
        dynamic: leave the size of the batch open and, of clouds, how many points they have.

    Raises:
        NotImplementedError: something in the model cannot be a graph; the module is named, and the reason.
    """
    axes = {name: _axes(name, value) if dynamic else {} for name, value in example.items()}
    batch = Dim('batch', min=1)
    shapes = tuple({axis: batch if kind == 'batch' else Dim.AUTO for axis, kind in axes[name].items()}
                   for name in example)
    torch._dynamo.reset()  # loops that were traced before, at another size, would keep this one from being any size
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(model, tuple(example.values()), dynamic_shapes=shapes, strict=False)
            answer = model(*example.values())
    except Exception as error:  # whatever torch, or a module that is traced, raises
        raise NotImplementedError(_refusal(error, model)) from error
    names = program.graph_signature.user_inputs
    values = {node.name: node.meta['val'] for node in program.graph.nodes if 'val' in node.meta}
    symbols = {}
    for name, node in zip(example, names):
        for axis, kind in axes[name].items():
            size = values[node].shape[axis]
            if not isinstance(size, int):
                symbols[str(size)] = kind
    shape_of = lambda node: [_named(size, symbols) for size in values[node].shape]  # noqa: E731
    outputs = dict(zip(answer, program.graph_signature.user_outputs))
    limits = {symbols[str(symbol)]: [int(limit.lower), None if str(limit.upper) == 'int_oo' else int(limit.upper)]
              for symbol, limit in program.range_constraints.items() if str(symbol) in symbols}
    dtypes = {name: str(values[node].dtype).removeprefix('torch.')
              for name, node in (*zip(example, names), *outputs.items())}
    _forget_sources(program.graph_module)
    return Captured(program, {name: shape_of(node) for name, node in zip(example, names)},
                    {name: shape_of(node) for name, node in outputs.items()}, dtypes, limits, symbols)


def _forget_sources(module: torch.fx.GraphModule) -> None:
    """Leave out where in source files the operators come from: files travel."""
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop('stack_trace', None)


def _axes(name: str, value: Tensor) -> dict[int, str]:
    """Which axes of an input vary."""
    return {0: 'batch', value.ndim - 2: 'points'} if name == 'points' else {0: 'batch'}


def _named(size, symbols: Mapping[str, str]) -> int | str:
    if isinstance(size, int):
        return size
    text = str(size)
    return symbols.get(text, text)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and remarks that torch makes about its own insides."""
    loggers = [logging.getLogger(name) for name in ('torch', 'torch.onnx', 'torch.export', 'onnxscript', 'onnx_ir')]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong
# ---------------------------------------------------------------------------------------------------------------------
def _refusal(error: Exception, model: nn.Module) -> str:
    text = str(error)
    if 'batch' in text and ('specialized' in text or 'inferred to be a constant' in text):
        return 'the graph of the model has the size of the batch built in; --static exports it for one size'
    name, module = _culprit(error.__traceback__, model)
    return f'{name} ({type(module).__name__}) cannot be exported: {reason(error)}'


def _culprit(traceback: TracebackType | None, model: nn.Module) -> tuple[str, nn.Module]:
    """The innermost of the model's modules in which an error was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    name, found = 'the model', model
    while traceback is not None:
        module = traceback.tb_frame.f_locals.get('self')
        if id(module) in names and names[id(module)]:
            name, found = names[id(module)].removeprefix('model.'), module
        traceback = traceback.tb_next
    return name, found


def reason(error: BaseException) -> str:
    """The sentence of an error of torch's, which can be pages, that says what is wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f'{type(error).__name__}: {" ".join(lines[:1])[:300]}' if lines else type(error).__name__
