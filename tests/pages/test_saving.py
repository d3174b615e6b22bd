"""The page of a run: its numbers are those of the folder, it needs nothing else, and is written whatever is there."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from example_runs import Page, metrics_line, run_folder, session, write_evaluation, write_grid

from lowvram import pages
from lowvram.errors import LowVRAMError
from lowvram.pages import about, pictures, saving
from lowvram.receipt.ledger import Receipt
from lowvram.receipt.rates import amount, energy


def page_of(folder: Path) -> Page:
    return Page(pages.write(folder))


def test_the_numbers_are_those_of_metrics_jsonl(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    page = page_of(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    charts = page.charts()
    titles = {"loss/G": "Loss of G", "loss/D": "Loss of D", "augment_p": "Augmentation probability p"}
    for name, title in {**titles, "s_per_kimg": "Time for a thousand images", "watts": "Power"}.items():
        written = {json.dumps(line["kimg"]): json.dumps(line[name]) for line in lines}
        assert len(charts[title]) == 25
        assert all(written[kimg] == value for kimg, value in charts[title]), title
        assert charts[title][-1][0] == json.dumps(lines[-1]["kimg"])  # the newest is never left out
    for label, kimg, value in charts["Peak memory in tensors, by phase"]:
        (line,) = [line for line in lines if json.dumps(line["kimg"]) == kimg]
        assert float(value) * 2**30 == line[f"peak_allocated_bytes/{label}"]
    assert "16,000" in page.text()


def test_costs_are_those_of_the_receipt(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    text = page_of(folder).text()
    totals = Receipt.read(folder).totals()
    assert f"Energy {energy(totals.kwh)}" in text
    assert f"Money {amount(totals.money['$'], '$')}" in text
    assert "Ada 8,000 30 minutes" in text and "Grace 8,000 30 minutes" in text
    assert "measured by the card's own counter" in text and "$0.40/h" in text


def test_quality_comes_from_evaluations(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    assert "Not measured yet" in page_of(folder).text()
    write_evaluation(folder, 500, frechet_efficientnet_lite0=123.456789)
    write_evaluation(folder, 1000, frechet_efficientnet_lite0=98.7654321)
    page = page_of(folder)
    rows = page.charts()["Frechet distance, EfficientNet-Lite0"]
    assert rows == [["8.0", "123.456789"], ["16.0", "98.7654321"]]


def test_evaluations_of_different_settings_are_told_apart(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    for step, fid in ((500, 30.0), (1000, 20.0)):
        write_evaluation(folder, step, n=5000, fid=fid)
        write_evaluation(folder, step, n=5000, truncation=0.5, fid=fid - 15)
    write_evaluation(folder, 1000, n=64, fid=200.0)
    write_evaluation(folder, 750, n=64, truncation=0.5, fid=100.0)
    page = page_of(folder)
    assert page.charts()["FID"] == [
        ["5,000 images", "8.0", "30.0"], ["5,000 images", "16.0", "20.0"],
        ["5,000 images, truncation=0.5", "8.0", "15.0"], ["5,000 images, truncation=0.5", "16.0", "5.0"],
    ]  # fmt: skip
    assert "FID 20 Samples" in page.text()  # the newest, of most images, with the usual settings
    assert "16 kimg, 64 images against 50 real ones 200" in page.text()


def test_a_page_is_one_valid_file_that_asks_for_nothing(tmp_path: Path) -> None:
    page = page_of(run_folder(tmp_path / "run"))
    for element in page.tree.iter():
        for name, value in element.attrib.items():
            if name.rpartition("}")[2] in ("src", "href", "action", "data", "poster", "srcset"):
                assert value.startswith(("#", "data:image/")), (element.tag, value)
            assert not name.startswith("on"), "a handler in an attribute"
    assert not re.search(r"url\(|@import|https?:", re.sub(r'"data:[^"]*"', "", page.source))
    assert not page.all("link") and not page.all("iframe")
    assert page.all("html")[0].get("lang") == "en" and page.all("main")
    assert all(image.get("alt") for image in page.all("img"))
    assert {anchor.get("href")[1:] for anchor in page.all("a")} <= {one.get("id") for one in page.tree.iter()}


def test_only_its_own_script_and_style_may_run(tmp_path: Path) -> None:
    page = page_of(run_folder(tmp_path / "run"))
    (policy,) = [m.get("content") for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    for tag in ("script", "style"):
        (element,) = page.all(tag)
        digest = base64.b64encode(hashlib.sha256(element.text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy


def test_the_command_repeats_the_run(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", "data.path=/photos of mine", "optimizer.lr=0.001")
    (code,) = page_of(folder).all("pre")
    words = "".join(code.itertext())
    assert words == (
        "python -m lowvram.train recipe=faces32 kimg=16 'data.path=\"/photos of mine\"' optimizer.lr=0.001"
    )


def test_a_folder_of_an_older_version_opens(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", receipt=False)
    old = ("step", "kimg", "s_per_kimg", "seconds", "loss/G")
    (folder / "metrics.jsonl").write_text(
        "\n".join(json.dumps({name: metrics_line(step)[name] for name in old}) for step in range(1, 30))
    )
    recipe = (folder / "recipe.yaml").read_text().splitlines()
    new = ("price", "electricity", "carbon", "contributor", "kernels", "weights")
    (folder / "recipe.yaml").write_text("\n".join(line for line in recipe if not line.startswith(new)))
    (folder / "reals.png").unlink()
    page = page_of(folder)
    text = page.text()
    assert "There is no receipt.json" in text and "There is no plan.json" in text
    assert "Loss of G" in page.charts() and "Power" not in page.charts()
    assert "reals.png" in text


def test_a_folder_with_nothing_but_a_recipe_opens(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("recipe: mine\n")
    text = page_of(tmp_path).text()
    assert "metrics.jsonl is not there" in text and "No samples yet" in text and "None were recorded yet" in text
    assert "is not one of those built in" in text


@pytest.mark.parametrize("there", [False, True])
def test_what_is_no_run_folder_is_said(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "nothing"
    if there:
        folder.mkdir()
    with pytest.raises(LowVRAMError, match="recipe.yaml" if there else "not there"):
        pages.write(folder)


# Size and time.


def test_many_grids_stay_a_page_that_can_be_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(tmp_path / "run")
    write_grid(folder / "fakes_000000.png", size=700)  # noise: nothing is harder to make small
    for kimg in range(1, 300):
        (folder / f"fakes_{kimg:06d}.png").touch()
    one = pictures.picture_of(folder / "fakes_000000.png")
    monkeypatch.setattr(pictures, "picture_of", lambda path: one)
    page = page_of(folder)
    assert 12 < len(page.all("img")) <= 26 and len(page.source) < 8 * 2**20
    assert "of 300 grids" in page.text()


def test_a_growing_run_encodes_each_grid_once() -> None:
    before: set[int] = set()
    for n in range(1, 400):
        grids = [(kimg, Path(f"fakes_{kimg:06d}.png")) for kimg in range(n)]
        now = {kimg for kimg, _ in pictures.chosen(grids)}
        assert len(now) <= 25 and {0, n - 1} <= now
        assert len(now - before) <= 1, n
        before |= now


def test_a_training_does_not_wait_for_all_pictures(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    for kimg in range(1, 7):
        write_grid(folder / f"fakes_{kimg:06d}.png", size=32)
    selected = pictures.chosen(pictures.grids(folder, sorted(p.name for p in folder.iterdir())))
    first = pictures.frames(selected, seconds=0.0)
    assert [frame.kimg for frame in first] == [16]  # the newest, whatever it takes
    assert len(pictures.frames(selected)) == 9
    assert len(pictures.frames(selected, seconds=0.0)) == 9  # those known cost nothing


# While training.


def test_about_notes_each_session_once(tmp_path: Path) -> None:
    for images in (5, 5, 6):
        about.note(tmp_path, about.here(data="faces", images=images))
    assert [one.images for one in about.read(tmp_path)] == [5, 6]
    assert about.read(tmp_path)[0].python == ".".join(map(str, sys.version_info[:3]))


NOON, LATER = "2026-01-01T12:00:00+00:00", "2026-01-01T13:00:00+00:00"


class Faces(list[int]):
    name = "faces"


def test_no_failure_ends_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(tmp_path / "run", "kimg=20")
    said: list[str] = []
    pages.while_training(folder, Faces([1, 2]), begun=NOON, running=True, say=said.append)
    assert not said and "In training: 16 kimg of 20" in Page(folder / "report.html").text()
    before = (folder / "report.html").read_text()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    pages.while_training(folder, Faces([1, 2, 3]), begun=NOON, running=True, say=said.append)
    monkeypatch.undo()
    assert said == ["the run's page could not be written: [Errno 28] No space left on device"]
    assert (folder / "report.html").read_text() == before
    assert not list(folder.glob(".report*"))
    monkeypatch.setattr(saving.run_page, "view", lambda *_, **__: 1 / 0)
    pages.while_training(folder, Faces([1]), begun=NOON, running=True, say=said.append)
    assert said[1] == "the run's page could not be written: division by zero"


@pytest.mark.parametrize(("kimg", "running", "said"), [
    (16, True, "Done: 16 kimg."), (20, True, "In training: 16 kimg of 20"), (20, False, "Stopped at 16 kimg of 20"),
])  # fmt: skip
def test_how_far_a_run_is(tmp_path: Path, kimg: int, running: bool, said: str) -> None:
    folder = run_folder(tmp_path / "run", f"kimg={kimg}")
    pages.while_training(folder, Faces([1, 2]), begun=NOON, running=running, say=print)
    text = Page(folder / "report.html").text()
    assert said in text
    assert "2 of the built-in drawn faces" in text


def test_a_later_page_says_what_the_training_said(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", "kimg=20")
    pages.while_training(folder, Faces([1]), begun=NOON, running=True, say=print)
    text = page_of(folder).text()
    assert "In training" not in text and "At 16 kimg of 20 kimg; last line" in text  # killed, or not: who knows
    pages.while_training(folder, Faces([1]), begun=NOON, running=False, say=print)
    assert "Stopped at 16 kimg of 20" in page_of(folder).text()
    (session_,) = about.read(folder)
    assert session_.begun == NOON < session_.ended and session_.kimg == 16
    with (folder / "metrics.jsonl").open("a") as file:  # and it trains again
        file.write(json.dumps(metrics_line(1100)) + "\n")
    assert "At 17.6 kimg of 20" in page_of(folder).text()
    pages.while_training(folder, Faces([1]), begun=LATER, running=True, say=print)
    assert [one.ended == "" for one in about.read(folder)] == [False, True]


def test_the_last_line_is_as_old_as_the_receipt_says_also_of_a_copy(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", "kimg=20", receipt=False)
    assert "last line 0 seconds" in page_of(folder).text() or "last line 1 seconds" in page_of(folder).text()
    long_ago = {"begun": "2020-01-01T08:00:00+00:00", "ended": "2020-01-01T09:00:00+00:00"}
    Receipt((replace(session(1, 0, 16000), **long_ago),)).write(folder)
    (days,) = re.findall(r"last line ([\d.]+) days before this page", page_of(folder).text())
    assert float(days) > 2000


def test_the_device_is_that_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"card {device}")
    assert about.here(device=torch.device("cpu")).device == "CPU"
    assert about.here(device=torch.device("cuda:1")).device == "card cuda:1"


def test_an_autoencoder_shows_reconstructions(tmp_path: Path) -> None:
    from lowvram.config import load_recipe
    from lowvram.run import Run

    Run(tmp_path / "run", load_recipe("faces64_vae"), is_new=True).prepare()
    write_grid(tmp_path / "run" / "fakes_000008.png")
    write_evaluation(tmp_path / "run", 500, fid=12.5)
    text = page_of(tmp_path / "run").text()
    assert "encoded and decoded again" in text and "latents each time" not in text and "generated images" not in text


def test_training_leaves_its_page(tiny: Callable[..., object], tmp_path: Path) -> None:
    from lowvram import Trainer

    Trainer(tiny("kimg=0.016", "snapshot_kimg=0.016"), quiet=True).fit()
    page = Page(tmp_path / "run" / "report.html")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert page.charts()["Loss of G"][-1] == [json.dumps(lines[-1]["kimg"]), json.dumps(lines[-1]["loss/G"])]
    assert "Done: 0.016 kimg" in page.text()
    assert about.read(tmp_path / "run")[-1].ended and about.read(tmp_path / "run")[-1].device == "CPU"
    assert about.read(tmp_path / "run")[0].images > 0
    Trainer(tiny("kimg=0.032", "snapshot_kimg=0.008", "resume=auto"), quiet=True).fit()
    sessions = Receipt.read(tmp_path / "run").sessions
    assert [one.begun for one in about.read(tmp_path / "run")] == [one.begun for one in sessions]
    assert len(sessions) == 2 and sessions[0].begun < sessions[1].begun


def test_a_page_needs_no_torch_unless_there_is_a_plan(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    code = f"import sys; from lowvram import pages; pages.write({str(folder)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
