"""Several crops of each image for SDXL: the network is told where the one that it sees was cut."""

from pathlib import Path

import pytest
import torch
from tiny_fine_tuning import batches, make_pictures, task_of, trainer_for
from tiny_pipelines import make_pipeline


@pytest.mark.parametrize("prior", [False, True], ids=["plain", "prior"])
def test_each_crop_has_its_own_place(prior: bool, tmp_path: Path) -> None:
    weights = make_pipeline(tmp_path / "sdxl", "sdxl")
    folder = make_pictures(tmp_path / "pictures" / "2_cat", size=(48, 40)).parent
    words = [f"data.path={folder}", f"out={tmp_path / 'run'}", "latent.crops=3", "batch=4", "data.mirror=true"]
    words += ["text.prompt=a cat", "prior.prompt=a dog", "prior.images=2", "sampling.steps=1"] if prior else []
    trainer = trainer_for("sdxl_lora", weights, *words)
    task = task_of(trainer)
    instances = task.instances
    assert instances.size_ids.shape == (8 if prior else 6, 6, 6) and instances.labelled
    seen = set()
    for batch in batches(trainer, 12):
        images = instances.images_of(batch.labels)
        assert int(images.max()) < len(instances.size_ids)
        told = task.condition.training(batch.labels, torch.arange(len(batch.labels)), None)["size_ids"]
        for label, image, moments, sizes in zip(
            batch.labels.tolist(), images.tolist(), batch.images, told, strict=True
        ):
            variant = label % 6
            assert sizes.tolist() == instances.size_ids[image, variant].tolist()
            if image < instances.own:  # the very latents of that crop
                latents = instances.items.parts[0] if prior else instances.items.images
                kept = latents.moments(image, bool(variant % 2), variant // 2)
                assert torch.equal(moments, torch.from_numpy(kept))
                assert sizes[:2].tolist() == [40, 48] and sizes[4:].tolist() == [32, 32]
            seen.add((image, variant))
    assert {variant for _, variant in seen} == set(range(6))
    assert len({tuple(instances.size_ids[0, variant, 2:4]) for variant in range(6)}) > 3
    if prior:
        weights_of = task._sample_weights(torch.tensor([0, 6 * 6 - 1, 6 * 6]))
        task.settings.prior.weight = 0.5
        assert weights_of.tolist() == [1, 1, 1]
        assert task._sample_weights(torch.tensor([0, 6 * 6 - 1, 6 * 6])).tolist() == [1, 1, 0.5]
    (batch,) = batches(trainer, 1)
    trainer.train_step(batch)
