"""Pages for people: every link leads somewhere, and figures are those of the results that they come from."""

import json
import re

import pytest
from commands import ROOT

from qat.quant.kv_formats import INTEGERS, KV_FORMATS
from qat.quant.quantizers import QUANTIZERS

PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")})
CELLS = ROOT / "docs" / "results" / "cells"


def anchors(page) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for place, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
        if place.startswith("http"):
            continue
        target = page.parent / place if place else page
        assert target.exists(), place
        assert not anchor or anchor in anchors(target), f"{place}#{anchor}"


@pytest.mark.parametrize("table", [QUANTIZERS, KV_FORMATS], ids=lambda table: table.kind)
def test_every_number_format_has_a_row(table):
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "method.md").read_text(), re.MULTILINE)
    explained = {name for row in rows for name in re.findall(r"`(\w+)`", row)} | {INTEGERS}
    assert explained >= set(table.those(lambda one: type(one).__module__.startswith("qat.")))  # no plug-ins of tests


@pytest.mark.parametrize(
    ("row", "cell"),
    [
        ("full precision", "full_precision_16-16-16"),
        ("RTN, the paper's quantizers", "rtn_4-8-4_kv_granularity=token"),
        ("LLM-QAT, one scale per token and head of the KV cache", "qat_4-8-4"),
        ("LLM-QAT, rotated KV cache (`--kv_rotation hadamard`)", "qat_4-8-4_kv_rotation=hadamard"),
        ("the same after 400 steps", "qat_4-8-4_kv_rotation=hadamard_steps=400"),
        ("GPTQ, rotated cache, weights in groups of 64", "gptq_4-8-4_w_group_size=64_kv_rotation=hadamard"),
        (
            "**LLM-QAT, rotated cache, groups (`--w_group_size 64`)**",
            "qat_4-8-4_w_group_size=64_kv_rotation=hadamard",
        ),
        (
            "and initialized with GPTQ's weights (`--student`)",
            "qat_4-8-4_w_group_size=64_kv_rotation=hadamard_student=gptq",
        ),
        ("RTN", "rtn_8-8-8"),
        ("SmoothQuant", "smoothquant_8-8-8"),
        ("**LLM-QAT, initialized with SmoothQuant's weights, `--lr 2e-5`**", "qat_8-8-8_lr=2e-05_student=smoothquant"),
    ],
)
def test_the_readmes_table_has_the_figures_of_the_cells(row, cell):
    texts = json.loads((CELLS / f"{cell}.json").read_text())["texts"]
    expected = [f"{texts[text]['perplexity']:.1f}" for text in ("encyclopedia", "howto")]
    (line,) = re.findall(rf"^\| {re.escape(row)} \|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [figure.strip(" *") for figure in line.split("|")] == expected
