"""Make links to files of the checkout work on the site, and the search work without a network.

Pages link to files outside docs/ by their relative path, as readers of the checkout need it. On the
site such a file is a page under source/. A Markdown file is shown as it is, any other file as code.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

SHIM = '<script src="https://unpkg.com/iframe-worker/shim"></script>'
# The search of the theme runs in a worker, and a browser starts none for a page from file://. There
# the worker's program runs in a frame that has the same two functions.
WORKER = """<script>
if (location.protocol === "file:") window.Worker = class extends EventTarget {
  constructor(url) {
    super();
    const frame = document.createElement("iframe");
    frame.hidden = true;
    document.body.append(frame);
    this.scope = frame.contentWindow;
    this.scope.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
    this.ready = new Promise(resolve => {
      const script = frame.contentDocument.createElement("script");
      script.src = url;
      script.onload = resolve;
      frame.contentDocument.body.append(script);
    });
  }
  postMessage(data) {
    this.ready.then(() => this.scope.dispatchEvent(new MessageEvent("message", { data })));
  }
  terminate() {}
};
</script>"""
LINK = re.compile(r"(?<=\]\()(?P<path>[\w./-]+)(?=[)#])")
IMAGES = (".svg", ".png")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add each file outside docs/ that a page links to."""
    docs = Path(config.docs_dir)
    waiting = [docs / file.src_uri for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        for path in _linked(waiting.pop()):
            if path in seen or path.is_relative_to(docs):
                continue
            seen.add(path)
            files.append(_added(path, docs, config))
            waiting += [path] if path.suffix == ".md" else []
    return files


def _linked(page: Path) -> Iterator[Path]:
    """The files of the checkout that a page links to."""
    for match in LINK.finditer(page.read_text(encoding="utf-8")):
        path = (page.parent / match["path"]).resolve()
        if path.is_file():
            yield path


def _added(path: Path, docs: Path, config: MkDocsConfig) -> File:
    name = _shown(path, docs)
    if path.suffix in (".md", *IMAGES):
        return File.generated(config, name, abs_src_path=str(path))
    text = path.read_text(encoding="utf-8")
    title = path.relative_to(docs.parent)
    code = f"# {title}\n\n`````{path.suffix[1:]}\n{text}`````\n"
    return File.generated(config, name, content=code)


def _shown(path: Path, docs: Path) -> str:
    """The place on the site of a file of the checkout."""
    if path.is_relative_to(docs):
        return path.relative_to(docs).as_posix()
    name = f"source/{path.relative_to(docs.parent).as_posix()}"
    return name if path.suffix in (".md", *IMAGES) else f"{name}.md"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links between docs/ and the rest of the checkout at their places on the site."""
    docs = Path(config.docs_dir)
    name = page.file.src_uri
    source = docs.parent / name.removeprefix("source/") if "source/" in name else docs / name
    up = "../" * name.count("/")

    def moved(match: re.Match[str]) -> str:
        path = (source.parent / match["path"]).resolve()
        return f"{up}{_shown(path, docs)}" if path.is_file() else match["path"]

    return LINK.sub(moved, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Take out the only script of another host, which the search needs for pages from file://."""
    return output.replace(SHIM, WORKER)


def on_post_template(output_content: str, template_name: str, config: MkDocsConfig) -> str:
    """The same for the page of a wrong address."""
    return output_content.replace(SHIM, WORKER)
