#!/usr/bin/env python3
"""What `make docs` adds to mkdocs, as its hook; --filter FILE is doxygen's filter of headers.

The pages in docs/ are plain Markdown whose links work in the repository. The site also has the
README as its first page, HACKING.md, CHANGELOG.md, a page for every other file that a page
links to, and the reference pages.
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADERS = ROOT / "build" / "doxygen" / "html"
TOP_PAGES = {"README.md": "index.md", "HACKING.md": "hacking.md", "CHANGELOG.md": "changes.md"}

PYTHON_PAGES = {
    "api/heed.md": ["heed.attention"],
    "api/transformers.md": ["heed.transformers"],
    "api/flash_api.md": ["heed.flash_api"],
    "api/sdpa.md": ["heed.sdpa"],
}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")
FENCE = re.compile(r"^```.*?^```", re.M | re.S)
LANGUAGES = {".cpp": "cpp", ".hpp": "cpp", ".cuh": "cpp", ".c": "c", ".h": "c", ".py": "python"}


# ---- the site ----


def on_files(files, config):
    from mkdocs.structure.files import File

    pages = {uri: ROOT / path for path, uri in TOP_PAGES.items()}
    pages |= {f.src_uri: Path(f.abs_src_path) for f in files.documentation_pages()}
    linked = {target for page in pages.values() for target in targets(page.read_text(), page)}
    for path, uri in TOP_PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / path).read_text()))
    for path in sorted(linked):
        if path.is_file() and page_uri(path).startswith("source/"):
            files.append(File.generated(config, page_uri(path), content=source_page(path)))
    for uri, names in PYTHON_PAGES.items():
        title = uri.removeprefix("api/").removesuffix(".md")
        title = "heed" if title == "heed" else f"heed.{title}"
        text = f"# {title}\n\n" + "".join(f"::: {name}\n\n" for name in names)
        files.append(File.generated(config, uri, content=text))
    files.append(File.generated(config, "api/headers.md", content=headers_page()))
    for path in sorted(HEADERS.rglob("*")):
        if path.is_file():
            uri = f"api/cpp/{path.relative_to(HEADERS).as_posix()}"
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    source = ROOT / next(
        (path for path, uri in TOP_PAGES.items() if uri == page.file.src_uri),
        f"docs/{page.file.src_uri}",
    )
    folder = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = (source.parent / match[1]).resolve()
        return posixpath.relpath(page_uri(target), folder or ".")

    if source.exists():
        markdown = outside_code(markdown, lambda text: LINK.sub(moved, text))
    return re.sub(r"^<!-- (?:table: .*|end) -->$", "", markdown, flags=re.M)


def outside_code(markdown: str, change) -> str:
    fences = FENCE.findall(markdown)
    texts = [change(text) for text in FENCE.split(markdown)]
    return texts[0] + "".join(f + t for f, t in zip(fences, texts[1:], strict=True))


def targets(markdown: str, page: Path) -> Iterator[Path]:
    """Files of the repository that a page links to."""
    for match in LINK.finditer(FENCE.sub("", markdown)):
        yield (page.parent / match[1]).resolve()


def page_uri(path: Path) -> str:
    """Where the site has a file of the repository."""
    inside = path.relative_to(ROOT).as_posix()
    if inside in TOP_PAGES:
        return TOP_PAGES[inside]
    return inside.removeprefix("docs/") if inside.startswith("docs/") else f"source/{inside}.md"


def source_page(path: Path) -> str:
    name = path.relative_to(ROOT).as_posix()
    return f"# {name}\n\n```{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}```\n"


def headers_page() -> str:
    lines = ["# C++ and C headers", "", "| header | |", "|---|---|"]
    for path in sorted((ROOT / "include" / "heed").iterdir()):
        page = re.sub(r"[._]", lambda m: {".": "_8", "_": "__"}[m[0]], path.name) + ".html"
        about = re.match(r"(?://|/\*) (.*)", path.read_text())[1]
        lines.append(f"| [`<heed/{path.name}>`](cpp/{page}) | {about} |")
    lines += ["", "[Every name](cpp/globals.html), [every class](cpp/annotated.html)."]
    return "\n".join(lines) + "\n"


# ---- headers for doxygen ----


def filtered(text: str) -> str:
    return c_comments(text) if "/*" in text.partition("\n")[0] else line_comments(text)


def line_comments(text: str) -> str:
    """// becomes /// before what it documents, ///< behind it. Indented lines become code."""
    lines: list[str] = []
    behind = -1  # column of the comment behind the last line of code
    for number, line in enumerate(text.splitlines()):
        line = re.sub(r"\s*// NOLINT.*", "", line)
        code, slashes, comment = line.partition("//")
        if not slashes:
            behind = -1
            lines.append(line)
        elif code.strip():
            behind = len(code)
            lines.append(f"{code}///<{comment}")
        elif len(code) == behind:
            lines.append(f"{code}///<{comment}")
        else:
            behind = -1
            if number == 0:
                lines.append("/// @file")
            indented = re.match(r"  +\S", comment)
            if indented and lines[-1].strip().startswith("///") and "     " not in lines[-1]:
                lines.append(f"{code}///")
            if not indented and lines and lines[-1].startswith(f"{code}///     "):
                lines.append(f"{code}///")
            lines.append(f"{code}///{'    ' if indented else ''}{comment}")
    return "\n".join(lines) + "\n"


def c_comments(text: str) -> str:
    text = re.sub(r"^/\* ----.*?\*/$", "", text, flags=re.M | re.S)
    text = re.sub(r"^([ ]*)/\*(?=[ ])", r"\1/**", text, flags=re.M)
    text = re.sub(r"(?<=\S)([ ]+)/\*(?=[ ])", r"\1/**<", text)
    text = re.sub(r"^ \*(?=   )", " *    ", text, flags=re.M)
    return text.replace("/**", "/** @file\n *", 1)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "--filter":
        sys.exit(__doc__)
    sys.stdout.write(filtered(Path(sys.argv[2]).read_text()))
