"""A card says what the stages of a checkpoint recorded, all of it that matters, and nothing else."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_student
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import xlstm_hybrid.reports.card
from xlstm_hybrid.checkpoint.files import add_provenance, read_provenance, verify_files, write_manifest
from xlstm_hybrid.errors import CheckpointError
from xlstm_hybrid.reports.card import flattened, listed, write_card

CONVERT = {
    "parent": "meta-llama/Llama-3.2-1B",
    "seconds": 1.94,
    "config": {
        "teacher": "meta-llama/Llama-3.2-1B",
        "sliding_window": 16,
        "num_sink_tokens": 4,
        "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid_sliding", "full_attention"],
    },
    "figures": {"parameters": {"teacher": 1_200_000, "student": 1_234_567, "new": 34_567}},
}
ALIGN = {
    "parent": "converted",
    "config": {"learning_rate": 1e-2},
    "data": {"mixture": {"text": 0.25}},
    "figures": {
        "relative_error": [{"layer": 0, "before": 0.5, "after": 0.0625}, {"layer": 1, "before": 0.25, "after": 0.125}]
    },
}
MERGE = {"config": {"method": "linear", "experts": [{"name": "math", "weight": 0.6}, {"name": "code", "weight": 0.4}]}}
EVALUATE = {
    "parent": "merged",
    "config": {"examples": 128},
    "figures": {
        "exact_match": {"recall": 0.75, "code": 0.5},
        "teacher_exact_match": {"recall": 1.0, "code": 0.25},
        "recovery": {"recall": 0.75, "code": 2.0},
        "perplexity": {"recall": 1.5, "text": 9.25},
        "teacher_perplexity": {"recall": 1.25, "text": 9.0},
        "c_0": 0.5,
        "alpha_star": 0.0,
    },
}
STAGES = {
    "convert": CONVERT,
    "align": ALIGN,
    "distill:math": {"parent": "aligned"},
    "merge": MERGE,
    "evaluate": EVALUATE,
}
RESULTS = {
    "students": {
        "converted": {"exact_match": {"recall": 0.125, "code": 0.0}},
        "student": {"exact_match": {"recall": 0.75, "code": 0.5}},
    },
    "sample": {"prompt": "a private prompt", "output": "x"},
}


def record(folder, stages=STAGES):
    """A checkpoint directory with the record of `stages` and nothing else."""
    folder.mkdir(exist_ok=True)
    for stage, entry in stages.items():
        add_provenance(folder, stage, stages=read_provenance(folder), **entry)
    return folder


def parts(text):
    """The YAML block, and the sections by title."""
    _, block, body = text.split("---\n", 2)
    sections = re.split(r"^## (.*)\n", body, flags=re.MULTILINE)
    return yaml.safe_load(block), {"": sections[0], **dict(zip(sections[1::2], sections[2::2], strict=True))}


def card(folder, results=None):
    return parts(write_card(folder, results).read_text(encoding="utf-8"))


# --- what it says ----------------------------------------------------------------------------------------------


def test_the_metadata_are_those_of_the_hub(tmp_path):
    metadata = card(record(tmp_path))[0]
    index = metadata.pop("model-index")
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["xlstm-hybrid", "xlstm", "distillation", "merge"],
        "base_model": "meta-llama/Llama-3.2-1B",
        "base_model_relation": "finetune",
    }
    assert index[0]["name"] == "xlstm-hybrid student of meta-llama/Llama-3.2-1B" and len(index) == 1
    scores = {(r["dataset"]["name"], m["type"]): m["value"] for r in index[0]["results"] for m in r["metrics"]}
    assert scores == {
        ("recall", "exact_match"): 0.75,
        ("code", "exact_match"): 0.5,
        ("recall", "perplexity"): 1.5,
        ("text", "perplexity"): 9.25,
    }


def test_the_hub_reads_the_card_as_it_was_meant(tmp_path):
    data = ModelCard.load(write_card(record(tmp_path))).data
    assert data.base_model == "meta-llama/Llama-3.2-1B" and data.library_name == "transformers"
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    assert (
        found["recall", "exact_match"] == 0.75
        and {r.task_type for r in data.eval_results} == {"text-generation"}
        and len(found) == 4
    )


def test_the_data_sets_are_the_hub_ids_of_what_stages_read(tmp_path):
    sources = {
        "math": {"path": "allenai/dolmino-mix-1124", "weight": 1.0},
        "mine": {"path": "data/rows.jsonl"},
        "folder": {"path": "rows"},
    }
    more = {
        "data": {
            "sources": {"again": {"path": "allenai/dolmino-mix-1124"}, "chat": {"path": "nvidia/OpenCodeInstruct"}}
        }
    }
    metadata, sections = card(record(tmp_path, {"align": {"data": {"sources": sources}}, "distill": {"config": more}}))
    assert metadata["datasets"] == ["allenai/dolmino-mix-1124", "nvidia/OpenCodeInstruct"]
    assert "data/rows.jsonl" in sections["How it was made"]


def test_time_and_energy_are_those_that_stages_recorded_and_no_others(tmp_path):
    text = card(record(tmp_path / "plain"))[1]["Time and energy"]
    assert (
        "| convert | 1.9 s |" in text and "align" not in text and "No stage recorded its energy or emissions." in text
    )
    stages = {
        "align": {"seconds": 9000.0, "figures": {"energy_kwh": 1.5, "device": "NVIDIA H100", "peak_memory_mib": 2048}},
        "evaluate": {"seconds": 99999.0},
    }
    text = card(record(tmp_path / "rich", stages))[1]["Time and energy"]
    assert (
        "| align | 2.5 h |" in text
        and "| align: energy, kWh | 1.5 |" in text
        and "| align: device | NVIDIA H100 |" in text
    )
    # the time of an evaluation is that of its whole run
    assert "No stage recorded its energy" not in text and "27.8" not in text
    record(tmp_path / "run")
    text = card(tmp_path / "run", RESULTS | {"peak_memory_mib": 777})[1]["Time and energy"]
    assert "| run: peak memory, MiB | 777 |" in text


def test_a_new_card_is_listed_in_the_manifest_and_hides_no_damage(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write_manifest(record(tmp_path))
    write_card(tmp_path)
    verify_files(tmp_path)
    assert "README.md" in json.loads((tmp_path / "manifest.json").read_text())["files"]
    (tmp_path / "config.json").write_text("[]")
    write_card(tmp_path, RESULTS)
    with pytest.raises(CheckpointError, match="config.json has SHA-256"):
        verify_files(tmp_path)


def test_a_local_teacher_is_named_but_is_no_base_model_of_the_hub(tmp_path):
    metadata, sections = card(record(tmp_path, {"convert": {"config": {"teacher": "tiny_teacher"}}}))
    assert "base_model" not in metadata and metadata["tags"] == ["xlstm-hybrid", "xlstm"]
    assert "# A hybrid xLSTM student of tiny_teacher\n" in sections[""]


def test_the_licence_is_the_one_that_stages_name(tmp_path):
    apache = {"config": {"license": "apache-2.0"}}
    metadata, sections = card(
        record(tmp_path / "one", {"convert": apache, "align": {"data": {"licence": "apache-2.0"}}})
    )
    assert metadata["license"] == "apache-2.0" and "licence" not in sections["Limits"]
    metadata, sections = card(record(tmp_path / "two", {"convert": apache, "align": {"data": {"license": "mit"}}}))
    assert "license" not in metadata and "several licences (apache-2.0, mit): all of them apply" in sections["Limits"]
    metadata, sections = card(record(tmp_path / "none"))
    assert "license" not in metadata and "No stage recorded a licence" in sections["Limits"]


def test_the_summary_is_what_conversion_recorded(tmp_path):
    text = card(record(tmp_path))[1][""]
    for fact in (
        "the Transformer meta-llama/Llama-3.2-1B",
        "1,234,567 parameters, of these 34,567 that its teacher does not have",
        "3 hybrid_sliding, 1 full_attention",
        "a window of 16 tokens and 4 sink tokens",
    ):
        assert fact in text


def test_the_figures_are_those_of_the_last_evaluation(tmp_path):
    text = card(record(tmp_path))[1]["Figures"]
    assert "| domain | exact match | of the teacher | recovery | perplexity | teacher's perplexity |" in text
    assert "| recall | 75.0 % | 100.0 % | 75.0 % | 1.5 | 1.25 |\n| code | 50.0 % | 25.0 % | 200.0 % | – | – |\n" in text
    assert "| text | – | – | – | 9.25 | 9 |" in text
    assert "C_0 = 0.50" in text and "α\\* = 0.000" in text and "each stage" not in text
    add_provenance(tmp_path, "evaluate", stages=read_provenance(tmp_path), figures={"exact_match": {"recall": 0.25}})
    text = card(tmp_path)[1]["Figures"]
    assert "| domain | exact match |\n| :-- | --: |\n| recall | 25.0 % |" in text and "C_0" not in text


def test_every_stage_is_told_in_order_with_settings_and_figures(tmp_path):
    text = card(record(tmp_path))[1]["How it was made"]
    assert re.findall(r"^### (.*)$", text, flags=re.MULTILINE) == [
        "1. convert",
        "2. align",
        "3. distill:math",
        "4. merge",
        "5. evaluate",
    ]
    assert "from Llama-3.2-1B, 1.9 s" in text and "from aligned" in text
    assert (
        "| layer_types | 3 × hybrid_sliding, full_attention |" in text
        and "| learning_rate | 0.01 |" in text
        and "| mixture.text | 0.25 |" in text
    )
    assert (
        "relative_error:\n\n| layer | before | after |\n| :-- | --: | --: |\n| 0 | 0.5 | 0.0625 |\n| 1 | 0.25 | 0.125 |"
        in text
    )
    assert "experts:\n\n| name | weight |\n| :-- | --: |\n| math | 0.6 |\n| code | 0.4 |" in text
    assert re.search(
        r"Made with python [\d.]+, torch \S+, transformers [^:]+: convert, align, distill:math, merge, evaluate\.", text
    )


def test_the_limits_name_what_was_lost_and_what_was_not_measured(tmp_path):
    text = card(record(tmp_path / "scored"))[1]["Limits"]
    assert (
        "- It scores below its teacher on: recall.\n" in text
        and "further back than 16 tokens" in text
        and "on nothing else" in text
    )
    text = card(record(tmp_path / "bare", {"convert": {"parent": "x"}}))[1]["Limits"]
    assert "No stage recorded an evaluation" in text and "below its teacher" not in text and "further back" not in text


def test_results_add_the_scores_of_earlier_stages_and_pictures_but_no_samples(tmp_path):
    record(tmp_path)
    for name in ("domains.png", "win_and_tie.png", "](evil).png"):
        (tmp_path / name).write_bytes(b"")
    text = card(tmp_path, RESULTS)[1]["Figures"]
    assert (
        "| domain | converted | student |\n| :-- | --: | --: |\n| recall | 12.5 % | 75.0 % |\n| code | 0.0 % | 50.0 % |"
        in text
    )
    assert re.findall(r"!\[.*", text) == ["![domains](domains.png)", "![win and tie](win_and_tie.png)"]
    assert "private prompt" not in (tmp_path / "README.md").read_text()
    assert "![" not in card(tmp_path)[1]["Figures"]  # pictures come with the results of a run


# --- what it cannot say ----------------------------------------------------------------------------------------


def numbers(text):
    return set(re.findall(r"\d+(?:\.\d+)?", text))


def test_no_number_comes_from_anywhere_but_the_record(tmp_path):
    empty = write_card(record(tmp_path / "empty", {"convert": {}})).read_text(encoding="utf-8")
    known = numbers(xlstm_hybrid.reports.card.TEMPLATE.read_text(encoding="utf-8")) | numbers(
        (tmp_path / "empty" / "provenance.json").read_text()
    )
    assert numbers(empty) <= known
    assert "Figures" not in parts(empty)[1] and "No stage recorded its time." in parts(empty)[1]["Time and energy"]


def test_a_checkpoint_without_a_record_has_no_card(tmp_path):
    with pytest.raises(
        CheckpointError, match="no provenance.json, expected a record of its stages.* see docs/finetune.md"
    ):
        write_card(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "results",
    [
        {"students": {"student": {"exact_match": {"recall": 0.875, "code": 0.5}}}},
        {"students": {"student": {"perplexity": {}}}},
        {"students": {}},
        {},
    ],
)
def test_results_of_another_checkpoint_are_refused(results, tmp_path):
    with pytest.raises(
        CheckpointError,
        match=r"recorded exact match {'recall': 0.75, 'code': 0.5}, the results have .* not of this checkpoint",
    ):
        write_card(record(tmp_path), results)
    assert not (tmp_path / "README.md").exists()


def test_costs_and_long_context_are_those_that_stages_recorded(tmp_path):
    far = {
        "task": "needle_4k",
        "tokens": 4096,
        "documents": 40,
        "coverage": 0.126,
        "excess": -0.025,
        "teacher_recall": 1.0,
        "student_recall": 0.104,
        "teacher_cache_bytes": 8_000_000,
        "student_cache_bytes": 250_000,
    }
    hopeless = far | {"task": "needle_8k", "tokens": 8192, "teacher_recall": 0.0, "student_recall": 0.0}
    cost = {
        "tokens": 4096,
        "batch": 2,
        "teacher_cache_bytes": 16_000_000,
        "student_cache_bytes": 500_000,
        "gain_cache_bytes": 32.0,
        "teacher_tokens_per_second": 10.0,
        "student_tokens_per_second": 25.0,
        "gain_tokens_per_second": 2.4,
        "teacher_first_token_s": 0.5,
        "student_first_token_s": None,
        "gain_first_token_s": None,
    }
    config = {"cpu": "a processor", "clock": "CPU seconds", "dtype": "float32", "checks_passed": 21}
    stages = {
        "convert": CONVERT,
        "evaluate": {"figures": EVALUATE["figures"] | {"long_context": [far, hopeless]}},
        "efficiency": {"config": config, "figures": {"rows": [cost]}},
    }
    sections = card(record(tmp_path, stages))[1]
    assert "| needle_4k | 4,096 | 40 | 100.0 % | 10.4 % | 12.6 % | -0.025 | 8 | 0.25 |" in sections["Figures"]
    assert "| needle_8k" not in sections["Figures"] and (
        "The teacher recalls nothing on needle_8k, nor does the student: left out. After 8,192 tokens the teacher's cache takes 8 MB, "
        "the student's 0.25 MB." in sections["Figures"]
    )
    costs = sections["Cost beside the teacher"]
    assert (
        "| cache, MB | 4,096 | 2 | 16 | 0.5 | 32 |" in costs
        and "| decoding, tokens/s | 4,096 | 2 | 10 | 25 | 2.4 |" in costs
    )
    assert (
        "| first token, ms | 4,096 | 2 | 500 | – | – |" in costs
        and "a processor, float32; times are CPU seconds; 21 checks passed" in costs
    )
    assert (
        "rows" not in sections["How it was made"]
        and "Cost beside the teacher" not in card(record(tmp_path / "without"))[1]
    )


def test_an_evaluation_of_perplexities_alone_has_a_card_too(tmp_path):
    stages = {"convert": CONVERT, "evaluate": {"figures": {"perplexity": {"math": 2.5}}}}
    results = {"students": {"student": {"exact_match": {}, "perplexity": {"math": 2.5}}}}
    sections = card(record(tmp_path, stages), results)[1]
    assert (
        "| math | 2.5 |" in sections["Figures"]
        and "each stage" not in sections["Figures"]
        and "nothing is known" not in sections["Limits"]
    )
    with pytest.raises(CheckpointError, match="not of this checkpoint"):
        write_card(tmp_path, {"students": {"student": {"exact_match": {}, "perplexity": {"math": 2.0}}}})


def test_results_cannot_stand_in_for_an_evaluation_that_no_stage_recorded(tmp_path):
    with pytest.raises(CheckpointError, match="recorded exact match None"):
        write_card(record(tmp_path, {"convert": CONVERT}), RESULTS)


def test_no_path_of_the_machine_reaches_the_card(tmp_path):
    record(
        tmp_path,
        {
            "convert": {
                "parent": tmp_path / "teacher",
                "config": {"teacher": str(tmp_path / "teacher"), "log": "~/log.txt"},
            }
        },
    )
    text = write_card(tmp_path).read_text()
    assert (
        str(tmp_path) not in text and str(Path.home()) not in text and "~/" not in text and "student of teacher" in text
    )


def test_text_of_the_record_stays_text(tmp_path):
    name = "a|b\n# title\n---\n<script> [x](y) $title ${figures} `c`"
    metadata, sections = card(
        record(tmp_path, {"convert": {"config": {"teacher": name, "license": 'mit"\ntags: [x]'}}})
    )
    assert metadata["license"] == 'mit"\ntags: [x]' and metadata["tags"] == ["xlstm-hybrid", "xlstm"]
    shown = "a\\|b # title --- \\<script> \\[x\\](y) $title ${figures} \\`c\\`"
    assert (
        f"# A hybrid xLSTM student of {shown}\n" in sections[""]
        and f"| teacher | {shown} |" in sections["How it was made"]
    )


# --- details ---------------------------------------------------------------------------------------------------


def test_long_and_repeated_lists_are_told_in_few_words():
    assert listed(["a"] * 30 + ["b"]) == "30 × a, b" and listed([1, 2, 3]) == "1, 2, 3" and listed([]) == "–"
    assert listed(list(range(20))) == "0, 1, 2, 3, 4, 5, 6, 7, and 12 more"


def test_nested_settings_become_dotted_names():
    rows, tables = flattened(
        {
            "a": {"b": 1.0, "c": {"d": True, "e": None}},
            "f": {"g": [{"x": 1}, {"x": 2}]},
            "n": 12_345,
            "mixed": [{"x": 1}, {"y": 2}],
        }
    )
    assert rows == [("a.b", "1"), ("a.c.d", "True"), ("a.c.e", "–"), ("n", "12,345"), ("mixed", "{'x': 1}, {'y': 2}")]
    assert tables == [("f.g", [["x"], ["1"], ["2"]])]


def test_the_card_is_replaced_as_a_whole_and_rewriting_changes_nothing(tmp_path):
    first = write_card(record(tmp_path), RESULTS).read_bytes()
    assert write_card(tmp_path, RESULTS).read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "provenance.json"]


def test_the_code_on_the_card_runs_in_the_directory_of_the_checkpoint(tmp_path, monkeypatch, capsys):
    words = Tokenizer(models.WordLevel({f"w{j}": j for j in range(61)}, unk_token="w5"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    tiny_student(torch.float32).save_pretrained(tmp_path)
    text = write_card(record(tmp_path)).read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1], {})
    told = capsys.readouterr().out.split()
    assert told[0] == "w5" and 1 < len(told) <= 33 and set(told) <= {f"w{j}" for j in range(61)}
