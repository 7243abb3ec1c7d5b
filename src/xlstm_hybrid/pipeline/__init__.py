"""The stages of a recipe, each a checkpoint directory in and one out, and the run that makes them all and resumes.

teacher -> convert -> calibrate -> align -> distil (one expert per domain mix) -> on-policy -> merge -> evaluate -> report and card
"""

from xlstm_hybrid.pipeline.evaluation import evaluate
from xlstm_hybrid.pipeline.experts import make_experts
from xlstm_hybrid.pipeline.run import Run
from xlstm_hybrid.pipeline.settings import parse_overrides
from xlstm_hybrid.pipeline.stages import align, calibrate, distill, multi_teacher, on_policy, prepare

__all__ = [
    "Run",
    "align",
    "calibrate",
    "distill",
    "evaluate",
    "make_experts",
    "multi_teacher",
    "on_policy",
    "parse_overrides",
    "prepare",
]
