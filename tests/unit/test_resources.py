"""Where the folders that come with the package are."""

from __future__ import annotations

from pathlib import Path

import pytest

from deephyper_balsam.common import bundled_files


@pytest.mark.parametrize("name", ["apps", "site-configs"])
def test_a_checkout_has_its_folders_beside_the_package(name: str) -> None:
    assert bundled_files.folder(name) == Path(__file__).parents[2] / name


def test_a_wheel_has_them_inside_and_these_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "deephyper_balsam"
    (package / "share" / "apps").mkdir(parents=True)
    (tmp_path / "apps").mkdir()
    monkeypatch.setattr(bundled_files, "_PACKAGE", package)
    assert bundled_files.folder("apps") == package / "share" / "apps"


def test_a_folder_that_is_missing_says_to_install_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled_files, "_PACKAGE", tmp_path / "deephyper_balsam")
    with pytest.raises(FileNotFoundError, match=r"no apps/ folder \(looked at .*share/apps and .*\): install it again"):
        bundled_files.folder("apps")
