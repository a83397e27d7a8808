"""The documentation site: `make docs` builds it into build/docs, without a network."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import re
import shutil
from importlib.metadata import version as installed_version
from pathlib import Path
from types import FunctionType
from typing import Any
from unittest import mock

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from docutils.utils.math.unichar2tex import uni2tex_table
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

import torchrec_exfm.das
import torchrec_exfm.das.memory
import torchrec_exfm.das.memory_server
import torchrec_exfm.das.memory_sql
import torchrec_exfm.history

project = "torchrec_exfm"
author = "The torchrec_exfm authors"
copyright = author
version = release = installed_version("torchrec-exfm")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the outputs are those that `make notebooks NOTEBOOKS=--write` kept

html_theme = "furo"
html_title = f"torchrec_exfm {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
smartquotes = False  # "--" is an option
html_math_renderer = "mathml"  # the browser's own: the usual ones fetch a script from elsewhere

autodoc_default_options = {"members": True}
autodoc_type_aliases = {"Ints": "numpy.ndarray"}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # a default as it is written, not the address of a lambda
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False

nitpick_ignore_regex = [
    # Types of others, whose pages are elsewhere: links to them need a network to be checked.
    ("py:.*", r"((torch|torchrec|torchx|numpy|concurrent|collections|pathlib|os)\.|nn\.).*"),
    ("py:.*", "Path|Tensor|JaggedTensor|Ints|Floats"),
    # In signatures of public names, and without a page: a type variable; a protocol that is told in
    # words there; rows and files of a window as they are read.
    ("py:class", r"torchrec_exfm\..*\.(BatchT|In|Out|T|Steps|StepInputs|Started|DataFile|Rows)"),
]

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "docs/notebooks"
PAGES = {  # files of other folders, and where they are shown
    "README": "index",
    "benchmarks/README": "benchmarks",
    "benchmarks/QUALITY": "quality",
    "examples/notebooks/README": "index",
    "examples/retrieval/README": "retrieval",
}

PUBLIC = (
    torchrec_exfm,
    torchrec_exfm.functional,
    torchrec_exfm.history,
    torchrec_exfm.das,
    torchrec_exfm.das.memory,
    torchrec_exfm.das.memory_server,
    torchrec_exfm.das.memory_sql,
)

# Classes of which a page shows what a user calls, and not what the package's other modules do.
PARTLY = {"torchrec_exfm.das.memory.Memory", "torchrec_exfm.das.memory.MemoryFormat"}


def setup(app: Sphinx) -> None:
    """Register what the pages need, and the checks."""
    visit_inline, visit_block = (_mathml(as_block) for as_block in (False, True))
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.add_directive("command-help", CommandHelp)
    app.connect("builder-inited", _copy_notebooks)
    app.connect("doctree-read", _dashes)
    app.connect("doctree-read", _link_pages)
    app.connect("missing-reference", _public_name)
    app.connect("env-check-consistency", _check_all_is_there)


class CommandHelp(SphinxDirective):
    """A directive that shows the output of `python -m MODULE COMMAND... --help`."""

    required_arguments = 1
    optional_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Return one literal block."""
        module, *command = " ".join(self.arguments).split()
        printed = io.StringIO()
        with (
            mock.patch.dict(os.environ, {"COLUMNS": "90"}),
            contextlib.redirect_stdout(printed),
            contextlib.suppress(SystemExit),
        ):
            importlib.import_module(f"{module}.__main__").main([*command, "--help"])
        text = printed.getvalue()
        return [nodes.literal_block(text, text, language="none")]


def _mathml(as_block: bool) -> Any:
    def visit(writer: Any, node: nodes.Element) -> None:
        formula = tex2mathml(node.astext().translate(uni2tex_table))
        if as_block:
            block = formula.replace("<math", '<math display="block"', 1)
            formula = f'<div class="math">{block}</div>'
        writer.body.append(formula)
        raise nodes.SkipNode

    return visit


def _copy_notebooks(app: Sphinx) -> None:
    """Copy the notebooks below docs/, as Sphinx reads no page from elsewhere; git ignores them."""
    shutil.rmtree(NOTEBOOKS, ignore_errors=True)
    NOTEBOOKS.mkdir()
    for notebook in (ROOT / "examples/notebooks").glob("*.ipynb"):
        # A link to a neighbour of examples/notebooks is one folder up there, and elsewhere here.
        text = re.sub(r"\]\(\.\./(?!\.\.)", "](../../examples/", notebook.read_text())
        (NOTEBOOKS / notebook.name).write_text(text)


def _link_pages(app: Sphinx, document: nodes.document) -> None:
    """Link to the page that shows a file of another folder."""
    for link in document.findall(pending_xref):
        path = os.path.relpath(os.path.join(app.srcdir, link["reftarget"]), ROOT)
        link["reftarget"] = PAGES.get(path, link["reftarget"])


def _dashes(app: Sphinx, document: nodes.document) -> None:
    """Put a dash between a parameter and its description, as smartquotes would."""
    for text in list(document.findall(nodes.Text)):
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" \N{EN DASH} "))


def _public_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.TextElement
) -> nodes.Element | None:
    """Link the name where a class is defined (torchrec_exfm.heads.Task) to the public one."""
    parts = node.get("reftarget", "").split(".")
    domain = env.domains.python_domain
    for module in PUBLIC:
        for name, *member in (parts[-1:], parts[-2:]):  # a name, or a method of a class
            if name in module.__all__:
                target = ".".join((module.__name__, name, *member))
                arguments = node["refdoc"], app.builder, "obj", target, node, text
                return domain.resolve_xref(env, *arguments)
    return None


def _check_all_is_there(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of public names, and of their methods and properties, that the reference lacks."""
    documented = set(env.domains.python_domain.objects) | {"torchrec_exfm.functional"}
    for module in PUBLIC:
        for name in module.__all__:
            target = f"{module.__name__}.{name}"
            for missing in {target, *_members(target, getattr(module, name))} - documented:
                text = "%s is public, and on no page of docs/"
                logging.getLogger(__name__).warning(text, missing)


def _members(target: str, owner: Any) -> set[str]:
    """Return the full names of a class's own public methods and properties with a docstring."""
    members = vars(owner).items() if inspect.isclass(owner) and target not in PARTLY else ()
    kinds = (FunctionType, classmethod, staticmethod, property)
    return {
        f"{target}.{name}"
        for name, member in members
        if isinstance(member, kinds) and not name.startswith("_") and inspect.getdoc(member)
    }
