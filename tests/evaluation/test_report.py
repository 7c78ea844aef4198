"""Reports keep apart what cannot be compared, and pair what can; numbers are worked out by hand."""

import itertools
import json
import math
import random

import pytest

from solar_jax.errors import UserError
from solar_jax.evaluation import score_plot
from solar_jax.evaluation.comparators import PUBLISHED
from solar_jax.evaluation.comparisons import comparable_groups, is_as_published, paired_differences
from solar_jax.evaluation.h6 import MMLU_SUBJECTS, h6_scores
from solar_jax.evaluation.report import write_report
from solar_jax.evaluation.results import read_results
from tests.evaluation.made_results import SIX, full_file, subset_file, write


def arc_file(outcomes, model="mine", *, limit=4, shots=25, hashes=None, **more):
    hashes = hashes or [f"h{i}" for i in range(len(outcomes))]
    samples = [
        {"doc_id": i, "doc_hash": h, "filter": "none", "acc_norm": x}
        for i, (h, x) in enumerate(zip(hashes, outcomes, strict=True))
    ]
    mean = sum(outcomes) / len(outcomes)
    results = {"arc_challenge": {"sample_len": len(outcomes), "acc_norm,none": mean, "acc_norm_stderr,none": "N/A"}}
    return {
        "model": model, "results": results, "n-shot": {"arc_challenge": shots}, "samples": {"arc_challenge": samples},
        "lm_eval": "0.4.13", "limit": limit,
    } | more  # fmt: skip


def read(folder, *contents):
    return read_results([write(folder, f"{i}.json", content) for i, content in enumerate(contents)])


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Draws everything but does not compress the picture, which takes a second."""
    figures = []
    monkeypatch.setattr(score_plot, "png_bytes", lambda figure: figures.append(figure) or b"png")
    return figures


def report(folder, *contents):
    files = [write(folder, f"{i}.json", content) for i, content in enumerate(contents)]
    write_report(files, folder / "out")
    return (folder / "out" / "report.md").read_text()


def tables(text):
    """Each table's rows as lists of cells."""
    blocks = ([*lines] for is_row, lines in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")))
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        for lines in blocks if lines[0].startswith("|")
    ]  # fmt: skip


def scores_of(text, model):
    """The row of a model in the table of scores."""
    return next(row for table in tables(text) if "ARC" in table[0] for row in table if row[0] == model)


def test_a_preset_of_2023_on_full_sets_stands_beside_published_scores(tmp_path):
    text = report(tmp_path, full_file())
    assert scores_of(text, "mine") == [
        "mine", "60.00 ± 1.00", "80.00 ± 1.00", "62.00 ± 1.00", "44.00 ± 1.00", "76.00 ± 1.00", "40.00 ± 1.00",
        "60.33 ± 0.41",
    ]  # fmt: skip
    table = next(t for t in tables(text) if ["mine"] in [row[:1] for row in t] and "ARC" in t[0])
    assert [row[0] for row in table[6:]] == [f"{row.model} (published)" for row in PUBLISHED]
    assert table[3] == ["*shots*", "*25*", "*10*", "*5*", "*0*", "*5*", "*5*", ""]
    assert table[4] == ["*items*", "*1,172*", "*10,042*", "*14,042*", "*817*", "*1,267*", "*1,319*", ""]
    assert text.count("Mistral 7B (published)") == 1, "not once more in a table of its own"
    assert ["mine", "0.json", "h6_2023", "0.4.13", "bfloat16", "without", "no", "none"] in tables(text)[0]
    assert "SFT | Alpaca-GPT4 | 69.15" in text
    assert "one chunk of pairs after another | 74.31" in text


NOT_AS_PUBLISHED = {
    "today's prompts": full_file(preset="h6"),
    "a chat template": full_file(chat_template=True),
    "BOS": full_file(bos={"uses": True}),
    "a subset": subset_file(preset="h6_2023"),
    "a limit": full_file(limit=20000),
    "no preset": full_file(preset=None),
    "other shots": full_file() | {"n-shot": full_file()["n-shot"] | {"gsm8k": 8}},
}  # fmt: skip


@pytest.mark.parametrize("why", NOT_AS_PUBLISHED)
def test_published_scores_stand_apart_from(why, tmp_path):
    text = report(tmp_path, NOT_AS_PUBLISHED[why])
    together = [t for t in tables(text) if any("published" in row[0] for row in t)]
    assert len(together) == 1
    assert not any(row[0] == "mine" for row in together[0])
    is_subset = why in ("a subset", "a limit")
    assert ("Scores of subsets cannot be compared with these" in text) == is_subset
    assert ("**Not the full sets**" in text) == is_subset
    assert ("the preset h6_2023 follows that commit" in text) == (not is_subset)


@pytest.mark.parametrize(
    ("task", "items", "full", "is_full"),
    [("arc_challenge", 1172, True, True), ("arc_challenge", 1171, True, False), ("gsm8k", 1319, False, False)],
)
def test_one_incomplete_task_makes_a_subset(tmp_path, task, items, full, is_full):
    content = full_file()
    content["h6"]["items"][task], content["h6"]["full"][task] = items, full
    (one,) = read(tmp_path, content)
    assert one.full == is_full
    assert is_as_published(one) == is_full


def test_no_table_mixes_subsets_full_sets_presets_and_harnesses(tmp_path):
    contents = {
        "full23": full_file("full23"), "full": full_file("full", preset="h6"),
        "full24": full_file("full24", lm_eval="0.4.9"), "some": subset_file("some"),
        "same": subset_file("same", seed=1), "fewer": subset_file("fewer", 10),
        "others": subset_file("others", hash_of="x{}-{}".format),
        "some23": subset_file("some23", preset="h6_2023"), "chosen": subset_file("chosen", preset=None),
    }  # fmt: skip
    text = report(tmp_path, *contents.values())
    of_scores = [t for t in tables(text) if "ARC" in t[0] and t[2][0] == "*metric*"]
    found = [{row[0] for row in t[2:] if "*" not in row[0] and "published" not in row[0]} for t in of_scores]
    assert sorted(map(sorted, found)) == sorted(
        [["full23"], ["full"], ["full24"], ["same", "some"], ["fewer"], ["others"], ["some23"], ["chosen"]]
    )
    assert "## Subsets, preset h6, lm-eval 0.4.13: table 3 of 3" in text


def test_items_are_compared_by_their_number_where_a_file_has_no_samples(tmp_path):
    bare = {key: value for key, value in subset_file("bare").items() if key != "samples"}
    fewer = {key: value for key, value in subset_file("fewer", 19).items() if key != "samples"}
    groups = comparable_groups(read(tmp_path, subset_file("some"), bare, fewer))
    assert [[one.model for one in group] for group in groups] == [["some", "bare"], ["fewer"]]
    assert paired_differences(*groups[0]) == {}


def test_other_shots_are_another_table(tmp_path):
    groups = comparable_groups(read(tmp_path, arc_file([1, 0]), arc_file([1, 0], shots=0)))
    assert [len(group) for group in groups] == [1, 1]


def test_a_paired_difference_is_that_of_the_items(tmp_path):
    # Differences 0, 100, 0, 0: mean 25, deviation 50, standard error 25. Unpaired it would be 38.
    text = report(tmp_path, arc_file([1, 0, 0, 1], "a"), arc_file([1, 1, 0, 1], "b"))
    assert ["b", "+25.00 ± 25.00"] in tables(text)[-2]
    assert "Less a, item by item" in text
    # A model less one that gets all of the same items right and wrong differs by nothing, surely.
    text = report(tmp_path, arc_file([1, 0, 0, 1], "a"), arc_file([1, 0, 0, 1], "b"))
    assert ["b", "+0.00 ± 0.00"] in tables(text)[-2]
    a, b = read(tmp_path, arc_file([0], limit=1), arc_file([1], "b", limit=1))
    assert (paired_differences(a, b)["arc_challenge"].points, paired_differences(a, b)["arc_challenge"].stderr) == (
        100, None
    )  # fmt: skip


def test_items_are_matched_by_hash_and_not_by_place(tmp_path):
    a = arc_file([1, 0, 0, 1])
    b = arc_file([1, 1, 0, 1], "b")
    b["samples"]["arc_challenge"].reverse()
    (difference,) = paired_differences(*read(tmp_path, a, b)).values()
    assert (difference.points, difference.stderr) == pytest.approx((25, 25))
    c = arc_file([1, 1, 0, 1], "c", hashes=["h0", "h1", "h2", "other"])
    assert len(comparable_groups(read(tmp_path, a, c))) == 2


def test_mmlus_difference_is_the_mean_over_subjects(tmp_path):
    a, b = subset_file("a", 2), subset_file("b", 2)
    first = f"mmlu_{MMLU_SUBJECTS[0]}"
    for content, wrong in ((a, 1), (b, 0)):
        for name in content["results"]:
            if not name.startswith("mmlu_"):
                continue
            values = [0.0 if name == first and i < wrong else 1.0 for i in range(2 if name == first else 40)]
            content["samples"][name] = [{"doc_id": i, "doc_hash": f"{i}", "acc": v} for i, v in enumerate(values)]
            content["results"][name]["acc,none"] = sum(values) / len(values)
        content["h6"]["mmlu"] = 100 - wrong * 50 / 57
        content["h6"]["mean"] = sum(content["h6"][task] for task in SIX) / 6
    # The first subject differs by 100 and 0: 50 on average, and a standard error of 50; the other 56 by nothing.
    found = paired_differences(*read(tmp_path, a, b))
    assert (found["mmlu"].points, found["mmlu"].stderr) == pytest.approx((50 / 57, 50 / 57))
    assert found["h6"].points == pytest.approx(sum(found[task].points for task in SIX) / 6)
    assert found["h6"].stderr == pytest.approx(math.hypot(*(found[task].stderr for task in SIX)) / 6)


def test_only_the_filter_of_the_score_counts(tmp_path):
    content = subset_file()
    more = [sample | {"filter": "flexible-extract", "exact_match": 1.0} for sample in content["samples"]["gsm8k"]]
    content["samples"]["gsm8k"] += more
    content["results"]["gsm8k"]["exact_match,flexible-extract"] = 1.0
    found, plain = read(tmp_path, content, subset_file())
    assert found.scores["gsm8k"] == plain.scores["gsm8k"]


def test_without_a_preset_the_six_are_averaged_if_they_were_asked_as_in_h6(tmp_path):
    content = full_file(preset=None)
    (one,) = read(tmp_path, content)
    assert one.full
    assert one.h6 == (pytest.approx(362 / 6), pytest.approx(1 / math.sqrt(6)))
    content["n-shot"]["arc_challenge"] = 0
    assert read(tmp_path, content)[0].h6 is None


def scored(content, subjects):
    """A file's `h6` as `evaluate` computes it from its results."""
    counts = {name: {"effective": of["sample_len"]} for name, of in content["results"].items()}
    return content | {"h6": h6_scores(content["results"], [f"mmlu_{subject}" for subject in subjects], counts)}


def test_what_evaluate_computes_is_read_with_all_items(tmp_path):
    made = subset_file(count=3)
    (one,) = read(tmp_path, scored(made, MMLU_SUBJECTS))
    assert one.h6 == pytest.approx((made["h6"]["mean"], made["h6"]["stderr"]["mean"]))
    assert {task: len(score.outcomes) for task, score in one.scores.items()} == made["h6"]["items"]
    (one,) = read(tmp_path, scored(full_file(), MMLU_SUBJECTS))
    assert is_as_published(one)


def test_mmlu_of_some_subjects_is_a_subset(tmp_path):
    content = full_file()
    for subject in MMLU_SUBJECTS[3:]:
        del content["results"][f"mmlu_{subject}"]
    (one,) = read(tmp_path, scored(content, MMLU_SUBJECTS[:3]))
    assert not one.full
    assert one.scores["mmlu"].items == 3 * 247  # 14,042 = 20 subjects of 247 and 37 of 246, in the made file
    assert one.others == ()


def test_other_tasks_are_listed_without_published_scores_or_a_picture(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.png").write_text("an earlier report's")
    results = {"lambada": {"alias": "lambada", "sample_len": 7, "perplexity,none": 12.5, "perplexity_stderr,none": 0.5}}
    text = report(tmp_path, arc_file([1]) | {"results": results, "n-shot": {"lambada": 0}, "samples": {}})
    assert ["lambada", "perplexity", "12.5000", "0.5000", "7", "0"] in tables(text)[1]
    assert "ublished" not in text
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.md"]
    # Beside tasks of H6 they have a section of their own; groups that sum up MMLU's subjects are not tasks.
    content = full_file()
    content["results"] |= results | {"mmlu": {"acc,none": 0.1}, "mmlu_stem": {"acc,none": 0.1}}
    text = report(tmp_path, content)
    assert [row[0] for row in tables(text)[-1]] == ["task", "---", "lambada"]


def test_some_of_mmlus_subjects_are_not_mmlu(tmp_path):
    content = full_file(preset=None)
    del content["results"]["mmlu_virology"]
    (one,) = read(tmp_path, content)
    assert "mmlu" not in one.scores
    assert len(one.others) == 56
    assert one.h6 is None


def test_the_picture_marks_published_scores_on_full_sets_alone(tmp_path, fast):
    report(tmp_path, subset_file("_$some$"), full_file(), full_file("today", preset="h6"))
    legends = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in fast[0].axes]
    names = [row.model for row in PUBLISHED]
    assert legends == [
        ["± standard error:", "mine", "published (harness b281b09):", *names],
        ["± standard error:", "today", "published (harness b281b09, other prompts):", *names],
        ["± standard error:", r" _\$some\$"],
    ]
    first = fast[0].axes[0]
    assert [bar.get_height() for bar in first.patches] == pytest.approx([60, 80, 62, 44, 76, 40, 362 / 6])
    mistral = next(line for line in first.lines if line.get_label() == "Mistral 7B")
    assert list(mistral.get_ydata()) == [59.98, 83.31, 64.16, 42.15, 78.37, 37.83, 60.97]


def changed(**more):
    return full_file() | more


def h6_of(**more):
    return changed(h6=full_file()["h6"] | more)


WRONG = {
    "a list": ([], r"the file: expected a JSON object, found \[\]\."),
    "no evaluation": ({"loss": 2.0}, r"results: expected an object of tasks, .*, found no such key\."),
    "no tasks": (changed(results={}), r"results: expected at least one task, found \{\}\."),
    "no metrics": (changed(results={"x": 3}), r"results\.x: expected an object of metrics, found 3\."),
    "preset": (changed(preset="h7"), r"preset: expected null or one of h6, h6_2023, found 'h7'\."),
    "limit": (changed(limit="all"), r"limit: expected null or a number of items, found 'all'\."),
    "model": (changed(model=None), r"model: expected the model's name, found null\."),
    "range": (h6_of(gsm8k=4000), r"h6\.gsm8k: expected a number from 0 to 100, found 4000\."),
    "NaN": (h6_of(truthfulqa_mc2=math.nan), r"h6\.truthfulqa_mc2: expected a finite number from 0 to 100, found nan\."),
    "absent": ({**full_file(), "h6": {"mean": 1}}, r"h6\.arc_challenge: expected a finite .*, found no such key\."),
    "mean": (h6_of(mean=70), r"h6\.mean: expected 60\.3333, the mean of the six, found 70\.0\."),
    "results": (h6_of(gsm8k=41), r"h6\.gsm8k: expected 40\.0000, as results has it, found 41\.0\."),
    "metric": (arc_file([1]) | {"results": {"arc_challenge": {"f1,none": 1}}},
               r'results\.arc_challenge: expected acc_norm,none, found \["f1,none"\]\.'),
    "samples": (arc_file([1, 0]) | {"results": {"arc_challenge": {"acc_norm,none": 0.9}}},
                r"samples of arc_challenge: expected items of mean acc_norm 90\.0000, the score, found 50\.0000\."),
    "stderr": (h6_of(stderr=3), r"h6\.stderr: expected an object by task, found 3\."),
}  # fmt: skip


@pytest.mark.parametrize("why", WRONG)
def test_what_is_wrong_is_named_with_file_and_key_and_nothing_is_written(why, tmp_path):
    content, message = WRONG[why]
    good, bad = write(tmp_path, "good.json", full_file()), write(tmp_path, "bad.json", content)
    with pytest.raises(UserError, match=rf"^{bad}: {message}$"):
        write_report([good, bad], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def places(value, path=()):
    """Paths to all values within a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield from places(child, (*path, key))


def test_any_value_in_place_of_another_is_read_or_refused_in_one_sentence(tmp_path):
    draw, junk = random.Random(0), (None, True, -1, 7, 1e999, math.nan, "text", [], [1], {}, {"a": [{}]})
    refused = []
    for preset in ("h6", None):
        plain = arc_file([1, 0, 1]) if preset is None else subset_file(count=2)
        outer = [p for p in places(plain) if len(p) > 0 and p[0] != "samples"]
        inner = [p for p in places(plain) if len(p) > 0 and p[0] == "samples"]
        for _ in range(150):
            content = json.loads(json.dumps(plain))
            *path, last = draw.choice(draw.choice((outer, inner)))
            at = content
            for key in path:
                at = at[key]
            at[last] = draw.choice(junk)
            try:
                report(tmp_path, content)
            except UserError as e:
                refused.append(str(e))
    assert len(refused) > 50
    assert [e for e in refused if not e.startswith(f"{tmp_path}/0.json: ") or "\n" in e] == []
