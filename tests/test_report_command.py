"""`python -m lowvram.report` as a user calls it."""

import sys
from pathlib import Path

import pytest
from commands import run as command

sys.path.insert(0, str(Path(__file__).parent / "pages"))
from example_runs import run_folder

from lowvram import report
from lowvram.errors import LowVRAMError


def test_it_writes_a_page_and_says_where(tmp_path: Path) -> None:
    run_folder(tmp_path / "outputs" / "a")
    run_folder(tmp_path / "outputs" / "lr=0.1")
    done = command("lowvram.report", "run=outputs/a", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "lowvram: wrote outputs/a/report.html\n"), done.stderr
    done = command("lowvram.report", "outputs/a", "outputs/lr=0.1", "out=both.html", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "lowvram: wrote both.html\n"), done.stderr
    assert "lr=0.1" in (tmp_path / "both.html").read_text()


@pytest.mark.parametrize(("words", "said"), [
    (["outputs/a", "outputs/a"], "outputs/a is named twice"),
    (["nothing"], "nothing is not there"),
    ([], "run is missing"),
    (["run=outputs/a", "size=3"], "There is no option size"),
    (["run=outputs/a", "out=no/such/place.html"], "the page can't be written"),
])  # fmt: skip
def test_mistakes_are_named(
    tmp_path: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "outputs" / "a")
    folders, options = report.split(words)
    monkeypatch.setattr(sys, "argv", ["report", *options])
    with pytest.raises(SystemExit) as ended:
        report.command(report.ReportOptions, lambda options: report.main(options, folders), "report")
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_folders_and_options_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=0.1").mkdir()
    words = ["a", "run=b", "lr=0.1", "lr=0.2", "out=c", "--help", "debug=true"]
    assert report.split(words) == (["a", "lr=0.1"], ["run=b", "lr=0.2", "out=c", "--help", "debug=true"])
    with pytest.raises(LowVRAMError, match="run is missing"):
        report.main(report.ReportOptions(), [])
