"""How the page looks: the theme, the style sheet and the templates of its own elements."""

from pathlib import Path

import gradio as gr
from gradio.themes.utils.fonts import LocalFont


PAGE = Path(__file__).parent / "page"
STYLE = PAGE / "style.css"

VERMILION = gr.themes.Color(
    name="vermilion",
    c50="#fff4ef", c100="#ffe5da", c200="#ffc8b3", c300="#ffa382", c400="#fb7a50",
    c500="#e9572b", c600="#d0431b", c700="#ac3415", c800="#862a14", c900="#652213", c950="#3a1108",
)  # fmt: skip

# Fonts that gradio itself serves, so that the page fetches nothing from elsewhere, in the weights whose files hold
# all Latin letters (others are subsets without them).
THEME = gr.themes.Base(
    primary_hue=VERMILION,
    neutral_hue=gr.themes.colors.stone,
    radius_size=gr.themes.sizes.radius_lg,
    font=(LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"),
    font_mono=(LocalFont("IBM Plex Mono", weights=(400, 700)), "ui-monospace", "monospace"),
).set(
    body_background_fill="#faf8f5",
    body_background_fill_dark="#151310",
    block_background_fill="white",
    block_background_fill_dark="#1f1c18",
    block_border_width="1px",
    border_color_primary="#e7e2da",
    border_color_primary_dark="#38332c",
    body_text_color_subdued="*neutral_500",
    body_text_color_subdued_dark="*neutral_400",
    block_info_text_color="*neutral_500",
    block_info_text_color_dark="*neutral_400",
    block_title_text_color="*neutral_700",
    block_title_text_color_dark="*neutral_200",
    button_secondary_background_fill="white",
    button_secondary_background_fill_hover="*primary_50",
    button_secondary_background_fill_dark="#2a2621",
    button_secondary_background_fill_hover_dark="#37322b",
    button_secondary_border_color="*border_color_primary",
    button_border_width="1px",
    block_label_background_fill="transparent",
    block_label_background_fill_dark="transparent",
    block_label_border_width="0px",
    block_title_text_weight="600",
    block_shadow="none",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_dark="*primary_600",
    button_primary_background_fill_hover_dark="*primary_700",
    button_primary_text_color="white",
    input_background_fill="#faf8f5",
    input_background_fill_dark="#161411",
    color_accent="*primary_700",
    slider_color="*primary_600",
)


def template(name: str) -> str:
    """A file of the `page` folder."""
    return (PAGE / name).read_text(encoding="utf-8")
