"""Weights of a merge, searched for on the simplex under the win-and-tie objective, with every candidate kept. Dims: E
experts.
"""

import hashlib
import itertools
import json
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from xlstm_hybrid.checkpoint.files import MANIFEST, digest, escaped, markdown_table, write_json
from xlstm_hybrid.errors import MergeError
from xlstm_hybrid.evaluation.scores import win_and_tie
from xlstm_hybrid.merging.merge import merge
from xlstm_hybrid.merging.methods import weight_files_digest
from xlstm_hybrid.recipe.merge_settings import PARTS

DECIMALS = 9  # objectives that differ by less are equal: rounding must not choose


@dataclass
class Candidate:
    """One point on the simplex and what its student scored on the calibration set."""

    weights: list
    scores: dict
    alpha_star: float
    c_0: float
    recovery: float

    def objective(self):
        """Smaller is better: alpha*; then C_0, the mean recovery (each benchmark counts up to 1), and how even the
        weights are.
        """
        uneven = sum(w * w for w in self.weights)
        return tuple(round(x, DECIMALS) for x in (self.alpha_star, -self.c_0, -self.recovery, uneven))


@dataclass
class Search:
    """What was found: the weights, and every candidate in the order in which it was tried."""

    weights: list
    candidates: list
    experts: list = field(default_factory=list)

    def rows(self):
        """The table of candidates, best first: weights, alpha*, C_0, recovery, scores."""
        tasks, rows = list(self.candidates[0].scores), []
        for c in sorted(self.candidates, key=lambda c: (c.objective(), c.weights)):
            figures = [f"{c.alpha_star:.4f}", f"{c.c_0:.3f}", f"{c.recovery:.4f}"]
            rows.append([*(f"{w:.3f}" for w in c.weights), *figures, *(f"{c.scores[t]:.4g}" for t in tasks)])
        return [[*self.experts, "alpha*", "C_0", "recovery", *tasks], *rows]

    def as_dict(self):
        """Plain values; one flat record per candidate, so that a card can print them as a table."""
        rows = []
        for c in self.candidates:
            weights = {f"weight of {name}": w for name, w in zip(self.experts, c.weights, strict=True)}
            figures = {"alpha_star": c.alpha_star, "c_0": c.c_0, "mean_recovery": c.recovery}
            rows.append({**weights, **figures, **c.scores})
        return {"experts": self.experts, "weights": self.weights, "candidates": rows}

    def markdown(self):
        return f"Weights: {escaped(', '.join(map(str, self.weights)))}\n\n{markdown_table(self.rows())}\n"


def simplex(count, parts):
    """All points of the simplex of `count` weights in steps of 1 / parts, as whole numbers whose sum is `parts`."""
    for cuts in itertools.combinations(range(parts + count - 1), count - 1):
        edges = (-1, *cuts, parts + count - 1)
        yield tuple(b - a - 1 for a, b in zip(edges, edges[1:], strict=False))


def first_points(count, parts, budget):
    """Uniform weights, every expert alone, then the grid from the middle outwards, as sixtieths; at most `budget` of
    them.
    """
    even = [PARTS // count + (j < PARTS % count) for j in range(count)]
    grid = [tuple(PARTS // parts * n for n in point) for point in simplex(count, parts)]
    grid.sort(key=lambda p: (sum(x * x for x in p), p))
    corners = [tuple(PARTS * (j == k) for j in range(count)) for k in range(count)]
    return list(dict.fromkeys([tuple(even), *corners, *grid]))[:budget]


def neighbours(point, step):
    """Points that move `step` sixtieths, or all that there is, from one expert to another."""
    for j, k in itertools.permutations(range(len(point)), 2):
        if moved := min(step, point[j]):
            yield tuple(x - moved * (n == j) + moved * (n == k) for n, x in enumerate(point))


def search_weights(score, count, teacher_scores, *, parts=5, budget=40, known=None, progress=None):
    """Minimise alpha* of a merge over the simplex: a grid, then moves between pairs of experts around the best point
    with halving steps.

    Args:
        score: weights (a list of `count` shares) -> {benchmark: score} of their merge on the calibration set; called
            once per point.
        teacher_scores: {benchmark: score} of the teacher on the same set.
        parts: steps of the grid along an edge; a divisor of `PARTS`.
        budget: candidates at most, known ones included.
        known: {point in sixtieths: scores} of an earlier search that was interrupted.
        progress: called with every new Candidate and its point.
    Returns:
        Search
    Raises:
        MergeError: settings that describe no search.  EvaluationError: scores that cannot be compared with the
            teacher's.
    """
    if count < 2 or budget < 1 or parts < 1 or PARTS % parts:
        raise MergeError(
            f"search: {count} experts, budget={budget}, parts={parts}; expected two experts or more, a candidate, a divisor of {PARTS}"
        )
    known, tried = dict(known or {}), {}

    def attempt(point):
        if point in tried or len(tried) >= budget:
            return
        weights, fresh = [x / PARTS for x in point], point not in known
        scores = {task: float(value) for task, value in (score(weights) if fresh else known[point]).items()}
        verdict = win_and_tie(scores, teacher_scores)
        recovered = [min(1.0, r) for r in verdict.recovery.values() if r is not None]
        mean = sum(recovered) / len(recovered) if recovered else 1.0
        tried[point] = Candidate(weights, scores, verdict.alpha_star, verdict.c_0, mean)
        if progress and fresh:
            progress(tried[point], point)

    def best():
        return min(tried, key=lambda p: (tried[p].objective(), p))

    for point in first_points(count, parts, budget):
        attempt(point)
    step = PARTS // parts
    while step > 1 and len(tried) < budget:
        step, middle = step // 2, None
        while (best_now := best()) != middle and len(tried) < budget:  # go on while it helps, at this step
            middle = best_now
            for point in neighbours(middle, step):
                attempt(point)
    return Search(tried[best()].weights, list(tried.values()))


def search_merge(
    experts,
    out,
    score,
    teacher_scores,
    *,
    calibration="",
    table=None,
    parts=5,
    budget=40,
    overwrite=False,
    work=None,
    progress=None,
    **settings,
):
    """Search the weights of a merge of checkpoints and write the best one to `out`, with the table of candidates in its
    record.

    Experts are searched in the order of their names, so that their order changes neither the candidates nor the result.

    Args:
        score: directory of a merged candidate -> {benchmark: score} on the calibration set.
        calibration: what the calibration set is, in words or JSON values; kept in the record.
        table: JSON file that keeps every candidate as it is scored; a search with the same experts, settings,
            calibration set and teacher scores goes on from it.
        work: folder for the candidates, one at a time; a temporary one by default.
        progress: called with every new Candidate.
        settings: of `merge` (method, base, options, statistics, ...), without weights.
    Returns:
        Search, its weights in the order of `experts`.
    """
    if "weights" in settings or "group_weights" in settings:
        raise MergeError("search: it finds the weights; leave weights and group_weights out")
    order = sorted(range(len(experts)), key=lambda j: (Path(experts[j]).resolve().name, str(experts[j])))
    ordered = [experts[j] for j in order]
    if settings.get("statistics"):
        settings["statistics"] = [settings["statistics"][j] for j in order]
    names = [Path(e).resolve().name for e in ordered]
    spec = specification(ordered, teacher_scores, calibration, settings)
    known = read_candidates(table, spec)
    rows = dict(known)

    def score_of(weights):
        with tempfile.TemporaryDirectory(dir=work) as folder:
            merge(ordered, Path(folder) / "candidate", weights=weights, **settings)
            return score(Path(folder) / "candidate")

    def note(candidate, point):
        rows[point] = candidate.scores
        if table is not None:
            write_json(table, {"spec": spec, "experts": names, "points": [[list(p), s] for p, s in rows.items()]})
        if progress:
            progress(candidate)

    found = search_weights(
        score_of, len(ordered), teacher_scores, parts=parts, budget=budget, known=known, progress=note
    )
    found.experts = names
    figures = {"search": {**found.as_dict(), "teacher_scores": teacher_scores, "calibration": calibration}}
    merge(ordered, out, weights=found.weights, overwrite=overwrite, figures=figures, **settings)
    back = [order.index(j) for j in range(len(order))]
    candidates = [
        Candidate([c.weights[j] for j in back], c.scores, c.alpha_star, c.c_0, c.recovery) for c in found.candidates
    ]
    return Search([found.weights[j] for j in back], candidates, [names[j] for j in back])


def specification(experts, teacher_scores, calibration, settings):
    """SHA-256 of what the scores of a candidate depend on."""
    base = settings.get("base")
    said = {k: v for k, v in settings.items() if k not in ("base", "statistics", "shard_bytes")}
    parts = [[weight_files_digest(e) for e in experts], teacher_scores, calibration, said]
    listed = base and (Path(base) / MANIFEST).is_file()
    parts.append(digest(Path(base) / MANIFEST) if listed else str(base and Path(base).name))
    parts += [[digest(path) for path in settings.get("statistics") or ()]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_candidates(table, spec):
    """`{point: scores}` of an interrupted search; MergeError where the table is damaged or of another search."""
    if table is None or not Path(table).is_file():
        return {}
    try:
        content = json.loads(Path(table).read_text(encoding="utf-8"))
        if content["spec"] != spec:
            raise MergeError(
                f"{Path(table).name} holds candidates of other experts, settings or scores; remove it, or name another file"
            )
        candidates = {tuple(point): scores for point, scores in content["points"]}
    except MergeError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise MergeError(
            f"{Path(table).name} is no table of a search ({error}); remove it, or name another file"
        ) from error
    for point, scores in candidates.items():
        if sum(point) != PARTS or not all(isinstance(v, int | float) and math.isfinite(v) for v in scores.values()):
            raise MergeError(f"{Path(table).name}: the candidate {point} is damaged; remove the file")
    return candidates
