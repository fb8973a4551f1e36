"""Claims are told from cells: by pairs of windows, and never by more than was measured."""

import json
import math
from dataclasses import asdict

import pytest
from commands import ROOT

from launch.paper import claims, curve, flips, served
from launch.paper.claims import Claim, Difference, Finding, Goal, closes
from launch.paper.curve import Law
from launch.reproduce import PEERS, TABLES, Budget, Cell, Results, queue, read_recipe
from qat.evaluate.tasks import ZERO_SHOT
from qat.quant.config import QuantConfig

RECIPES = ROOT / "launch" / "recipes" / "reproduce"
WINDOWS = [1.0, 2.0, 3.0, 4.0]


def cell(method: str, shift: float, nll: float = 3.0, **settings) -> dict:
    """A cell whose windows all have KL higher by ``shift``, and a little noise."""
    kl = [value + shift + 0.001 * number for number, value in enumerate(WINDOWS)]
    quant = {name: getattr(QuantConfig(), name) for name in QuantConfig.__dataclass_fields__}
    score = {"nll": nll, "kl": sum(kl) / 4, "kl_stderr": 0.1, "perplexity": 20.0, "window_kl": kl}
    return {
        "name": f"{method}_4-8-4", "method": method, "bits": "4-8-4", "changes": [], "seed": 0,
        "settings": quant | settings, "texts": {"prose": score}, "tasks": {},
        "budget": asdict(Budget()) | {"trained": {"tokens": 1234}},
    }  # fmt: skip


def test_pairs_tell_apart_what_spreads_much_more_by_itself():
    assert Difference.of(cell("qat", 0), cell("rtn", 0.1)).sure
    assert Difference.of(cell("qat", 0), cell("rtn", 0.1)).mean == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("shift", "strictly", "verdict"),
    [
        (0.1, True, "holds"),
        (-0.1, True, "does not hold"),
        (0.0, True, "undecided"),
        (0.0, False, "holds"),
        (-0.1, False, "does not hold"),
    ],
)
def test_verdicts(shift, strictly, verdict):
    cells = {"a": cell("qat", 0), "b": cell("rtn", shift)}
    noisy = cells["b"]["texts"]["prose"]["window_kl"]
    noisy[0] += 0.01
    noisy[1] -= 0.01
    assert Claim("", [("a", "b")], strictly).check(cells).verdict == verdict


def test_a_claim_of_several_pairs_fails_with_one_and_says_what_was_measured():
    cells = {"a": cell("qat", 0), "b": cell("rtn", 0.1), "c": cell("gptq", -0.1)}
    claim = Claim("", [("a", "b"), ("a", "c"), ("a", "missing")])
    finding = claim.check(cells)
    assert finding.verdict == "does not hold (holds in 1 of 2, 2 of 3 measured)"
    assert "a - b: -0.1" in finding.numbers
    assert "missing" not in finding.numbers
    assert Claim("", [("a", "missing")]).check(cells) == Finding("not measured yet", "")


def test_what_another_seed_changes_is_no_difference():
    cells = {"a": cell("qat", 0), "b": cell("qat", 0.1), "r": cell("rtn", 0.1), "q": cell("gptq", 0.2)}
    assert Claim("", [("a", "b")]).check(cells).verdict == "holds"
    cells["a_seed=1"] = cell("qat", 0.15) | {"seed": 1}
    assert claims.seed_spread(cells) == pytest.approx(0.15)
    assert Claim("", [("a", "b")]).check(cells).verdict == "undecided"
    assert Claim("", [("a", "b")], strictly=False).check(cells).verdict == "holds"
    assert Claim("", [("r", "q")]).check(cells).verdict == "holds", "of two that were not trained"


def test_a_claim_may_be_about_one_text():
    cells = {"a": cell("qat", 0), "b": cell("rtn", 0.1)}
    for name, own in cells.items():
        own["texts"] |= {"verse": cell("", 0.3 if name == "a" else 0.0)["texts"]["prose"]}
    claim = Claim("", [("a", "b"), ("a", "b")], on=("prose", "verse"))
    finding = claim.check(cells)
    assert finding.verdict == "does not hold (holds in 1 of 2)"
    assert "a - b on prose: -0.1" in finding.numbers
    assert "a - b on verse: +0.3" in finding.numbers


def test_closing_the_gap():
    cells = {"f": cell("full_precision", 0, nll=3.0), "q": cell("qat", 0.2, nll=3.2)}
    assert closes(["q"], cells) == claims.NOT_MEASURED
    cells[claims._PAPERS_RTN] = cell("rtn", 1, nll=4.0, kv_granularity="token")
    assert closes(["q"], cells) == Finding("holds", "q: prose 80%")
    cells["r"] = cell("rtn", 1, nll=3.5)
    assert closes(["q"], cells) == Finding("holds", "q: prose 80% (of its own RTN's: prose 60%)")
    cells["q"]["texts"]["prose"]["nll"] = 3.3
    assert closes(["q"], cells).verdict == "does not hold"


def accuracies(outcome):
    return {"tasks": {task: {"correct": outcome} for task in ZERO_SHOT}}


def test_accuracy_differs_by_pairs():
    """The same documents right on both sides leave no spread."""
    a, b = accuracies("1101"), accuracies("1001")
    difference = claims.accuracy_difference([(a, b)])
    assert difference.mean == pytest.approx(25)
    assert difference.stderr == pytest.approx(25 / 8**0.5)
    assert claims.accuracy_difference([(a, a)]) == Difference(0, 0)
    assert claims.accuracy_difference([(a, b)] * 3) == difference  # measured thrice, they are not more documents
    assert claims.accuracy_difference([(a, b), (b, a)]) == Difference(0, 0)


def test_flips_differ_by_pairs():
    """The first pair's cell flips on one document where the other flips on all four."""
    teacher, a, b = (accuracies(outcome) for outcome in ("1100", "1101", "0011"))
    difference = claims.flip_difference([(a, b)], teacher)
    assert difference.mean == pytest.approx(100 * (1 - 4) / 4)
    assert claims.flip_difference([(a, a)], teacher) == Difference(0, 0)
    made = {
        "q": a | {"method": "qat"},
        "r": b | {"method": "rtn"},
        "f": accuracies("11001") | {"method": "full_precision"},
    }
    for cell in made.values():
        cell["settings"] = asdict(QuantConfig()) | {"limit": 0}
    assert claims._flips_by_pairs(made).splitlines()[-1].replace(" ", "") == "|q||||", (
        "the teacher's documents are others"
    )


def test_accuracies_without_a_rival_leave_their_column_empty():
    """Two students and full precision, as --cells 'full*,qat*' leaves them."""
    made = {}
    for name, method, bits in (("f", "full_precision", 16), ("q", "qat", 4), ("p", "qat", 8)):
        scores = {task: {"correct": "1101", "documents": 4} for task in ZERO_SHOT}
        settings = asdict(QuantConfig(w_bits=bits)) | {"limit": 4}
        made[name] = {"method": method, "settings": settings, "tasks": scores, "machine": "a Xeon, 2 cores"}
    found = claims._accuracies_by_pairs(made)
    lines = found.splitlines()[:7]
    assert lines[-1] == "| all of these | +0.0 ± 0.0 |  |  |  |"
    assert found.splitlines()[-1].startswith("2 cells' accuracies were measured with float matmuls")
    assert found.endswith(": q, p."), "full precision always multiplies floats"
    made["q"]["products"] = {"piqa": "int_mm"}
    found = claims._accuracies_by_pairs(made)
    assert found.splitlines()[:7] == lines
    assert "a Xeon (floats); a Xeon (int_mm)" in found
    assert found.endswith(": p.")
    made["p"]["products"] = {"piqa": "int_mm"}
    assert claims._accuracies_by_pairs(made).splitlines() == lines
    made["p"]["arithmetic"] = "products of codes"
    assert "a Xeon (int_mm); a Xeon (products of codes)" in claims._accuracies_by_pairs(made)
    made["q"]["arithmetic"] = "products of codes"
    assert claims._accuracies_by_pairs(made).splitlines() == lines


def test_the_claims_say_where_cells_of_two_arithmetics_are_compared():
    made = {name: {"settings": asdict(QuantConfig(a_bits=bits))} for name, bits in (("a", 8), ("b", 8), ("c", 16))}
    assert claims._mixed(made) == ""
    made["a"]["arithmetic"] = "products of codes"
    assert claims._mixed(made).startswith("1 of 2 cells"), "activations in 16 bits are always multiplied as floats"
    made["b"]["arithmetic"] = "products of codes"
    assert claims._mixed(made) == ""


def test_the_claims_name_cells_that_the_recipes_make():
    made = {job.cell.name for job in queue({path.stem: read_recipe(path) for path in RECIPES.glob("*.yaml")}, "*")}
    claimed = {name for claim in claims.CLAIMS for pair in claim.pairs for name in pair}
    claimed |= {name for names in claims.RECIPES_4_8_4.values() for name in names}
    goals = [claim for claim in claims.BEYOND if isinstance(claim, claims.Goal)]
    claimed |= {name for claim in claims.BEYOND if isinstance(claim, Claim) for pair in claim.pairs for name in pair}
    claimed |= {name for goal in goals for name in (goal.cell, goal.of) if name}
    assert claimed <= made


def test_the_page_shows_every_cell_and_every_claim():
    cells = {"qat_4-8-4": cell("qat", 0)}
    page = claims.markdown({"main": ["qat_4-8-4", "rtn_4-8-4"]}, cells, {}, {}, {})
    assert "| LLM-QAT | 4-8-4 |" in page
    assert "1 of 2 cells." in page
    assert "100 optimizer steps of 2 sequences of at most 256 tokens (1,234 tokens" in page
    assert all(claim.text in page for claim in claims.CLAIMS)


def test_a_recipe_stands_for_every_combination_once_and_in_order(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- method: [rtn, qat]\n  bits: [4-8-4, 8-8-8]\n  tasks: paper\n- method: qat\n  bits: 4-8-4\n")
    jobs = queue({"a": read_recipe(recipe), "b": read_recipe(recipe)}, "*")
    assert [job.cell.name for job in jobs if not job.tasks] == ["rtn_4-8-4", "rtn_8-8-8", "qat_4-8-4", "qat_8-8-8"]
    assert len(jobs) == 8
    assert all(job.tasks for job in jobs[4:])  # accuracy comes after all of perplexity


def test_a_cells_name_says_what_is_unusual():
    assert Cell("qat", QuantConfig(), Budget()).name == "qat_4-8-4"
    quant = QuantConfig(4, 8, 8, kv_format="ggml_q8_0/ggml_q4_0", overrides={"lm_head": {"w_bits": 8, "a_bits": 8}})
    served = Cell("qat", quant, Budget())
    assert served.name == "qat_4-8-8_kv_format=ggml_q8_0+ggml_q4_0_lm_head.w_bits=8_lm_head.a_bits=8"
    changed = Cell("qat", QuantConfig(4, 6, 16, kv_rotation="hadamard"), Budget(steps=400), data="top1", seed=2)
    assert changed.name == "qat_4-6-16_kv_rotation=hadamard_steps=400_data=top1_seed=2"


def test_what_llama_cpp_quantizes_has_no_bits_of_ours():
    made = []
    for method in ("full_precision", "llama_q4_0"):
        own = cell(method, 0, text="prose") | {"machine": "a Xeon", "versions": {}, "bits": "16-16-16"}
        score = own["texts"]["prose"] | {"nll_stderr": 0.1, "top1": 0.9, "top1_stderr": 0.1, "tokens": 9}
        own |= {"served": {"file_MB": 9.0, "tokens_per_second": {"f16": 9.0}}, "texts": {"prose, f16 cache": score}}
        made.append(own)
    assert [row["bits"] for row in served.rows(made)] == ["16-16-16", None]
    page = served.markdown(made, 2)
    assert "| full precision | 16-16-16 |" in page
    assert "| llama.cpp's Q4_0 |  |" in page


def test_the_law_of_a_curve_is_found_with_and_without_a_floor():
    tokens = [1e4 * 2**step for step in range(6)]
    law = Law.of(tokens, [3 * n**-0.3 for n in tokens])
    assert (law.scale, law.exponent) == pytest.approx((3, 0.3))
    floored = Law.with_floor(tokens, [0.1 + 3 * n**-0.3 for n in tokens])
    assert floored(1e8) == pytest.approx(0.1 + 3 * 1e8**-0.3, rel=0.02)
    plain = Law.of(tokens, [0.1 + 3 * n**-0.3 for n in tokens])
    assert plain(1e8) < 0.9 * floored(1e8), "without the floor it promises too much"
    kl = [0.1 + 3 * n**-0.3 for n in tokens]
    assert plain.error(tokens, kl) > 10 * floored.error(tokens, kl), "both are errors of log KL"
    assert Law(0.0, 2.0, 0.5).error(tokens, [n**-0.5 for n in tokens]) == pytest.approx(math.log(2))


def test_a_curve_is_of_the_cells_that_differ_in_length_alone():
    changes, quant = ["steps=50", "decay_steps=10", "sequences=60"], ["kv_format=ggml_q8_0/ggml_q4_0"]
    cells = {"other": cell("rtn", 2), "rtn": cell("rtn", 1) | {"changes": quant}}
    for number, tokens in enumerate((1000, 4000, 2000)):
        own = cell("qat", 0.1 * number, decay_steps=10) | {"changes": [*quant, *changes]}
        own["budget"]["trained"]["tokens"] = tokens
        cells[f"{number}"] = own
    cells["another rate"] = cell("qat", 0, decay_steps=10) | {"changes": ["lr=1", *changes]}
    (found,) = curve.curves(cells)
    assert (found.name, found.tokens) == (f"4-8-4 {quant[0]}", [1000, 2000, 4000])
    assert found.untrained == cells["rtn"]["texts"]["prose"]["kl"]
    assert len(found.laws) == 1, "three points have no floor"
    assert "1k, 2k, 4k" in curve.markdown([found])
    assert curve.markdown([]) == ""


def test_flips_are_shown_beside_the_difference_that_hides_them():
    made = {
        name: {"method": method, "tasks": {"piqa": {"correct": correct}}}
        for name, method, correct in (("f", "full_precision", "1100"), ("q", "qat", "1010"))
    }
    page = flips.markdown({"all": made, "none": {}})
    assert "| q | 4 (all) | +0.0 ± 35.4 | 50.0% ± 25.0% | 25.0% | 25.0% |  |" in page
    assert flips.markdown({"all": {"q": made["q"]}}) == ""
    others = {"longer": {"piqa": {"correct": "10101"}}, "another": {"boolq": {"correct": "1100"}}, "empty": {}}
    made |= {name: {"method": "qat", "tasks": tasks} for name, tasks in others.items()}
    assert flips.markdown({"all": made, "none": {}}) == page, "what has no document in common has no row"


def test_a_goal_is_a_distance_or_a_part_of_another():
    cells = {"q": cell("qat", 0), "r": cell("rtn", 10)}  # 2.5 and 12.5 nats
    assert Goal("", "q", 2.6, on="prose").check(cells).verdict == "holds"
    assert Goal("", "q", 0.1, "r", on="prose").check(cells).verdict == "does not hold"
    assert "80.0% of r's 12.502 gone" in Goal("", "q", 0.3, "r", on="prose").check(cells).numbers
    assert Goal("", "q", 1, "missing").check(cells) == claims.NOT_MEASURED


def test_other_texts_are_no_counterpart():
    cells = {"f": cell("full_precision", 0, text="prose"), "q": cell("qat", 0, text="dialogues")}
    assert claims.counterpart(cells["q"], "full_precision", cells) is None
    cells |= {"r": cell("rtn", 1, rotation="hadamard"), "o": cell("rtn", 1), "q": cell("qat", 0, rotation="hadamard")}
    assert claims.counterpart(cells["q"], "rtn", cells) is cells["o"], "the distance is that of RTN without rotation"


def test_the_page_says_what_the_cells_say():
    """The committed one. ``launch/reproduce.py`` with any cell that is there writes it again."""
    results = ROOT / "docs" / "results"
    tables = {table: read_recipe(RECIPES / f"{table}.yaml") for table in TABLES}
    found = {}
    for job in (job for jobs in tables.values() for job in jobs):
        file = results / "cells" / f"{job.name}.json"
        if file.exists():
            result = json.loads(file.read_text())
            if {key: value for key, value in result["settings"].items() if key != "model"} == job.settings:
                found[job.cell.name, job.kind] = result
    assert len(found) > 100
    page = Results.of(tables, found).page(results / PEERS)
    assert page.splitlines() == (results / "README.md").read_text().splitlines()
