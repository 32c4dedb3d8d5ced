"""Imports whose own deprecated calls are not ours to mend, before warnings become errors."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # typer asks click for what click 9 will drop
    import flwr.app  # noqa: F401
    import typer  # noqa: F401
