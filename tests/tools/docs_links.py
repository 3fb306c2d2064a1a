"""A hook of mkdocs: links from docs/ to other files of the checkout lead to the repository.

The same Markdown is read on a git forge, where `../examples/quickstart.yaml` works as it is.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

_LOG = logging.getLogger("mkdocs.hooks.docs_links")
_CODE_OR_LINK = re.compile(r"^```.*?^```|`[^`\n]*`|\]\((?P<target>\.\./[^)\s]*)\)", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page, with each link out of docs/ replaced by the repository's address of that file."""
    docs = Path(config.docs_dir).resolve()
    checkout = docs.parent

    def replace(match: re.Match[str]) -> str:
        target = match["target"]
        if target is None:
            return match[0]
        name, mark, anchor = target.partition("#")
        path = (docs / page.file.src_uri).parent.joinpath(name).resolve()
        if path.is_relative_to(docs):
            return match[0]
        if not path.exists():
            _LOG.warning("%s: the link '%s' leads to no file; correct its path", page.file.src_uri, target)
        kind = "tree" if path.is_dir() else "blob"
        repository = str(config.repo_url).rstrip("/")
        return f"]({repository}/{kind}/main/{path.relative_to(checkout)}{mark}{anchor})"

    return _CODE_OR_LINK.sub(replace, markdown)
