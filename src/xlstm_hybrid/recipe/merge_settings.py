"""What a merge can be told: methods, their needs and options, module groups; the section `merge` of a recipe."""

import math
import re
from difflib import get_close_matches

METHODS = ("linear", "task_arithmetic", "ties", "dare", "dare_ties", "slerp", "fisher", "regmean")
ON_POLICY = "on_policy"  # not a merge of weights: the experts teach one student on its own samples
NEED_BASE = {"task_arithmetic", "ties", "dare", "dare_ties"}
NEED_KEYS = {"dare", "dare_ties"}
NEED_TWO = {"slerp"}
NEED_STATISTICS = {"fisher": "fisher", "regmean": "gram"}  # method: kind of statistics
OPTIONS = {  # method: the options that a caller may set
    "task_arithmetic": {"scale"},
    "ties": {"density", "scale"},
    "dare": {"drop", "seed", "scale"},
    "dare_ties": {"drop", "seed", "scale"},
    "fisher": {"floor"},
    "regmean": {"alpha"},
}
ALLOWED = {  # option: what it may be, in words and as a test
    "scale": ("a number above 0", lambda x: 0 < x < math.inf),
    "density": ("a share above 0, at most 1", lambda x: 0 < x <= 1),
    "drop": ("a share of at least 0, below 1", lambda x: 0 <= x < 1),
    "seed": ("a whole number", lambda x: x == int(x)),
    "floor": ("a number above 0", lambda x: 0 < x < math.inf),
    "alpha": ("a share between 0 and 1", lambda x: 0 <= x <= 1),
}
GROUPS = {  # module group: names of its tensors; the first that fits
    "feature_maps": re.compile(r"\.mlstm\.[qk]_map$"),
    "gates": re.compile(r"\.mlstm\."),
    "attention": re.compile(r"\.self_attn\."),
    "mlp": re.compile(r"\.mlp\."),
    "embeddings": re.compile(r"(^|\.)(embed_tokens|lm_head)\."),
    "norms": re.compile(r"norm\."),
    "other": re.compile(""),
}
PARTS = 60  # weights of a search are whole sixtieths: halves, thirds, quarters, fifths, sixths and tenths are exact
LABELS = ("model", "data")


def is_number(x):
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def unknown_keys(where, given, known):
    """Keys that a section does not have, in words, with the nearest that it has; [] where it has all."""
    unknown = sorted(map(str, set(given) - set(known)))
    near = [match for name in unknown for match in get_close_matches(name, list(known), n=1)]
    hint = f" (did you mean {' and '.join(near)}?)" if near else ""
    return [f"{where}unknown keys {unknown}, expected some of {sorted(known)}{hint}"] * bool(unknown)


def group_of(name):
    """Module group of a tensor, a key of `GROUPS`."""
    return next(group for group, pattern in GROUPS.items() if pattern.search(name))


def on_simplex(shares):
    """Whether numbers are shares of at least 0 whose sum is 1."""
    return all(is_number(w) and w >= 0 for w in shares) and math.isclose(sum(shares), 1, rel_tol=0, abs_tol=1e-6)


def option_faults(method, options):
    """Options that `method` does not have or that are out of range, in words."""
    known, wrong = OPTIONS.get(method, set()), []
    for name, value in options.items():
        if name not in known:
            wrong.append(f"{name}: {f'expected one of {sorted(known)}' if known else 'it takes no options'}")
        elif not (is_number(value) and ALLOWED[name][1](value)):
            wrong.append(f"{name}={value!r}: expected {ALLOWED[name][0]}")
    return wrong


# --- the section of a recipe -----------------------------------------------------------------------------------


def at_least(least):
    """A whole number of at least `least`, in words and as a test."""
    return f"a whole number of at least {least}", lambda x: type(x) is int and x >= least


SETTINGS = {  # of the parts of the section that hold settings: what each may be, in words and as a test
    "search": {name: at_least(1) for name in ("examples", "documents", "batch_size", "budget")}
    | {"parts": (f"a divisor of {PARTS}", lambda x: at_least(1)[1](x) and PARTS % x == 0)},
    "statistics": {name: at_least(least) for name, least in (("rows", 1), ("batch_size", 1), ("seed", 0))}
    | {"labels": (f"one of {LABELS}", lambda x: x in LABELS)},
}
KEYS = {"method", "weights", "options", "group_weights", "base", "search", "statistics", "on_policy"}


def section_faults(merge, experts):
    """What is wrong with a recipe's section `merge`, in words.

    Args:
        merge: the section. method: one of `METHODS` or "on_policy".  weights: {expert: share}, or search: {"examples"
            of the tiny domains or "documents" that nothing trains on, "budget", "parts", "batch_size"}, which finds
            them.  options: of the method. group_weights: {group: {expert: share}}.  base: "aligned" (the default) or a
            path, for methods that need one. statistics: {"rows", "batch_size", "labels", "seed"}, for methods that need
            them. on_policy: fields of `OnPolicyKDConfig`; the experts then teach the merged student, or with method
            "on_policy" the aligned one.
        experts: {name: mix} of the recipe.
    """
    wrong = unknown_keys("merge: ", merge, KEYS)
    names = [name for name in ("weights", "options", "group_weights", *SETTINGS, "on_policy") if name in merge]
    parts = {name: merge[name] for name in names if isinstance(merge[name], dict)}
    wrong += [f"merge.{n}: expected names and values, got {merge[n]!r}" for n in names if n not in parts]
    method = merge.get("method")
    if method not in (*METHODS, ON_POLICY):
        wrong.append(f"merge.method={method!r}: expected one of {', '.join((*METHODS, ON_POLICY))}")
    else:
        wrong += method_faults(merge, method, experts)
        wrong += [f"merge.options: {fault}" for fault in option_faults(method, parts.get("options", {}))]
    if ("weights" in merge) == ("search" in merge):
        wrong.append("merge: expected either weights or search, which finds them")
    wrong += share_faults("merge.weights", parts["weights"], experts) if "weights" in parts else []
    for group, shares in parts.get("group_weights", {}).items():
        if group not in GROUPS:
            wrong.append(f"merge.group_weights: {group!r} is no module group, expected some of {list(GROUPS)}")
        else:
            wrong += share_faults(f"merge.group_weights.{group}", shares, experts)
    sources = all(isinstance(mix, dict) and "sources" in mix for mix in experts.values())
    if "documents" in parts.get("search", {}) and not sources:
        wrong.append("merge.search.documents: expected sources for every expert; the tiny domains have examples")
    for part in SETTINGS.keys() & parts.keys():
        wrong += setting_faults(part, parts[part])
    return wrong


def method_faults(merge, method, experts):
    """Parts of the section that its method, or a search, has no use for or cannot do without."""
    wrong, given = [], set(merge)
    if method == ON_POLICY:
        idle = sorted(given & {"options", "group_weights", "base", "search", "statistics"})
        wrong += [f"merge: method on_policy merges no weights, leave out {', '.join(idle)}"] * bool(idle)
        if "on_policy" not in given:
            wrong.append(
                "merge: method on_policy needs the section on_policy, fields of OnPolicyKDConfig with max_steps"
            )
        return wrong
    if "base" in given and (method not in NEED_BASE or not isinstance(merge["base"], str) or not merge["base"]):
        expected = f"'aligned' or a path, for one of {', '.join(sorted(NEED_BASE))}"
        wrong.append(f"merge.base={merge['base']!r}: expected {expected}")
    if "statistics" in given and method not in NEED_STATISTICS:
        wrong.append(f"merge.statistics: {method} takes none, only {', '.join(NEED_STATISTICS)}")
    if method in NEED_TWO and len(experts) != 2:
        wrong.append(f"merge.method={method!r}: expected two experts, got {len(experts)}")
    if "search" in given and ("group_weights" in given or len(experts) < 2):
        wrong.append("merge.search: expected two experts or more, and no group_weights")
    return wrong


def share_faults(where, shares, experts):
    """Faults of {expert: share}: other names, shares off the simplex."""
    if not isinstance(shares, dict) or set(shares) != set(experts):
        names = sorted(map(str, shares)) if isinstance(shares, dict) else shares
        return [f"{where} names {names}, the experts are {sorted(experts)}"]
    if not on_simplex(shares.values()):
        return [f"{where}: {dict(shares)}, expected shares of at least 0 whose sum is 1"]
    return []


def setting_faults(part, settings):
    wrong = unknown_keys(f"merge.{part}: ", settings, SETTINGS[part])
    for name, value in settings.items():
        words, allowed = SETTINGS[part].get(name, ("", lambda x: True))
        wrong += [f"merge.{part}.{name}={value!r}: expected {words}"] * (not allowed(value))
    if part == "search" and ("examples" in settings) == ("documents" in settings):
        wrong.append(
            "merge.search: expected either examples, of the tiny domains, or documents, of the experts' sources"
        )
    return wrong
