"""Hooks of mkdocs: what the site has beyond the pages in ``docs/``.

- Links from a page to a file of the repository outside ``docs/`` lead to a page that shows the
  file (``code/...``), so that the site is complete in itself; CHANGELOG.md and CONTRIBUTING.md
  become pages.
- ``learn/recording.html`` is the page that ``tilewise trace`` writes, made anew in every build.
- ``<!-- commands -->`` in a page becomes the options of every command.
- Patterns in the navigation stand for the pages in that place that are named nowhere else.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

# Pages of the site that are files outside docs/, and pages that stand for one.
BORROWED = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
STAND_INS = {path: page for page, path in BORROWED.items()} | {"README.md": "index.md"}

RECORDING = "learn/recording.html"
LANGUAGES = {".py": "python", ".cpp": "cpp", ".hpp": "cpp", ".h": "cpp", ".toml": "toml"}
LANGUAGES |= {".yml": "yaml", ".md": "markdown", ".sh": "sh"}

_CODE = re.compile(r"(^(?P<fence>`{3,}).*?^(?P=fence)[ ]*$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_ELSEWHERE = re.compile(r"[a-z]+:|/|#")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace the patterns in the navigation by the pages that they stand for."""
    nav: list[Any] = config.nav or []
    named = {entry for entry in _entries(nav) if "*" not in entry}
    pages = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    config.nav = _expanded(nav, [page for page in pages if page not in named])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the borrowed pages, the recording, and a page for each file that a page links."""
    for page, source in BORROWED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    files.append(_hidden(config, RECORDING, _recording()))
    linked: set[Path] = set()
    for file in files.documentation_pages():
        linked |= set(_linked(file.content_string, _place(file.src_uri)))
    for path in sorted(linked):
        for shown in (path, *_listed(path)):
            if files.get_file_from_path(_shown_at(shown)) is None:
                files.append(_hidden(config, _shown_at(shown), _show(shown)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files outside ``docs/`` into links to the pages that show them."""
    here = page.file.src_uri
    if here.startswith("code/"):
        return markdown
    if here == "learn/trace.md":
        markdown = _with_recording(markdown)
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", _commands())

    def replace(link: re.Match[str]) -> str:
        target = _outside(link[2], _place(here))
        if target is None:
            return link[0]
        return link[1] + os.path.relpath(_shown_at(target), Path(here).parent) + link[3]

    parts = _CODE.split(markdown)
    # split() gives text, then for each piece of code its two groups: the code and the fence.
    parts[0::3] = [_LINK.sub(replace, text) for text in parts[0::3]]
    return "".join(text for index, text in enumerate(parts) if index % 3 != 2)


def _entries(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for item in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _entries(item)


def _expanded(nav: list[Any], free: list[str]) -> list[Any]:
    """``nav`` with each pattern replaced by the pages of ``free`` in the pattern's own folder."""
    found: list[Any] = []
    for item in nav:
        if isinstance(item, dict):
            found.append(
                {
                    title: _expanded(inner, free) if isinstance(inner, list) else inner
                    for title, inner in item.items()
                }
            )
        elif "*" in item:
            depth = item.count("/")
            found += [p for p in free if p.count("/") == depth and fnmatch.fnmatch(p, item)]
        else:
            found.append(item)
    return found


def _place(page: str) -> Path:
    """The folder from which a page's relative links count."""
    return (ROOT / BORROWED[page]).parent if page in BORROWED else (DOCS / page).parent


def _outside(target: str, folder: Path) -> Path | None:
    """The file or folder that a link leads to, if it is in the repository but no page."""
    if _ELSEWHERE.match(target):
        return None
    path = Path(os.path.normpath(folder / target))
    if not path.exists() or not path.is_relative_to(ROOT):
        return None
    inside = path.is_relative_to(DOCS)
    # Links from CONTRIBUTING.md to docs/ have to be made anew as well.
    return None if inside and folder.is_relative_to(DOCS) else path


def _linked(markdown: str, folder: Path) -> Iterator[Path]:
    """The files that need a page of their own."""
    for _, target, _ in _LINK.findall(_CODE.sub("", markdown)):
        path = _outside(target, folder)
        if path and not path.is_relative_to(DOCS) and _name(path) not in STAND_INS:
            yield path


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _shown_at(path: Path) -> str:
    """Where the site shows a file of the repository."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    if _name(path) in STAND_INS:
        return STAND_INS[_name(path)]
    # Data is for programs: it lies in the site as it is.
    return f"code/{_name(path)}" + ("" if path.suffix == ".json" else ".md")


def _listed(folder: Path) -> list[Path]:
    """The source files that a folder's page links."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in files if path.suffix in LANGUAGES and path.is_file()]


def _show(path: Path) -> str:
    """A page that shows a file, or the list of a folder's files. The search does not find it."""
    head = (
        f"---\nhide: [toc]\nsearch: {{exclude: true}}\n---\n\n# {path.name}\n\n`{_name(path)}`\n\n"
    )
    if path.is_dir():
        return head + "\n".join(f"- [{p.name}]({path.name}/{p.name}.md)" for p in _listed(path))
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return text
    longest = max(map(len, re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{head}{fence}{LANGUAGES.get(path.suffix, 'text')}\n{text.rstrip()}\n{fence}\n"


def _hidden(config: MkDocsConfig, path: str, content: str) -> File:
    """A page of the site that the navigation does not list."""
    return File.generated(config, path, content=content, inclusion=InclusionLevel.NOT_IN_NAV)


def _recording() -> str:
    """What ``tilewise trace`` writes without options."""
    import torch

    from tilewise import masks
    from tilewise.learn import render, trace

    torch.set_num_threads(1)
    tensors = trace.example(32, 32, 8, 0)
    return render.page(trace.record(*tensors, mask=masks.causal(), block_q=8, block_kv=8))


def _with_recording(markdown: str) -> str:
    """The page on ``tilewise trace`` with links to the recording where it shows a picture of it."""
    picture = re.compile(r"^(!\[[^\]]*\]\(\.\./images/trace-desktop\.png\))$", re.MULTILINE)
    link = f"[Open this recording and play it]({Path(RECORDING).name}){{ .md-button }}\n\n"
    found, count = picture.subn(rf"{link}[\1]({Path(RECORDING).name})", markdown)
    if count != 1:
        raise PluginError("learn/trace.md: expected images/trace-desktop.png once, on its own line")
    return found


def _commands() -> str:
    """A section for each command: what it does, then its arguments and options."""
    import typer

    from tilewise.cli import app

    parts = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        parts.append(f"## tilewise {name}\n\n{(command.help or '').strip()}\n")
        rows = ["| option | | default |", "|---|---|---|"]
        for parameter in command.params:
            names = [str(parameter.name).upper()]
            if parameter.param_type_name == "option":
                names = [*sorted(parameter.opts, key=len, reverse=True), *parameter.secondary_opts]
            default = parameter.default
            if isinstance(default, bool):  # a pair says by its own names which one holds
                default = names[not default] if parameter.secondary_opts else None
            text = (parameter.help or "").replace("|", "\\|")
            shown = ", ".join(f"`{name}`" for name in names)
            rows.append(f"| {shown} | {text} | {'' if default is None else f'`{default}`'} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)
