# SPDX-License-Identifier: Apache-2.0
"""The README as a package index shows it, where links to files beside it lead nowhere: they lead to
`[project.urls] Source` of pyproject.toml, and are plain words as long as it names none."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)\s]+)\)")


def alone(text: str, source: str | None) -> str:
    """The text without links to files beside it. source: the page of the repository."""

    def link(found: re.Match[str]) -> str:
        picture, words, file = found.groups()
        if source is None:
            return "" if picture else words
        return f"{picture}[{words}]({source}/{'raw' if picture else 'blob'}/main/{file})"

    return LINK.sub(link, text)


class FrontPage(MetadataHookInterface):
    def update(self, metadata: dict) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        source = metadata.get("urls", {}).get("Source")
        metadata["readme"] = {"content-type": "text/markdown", "text": alone(text, source)}
