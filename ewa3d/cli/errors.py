"""What a mistake looks like on the command line."""

__all__ = ['USER_ERRORS', 'one_line']

USER_ERRORS = (ValueError, TypeError, KeyError, OSError, ImportError, SyntaxError, NotImplementedError)
DISTRIBUTIONS = {'PIL': 'pillow', 'cv2': 'opencv-python-headless', 'sklearn': 'scikit-learn', 'skimage': 'scikit-image',
                 'yaml': 'pyyaml', 'open3d': "'ewa3d[3d]'"}  # module → what to install, where the names differ


def one_line(error: BaseException) -> str:
    """What went wrong, without a traceback (a data worker's error carries one in its text); where a package is missing,
    with the command that installs it."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    if any('Original Traceback' in line for line in lines):
        return lines[-1]
    if isinstance(error, ModuleNotFoundError) and error.name and 'pip install' not in text:
        package = error.name.partition('.')[0]
        if package != 'ewa3d':
            lines.append(f'(pip install {DISTRIBUTIONS.get(package, package)})')
    return ' '.join(lines)
