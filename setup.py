"""Everything is in pyproject.toml. This only refuses to build what would be installed beside other packages."""

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError


class EditableOnly(build_py):
    """Wheels and `setup.py install` come through here; so do editable builds, which copy nothing."""

    def run(self) -> None:
        if not self.editable_mode:
            raise SetupError(
                "moe-harness can only be installed with `pip install -e .`: its top-level packages have plain names "
                "(kernels, cases, reference, harness) and would overwrite another package's files in site-packages"
            )
        super().run()


setup(cmdclass={"build_py": EditableOnly})
