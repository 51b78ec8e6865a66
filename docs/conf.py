"""Sphinx builds the site from these pages and the docstrings: `sphinx-build -W docs site`."""

import importlib
import inspect
import pydoc
import re
import zlib
from pathlib import Path

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.addnodes import pending_xref
from sphinx.util import logging

import kljax
from kljax._pipeline import OPTIONS

HERE = Path(__file__).parent
REPOSITORY = "https://github.com/kljax/kljax"

project = "kljax"
author = "the kljax authors"
copyright = author
release = kljax.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = f"kljax {kljax.__version__}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sourcelink = False
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
}
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
default_role = "py:obj"
nitpicky = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True


# --- names of other projects: their addresses, so that a build needs no network ---


def _inventory(project: str) -> Path:
    """Written from a list of `name role address`, as Sphinx reads it."""
    lines = (HERE / "inventories" / f"{project}.txt").read_text().splitlines()
    objects = "".join(f"{name} {role} 1 {page} -\n" for name, role, page in map(str.split, lines))
    head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
    head += "# The remainder of this file is compressed using zlib.\n"
    out = HERE / "_build" / f"{project}.inv"
    out.parent.mkdir(exist_ok=True)
    out.write_bytes(head.encode() + zlib.compress(objects.encode()))
    return out


intersphinx_mapping = {
    project: (address, str(_inventory(project)))
    for project, address in {
        "jax": "https://docs.jax.dev/en/latest/",
        "optax": "https://optax.readthedocs.io/en/latest/",
        "flax": "https://flax.readthedocs.io/en/stable/",
    }.items()
}


# --- mathematics as MathML: no script, nothing from elsewhere ---


def _inline(self, node):
    self.body.append(_mathml(node, ""))
    raise nodes.SkipNode


def _block(self, node):
    self.body.append(f'<div class="math">{_mathml(node, "block")}</div>')
    raise nodes.SkipNode


def _mathml(node: nodes.Element, display: str) -> str:
    return "".join(latex2mathml.tex2mathml(node.astext(), as_block=bool(display)))


# --- signatures: what a function has of its own, and **options for what all have ---


def _short(app, what, name, obj, options, signature, returns):
    if not callable(obj):
        return None
    try:
        parameters = list(inspect.signature(obj).parameters.values())
    except (TypeError, ValueError):
        return None
    parameters = [p for p in parameters if p.name != "self"]
    shared = [p for p in parameters if p.name in OPTIONS]
    if len(shared) > 5:
        parameters = [
            p for p in parameters if p not in shared or p.default != OPTIONS[p.name].default
        ]
        rest = inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)
        parameters = [p for p in parameters if p.kind is not p.VAR_KEYWORD] + [rest]
    plain = [p.replace(annotation=p.empty, default=_by_name(p.default)) for p in parameters]
    return str(inspect.Signature(plain)), None


def _paragraphs(app, what, name, obj, options, lines):
    """Shapes, Zeros, Gradients, Source: each a paragraph of its own."""
    out = []
    for line in lines:
        label = re.match(r"(Shapes|Zeros|Gradients|Source)[a-z, ]*: ", line)
        out += ["", f"**{label[0].strip()}** {line[label.end() :]}"] if label else [line]
    lines[:] = out


class _Name(str):
    __repr__ = str.__str__


def _by_name(default):
    return _Name(default.__name__) if inspect.isfunction(default) else default


# --- `kljax.forward_kl` in the text is a link to it ---

_MODULES = ("kljax", "kljax.families", "kljax.metrics", "kljax.training")
_PUBLIC = {
    f"{module}.{name}"
    for module in _MODULES
    for name, it in vars(importlib.import_module(module)).items()
    if not name.startswith("_") and not inspect.ismodule(it)
}


_OTHERWISE = {"agreement", "divergence", "kl", "reduce"}  # names of arguments and fields, too


def _target(called: str) -> str | None:
    """In full, of what may be called without its module."""
    if re.fullmatch(r"(jax|optax|nnx|flax)\.[\w.]+", called):
        return f"flax.{called}" if called.startswith("nnx.") else called
    names = (called, f"kljax.{called}", *(f"{module}.{called}" for module in _MODULES))
    return next((name for name in names if name in _PUBLIC), None)


def _link(app, doctree):
    for link in doctree.findall(pending_xref):
        if link["refdomain"] == "py":
            link["reftarget"] = _target(link["reftarget"]) or link["reftarget"]
    for literal in list(doctree.findall(nodes.literal)):
        if isinstance(literal.parent, pending_xref | nodes.reference | nodes.title):
            continue
        called = literal.astext().removesuffix("()")
        if re.fullmatch(r"kljax(\.\w+)+", called) and pydoc.locate(called) is None:
            logging.getLogger(__name__).warning("there is no %s", called, location=literal)
        if re.fullmatch(r"examples/\w+\.py", called):
            link = nodes.reference("", "", refuri=f"{REPOSITORY}/blob/main/{called}")
            literal.replace_self(link)
            link += literal
        elif called not in _OTHERWISE and (target := _target(called)):
            link = pending_xref("", refdomain="py", reftype="obj", reftarget=target)
            link["refexplicit"], link["refdoc"] = True, app.env.current_document.docname
            literal.replace_self(link)
            link += literal


def setup(app):
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("autodoc-process-signature", _short)
    app.connect("autodoc-process-docstring", _paragraphs)
    app.connect("doctree-read", _link)
