"""Pipelines written as folder and as single file: bit for bit, loaded by diffusers, whole or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_pipelines
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowvram.errors import LowVRAMError
from lowvram.models.autoencoder import Autoencoder
from lowvram.models.unet import UNet
from lowvram.weights import pipeline_writer
from lowvram.weights.pipeline import open_pipeline
from lowvram.weights.pipeline_writer import write_folder, write_single_file

FAMILIES = tiny_pipelines.FAMILIES
UNET = "model.diffusion_model."
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {family: tiny_pipelines.make_pipeline(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def files(folders: dict[str, Path]) -> dict[str, Path]:
    out = {}
    for family, folder in folders.items():
        out[family] = folder.with_suffix(".safetensors")
        write_single_file(out[family], open_pipeline(folder), {})
    return out


@pytest.fixture(scope="module")
def images(folders: dict[str, Path]) -> dict[str, Tensor]:
    return {family: tiny_pipelines.sample(tiny_pipelines.load_pipeline(folders[family])) for family in FAMILIES}


def states(path: Path) -> dict[str, dict[str, Tensor]]:
    """State dicts of our networks, and transformers', with a pipeline's weights."""
    pipeline = open_pipeline(path)
    out = {}
    for part in pipeline.parts:
        config = pipeline.config(part)
        network: torch.nn.Module
        if part == "unet":
            network = UNet.from_config(config)
        elif part == "vae":
            network = Autoencoder.from_config(config)
        else:
            kind = transformers.CLIPTextModelWithProjection if part[-1] == "2" else transformers.CLIPTextModel
            network = kind(transformers.CLIPTextConfig(**config))
        pipeline.load(part, network)
        out[part] = network.state_dict()
    return out


def full(state: dict[str, Tensor]) -> dict[str, Tensor]:
    heads = ("embeddings.", "encoder.layers", "final_layer_norm.")
    return {f"text_model.{n}" if n.startswith(heads) else n: t for n, t in state.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert set(a) == set(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert torch.equal(tensor, b[name]), name


def extended(path: Path, out: Path) -> Path:
    """A single file with all that published ones have beside the networks, in half precision but for some."""
    content = {name: tensor.half() if "first_stage" not in name else tensor for name, tensor in load_file(path).items()}
    content["model_ema.decay"] = torch.tensor(0.9999)
    content["model_ema.diffusion_modelout2bias"] = torch.rand(4)
    content["alphas_cumprod"] = torch.rand(1000, dtype=torch.float64)
    if "cond_stage_model.model.ln_final.bias" in content:
        width = len(content["cond_stage_model.model.ln_final.bias"])
        content["cond_stage_model.model.text_projection"] = torch.rand(width, width)
        content["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)
    elif "cond_stage_model.transformer.text_model.final_layer_norm.bias" in content:
        content["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    else:
        content["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
    save_file(content, out, {"modelspec.title": "x", "sshs_model_hash": "abc"})
    return out


def diffusers_file(path: Path, config: Path) -> Any:
    """A single file in diffusers, with the configurations of a folder."""
    kind = json.loads((config / "model_index.json").read_text())["_class_name"]
    pipeline = getattr(diffusers, kind).from_single_file(str(path), config=str(config), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_to_folder(folders: dict[str, Path], images: dict[str, Tensor], family: str, tmp_path: Path) -> None:
    source, out = folders[family], tmp_path / "out"
    write_folder(out, open_pipeline(source), states(source))
    for part in open_pipeline(source).parts:
        name = "model" if part.startswith("text") else "diffusion_pytorch_model"
        written = load_file(out / part / f"{name}.safetensors")
        assert_same(written, full(load_file(next((source / part).glob("*.safetensors")))))
        assert not part.startswith("text") or "text_model.embeddings.token_embedding.weight" in written
    found = {str(file.relative_to(out)) for file in out.rglob("*")}
    assert found == {str(file.relative_to(source)) for file in source.rglob("*")}
    for file in (*source.rglob("*.json"), *source.rglob("*.txt")):
        other = out / file.relative_to(source)
        same = json.loads if file.suffix == ".json" else str
        assert same(other.read_text()) == same(file.read_text())
    assert torch.equal(tiny_pipelines.sample(tiny_pipelines.load_pipeline(out)), images[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_single_file_to_single_file(files: dict[str, Path], family: str, tmp_path: Path) -> None:
    source, out = extended(files[family], tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    write_single_file(out, open_pipeline(source), {})
    assert_same(load_file(out), load_file(source))
    # Through our networks and back: only the average is gone, of what it averaged no longer.
    write_single_file(out, open_pipeline(source), states(source))
    expected = {name: tensor for name, tensor in load_file(source).items() if not name.startswith("model_ema.")}
    assert_same(load_file(out), expected)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.title"] == "x"
    assert metadata["format"] == "pt"
    assert "sshs_model_hash" not in metadata


@pytest.mark.parametrize("family", FAMILIES)
def test_single_file_in_diffusers(
    folders: dict[str, Path], images: dict[str, Tensor], family: str, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    write_single_file(out, open_pipeline(folders[family]), states(folders[family]))
    found = tiny_pipelines.sample(diffusers_file(out, folders[family]))
    torch.testing.assert_close(found, images[family], atol=1e-4, rtol=0)  # where memory lies decides last bits


@pytest.mark.parametrize("family", FAMILIES)
def test_single_file_to_folder(
    folders: dict[str, Path], files: dict[str, Path], images: dict[str, Tensor], family: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_folder(out, open_pipeline(files[family]), {})
    pipeline, source = tiny_pipelines.load_pipeline(out), tiny_pipelines.load_pipeline(folders[family])
    assert type(pipeline) is type(source)
    assert len(pipeline.tokenizer) == 49408  # the tiny encoders know fewer tokens
    assert pipeline.scheduler.config.prediction_type == source.scheduler.config.prediction_type
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        if hasattr(source, name):
            setattr(pipeline, name, getattr(source, name))
    assert torch.equal(tiny_pipelines.sample(pipeline), images[family])
    assert open_pipeline(out).family == family
    assert bool(pipeline.config.get("force_zeros_for_empty_prompt")) == (family == "sdxl")


def test_one_part_that_changed(folders: dict[str, Path], files: dict[str, Path], tmp_path: Path) -> None:
    changed = {"unet": {n: t + 1 for n, t in load_file(next((folders["sdxl"] / "unet").glob("*.safetensors"))).items()}}
    write_single_file(tmp_path / "a.safetensors", open_pipeline(files["sdxl"]), changed)
    write_single_file(tmp_path / "b.safetensors", open_pipeline(folders["sdxl"]), changed)
    found = load_file(tmp_path / "a.safetensors")
    assert_same(found, load_file(tmp_path / "b.safetensors"))
    assert all(torch.equal(found[n], t + 1 if n.startswith(UNET) else t) for n, t in load_file(files["sdxl"]).items())


def test_another_type(folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline = open_pipeline(folders["sd1"])
    write_folder(tmp_path / "out", pipeline, {}, dtype=torch.float16)
    write_single_file(tmp_path / "x.safetensors", pipeline, {}, dtype=torch.bfloat16)
    again = open_pipeline(tmp_path / "out")
    for part in pipeline.parts:
        for name in pipeline.names(part):
            assert torch.equal(again.tensor(part, name), pipeline.tensor(part, name).half())
    assert {tensor.dtype for tensor in load_file(tmp_path / "x.safetensors").values()} == {torch.bfloat16}
    assert tiny_pipelines.load_pipeline(tmp_path / "out").text_encoder.dtype == torch.float16
    state = {name: pipeline.tensor("vae", name) for name in pipeline.names("vae")}
    state["encoder.conv_in.weight"][0, 0, 0, 0] = 1e5
    with pytest.raises(LowVRAMError, match=r"encoder\.conv_in\.weight"):
        write_folder(tmp_path / "fp16", pipeline, {"vae": state}, dtype=torch.float16)
    assert not (tmp_path / "fp16").exists()


@pytest.mark.parametrize(("family", "layout"), [("sd1", "folder"), ("sd2", "single_file"), ("sdxl", "folder")])
def test_schedule_that_training_changed(
    folders: dict[str, Path], files: dict[str, Path], family: str, layout: str, tmp_path: Path
) -> None:
    source = folders[family] if layout == "folder" else files[family]
    out, file, back = tmp_path / "out", tmp_path / "x.safetensors", tmp_path / "back.safetensors"
    write_folder(out, open_pipeline(source), {}, scheduler=ZERO_SNR)
    scheduler = tiny_pipelines.load_pipeline(out).scheduler
    assert {name: scheduler.config[name] for name in ZERO_SNR} == ZERO_SNR
    assert scheduler.alphas_cumprod[-1] < 1e-6
    write_single_file(file, open_pipeline(source), {}, scheduler=ZERO_SNR)
    found = open_pipeline(file).config("scheduler")
    assert {name: found[name] for name in ZERO_SNR} == ZERO_SNR
    diffusers_file(file, folders[family])  # the marks don't disturb it
    plain = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    write_single_file(back, open_pipeline(file), {}, scheduler=plain)
    assert open_pipeline(back).config("scheduler")["prediction_type"] == "epsilon"
    assert set(load_file(back)) == set(load_file(files[family]))


def test_folder_without_an_index(folders: dict[str, Path], images: dict[str, Tensor], tmp_path: Path) -> None:
    source = shutil.copytree(folders["sdxl"], tmp_path / "sdxl")
    (source / "model_index.json").unlink()
    write_folder(tmp_path / "out", open_pipeline(source), {})
    assert torch.equal(tiny_pipelines.sample(tiny_pipelines.load_pipeline(tmp_path / "out")), images["sdxl"])


def test_other_components_are_copied(folders: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(folders["sd1"], tmp_path / "sd1")
    (source / "safety_checker").mkdir()
    for name in ("config.json", "model.safetensors", "pytorch_model.bin"):
        (source / "safety_checker" / name).write_bytes(b"as it is")
    (source / "LICENSE.md").write_text("terms")
    index = json.loads((source / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (source / "model_index.json").write_text(json.dumps(index))
    write_folder(tmp_path / "out", open_pipeline(source), {})
    found = sorted(file.name for file in (tmp_path / "out" / "safety_checker").iterdir())
    assert found == ["config.json", "model.safetensors"]
    assert (tmp_path / "out" / "safety_checker" / "model.safetensors").read_bytes() == b"as it is"
    assert (tmp_path / "out" / "LICENSE.md").read_text() == "terms"
    assert json.loads((tmp_path / "out" / "model_index.json").read_text()) == index


def test_states_that_do_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline = open_pipeline(folders["sd1"])
    state = {name: pipeline.tensor("vae", name) for name in pipeline.names("vae")}
    name = "quant_conv.bias"
    for wrong, word in (
        ({n: t for n, t in state.items() if n != name}, "quant_conv.bias is missing"),
        (state | {"other": torch.zeros(1)}, "other has no place"),
        (state | {name: torch.zeros(3)}, "quant_conv.bias has shape [3], not [8]"),
        (state | {name: torch.full((8,), torch.nan)}, "quant_conv.bias"),
    ):
        for write, out in ((write_folder, tmp_path / "out"), (write_single_file, tmp_path / "out.safetensors")):
            with pytest.raises(LowVRAMError) as error:
                write(out, pipeline, {"vae": wrong})
            assert word in str(error.value)
    assert not list(tmp_path.iterdir())


def test_places_that_can_not_be_written(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_pipeline(folders["sd1"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("kept")
    with pytest.raises(LowVRAMError, match="is there already"):
        write_folder(tmp_path / "full", pipeline, {})
    with pytest.raises(LowVRAMError, match="safetensors"):
        write_single_file(tmp_path / "x.ckpt", pipeline, {})
    with pytest.raises(LowVRAMError, match="can't be written"):
        write_folder(tmp_path / "full" / "x" / "y", pipeline, {})

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline_writer, "_copy_files", fails)
    with pytest.raises(LowVRAMError, match="No space left"):
        write_folder(tmp_path / "out", pipeline, {})
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "x"]
    monkeypatch.undo()
    (tmp_path / "out").mkdir()  # an empty one is taken
    write_folder(tmp_path / "out", pipeline, {})
    assert open_pipeline(tmp_path / "out").parts == pipeline.parts
