"""All metrics in one pass: closer images score better, and what is computed from the real ones is kept."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch.nn import functional as F

from lowvram.errors import LowVRAMError
from lowvram.evaluate import evaluate
from lowvram.metrics import evaluation
from lowvram.metrics.evaluation import evaluate_images


def pictures(n: int, seed: int) -> torch.Tensor:
    """Random smooth images, uint8 [n, 3, 32, 32]."""
    small = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 255
    return F.interpolate(small, size=32, mode="bicubic").clamp(0, 255).to(torch.uint8)


class FakeData:
    name = "the test's images"
    resolution = 32
    labels = None
    class_names: ClassVar[list[str]] = []

    def __init__(self, n: int, seed: int = 0) -> None:
        self.pictures = pictures(n, seed)
        self.fingerprint = f"test-{n}-{seed}"
        self.reads = 0

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.reads += 1
        return self.pictures[index]


class FakeTask:
    """Draws from what its data were drawn from, or noise."""

    device = torch.device("cpu")
    settings = SimpleNamespace(task="fake", data=SimpleNamespace(mirror=False, workers=0), resolution=32)
    sample_options = ("truncation_psi", "noise_mode", "classes")

    def __init__(self, data: FakeData, *, good: bool = True) -> None:
        self.data, self.good = data, good
        self.calls: list[tuple[int, int, dict]] = []

    def dataset(self) -> FakeData:
        return self.data

    def sample(self, n: int, seed: int = 0, *, start: int = 0, **options: object) -> torch.Tensor:
        self.calls.append((start, n, options))
        if self.good:
            return pictures(200, 100 + seed)[start : start + n]
        noise = torch.rand(200, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 255
        return noise[start : start + n].to(torch.uint8)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The true network on small inputs, and few directions, so that seconds suffice."""
    from lowvram.metrics import features

    small = features.EfficientNetLite0(size=64)
    small.name = "efficientnet_lite0"
    monkeypatch.setattr(evaluation, "EfficientNetLite0", lambda device, size: small)


def test_noise_is_far_and_the_same_distribution_is_near(quick: None) -> None:
    data = FakeData(80)
    good = evaluate(FakeTask(data), n=60, progress=False)
    reads = data.reads
    bad = evaluate(FakeTask(data, good=False), n=60, progress=False)
    names = {f"{m}_efficientnet_lite0" for m in ("frechet", "precision", "recall")} | {"swd_32", "swd_16", "swd_mean"}
    assert set(good.values) == names and set(good.floor) == names
    assert (good.generated_images, good.real_images, good.floor_images) == (60, 60, 30)
    for name in ("frechet_efficientnet_lite0", "swd_32", "swd_16"):
        assert bad.values[name] > 2 * good.values[name]
    assert good.values["precision_efficientnet_lite0"] > 0.7 > 0.1 > bad.values["precision_efficientnet_lite0"]
    assert good.values["swd_mean"] == pytest.approx((good.values["swd_32"] + good.values["swd_16"]) / 2)
    assert good.floor == bad.floor
    assert "fid" in good.not_computed and "inception=PATH" in good.not_computed["fid"]
    assert any("too large" in note for note in good.notes)
    assert "frechet_efficientnet_lite0" in good.table() and "not computed" in good.table()

    assert reads == 60 and data.reads == 120  # the patches of all 60; the features were kept
    evaluate(FakeTask(data), n=60, metrics=["frechet"], progress=False)
    assert data.reads == 120


def test_another_judge_is_asked_by_name(quick: None) -> None:
    data = FakeData(80)
    both = evaluate(FakeTask(data), n=60, metrics=["frechet"], backbones=evaluation.BACKBONES, progress=False)
    assert set(both.values) == set(both.floor) == {"frechet_efficientnet_lite0", "frechet_random_conv"}
    assert sum("too large" in note for note in both.notes) == 2
    metrics = ["frechet", "precision_recall"]
    alone, noise = (
        evaluate(FakeTask(data, good=good), n=60, metrics=metrics, backbones=["random_conv"], progress=False)
        for good in (True, False)
    )
    assert set(alone.values) == {f"{metric}_random_conv" for metric in ("frechet", "precision", "recall")}
    assert alone.values["frechet_random_conv"] == pytest.approx(both.values["frechet_random_conv"], rel=1e-4)
    assert noise.values["frechet_random_conv"] > 1.5 * alone.values["frechet_random_conv"]


def test_images_are_asked_for_in_slices_once_each(quick: None) -> None:
    task = FakeTask(FakeData(80))
    evaluate(task, n=60, seed=3, truncation=0.5, noise_mode="const", metrics=["swd"], floor=False, progress=False)
    assert [(start, n) for start, n, _ in task.calls] == [(0, 50), (50, 10)]
    assert task.calls[0][2]["truncation_psi"] == 0.5 and task.calls[0][2]["noise_mode"] == "const"


def test_classes_are_drawn_as_often_as_the_data_has_them(quick: None) -> None:
    data = FakeData(80)
    data.labels = torch.tensor([0] * 60 + [1] * 20).numpy()
    task = FakeTask(data)
    evaluate(task, n=60, metrics=["swd"], progress=False)
    classes = task.calls[0][2]["classes"]
    assert sorted(classes) == sorted(data.labels.tolist()) and classes != sorted(classes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 3}, "n=3"),
        ({"metrics": ["kid"]}, "metrics=kid"),
        ({"metrics": []}, "names nothing"),
        ({"backbones": ["alexnet"]}, "backbone=alexnet"),
        ({"backbones": []}, "backbone names nothing"),
        ({"inception": "/none.pth"}, "inception=/none.pth"),
    ],
)
def test_wrong_options_are_named_before_any_work(options: dict, message: str) -> None:
    task = FakeTask(FakeData(20))
    with pytest.raises(LowVRAMError, match=message):
        evaluate(task, **{"n": 20, "progress": False, **options})
    assert not task.calls


def test_a_data_set_of_a_few_images_is_named() -> None:
    with pytest.raises(LowVRAMError, match="the test's images has 5 images"):
        evaluate(FakeTask(FakeData(5)), n=20, progress=False)


def test_too_few_generated_images_are_an_error(quick: None) -> None:
    def short() -> Iterator[torch.Tensor]:
        yield pictures(10, 1)

    with pytest.raises(LowVRAMError, match="10 images were generated where n=12"):
        evaluate_images(short(), FakeData(20), n=12, metrics=["swd"], progress=False)


def test_nothing_is_generated_for_a_metric_that_cannot_be_taken(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    task = FakeTask(FakeData(40))
    result = evaluate(task, n=40, metrics=["fid"], progress=False)
    assert not task.calls and not result.values and "not computed" in result.table()


def test_fid_is_measured_where_its_weights_are(quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """With a stand-in of 4 features for the 90 MB network."""

    class Stand:
        name, version, dim, is_published = "inception", "stand-1", 4, True

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().flatten(1)[:, :4]

    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"")
    monkeypatch.setattr(evaluation, "InceptionV3", lambda path, device: Stand())
    result = evaluate(FakeTask(FakeData(40)), n=40, metrics=["fid"], inception=str(weights), progress=False)
    assert set(result.values) == {"fid"} and set(result.floor) == {"fid"} and not result.not_computed
    assert any("50,000" in note for note in result.notes)


@pytest.mark.slow
def test_the_true_inception_architecture_runs(tmp_path) -> None:
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    from lowvram.metrics.features import InceptionV3

    make = fidelity.load_state_dict_from_url
    fidelity.load_state_dict_from_url = lambda *_, **__: {}
    original = fidelity.FeatureExtractorInceptionV3.load_state_dict
    try:
        fidelity.FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
        network = fidelity.FeatureExtractorInceptionV3("random", ["2048"])
    finally:
        fidelity.load_state_dict_from_url = make
        fidelity.FeatureExtractorInceptionV3.load_state_dict = original
    torch.save(network.state_dict(), tmp_path / "random.pth")
    extractor = InceptionV3(tmp_path / "random.pth")
    assert not extractor.is_published
    assert extractor(pictures(2, 0)).shape == (2, 2048)
