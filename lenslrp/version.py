"""The installed version."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("lenslrp")
except PackageNotFoundError:  # running from a checkout that is not installed
    VERSION = "0+checkout"
