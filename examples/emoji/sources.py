"""The drawing styles of the emoji dataset: pinned packages, whom to credit and under which license."""

from __future__ import annotations

from typing import NamedTuple


class Source(NamedTuple):
    """A drawing style: its pinned npm package, the place of its images, and its credit."""

    style: str
    package: str
    version: str
    sha256: str
    pictures: str  # folder of `<codepoints>.<extension>` files, or an iconify `icons.json`
    author: str
    license: str
    url: str

    @property
    def archive(self) -> str:
        """File name of the tarball that `npm pack` writes."""
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


SOURCES = (
    Source(
        "noto",
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "package/icons.json",
        "Google (Noto Emoji)",
        "Apache-2.0",
        "https://github.com/googlefonts/noto-emoji",
    ),
    Source(
        "twemoji",
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "package/icons.json",
        "Twitter and contributors (Twemoji)",
        "CC-BY-4.0",
        "https://github.com/jdecked/twemoji",
    ),
    Source(
        "fluent",
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        "package/icons.json",
        "Microsoft (Fluent Emoji, color)",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    Source(
        "fluentflat",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "package/icons.json",
        "Microsoft (Fluent Emoji, flat)",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    Source(
        "fluent3d",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "package/assets",
        "Microsoft (Fluent Emoji, 3D), packaged by LobeHub",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    Source(
        "notov1",
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "package/icons.json",
        "Google (Noto Emoji, first version)",
        "Apache-2.0",
        "https://github.com/googlefonts/noto-emoji",
    ),
    Source(
        "emojitwo",
        "@iconify-json/emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "package/icons.json",
        "EmojiTwo contributors",
        "CC-BY-4.0",
        "https://github.com/EmojiTwo/emojitwo",
    ),
    Source(
        "fxemoji",
        "@iconify-json/fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "package/icons.json",
        "Mozilla (Firefox OS Emoji)",
        "Apache-2.0",
        "https://github.com/mozilla/fxemoji",
    ),
    Source(
        "streamline",
        "@iconify-json/streamline-emojis",
        "1.2.4",
        "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
        "package/icons.json",
        "Streamline (Streamline Emojis)",
        "CC-BY-4.0",
        "https://github.com/webalys-hq/streamline-vectors",
    ),
)
# Its emoji.json names every emoji: short name, category, skin tones. Its pictures are too small to use.
CATALOG_SOURCE = Source(
    "catalog",
    "emoji-datasource-google",
    "16.0.0",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "package/emoji.json",
    "Cal Henderson (emoji-data)",
    "MIT",
    "https://github.com/iamcal/emoji-data",
)
