"""What the site shows from outside docs/: the notebooks, the changelog, and links to other files of the repository."""

import base64
import os
import re
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put pages of docs/ that `nav` does not name at the end of the guides."""
    named = set(re.findall(r"[\w/]+\.md", str(config.nav)))
    (guides,) = (section["Guides"] for section in config.nav if "Guides" in section)
    guides += sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in named)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the changelog, and each notebook as a page with its pictures."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "changelog.md", content=changelog))
    for path in sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")):
        page, pictures = notebook_page(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and the PNG pictures it refers to by name."""
    parts, pictures = [], {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            text = output.get("text") or data.get("text/plain", "")
            if "image/png" in data:
                name = f"{path.stem}_{len(pictures)}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![Output]({name})")
            elif text:
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts), pictures


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Name the files of the repository that a page links to and the site does not hold."""
    sources = {"changelog.md": ROOT / "CHANGELOG.md"}
    if page.file.src_uri.startswith("notebooks/"):
        folder = ROOT / "examples" / "notebooks"
    else:
        folder = sources.get(page.file.src_uri, ROOT / "docs" / page.file.src_uri).parent

    def replace(match: re.Match) -> str:
        picture, text, target, anchor = match.groups()
        if re.match(r"[a-z]+:", target) or picture:
            return match.group()
        path = Path(os.path.normpath(folder / target))
        if path.suffix == ".ipynb" or (ROOT / "docs") in path.parents:
            is_notebook = path.suffix == ".ipynb"
            uri = f"notebooks/{path.stem}.md" if is_notebook else path.relative_to(ROOT / "docs").as_posix()
            return f"[{text}]({os.path.relpath(uri, Path(page.file.src_uri).parent)}{anchor or ''})"
        if path.exists():
            return f"{text} (`{path.relative_to(ROOT).as_posix()}`)"
        return match.group()

    fences = [match.span() for match in CODE.finditer(markdown)]
    return LINK.sub(
        lambda match: match.group() if any(a <= match.start() < b for a, b in fences) else replace(match), markdown
    )
