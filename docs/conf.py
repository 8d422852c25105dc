"Sphinx settings of the site; `make_site.py` writes the pages that it reads."
import html

project = "spectralmoe"
author = copyright = "The spectralmoe authors"
extensions = ["myst_nb"]
html_theme = "furo"
html_title = "spectralmoe"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = html_show_copyright = html_copy_source = False
html_show_search_summary = False  # it fetches pages, which browsers refuse to files
html_permalinks_icon = "#"
pygments_style, pygments_dark_style = "friendly", "monokai"
templates_path = []
exclude_patterns = ["files"]

nb_execution_mode = "off"  # the outputs that are committed
nb_merge_streams = True
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
myst_update_mathjax = False
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]


def mathml(latex, display):
    "An equation as MathML, which browsers draw without scripts."
    from latex2mathml.converter import convert
    return convert(latex, display="block" if display else "inline")


def inline(self, node):
    self.body.append(mathml(node.astext(), False))
    from docutils import nodes
    raise nodes.SkipNode


def block(self, node):
    self.body.append(f'<div class="equation" role="math" aria-label="{html.escape(node.astext(), quote=True)}">{mathml(node.astext(), True)}</div>')
    from docutils import nodes
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))


html_math_renderer = "mathml"
