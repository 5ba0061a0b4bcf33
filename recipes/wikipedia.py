"""English Wikipedia as a stream of article texts: a small excerpt that needs no network, or the whole dump.

A source starts its stream anew at every call, because the tokenizer's training and the encoding each read it once.
"""

from __future__ import annotations

import bz2
import hashlib
import importlib.util
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lightning_gemini.errors import ConfigurationError

_EXCERPT_PATTERN = "test/test_data/enwiki-latest-pages-articles*.bz2"
_SHORTEST_ARTICLE_CHARACTERS = 400
_REDIRECT = re.compile(r"\s*#redirect", re.IGNORECASE)
_BLANK_LINES = re.compile(r"\s*\n\s*\n\s*")


@dataclass(frozen=True, slots=True)
class Source:
    """A corpus.

    Attributes:
        identity: Changes exactly when the texts do; names the corpus in the token cache.
        articles: Starts the stream of plain article texts.
    """

    identity: str
    articles: Callable[[], Iterator[str]]


def excerpt(articles: int | None = None) -> Source:
    """The excerpt of a Wikipedia dump (206 pages, 3 MB of text) that the gensim wheel carries for its own tests.

    Args:
        articles: Stop after so many articles; ``None`` takes all.

    Raises:
        ConfigurationError: gensim, or the excerpt in it, is missing.
    """
    dump = _excerpt_path()
    digest = hashlib.sha256(dump.read_bytes()).hexdigest()[:16]
    return Source(f"excerpt-{digest}-{articles}", lambda: itertools.islice(_dump_articles(dump), articles))


def hub(path: str, name: str, split: str = "train", articles: int | None = None) -> Source:
    """A Wikipedia data set of the Hugging Face hub, for example ``wikimedia/wikipedia``, ``20231101.en``.

    The stream starts only when it is read, so a wrong name or a missing network shows then, as a ConfigurationError.
    """
    identity = f"{path}-{name}-{split}-{articles}"
    return Source(identity, lambda: itertools.islice(_hub_articles(path, name, split), articles))


def _excerpt_path() -> Path:
    # find_spec finds the wheel without importing it: gensim's own import takes seconds.
    spec = importlib.util.find_spec("gensim")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for dump in sorted(Path(folder).glob(_EXCERPT_PATTERN)):
            return dump
    raise ConfigurationError(
        "data=excerpt reads the Wikipedia excerpt in the gensim wheel, which is not installed here: "
        "`pip install gensim`, or use data=wikipedia"
    )


def _dump_articles(dump: Path) -> Iterator[str]:
    from gensim.corpora import wikicorpus  # type: ignore[import-untyped]

    with bz2.open(dump) as pages:
        for _title, markup, _page_id in wikicorpus.extract_pages(pages, filter_namespaces=("0",)):
            if _REDIRECT.match(markup):
                continue
            text = _BLANK_LINES.sub("\n\n", wikicorpus.filter_wiki(markup)).strip()
            if len(text) >= _SHORTEST_ARTICLE_CHARACTERS:
                yield text


def _hub_articles(path: str, name: str, split: str) -> Iterator[str]:
    import datasets  # type: ignore[import-untyped]

    try:
        rows = datasets.load_dataset(path, name, split=split)
    except Exception as error:  # the hub's client raises its own, requests', and plain OSErrors
        raise ConfigurationError(
            f"cannot load {path} ({name}, {split}) from the Hugging Face hub: {type(error).__name__}: {error}. "
            "Check the name and the network (HF_ENDPOINT, HF_HOME for a copy downloaded before), or use data=excerpt"
        ) from error
    for row in rows:
        yield row["text"]
