"""Adapters to and from other libraries' files: one module for each format."""

from shared.interop.exchange import export_adapter as export_adapter
from shared.interop.exchange import import_adapter as import_adapter
