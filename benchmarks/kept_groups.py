"""What full attention of a student's best key/value groups brings back, without training.

Gives the best 0, 1, 2, 4 groups of a ranking (`xlstm-hybrid plan-layers --measure --save-ranking`) back to a student, as it
is, and asks for a needle in real text. Writes one JSON, and recall over the bytes of the cache beside the arena's small
models: python benchmarks/kept_groups.py STUDENT TEACHER --ranking docs/real/ranking.json --work runs/kept. What is finished
is not run again.
"""

import argparse
import json
from pathlib import Path

from xlstm_hybrid.checkpoint.files import read_json, staged, write_file, write_json
from xlstm_hybrid.conversion.load import load
from xlstm_hybrid.evaluation.harness import Options, expand, run_harness
from xlstm_hybrid.planning.layers import best_groups, keep_groups
from xlstm_hybrid.reports.plots import as_png
from xlstm_hybrid.reports.recall_bytes import curve_of_harness, curves_of_arena, draw_recall_bytes

ARENA = Path(__file__).parents[1] / "docs/arena/results.json"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path, help="checkpoint without kept groups")
    parser.add_argument("teacher", help="directory, GGUF file or hub id")
    parser.add_argument("--ranking", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and lm-eval's results")
    parser.add_argument("--groups", default="0,1,2,4")
    parser.add_argument("--kind", default="needle")
    parser.add_argument("--lengths", default="512,1k,2k")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--haystack", type=Path)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON of the figures")
    parser.add_argument("--picture", type=Path, help="PNG")
    asked = parser.parse_args(arguments)
    ranking, units = read_json(asked.ranking, "ranking"), expand(asked.kind, asked.lengths)
    options = {"samples": asked.samples, "haystack": asked.haystack, "batch_size": asked.batch_size, "chat": asked.chat}
    run_harness(asked.teacher, units, asked.work / "teacher", Options(name="teacher", **options))
    folders, rows = {}, []
    for count in map(int, asked.groups.split(",")):
        kept, name = best_groups(ranking, count), f"{count} groups"
        checkpoint, folders[name] = asked.work / f"checkpoint-{count}", asked.work / f"kept-{count}"
        if not checkpoint.is_dir():
            student, tokenizer = load(asked.student)
            with staged(checkpoint) as temporary:
                keep_groups(student, kept).save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
        found = run_harness(checkpoint, units, folders[name], Options(name=name, **options))
        rows += [{"groups": count, "kept_groups": kept, **found[u.name]["long_context"]} for u in units]
    points = curve_of_harness(asked.work / "teacher", folders, asked.kind)
    figures = {"kind": asked.kind, "samples": asked.samples, "haystack": asked.haystack and asked.haystack.name}
    figures |= {"teacher": Path(asked.teacher).name, "points": points, "rows": rows}
    print(json.dumps(points, indent=1))
    if asked.out:
        write_json(asked.out, figures)
    if asked.picture:
        curves = {Path(asked.teacher).stem.partition(".")[0]: points} | curves_of_arena(
            json.loads(ARENA.read_text(encoding="utf-8"))
        )
        write_file(asked.picture, as_png(draw_recall_bytes, curves))


if __name__ == "__main__":
    main()
