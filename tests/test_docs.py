"""Pages for people: every link leads somewhere, and every number format is explained."""

import re

import pytest
from commands import ROOT

from qat.quant.kv_formats import DEFAULT_KV_FORMAT, KV_FORMATS
from qat.quant.quantizers import QUANTIZERS

PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")})


def anchors(page) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text)
    for place, anchor in links + [(place, "") for place in re.findall(r'src="([^"]+)"', text)]:
        if place.startswith("http"):
            continue
        target = page.parent / place if place else page
        assert target.exists(), place
        assert not anchor or anchor in anchors(target), f"{place}#{anchor}"


@pytest.mark.parametrize("table", [QUANTIZERS, KV_FORMATS], ids=lambda table: table.kind)
def test_every_number_format_has_a_row(table):
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "method.md").read_text(), re.MULTILINE)
    explained = {name for row in rows for name in re.findall(r"`(\w+)`", row)} | {DEFAULT_KV_FORMAT}
    assert explained >= set(table.those(lambda one: type(one).__module__.startswith("qat.")))  # no plug-ins of tests
