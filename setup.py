"""What pyproject.toml can't say: the config tree, at the top of the repository, is the package divflow.configs of a wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["divflow*"]), "divflow.configs"],
    package_dir={"divflow.configs": "configs"},
    package_data={"divflow": ["py.typed"], "divflow.configs": ["**/*.yaml"]},
)
