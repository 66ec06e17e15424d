"""The documentation site builds without a warning, and what it promises is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_nothing_is_fetched_from_elsewhere(site):
    page = (site / "index.html").read_text()
    assert re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?)[^"]*)"', page) == []
    assert "fonts.googleapis.com" not in page


def test_reference_shows_docstrings_as_lists(site):
    page = (site / "api" / "tokenizer.html").read_text()
    assert "<strong>pixel_values</strong>" in page
    assert "<strong>Raises</strong>" in page
    assert "Args:" not in page


def test_notebooks_are_pages_with_pictures(site):
    for path in sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")):
        assert (site / "notebooks" / f"{path.stem}.html").is_file()
        assert list((site / "notebooks").glob(f"{path.stem}_*.png"))


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_of_the_repository(page):
    """As GitHub shows the pages, which knows nothing of those that the site generates."""
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert [target for target in missing if not target.startswith(("mailto:", "data:"))] == []


def test_every_page_is_in_the_navigation(site):
    faq = (site / "faq.html").read_text()
    navigation = faq[faq.index("<nav") :]
    pages = [path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f'href="{page}"' not in navigation] == []
