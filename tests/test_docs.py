"""The documentation: its links, its commands, and the site that ``make docs`` builds from it."""

from __future__ import annotations

import ast
import html.parser
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer

import tilewise
import tilewise.nn
from tilewise.cli import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted(DOCS.rglob("*.md"))

FENCE = re.compile(r"^(`{3,})(\w*)[^\n]*\n(.*?)^\1[ ]*$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
ELSEWHERE = re.compile(r"https?:|mailto:")
OBJECT = re.compile(r"^::: (\S+)", re.MULTILINE)

COMMANDS = typer.main.get_command(app).commands

needs_mkdocs = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings")),
    reason='the site needs mkdocs-material and mkdocstrings-python (pip install ".[docs]")',
)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What a link to this page may name, as code hosting sites and the site's slugify make it."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.+?)\s*#*$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    slugs = {
        slug if n == 0 else f"{slug}-{n}" for slug, top in found.items() for n in range(top + 1)
    }
    return slugs | set(OBJECT.findall(prose(page)))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for found in LINK.finditer(INLINE.sub("", prose(page))):
        link = found[1] or found[2]
        if ELSEWHERE.match(link):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        assert target.exists(), f"{link}: there is no {path}"
        assert target.is_relative_to(ROOT), f"{link}: outside the repository"
        if anchor:
            assert target.suffix == ".md", f"{link}: only pages have anchors"
            assert anchor in anchors(target), f"{link}: {path} has {sorted(anchors(target))}"


def shell_lines(page: Path) -> Iterator[list[str]]:
    """The commands in a page's shell blocks, each as its words."""
    text = page.read_text(encoding="utf-8")
    blocks = [block for _, language, block in FENCE.findall(text) if language == "sh"]
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        for command in line.split(" && "):
            words = shlex.split(command, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words:
                yield words


def mentioned(page: Path) -> Iterator[list[str]]:
    """Commands in running text; their options may lack a value there."""
    for code in INLINE.findall(prose(page)):
        if re.match(r"(tilewise|make) [a-z]", code):
            yield shlex.split(code)


def targets() -> set[str]:
    return set(
        re.findall(r"^([a-z-]+)(?: [a-z -]+)?:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page):
    """Each is parsed as the shell would hand it over; what it would do is tested elsewhere."""
    for program, *arguments in shell_lines(page):
        if program.endswith("tilewise"):
            assert arguments, f"{page}: tilewise without a command"
            if arguments[0].startswith("-"):
                continue
            assert arguments[0] in COMMANDS, f"there is no tilewise {arguments[0]}"
            COMMANDS[arguments[0]].make_context(arguments[0], arguments[1:])
        elif program == "make":
            named = [argument for argument in arguments if "=" not in argument]
            assert set(named) <= targets(), f"make {arguments}: no such target"
        elif Path(program).name.startswith("python"):
            files = [argument for argument in arguments if argument.endswith(".py")]
            assert all((ROOT / file).exists() for file in files), f"{arguments}: no such file"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_mentioned_commands_exist(page):
    for program, command, *arguments in mentioned(page):
        if program == "make":
            assert command in targets(), f"make {command}: no such target"
            continue
        assert command in COMMANDS, f"there is no tilewise {command}"
        known = {option for found in COMMANDS[command].params for option in found.opts}
        known |= {option for found in COMMANDS[command].params for option in found.secondary_opts}
        used = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        assert used <= known | {"--help"}, f"tilewise {command} has no {used - known}"


def test_commands_are_found_at_all():
    """What the tests above would not notice: that they read nothing."""
    readme = ROOT / "README.md"
    assert ["tilewise", "compare", "--memory-model"] in list(shell_lines(readme))
    assert ["make", "docs"] in list(mentioned(readme))
    assert {"docs", "test", "fast", "sanitize-threads"} <= targets()
    with pytest.raises(Exception, match="No such option"):
        COMMANDS["trace"].make_context("trace", ["--q-length", "8"])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_languages_of_code_are_those_that_tests_read(page):
    """A block in ``py`` or ``bash`` would be run by no test."""
    languages = {language for _, language, _ in FENCE.findall(page.read_text(encoding="utf-8"))}
    assert languages <= {"", "python", "sh", "text"}


def documented() -> list[str]:
    pages = sorted((DOCS / "reference").glob("*.md"))
    return [found for page in pages for found in OBJECT.findall(page.read_text(encoding="utf-8"))]


def exports(path: Path) -> list[str]:
    """``__all__`` of a file, which need not be importable here."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def public_modules() -> Iterator[tuple[str, list[str]]]:
    yield "tilewise", tilewise.__all__
    yield "tilewise.masks", tilewise.masks.__all__
    yield "tilewise.nn", tilewise.nn.__all__
    source = Path(tilewise.__file__).parent
    for path in sorted((source / "compat").rglob("*.py")):
        if names := exports(path):
            parts = path.relative_to(source).with_suffix("").parts
            yield ".".join(["tilewise", *(part for part in parts if part != "__init__")]), names


def resolve(dotted: str) -> object:
    """The object itself, so that a name which two modules share counts once."""
    module, _, last = dotted.rpartition(".")
    return getattr(importlib.import_module(module), last)


@pytest.mark.parametrize("module", dict(public_modules()))
def test_every_public_name_is_in_the_reference(module):
    names = dict(public_modules())[module]
    if module.rpartition(".")[2] in ("transformers", "thunder"):  # they need their library
        missing = {f"{module}.{name}" for name in names} - set(documented())
        assert not missing
        return
    shown = [resolve(dotted) for dotted in documented() if not re.search("transf|thunder", dotted)]
    for name in names:
        thing = resolve(f"{module}.{name}")
        if inspect.isfunction(thing) or inspect.isclass(thing):
            assert any(thing is other for other in shown), f"docs/reference: no ::: {module}.{name}"


def test_every_public_name_is_documented_once():
    assert len(documented()) == len(set(documented())) > 80


class Page(html.parser.HTMLParser):
    """What a page of the site refers to, what it loads, and the anchors that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.anchors |= {values[key] for key in ("id", "name") if key in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in ("script", "img", "iframe", "source") and "src" in values:
            self.loads.append(values["src"])
        elif tag == "link" and values.get("rel") not in ("prev", "next"):
            self.loads.append(values.get("href", ""))


def build(folder: Path) -> dict[Path, Page]:
    """The pages of the site, built into a folder; a warning is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return {path: Page(path) for path in folder.rglob("*.html")}


def site_has_every_page(site: Path, built: dict[Path, Page]) -> None:
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS)).with_suffix(".html") in built
    assert site / "changelog.html" in built
    assert site / "contributing.html" in built
    assert site / "code" / "src" / "tilewise" / "backends" / "tiled.py.html" in built


def links_within_the_site_lead_somewhere(site: Path, built: dict[Path, Page]) -> None:
    count = 0
    for path, page in built.items():
        for link in page.links:
            if ELSEWHERE.match(link) or path.name == "404.html":
                continue
            place, _, anchor = link.partition("#")
            target = Path(os.path.normpath(path.parent / place)) if place else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_relative_to(site), f"{path}: {link} leaves the site"
            assert target.exists(), f"{path}: {link}"
            if anchor and target in built and target.name != "recording.html":
                assert anchor in built[target].anchors | {"__skip"}, f"{path}: {link}"
            count += 1
    assert count > 1000


def site_loads_nothing_from_elsewhere(site: Path, built: dict[Path, Page]) -> None:
    for path, page in built.items():
        for load in page.loads:
            assert not re.match(r"(?!data:)[a-z]+:|//", load), f"{path} loads {load}"
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.search(r"url\([\"']?(https?:|//)|@import", text), style


def site_shows_every_name_and_its_arguments(site: Path, built: dict[Path, Page]) -> None:
    everything = {anchor for page in built.values() for anchor in page.anchors}
    assert set(documented()) <= everything
    page = (site / "reference" / "attention.html").read_text(encoding="utf-8")
    for argument in inspect.signature(tilewise.attention).parameters:
        assert re.search(rf"<b>(<code>)?[^<]*\b{argument}\b", page), argument


def site_shows_every_command_and_option(site: Path, built: dict[Path, Page]) -> None:
    text = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    for command, found in COMMANDS.items():
        assert f'id="tilewise-{command}"' in text
        for option in (o for p in found.params for o in (*p.opts, *p.secondary_opts)):
            shown = option if option.startswith("-") else option.upper()
            assert f"<code>{shown}</code>" in text, (command, option)


def site_plays_the_recording(site: Path, built: dict[Path, Page]) -> None:
    assert "32 queries, 32 keys, head_dim 8" in (site / "learn" / "recording.html").read_text()
    assert built[site / "learn" / "trace.html"].links.count("recording.html") == 2


@needs_mkdocs
def test_site(tmp_path):
    """One test, since processes that share the tests would each build the site for their own."""
    built = build(tmp_path)
    for check in (
        site_has_every_page,
        links_within_the_site_lead_somewhere,
        site_loads_nothing_from_elsewhere,
        site_shows_every_name_and_its_arguments,
        site_shows_every_command_and_option,
        site_plays_the_recording,
    ):
        check(tmp_path, built)


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_mkdocs
def test_patterns_of_the_navigation_stand_for_what_is_named_nowhere_else():
    expanded = tool("docs_site")._expanded(
        [{"Home": "index.md"}, {"A": ["a/index.md", "a/*.md"]}, "*.md", "none/*.md"],
        ["a/one.md", "a/two.md", "b/one.md", "other.md"],
    )
    assert expanded[0] == {"Home": "index.md"}
    assert expanded[1] == {"A": ["a/index.md", "a/one.md", "a/two.md"]}
    assert expanded[2:] == ["other.md"]


@needs_mkdocs
def test_links_out_of_the_docs_are_made_anew():
    site = tool("docs_site")

    class Here:
        def __init__(self, path: str) -> None:
            self.file = self
            self.src_uri = path

    def made(path: str, text: str) -> str:
        return site.on_page_markdown(text, Here(path), None, None)

    tiled = "src/tilewise/backends/tiled.py"
    assert made("learn/x.md", f"[a](../../{tiled})") == f"[a](../code/{tiled}.md)"
    assert made("index.md", "[a](../CONTRIBUTING.md#x)") == "[a](contributing.md#x)"
    assert made("contributing.md", "[a](docs/design.md#words)") == "[a](design.md#words)"
    for same in ("`[a](../README.md)`", "```text\n[a](../README.md)\n```\n", "[a](learn/io.md)"):
        assert made("index.md", same) == same
    assert made("index.md", "[a](https://x.org) [b](../none.py)") == (
        "[a](https://x.org) [b](../none.py)"
    )


@needs_mkdocs
def test_lists_of_names_in_docstrings_become_one_line():
    plain = tool("docs_docstrings").plain
    docstring = "Args:\n    a, b,\n        c: none.\n    d: of\n        two, lines: yes.\n"
    joined = "Args:\n    a, b, c: none.\n    d: of\n        two, lines: yes.\n"
    assert plain(docstring) == joined
    assert plain("See :class:`~x.Y`, not `z`.") == "See `x.Y`, not `z`."
