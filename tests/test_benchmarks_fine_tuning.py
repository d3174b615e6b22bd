"""The fine-tuning benchmark: the pipeline that it makes, what it concludes, and the whole command on a few steps."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import fine_tuning, fine_tuning_base, record
from lowvram.errors import LowVRAMError
from lowvram.models.autoencoder import Autoencoder
from lowvram.tasks import load_weights
from lowvram.weights.pipeline import open_pipeline

_BEGINS = ("before", "before_word", "before_instance")
_TRAINED = ("full", "lora", "textual_inversion", "dreambooth", "dreambooth_alone")


def points(**distance: float) -> list[dict[str, Any]]:
    """As the command makes them, with one distance for all measures and references."""

    def found(value: float) -> dict[str, Any]:
        return {"values": dict.fromkeys(fine_tuning.MEASURES, value), "floor": dict.fromkeys(fine_tuning.MEASURES, 0.5)}

    made = []
    for name, value in distance.items():
        references = ("class_before",) if name.endswith("_class") else ("learned", "held_out")
        details = {"training_seconds": 0.0} | {reference: found(value) for reference in references}
        made.append({"name": name, "details": details})
    return made


def moved() -> list[dict[str, Any]]:
    return points(
        **dict.fromkeys(_BEGINS, 3.0), **dict.fromkeys(_TRAINED, 1.0), dreambooth_class=1.0, dreambooth_alone_class=2.0
    )


def test_parts_that_move_leave_nothing_to_object_to() -> None:
    assert fine_tuning.shortcomings(moved()) == []
    assert fine_tuning.shortcomings(points(before=3.0, lora=1.0)) == []


@pytest.mark.parametrize("name", _TRAINED)
@pytest.mark.parametrize("reference", ["learned", "held_out"])
def test_a_part_that_does_not_move_is_named(name: str, reference: str) -> None:
    found = moved()
    measure = fine_tuning.CLAIMED[0]
    details = next(point["details"] for point in found if point["name"] == name)
    details[reference]["values"][measure] = 3.0
    (said,) = fine_tuning.shortcomings(found)
    assert said.startswith(f"{name} ") and measure in said and reference in said


def test_a_prior_that_keeps_nothing_is_named() -> None:
    found = moved()
    kept, alone = found[-2]["details"], copy.deepcopy(found[-1]["details"])
    kept["class_before"] = alone["class_before"]
    assert [said.split(" by ")[0] for said in fine_tuning.shortcomings(found)] == [
        "prior preservation keeps the class no better"
    ] * len(fine_tuning.CLAIMED)


def test_the_table_has_a_row_for_each_comparison_and_the_floors() -> None:
    rows = fine_tuning.table(moved()).splitlines()
    assert len(rows) == 1 + 2 * (len(_BEGINS) + len(_TRAINED)) + 2 + 3
    assert sum(row.startswith("floor") for row in rows) == 3


def test_distances_see_a_tint(tmp_path: Path) -> None:
    for index in range(16):
        shade = np.random.default_rng(index).integers(100, 140, (32, 32, 3), np.uint8)
        Image.fromarray(shade).save(tmp_path / f"{index}.png")
    alike = torch.from_numpy(np.random.default_rng(99).integers(100, 140, (16, 3, 32, 32), np.uint8))
    near, far = (fine_tuning.distances(images, tmp_path) for images in (alike, alike + torch.tensor(60).byte()))
    assert near["values"]["colour"] < 2 and abs(far["values"]["colour"] - 60 * 3**0.5) < 2
    assert far["values"]["frechet_lite0"] > 1.2 * near["values"]["frechet_lite0"]
    assert far["values"]["swd_mean"] < 1.2 * near["values"]["swd_mean"]  # which is why nothing is claimed by it
    assert set(near["floor"]) == set(fine_tuning.MEASURES) and near["floor"]["colour"] < 2


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fine_tuning")


def test_faces_are_tinted_by_their_paper_which_captions_name(home: Path) -> None:
    def paper(index: int) -> fine_tuning_base.Paper:
        return fine_tuning_base.WHITE if index == 0 else ("green", fine_tuning_base.PAPERS["green"])

    captions = fine_tuning_base.draw(home / "faces", range(2), paper=paper)
    assert captions[0].startswith("a person") and captions[1].startswith("green paper, a person")
    assert (home / "faces" / "000001.txt").read_text() == captions[1] + "\n"
    corner = [tuple(np.asarray(Image.open(home / "faces" / f"00000{index}.png"))[0, 0]) for index in range(2)]
    assert corner == [(255, 255, 255), fine_tuning_base.PAPERS["green"]]
    unnamed = fine_tuning_base.draw(home / "more", range(1, 2), paper=paper, named=False, captioned=False)
    assert unnamed[0].startswith("a person") and not list((home / "more").glob("*.txt"))


def test_the_pipeline_of_random_weights_is_one_that_opens_and_samples(home: Path) -> None:
    torch.manual_seed(0)
    autoencoder = Autoencoder(block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=0.5)
    fine_tuning_base.write_random(home / "random", autoencoder, seed=0)
    pipeline = open_pipeline(home / "random")
    assert (pipeline.family, pipeline.parts) == ("sd1", ("unet", "vae", "text_encoder"))
    task = load_weights(home / "random", device="cpu")
    assert task.settings.resolution == fine_tuning_base.RESOLUTION
    images = task.sample(2, prompts=["a person", "green paper"], steps=1)
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.uint8
    fine_tuning_base.write_random(home / "again", autoencoder, seed=0)
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (home / "random" / name).read_bytes() == (home / "again" / name).read_bytes()


def test_what_is_asked_wrongly_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(LowVRAMError, match="parts=laura is not known"):
        fine_tuning.run(fine_tuning.Options(out=str(tmp_path / "out"), parts="full,laura"))
    (tmp_path / "runs").mkdir()
    with pytest.raises(LowVRAMError, match="has trainings already"):
        fine_tuning.run(fine_tuning.Options(out=str(tmp_path)))
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]


@pytest.mark.slow
def test_the_command_writes_points_grids_and_a_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    small = {"faces": 24, "images": 16, "samples": 8, "pretrain_kimg": 0.032, "autoencoder_kimg": 0.008, "kimg": 0.016}
    monkeypatch.setattr(
        "sys.argv", ["fine_tuning", f"out={out}", *(f"{name}={value}" for name, value in small.items())]
    )
    try:
        fine_tuning.main()
    except SystemExit as ended:  # so little training need not help: the exit status says whether it did
        assert "no nearer" in str(ended.code) or "no better" in str(ended.code)
    found = [point["name"] for point in record.read(out / "fine_tuning.json")["points"]]
    trained = [*_TRAINED[:4], "dreambooth_class", _TRAINED[4], "dreambooth_alone_class"]
    assert found == [*_BEGINS, "before_class", *trained]
    assert all((out / f"{name}.png").is_file() for name in found)
    assert open_pipeline(out / "base").parts == ("unet", "vae", "text_encoder")
    assert {path.name for path in (out / "few").iterdir()}.isdisjoint(path.name for path in (out / "unseen").iterdir())
    assert "floor" in capsys.readouterr().out
