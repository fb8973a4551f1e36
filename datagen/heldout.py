"""Real prose that no model here was trained on by us: encyclopedic articles from a PyPI package.

The gensim wheel carries, for its own tests, an excerpt of a 2016 Wikipedia dump. It is read where it is
installed and never copied. gensim itself is not imported.
"""

import bz2
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import mwparserfromhell

from qat.errors import UserError

_DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_SHORTEST = 2000
"""Characters: shorter pages are redirects and stubs."""

_FOOTNOTE = re.compile(r"<ref[^<>]*/>|<ref.*?</ref>", re.DOTALL)


def articles() -> Iterator[str]:
    """The text of each article, without its markup; raises UserError where the package is missing."""
    spec = importlib.util.find_spec("gensim")
    if spec is None or spec.origin is None:
        raise UserError("The held-out prose is in the package gensim: pip install --no-deps gensim==4.4.0")
    with bz2.open(Path(spec.origin).parent / _DUMP) as dump:
        for _, element in ElementTree.iterparse(dump):
            if element.tag.endswith("}text") and len(element.text or "") > _SHORTEST:
                text = _prose(element.text or "")
                if len(text) > _SHORTEST:
                    yield text
            element.clear()


def _prose(markup: str) -> str:
    code = mwparserfromhell.parse(_FOOTNOTE.sub("", markup))
    for link in code.filter_wikilinks(recursive=False):
        if link.title.startswith(("File:", "Image:", "Category:")):
            code.remove(link)
    return code.strip_code(normalize=True, collapse=True).strip()
