"""Published pipelines as folder and as single file: read, loaded, and told apart from what is none."""

import inspect
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_pipelines
import torch
import transformers
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowvram.errors import LowVRAMError
from lowvram.models.autoencoder import Autoencoder
from lowvram.models.unet import UNet
from lowvram.weights import pipeline_parts, pipeline_shapes
from lowvram.weights.pipeline import Pipeline, open_pipeline
from lowvram.weights.pipeline_keys import stored_shape
from lowvram.weights.pipeline_writer import write_single_file
from lowvram.weights.tensor_file import TensorFile

FAMILIES = tiny_pipelines.FAMILIES
UNET = "model.diffusion_model."


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


def networks(pipeline: Pipeline) -> dict[str, nn.Module]:
    """Ours, and transformers', built from a pipeline's configurations, with weights of their own."""
    out: dict[str, nn.Module] = {}
    for part in pipeline.parts:
        config = pipeline.config(part)
        if part == "unet":
            out[part] = UNet.from_config(config)
        elif part == "vae":
            out[part] = Autoencoder.from_config(config)
        else:
            text = transformers.CLIPTextConfig(**config)
            kinds = {"text_encoder": transformers.CLIPTextModel}
            out[part] = kinds.get(part, transformers.CLIPTextModelWithProjection)(text)
    return out


def tensors(path: Path) -> dict[str, Tensor]:
    """Those of a file in a folder, by names that begin with text_model. where they are a text encoder's."""
    heads = ("embeddings.", "encoder.layers", "final_layer_norm.")
    return {f"text_model.{n}" if n.startswith(heads) else n: t for n, t in load_file(path).items()}


def weights_of(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_is_read_as_it_lies(folders: dict[str, Path], family: str) -> None:
    pipeline = open_pipeline(folders[family])
    assert (pipeline.family, pipeline.layout) == (family, "folder")
    assert pipeline.parts == ("unet", "vae", "text_encoder", "text_encoder_2")[: 4 if family == "sdxl" else 3]
    for part in pipeline.parts:
        assert pipeline.config(part) == json.loads((folders[family] / part / "config.json").read_text())
        expected = tensors(weights_of(folders[family], part))
        assert set(pipeline.names(part)) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(pipeline.tensor(part, name), tensor)
            assert pipeline.shape(part, name) == tuple(tensor.shape)
            assert pipeline.dtype(part, name) == tensor.dtype
    assert pipeline.config("scheduler")["prediction_type"] == ("v_prediction" if family == "sd2" else "epsilon")
    assert pipeline.tokenizer("text_encoder") == folders[family] / "tokenizer"


@pytest.mark.parametrize("family", FAMILIES)
def test_single_file_has_the_same_tensors(folders: dict[str, Path], files: dict[str, Path], family: str) -> None:
    folder, file = open_pipeline(folders[family]), open_pipeline(files[family])
    assert (file.family, file.layout, file.parts) == (family, "single_file", folder.parts)
    for part in folder.parts:
        assert set(file.names(part)) == set(folder.names(part))
        for name in folder.names(part):
            assert torch.equal(file.tensor(part, name), folder.tensor(part, name)), name
            assert file.shape(part, name) == folder.shape(part, name), name


@pytest.mark.parametrize("family", FAMILIES)
def test_single_file_tells_its_configuration(folders: dict[str, Path], files: dict[str, Path], family: str) -> None:
    folder, file = open_pipeline(folders[family]), open_pipeline(files[family])
    # What shapes can't tell, and no network's numbers depend on.
    other = {"sample_size", "dtype", "transformers_version", "upcast_attention", "force_upcast"}
    other |= {"bos_token_id", "eos_token_id", "pad_token_id"}
    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    for part in folder.parts:
        found, kind = file.config(part), kinds.get(part, transformers.CLIPTextConfig)
        defaults = {name: parameter.default for name, parameter in inspect.signature(kind.__init__).parameters.items()}
        for key, value in folder.config(part).items():
            if not key.startswith("_") and key not in other:
                assert found.get(key, defaults.get(key)) == value, key
    assert file.config("scheduler")["prediction_type"] == folder.config("scheduler")["prediction_type"]


@pytest.mark.parametrize(("family", "layout"), [("sd1", "folder"), *((family, "single_file") for family in FAMILIES)])
def test_networks_are_loaded(folders: dict[str, Path], files: dict[str, Path], family: str, layout: str) -> None:
    pipeline = open_pipeline(folders[family] if layout == "folder" else files[family])
    for part, network in networks(pipeline).items():
        pipeline.load(part, network)
        expected = tensors(weights_of(folders[family], part))
        state = {f"text_model.{n}" if f"text_model.{n}" in expected else n: t for n, t in network.state_dict().items()}
        assert set(state) == set(expected)
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_load_takes_another_type_and_the_meta_device(files: dict[str, Path]) -> None:
    pipeline = open_pipeline(files["sd1"])
    with torch.device("meta"):
        network = UNet.from_config(pipeline.config("unet"))
    network.conv_in.requires_grad_(False)
    pipeline.load("unet", network, dtype=torch.bfloat16)
    assert {(p.dtype, p.device.type) for p in network.parameters()} == {(torch.bfloat16, "cpu")}
    assert not network.conv_in.weight.requires_grad
    assert network.conv_out.weight.requires_grad
    assert torch.equal(network.conv_in.weight, pipeline.tensor("unet", "conv_in.weight").bfloat16())


def test_load_holds_one_tensor_at_a_time(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = open_pipeline(files["sdxl"])
    network = networks(pipeline)["text_encoder_2"]  # its joined and transposed tensors are made of others
    seen: list[weakref.ref[Tensor]] = []
    read = TensorFile.read

    def watched(file: TensorFile, name: str) -> Tensor:
        assert not [tensor for tensor in seen if tensor() is not None]
        tensor = read(file, name)
        seen.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(TensorFile, "read", watched)
    pipeline.load("text_encoder_2", network)
    assert len(seen) == len(network.state_dict())


def test_second_text_encoder_is_that_of_diffusers(folders: dict[str, Path], files: dict[str, Path]) -> None:
    ids = torch.tensor([[192, 5, 9, 40, 193] + [0] * 72])
    pipeline = open_pipeline(files["sdxl"])
    network = networks(pipeline)["text_encoder_2"].eval()
    pipeline.load("text_encoder_2", network)
    other = transformers.CLIPTextModelWithProjection.from_pretrained(folders["sdxl"] / "text_encoder_2").eval()
    torch.testing.assert_close(network(ids).text_embeds, other(ids).text_embeds)  # where memory lies decides last bits


# The published sizes, on the meta device, against diffusers' conversions.


@pytest.mark.parametrize(
    ("family", "unet", "vae", "text", "upsamplers"),
    [
        ("sd1", 686, 248, 196, "2.1 5.2 8.2"),
        ("sd2", 686, 248, 372, "2.1 5.2 8.2"),
        ("sdxl", 1680, 248, 196, "2.2 5.2"),
    ],
)
def test_published_layouts(family: str, unet: int, vae: int, text: int, upsamplers: str, tmp_path: Path) -> None:
    configs = pipeline_shapes.published(family)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    with torch.device("meta"):
        made: dict[str, Any] = {
            "unet": diffusers.UNet2DConditionModel.from_config(configs["unet"]),
            "vae": diffusers.AutoencoderKL.from_config(configs["vae"]),
        }
        for part in (part for part in configs if part.startswith("text")):
            kind = transformers.CLIPTextModelWithProjection if part[-1] == "2" else transformers.CLIPTextModel
            made[part] = kind(transformers.CLIPTextConfig(**configs[part]))
    single: dict[str, Tensor] = {}
    for part, network in made.items():
        state = {pipeline_parts.full_name(part, name): t for name, t in network.state_dict().items()}
        shapes[part] = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name, piece in pipeline_parts.for_single_file(family, part, shapes[part]).items():
            single[piece.key] = torch.empty(stored_shape(piece.form, shapes[part][name]), device="meta")
    assert [len(shapes[part]) for part in ("unet", "vae", "text_encoder")] == [unet, vae, text]
    # diffusers would take the upsampler at either place, other programs at this one alone.
    ups = {key.removeprefix(UNET) for key in single if key.endswith(".conv.weight") and "output_blocks" in key}
    assert ups == {f"output_blocks.{place}.conv.weight" for place in upsamplers.split()}
    # Back by diffusers' own functions.
    found = {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(dict(single), dict(made["unet"].config)),
        "vae": single_file_utils.convert_ldm_vae_checkpoint(dict(single), dict(made["vae"].config)),
    }
    if family != "sd2":
        found["text_encoder"] = single_file_utils.convert_ldm_clip_checkpoint(dict(single))
    else:
        found["text_encoder"] = single_file_utils.convert_open_clip_checkpoint(made["text_encoder"], dict(single))
    if family == "sdxl":
        prefix = "conditioner.embedders.1.model."
        second = single_file_utils.convert_open_clip_checkpoint(made["text_encoder_2"], dict(single), prefix)
        found["text_encoder_2"] = second
    for part, state in found.items():
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes[part], part
    # And by ours, with the configuration that the shapes tell.
    stored = {key: tuple(tensor.shape) for key, tensor in single.items()}
    for part, expected in shapes.items():
        pieces = pipeline_parts.in_single_file(tmp_path, family, part, stored)
        assert {name: piece.shape(stored[piece.key]) for name, piece in pieces.items()} == expected
        table = pipeline_shapes.Shapes(tmp_path, part, expected)
        if part == "unet":
            config = pipeline_shapes.unet(family, table, pooled=1280 if family == "sdxl" else None)
            assert config.pop("transformer_layers_per_block") == configs["unet"].pop("transformer_layers_per_block", 1)
            assert config.pop("use_linear_projection") == configs["unet"].pop("use_linear_projection", False)
        elif part == "vae":
            config = pipeline_shapes.autoencoder(family, table)
        else:
            config = pipeline_shapes.text(family, part, table)
        assert config == configs[part]


# Other ways in which the files lie.


def with_keys(path: Path, out: Path, change: Any, metadata: dict[str, str] | None = None) -> Path:
    """A copy of a file with its tensors changed in place by a function."""
    content = load_file(path)
    change(content)
    save_file(content, out, metadata)
    return out


def test_checkpoint_of_a_training_run(files: dict[str, Path], tmp_path: Path) -> None:
    content = load_file(files["sd1"])
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1
        for name, tensor in content.items()
        if name.startswith(UNET)
    }
    content["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    other = {"betas": torch.rand(1000), "model_ema.decay": torch.tensor(0.9999)}
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": content | averages | other, "global_step": 875000}, path)
    pipeline, expected = open_pipeline(path), open_pipeline(files["sd1"])
    assert pipeline.parts == expected.parts
    for part in pipeline.parts:
        assert set(pipeline.names(part)) == set(expected.names(part))
        for name in pipeline.names(part):
            assert torch.equal(pipeline.tensor(part, name), expected.tensor(part, name))


def test_text_encoder_without_the_prefix(files: dict[str, Path], tmp_path: Path) -> None:
    head = "cond_stage_model.transformer."

    def strip(content: dict[str, Tensor]) -> None:
        for key in [key for key in content if key.startswith(head)]:
            content[key.replace("text_model.", "", 1)] = content.pop(key)

    pipeline = open_pipeline(with_keys(files["sd1"], tmp_path / "x.safetensors", strip))
    assert set(pipeline.names("text_encoder")) == set(open_pipeline(files["sd1"]).names("text_encoder"))
    assert pipeline.config("text_encoder")["num_hidden_layers"] == 3


def test_last_layer_of_open_clip_is_left_out_where_nothing_reads_it(files: dict[str, Path], tmp_path: Path) -> None:
    head = "cond_stage_model.model."

    def extend(content: dict[str, Tensor]) -> None:
        for key in [key for key in content if ".resblocks.2." in key]:
            content[key.replace(".resblocks.2.", ".resblocks.3.")] = content[key] + 1
        width = len(content[f"{head}ln_final.bias"])
        content[f"{head}text_projection"], content[f"{head}logit_scale"] = torch.eye(width), torch.tensor(4.6)

    whole = open_pipeline(with_keys(files["sd2"], tmp_path / "x.safetensors", extend))
    plain = open_pipeline(files["sd2"])
    assert whole.config("text_encoder") == plain.config("text_encoder")
    assert set(whole.names("text_encoder")) == set(plain.names("text_encoder"))
    for name in plain.names("text_encoder"):
        assert torch.equal(whole.tensor("text_encoder", name), plain.tensor("text_encoder", name))


@pytest.mark.parametrize("kind", ["fp16", "shards", "bin", "two", "snapshot"])
def test_files_of_a_folder(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(folders["sd1"], tmp_path / "sd1")
    file = weights_of(folder, "unet")
    expected = load_file(file)
    if kind == "shards":
        network = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
        file.unlink()
        network.save_pretrained(folder / "unet", max_shard_size="2MB")
        assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 2
    elif kind == "bin":
        torch.save(expected, file.with_suffix(".bin"))
        file.unlink()
    elif kind == "fp16":
        file.rename(file.with_suffix(".fp16.safetensors"))
    elif kind == "two":
        save_file({name: tensor.half() + 1 for name, tensor in expected.items()}, file.with_suffix(".fp16.safetensors"))
    else:
        (tmp_path / "models--x" / "snapshots").mkdir(parents=True)
        folder.rename(tmp_path / "models--x" / "snapshots" / "abc")
        folder = tmp_path / "models--x"
    pipeline = open_pipeline(folder)
    assert set(pipeline.names("unet")) == set(expected)
    assert all(torch.equal(pipeline.tensor("unet", name), tensor) for name, tensor in expected.items())
    read = [path for path in pipeline.files() if path.parent.name == "unet"]
    there = {path for path in folder.rglob("unet/*") if path.suffix in (".safetensors", ".bin")}
    assert set(read) == ({file} if kind == "two" else there) and len(read) == len(set(read))
    assert {path.parent.name for path in pipeline.files()} == set(pipeline.parts)


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_names_of_the_autoencoder(folders: dict[str, Path], tmp_path: Path, convolutions: bool) -> None:
    folder = shutil.copytree(folders["sd1"], tmp_path / "sd1")
    file = weights_of(folder, "vae")
    expected = load_file(file)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    content = {}
    for name, tensor in expected.items():
        for here, there in old.items():
            if f".{here}." in name:
                name = name.replace(f".{here}.", f".{there}.")
                tensor = tensor[..., None, None] if convolutions and tensor.ndim == 2 else tensor
        content[name] = tensor
    save_file(content, file)
    pipeline = open_pipeline(folder)
    network = Autoencoder.from_config(pipeline.config("vae"))
    pipeline.load("vae", network)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in expected.items())
    single = tmp_path / "x.safetensors"
    write_single_file(single, pipeline, {})
    assert load_file(single)["first_stage_model.encoder.mid.attn_1.q.weight"].shape[2:] == (1, 1)


@pytest.mark.parametrize(
    ("family", "metadata", "mark", "given", "expected"),
    [
        ("sd1", {}, None, None, "epsilon"),
        ("sd1", {}, "v_pred", None, "v_prediction"),
        ("sd1", {}, None, "v_prediction", "v_prediction"),
        ("sd2", {}, None, None, "v_prediction"),
        ("sd2", {"modelspec.resolution": "512x512"}, None, None, "epsilon"),
        ("sd2", {"global_step": "875000"}, None, None, "epsilon"),
        ("sd2", {"modelspec.prediction_type": "epsilon"}, None, None, "epsilon"),
        ("sd2", {}, None, "epsilon", "epsilon"),
        ("sdxl", {"modelspec.prediction_type": "v"}, None, None, "v_prediction"),
    ],
)
def test_prediction_of_a_single_file(
    files: dict[str, Path], tmp_path: Path, family: str, metadata: dict[str, str], mark: str, given: str, expected: str
) -> None:
    def change(content: dict[str, Tensor]) -> None:
        if mark:
            content[mark] = torch.zeros(0)

    path = with_keys(files[family], tmp_path / "x.safetensors", change, metadata)
    pipeline = open_pipeline(path, prediction_type=given)
    assert pipeline.config("scheduler")["prediction_type"] == expected


# What is no pipeline, or is damaged.


def refused(path: Path, *words: str, part: str | None = None) -> None:
    """Opening, or loading a part, is refused with an error that has all the words."""
    with pytest.raises(LowVRAMError) as error:
        pipeline = open_pipeline(path)
        if part:
            pipeline.load(part, networks(pipeline)[part])
    assert all(word in str(error.value) for word in words), error.value


def test_missing_unexpected_and_wrong_tensors_are_listed(files: dict[str, Path], tmp_path: Path) -> None:
    name = "input_blocks.1.0.emb_layers.1"

    def change(content: dict[str, Tensor]) -> None:
        content[f"{UNET}input_blocks.1.0.embb_layers.1.weight"] = content.pop(f"{UNET}{name}.weight")
        content[f"{UNET}out.2.bias"] = torch.zeros(5)
        content[f"{UNET}extra"] = torch.zeros(5)

    path = with_keys(files["sd1"], tmp_path / "x.safetensors", change)
    pipeline = open_pipeline(path)
    network = UNet.from_config(open_pipeline(files["sd1"]).config("unet"))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(LowVRAMError) as error:
        pipeline.load("unet", network)
    words = ("down_blocks.0.resnets.0.time_emb_proj.weight is missing", "embb_layers.1.weight has no place", "extra")
    assert all(word in str(error.value) for word in (*words, "out.2.bias has shape [5], not [4]", path.name))
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_nearest_names_are_shown(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["sd1"], tmp_path / "sd1")
    content = load_file(weights_of(folder, "vae"))
    content["encoder.conv_inn.weight"] = content.pop("encoder.conv_in.weight")
    save_file(content, weights_of(folder, "vae"))
    refused(folder, "encoder.conv_in.weight is missing (there is encoder.conv_inn.weight)", part="vae")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(files: dict[str, Path], tmp_path: Path, bad: float) -> None:
    def change(content: dict[str, Tensor]) -> None:
        content["first_stage_model.decoder.mid.attn_1.k.weight"][0, 0] = bad

    path = with_keys(files["sd1"], tmp_path / "x.safetensors", change)
    refused(path, str(path), "first_stage_model.decoder.mid.attn_1.k.weight", part="vae")


def test_files_that_are_no_pipeline(files: dict[str, Path], tmp_path: Path) -> None:
    for keys, word in (
        (["lora_unet_mid_block.lora_down.weight"], "LoRA"),
        (["double_blocks.0.img_attn.qkv.weight"], "Flux"),
        (["down_blocks.0.resnets.0.norm1.weight"], "folder"),
        (["something"], "something"),
        ([f"{UNET}input_blocks.0.0.weight", "edm_mean"], "noise"),
        ([f"{UNET}input_blocks.0.0.weight", "conditioner.embedders.0.model.ln_final.weight"], "refiner"),
    ):
        save_file({key: torch.zeros(1) for key in keys}, tmp_path / "x.safetensors")
        refused(tmp_path / "x.safetensors", word, "x.safetensors")
    refused(tmp_path / "nowhere", "does not exist")
    refused(tmp_path, "unet/config.json")
    (tmp_path / "cut.safetensors").write_bytes(files["sd1"].read_bytes()[:-1000])
    refused(tmp_path / "cut.safetensors", "cut.safetensors", "cut off")
    with pytest.raises(LowVRAMError, match="prediction_type"):
        open_pipeline(files["sd1"], prediction_type="sample")


@pytest.mark.parametrize("axes", [(), (5,), (5, 0, 3, 3)])
def test_shapes_that_make_no_network(files: dict[str, Path], tmp_path: Path, axes: tuple[int, ...]) -> None:
    def change(content: dict[str, Tensor]) -> None:
        content[f"{UNET}input_blocks.0.0.weight"] = torch.zeros(axes)

    refused(with_keys(files["sd1"], tmp_path / "x.safetensors", change), part="unet")


def test_parts_that_are_missing(files: dict[str, Path], folders: dict[str, Path], tmp_path: Path) -> None:
    def only_unet(content: dict[str, Tensor]) -> None:
        for key in [key for key in content if not key.startswith(UNET)]:
            del content[key]

    for family in FAMILIES:
        pipeline = open_pipeline(with_keys(files[family], tmp_path / f"{family}.safetensors", only_unet))
        assert (pipeline.family, pipeline.parts) == (family, ("unet",))
        pipeline.load("unet", networks(pipeline)["unet"])
        with pytest.raises(LowVRAMError, match="has no vae, only unet"):
            pipeline.config("vae")
    folder = shutil.copytree(folders["sdxl"], tmp_path / "sdxl")
    shutil.rmtree(folder / "vae")
    assert open_pipeline(folder).parts == ("unet", "text_encoder", "text_encoder_2")
    weights_of(folder, "unet").unlink()
    refused(folder, "unet has no weights", part="unet")
    shutil.rmtree(folder / "unet")
    refused(folder, "StableDiffusionXLPipeline", "unet/config.json")


def test_folder_of_another_noise(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["sdxl"], tmp_path / "sdxl")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "EDMEulerScheduler"}))
    with pytest.raises(LowVRAMError, match="another kind of noise"):
        open_pipeline(folder).config("scheduler")


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff", b'{"a": ' * 100000])
def test_damaged_configurations(folders: dict[str, Path], tmp_path: Path, content: bytes) -> None:
    folder = shutil.copytree(folders["sd1"], tmp_path / "sd1")
    (folder / "unet" / "config.json").write_bytes(content)
    refused(folder, str(folder / "unet" / "config.json"))


def test_components_stay_in_the_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["sd1"], tmp_path / "sd1")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"../../etc": ["diffusers", "X"]}))
    refused(folder, "../../etc")


def test_the_same_tensor_twice(files: dict[str, Path], tmp_path: Path) -> None:
    head = "cond_stage_model.transformer."

    def change(content: dict[str, Tensor]) -> None:
        content[f"{head}final_layer_norm.bias"] = content[f"{head}text_model.final_layer_norm.bias"] + 1

    refused(with_keys(files["sd1"], tmp_path / "x.safetensors", change), "final_layer_norm.bias", part="text_encoder")
