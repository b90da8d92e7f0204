"""What pyproject.toml cannot say: the folder configs/ goes into the wheel, as ewa3d/configs."""
from pathlib import Path
from shutil import copytree, ignore_patterns

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """In a checkout, also an editable one, the package reads them where they are."""

    def run(self):
        super().run()
        if not self.editable_mode:
            copytree(Path(__file__).resolve().parent / 'configs', Path(self.build_lib) / 'ewa3d' / 'configs',
                     ignore=ignore_patterns('__pycache__'), dirs_exist_ok=True)


setup(cmdclass={'build_py': BuildWithConfigs})
