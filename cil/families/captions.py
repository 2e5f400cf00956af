"""What families share that are told a caption: CLIP's tokenizer, and the tokens of what guidance says nothing of."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cil.families.sd_vae import SDVAEFamily

VOCABULARIES = (("vocab.json", "merges.txt"), ("tokenizer.json",))  # either
PROBES = ("", "a dog", "Ein Café, 3 Hunde &amp; 犬", "very " * 99)  # what a tokenizer does, is seen by these


class CaptionedFamily(SDVAEFamily):
    @property
    def vocabulary(self) -> str | None:
        """The folder of the tokenizer."""
        return self.options.tokenizer

    @property
    @abstractmethod
    def words(self) -> int:
        """That the text tower knows."""

    @cached_property
    def tokenizer(self) -> Any:
        own = self.preset == "tiny" and self.options.tokenizer is None
        tokenizer = byte_tokenizer() if own else clip_tokenizer(self.vocabulary)
        if len(tokenizer) > self.words:
            told = f"{len(tokenizer)} words, and the text tower of {self.name}, {self.preset}, knows {self.words}"
            raise ValueError(f"tokenizer={self.vocabulary}: {told}")
        return tokenizer

    @cached_property
    def encoder_identity(self) -> str:
        """Of the tokenizer too: what it holds, and how it cuts and pads."""
        held = self.tokenizer.backend_tokenizer.to_str(), self.ids(PROBES).tolist()
        return f"{super().encoder_identity}-{hashlib.sha256(repr(held).encode()).hexdigest()[:8]}"

    @abstractmethod
    def ids(self, captions: Sequence[str]) -> Tensor:
        """[B, 77], as the text tower was trained on."""

    @abstractmethod
    def _text(self, captions: Sequence[str]) -> Tensor:
        """[B, 77, D]"""

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        return {"text": self._text(captions).half().cpu()}

    @cached_property
    @torch.no_grad()
    def _empty_caption(self) -> Tensor:
        return self._text([""])

    def _tokens(self, captions: Sequence[str], length: int, **how: Any) -> Any:
        """Cut to `length` with the end kept. What no encoding has, such as half of a surrogate pair, becomes `?`."""
        if not captions:
            raise ValueError("captions: at least one")
        clean = [caption.encode("utf-8", "replace").decode() for caption in captions]
        return self.tokenizer(clean, truncation=True, max_length=length, **how).input_ids


def clip_tokenizer(folder: str | None) -> Any:
    """CLIP's, of its files."""
    from transformers import CLIPTokenizer

    if folder is None:
        raise ValueError("tokenizer=None: this needs one; name a folder with CLIP's vocab.json and merges.txt")
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no folder; expected one with CLIP's vocab.json and merges.txt")
    if not any(all(Path(folder, name).is_file() for name in kind) for kind in VOCABULARIES):
        raise ValueError(f"{folder}: no vocabulary; expected CLIP's vocab.json and merges.txt, or its tokenizer.json")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises nothing more exact
        raise ValueError(f"{folder}: not CLIP's tokenizer, or damaged ({' '.join(str(error).split())})") from None


def byte_tokenizer() -> Any:
    """CLIP's without merges: every byte, inside a word and at its end, and the two marks."""
    from transformers import CLIPTokenizer

    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    symbols = [*map(chr, visible), *(chr(256 + i) for i in range(len(hidden)))]
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
