"""A CLIP text encoder of a few thousand random weights, with its tokenizer, as a folder."""

import json
from pathlib import Path

import torch
import transformers

LENGTH = 77


def save_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> None:
    """A byte-pair vocabulary of single letters and the merges of three words."""
    signs = [chr(code) for code in range(33, 127)]
    merges = ["c a", "ca t</w>", "r e", "re d</w>"]
    vocabulary = signs + [f"{sign}</w>" for sign in signs] + ["".join(merge.split()) for merge in merges]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


VOCABULARY = 94 * 2 + 4 + 2


def save_encoder(folder: Path, width: int, projection: int | None = None, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=projection or width,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
    )
    kind = transformers.CLIPTextModel if projection is None else transformers.CLIPTextModelWithProjection
    model = kind(config).eval()
    for parameter in model.parameters():  # the published initialisation hides mistakes: nearly zero, all alike
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model
