"""The stages of a recipe, each a checkpoint directory in and one out, and the road that walks them and resumes.

teacher -> convert -> align -> distil (one expert per domain mix) -> on-policy -> merge -> evaluate -> report and card
"""

from xlstm_hybrid.conversion.load import load
from xlstm_hybrid.pipeline.experts import make_experts
from xlstm_hybrid.pipeline.judge import evaluate, mean_gates, sample
from xlstm_hybrid.pipeline.road import Road
from xlstm_hybrid.pipeline.settings import parse_overrides
from xlstm_hybrid.pipeline.stages import align, distill, multi_teacher, on_policy, prepare

__all__ = [
    "Road",
    "align",
    "distill",
    "evaluate",
    "load",
    "make_experts",
    "mean_gates",
    "multi_teacher",
    "on_policy",
    "parse_overrides",
    "prepare",
    "sample",
]
