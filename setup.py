"""Two source roots: `src/` is the package, `kernels/` holds `xlstm_kernels` (and must never become a package itself)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "src/xlstm_hybrid/__init__.py").read_text())[1]

TRAIN = ["trl>=1.16,<2", "peft>=0.21", "datasets>=4", "accelerate>=1.10", "matplotlib>=3.8"]
EVAL = ["lm-eval>=0.4.13", "matplotlib>=3.8"]
EVAL_PAPER = ["lm-eval[math,ifeval]>=0.4.13"]
ENERGY = ["nvidia-ml-py>=12"]  # imported as pynvml
SERVE = ["fastapi", "uvicorn", "openai"]
QUANT = ["bitsandbytes>=0.50"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.29"]
TEST = ["pytest>=8", "pytest-xdist>=3", "ruff>=0.9", "triton>=3.6; platform_system == 'Linux'"]  # its interpreter and compiler need no GPU

setup(
    name="xlstm-hybrid",
    version=VERSION,
    description="Distil pretrained Transformers into hybrid xLSTM students, inside Hugging Face Transformers",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "src", "xlstm_kernels": "kernels/xlstm_kernels", "xlstm_hybrid.recipes": "recipes"},
    packages=[*find_packages("src", exclude=["xlstm_arena*"]), *find_packages("kernels"), "xlstm_hybrid.recipes"],
    package_data={"xlstm_hybrid": ["reports/card_template.md", "evaluation/lm_eval_tasks/*"],
                  "xlstm_hybrid.recipes": ["*.yaml", "accelerate/*.yaml", "arena/*.yaml", "tiny_teacher/*.*",
                                           "tiny_teacher/tiny-llama/*"]},
    install_requires=["torch>=2.10,<2.14", "transformers>=5.17,<6", "safetensors>=0.5"],  # torch's GPU builds bring triton themselves
    extras_require={"train": TRAIN, "eval": EVAL, "eval-paper": EVAL_PAPER, "energy": ENERGY, "test": TEST, "serve": SERVE, "quant": QUANT,
                    "docs": DOCS, "gpu": ["triton>=3.6"], "all": sorted({*TRAIN, *EVAL, *TEST})},
    entry_points={"console_scripts": ["xlstm-hybrid=xlstm_hybrid.cli:main"]},
)
