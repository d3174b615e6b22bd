import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import load_pipeline, make_pipeline
from torch import Tensor

from lowvram.adapters import embedding_files
from lowvram.errors import LowVRAMError


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pipelines")
    return {family: load_pipeline(make_pipeline(folder / family, family)) for family in ("sd1", "sdxl")}  # type: ignore[arg-type]


def vectors(*widths: int, count: int = 2) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(count, width, generator=draw) for width in widths]


@torch.no_grad()
def ours(pipeline: Any, file: Path, prompt: str, *, parts: tuple[str, ...]) -> list[Tensor]:
    encoders = [getattr(pipeline, f"text_encoder{part}") for part in parts]
    tokenizers = [getattr(pipeline, f"tokenizer{part}") for part in parts]
    embeddings = embedding_files.add_from_files(encoders, tokenizers, [file])
    options = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    outs = []
    for encoder, tokenizer in zip(encoders, embeddings.tokenizers, strict=True):
        outs.append(encoder(tokenizer([prompt], **options)["input_ids"], output_hidden_states=True))
    embeddings.remove()
    return [out.hidden_states[-2] if len(parts) > 1 else out.last_hidden_state for out in outs]


@pytest.mark.parametrize("layout", ["diffusers", "webui"])
def test_diffusers_reads_a_word(pipelines: dict[str, Any], tmp_path: Path, layout: Any) -> None:
    pipeline, file = pipelines["sd1"], tmp_path / "toy.safetensors"
    token = f"<toy-{layout}>"
    embedding_files.write(file, token, vectors(128, count=3), layout=layout)
    assert set(load_file(file)) == ({token} if layout == "diffusers" else {"emb_params"})
    (wanted,) = ours(pipeline, file, f"a red {token} cat", parts=("",))
    pipeline.load_textual_inversion(file, **({} if layout == "diffusers" else {"token": token}))
    theirs, _ = pipeline.encode_prompt(f"a red {token} cat", "cpu", 1, False)
    torch.testing.assert_close(wanted, theirs, atol=1e-5, rtol=1e-5)
    plain, _ = pipeline.encode_prompt("a red toy cat", "cpu", 1, False)
    assert (theirs - plain).abs().max() > 0.1
    pipeline.unload_textual_inversion([token, f"{token}_1", f"{token}_2"])


def test_diffusers_reads_a_word_for_two_encoders(pipelines: dict[str, Any], tmp_path: Path) -> None:
    pipeline, file = pipelines["sdxl"], tmp_path / "toy.safetensors"
    embedding_files.write(file, "<toy>", vectors(64, 128))
    wanted = torch.cat(ours(pipeline, file, "a <toy>, red", parts=("", "_2")), dim=2)
    state = load_file(file)
    for key, part in (("clip_l", ""), ("clip_g", "_2")):
        networks = {"text_encoder": getattr(pipeline, f"text_encoder{part}")}
        networks["tokenizer"] = getattr(pipeline, f"tokenizer{part}")
        pipeline.load_textual_inversion(state[key], token="<toy>", **networks)
    theirs = pipeline.encode_prompt("a <toy>, red", device="cpu", do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(wanted, theirs, atol=1e-5, rtol=1e-5)


def test_round_trips(tmp_path: Path) -> None:
    file = tmp_path / "toy.safetensors"
    for layout in ("diffusers", "webui"):
        for widths in ((32,), (32, 48)):
            given = vectors(*widths)
            embedding_files.write(file, "<x>", given, layout=layout, dtype=torch.float16)  # type: ignore[arg-type]
            read = embedding_files.read(file)
            assert read.token == "<x>" and len(read.vectors) == len(widths)
            assert all(torch.equal(a, b.half()) for a, b in zip(read.vectors, given, strict=True))
    assert embedding_files.read(file, token="<y>").token == "<y>"


def test_files_of_other_programs(tmp_path: Path) -> None:
    (given,) = vectors(32)
    web = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": given},
        "name": "style",
        "step": 5,
        "sd_checkpoint": None,
    }
    torch.save(web, tmp_path / "web.pt")
    torch.save(
        {**web, "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(given)})}, tmp_path / "first.pt"
    )
    torch.save({"<toy>": given[0]}, tmp_path / "learned_embeds.bin")
    torch.save({"clip_g": given, "clip_l": given[:, :8]}, tmp_path / "xl.pt")
    save_file({"emb_params": given}, tmp_path / "my style.safetensors")
    found = {path.name: embedding_files.read(path) for path in sorted(tmp_path.iterdir())}
    tokens = {name: word.token for name, word in found.items()}
    assert tokens == {
        "web.pt": "style",
        "first.pt": "style",
        "learned_embeds.bin": "<toy>",
        "xl.pt": "<xl>",
        "my style.safetensors": "<my-style>",
    }
    assert [vector.shape[1] for vector in found["xl.pt"].vectors] == [8, 32]
    assert torch.equal(found["learned_embeds.bin"].vectors[0], given[:1])
    assert all(torch.equal(found[name].vectors[0], given) for name in ("web.pt", "first.pt", "my style.safetensors"))


def test_wrong_files_are_told(pipelines: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    wrong: list[tuple[dict[str, Tensor], str]] = [
        ({"a": torch.ones(2, 4), "b": torch.ones(2, 4)}, "holds 2 tensors, a, b"),
        ({"a": torch.ones(2, 4, 4)}, "no vectors"),
        ({"a": torch.ones(2, 4, dtype=torch.int64)}, "no vectors"),
        ({"a": torch.full((2, 4), float("inf"))}, "a has 8 of 8 values"),
        ({"clip_l": torch.ones(2, 4), "clip_g": torch.ones(3, 4)}, r"\[2, 3\] vectors"),
    ]
    for state, told in wrong:
        save_file(state, file)
        with warnings.catch_warnings(), pytest.raises(LowVRAMError, match=told):
            embedding_files.read(file)
    torch.save({"name": "x"}, tmp_path / "empty.pt")
    with pytest.raises(LowVRAMError, match="holds no tensors"):
        embedding_files.read(tmp_path / "empty.pt")
    with pytest.raises(LowVRAMError, match="does not exist"):
        embedding_files.read(tmp_path / "none.pt")
    pipeline = pipelines["sd1"]
    save_file({"<x>": torch.ones(1, 64)}, file)
    with pytest.raises(LowVRAMError, match=r"widths \[64\], the text encoders \[128\]"):
        embedding_files.add_from_files([pipeline.text_encoder], [pipeline.tokenizer], [file])


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"string_to_param": {"*": Bomb()}}, tmp_path / "bomb.pt")
    with pytest.raises(LowVRAMError, match=r"bomb\.pt"):
        embedding_files.read(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()
