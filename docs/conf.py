"""How Sphinx makes the pages of the guides and the docstrings: `sphinx-build -W docs docs/_build`."""

import re

from sphinx.application import Sphinx

import kvmstats_fast

project = "kvmstats_fast"
author = "the kvmstats_fast developers"
release = version = kvmstats_fast.__version__

extensions = ["sphinx.ext.autodoc", "numpydoc", "myst_parser"]
exclude_patterns = ["_build", "examples"]
html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False

myst_heading_anchors = 3  # links from one guide into another name headings

autodoc_default_options = {
    "members": True,
    # Methods that come from a room of their own are the class's; those of Python's own classes are known.
    "inherited-members": "Mapping,Sequence,Exception,BaseException,OSError,IntEnum,Enum,int,str,tuple,object",
    "member-order": "groupwise",
}
autodoc_typehints = "none"  # the sections of the docstrings have types
numpydoc_show_class_members = False  # autodoc has them
numpydoc_xref_param_type = False


def leave_out_internal(_app: Sphinx, _what: str, _name: str, member: object, *_: object) -> bool | None:
    """Leave out a method whose docstring says that it is for other rooms of the package."""
    return True if re.search(r"\bInternal[.:;]", member.__doc__ or "") else None


def setup(app: Sphinx) -> None:
    """Have Sphinx ask."""
    app.connect("autodoc-skip-member", leave_out_internal)
