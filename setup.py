"""Lists the packages; everything else is in pyproject.toml."""

from setuptools import find_namespace_packages, find_packages, setup

CONF = "lightning_gemini.conf"  # lies in conf/; its groups are folders without a module

setup(
    packages=[
        *find_packages(include=["lightning_gemini", "lightning_gemini.*"]),
        CONF,
        *(f"{CONF}.{group}" for group in find_namespace_packages("conf")),
    ]
)
