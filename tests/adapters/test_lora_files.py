import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from networks import run, small_unet, stir
from safetensors.torch import load_file, save_file
from tiny_pipelines import load_pipeline, make_pipeline
from torch import Tensor, nn

from lowvram.adapters import lora, lora_files
from lowvram.adapters.lora import Adapters
from lowvram.adapters.lora_names import parse
from lowvram.errors import LowVRAMError
from lowvram.models.unet import UNet


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pipelines")
    return {family: load_pipeline(make_pipeline(folder / family, family)) for family in ("sd1", "sdxl")}  # type: ignore[arg-type]


def our_networks(pipeline: Any) -> dict[str, nn.Module]:
    """Networks of our own with a diffusers pipeline's weights; text encoders are transformers' own."""
    unet = UNet.from_config(dict(pipeline.unet.config))
    unet.load_state_dict(pipeline.unet.state_dict())
    networks: dict[str, nn.Module] = {"unet": unet}
    for part in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipeline, part, None)
        if encoder is not None:
            networks[part] = type(encoder)(encoder.config).eval()
            networks[part].load_state_dict(encoder.state_dict())
    return networks


def adapted(networks: dict[str, nn.Module], *, dora: bool) -> dict[str, Adapters]:
    made = {"unet": lora.add(networks["unet"], rank=4, alpha=2, targets=["all"], dora=dora)}
    for part in networks:
        if part != "unet":
            made[part] = lora.add(networks[part], rank=3, alpha=6, targets=["transformer"], dora=dora)
    for seed, adapters in enumerate(made.values()):
        stir(adapters, seed, std=0.05)
    return made


def write(path: Path, adapters: dict[str, Adapters], **options: Any) -> Path:
    alphas = {part: {path: rank.alpha for path, rank in a.ranks.items()} for part, a in adapters.items()}
    lora_files.write(path, {part: a.state_dict() for part, a in adapters.items()}, alpha=alphas, **options)
    return path


@torch.no_grad()
def outputs(networks: dict[str, nn.Module], pipeline: Any) -> dict[str, Tensor]:
    """What the UNet and the text encoders make of the same inputs; of ours, or of diffusers' own (an empty dict)."""
    draw = torch.Generator().manual_seed(0)
    x, time = torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([3.0, 500.0])
    context = torch.randn(2, 7, pipeline.unet.config.cross_attention_dim, generator=draw)
    pooled, sizes = torch.randn(2, 96, generator=draw), torch.tensor([[32, 32, 0, 0, 32, 32]] * 2)
    sdxl = pipeline.unet.config.addition_embed_type is not None
    ids = torch.randint(0, 190, (2, 77), generator=draw)
    ids[:, 20] = 193
    found = {}
    if networks:
        added: dict[str, Any] = {"pooled": pooled, "size_ids": sizes} if sdxl else {}
        found["unet"] = networks["unet"](x, time, context=context, **added)
    else:
        added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}} if sdxl else {}
        found["unet"] = pipeline.unet(x, time, encoder_hidden_states=context, **added).sample
    for part in ("text_encoder", "text_encoder_2"):
        encoder = networks.get(part) if networks else getattr(pipeline, part, None)
        if encoder is not None:
            found[part] = encoder(input_ids=ids)[0]
    return found


@pytest.mark.parametrize(
    ("family", "layout", "dora"),
    [
        ("sd1", "diffusers", False),
        ("sd1", "kohya", False),
        pytest.param("sdxl", "diffusers", True, marks=pytest.mark.slow),
        pytest.param("sdxl", "kohya", False, marks=pytest.mark.slow),
    ],
)
def test_diffusers_loads_what_we_write(
    pipelines: dict[str, Any], tmp_path: Path, family: str, layout: str, dora: bool
) -> None:
    pipeline = pipelines[family]
    networks = our_networks(pipeline)
    plain = outputs(networks, pipeline)
    file = write(tmp_path / "a.safetensors", adapted(networks, dora=dora), layout=layout)
    ours = outputs(networks, pipeline)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.load_lora_weights(file)
    try:
        theirs = outputs({}, pipeline)
    finally:
        pipeline.unload_lora_weights()
    again = our_networks(pipeline)
    for part, network in again.items():
        lora_files.add_from_file(network, part, file)
    read = outputs(again, pipeline)
    for part, out in ours.items():
        assert (out - plain[part]).abs().max() > 0.01
        torch.testing.assert_close(theirs[part], out, atol=1e-4, rtol=1e-4)
        assert torch.equal(read[part], out)


def test_we_load_what_diffusers_writes(pipelines: dict[str, Any], tmp_path: Path) -> None:
    pipeline = pipelines["sd1"]
    networks = our_networks(pipeline)
    names = ["to_q", "to_k", "conv1", "proj_in"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, init_lora_weights=False)
    pipeline.unet.add_adapter(config, "new")
    try:
        theirs = outputs({}, pipeline)["unet"]
        state = peft.get_peft_model_state_dict(pipeline.unet, adapter_name="new")
        metadata = {"unet_lora_adapter_metadata": pipeline.unet.peft_config["new"].to_dict()}
        diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state, **metadata)
    finally:
        pipeline.unet.delete_adapters("new")
    adapters = lora_files.add_from_file(networks["unet"], "unet", tmp_path / "pytorch_lora_weights.safetensors")
    assert (adapters.rank, adapters.alpha) == (4, 8)
    torch.testing.assert_close(outputs(networks, pipeline)["unet"], theirs, atol=1e-4, rtol=1e-4)


def single_file_names() -> list[str]:
    """Layers of SDXL's UNet as its single file has them, from the description of its blocks (arXiv 2307.01952)."""
    names = []
    inner = ["attn1_to_q", "attn2_to_out_0", "ff_net_0_proj", "ff_net_2"]
    depths = {"input_blocks_4": 2, "input_blocks_5": 2, "input_blocks_7": 10, "input_blocks_8": 10, "middle_block": 10}
    depths |= {f"output_blocks_{i}": 10 if i < 3 else 2 for i in range(6)}
    for block, depth in depths.items():
        for name in ["proj_in", "proj_out", *(f"transformer_blocks_{d}_{n}" for d in range(depth) for n in inner)]:
            names.append(f"lora_unet_{block}_1_{name}")
    for block in [*(f"input_blocks_{i}_0" for i in (1, 2, 4, 5, 7, 8)), *(f"output_blocks_{i}_0" for i in range(9))]:
        names += [f"lora_unet_{block}_{name}" for name in ("in_layers_2", "emb_layers_1", "out_layers_3")]
    names += [f"lora_unet_middle_block_{i}_in_layers_2" for i in (0, 2)]
    names += [f"lora_unet_input_blocks_{i}_0_op" for i in (3, 6)]
    return names


def test_single_file_names_are_those_of_our_layers() -> None:
    config = {"block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10)}
    kinds = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    ups = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    heads = {"attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "use_linear_projection": True}
    with torch.device("meta"):
        unet = UNet(**config, down_block_types=kinds, up_block_types=ups, **heads)  # type: ignore[arg-type]
    layers = lora.target_layers(unet)
    found = [parse(f"{name}.lora_down.weight") for name in single_file_names()]
    assert all(name is not None and name.part == "unet" for name in found)
    paths = [name.path for name in found if name is not None]
    assert len(set(paths)) == len(paths) and set(paths) <= set(layers)
    # And diffusers, which has its own rules, means the same layers.
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )
    from diffusers.utils import convert_unet_state_dict_to_peft

    state = {f"{name}.{end}.weight": torch.tensor(i) for i, name in enumerate(single_file_names()) for end in ENDS}
    mapped = _maybe_map_sgm_blocks_to_diffusers(state, SDXL)
    theirs = convert_unet_state_dict_to_peft(_convert_non_diffusers_lora_to_diffusers(mapped)[0])
    their_paths = {int(v): k.split(".lora_")[0].removeprefix("unet.") for k, v in theirs.items()}
    assert their_paths == dict(enumerate(paths))


ENDS = ("lora_down", "lora_up")


class SDXL:
    layers_per_block = 2


TEXT = "text_model.encoder.layers.0"
ATTENTION = f"{TEXT}.self_attn"


@pytest.mark.parametrize(
    ("key", "part", "path", "kind"),
    [
        ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "unet", "mid_block.attentions.0.proj_in", "down"),
        ("mid_block.a.attn1.processor.to_out_lora.up.weight", "unet", "mid_block.a.attn1.to_out.0", "up"),
        ("lora_unet_mid_block_resnets_1_time_emb_proj.alpha", "unet", "mid_block.resnets.1.time_emb_proj", "alpha"),
        ("lora_unet_time_embedding_linear_1.lora_up.weight", "unet", "time_embedding.linear_1", "up"),
        ("lora_unet_label_emb_0_2.lora_up.weight", "unet", "add_embedding.linear_2", "up"),
        ("lora_unet_output_blocks_2_2_conv.lora_up.weight", "unet", "up_blocks.0.upsamplers.0.conv", "up"),
        ("lora_unet_output_blocks_11_1_proj_out.dora_scale", "unet", "up_blocks.3.attentions.2.proj_out", "magnitude"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "text_encoder", f"{TEXT}.mlp.fc1", "alpha"),
        (f"lora_te2_{ATTENTION.replace('.', '_')}_out_proj.alpha", "text_encoder_2", f"{ATTENTION}.out_proj", "alpha"),
        (f"text_encoder.{TEXT[11:]}.b.lora_linear_layer.down.weight", "text_encoder", f"{TEXT}.b", "down"),
        (f"text_encoder_2.{TEXT}.a.lora_magnitude_vector.weight", "text_encoder_2", f"{TEXT}.a", "magnitude"),
    ],
)  # fmt: skip
def test_names_of_files(key: str, part: str, path: str, kind: str) -> None:
    assert parse(key) == (part, path, kind)


def test_names_of_no_adapter() -> None:
    for key in ("lora_unet_x.hada_w1_a", "unet.x.lokr_w1", "lora_unet_x.lora_mid.weight", "alpha", "emb_params"):
        assert parse(key) is None


def test_dora_for_web_interfaces(tmp_path: Path) -> None:
    """They take dora_scale [out, 1 ...] times (W + dW) / |W + dW|, the norm over each output's weights."""
    unet = small_unet()
    weights = {path: layer.weight.detach().clone() for path, layer in lora.target_layers(unet).items()}  # type: ignore[operator]
    adapters = lora.add(unet, rank=2, alpha=1, targets=["to_q", "conv2"], dora=True)
    stir(adapters)
    out = run(unet)
    state = load_file(write(tmp_path / "a.safetensors", {"unet": adapters}, layout="kohya"))
    adapters.remove()
    for path, rank in {path: 2 for path in weights if f"lora_unet_{path.replace('.', '_')}.alpha" in state}.items():
        key = f"lora_unet_{path.replace('.', '_')}"
        up, down = state[f"{key}.lora_up.weight"], state[f"{key}.lora_down.weight"]
        delta = (up.flatten(1) @ down.flatten(1)).reshape(weights[path].shape) * state[f"{key}.alpha"] / rank
        changed = weights[path] + delta
        norm = changed.flatten(1).norm(dim=1).reshape(state[f"{key}.dora_scale"].shape)
        with torch.no_grad():
            unet.get_submodule(path).weight.copy_(state[f"{key}.dora_scale"] * changed / norm)  # type: ignore[operator,union-attr]
    assert not torch.equal(run(small_unet()), out)
    torch.testing.assert_close(run(unet), out, atol=1e-5, rtol=1e-4)


def test_ranks_that_differ_and_files_that_stack(tmp_path: Path) -> None:
    unet = small_unet()
    before = run(unet)
    ranks = {"conv_in": lora.Rank(rank=2, alpha=1), "conv_out": lora.Rank(rank=5, alpha=20)}
    adapters = lora.add_to(unet, ranks)
    stir(adapters)
    out = run(unet)
    for layout in ("diffusers", "kohya"):
        file = write(tmp_path / f"{layout}.safetensors", {"unet": adapters}, layout=layout, dtype=torch.bfloat16)
        read = lora_files.read(file)
        assert {path: layer.rank for path, layer in read.parts["unet"].items()} == ranks
        assert read.rank == 5 and not read.dora
        other = small_unet()
        first = lora_files.add_from_file(other, "unet", read)
        assert (run(other) - out).norm() < 0.02 * (out - before).norm()  # bfloat16
        first.scale(0.5)
        second = lora_files.add_from_file(other, "unet", file, weight=0.5)
        assert first.name != second.name
        assert (run(other) - out).norm() < 0.02 * (out - before).norm()


def changed(
    file: Path, tmp_path: Path, change: dict[str, Tensor | None], metadata: dict[str, str] | None = None
) -> Path:
    state = load_file(file) | {key: value for key, value in change.items() if value is not None}
    path = tmp_path / "changed.safetensors"
    save_file({key: value for key, value in state.items() if change.get(key, value) is not None}, path, metadata)
    return path


Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
P = Q.replace("to_q", "to_p")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({f"{P}.lora_A.weight": torch.ones(2, 9), f"{P}.lora_B.weight": torch.ones(9, 2)}, r"to_p \(nearest: .*to_"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 63)}, r"attn1\.to_q has weights of \[2, 63\].*\[2, 64\]"),
        ({f"{Q}.lora_B.weight": torch.ones(65, 2)}, r"\[65, 2\].*\[64, 2\]"),
        ({f"{Q}.lora_B.weight": torch.ones(64, 3)}, r"weights of \[2, 64\] and \[64, 3\]"),
        ({f"{Q}.lora_B.weight": None}, r"attn1\.to_q has down but no up"),
        ({f"{Q}.lora_A.weight": torch.full((2, 64), float("nan"))}, r"to_q\.lora_A\.weight has 128 of 128 values"),
        ({f"{Q}.hada_w1_a": torch.ones(2, 2)}, r"1 of \d+ tensors belong to no LoRA, .*hada_w1_a"),
        ({f"{Q}.lora_magnitude_vector": torch.ones(64)}, "some layers of unet have DoRA's norms"),
        ({f"{Q}.lora_magnitude_vector": torch.ones(9)}, r"norms of \[9\]"),
        ({f"{Q}.alpha": torch.ones(9)}, r"alpha of \[9\]"),
    ],
)  # fmt: skip
def test_wrong_files_are_told(tmp_path: Path, change: dict[str, Tensor | None], told: str) -> None:
    unet = small_unet()
    adapters = lora.add(small_unet(), rank=2, targets=["attention"])
    file = write(tmp_path / "a.safetensors", {"unet": adapters})
    with pytest.raises(LowVRAMError, match=told) as caught:
        lora_files.add_from_file(unet, "unet", changed(file, tmp_path, change))
    assert "changed.safetensors" in str(caught.value)
    assert list(unet.state_dict()) == list(small_unet().state_dict())  # nothing half-loaded


def test_metadata_and_parts_that_are_wrong(tmp_path: Path) -> None:
    adapters = lora.add(small_unet(), rank=2, targets=["conv_in"])
    file = write(tmp_path / "a.safetensors", {"unet": adapters})
    with pytest.raises(LowVRAMError, match="no adapters for text_encoder"):
        lora_files.add_from_file(small_unet(), "text_encoder", file)
    for notes in ("{", "[]", json.dumps({"unet.lora_alpha": "x"}), json.dumps({"unet.alpha_pattern": 3})):
        with pytest.raises(LowVRAMError, match="lora_adapter_metadata"):
            lora_files.read(changed(file, tmp_path, {}, {"lora_adapter_metadata": notes}))
    with pytest.raises(LowVRAMError, match="does not exist"):
        lora_files.read(tmp_path / "none.safetensors")


def test_a_projection_may_be_of_either_kind(tmp_path: Path) -> None:
    """proj_in is a 1x1 convolution in some networks of the same weights, a linear layer in others."""
    unet = small_unet(use_linear_projection=False)
    adapters = lora.add(unet, rank=2, targets=["proj_in", "proj_out"])
    stir(adapters)
    linear = small_unet(use_linear_projection=True)
    linear.load_state_dict({k: v.reshape(linear.state_dict()[k].shape) for k, v in lora.plain_state(unet).items()})
    lora_files.add_from_file(linear, "unet", write(tmp_path / "a.safetensors", {"unet": adapters}))
    torch.testing.assert_close(run(linear), run(unet), atol=1e-5, rtol=1e-4)
