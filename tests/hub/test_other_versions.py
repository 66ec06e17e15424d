"""What one set of library versions saves, another one loads by the code that goes along, without this package."""

import os

import pytest

from .conftest import Client
from .fake_hub import FakeHub
from .test_portable import CHECK_MODELS, CHECK_PIPELINE, fill


OTHER_PYTHON = os.environ.get("VFMTOK_OTHER_PYTHON")
pytestmark = pytest.mark.skipif(
    OTHER_PYTHON is None, reason="VFMTOK_OTHER_PYTHON names no Python with other versions; `make test-oldest` sets it"
)
PUBLISH = """
from pathlib import Path
from tests.hub.fake_hub import FakeHub
from tests.hub.published import publish

with FakeHub() as hub:
    publish(hub, Path({folder!r}))
"""


def check(client: Client, published) -> None:
    client(fill(CHECK_MODELS, published, "transformers_modules.", trust_remote_code=True))
    client(fill(CHECK_PIPELINE, published, "diffusers_modules.") + '\ncheck_pipeline("tester/pipe")')


def test_others_load_what_these_versions_save(published, hub, tmp_path):
    with Client(hub, tmp_path, packaged=False, python=OTHER_PYTHON) as other:
        check(other, published)


def test_these_versions_load_what_others_save(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    with FakeHub() as hub:
        with Client(hub, tmp_path / "other", python=OTHER_PYTHON) as other:
            other(PUBLISH.format(folder=str(folder)))
        for name in ("tokenizer", "ar", "rar", "pipe"):
            hub.put(name, folder / name)
        with Client(hub, tmp_path / "this", packaged=False) as this:
            check(this, folder)
