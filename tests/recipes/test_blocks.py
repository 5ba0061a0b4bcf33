from __future__ import annotations

import bz2
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import blocks
import numpy as np
import pytest
import torch
import wikipedia

from lightning_gemini.errors import ConfigurationError

CONFIG = blocks.TokenizerConfig(vocab_size=300)
TEXTS = ("the cat sat on the mat. " * 20, "a dog, naïve and bold, ran to the cat. " * 15)


def source(marker: Path | None = None, pause_s: float = 0.0) -> wikipedia.Source:
    """Two articles; every start of the stream adds a line to ``marker``."""

    def articles() -> Iterator[str]:
        if marker is not None:
            with marker.open("a") as file:
                file.write(f"{os.getpid()}\n")
        time.sleep(pause_s)
        yield from TEXTS

    return wikipedia.Source("two-articles", articles)


def test_tokens_are_the_articles_with_a_separator_after_each(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokens = blocks.tokenise(source(), CONFIG, tmp_path)
    tokenizer = Tokenizer.from_file(str(next(tmp_path.glob("*/tokenizer.json"))))
    text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    assert text == "".join(article + blocks.END_OF_TEXT for article in TEXTS)
    assert tokens.dtype == np.uint16
    assert 257 < tokenizer.get_vocab_size() <= 300


def test_the_same_corpus_gives_the_same_tokens_everywhere(tmp_path: Path) -> None:
    first = blocks.tokenise(source(), CONFIG, tmp_path / "a")
    second = blocks.tokenise(source(), CONFIG, tmp_path / "b")
    assert first.tobytes() == second.tobytes()


def test_other_settings_get_an_entry_of_their_own(tmp_path: Path) -> None:
    blocks.tokenise(source(), CONFIG, tmp_path)
    blocks.tokenise(source(), blocks.TokenizerConfig(vocab_size=280), tmp_path)
    blocks.tokenise(wikipedia.Source("other", source().articles), CONFIG, tmp_path)
    assert len(list(tmp_path.glob("*/tokens.bin"))) == 3


def test_processes_that_ask_at_once_train_one_tokenizer(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    work = source(tmp_path / "starts", pause_s=0.3)
    processes = [fork.Process(target=blocks.tokenise, args=(work, CONFIG, tmp_path / "cache")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    starts = (tmp_path / "starts").read_text().splitlines()
    assert len(starts) == 2  # one to train, one to encode
    assert len(set(starts)) == 1


def test_a_builder_that_was_killed_leaves_no_half_entry(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    marker = tmp_path / "starts"
    process = fork.Process(target=blocks.tokenise, args=(source(marker, pause_s=60.0), CONFIG, tmp_path / "cache"))
    process.start()
    while not marker.exists():
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    tokens = blocks.tokenise(source(), CONFIG, tmp_path / "cache")
    assert len(tokens) > 0
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_damaged_tokens_are_refused_with_the_directory_to_remove(tmp_path: Path) -> None:
    blocks.tokenise(source(), CONFIG, tmp_path)
    path = next(tmp_path.glob("*/tokens.bin"))
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ConfigurationError, match=f"{path.parent} holds .* remove the directory"):
        blocks.tokenise(source(), CONFIG, tmp_path)
    (path.parent / "meta.json").write_text("{")
    with pytest.raises(ConfigurationError, match="cannot read the cached tokens"):
        blocks.tokenise(source(), CONFIG, tmp_path)


def test_blocks_cut_the_tokens_without_overlap() -> None:
    data = blocks.Blocks(np.arange(23, dtype=np.uint16), 5)
    assert len(data) == 4
    assert data[3].tolist() == [15, 16, 17, 18, 19]
    assert data[0].dtype == torch.int64
    with pytest.raises(ConfigurationError, match="less than one block of 24"):
        blocks.Blocks(np.arange(23, dtype=np.uint16), 24)


def test_the_excerpt_is_english_text_without_markup() -> None:
    articles = list(wikipedia.excerpt(3).articles())
    assert len(articles) == 3
    assert "Anarchism" in articles[0]
    for article in articles:
        assert not article.lower().startswith("#redirect")
        assert "{{" not in article
        assert "[[" not in article
        assert len(article) >= 400


def test_a_missing_excerpt_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install gensim"):
        wikipedia.excerpt()


def test_short_articles_and_redirects_are_left_out(tmp_path: Path) -> None:
    def page(number: int, text: str) -> str:
        revision = f"<revision><text>{text}</text></revision>"
        return f"<page><title>T{number}</title><ns>0</ns><id>{number}</id>{revision}</page>"

    pages = (page(1, "#REDIRECT [[Elsewhere]] " + "x " * 400), page(2, "short"), page(3, "A '''long''' article. " * 30))
    dump = tmp_path / "dump.bz2"
    xml = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{"".join(pages)}</mediawiki>'
    dump.write_bytes(bz2.compress(xml.encode()))
    (article,) = wikipedia._dump_articles(dump)
    assert article.startswith("A '''long''' article.")


def test_an_unreachable_hub_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    stream = wikipedia.hub("wikimedia/wikipedia", "20231101.en").articles()
    with pytest.raises(ConfigurationError, match=r"no route.*data=excerpt"):
        next(stream)


def test_the_hub_s_texts_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[object, ...]] = []

    def load(path: str, name: str, split: str) -> list[dict[str, str]]:
        asked.append((path, name, split))
        return [{"text": text} for text in TEXTS]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(wikipedia.hub("wikimedia/wikipedia", "20231101.en", articles=1).articles()) == [TEXTS[0]]
    assert asked == [("wikimedia/wikipedia", "20231101.en", "train")]
