"""Who the Debian packages say is to be written to."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

BUILD = Path(__file__).parents[2] / "packaging" / "build.py"


@pytest.fixture
def build() -> Any:
    spec = importlib.util.spec_from_file_location("vchan_build", BUILD)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_whoever_builds_them_says_so(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEBFULLNAME", "Some Team")
    monkeypatch.setenv("DEBEMAIL", "team@vchan.invalid")
    assert build.maintainer() == "Some Team <team@vchan.invalid>"
    monkeypatch.delenv("DEBEMAIL")
    assert build.maintainer() == build.NO_MAINTAINER


def test_an_address_that_nobody_named_cannot_exist(build: Any) -> None:
    assert build.NO_MAINTAINER.endswith(".invalid>")
