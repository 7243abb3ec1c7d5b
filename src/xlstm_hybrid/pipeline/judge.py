"""What a run measures of a checkpoint: scores on the tiny domains, perplexity of held-out documents, output gates, a sample."""

from itertools import islice

import torch

from xlstm_hybrid.conversion.load import load
from xlstm_hybrid.data import collate, open_streams, packed_rows
from xlstm_hybrid.data import toy_domains as tasks
from xlstm_hybrid.evaluation.scores import ExactMatch, contradictions, exact_match, perplexity


def evaluate(model_dir, recipe, progress=None, known=None):
    """Scores of one checkpoint as the recipe's section `evaluate` asks for them.

    With "examples": exact match (greedy, batched, through the cache) and perplexity on every domain of `tasks`, and perplexity of real text.
    What is `known` already, {"exact_match": {domain: share}, "samples": ..., "contradictions": ...}, is not measured
    again.
    With "documents": perplexity of so many held-out documents of every source of the recipe, each cut to a row's length.

    Returns:
        {"exact_match": {domain: share}, "perplexity": {domain or source: value}, "samples": {domain: [...]},
        "contradictions": {domain: those of the samples that cannot be, see `evaluation.contradictions`}}
    """
    model, tokenizer = load(model_dir)
    if "documents" in recipe.evaluate:
        return judge_sources(model, tokenizer, recipe, progress)
    return judge_domains(model, tokenizer, recipe.evaluate, progress, known or {"exact_match": {}})


def judge_domains(model, tokenizer, settings, progress, known):
    result = {"exact_match": {}, "perplexity": {}, "samples": {}, "contradictions": {}}
    for domain in tasks.DOMAINS:
        examples = tasks.test_examples(domain, settings["examples"])
        if domain in known["exact_match"]:
            judged = ExactMatch(known["exact_match"][domain], known["samples"][domain])
            wrong = known["contradictions"].get(domain)
        else:
            judged = exact_match(model, tokenizer, examples, batch_size=settings["batch_size"])
            wrong = contradictions(model, tokenizer, judged.samples)
        result["contradictions"] |= {domain: wrong} if wrong else {}
        result["exact_match"][domain], result["samples"][domain] = judged.score, judged.samples
        result["perplexity"][domain] = perplexity(model, [tasks.encode(tokenizer, e) for e in examples])
        if progress:
            progress(domain, f"{judged.score:6.1%}")
    chunks = tasks.text_chunks("test", size=300)
    rows = [tasks.encode_text(tokenizer, c) for c in chunks[:: max(1, len(chunks) // settings["text_chunks"])][: settings["text_chunks"]]]
    result["perplexity"]["text"] = perplexity(model, rows)
    return result


def judge_sources(model, tokenizer, recipe, progress=None):
    result, settings = {"exact_match": {}, "perplexity": {}, "samples": {}, "contradictions": {}}, recipe.evaluate
    for expert in (None, *recipe.experts):
        if "sources" not in recipe.mix(expert):
            continue
        for stream in open_streams(recipe, tokenizer, expert, test=True):
            name = stream.name if expert is None else f"{expert}/{stream.name}"
            rows = [(ids[: recipe.length], labels[: recipe.length]) for ids, labels in islice(stream, settings["documents"])]
            result["perplexity"][name] = perplexity(model, rows, batch_size=settings["batch_size"])
            if progress:
                progress(name, f"perplexity {result['perplexity'][name]:.4g}")
    return result


@torch.no_grad()
def mean_gates(model_dir, recipe, rows=8):
    """Mean output gate per layer and head (1: mLSTM, 0: window) over held-out rows: [hybrid layers, heads]."""
    model, tokenizer = load(model_dir)
    batch = {k: v.to(model.device) for k, v in collate(packed_rows(recipe, tokenizer, rows, test=True)).items() if k != "labels"}
    return [gate.mean((0, 1)).tolist() for gate in model(**batch, use_cache=False, logits_to_keep=1, output_gates=True)["gates"]]


def sample(model_dir, prompt):
    """A greedy continuation, as a user would ask for it."""
    model, tokenizer = load(model_dir)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=24, do_sample=False)
    return {"prompt": prompt, "output": tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)}
