"""Packaging. The top-level folders kernels/ and models/ install as `bimedix_jax.kernels` and `bimedix_jax.models`.

Never as `kernels` or `models`: Hugging Face has a distribution with a top-level package `kernels`, which ours would
overwrite. In the source tree two symlinks in bimedix_jax/ give the same names; here `package_dir` does, so that a
wheel holds each file once. experiments/, scripts/ and tests/ do not install.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
INIT = (ROOT / "bimedix_jax/__init__.py").read_text("utf-8")
VERSION = next(line.split('"')[1] for line in INIT.splitlines() if line.startswith("__version__ = "))

MAPPED = {"bimedix_jax.kernels": "kernels", "bimedix_jax.models": "models"}
PACKAGES = ["bimedix_jax"]
# the symlinks are left out here and their targets added below, so that each file has one name
LINKED = ["kernels", "kernels.*", "models", "models.*"]
PACKAGES += [f"bimedix_jax.{name}" for name in find_packages("bimedix_jax", exclude=LINKED)]
for package, folder in MAPPED.items():
    PACKAGES += [package, *(f"{package}.{name}" for name in find_packages(folder))]

# Lower bounds are what is tested (constraints/); upper ones only where a newer version is known to differ.
RUNTIME = [
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "numpy>=2.3",
    "scipy>=1.17",
    "ml_dtypes>=0.5.4",
    "jaxtyping>=0.3.11",
    "safetensors>=0.8.0",
    "tokenizers>=0.23.3",
    "sentencepiece>=0.2.3",
    "gguf>=0.19.0",
    "huggingface_hub>=2.4.0",
    "jinja2>=3.1.6",
    "pydantic>=2.12",
    "tyro>=1.0.17",
    "docstring_parser>=0.18",
    "rich>=14.0",
    "tqdm>=4.67",
    "pyarrow>=26.0",
    "grain>=0.2.18",
    "array_record>=0.8.3",
    "rensa>=0.5.0",
    "matplotlib>=3.10",
    "arabic-reshaper>=3.0.0",
    "python-bidi>=0.6.7",
    "wandb>=0.31.0",
]

LINUX = '; sys_platform == "linux"'
EXTRAS = {
    # fetching, translating and scoring data; `openai` talks to any server that offers its API
    "data": ["openai>=3.54", "datasets>=5.2.0", "sacrebleu>=2.6.0"],
    # lm-evaluation-harness without its own back ends: `bimedix eval harness`
    "eval": ["lm_eval>=0.4.13", "datasets>=5.2.0"],
    "serve": ["fastapi>=0.165", "uvicorn>=0.54"],
    "cuda12": ["jax[cuda12]>=0.10.2"],
    "tpu": ["jax[tpu]>=0.10.2"],
    # Compiling for GPUs and TPUs that are not there: XLA's CUDA plugin, the assembler ptxas and the TPU compiler, about
    # 1.3 GB unpacked. `cuda12-local` leaves CUDA's run-time libraries out on purpose: nothing of this runs on a GPU.
    # JAX's own extras ask for the plugin and the libtpu that belong to its version.
    "aot": [
        f"jax[cuda12-local]>=0.10.2{LINUX}",
        f"nvidia-cuda-nvcc-cu12>=12.6.85{LINUX}",
        f'jax[tpu]>=0.10.2{LINUX} and platform_machine == "x86_64"',
    ],
    # what `bimedix bench train` and `bench decode` compare with
    "bench": ["torch>=2.13", "transformers>=5.23", "peft>=0.21.2", "bitsandbytes>=0.50.2"],
    # torch, transformers, peft and bitsandbytes are what the tests compare with; nothing at run time imports them
    "dev": [
        "pytest>=9.2",
        "pytest-xdist>=3.8",
        "hypothesis>=6.170",
        "ruff>=0.17.6",
        "pyright[nodejs]>=1.1.414",  # node from PyPI, not from wherever nodeenv finds it
        "beartype>=0.23.1",
        "build>=1.3",
        "setuptools>=77",
        "torch>=2.13",
        "transformers>=5.23",
        "peft>=0.21.2",
        "bitsandbytes>=0.50.2",
        "accelerate>=1.15",
        "mistral-common>=1.13.1",
        "kernels",  # Hugging Face's: a test shows that ours and theirs live side by side
    ],
}

setup(
    name="bimedix_jax",
    version=VERSION,
    description="BiMediX in JAX: bilingual (English, Arabic) medical mixtures of experts, for research",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=PACKAGES,
    package_dir=MAPPED,
    package_data={
        "bimedix_jax": ["assets/**/*"],
        "bimedix_jax.kernels": ["x86/*"],  # C++, compiled where it runs
        "bimedix_jax.kernels.attention": ["avx512/*"],
        "bimedix_jax.kernels.expert_mlp": ["avx512/*"],
        "bimedix_jax.kernels.nf4_matmul": ["avx512/*"],
    },
    include_package_data=False,
    install_requires=RUNTIME,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["bimedix = bimedix_jax.cli:main"]},
    zip_safe=False,
)
