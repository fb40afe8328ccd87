"""Variants as models that need no ppcl: a diffusers folder, or one file in the layout of the family's release."""

from ppcl.export.diffusers_folder import export_folder
from ppcl.export.single_file import check_export, export_file

__all__ = ["check_export", "export_file", "export_folder"]
