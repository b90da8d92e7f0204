"""What a mistake looks like on the command line."""
import re
import sys
import time
import traceback

__all__ = ['USER_ERRORS', 'end_rank', 'one_line', 'tell']

USER_ERRORS = (ValueError, TypeError, KeyError, OSError, ImportError, SyntaxError, NotImplementedError)
# module → what to install, where the names differ
DISTRIBUTIONS = {'PIL': 'pillow', 'cv2': 'opencv-python-headless', 'sklearn': 'scikit-learn', 'skimage': 'scikit-image',
                 'yaml': 'pyyaml', 'open3d': "'ewa3d[3d]'",
                 **dict.fromkeys(('onnx', 'onnxscript', 'onnxruntime'), "'ewa3d[export]'")}
FIRST = 2  # seconds that a rank leaves to the one that failed first, so that torchrun reports that one


def one_line(error: BaseException) -> str:
    """What went wrong, without a traceback (a data worker's error carries one in its text); where a package is missing,
    with the command that installs it."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in _of_worker(text).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, ModuleNotFoundError) and error.name and 'pip install' not in text:
        package = error.name.partition('.')[0]
        if package != 'ewa3d':
            lines.append(f'(pip install {DISTRIBUTIONS.get(package, package)})')
    return ' '.join(lines)


def _of_worker(text: str) -> str:
    """What comes after the traceback in the text of a data worker's error, and which worker; other text as it is."""
    lines = text.splitlines()
    if not any('Original Traceback' in line for line in lines):
        return text
    frame = max((i for i, line in enumerate(lines) if line.startswith('  File "')), default=0)
    rest = next((i for i in range(frame + 1, len(lines)) if not lines[i].startswith('    ')), len(lines) - 1)
    worker = re.search(r'worker process (\d+)', lines[0])
    return '\n'.join(([f'data worker {worker[1]}:'] if worker else []) + lines[rest:])


def tell(error: Exception) -> int:
    """Write what went wrong; gives the exit code (see :func:`ewa3d.cli.main`)."""
    if isinstance(error, USER_ERRORS):
        sys.stderr.write(f'error: {_rank()}{one_line(error)}\n')
        return 2
    if not type(error).__module__.startswith('ewa3d.'):
        sys.stderr.write(f'{_rank()}{traceback.format_exc()}')
        return 3
    sys.stderr.write(f'error: {_rank()}{one_line(error)}\n')
    from ewa3d.engine.ranks import EXIT_CODE, PeerError
    return EXIT_CODE if isinstance(error, PeerError) else 3


def end_rank(code: int) -> int:
    """``code``; one of several processes that failed ends here, since to leave in order is to wait for the others."""
    if code and _rank():
        from ewa3d.engine.ranks import EXIT_CODE, hard_exit
        if code == EXIT_CODE:
            sys.stderr.flush()
            time.sleep(FIRST)
        hard_exit(code)
    return code


def _rank() -> str:
    """``rank 1 of 2: `` where several processes run together."""
    dist = sys.modules.get('torch.distributed')
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return ''
    return f'rank {dist.get_rank()} of {dist.get_world_size()}: '
