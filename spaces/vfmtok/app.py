"""
The page: pictures from class labels, with and without guidance, and a look inside the image tokenizer.

Run it with `python app.py`. `VFMTOK_MODEL` names another pipeline, a folder or a repository on the Hub.
"""

import os
from collections.abc import Iterator

import gradio as gr
import PIL.Image

from inspection import decode_tokens, inspect
from model import gpu
from neighbors import EXAMPLES, nearest
from pictures import picture_upload
from sampling import generate_at_once, generate_stepwise
from settings import DEFAULT_LABEL, RANGES, Settings, class_choices, random_seed
from theme import STYLE, THEME, template
from views import comparison_view, generation_view, neighbors_view, page_facts, picture_captions


HISTORY = 24
# Two visitors at a time; who comes later waits in a queue of bounded length.
MODEL_EVENT = {"concurrency_id": "model", "concurrency_limit": 2}
QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
# The first of each class.
FEW_EXAMPLES = list({path.stem.split("_")[0]: path for path in reversed(EXAMPLES)}.values())[::-1]
LINK = """(...values) => {
  const link = new URL(window.location.origin + window.location.pathname);
  %s.forEach((name, index) => link.searchParams.set(name, values[index]));
  window.history.replaceState(null, "", link);
  navigator.clipboard?.writeText(link.href).catch(() => {});
  return link.href;
}""" % ["label", *RANGES]


# ---------------------------------------------------------------------------------------------------------------
# What the page asks for


@gpu
def generate(
    label: str, images: int, seed: int, temperature: float, top_k: int, top_p: float, guidance: float, history: list
) -> Iterator[tuple]:
    """Pictures of a class, while they grow; at the end also the gallery, newest first."""
    settings = Settings.checked(
        label, images=images, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance
    )
    for generation in generate_stepwise(settings):
        yield generation_view(settings, generation), gr.skip(), gr.skip()
    pictures = list(zip(generation.pictures, picture_captions(settings), strict=True))
    history = (pictures + history)[:HISTORY]
    yield generation_view(settings, generation), history, history


@gpu
def compare(label: str, images: int, seed: int, guidance: float) -> dict:
    """The same class and seeds without and with guidance."""
    plain = Settings.checked(label, images=images, seed=seed)
    guided = Settings.checked(label, images=images, seed=seed, guidance=guidance)
    return comparison_view(plain, generate_at_once(plain), guided, generate_at_once(guided))


@gpu
def look_inside(picture: PIL.Image.Image | None) -> dict | None:
    """A picture's tokens, what each looks at, and the reconstruction."""
    return None if picture is None else inspect(picture)


@gpu
def decode(image_tokens: list[int]) -> str:
    """The picture of all tokens of a grid, row by row, as a `data:` URL."""
    return decode_tokens(image_tokens)


@gpu
def decode_edit(event: gr.EventData) -> dict:
    """The picture of tokens that were changed on the page."""
    return gr.update(edited=decode_tokens(event.tokens))


@gpu
def find_nearest(picture: PIL.Image.Image | None) -> dict | None:
    """The nearest examples of a picture."""
    return None if picture is None else neighbors_view(nearest(picture))


def first_picture(picture: PIL.Image.Image | None) -> str | dict:
    """An example, unless there is a picture."""
    return str(FEW_EXAMPLES[-3:][0]) if picture is None else gr.skip()


def chosen_example(event: gr.SelectData) -> str:
    """The example that was clicked."""
    return str(EXAMPLES[event.index])


def settings_of_link(request: gr.Request) -> list:
    """The form's values from the page's address."""
    return Settings.from_link(dict(request.query_params)).values()


# ---------------------------------------------------------------------------------------------------------------
# The page


def number_slider(name: str, label: str, **settings) -> gr.Slider:
    """A slider over the range that `settings.py` allows."""
    low, high, step = RANGES[name]
    value = getattr(Settings(DEFAULT_LABEL), name)
    return gr.Slider(low, high, **{"value": value, "step": step, "label": label, **settings})


def class_picker() -> gr.Dropdown:
    """Classes by name, with search. It takes any text, so that a wrong one meets our message and not a list of all."""
    return gr.Dropdown(
        class_choices(), value=DEFAULT_LABEL, label="Class", info="Type to search.", allow_custom_value=True
    )


def seed_with_dice() -> gr.Number:
    """A number and the button that throws another."""
    low, high, _ = RANGES["seed"]
    with gr.Row(elem_classes="vt-seed"):
        seed = gr.Number(0, label="Seed", minimum=low, maximum=high, precision=0, min_width=120)
        dice = gr.Button("🎲", elem_classes="vt-dice", min_width=52, scale=0)
    dice.click(random_seed, outputs=seed, **QUIET)
    return seed


def generate_tab(page: gr.Blocks) -> None:
    """Form, growing pictures, gallery. The page's address fills the form."""
    with gr.Tab("Generate"), gr.Row():
        with gr.Column(scale=2, min_width=300):
            label = class_picker()
            images = number_slider("images", "Pictures")
            seed = seed_with_dice()
            guidance = number_slider("guidance", "Guidance", info="1 is off: one pass a token, as the model is meant.")
            with gr.Accordion("Sampling", open=False):
                temperature = number_slider("temperature", "Temperature")
                top_k = number_slider("top_k", "Top-k", info="0 is off.")
                top_p = number_slider("top_p", "Top-p", info="1 is off.")
            with gr.Row():
                start = gr.Button("Generate", variant="primary", scale=2, min_width=120)
                stop = gr.Button("Stop", min_width=80)
            link = gr.Textbox(
                label="Link to these settings", buttons=["copy"], interactive=False, visible=False, elem_id="link"
            )
            share = gr.Button("Copy a link to these settings", size="sm")
        with gr.Column(scale=4, min_width=300):
            sheet = gr.HTML(html_template=template("generation.html"), js_on_load=None, elem_id="generation")
            gallery = gr.Gallery(
                label="Generated so far", format="png", height="auto", object_fit="contain", show_label=False,
                container=False, buttons=["download", "fullscreen"], interactive=False,
                elem_classes="vt-gallery vt-generated",
            )  # fmt: skip
    history = gr.State([], time_to_live=3600)
    form = [label, images, seed, temperature, top_k, top_p, guidance]
    generation = start.click(
        generate, [*form, history], [sheet, gallery, history], show_progress="hidden", **MODEL_EVENT
    )
    stop.click(None, cancels=generation)
    share.click(None, form, link, js=LINK).then(lambda: gr.update(visible=True), outputs=link, **QUIET)
    # In the queue, for warnings reach the page only from there.
    page.load(settings_of_link, outputs=form, show_progress="hidden", api_visibility="private")


def guidance_tab() -> None:
    """The same seeds without and with guidance, beside each other."""
    with gr.Tab("Guidance"), gr.Row():
        with gr.Column(scale=2, min_width=300):
            label = class_picker()
            images = number_slider("images", "Pictures", value=1)
            seed = seed_with_dice()
            guidance = number_slider("guidance", "Guidance of the second side", value=2)
            start = gr.Button("Generate both", variant="primary")
        with gr.Column(scale=4, min_width=300):
            sides = gr.HTML(html_template=template("comparison.html"), js_on_load=None, elem_id="comparison")
    start.click(compare, [label, images, seed, guidance], sides, show_progress="minimal", **MODEL_EVENT)


def inspector_tab() -> None:
    """An upload and the view of `page/inspector.js`, which edits tokens by itself and has them decoded here."""
    with gr.Tab("Inside") as tab, gr.Row():
        with gr.Column(scale=2, min_width=260):
            picture = picture_upload(height=240, elem_classes="vt-upload", elem_id="inspected")
            gr.Examples(
                [[str(path)] for path in FEW_EXAMPLES], picture, label="Examples", examples_per_page=20,
            )  # fmt: skip
        with gr.Column(scale=5, min_width=320):
            inspector = gr.HTML(
                html_template=template("inspector.html"), js_on_load=template("inspector.js"), edited=None
            )
    tab.select(first_picture, picture, picture, **QUIET)
    picture.change(look_inside, picture, inspector, show_progress="minimal", **MODEL_EVENT)
    inspector.input(
        decode_edit, outputs=inspector, show_progress="hidden", trigger_mode="always_last", api_visibility="private",
        **MODEL_EVENT,
    )  # fmt: skip


def nearest_tab() -> None:
    """An upload or an example, and its neighbors."""
    with gr.Tab("Nearest") as tab, gr.Row():
        with gr.Column(scale=2, min_width=260):
            picture = picture_upload(height=240, elem_classes="vt-upload", elem_id="query")
            gallery = gr.Gallery(
                EXAMPLES, label="Examples", show_label=False, container=False, height="auto", allow_preview=False,
                interactive=False, object_fit="contain", buttons=[], elem_classes="vt-gallery vt-pool",
            )  # fmt: skip
        with gr.Column(scale=5, min_width=320):
            neighbors = gr.HTML(html_template=template("neighbors.html"), js_on_load=None, elem_id="neighbors")
    tab.select(first_picture, picture, picture, **QUIET)
    gallery.select(chosen_example, outputs=picture, **QUIET)
    picture.change(find_nearest, picture, neighbors, show_progress="minimal", **MODEL_EVENT)


def build_page() -> gr.Blocks:
    """All of it. Files of visitors are deleted after an hour."""
    gr.set_static_paths(EXAMPLES[0].parent)
    with gr.Blocks(title="VFMTok", delete_cache=(600, 3600), analytics_enabled=False) as page:
        gr.HTML(page_facts(), html_template=template("header.html"), js_on_load=None)
        generate_tab(page)
        guidance_tab()
        inspector_tab()
        nearest_tab()
        gr.api(decode, **MODEL_EVENT)
    return page.queue(max_size=32)


if __name__ == "__main__":
    # Newer releases of gradio would keep what visitors do in their browsers; older ones have no such argument of launch.
    os.environ.setdefault("GRADIO_RUN_HISTORY", "False")
    build_page().launch(
        theme=THEME, css_paths=STYLE, max_file_size="10mb", footer_links=["api", "gradio"]
    )  # fmt: skip
