"""Readers of a hospital's own data: a site's files in, one `common.table.Table` out."""

from client.sources.table import read_table

__all__ = ["read_table"]
