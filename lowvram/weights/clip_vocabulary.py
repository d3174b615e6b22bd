"""The tokenizer of CLIP's text encoders, for weights that come without it: every Stable Diffusion in a single file.

All of them use the one byte-pair vocabulary of CLIP (arXiv 2103.00020, section 2.4), and differ in the token that
fills up a text to 77. What is shipped is the list of merges, under CLIP's own licence; the rest follows from it.
"""

import contextlib
import gzip
import json
import os
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from lowvram.data.image_cache import cache_root
from lowvram.errors import LowVRAMError

__all__ = ["END", "LENGTH", "SIZE", "START", "folder"]

LENGTH = 77  # tokens of a text, with the two at its ends
START, END = "<|startoftext|>", "<|endoftext|>"
SIZE = 49408  # tokens: 256 bytes, the same at the end of a word, 48,894 merges, START and END


def folder(pad: str = END) -> Path:
    """A folder with vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json, in the user's cache.

    pad: the token that fills up: END for Stable Diffusion 1 and the first encoder of SDXL, "!" for Stable Diffusion 2
    and the second of SDXL.

    Raises:
        LowVRAMError: `pad` is no token, or the cache can't be written.
    """
    vocabulary, merges = _vocabulary()
    if pad not in vocabulary:
        raise LowVRAMError(f"pad={pad!r} is no token of CLIP's vocabulary.", f'Use "{END}" or "!".')
    where = cache_root() / f"clip-tokenizer-{vocabulary[pad]}"
    files = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges),
        "tokenizer_config.json": json.dumps(_settings(pad), indent=2) + "\n",
        "special_tokens_map.json": json.dumps(_special_tokens(pad), indent=2) + "\n",
    }
    for name, text in files.items():
        _keep(where / name, text.encode())
    return where


@cache
def _vocabulary() -> tuple[dict[str, int], list[str]]:
    """The number of each token, and the merges, in their order."""
    packed = resources.files("lowvram.weights").joinpath("clip", "merges.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode("utf-8").splitlines()
    signs = _signs_of_bytes()
    tokens = [*signs, *(f"{sign}</w>" for sign in signs), *("".join(merge.split(" ")) for merge in merges), START, END]
    return {token: number for number, token in enumerate(tokens)}, merges


def _signs_of_bytes() -> list[str]:
    """A printable sign for each byte, in the order of their numbers: those that print as they are come first.

    The others, such as the space, take the signs from 256 on (the byte-level vocabulary of GPT-2).
    """
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printed)
    return [chr(code) for code in printed] + [chr(256 + number) for number in range(others)]


def _special_tokens(pad: str) -> dict[str, Any]:
    way = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    start, end = {"content": START, **way}, {"content": END, **way}
    return {"bos_token": start, "eos_token": end, "pad_token": pad, "unk_token": end}


def _settings(pad: str) -> dict[str, Any]:
    return {
        "add_prefix_space": False,
        **_special_tokens(pad),
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": LENGTH,
        "tokenizer_class": "CLIPTokenizer",
    }


def _keep(path: Path, data: bytes) -> None:
    """Write a file unless it is there already; several processes may do so at once, since they write the same."""
    with contextlib.suppress(OSError):
        if path.read_bytes() == data:
            return
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(data)
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise LowVRAMError(
            f"the tokenizer's {path.name} can't be kept in {path.parent}: {error.strerror or error}.",
            "Free some space, or set LOWVRAM_CACHE to a folder that can be written.",
        ) from error
