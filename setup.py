"""The wheel: the package, and inside it as paradiffusion/shipped what a checkout has beside it. The rest is in pyproject.toml."""

from setuptools import find_packages, setup

SHIPPED = {
    "paradiffusion.shipped": (".", []),  # train.py, sample.py and app.py
    "paradiffusion.shipped.scripts": ("scripts", ["slurm.sh"]),
    "paradiffusion.shipped.configs": ("configs", ["**/*.yaml"]),
    "paradiffusion.shipped.data": ("data", ["*.txt", "*.jsonl", "nano/**", "nano_codec/**", "nano_codec_white/**"]),
}
setup(
    packages=[*find_packages(include=["paradiffusion*"]), *SHIPPED],
    package_dir={name: folder for name, (folder, _) in SHIPPED.items()},
    package_data={
        "paradiffusion": ["**/*.html", "**/*.md", "**/*.css", "**/*.js", "**/*.toml"],
        **{name: patterns for name, (_, patterns) in SHIPPED.items()},
    },
)
