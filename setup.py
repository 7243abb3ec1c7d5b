"""Two source roots: `src/` is the package, `kernels/` holds `xlstm_kernels` (and must never become a package itself)."""

import re
import runpy
import sys
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "src/xlstm_hybrid/__init__.py").read_text(encoding="utf-8"))[1]

TABLE = runpy.run_path(str(HERE / "src/xlstm_hybrid/environment/versions.py"))  # by its path: nothing is installed yet
bounds, of_extra = TABLE["requirement"], TABLE["requirements"]

# torch's GPU builds bring triton themselves
# The arena is not part of the package: a working copy has it, a wheel does not
EXCLUDED = [] if "editable_wheel" in sys.argv else ["xlstm_arena*"]
CORE = [bounds(name) for name in ("torch", "transformers", "safetensors", "numpy", "huggingface_hub")]
EXTRAS = {extra: of_extra(extra) for extra in TABLE["EXTRAS"]}
# Triton's interpreter and compiler need no GPU
EXTRAS["test"] = [
    *EXTRAS["serve"],
    "pytest>=8",
    "pytest-xdist>=3",
    "ruff>=0.9",
    bounds("gguf"),
    f"{bounds('triton')}; platform_system == 'Linux'",
]
EXTRAS["eval-paper"] = [bounds("lm-eval").replace("lm-eval", "lm-eval[math,ifeval]", 1)]
EXTRAS["docs"] = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.29"]
EXTRAS["all"] = sorted({*EXTRAS["train"], *EXTRAS["eval"], *EXTRAS["test"]})

setup(
    name="xlstm-hybrid",
    version=VERSION,
    description="Distil pretrained Transformers into hybrid xLSTM students, inside Hugging Face Transformers",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=f">={TABLE['PYTHON']}",
    package_dir={"": "src", "xlstm_kernels": "kernels/xlstm_kernels", "xlstm_hybrid.recipes": "recipes"},
    packages=[*find_packages("src", exclude=EXCLUDED), *find_packages("kernels"), "xlstm_hybrid.recipes"],
    package_data={
        "xlstm_kernels": ["*/*.c"],
        "xlstm_hybrid": ["reports/card_template.md", "evaluation/lm_eval_tasks/*"],
        "xlstm_hybrid.recipes": [
            "*.yaml",
            "accelerate/*.yaml",
            "arena/*.yaml",
            "tiny_teacher/*.*",
            "tiny_teacher/tiny-llama/*",
        ],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["xlstm-hybrid=xlstm_hybrid.cli:main"],
        "vllm.general_plugins": ["xlstm_hybrid=xlstm_hybrid.vllm:register"],
    },
)
