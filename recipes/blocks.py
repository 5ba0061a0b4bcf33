"""Articles to fixed-length blocks of tokens, through a byte-level BPE tokenizer trained on the fly.

Tokenizer and tokens are kept in a cache directory. All ranks of a machine ask for them at once: the first does the work
under a lock, the others wait for it and map the same file.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset
from wikipedia import Source

from lightning_gemini.errors import ConfigurationError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
_FORMAT = 1
_ENCODE_BATCH_ARTICLES = 64


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """How the tokenizer is trained.

    Attributes:
        vocab_size: Upper bound of the number of tokens, the 256 bytes and ``<|endoftext|>`` included.
        min_frequency: Pairs seen less often are not merged.
        training_articles: Train on the first so many articles; ``None`` takes all.
    """

    vocab_size: int
    min_frequency: int = 2
    training_articles: int | None = None


class Blocks(Dataset[torch.Tensor]):
    """Map-style data set of blocks: item i is int64 of shape (block_tokens,).

    Args:
        tokens: One-dimensional unsigned integers; a memory map will do.
        block_tokens: Length of a block. The last, shorter one is dropped.

    Raises:
        ConfigurationError: The corpus is shorter than one block.
    """

    def __init__(self, tokens: np.ndarray, block_tokens: int) -> None:
        count = len(tokens) // block_tokens
        if count == 0:
            raise ConfigurationError(f"the corpus has {len(tokens)} tokens, less than one block of {block_tokens}")
        self._blocks = tokens[: count * block_tokens].reshape(count, block_tokens)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self._blocks[index].astype(np.int64))


def tokenise(source: Source, config: TokenizerConfig, cache_dir: Path) -> np.ndarray:
    """The corpus as one read-only row of token ids, from the cache or made now.

    Deterministic: the same source and config give the same ids on every machine.

    Raises:
        ConfigurationError: The source cannot be read, or the cached tokens are damaged.
    """
    entry = cache_dir / _key(source, config)
    if not entry.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(entry.with_name(f"{entry.name}.lock")):
            if not entry.exists():
                _build(source, config, entry)
    return _load(entry)


def _key(source: Source, config: TokenizerConfig) -> str:
    import tokenizers

    parts = (_FORMAT, source.identity, *astuple(config), tokenizers.__version__)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go of it when its holder is killed
        yield


def _build(source: Source, config: TokenizerConfig, entry: Path) -> None:
    partial = entry.with_name(f"{entry.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a builder that was killed; we hold the lock
    partial.mkdir()
    tokenizer = _train(source, config)
    tokenizer.save(str(partial / "tokenizer.json"))
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32)
    count = 0
    with (partial / "tokens.bin").open("wb") as file:
        for ids in _encoded(source, tokenizer, dtype):
            file.write(ids.tobytes())
            count += len(ids)
    (partial / "meta.json").write_text(json.dumps({"tokens": count, "dtype": dtype.name, "source": source.identity}))
    partial.rename(entry)


def _train(source: Source, config: TokenizerConfig) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(source.articles(), config.training_articles), trainer)
    return tokenizer


def _encoded(source: Source, tokenizer: Tokenizer, dtype: np.dtype) -> Iterator[np.ndarray]:
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    articles = source.articles()
    while batch := list(itertools.islice(articles, _ENCODE_BATCH_ARTICLES)):
        for encoding in tokenizer.encode_batch(batch):
            yield np.array([*encoding.ids, end_of_text], dtype)


def _load(entry: Path) -> np.ndarray:
    try:
        meta = json.loads((entry / "meta.json").read_text())
        tokens: np.ndarray = np.memmap(entry / "tokens.bin", dtype=meta["dtype"], mode="r")
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(f"cannot read the cached tokens: {error}. Remove {entry} and start again") from error
    if len(tokens) != meta["tokens"]:
        raise ConfigurationError(
            f"{entry} holds {len(tokens)} tokens, expected {meta['tokens']}: remove the directory and start again"
        )
    return tokens
